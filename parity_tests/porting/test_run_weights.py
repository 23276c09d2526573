"""A run of train.py, finished, stopped or killed, makeMoE or fine-tuned, is read by `load` and every command."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import jax_moe
from jax_moe.disk import verify
from jax_moe.porting.families import FAMILIES
from jax_moe.porting.formats.state_file import read_state
from jax_moe.stored import stored_variables
from moe_cli.main import main
from moe_train import loop
from moe_train.configs.settings import flat
from moe_train.options import read_settings
from moe_train.run import checkpoint
from moe_train.run.folder import read_config
from parity_tests.cli.commands import fails, names
from parity_tests.layers.test_stored import BIAS, CONFIG, CORRECTED
from parity_tests.porting.decoder_cases import decoder, weights
from parity_tests.porting.test_load_save import numbers
from parity_tests.shared.compare import MismatchError, check_exact
from parity_tests.shared.filled import filled

pytestmark = pytest.mark.usefixtures("quick")
TEXT = "abcdefghij" * 60
FRESH = (
    "--data text.txt --steps 4 --batch-size 2 --block-size 8 --model-dim 8 --num-heads 2 --num-layers 1 --num-experts 2"
)
SMALL = "--eval-every 4 --eval-batches 1 --checkpoint-every 2 --sample-length 3 --warmup-steps 0 --sample-prompt a"
TUNED = "--pretrained tiny --data tokens.npy --steps 4 --batch-size 2 --block-size 8 --warmup-steps 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of four steps, with checkpoints after steps two and four."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT)
    np.save(folder / "tokens.npy", np.arange(600, dtype=np.uint16) % 11)
    narrow = decoder("mixtral", "bfloat16")
    jax_moe.save_pretrained(narrow, folder / "tiny", model_type="mixtral")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for settings, out in ((FRESH, "fresh"), (TUNED, "tuned")):
            small = SMALL if out == "fresh" else SMALL.replace(" --sample-prompt a", " --sample-prompt 1")
            patch.setattr(sys, "argv", ["train/train.py", *f"{settings} {small} --out {out}".split()])
            assert loop.main() == 0
    return folder


def killed(run: Path, target: Path, step: int = 2) -> Path:
    """The run as left by a kill after that step."""
    shutil.copytree(run, target)
    for name in ("model.safetensors", "sample.txt"):
        (target / name).unlink(missing_ok=True)
    shutil.rmtree(target / "pretrained", ignore_errors=True)
    for later in (target / "checkpoints").iterdir():
        if later.name.split(".")[0].isdigit() and int(later.name.split(".")[0]) > step:
            shutil.rmtree(later) if later.is_dir() else later.unlink()
    return target


def test_a_finished_run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "fresh"
    model = jax_moe.load(run)
    verify(jax_moe.to_torch(model), read_state(run / "model.safetensors"), run)
    assert main(["inspect", str(run)]) == 0
    assert "step 4 of 4 of the run, from model.safetensors" in capsys.readouterr().out
    again = killed(run, tmp_path / "again", step=4)  # died between its last checkpoint and its end: the same weights
    check_exact(numbers(jax_moe.load(again)), numbers(model), "last checkpoint")
    stale = tmp_path / "stale"  # finished, made longer, killed: the checkpoint is newer than model.safetensors
    shutil.copytree(run, stale)
    os.utime(stale / "model.safetensors", ns=(0, 0))
    assert main(["inspect", str(stale)]) == 0
    assert "step 4 of 4 of the run, from checkpoints/4" in capsys.readouterr().out


def test_a_killed_run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = killed(place / "fresh", tmp_path / "run")
    early, late = numbers(jax_moe.load(run)), numbers(jax_moe.load(place / "fresh"))
    assert early.keys() == late.keys() and any((early[name] != late[name]).any() for name in early)
    assert main(["inspect", str(run)]) == 0
    assert "step 2 of 4 of the run, from checkpoints/2" in capsys.readouterr().out
    assert main(["generate", str(run), "--prompt", "abc", "--max-new-tokens", "3"]) == 0
    streams = capsys.readouterr()
    assert streams.out.startswith("abc") and streams.err == "jax-moe: step 2 of 4 of the run, from checkpoints/2\n"
    assert main(["port", str(run), str(tmp_path / "folder")]) == 0
    assert "step 2 of 4 of the run" in capsys.readouterr().out
    check_exact(numbers(jax_moe.load(tmp_path / "folder")), early, "ported")
    check_exact(numbers(jax_moe.load(place / "fresh" / "checkpoints" / "2")), early, "an older step, by its folder")
    assert "belongs to" in fails(capsys, "inspect", run / "checkpoints")
    with (run / "checkpoints" / "2.sha256").open("a") as sums:
        sums.write("0" * 64 + "  2/nothing\n")
    assert "must be a whole Orbax checkpoint" in fails(capsys, "inspect", run)
    (run / "checkpoints" / "2.sha256").unlink()  # the kill came before the sums were written
    assert "is a run without weights yet" in fails(capsys, "generate", run)


def test_a_finished_fine_tune(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "tuned"
    check_exact(numbers(jax_moe.load(run)), numbers(jax_moe.load_pretrained(run / "pretrained")), "run")
    assert main(["inspect", str(run)]) == 0
    assert "files: step 4 of 4 of the run, from pretrained; model.safetensors" in capsys.readouterr().out
    assert main(["generate", str(run), "--tokens", "1,2", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["port", str(run), str(tmp_path / "hf")]) == 0
    check_exact(weights(tmp_path / "hf"), weights(run / "pretrained"), "ported")


def test_a_killed_fine_tune(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command reads its newest checkpoint, in the dtypes of the folder that it began with."""
    last = killed(place / "tuned", tmp_path / "last", step=4)
    check_exact(numbers(jax_moe.load(last)), numbers(jax_moe.load(place / "tuned")), "the last checkpoint")
    run = killed(place / "tuned", tmp_path / "run")
    model = jax_moe.load(run)
    assert {value.dtype.name for value in numbers(model).values()} == {"bfloat16"}
    assert main(["inspect", str(run)]) == 0
    assert "step 2 of 4 of the run, from checkpoints/2; an Orbax checkpoint" in capsys.readouterr().out
    tokens = ["--tokens", "1,2", "--max-new-tokens", "3", "--temperature", "0"]
    assert main(["generate", str(run), *tokens]) == 0
    assert capsys.readouterr().err == "jax-moe: step 2 of 4 of the run, from checkpoints/2\n"
    assert main(["port", str(run), str(tmp_path / "hf")]) == 0
    check_exact(numbers(jax_moe.load(tmp_path / "hf")), numbers(model), "ported")
    assert main(["port", str(run), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    check_exact(numbers(jax_moe.load(tmp_path / "orbax")), numbers(model), "Orbax")
    capsys.readouterr()
    settings = (run / "config.json").read_text()
    (run / "config.json").write_text(settings.replace(str(place / "tiny"), str(place / "gone")))
    assert "began with the model in" in fails(capsys, "inspect", run)


def test_a_run_in_pytorch(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="trains in PyTorch")
    monkeypatch.chdir(place)
    monkeypatch.setattr(
        sys, "argv", ["train/train.py", *f"{FRESH} {SMALL} --framework torch --out {tmp_path / 'a'}".split()]
    )
    assert loop.main() == 0
    whole = jax_moe.load(tmp_path / "a")
    last = killed(tmp_path / "a", tmp_path / "last", step=4)
    assert "4.pt" in names(last / "checkpoints")
    check_exact(numbers(jax_moe.load(last)), numbers(whole), "4.pt")
    assert main(["inspect", str(killed(tmp_path / "a", tmp_path / "killed"))]) == 0
    assert isinstance(whole, nnx.Module) and jax.tree.leaves(nnx.state(whole))


def test_a_run_keeps_a_correction_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No optimizer holds it, but a checkpoint does; if an older checkpoint lacks it, the model's value is taken."""
    monkeypatch.setitem(FAMILIES, "corrected_moe", CORRECTED)
    monkeypatch.chdir(tmp_path)
    model = filled(lambda: jax_moe.Decoder(CONFIG, rngs=nnx.Rngs(0)))
    jax_moe.save_pretrained(model, Path("tiny"), model_type="corrected_moe")
    np.save("tokens.npy", np.arange(600, dtype=np.uint16) % 11)

    def prepared(words: str) -> Any:
        """The learner of a run that is about to train."""
        made = loop.prepare(*read_settings(words.split()))
        made.lock.release()
        assert not any("correction" in name for name in checkpoint.shapes(made.learner.state))
        return made.learner

    def found(module: nnx.Module) -> dict[str, np.ndarray]:
        return {BIAS: np.asarray(stored_variables(module)[BIAS][...])}

    run, bias = Path("run"), {BIAS: np.asarray(model.moe.router.correction_bias[...])}
    learner = prepared(f"{TUNED} {SMALL} --out run".replace("prompt a", "prompt 1"))
    settings = flat(read_config(run)["config"])
    learner.save(run / "checkpoints", 1, settings).wait()
    check_exact(found(jax_moe.load(run)), bias, "read from the run's checkpoint")
    model.moe.router.correction_bias[...] += 1
    jax_moe.save_pretrained(model, Path("tiny"), model_type="corrected_moe", overwrite=True)
    check_exact(found(prepared("--resume --out run").module()), bias, "resumed: the run's own")
    checkpoint.save(run / "checkpoints", 1, learner.state, settings)
    again = found(prepared("--resume --out run").module())
    with pytest.raises(MismatchError):
        check_exact(again, bias, "resumed without: that of the model")
    check_exact(again, {BIAS: bias[BIAS] + 1}, "resumed without: that of the model")
