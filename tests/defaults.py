"""JAX's own settings, as users have them: those of `conftest` are stricter."""

import contextlib

import jax


@contextlib.contextmanager
def jax_promotion():
    """What Flax's own layers, and Optax, need."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@contextlib.contextmanager
def jax_defaults():
    with jax_promotion(), jax.enable_x64(False):
        yield
