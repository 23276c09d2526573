"""How the processes of a run start and find each other; nothing here changes a number of the run, no run stores it."""

from dataclasses import dataclass

from jax_moe.config.checks import require
from moe_train.configs.values import check_values


@dataclass(frozen=True)
class Launch:
    """Several processes, one run (`jax.distributed.initialize`): the same command on each of them."""

    coordinator: str | None = None
    """HOST:PORT at which process 0 listens, to be reached from all others; used with --processes and --process-id."""
    processes: int | None = None
    """The number of processes that train together."""
    process_id: int | None = None
    """The number of this process, from 0; process 0 alone writes and prints."""
    distributed: bool = False
    """Several processes that SLURM, GKE or a TPU pod has started: jax finds their coordinator and numbers."""
    coordinator_timeout: int = 300
    """Seconds in which all processes must have found each other."""
    heartbeat_timeout: int = 100
    """Seconds without a sign of life after which a process counts as dead, and the others end."""
    compilation_cache: bool = True
    """Keep compiled programs in ~/.cache/jax-moe, and take them from there (JAX only)."""

    @property
    def alone(self) -> bool:
        """Whether the run is one process."""
        return self.coordinator is None and not self.distributed


def check_launch(launch: Launch) -> None:
    """Raises ValueError for options that do not describe one process or several."""
    check_values(launch)
    for name in ("coordinator_timeout", "heartbeat_timeout"):
        require(getattr(launch, name) >= 1, name, getattr(launch, name), "at least 1 second")
    numbers = {"processes": launch.processes, "process_id": launch.process_id}
    if launch.coordinator is None:
        for name, value in numbers.items():
            require(value is None, name, value, "left out without --coordinator HOST:PORT")
        return
    require(not launch.distributed, "distributed", True, "left out with --coordinator, or used in place of it")
    host, _, port = launch.coordinator.rpartition(":")
    known = bool(host) and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536
    require(known, "coordinator", launch.coordinator, "HOST:PORT of process 0, such as 10.0.0.1:1234")
    for name, value in numbers.items():
        require(value is not None, name, value, "given with --coordinator")
    assert launch.processes is not None and launch.process_id is not None
    require(launch.processes >= 1, "processes", launch.processes, "at least 1")
    known = 0 <= launch.process_id < launch.processes
    require(known, "process_id", launch.process_id, f"0 to {launch.processes - 1}, as --processes={launch.processes}")
