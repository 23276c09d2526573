"""`train.py --data-loader grain`: epochs of shuffled windows, the same for any processes and after a resume."""

import sys
from pathlib import Path

import numpy as np
import pytest

from moe_train import loop
from moe_train.data import windows
from moe_train.data.windows import Windows, check_loader

TOKENS = np.arange(203, dtype=np.uint16)  # 20 windows of 10 tokens, and two left over


def test_without_grain_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "find_spec", lambda name: None)
    check_loader("positions")
    with pytest.raises(ValueError, match=r"^data_loader='grain': must be left out .* 'jax-moe\[data\]'`$"):
        check_loader("grain")


@pytest.fixture
def grain() -> None:
    pytest.importorskip("grain", reason="needs the extra 'data': grain")


@pytest.mark.usefixtures("grain")
def test_an_epoch_has_every_window_once_in_an_order_of_its_own() -> None:
    read = Windows(TOKENS, 1, 4, 10, 15, None)
    batches = [read.batch(step) for step in range(15)]
    assert all(batch.shape == (4, 11) and batch.dtype == np.int32 for batch in batches)
    assert all((np.diff(batch) == 1).all() for batch in batches)
    epochs = np.concatenate([batch[:, 0] for batch in batches]).reshape(3, 20) // 10
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs.tolist())
    assert len(set(map(tuple, epochs.tolist()))) == 3
    assert epochs[0, :8].tolist() == [10, 5, 7, 3, 8, 18, 9, 2], "Grain keeps this order across its versions"
    assert not np.array_equal(Windows(TOKENS, 2, 4, 10, 15, None).batch(0), batches[0])
    for step in (7, 8, 3):  # as a resumed run begins
        np.testing.assert_array_equal(read.batch(step), batches[step])
    shares = [Windows(TOKENS, 1, 4, 10, 15, np.array(rows)) for rows in ([0, 1], [2, 3])]
    both = np.concatenate([share.batch(6) for share in shares])
    np.testing.assert_array_equal(both, batches[6])
    read.close()
    with pytest.raises(StopIteration):
        Windows(TOKENS, 1, 4, 10, 15, None).batch(15)


@pytest.mark.usefixtures("grain", "quick")
def test_a_resumed_run_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps, and three that are resumed to six, give the same weights."""
    monkeypatch.chdir(tmp_path)
    np.save("tokens.npy", TOKENS % 7)
    settings = (
        "--data tokens.npy --eval-every 3 --eval-batches 1 --batch-size 4 --num-layers 1 --model-dim 8 --num-heads 2 "
        "--num-experts 2 --block-size 4 --decay none --warmup-steps 0 --sample-length 1 --data-loader grain --steps"
    )
    words = settings.split()

    def train(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train/train.py", *more])
        assert loop.main() == 0

    train(*words, "6", "--out", "whole")
    train(*words, "3", "--out", "parts")
    train("--resume", "--out", "parts", "--steps", "6")
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "parts/model.safetensors").read_bytes()
