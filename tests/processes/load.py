"""Loads a checkpoint in one of several processes, and writes it back together.

Prints as JSON how many bytes it read for how many of its own.

    python -m tests.processes.load model.safetensors out --distributed ...
"""

import argparse
import json
import time

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mha import convert
from flax_mha.convert._files import strided


def place_on(mesh):
    """Heads over all devices, of other parameters the longest axis."""

    def place(path, axes, spec):
        if "heads" in axes:
            axis = axes.index("heads")
        else:
            axis = int(np.argmax(spec.shape))
        names = [None] * len(spec.shape)
        if spec.shape and spec.shape[axis] % mesh.size == 0:
            names[axis] = "devices"
        return NamedSharding(mesh, P(*names))

    return place


def counted():
    """Returns a list of the bytes of each read from now on."""
    fill, reads = strided._fill, []

    def count(file, offset, array):
        reads.append(array.nbytes)
        fill(file, offset, array)

    strided._fill = count
    return reads


def system_count():
    """Returns the bytes that this process has read, as Linux counts them."""
    with open("/proc/self/io") as file:
        return int(file.readline().removeprefix("rchar: "))


def load(path):
    """Returns parameters on all devices, their conversion, and what was read."""
    mesh = jax.sharding.get_mesh()
    state_dict = convert.read_state_dict(path)
    conversion = convert.plan_tree(state_dict, num_heads=8, stack=["layers"])
    reads, before = counted(), system_count()
    start, cpu = time.perf_counter(), time.process_time()
    params = conversion.params(state_dict, place_on(mesh))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    own = {
        (path, str(shard.index)): shard.data.nbytes
        for path, array in jax.tree.leaves_with_path(params)
        for shard in array.addressable_shards
    }
    report = {
        "own": sum(own.values()),
        "read": sum(reads),
        "system": system_count() - before,
        "seconds": seconds,
        "cpu": cpu,
    }
    return params, conversion, report


def main():
    args = arguments()
    if args.distributed:
        address, count, index = args.distributed
        jax.distributed.initialize(address, int(count), int(index))
    with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("devices",))):
        print(json.dumps(load_and_write(args)))


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("out", nargs="?")
    parser.add_argument("--max-file-size", type=int, default=500_000_000)
    parser.add_argument("--distributed", nargs=3)
    return parser.parse_args()


def load_and_write(args):
    params, conversion, report = load(args.path)
    if args.out:
        start = time.perf_counter()
        state_dict = conversion.state_dict(params)
        convert.save_safetensors(args.out, state_dict, max_file_size=args.max_file_size)
        report["writing"] = time.perf_counter() - start
        try:  # what the first process alone finds out
            convert.save_safetensors(args.out, state_dict)
        except OSError as error:
            report["refused"] = str(error)
    return report


if __name__ == "__main__":
    main()
