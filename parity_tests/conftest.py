"""Settings for all tests: full matrix precision, one thread for PyTorch, the same Hypothesis examples on every run.

fp64 in JAX is switched on around what needs it (`sides.precision`) and nowhere else: the rest runs as users run it.
Nothing here needs PyTorch; without it the tests that compare with it are skipped and say so.
"""

import importlib.util

import jax
from hypothesis import HealthCheck, settings

jax.config.update("jax_default_matmul_precision", "highest")

settings.register_profile(
    "derandomised", derandomize=True, deadline=None, max_examples=40, print_blob=False, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.register_profile("search", parent=settings.get_profile("derandomised"), derandomize=False, max_examples=1000)
settings.load_profile("derandomised")

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
