"""The parity microscope: one batch in JAX and PyTorch, compared stage by stage.

`compare_modules` compares a user's own modules; `explain` names the convention that differs. `__init__.pyi` lists the
public names. They load on first use, PyTorch when a comparison runs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
