"""What the text of a compiled TPU program says: estimated cycles, and bytes of collectives; loops times their trips."""

import dataclasses
import math
import re
from collections.abc import Callable

UNKNOWN = 2**62  # a cost of more cycles than this is the compiler's word for none
# What each of n chips of a ring sends for one byte of its result
SENT: dict[str, Callable[[float], float]] = {
    "all-gather": lambda n: 1 - 1 / n, "all-reduce": lambda n: 2 - 2 / n, "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: 1 - 1 / n, "ragged-all-to-all": lambda n: 1 - 1 / n, "collective-permute": lambda n: 1,
}
SIZES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
    "s64": 8, "u64": 8,
}
HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
COLLECTIVE = re.compile(rf" = (\(?[^=]*?\)?) ({'|'.join(SENT)})(-start)?\(")
COMMENT = re.compile(r"/\*.*?\*/")  # /*index=5*/ in a long tuple
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
CALL = re.compile(r"(?:call|call-start|async-start)\(.*(?:to_apply|calls|called_computations)=\{?%?([\w.\-]+)")
BRANCHES = re.compile(r" conditional\(.*?(?:true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)|"
                      r"branch_computations=\{([^}]*)\})")
FUSION = re.compile(r" fusion\(.*calls=%?([\w.\-]+)")
SCATTERS = "all-reduce-scatter"  # begins the names of fusions that reduce and keep a chip's part
GROUPS = re.compile(
    r"replica_groups=(?:\{\{(?P<listed>[\d,]+)\}|\[(?P<sizes>[\d,]+)\]<=|"
    r"mesh\[(?P<mesh>[^\]]*)\].*? \{(?P<axes>[^}]*)\})"
)
BOUND = re.compile(r"%([\w.\-]+) = s32\[\][^=]* constant\((\d+)\)")


@dataclasses.dataclass
class Counts:
    """Of a computation: estimated cycles, operations without an estimate, and {kind of collective: bytes sent}."""

    cycles: int = 0
    without: int = 0
    sent: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, other: "Counts", times: int = 1) -> None:
        """Adds another computation that runs so many times."""
        self.cycles += times * other.cycles
        self.without += times * other.without
        for kind, size in other.sent.items():
            self.sent[kind] = self.sent.get(kind, 0.0) + times * size


def count(text: str) -> Counts:
    """The entry computation's, with loops times their trip count and what it calls.

    Of the branches of a conditional the one that sends least counts. The trip count is that of the loop's condition, a
    counter below a constant; a loop without one counts once.
    """
    lines = _computations(text)
    entry = next((name for name, (is_entry, _) in lines.items() if is_entry), "")
    found: dict[str, Counts] = {}

    def total(name: str) -> Counts:
        if name not in found:
            counts = found[name] = Counts()
            for line in lines.get(name, (False, []))[1]:
                counts.add(_own(line, name.startswith(SCATTERS)))
                branches = BRANCHES.search(line)
                loop, call, fusion = LOOP.search(line), CALL.search(line), FUSION.search(line)
                if loop:
                    counts.add(total(loop[2]), _trips(lines.get(loop[1], (False, []))[1]))
                elif call:
                    counts.add(total(call[1]))
                elif branches:
                    names = [name.strip(" %") for part in branches.groups() if part for name in part.split(",")]
                    counts.add(min(map(total, names), key=lambda branch: sum(branch.sent.values())))
                elif fusion:  # its cycles stand in its own line
                    counts.add(Counts(sent=total(fusion[1]).sent))
        return found[name]

    return total(entry)


def _computations(text: str) -> dict[str, tuple[bool, list[str]]]:
    """{computation: whether it is the entry, its lines}."""
    found: dict[str, tuple[bool, list[str]]] = {}
    name = ""
    for line in COMMENT.sub("", text).splitlines():
        head = None if line.startswith(" ") else HEAD.match(line)
        if head:
            name = head[2]
            found[name] = bool(head[1]), []
        elif name:
            found[name][1].append(line)
    return found


def _own(line: str, scatters: bool) -> Counts:
    cycles, collective = CYCLES.search(line), COLLECTIVE.search(line)
    counts = Counts()
    if cycles:
        known = int(cycles[1]) < UNKNOWN
        counts.add(Counts(int(cycles[1]) if known else 0, 0 if known else 1))
    if collective:
        types, kind, begins = collective[1], collective[2], bool(collective[3])
        sizes = [_bytes(*array) for array in ARRAY.findall(types)]
        result = max(sizes, default=0.0) if begins else sum(sizes)  # one that begins names its operand too
        n = _chips(line)
        if scatters and kind == "all-reduce":
            kind, result = "reduce-scatter", result / n
        counts.add(Counts(sent={kind: SENT[kind](n) * result}))
    return counts


def _chips(line: str) -> int:
    """How many chips a collective is among. Raises ValueError if its line does not say it."""
    if "source_target_pairs" in line:
        return 2
    found = GROUPS.search(line)
    if found is None:
        raise ValueError(f"{line.strip()[:200]}: must name its replica_groups")
    if found["listed"]:
        return found["listed"].count(",") + 1
    if found["sizes"]:
        return int(found["sizes"].split(",")[-1])
    sizes = dict(re.findall(r"('\w+')=(\d+)", found["mesh"]))
    return math.prod(int(sizes[axis]) for axis in found["axes"].split(","))


def _bytes(kind: str, dims: str) -> float:
    return float(SIZES.get(kind, 0) * math.prod(map(int, filter(None, dims.split(",")))))


def _trips(condition: list[str]) -> int:
    bounds = {match[1]: int(match[2]) for line in condition if (match := BOUND.search(line))}
    for line in condition:
        compared = re.search(r"ROOT .* compare\(.*%([\w.\-]+)\), direction=LT", line)
        if compared and compared[1] in bounds:
            return bounds[compared[1]]
    return 1
