"""How far apart two correct frameworks may be, by dtype and kind of stage; "" is any kind not named.

The error is relative to the stage's largest value (gradients: by norm). Measured worst in parity_tests/test_microscope.py.
"""

TOLERANCES: dict[str, dict[str, float]] = {
    "float64": {"": 2e-14, "experts": 4e-14, "gradient": 2e-13},
    "float32": {"": 1e-5, "experts": 2e-5, "loss": 2e-6, "balance_loss": 2e-6, "gradient": 5e-5},
}
