"""Several processes load a checkpoint, train, are killed, and go on: real ones."""

import jax
import numpy as np
import pytest

from flax_mha.convert import read_state_dict, save_safetensors
from tests.processes import Processes

DEADLINE = 120  # seconds, of machines that do other things


def a_model(layers, width, seed=0):
    """Returns the state_dict of a torch.nn.TransformerEncoder, of random numbers."""
    rng = np.random.default_rng(seed)
    shapes = {
        "self_attn.in_proj_weight": (3 * width, width),
        "self_attn.in_proj_bias": (3 * width,),
        "self_attn.out_proj.weight": (width, width),
        "self_attn.out_proj.bias": (width,),
        "linear1.weight": (4 * width, width),
        "linear1.bias": (4 * width,),
        "linear2.weight": (width, 4 * width),
        "linear2.bias": (width,),
    }
    return {
        f"layers.{n}.{name}": rng.standard_normal(shape, np.float32)
        for n in range(layers)
        for name, shape in shapes.items()
    }


def test_each_process_reads_its_own_bytes_and_all_write_one_folder(tmp_path):
    source, out = tmp_path / "model.safetensors", tmp_path / "out"
    tensors = a_model(layers=2, width=512)
    save_safetensors(source, tensors)
    argv = [source, out, "--max-file-size", 10_000_000]
    with Processes(tmp_path, 2, "tests.processes.load", *argv) as processes:
        processes.wait(DEADLINE)
        assert processes.codes == {0: 0, 1: 0}, processes.output()
    for index in range(2):
        report = processes.report(index)
        assert report["own"] <= report["read"] <= 1.01 * report["own"]
        assert report["own"] < 0.51 * source.stat().st_size
    assert len(list(out.glob("model-*-of-00003.safetensors"))) == 3
    written = read_state_dict(out)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)
