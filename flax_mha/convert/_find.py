"""Which attention layers a state_dict holds, told from its keys and shapes alone."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from flax_mha._params import parameter_table
from flax_mha.convert import _strict
from flax_mha.convert._arrays import Spec, is_floating, specs
from flax_mha.convert._rules import check_mapping

_LINEARS = {
    "in_proj_weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "q_proj_weight": ("q_proj.weight",),
    "k_proj_weight": ("k_proj.weight",),
    "v_proj_weight": ("v_proj.weight",),
    "in_proj_bias": ("q_proj.bias", "k_proj.bias", "v_proj.bias"),
}
# For each family, which of its names make a parameter of ours; those not listed, one
# of the same name. Several are the rows of one matrix, below each other.
_FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "torch": {},
    "linears": _LINEARS,
    "clip_pool": {
        **_LINEARS,
        "out_proj.weight": ("c_proj.weight",),
        "out_proj.bias": ("c_proj.bias",),
    },
    "timm": {
        "in_proj_weight": ("qkv.weight",),
        "in_proj_bias": ("qkv.bias",),
        "out_proj.weight": ("proj.weight",),
        "out_proj.bias": ("proj.bias",),
    },
}
# A layer, or what looks like one, is wherever one of these names is.
_SIGNS = {
    "in_proj_weight": "torch",
    "q_proj_weight": "torch",
    "in_proj_bias": "torch",
    "q_proj.weight": "linears",
    "qkv.weight": "timm",
}
# Names that only attention of other kinds has.
OTHER_KINDS = {
    "Wqkv.weight": "flash-attn's MHA",
    "c_attn.weight": "GPT-2's attention (some store its weights transposed)",
    "query_key_value.weight": "GPT-NeoX's attention, whose rows are in another order",
    "to_q.weight": "diffusers' Attention",
    "query.kernel": "Flax's MultiHeadDotProductAttention",
    "query.weight": "an attention as BERT's, whose output layer is elsewhere",
}
# Signs that say so only beside others: a query alone may be anything.
_ONLY_BESIDE = {"query.weight": ("key.weight", "value.weight")}
# What a family has beside the layer itself.
_BESIDE = {"clip_pool": {"positional_embedding"}}


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """One `torch.nn.MultiheadAttention`, or what computes the same, in a state_dict.

    Attributes:
        prefix: Its name in the model, "encoder.layers.0.self_attn" say; "" if the
            state_dict is the layer's own.
        family: How it is stored: "torch" (`in_proj_weight` or `q_proj_weight` ...),
            "linears" (`q_proj.weight`, ..., `out_proj.weight`, as fairseq, ESM and
            Hugging Face have them), "clip_pool" (CLIP's AttentionPool2d, `c_proj`) or
            "timm" (`qkv` and `proj`).
        embed_dim: Features of query.
        kdim: Features of key.
        vdim: Features of value.
        output_dim: Features of the output; `embed_dim` but in CLIP's AttentionPool2d.
        bias: Whether it has biases.
        add_bias_kv: Whether it has `bias_k` and `bias_v`.
        dtype: Of its weights.
        keys: For each parameter of `MultiheadAttention`, by its dotted name, the names
            in the state_dict of the tensors whose rows it has, one below the other.
    """

    prefix: str
    family: str
    embed_dim: int
    kdim: int
    vdim: int
    output_dim: int
    bias: bool
    add_bias_kv: bool
    dtype: np.dtype
    keys: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class LookAlike:
    """What has some of the names of an attention layer, but is not one.

    Attributes:
        prefix: Its name in the model.
        keys: Its names in the state_dict.
        reason: What is not as in a `torch.nn.MultiheadAttention`.
    """

    prefix: str
    keys: tuple[str, ...]
    reason: str


def find_layers(state_dict: Mapping[str, Any]) -> list[AttentionLayer]:
    """Returns every multi-head attention of a model, in the order of its state_dict.

    Reads no tensor: names, shapes and dtypes must say it all. Code that leaves no
    tensor cannot be seen in them, such as rotary positions or another scale.

    Args:
        state_dict: Name to tensor or array, a `Checkpoint` say.

    Raises:
        TypeError: `state_dict` is not a mapping of names to tensors.
    """
    found = _examine_all(state_dict)
    return [layer for layer in found if isinstance(layer, AttentionLayer)]


def find_look_alikes(state_dict: Mapping[str, Any]) -> list[LookAlike]:
    """Returns what `find_layers` leaves out, though it has names of such a layer.

    Among them are layers that have only some biases (Whisper's `k_proj`, timm's
    `qkv_bias=False`). Zeros would compute the same, but trained, they could not go
    back: add them to the state_dict to convert such a layer all the same.

    Args:
        state_dict: Name to tensor or array, a `Checkpoint` say.

    Raises:
        TypeError: `state_dict` is not a mapping of names to tensors.
    """
    found = _examine_all(state_dict)
    return [layer for layer in found if isinstance(layer, LookAlike)]


def _examine_all(
    state_dict: Mapping[str, Any],
) -> Iterator[AttentionLayer | LookAlike]:
    check_mapping(state_dict)
    tensors = specs(state_dict)
    signs = [*_SIGNS, *OTHER_KINDS]
    below: dict[str, dict[str, Spec]] = {
        name.removesuffix(sign).removesuffix("."): {}
        for name in tensors
        for sign in signs
        if f".{name}".endswith(f".{sign}")
        and all(
            name.removesuffix(sign) + other in tensors
            for other in _ONLY_BESIDE.get(sign, ())
        )
    }
    for name, spec in tensors.items():
        for prefix in _ancestors(name):
            if prefix in below:
                below[prefix][name.removeprefix(prefix).removeprefix(".")] = spec
    return (_examine(prefix, below[prefix]) for prefix in below)


def _ancestors(name: str) -> Iterator[str]:
    yield ""
    for at, letter in enumerate(name):
        if letter == ".":
            yield name[:at]


def _examine(prefix: str, below: Mapping[str, Spec]) -> AttentionLayer | LookAlike:
    """Compares what is below a prefix with the layer that it comes closest to."""
    family = next((family for sign, family in _SIGNS.items() if sign in below), None)
    if family is None:
        sign = next(sign for sign in OTHER_KINDS if sign in below)
        return _look_alike(prefix, below, f"{sign} belongs to {OTHER_KINDS[sign]}")
    if family == "linears" and "c_proj.weight" in below:
        family = "clip_pool"
    beside = _BESIDE.get(family, ())
    shapes = {name: spec.shape for name, spec in below.items() if name not in beside}
    sizes = _sizes(family, shapes)
    if sizes is None:
        return _look_alike(prefix, below, "no weight tells its embed_dim")
    rows = _rows(family, sizes, shapes)
    wanted = {name: shape for named in rows.values() for name, shape in named.items()}
    wrong = _strict.lines(_strict.differences(shapes, wanted))
    wrong = wrong or _strict.lines({"of other dtypes": _wrong_dtypes(rows, below)})
    if wrong:
        own = [name for name in below if name in wanted]
        return _look_alike(prefix, own, "; ".join(wrong))
    weight = "in_proj_weight" if "in_proj_weight" in rows else "q_proj_weight"
    return AttentionLayer(
        prefix=prefix,
        family=family,
        **sizes,
        bias="in_proj_bias" in rows,
        add_bias_kv="bias_k" in rows,
        dtype=np.dtype(below[next(iter(rows[weight]))].dtype),
        keys={param: _full(prefix, named) for param, named in rows.items()},
    )


def _look_alike(prefix: str, names: Iterable[str], reason: str) -> LookAlike:
    return LookAlike(prefix, _full(prefix, names), reason)


def _full(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" if prefix else name for name in names)


def _sizes(family: str, shapes: Mapping[str, _strict.Shape]) -> dict[str, int] | None:
    """Returns embed_dim, kdim, vdim and output_dim; None if no weight tells them."""

    def matrix(*params: str) -> _strict.Shape:
        names = [_FAMILIES[family].get(param, (param,))[-1] for param in params]
        return next((s for n in names if len(s := shapes.get(n, ())) == 2), ())

    # The rows of in_proj_weight say nothing: other layers have fewer under that name.
    out = matrix("out_proj.weight")
    columns = out or matrix("q_proj_weight", "in_proj_weight")
    if 0 in (columns or (0,)):
        return None
    embed_dim = columns[-1]
    return dict(
        embed_dim=embed_dim,
        kdim=(matrix("k_proj_weight") or (embed_dim,))[-1],
        vdim=(matrix("v_proj_weight") or (embed_dim,))[-1],
        output_dim=out[0] if out and family == "clip_pool" else embed_dim,
    )


def _rows(
    family: str, sizes: Mapping[str, int], shapes: Mapping[str, _strict.Shape]
) -> dict[str, dict[str, _strict.Shape]]:
    """Returns for each parameter of ours the family's names and their shapes."""

    def names(param: str) -> tuple[str, ...]:
        return _FAMILIES[family].get(param, (param,))

    def has(*params: str) -> bool:
        return any(name in shapes for param in params for name in names(param))

    table = parameter_table(
        sizes["embed_dim"],
        1,  # the number of heads changes none of PyTorch's shapes
        kdim=sizes["kdim"],
        vdim=sizes["vdim"],
        bias=has("in_proj_bias", "out_proj.bias"),
        add_bias_kv=has("bias_k", "bias_v"),
    )
    rows = {}
    for param, spec in table.items():
        first, *rest = spec.torch_shape
        if param.startswith("out_proj."):
            first = sizes["output_dim"]
        shape = (first // len(names(param)), *rest)
        rows[param] = dict.fromkeys(names(param), shape)
    return rows


def _wrong_dtypes(
    rows: Mapping[str, Mapping[str, Any]], below: Mapping[str, Spec]
) -> list[str]:
    """Lists tensors of integers, and those of one parameter that differ."""
    wrong = []
    for named in rows.values():
        dtypes = {name: below[name].dtype for name in named}
        floating = all(map(is_floating, dtypes.values()))
        if not floating or len(set(dtypes.values())) > 1:
            wrong += [f"{name} {dtype}" for name, dtype in dtypes.items()]
    return wrong
