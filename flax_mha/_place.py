"""How a call is divided over a mesh: each device attends its own sequences and heads.

Inside `jax.shard_map` no kernel need know of meshes, and all derivatives are right:
the gradient of what devices share becomes a sum over them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from flax_mha import _mesh
from flax_mha._call import Call
from flax_mha._dropout import Part
from flax_mha._lowering import is_quantized
from flax_mha._typing import MeanWeights, OutHeads, Weights

_Results = tuple[OutHeads, Weights | MeanWeights | None]


class Place(NamedTuple):
    """The mesh axes that divide the sequences of a call, and its heads."""

    mesh: Any
    batch: _mesh.Axes
    heads: _mesh.Axes
    left_to_xla: _mesh.Axes  # Auto axes that no rule speaks of
    left_out: tuple[str, ...]  # in words: what rules say that cannot be

    @classmethod
    def of(cls, layout: Any, call: Call) -> "Place | None":
        """Returns where a call is; None where nothing says how it is divided.

        Explicit axes are those of the types of query, key and value. Auto axes are
        those that rules give for "batch" and "heads".

        Raises:
            ValueError: Explicit axes divide another axis than these.
        """
        mesh = _mesh.mesh_of(call.query)
        if mesh is None or _mesh.is_mapped_over():
            return None
        found: dict[str, _mesh.Axes] = dict(batch=(), heads=())
        for argument in ("query", "key", "value"):
            names = layout.rows if argument == "query" else layout.columns
            spec = _mesh.explicit_spec(getattr(call, argument))
            for name, axes in zip(names, spec, strict=True):
                if axes and name not in found:
                    raise ValueError(_indivisible(argument, spec, names))
                if axes:
                    found[name] = found[name] or axes
        if mesh.manual_axes:  # `jax.shard_map` in another: JAX cannot differentiate it
            if any(found.values()):
                raise ValueError(
                    f"explicit mesh axes divide the call, {found}, inside a "
                    f"jax.shard_map over {mesh.manual_axes} only: leave its axis_names "
                    "out, so that it is over all axes, or call the layer outside of it."
                )
            return None
        if not all(isinstance(size, int) for size in call.logits):
            # Exported with `jax.shard_map` inside, it could not be called.
            if any(found.values()):
                raise ValueError(
                    "all sizes must be known where explicit mesh axes divide the call, "
                    f"{found}; got {call.logits} (batch, heads, tgt, src): export it "
                    "without a mesh."
                )
            return None
        ruled, left_out = _mesh.ruled_axes(mesh), []
        if not mesh.explicit_axes and not ruled:
            return None
        for name, size in zip(found, call.logits, strict=False):
            if name in layout.rows:
                axes, why_not = _mesh.by_rules(name, size, mesh)
                found[name] += axes
                left_out += [why_not] if why_not else []
        left = tuple(axis for axis in mesh.auto_axes if axis not in ruled)
        return cls(mesh, **found, left_to_xla=left, left_out=tuple(left_out))

    def attend(
        self,
        attend: Callable[[Any, Any, Call], _Results],
        options: Any,
        layout: Any,
        call: Call,
    ) -> _Results:
        """Returns `attend(options, layout, call)`, each device attending its part."""
        args = jax.tree.map(self._put, (layout, call), self._specs(layout, call))
        # What is quantized must not be kept for others.
        run = _attend_parts if is_quantized() else _compiled_parts
        return run(self, attend, options, *args)

    def part(self, call: Call) -> Part:
        """Returns what part of all the call this is, inside `jax.shard_map`."""
        batch, heads, _, _ = call.logits
        return Part(
            sequence=lax.axis_index(self.batch) * batch,
            head=lax.axis_index(self.heads) * heads,
            num_heads=np.asarray(heads * self.parts(self.heads), np.int32),
        )

    def spec(self, names: Sequence[str | None], shape: Sequence[int]) -> jax.P:
        """Returns how an array is divided whose first axes have these names."""

        def axes(name, size):
            divided = dict(batch=self.batch, heads=self.heads).get(name, ())
            # What an axis has only one of is the same for all.
            return () if size % self.parts(divided) else divided

        return jax.P(*map(axes, names, shape))

    def parts(self, axes: _mesh.Axes) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _specs(self, layout: Any, call: Call) -> tuple[Any, Call]:
        """Returns how all arrays are divided, as a tree like that of the arguments."""

        def divided(*names: str | None) -> Callable[[Any], Any]:
            return lambda x: self.spec(names, x.shape)

        whole = jax.tree.map(lambda x: jax.P(), call)
        return jax.tree.map(divided(*layout.own), layout), whole._replace(
            query=divided(*layout.rows)(call.query),
            key=divided(*layout.columns)(call.key),
            value=divided(*layout.columns)(call.value),
            mask=call.mask.map(divided("batch", "heads")),
            extra=jax.tree.map(divided(None, "heads"), call.extra),
        )

    def _put(self, x: Any, spec: jax.P) -> Any:
        if not np.ndim(x):
            return x
        axes = *map(_mesh.as_tuple, spec), *[()] * (np.ndim(x) - len(spec))
        return _mesh.resharded(x, axes, self.mesh)


def _attend_parts(place, attend, options, layout, call):
    def one_part(layout, call):
        dropout = call.dropout
        if dropout is not None:
            dropout = dataclasses.replace(dropout, part=place.part(call))
        out, weights = attend(options, layout, call._replace(dropout=dropout))
        if options.weights == "mean" and place.heads:
            weights = lax.pmean(weights, place.heads)
        return out, weights

    names = ("batch", "heads") if options.weights == "heads" else ("batch",)
    in_specs = place._specs(layout, call)
    out_specs = in_specs[1].query, place.spec(names, call.logits)
    manual = set(place.mesh.axis_names).difference(place.left_to_xla)
    return jax.shard_map(
        one_part,
        mesh=place.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        # If empty, all but those that `jax.vmap` is over.
        axis_names=manual if place.left_to_xla else set(),
    )(layout, call)


# Or eager calls would be compiled anew.
_compiled_parts = jax.jit(_attend_parts, static_argnums=(0, 1, 2))


def _indivisible(argument: str, spec: Any, names: Sequence[str | None]) -> str:
    allowed = " and ".join(name for name in names if name)
    shape = "(batch, length, heads, head_dim)"
    return (
        f"{argument} must be divided over {allowed} only, but explicit mesh axes "
        f"divide it, {shape}, as {_mesh.partition_spec(spec)}: "
        "use jax.sharding.reshard before."
    )
