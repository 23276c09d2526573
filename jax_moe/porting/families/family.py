"""What a family is: a record of all that is asked about it. Also the rows and settings that many families share.

A family may be known by its mixture alone, whatever stands around it; a whole decoder builds on the same rows.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from jax_moe.config.attention import RopeKind
from jax_moe.config.checks import check_depth, is_int, require
from jax_moe.config.decoder import DecoderConfig, differences
from jax_moe.config.moe import MoEConfig
from jax_moe.porting.families.choices import StateDict
from jax_moe.porting.families.rope_settings import read_rope, write_rope
from jax_moe.porting.families.settings import ACTIVATIONS, REFUSED, ROPE_KINDS, Settings
from jax_moe.porting.table.plan import Plan
from jax_moe.porting.table.rows import Row, Table, stacked, under

Config = TypeVar("Config")


# Of a layer: the norms before both halves, and grouped-query attention
NORMS = (
    Row("input_layernorm.weight", "D", "attention_norm.scale", "D"),
    Row("post_attention_layernorm.weight", "D", "ffn_norm.scale", "D"),
)
GROUPED = (
    Row("self_attn.q_proj.weight", "(H A) D", "attention.query", "D H A"),
    Row("self_attn.q_proj.bias", "(H A)", "attention.query_bias", "H A"),
    Row("self_attn.k_proj.weight", "(J A) D", "attention.key", "D J A"),
    Row("self_attn.k_proj.bias", "(J A)", "attention.key_bias", "J A"),
    Row("self_attn.v_proj.weight", "(J A) D", "attention.value", "D J A"),
    Row("self_attn.v_proj.bias", "(J A)", "attention.value_bias", "J A"),
    Row("self_attn.o_proj.weight", "D (H A)", "attention.out", "H A D"),
    Row("self_attn.o_proj.bias", "D", "attention.out_bias", "D"),
    Row("self_attn.q_norm.weight", "W", "attention.query_norm.scale", "W"),
    Row("self_attn.k_norm.weight", "W", "attention.key_norm.scale", "W"),
)
BEFORE = (Row("model.embed_tokens.weight", "V D", "embedding", "V D"),)
AFTER = (Row("model.norm.weight", "D", "final_norm.scale", "D"), Row("lm_head.weight", "V D", "head", "D V"))


def gated_ffn(theirs: str, ours: str) -> tuple[Row, ...]:
    """One FFN outside the mixture: `gate_proj`, `up_proj`, `down_proj`; ours holds it as one expert."""
    names = (("gate", "F D", "D F"), ("up", "F D", "D F"), ("down", "D F", "F D"))
    return tuple(Row(f"{theirs}{name}_proj.weight", a, f"{ours}{name}", f"0/1 {b}") for name, a, b in names)


def fused_experts(gate_up: str, down: str) -> tuple[Row, ...]:
    """All experts in two tensors: [E, 2F, D], the gates' rows first, and [E, D, F]."""
    return (
        Row(gate_up, "E (0/2 F) D", "experts.gate", "E D F"),
        Row(gate_up, "E (1/2 F) D", "experts.up", "E D F"),
        Row(down, "E D F", "experts.down", "E F D"),
    )


ROUTER = (Row("gate.weight", "E D", "router.kernel", "D E"),)
PER_EXPERT = (
    *ROUTER,
    Row("experts.{e}.gate_proj.weight", "F D", "experts.gate", "e D F"),
    Row("experts.{e}.up_proj.weight", "F D", "experts.up", "e D F"),
    Row("experts.{e}.down_proj.weight", "D F", "experts.down", "e F D"),
)
FUSED = (*ROUTER, *fused_experts("experts.gate_up_proj", "experts.down_proj"))
LAYER = "model.layers.{l}."


@dataclass(frozen=True)
class Names:
    """What files, or the reference in memory, call a mixture's weights: a layer's rows and their prefix in a model."""

    rows: tuple[Row, ...]
    layer: str  # layout of a mixture by itself; families with the same rows share it
    whole: str = ""  # layout of a whole decoder, if not by the family's name
    within: str = f"{LAYER}mlp."

    @property
    def table(self) -> Table:
        """Of a mixture by itself."""
        return Table(self.layer, self.rows)


@dataclass(frozen=True)
class Stack:
    """The layers of an encoder or of a decoder, in a model that has both; they are numbered on from one to the next."""

    name: str
    count: tuple[str, ...]  # the settings that say how many layers it has: the first that there is
    within: str  # what stands before the names of a mixture's weights
    renamed: tuple[tuple[str, str], ...] = ()  # a setting that the contract reads, and the name of this stack's


@dataclass(frozen=True)
class Mixture:
    """A layer's mixture: its contract from config.json and back, its names in files and in the reference's memory."""

    read: Callable[[Settings], MoEConfig]
    write: Callable[[MoEConfig], dict[str, Any]]
    on_disk: Names
    in_memory: Names  # files may have these names too
    # The model types that have it, each with the way to its text model's settings in config.json. None: the family,
    # at the top
    types: Mapping[str, str] = field(default_factory=dict)
    roots: tuple[str, ...] = ("model.",)  # what may stand before `layers.` in a file
    by_layer: tuple[str, ...] = ()  # settings that may be a list with an entry for each layer
    each_layer: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values  # with such a list where none stands
    by_number: tuple[str, ...] = ()  # settings that per_layer_config may give single layers: none is of the mixture
    stacks: tuple[Stack, ...] = ()  # none: the layers of the one decoder, their names those of `on_disk`
    # What begins the names of tensors in the module that are not the mixture's, and stay as they are; {e} is the number
    # of an expert beyond the contract's
    beside: tuple[str, ...] = ()

    def is_beside(self, name: str, moe: MoEConfig) -> bool:
        """Whether a tensor of the module, by its name there, is none of the mixture's."""
        for start in self.beside:
            found = re.match(re.escape(start).replace(r"\{e\}", r"(\d+)"), name)
            if found and (not found.groups() or int(found[1]) >= moe.num_networks):
                return True
        return False


@dataclass(frozen=True)
class Whole:
    """The decoder around the mixtures: its contract from config.json and back, other rows, optimizer order."""

    architecture: str
    read: Callable[[Settings, MoEConfig], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    attention: Mapping[str, tuple[Row, ...]] = field(default_factory=lambda: {"grouped": GROUPED})  # rows by kind
    norms: tuple[Row, ...] = NORMS  # of every layer
    dense: tuple[Row, ...] = under(gated_ffn("", ""), "mlp.", "")  # of a layer without a mixture
    layer: str = LAYER  # what stands before the names of these rows
    before: tuple[Row, ...] = BEFORE  # all layers
    after: tuple[Row, ...] = AFTER
    # What begins the names of tensors that the decoder does not use and saving keeps; LAYER: layers after the last
    carried: tuple[str, ...] = ()
    # How the names of a text model by itself begin, and how they do in a folder of the model around it
    inside: tuple[str, str] = ("", "")
    # The reference numbers a layer's parameters by the first of these prefixes that a name has, then in row order.
    order: tuple[str, ...] = ("self_attn.", "mlp.", "input_layernorm.", "post_attention_layernorm.")

    def named(self, ours: str) -> str:
        """The files' name of what stands outside the layers: of our "embedding", "head" or "final_norm.scale"."""
        return next(row.theirs for row in (*self.before, *self.after) if row.ours == ours)


@dataclass(frozen=True)
class Family:
    """A family: a config.json's `model_type` with mixture and decoder, or a state dict known by its names, or both."""

    name: str  # of a Hugging Face family its model_type
    mixture: Mixture | None = None
    decoder: Whole | None = None
    state: StateDict | None = None

    def mixture_config(self, values: Mapping[str, Any], layer: int = 0, stack: Stack | None = None) -> MoEConfig:
        """The contract of a layer's mixture, by its number in the stack. Raises ValueError as `config`."""
        assert self.mixture is not None
        values = self.mixture.each_layer(self.text_settings(values))
        renamed = () if stack is None else stack.renamed
        values = {**values, **{name: values[other] for name, other in renamed if other in values}}
        lists = {name: values[name] for name in self.mixture.by_layer if isinstance(values.get(name), list)}
        own = {name: value[layer] for name, value in lists.items() if layer < len(value)}
        return self._contract({**values, **own}, self.mixture.read)

    def text_settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The text model's own settings of a config.json, its model type the family's. Raises ValueError if there are
        none, and for more layers than any model has.
        """
        assert self.mixture is not None
        model_type, found = values.get("model_type"), dict[str, Any](values)
        way = self.mixture.types.get(model_type) if isinstance(model_type, str) else None
        if way is None:
            _check_layers(found)
            return found
        for word in filter(None, way.split(".")):
            inner = found.get(word)
            require(isinstance(inner, dict), word, inner, "an object with the text model's settings")
            outer = {name: found[name] for name in ("quantization_config",) if name in found}
            found = {**inner, **outer}  # type: ignore[dict-item]
        _check_layers(found)
        return {**found, "model_type": self.name}

    def is_nested(self, values: Mapping[str, Any]) -> bool:
        """Whether a config.json is of a model around the text model, whose tensors stand among others."""
        return self.mixture is not None and bool(self.mixture.types.get(values.get("model_type", "")))

    def first_of_layers(self, values: Mapping[str, Any]) -> str:
        """How the names of layers begin in a folder with that config.json."""
        name, (alone, inside) = self.whole.layer.partition("{l}")[0], self.whole.inside
        return inside + name.removeprefix(alone) if self.is_nested(values) else name

    def config(self, values: Mapping[str, Any]) -> DecoderConfig:
        """The contract. Raises ValueError with everything that is missing, of a wrong type or not supported."""
        mixture, decoder = self._parts()
        values = self.text_settings(values)
        lists = {name: values[name] for name in mixture.by_layer if isinstance(values.get(name), list)}
        alike = {name: each[0] for name, each in lists.items() if each and all(value == each[0] for value in each)}
        return self._contract(
            {**values, **alike}, lambda settings: decoder.read(settings, mixture.read(settings))
        )

    @property
    def whole(self) -> Whole:
        """The decoder, of a family whose whole decoder is known."""
        assert self.decoder is not None, f"of {self.name} the whole decoder is not known"
        return self.decoder

    def _parts(self) -> tuple[Mixture, Whole]:
        assert self.mixture is not None
        return self.mixture, self.whole

    def _contract(self, values: Mapping[str, Any], read: Callable[[Settings], Config]) -> Config:
        settings = Settings(values)
        settings.must_be("model_type", self.name, "the family")
        settings.must_be("is_causal", True, "a decoder sees what stands before")
        self._check_single_layers(settings)
        config = None
        try:
            config = read(settings)
        except ValueError as error:
            settings.errors.append(str(error))
        if settings.errors or config is None:
            raise ValueError("; ".join(dict.fromkeys(settings.errors)))
        return config

    def _check_single_layers(self, settings: Settings) -> None:
        """Notes settings of single layers that the family does not read."""
        name, allowed = "per_layer_config", () if self.mixture is None else self.mixture.by_number
        if not allowed:
            settings.must_be(name, {}, "settings of single layers are not supported")
            return
        found = settings.take(name, dict, {}, {})
        fits = all(isinstance(each, dict) and set(each) <= set(allowed) for each in found.values())
        if not fits or not all(str(number).isdecimal() for number in found):
            settings.wrong(name, f"an object of layer numbers, each with {' and '.join(allowed)} at most")

    def values(self, config: DecoderConfig) -> dict[str, Any]:
        """config.json of a contract. Raises ValueError if the family cannot say it."""
        mixture, decoder = self._parts()
        alone = next((name for name, way in mixture.types.items() if way == ""), self.name)
        named = {"architectures": [decoder.architecture], "model_type": alone}
        values = named | decoder.write(config) | mixture.write(config.moe)
        again = self.config(values)
        if config != again:
            unsaid = ", ".join(differences(config, again))
            raise ValueError(f"{self.name}: must be a contract of that family; it cannot say {unsaid}")
        return values

    def on_disk(self, config: DecoderConfig) -> Table:
        """A decoder's names as they are written."""
        return self._table(self._parts()[0].on_disk, "", config)

    def in_memory(self, config: DecoderConfig) -> Table:
        """A decoder's names as the reference has them in memory, and its optimizer."""
        return self._table(self._parts()[0].in_memory, "_fused", config)

    def _table(self, names: Names, side: str, config: DecoderConfig) -> Table:
        """The rows of every stack of layers, each with the numbers that its layers have in the files."""
        decoder, numbers = self._parts()[1], dict[str, tuple[int, ...]]()
        kinds = {"moe": under(names.rows, names.within, ""), "dense": under(decoder.dense, decoder.layer, "")}
        kinds |= {kind: under((*decoder.norms, *rows), decoder.layer, "") for kind, rows in decoder.attention.items()}
        attention, ffn = list[Row](), list[Row]()
        for i, (name, stack) in enumerate(config.stacks.items()):
            number, kind = f"l{i}", stack.contract.kind
            rows = stacked(kinds.get(kind, ()), "", f"{name}.", number)
            numbered = (replace(row, theirs=row.theirs.replace("{l}", f"{{{number}}}")) for row in rows)
            (attention if kind in decoder.attention else ffn).extend(numbered)
            numbers[number] = stack.layers
        layout = names.whole or f"hf_{self.name}{side}"
        return Table(layout, (*decoder.before, *attention, *decoder.after, *ffn), numbers=numbers)

    def parameter_order(self, plan: Plan) -> list[str]:
        """The reference's `named_parameters()`: what stands before the layers, each layer, what stands after them."""
        decoder = self._parts()[1]
        before, order = [row.theirs for row in decoder.before], decoder.order

        def rank(name: str) -> tuple[int, int, int]:
            found = re.match(decoder.layer.replace(".", r"\.").replace("{l}", r"(\d+)"), name)
            if found is None:
                return (0 if name in before else 2), 0, 0
            rest = name[found.end() :]
            place = next((i for i, start in enumerate(order) if rest.startswith(start)), None)
            require(place is not None, f"{self.name}: order", order, f"of prefixes that {rest} has one of")
            return 1, int(found[1]), place  # type: ignore[return-value]

        return sorted(plan.their_shapes, key=rank)  # within a module in the order of the rows


def read_around(
    settings: Settings, *, max_positions: int = 2048, norm_eps: float = 1e-6, aux: float | None = 0.001,
    tied: bool = False,
) -> dict[str, Any]:
    """Fields of `DecoderConfig` that every family's config.json says in the same words: all but its layers.

    The others are what transformers takes where config.json is silent; `aux` None: it has no balance loss.
    """
    return {
        "vocab_size": settings.size("vocab_size"),
        "model_dim": settings.size("hidden_size"),
        "max_positions": settings.integer("max_position_embeddings", max_positions),
        "norm_eps": settings.number("rms_norm_eps", norm_eps),
        "tied_embeddings": settings.flag("tie_word_embeddings", tied),
        "balance_loss_weight": 0.0 if aux is None else settings.number("router_aux_loss_coef", aux),
    }


def _check_layers(values: Mapping[str, Any]) -> None:
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
        if is_int(values.get(name)) and values[name] > 0:  # other values are refused where they are read
            check_depth(**{name: values[name]})


def read_decoder(
    settings: Settings, moe: MoEConfig, *, kv_heads: int | None = None, null_kv_heads: bool = True, theta: float = 1e4,
    max_positions: int = 2048, norm_eps: float = 1e-6, aux: float | None = 0.001, fraction: float | None = None,
    head_dim: int | None = None, tied: bool = False, kinds: tuple[RopeKind, ...] = ROPE_KINDS, **own: Any,
) -> DecoderConfig:
    """A decoder of grouped-query attention; `own` are the family's fields of `GroupedDecoder`. May raise ValueError.

    The other arguments are transformers' defaults for missing fields: `kv_heads` None gives each query head its own,
    and so does null in config.json if `null_kv_heads`; `fraction` and `kinds` as in `read_rope`.
    """
    around = read_around(settings, max_positions=max_positions, norm_eps=norm_eps, aux=aux, tied=tied)
    heads = settings.size("num_attention_heads")
    own_dim, null = around["model_dim"] // heads, heads if null_kv_heads else REFUSED
    return DecoderConfig.grouped(**around | {
        "num_layers": settings.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": settings.integer("num_key_value_heads", kv_heads or heads, null=null),
        "head_dim": settings.integer("head_dim", head_dim or own_dim, null=own_dim),
        "moe": moe,
        "rope": read_rope(settings, theta, around["max_positions"], fraction, kinds),
        "attention_dropout": settings.number("attention_dropout", 0.0),
    } | own)


def read_moe(make: Callable[..., MoEConfig], settings: Settings, width: str, **own: Any) -> MoEConfig:
    """A preset at this config.json's sizes; `width` is the family's name of an expert's width.

    The number of experts has two names, of which transformers takes one or both, by family: they must agree.
    """
    number, top_k = settings.size("num_local_experts", "num_experts"), settings.size("num_experts_per_tok")
    if top_k > number:
        settings.errors.append(f"num_experts_per_tok={top_k}: must be at most the number of experts, {number}")
    moe = make(settings.size("hidden_size"), settings.size(width), number, min(top_k, number), **own)
    return dataclasses.replace(moe, expert=dataclasses.replace(moe.expert, activation=settings.activation()))


def write_moe(moe: MoEConfig, experts: str, width: str) -> dict[str, Any]:
    """The reverse of `read_moe`; `experts` and `width` are the family's names of two sizes."""
    words = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "hidden_size": moe.model_dim, "hidden_act": words[moe.expert.activation], experts: moe.num_experts,
        width: moe.expert_dim,
        "num_experts_per_tok": moe.top_k,
    }


def write_around(config: DecoderConfig) -> dict[str, Any]:
    """The reverse of `read_around`, and the number of layers."""
    return {
        "vocab_size": config.vocab_size, "num_hidden_layers": config.num_layers,
        "max_position_embeddings": config.max_positions, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings, "router_aux_loss_coef": config.balance_loss_weight,
    }


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """The reverse of `read_decoder`; what is of the mixture stands in `write_moe`."""
    attention = config.attention
    return write_around(config) | {
        "num_attention_heads": attention.num_heads, "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim, "attention_dropout": attention.dropout,
        **({} if config.rope is None else {"rope_parameters": write_rope(config.rope)}),
    }
