"""The reference for makeMoE models and single layers: `torch_ref`, with every intermediate value recorded.

Noise and dropout are off on both sides. torch and torch_ref are imported when a run starts.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jax_moe.config.models import MakeMoEConfig
from jax_moe.config.moe import MoEConfig, SoftMoEConfig
from jax_moe.porting.torch_tensors import import_torch, numpy_to_tensor
from moe_parity.sides.hooks import Watch, watching
from moe_parity.stages import Place


def trace_torch_ref(
    config: Any, weights: dict[str, np.ndarray], x: np.ndarray, cotangent: np.ndarray | None, grads: bool
) -> dict[Place, np.ndarray]:
    """Runs `torch_ref` with these weights, loaded with strict=True: every stage and, with `grads`, every gradient.

    `x` holds the tokens of a language model, whose loss is that of the next token, or the inputs of a layer, whose loss
    is sum(answer * cotangent).
    """
    torch = import_torch("parity")
    name, watched = _KINDS[type(config)]
    module = make_module(name, config, weights)
    inputs = torch.from_numpy(np.asarray(x))
    with watching() as watch:
        with torch.set_grad_enabled(grads):
            objective = watched(watch, module, inputs, cotangent)
        if grads and objective is not None:
            objective.backward()
            for name, value in module.named_parameters():
                grad = torch.zeros_like(value) if value.grad is None else value.grad
                watch.trace[Place("gradient", None, name)] = grad.numpy()
    return watch.trace


def make_module(name: str, config: Any, weights: dict[str, np.ndarray]) -> Any:
    """The `torch_ref` module of that name, in evaluation mode and in the weights' dtype."""
    import torch_ref

    tensors = {key: numpy_to_tensor(value) for key, value in weights.items()}
    module = getattr(torch_ref, name)(config).to(next(iter(tensors.values())).dtype).eval()
    module.load_state_dict(tensors, strict=True)
    return module


def _watched_model(watch: Watch, model: Any, tokens_BT: Any, _cotangent: Any) -> Any:
    """Runs a makeMoE model and returns its loss."""
    import torch_ref

    torch = import_torch("parity")
    config, (B, T) = model.config, tokens_BT.shape
    watch.into(model.blocks[0], lambda x: watch.put(Place("embedding"), x))
    for i, block in enumerate(model.blocks):
        _watch_block(watch, block, i)
    silence = torch.zeros(config.num_layers, B, T, config.num_experts)
    logits_BTV, stats = model.logits_and_stats(tokens_BT, randomness=torch_ref.Randomness(noise_BTE=silence))
    for i, value in enumerate(stats.load_balance_loss):
        watch.put(Place("balance_loss", i), value)
    watch.put(Place("logits"), logits_BTV)
    if T < 2:
        return logits_BTV.sum() * 0
    wide_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    loss = torch.nn.functional.cross_entropy(wide_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    watch.put(Place("loss"), loss)
    return loss


def _watch_block(watch: Watch, block: Any, i: int) -> None:
    """Norms are recorded as inputs of the next module, for `torch_ref` calls them as functions."""
    watch.into(block.sa, lambda x: watch.put(Place("attention_norm", i), x))
    watch.out_of(block.sa, lambda y, *_: watch.put(Place("attention", i), y))
    watch.into(block.smoe, lambda x: watch.put(Place("ffn_norm", i), x))
    watch_mixture(watch, block.smoe, i)
    watch.out_of(block.smoe, lambda answer, *_: watch.put(Place("combined", i), answer[0]))
    watch.out_of(block, lambda answer, *_: watch.put(Place("residual", i), answer[0]))


def watch_mixture(watch: Watch, mixture: Any, i: int | None) -> None:
    """Records the routing and the output of every choice: the rows of each expert's calls, in token order."""
    from torch_ref.dispatch import merge_groups, round_weights
    from torch_ref.moe import moe_routing

    found: dict[str, Any] = {"rows": []}

    def routed(x_BTD: Any) -> None:
        torch = import_torch("parity")
        config, (B, T) = mixture.config, x_BTD.shape[:2]
        learned = config.router.noise == "learned_gaussian"
        noise = torch.zeros(B, T, config.num_experts) if learned else None
        x_GSD, routing, slots, capacity, _ = moe_routing(x_BTD, parts_of(mixture), training=False, noise_BTE=noise)
        rounded = round_weights(slots._replace(weight_GSK=routing.weight_GSK), config, x_BTD.dtype).weight_GSK
        found.update(rows=[], choice=routing.expert_GSK, kept=slots.slot_GSK != capacity)
        values = {
            "router_logits": routing.logits_GSE, "experts": routing.expert_GSK, "weights": rounded,
            "slots": slots.slot_GSK,
        }
        for kind, value in values.items():
            watch.put(Place(kind, i), merge_groups(value, B, T))
        if mixture.config.expert.shared_dim:
            shared = mixture.shared(x_GSD)
            if mixture.shared_gate is not None:
                shared = shared * torch.nn.functional.linear(x_GSD, mixture.shared_gate.weight).sigmoid()
            shared = shared * mixture.config.expert.shared_scale
            watch.put(Place("shared", i), merge_groups(shared, B, T))

    def combined(answer: Any, x_BTD: Any, *_: Any) -> None:
        torch = import_torch("parity")
        choice_GSK, kept_GSK = found["choice"], found["kept"]
        y_RD = torch.zeros(choice_GSK.numel(), x_BTD.shape[-1], dtype=x_BTD.dtype)
        for e, rows in enumerate(found["rows"]):
            y_RD[((choice_GSK == e) & kept_GSK).flatten()] = rows.detach()
        watch.put(Place("expert_outputs", i), merge_groups(y_RD.unflatten(0, choice_GSK.shape), *x_BTD.shape[:2]))

    watch.into(mixture, routed)
    for expert in mixture.experts:
        watch.out_of(expert, lambda rows, *_: found["rows"].append(rows))
    watch.out_of(mixture, combined)


def parts_of(mixture: Any) -> Any:
    """A layer's weights, as `torch_ref.moe.moe_routing` takes them."""
    from torch_ref.moe import Parts

    if hasattr(mixture, "parts"):
        return mixture.parts()
    router = mixture.router
    return Parts(mixture.config, router.topkroute_linear, router.noise_linear, None, list(mixture.experts))


def _watched_layer(watch: Watch, layer: Any, x_BTD: Any, cotangent: np.ndarray | None) -> Any:
    torch = import_torch("parity")
    config = layer.config
    watch_mixture(watch, layer, None)
    learned = config.router.noise == "learned_gaussian"
    y_BTD, stats = layer(x_BTD, noise_BTE=torch.zeros(*x_BTD.shape[:2], config.num_experts) if learned else None)
    watch.put(Place("combined"), y_BTD)
    watch.put(Place("balance_loss"), stats.load_balance_loss)
    return None if cotangent is None else (y_BTD * torch.from_numpy(cotangent)).sum()


def _watched_soft_moe(watch: Watch, layer: Any, x_BTD: Any, cotangent: np.ndarray | None) -> Any:
    from torch_ref.soft_moe import soft_weights

    torch = import_torch("parity")
    for name, value in zip(("dispatch", "combine"), soft_weights(x_BTD, layer.phi), strict=True):
        watch.put(Place("weights", None, name), value)
    inputs: list[Any] = []
    answers: list[Any] = []
    for expert in layer.experts:
        watch.into(expert, inputs.append)
        watch.out_of(expert, lambda y, *_: answers.append(y))
    y_BTD = layer(x_BTD)
    watch.put(Place("slot_inputs"), torch.stack(inputs))
    watch.put(Place("expert_outputs"), torch.stack(answers))
    watch.put(Place("combined"), y_BTD)
    return None if cotangent is None else (y_BTD * torch.from_numpy(cotangent)).sum()


# For each kind of contract: the module of torch_ref, and how it is watched.
_KINDS: dict[type, tuple[str, Callable[..., Any]]] = {
    MakeMoEConfig: ("MakeMoE", _watched_model), SoftMoEConfig: ("SoftMoE", _watched_soft_moe),
    MoEConfig: ("MoE", _watched_layer),
}
