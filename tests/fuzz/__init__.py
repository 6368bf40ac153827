"""Configurations drawn at random, ours against the definition and live PyTorch.

`python -m tests.fuzz` runs them, `test_fuzz.py` a few. A part is a module with a table
`OPTIONS`, `settle`, which changes what excludes each other, and `check`, which raises;
`SAME` and `VALUES` if configurations share programs (see `drawing.drawn`). Another part
is another module, and its name in `PARTS`.
"""

PARTS = ("layer", "sdpa", "ragged", "ragged_sdpa", "decoding", "array", "meshes")
