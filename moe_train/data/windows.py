"""`--data-loader grain`: windows of the training split in epochs, shuffled and read ahead by Grain.

With T = block_size, window i is tokens i*T to i*T + T, the last of them a target only: an epoch predicts every token
once, but for the first and fewer than T at the end. Grain shuffles the windows anew for every epoch, by the seed; the
batch of step s is windows s*B to s*B + B - 1 of that endless order. So a batch is a function of seed and step, on any
number of processes, and the position of a resumed run is its step.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from jax_moe.config.checks import require

THREADS, AHEAD = 4, 16  # threads that read, and the batches that they may be ahead


def check_loader(name: str) -> None:
    """Raises ValueError if the loader needs a package that is not installed."""
    there = name != "grain" or find_spec("grain") is not None
    require(there, "data_loader", name, "left out without Grain; `pip install 'jax-moe[data]'`")


class Windows:
    """Batches [B, T + 1] for steps before `stop`; of several processes each reads its `rows` only."""

    def __init__(
        self, tokens: np.ndarray, seed: int, batch_size: int, block_size: int, stop: int, rows: np.ndarray | None
    ):
        import grain

        number = (len(tokens) - 1) // block_size
        order = grain.MapDataset.range(number).seed(seed).shuffle().repeat()
        self.batches = order.batch(batch_size).map(partial(read, tokens, block_size, rows))
        self.options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
        self.stop, self.next = stop, -1
        self.reading: Any = None

    def batch(self, step: int) -> np.ndarray:
        """The batch of a step; reading goes on with the steps after it."""
        if step != self.next:
            self.close()
            self.reading = iter(self.batches[step : self.stop].to_iter_dataset(self.options))
        self.next = step + 1
        return next(self.reading)

    def close(self) -> None:
        """Ends the threads."""
        if self.reading is not None:
            self.reading.close()
        self.reading, self.next = None, -1


def read(tokens: np.ndarray, block_size: int, rows: np.ndarray | None, window_B: np.ndarray) -> np.ndarray:
    """The windows of these numbers, or those in `rows` of them: [B, T + 1] tokens."""
    window_B = window_B if rows is None else window_B[rows]
    start_B1 = window_B.astype(np.int64)[:, None] * block_size
    return tokens[start_B1 + np.arange(block_size + 1)].astype(np.int32, copy=False)
