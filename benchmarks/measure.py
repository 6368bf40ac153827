"""How it is measured: side by side in one process, in turns."""

import ctypes
import dataclasses
import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch

LIMIT_S = 4.0  # no more repeats of a contender that has run so long in one case
PAUSE_S = 0.1  # until thread pools no longer spin, and XLA has freed its memory
CORES = (
    len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else (os.cpu_count() or 1)
)


@dataclasses.dataclass
class Step:
    """What one contender does for one case; `call` returns when it is done."""

    call: Callable[[], object]
    compile_s: float | None = None
    temp_bytes: int | None = None


def jax_step(function: Callable, *args) -> Step:
    """Compiles `function` for `args`, which are on the device already."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compile_s = time.perf_counter() - start
    return Step(
        call=lambda: jax.block_until_ready(compiled(*args)),
        compile_s=compile_s,
        temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
    )


def compare(case, contenders: dict[str, Callable], repeats: int) -> dict[str, dict]:
    """Measures all contenders for one case; what fails is recorded as its reason."""
    results, steps = {}, {}
    for name, build in contenders.items():
        try:
            step = build(case)
            if isinstance(step, str):
                results[name] = {"reason": step}
                continue
            results[name] = {
                "compile_s": step.compile_s,
                "temp_bytes": step.temp_bytes,
            }
            if (step.temp_bytes or 0) > _memory_bytes() / 2:
                results[name]["reason"] = "needs more than half of the memory"
                continue
            step.call()  # warms up: threads start, pages come in, PyTorch compiles
            results[name]["peak_bytes"] = peak_bytes(step.call)
            steps[name] = step
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            results[name] = {"reason": reason}

    times = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            if sum(times[name]) < LIMIT_S:
                time.sleep(PAUSE_S)
                times[name].append(seconds_of(step.call))
    for name, seconds in times.items():
        results[name]["median_ms"] = 1000 * statistics.median(seconds)
        results[name]["min_ms"] = 1000 * min(seconds)
        results[name]["repeats"] = len(seconds)

    steps.clear()
    gc.collect()
    return results


def machine() -> dict:
    """Describes what the numbers were measured with, and on."""
    packages = ["flax_mha", "jax", "jaxlib", "flax", "torch", "equinox", "numpy"]
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": _processor(),
        "cores": CORES,
        "load_average": os.getloadavg()[0],  # others' work, if much above 0
        "versions": {"python": platform.python_version(), **versions},
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gemm_gflops": _gemm_gflops(),
    }


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Returns by how much a call, with its result, raises the process's memory.

    XLA's own number, `temp_bytes`, does not count what its CPU library for fusions
    (YNNPACK) allocates: all the logits, for some of the contenders.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None  # not Linux
    gc.collect()
    time.sleep(PAUSE_S)
    ctypes.CDLL(None).malloc_trim(0)  # or memory freed before would be used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(key)]
    return int(line.split()[1]) * 1024  # given in kB


def _gemm_gflops(size: int = 2048) -> dict[str, float]:
    """Returns what a float32 matrix product reaches: the peak for all the others."""
    x = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    ours, theirs = jax.numpy.asarray(x), torch.from_numpy(x)
    calls = {
        "jax": jax_step(lambda x: x @ x, ours).call,
        "torch": lambda: theirs @ theirs,
    }
    best = {
        name: min(seconds_of(call) for _ in range(7)) for name, call in calls.items()
    }
    return {name: 2 * size**3 / seconds / 1e9 for name, seconds in best.items()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
