"""The processes of a run: how they meet, agree and fail together.

A failure in one process is a failure in all, with one message. Texts travel as bytes through the collectives of jax,
which all processes must call in the same order; with one process nothing travels and jax is not imported.
"""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, TypeVar

from moe_train.configs.launch import Launch, check_launch
from moe_train.run.interrupt import Interrupt

T = TypeVar("T")
GRACE = 60  # seconds by which jax waits longer than we do: it ends the process with pages of text
REFUSED, FAILED = 2, 1  # exit codes: a wrong request, an early end


class AgreedError(Exception):
    """A failure that all processes know of; `status` is the exit code."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Processes:
    """So many processes, of which this is number `index`."""

    count: int = 1
    index: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.index == 0

    def everywhere(self, work: Callable[[], T]) -> T:
        """What `work` returns in this process. If it fails in any process, all raise the first one's error.

        With one process the error itself is raised; with several a ValueError or OSError of the same message.
        """
        if self.count == 1:
            return work()
        result, failure = None, ""
        try:
            result = work()
        except (ValueError, OSError) as error:
            failure = json.dumps([isinstance(error, ValueError), _one_line(error)])
        except SystemExit:  # from the parser of options, which has printed why
            failure = json.dumps([True, "its options cannot be read, see its own output"])
        said = self.gather(failure)
        for index, text in enumerate(said):
            if text:
                wrong, message = json.loads(text)
                where = f"process {index}: " if index else ""
                raise AgreedError(f"{where}{message}", REFUSED if wrong else FAILED)
        return result  # type: ignore[return-value]

    def alone(self, work: Callable[[], T]) -> T | None:
        """What `work` returns in process 0, None in the others, which wait for it; its error is raised in all."""
        return self.everywhere(work if self.first else lambda: None)  # type: ignore[arg-type, return-value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag if self.count == 1 else "yes" in self.gather("yes" if flag else "")

    def agree(self, values: Mapping[str, Any]) -> None:
        """Raises an error that names the entries which are not the same in all processes."""
        if self.count == 1:
            return
        said = [json.loads(text) for text in self.gather(json.dumps(values))]
        for index, other in enumerate(said):
            differ = sorted(name for name in said[0].keys() | other.keys() if said[0].get(name) != other.get(name))
            if differ:
                pairs = [f"{name}={said[0].get(name)!r:.80} and {other.get(name)!r:.80}" for name in differ[:5]]
                text = f"processes 0 and {index} must be started with the same settings: {', '.join(pairs)}"
                raise AgreedError(text, REFUSED)

    def gather(self, text: str) -> list[str]:
        """The text of each process, in order."""
        if self.count == 1:
            return [text]
        import numpy as np
        from jax.experimental.multihost_utils import process_allgather

        raw = text.encode()
        sizes = process_allgather(np.asarray(len(raw), np.int32)).ravel().tolist()
        if not max(sizes):
            return [""] * len(sizes)
        padded = np.frombuffer(raw.ljust(max(sizes), b"\0"), np.uint8)
        rows = np.asarray(process_allgather(padded))
        return [rows[i, :size].tobytes().decode() for i, size in enumerate(sizes)]


ALONE = Processes()


class InterruptOfAny(Interrupt):
    """With several processes: all stop at the same step, the first at which they meet after a signal to any of them."""

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes, self.signalled = processes, False

    def meet(self) -> None:
        self.requested = self.processes.any(self.signalled)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        self._restore()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'the output'}: cannot be written ({error.strerror})"
    return text


def meet(launch: Launch) -> Processes:
    """The processes of this run, once all of them have met; to be called before jax looks for devices.

    Raises ValueError for wrong options. If the others do not come in time, ends the process with one line. The
    processes other than the first print nothing to stdout from then on.
    """
    check_launch(launch)
    if launch.alone:
        return ALONE
    import jax

    # It would take SIGTERM from the run, which saves a checkpoint when it is asked to end.
    jax.config.update("jax_enable_preemption_service", False)
    with _in_time(launch):
        try:
            jax.distributed.initialize(
                launch.coordinator, launch.processes, launch.process_id,
                initialization_timeout=launch.coordinator_timeout + GRACE,
                heartbeat_timeout_seconds=launch.heartbeat_timeout,
            )
        except (ValueError, RuntimeError) as error:  # no cluster is found; the port is taken
            where = f"coordinator={launch.coordinator!r}: must be HOST:PORT of process 0, and a free port"
            if launch.distributed:
                where = "distributed=True: must be used under SLURM, GKE or on a TPU pod, elsewhere --coordinator"
            raise ValueError(f"{where} (jax: {_one_line(error)[:200]})") from None
        processes = Processes(jax.process_count(), jax.process_index())
        if not processes.first:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        processes.any(False)  # they also exchange their devices
    return processes


@contextmanager
def _in_time(launch: Launch) -> Iterator[None]:
    """Ends the process with one line if the body has not ended in time: jax would abort, or wait on."""
    seconds = launch.coordinator_timeout
    many = f"all {launch.processes} processes" if launch.processes else "all processes"
    where = "distributed=True" if launch.distributed else f"coordinator={launch.coordinator!r}"

    def end() -> None:
        needed = f"must be reached by {many} within coordinator_timeout={seconds} seconds"
        print(f"error: {where}: {needed}; start them all, or wait longer", file=sys.stderr, flush=True)
        os._exit(REFUSED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def leave_at_once(error: BaseException, saved: str) -> NoReturn:
    """Ends a process of several after an error that the others do not know of, without waiting for them.

    Most often it is the end of another process, in the words of what has carried numbers between them.
    """
    import jax

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    text = " ".join(str(error).split())[:300]
    if not isinstance(error, jax.errors.JaxRuntimeError | KeyboardInterrupt) and "Gloo" not in text:
        traceback.print_exception(error)
    said = f"a process has ended or failed, the others cannot go on without it ({type(error).__name__}: {text})"
    print(f"error: {said}{saved}", file=sys.stderr, flush=True)
    os._exit(FAILED)
