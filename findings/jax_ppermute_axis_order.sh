#!/usr/bin/env bash
# Collectives over several mesh axes take a tuple of names, which says in which order the
# devices are numbered: `axis_index`, `all_gather`, `all_to_all` and `psum_scatter` follow
# it, and so does `PartitionSpec`. A good guess: so does `ppermute`, whose pairs are such
# numbers. It is wrong: it numbers devices in the mesh's own order, whatever the tuple
# says. A shift round a ring of axes in another order goes elsewhere, and nothing is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2
cd "$folder"

JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 \
  "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax import P, lax

print("jax", jax.__version__)
auto = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=auto)
places = [(n, (n + 1) % 8) for n in range(8)]


def over(axes, function):
    run = jax.shard_map(function, mesh=mesh, in_specs=P(axes), out_specs=P(axes))
    return run(jnp.arange(8)).tolist()


def from_before(axes):  # the same shift by another collective
    def shift(x):
        everything = lax.all_gather(x, axes, tiled=True)
        return lax.dynamic_slice_in_dim(everything, (lax.axis_index(axes) - 1) % 8, 1)

    return shift


def permuted(axes):
    return lambda x: lax.ppermute(x, axes, places)


seen = {}
for axes in (("a", "b"), ("b", "a")):
    seen[axes] = over(axes, from_before(axes)), over(axes, permuted(axes))
    print(f"{axes}: by all_gather {seen[axes][0]}, by ppermute {seen[axes][1]}")
assert seen["a", "b"][0] == seen["a", "b"][1]
assert seen["b", "a"][0] == [7, 0, 1, 2, 3, 4, 5, 6]
assert seen["b", "a"][1] == [7, 6, 0, 1, 2, 3, 4, 5]
PYTHON
