"""MoE: tokens -> routing -> dispatch -> experts -> combine, the four composed."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from jax_moe.arrays import check_limit, moe_arrays
from jax_moe.config.moe import MoEConfig
from jax_moe.dims import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray, wide
from jax_moe.dispatch import Moves, Slots, assign_slots, merge_groups, round_weights, single_answers, split_groups
from jax_moe.dropout import fold
from jax_moe.experts import Experts, Weights, expert_ffn, make_experts
from jax_moe.initializers import rounded, uniform
from jax_moe.kernels import choose_dispatcher, reads_in_place
from jax_moe.kernels.chosen import apply_experts
from jax_moe.losses import MoEStats, layer_stats
from jax_moe.norms import MixtureScale, rms_norm
from jax_moe.parameters import parameter
from jax_moe.router_network import RouterNetwork
from jax_moe.routing import Routing, noise_scale, product_logits, route, router_logits
from jax_moe.sharding.expert_parallel import exchange_in_use
from jax_moe.sharding.explicit import auto_inside
from jax_moe.stored import Kept


class CorrectionBias(Kept):
    """The selection-only bias of a router: no Param, so no gradient and no optimizer touches it. Stored, in fp32."""


class ExpertTable(Kept):
    """The K experts of every token, as integers: no Param. Stored."""


class Router(nnx.Module):
    """The router's weights: kernel [D, E], [bias], [noise_kernel, noise_bias], [correction_bias], [input_scale] [D] of
    the norm of what it reads, [expert_scale] [E], [learned_scale], and the [expert_table] [V, K]. In the place of the
    kernel may stand `keys` [D, O], of product keys, or a `network`.

    Logits of shared experts that it weighs stand after those of the E.
    """

    def __init__(
        self, config: MoEConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer | None = None,
    ):
        init = rounded(kernel_init or jax.nn.initializers.lecun_normal())
        learned = config.router.noise == "learned_gaussian"
        bound = config.model_dim**-0.5
        if config.router.network_dim:
            self.network = RouterNetwork(config, rngs=rngs, param_dtype=param_dtype, kernel_init=kernel_init)
        if config.router.product_keys != "none":
            keys = init(rngs.params(), (config.model_dim, config.router_outputs), param_dtype)
            self.keys = parameter(keys, "D O", "router")
        linear = not config.router.network_dim and config.router.product_keys == "none"
        for prefix in ("", "noise_") if learned else ("",) if linear else ():
            kernel = init(rngs.params(), (config.model_dim, config.num_logits), param_dtype)
            setattr(self, f"{prefix}kernel", parameter(kernel, "D E", "router"))
            if config.router.bias:
                bias = uniform(bound)(rngs.params(), (config.num_logits,), param_dtype)
                setattr(self, f"{prefix}bias", parameter(bias, "E", "router"))
        if config.router.correction_bias:
            zeros = jnp.zeros((config.num_experts,), jnp.float32)
            self.correction_bias = parameter(zeros, "E", "correction", CorrectionBias)
        if config.router.table_tokens:
            first_V1 = jnp.arange(config.router.table_tokens, dtype=jnp.int32)[:, None]
            table_VK = (first_V1 + jnp.arange(config.top_k, dtype=jnp.int32)) % config.num_experts
            self.expert_table = parameter(table_VK, "V K", "correction", ExpertTable)
        if config.router.input_norm:
            self.input_scale = parameter(jnp.ones((config.model_dim,), param_dtype), "D", "router")
        if config.router.expert_scale:
            self.expert_scale = parameter(jnp.ones((config.num_experts,), param_dtype), "E", "router")
        if config.router.learned_scale:
            self.learned_scale = parameter(jnp.ones((1,), param_dtype), "1", "router")

    def weight(self, name: str) -> Array | None:
        """A parameter as a plain array, or None where the contract has none."""
        value = getattr(self, name, None)
        return None if value is None else value[...]


class MoEArrays(TypedDict, total=False):
    """The arrays that only a sparse layer takes, as `MoE` explains them."""

    noise_BTE: Float[Array, "B T E"] | None
    jitter_BTD: Float[Array, "B T D"] | None
    keep_BTKD: Bool[Array, "B T K D"] | None
    expert_BTK: Int[Array, "B T K"] | None
    tokens_BT: Int[Array, "B T"] | None
    router_state_BTI: Float[Array, "B T I"] | None
    capacity_limit: Int[Array, ""] | None


class MoEOutput(NamedTuple):
    """What one call of a layer computes."""

    y_BTD: Float[Array, "B T D"]
    stats: MoEStats
    routing: Routing  # in groups, before anything is dropped
    slots: Slots
    capacity: int  # C: a choice at slot C was dropped
    stages: dict[str, Array] | None = None  # every intermediate value [B, T, ...] by name, where asked for
    router_state_BTI: Float[Array, "B T I"] | None = None  # of a router that is a network, for the next mixture's

    @property
    def expert_BTK(self) -> Int[Array, "B T K"]:
        """The experts every token was sent to, best first."""
        return merge_groups(self.routing.expert_GSK, *self.y_BTD.shape[:2])


class MoE(nnx.Module):
    """A sparse mixture-of-experts layer under one contract.

    Args:
        config: the contract, from `jax_moe.presets`.
        rngs: parameter initialisation (`rngs.params`); `nnx.Rngs(0)` unless given.
        param_dtype: dtype of the stored parameters. Experts compute in the input's dtype.
        kernel_init: initializer of all kernels; the experts' is called with [E, rows, columns]
            (default: fan-in scaled normal, each expert on its own).
    """

    def __init__(
        self, config: MoEConfig, *, rngs: nnx.Rngs | None = None, param_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer | None = None,
    ):
        self.config = config
        rngs = rngs or nnx.Rngs(0)
        kwargs: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype, "kernel_init": kernel_init}
        self.router = Router(config, **kwargs)
        self.experts = make_experts(config, **kwargs)
        if config.expert.shared_dim:
            shared = (1, config.model_dim, config.expert.shared_dim, config.expert.shared)
            if config.router.shared_experts:
                weighed = (config.router.shared_experts, *shared[1:])
                self.shared_experts = Experts(*weighed, role="shared", leading="Y", **kwargs)
            else:
                self.shared = Experts(*shared, role="shared", leading="1", **kwargs)
            if config.expert.shared_gate:
                init = rounded(jax.nn.initializers.lecun_normal())
                self.shared_gate = parameter(init(rngs.params(), (config.model_dim, 1), param_dtype), "D 1", "gate")
        if config.answer_bias:
            self.answer_bias = parameter(jnp.zeros((config.model_dim,), param_dtype), "D", "shared")

        around, D = config.around, config.model_dim
        if around.latent_dim:
            init = rounded(kernel_init or jax.nn.initializers.lecun_normal())
            into, back = (D, around.latent_dim), (around.latent_dim, D)
            self.latent_in = parameter(init(rngs.params(), into, param_dtype), "D I", "projection")
            self.latent_out = parameter(init(rngs.params(), back, param_dtype), "I D", "projection")
        if around.latent_norm != "none":
            norm = around.latent_norm, around.latent_dim, around.latent_norm_eps
            self.latent_norm = MixtureScale(*norm, param_dtype)
        if around.output_norm != "none":
            self.output_norm = MixtureScale(around.output_norm, D, around.output_norm_eps, param_dtype)
        for name in ("input_norm", "routed_norm", "shared_input_norm", "shared_norm"):
            if getattr(around, name) != "none":
                setattr(self, name, MixtureScale(getattr(around, name), D, around.norm_eps, param_dtype))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        mask_BT: Bool[Array, "B T"] | None = None,
        noise_BTE: Float[Array, "B T E"] | None = None,
        jitter_BTD: Float[Array, "B T D"] | None = None,
        keep_BTKD: Bool[Array, "B T K D"] | None = None,
        expert_BTK: Int[Array, "B T K"] | None = None,
        tokens_BT: Int[Array, "B T"] | None = None,
        router_state_BTI: Float[Array, "B T I"] | None = None,
        capacity_limit: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], MoEStats]:
        """The layer's answer in the input's dtype, and its statistics.

        Without a key and without arrays the call is deterministic: no noise, no dropout. With a key it follows the
        contract, as in training or (`training=False`) as at evaluation. Arrays take the place of draws:
        `noise_BTE` unit Gaussians (added to the logits as they are where the contract has no learned noise),
        `jitter_BTD` factors on the input, `keep_BTKD` True where an answer survives dropout.
        `mask_BT` is False at padding, which may hold anything, takes no slot, gets a zero answer and counts in no
        statistic.
        `expert_BTK` replays choices: K different experts for every real token. `tokens_BT` are the tokens where a table
        of them chooses (`table_tokens`): one of the two is needed there.
        `router_state_BTI` is what `run` of the mixture before returned, for a router that takes it (`takes_state`);
        without it nothing is added to the router's own.
        No tokens at all give an empty answer and statistics of 0.
        Raises ValueError, by name, for an array of another kind or shape or with an expert out of range, and for a
        capacity below one slot.
        """
        output = self.run(
            x_BTD, key=key, training=training, mask_BT=mask_BT, noise_BTE=noise_BTE, jitter_BTD=jitter_BTD,
            keep_BTKD=keep_BTKD, expert_BTK=expert_BTK, tokens_BT=tokens_BT, router_state_BTI=router_state_BTI,
            capacity_limit=capacity_limit,
        )
        return output.y_BTD, output.stats

    @auto_inside("x_BTD", "y_BTD", "router_state_BTI")
    def run(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        key: PRNGKeyArray | None = None,
        training: bool = True,
        mask_BT: Bool[Array, "B T"] | None = None,
        watch: bool = False,
        first_expert: Int[Array, ""] | None = None,
        **arrays: Unpack[MoEArrays],
    ) -> MoEOutput:
        """All that a call computes. Arguments as in a call; under jit, what is not used is not computed.

        `watch` also hands out every stage, at the cost of the experts' work once more for each choice. `first_expert`:
        the layer's experts are those from this number on of many layers' experts, stacked as one layer's.
        """
        limit = arrays.pop("capacity_limit", None)
        x_BTD, given = moe_arrays(self.config, x_BTD, mask_BT=mask_BT, **arrays)
        x_GSD, routing, slots, capacity, mask_GS, state_BTI = self._route(x_BTD, given, limit, key, training)
        keep_BTKD = given.get("keep_BTKD")
        rate = self.config.expert.dropout
        weights, first = self._experts(x_BTD, first_expert)
        moves = Moves(
            config=replace(self.config, model_dim=self.config.inner_dim), capacity=capacity,
            apply=partial(apply_experts, self.config.expert, weights, first), weights=weights, first_expert=first,
            dropout_key=fold(key, 1) if training and rate > 0 and keep_BTKD is None else None,
            keep_GSKD=None if keep_BTKD is None or rate == 0 else split_groups(keep_BTKD, x_GSD.shape[1]),
        )
        rounded, shared_GSD = round_weights(slots, self.config, x_BTD.dtype), None
        exchange = exchange_in_use(self.config) if first_expert is None else None  # XLA splits what decodes
        dispatcher = exchange or choose_dispatcher(self.config)
        inner_GSD = self._to_experts(x_GSD)
        y_GSD = dispatcher(inner_GSD, routing, rounded, moves)
        if self.config.around.latent_dim:
            y_GSD = y_GSD @ self.latent_out[...].astype(y_GSD.dtype)
        y_GSD = self._normed("routed_norm", y_GSD)
        if self.config.expert.shared_dim:
            shared_GSD = self._shared_answer(x_GSD, mask_GS, routing.shared_GSY)
            y_GSD += shared_GSD
        if self.config.around.output_norm != "none":
            y_GSD = self.output_norm(y_GSD)
        if self.config.answer_bias:
            bias_D = self.answer_bias[...].astype(y_GSD.dtype)
            y_GSD += bias_D if mask_GS is None else jnp.where(mask_GS[..., None], bias_D, 0)
        stats = layer_stats(routing, slots, self.config, capacity, mask_GS, x_BTD.shape[:2])
        y_BTD = merge_groups(y_GSD, *x_BTD.shape[:2])
        output = MoEOutput(y_BTD, stats, routing, slots, capacity, router_state_BTI=state_BTI)
        if not watch:
            return output
        answers_GSKD = single_answers(dispatcher, inner_GSD, routing, rounded, moves)
        return output._replace(stages=self._stages(output, answers_GSKD, shared_GSD, x_BTD.dtype))

    def _stages(
        self, output: MoEOutput, answers_GSKD: Array, shared_GSD: Array | None, dtype: DTypeLike
    ) -> dict[str, Array]:
        """Every intermediate value, by token; `experts` are the router's own choices even where others were
        replayed.
        """
        routing, slots = output.routing, output.slots
        before_drops = round_weights(slots._replace(weight_GSK=routing.weight_GSK), self.config, dtype)
        found = {
            "router_logits": routing.logits_GSE, "experts": routing.own_GSK, "weights": before_drops.weight_GSK,
            "slots": slots.slot_GSK, "expert_outputs": answers_GSKD, "shared": shared_GSD,
        }
        B, T = output.y_BTD.shape[:2]
        stages = {name: merge_groups(value, B, T) for name, value in found.items() if value is not None}
        return stages | {"combined": output.y_BTD, "balance_loss": output.stats.load_balance_loss}

    def _route(
        self, x_BTD: Array, given: dict[str, Array], limit: Array | None, key: PRNGKeyArray | None, training: bool
    ) -> tuple[Array, Routing, Slots, int, Array | None, Array | None]:
        """The first half of a call: grouped tokens, choices, slots, the capacity C, the mask of real tokens and the
        router's state.
        """
        config, router = self.config, self.config.router
        mask_BT, expert_BTK = given.get("mask_BT"), given.get("expert_BTK")
        noise_BTE, jitter_BTD = given.get("noise_BTE"), given.get("jitter_BTD")
        if router.table_tokens and expert_BTK is None:  # a token that is not in the table gives NaN
            table_VK = self.router.weight("expert_table")
            assert table_VK is not None
            tokens_BT = given["tokens_BT"] if mask_BT is None else jnp.where(mask_BT, given["tokens_BT"], 0)
            expert_BTK = jnp.take(table_VK, tokens_BT, axis=0, mode="fill", fill_value=-1)
        B, T, _ = x_BTD.shape
        noise_key = fold(key, 0) if training or router.noise_at_evaluation else None
        if router.noise == "learned_gaussian" and noise_BTE is None and noise_key is not None:
            noise_BTE = jax.random.normal(noise_key, (B, T, config.num_experts), wide(x_BTD.dtype))
        if router.noise == "input_jitter" and jitter_BTD is None and noise_key is not None:
            low, high = 1 - router.jitter_eps, 1 + router.jitter_eps
            jitter_BTD = jax.random.uniform(noise_key, x_BTD.shape, wide(x_BTD.dtype), low, high)
        S = config.group_size(B, T)
        capacity = config.expert_capacity(S) if B * T else 1
        limit = check_limit(limit, capacity)
        padded = mask_BT is not None or B * T % S != 0 or B * T == 0
        mask_GS = split_groups(jnp.ones((B, T), bool) if mask_BT is None else mask_BT, S) if padded else None
        if mask_BT is not None:  # 0 * NaN would still be NaN
            x_BTD = jnp.where(mask_BT[..., None], x_BTD, 0)
        router_input_BTD = x_BTD
        if jitter_BTD is not None:
            router_input_BTD = (x_BTD.astype(wide(x_BTD.dtype)) * jitter_BTD).astype(x_BTD.dtype)
        if router.jitter_scope == "block":
            x_BTD = router_input_BTD
        before_BTI = given.get("router_state_BTI")
        if before_BTI is not None and mask_BT is not None:
            before_BTI = jnp.where(mask_BT[..., None], before_BTI, 0)
        logits_BTE, state_BTI = self._logits(router_input_BTD, noise_BTE, before_BTI)
        if expert_BTK is not None and mask_BT is not None:  # padding may name anything
            expert_BTK = jnp.where(mask_BT[..., None], expert_BTK, jnp.clip(expert_BTK, 0, config.num_experts - 1))
        if expert_BTK is not None:  # a traced -1 would count from the end: beyond the last one it gives NaN
            expert_BTK = jnp.where(expert_BTK < 0, config.num_experts, expert_BTK)
        replay = None if expert_BTK is None else split_groups(expert_BTK, S)
        weight = self.router.weight
        scales = weight("expert_scale"), weight("learned_scale")
        routing = route(split_groups(logits_BTE, S), config, weight("correction_bias"), replay, *scales)
        slots = assign_slots(routing, config, capacity, mask_GS, limit)
        return split_groups(x_BTD, S), routing, slots, capacity, mask_GS, state_BTI

    def _clean_logits(self, x_BTD: Array, before_BTI: Array | None) -> tuple[Array, Array | None]:
        """The logits before noise, and the state of a router that is a network."""
        if self.config.router.network_dim:
            return self.router.network(x_BTD, before_BTI)
        weight, keys = self.router.weight, self.config.router.product_keys
        kernel = weight("kernel" if keys == "none" else "keys")
        assert kernel is not None
        logits_BTE = router_logits(x_BTD, kernel, weight("bias"), self.config.router.dtype)
        return logits_BTE if keys == "none" else product_logits(logits_BTE, keys), None

    def _logits(
        self, x_BTD: Array, noise_BTE: Array | None, before_BTI: Array | None
    ) -> tuple[Array, Array | None]:
        weight, dtype = self.router.weight, self.config.router.dtype
        if self.config.router.input_norm:
            scale_D = self.router.input_scale[...].astype(x_BTD.dtype)
            x_BTD = rms_norm(x_BTD, None, self.config.router.input_norm_eps) * scale_D * self.config.model_dim**-0.5
        logits_BTE, state_BTI = self._clean_logits(x_BTD, before_BTI)
        logits_BTE = logits_BTE * self.config.router.logit_scale
        if noise_BTE is None:
            return logits_BTE, state_BTI
        of_shared = (0, self.config.router.shared_experts)
        noise_BTE = jnp.pad(noise_BTE.astype(logits_BTE.dtype), ((0, 0), (0, 0), of_shared))
        if self.config.router.noise == "learned_gaussian":
            noise_kernel = weight("noise_kernel")
            assert noise_kernel is not None
            noise_BTE = noise_BTE * noise_scale(router_logits(x_BTD, noise_kernel, weight("noise_bias"), dtype))
        return logits_BTE + noise_BTE, state_BTI

    def _experts(self, x_BTD: Array, first_expert: Array | None) -> tuple[Weights, Array | int]:
        """The parameters that a dispatcher reads, and where the layer's experts begin among them."""
        weights = self.experts.weights()
        if first_expert is None:
            return weights, 0
        if reads_in_place(x_BTD.shape[0] * x_BTD.shape[1], x_BTD.dtype, self.config):
            return weights, first_expert
        E = self.config.num_networks
        return {name: jax.lax.dynamic_slice_in_dim(w, first_expert, E) for name, w in weights.items()}, 0

    def _to_experts(self, x_GSD: Array) -> Array:
        """What routed experts read: the tokens, or these normed or mapped into another width."""
        x_GSD = self._normed("input_norm", x_GSD)
        if not self.config.around.latent_dim:
            return x_GSD
        x_GSI = x_GSD @ self.latent_in[...].astype(x_GSD.dtype)
        return x_GSI if self.config.around.latent_norm == "none" else self.latent_norm(x_GSI)

    def _normed(self, name: str, x_GSD: Array) -> Array:
        """Normed, where the contract has that norm."""
        norm = getattr(self, name, None)
        return x_GSD if norm is None else norm(x_GSD)

    def _shared_answer(self, x_GSD: Array, mask_GS: Array | None, weight_GSY: Array | None) -> Array:
        """What the shared experts add, weighed or behind their gate; 0 at padding. Only where the contract has them."""
        x_GSD = self._normed("shared_input_norm", x_GSD)
        y_GSD = self._weighed_answer(x_GSD, weight_GSY) if weight_GSY is not None else self._gated_answer(x_GSD)
        if self.config.expert.shared_scale != 1:
            y_GSD *= self.config.expert.shared_scale
        y_GSD = self._normed("shared_norm", y_GSD)
        return y_GSD if mask_GS is None else jnp.where(mask_GS[..., None], y_GSD, 0)

    def _weighed_answer(self, x_GSD: Array, weight_GSY: Array) -> Array:
        """The sum of shared experts' answers, each times the weight that the router gives it."""
        G, S, D = x_GSD.shape
        Y = self.config.router.shared_experts
        if self.config.router.weight_dtype == "input":
            weight_GSY = weight_GSY.astype(x_GSD.dtype).astype(weight_GSY.dtype)
        x_YRD = jnp.broadcast_to(x_GSD.reshape(1, G * S, D), (Y, G * S, D))
        y_YRD = expert_ffn(x_YRD, self.shared_experts.weights(), self.config.expert.shared)
        y_YGSD = y_YRD.reshape(Y, G, S, D).astype(weight_GSY.dtype)
        return jnp.einsum("GSY,YGSD->GSD", weight_GSY, y_YGSD).astype(x_GSD.dtype)

    def _gated_answer(self, x_GSD: Array) -> Array:
        """The shared expert's answer, behind its gate where it has one."""
        y_GSD = expert_ffn(x_GSD.reshape(1, -1, x_GSD.shape[-1]), self.shared.weights(), self.config.expert.shared)
        y_GSD = y_GSD.reshape(x_GSD.shape)
        if self.config.expert.shared_gate:
            y_GSD *= jax.nn.sigmoid(x_GSD @ self.shared_gate[...].astype(x_GSD.dtype))
        return y_GSD
