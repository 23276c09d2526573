"""Step counts of experts: torch counts per parameter, we per expert, as [*L, E] under the path of the experts."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jax_moe.porting.errors import PortError
from jax_moe.porting.table.plan import Plan
from jax_moe.unchosen import experts_in

HINT = "an expert without tokens takes no step in PyTorch; adamw_as_torch(..., unchosen='skip') counts so"


def expert_tensors(plan: Plan) -> dict[str, tuple[int, ...]]:
    """{torch's name: shape} of the tensors that hold only expert weights: these may have step counts of their own."""
    experts = experts_in(plan.ours)
    others = {piece.theirs for piece in plan.pieces if piece.ours not in experts}
    return {name: shape for name, shape in plan.their_shapes.items() if name not in others}


def counts_of(plan: Plan, own_steps: Mapping[str, int], step: int) -> dict[str, np.ndarray]:
    """{path of the experts: steps of each}, from torch's steps by name where they are not `step`; empty if all are.

    Raises PortError if the parameters of an expert have different steps.
    """
    if not own_steps:
        return {}
    counts = {path: np.full(shape, step, np.int64) for path, shape in _shapes(plan).items()}
    for name, path, index in _places(plan):
        counts[path][index] = own_steps.get(name, step)
    wrong = set()
    for name, path, index in _places(plan):
        found, expert = own_steps.get(name, step), counts[path][index]
        if (expert != found).any():
            wrong.add(f"step of {name} is {found}, must be {np.max(expert)} as of its expert's other parameters")
    if wrong:
        raise PortError("optimizer state", wrong=sorted(wrong))
    return counts


def own_steps_of(plan: Plan, counts: Mapping[str, np.ndarray], step: int) -> dict[str, int]:
    """The reverse of `counts_of`. Raises PortError if a torch tensor holds experts with different steps, or counts that
    do not fit the plan.
    """
    if not counts:
        return {}
    shapes, found = _shapes(plan), {path: value.shape for path, value in counts.items()}
    if shapes != found:
        raise PortError("optimizer state", wrong=[f"steps of experts are {found}, must be {shapes}"])
    steps: dict[str, int] = {}
    wrong = []
    for name, path, index in _places(plan):
        held = sorted(set(counts[path][index].ravel().tolist()))
        if len(held) > 1 or steps.setdefault(name, held[0]) != held[0]:
            wrong.append(f"steps of the experts in {name} are {held[0]} to {held[-1]}, must be equal")
    if wrong:
        raise PortError(f"optimizer state (layout {plan.table.name})", wrong=wrong)
    return {name: own for name, own in steps.items() if own != step}


def unequal(counts: Mapping[str, np.ndarray], step: int | None) -> list[str]:
    """Messages for the experts whose step count is not `step`."""
    return [
        f"step of {path}[{', '.join(map(str, index))}] is {counts[path][tuple(index)]}, must be {step} as of the others"
        for path in counts for index in np.argwhere(counts[path] != step).tolist()
    ]


def _places(plan: Plan) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(torch's name, path of the experts, index of those in the tensor)."""
    experts = experts_in(plan.ours)
    for piece in plan.pieces:
        if piece.ours in experts:
            path, own_dims = experts[piece.ours]
            yield piece.theirs, path, (*piece.our_index[:-own_dims], ...)


def _shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """{path of the experts: [*L, E]}."""
    return {path: plan.ours[name].shape[:-own_dims] for name, (path, own_dims) in experts_in(plan.ours).items()}
