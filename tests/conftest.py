import collections
import os

# JAX reads this when it starts. Eight devices on the CPU, for the tests that shard; and
# LLVM without optimisation, as compiling takes most of the time (XLA's passes, which
# the tests of memory look at, are the same), unless it is asked for.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        f"--xla_backend_optimization_level={3 * ('FLAX_MHA_OPTIMIZED' in os.environ)}",
    ]
)

# The tests that use the TPU compiler need no TPU, and must not look for one.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp
import pytest

import flax_mha

# float64 for exact comparisons; nothing may promote or broadcast by accident.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="of the cases of each test, run only every N-th",
    )


def pytest_collection_modifyitems(config, items):
    every, seen = config.getoption("--every"), collections.Counter()
    kept, others = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        (others if seen[test] % every else kept).append(item)
        seen[test] += 1
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = kept


@pytest.fixture
def getkey():
    """Returns a function that returns a new random key at each call."""
    keys = (jax.random.key(n) for n in range(10_000))
    return lambda: next(keys)


@pytest.fixture(autouse=True)
def _names_in_doctests(doctest_namespace):
    doctest_namespace.update(
        jax=jax,
        jnp=jnp,
        MultiheadAttention=flax_mha.MultiheadAttention,
    )
