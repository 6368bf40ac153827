#!/usr/bin/env bash
# In `jax.export` with symbolic sizes a comparison that cannot be decided raises
# InconclusiveDimensionOperation, which code catches to take the general way.
# A good guess: so does the same comparison after a division (bytes to MiB, say), or with
# a number that is no integer. It is wrong: `/` makes a traced array of the size, and a
# float is converted by `int`: TracerBoolConversionError and ConcretizationTypeError, two
# errors of tracing, though no array is involved. Neither is caught by an `except
# InconclusiveDimensionOperation`; and a comparison that symbolic sizes could decide, as
# that b >= 0.5 for any b of at least 1, is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2
cd "$folder"

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
from jax import export

print("jax", jax.__version__)
(b,) = export.symbolic_shape("b")
shape = jax.ShapeDtypeStruct((b, 3), "float32")


def outcome(condition):
    def choose(x):
        return x if condition(x.shape[0]) else x + 1

    try:
        export.export(jax.jit(choose))(shape)
    except Exception as error:
        return type(error).__name__
    return "exported"


CASES = {
    "b <= 64": (lambda b: b <= 64, "InconclusiveDimensionOperation"),
    "4 * b <= 64 * 2**20": (
        lambda b: 4 * b <= 64 * 2**20,
        "InconclusiveDimensionOperation",
    ),
    "4 * b / 2**20 <= 64": (
        lambda b: 4 * b / 2**20 <= 64,
        "TracerBoolConversionError",
    ),
    "b <= 64.5": (lambda b: b <= 64.5, "ConcretizationTypeError"),
    "b >= 1": (lambda b: b >= 1, "exported"),
    "b >= 0.5": (lambda b: b >= 0.5, "ConcretizationTypeError"),
}
got = {text: outcome(condition) for text, (condition, _) in CASES.items()}
for text, name in got.items():
    print(f"{text:20} {name}")
assert got == {text: name for text, (_, name) in CASES.items()}
PYTHON
