"""`torch_ref`'s own names: MoE with every contract, one torch.nn.Linear a map; Attention and Block.

Attention has one Linear a head and projection as in makeMoE, or one fused `qkv` (rows q, k, v, by head); Block is norm,
attention, norm, and a sparse or soft mixture.
"""

from flax import nnx

from jax_moe.attention.multihead import Attention
from jax_moe.config.moe import MoEConfig
from jax_moe.experts import DIMS
from jax_moe.models.block import Block
from jax_moe.moe import MoE
from jax_moe.porting.families import soft_moe
from jax_moe.porting.families.choices import StateDict
from jax_moe.porting.families.family import Family
from jax_moe.porting.table.rows import Row, Table, layer_norm, linear, stacked, under

NETWORK = (
    *(
        row
        for name, dims in (("down", "D I"), ("first", "I O"), ("second", "O I"), ("out", "I E"))
        for row in linear(f"router.network.{name}", "router.network.", dims, name, f"{name}_bias")
    ),
    *(Row(f"router.network.{name}", "I", f"router.network.{name}", "I") for name in ("norm", "state_scale")),
)
ROUTER = (
    *linear("router.linear", "router.", "D E"),
    *linear("router.noise_linear", "router.", "D E", "noise_kernel", "noise_bias"),
    Row("router.keys.weight", "O D", "router.keys", "D O"),
    *NETWORK,
    Row("router.correction_bias", "E", "router.correction_bias", "E"),
    Row("router.expert_table", "V K", "router.expert_table", "V K"),
)
EXPERT = tuple(row for name in ("gate", "up", "down") for row in linear(name, "", DIMS[name], name, f"{name}_bias"))
ROWS = (
    *ROUTER, *stacked(EXPERT, "experts.{e}.", "experts.", "e"), *stacked(EXPERT, "shared.", "shared.", "0/1"),
    *stacked(EXPERT, "shared_experts.{y}.", "shared_experts.", "y"),
    Row("router.learned_scale", "1", "router.learned_scale", "1"),
    Row("shared_gate.weight", "1 D", "shared_gate", "D 1"),
    Row("latent_in.weight", "I D", "latent_in", "D I"), Row("latent_out.weight", "D I", "latent_out", "I D"),
    Row("latent_norm.weight", "D", "latent_norm.scale", "D"),
    Row("answer_norm.weight", "D", "experts.answer_scale", "D"),
    *(
        Row(f"{name}.weight", "D", f"{name}.scale", "D")
        for name in ("output_norm", "input_norm", "routed_norm", "shared_input_norm", "shared_norm")
    ),
    Row("router.input_scale", "D", "router.input_scale", "D"),
    Row("router.expert_scale", "E", "router.expert_scale", "E"),
    Row("answer_bias", "D", "answer_bias", "D"),
)
ATTENTION = (
    Row("heads.{h}.key.weight", "A D", "key", "D h A"),
    Row("heads.{h}.query.weight", "A D", "query", "D h A"),
    Row("heads.{h}.value.weight", "A D", "value", "D h A"),
    Row("qkv.weight", "(3 H A) D", "qkv", "D 3 H A"),
    Row("proj.weight", "D (H A)", "out", "H A D"),
    Row("proj.bias", "D", "out_bias", "D"),
)
_AROUND = (
    *layer_norm("attention_norm", "attention_norm"),
    *under(ATTENTION, "attention.", "attention."),
    *layer_norm("moe_norm", "moe_norm"),
)

KNOWN_BY = r"router\.(linear|keys|network\.out)\.weight"
TORCH_REF = Family("moe", state=StateDict(MoE, MoEConfig, Table("torch_ref", ROWS), KNOWN_BY, None))
# Parts of models, which no checkpoint is of.
PARTS: dict[type[nnx.Module], tuple[Table, ...]] = {
    Attention: (Table("torch_ref", ATTENTION),),
    Block: (
        Table("torch_ref", (*_AROUND, *under(ROWS, "moe.", "moe."))),
        Table("torch_ref_soft", (*_AROUND, *under(soft_moe.ROWS, "moe.", "moe."))),
    ),
}
