"""`torch_ref.MoE`: every contract, one torch.nn.Linear a map."""

from jax_moe.porting.table.rows import Row, Table, linear

ROUTER = (
    *linear("router.linear", "router."),
    *linear("router.noise_linear", "router.", "noise_kernel", "noise_bias"),
    Row("router.correction_bias", "E", "router.correction_bias", "E"),
)
EXPERTS = tuple(
    row
    for name in ("gate", "up", "down")
    for row in (
        Row(f"experts.{{e}}.{name}.weight", "O I", f"experts.{name}", "e I O"),
        Row(f"experts.{{e}}.{name}.bias", "O", f"experts.{name}_bias", "e O"),
    )
)
SHARED = tuple(
    row
    for name in ("gate", "up", "down")
    for row in (
        Row(f"shared.{name}.weight", "O I", f"shared.{name}", "0/1 I O"),
        Row(f"shared.{name}.bias", "O", f"shared.{name}_bias", "0/1 O"),
    )
)
ROWS = (*ROUTER, *EXPERTS, *SHARED, Row("shared_gate.weight", "O I", "shared_gate", "I O"))
TORCH_REF = Table("torch_ref", ROWS)
