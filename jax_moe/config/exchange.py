"""How tokens get to the devices of their experts; `sharding/expert_parallel.py` says what each way does."""

from typing import Literal

Exchange = Literal["xla", "all_to_all", "padded", "ring", "ragged", "auto"]
