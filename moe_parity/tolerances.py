"""How far apart two correct frameworks may be, by dtype and kind of stage; "" is any kind not named.

The error is relative to the stage's largest value (gradients: by norm). Beside each the worst measured over the 15 models of
parity_tests/table/family_cases.py and the modules of parity_tests/microscope/test_microscope.py. A choice may differ where
its scores are closer than twice what router logits may be off: `experts` is that.
"""

TOLERANCES: dict[str, dict[str, float]] = {
    "float64": {
        "": 2e-14,  # 2.2e-15, an answer of a mixture
        "router_logits": 1e-14,  # 1.3e-15
        "experts": 2e-14,
        "loss": 1e-15,  # 1.1e-16
        "balance_loss": 2e-15,  # 2.8e-16
        "gradient": 2e-13,  # 2.7e-14
    },
    "float32": {
        "": 1e-5,  # 2.0e-6, an answer of a mixture
        "router_logits": 5e-6,  # 9.1e-7
        "experts": 1e-5,
        "loss": 2e-6,  # 2.4e-7
        "balance_loss": 1e-6,  # 1.3e-7
        "gradient": 5e-5,  # 1.5e-5
    },
}
