"""What kind of parameter each tensor is, and so how its axes go."""

import math
import re
from collections.abc import Container, Iterable, Mapping

from flax_mha.convert._arrays import Spec, is_floating
from flax_mha.convert._find import LookAlike
from flax_mha.convert._names import Names
from flax_mha.convert._questions import IGNORE, KINDS, Question
from flax_mha.convert._rules import first_matches

Specs = Mapping[str, Spec]

# What a whole module is: an attention layer, whatever its code does besides.
ATTENTION = "attention"
# What BatchNorm stores beside its parameters.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# Modules that are mostly Embeddings, by what nearly all of transformers' are called.
_EMBEDDING = re.compile(
    r"(?!.*(proj|linear|dense|patch)[^.]*$)"
    r"(.*\.)?(\w*emb\w*(\.\w+)?|wte|wpe|shared|\w*tokens?|\w*codebook|\w*attention_bias)"
)
_OR_KEEP = '(kinds "weight" keeps them)'


def chosen_kinds(tensors: Specs, kinds: Mapping[str, str]) -> dict[str, str]:
    """Returns what the caller says, by key.

    Raises:
        ValueError: A pattern matches nothing, or a tensor cannot be of the kind.
    """
    keys = {module_of(key): key for key in tensors}
    found = first_matches(
        kinds,
        list(keys),
        "kinds",
        lambda pattern, name: kinds[pattern] == "weight" or _is_weight(keys[name]),
    )
    chosen = {keys[name]: kinds[pattern] for name, pattern in found.items()}
    for key, kind in chosen.items():
        possible = _possible(key, tensors[key])
        if kind not in possible:
            raise ValueError(
                f"kinds must say {' or '.join(map(repr, possible))} of {key}, which "
                f"has shape {tensors[key].shape}; got {kind!r}."
            )
        if kind == "kernel" and not _fits_bias(key, tensors):
            raise ValueError(
                f"kinds must not say 'kernel' of {key}: of shape {tensors[key].shape} "
                f"beside a bias of {tensors[_bias(key)].shape}, it is not stored as a "
                "Linear or Conv is (GPT-2's Conv1D is stored transposed). Say 'weight' "
                "to take it as it is, or rearrange it first."
            )
    return chosen


def kinds_of(
    keys: Container[str],
    tensors: Specs,
    chosen: Mapping[str, str],
    names: Names,
    target: Container[str] | None,
    look_alikes: Iterable[LookAlike],
    buffers: Container[str],
) -> tuple[dict[str, str], dict[Question, list[str]]]:
    """Returns the kind of each of these keys, and what to ask, with the keys in doubt.

    Args:
        keys: Those to tell the kind of.
        tensors: All of them.
        chosen: What the caller says.
        target: Paths that there should be, which decide where the caller does not.
        look_alikes: What is in doubt because it is below one of these.
        buffers: Keys without which an attention layer computes the same.
    """
    alike = {key: look_alike for look_alike in look_alikes for key in look_alike.keys}
    questions: dict[Question, list[str]] = {}
    kinds = {}
    for key in (key for key in tensors if key in keys):
        possible = _possible(key, tensors[key])
        kinds[key] = chosen.get(key, possible[0])
        if key in chosen:
            continue
        if target is not None:
            fitting = [
                kind
                for kind in possible
                if names.locate(parameter_name(key, kind)).path in target
            ]
            kinds[key] = next(iter(fitting), possible[0])
        elif key in alike:
            for question in _of_look_alike(alike[key], tensors):
                questions.setdefault(question, []).append(key)
        elif key in buffers:
            about = (
                f"may be left out, as attention computes the same without {_OR_KEEP}"
            )
            questions[Question(about, key, IGNORE, key)] = [key]
        elif doubt := _doubt(key, tensors):
            questions[doubt] = [key]
            if doubt.argument == KINDS:
                kinds[key] = doubt.answers[0].strip('"')
    return kinds, questions


def _of_look_alike(look_alike: LookAlike, tensors: Specs) -> list[Question]:
    """Asks for kinds of its modules, of which one says that all are what they seem."""
    keys = [key for key in look_alike.keys if key in tensors]
    doubts = {key: _doubt(key, tensors) for key in keys}
    kinds = {
        module_of(key): doubt.answers[0]
        for key, doubt in doubts.items()
        if doubt is not None and doubt.argument == KINDS
    }
    linears = [key for key in keys if _is_weight(key) and len(tensors[key].shape) > 1]
    if not kinds and linears:
        kinds = {module_of(linears[0]): '"kernel"'}
    about = (
        f"can only be taken module by module, not as attention ({look_alike.reason})"
    )
    return [
        Question(about, repr(look_alike.prefix), KINDS, module, (kind,))
        for module, kind in (kinds or {module_of(keys[0]): '"weight"'}).items()
    ]


def module_of(key: str) -> str:
    """Returns the name that patterns of kinds match."""
    return key.removesuffix(".weight")


def parameter_name(key: str, kind: str) -> str:
    """Returns the dotted name in Flax."""
    return key.removesuffix("weight") + kind if _is_weight(key) else key


def axes_order(key: str, kind: str, rank: int) -> tuple[int, ...]:
    """Returns the tensor's axes in Flax's order: (..., in, out) for a kernel."""
    if kind == "kernel" and _is_weight(key):
        return (*range(2, rank), 1, 0)
    return tuple(range(rank))


def _is_weight(key: str) -> bool:
    return key.rpartition(".")[2] == "weight"


def _possible(key: str, spec: Spec) -> tuple[str, ...]:
    """Returns the kinds that such a tensor can be of, the likeliest first."""
    if not _is_weight(key) or not spec.shape:
        return ("weight",)
    if len(spec.shape) == 1:
        return ("scale", "weight")
    if len(spec.shape) == 2:
        return ("kernel", "embedding", "weight")
    return ("kernel", "weight")


def _doubt(key: str, tensors: Specs) -> Question | None:
    """Asks what a tensor is if nobody can tell; shapes often do."""
    if any(p.startswith("lora_") or p == "base_layer" for p in key.split(".")):
        about = (
            "may be LoRA that is not merged (merge_and_unload() in peft, save again)"
        )
        return Question(about, key, IGNORE, key)
    if key.rpartition(".")[2] in _BUFFERS:
        about = f"may be BatchNorm's statistics, which are no parameters {_OR_KEEP}"
        return Question(about, key, IGNORE, key)
    dtype = tensors[key].dtype
    if not is_floating(dtype) and dtype.kind != "c":
        about = f"may be no parameters, as integers or truth values {_OR_KEEP}"
        return Question(about, key, IGNORE, key)
    if not _is_weight(key):
        return None
    module, shape = module_of(key), tensors[key].shape
    if not _fits_bias(key, tensors):
        about = "cannot be a Linear's or Conv's weight beside that bias"
        return Question(about, key, KINDS, module, ('"weight"',))
    if len(shape) == 2 and _bias(key) not in tensors:
        about, answers = (
            "may be a Linear's or an Embedding's",
            ['"kernel"', '"embedding"'],
        )
        likely = -1 if _EMBEDDING.fullmatch(module) else 1
        return Question(about, key, KINDS, module, tuple(answers[::likely]))
    # A Conv1d has shapes as a Bilinear, and a Conv2d may have those of a LayerNorm2d.
    if len(shape) == 3 or (len(shape) > 3 and math.prod(shape) == shape[1]):
        about = "may be a Conv's, a Bilinear's or a LayerNorm2d's"
        return Question(about, key, KINDS, module, ('"kernel"', '"weight"'))
    return None


def _bias(key: str) -> str:
    return f"{key.removesuffix('weight')}bias"


def _fits_bias(key: str, tensors: Specs) -> bool:
    """Whether its bias, if there is one, is of a Linear's, Conv's or norm's features.

    Those of a ConvTranspose are the second axis; a Linear's never.
    """
    bias, shape = tensors.get(_bias(key)), tensors[key].shape
    if bias is None or len(shape) < 2:
        return True
    return bias.shape in ([shape[:1]] if len(shape) == 2 else [shape[:1], shape[1:2]])
