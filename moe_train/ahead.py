"""What a run needs at its end, checked before its first step."""

import tempfile
from math import ceil
from pathlib import Path

from jax_moe.config.checks import require
from jax_moe.config.models import MakeMoEConfig
from jax_moe.disk import check_space
from jax_moe.guarded import require_memory
from moe_train.configs.settings import TrainConfig
from moe_train.run import folder as run_folder
from moe_train.task import Task

LONGEST_SAMPLE = 1_000_000  # tokens
FLOATS = 3  # fp32 numbers a parameter: the weight and two moments


def check_end(config: TrainConfig, task: Task, folder: Path) -> None:
    """Raises ValueError if the sample is too long, or if the folder for the trained model is taken."""
    length = config.sample_length
    require(length <= LONGEST_SAMPLE, "sample_length", length, f"at most {LONGEST_SAMPLE:,}")
    model = task.model
    if isinstance(model, MakeMoEConfig):
        return
    from jax_moe.generation.cache import cache_bytes

    positions = length + config.model.block_size  # its cache may grow with the sample
    require_memory(cache_bytes(model.config, 1, positions, "float32"), f"sample_length={length}")
    target = folder / "pretrained"
    free = not target.exists() or (target / "config.json").is_file()
    require(free, "out", str(folder), f"a folder that holds no other file or folder named {target.name}")


def check_export(config: TrainConfig, folder: Path) -> None:
    """Raises ValueError unless `--export` is a folder, new or empty and apart from others, that can be written."""
    if config.export is None:
        return
    name, target = config.export, Path(config.export).resolve()
    for other in filter(None, (str(folder), config.pretrained)):
        place = Path(other).resolve()
        apart = target != place and target not in place.parents and place not in target.parents
        require(apart, "export", name, f"neither {other} nor inside or around it")
    try:
        empty = target.is_dir() and not any(target.iterdir())
        require(not target.exists() or empty, "export", name, "a new folder, or an empty one")
        require(target.parent.is_dir(), "export", name, f"in a folder that exists, {target.parent} does not")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ValueError(f"export={name!r}: must be a folder that can be written ({error.strerror})") from None


def check_disk(config: TrainConfig, num_parameters: int, folder: Path) -> None:
    """Raises ValueError if a disk has no room for the checkpoints that are kept and the model, or for its export."""
    due = max(ceil(config.steps / config.checkpoint_every), 1)
    most = config.keep_checkpoints + config.keep_best + 1  # on the disk while the newest is written
    new = max(min(most - len(run_folder.saved_steps(folder)), due), 1)
    check_space(folder / "checkpoints", (new * FLOATS + 1) * 4 * num_parameters)
    if config.export is not None:
        check_space(Path(config.export).absolute(), 4 * num_parameters)
