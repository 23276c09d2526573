"""Folders of PyTorch `.bin` files: read lazily with weights_only=True, refused if they hold anything but tensors."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason=".bin files are PyTorch's, which is not installed")

import jax_moe  # noqa: E402
from jax_moe.porting.formats.safetensors import read_safetensors  # noqa: E402
from jax_moe.porting.formats.state_file import read_state  # noqa: E402
from jax_moe.porting.formats.torch_pickle import map_pt  # noqa: E402
from jax_moe.porting.torch_tensors import numpy_to_tensor  # noqa: E402
from parity_tests.porting.decoder_cases import decoder, weights  # noqa: E402
from parity_tests.shared.compare import check_exact  # noqa: E402


class Malicious:
    """Unpickled, it would write a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        """The call that unpickling makes."""
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded .safetensors folder that nobody changes."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    model = decoder("granitemoe", request.param, num_layers=2)
    jax_moe.save_pretrained(model, folder, model_type="granitemoe", max_shard_bytes=1500)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """The same weights as shards of .bin with their index."""
    made = Path(shutil.copytree(whole, tmp_path / "model"))
    index = made / "model.safetensors.index.json"
    for file in sorted(made.glob("*.safetensors")):
        state = {name: numpy_to_tensor(value) for name, value in read_safetensors(file).items()}
        torch.save(state, made / file.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin"))
        file.unlink()
    listed = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
    (made / "pytorch_model.bin.index.json").write_text(listed)
    index.unlink()
    return made


def test_sharded_single_and_old(folder: Path, whole: Path, tmp_path: Path) -> None:
    """Saved again as .safetensors the tensors are the same; the format from before PyTorch 1.6 is read as well."""
    state = {name: numpy_to_tensor(value) for name, value in weights(whole).items()}
    assert len(list(folder.glob("*.bin"))) > 1
    single, old = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("single", "old"))
    for one, zipped in ((single, True), (old, False)):
        for file in one.glob("pytorch_model*"):
            file.unlink()
        torch.save(state, one / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    for one in (folder, single, old):
        jax_moe.save_pretrained(jax_moe.load_pretrained(one), tmp_path / "saved", overwrite=True)
        check_exact(weights(tmp_path / "saved"), weights(whole), one.name)


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    """A change in the file after it was opened is seen: nothing was read before its turn."""
    file = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(2000)}, file)
    shape, dtype, read = map_pt(file)["a"]
    assert (shape, dtype) == ((2000,), np.float32)
    raw = file.read_bytes()
    place = raw.index(bytes(4000))
    with file.open("r+b") as opened:
        opened.seek(place + 2000)
        opened.write(np.float32(7).tobytes() * 8)
    assert read().any()


def test_code_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"lm_head.weight": Malicious(mark)}, sorted(folder.glob("*.bin"))[0])
        with pytest.raises(ValueError, match=r"refused, its pickle holds code|must be a whole PyTorch") as caught:
            jax_moe.load_pretrained(folder)
        assert "\n" not in str(caught.value) and not mark.exists()


def test_every_broken_file_is_named(folder: Path) -> None:
    files = sorted(folder.glob("*.bin"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-200])
    torch.save([torch.zeros(2)], files[2])
    with pytest.raises(ValueError) as caught:
        jax_moe.load_pretrained(folder)
    message = str(caught.value)
    assert f"{files[0].name} is missing" in message and f"{files[1].name}: must be a whole PyTorch" in message
    assert f"{files[2].name}: must hold a state dict" in message and "\n" not in message


def test_dtypes_that_numpy_lacks(folder: Path) -> None:
    file = sorted(folder.glob("*.bin"))[0]
    name = next(iter(json.loads((folder / "pytorch_model.bin.index.json").read_text())["weight_map"]))
    torch.save({
        "a": torch.zeros(2, dtype=torch.float8_e4m3fn), "b": torch.zeros(2).to_sparse(),
        "c": torch.zeros(2, dtype=torch.int8),
        name: torch.ones(2),
    }, file)
    with pytest.raises(
        ValueError, match="must be one of F64, F32, F16, BF16: a is float8_e4m3fn, b is sparse_coo, c is int8"
    ):
        jax_moe.load_pretrained(folder)
    with pytest.raises(ValueError, match="must hold tensors that numpy has; a is float8_e4m3fn, b is sparse_coo"):
        read_state(file)
