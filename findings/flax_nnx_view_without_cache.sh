#!/usr/bin/env bash
# `nnx.view(module, decode=True, batch_size=2, max_length=5)` is to make a view of a module
# that decodes; the docstring of MultiHeadAttention.set_view says that the two sizes are
# used for the cache. A good guess: the view has a cache, and takes one token at a time.
# It is wrong for a module as its constructor makes it: attributes of the cache are there
# from the start and are None, so that none is made, and the sizes are ignored in silence.
# The first call says that `init_cache` is missing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2
cd "$folder"

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import flax
import jax.numpy as jnp
from flax import nnx

print("flax", flax.__version__)
layer = nnx.MultiHeadAttention(
    num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0)
)
view = nnx.view(layer, decode=True, batch_size=2, max_length=5)
print("decode:", view.decode, "cached_key:", view.cached_key)
token = jnp.ones((2, 1, 8))
try:
    view(token)
    raise AssertionError("the view has a cache")
except ValueError as error:
    print("ValueError:", error)
    assert "init_cache" in str(error)
assert view.decode and view.cached_key is None

view.init_cache((2, 5, 8))  # its way in words of its own: all sizes of the input
print("after init_cache:", view(token).shape)
PYTHON
