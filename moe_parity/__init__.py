"""The parity microscope: one batch in two frameworks, compared stage by stage.

Beside `jax_moe` and `torch_ref`, for it runs both. No torch is imported before a run needs it.

Your own modules: `compare_modules`; which convention differs: `explain`. `__init__.pyi` lists the public names, which load on
first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
