#!/usr/bin/env bash
# `scaled_dot_product_attention(is_causal=True)` hides what comes later, and `scale` may be
# any number: the documentation scales the product first and then adds the mask's -inf. A
# good guess: a negative scale gives what it gives with the same mask as `attn_mask`, in
# every backend. It is wrong for the fused kernel of CPUs, which is the default there: it
# scales the -inf too, which becomes +inf. All rows but the last are NaN, in silence.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attend

print("torch", torch.__version__)
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 4, 8)
past = torch.ones(4, 4, dtype=torch.bool).tril()


def nan_rows(**options):
    return attend(q, k, v, **options)[0, 0].isnan().all(-1).tolist()


found = {
    f"scale {scale}, {name}": nan_rows(scale=scale, **mask)
    for scale in (1.5, -1.5)
    for name, mask in {
        "is_causal": dict(is_causal=True),
        "the same attn_mask": dict(attn_mask=past),
    }.items()
}
with sdpa_kernel(SDPBackend.MATH):
    found["scale -1.5, is_causal, math backend"] = nan_rows(scale=-1.5, is_causal=True)
for name, rows in found.items():
    print(f"{name}: rows of NaN {rows}")
assert found.pop("scale -1.5, is_causal") == [True, True, True, False]
assert not any(map(any, found.values()))
PYTHON
