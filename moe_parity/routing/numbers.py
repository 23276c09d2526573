"""Numbers about the routing of a text, layer by layer. Numpy only, and no router: all is counted from choices."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_parity.routing.observe import Observed

MOST_TAKEN = 8  # tokens listed for each expert


@dataclass(frozen=True)
class Taken:
    """A token that an expert takes more often than others do."""

    token: int
    count: int  # its occurrences that chose the expert
    occurrences: int
    lift: float  # (count / occurrences) / (choices of the expert / N)

    @property
    def share(self) -> float:
        """The share of the token's occurrences that chose the expert."""
        return self.count / self.occurrences


@dataclass(frozen=True)
class LayerNumbers:
    """How N tokens are spread over the E experts of one mixture."""

    layer: int
    expert_NK: np.ndarray  # choices, best first
    weight_NK: np.ndarray  # their weights before drops
    dropped_NK: np.ndarray  # True where a choice got no slot
    entropy: float  # mean entropy of a token's scores, in nats
    choices_E: np.ndarray  # how many choices went to each expert, before drops
    dropped_E: np.ndarray  # how many of them got no slot
    together_EE: np.ndarray  # tokens that chose both; on the diagonal choices_E
    taken: tuple[tuple[Taken, ...], ...]  # for each expert, the largest lift first

    @property
    def load_E(self) -> np.ndarray:
        """The share of choices that went to each expert, before drops; sums to 1."""
        return self.choices_E / self.choices_E.sum()

    @property
    def dropped_fraction(self) -> float:
        """The share of choices that got no slot."""
        return float(self.dropped_NK.mean())

    @property
    def lost_tokens(self) -> int:
        """How many tokens got no slot with any expert."""
        return int(self.dropped_NK.all(axis=1).sum())

    @property
    def entropy_share(self) -> float:
        """The entropy over ln E, its largest value; 0 for a single expert."""
        E = len(self.choices_E)
        return self.entropy / math.log(E) if E > 1 else 0.0

    @property
    def with_EE(self) -> np.ndarray:
        """Row e: of the tokens that chose e, the share that also chose each other expert; sums to K - 1."""
        others_EE = self.together_EE * ~np.eye(len(self.choices_E), dtype=bool)
        return others_EE / np.maximum(self.choices_E, 1)[:, None]

    def pairs(self, most: int) -> list[tuple[int, int, int]]:
        """The pairs of experts that most tokens chose, as (e, f, tokens), e < f; pairs of no token are left out."""
        first_P, second_P = np.triu_indices(len(self.choices_E), 1)
        count_P = self.together_EE[first_P, second_P]
        order = np.argsort(-count_P, kind="stable")[:most]
        return [(int(first_P[p]), int(second_P[p]), int(count_P[p])) for p in order if count_P[p]]

    def to_json(self) -> dict[str, Any]:
        """The numbers under the keys that `jax-moe routing --json` documents."""
        return {
            "layer": self.layer, "load": self.load_E.tolist(), "choices": self.choices_E.tolist(),
            "dropped": self.dropped_E.tolist(), "dropped_fraction": self.dropped_fraction,
            "lost_tokens": self.lost_tokens, "entropy": self.entropy, "entropy_share": self.entropy_share,
            "together": self.together_EE.tolist(),
            "taken": [[{**asdict(each), "share": each.share} for each in of_expert] for of_expert in self.taken],
        }


def least_occurrences(num_tokens: int) -> int:
    """How often a token must occur to be listed as taken: rare ones have a large lift by chance."""
    return min(5, 1 + num_tokens // 256)


def numbers(observed: Observed, layers: tuple[int, ...], num_experts: int) -> list[LayerNumbers]:
    """The numbers of every mixture; `layers` are their places in the model."""
    return [_of_layer(layer, observed, row, num_experts) for row, layer in enumerate(layers)]


def _of_layer(layer: int, observed: Observed, row: int, E: int) -> LayerNumbers:
    expert_NK, dropped_NK = observed.expert_LNK[row].astype(np.int64), observed.dropped_LNK[row]
    pair_NKK = expert_NK[:, :, None] * E + expert_NK[:, None, :]
    return LayerNumbers(
        layer=layer, expert_NK=expert_NK, weight_NK=observed.weight_LNK[row], dropped_NK=dropped_NK,
        entropy=float(observed.entropy_L[row]),
        choices_E=np.bincount(expert_NK.ravel(), minlength=E),
        dropped_E=np.bincount(expert_NK[dropped_NK], minlength=E),
        together_EE=np.bincount(pair_NKK.ravel(), minlength=E * E).reshape(E, E),
        taken=_taken(observed.token_N, expert_NK, E),
    )


def _taken(token_N: np.ndarray, expert_NK: np.ndarray, E: int) -> tuple[tuple[Taken, ...], ...]:
    """For each expert the tokens of the largest lift above 1; of equals those that it takes more often."""
    token_U, place_N, occurrences_U = np.unique(token_N, return_inverse=True, return_counts=True)
    U, N = len(token_U), len(token_N)
    count_EU = np.bincount((expert_NK * U + place_N[:, None]).ravel(), minlength=E * U).reshape(E, U)
    choices_E1 = count_EU.sum(axis=1, keepdims=True)
    lift_EU = count_EU / occurrences_U / np.maximum(choices_E1 / N, 1 / N)
    listed_EU = (lift_EU > 1) & (occurrences_U >= least_occurrences(N))
    found = []
    for count_U, lift_U, listed_U in zip(count_EU, lift_EU, listed_EU, strict=True):
        best = sorted(np.flatnonzero(listed_U), key=lambda u: (-lift_U[u], -count_U[u]))[:MOST_TAKEN]
        found.append(
            tuple(Taken(int(token_U[u]), int(count_U[u]), int(occurrences_U[u]), float(lift_U[u])) for u in best)
        )
    return tuple(found)
