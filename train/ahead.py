"""What a run needs at its end, looked at before its first step."""

from math import ceil
from pathlib import Path

from jax_moe.config.checks import require
from jax_moe.config.models import MakeMoEConfig
from jax_moe.disk import check_space
from jax_moe.guarded import require_memory
from train.configs.settings import TrainConfig
from train.run import folder as run_folder
from train.task import Task

LONGEST_SAMPLE = 1_000_000  # tokens
KEPT = 3  # checkpoints on the disk while the third is being written
NUMBERS = 3  # of four bytes a parameter: itself and its two moments


def check_end(config: TrainConfig, task: Task, folder: Path) -> None:
    """Raises ValueError if the sample is longer than anything that could be made, or the model has no place."""
    length = config.sample_length
    require(length <= LONGEST_SAMPLE, "sample_length", length, f"at most {LONGEST_SAMPLE:,}")
    model = task.model
    if isinstance(model, MakeMoEConfig):
        return
    decoder = model.config  # its cache of keys and values grows with the sample
    cache = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * (length + config.model.block_size) * 4
    require_memory(cache, f"sample_length={length}")
    target = folder / "pretrained"
    free = not target.exists() or (target / "config.json").is_file()
    require(free, "out", str(folder), f"a folder in which {target.name} is no other folder or file")


def check_disk(config: TrainConfig, num_parameters: int, folder: Path) -> None:
    """Raises ValueError if the checkpoints that are kept and the model are larger than what is free."""
    still = max(ceil(config.steps / config.checkpoint_every), 1)
    new = max(min(KEPT - len(run_folder.saved_steps(folder)), still), 1)
    check_space(folder / "checkpoints", (new * NUMBERS + 1) * 4 * num_parameters)
