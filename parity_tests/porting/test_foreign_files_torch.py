"""`.pt` files of other projects, and hostile files."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="writes .pt files")

from jax_moe.porting.checkpoint import load  # noqa: E402
from jax_moe.porting.formats.state_file import read_state  # noqa: E402
from parity_tests.porting.porting_cases import mixtral_state  # noqa: E402
from parity_tests.porting.test_foreign_files import refused  # noqa: E402

STATE = {name: torch.tensor(value) for name, value in mixtral_state().items()}


@pytest.mark.parametrize("keys", [("state_dict",), ("model_state_dict",), ("model",), ("module", "state_dict")])
def test_a_state_dict_in_a_trainers_dictionary(keys: tuple[str, ...], tmp_path: Path) -> None:
    whole: Any = STATE
    for key in reversed(keys):
        whole = {key: whole, "epoch": 3, "args": {"lr": 1e-3}}
    torch.save(whole, tmp_path / "x.pt")
    found = load(tmp_path / "x.pt").state()
    assert all(np.array_equal(found[name], value) for name, value in mixtral_state().items())


def test_a_small_file_that_says_gigabytes(tmp_path: Path) -> None:
    """A file of 1.6 kB that took 9.7 GiB and 20 s before this check."""
    torch.save({"phi": torch.zeros(1).expand(2 * 10**8, 2, 2)}, tmp_path / "x.pt")
    begin = time.perf_counter()
    assert "says 3,200,000,000 bytes ([200000000, 2, 2]) where 4 are stored" in refused(tmp_path / "x.pt")
    assert time.perf_counter() - begin < 5


def test_many_views_of_one_storage_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_moe import guarded

    shared = torch.zeros(1000, 100)
    torch.save({f"w{i}": shared for i in range(50)}, tmp_path / "x.pt")
    monkeypatch.setattr(guarded, "available_memory", lambda: 10**7)
    assert "needs about 20,000,000 bytes of memory" in refused(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (lambda: torch.zeros(2, device="meta"), "is a meta tensor"),
        (lambda: torch.eye(3).to_sparse(), "w is sparse_coo"),
        (lambda: torch.zeros(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: 3, "not tensors: w"),
    ],
)
def test_tensors_without_plain_numbers(tensor: Any, said: str, tmp_path: Path) -> None:
    torch.save({"w": tensor()}, tmp_path / "x.pt")
    assert said in refused(tmp_path / "x.pt")


def test_a_whole_pickled_module_is_refused_with_the_cure(tmp_path: Path) -> None:
    """makeMoE's own `model.pt`."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    message = refused(tmp_path / "model.pt")
    assert "its pickle holds code or objects" in message and "torch.save(model.state_dict(), FILE)" in message


def test_a_small_expanded_mask_and_a_view_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(3, 4), "b": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "x.pt")
    found = read_state(tmp_path / "x.pt")
    assert found["a"].shape == (3, 4) and found["b"].tolist() == [[0, 3], [1, 4], [2, 5]]
