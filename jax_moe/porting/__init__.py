"""Weights both ways: an engine over numpy arrays, and one table of rows a family.

`__init__.pyi` lists the public names, which load on first use: reading safetensors or Orbax costs nothing before.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
