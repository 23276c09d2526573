"""The kinds of input that the fuzzer damages: a reader, a valid file for it, and the files beside it."""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = Path(__file__).parents[1] / "samples" / "v0_1_0"
SLOW = 0.02  # share of a kind whose reader takes half a second
FEW = 0.1  # share of each of many kinds, and of those whose reader takes a tenth of a second


@dataclass(frozen=True)
class Kind:
    """A reader with a valid file for it."""

    name: str  # of the file within a folder
    valid: Callable[[], bytes]
    read: Callable[[Path], object]  # gets the folder
    others: Callable[[], dict[str, bytes]] = dict  # files beside it
    share: float = 1.0  # of the inputs that a kind gets with equal shares


@functools.cache
def kinds() -> dict[str, Kind]:
    """Every kind of file; `.pt` if torch is installed."""
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
    return found | _commands() | _configs() | _tokenizers()


def _commands() -> dict[str, Kind]:
    """The words of a command line, one on each line."""
    from moe_cli.arguments import parse
    from moe_train.options import read_launch, read_settings

    def words(folder: Path) -> list[str]:
        text = os.fsdecode((folder / "words.txt").read_bytes())  # as Python reads the words of a process
        return text.replace("\0", "").split("\n")

    def read_train(given: list[str]) -> None:
        read_launch(given)
        read_settings(given)

    def read(parse: Callable[[list[str]], object], folder: Path) -> None:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                parse(words(folder))
        except SystemExit as ended:
            if ended.code not in (0, 2) or "Traceback" in said.getvalue():
                raise RuntimeError(f"status {ended.code}: {said.getvalue()}") from None
            if ended.code:
                raise ValueError("refused") from None

    lines = {
        "jax-moe port": "port model.safetensors out --to torch --capacity-factor 1.25 --overwrite",
        "jax-moe inspect": "inspect folder --mesh data=2,expert=4 --names",
        "jax-moe generate": "generate folder --prompt Once --max-new-tokens 20 --temperature 0.7 --top-p 0.9 --seed 3",
        "train.py": "--out fuzzed --steps 100 --learning-rate 3e-4 --mesh data=1 --top-k 2 --capacity-factor none "
        "--attention blocks --exchange auto --precision mixed --data text.txt",
    }
    readers = {name: read_train if name == "train.py" else parse for name in lines}
    made = {name: "\n".join(line.split()).encode() for name, line in lines.items()}
    return {
        f"command line, {name}": Kind("words.txt", partial(bytes, data), partial(read, readers[name]), share=FEW)
        for name, data in made.items()
    }


def _configs() -> dict[str, Kind]:
    """The config.json of every row of the table of families, of which the contract is read."""
    if not (importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")):
        return {}
    import transformers

    from jax_moe.guarded import read_text_and_object
    from jax_moe.porting.families import family_named
    from jax_moe.porting.formats.quantised import read_scheme
    from parity_tests.table.family_cases import CASES

    def read(folder: Path) -> None:
        _, values = read_text_and_object(folder / "config.json")
        read_scheme(values)
        family_named(values.get("model_type")).config(values)

    def text(case: Any) -> bytes:
        return json.dumps(case.config().to_dict()).encode()

    transformers.logging.set_verbosity_error()
    made = {f"config.json, {case.name}": text(case) for case in CASES}
    return {name: Kind("config.json", partial(bytes, data), read, share=FEW) for name, data in made.items()}


def _tokenizers() -> dict[str, Kind]:
    """A tokenizer.json, with which a text is encoded and decoded."""
    if not importlib.util.find_spec("tokenizers"):
        return {}
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from jax_moe.generation.text import encode, read_tokenizer, text_of

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    data = tokenizer.to_str().encode()

    def read(folder: Path) -> None:
        found = read_tokenizer(folder)
        text_of(found, encode(found, "the cat \U0001f600"))

    return {"tokenizer.json": Kind("tokenizer.json", lambda: data, read)}


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
