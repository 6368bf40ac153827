"""Dropout keeps the right share, everywhere independently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha._dropout import Dropout

SHAPE = (4, 8, 256, 256)  # 2 million elements
SIZE = np.prod(SHAPE)
RATES = [0.1, 0.5, 0.9]
# Bounds are 5 standard deviations: a right generator fails one test in two million.
SIGMAS = 5


def dropped(rate, seed=0):
    """Returns 1.0 where an element is dropped, (batch, heads, tgt, src)."""
    dropout = Dropout.from_rng(jax.random.key(seed), rate)
    factors = dropout.factors(dropout.all_rows(*SHAPE[:3]), SHAPE[3], jnp.float64)
    assert set(np.unique(factors)) == {0.0, 1 / (1 - rate)}
    return np.asarray(factors == 0, np.float64)


@pytest.mark.parametrize("rate", RATES)
def test_the_share_of_dropped_elements_is_the_rate(rate):
    sigma = np.sqrt(rate * (1 - rate) / SIZE)
    assert abs(dropped(rate).mean() - rate) < SIGMAS * sigma


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("axis", range(4), ids=["batch", "head", "query", "key"])
def test_every_slice_has_the_rate(rate, axis):
    others = tuple(n for n in range(4) if n != axis)
    shares = dropped(rate).mean(axis=others)
    sigma = np.sqrt(rate * (1 - rate) * SHAPE[axis] / SIZE)
    # The largest of up to 256 slices: one more standard deviation.
    assert np.abs(shares - rate).max() < (SIGMAS + 1) * sigma


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("axis", range(4), ids=["batch", "head", "query", "key"])
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_neighbours_are_independent(rate, axis, lag):
    x = dropped(rate) - rate
    shifted = np.roll(x, lag, axis)
    correlation = (x * shifted).mean() / (rate * (1 - rate))
    assert abs(correlation) < SIGMAS / np.sqrt(SIZE)


def test_rows_are_pairwise_independent():
    x = (dropped(0.5) - 0.5).reshape(-1, SHAPE[3])[:2048] * 2
    correlations = x @ x.T / SHAPE[3]
    np.fill_diagonal(correlations, 0)
    # The largest of two million pairs of 256 fair coins; equal rows would give 1.
    assert np.abs(correlations).max() < 0.45


def test_keys_are_independent_of_each_other():
    a, b = dropped(0.5, seed=1), dropped(0.5, seed=2)
    correlation = ((a - 0.5) * (b - 0.5)).mean() * 4
    assert abs(correlation) < SIGMAS / np.sqrt(SIZE)


def test_rate_1_drops_everything_and_nan_stays_nan():
    dropout = Dropout.from_rng(jax.random.key(0), 1.0)
    factors = dropout.factors(dropout.all_rows(1, 1, 3), 4, jnp.float64)
    assert not factors.any()
    assert np.isnan(np.nan * factors).all()


def test_old_and_new_style_keys_work():
    for rng in (jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")):
        assert Dropout.from_rng(rng, 0.5).seed.shape == (2,)
