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


def test_columns_are_pairwise_independent():
    x = (dropped(0.5) - 0.5).reshape(-1, SHAPE[3])[:, :256].T * 2
    correlations = x @ x.T / np.sqrt(x.shape[1])
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < SIGMAS + 1  # of 30 thousand pairs


@pytest.mark.parametrize("first", [0, 2**16 - 1000, 2**32 - 1000])
def test_words_of_near_columns_differ_in_their_lower_halves(first):
    dropout = Dropout.from_rng(jax.random.key(0), 0.5)
    column = jnp.uint32(first) + jnp.arange(2**17, dtype=jnp.uint32)
    words = np.asarray(dropout.column_words(column))
    assert len(np.unique(words)) == 2**17
    assert len(np.unique(words[: 2**16] % 2**16)) == 2**16
    for bit in range(16, 32):  # the upper half is random
        share = (words >> bit & 1).mean()
        assert abs(share - 0.5) < SIGMAS * 0.5 / np.sqrt(2**16)


def test_rows_and_columns_of_high_numbers():
    dropout = Dropout.from_rng(jax.random.key(0), 0.5)
    row = jnp.uint32(2**31 - 500) + jnp.arange(1000, dtype=jnp.uint32)[:, None]
    x = np.asarray(dropout.factors(row, 1000, jnp.float64, 2**31 - 500)) - 1
    assert abs(x.mean()) < SIGMAS / 1000
    for axis in range(2):
        assert np.abs(x.mean(axis)).max() < (SIGMAS + 1) / np.sqrt(1000)
        assert abs((x * np.roll(x, 1, axis)).mean()) < SIGMAS / 1000


@pytest.mark.parametrize("which", [0, 1])
def test_seeds_of_one_bits_difference_are_independent(which):
    seed = np.array([5, 7], np.uint32)
    near = seed ^ np.eye(2, dtype=np.uint32)[which]
    row = jnp.arange(1000, dtype=jnp.uint32)[:, None]
    a, b = (
        np.asarray(Dropout(jnp.asarray(x), 0.5).factors(row, 1000, jnp.float64)) - 1
        for x in (seed, near)
    )
    assert abs((a * b).mean()) < SIGMAS / 1000


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
