#!/usr/bin/env bash
# `precision=` of flax.nnx.MultiHeadAttention is documented as the numerical precision of
# its computation. A good guess: `precision="highest"` holds for all six of its products,
# as it does in flax.linen. It is wrong: the two of attention itself (queries with keys,
# weights with values) are left at the default, which is bfloat16's on a TPU. No call
# warns; a jaxpr shows it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2
cd "$folder"

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import re

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

print("flax", flax.__version__, "jax", jax.__version__)
x = jnp.ones((1, 3, 8))


def counted(function, *args):
    """Returns how many products a function has, and how many at the highest."""
    text = str(jax.make_jaxpr(function)(*args))
    return text.count("dot_general["), len(re.findall(r"\(Precision\.HIGHEST,", text))


module = nn.MultiHeadDotProductAttention(num_heads=2, precision="highest")
linen = counted(module.apply, module.init(jax.random.key(0), x), x)
layer = nnx.MultiHeadAttention(
    num_heads=2, in_features=8, decode=False, precision="highest", rngs=nnx.Rngs(0)
)
definition, state = nnx.split(layer)
other = counted(lambda state, x: nnx.merge(definition, state)(x), state, x)
for name, (products, highest) in {"flax.linen": linen, "flax.nnx": other}.items():
    print(f"{name}: {highest} of {products} products have precision HIGHEST")
assert linen == (6, 6) and other == (6, 4)
PYTHON
