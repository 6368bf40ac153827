"""Compiles the module for TPUs with the real compiler and tabulates its memory.

python -m benchmarks.tpu    (needs the `tpu` extra, on Linux x86-64; no TPU)
"""

import argparse
import functools
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import importlib.metadata

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from flax_mha import MultiheadAttention

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
SHORT = (4, 4096, 512, 8)
LONG = [(1, length, 1024, 16) for length in (8192, 16384, 32768)]

# Constructor options, and the call's, whose masks depend on the shape.
OPTIONS = {
    "no mask": ({}, lambda b, n, h: {}),
    "causal": ({}, lambda b, n, h: {"is_causal": True}),
    "key padding": ({}, lambda b, n, h: {"key_padding_mask": ((b, n), bool)}),
    "float (L, S) mask": ({}, lambda b, n, h: {"attn_mask": ((n, n), jnp.bfloat16)}),
    "per-head mask": ({}, lambda b, n, h: {"attn_mask": ((b * h, n, n), bool)}),
    "dropout 0.1": ({"dropout": 0.1}, lambda b, n, h: {}),
    "bias_kv": ({"add_bias_kv": True}, lambda b, n, h: {}),
}


def compiled(module, chip, batch, length, embed, grad, masks, **flags):
    """Compiles a forward pass, or a training step, for one chip."""
    x = jax.ShapeDtypeStruct((batch, length, embed), jnp.bfloat16)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    init = functools.partial(module.init, **flags)
    variables = jax.eval_shape(init, {"params": rng, "dropout": rng}, x, x, x)

    def apply(variables, x, masks, rng):
        out = module.apply(variables, x, x, x, rngs={"dropout": rng}, **masks, **flags)
        return out[0] if isinstance(out, tuple) else out

    def loss(*args):
        return jnp.sum(apply(*args).astype(jnp.float32))

    step = jax.grad(loss, argnums=(0, 1)) if grad else apply
    here = SingleDeviceSharding(_devices(chip)[0])
    masks = {name: jax.ShapeDtypeStruct(*mask) for name, mask in masks.items()}
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        (variables, x, masks, rng),
    )
    lowered = jax.jit(step).lower(*args)
    kernel = "mosaic" if "tpu_custom_call" in lowered.as_text() else "blockwise"
    return kernel, lowered.compile().memory_analysis().temp_size_in_bytes / 2**20


@functools.cache
def _devices(chip):
    name = TOPOLOGIES[chip]
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def ours(name, chip, shape, grad):
    batch, length, embed, heads = shape
    build, call = OPTIONS[name]
    module = MultiheadAttention(
        embed, heads, batch_first=True, param_dtype=jnp.bfloat16, **build
    )
    masks = call(batch, length, heads)
    flags = {"is_causal": masks.pop("is_causal")} if "is_causal" in masks else {}
    flags |= {"need_weights": False, "deterministic": False}
    return compiled(module, chip, batch, length, embed, grad, masks, **flags)


def stock(chip, shape, grad):
    batch, length, embed, heads = shape
    module = nn.MultiHeadDotProductAttention(
        num_heads=heads,
        param_dtype=jnp.bfloat16,
        attention_fn=lambda q, k, v, **_: jax.nn.dot_product_attention(q, k, v),
    )
    return compiled(module, chip, batch, length, embed, grad, {})[1]


def table():
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu")
    )
    yield f"Compiled, not run; bfloat16; {versions}. Temporary memory in MiB of the"
    yield "module for (batch, length, embed, heads), without weights; gradients are of"
    yield "parameters and input. Stock is flax.linen.MultiHeadDotProductAttention with"
    yield f"jax.nn.dot_product_attention and no option, at {SHORT}. What"
    yield "fits in the vector memory (128 MiB on these chips) is not counted, so that"
    yield "small numbers grow faster than linearly."
    yield ""
    shapes = " | ".join(map(str, LONG))
    yield f"| chip | pass | option | kernel | {SHORT} | / stock | {shapes} |"
    yield "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for chip in TOPOLOGIES:
        for grad in (False, True):
            other = stock(chip, SHORT, grad)
            for name in OPTIONS:
                kernel, short = ours(name, chip, SHORT, grad)
                long = [_mib_or_no_room(name, chip, shape, grad) for shape in LONG]
                yield (
                    f"| {chip} | {'gradient' if grad else 'forward'} | {name} | "
                    f"{kernel} | {short:.0f} | {short / other:.3f} | "
                    f"{' | '.join(long)} |"
                )


def _mib_or_no_room(name, chip, shape, grad):
    try:
        return f"{ours(name, chip, shape, grad)[1]:.0f}"
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return "no room"  # the masks alone are larger than the chip's memory


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    out = parser.parse_args().out
    lines = []
    for line in table():
        print(line, flush=True)
        lines.append(line)
    (out / "tpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
