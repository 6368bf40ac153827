"""What PyTorch's users wrap a state_dict in, undone; each step is noted."""

import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from flax_mha.convert._arrays import LazyArray, few, is_array
from flax_mha.convert._files.fold import fold
from flax_mha.convert._files.nested import Module, flat, holds_tensors
from flax_mha.convert._files.quantized import (
    check_not_packed,
    fold_quantizable,
    fold_scales,
    with_packed_linears,
)
from flax_mha.convert._files.tensors import NoArray, NoValues
from flax_mha.convert._files.unpickle import Inert

_WRAPPERS = {
    *("state_dict", "model", "module", "model_state_dict", "model_state", "net"),
    *("network", "params", "weights"),
}
_DEPTH = 4  # of wrappers; a pickle may hold itself
_AVERAGE = re.compile(r"(?:^|[^a-z])(?:ema|swa|averaged?|shadow)(?:$|[^a-z])", re.I)
# What torch.compile and FSDP put into names, wherever the module is that they wrap.
_INSERTED = re.compile(
    r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_EXTRA = "_extra_state"  # whatever a module's get_extra_state returns
_COUNTER = "n_averaged"  # the one tensor of torch's AveragedModel beside its `module.`


def peel(
    content: Mapping[Any, Any], wrapper: str | None, path: pathlib.Path
) -> tuple[dict[str, LazyArray], list[str]]:
    """Returns a model's own tensors by its own names, and notes on what was undone.

    Args:
        content: Of a file: tensors, or mappings that hold them beside other things.
        wrapper: The key of the mapping to take, where there are several.
        path: What messages call the file.

    Raises:
        ValueError: There is no state_dict, or no single one; two names become the same;
            or a parametrization or quantization is unknown.
    """
    arrays, notes = _unwrap(content, wrapper, path)
    check_not_packed(arrays)
    for step in (_without_prefixes, fold, fold_scales, fold_quantizable):
        arrays, note = step(arrays)
        notes += [note] if note else []
    return arrays, notes


def no_state_dict(path: pathlib.Path, what: str) -> ValueError:
    return ValueError(f"{str(path)!r} must hold a state_dict of tensors, got {what}.")


def _unwrap(
    content: Mapping[Any, Any], wrapper: str | None, path: pathlib.Path
) -> tuple[dict[str, LazyArray], list[str]]:
    notes, chosen, there = [], [], []
    while (key := _inner(content, wrapper, path)) is not None:
        if len(chosen) == _DEPTH:
            raise no_state_dict(path, f"mappings in mappings: {few(chosen)}")
        chosen.append(key)
        beside = [
            _described(other, content[other]) for other in content if other != key
        ]
        rest = f", not {few(beside)}" if beside else ""
        notes.append(f"Taken from {key!r}{rest}.")
        holding = [other for other in content if _holds_arrays(content[other])]
        if len(holding) > 1:
            notes[-1] += f" Each of {few(holding)} may be the `wrapper`."
        there += holding
        content = content[key]
    if wrapper is not None and wrapper not in chosen:
        raise ValueError(
            f"wrapper must be a key of {str(path)!r} that holds a state_dict, "
            f"got {wrapper!r}; there are {few(there) or 'none'}."
        )
    if isinstance(content, Module):
        notes.append(f"The parameters and buffers of a pickled {content.named}.")
    arrays, more = _arrays(content, path)
    return arrays, notes + more


def _arrays(
    content: Mapping[Any, Any], path: pathlib.Path
) -> tuple[dict[str, LazyArray], list[str]]:
    """Returns the tensors among the items, those inside of others by longer names."""
    content, note = with_packed_linears(content)
    notes = [note] if note else []
    arrays, others, inside = {}, [], []
    for name, value in content.items():
        if str(name).rpartition(".")[2] == _EXTRA:
            others.append(_described(name, value))
        elif _is_tensor(value):
            arrays[name] = value
        elif not holds_tensors(value):
            others.append(_described(name, value))
        else:
            inside.append(name)
            arrays |= _flat(path, name, value)
    if inside:
        notes.append(f"Tensors found inside of {few(inside)}.")
    if others:
        notes.append(f"Left out, as they are no parameters: {few(others)}.")
    if not all(isinstance(name, str) for name in arrays):
        raise no_state_dict(path, f"names that are no strings: {few(arrays)}")
    _check_all_arrays(arrays, path)
    found = {name: _lazy(name, value) for name, value in arrays.items()}
    return {name: array for name, array in found.items() if array}, notes


def _lazy(name: str, value: Any) -> LazyArray | None:
    if isinstance(value, NoValues):
        return value.of_name(name)
    if not is_array(value):
        return None  # beside tensors in a container
    if isinstance(value, LazyArray):
        return value
    return LazyArray(value.shape, value.dtype, value.read)


def _flat(path: pathlib.Path, name: str, value: Any) -> dict[str, Any]:
    try:
        return flat(name, value)
    except ValueError as error:
        raise no_state_dict(path, f"{name}, which {error}") from error


def _check_all_arrays(values: Mapping[str, Any], path: pathlib.Path) -> None:
    """Refuses tensors that are no arrays, and what only its own code can take apart."""
    reasons: dict[str, list[str]] = {}
    for name, value in values.items():
        if isinstance(value, NoArray):
            reasons.setdefault(value.reason, []).append(name)
        elif not is_array(value) and holds_tensors(value):
            what = getattr(value, "named", type(value).__name__)
            reason = (
                f"is a {what} with tensors inside, which only its own code can read"
            )
            reasons.setdefault(reason, []).append(name)
    if reasons:
        listed = "; ".join(f"{few(names)} {why}" for why, names in reasons.items())
        raise ValueError(
            f"{str(path)!r} must hold plain tensors, but {listed}. Make plain tensors "
            "of them in PyTorch (`dequantize` what is quantized), and save again."
        )


def _described(name: Any, value: Any) -> str:
    """Returns a name, with the class of an object that was not made."""
    return f"{name} ({value.named})" if isinstance(value, Inert) else str(name)


def _inner(content: Mapping[Any, Any], wrapper: str | None, path: pathlib.Path) -> Any:
    """Returns the key of the mapping to go into; None if the tensors are here."""
    holding = [key for key, value in content.items() if _holds_arrays(value)]
    if wrapper in holding:
        return wrapper
    known = [key for key in holding if _is_wrapper(key)]
    if not known and any(map(_is_tensor, content.values())):
        return None
    candidates = known or holding
    if not candidates and holds_tensors(content):
        return None  # in containers, by longer names
    if not candidates:
        raise no_state_dict(path, f"a mapping with keys {list(content)[:8]}")
    plain = [key for key in candidates if not _AVERAGE.search(str(key))] or candidates
    if len(plain) > 1:
        raise ValueError(
            f"{str(path)!r} holds several state_dicts, {few(plain)}: choose one with "
            "`wrapper`."
        )
    return plain[0]


def _is_tensor(value: Any) -> bool:
    return is_array(value) or isinstance(value, NoArray)


def _is_wrapper(key: Any) -> bool:
    return key in _WRAPPERS or bool(_AVERAGE.search(str(key)))


def _holds_arrays(value: Any, depth: int = _DEPTH) -> bool:
    return isinstance(value, Mapping) and any(
        _is_tensor(inner)
        or (depth > 1 and _is_wrapper(key) and _holds_arrays(inner, depth - 1))
        for key, inner in value.items()
    )


def _without_prefixes(arrays: dict[str, LazyArray]) -> tuple[dict[str, LazyArray], str]:
    names = _without_averages({name: _peeled(name) for name in arrays})
    while _all_begin_with_module(names.values()):
        names = {
            name: _peeled(ours.removeprefix("module.")) for name, ours in names.items()
        }
    theirs: dict[str, str] = {}
    for name, ours in names.items():
        if ours in theirs:
            raise ValueError(
                f"{theirs[ours]!r} and {name!r} are both {ours!r} without the "
                "prefixes that wrappers add."
            )
        theirs[ours] = name
    changed = [name for name in arrays if names.get(name) != name]
    note = f"Prefixes of wrappers peeled off {len(changed)} names: {few(changed, 2)}."
    return {
        ours: arrays[name] for ours, name in theirs.items()
    }, note if changed else ""


def _without_averages(names: dict[str, str]) -> dict[str, str]:
    """Takes the counter and the "module." of each of torch's AveragedModels away."""
    counters = [name for name in names.values() if f".{name}".endswith(f".{_COUNTER}")]
    for counter in counters:
        prefix = counter.removesuffix(_COUNTER)
        start = f"{prefix}module."
        below = [n for n in names.values() if n.startswith(prefix) and n != counter]
        if below and all(name.startswith(start) for name in below):
            names = {
                name: prefix + ours.removeprefix(start)
                if ours.startswith(start)
                else ours
                for name, ours in names.items()
                if ours != counter
            }
    return names


def _peeled(name: str) -> str:
    while (peeled := _INSERTED.sub(r"\1", name)) != name:
        name = peeled
    return name


def _all_begin_with_module(names: Collection[str]) -> bool:
    return bool(names) and all(name.startswith("module.") for name in names)
