"""A small makeMoE model in a folder, a hostile text in its characters, routing made by hand, and a page's content."""


import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

import jax_moe
from jax_moe.porting.checkpoint import Checkpoint, save
from moe_parity.routing.observe import Observed

HOSTILE = (
    "<script>alert('a')</script>\n\" onload=\"<!--&lt;\x01\N{RIGHT-TO-LEFT OVERRIDE}at\N{HEBREW LETTER SHIN}"
    "\N{GRINNING FACE}\n</span></div>"
)
CHARACTERS = "".join(sorted({*HOSTILE, *"able"}))
BLOCK = 8


def character_model(**settings: Any) -> jax_moe.MakeMoE:
    sizes = {"block_size": BLOCK, "model_dim": 8, "num_heads": 2, "num_layers": 2, "num_experts": 4, "top_k": 2}
    config = jax_moe.MakeMoEConfig(vocab_size=len(CHARACTERS), dropout=0.0, **(sizes | settings))
    return jax_moe.MakeMoE(config, rngs=nnx.Rngs(3))


def save_makemoe(path: Path) -> Path:
    """A folder of ours with a makeMoE model and its characters."""
    save(Checkpoint("makemoe", character_model(), CHARACTERS), path)
    return path


def written(folder: Path, text: str) -> Path:
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder / "text.txt"


def observed(token_N: list[int], expert_NK: list[list[int]], dropped_NK: list[list[int]] | None = None) -> Observed:
    """One layer's routing, the second weight a quarter."""
    chosen = np.asarray(expert_NK)[None]
    return Observed(
        np.asarray(token_N), np.arange(len(token_N)) == 0, chosen,
        np.broadcast_to(np.asarray([0.75, 0.25])[: chosen.shape[2]], chosen.shape),
        np.zeros(chosen.shape, bool) if dropped_NK is None else np.asarray(dropped_NK, bool)[None], np.asarray([0.5]),
    )


class Shown(HTMLParser):
    """The page as a browser reads it: tags, links, the text, and the pieces and tooltips of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.links, self.pieces = Counter[str](), list[str](), list[str]()
        self.tips, self.classes, self.text, self.open = list[str](), list[str](), "", list[str]()

    @classmethod
    def of(cls, page: str) -> tuple["Shown", dict[str, Any]]:
        found = cls()
        found.feed(page)
        data = re.findall(r'<script type="application/json" id="data">([^<]*)</script>', page)
        return found, json.loads(data[0])

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.tags[tag] += 1
        self.links += [given[name] for name in ("src", "href", "srcset", "action", "data") if name in given]
        assert not any(name.startswith("on") for name in given)
        if tag == "span" and re.match(r"t e\d", given.get("class", "")):
            self.pieces.append("")
            self.tips.append(given["title"])
            self.classes.append(given["class"])
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open:
            self.pieces[-1] += data
