import ast
import importlib
import inspect
import subprocess
import sys

import numpy as np
import pytest

import flax_mha
from flax_mha import convert

CHECK = """
import sys
{imports}
heavy = {{"torch", "safetensors", "flax.nnx"}} & sys.modules.keys()
assert not heavy, f"imported {{heavy}}"
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was started"
"""


def run(imports):
    return subprocess.run(
        [sys.executable, "-c", CHECK.format(imports=imports)],
        capture_output=True,
        text=True,
    )


def test_import_loads_nothing_heavy_and_starts_no_device():
    assert run("import flax_mha").returncode == 0


@pytest.mark.parametrize(
    "imports",
    ["import safetensors", "import flax.nnx", "import flax_mha, jax; jax.devices()"],
)
def test_that_the_test_above_can_fail(imports):
    assert "AssertionError" in run(imports).stderr


def test_public_names():
    assert set(dir(flax_mha)) == {
        "Explanation",
        "KeyValueCache",
        "MultiheadAttention",
        "RaggedArray",
        "convert",
        "explain",
        "functional",
        "linen",
        "nnx",
        "sharding",
        "training",
    }
    assert flax_mha.nnx.__all__ == ["MultiheadAttention"]


@pytest.mark.parametrize(
    "module",
    [flax_mha.functional, flax_mha.convert, flax_mha.sharding, flax_mha.training],
)
def test_public_functions_are_documented(module):
    for name in set(module.__all__) - {"RULES", "Rules"}:
        sections = ("Args:", "Raises:", "Attributes:")
        assert any(section in getattr(module, name).__doc__ for section in sections)


INSPECT = """
import sys
from flax_mha._cli import main
assert main(["inspect", sys.argv[1]]) == 0
heavy = {"flax", "jax", "orbax", "torch"} & sys.modules.keys()
assert not heavy, f"imported {heavy}"
"""


def inspected(path, before=""):
    return subprocess.run(
        [sys.executable, "-c", before + INSPECT, path], capture_output=True, text=True
    )


def test_looking_into_a_file_imports_no_framework(tmp_path):
    path = tmp_path / "a.safetensors"
    layer = {f"{n}_proj.weight": np.ones((4, 4), "bfloat16") for n in ("q", "k", "v")}
    convert.save_safetensors(path, {**layer, "out_proj.weight": np.ones((4, 4))})
    assert inspected(path).returncode == 0
    assert "imported {'jax'}" in inspected(path, "import jax").stderr


@pytest.mark.parametrize("module", [flax_mha, flax_mha.convert])
def test_lazy_names_are_those_that_type_checkers_see(module):
    block = next(
        node
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.If)
    )
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in block.body
        for alias in node.names
    }
    for name in dir(module):
        there = importlib.import_module(seen[name].rpartition(".")[0])
        assert getattr(module, name) is getattr(there, seen[name].rpartition(".")[2])
    assert dir(module) == sorted(seen)
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        getattr(module, "other")  # noqa: B009
