"""Switch Transformers' sparse layer (Hugging Face's SwitchTransformersSparseMLP): wi goes up, wo down, no gate."""

from jax_moe.porting.table.rows import Row, Table, linear

ROWS = (
    *linear("router.classifier", "router."),
    Row("experts.expert_{e}.wi.weight", "F D", "experts.up", "e D F"),
    Row("experts.expert_{e}.wo.weight", "D F", "experts.down", "e F D"),
)
SPARSE_MLP = Table("switch", ROWS)
