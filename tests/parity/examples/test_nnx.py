"""The examples in nnx against PyTorch's models."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from examples import digits_vit_nnx, train_digits_in_torch, transformer_nnx
from flax_mha import convert
from tests.defaults import jax_defaults, jax_promotion
from tests.parity._live import TOLERANCE, causal_mask, normal

SIZES = dict(d_model=6, nhead=3, dim_feedforward=8, dropout=0.0)
OPTIONS = {
    "seq_first": dict(),
    "batch_first_norm_first_no_bias": dict(
        batch_first=True, norm_first=True, bias=False, activation="gelu"
    ),
}
BATCH, SRC, TGT = 2, 5, 4
MASKS = dict(
    tgt_mask=causal_mask(TGT, TGT),
    src_key_padding_mask=np.arange(SRC) >= np.array([[3], [5]]),
    memory_key_padding_mask=np.arange(SRC) >= np.array([[3], [5]]),
)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_transformer_is_torchs(options):
    layers = dict(num_encoder_layers=2, num_decoder_layers=1)
    theirs = torch.nn.Transformer(**SIZES, **layers, **options, dtype=torch.float64)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = nnx.eval_shape(
        lambda: transformer_nnx.Transformer(
            **SIZES, **layers, **options, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
    )
    params = convert.convert_tree(
        theirs.state_dict(), 3, target=convert.nnx_params(ours)
    )
    convert.update_nnx(ours, params)
    first = (BATCH, SRC), (BATCH, TGT)
    shapes = first if options.get("batch_first") else [pair[::-1] for pair in first]
    arrays = [normal(*shape, 6, seed=n) for n, shape in enumerate(shapes)]
    want = theirs(
        *map(torch.tensor, arrays), **{n: torch.tensor(m) for n, m in MASKS.items()}
    )
    ours.eval()
    with jax_promotion():
        got = ours(*arrays, **MASKS)
    np.testing.assert_allclose(got, want.detach(), **TOLERANCE)


def test_digits_are_finetuned_and_go_back_to_torch_strictly(tmp_path, monkeypatch):
    train_x, images, train_y, labels = digits_vit_nnx.load_digits_split()
    fewer = train_x[:140], images, train_y[:140], labels  # an epoch takes a while
    monkeypatch.setattr(digits_vit_nnx, "load_digits_split", lambda: fewer)
    with jax_defaults():
        digits_vit_nnx.main(["--out", str(tmp_path)])  # exits if its logits differ
        after = load_file(tmp_path / "digits_vit_nnx.safetensors")
        model = digits_vit_nnx.VisionTransformer(nnx.Rngs(0))
        params = convert.convert_tree(after, digits_vit_nnx.NUM_HEADS)
        convert.update_nnx(model, params)
        logits = digits_vit_nnx.predict(model, images)
    theirs = train_digits_in_torch.VisionTransformer()
    tensors = {name: torch.from_numpy(array) for name, array in after.items()}
    theirs.load_state_dict(tensors, strict=True)
    expected = theirs.eval()(torch.from_numpy(np.asarray(images))).detach()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    folder = pathlib.Path(digits_vit_nnx.__file__).parent / "data"
    before = load_file(folder / "digits_vit.safetensors")
    assert all((before[name] != after[name]).any() for name in before)
