"""Commands to be killed: a process that has imported everything forks a child per command, so that starts are fast.

JAX has no threads before its first use, and the parent never uses it. A child kills itself, as `kill -9` would,
at a given moment. An audit hook counts moments: every operation of Python on files below its folder.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
EVENTS = {
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "os.truncate", "shutil.rmtree"
}
NEVER = 10**9


class Zygote:
    """Runs commands in `folder`, one after the other."""

    def __init__(self, folder: Path, imports: str, environment: dict[str, str]):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "parity_tests.shared.zygote", str(folder), imports],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        )

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def run(self, *arguments: object, kill_at: int = NEVER, most_bytes: int = -1) -> "Done":
        """Runs a command; with `most_bytes` no file can grow beyond that size, as on a full disk."""
        return self.together([arguments], [kill_at], [most_bytes])[0]

    def together(
        self, commands: Sequence[Sequence[object]], kill_at: Sequence[int] = (), most_bytes: Sequence[int] = ()
    ) -> list["Done"]:
        """Runs commands at the same time, each in a child of its own."""
        assert self.process.stdin is not None and self.process.stdout is not None
        words = [[str(argument) for argument in arguments] for arguments in commands]
        kills, sizes = kill_at or [NEVER] * len(words), most_bytes or [-1] * len(words)
        self.process.stdin.write(json.dumps([words, list(kills), list(sizes)]) + "\n")
        self.process.stdin.flush()
        return [Done(*answer) for answer in json.loads(self.process.stdout.readline())]


class Done(NamedTuple):
    """Exit code or minus the signal, the printed text, the number of moments (-1: killed), and when it ended."""

    status: int
    printed: str
    moments: int
    seconds: float  # since the start


def main(folder: Path, imports: str) -> None:
    """Serves commands from stdin; `imports` is `module:function`."""
    name, function = imports.split(":")
    __import__(name)
    os.chdir(folder)
    for line in sys.stdin:
        commands, kill_at, most_bytes = json.loads(line)
        ended: dict[int, tuple[int, float]] = {}
        children, since = [], time.monotonic()
        for number, arguments in enumerate(commands):
            printed, moments = (folder.parent / f"{folder.name}.{number}.{what}" for what in ("printed", "moments"))
            moments.unlink(missing_ok=True)
            child = os.fork()
            if child == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes[number], resource.RLIM_INFINITY))
                _command(getattr(sys.modules[name], function), arguments, kill_at[number], printed, moments)
            children.append((child, printed, moments))
        for _ in children:
            child, status = os.wait()
            ended[child] = os.waitstatus_to_exitcode(status), time.monotonic() - since
        answers = []
        for child, printed, moments in children:
            seen = int(moments.read_text()) if moments.exists() else -1
            answers.append((ended[child][0], printed.read_text("utf-8"), seen, ended[child][1]))
        print(json.dumps(answers), flush=True)


def _command(function: Any, arguments: list[str], kill_at: int, printed: Path, moments: Path) -> None:
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    inside, seen = str(Path.cwd()), 0

    def hook(event: str, about: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in EVENTS and about and isinstance(about[0], str | os.PathLike):
            path = os.fspath(about[0])
            if isinstance(path, str) and (not os.path.isabs(path) or path.startswith(inside)):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.argv = ["train/train.py", *arguments]
    sys.addaudithook(hook)
    status = 70
    try:
        status = function()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 71
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        moments.write_text(str(seen))
        os._exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
