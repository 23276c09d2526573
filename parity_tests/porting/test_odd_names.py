"""Folder names with glob characters or other odd parts, in Orbax too: what is written can be read back."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe.porting.formats.orbax import plain, read_orbax, verify_orbax, write_orbax
from moe_cli.main import main
from moe_train.run import checkpoint

NAMES = [
    "run[1]", "[!a]", "a*b", "a?b", "{a,b}", "a\\b", "a b", "%20", "~", "a:b", "x.orbax-checkpoint-tmp", "line\nbreak",
    "dots..",
]
ARRAYS = {"a.w": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_a_run(name: str, tmp_path: Path) -> None:
    state = {"w": jnp.arange(6.0).reshape(2, 3), "count": jnp.asarray(3)}
    neighbour = {"w": state["w"] + 1, "count": jnp.asarray(4)}
    for folder, value in ((tmp_path / "axb", neighbour), (tmp_path / name, state)):  # "a*b" fits "axb" too
        folder.mkdir()
        checkpoint.save(folder / "checkpoints", 5, value, {"seed": 1})
    step, settings, found = checkpoint.restore(tmp_path / name / "checkpoints", state)
    assert (step, settings) == (5, {"seed": 1})
    jax.tree.map(np.testing.assert_array_equal, found, state)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_bare_weights(name: str, tmp_path: Path) -> None:
    write_orbax(tmp_path / "axb", {key: value + 1 for key, value in ARRAYS.items()})
    sums = write_orbax(tmp_path / name, ARRAYS)
    verify_orbax(tmp_path / name, sums, ARRAYS, lambda _: None)
    assert {key: header.shape for key, header in read_orbax(tmp_path / name, sums).items()} == {
        "a.w": (2, 3),
        "b": (4,),
    }
    assert {path.name for path in tmp_path.iterdir()} == {"axb", name}


def test_the_command(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "of[me]").mkdir()
    for source, name in ((whole, "there[1]"), (tmp_path / "of[me]" / "there[1]", "back")):
        assert main(["port", str(source), str(tmp_path / "of[me]" / name)]) == 0, capsys.readouterr().err


def test_a_temporary_folder_of_such_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t[1]").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t[1]"))
    with pytest.raises(OSError, match="its path must hold none of"), plain(tmp_path / "run[1]"):
        pass
    with plain(tmp_path / "run") as path:
        assert path == tmp_path / "run"


def test_what_does_not_read_back_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: Orbax writes a wrong number. The checkpoint before it stays the newest."""
    state, real = {"w": jnp.arange(6.0), "v": jnp.zeros(2)}, checkpoint.begin_tree
    checkpoint.save(tmp_path, 5, state, {})
    for other in ({**state, "v": state["v"].at[1].set(1e-9)}, {"w": state["w"]}):
        monkeypatch.setattr(checkpoint, "begin_tree", lambda path, tree, about, other=other: real(path, other, about))
        with pytest.raises(OSError, match="must read back as written; differs in v"):
            checkpoint.save(tmp_path, 6, state, {})
    assert {path.name for path in tmp_path.iterdir()} == {"5", "5.sha256"}
