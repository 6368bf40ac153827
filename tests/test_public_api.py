import subprocess
import sys

import pytest

import flax_mha

CHECK = """
import sys
{imports}
heavy = {{"torch", "safetensors"}} & sys.modules.keys()
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


def test_import_loads_no_torch_no_safetensors_and_starts_no_device():
    assert run("import flax_mha").returncode == 0


@pytest.mark.parametrize(
    "imports", ["import safetensors", "import flax_mha, jax; jax.devices()"]
)
def test_that_the_test_above_can_fail(imports):
    assert "AssertionError" in run(imports).stderr


def test_public_names():
    names = {name for name in vars(flax_mha) if not name.startswith("_")}
    assert names == {
        "Explanation",
        "KeyValueCache",
        "MultiheadAttention",
        "RaggedArray",
        "convert",
        "explain",
        "functional",
        "linen",
    }


@pytest.mark.parametrize("module", [flax_mha.functional, flax_mha.convert])
def test_public_functions_are_documented(module):
    for name in module.__all__:
        sections = ("Args:", "Raises:", "Attributes:")
        assert any(section in getattr(module, name).__doc__ for section in sections)
