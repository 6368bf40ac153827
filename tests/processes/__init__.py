"""Several processes of one program, on this machine, as hosts of a pod would be."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import numpy as np


class Processes:
    """Starts a module in `count` processes that find each other; kills what is left.

    Each gets `--distributed ADDRESS COUNT INDEX` behind its arguments, if it is not the
    only one.

    Attributes:
        running: By their index.
        codes: What those that have ended returned, by their index.
    """

    def __init__(self, folder, count, module, *argv, devices=1):
        self.running, self.codes, self._outputs = {}, {}, []
        flags = f"--xla_force_host_platform_device_count={devices}"
        flags += " --xla_backend_optimization_level=0"  # as in conftest.py
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        for index in range(count):
            self._outputs.append(pathlib.Path(folder) / f"output_{index}.txt")
            with self._outputs[index].open("w") as file:
                own = ["--distributed", address, str(count), str(index)]
                own = own if count > 1 else []
                self.running[index] = subprocess.Popen(
                    [sys.executable, "-m", module, *map(str, argv), *own],
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.running.values():
            process.kill()
            process.wait()

    def output(self, index=0):
        return self._outputs[index].read_text()

    def report(self, index):
        """Returns the JSON that a process has printed."""
        (line,) = [x for x in self.output(index).splitlines() if x.startswith("{")]
        return json.loads(line)

    def kill(self, index):
        process = self.running.pop(index)
        process.kill()
        self.codes[index] = process.wait()

    def wait(self, seconds):
        """Returns how long it took until all had ended."""
        start = time.monotonic()
        self.wait_until(lambda: not self.running, seconds, may_end=True)
        return time.monotonic() - start

    def wait_until(self, reached, seconds, *, may_end=False):
        """Raises an error if `reached` is not true in time, or a process has ended."""
        start = time.monotonic()
        while not reached():
            for index, process in [*self.running.items()]:
                if process.poll() is not None:
                    self.codes[index] = self.running.pop(index).returncode
            ended = bool(self.codes) and not may_end
            if ended or time.monotonic() > start + seconds:
                said = "\n".join(path.read_text()[-2000:] for path in self._outputs)
                raise AssertionError(f"{self.running} still ran, {self.codes}\n{said}")
            time.sleep(0.005)


def losses(output):
    """Returns the losses that `examples/train.py` has printed, by their steps."""
    found = re.findall(r"^step (\d+): loss (\S+)$", output, re.M)
    return {int(step): float(loss) for step, loss in found}


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
