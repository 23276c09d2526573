"""Commands keep compiled programs, and read them again: in processes of their own, as jax reads its settings once."""

import os
import subprocess
import sys
from pathlib import Path

COMMAND = "import sys; from moe_cli.main import main; sys.exit(main())"
GENERATE = "--tokens", "1,2,3", "--max-new-tokens", "3", "--temperature", "0"


def generated(folder: Path, home: Path, *options: str) -> str:
    """What `jax-moe generate` prints, with its cache in `home`; it must say nothing else."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(home), "JAX_LOGGING_LEVEL": "WARNING"}
    command = [sys.executable, "-W", "default", "-c", COMMAND, "generate", str(folder), *GENERATE, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "cache" not in done.stderr, done.stderr
    return done.stdout


def test_programs_are_kept_and_damaged_ones_compiled_again(folder: Path, tmp_path: Path) -> None:
    """The next start adds no program, and compiles what it cannot read; without a cache the same is printed."""
    (tmp_path / "file").write_text("")
    first = generated(folder, tmp_path)
    kept = sorted(tmp_path.rglob("*-cache"))
    assert any("_start" in path.name for path in kept), sorted(path.name for path in tmp_path.rglob("*"))
    assert {path.parent.stat().st_mode & 0o777 for path in kept} == {0o700}
    kept[0].write_bytes(kept[0].read_bytes()[:-20])
    assert generated(folder, tmp_path) == first and sorted(tmp_path.rglob("*-cache")) == kept
    assert generated(folder, tmp_path / "file") == first
    assert generated(folder, tmp_path / "off", "--no-compilation-cache") == first and not (tmp_path / "off").exists()
