"""What is the same: results and derivatives of ours, and those of the definition."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from tests.fuzz import definition
from tests.fuzz.transforms import SETS


class Tolerance(NamedTuple):
    """Of a sum of few terms, relative to the largest magnitude."""

    results: float
    derivatives: float


# That of narrow dtypes is rounded at each step; float64 is where a mistake would show.
TOLERANCE = {
    "float64": Tolerance(1e-9, 1e-8),
    "float32": Tolerance(5e-5, 5e-4),
    "float16": Tolerance(1e-2, 1e-1),
    "bfloat16": Tolerance(3e-2, 1.5e-1),
}


class Mismatch(AssertionError):
    """Ours is not what it should be."""


def widest_tolerance(*dtypes):
    return max(TOLERANCE[np.dtype(dtype).name] for dtype in dtypes)


def same(got, want, tolerance, *, least=0.0):
    """Checks arrays by name: shapes, where there is NaN, and values.

    Args:
        least: A magnitude that errors may always be relative to.
    """
    if got.keys() != want.keys():
        raise Mismatch(f"got {sorted(got)}, wanted {sorted(want)}")
    for name, expected in want.items():
        actual = np.asarray(got[name], np.float64)
        if actual.shape != expected.shape:
            raise Mismatch(f"{name} has shape {actual.shape}, not {expected.shape}")
        if not np.array_equal(np.isnan(actual), np.isnan(expected)):
            raise Mismatch(
                f"{name} has {np.isnan(actual).sum()} NaN, in other places than the "
                f"{np.isnan(expected).sum()} that it should have"
            )
        error = relative_error(actual, expected, least)
        if not error <= tolerance:
            raise Mismatch(f"{name} is off by {error:.2g}, relative to the largest")


def same_slopes(gradients, directions, want, tolerance):
    """Checks gradients by name, each along a direction.

    Args:
        want: By name, how fast the loss changes along it.
    """
    largest = max([_magnitude(x) for x in gradients.values()], default=0.0)
    for name, slope in want.items():
        d = np.asarray(gradients[name], np.float64)
        if d.shape != directions[name].shape:
            raise Mismatch(f"d_{name} has shape {d.shape}")
        got = np.sum(d * directions[name])
        terms = np.abs(directions[name]) * np.maximum(np.abs(d), largest / 100)
        scale = max(np.nansum(terms) / np.sqrt(max(d.size, 1)), 1e-30)
        if np.isnan(got) != np.isnan(slope) or abs(got - slope) / scale > tolerance:
            raise Mismatch(
                f"d_{name}, along a direction: got {got}, wanted {slope}, "
                f"off by {abs(got - slope) / scale:.2g}"
            )


def against_definition(define, leaves, shared, ours, tolerance):
    """Checks results, tangents, and gradients along directions.

    Args:
        define: The definition, of leaves by name.
        shared: Those that all sets have in common.
    """
    exact = {name: x.astype(np.float64) for name, x in leaves.items()}

    def of_all_sets(leaves):
        if not ours.has_sets:
            return define(leaves)
        sets = [
            define({n: x if n in shared else x[s] for n, x in leaves.items()})
            for s in range(SETS)
        ]
        return {name: np.stack([one[name] for one in sets]) for name in sets[0]}

    same(ours.results, of_all_sets(exact), tolerance.results)
    if ours.tangents:
        tangents = definition.derivative(of_all_sets, exact, ours.directions)
        largest = max(_magnitude(x) for x in tangents.values())
        limit = tolerance.derivatives
        same(ours.tangents, tangents, limit, least=largest / 100)
    slopes = {}
    for name in ours.gradients:
        one = {name: ours.directions[name]}
        tangents = definition.derivative(of_all_sets, exact, one)
        slopes[name] = sum(
            np.sum(tangents[n] * ours.cotangents[n]) for n in ours.cotangents
        )
    same_slopes(ours.gradients, ours.directions, slopes, tolerance.derivatives)


def against_torch(want, ours, tolerance, own=None):
    """Checks results, and gradients, named "d_" before, where there are any.

    Args:
        own: What PyTorch finds in the dtype of ours: errors may be twice its own.
    """
    got = ours.results | {f"d_{name}": x for name, x in ours.gradients.items()}
    if got.keys() != want.keys():
        raise Mismatch(f"got {sorted(got)}, wanted {sorted(want)}")
    largest = max(np.max(np.abs(x), initial=0) for x in want.values())
    for name, expected in want.items():
        is_result = name in ours.results
        limit = tolerance.results if is_result else tolerance.derivatives
        least = largest / 100
        if own is not None and not np.isnan(own[name] - expected).any():
            dtype = next(iter(ours.results.values())).dtype
            limit = 2 * relative_error(own[name], expected, least)
            limit += 8 * float(jnp.finfo(dtype).eps)  # of which it may have none
        same({name: got[name]}, {name: expected}, limit, least=least)


def relative_error(actual, expected, least):
    """Returns the largest, relative to the largest magnitude, or `least`."""
    scale = max(np.nanmax(np.abs(expected), initial=0.0), least, 1e-30)
    with np.errstate(invalid="ignore"):
        error = np.abs(actual - expected)
    return np.nanmax(np.where(actual == expected, 0, error), initial=0.0) / scale


def of_dtype(results, dtype):
    for name, x in results.items():
        if x.dtype != dtype:
            raise Mismatch(f"{name} is of {x.dtype}, not {dtype}")


def _magnitude(x):
    x = np.abs(np.asarray(x, np.float64))
    return np.nanmax(np.where(np.isfinite(x), x, 0), initial=0.0)
