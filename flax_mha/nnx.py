"""`MultiheadAttention` for flax.nnx: declares parameters, computes nothing."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.typing import Initializer

from flax_mha import _masks
from flax_mha._attention import multi_head_attention, project_out
from flax_mha._cache import KeyValueCache
from flax_mha._checks import arguments, layer
from flax_mha._checks import cache as cache_checks
from flax_mha._checks import module as checks
from flax_mha._dropout import Dropout
from flax_mha._initializers import given, table_of
from flax_mha._mesh import place_by_names
from flax_mha._params import Kind
from flax_mha._typing import Array, ArrayLike, DType, OutHeads, Precision, Sequences

__all__ = ["MultiheadAttention"]

Metadata = Mapping[str, Any]


class MultiheadAttention(nnx.Module):
    """`torch.nn.MultiheadAttention` for nnx: same arguments, numbers, checkpoints.

    It computes what `flax_mha.MultiheadAttention` does, where arguments are described
    that have the same names. Parameters are `nnx.Param`s under PyTorch's names, in the
    same shapes as there, `in_proj_weight` (3, num_heads, head_dim, embed_dim) say;
    those that PyTorch would not have are None.

    A parameter's metadata has the names of its axes, "qkv", "heads", "head_dim" and
    "embed", as `out_sharding`. Under `jax.set_mesh` parameters are created divided over
    the mesh's axes that `flax.linen.logical_axis_rules` or a parameter's own
    `sharding_rules` give for "heads" and "embed", or that have these names.

    Attributes:
        embed_dim, num_heads, dropout, bias: PyTorch's, in its order.
        add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device: So are these.
        dtype, param_dtype, deterministic, precision, implementation: As in linen.
            `deterministic` is what `train()`, `eval()` and `nnx.view` set.
        decode, cache_dtype: As in linen, with the cache in `self.cache`, an `nnx.Cache`
            that `init_cache` or `nnx.view(mha, decode=True, batch_size=...,
            max_length=...)` makes.
        kernel_init, out_kernel_init, bias_init, out_bias_init, bias_kv_init: As in
            linen. `nnx.with_partitioning` may be round them.
        kernel_metadata, bias_metadata, bias_kv_metadata: Further metadata of these
            parameters.
        out_kernel_metadata, out_bias_metadata: Those of the out-projection; None:
            the others'.
        rngs: Draws parameters from "params".
        keep_rngs: Keep a fork of the "dropout" stream, if there is dropout.

    >>> from flax import nnx
    >>> from flax_mha.nnx import MultiheadAttention
    >>> mha = MultiheadAttention(8, 2, batch_first=True, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((1, 3, 8), jnp.float32)
    >>> out, weights = mha(x, x, x)
    >>> out.shape, weights.shape, mha.out_proj.weight.shape
    ((1, 3, 8), (1, 3, 3), (8, 2, 4))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        *,
        dtype: DType | None = None,
        param_dtype: DType = jnp.float32,
        deterministic: bool | None = None,
        precision: Precision = None,
        implementation: str | None = None,
        decode: bool = False,
        cache_dtype: DType | None = None,
        kernel_init: Initializer | None = None,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        out_bias_init: Initializer | None = None,
        bias_kv_init: Initializer | None = None,
        kernel_metadata: Metadata | None = None,
        out_kernel_metadata: Metadata | None = None,
        bias_metadata: Metadata | None = None,
        out_bias_metadata: Metadata | None = None,
        bias_kv_metadata: Metadata | None = None,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
    ):
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.bias = bias
        self.add_bias_kv = add_bias_kv
        self.add_zero_attn = add_zero_attn
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.deterministic = deterministic
        self.precision = precision
        self.implementation = implementation
        self.decode = decode
        self.cache_dtype = cache_dtype
        self.cache = nnx.data(None)
        checks.constructor(self, device)
        arguments.python_bools(keep_rngs=keep_rngs)
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(
                "rngs must be an nnx.Rngs, such as nnx.Rngs(0), "
                f"got {arguments.describe(rngs)}."
            )
        keeps_rngs = keep_rngs and dropout > 0
        checks.streams(rngs, "params", *["dropout"] * keeps_rngs)
        inits: dict[Kind, Initializer | None] = {
            "kernel": kernel_init,
            "out_kernel": out_kernel_init,
            "bias": bias_init,
            "out_bias": out_bias_init,
            "bias_kv": bias_kv_init,
        }
        metadata: dict[Kind, Metadata | None] = {
            "kernel": kernel_metadata,
            "out_kernel": out_kernel_metadata,
            "bias": bias_metadata,
            "out_bias": out_bias_metadata,
            "bias_kv": bias_kv_metadata,
        }
        checks.initializers(inits)
        checks.metadata(metadata)
        self._declare(inits, metadata, device, rngs)
        forked = rngs.dropout.fork() if keeps_rngs else None
        self.rngs = nnx.data(forked)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

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
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
        sow_weights: bool = False,
    ) -> tuple[Sequences, Array | None]:
        """Attends from `query` to `key` and `value`, as `torch.nn.MultiheadAttention`.

        Args and results are those of `flax_mha.MultiheadAttention`, but for:

        Args:
            deterministic: No dropout; goes before the attribute.
            rngs: Draws dropout: an `nnx.Rngs` with a "dropout" stream, a stream, or a
                key. Goes before what the constructor kept.
            sow_weights: Also record the weights that are returned, for `nnx.capture`,
                as an `nnx.Intermediate` "attention_weights".
        """
        checks.sown_weights(sow_weights, need_weights)
        kept = self.cache if self.decode else None
        if self.decode:
            cache_checks.has_been_made(kept)
        with nn.logical_axis_rules(self._rules()):
            out, weights, *cached = multi_head_attention(
                self._parameters(),
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
                dropout=self._dropout(deterministic, rngs),
                cache=None if kept is None else kept.get_value(),
                dtype=self.dtype,
                precision=self.precision,
                implementation=self.implementation,
                out_proj=self.out_proj,
            )
        if kept is not None and key is not None:
            kept.set_value(*cached)
        if sow_weights:
            self.sow(nnx.Intermediate, "attention_weights", weights)
        return out, weights

    def init_cache(
        self, batch_size: int, max_length: int, dtype: DType | None = None
    ) -> None:
        """Makes an empty cache for `decode=True`, in place of what there is.

        Args:
            batch_size: How many sequences; 1 for inputs without a batch.
            max_length: Tokens of each that there is room for.
            dtype: Of what is kept; None: `cache_dtype`, or that of the computation.

        Raises:
            ValueError: A size is negative.
            TypeError: A size is no integer, or the dtype not floating point.
        """
        cache_checks.sizes(batch_size=batch_size, max_length=max_length)
        dtype = dtype or self.cache_dtype or self.dtype or self.param_dtype
        sizes = batch_size, max_length, self.num_heads, self.head_dim
        self.cache = nnx.Cache(KeyValueCache.empty(*sizes, dtype))

    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
    ):
        """Class method used by ``nnx.view``.

        Args:
          deterministic: if True, no dropout.
          decode: if True, keeps keys and values; if False, drops them.
          batch_size: of the cache that is made, if this and max_length are given.
          max_length: tokens of each sequence that there is room for.
        """
        cache_checks.view(decode, batch_size=batch_size, max_length=max_length)
        if deterministic is not None:
            arguments.python_bools(deterministic=deterministic)
            self.deterministic = deterministic
        if decode is not None:
            arguments.python_bools(decode=decode)
            self.decode = decode
            self.cache = self.cache if decode else nnx.data(None)
        if batch_size is not None and max_length is not None:
            self.init_cache(batch_size, max_length)

    def merge_masks(
        self,
        attn_mask: ArrayLike | None,
        key_padding_mask: ArrayLike | None,
        query: ArrayLike,
    ) -> tuple[Array | None, int | None]:
        """Merges the masks; see `flax_mha.MultiheadAttention.merge_masks`."""
        layer.mergeable_masks(attn_mask, key_padding_mask, query)
        return _masks.merge(attn_mask, key_padding_mask, query, self.num_heads)

    def _declare(
        self,
        inits: dict[Kind, Initializer | None],
        metadata: dict[Kind, Metadata | None],
        device: Any,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the parameters."""
        params: dict[str, nnx.Param] = {}
        for name, spec in table_of(self, inits).items():
            value = spec.init(rngs.params(), spec.shape, self.param_dtype)
            own = given(metadata, spec.kind) or {}
            params[name] = _param(value, spec.axes, own, device)
        for name in _NAMES:
            setattr(self, name, params.get(name, nnx.data(None)))
        self.out_proj = _OutProjection(
            params["out_proj.weight"], params.get("out_proj.bias"), self.precision
        )

    def _parameters(self) -> dict[str, Array]:
        """Returns the parameters by PyTorch's name."""
        params = {name: getattr(self, name) for name in _NAMES}
        params["out_proj.weight"] = self.out_proj.weight
        params["out_proj.bias"] = self.out_proj.bias
        return {name: param[...] for name, param in params.items() if param is not None}

    def _rules(self) -> tuple[Any, ...]:
        """Returns what divides a call: the weights' own rules, then the context's."""
        own = getattr(self.out_proj.weight, "sharding_rules", None) or ()
        return (*own, *nn.get_logical_axis_rules())

    def _dropout(
        self, deterministic: bool | None, rngs: nnx.Rngs | nnx.RngStream | Array | None
    ) -> Dropout | None:
        rngs = self.rngs if rngs is None else rngs
        has_rng, how = rngs is not None, "mha(..., rngs=nnx.Rngs(dropout=0))"
        if not checks.drops_out(self, deterministic, has_rng=has_rng, how=how):
            return None
        if isinstance(rngs, nnx.Rngs):
            checks.streams(rngs, "dropout")
            rngs = rngs.dropout
        rng: Any = rngs() if isinstance(rngs, nnx.RngStream) else rngs
        what = "an nnx.Rngs, a stream of one, or a JAX random key"
        arguments.random_key("rngs", rng, what)
        return Dropout.from_rng(rng, self.dropout)


# Without those of the out-projection.
_NAMES = (
    *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("in_proj_bias", "bias_k", "bias_v"),
)


class _OutProjection(nnx.Module):
    def __init__(self, weight: nnx.Param, bias: nnx.Param | None, precision: Precision):
        self.weight = weight
        self.bias = nnx.data(bias)
        self.precision = precision

    def __call__(self, attended: OutHeads) -> Array:
        bias = None if self.bias is None else self.bias[...]
        with jax.named_scope("out_proj"):  # as linen does by itself
            return project_out(attended, self.weight[...], bias, self.precision)


def _param(
    value: Any, axes: tuple[str, ...], metadata: Metadata, device: Any
) -> nnx.Param:
    """Returns a parameter with the names of its axes, placed where these say.

    Who gives `out_sharding` gets what nnx makes of it. Otherwise it is placed here: nnx
    would refuse names where there is no mesh, and names without a rule where there is.
    """
    if isinstance(value, nnx.VariableMetadata):
        metadata = {**value.metadata, **metadata}
        value = value.raw_value
    if device is not None:
        value = jax.device_put(value, device)
    if "out_sharding" in metadata:
        return nnx.Param(value, **metadata)
    rules = (*(metadata.get("sharding_rules") or ()), *_UNDIVIDED)
    if device is None and nnx.using_eager_sharding():
        value = place_by_names(value, axes, (*rules, *nn.get_logical_axis_rules()))
    defaults = dict(out_sharding=axes, eager_sharding=False)
    metadata = {**defaults, **metadata, "sharding_rules": rules}
    return nnx.Param(value, **metadata)


# Rules for names that nobody has a rule for, as nnx wants one for every name.
_UNDIVIDED = (("qkv", None), ("head_dim", None))
