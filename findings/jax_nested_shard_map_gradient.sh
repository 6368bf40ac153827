#!/usr/bin/env bash
# `jax.shard_map` may be over some axes of a mesh, and have another in it over the rest.
# A good guess: what can be computed so can be differentiated, as one shard_map over all
# axes can. It is wrong: forward pass and tangents are right, but to compile the gradient
# raises "Cannot lower jaxpr with verifier errors". What the inner one keeps for its
# backward pass is said to be divided over the outer's axis as well, which it is not free
# to say. So a library cannot use shard_map inside of what its callers may call in one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2
cd "$folder"

JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 \
  "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax import P

print("jax", jax.__version__)
mesh = jax.make_mesh((2, 2), ("data", "tensor"))


def part(spec, axis, function):
    return jax.shard_map(function, in_specs=spec, out_specs=spec, axis_names={axis})


by_columns = part(P(None, "tensor"), "tensor", jnp.sin)
nested = part(P("data"), "data", by_columns)
whole = jax.shard_map(
    jnp.sin, mesh=mesh, in_specs=P("data", "tensor"), out_specs=P("data", "tensor")
)


def outcome(function, x):
    try:
        return "right" if jnp.allclose(jax.jit(function)(x), jnp.cos(x)) else "wrong"
    except ValueError as error:
        return str(error).splitlines()[0]


def gradient(function):
    return jax.grad(lambda x: jnp.sum(function(x)))


def tangent(x):
    return jax.jvp(nested, (x,), (jnp.ones_like(x),))[1]


with jax.set_mesh(mesh):
    x = jax.device_put(jnp.arange(16.0).reshape(4, 4), P("data", "tensor"))
    seen = {
        "gradient of one over all axes": outcome(gradient(whole), x),
        "tangent of the nested": outcome(tangent, x),
        "gradient of the nested": outcome(gradient(nested), x),
    }
for name, result in seen.items():
    print(f"{name}: {result}")
assert list(seen.values()) == [
    "right",
    "right",
    "Cannot lower jaxpr with verifier errors:",
]
PYTHON
