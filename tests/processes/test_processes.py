"""Several processes load a checkpoint, train, are killed, and go on: real ones."""

import contextlib
import io
import signal

import numpy as np

from examples import train
from flax_mha.convert import read_state_dict, save_safetensors
from tests.defaults import jax_defaults
from tests.processes import Processes, a_model, losses

DEADLINE = 300  # seconds, of machines that do other things


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
        refused = ["overwrite=True replaces it", "process 0 could not write"][index]
        assert refused in report["refused"]
    assert len(list(out.glob("model-*-of-00003.safetensors"))) == 3
    written = read_state_dict(out)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)


def train_here(*argv):
    """Returns the losses of a run on this process's eight devices."""
    with (
        jax_defaults(),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        train.main([*map(str, argv), *SMALL])
    return losses(printed.getvalue())


SMALL = (
    "--layers 1 --width 16 --heads 2 --batch 16 --save-every 20 --log-every 1".split()
)


def test_of_two_processes_one_is_killed_and_one_process_goes_on(tmp_path):
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    argv = [killed, *SMALL, "--steps", 100_000, "--fsdp", 2]
    with Processes(tmp_path, 2, "examples.train", *argv) as processes:
        processes.wait_until(lambda: "step 24:" in processes.output(), DEADLINE)
        processes.kill(1)
        assert processes.wait(DEADLINE) < 60
        assert processes.codes[0] in (1, -signal.SIGABRT)  # our end of it, or JAX's
        first = losses(processes.output())
    last = max(int(path.name) for path in killed.iterdir() if path.name.isdigit())
    then = train_here(killed, "--steps", last + 3, "--fsdp", 2, "--context", 2)
    assert list(then) == [last + 1, last + 2, last + 3]
    want = train_here(alone, "--steps", last + 3)
    for got in (first, then):
        steps = sorted(got.keys() & want.keys())
        assert len(steps) >= 3
        np.testing.assert_allclose(
            [got[n] for n in steps], [want[n] for n in steps], atol=1e-5
        )
