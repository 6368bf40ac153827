#!/usr/bin/env bash
# `jax.vmap` over an axis that explicit mesh axes divide needs no communication: each
# device has its own elements. A good guess: nor does it if the function holds a
# `jax.shard_map` over other mesh axes, which has nothing to do with that one. It is
# wrong in jax 0.10.2: the arrays are gathered over the mapped axis before the shard_map,
# so each device computes all elements, and nothing is said. jax 0.12 divides them.
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
by_columns = jax.shard_map(
    jnp.sin, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"), axis_names={"tensor"}
)
with jax.set_mesh(mesh):
    x = jax.device_put(jnp.ones((4, 4)), P("data", "tensor"))
    seen = {}
    for name, function in dict(plain=jnp.sin, shard_map=by_columns).items():
        program = jax.jit(jax.vmap(function)).lower(x).compile()
        seen[name] = program.as_text().count(" all-gather(")
        print(f"{name}: {seen[name]} all-gathers")
assert seen["plain"] == 0
assert seen["shard_map"] > 0
PYTHON
