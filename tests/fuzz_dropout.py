"""Looks for order in what dropout keeps, until it is stopped.

python -m tests.fuzz_dropout [--seed N] [--count N]

Each draw takes seeds, a rate, a number of rows and of columns, and where these begin.
What it prints are standard deviations from what chance would give, from 4 on, and the
largest so far of each statistic; chance gives one over 5 in two million.
"""

import argparse
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha._dropout import Dropout

RATES = 0.01, 0.1, 0.3, 0.5, 0.9
# (rows, columns): from one of each up, at the ends of what numbers are for
SIZES = (1, 100_000), (100_000, 1), (20_000, 7), (4096, 197), (2048, 2048), (197, 16384)
FIRST_ROWS = 0, 1000, 2**31 - 100, 2**32 - 100
FIRST_COLUMNS = 0, 0, 2**16 - 100, 2**20
LAGS = 1, 2, 3, 4, 8, 16, 64, 256, 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_dropout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=None)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    largest: dict[str, float] = {}
    for number in itertools.count() if options.count is None else range(options.count):
        case = [rng.choice(x).item() for x in (RATES, FIRST_ROWS, FIRST_COLUMNS)]
        size = SIZES[rng.integers(len(SIZES))]
        seed = rng.integers(0, 2**32, 2, np.uint32)
        for name, z in statistics(seed, *case, *size).items():
            if abs(z) > largest.get(name, 4):
                largest[name] = abs(z)
                print(f"{number}: {name} {z:+.2f} {case} {size} {seed}", flush=True)


def statistics(seed, rate, first_row, first_column, rows, columns) -> dict[str, float]:
    """Returns standard deviations by what was counted."""
    dropped = _dropped(seed, rate, first_row, first_column, rows, columns)
    x = (dropped - rate) / math.sqrt(rate * (1 - rate))
    found = {"all": x.mean() * math.sqrt(x.size)}
    found["rows"] = _spread(x.mean(1, dtype=np.float64) * math.sqrt(columns), rate)
    found["columns"] = _spread(x.mean(0, dtype=np.float64) * math.sqrt(rows), rate)
    near = seed ^ np.array([0, 1 << int(seed[0]) % 32], np.uint32)
    other = _dropped(near, rate, first_row, first_column, rows, columns)
    other = (other - rate) / math.sqrt(rate * (1 - rate))
    found["seeds of one bit's difference"] = (x * other).mean() * math.sqrt(x.size)
    for lag in LAGS:
        if lag < columns:
            product = x[:, lag:] * x[:, :-lag]
            found[f"columns {lag} apart"] = product.mean() * math.sqrt(product.size)
        if lag < rows:
            product = x[lag:] * x[:-lag]
            found[f"rows {lag} apart"] = product.mean() * math.sqrt(product.size)
    for a, b in itertools.product(LAGS, LAGS):
        if a < rows and b < columns and rate > 0.05:  # or they are too few
            product = x[a:, b:] * x[:-a, b:] * x[a:, :-b] * x[:-a, :-b]
            z = product.mean() * math.sqrt(product.size)
            found["corners"] = max(found.get("corners", 0), abs(z))
    for name, y in ("pairs of rows", x), ("pairs of columns", x.T):
        if 100 < len(y) <= 4096 and y.shape[1] > 1000 and 0.1 < rate < 0.9:
            pairs = np.triu(y @ y.T, 1).ravel() / math.sqrt(y.shape[1])
            # The largest of n normal numbers is near sqrt(2 log n).
            expected = math.sqrt(2 * math.log(len(y) ** 2 / 2))
            found[name] = np.abs(pairs).max() - expected + 4
    return found


def _dropped(seed, rate, first_row, first_column, rows, columns) -> np.ndarray:
    dropout = Dropout(jnp.asarray(seed, jnp.uint32), float(rate))
    row = jnp.uint32(first_row) + jnp.arange(rows, dtype=jnp.uint32)[:, None]
    keep = jax.jit(dropout.factors, static_argnums=(1, 2))(
        row, columns, jnp.dtype("float32"), jnp.uint32(first_column)
    )
    return np.asarray(keep == 0, np.float32)


def _spread(z: np.ndarray, rate: float) -> float:
    """Returns how far the variance of standardized means is from 1."""
    if len(z) < 50:
        return 0.0
    return ((z**2).mean() - 1) / max(
        math.sqrt(2 / len(z)), (z**2).std() / len(z) ** 0.5
    )


if __name__ == "__main__":
    main()
