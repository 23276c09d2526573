"""Settings of training, and the command's errors for bad requests."""

import dataclasses
import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from jax_moe.config.models import MakeMoEConfig
from moe_train import loop
from moe_train.configs import PRESETS
from moe_train.configs.settings import (
    ModelSettings,
    OptimizerSettings,
    TrainConfig,
    check,
    flat,
    from_flat,
    model_config,
)

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 20


def test_the_published_preset_is_the_published_run() -> None:
    config = PRESETS["published"]
    assert model_config(config, 65) == MakeMoEConfig()
    assert (config.batch_size, config.steps, config.eval_every, config.final_eval_batches) == (16, 5000, 100, 400)
    assert config.optimizer == OptimizerSettings(
        learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01
    )
    assert (
        config.optimizer.clip_norm is None and config.optimizer.decay == "none" and config.optimizer.warmup_steps == 0
    )


def test_model_settings_are_those_of_the_model_but_the_vocabulary() -> None:
    names = [field.name for field in dataclasses.fields(MakeMoEConfig)]
    assert ["vocab_size", *(field.name for field in dataclasses.fields(ModelSettings))] == names
    assert MakeMoEConfig(vocab_size=65, **dataclasses.asdict(ModelSettings())) == MakeMoEConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound_and_survive_json(name: str) -> None:
    config = PRESETS[name]
    check(config)
    assert config.preset == name
    assert from_flat(json.loads(json.dumps(flat(config)))) == config


def test_from_flat_is_strict() -> None:
    values = flat(TrainConfig())
    with pytest.raises(ValueError, match=r"settings=\['steps'\]"):
        from_flat({name: value for name, value in values.items() if name != "steps"})
    with pytest.raises(ValueError, match="stps"):
        from_flat({**values, "stps": 3})


def test_capacity_below_one_slot_names_the_least_factor() -> None:
    config = TrainConfig(batch_size=2, model=ModelSettings(block_size=4, num_experts=8, top_k=1, capacity_factor=0.4))
    with pytest.raises(ValueError, match=r"capacity_factor=0\.4: must be at least 1, which"):
        model_config(config, 65)
    for tokens, experts, top_k in ((8, 3, 1), (7, 64, 2), (512, 8, 2)):
        settings = ModelSettings(block_size=tokens, num_experts=experts, top_k=top_k, capacity_factor=1e-9)
        with pytest.raises(ValueError) as caught:
            model_config(TrainConfig(batch_size=1, model=settings), 65)
        least = float(str(caught.value).split("at least ")[1].split(",")[0])
        fits = dataclasses.replace(settings, capacity_factor=least)
        assert model_config(TrainConfig(batch_size=1, model=fits), 65).moe.expert_capacity(tokens) == 1
        assert Fraction(experts, tokens * top_k) <= Fraction(str(least))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"eval_every": 0}, "eval_every=0"),
        ({"final_eval_batches": 0}, "final_eval_batches=0"),
        ({"seed": -3}, "seed=-3"),
        ({"sample_temperature": -0.1}, "sample_temperature=-0.1"),
        ({"sample_prompt": ""}, "sample_prompt=''"),
        ({"framework": "torch", "num_devices": 2}, "num_devices=2: must be 1 or None with framework='torch'"),
        ({"framework": "torch", "mesh": "data=2"}, "mesh='data=2': must be None with framework='torch'"),
        ({"num_devices": 2, "mesh": "data=2"}, "num_devices=2: must be left out with --mesh"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"beta2": 1.0}, "beta2=1.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"warmup_steps": 5000}, "warmup_steps=5000: must be at least 0 and below steps=5000"),
        ({"final_learning_rate": 1e-4}, "final_learning_rate=0.0001: must be 0 unless decay='cosine'"),
        (
            {"final_learning_rate": 1.0, "decay": "cosine"},
            "final_learning_rate=1.0: must be at most learning_rate=0.001",
        ),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(from_flat({**flat(TrainConfig()), **change}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# The command, in this process


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs train.py's main in an empty folder with a text; gives (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train/train.py", *words])
        try:
            code = loop.main()
        except SystemExit as error:  # the command-line parser's own
            code = int(error.code or 0)
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--top-k 9", "top_k=9: must be at most num_experts=8"),
        ("--model-dim 100 --num-heads 6", "num_heads=6: must be a divisor of model_dim=100"),
        ("--capacity-factor 0.0001", "capacity_factor=0.0001: must be at least 0.007813"),
        ("--capacity-factor -1", "factor=-1.0: must be a number above 0"),
        ("--capacity-factor 0", "capacity_factor=0.0: must be a number above 0, or none"),
        ("--dropout 1", "dropout=1.0"),
        ("--warmup-steps 9999", "warmup_steps=9999"),
        ("--final-learning-rate 0.1", "final_learning_rate=0.1"),
        ("--batch-size 0", "batch_size=0"),
        ("--num-devices 99", "num_devices=99"),
        ("--mesh data=99", "mesh='data=99': must be of at most"),
        ("--mesh data=0", "mesh='data=0': must be at least one device on each axis"),
        ("--mesh data", "mesh='data': must be axes with their number of devices, such as data=4,expert=2"),
        ("--mesh data=2,data=2", "mesh='data=2,data=2': must be with data once"),
        ("--exchange ring", "exchange='ring': must be auto or xla without expert devices, as --mesh data=4,expert=2"),
        ("--mesh experts=2", "mesh='experts=2': must be of the axes data, expert, sequence, tensor"),
        ("--sample-prompt ~", "sample_prompt='~'"),
        ("--data nowhere.txt", "data='nowhere.txt': must be a readable text file"),
        ("--block-size 900", "data='text.txt': must be longer"),
        ("--out text.txt/x", "out='text.txt/x': must be a folder that can be written (Not a directory)"),
        ("--out .", "out='.': must be new or empty; it holds no run"),
        ("--resume --out nowhere", "resume: must find a run, nowhere/config.json does not exist"),
        ("--resume", "resume=True: must be used with --out"),
        ("--dispatcher grouped", "dispatcher='grouped'"),
    ],
)
def test_bad_requests_are_one_line(command, tmp_path: Path, words: str, message: str) -> None:
    extra = () if "--data" in words else ("--data", "text.txt")
    code, error = command(*words.split(), *extra)
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.rglob("*") if path.name != "runs"] == ["text.txt"], "nothing may be written"


def test_unknown_flags_are_answered_with_the_nearest(command, tmp_path: Path) -> None:
    code, error = command("--num-layer", "4")
    assert code == 2 and "--num-layer" in error and "--num-layers" in error and "Traceback" not in error
    assert command("--steps", "many")[0] == 2
    assert command("--framework", "tensorflow")[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(("words", "missing"), [("--framework torch", "torch"), ("--logger mlflow", "mlflow")])
def test_missing_extras_are_named(command, monkeypatch: pytest.MonkeyPatch, words: str, missing: str) -> None:
    for module in ("moe_train.task", "moe_train.run.logger"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    code, error = command(*words.split(), "--data", "text.txt")
    assert code == 2 and error.count("\n") == 1
    assert f"pip install 'jax-moe[{missing}]'" in error
