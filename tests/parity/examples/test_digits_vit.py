import pathlib

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from examples import digits_vit, train_digits_in_torch
from flax_mha import convert
from tests.defaults import jax_defaults

DATA = pathlib.Path(digits_vit.__file__).parent / "data"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs the example as a reader does; returns its output folder."""
    out = tmp_path_factory.mktemp("digits_vit")
    train_x, test_x, train_y, test_y = digits_vit.load_digits_split()
    fewer = train_x[:140], test_x, train_y[:140], test_y  # an epoch takes a while
    with (
        pytest.MonkeyPatch.context() as patch,
        jax_defaults(),
    ):
        patch.setattr(digits_vit, "load_digits_split", lambda: fewer)
        digits_vit.main(["--out", str(out)])  # exits if its logits differ from torch's
        yield out


def test_the_example_draws_a_picture(finished):
    assert (finished / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_torch_loads_the_finetuned_model_strictly_with_the_same_outputs(finished):
    state_dict = load_file(finished / "digits_vit_finetuned.safetensors")
    theirs = train_digits_in_torch.VisionTransformer()
    theirs.load_state_dict(
        {name: torch.from_numpy(array) for name, array in state_dict.items()},
        strict=True,
    )
    theirs.eval()
    _, images, _, _ = digits_vit.load_digits_split()
    params = convert.convert_tree(state_dict, digits_vit.NUM_HEADS)
    logits = digits_vit.predict(params, images)
    expected = theirs(torch.from_numpy(np.asarray(images))).detach()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_finetuning_changed_the_model(finished):
    before = load_file(DATA / "digits_vit.safetensors")
    after = load_file(finished / "digits_vit_finetuned.safetensors")
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)
