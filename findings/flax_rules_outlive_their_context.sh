#!/usr/bin/env bash
# `flax.linen.logical_axis_rules` says, in a `with` block, which mesh axes divide arrays.
# A good guess: a jitted function that is called in another block follows the rules there,
# as it is traced again under another `jax.set_mesh`. It is wrong: rules are no part of
# what `jax.jit` compares, so the first call's are used for good, and nothing is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 flax==0.12.8
cd "$folder"

JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 \
  "$folder/venv/bin/python" - <<'PYTHON'
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

print("jax", jax.__version__, "flax", flax.__version__)
auto = (jax.sharding.AxisType.Auto,)
mesh = jax.make_mesh((4,), ("devices",), axis_types=auto)
x = jnp.ones((4, 4))


def constrain(x):
    return nn.with_logical_constraint(x, ("batch", "embed"))


kept = jax.jit(constrain)
with jax.set_mesh(mesh):
    with nn.logical_axis_rules([("batch", "devices")]):
        first = kept(x).sharding.spec
    with nn.logical_axis_rules([("embed", "devices")]):
        second = kept(x).sharding.spec
        new = jax.jit(lambda x: constrain(x))(x).sharding.spec
print("batch over devices:", first)
print("embed over devices, the same jitted function:", second)
print("embed over devices, a new one:", new)
assert first == second == jax.P("devices")
assert new == jax.P(None, "devices")
PYTHON
