"""Mixtral's sparse block (Hugging Face's MixtralSparseMoeBlock on disk): w1 is the gate, w3 goes up, w2 down."""

from jax_moe.porting.table.rows import Row, Table

ROWS = (
    Row("gate.weight", "E D", "router.kernel", "D E"),
    Row("experts.{e}.w1.weight", "F D", "experts.gate", "e D F"),
    Row("experts.{e}.w2.weight", "D F", "experts.down", "e F D"),
    Row("experts.{e}.w3.weight", "F D", "experts.up", "e D F"),
)
SPARSE_BLOCK = Table("mixtral", ROWS)
