"""`MultiheadAttention` for flax.linen: declares parameters, computes nothing."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_mha import _masks
from flax_mha._attention import multi_head_attention
from flax_mha._cache import KeyValueCache
from flax_mha._checks import arguments, layer
from flax_mha._checks import cache as cache_checks
from flax_mha._dropout import Dropout
from flax_mha._kernels import KERNELS
from flax_mha._params import ParamSpec, parameter_table
from flax_mha._ragged.array import RaggedArray
from flax_mha._typing import Array, ArrayLike, DType, Precision, Sequences


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
        kdim: Features of key; `embed_dim` if None.
        vdim: Features of value; `embed_dim` if None.
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
            (everywhere; memory linear in the lengths), "splash" (TPU), or "reference"
            (all logits at once; allows `jax.jvp`). None: the best that can, for the
            platform compiled for; see `flax_mha.explain`.
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

    def __post_init__(self):
        layer.sizes(self.embed_dim, self.num_heads, self.kdim, self.vdim)
        arguments.probability("dropout", self.dropout)
        arguments.floating_dtype("param_dtype", self.param_dtype)
        if self.dtype is not None:
            arguments.floating_dtype("dtype", self.dtype)
        if self.cache_dtype is not None:
            arguments.floating_dtype("cache_dtype", self.cache_dtype)
        arguments.python_bools(decode=self.decode)
        arguments.one_of("implementation", self.implementation, KERNELS)
        self.kdim = self.embed_dim if self.kdim is None else self.kdim
        self.vdim = self.embed_dim if self.vdim is None else self.vdim
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
                with the heads of one batch element together. Boolean: **True may not
                attend**. Float: added to the logits.
            average_attn_weights: Average the returned weights over heads.
            is_causal: Without `attn_mask`, apply the causal mask. With it, a hint that
                `attn_mask` is the causal mask: as in PyTorch, it replaces `attn_mask`
                if `need_weights=False` and there is no `key_padding_mask`, and does
                nothing otherwise.
            deterministic: If False, apply dropout, drawn from the "dropout" rng, given
                as `apply(..., rngs={"dropout": key})`.

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
        params = self._parameters()
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
        )
        if key is not None and cached:
            self.put_variable("cache", "kv", *cached)
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
        batch, length = 1, key.shape[0]
        if key.ndim == 3:
            is_first = self.batch_first or isinstance(key, RaggedArray)
            batch, length = key.shape[:2] if is_first else key.shape[1::-1]
        dtype = self.cache_dtype or self.dtype
        dtype = dtype or jnp.result_type(query, key, *params.values())
        sizes = batch, length, self.num_heads, self.head_dim
        self.put_variable("cache", "kv", KeyValueCache.empty(*sizes, dtype))
        return None

    def _parameters(self) -> dict[str, Array]:
        """Declares the parameters; returns them by PyTorch's name."""
        table = parameter_table(
            self.embed_dim,
            self.num_heads,
            kdim=self.kdim,
            vdim=self.vdim,
            bias=self.bias,
            add_bias_kv=self.add_bias_kv,
        )
        out_proj = {
            name.removeprefix("out_proj."): table.pop(name)
            for name in list(table)
            if name.startswith("out_proj.")
        }
        params = _declare(self, table)
        for name, param in _Parameters(
            out_proj, self.param_dtype, self.device, name="out_proj"
        )().items():
            params[f"out_proj.{name}"] = param
        return params

    def _dropout(self, deterministic: bool | None) -> Dropout | None:
        if self.dropout == 0:
            return None
        if deterministic is None:
            deterministic = self.deterministic
        layer.dropout_call(self.dropout, deterministic, self.has_rng("dropout"))
        if deterministic:
            return None
        return Dropout.from_rng(self.make_rng("dropout"), self.dropout)


class _Parameters(nn.Module):
    """Parameters under a name of their own in the tree."""

    specs: dict[str, ParamSpec]
    param_dtype: DType
    device: Any

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        return _declare(self, self.specs)


def _declare(module: nn.Module, specs: dict[str, ParamSpec]) -> dict[str, Array]:
    def init(rng, spec):
        param = spec.init(rng, spec.shape, module.param_dtype)
        return param if module.device is None else jax.device_put(param, module.device)

    return {name: module.param(name, init, spec) for name, spec in specs.items()}
