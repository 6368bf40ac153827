"""The parameter table: PyTorch's names and bytes, reshaped so that heads are an axis.

The modules, the converter and the sharding rules read this table; nobody else knows a
parameter's shape. Nothing is ever transposed, so converting is a view. JAX is imported
where a parameter is made: who only looks into a file needs none.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from flax.typing import Initializer

SEPARATE_WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")

# What the modules' `..._init` and `..._metadata` arguments are for.
Kind = Literal["kernel", "bias", "bias_kv", "out_kernel", "out_bias"]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: how PyTorch shapes it, how we do, and how it starts."""

    kind: Kind
    torch_shape: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # one logical name for each axis of `shape`
    init: "Initializer"


def uniform(bound: float) -> "Initializer":
    def init(rng, shape, dtype=np.float32, out_sharding=None):
        import jax

        return jax.random.uniform(
            rng, shape, dtype, -bound, bound, out_sharding=out_sharding
        )

    return init


def zeros(rng, shape, dtype=np.float32, out_sharding=None):
    import jax

    return jax.nn.initializers.zeros(rng, shape, dtype, out_sharding)


def normal(deviation: float) -> "Initializer":
    def init(rng, shape, dtype=np.float32, out_sharding=None):
        import jax

        return jax.nn.initializers.normal(deviation)(rng, shape, dtype, out_sharding)

    return init


def xavier_uniform(rows: int, columns: int) -> "Initializer":
    """Glorot and Bengio's uniform initialiser for PyTorch's (rows, columns) matrix.

    The fans are those of the matrix as PyTorch stores it: the packed (3E, E) matrix
    starts smaller than three separate (E, E) ones would.
    """
    return uniform(math.sqrt(6 / (rows + columns)))


def parameter_table(
    embed_dim: int,
    num_heads: int,
    *,
    kdim: int | None = None,
    vdim: int | None = None,
    bias: bool = True,
    add_bias_kv: bool = False,
    packed: bool | None = None,
) -> dict[str, ParamSpec]:
    """Returns PyTorch's parameters by name, in the order of its state_dict.

    Args:
        packed: Whether the weights of the in-projection are one, `in_proj_weight`;
            None: as in PyTorch, if all three have the same shape.
    """
    kdim = embed_dim if kdim is None else kdim
    vdim = embed_dim if vdim is None else vdim
    packed = kdim == vdim == embed_dim if packed is None else packed
    head_dim = embed_dim // num_heads
    heads = (num_heads, head_dim)

    def projection(features: int) -> ParamSpec:
        return ParamSpec(
            kind="kernel",
            torch_shape=(embed_dim, features),
            shape=(*heads, features),
            axes=("heads", "head_dim", "embed"),
            init=xavier_uniform(embed_dim, features),
        )

    table = {}
    if packed:
        table["in_proj_weight"] = ParamSpec(
            kind="kernel",
            torch_shape=(3 * embed_dim, embed_dim),
            shape=(3, *heads, embed_dim),
            axes=("qkv", "heads", "head_dim", "embed"),
            init=xavier_uniform(3 * embed_dim, embed_dim),
        )
    else:
        sources = (embed_dim, kdim, vdim)
        table.update(zip(SEPARATE_WEIGHTS, map(projection, sources), strict=True))
    if bias:
        table["in_proj_bias"] = ParamSpec(
            kind="bias",
            torch_shape=(3 * embed_dim,),
            shape=(3, *heads),
            axes=("qkv", "heads", "head_dim"),
            init=zeros,
        )
    if add_bias_kv:
        for name in ("bias_k", "bias_v"):
            table[name] = ParamSpec(
                kind="bias_kv",
                torch_shape=(1, 1, embed_dim),
                shape=heads,
                axes=("heads", "head_dim"),
                # torch.nn.init.xavier_normal_ of a (1, 1, E) tensor: both fans are E.
                init=normal(embed_dim**-0.5),
            )
    table["out_proj.weight"] = ParamSpec(
        kind="out_kernel",
        torch_shape=(embed_dim, embed_dim),
        shape=(embed_dim, *heads),
        axes=("embed", "heads", "head_dim"),
        init=uniform(embed_dim**-0.5),  # torch.nn.Linear's own, not Xavier's
    )
    if bias:
        table["out_proj.bias"] = ParamSpec(
            kind="out_bias",
            torch_shape=(embed_dim,),
            shape=(embed_dim,),
            axes=("embed",),
            init=zeros,
        )
    return table


def map_with_specs(
    tree: Any,
    function: Callable[[Any, ParamSpec | None], Any],
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """Maps each leaf of a whole model's parameters, and its row of the table or None.

    Attention layers are known by the names and ranks of their parameters; they may be
    stacked, with their axes in front. The sizes in the rows do not matter.

    Raises:
        TypeError: A leaf has no shape.
    """
    import jax
    from flax.core import meta

    def each(path, leaf):
        array = leaf.value if isinstance(leaf, meta.Partitioned) else leaf
        if not hasattr(array, "shape"):
            raise TypeError(
                "a tree of parameters must have arrays for leaves, got "
                f"{type(leaf)} at {jax.tree_util.keystr(path)}."
            )
        return function(leaf, _spec(_name(path), len(array.shape)))

    return jax.tree.map_with_path(each, tree, is_leaf=is_leaf)


def _name(path: tuple[Any, ...]) -> str:
    """Returns PyTorch's name, of one or two keys."""
    keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    if keys and keys[-1] == "value":  # of an nnx.Variable
        keys.pop()
    start = -2 if keys[-2:-1] == ["out_proj"] else -1
    return ".".join(keys[start:])


def _spec(name: str, rank: int) -> ParamSpec | None:
    spec = _SPECS.get(name)
    # "out_proj.weight" is a name that others use, too.
    return spec if spec is not None and rank >= len(spec.axes) else None


_SPECS = parameter_table(1, 1, packed=False, add_bias_kv=True) | parameter_table(1, 1)
