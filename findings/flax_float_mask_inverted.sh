#!/usr/bin/env bash
# Float masks with 0 for "may attend" and -inf for "may not" are what PyTorch's attention
# adds to the logits, and what most code that is ported from it makes.
# A good guess of what Flax's `mask=` does with one: it is added, or refused.
# It is wrong: a mask is a condition, 0 is false and -inf is true. Attention goes exactly
# where it must not, without a word. A row that is all 0 is all forbidden, so all equal.
# (Floats are no mistake as such there: make_causal_mask returns float32, of 0 and 1.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2
cd "$folder"

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

print("flax", flax.__version__, "jax", jax.__version__)
print("make_causal_mask:", nn.make_causal_mask(jnp.ones((1, 3))).dtype)
x = jax.random.normal(jax.random.key(0), (1, 4, 1, 8))  # (batch, length, heads, ...)
allowed = jnp.tril(jnp.ones((4, 4), bool))[None, None]
added = jnp.where(allowed, 0.0, -jnp.inf)
weights = nn.dot_product_attention_weights(x, x, mask=added)[0, 0]
print("weights of flax.linen, with a causal float mask:")
print(np.round(weights, 2))
for library in (nn, nnx):
    def attend(**options):
        return library.dot_product_attention(x, x, x, **options)

    right, inverted = attend(mask=allowed), attend(mask=~allowed)
    got = attend(mask=added)
    print(f"{library.__name__}: as it was meant: {bool(jnp.allclose(got, right))}, "
          f"as the inverted mask: {bool(jnp.allclose(got, inverted))}, "
          f"as bias=: {bool(jnp.allclose(attend(bias=added), right))}")
    assert jnp.allclose(got, inverted) and not jnp.allclose(got, right)
    assert jnp.allclose(attend(bias=added), right)
PYTHON
