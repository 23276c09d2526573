"""`torch_ref.Attention`: one Linear a head and projection as in makeMoE, or one fused `qkv` (rows q, k, v, by head)."""

from jax_moe.porting.table.rows import Row, Table

ROWS = (
    Row("heads.{h}.key.weight", "A D", "key", "D h A"),
    Row("heads.{h}.query.weight", "A D", "query", "D h A"),
    Row("heads.{h}.value.weight", "A D", "value", "D h A"),
    Row("qkv.weight", "(P H A) D", "qkv", "D P H A"),
    Row("proj.weight", "D (H A)", "out", "H A D"),
    Row("proj.bias", "D", "out_bias", "D"),
)
TORCH_REF = Table("torch_ref", ROWS)
