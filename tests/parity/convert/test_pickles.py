"""What people save beside plain tensors and in place of them, and hostile files."""

import argparse
import collections
import functools
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from flax_mha._cli import main
from flax_mha.convert import convert_tree, read_state_dict
from tests.convert.test_files import assert_raises
from tests.parity.convert.test_files import assert_same_bits, ones


class Block(torch.nn.Module):
    """Has all that a state_dict has, and what it has not."""

    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 2)
        self.fc = torch.nn.Linear(8, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.nothing = None

    def forward(self, x):
        y = self.attn(x, x, x, need_weights=False)[0]
        return self.norm(self.fc(y)[0]) * self.scale.sum()


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block().eval()


# Beside the tensors


BESIDE = {
    "namespace": argparse.Namespace(lr=1e-4, nheads=8),
    "NumPy scalar": np.float64(0.7),
    "NumPy array": np.zeros(3),
    "array of objects": np.array([{"a": 1}, None]),
    "partial": functools.partial(torch.optim.AdamW, lr=1e-3),
    "path": pathlib.PosixPath("x"),
    "version": torch.__version__,
    "defaultdict": collections.defaultdict(int, a=1),
    "counter": collections.Counter("aab"),
    "set": {1, (2, 3)},
    "frozenset": frozenset({"a"}),
    "slice": slice(3),
    "tuple as key": {(1, (2, 3)): 4},
    "class": torch.nn.Linear,
    "function": json.dumps,
    "enum": torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING(0),
    "dtype": torch.float16,
    "device": torch.device("cuda:0"),
    "size": torch.Size([2]),
    "generator": torch.Generator().get_state(),
    "bytes": b"\0\xff",
    "complex": 1j,
    "exception": ValueError("a"),
    "optimizer": torch.optim.Adam([torch.ones(2)]),
    "date": __import__("datetime").datetime(2020, 1, 1),
    "buffer": io.BytesIO(b"a"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_what_lies_beside_the_tensors_is_left_out(tmp_path, beside, zipped):
    content = {"model": ones("a", "b"), "beside": beside}
    path = tmp_path / "a.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    state_dict = read_state_dict(path)
    assert_same_bits(state_dict, ones("a", "b"))
    assert state_dict.notes[0].startswith("Taken from 'model', not beside")


@pytest.mark.parametrize("name", sorted(BESIDE.keys() - {"optimizer"}))
def test_what_lies_among_the_tensors_is_left_out_or_named(tmp_path, name):
    torch.save({**ones("a"), "beside": BESIDE[name]}, tmp_path / "a.pt")
    state_dict = read_state_dict(tmp_path / "a.pt")
    tensors = [n for n in state_dict if n != "a"]
    assert "beside" in "".join([*state_dict.notes, *tensors])


def test_a_class_that_does_not_exist_here_is_named(tmp_path):
    module = types.ModuleType("some_library")
    module.Config = type("Config", (dict,), {"__module__": "some_library"})
    sys.modules["some_library"] = module
    try:
        content = {"model": ones("a"), "config": module.Config(heads=8)}
        torch.save(content, tmp_path / "a.pt")
    finally:
        del sys.modules["some_library"]
    state_dict = read_state_dict(tmp_path / "a.pt")
    assert_same_bits(state_dict, ones("a"))
    assert state_dict.notes == (
        "Taken from 'model', not config (some_library.Config).",
    )
    assert "some_library" not in sys.modules


class Settings(dict):
    """A dict with another name, as many libraries have."""


def test_a_state_dict_of_another_class_is_read(tmp_path):
    torch.save({"state_dict": Settings(ones("a"))}, tmp_path / "a.pt")
    assert_same_bits(read_state_dict(tmp_path / "a.pt"), ones("a"))


def test_extra_state_is_no_parameter(tmp_path):
    extra = {"a._extra_state": torch.zeros(4, dtype=torch.uint8)}
    torch.save(ones("a.w") | extra, tmp_path / "a.pt")
    state_dict = read_state_dict(tmp_path / "a.pt")
    assert_same_bits(state_dict, ones("a.w"))
    assert state_dict.notes == ("Left out, as they are no parameters: a._extra_state.",)


def test_tensors_inside_of_containers_have_longer_names(tmp_path):
    content = {"a": ones("b")["b"], "list": [torch.ones(1), {"c": torch.zeros(2)}]}
    torch.save(content, tmp_path / "a.pt")
    state_dict = read_state_dict(tmp_path / "a.pt")
    want = {"a": content["a"], "list.0": torch.ones(1), "list.1.c": torch.zeros(2)}
    assert_same_bits(state_dict, want)
    assert state_dict.notes == ("Tensors found inside of list.",)


class Holder:
    def __init__(self):
        self.tensor = torch.ones(2)


def test_tensors_inside_of_unknown_objects_are_refused(tmp_path):
    torch.save({**ones("a"), "b.c": Holder()}, tmp_path / "a.pt")
    assert_raises(
        ValueError,
        "must hold plain tensors, but b.c is a tests.parity.convert.test_pickles.Hold"
        "er with tensors inside, which only its own code can read",
        lambda: read_state_dict(tmp_path / "a.pt"),
    )


# Whole modules and archives


def export(model, path):
    torch.export.save(torch.export.export(model, (torch.ones(3, 4, 8),)), path)


def save_trace(model, path):
    torch.jit.save(torch.jit.trace(model, torch.ones(3, 4, 8)), path)


MODELS = {
    "module": torch.save,
    "module, older format": functools.partial(
        torch.save, _use_new_zipfile_serialization=False
    ),
    "module beside": lambda model, path: torch.save({"model": model, "epoch": 3}, path),
    "TorchScript, traced": save_trace,
    "TorchScript, scripted": lambda model, path: torch.jit.save(
        torch.jit.script(model), path
    ),
    "torch.export": export,
    "pickle": lambda model, path: path.write_bytes(pickle.dumps(model.state_dict())),
    "pickle, protocol 2": lambda model, path: path.write_bytes(
        pickle.dumps(model.state_dict(), protocol=2)
    ),
    "NumPy": lambda model, path: path.write_bytes(zipped_arrays(model, np.savez)),
    "NumPy, compressed": lambda model, path: path.write_bytes(
        zipped_arrays(model, np.savez_compressed)
    ),
    "pickled arrays": lambda model, path: path.write_bytes(
        pickle.dumps({"model": arrays_of(model), "by": "us"})
    ),
    "pickled arrays, protocol 2": lambda model, path: path.write_bytes(
        pickle.dumps(arrays_of(model), protocol=2)
    ),
    "pickled arrays, protocol 5": lambda model, path: path.write_bytes(
        pickle.dumps(arrays_of(model), protocol=5)
    ),
    "npy of a dict": lambda model, path: path.write_bytes(npy(arrays_of(model))),
}


def arrays_of(model):
    return {name: values.numpy() for name, values in model.state_dict().items()}


def npy(content):
    buffer = io.BytesIO()
    np.save(buffer, content)
    return buffer.getvalue()


def zipped_arrays(model, save):
    buffer = io.BytesIO()
    save(buffer, **arrays_of(model))
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("save", MODELS.values(), ids=MODELS)
def test_whole_models_are_read_whatever_the_file_is_called(tmp_path, save, block):
    path = tmp_path / "model.weights"
    save(block, path)
    state_dict = read_state_dict(path)
    want = block.state_dict()
    hidden = {"hidden": block.hidden} if "hidden" in state_dict else {}
    assert bool(hidden) == (save in (save_trace, MODELS["TorchScript, scripted"]))
    got = {name: state_dict[name] for name in [*want, *hidden]}
    assert_same_bits(got, want | hidden)
    assert len(state_dict) == len(got)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TypedStorage is")
def test_a_package_is_refused_with_the_way_out(tmp_path, block):
    with torch.package.PackageExporter(tmp_path / "a.pt") as exporter:
        exporter.extern("**")
        exporter.save_pickle("model", "model.pkl", block)
    assert_raises(
        ValueError,
        "is a torch.package archive, whose model needs the code in it: load it by "
        "torch.package.PackageImporter, and torch.save its state_dict.",
        lambda: read_state_dict(tmp_path / "a.pt"),
    )


WITHOUT_TORCH = """
import sys, warnings
warnings.simplefilter("error")
from flax_mha.convert import read_state_dict
print(sum(array.size for array in read_state_dict(sys.argv[1]).values()))
assert not {"torch", "jax"} & sys.modules.keys()
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pytorch_is_not_needed(tmp_path, block):
    path = tmp_path / "a.pt"
    MODELS["TorchScript, scripted"](block, path)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, path], capture_output=True, text=True
    )
    assert run.stdout == f"{sum(v.numel() for v in block.state_dict().values()) + 2}\n"
    assert not run.stderr


# Quantized


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 2)
        self.fc = torch.nn.Linear(8, 4)
        self.last = torch.nn.Linear(4, 2, bias=False)


DYNAMIC = {
    "int8": dict(qconfig_spec={torch.nn.Linear}),
    "int8 by channel": dict(
        qconfig_spec={
            torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig
        }
    ),
    "float16": dict(qconfig_spec={torch.nn.Linear}, dtype=torch.float16),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("options", DYNAMIC.values(), ids=DYNAMIC)
def test_dynamically_quantized_weights_are_dequantized(tmp_path, options, zipped):
    model = torch.ao.quantization.quantize_dynamic(Small().eval(), **options)
    path = tmp_path / "a.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    state_dict = read_state_dict(path)
    want = {f"attn.{name}": value for name, value in model.attn.state_dict().items()}
    for name in ("fc", "last"):
        weight = getattr(model, name).weight()
        want[f"{name}.weight"] = weight.dequantize() if weight.is_quantized else weight
    want["fc.bias"] = model.fc.bias()
    assert_same_bits(dict(sorted(state_dict.items())), dict(sorted(want.items())))
    assert state_dict.notes[0].startswith("Weights dequantized: fc, last. Where")
    params = convert_tree(state_dict, 2, kinds={"last.*": "kernel"})
    np.testing.assert_array_equal(params["fc"]["kernel"], want["fc.weight"].T)


def quantized():
    return torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 3, torch.quint8)


def static():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    model.qconfig = torch.ao.quantization.get_default_qconfig("onednn")
    prepared = torch.ao.quantization.prepare(model)
    prepared(torch.randn(4, 3))
    return torch.ao.quantization.convert(prepared).state_dict()


def embedding():
    model = torch.nn.Sequential(torch.nn.Embedding(3, 2))
    model.qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig
    prepared = torch.ao.quantization.prepare(model)
    return torch.ao.quantization.convert(prepared).state_dict()


def lstm():
    model = torch.nn.Sequential(torch.nn.LSTM(3, 2))
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM}).state_dict()


def whole():
    return torch.ao.quantization.quantize_dynamic(Small(), {torch.nn.Linear})


def script():
    """Not what torch.save makes of it."""
    return torch.jit.trace(whole().eval().fc, torch.ones(1, 8))


class Subclass(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, *_):
        raise NotImplementedError


NO_ARRAYS = {
    "quantized tensor": (
        lambda: {"a": quantized()},
        "a is quantized (torch.quint8). Make plain tensors of them in PyTorch (`deq",
    ),
    "static": (static, "0._packed_params._packed_params.0 is quantized (torch.qint8)"),
    "embedding": (embedding, "is quantized (torch.quint8)"),
    "LSTM": (lstm, "0._all_weight_values.0.param is a torch.ScriptObject with"),
    "TorchScript": (
        script,
        "_packed_params._packed_params is a __torch__.torch.classes.quantized.Linear",
    ),
    "whole module": (
        whole,
        "last._packed_params._packed_params is a torch.ScriptObject wi",
    ),
    "nested": (
        lambda: {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        "a is a nested tensor, of sequences of different lengths",
    ),
    "jagged": (
        lambda: {
            "a": torch.nested.nested_tensor(
                [torch.ones(2), torch.ones(3)], layout=torch.jagged
            )
        },
        "NestedTensor, which only its own code can read",
    ),
    "subclass": (
        lambda: {"a": Subclass(torch.ones(2))},
        "a is a tests.parity.convert.test_pickles.Subclass, which only its own code",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("make, text", NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_tensors_that_are_no_arrays_are_refused_by_name(tmp_path, make, text):
    save = torch.jit.save if make is script else torch.save
    save(make(), tmp_path / "a.pt")
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path / "a.pt"))


# Hostile


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def hostile(folder):
    """Returns what would make a folder by running code, in the ways that there are."""
    made = str(folder / "ran")
    code = f"__import__('os').mkdir({made!r})"
    return {
        "os.mkdir": Call(os.mkdir, made),
        "os.system": Call(os.system, f"mkdir {made}"),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "getattr": Call(getattr, Call(__import__, "os"), "mkdir"),
        "subprocess": Call(subprocess.Popen, ["mkdir", made]),
        "partial": Call(functools.partial(os.mkdir, made)),
        "numpy": Call(np.save, made, 3),
        "torch": Call(torch.save, 3, made),
        "map": Call(list, Call(map, os.mkdir, [made])),
        "module": Call(torch.nn.Module.apply, torch.nn.Linear(1, 1), os.mkdir),
        "rebuild": Call(
            torch._tensor._rebuild_from_type_v2, os.mkdir, 3, (made,), None
        ),
        "parameter": Call(
            torch._utils._rebuild_parameter_with_state, torch.ones(1), True, {}, made
        ),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("name", hostile(pathlib.Path()))
def test_nothing_that_a_pickle_names_is_called(tmp_path, name, zipped):
    path = tmp_path / "a.pt"
    content = {**ones("a"), "evil": hostile(tmp_path)[name]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    before = set(sys.modules)
    try:
        state_dict = read_state_dict(path)
        assert state_dict["a"].shape == (2, 3)
    except ValueError as error:
        assert str(path) in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert set(sys.modules) == before


def test_that_the_test_above_can_fail(tmp_path):
    torch.save({"evil": hostile(tmp_path)["os.mkdir"]}, tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def rezipped(path, compression=zipfile.ZIP_STORED, **changes):
    """Writes the members of a zip again, some of them changed; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            content = changes.get(name.partition("/")[2].replace(".", "_"), content)
            if content is not None:
                archive.writestr(name, content)


ZIPS = {
    "compressed": (
        dict(compression=zipfile.ZIP_DEFLATED),
        "has a/byteorder compressed, which PyTorch never does: zip it without",
    ),
    "big-endian": (
        dict(byteorder=b"big"),
        "has its bytes in big-endian order: save it",
    ),
    "pickle cut": (dict(data_pkl=b"\x80\x02}"), "is a broken pickle"),
    "no pickle": (
        dict(data_pkl=None),
        "is a zip file, but of no known kind: it holds ",
    ),
}


@pytest.mark.parametrize("changes, text", ZIPS.values(), ids=ZIPS)
def test_changed_archives_are_refused(tmp_path, changes, text):
    torch.save(ones("a"), tmp_path / "a.pt")
    rezipped(tmp_path / "a.pt", **changes)
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path / "a.pt"))


@pytest.mark.parametrize("changes", [{"data/0": b"\0" * 23}, {"data/0": None}])
def test_bytes_that_are_missing_are_refused(tmp_path, changes):
    torch.save(ones("a"), tmp_path / "a.pt")
    rezipped(tmp_path / "a.pt", **changes)
    text = "a.pt' is broken: a tensor ends behind" if changes["data/0"] else "a broken"
    assert_raises(ValueError, text, lambda: dict(read_state_dict(tmp_path / "a.pt")))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
def test_changed_bytes_never_raise_anything_else(tmp_path, zipped):
    path = tmp_path / "a.pt"
    content = {"model": ones("a"), "args": argparse.Namespace(a=1)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    pickled = good.index(b"ctorch._utils")
    read = 0
    for place in range(max(0, pickled - 60), pickled + 260):
        for byte in rng.integers(0, 256, 3).tolist():
            path.write_bytes(good[:place] + bytes([byte]) + good[place + 1 :])
            try:
                dict(read_state_dict(path))
                read += 1
            except ValueError:
                pass
    assert 10 < read < 900  # both happen


def test_command_line_reads_a_training_checkpoint(tmp_path, block, capsys):
    content = {"model": block, "args": argparse.Namespace(heads=2)}
    torch.save(content, tmp_path / "last.ckpt")
    assert main(["inspect", str(tmp_path / "last.ckpt")]) == 0
    assert "not args (argparse.Namespace)" in capsys.readouterr().out
