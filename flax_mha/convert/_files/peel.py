"""What PyTorch's users wrap a state_dict in, undone; each step is noted."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from flax_mha.convert._arrays import LazyArray, few, is_array
from flax_mha.convert._files.fold import fold_quantizable, fold_weight_norm

_WRAPPERS = {
    *("state_dict", "model", "module", "model_state_dict", "model_state", "net"),
    *("network", "params", "weights"),
}
_AVERAGE = re.compile(r"(?:^|[^a-z])(?:ema|swa|averaged?|shadow)(?:$|[^a-z])", re.I)
# What torch.compile and FSDP put into names, wherever the module is that they wrap.
_INSERTED = re.compile(
    r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
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
            or a parametrization is unknown.
    """
    arrays, notes = _unwrap(content, wrapper, path)
    for step in (_without_prefixes, fold_weight_norm, fold_quantizable):
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
        chosen.append(key)
        beside = [other for other in content if other != key]
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
    others = [name for name, value in content.items() if not is_array(value)]
    if others:
        notes.append(f"Left out, as they are no tensors: {few(others)}.")
    arrays = {name: value for name, value in content.items() if is_array(value)}
    if not all(isinstance(name, str) for name in arrays):
        raise no_state_dict(path, f"names that are no strings: {few(arrays)}")
    return arrays, notes


def _inner(content: Mapping[Any, Any], wrapper: str | None, path: pathlib.Path) -> Any:
    """Returns the key of the mapping to go into; None if the tensors are here."""
    holding = [key for key, value in content.items() if _holds_arrays(value)]
    if wrapper in holding:
        return wrapper
    known = [key for key in holding if _is_wrapper(key)]
    if not known and any(map(is_array, content.values())):
        return None
    candidates = known or holding
    if not candidates:
        raise no_state_dict(path, f"a mapping with keys {list(content)[:8]}")
    plain = [key for key in candidates if not _AVERAGE.search(str(key))] or candidates
    if len(plain) > 1:
        raise ValueError(
            f"{str(path)!r} holds several state_dicts, {few(plain)}: choose one with "
            "`wrapper`."
        )
    return plain[0]


def _is_wrapper(key: Any) -> bool:
    return key in _WRAPPERS or bool(_AVERAGE.search(str(key)))


def _holds_arrays(value: Any) -> bool:
    return isinstance(value, Mapping) and any(
        is_array(inner) or (_is_wrapper(key) and _holds_arrays(inner))
        for key, inner in value.items()
    )


def _without_prefixes(arrays: dict[str, LazyArray]) -> tuple[dict[str, LazyArray], str]:
    names = {name: _peeled(name) for name in arrays}
    while _all_begin_with_module(names.values()):
        names = {
            name: _peeled(ours.removeprefix("module."))
            for name, ours in names.items()
            if ours != _COUNTER
        }
    theirs: dict[str, str] = {}
    for name, ours in names.items():
        if ours in theirs:
            raise ValueError(
                f"{theirs[ours]!r} and {name!r} are both {ours!r} without the "
                "prefixes that wrappers add."
            )
        theirs[ours] = name
    changed = [name for name, ours in names.items() if name != ours]
    note = f"Prefixes of wrappers peeled off {len(changed)} names: {few(changed, 2)}."
    return {
        ours: arrays[name] for ours, name in theirs.items()
    }, note if changed else ""


def _peeled(name: str) -> str:
    while (peeled := _INSERTED.sub(r"\1", name)) != name:
        name = peeled
    return name


def _all_begin_with_module(names: Any) -> bool:
    others = [name for name in names if name != _COUNTER]
    return bool(others) and all(name.startswith("module.") for name in others)
