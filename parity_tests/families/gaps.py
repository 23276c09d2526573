"""The model types of `transformers` with routed experts: found in its sources, and those whose mixture is not here
yet.
"""

import ast
import importlib.util
import re
from pathlib import Path

# A class of experts, by its name; or a function that mixes them.
EXPERTS = re.compile(r"Experts$|ExpertGLU$|NaiveMoe$|CDMoE$")

# Each with the reason in words. A type that is neither here nor in the table turns a test red.
GAPS: dict[str, str] = {
    "vitpose_backbone": "no mixture that routes: it has no router, the caller names each image's data set, and an "
    "expert is the last rows of one linear map",
}

# In the table, and yet not all of it.
IN_PART: dict[str, str] = {
    "nllb_moe": "at evaluation; transformers 5.24 calls experts 0 and 1 alone, whatever the "
                "router chose: compared with its router and its experts, put together as in fairseq",
    "jetmoe": "the mixture of feed-forward networks; that of attention (queries and outputs by expert) is not read",
    "ernie4_5_vl_moe": "the mixture of text tokens, with the shared experts; that of vision tokens is not read, and "
    "stays as it is",
    "qwen3_omni_moe": "the thinker's mixture; the talker's is not read",
    "dots3_note": "the text model's mixture; the vision model's is not read",
}

# What of the reference is not followed, or cannot be compared.
FINDINGS: dict[str, str] = {
    "doge": "its router mixes tokens, so that a text at once and token by token differ: followed, for checkpoints were "
    "trained so; norm_topk_prob=True divides the softmax in place in transformers 5.24, which then has no gradient "
    "(parity_tests/families/test_findings.py)",
    "longcat_flash": "transformers 5.24 makes a gate and an up for zero experts too, which nothing reads: it writes "
    "them, and refuses a published folder, which has none (parity_tests/families/test_findings.py); `load_moe` reads "
    "both",
}


def found() -> set[str]:
    """The model types of the installed transformers whose modelling code defines routed experts."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    return {file.parent.name for file in Path(spec.origin).parent.glob("models/*/modeling_*.py") if _defines(file)}


def _defines(file: Path) -> bool:
    """Whether the file is its folder's own model and defines a class of experts."""
    if file.stem != f"modeling_{file.parent.name}":
        return False
    text = file.read_text(encoding="utf-8")
    if not re.search(r"^class \w*(Experts|ExpertGLU|NaiveMoe|CDMoE)\b", text, re.M):
        return False
    classes = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    return any(EXPERTS.search(name) for name in classes)
