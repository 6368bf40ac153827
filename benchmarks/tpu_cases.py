"""What `benchmarks.tpu` compiles: attention by several kernels, and a ViT's step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as library,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from flax_mha import MultiheadAttention
from flax_mha._call import Call
from flax_mha._dispatch import dot_product_attention
from flax_mha._dropout import Dropout
from flax_mha._masks import Mask


@dataclasses.dataclass(frozen=True)
class Case:
    """Attention of one shape with one option, in bfloat16."""

    kernels: tuple[str, ...]
    batch: int = 4
    length: int = 4096
    heads: int = 8
    head_dim: int = 64
    rate: float | None = None
    # "float", "heads", "causal", "padding" of keys, or "ragged": queries', too
    mask: str | None = None
    grad_mask: bool = False
    whole: str | None = None  # the case without the option

    @property
    def mask_shape(self) -> tuple[int, ...]:
        heads = self.heads if self.mask == "heads" else 1
        return 1, heads, self.length, self.length

    @property
    def trips(self) -> tuple[float, ...]:
        """How often our kernels' loops run, for a block: over 1024 keys at a time."""
        parts = self.length // 1024
        trips = {"padding": (parts / 2,), "causal": ((parts - 1) / 2, 1)}
        return trips.get(self.mask, (parts / 4,))

    @property
    def share(self) -> float:
        """How much of what kernels can jump over they execute, beside such loops."""
        parts = self.length // 1024
        if self.grad_mask:  # on the first and the last visit of its blocks
            return 1 / (self.batch * self.heads)
        shares = {"padding": 0.5, "causal": (parts + 1) / (2 * parts or 1)}
        return shares.get(self.mask, 1.0)


ALL = ("mosaic", "splash", "blockwise")
OURS = ("mosaic", "blockwise")
CASES = {
    "none": Case(ALL),
    "none 128": Case(ALL[:2], head_dim=128),
    "none 256": Case(ALL[:2], head_dim=256),
    "dropout": Case(OURS, rate=0.1, whole="none"),
    "float mask": Case(OURS, mask="float", whole="none"),
    "float mask, its gradient": Case(OURS, mask="float", grad_mask=True, whole="none"),
    "mask per head": Case(OURS, mask="heads", whole="none"),
    "half padding": Case(ALL[:2], mask="padding", whole="none"),
    "half ragged": Case(ALL[:1], mask="ragged", whole="none"),
    "8192": Case(ALL[:2], batch=1, length=8192),
    "8192 causal": Case(ALL[:2], batch=1, length=8192, mask="causal", whole="8192"),
    "197": Case(ALL, batch=64, length=197, heads=12),
    "577": Case(ALL, batch=64, length=577, heads=12),
}


def attention(case: Case, kernel: str) -> tuple[Callable, list[Any]]:
    """Returns a function of queries, keys, values and more; and their shapes."""
    shape = case.batch, case.length, case.heads, case.head_dim
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
    if kernel == "splash":
        return lambda q, k, v: _splash(case, q, k, v), args
    if case.mask in ("float", "heads"):
        args.append(jax.ShapeDtypeStruct(case.mask_shape, jnp.float32))
    elif case.mask in ("padding", "ragged"):
        shape = case.batch, 1, 1, case.length
        args.append(jax.ShapeDtypeStruct(shape, jnp.bool))
    if case.rate:
        args.append(jax.ShapeDtypeStruct((2,), jnp.uint32))

    def attend(q, k, v, *more):
        mask, dropout = Mask(is_causal=case.mask == "causal"), None
        if case.mask in ("float", "heads"):
            bias = more[0] if case.grad_mask else jax.lax.stop_gradient(more[0])
            mask = Mask(attn_bias=(bias,))
        elif case.mask in ("padding", "ragged"):
            mask = Mask(blocked=(more[0],))
        if case.mask == "ragged":
            half = jnp.full(case.batch, case.length // 2)
            mask = dataclasses.replace(mask, tgt_lens=half)
        if case.rate:
            dropout = Dropout(more[-1], case.rate)
        scale = jnp.float32(case.head_dim**-0.5)
        call = Call(q, k, v, mask, scale, dropout)
        return dot_product_attention(call, implementation=kernel)[0]

    return attend, args


def step(case: Case, attend: Callable) -> Callable:
    """Returns `attend` with its gradients, the mask's too if the case wants it."""

    def both(d_out, *args):
        count = 4 if case.grad_mask else 3
        out, pull_back = jax.vjp(
            lambda *some: attend(*some, *args[count:]), *args[:count]
        )
        return out, pull_back(d_out)

    return both


def _splash(case: Case, q: Any, k: Any, v: Any) -> Any:
    """JAX's kernel, of blocks as large as its vector memory takes."""
    parts = -(-case.length // 1024)
    block = -(-case.length // (parts * 128)) * 128
    length = block * parts
    mask = masks.FullMask((length, length))
    if case.mask == "causal":
        mask = masks.CausalMask((length, length))
    is_fused = parts <= 4  # it keeps a copy of a gradient for each block of keys
    sizes = library.BlockSizes(
        *(block,) * 6,
        *(None if is_fused else block,) * 2,
        use_fused_bwd_kernel=is_fused,
    )
    kernel = library.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * case.heads), block_sizes=sizes
    )
    segments = None
    if length > case.length or case.mask == "padding":
        last = case.length // 2 if case.mask == "padding" else case.length
        is_padding = (jnp.arange(length) >= last).astype(jnp.int32)
        segments = library.SegmentIds(jnp.zeros_like(is_padding), is_padding)
    widths = (0, 0), (0, 0), (0, length - case.length), (0, 0)
    scaled = q * jnp.bfloat16(case.head_dim**-0.5)
    q, k, v = (jnp.pad(x.swapaxes(1, 2), widths) for x in (scaled, k, v))
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(q, k, v)
    return out[:, :, : case.length].swapaxes(1, 2)


class _Block(nn.Module):
    implementation: str | None

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(dtype=jnp.bfloat16)(x)
        attn = MultiheadAttention(
            *(768, 12),
            dropout=0.1,
            batch_first=True,
            param_dtype=jnp.bfloat16,
            implementation=self.implementation,
        )
        y, _ = attn(y, y, y, need_weights=False, deterministic=False)
        y = nn.LayerNorm(dtype=jnp.bfloat16)(x := x + y)
        y = nn.gelu(nn.Dense(3072, dtype=jnp.bfloat16)(y))
        return x + nn.Dense(768, dtype=jnp.bfloat16)(y), None


class _ViT(nn.Module):
    """The encoder of ViT-B: 12 layers, compiled once."""

    implementation: str | None

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=12,
        )
        x, _ = layers(self.implementation)(x, None)
        return nn.LayerNorm(dtype=jnp.bfloat16)(x)


def vit_step(implementation: str | None) -> tuple[Callable, list[Any]]:
    """Returns a step of ViT-B at 64 images of 197 tokens; and its arguments' shapes."""
    model = _ViT(implementation)
    x = jax.ShapeDtypeStruct((64, 197, 768), jnp.bfloat16)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(model.init, {"params": rng, "dropout": rng}, x)

    def loss(variables, x, rng):
        out = model.apply(variables, x, rngs={"dropout": rng})
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    return jax.grad(loss), [variables, x, rng]
