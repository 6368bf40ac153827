"""A whole model: each tensor of its state_dict to a parameter in Flax's tree."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax_mha.convert._conversion import Conversion, Place
from flax_mha.convert._draft import draft_tree
from flax_mha.convert._heads import Heads


def convert_tree(
    state_dict: Mapping[str, Any],
    num_heads: Heads = None,
    *,
    place: Place | None = None,
    **plan: Any,
) -> dict[str, Any]:
    """Returns the Flax parameters of a whole model.

    Short for `plan_tree(...).params(state_dict, place)`; keep the plan to go back or
    to verify.

    Args:
        state_dict: PyTorch's name to tensor or array; a `Checkpoint` is read tensor by
            tensor.
        num_heads: As `plan_tree`.
        place: Called for each parameter with its path, the logical names of its axes,
            and its shape and dtype; returns the sharding to put it on. See
            `Conversion.params`.
        **plan: The other arguments of `plan_tree`.

    Raises:
        ValueError: As `plan_tree`.
    """
    return plan_tree(state_dict, num_heads, **plan).params(state_dict, place)


def plan_tree(
    state_dict: Mapping[str, Any],
    num_heads: Heads = None,
    *,
    prefix: str = "",
    rename: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    target: Mapping[str, Any] | None = None,
    stack: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Conversion:
    """Plans how a model's state_dict becomes Flax parameters; reads no tensor.

    Attention layers become those of `MultiheadAttention`. Everywhere else, `weight` is
    named and turned as Flax has it:

    | in PyTorch | in Flax, and its name as a kind |
    |---|---|
    | Linear, Conv, ConvTranspose | "kernel": axes (..., in, out) |
    | Embedding | "embedding" |
    | LayerNorm, GroupNorm, RMSNorm, BatchNorm | "scale" |
    | anything else | "weight", as it is |

    (Flax's ConvTranspose needs `transpose_kernel=True` for it.) Shapes tell which it
    is, but for a matrix without a bias, which may be a Linear's or an Embedding's; for
    three axes, which a Conv1d has and a Bilinear; for a weight (1, features, 1, 1), of
    a LayerNorm2d or a Conv2d; for what does not fit its bias, as GPT-2's Conv1D, which
    is stored transposed; and for what only looks like an attention layer, with all that
    lies below its name. Those need `kinds` or a `target`, and so do integers, which may
    be no parameters at all. Other parameters keep name and shape. Lists are named as in
    Flax: "layers.0.linear1" becomes "layers_0/linear1".

    Biases that only some of a layer's projections have become zeros for the others.

    Patterns are regular expressions. But for `rename`'s, they must match whole names,
    as the state_dict has them, and one that decides nothing is an error.

    Args:
        state_dict: PyTorch's name to tensor or array, or to `jax.ShapeDtypeStruct`.
        num_heads: Of all attention layers; or {pattern of their prefixes: number}, of
            which the first counts; or a function of the `AttentionLayer`; or None, to
            read it from `config` where that leaves no doubt.
        prefix: Of the part to convert, "model.encoder" say; paths begin below it, and
            other names are left alone.
        rename: {pattern: replacement}, applied with `re.sub`, all in order, to the
            dotted name of each parameter in Flax, "encoder.layers.0.linear1.kernel",
            before its numbers are joined. (Stacked layers have no number.) It must
            change some name, and leave something between the dots of each.
        kinds: {pattern of module names: "kernel", "embedding", "scale" or "weight"};
            the first counts. "weight" also matches the names of other parameters, to
            say that they are wanted as they are. What is or looks like an attention
            layer, with a module that matches, is converted as its modules are.
            "attention" matches the names of attention layers, and says that their
            weights are wanted though they may compute more than their tensors show,
            rotary positions say (`AttentionLayer.unseen`, or `config` says so).
        ignore: Patterns of names to leave out, also on the way back. What only looks
            like an attention layer does not become one by it.
        target: What the tree must be: nested dicts of anything with shape and dtype, as
            `jax.eval_shape(model.init, ...)["params"]`. Where `kinds` says nothing, it
            also tells what kind a weight is.
        stack: Modules such as "encoder.layers" of which the numbered children, equal in
            all shapes, become one along a new first axis, as `flax.linen.scan` has it.
        config: What the model's config.json holds; that beside a `Checkpoint` if None.

    Raises:
        ValueError: Something is not known, and all of it is asked at once, each with
            what to say; or left over, missing, misshapen or of another dtype.
        TypeError: `state_dict` is not a mapping of names to tensors, `ignore` or
            `stack` is a string, or a number of heads is not an integer.
    """
    return draft_tree(
        state_dict,
        num_heads,
        prefix=prefix,
        rename=rename,
        kinds=kinds,
        ignore=ignore,
        target=target,
        stack=stack,
        config=config,
    ).finished()
