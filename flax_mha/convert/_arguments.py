"""What is checked of an argument alone; without JAX, which `inspect` does not start."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any


def check_state_dict(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict must map names to arrays, as module.state_dict() does, "
            f"got {type(state_dict)}."
        )
    for name in state_dict:
        check_kind("names in state_dict", name, str, "strings")


def check_tree(argument: str, tree: Any) -> None:
    check_kind(argument, tree, Mapping, "nested dicts of arrays")


def check_rules(argument: str, rules: Any) -> None:
    check_kind(argument, rules, Mapping | None, "a dict from patterns, or None")


def check_several(argument: str, value: Any, what: str) -> None:
    if isinstance(value, str):
        raise TypeError(f"{argument} must be several {what}, got the string {value!r}.")
    check_kind(argument, value, Iterable, f"several {what}")


def check_flags(**flags: Any) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}.")


def check_kind(argument: str, value: Any, kind: Any, what: str) -> None:
    """Checks that an argument is of this class, which is `what`."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument} must be {what}, got {type(value)}.")


def as_path(path: Any) -> pathlib.Path:
    try:
        return pathlib.Path(path)
    except TypeError:
        raise TypeError(
            f"path must be a string or a pathlib.Path, got {type(path)}."
        ) from None
