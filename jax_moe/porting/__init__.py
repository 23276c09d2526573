"""Weights converted both ways: an engine over numpy arrays, and a table of rows per family.

`__init__.pyi` lists the public names, which load on first use: safetensors and Orbax only if needed.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
