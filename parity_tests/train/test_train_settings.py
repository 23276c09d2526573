"""Settings of a run: values that affect numbers are checked, whatever their source; defaults adapt to others."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jax_moe import guarded
from moe_train import options
from moe_train.configs import PRESETS
from moe_train.configs.adapt import fit_settings, given
from moe_train.configs.launch import Launch
from moe_train.configs.settings import LATER, TrainConfig, check, flat, from_flat
from moe_train.run import folder as run_folder
from moe_train.task import Task, read_task

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 20
NAMES = sorted(flat(TrainConfig()))
WRONG: list[Any] = [
    float("inf"), float("-inf"), float("nan"), 1e300, -1e300, 1e-300, 10**30, -(10**30), -1, 0, 2**31, 2**32, 1.5, True,
    "4", "", "nonsense", "\0", "\ud800", [], {}, [1], None,
]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def ask(*words: str) -> Task:
    """The settings that train.py reads from a command line, before it writes anything."""
    config, saved, _, free = options.read_settings(["--data", "text.txt", *words])
    check(config)
    assert saved is None
    return read_task(config, free)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_every_kind_is_right_or_one_line(text: Path, name: str) -> None:
    """A value in a run's config.json comes back unchanged, or a ValueError names the setting."""
    accepted = []
    for value in WRONG:
        values = {**flat(dataclasses.replace(TrainConfig(), data="text.txt")), name: value}
        try:
            config = from_flat(json.loads(json.dumps(values)))
            check(config)
            read_task(config)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, error
            assert name in str(error) or "bytes of memory" in str(error), error
        else:
            accepted.append(value)
    for value in accepted:
        assert not (isinstance(value, float) and (value != value or abs(value) > 1e38 or 0 < abs(value) < 1e-38)), value
        assert value is not True or flat(TrainConfig())[name] in (True, False)
        assert not isinstance(value, (list, dict))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seed 4294967296", "seed=4294967296: must be 0 to 4294967295"),
        ("--eps inf", "eps=inf: must be 0 or a number from 1.2e-38 to 3.4e+38"),
        ("--eps 1e-60", "eps=1e-60: must be 0 or a number"),
        ("--beta2 0.99999999999", "beta2=0.99999999999: must be at least 0 and below 1, in fp32 too"),
        ("--learning-rate 1e39", "learning_rate=1e+39: must be"),
        ("--sample-temperature nan", "sample_temperature=nan: must be"),
        ("--capacity-factor inf", "capacity_factor=inf: must be"),
        ("--dropout nan", "dropout=nan: must be"),
        ("--batch-size 99999999999999", "batch_size=99999999999999: must be at most 2147483647"),
        (
            "--num-layers 1000000000",
            "training 632,560,000,008,861 parameters on batches of 16 x 32 tokens needs about 10,",
        ),
        ("--batch-size 2000000000", "bytes of memory: must be at most"),
        ("--model-dim 2000000000 --num-heads 1", "bytes of memory: must be at most"),
        ("--num-experts 2000000000 --capacity-factor none", "bytes of memory: must be at most"),
        (
            "--data-dtype uint16 --data tinyshakespeare",
            "data_dtype='uint16': must be left out with data='tinyshakespeare'",
        ),
        ("--init-from nowhere", "init_from='nowhere': must be a run, a folder, or a .pt or .safetensors file"),
        ("--lr 1e-3", "--lr: is --learning-rate here"),
        ("--max_iters=100", "--max-iters: is --steps here"),
        ("--n-embd 100", "--n-embd: is --model-dim here"),
        # settings that the user gave never change
        ("--steps 40 --warmup-steps 100", "warmup_steps=100: must be at least 0 and below steps=40"),
        ("--model-dim 100 --num-heads 6", "num_heads=6: must be a divisor of model_dim=100"),
        ("--num-experts 1 --top-k 2", "top_k=2: must be at most num_experts=1"),
        ("--learning-rate 1e-4 --final-learning-rate 3e-4", "final_learning_rate=0.0003: must be at most"),
        ("--block-size 900", "data='text.txt': must be longer"),
        ("--batch-size 1 --block-size 2 --capacity-factor 1", "capacity_factor=1.0: must be at least 2"),
        ("--sample-prompt ~", "sample_prompt='~'"),
    ],
)
def test_what_is_asked_for_and_cannot_be(text: Path, words: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        ask(*words.split())
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_largest_seed_is_a_seed(text: Path) -> None:
    assert ask("--seed", str(2**32 - 1)).config.seed == 2**32 - 1


@pytest.mark.parametrize(
    ("words", "adapted"),
    [
        ("--steps 40", {"warmup_steps": 4}),
        ("--steps 1", {"warmup_steps": 0}),
        ("--steps 101", {"warmup_steps": 100}),
        ("--model-dim 100", {"num_heads": 5}),
        ("--model-dim 1", {"num_heads": 1}),
        ("--num-experts 1", {"top_k": 1}),
        ("--learning-rate 1e-4", {"final_learning_rate": 1e-5}),
        ("--decay none", {"final_learning_rate": 0.0}),
        ("--batch-size 1 --block-size 2", {"capacity_factor": 2.0}),
        ("--num-experts 640 --batch-size 4 --block-size 8", {"capacity_factor": 10.0}),
        ("--data short.txt", {"block_size": 3, "sample_prompt": "z"}),
        ("--data short.txt --batch-size 1", {"block_size": 3, "capacity_factor": 1.5, "sample_prompt": "z"}),
        ("--num-devices 3", {"batch_size": 18}),
        ("--mesh data=3,expert=2", {"batch_size": 18}),
        ("--preset published --steps 3", {"warmup_steps": 0, "final_learning_rate": 0.0}),
    ],
)
def test_a_default_goes_with_what_is_asked_for(text: Path, words: str, adapted: dict[str, Any]) -> None:
    """Only the adapted defaults change."""
    # 40 characters, the last four for validation
    text.with_name("short.txt").write_text("abcdefghij" * 3 + "abcdefzyxz")
    config = ask(*words.split()).config
    found = flat(config)
    assert {name: found[name] for name in adapted} == adapted
    usual = flat(PRESETS["published" if "published" in words else "quick"])
    asked = given(["--data", "text.txt", *words.split()]) | {"preset"}
    assert {name for name in NAMES if found[name] != usual[name]} <= set(adapted) | asked
    for name in asked - {"preset", "data"}:
        value = words.split()[words.split().index(f"--{name.replace('_', '-')}") + 1]
        assert str(found[name]) == value.replace("1e-4", "0.0001")


def test_the_options_that_a_user_gave() -> None:
    words = [
        "--steps", "4", "--no-noise", "--batch_size=3", "--eval-noise", "--sample-prompt", "steps", "--unknown", "-h"
    ]
    assert given(words) == {"steps", "noise", "batch_size", "eval_noise", "sample_prompt"}
    config = dataclasses.replace(TrainConfig(), steps=3)
    assert fit_settings(config, frozenset()) == config


def test_other_names_are_no_names_here_and_lead_to_some() -> None:
    names = {*NAMES, *vars(Launch())}
    for other, ours in options.ALIASES.items():
        assert ours.replace("-", "_") in names, ours
        assert other.replace("-", "_") not in names, other


def test_settings_of_the_first_version_are_read(tmp_path: Path) -> None:
    values = flat(TrainConfig())
    first = from_flat({name: value for name, value in values.items() if name not in LATER})
    assert first == dataclasses.replace(TrainConfig(), exchange="xla"), "which was the only way then"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {"batch_size": "4"}}, "batch_size='4': must be an integer"),
        ({"settings": {"seed": {}}}, "seed={}: must be an integer"),
        ({"settings": {"dropout": "0.1"}}, "dropout='0.1': must be 0 or a number"),
        ({"settings": {"framework": "tensorflow"}}, "framework='tensorflow': must be one of 'jax', 'torch'"),
        ({"settings": {"noise": 1}}, "noise=1: must be True or False"),
        ({"settings": None}, "settings=None: must be an object"),
        ({"settings": 7}, "settings=7: must be an object"),
        ({"text": None}, "text=None: must be an object with a sha256"),
        ({"text": {}}, "text={}: must be an object with a sha256"),
        ({"text": {"sha256": 3}}, "must be an object with a sha256"),
        ({"text": {"sha256": "x", "vocabulary": "aa"}}, "vocabulary='aa': must be different characters"),
        ({"text": {"sha256": "x", "vocabulary": ["a"]}}, "vocabulary=['a']: must be different characters"),
        ({"text": {"sha256": "x", "vocabulary": "\ud800"}}, "surrogates not allowed"),
        ({"model": None}, "model=None: must be an object"),
        ({"model": {"vocab_size": "65"}}, "vocab_size='65': must be an integer"),
    ],
)
def test_a_damaged_run_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    whole = {"settings": flat(TrainConfig()), "text": {"sha256": "x", "vocabulary": "ab"}, "model": {"vocab_size": 2}}
    part = change.get("settings")
    changed = {**whole, **change, **({"settings": {**whole["settings"], **part}} if isinstance(part, dict) else {})}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(whole))
    assert run_folder.read_config(tmp_path)["config"] == TrainConfig()
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError) as caught:
        run_folder.read_config(tmp_path)
    assert said in str(caught.value) and str(caught.value).startswith(f"{path}: must be the settings of a run (")
    assert "\n" not in str(caught.value)
    for name in whole:
        path.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        with pytest.raises(ValueError, match="must be the settings of a run"):
            run_folder.read_config(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        run_folder.read_config(tmp_path)


def test_memory_is_that_of_the_parameters_and_the_batch(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fits to the byte, and not with a byte less; parameters are counted exactly."""
    from moe_train.memory import num_parameters

    task = ask("--num-layers", "2")
    assert not isinstance(task.model, str)
    parameters = num_parameters(task.model)  # type: ignore[arg-type]
    V, T, B = task.text.vocab_size, 32, 16
    needed = 16 * parameters + B * T * (2 * 96 * 4 + 4 * V) + 12 * B * (T + 1)
    monkeypatch.setattr(guarded, "available_memory", lambda: needed)
    ask("--num-layers", "2")
    monkeypatch.setattr(guarded, "available_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=f"needs about {needed:,} bytes of memory: must be at most {needed - 1:,}"):
        ask("--num-layers", "2")
