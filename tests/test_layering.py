import ast
import graphlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "flax_mha"
KERNELS = ["blockwise", "cudnn", "heads_first", "mosaic", "ragged", "reference"]
LAYERS = [
    ["_typing", "_mesh", "_lazy"],
    ["_runs"],
    ["_lowering"],
    ["_dropout", "_masks", "_params", "_checks.arguments"],
    ["_call", "_initializers", "training"],
    ["_length"],
    ["_place", "sharding"],
    ["_checks.layer", "_checks.functional", "_checks.cache", "_checks"],
    ["_ragged.checks"],
    ["_ragged.call_checks", "_ragged.tokens"],
    ["_ragged.array"],
    ["_ragged"],
    ["_kernels._blocks", "_kernels._softmax"],
    ["_kernels._cudnn_calls", "_kernels._cudnn_layout"],
    ["_kernels._mosaic_sizes"],
    ["_kernels._mosaic_tile"],
    ["_kernels._mosaic_chunks"],
    ["_kernels._mosaic_steps"],
    ["_kernels._mosaic_calls"],
    ["_kernels._mosaic_flat", "_kernels._mosaic_masks"],
    ["_kernels._mosaic_spans"],
    ["_kernels._mosaic_work"],
    ["_kernels._ragged_blocks"],
    [f"_kernels.{name}" for name in KERNELS],
    ["_kernels"],
    ["_checks.module"],
    ["_plan"],
    ["_layouts"],
    ["_cache"],
    ["_heads_first", "_ring"],
    ["_dispatch", "_explain"],
    ["_sequences"],
    ["_bare_sequences", "_cached_sequences"],
    ["_attention"],
    ["linen", "nnx", "functional"],
    ["convert._processes", "convert._arguments"],
    ["convert._arrays", "convert._families", "convert._layers", "convert._model"],
    ["convert._rows"],
    ["convert._config", "convert._unseen"],
    ["convert._strict", "convert._rules", "convert._files.folders"],
    ["convert._files.replacing", "convert._files.strided", "convert._files.unpickle"],
    ["convert._files.source"],
    ["convert._files.safetensors", "convert._files.tensors"],
    ["convert._files.folder_writer"],
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
    ["convert._nnx"],
    ["convert._layer", "convert._nested", "convert._stock", "convert._tree"],
    ["convert._verify"],
    ["convert"],
    ["_cli._messages", "_cli._signals"],
    ["_cli._tables"],
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


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_imports_no_other_kernel_and_no_framework(name):
    source = (PACKAGE / "_kernels" / f"{name}.py").read_text()
    assert not {f"_kernels.{kernel}" for kernel in KERNELS} & set(imports(source))
    names = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
    }
    assert not names & {"flax", "torch"}


def test_no_modules_import_each_other_in_a_circle():
    graph = {}
    for path in FILES:
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        module = module.removesuffix(".__init__")
        graph[module] = set(imports(path.read_text())) - {module}
    list(graphlib.TopologicalSorter(graph).static_order())  # or it raises CycleError


def test_an_import_that_points_up_is_seen():
    source = "from flax_mha import convert\nfrom flax_mha._kernels.ragged import y"
    assert list(imports(source)) == ["convert", "_kernels.ragged"]
