#!/usr/bin/env bash
# A Pallas kernel for TPUs can be lowered where there is none, to be exported or compiled
# for a topology: nothing in it asks which TPU it is for.
# A good guess: so can the same kernel in other words. It is wrong. `n // 2` of a number
# that is known only when it runs asks for the device's kind, and fails on a machine
# without a TPU, where `n % 2` and `lax.div(n, 2)` do not. And memory by `pl.run_scoped`
# asks, too, where the same memory by `scratch_shapes` does not; it did not ask in JAX
# 0.10.2. So tests that lower for TPUs on CPUs can begin to fail with a new JAX.
# Needs Python 3.12 or newer, as this JAX does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 python3.12 python3; do
  if "$python" -c "import sys; assert sys.version_info >= (3, 12)" 2>/dev/null; then break; fi
done
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.12.0.1
cd "$folder"

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

print("jax", jax.__version__)
BLOCK = pl.BlockSpec((8, 128), lambda i: (i, 0))
ARRAY = jax.ShapeDtypeStruct((16, 128), jnp.float32)
MEMORY = pltpu.VMEM((8, 128), jnp.float32)


def outcome(kernel, **options):
    run = pl.pallas_call(
        kernel, out_shape=ARRAY, grid=(2,), in_specs=[BLOCK], out_specs=BLOCK, **options
    )
    try:
        jax.jit(run).trace(ARRAY).lower(lowering_platforms=("tpu",))
    except Exception as error:
        assert "Unsupported TPU device kind: cpu" in str(error)
        return type(error).__name__
    return "lowered"


def repeated(count):
    def kernel(x, out):
        times = count(pl.program_id(0))
        out[...] = lax.fori_loop(0, times, lambda _, y: y + 1, x[...])

    return kernel


def copy(x, out, memory):
    memory[...] = x[...]
    out[...] = memory[...]


def scoped(x, out):
    pl.run_scoped(lambda memory: copy(x, out, memory), MEMORY)


got = {
    "n // 2": outcome(repeated(lambda n: n // 2)),
    "n % 2": outcome(repeated(lambda n: n % 2)),
    "lax.div(n, 2)": outcome(repeated(lambda n: lax.div(n, jnp.int32(2)))),
    "run_scoped": outcome(scoped),
    "scratch_shapes": outcome(copy, scratch_shapes=[MEMORY]),
}
for text, name in got.items():
    print(f"{text:15} {name}")
fails = {text for text, name in got.items() if name == "ValueError"}
assert fails == {"n // 2", "run_scoped"}
assert all(got[text] == "lowered" for text in got if text not in fails)
PYTHON
