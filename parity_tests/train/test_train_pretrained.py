"""`train.py --pretrained`: a folder of transformers fine-tuned in JAX, resumed, and loaded again by transformers.

Long because all tests share a small folder and a finished run.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is PyTorch")
pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")
pytest.importorskip("tokenizers", reason="needs the extra 'text': tokenizers")

import jax
import torch
import transformers
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import jax_moe
from jax_moe.porting.formats.safetensors import read_safetensors
from jax_moe.sharding import data_mesh
from moe_train import loop
from moe_train.configs import PRESETS
from moe_train.configs.settings import ModelSettings, OptimizerSettings, TrainConfig
from moe_train.learners.jax_learner import JaxLearner
from moe_train.learners.models import Pretrained
from moe_train.learners.optimizer import learning_rate
from moe_train.run import metrics
from moe_train.run.export import export
from moe_train.task import make_learner, read_task
from parity_tests.shared.compare import MismatchError, check_close, check_exact
from parity_tests.table.family_cases import draw_weights
from parity_tests.train.test_train_run import numbers

pytestmark = pytest.mark.usefixtures("quick")
TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(80))
SETTINGS = "--pretrained tiny --data text.txt --block-size 12 --batch-size 4 --steps 6 --eval-every 3 --eval-batches 2"
TRAINING = "--learning-rate 0.01 --warmup-steps 2 --balance-loss-weight 0.1 --sample-length 5 --checkpoint-every 100"
CURVE = 2e-6  # measured: 3.0e-7, weights 2.5e-7
LOGITS = 4e-6  # measured: 4.4e-7


def tiny_model(dtype: torch.dtype = torch.float32) -> Any:
    """A Mixtral of two layers whose routers spread their tokens."""
    config = transformers.MixtralConfig(
        vocab_size=270, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
        router_aux_loss_coef=0.05, dtype=dtype, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )
    model = transformers.MixtralForCausalLM._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    draw_weights(model, seed=1)
    return model.to(dtype)


def tiny_tokenizer() -> Tokenizer:
    """A tokenizer of bytes and a few merges that would truncate texts at eight tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.enable_truncation(8)
    return tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, its tokens, and two models, with and without a tokenizer."""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "text.txt").write_text(TEXT)
    for name in ("tiny", "mute"):
        tiny_model().save_pretrained(folder / name)
    tiny_tokenizer().save(str(folder / "tiny" / "tokenizer.json"))
    np.save(folder / "tokens.npy", np.arange(1000, dtype=np.uint16) % 270)
    return folder


def command(monkeypatch: pytest.MonkeyPatch, place: Path, words: str) -> int:
    """Runs train.py in that folder; returns its exit code."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["train/train.py", *words.split()])
    return loop.main()


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """An uninterrupted run of six steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert command(monkeypatch, place, f"{SETTINGS} {TRAINING} --out whole --export exported") == 0
    return place / "whole"


def test_a_run_learns_and_writes_everything(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "metrics.jsonl", "loss.png", "expert_load.png", "sample.txt", "pretrained", "checkpoints",
    }
    assert {path.name for path in (whole / "pretrained").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }
    rows = metrics.read(whole)
    assert [row["step"] for row in rows] == [0, 3, 6] and np.shape(rows[0]["expert_load"]) == (2, 4)
    for name in ("train_loss", "val_loss"):
        assert rows[-1][name] < rows[0][name] - 0.5  # measured: 6.28 to 5.01, and 6.25 to 5.30


def test_stopped_and_resumed_is_the_same_run(
    whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal in step 4 saves a folder that transformers can load; the resumed run ends with equal bits."""
    step = JaxLearner.train_step

    def interrupted(self: JaxLearner, number: int, tokens_BT1: np.ndarray) -> Any:
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, tokens_BT1)

    monkeypatch.setattr(JaxLearner, "train_step", interrupted)
    assert command(monkeypatch, place, f"{SETTINGS} {TRAINING} --out parts --export first") == 130
    assert "stopped and saved at step 5 of 6; to go on: python" in (said := capsys.readouterr().out)
    assert said.endswith(" --resume --out parts --export first\n")
    halfway = (place / "parts" / "pretrained" / "model.safetensors").read_bytes()
    monkeypatch.setattr(JaxLearner, "train_step", step)
    assert command(monkeypatch, place, "--resume --out parts --export second") == 0
    assert not (place / "first").exists() and folder_bytes(place / "second") == folder_bytes(place / "exported")
    assert numbers(place / "parts") == numbers(whole)
    for name in ("pretrained/model.safetensors", "pretrained/config.json", "sample.txt"):
        assert (place / "parts" / name).read_bytes() == (whole / name).read_bytes(), name
    assert halfway != (whole / "pretrained" / "model.safetensors").read_bytes()


def test_transformers_loads_what_was_trained(whole: Path, place: Path) -> None:
    """transformers' logits of the export are the decoder's, the weights have changed, the tokenizer is there."""
    exported = place / "exported"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager").eval()
    ours = jax_moe.load_pretrained(whole / "pretrained")
    tokens = np.random.default_rng(0).integers(0, 270, (2, 11))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    forward = jax.jit(lambda model, tokens: model(tokens))
    logits = forward(ours, tokens)
    print("logits", check_close({"logits": np.asarray(logits)}, {"logits": expected}, LOGITS, "logits"))
    before = forward(jax_moe.load_pretrained(place / "tiny"), tokens)
    assert np.abs(np.asarray(before) - expected).max() > 0.1
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        for folder in (whole / "pretrained", exported):
            assert (folder / name).read_bytes() == (place / "tiny" / name).read_bytes()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_that_finds_its_folder_taken(whole: Path, place: Path) -> None:
    """The run ends in one line that says how to write the export; what is there stays."""
    before = folder_bytes(place / "tiny")
    said = r"^the model is in .*checkpoints but could not be written: .*; `jax-moe port [^\n]*$"
    with pytest.raises(OSError, match=said):
        export(whole, place / "tiny")
    assert folder_bytes(place / "tiny") == before


def settings(place: Path, **changes: Any) -> TrainConfig:
    """Five steps with the command's settings: every part of the optimizer and the checkpoint's own balance loss."""
    optimizer = OptimizerSettings(
        learning_rate=3e-3, warmup_steps=2, decay="cosine", final_learning_rate=1e-3, clip_norm=1.0,
        balance_loss_weight=None,
    )
    return dataclasses.replace(
        PRESETS["finetune"], pretrained=str(place / "tiny"), data=str(place / "text.txt"), steps=5, batch_size=4,
        model=ModelSettings(block_size=12), optimizer=optimizer, **changes,
    )


def plain_loop(model: Any, batches: list[np.ndarray], config: TrainConfig, weight: float) -> list[float]:
    """Cross entropies of AdamW steps on transformers' model in a plain PyTorch loop."""
    model.train()
    chosen, rate = config.optimizer, learning_rate(config.optimizer, config.steps)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(chosen.beta1, chosen.beta2), weight_decay=chosen.weight_decay
    )
    losses = []
    for step, tokens_BT1 in enumerate(batches):
        optimizer.param_groups[0]["lr"] = float(rate(step))
        tokens = torch.from_numpy(tokens_BT1).long()
        output = model(input_ids=tokens[:, :-1], output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + weight * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_five_steps_are_those_of_a_plain_pytorch_loop(place: Path) -> None:
    """Equal batches, AdamW, warm-up, clipping and balance loss give equal losses and weights; another loss fails."""
    config = settings(place)
    task = read_task(config)
    learner = make_learner(config, task)
    run = loop.Run(config, place, task.text, learner, 0, [], None)  # type: ignore[arg-type]
    batches = [run.batch("train", step) for step in range(config.steps)]
    losses = [float(learner.train_step(step, tokens)) for step, tokens in enumerate(batches)]
    theirs = tiny_model()
    expected = plain_loop(theirs, batches, config, weight=0.05)
    errors = {"curve": check_close({"curve": np.array(losses)}, {"curve": np.array(expected)}, CURVE, "losses")}
    assert isinstance(learner, JaxLearner)
    learner.write(place)
    again = transformers.AutoModelForCausalLM.from_pretrained(place / "pretrained")
    state = [{name: value.numpy() for name, value in model.state_dict().items()} for model in (again, theirs)]
    errors["weights"] = check_close(state[0], state[1], CURVE, "weights after five steps")
    without = plain_loop(tiny_model(), batches, config, weight=0.0)
    with pytest.raises(MismatchError):
        check_close({"curve": np.array(losses)}, {"curve": np.array(without)}, 3 * CURVE, "without the balance loss")
    print(errors)


def test_dtypes_go_back_as_they_came(tmp_path: Path) -> None:
    """bf16 weights with an fp32 norm are trained in fp32; without training every file is written back bit for bit."""
    model = tiny_model(torch.bfloat16)
    model.model.norm.weight.data = model.model.norm.weight.data.float() + 1e-5
    model.save_pretrained(tmp_path / "tiny")
    pretrained = Pretrained(tmp_path / "tiny")
    graphdef, params, rest = pretrained.start(jax.random.key(0), data_mesh(1))
    assert {value.dtype.name for value in jax.tree.leaves(params)} == {"float32"}
    pretrained.write(nnx.merge(graphdef, params, rest), tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "pretrained" / name).read_bytes() == (tmp_path / "tiny" / name).read_bytes()
    there, here = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("tiny", "pretrained")
    )
    states = [{n: v.float().numpy() for n, v in model.state_dict().items()} for model in (here, there)]
    check_exact(states[0], states[1], "untrained")
    files = [read_safetensors(tmp_path / name / "model.safetensors") for name in ("pretrained", "tiny")]
    check_exact(files[0], files[1], "tensors on the disk")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pretrained").write_text("in the way")
    with pytest.raises(OSError, match=r"^the model is in .*checkpoints but could not be written: [^\n]*$"):
        pretrained.write(nnx.merge(graphdef, params, rest), tmp_path / "other")
    assert (tmp_path / "other" / "pretrained").read_text() == "in the way"


# Data


def test_text_is_one_stream_and_never_cut(place: Path) -> None:
    """All tokens of the text are used, though tokenizer.json truncates at eight; 90% of them for training."""
    text = read_task(settings(place)).text
    tokens = np.concatenate([text.train, text.val])
    assert text.decode(tokens.tolist()) == TEXT and len(tokens) > 1000
    assert len(text.train) == int(0.9 * len(tokens))
    assert text.encode("beer") == tiny_tokenizer().encode("beer").ids
    assert text.encode(" \n") != [] and text.size == "270 kinds of tokens"


def test_tokens_serve_a_folder_without_tokenizer(place: Path) -> None:
    config = dataclasses.replace(settings(place), pretrained=str(place / "mute"), data=str(place / "tokens.npy"))
    task = read_task(config)
    assert task.text.encode("\n") == [900 % 270] and task.text.encode("3 14") == [3, 14]
    assert task.text.decode([3, 14]) == "3 14"
    batch = loop.Run(config, place, task.text, None, 0, [], None).batch("train", 0)  # type: ignore[arg-type]
    assert batch.dtype == np.int32 and batch.shape == (4, 13) and (np.diff(batch) % 270 == 1).all()
    for words in ("beer", "270", "-1"):
        with pytest.raises(ValueError, match=f"sample_prompt='{words}': must be "):
            task.text.encode(words)


def test_a_block_longer_than_the_model_was_made_for_is_noted(place: Path) -> None:
    """As in transformers with rotary positions it is allowed, with a note."""
    config = dataclasses.replace(settings(place), model=ModelSettings(block_size=40))
    assert read_task(config).note == "note: block_size=40 is longer than the 32 positions that the model was made for"
    assert read_task(settings(place)).note is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pretrained nowhere", "pretrained='nowhere': must be a folder of `save_pretrained`"),
        ("--pretrained text.txt", "pretrained='text.txt': must be a folder of `save_pretrained`"),
        ("--pretrained empty", "pretrained='empty': must be a folder of `save_pretrained`"),
        ("--pretrained gpt2", "pretrained='gpt2': gpt2/config.json: model_type='gpt2'"),
        ("--pretrained mute", "pretrained='mute': must hold tokenizer.json to read text; --data FILE.npy gives tokens"),
        ("--pretrained broken", "broken/tokenizer.json: must be a tokenizer"),
        ("--pretrained tiny --data nowhere.txt", "data='nowhere.txt': must be a readable text file"),
        (
            "--pretrained tiny --data nowhere.npy",
            "data='nowhere.npy': must be a readable .npy file of tokens (No such file",
        ),
        ("--pretrained tiny --data fake.npy", "data='fake.npy': must be a readable .npy file of tokens ("),
        (
            "--pretrained tiny --data square.npy",
            "data='square.npy': must hold one axis of integers, has shape (2, 2) of int64",
        ),
        ("--pretrained tiny --data floats.npy", "data='floats.npy': must hold one axis of integers"),
        ("--pretrained tiny --data objects.npy", "data='objects.npy': must be a readable .npy file of tokens ("),
        (
            "--pretrained tiny --data high.npy --block-size 9",
            "data='high.npy': token 270: must be 0 to 269 (vocab_size=270",
        ),
        ("--pretrained tiny --data low.npy --block-size 9", "data='low.npy': token -1: must be 0 to 269"),
        ("--pretrained tiny --block-size 4000", "data='text.txt': must be longer; its training split has"),
        ("--pretrained tiny --block-size 0", "block_size=0: must be an integer of at least 1"),
        ("--pretrained tiny --framework torch", "framework='torch': must be 'jax' with --pretrained"),
        ("--pretrained tiny --num-layers 3", "num_layers=3: must be left out with --pretrained"),
        ("--pretrained tiny --balance-loss-weight -1", "balance_loss_weight=-1.0: must be at least 0"),
        ("--pretrained mute --data high.npy --block-size 9 --sample-prompt beer", "data='high.npy'"),
        (
            "--pretrained mute --data tokens.npy --block-size 9 --sample-prompt beer",
            "sample_prompt='beer': must be tokens",
        ),
        ("--preset finetune", "preset='finetune': must be used with --pretrained DIR"),
        ("--balance-loss-weight None", "balance_loss_weight=None: must be a number without --pretrained"),
    ],
)
def test_bad_requests_are_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    if not (place / "fake.npy").exists():
        arrays = {"square": np.eye(2, dtype=int), "floats": np.ones(99), "objects": np.array([{}] * 99), "fake": None}
        arrays |= {"high": np.full(999, 270), "low": np.full(999, -1)}
        for name, array in arrays.items():
            if array is None:
                (place / f"{name}.npy").write_text("no array")
            else:
                np.save(place / f"{name}.npy", array, allow_pickle=True)
        for name in ("empty", "gpt2", "broken"):
            (place / name).mkdir()
        (place / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        for name in ("config.json", "model.safetensors"):
            (place / "broken" / name).symlink_to(place / "tiny" / name)
        (place / "broken" / "tokenizer.json").write_text("{}")
    names = {path.name for path in place.iterdir()}
    extra = "" if "--data" in words else " --data text.txt"
    assert command(monkeypatch, place, f"{words}{extra} --out refused") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert {path.name for path in place.iterdir()} == names, "nothing may be written"
