"""Settings for all tests: full matrix precision, one thread for PyTorch, the same Hypothesis examples on every run.

fp64 in JAX is switched on only around tests that need it (`sides.precision`): the others run as users run them. Without
PyTorch, tests that compare with it are skipped with that reason.
"""

import contextlib
import gc
import importlib.util
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_default_matmul_precision", "highest")

# Compiling takes the time in tests, not running: these options compile three times faster into slower code, also in
# processes that tests start. The fp32 columns of the parity table are compiled as users compile (`quick.AS_USERS`).
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # newer XLA has no such emitters to leave out
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

settings.register_profile(
    "derandomised", derandomize=True, deadline=None, max_examples=40, print_blob=False, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.register_profile("search", parent=settings.get_profile("derandomised"), derandomize=False, max_examples=1000)
settings.load_profile("derandomised")

pytest.register_assert_rewrite("parity_tests.cli.commands")

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")

PROGRAMS = "PARITY_TESTS_PROGRAMS"  # names the folder of compiled programs to the workers of this session
LONGEST = ("test_whole_runs.py", "test_kills.py", "test_documents.py", "test_fuzz.py", "test_hypothesis.py")
MAPS = Path("/proc/self/maps")
TESTS = itertools.count(1)
MOST_MAPS = 35_000  # Linux gives a process 65,530; without more, XLA aborts the process


def pytest_configure(config: pytest.Config) -> None:
    """Workers share compiled programs: XLA's key of a program covers all that determines its code.

    Commands that tests start as subprocesses have a folder of their own: some are killed while they write.
    """
    for what in ("reading", "writing"):  # half written, or the folder was removed: the program is compiled
        config.addinivalue_line("filterwarnings", f"ignore:Error {what} persistent compilation cache entry")
    if PROGRAMS not in os.environ:
        os.environ[PROGRAMS] = folder = tempfile.mkdtemp(prefix="programs-")
        os.environ["XDG_CACHE_HOME"] = f"{folder}/of-commands"
        config.add_cleanup(lambda: (os.environ.pop(PROGRAMS), shutil.rmtree(folder, ignore_errors=True)))
    jax.config.update("jax_compilation_cache_dir", os.environ[PROGRAMS])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def pytest_collection_finish() -> None:
    """Collects garbage rarely: looking at the many objects of tracing took a tenth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, so that no worker waits for them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def few_compiled_programs() -> Iterator[None]:
    """Drops compiled programs before the memory maps that each of them holds run out; looks at every tenth test."""
    yield
    if next(TESTS) % 10 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@contextlib.contextmanager
def without_shapes() -> Iterator[None]:
    """Without the checks of annotated shapes and types."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns off the type checks of pytest, so that our own errors are raised, as for users, and long loops are fast."""
    with without_shapes():
        yield


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """For tests that spend their time on compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def small_programs() -> Iterator[None]:
    """For tests of other matters than dispatch: what is "auto" dispatches by einsums, a third of the grouped program.

    The other name of the highest precision keeps the programs apart from those of other modules.
    """
    from jax_moe import kernels

    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("float32"):
        patch.setattr(kernels, "grouped_dispatch", kernels.einsum_dispatch)
        yield


@pytest.fixture(scope="module", autouse=True)
def by_folder(request: pytest.FixtureRequest) -> Iterator[None]:
    """`small_programs` in the folders that test other matters than dispatch. Annotated shapes are checked in the
    folders of the packages that have them; elsewhere that takes up to a tenth of the time (`make nightly` has all).
    """
    folder = request.path.parent.name
    if folder in ("cli", "families", "microscope", "porting", "train"):
        request.getfixturevalue("small_programs")
    checked = folder in ("layers", "microscope", "sharding") or os.environ.get("SHAPES_EVERYWHERE")
    with contextlib.nullcontext() if checked else without_shapes():
        yield


# jax_moe is imported inside functions: this file is read before jaxtyping's hook is installed.


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-MoE folder in five shards, with a tokenizer and code that must not run. Tests do not change it."""
    from jax_moe import save_pretrained
    from parity_tests.porting.decoder_cases import decoder

    folder = tmp_path_factory.mktemp("whole") / "model"
    save_pretrained(decoder("qwen2_moe"), folder, model_type="qwen2_moe", max_shard_bytes=4000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit(7)")
    return folder


@pytest.fixture(scope="session")
def orbax(whole: Path) -> Path:
    """The same model as an Orbax checkpoint. Tests do not change it."""
    from moe_cli.main import main

    assert main(["port", str(whole), str(whole.parent / "orbax-0.1")]) == 0
    return whole.parent / "orbax-0.1"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole`."""
    return Path(shutil.copytree(whole, tmp_path / "model"))
