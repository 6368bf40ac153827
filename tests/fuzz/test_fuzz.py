"""Some of what `python -m tests.fuzz` draws, and that it would find a fault."""

import ast
import functools
import importlib

import pytest

from tests.fuzz import PARTS, definition, layer
from tests.fuzz.comparing import Mismatch
from tests.fuzz.drawing import drawn, simplest

SEED = 1
PROGRAMS = dict(layer=3, sdpa=1, ragged=1, ragged_sdpa=1, decoding=1, array=1)
MODULES = {name: importlib.import_module(f"tests.fuzz.{name}") for name in PARTS}
CASES = [(name, n) for name, count in PROGRAMS.items() for n in range(count)]
drawn_layer = functools.partial(drawn, layer, SEED)


@pytest.mark.parametrize("name, n", CASES)
def test_what_is_drawn_is_what_it_is_by_definition(name, n):
    part = MODULES[name]
    part.check(drawn(part, SEED, n * getattr(part, "SAME", 1)))


def test_a_draw_can_be_repeated():
    assert drawn_layer(3) == drawn_layer(3) != drawn_layer(4)


def test_a_few_draws_share_a_program():
    first, second = drawn_layer(0), drawn_layer(1)
    changed = {name for name in first if first[name] != second[name]}
    assert "numbers" in changed
    assert changed <= {"numbers", *layer.VALUES}


def test_a_fault_is_found(monkeypatch):
    def fault(*args, **options):
        return [-x for x in project(*args, **options)]

    project = definition.project
    monkeypatch.setattr(definition, "project", fault)
    with pytest.raises(Mismatch):
        layer.check(drawn_layer(0) | dict(tgt_len=3, src_len=3, transform="eager"))


@pytest.mark.parametrize("part", MODULES.values(), ids=PARTS)
def test_any_configuration_can_be_pasted_and_made_simple(part):
    always = functools.partial(simplest, options=part.OPTIONS, settle=part.settle)
    for n in range(0, 2000, 40):
        config = drawn(part, SEED, n)
        assert ast.literal_eval(repr(config)) == config
        simple = always(config, fails=lambda _: True)
        assert simple == always(simple, fails=lambda _: True)


def test_a_failing_configuration_is_made_simple():
    config = simplest(
        drawn_layer(5) | dict(num_heads=5, batch=3),
        layer.OPTIONS,
        layer.settle,
        fails=lambda config: config["num_heads"] > 1,
    )
    changed = {n for n, values in layer.OPTIONS.items() if config[n] != values[0]}
    assert changed == {"num_heads"} and config["num_heads"] == 2
