"""What `decode` measures: each decodes tokens of a layer, from a position on."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from flax_mha import KeyValueCache
from flax_mha._attention import _project, multi_head_attention, project_out
from flax_mha._params import parameter_table

EMBED, HEADS = 512, 8
HEAD_DIM = EMBED // HEADS
OURS = "flax_mha"
TOKENS = 16  # of a turn: short, so that what else the machine does disturbs all alike


def parameters(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=spec.shape) / EMBED**0.5, jnp.float32)
        for name, spec in parameter_table(EMBED, HEADS).items()
    }


def attend(params, x, cache):
    options = dict(batch_first=True, is_causal=True, need_weights=False)
    out, _, cache = multi_head_attention(params, x, x, x, cache=cache, **options)
    return out, cache


class Ours:
    """One call for each token, of a compiled step whose cache is donated."""

    def __init__(self, batch: int, length: int, dtype: str = "float32"):
        self.params = parameters()
        self.x = jnp.ones((batch, 1, EMBED))
        self.cache = KeyValueCache.empty(batch, length, HEADS, HEAD_DIM, dtype)
        self.step = jax.jit(attend, donate_argnums=2)

    def seek(self, position: int) -> None:
        at = jnp.full_like(self.cache.position, position)
        cache = self.cache
        self.cache = KeyValueCache(cache.keys, cache.values, at, cache.dtype)

    def decode(self, tokens: int) -> None:
        out = self.x
        for _ in range(tokens):
            out, self.cache = self.step(self.params, self.x, self.cache)
        jax.block_until_ready((out, self.cache))


class InScan(Ours):
    """All tokens in one program."""

    def __init__(self, batch: int, length: int):
        super().__init__(batch, length)

        def scan(params, x, cache):
            def body(carry, _):
                return attend(params, *carry), None

            return jax.lax.scan(body, (x, cache), None, length=TOKENS)[0]

        self.scan = jax.jit(scan, donate_argnums=2)

    def decode(self, tokens: int) -> None:
        out, self.cache = self.scan(self.params, self.x, self.cache)
        jax.block_until_ready((out, self.cache))


class Projections:
    """The products with the weights alone: less than that no step can take."""

    def __init__(self, batch: int, length: int):
        self.params, self.x = parameters(), jnp.ones((batch, 1, EMBED))

        def step(params, x):
            q, k, v = _project(params, x, x, x, precision=None)
            weight, bias = params["out_proj.weight"], params["out_proj.bias"]
            return project_out(q + k + v, weight, bias, None)

        self.step = jax.jit(step)

    def seek(self, position: int) -> None:
        pass

    def decode(self, tokens: int) -> None:
        out = self.x
        for _ in range(tokens):
            out = self.step(self.params, self.x)
        jax.block_until_ready(out)


class Flax:
    """flax.linen's own layer."""

    def __init__(self, batch: int, length: int):
        mha = nn.MultiHeadDotProductAttention(HEADS, qkv_features=EMBED, decode=True)
        full = jnp.ones((batch, length, EMBED))
        variables = mha.init(jax.random.key(0), full)
        self.params, self.cache = variables["params"], variables["cache"]
        self.x = full[:, :1]

        def step(params, cache, x):
            variables = {"params": params, "cache": cache}
            out, state = mha.apply(variables, x, mutable=["cache"])
            return out, state["cache"]

        self.step = jax.jit(step, donate_argnums=1)

    def seek(self, position: int) -> None:
        self.cache["cache_index"] = jnp.int32(position)

    def decode(self, tokens: int) -> None:
        out = self.x
        for _ in range(tokens):
            out, self.cache = self.step(self.params, self.cache, self.x)
        jax.block_until_ready((out, self.cache))


class Torch:
    """A cache by hand round scaled_dot_product_attention, of what is filled."""

    def __init__(self, batch: int, length: int):
        self.mha = torch.nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
        shape = batch, HEADS, length, HEAD_DIM
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.x = torch.ones(batch, 1, EMBED)
        self.position = 0

    def seek(self, position: int) -> None:
        self.position = position

    @torch.no_grad()
    def decode(self, tokens: int) -> None:
        mha, batch = self.mha, len(self.x)
        for _ in range(tokens):
            qkv = torch.nn.functional.linear(
                self.x, mha.in_proj_weight, mha.in_proj_bias
            )
            q, k, v = qkv.view(batch, 1, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
            at = self.position
            self.keys[:, :, at : at + 1], self.values[:, :, at : at + 1] = k, v
            out = torch.nn.functional.scaled_dot_product_attention(
                q, self.keys[:, :, : at + 1], self.values[:, :, : at + 1]
            )
            mha.out_proj(out.transpose(1, 2).reshape(batch, 1, EMBED))
            self.position += 1


CONTENDERS = {
    OURS: Ours,
    "flax_mha, bfloat16 cache": partial(Ours, dtype="bfloat16"),
    "flax_mha, in lax.scan": InScan,
    "flax_mha, projections alone": Projections,
    "flax.linen": Flax,
    "torch, by hand": Torch,
}
