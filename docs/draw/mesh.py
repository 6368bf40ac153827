"""Which sequences and heads lie on which device of a mesh, by JAX's own shardings."""

import jax
import numpy as np

import flax_mha
from docs.draw.svg import picture, rect, text
from flax_mha.sharding import param_shardings

SHAPE = {"data": 4, "tensor": 2}
BATCH, HEADS = 8, 4
CELL, GAP, BELOW, TOP, LEFT = 14, 76, 56, 50, 100
WIDTH, HEIGHT = HEADS * CELL, BATCH * CELL


def parts_of_devices() -> dict[tuple[int, int], tuple[range, range]]:
    """Returns by place in the mesh the sequences and the heads that are there."""
    mesh = jax.make_mesh(tuple(SHAPE.values()), tuple(SHAPE))
    mha = flax_mha.MultiheadAttention(8 * HEADS, HEADS, batch_first=True)
    x = jax.ShapeDtypeStruct((BATCH, 1, 8 * HEADS), "float32")
    params = jax.eval_shape(mha.init, jax.random.key(0), x, x, x)["params"]
    weight = param_shardings(params, mesh)["out_proj"]["weight"]
    batch = jax.NamedSharding(mesh, jax.P("data"))
    sequences = batch.devices_indices_map(x.shape)
    heads = weight.devices_indices_map(params["out_proj"]["weight"].shape)
    return {
        place: (
            range(BATCH)[sequences[mesh.devices[place]][0]],
            range(HEADS)[heads[mesh.devices[place]][1]],
        )
        for place in np.ndindex(mesh.devices.shape)
    }


def device(x: float, y: float, sequences: range, heads: range) -> list[str]:
    parts = [
        text(x + WIDTH / 2, y - 8, f"sequences {ends(sequences)}", "middle"),
        text(x + WIDTH / 2, y + HEIGHT + 16, f"heads {ends(heads)}", "middle"),
    ]
    for sequence in range(BATCH):
        for head in range(HEADS):
            is_here = sequence in sequences and head in heads
            at = x + head * CELL, y + sequence * CELL
            parts.append(rect(*at, CELL - 2, CELL - 2, "a" if is_here else "quiet"))
    return parts


def ends(numbers: range) -> str:
    return f"{numbers[0]} and {numbers[-1]}"


def drawing() -> str:
    parts = []
    for (data, tensor), held in parts_of_devices().items():
        x = LEFT + data * (WIDTH + GAP)
        y = TOP + tensor * (HEIGHT + BELOW)
        parts += device(x, y, *held)
    for data in range(SHAPE["data"]):
        x = LEFT + data * (WIDTH + GAP) + WIDTH / 2
        parts.append(text(x, 18, f"data {data}", "middle"))
    for tensor in range(SHAPE["tensor"]):
        y = TOP + tensor * (HEIGHT + BELOW) + HEIGHT / 2
        parts.append(text(12, y, f"tensor {tensor}"))
    width = LEFT + SHAPE["data"] * (WIDTH + GAP) - GAP / 2
    height = TOP + SHAPE["tensor"] * (HEIGHT + BELOW) - BELOW / 2
    title = "Eight devices, each with two of eight sequences and two of four heads"
    return picture(width, height, title, parts)
