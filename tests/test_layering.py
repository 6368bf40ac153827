import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "flax_mha"
LAYERS = [
    ["_typing", "_lazy"],
    ["_dropout", "_masks", "_checks", "_params"],
    ["_ragged_checks"],
    ["_ragged", "_blocks", "_softmax", "_cudnn_calls", "_lowering"],
    ["_padded", "_ragged_blocks"],
    ["_kernels"],
    ["_plan"],
    ["_dispatch"],
    ["_attention", "_explain"],
    ["_module", "functional"],
    ["convert._arrays", "convert._families", "convert._layers", "convert._model"],
    ["convert._config", "convert._patterns"],
    ["convert._strict", "convert._rules", "convert._files.folders"],
    ["convert._files.source", "convert._files.unpickle"],
    ["convert._files.safetensors", "convert._files.tensors"],
    ["convert._files.fold", "convert._files.numpy_arrays", "convert._files.quantized"],
    ["convert._files.nested", "convert._files.archives"],
    ["convert._questions"],
    ["convert._entries", "convert._reasons"],
    ["convert._find", "convert._names", "convert._files.peel"],
    ["convert._conversion", "convert._heads", "convert._kinds"],
    ["convert._compute", "convert._stack"],
    ["convert._parts"],
    ["convert._draft"],
    ["convert._files.pickles"],
    ["convert._files.distributed", "convert._files.write"],
    ["convert._files.read"],
    ["convert._files"],
    ["convert._layer", "convert._nested", "convert._stock", "convert._tree"],
    ["convert._verify"],
    ["convert"],
    ["_cli._messages", "_cli._tables"],
    ["_cli._commands", "_cli._inspect"],
    ["_cli"],
    ["__init__", "__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def unit(dotted):
    """Returns the entry of LAYERS that this name, of a module or in it, belongs to."""
    while dotted not in RANK:
        assert "." in dotted, f"{dotted} is in no layer"
        dotted = dotted.rpartition(".")[0]
    return dotted


def unit_of_file(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return unit(".".join(parts))


def imports(source):
    """Yields the package's own units that this source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, *inner = node.module.split(".")
            if package == "flax_mha":
                yield from (unit(".".join([*inner, n.name])) for n in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_only_point_down(path):
    targets = set(imports(path.read_text()))
    unit = unit_of_file(path)
    own = {unit} if path.stem == "__init__" else set()  # a package, its modules
    assert all(RANK[target] < RANK[unit] for target in targets - own)


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
