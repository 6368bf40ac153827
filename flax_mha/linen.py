"""`MultiheadAttention` for flax.linen: declares parameters, computes nothing."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from flax_mha import _masks
from flax_mha._attention import multi_head_attention, project_out
from flax_mha._cache import KeyValueCache
from flax_mha._checks import arguments, layer
from flax_mha._checks import cache as cache_checks
from flax_mha._checks import module as checks
from flax_mha._dropout import Dropout
from flax_mha._initializers import table_of
from flax_mha._params import Kind, ParamSpec
from flax_mha._ragged.array import RaggedArray
from flax_mha._typing import Array, ArrayLike, DType, OutHeads, Precision, Sequences


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` for Flax: same arguments, numbers, checkpoints.

    Computes `softmax(q @ kT / sqrt(head_dim) + masks) @ v` for each head, where q, k
    and v are linear projections of query, key and value, and projects the heads'
    results together (Vaswani et al., arXiv:1706.03762).

    The first ten arguments are PyTorch's, in its order, with its defaults and initial
    values; `dtype` has Flax's meaning:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html

    Attributes:
        embed_dim: Features of query and of the output; divisible by `num_heads`.
        num_heads: Number of heads, each of size head_dim = embed_dim // num_heads.
        dropout: Chance, 0 to 1, that an attention weight is dropped in training.
        bias: Add `in_proj_bias` and `out_proj.bias`.
        add_bias_kv: Append a learned key and value (`bias_k`, `bias_v`) to the others.
        add_zero_attn: Append a key and value of zeros.
        kdim: Features of key; None: `embed_dim`.
        vdim: Features of value; None: `embed_dim`.
        batch_first: Inputs are (batch, length, features), not PyTorch's default
            (length, batch, features).
        device: `jax.Device` or `jax.sharding.Sharding` to create parameters on.
        dtype: Of the computation; None promotes inputs and parameters together, so
            that bfloat16 inputs with float32 parameters give float32. PyTorch's
            `dtype` is `param_dtype`.
        param_dtype: Of the parameters.
        deterministic: No dropout, as `eval()` in PyTorch. Needed only if `dropout > 0`,
            here or in the call, which has precedence.
        precision: Of all products, as `jax.numpy.einsum` takes it.
        implementation: Kernel that must run, or else ValueError with the reason, where
            it can be known, while tracing, or when the program is lowered: "blockwise"
            (everywhere; memory linear in the lengths), "mosaic" (TPU), "cudnn" (NVIDIA
            GPU), or "reference" (all logits at once). None: the best that can, for the
            platform compiled for; see `flax_mha.explain`.
        kernel_init: Draws the weights of the in-projection, as a matrix (in_features,
            out_features); None: PyTorch's way.
        out_kernel_init: Draws that of the out-projection; None: `kernel_init`.
        bias_init: Draws `in_proj_bias`, (3, num_heads, head_dim); None: zeros.
        out_bias_init: Draws `out_proj.bias`, (embed_dim,); None: `bias_init`.
        bias_kv_init: Draws `bias_k` and `bias_v`, (num_heads, head_dim); None:
            PyTorch's way.
        logical_axes: Box parameters in `nn.LogicallyPartitioned`, for
            `nn.get_partition_spec` and `nn.logical_to_mesh_sharding`. The names are
            "qkv", "heads", "head_dim" and "embed".
        decode: Keep keys and values in the "cache" collection, as a `KeyValueCache`,
            and attend to all that it holds; see `docs/decoding.md`. `init` makes room
            for as many tokens as its key has.
        cache_dtype: Of what is kept; None: that of the computation.

    Parameters have PyTorch's names and values, reshaped so that heads are an axis:
    `in_proj_weight` is (3, num_heads, head_dim, embed_dim), for example.
    """

    embed_dim: int
    num_heads: int
    dropout: float = 0.0
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    kdim: int | None = None
    vdim: int | None = None
    batch_first: bool = False
    device: Any = None
    dtype: DType | None = None
    param_dtype: DType = jnp.float32
    deterministic: bool | None = None
    precision: Precision = None
    implementation: str | None = None
    decode: bool = False
    cache_dtype: DType | None = None

    kernel_init: Initializer | None = None
    out_kernel_init: Initializer | None = None
    bias_init: Initializer | None = None
    out_bias_init: Initializer | None = None
    bias_kv_init: Initializer | None = None
    logical_axes: bool = False

    def __post_init__(self):
        checks.constructor(self, self.device)
        arguments.python_bools(logical_axes=self.logical_axes)
        checks.initializers(_inits(self))
        super().__post_init__()

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @nn.compact
    def __call__(
        self,
        query: Sequences,
        key: Sequences | None,
        value: Sequences | None,
        key_padding_mask: Sequences | None = None,
        need_weights: bool = True,
        attn_mask: ArrayLike | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        deterministic: bool | None = None,
        sow_weights: bool = False,
    ) -> tuple[Sequences, Array | None]:
        """Attends from `query` to `key` and `value`, as `torch.nn.MultiheadAttention`.

        Shapes are for `batch_first=True`; otherwise the first two axes of query, key,
        value and the output are swapped. Without a batch, leave out `batch`
        everywhere; `batch_first` then has no effect. Nor has it if query, key and value
        are `RaggedArray`s, whose shapes are those with padding to `max_len`.

        Args:
            query: What attends, (batch, tgt_len, embed_dim).
            key: What is compared with `query`, (batch, src_len, kdim).
            value: What is averaged, (batch, src_len, vdim).
            key_padding_mask: (batch, src_len). Boolean: **True is ignored**. Float:
                added to the logits. With `RaggedArray`s, one of values (capacity,).
            need_weights: Also return the attention weights. Under `jit`, weights that
                are not used cost nothing.
            attn_mask: (tgt_len, src_len), or (batch * num_heads, tgt_len, src_len)
                with the heads of one batch element together, or, what PyTorch does not
                take, (batch or 1, num_heads or 1, tgt_len, src_len). Boolean: **True
                may not attend**. Float: added to the logits.
            average_attn_weights: Average the returned weights over heads.
            is_causal: Without `attn_mask`, apply the causal mask. With it, a hint that
                `attn_mask` is the causal mask: as in PyTorch, it replaces `attn_mask`
                if `need_weights=False` and there is no `key_padding_mask`, and does
                nothing otherwise.
            deterministic: If False, apply dropout, drawn from the "dropout" rng, given
                as `apply(..., rngs={"dropout": key})`, or else from "params".
            sow_weights: Also record the weights that are returned, as
                "attention_weights" of the "intermediates".

        With `decode=True`, except in `init`: key and value are appended to the cache,
        which `apply(..., mutable=["cache"])` returns, or are None, and all that it then
        holds is attended to. Masks have as many columns as it has room for.
        `is_causal` is by position, also beside an `attn_mask`. No dropout.

        Returns:
            The output, (batch, tgt_len, embed_dim), a `RaggedArray` if the query is
            one, and the weights after dropout, (batch, tgt_len, src_len), or (batch,
            num_heads, tgt_len, src_len) if not averaged, or None if not needed. With
            `add_bias_kv` and `add_zero_attn` the weights have a column more for each.
            Those of padding are 0. A query that may attend to
            nothing gets NaN if `need_weights`, and makes all gradients NaN, used or
            not; without, it gets `out_proj`'s bias and no gradient. Both as in PyTorch.

        Raises:
            ValueError: Shapes disagree.
            TypeError: An argument is not an array, or not of a dtype it can have.

        >>> mha = MultiheadAttention(embed_dim=8, num_heads=2, batch_first=True)
        >>> x = jnp.ones((1, 3, 8), jnp.float32)
        >>> variables = mha.init(jax.random.key(0), x, x, x)
        >>> out, weights = mha.apply(variables, x, x, x)
        >>> out.shape, weights.shape
        ((1, 3, 8), (1, 3, 3))
        """
        checks.sown_weights(sow_weights, need_weights)
        table = self._table()
        names = [name for name in table if name.startswith("out_proj.")]
        out_proj = _OutProjection(
            {name.removeprefix("out_proj."): table.pop(name) for name in names},
            self.param_dtype,
            self.device,
            self.precision,
            name="out_proj",
        )
        params = _declare(self, table)
        params |= {f"out_proj.{name}": p for name, p in out_proj.params.items()}
        cache = self._cache(params, query, key) if self.decode else None
        out, weights, *cached = multi_head_attention(
            params,
            query,
            key,
            value,
            key_padding_mask,
            attn_mask,
            batch_first=self.batch_first,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            add_zero_attn=self.add_zero_attn,
            dropout=self._dropout(deterministic),
            cache=cache,
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
            out_proj=out_proj,
        )
        if key is not None and cached:
            cache_checks.can_be_changed(self.is_mutable_collection("cache"))
            self.put_variable("cache", "kv", *cached)
        if sow_weights:
            self.sow("intermediates", "attention_weights", weights)
        return out, weights

    def merge_masks(
        self,
        attn_mask: ArrayLike | None,
        key_padding_mask: ArrayLike | None,
        query: ArrayLike,
    ) -> tuple[Array | None, int | None]:
        """Merges the masks as `torch.nn.MultiheadAttention.merge_masks` does.

        Args:
            attn_mask: (length, length) or (batch * num_heads, length, length).
            key_padding_mask: (batch, length).
            query: (batch, length, embed_dim), for its shape.

        Returns:
            The merged mask and its type: (None, None), (key_padding_mask, 1), or a
            mask of shape (batch, num_heads, length, length) and 2.
        """
        layer.mergeable_masks(attn_mask, key_padding_mask, query)
        return _masks.merge(attn_mask, key_padding_mask, query, self.num_heads)

    def _cache(
        self, params: dict[str, Array], query: Sequences, key: Sequences
    ) -> KeyValueCache | None:
        """Returns what is kept so far; in `init`, None, and makes room."""
        if self.has_variable("cache", "kv"):
            return self.get_variable("cache", "kv")
        cache_checks.can_be_made(self.is_initializing(), key)
        dtype = self.cache_dtype or self.dtype
        dtype = dtype or jnp.result_type(query, key, *params.values())
        batch, length = 1, key.shape[0]
        if key.ndim == 3:
            is_first = self.batch_first or isinstance(key, RaggedArray)
            batch, length = key.shape[:2] if is_first else key.shape[1::-1]
        cache = KeyValueCache.empty(batch, length, self.num_heads, self.head_dim, dtype)
        self.put_variable("cache", "kv", cache)
        return None

    def _table(self) -> dict[str, ParamSpec]:
        table = table_of(self, _inits(self))
        if not self.logical_axes:
            return table
        return {
            name: dataclasses.replace(spec, init=_boxed(spec.init, spec.axes))
            for name, spec in table.items()
        }

    def _dropout(self, deterministic: bool | None) -> Dropout | None:
        has_rng = self.has_rng("dropout") or self.has_rng("params")
        how = 'apply(..., rngs={"dropout": key})'
        if not checks.drops_out(self, deterministic, has_rng=has_rng, how=how):
            return None
        return Dropout.from_rng(self.make_rng("dropout"), self.dropout)


class _OutProjection(nn.Module):
    specs: dict[str, ParamSpec]
    param_dtype: DType
    device: Any
    precision: Precision

    def setup(self):
        self.params = _declare(self, self.specs)

    def __call__(self, attended: OutHeads) -> Array:
        weight, bias = self.params["weight"], self.params.get("bias")
        return project_out(attended, weight, bias, self.precision)


def _inits(module: MultiheadAttention) -> dict[Kind, Initializer | None]:
    return {
        "kernel": module.kernel_init,
        "out_kernel": module.out_kernel_init,
        "bias": module.bias_init,
        "out_bias": module.out_bias_init,
        "bias_kv": module.bias_kv_init,
    }


def _declare(module: nn.Module, specs: dict[str, ParamSpec]) -> dict[str, Array]:
    def init(rng, spec):
        param = spec.init(rng, spec.shape, module.param_dtype)
        return param if module.device is None else jax.device_put(param, module.device)

    return {name: module.param(name, init, spec) for name, spec in specs.items()}


def _boxed(init: Initializer, axes: tuple[str, ...]) -> Initializer:
    def boxed(*args):
        value = init(*args)
        is_boxed = isinstance(value, nn.meta.AxisMetadata)
        return value if is_boxed else nn.LogicallyPartitioned(value, axes)

    return boxed
