"""Pickles, read without importing or calling anything that they name.

A pickle is a program: it may name any function and call it. Here a name becomes a class
of its own that keeps what it is given and does nothing, but for the few names that
tensors consist of, which the caller knows.
"""

import collections
import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, ClassVar

Names = Mapping[tuple[str, str], Any]


class Inert(dict):
    """Stands for an object of a class that is not imported, or for a call's result.

    It is a dict of the items that the pickle sets, as many classes in checkpoints are.

    Attributes:
        named: The class or function, "argparse.Namespace" say.
        args: What it was to be called with.
        added: What was added to it, were it a list or set.
        state: What was to become its attributes, or None.
    """

    named = "?"
    args: tuple[Any, ...]
    added: list[Any]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> "Inert":
        made = super().__new__(cls)
        made.args, made.added, made.state = args, [], None
        return made

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key
    __eq__ = object.__eq__

    def __call__(self, *args: Any) -> "Inert":
        """A method of it, say: not called either."""
        return inert_class(f"{self.named}(...)")(*args)

    def append(self, value: Any) -> None:
        self.added.append(value)

    add = append

    def extend(self, values: Any) -> None:
        self.added.extend(values)

    def __repr__(self) -> str:
        return f"<{self.named}>"

    @property
    def attributes(self) -> dict[Any, Any]:
        return attributes(self.state)

    @property
    def inside(self) -> list[Any]:
        """All that it was given."""
        return [*self.args, *self.added, *self.keys(), *self.values(), self.state]


def attributes(state: Any) -> dict[Any, Any]:
    """Returns those that an object's state says, of slots too."""
    parts = state if isinstance(state, tuple) else (state,)
    dicts = [part for part in parts if isinstance(part, dict)]
    return {name: value for part in dicts for name, value in part.items()}


def ordered_dict(items: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    """Stands for collections.OrderedDict, which every dict is today."""
    made = collections.OrderedDict()
    for key, value in items:
        made[_key(key)] = value
    return made


def inert_class(named: str) -> type[Inert]:
    """Returns a class that stands for the one, or the function, of that name."""
    named = named if named.isprintable() else ascii(named)
    return type("Inert", (Inert,), {"named": named})


_KEYS = (str, bytes, int, float, type(None), Inert)
_MUCH = 2**20  # in bytes
# C's own would make memory for any number of a memo, however large.
_Python: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Bounded:
    """A file that makes no room for more than there is, whatever a pickle announces."""

    def __init__(self, file: IO[bytes]):
        self.readline = file.readline
        self._file = file

    def read(self, count: int) -> bytes:
        if count > _MUCH:
            here = self._file.tell()
            rest = self._file.seek(0, io.SEEK_END) - here
            self._file.seek(here)
            if count > rest:
                raise EOFError("it is cut off")
        return self._file.read(count)


class _Unpickler(_Python):
    dispatch: ClassVar = dict(_Python.dispatch)

    def __init__(self, file: IO[bytes], names: Names, persistent: Callable[[Any], Any]):
        super().__init__(_Bounded(file), encoding="latin1")  # Python 2's too
        self._names = names
        self._classes: dict[str, type[Inert]] = {}
        self.persistent_load = persistent

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        if (module, name) in self._names:
            return self._names[module, name]
        named = f"{module}.{name}"
        if named not in self._classes:
            self._classes[named] = inert_class(named)
        return self._classes[named]

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"it has the extension {code}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for at in range(0, len(items), 2):
            self.stack[-1][_key(items[at])] = items[at + 1]

    def load_bytearray8(self) -> None:
        """Reads what is there, before it makes room for it."""
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def load_empty_set(self) -> None:
        self.append(self.find_class("builtins", "set")())

    def load_frozenset(self) -> None:
        self.append(self.find_class("builtins", "frozenset")(self.pop_mark()))

    def load_build(self) -> None:
        """Gives an object its state; never by its own `__setstate__` or `__dict__`."""
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Inert):
            made.state = state
        elif hasattr(made, "build"):  # one of the caller's
            made.build(state)
        elif not isinstance(made, collections.OrderedDict):  # state_dict._metadata
            raise pickle.UnpicklingError(f"it gives a state to {type(made).__name__}")

    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.EMPTY_SET[0]: load_empty_set,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BUILD[0]: load_build,
    }


def _key(key: Any) -> Any:
    """Returns what can be a key; to hash tuples of tuples may take forever."""
    return key if isinstance(key, _KEYS) else inert_class(type(key).__name__)(key)


def _no_persistent(identity: Any) -> Any:
    raise pickle.UnpicklingError("it names what is not in it")


def unpickle(
    file: IO[bytes], names: Names, persistent: Callable[[Any], Any] = _no_persistent
) -> Any:
    """Returns the object of a pickle, and leaves the file behind its end.

    Args:
        names: What stands for a module's name: a type or function that is safe whatever
            it is called with. All others are `Inert`.
        persistent: Returns what a persistent id stands for.

    Raises:
        ValueError: It is no pickle, cut off or broken.
    """
    try:
        return _Unpickler(file, names, persistent).load()
    except OSError:
        raise
    except Exception as error:  # a broken pickle may raise anything
        text = str(error) or type(error).__name__
        raise ValueError(f"is a broken pickle: {text.splitlines()[0]:.200}") from error
