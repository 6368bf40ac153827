"""Compiles for TPUs that are not there, and reads the schedules that the compiler made.

The compiler writes what every kernel and fusion executes as bundles, of which a core
issues one a cycle; a jump backwards closes a loop, and its test has the trip count.
What memory takes is not in these numbers, beyond what the compiler schedules round it.
"""

import atexit
import dataclasses
import functools
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when JAX first asks for TPUs.
_PASS = "packed-bundles-post-ra"  # what is written of the compiler's many
_DUMP = Path(tempfile.mkdtemp(prefix="schedules-"))
atexit.register(shutil.rmtree, _DUMP, ignore_errors=True)
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={_DUMP} --xla_jf_dump_hlo_text=false"
    f" --xla_jf_dump_llo_html=false --xla_jf_dump_llo_pass_label_regex={_PASS}",
}

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

TOPOLOGIES = {
    "v5e": "v5e:2x2",
    "v6e": "v6e:2x2",
    "v5p": "v5p:2x2x1",
    "tpu7x": "tpu7x:2x2x1",
}
_FILES = f"*-{_PASS}.txt"
_NAME = re.compile(rf"^\d+-(.*)-\d+-{_PASS}.*")
_COMPUTATION = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = ")
_CONSTANT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_WHILE = re.compile(r"condition=%([\w.-]+), body=%([\w.-]+)")
_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s*(?:[A-Z]{2})?\s*:[> ]*\{")
_JUMP = re.compile(r"sbr\.rel \(!?%(\w+)\) target bundleno = (\d+)")
_TEST = re.compile(r"%(\w+) = scmp\.\S+ %\w+, (\d+) /\* loop exit test")
_DELAY = 5  # bundles that are executed after a jump's own, before it
_SMALL = 200  # bundles; what is jumped over and smaller counts as executed


@dataclasses.dataclass
class Schedule:
    """What one compiled function takes."""

    cycles: int = 0
    skippable: int = 0  # of these, in parts that the kernels can jump over
    # Of these, in loops whose trip counts are not known, which count as one: in the
    # first of each of our kernels, and so on.
    loops: list[int] = dataclasses.field(default_factory=list)
    temp_mib: float = 0.0


def compiled(chip: str, function: Callable, *args: Any) -> Schedule:
    """Compiles `function` for one chip.

    Args:
        args: Trees of anything with a shape and a dtype.
    """
    here = SingleDeviceSharding(_device(chip))
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), args
    )
    for path in _DUMP.iterdir():
        path.unlink()
    program = jax.jit(function).lower(*args).compile()
    found = Schedule(temp_mib=program.memory_analysis().temp_size_in_bytes / 2**20)
    paths = [x for x in _DUMP.glob(_FILES) if "schedule" not in x.name]
    if not paths:
        raise RuntimeError(f"the compiler wrote no schedule ({_FILES})")
    times = loops(program.as_text())
    for path in paths:
        with path.open(errors="replace") as lines:
            cycles, skippable, inner = read(lines)
        name = _NAME.sub(r"\1", path.name)
        found.cycles += cycles * times.get(name, 1)
        found.skippable += skippable * times.get(name, 1)
        if name.startswith("flax_mha"):
            inner = [x * times.get(name, 1) for x in inner]
            pairs = itertools.zip_longest(found.loops, inner, fillvalue=0)
            found.loops = [sum(pair) for pair in pairs]
    return found


@functools.cache
def _device(chip: str) -> Any:
    name = TOPOLOGIES[chip]
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]


def loops(program: str) -> dict[str, int]:
    """Returns how often each instruction of a program in HLO is executed.

    A loop ends at the constant in its condition; without one, it counts once.
    """
    callers, lies_in, last, computation = {}, {}, {}, ""
    for line in program.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        elif instruction := _INSTRUCTION.match(line):
            lies_in[instruction[1]] = computation
            if constant := _CONSTANT.search(line):
                last[computation] = int(constant[1])
            if loop := _WHILE.search(line):
                callers[loop[2]] = computation, loop[1]

    def times(computation):
        if computation not in callers:
            return 1
        caller, condition = callers[computation]
        return last.get(condition, 1) * times(caller)

    return {name: times(computation) for name, computation in lies_in.items()}


def read(lines: Any) -> tuple[int, int, list[int]]:
    """Returns a kernel's cycles, those that can be jumped over, and those of loops.

    A part is the innermost that a jump leaves out, inside of a step that another does.
    Loops are those whose trip count is not known: each counts once, without what it
    can jump over.
    """
    trips_of, jumps, length, at = {}, [], 0, 0
    for line in lines:
        bundle = _BUNDLE.match(line)
        if not bundle:
            continue
        at = int(bundle[1], 16)
        length = max(length, at + 1)
        for test in _TEST.finditer(line):
            trips_of[test[1]] = int(test[2])
        jumps += [(at, int(jump[2]), jump[1]) for jump in _JUMP.finditer(line)]
    times = [1] * length
    ahead = [(at + _DELAY, to) for at, to, _ in jumps if to - at > _SMALL]
    unknown = []
    for at, to, test in jumps:
        if to > at:
            continue
        loop = to, min(at + _DELAY, length)
        if test not in trips_of:
            unknown.append(loop)
            for part in (x for x in ahead if _holds(loop, x)):
                times[slice(*part)] = [0] * (part[1] - part[0])
        for n in range(*loop):
            times[n] *= trips_of.get(test, 1)
    parts = [x for x in ahead if any(_holds(y, x) for y in ahead)]
    parts = [x for x in parts if not any(_holds(x, y) for y in ahead)]
    cycles, *loops = (sum(times[slice(*x)]) for x in [(0, length), *sorted(unknown)])
    return cycles, sum(sum(times[slice(*part)]) for part in parts), loops


def _holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]
