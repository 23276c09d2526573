"""Readers are fed damaged files: each must answer with a ValueError of one line, quickly and in little memory.

    python -m parity_tests.fuzz --count 100000 --seed 1

Each input is a small valid file with one to four changes: bytes flipped, cut, doubled, numbers made huge, JSON values
replaced by values of another kind. `damaged(data, generator)` is a pure function of the seed, so that a finding
repeats.
"""

import argparse
import copy
import io
import json
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parity_tests.fuzz.kinds import Kind, kinds

LONGEST, MOST_BYTES = 5.0, 300e6  # seconds and bytes that one input may take
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 10**9, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "4", "\0",
    "../x", [], [[]], [1], {}, {"a": {}},
)
ODD_WORDS = (
    "-1", "0", "0.0", "1e400", "nan", "none", "", "=", "--", "-", "../x", "/", "a=b", "9" * 400, "--out", "--help",
    "data=2,data=2", "1/0", "\u0663", "\U0001f600", "x" * 5000,
)


def finding(kind: Kind, data: bytes, folder: Path) -> str | None:
    """What is wrong with the reader's answer to this file, or None."""
    write_files(folder, {**kind.others(), kind.name: data})
    begin, before, said = time.perf_counter(), _largest(), None
    try:
        kind.read(folder)
    except (ValueError, OSError) as error:
        message = str(error)
        fits = type(error) is not UnicodeDecodeError and "\n" not in message and len(message) < 4000
        said = None if fits else repr(error)[:300]
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        said = repr(error)[:300]
    peak = _largest() - before
    seconds = time.perf_counter() - begin
    if said is None and (seconds > LONGEST or peak > MOST_BYTES):
        said = f"took {seconds:.1f} s and {peak:,} bytes"
    return said


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files {path within the folder: content}."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _largest() -> int:
    """The peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def damaged(data: bytes, draw: np.random.Generator) -> bytes:
    """The file with some changes; JSON, also in a safetensors header, is changed as JSON half of the time."""
    if draw.random() < 0.5:
        if data[:1] == b"{":
            return _json_changed(data, draw)
        if data[8:9] == b"{":
            (size,) = struct.unpack("<Q", data[:8])
            header = _json_changed(data[8 : 8 + size], draw)
            return struct.pack("<Q", len(header)) + header + data[8 + size :]
    if data.isascii() and (data[:1].isalpha() or data[:2] == b"--") and draw.random() < 0.7:
        return _words_changed(data, draw)
    if data[:4] == b"PK\3\4" and draw.random() < 0.7:
        return _pickle_changed(data, draw)
    changed = bytearray(data)
    for _ in range(draw.integers(1, 5)):
        at = int(draw.integers(0, max(len(changed), 1)))
        what = draw.integers(0, 5)
        if what == 0 and changed:
            changed[at] = int(draw.integers(0, 256))
        elif what == 1:
            del changed[at:]
        elif what == 2:
            changed[at:at] = changed[: int(draw.integers(0, 64))]
        elif what == 3:
            changed[at : at + 8] = struct.pack("<Q", int(draw.integers(0, 2**63)))
        else:
            changed[at:at] = b"[" * int(draw.integers(1, 3000))
    return bytes(changed)


def _pickle_changed(data: bytes, draw: np.random.Generator) -> bytes:
    """A `.pt` with a changed pickle in an intact archive, so that torch reads the pickle."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {member.filename: archive.read(member) for member in archive.infolist()}
    name = next(entry for entry in records if entry.endswith("data.pkl"))
    pickled = bytearray(records[name])
    for _ in range(draw.integers(1, 4)):
        at, what = int(draw.integers(0, len(pickled))), draw.integers(0, 3)
        pickled[at : at + (1, 0, 4)[what]] = (bytes([int(draw.integers(0, 256))]), b"K\3", b"\xff\xff\xff\x7f")[what]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for entry, record in {**records, name: bytes(pickled)}.items():
            archive.writestr(entry, record)
    return out.getvalue()


def _words_changed(data: bytes, draw: np.random.Generator) -> bytes:
    """A command line, a word on each line, with words replaced, left out, doubled or put elsewhere."""
    words = data.split(b"\n")
    for _ in range(draw.integers(1, 4)):
        at, what = int(draw.integers(0, len(words))), draw.integers(0, 4)
        odd = ODD_WORDS[int(draw.integers(0, len(ODD_WORDS)))].encode()
        words[at : at + 1] = ([odd], [odd], [], [words[at], words[int(draw.integers(0, len(words)))]])[what]
        words = words or [b""]
    return b"\n".join(words)


def _json_changed(data: bytes, draw: np.random.Generator) -> bytes:
    try:
        value = json.loads(data)
    except ValueError:
        return data[: len(data) // 2]
    for _ in range(draw.integers(1, 4)):
        node: Any = value
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = keys[int(draw.integers(0, len(keys)))]
            if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.7:
                node = node[key]
                continue
            if draw.random() < 0.2:
                del node[key]
            else:
                node[key] = copy.deepcopy(ODD[int(draw.integers(0, len(ODD)))])
            break
    return json.dumps(value).encode()


def fuzz(count: int, seed: int, show: Callable[[str], None] = lambda line: None) -> list[str]:
    """Tries `count` inputs, shared by the kinds; returns a line per finding, with its seed and number."""
    found: list[str] = []
    chosen, number, tried = list(kinds().items()), -1, 0
    while tried < count:
        number += 1
        turn, place = divmod(number, len(chosen))
        name, kind = chosen[place]
        if int(turn * kind.share) == int((turn - 1) * kind.share):  # a slow kind gets its share of the turns
            continue
        data = damaged(kind.valid(), np.random.default_rng([seed, number]))
        with tempfile.TemporaryDirectory() as folder:
            said = finding(kind, data, Path(folder))
        if said is not None:
            found.append(f"{name}, seed {seed}, number {number}: {said}")
            show(found[-1])
        tried += 1
        if tried % 10_000 == 0 or tried == count:
            show(f"{tried:,} inputs, {len(found)} findings")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Readers fed with damaged files.")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(1 if fuzz(given.count, given.seed, lambda line: print(line, flush=True)) else 0)
