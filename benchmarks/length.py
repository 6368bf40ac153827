"""Tabulates what a divided length costs on TPUs: memory of a chip, and bytes it sends.

python -m benchmarks.length    (needs the `tpu` extra, on Linux x86-64; no TPU)

A training step of the attention of 16 heads of 128, bfloat16, one sequence, compiled by
the real compiler. It takes some minutes: `--way` and `--length` choose.
"""

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.collectives import sent
from flax_mha.functional import scaled_dot_product_attention
from flax_mha.sharding import length_by

WAYS = ("ulysses", "all_gather", "ring")
CHIPS = {16384: 2, 32768: 4, 131072: 16}


def step(query, key, value, is_causal):
    def loss(*inputs):
        out = scaled_dot_product_attention(*inputs, is_causal=is_causal)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return jax.grad(loss, (0, 1, 2))(query, key, value)


def compiled(way, length, chips, is_causal):
    name = "v5e:2x2" if chips <= 4 else "v5e:4x4"
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = Mesh(np.array(devices[:chips]), ("length",), axis_types=(AxisType.Explicit,))
    by_length = NamedSharding(mesh, P(None, None, "length"))
    shape = (1, 16, length, 128)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=by_length)
    with jax.set_mesh(mesh), length_by(way):
        run = jax.jit(step, static_argnums=3, out_shardings=(by_length,) * 3)
        return run.lower(x, x, x, is_causal).compile()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=WAYS, action="append")
    parser.add_argument("--length", type=int, choices=CHIPS, action="append")
    parser.add_argument("--causal", action="store_true")
    options = parser.parse_args()
    print("| way | length | chips | temporary MiB | sent MiB | kernels |")
    print("|---|---|---|---|---|---|")
    for length in options.length or CHIPS:
        for way in options.way or WAYS:
            chips = CHIPS[length]
            program = compiled(way, length, chips, options.causal)
            memory = program.memory_analysis().temp_size_in_bytes / 2**20
            text = program.as_text()
            moved = sent(program) / 2**20
            kernels = text.count('custom_call_target="tpu_custom_call"')
            row = way, length, chips, f"{memory:.0f}", f"{moved:.0f}", kernels
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
