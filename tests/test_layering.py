import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "flax_mha"
LAYERS = [
    ["_typing"],
    ["_dropout", "_masks", "_checks", "_params"],
    ["_blocks", "_cudnn_calls", "_lowering"],
    ["_kernels"],
    ["_dispatch"],
    ["_attention", "_explain"],
    ["_module", "functional"],
    ["convert"],
    ["__init__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def unit(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source):
    """Yields the package's own units that this source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "flax_mha":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            package, _, rest = node.module.partition(".")
            if package == "flax_mha":
                yield rest.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_only_point_down(path):
    targets = set(imports(path.read_text()))
    own = {unit(path)} if path.stem == "__init__" else set()  # a package, its modules
    assert all(RANK[target] < RANK[unit(path)] for target in targets - own)


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "_kernels").glob("[!_]*.py")), ids=lambda path: path.stem
)
def test_a_kernel_imports_no_other_kernel_and_no_framework(path):
    source = path.read_text()
    assert "_kernels" not in set(imports(source))
    names = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
    }
    assert not names & {"flax", "torch"}


def test_an_import_that_points_up_is_seen():
    source = "from flax_mha import convert\nfrom flax_mha._kernels.x import y"
    assert list(imports(source)) == ["convert", "_kernels"]
