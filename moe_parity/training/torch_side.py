"""The PyTorch side of a compared training run: a plain loop of backward for each part, clipping, and a step."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_moe.porting.torch_tensors import import_torch, tensor_to_numpy
from moe_parity.sides.hooks import watching
from moe_parity.training.jax_side import Curve
from moe_parity.training.settings import Numbers, TrainSettings

SMALL = 1 << 20  # a model with fewer parameters runs on one thread
Loss = Callable[[Any, Mapping[str, Any], TrainSettings], tuple[Any, np.ndarray]]


def makemoe_loss(module: Any, part: Mapping[str, Any], settings: TrainSettings) -> tuple[Any, np.ndarray]:
    """The loss, and the experts [L, tokens, K], as `makemoe_loss` of the JAX side."""
    import torch_ref

    tokens = part["tokens"]
    draws = torch_ref.Randomness(**{name: value for name, value in part.items() if name != "tokens"})
    output = module.run(tokens[:, :-1], randomness=draws)
    loss = torch_ref.next_token_loss(output.logits_BTV, tokens[:, 1:])
    loss = loss + settings.balance_loss_weight * torch_ref.pool_balance_loss(output.stats, module.config.moe)
    loss = loss + settings.router_z_loss_weight * output.stats.router_z_loss.mean()
    return loss, output.expert_LBTK.flatten(1, 2).numpy()


@dataclass(frozen=True)
class TransformersLoss:
    """The training loss of transformers, balance loss included, and the experts [L, tokens, K] that its mixtures call.

    `experts` are the paths of their modules.
    """

    experts: tuple[str, ...]

    def __call__(self, module: Any, part: Mapping[str, Any], settings: TrainSettings) -> tuple[Any, np.ndarray]:
        chosen: list[np.ndarray] = []
        with watching() as watch:
            for path in self.experts:
                watch.out_of(module.get_submodule(path), lambda y, x, index, *_: chosen.append(index.numpy()))
            output = module(part["tokens"], labels=part["tokens"], use_cache=False)
        return output.loss, np.stack(chosen)


@contextmanager
def _threads_for(module: Any) -> Iterator[None]:
    """Limits a small model to one thread: on a busy machine, splitting its work costs ten times the work."""
    torch = import_torch("parity")
    before = torch.get_num_threads()
    if sum(value.numel() for value in module.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchTrainer:
    """A module, its optimizer (torch.optim.AdamW unless given) and the training loop.

    `biases` are the names of its mixtures' correction biases, which no optimizer moves.
    """

    def __init__(
        self, module: Any, settings: TrainSettings, loss: Loss, optimizer: Any = None, biases: tuple[str, ...] = ()
    ):
        torch = import_torch("parity")
        self.module, self.settings, self.loss, self.biases = module, settings, loss, biases
        self.optimizer = optimizer or torch.optim.AdamW(
            module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def run(self, draw: Callable[[int], Numbers], steps: Iterable[int]) -> Curve:
        """Trains on the inputs that `draw` gives for these steps."""
        with _threads_for(self.module):
            return self._run(draw, steps)

    def _run(self, draw: Callable[[int], Numbers], steps: Iterable[int]) -> Curve:
        from torch_ref.optimizers import clipped_step

        torch, settings = import_torch("parity"), self.settings
        dtype = next(self.module.parameters()).dtype
        curve, experts = [], []
        for step in steps:
            kinds = {"f": dtype, "i": torch.int64, "b": torch.bool}
            given = {name: torch.from_numpy(value).to(kinds[value.dtype.kind]) for name, value in draw(step).items()}
            self.optimizer.zero_grad(set_to_none=True)
            losses, chosen = [], []
            for n in range(settings.accumulation):
                loss, expert_LTK = self.loss(self.module, {name: value[n] for name, value in given.items()}, settings)
                (loss / settings.accumulation).backward()
                losses.append(loss.item())
                chosen.append(expert_LTK)
            clipped_step(self.optimizer, settings.rate(step), settings.clip_norm)
            if settings.bias_update_rate:
                self._move_biases(np.stack(chosen))
            curve.append(float(np.mean(losses, dtype=np.float64)))
            experts.append(np.stack(chosen))
        return Curve(np.asarray(curve), np.stack(experts))

    def _move_biases(self, expert_NLTK: np.ndarray) -> None:
        """Moves the correction biases by the load of a step's parts: in fp32, even where the module computes in fp64.

        `widened` leaves no fp32 in torch. A sum of two fp32 numbers, taken in fp64 and rounded, is that of fp32.
        """
        from torch_ref import tokens_per_expert, update_correction_bias

        torch, held = import_torch("parity"), self.module.state_dict()
        rate = float(np.float32(self.settings.bias_update_rate))
        for layer, name in enumerate(self.biases):
            tokens_E = tokens_per_expert(torch.from_numpy(expert_NLTK[:, layer]), held[name].numel())
            moved_E = update_correction_bias(held[name].flatten(), tokens_E, rate).numpy().astype(np.float32)
            held[name].copy_(torch.from_numpy(moved_E).view_as(held[name]))

    @property
    def names(self) -> list[str]:
        """The parameters' names in the optimizer's order."""
        return [name for name, _ in self.module.named_parameters()]

    def weights(self) -> dict[str, np.ndarray]:
        """The present parameters and correction biases by name."""
        held = dict(self.module.named_parameters())
        held |= {name: self.module.state_dict()[name] for name in self.biases}
        return {name: tensor_to_numpy(value) for name, value in held.items()}
