"""Public names that are imported when they are first asked for."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` of a package (PEP 562).

    JAX takes most of a second to import, and what only looks into a file needs none.

    Args:
        package: Its `__name__`.
        names: For each of its modules, the names that the package takes from there; a
            module without any is itself such a name.
    """
    where = {name: module for module, listed in names.items() for name in listed}

    def get(name: str) -> Any:
        if name in where:
            module = importlib.import_module(f"{package}.{where[name]}")
            return getattr(module, name)
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listed() -> list[str]:
        public = [name for name in names if not name.startswith("_")]
        return sorted([*where, *public])

    return get, listed
