"""Readers are fed damaged files: each must answer with a ValueError of one line, quickly and in little memory.

    python -m parity_tests.fuzz --count 100000 --seed 1

Each input is a small valid file with one to four changes: bytes flipped, cut, doubled, numbers made huge, JSON values
replaced by values of another kind. `damaged(kind, generator)` is a pure function of the seed, so that a finding
repeats. Long because every kind of file is made here.
"""

import argparse
import copy
import hashlib
import io
import json
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = Path(__file__).parents[1] / "samples" / "v0_1_0"
SLOW = 0.02  # share of a kind whose reader takes half a second
LONGEST, MOST_BYTES = 5.0, 300e6  # seconds and bytes that one input may take
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 10**9, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "4", "\0",
    "../x", [], [[]], [1], {}, {"a": {}},
)


@dataclass(frozen=True)
class Kind:
    """A reader with a valid file for it."""

    name: str  # of the file within a folder
    valid: Callable[[], bytes]
    read: Callable[[Path], object]  # gets the folder
    others: Callable[[], dict[str, bytes]] = dict  # files beside it
    share: float = 1.0  # of the inputs that a kind gets with equal shares


def finding(kind: Kind, data: bytes, folder: Path) -> str | None:
    """What is wrong with the reader's answer to this file, or None."""
    write_files(folder, {**kind.others(), kind.name: data})
    begin, before, said = time.perf_counter(), _largest(), None
    try:
        kind.read(folder)
    except (ValueError, OSError) as error:
        message = str(error)
        fits = type(error) is not UnicodeDecodeError and "\n" not in message and len(message) < 4000
        said = None if fits else repr(error)[:300]
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        said = repr(error)[:300]
    peak = _largest() - before
    seconds = time.perf_counter() - begin
    if said is None and (seconds > LONGEST or peak > MOST_BYTES):
        said = f"took {seconds:.1f} s and {peak:,} bytes"
    return said


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files {path within the folder: content}."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _largest() -> int:
    """The peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def damaged(data: bytes, draw: np.random.Generator) -> bytes:
    """The file with some changes; JSON, also in a safetensors header, is changed as JSON half of the time."""
    if draw.random() < 0.5:
        if data[:1] == b"{":
            return _json_changed(data, draw)
        if data[8:9] == b"{":
            (size,) = struct.unpack("<Q", data[:8])
            header = _json_changed(data[8 : 8 + size], draw)
            return struct.pack("<Q", len(header)) + header + data[8 + size :]
    if data[:4] == b"PK\3\4" and draw.random() < 0.7:
        return _pickle_changed(data, draw)
    changed = bytearray(data)
    for _ in range(draw.integers(1, 5)):
        at = int(draw.integers(0, max(len(changed), 1)))
        what = draw.integers(0, 5)
        if what == 0 and changed:
            changed[at] = int(draw.integers(0, 256))
        elif what == 1:
            del changed[at:]
        elif what == 2:
            changed[at:at] = changed[: int(draw.integers(0, 64))]
        elif what == 3:
            changed[at : at + 8] = struct.pack("<Q", int(draw.integers(0, 2**63)))
        else:
            changed[at:at] = b"[" * int(draw.integers(1, 3000))
    return bytes(changed)


def _pickle_changed(data: bytes, draw: np.random.Generator) -> bytes:
    """A `.pt` with a changed pickle in an intact archive, so that torch reads the pickle."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {member.filename: archive.read(member) for member in archive.infolist()}
    name = next(entry for entry in records if entry.endswith("data.pkl"))
    pickled = bytearray(records[name])
    for _ in range(draw.integers(1, 4)):
        at, what = int(draw.integers(0, len(pickled))), draw.integers(0, 3)
        pickled[at : at + (1, 0, 4)[what]] = (bytes([int(draw.integers(0, 256))]), b"K\3", b"\xff\xff\xff\x7f")[what]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for entry, record in {**records, name: bytes(pickled)}.items():
            archive.writestr(entry, record)
    return out.getvalue()


def _json_changed(data: bytes, draw: np.random.Generator) -> bytes:
    try:
        value = json.loads(data)
    except ValueError:
        return data[: len(data) // 2]
    for _ in range(draw.integers(1, 4)):
        node: Any = value
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = keys[int(draw.integers(0, len(keys)))]
            if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.7:
                node = node[key]
                continue
            if draw.random() < 0.2:
                del node[key]
            else:
                node[key] = copy.deepcopy(ODD[int(draw.integers(0, len(ODD)))])
            break
    return json.dumps(value).encode()


def kinds() -> dict[str, Kind]:
    """Every kind of file; `.pt` if torch is installed."""
    import importlib.util

    from jax_moe.guarded import read_npy
    from jax_moe.porting.checkpoint import load
    from jax_moe.porting.formats.hf_folder import open_folder
    from moe_train.run import folder as run_folder
    from moe_train.run import metrics

    files = _made()

    config = {"config.json": files["hf/config.json"]}
    weights = {"model.safetensors": files["hf/model.safetensors"]}
    shard = {"model-00001-of-00001.safetensors": files["hf/model.safetensors"], "config.json": files["hf/config.json"]}
    ours = {"weights.safetensors": files["ours/weights.safetensors"]}
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(files["names"], next(iter(shard)))}).encode()
    found = {
        "Hugging Face config.json": Kind("config.json", lambda: files["hf/config.json"], open_folder, lambda: weights),
        "safetensors": Kind("model.safetensors", lambda: files["hf/model.safetensors"], open_folder, lambda: config),
        "index": Kind("model.safetensors.index.json", lambda: index, open_folder, lambda: shard),
        "our config.json": Kind("config.json", lambda: files["ours/config.json"], load, lambda: ours),
        "npy": Kind("x.npy", lambda: files["npy"], lambda folder: read_npy(folder / "x.npy")),
        "metrics": Kind("metrics.jsonl", lambda: files["metrics"], metrics.read),
        "optimizer.json": Kind("said.json", lambda: files["optimizer"], _read_optimizer),
        "run settings": Kind("config.json", lambda: files["run"], run_folder.read_config),
        "weights of a run": _among(SAMPLES / "run_finished", "model.safetensors", load, without="checkpoints"),
        "sums of a run": _among(SAMPLES / "run_stopped", "checkpoints/2.sha256", load, share=0.1),
        "Orbax metadata": _among(SAMPLES / "soft_moe_orbax", "state/_METADATA", _load_orbax, share=SLOW),
        "Orbax manifest": _among(SAMPLES / "soft_moe_orbax", "state/manifest.ocdbt", _load_orbax, share=SLOW),
    }
    if importlib.util.find_spec("torch"):
        found["pt"] = Kind("x.pt", lambda: files["pt"], lambda folder: load(folder / "x.pt"))
        found["training pt"] = Kind("x.pt", lambda: files["training"], lambda f: load(f / "x.pt", with_optimizer=True))
    return found


def _among(
    folder: Path, name: str, read: Callable[[Path], object], without: str | None = None, share: float = 1.0
) -> Kind:
    """A file of a folder, beside the folder's other files except those under `without`."""
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    others = {other: data for other, data in files.items() if other != name and other.split("/")[0] != without}
    return Kind(name, lambda: files[name], read, lambda: others, share)


def _load_orbax(folder: Path) -> None:
    """Loads a folder with updated sums, so that more than the check of sums is tested."""
    from jax_moe.porting.checkpoint import load

    about = json.loads((folder / "config.json").read_bytes())
    for name in about["files"]:
        data = (folder / name).read_bytes()
        about["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
    (folder / "config.json").write_text(json.dumps(about))
    load(folder)


def _read_optimizer(folder: Path) -> None:
    """Reads the JSON as the metadata of an optimizer.safetensors."""
    from jax_moe.porting.formats.safetensors import write_safetensors
    from jax_moe.porting.optimizer import own_file

    text = (folder / "said.json").read_bytes().decode("utf-8", "replace")
    write_safetensors(folder / "o.safetensors", {"exp_avg.a": np.ones(2, np.float32)}, {own_file.KEY: text})
    own_file._read(folder / "o.safetensors")


def _trained(state: dict[str, np.ndarray], path: Path) -> bytes:
    """A trainer's file with a state dict and an optimizer after a step."""
    import torch

    weights = [torch.nn.Parameter(torch.tensor(value)) for value in state.values()]
    optimizer = torch.optim.AdamW(weights)
    sum((weight**2).sum() for weight in weights).backward()  # type: ignore[union-attr]
    optimizer.step()
    torch.save({"model": dict(zip(state, weights, strict=True)), "optimizer": optimizer.state_dict(), "epoch": 1}, path)
    return path.read_bytes()


def _made() -> dict[str, Any]:
    """The valid files."""
    import importlib.util

    import jax_moe
    from jax_moe.porting.checkpoint import Checkpoint, save
    from jax_moe.porting.formats.safetensors import read_safetensors
    from jax_moe.porting.formats.state_file import write_state
    from moe_train.configs.settings import TrainConfig, flat
    from parity_tests.porting.decoder_cases import decoder
    from parity_tests.porting.porting_cases import make, mixtral_state

    with tempfile.TemporaryDirectory() as place:
        hf, ours = Path(place) / "hf", Path(place) / "ours"
        jax_moe.save_pretrained(decoder("qwen2_moe"), hf, model_type="qwen2_moe")
        save(Checkpoint("soft_moe", make("soft_moe")), ours)
        found: dict[str, Any] = {
            f"{f.parent.name}/{f.name}": f.read_bytes() for folder in (hf, ours) for f in folder.iterdir()
        }
        found["names"] = list(read_safetensors(hf / "model.safetensors"))
        if importlib.util.find_spec("torch"):
            write_state(Path(place) / "x.pt", mixtral_state())
            found["pt"] = (Path(place) / "x.pt").read_bytes()
            found["training"] = _trained(mixtral_state(), Path(place) / "t.pt")
    array = io.BytesIO()
    np.save(array, np.arange(6, dtype=np.int32).reshape(2, 3))
    group = {"lr": 0.1, "betas": [0.9, 0.99], "params": [0]}
    said = {"step": 3, "step_dtype": "float32", "groups": [group], "order": ["a"], "others": {}, "words": ["exp_avg"]}
    row = {
        "step": 1, "train_loss": 1.0, "val_loss": 2.0, "dropped_fraction": [0.0], "expert_load": [[0.5, 0.5]],
        "router_entropy": [0.5], "load_balance_loss": [1.0], "tokens_per_second": None,
    }
    return found | {
        "optimizer": json.dumps(said).encode(), "npy": array.getvalue(),
        "metrics": "".join(json.dumps({**row, "step": i}) + "\n" for i in range(3)).encode(),
        "run": json.dumps({"settings": flat(TrainConfig()), "model": {}, "text": {"sha256": "0"}}).encode(),
    }


def fuzz(count: int, seed: int, show: Callable[[str], None] = lambda line: None) -> list[str]:
    """Tries `count` inputs, shared by the kinds; returns a line per finding, with its seed and number."""
    found: list[str] = []
    chosen, number, tried = list(kinds().items()), -1, 0
    while tried < count:
        number += 1
        turn, place = divmod(number, len(chosen))
        name, kind = chosen[place]
        if int(turn * kind.share) == int((turn - 1) * kind.share):  # a slow kind gets its share of the turns
            continue
        data = damaged(kind.valid(), np.random.default_rng([seed, number]))
        with tempfile.TemporaryDirectory() as folder:
            said = finding(kind, data, Path(folder))
        if said is not None:
            found.append(f"{name}, seed {seed}, number {number}: {said}")
            show(found[-1])
        tried += 1
        if tried % 10_000 == 0 or tried == count:
            show(f"{tried:,} inputs, {len(found)} findings")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Readers fed with damaged files.")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(1 if fuzz(given.count, given.seed, lambda line: print(line, flush=True)) else 0)
