"""How a call is divided over a mesh: each device attends its own part.

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
from flax_mha._length import Length
from flax_mha._lowering import is_quantized
from flax_mha._typing import MeanWeights, OutHeads, Weighting, Weights

_Results = tuple[OutHeads, Weights | MeanWeights | None]

# What layouts call the axes that may be divided, in the words of rules.
_WORDS = {"batch": "batch", "heads": "heads", "tgt": "length", "src": "length"}


class Place(NamedTuple):
    """The mesh axes that divide the sequences of a call, its heads, and its length."""

    mesh: Any
    batch: _mesh.Axes
    heads: _mesh.Axes
    length: Length | None
    left_to_xla: _mesh.Axes  # Auto axes that no rule speaks of
    left_out: tuple[str, ...]  # in words: what rules say that cannot be
    gathered: tuple[str, ...] = ()  # in words: what types divide, and devices get whole

    @classmethod
    def of(
        cls, layout: Any, call: Call, *, weights: Weighting, implementation: str | None
    ) -> "Place | None":
        """Returns where a call is; None where nothing says how it is divided.

        Explicit axes are those of the types of query, key and value. Auto axes are
        those that rules give for "batch", "heads" and "length".

        Raises:
            ValueError: Explicit axes divide another axis than these, or the way that
                was named to attend a length cannot be.
        """
        mesh = _mesh.mesh_of(call.query)
        if mesh is None or _mesh.is_mapped_over():
            return None
        found = _explicit_axes(layout, call)
        if not _can_be_divided(mesh, found, call):
            return None
        ruled, left_out = _mesh.ruled_axes(mesh), []
        if not mesh.explicit_axes and not ruled:
            return None
        for name, size in zip(found, call.logits, strict=True):
            if name in (*layout.rows, *layout.columns):
                axes, why_not = _mesh.by_rules(_WORDS[name], size, mesh)
                found[name] += axes
                left_out += [why_not] if why_not else []
        left = tuple(axis for axis in mesh.auto_axes if axis not in ruled)
        place = cls(mesh, found["batch"], found["heads"], None, left, tuple(left_out))
        place = place._with_length(found, layout, call, weights, implementation)
        return place._replace(gathered=place._gathered(layout, call))

    def _with_length(self, found, layout, call, weights, implementation) -> "Place":
        """Returns the place with the axes that divide the length, if any do."""
        taken = *self.batch, *self.heads
        both = found["tgt"] or found["src"]
        axes = tuple(axis for axis in both if axis not in taken)
        if not axes:
            return self
        no_rows, no_ring = None, None
        if layout.is_ragged:
            no_rows = "the tokens of RaggedArrays are one axis for all elements"
        if weights is not None:
            no_ring = (
                "a row of attention weights is of all keys: say need_weights=False"
            )
        if implementation == "reference":
            no_ring = "implementation='reference' keeps no sums of rows"
        length = Length.of(
            axes,
            self.parts(axes),
            call,
            has_queries=bool(found["tgt"]),
            has_keys=bool(found["src"]),
            heads=call.logits[1] // self.parts(self.heads),
            devices=self.parts(self.batch + self.heads),
            no_rows=no_rows,
            no_ring=no_ring,
        )
        if isinstance(length, Length):
            return self._replace(length=length)
        if set(axes).intersection(_mesh.explicit_spec(call.query)[1]):
            raise ValueError(
                f"explicit mesh axes {axes} divide the length, and cannot: {length}. "
                "Use jax.sharding.reshard before."
            )
        why = f"length over mesh axes {axes}: {length}"
        return self._replace(left_out=(*self.left_out, why))

    def _gathered(self, layout: Any, call: Call) -> tuple[str, ...]:
        found = []

        def compare(path, x, spec):
            kept = {axis for axes in spec for axis in _mesh.as_tuple(axes)}
            divided = _mesh.explicit_spec(x) if np.ndim(x) else ()
            axes = tuple(a for axes in divided for a in axes if a not in kept)
            if axes:
                found.append(f"{path[0].name} over {axes}")

        _, specs = self._specs(layout, call)
        jax.tree_util.tree_map_with_path(compare, call, specs)
        if self.length is not None and self.length.way == "all_gather":
            found.append(f"key and value over {self.length.axes}")
        return tuple(found)

    def attend(
        self,
        attend: Callable[[Any, Any, Call], _Results],
        options: Any,
        layout: Any,
        call: Call,
    ) -> _Results:
        """Returns `attend(options, layout, call)`, each device attending its part."""
        heads = self._axes(attended=True)["heads"]
        call = call.repeated(layout.columns.index("heads"), self.parts(heads))
        args = jax.tree.map(self._put, (layout, call), self._specs(layout, call))
        # What is quantized must not be kept for others.
        run = _attend_parts if is_quantized() else _compiled_parts
        out, weights = run(self, attend, options, *args)
        of_queries = _mesh.explicit_spec(call.query)[1]
        if self.length is not None and not set(self.length.axes) & set(of_queries):
            # Keys alone were divided by types: the result is whole, as queries are.
            spec = [
                tuple(axis for axis in axes if axis not in self.length.axes)
                for axes in _mesh.explicit_spec(out)
            ]
            out = _mesh.resharded(out, spec, self.mesh)
        return out, weights

    def part(self, call: Call) -> Part:
        """Returns what part of all the call this is, inside `jax.shard_map`."""
        batch, heads, tgt_len, _ = call.logits
        by_heads = self._axes(attended=True)["heads"]
        part = Part(
            sequence=lax.axis_index(self.batch) * batch,
            head=lax.axis_index(by_heads) * heads,
            num_heads=np.asarray(heads * self.parts(by_heads), np.int32),
        )
        if self.length is None or self.length.way != "all_gather":
            return part
        total = np.asarray(tgt_len * self.length.parts, np.int32)
        return part._replace(rows=self.length.rows(tgt_len), tgt_len=total)

    @property
    def divided(self) -> dict[str, _mesh.Axes]:
        """Returns the axes by the words of rules."""
        length = () if self.length is None else self.length.axes
        return dict(batch=self.batch, heads=self.heads, length=length)

    def parts(self, axes: _mesh.Axes) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _axes(self, *, attended: bool) -> dict[str, _mesh.Axes]:
        """Returns how axes are divided of what is attended, or else of what comes."""
        axes, length = dict(batch=self.batch, heads=self.heads), self.length
        if length is None:
            return axes
        if not attended:
            return axes | dict(tgt=length.axes, src=length.axes)
        if length.way == "ulysses":
            return axes | dict(heads=self.heads + length.axes)
        return axes | dict(tgt=length.axes)

    def _spec(
        self,
        names: Sequence[str | None],
        shape: Sequence[int],
        *,
        attended: bool = True,
    ) -> jax.P:
        """Returns how an array is divided whose first axes have these names."""
        divided = self._axes(attended=attended)

        def axes(name, size):
            axes = divided.get(name, ())
            # What an axis has only one of is the same for all.
            return () if size % self.parts(axes) else axes

        return jax.P(*map(axes, names, shape))

    def _specs(self, layout: Any, call: Call) -> tuple[Any, Call]:
        """Returns how all arrays are divided, as a tree like that of the arguments."""
        length = self.length

        def spec(*names: str | None, **options: Any) -> Callable[[Any], Any]:
            return lambda x: self._spec(names, x.shape, **options)

        of_queries = spec(*layout.rows, attended=not (length and length.has_queries))
        of_keys = spec(*layout.columns, attended=not (length and length.has_keys))
        whole = jax.tree.map(lambda x: jax.P(), call)
        return jax.tree.map(spec(*layout.own), layout), whole._replace(
            query=of_queries(call.query),
            key=of_keys(call.key),
            value=of_keys(call.value),
            mask=call.mask.map(spec("batch", "heads", "tgt")),
            extra=jax.tree.map(spec(None, "heads"), call.extra),
        )

    def _put(self, x: Any, spec: jax.P) -> Any:
        if not np.ndim(x):
            return x
        axes = *map(_mesh.as_tuple, spec), *[()] * (np.ndim(x) - len(spec))
        return _mesh.resharded(x, axes, self.mesh)


def _attend_parts(place, attend, options, layout, call):
    length, by_heads = place.length, place._axes(attended=True)["heads"]

    def one_part(layout, call):
        if length is not None:
            call = length.enter(call)
        dropout = call.dropout
        if dropout is not None:
            dropout = dataclasses.replace(dropout, part=place.part(call))
        out, weights = attend(options, layout, call._replace(dropout=dropout))
        if options.weights == "mean" and by_heads:
            weights = lax.pmean(weights, by_heads)
        if length is None:
            return out, weights
        return length.leave(out), length.leave_weights(weights)

    batch, heads, tgt_len, _ = call.logits
    weights = ("batch", "heads", "tgt"), (batch, heads, tgt_len)
    if options.weights == "mean":
        weights = ("batch", "tgt"), (batch, tgt_len)
    in_specs = place._specs(layout, call)
    out_specs = in_specs[1].query, place._spec(*weights)
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


def _explicit_axes(layout: Any, call: Call) -> dict[str, _mesh.Axes]:
    """Returns the explicit mesh axes that divide the axes of a call's logits."""
    found: dict[str, _mesh.Axes] = dict(batch=(), heads=(), tgt=(), src=())
    for argument in ("query", "key", "value"):
        names = layout.rows if argument == "query" else layout.columns
        spec = _mesh.explicit_spec(getattr(call, argument))
        for name, axes in zip(names, spec, strict=True):
            if axes and name not in found:
                raise ValueError(_indivisible(argument, spec, names))
            if axes:
                found[name] = found[name] or axes
    return found


def _can_be_divided(mesh: Any, found: dict[str, _mesh.Axes], call: Call) -> bool:
    """Whether `jax.shard_map` can be here; raises where types need it."""
    divided = {_WORDS[name]: axes for name, axes in found.items() if axes}
    if mesh.manual_axes:  # it is in another already: JAX cannot differentiate that
        if divided:
            raise ValueError(
                f"explicit mesh axes divide the call, {divided}, inside a "
                f"jax.shard_map over {mesh.manual_axes} only: leave its axis_names "
                "out, so that it is over all axes, or call the layer outside of it."
            )
        return False
    if not all(isinstance(size, int) for size in call.logits):
        # Exported with it inside, a program could not be called.
        if divided:
            raise ValueError(
                "all sizes must be known where explicit mesh axes divide the call, "
                f"{divided}; got {call.logits} (batch, heads, tgt, src): export it "
                "without a mesh."
            )
        return False
    return True


def _indivisible(argument: str, spec: Any, names: Sequence[str | None]) -> str:
    *words, last = [_WORDS[name] for name in names if name]
    allowed = f"{', '.join(words)} and {last}"
    shape = "(batch, length, heads, head_dim)"
    return (
        f"{argument} must be divided over {allowed} only, but explicit mesh axes "
        f"divide it, {shape}, as {_mesh.partition_spec(spec)}: "
        "use jax.sharding.reshard before."
    )
