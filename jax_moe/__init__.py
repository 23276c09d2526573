"""Mixture of Experts in JAX, provably equal to `torch_ref` in PyTorch.

`__init__.pyi` lists the public names. Each loads on first use: `import jax_moe.config` imports neither jax nor flax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
