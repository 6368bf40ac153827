#!/usr/bin/env bash
# `checkify` with `index_checks` reports an index that is out of bounds. It takes
# `lax.dynamic_update_slice`, it takes `lax.dynamic_slice` under `vmap`, and all indices
# here are within bounds. A good guess: it takes an update under `vmap`, too, as one
# writes a cache whose sequences are at different positions. It is wrong: tracing ends in
# a bare IndexError of JAX's own, "tuple index out of range", from the check itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2
cd "$folder"

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import checkify

print("jax", jax.__version__)
cache, part, position = jnp.zeros((3, 8)), jnp.ones((3, 2)), jnp.array([0, 3, 6])


def update(cache, part, position):
    return lax.dynamic_update_slice(cache, part, (position,))


def read(cache, part, position):
    return lax.dynamic_slice(cache, (position,), (2,))


def checked(function, *args):
    try:
        error, _ = checkify.checkify(function, errors=checkify.index_checks)(*args)
    except IndexError as error:
        return f"IndexError: {error}"
    return error.get()


seen = {
    "update, one": checked(update, cache[0], part[0], position[0]),
    "read, vmap": checked(jax.vmap(read), cache, part, position),
    "update, vmap": checked(jax.vmap(update), cache, part, position),
}
print(seen)
assert seen["update, one"] is None and seen["read, vmap"] is None
assert seen["update, vmap"] == "IndexError: tuple index out of range"
PYTHON
