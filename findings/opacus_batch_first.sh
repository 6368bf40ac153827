#!/usr/bin/env bash
# opacus.layers.DPMultiheadAttention is to be used in place of torch.nn.MultiheadAttention,
# and takes its state_dict. A good guess: as it gives the same with batch_first=False, so
# it does with batch_first=True. It is wrong with more than one head: attention weights are
# the same, but the attended values, of shape (batch, heads, length, head_dim), are taken
# for (batch, length, embed_dim) as they lie in memory. A token's output is made of what
# other tokens attended to; shapes are as they should be. A causal mask of (length, length)
# is refused, as its size is compared with the batch's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet opacus==1.6.0 torch==2.13.0
cd "$folder"

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import warnings

import torch

warnings.simplefilter("ignore")
from opacus.layers import DPMultiheadAttention

print("opacus", importlib.metadata.version("opacus"), "torch", torch.__version__)
torch.manual_seed(0)
x = torch.randn(3, 5, 8)
difference = {}
for heads, batch_first in ((2, False), (1, True), (2, True)):
    theirs = torch.nn.MultiheadAttention(8, heads, batch_first=batch_first)
    ours = DPMultiheadAttention(8, heads, batch_first=batch_first)
    ours.load_state_dict(theirs.state_dict())
    (want, want_weights), (got, weights) = theirs(x, x, x), ours(x, x, x)
    assert want.shape == got.shape and torch.allclose(want_weights, weights)
    difference[heads, batch_first] = (want - got).abs().max().item()
    print(f"{heads} heads, batch_first={batch_first}: weights are equal, outputs of the "
          f"same shape differ by up to {difference[heads, batch_first]:.1e}")

mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
theirs(x, x, x, attn_mask=mask)
try:
    ours(x, x, x, attn_mask=mask)
    refused = ""
except ValueError as error:
    refused = str(error)
print("a causal mask:", refused or "taken")
assert difference[2, False] < 1e-6 and difference[1, True] < 1e-6
assert difference[2, True] > 1e-2 and "attn_mask" in refused
PYTHON
