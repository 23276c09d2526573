"""The mixture in `transformers`: made alone from a tiny configuration, its weights drawn by numpy, and run."""

import functools
import importlib
import inspect
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_parity.sides.transformers import widened
from parity_tests.families.cases import SHAPES, Case


def configuration(case: Case, shape: int) -> Any:
    """transformers' configuration of the whole model type."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[case.named or case.model_type](**case.values(shape))


def text_of(case: Case, config: Any) -> Any:
    """The part of it that the mixture is made from."""
    for word in case.nested.split(".") if case.nested and not case.of_whole else []:
        config = getattr(config, word)
    return config


def as_file(config: Any) -> dict[str, Any]:
    """What its config.json says."""
    return json.loads(config.to_json_string(use_diff=True))


class Nothing(torch.nn.Module):
    """In the place of attention: it adds nothing."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Zeros, and no weights."""
        return torch.zeros_like(hidden_states), None


class Layer(torch.nn.Module):
    """The mixture with what stands beside it, as the layer adds them up."""

    def __init__(self, case: Case, config: Any):
        super().__init__()
        config._experts_implementation = "eager"
        modeling = importlib.import_module(f"transformers.models.{case.model_type}.modeling_{case.model_type}")
        self.names = [case.at or "own", *case.beside]
        given = {"layer_idx": 1, "ffn_dim": getattr(config, "encoder_ffn_dim", None)}
        self.case, self.prefixed = case, bool(case.at)
        for name, kind in zip(self.names, (f"{case.prefix}{case.module}", *case.beside.values()), strict=True):
            made = getattr(modeling, kind)
            takes = inspect.signature(made.__init__).parameters
            further = {word: value for word, value in given.items() if word in takes}
            self.add_module(name, made(config, **further))
        if case.model_type == "nllb_moe":
            self.own.experts.forward = functools.partial(every_expert, self.own.experts)
        if case.before:
            self._within(self.own)

    def _within(self, layer: Any) -> None:
        """Of a whole layer what is not of the mixture adds nothing, and what its child reads is kept as the answer."""
        layer.self_attn = Nothing()
        for name in ("input_layernorm", "post_attention_layernorm", self.case.before):
            setattr(layer, name, torch.nn.Identity())
        del layer.layer_scalar
        layer.layer_scalar = 1.0
        found: dict[str, Any] = {}
        getattr(layer, self.case.before).register_forward_pre_hook(lambda module, args: found.update(y=args[0]))
        layer.register_forward_hook(lambda module, args, answer: found["y"])

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of their answers; beside it, in the last dim, the state that a router hands on."""
        if state is not None:
            return torch.cat(self.own(x, state), dim=-1)
        found = [getattr(self, name)(x) for name in self.names]
        return sum((one[0] if isinstance(one, tuple) else one).reshape(x.shape) for one in found)  # type: ignore[return-value]

    def named(self, tensors: Any) -> dict[str, Any]:
        """By the names that the tensors have in the mixture, or in the layer where something stands beside it."""
        pairs = ((name if self.prefixed else name.removeprefix("own."), value) for name, value in tensors)
        return without_spare(self.case, dict(pairs))


def without_spare(case: Case, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors without those of another mixture, and without the rows that nothing reads."""
    tensors = {name: value for name, value in tensors.items() if not case.unread or not name.startswith(case.unread)}
    count = case.settings.get("zero_expert_num", 0)
    spare = {name for name in tensors if case.spare and name.endswith(case.spare)}
    return {name: value[:-count] if name in spare else value for name, value in tensors.items()}


def every_expert(experts: Any, x: torch.Tensor, first_choice: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What NLLB's experts have to do in evaluation, as in fairseq: each by its weight, 0 where it was not chosen."""
    answers = [experts[f"expert_{e}"](x) * weights[:, e, None] for e in range(experts.num_experts)]
    return sum(answers) * (1 - experts.moe_token_dropout)  # type: ignore[return-value]


@dataclass
class Answer:
    """One run: arrays by name."""

    experts: np.ndarray  # [tokens, K], in ascending order
    y: np.ndarray
    gradients: dict[str, np.ndarray]  # of the input ("x") and of every parameter by its name in memory
    logits: np.ndarray | None  # what the router hands on, if that is its logits


def draw(layer: torch.nn.Module, seed: int) -> None:
    """Weights that matter: routers that spread their tokens, biases that change choices."""
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, value in sorted([*layer.named_parameters(), *layer.named_buffers()]):
            drawn = generator.normal(size=tuple(value.shape))
            drawn *= 0.3 if "moe_statics" in name else 1.0  # a softmax's scores are small
            routes = any(word in name for word in ("gate.w", "router", "classifier")) and value.ndim > 1
            if value.ndim > 1:
                drawn *= (3.0 if routes else 1.0) * value.shape[-1] ** -0.5
            else:
                drawn = drawn * 0.2 + (1.0 if "norm" in name or "scale" in name else 0.0)
            value.copy_(torch.from_numpy(np.asarray(drawn)))


def make_layer(case: Case, shape: int, dtype: str) -> Layer:
    """The layer with its weights drawn in fp32, as `dtype`."""
    with widened() if dtype == "float64" else nullcontext():
        layer = Layer(case, text_of(case, configuration(case, shape))).to(getattr(torch, dtype)).eval()
    single = Layer(case, text_of(case, configuration(case, shape)))
    draw(single, seed=case.seed + shape)
    layer.load_state_dict(single.state_dict())
    return layer


def inputs(case: Case, shape: int, dtype: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Vectors and, where its router reads one, a state; and what the answer, with the state that the router hands on,
    is multiplied by before its sum is differentiated.
    """
    generator = np.random.default_rng(100 + shape)
    (B, T), (D, *_) = SHAPES[shape]
    x, cotangent = (generator.normal(size=(B, T, D)).astype(dtype) for _ in range(2))
    if not case.state:
        return {"x": x}, cotangent
    state, of_state = (generator.normal(size=(B, T, case.values(shape)[case.state])).astype(dtype) for _ in range(2))
    return {"x": x, "state": state}, np.concatenate([cotangent, of_state], axis=-1)


def run(layer: Layer, shape: int, dtype: str) -> Answer:
    """The reference's answer."""
    found: dict[str, Any] = {}

    def routed(module: Any, given: Any, answer: Any) -> None:
        answers = answer if isinstance(answer, tuple) else (answer,)
        if type(module).__name__ == "Llama4Router":  # scores of all experts, 0 of those that were not chosen
            K = module.top_k
            answers = (answer[1], answer[0].topk(K, dim=-1).indices)
        if type(module).__name__ == "NllbMoeTop2Router":  # the first choices, one-hot, the weights of both, the logits
            answers = (answer[2], answer[1].topk(2, dim=-1).indices)
        if type(module).__name__ == "SwitchTransformersTop1Router":  # one-hot, without those that were dropped
            answers = (answer[2], answer[2].argmax(dim=-1, keepdim=True))
        if type(module).__name__ == "JetMoeTopKGating":  # tokens sorted by expert, and the logits last
            answers = (answer[-1], answer[-1].topk(module.top_k, dim=-1).indices)
        if type(module).__name__ == "ZayaRouter":  # its extra expert is named 0, with weight 0
            biased = answers[0].softmax(dim=-1) + module.balancing_biases
            answers = (answers[0], biased.topk(module.top_k, dim=-1).indices)
        if type(module).__name__ == "DogeCDMoE":
            found["logits"] = answers[1].detach().numpy()  # [2, tokens, n]
            answers = (doge_choices(module, answers[1]),)
        tensors = [one for one in (*answers, *given) if isinstance(one, torch.Tensor)]
        index = [one for one in tensors if not one.is_floating_point()]
        if index:
            found.setdefault("experts", index[0].reshape(-1, index[0].shape[-1]).sort(dim=-1).values.numpy())
        if any(word in type(module).__name__ for word in ("Router", "Gate", "Gating")):
            found.setdefault("logits", answers[0].detach().reshape(-1, answers[0].shape[-1]).numpy())

    hooks = [one.register_forward_hook(routed) for one in layer.modules()]
    arrays, of_answer = inputs(layer.case, shape, dtype)
    read = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in arrays.items()}
    cotangent = torch.from_numpy(of_answer)
    layer.zero_grad()
    with widened() if dtype == "float64" else nullcontext():
        y = layer(**read)
        (y * cotangent).sum().backward()
    for hook in hooks:
        hook.remove()
    trained = [(name, value) for name, value in layer.named_parameters() if value.requires_grad]
    gradients = [(n, torch.zeros_like(p) if p.grad is None else p.grad) for n, p in trained]
    named = {name: value.numpy() for name, value in layer.named(gradients).items()}
    of_inputs = {name: value.grad.numpy() for name, value in read.items()}  # type: ignore[union-attr]
    return Answer(found["experts"], y.detach().numpy(), {**of_inputs, **named}, found.get("logits"))


def doge_choices(module: Any, logits: torch.Tensor) -> torch.Tensor:
    """The experts of every token, as in Doge's forward, of which only the logits come out."""
    first, second = logits
    n = first.shape[-1]
    sums = torch.stack([first[:, i] + second[:, j] for i in range(n) for j in range(n)], dim=-1)
    return sums.topk(module.top_k, dim=-1).indices


def balance_loss(case: Case, logits: np.ndarray, shape: int, top_k: int) -> float:
    """transformers' own balance loss of one layer."""
    modeling = importlib.import_module(f"transformers.models.{case.model_type}.modeling_{case.model_type}")
    given = torch.from_numpy(logits)
    if case.model_type == "doge":
        n = logits.shape[-1]
        with widened():
            return float(modeling.load_balancing_loss_func((given,), n * n, n, top_k))
    if case.model_type == "switch_transformers":  # each sequence by itself
        given = given.reshape(*SHAPES[shape][0], -1)
        with widened():
            return float(modeling.load_balancing_loss_func(given.softmax(-1), given.argmax(-1)))
    with widened():
        return float(modeling.load_balancing_loss_func((given,), logits.shape[-1], top_k))


def save_model(case: Case, folder: Path) -> Any:
    """The tiniest whole model of the type, written by its own save_pretrained; the model."""
    import transformers
    config = configuration(case, 0)
    if case.alone:
        config = transformers.CONFIG_MAPPING[case.alone](**case.values(0, alone=True))
    model = getattr(transformers, f"{case.prefix}{case.model}")(config)
    draw(model, seed=5)
    model.save_pretrained(folder)
    return model
