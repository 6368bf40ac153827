"""One error that lists everything that is wrong, instead of the first thing."""

from collections.abc import Iterable, Mapping

from flax_mha.convert._arrays import Spec

Shape = tuple[int, ...]


def differences(
    shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]
) -> dict[str, list[str]]:
    """Returns by title which names are missing, unexpected and misshapen."""
    return {
        "missing": [
            f"{name} {shape}" for name, shape in wanted.items() if name not in shapes
        ],
        "unexpected": [
            f"{name} {shape}" for name, shape in shapes.items() if name not in wanted
        ],
        "misshapen": [
            f"{name} {shapes[name]}, wanted {shape}"
            for name, shape in wanted.items()
            if shapes.get(name, shape) != shape
        ],
    }


def spec_differences(
    specs: Mapping[str, Spec],
    wanted: Mapping[str, Spec],
) -> dict[str, list[str]]:
    """Returns the same, and which names are of another dtype."""
    return differences(
        {name: spec.shape for name, spec in specs.items()},
        {name: spec.shape for name, spec in wanted.items()},
    ) | {
        "of another dtype": [
            f"{name} {specs[name].dtype}, wanted {spec.dtype}"
            for name, spec in wanted.items()
            if name in specs and specs[name].dtype != spec.dtype
        ]
    }


def lines(titled: Mapping[str, Iterable[str]]) -> list[str]:
    """Returns "title: item; item" for each list that is not empty."""
    return [f"{title}: {'; '.join(items)}" for title, items in titled.items() if items]


def raise_if_any(
    what: str, titled: Mapping[str, Iterable[str]], hint: str = ""
) -> None:
    """Raises a ValueError of `what`, the lists and the hint, if a list has an item."""
    listed = lines(titled)
    names = [*titled.get("missing", ()), *titled.get("unexpected", ())]
    if any(name.startswith("params/") for name in names):
        hint += "\n  Did you pass variables instead of variables['params']?"
    if listed:
        raise ValueError("\n  ".join([f"{what}, but", *listed]) + hint)
