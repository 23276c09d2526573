"""The model and the text that a run's settings ask for, and notes on them for the user."""

import dataclasses
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_moe.config.checks import require
from jax_moe.config.models import MakeMoEConfig
from moe_train.configs import PRESETS
from moe_train.configs.adapt import EXPLICIT, Free, changed, fit_block, fit_capacity
from moe_train.configs.known import Known
from moe_train.configs.settings import ModelSettings, TrainConfig, model_config
from moe_train.data import text as data
from moe_train.data.tokens import Tokens, holds_tokens, load_tokens
from moe_train.learners.learner import Learner
from moe_train.memory import check_memory, num_parameters

if TYPE_CHECKING:
    from moe_train.learners.initial import Initial
    from moe_train.learners.models import Pretrained


@dataclass(frozen=True)
class Task:
    """A checked model and text, and the settings fitted to them. No weights are read yet but those of `initial`."""

    model: "MakeMoEConfig | Pretrained"
    text: data.Text | Tokens
    about: dict[str, Any]  # the model's entry in the run's config.json
    config: TrainConfig
    note: str | None = None
    initial: "Initial | None" = None


def read_task(config: TrainConfig, free: Free = EXPLICIT, known: Known | None = None) -> Task:
    """The task of checked settings; those named in `free` are defaults and may change to fit text and model.

    `known` describes the text of a run to be resumed. Raises ValueError with one line for whatever is wrong.
    """
    known = known or Known()
    if config.pretrained is not None:
        return _with_prompt(_finetune(config, Path(config.pretrained), free, known), free)
    require(config.preset != "finetune", "preset", config.preset, "used with --pretrained DIR")
    weight = config.optimizer.balance_loss_weight
    require(weight is not None, "balance_loss_weight", weight, "a number without --pretrained")
    rate = config.optimizer.bias_update_rate
    require(rate == 0, "bias_update_rate", rate, "0 without --pretrained: makeMoE has no correction bias")
    if config.framework == "torch" and find_spec("torch") is None:
        raise ValueError("framework='torch': needs PyTorch; `pip install 'jax-moe[torch]'`")
    return _with_prompt(_fresh(config, free, known), free)


def _fresh(config: TrainConfig, free: Free, known: Known) -> Task:
    """The task of a makeMoE with random weights, or with those of another makeMoE."""
    initial = None
    if config.init_from is not None and not known.saved:
        from moe_train.learners.initial import read_initial

        initial = read_initial(config.init_from)
        config = initial.fit(config, free)
        size = initial.config.vocab_size if initial.characters is None else None
        known = dataclasses.replace(known, vocabulary=initial.characters, vocab_size=size)
    block = 1 if "block_size" in free else config.model.block_size
    text: data.Text | Tokens
    if holds_tokens(config.data, config.data_dtype):
        text = load_tokens(config.data, None, known.vocab_size, block, config.data_dtype)
    else:
        text = data.load_text(config.data, block, known.vocabulary, known.sha256)
    if initial is None:
        config = fit_block(config, free, min(len(text.train), len(text.val)) - 1)
    else:
        initial.check_sizes(config, text.vocab_size)
        data.check_length(text.train, text.val, text.source, config.model.block_size, "tokens")
    config = fit_capacity(config, free)
    model = model_config(config, text.vocab_size)
    check_memory(config, num_parameters(model), model.num_layers, model.model_dim, model.vocab_size)
    return Task(model, text, dataclasses.asdict(model), config, initial.note() if initial else None, initial)


def _with_prompt(task: Task, free: Free) -> Task:
    """The task with a prompt that the model can read: if not the default, the validation split's first token."""
    try:
        task.text.encode(task.config.sample_prompt)
    except ValueError:
        if "sample_prompt" not in free:
            raise
        prompt = task.text.decode([int(task.text.val[0])])
        task = dataclasses.replace(task, config=changed(task.config, free, sample_prompt=prompt))
        task.text.encode(task.config.sample_prompt)
    return task


def _finetune(config: TrainConfig, folder: Path, free: Free, known: Known) -> Task:
    """The task of fine-tuning the model in a folder of `save_pretrained`."""
    from moe_train.learners.models import Pretrained

    usual = PRESETS[config.preset].model if config.preset else ModelSettings()
    for setting in dataclasses.fields(ModelSettings):
        name, value = setting.name, getattr(config.model, setting.name)
        same = name == "block_size" or value == getattr(usual, name)
        require(same, name, value, "left out with --pretrained: the checkpoint sets it")
    block_size = config.model.block_size
    require(block_size >= 1, "block_size", block_size, "an integer of at least 1")
    there = (folder / "config.json").is_file()
    require(there, "pretrained", str(folder), "a folder of `save_pretrained`, with its config.json")
    try:
        model = Pretrained(folder)
    except ValueError as error:
        raise ValueError(f"pretrained={str(folder)!r}: {' '.join(str(error).split())}") from None
    rate, biased = config.optimizer.bias_update_rate, any(moe.router.correction_bias for moe in model.config.mixtures)
    require(rate == 0 or biased, "bias_update_rate", rate, f"0: {model.model_type} has no correction bias")
    positions, note = model.config.max_positions, None
    block = 1 if "block_size" in free else block_size
    text = load_tokens(config.data, folder, model.config.vocab_size, block, config.data_dtype, known.sha256)
    config = fit_block(config, free, min(positions, len(text.train) - 1, len(text.val) - 1))
    if config.model.block_size > positions:
        note = f"note: block_size={block_size} is longer than the {positions} positions that the model was made for"
    check_memory(config, model.num_parameters, model.config.num_layers, model.config.model_dim, model.config.vocab_size)
    about = {"pretrained": str(folder.absolute()), "model_type": model.model_type}
    return Task(model, text, about, config, note)


def make_learner(config: TrainConfig, task: Task) -> Learner:
    """The learner that the settings name, with its first weights."""
    weights = None if task.initial is None else task.initial.module
    if config.framework == "torch":
        from moe_train.learners.torch_learner import TorchLearner

        assert isinstance(task.model, MakeMoEConfig)
        return TorchLearner(config, task.model, weights)
    from moe_train.learners.jax_learner import JaxLearner
    from moe_train.learners.models import FreshMakeMoE

    model = FreshMakeMoE(task.model, weights) if isinstance(task.model, MakeMoEConfig) else task.model
    return JaxLearner(config, model)
