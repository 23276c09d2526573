"""The PyTorch learner: the reference model, plainly written, with the JAX learner's initial weights and batches."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torch_ref
from jax_moe.config.models import MakeMoEConfig
from jax_moe.config.precision import PRECISIONS
from jax_moe.disk import sync, whole
from jax_moe.models.makemoe import MakeMoE
from jax_moe.optimizers import in_full_precision
from moe_train.configs import TrainConfig
from moe_train.learners.jax_learner import JaxLearner
from moe_train.learners.models import FreshMakeMoE
from moe_train.learners.optimizer import learning_rate
from moe_train.run import checkpoint
from moe_train.run import folder as run_folder
from moe_train.run.keep import KEEP, Keep
from moe_train.run.metrics import Evaluation
from torch_ref.generation.generate import generate
from torch_ref.losses import MoEStats, chosen_experts, next_token_loss, pool_balance_loss
from torch_ref.models.makemoe import Randomness
from torch_ref.optimizers import clipped_step
from torch_ref.precision import call_in, torch_dtype
from torch_ref.unchosen import skip_unchosen

# Streams of the run's seed, one per purpose.
STEP, EVALUATE, SAMPLE = range(3)
_USES = {"eval_train": 0, "eval_val": 1}


class TorchLearner:
    """`torch_ref.MakeMoE` with torch.optim.AdamW. Draws are torch's own: the curves agree in law, not draw by draw."""

    compiles = False
    rows: np.ndarray | None = None

    def __init__(self, config: TrainConfig, model: MakeMoEConfig, initial: MakeMoE | None = None):
        self.config, self.model_config, self.precision = config, model, PRECISIONS[config.precision]
        self.torch_device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = torch_ref.MakeMoE(model)
        weights = JaxLearner(config, FreshMakeMoE(model, initial)).weights()
        self.model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
        self.model.to(self.torch_device)
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(settings.beta1, settings.beta2),
            eps=settings.eps, weight_decay=settings.weight_decay,
        )
        self.rate = in_full_precision(learning_rate(settings, config.steps))
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.device = f"torch on {self.torch_device}"

    def _seed(self, *numbers: int) -> None:
        words = np.random.SeedSequence([self.config.seed, *numbers]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]) >> 1)

    def _loss(self, tokens_BT1: np.ndarray, **kwargs: Any) -> tuple[torch.Tensor, MoEStats]:
        tokens = torch.as_tensor(tokens_BT1, dtype=torch.int64, device=self.torch_device)
        output = call_in(self.precision, self.model, tokens[:, :-1], method="run", **kwargs)
        logits_BTV = output.logits_BTV.to(torch_dtype(self.precision.output))
        return next_token_loss(logits_BTV, tokens[:, 1:]), output.stats

    def train_step(self, step: int, tokens_BT1: np.ndarray) -> torch.Tensor:
        settings = self.config.optimizer
        self._seed(STEP, step)
        self.model.train()
        loss, stats = self._loss(tokens_BT1, remat=self.config.remat)
        total = loss
        if settings.balance_loss_weight:
            total = total + settings.balance_loss_weight * pool_balance_loss(stats, self.model_config.moe)
        if settings.router_z_loss_weight:
            total = total + settings.router_z_loss_weight * stats.router_z_loss.mean()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if settings.unchosen == "skip":
            skip_unchosen(self.model, chosen_experts(stats))
        clipped_step(self.optimizer, float(self.rate(step)), settings.clip_norm)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, step: int, use: str, batches: Iterable[np.ndarray]) -> Evaluation:
        self._seed(EVALUATE, step, _USES[use])
        self.model.eval()
        losses, every = [], []
        for tokens_BT1 in batches:
            loss, stats = self._loss(tokens_BT1, randomness=self._silence(tokens_BT1))
            losses.append(loss)
            every.append(stats)
        if not losses:
            return Evaluation(0.0, [], [], [], [])
        mean = MoEStats(*(torch.stack(values).mean(dim=0).cpu() for values in zip(*every, strict=True)))
        return Evaluation(
            loss=float(torch.stack(losses).mean()),
            dropped_fraction_L=mean.dropped_fraction.tolist(),
            expert_load_LE=mean.expert_load_E.tolist(),
            router_entropy_L=mean.router_entropy.tolist(),
            load_balance_loss_L=mean.load_balance_loss.tolist(),
        )

    def _silence(self, tokens_BT1: np.ndarray) -> Randomness | None:
        """Zeros in place of the router's noise if evaluation is to have none, else None."""
        if self.config.eval_noise or not self.model_config.noise:
            return None
        B, T1 = tokens_BT1.shape
        shape = (self.model_config.num_layers, B, T1 - 1, self.model_config.num_experts)
        return Randomness(noise_BTE=torch.zeros(shape, device=self.torch_device))

    def save(self, folder: Path, step: int, settings: dict[str, Any], keep: Keep = KEEP) -> None:
        folder.mkdir(exist_ok=True)
        content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "settings": settings}
        with whole(folder / f"{step}.pt") as part:
            _write(part, content)
        for old in keep.removable(sorted(int(path.stem) for path in folder.glob("[0-9]*.pt"))):
            (folder / f"{old}.pt").unlink()

    def restore(self, folder: Path) -> tuple[int, dict[str, Any]]:
        paths = sorted(folder.glob("[0-9]*.pt"), key=lambda path: int(path.stem))
        if not paths:
            raise ValueError(f"resume: must find a checkpoint, {folder} has none")
        path = paths[-1]
        try:
            loaded = torch.load(path, map_location=self.torch_device, weights_only=True)
            model, optimizer, settings = loaded["model"], loaded["optimizer"], loaded["settings"]
        except Exception as error:  # torch raises exceptions of many classes for a damaged file
            raise checkpoint.damaged(path, str(error) or type(error).__name__) from None
        try:
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"{path}: must be of this model ({reason})") from None
        return int(path.stem), settings

    def memory(self) -> None:
        return None

    def sample(self, prompt: list[int], length: int, temperature: float) -> list[int]:
        self._seed(SAMPLE)
        tokens_BT = torch.tensor([prompt], dtype=torch.int64, device=self.torch_device)
        return generate(self.model, tokens_BT, max_new_tokens=length, temperature=temperature)[0].tolist()

    def weights(self) -> dict[str, np.ndarray]:
        return {name: value.cpu().numpy() for name, value in self.model.state_dict().items()}

    def write(self, folder: Path) -> None:
        run_folder.write_weights(folder, self.weights())


def _write(path: Path, content: dict[str, Any]) -> None:
    """Writes the file and reads it back. Raises OSError with one line unless every tensor is the same bit for bit."""
    try:
        torch.save(content, path)
        sync(path)
        again = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:  # torch raises no other class for a full disk
        raise OSError(f"{path}: cannot be written ({' '.join(str(error).split())[:160]})") from None
    if not _same(content, again):
        raise OSError(f"{path}: must read back as written; it differs")


def _same(a: Any, b: Any) -> bool:
    """Equal in structure and values, tensors bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, torch.Tensor):
        bits = [value.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for value in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    return bool(a == b)
