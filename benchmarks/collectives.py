"""What each chip sends in a program that was compiled for TPUs."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1}
# Of the bytes of the result, how many a chip sends, in a group of n chips.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "reduce-scatter": lambda n: n - 1,
}


class Move(NamedTuple):
    """A collective of a program."""

    kind: str
    times: int  # it runs
    sent: float  # bytes, by each chip, each time
    group: np.ndarray  # numbers of chips that exchange something among themselves


def moves(program) -> list[Move]:
    """Returns all that a compiled program moves."""
    bodies, name = {}, ""
    for line in program.as_text().splitlines():
        begins = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if begins:
            name = "entry" if begins[1] else begins[2]
        bodies.setdefault(name, []).append(line)
    return list(_moves("entry", bodies, 1, set()))


def sent(program) -> float:
    """Returns the bytes that a chip sends in a program."""
    return sum(move.times * move.sent for move in moves(program))


def _moves(body: str, bodies: dict, times: int, seen: set) -> Iterator[Move]:
    for line in bodies[body]:
        loop = re.search(r" while\(.*condition=%?([^,]+), body=%?([\w.\-]+)", line)
        called = re.search(r" calls=%?([\w.\-]+)", line)
        if loop:
            inside = times * _trips(bodies[loop[1]])
            yield from _moves(loop[2], bodies, inside, seen)
        elif called:
            yield from _moves(called[1], bodies, times, seen)
        found = re.search(rf"= (.*) ({'|'.join(SENT)})(-start)?\(", line)
        chain = re.search(r'chain_id="(\d+)"', line)
        if not found or (chain and chain[1] in seen):
            continue  # a chain is one collective, in steps between which others run
        seen.update(chain.groups() if chain else ())
        kind, size, group = found[2], _size(*found.groups()), _group(line)
        if body.startswith("all-reduce-scatter"):  # each keeps its part of the sum
            kind, size = "reduce-scatter", size / len(group)
        yield Move(kind, times, SENT[kind](len(group)) * size, group)


def _trips(condition: list[str]) -> int:
    """Returns how often a loop runs: until its counter, from 0, is a constant."""
    (count,) = re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return int(count)


def _size(results: str, kind: str, start: str | None) -> int:
    """Returns the bytes of what a collective makes."""
    sizes = [
        BYTES[dtype] * math.prod(_numbers(dims))
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", results)
    ]
    # What is under way is a pair of operand and result, and flags.
    is_pair = start and kind != "all-reduce" and len(sizes) > 1
    return sizes[1] if is_pair else sum(sizes)


def _group(line: str) -> np.ndarray:
    """Returns the first group of chips, of all that look alike."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return np.unique(_numbers(pairs[1]))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return np.array(_numbers(listed[1]))
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+), ", line):
        return _iota(counted[2]).reshape(_numbers(counted[1]))[0]
    mesh = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line
    )
    assert mesh, line
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    shape = [int(size) for size in sizes.values()]
    numbers = _iota(mesh[2] or f"[{math.prod(shape)}]").reshape(shape)
    inside = [f"'{axis}'" in mesh[3] for axis in sizes]
    return numbers[tuple(slice(None) if x else 0 for x in inside)].ravel()


def _iota(text: str) -> np.ndarray:
    """Returns the numbers that XLA writes as `[2,8]T(1,0)`."""
    dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
