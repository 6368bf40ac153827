"""Tabulates a training step of `examples/train.py` on up to 256 TPU chips.

python -m benchmarks.pod    (needs the `examples` and `tpu` extras, on Linux x86-64)

Twelve layers of width 1024, 16 heads, and for each chip one image of 4096 patches,
compiled by the real compiler: it takes some minutes, and no TPU.
"""

import argparse
import importlib.metadata
import os
from collections import Counter

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding

from benchmarks.collectives import SENT, moves
from examples import train

AXES = ("data", "fsdp", "context", "tensor")
# By how many chips: their topology, and the sizes of the axes.
MESHES = {
    1: ("v5e:2x2", (1, 1, 1, 1)),
    4: ("v5e:2x2", (1, 2, 1, 2)),
    16: ("v5e:4x4", (1, 4, 2, 2)),
    64: ("v5e:8x8", (2, 8, 2, 2)),
    256: ("v5e:16x16", (8, 8, 2, 2)),
}
WIDTH, HEADS, LAYERS, SIZE = 1024, 16, 12, 128  # of images, in pixels


def compiled(chips: int):
    """Returns the program of a step."""
    topology, shape = MESHES[chips]
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices, types = found.devices[:chips], (AxisType.Auto,) * len(AXES)
    mesh = jax.make_mesh(shape, AXES, types, devices=devices)
    model = train.VisionTransformer(WIDTH, HEADS, LAYERS, "bfloat16")
    with jax.set_mesh(mesh), nn.logical_axis_rules(train.RULES):
        state = train.creator(model, mesh, SIZE).eval_shape()
        by_batch = NamedSharding(mesh, train.BATCH)
        images = (chips, SIZE, SIZE)
        images = jax.ShapeDtypeStruct(images, jnp.float32, sharding=by_batch)
        labels = jax.ShapeDtypeStruct((chips,), jnp.int32, sharding=by_batch)
        step = jax.jit(train.train_step, donate_argnums=0)
        return step.lower(state, images, labels).compile()


def measured(chips: int) -> dict:
    """Returns what a chip holds and sends, in MiB."""
    program, shape = compiled(chips), MESHES[chips][1]
    memory, sent, times = program.memory_analysis(), Counter(), Counter()
    for move in moves(program):
        places = zip(AXES, np.unravel_index(move.group, shape), strict=True)
        over = ", ".join(axis for axis, at in places if len(set(at)) > 1)
        times[move.kind, over] += move.times
        sent[move.kind, over] += move.times * move.sent / 2**20
    return {
        "arguments": memory.argument_size_in_bytes / 2**20,
        "temporary": memory.temp_size_in_bytes / 2**20,
        "moves": [(*what, times[what], size) for what, size in sent.most_common()],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", type=int, nargs="+", choices=MESHES, default=MESHES)
    options = parser.parse_args()
    made_by = (f"{x} {importlib.metadata.version(x)}" for x in ("jax", "libtpu"))
    patches = (SIZE // 2) ** 2
    print(
        f"A training step of `examples/train.py`: {LAYERS} layers of width\n"
        f"{WIDTH} with {HEADS} heads, bfloat16, and for each chip an image of {patches}"
        f" patches.\nCompiled for TPUs v5e, not run; {', '.join(made_by)}. MiB of each "
        "chip.\nArguments are parameters, the optimizer's state and the batch.\n"
    )
    row("chips", *AXES, "arguments", "temporary", *SENT, "all sent")
    row(*["---"] * (len(AXES) + len(SENT) + 4))
    for chips in options.chips:
        run = measured(chips)
        sent = [sum(x[3] for x in run["moves"] if x[0] == kind) for kind in SENT]
        sizes = run["arguments"], run["temporary"], *sent, sum(sent)
        row(chips, *MESHES[chips][1], *(f"{size:.0f}" for size in sizes))
    print(f"\nThe collectives of {chips} chips, and the axes that they are over:\n")
    row("collective", "axes", "times in a step", "sent")
    row(*["---"] * 4)
    for *what, size in run["moves"]:
        row(*what, f"{size:.1f}")


def row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
