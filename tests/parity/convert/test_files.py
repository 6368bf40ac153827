"""Files as PyTorch's users write them, and files that PyTorch reads."""

import collections
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file, save_model

from flax_mha.convert import read_state_dict, save_safetensors
from flax_mha.convert._files import strided
from tests.convert.test_files import WRONG_FILES, assert_raises, packed, tensor

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32),
    *(torch.int32, torch.uint64, torch.int64, torch.float16, torch.bfloat16),
    *(torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz),
    torch.float8_e5m2fnuz,
]


def bits_of(values):
    return values.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def assert_same_bits(got, want):
    assert list(got) == list(want)
    for name, values in want.items():
        assert f"torch.{got[name].dtype}" == str(values.dtype)
        assert got[name].shape == tuple(values.shape)
        assert got[name].tobytes() == bits_of(values)


def ones(*names):
    return {name: torch.full((2, 3), float(n)) for n, name in enumerate(names)}


# Tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_and_written_bit_for_bit(tmp_path, dtype):
    bits = torch.arange(48, dtype=torch.uint8)
    values = (bits % 2 if dtype == torch.bool else bits).view(dtype)
    state_dict = {
        "a": values.reshape(2, -1).clone(),
        "b": values[0].clone(),
        "c": values[:0].clone(),
    }
    save_file(state_dict, tmp_path / "theirs.safetensors")
    torch.save(state_dict, tmp_path / "theirs.pt")
    for name in ("theirs.safetensors", "theirs.pt"):
        assert_same_bits(read_state_dict(tmp_path / name), state_dict)
    save_safetensors(tmp_path / "ours.safetensors", state_dict)
    assert_same_bits(read_state_dict(tmp_path / "ours.safetensors"), state_dict)
    for name, loaded in load_file(tmp_path / "ours.safetensors").items():
        assert loaded.dtype == dtype and loaded.shape == state_dict[name].shape
        assert bits_of(loaded) == bits_of(state_dict[name])


def unusual_tensors():
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    return {
        "parameter": weight,
        "transposed": weight.t(),
        "strided": weight[:, ::2],
        "expanded": torch.ones(1).expand(4),
        "tied": weight,
        "row": weight[1],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "conjugate": torch.ones(2, dtype=torch.complex64).mul(1j).conj(),
        "negative": torch.ones(2, dtype=torch.complex64).mul(1j).conj().imag,
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pth.tar"])
def test_views_and_tied_tensors_are_read_as_what_they_are(tmp_path, suffix, zipped):
    want = unusual_tensors()
    path = tmp_path / f"a{suffix}"
    torch.save(want, path, _use_new_zipfile_serialization=zipped)
    want = {name: value.resolve_conj().resolve_neg() for name, value in want.items()}
    assert_same_bits(read_state_dict(path), want)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
def test_of_a_tensor_in_order_a_part_is_read_by_itself(tmp_path, monkeypatch, zipped):
    want = torch.randn(6, 40, 30)
    turned = {"a": want, "turned": want.mT, "rows": want[2:]}
    torch.save(turned, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    fill, reads = strided._fill, []
    monkeypatch.setattr(
        strided, "_fill", lambda *args: reads.append(args[2].nbytes) or fill(*args)
    )
    lazy = read_state_dict(tmp_path / "a.pt")._lazy_arrays
    assert lazy["turned"].read_view is None
    for name in ("a", "rows"):
        reads.clear()
        part = lazy[name].read_view(lambda a: a[3:, 10:20])
        np.testing.assert_array_equal(part, turned[name][3:, 10:20])
        assert sum(reads) == part.nbytes


def test_views_and_tied_tensors_are_written_as_what_they_are(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", unusual_tensors())
    got = load_file(tmp_path / "a.safetensors")
    for name, want in unusual_tensors().items():
        assert got[name].equal(want), name


def test_what_is_read_does_not_depend_on_the_file_any_more(tmp_path):
    torch.save(ones("a"), tmp_path / "a.pt")
    array = read_state_dict(tmp_path / "a.pt")["a"]
    os.truncate(tmp_path / "a.pt", 0)  # the process would crash if it were mapped
    array += 1
    np.testing.assert_array_equal(array, np.ones((2, 3)))


def transformer():
    return torch.nn.TransformerEncoderLayer(4, 2, 8, dtype=torch.bfloat16)


def test_pytorch_loads_strictly_what_was_read_and_written(tmp_path):
    torch.save(transformer().state_dict(), tmp_path / "a.pt")
    save_safetensors(tmp_path / "a.safetensors", read_state_dict(tmp_path / "a.pt"))
    model = transformer()
    model.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=True)
    assert_same_bits(read_state_dict(tmp_path / "a.pt"), model.state_dict())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # or transformers will not load it


def test_a_tied_tensor_that_save_model_leaves_out_is_there(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False)})
    model["b"] = model["a"]
    save_model(model, str(tmp_path / "a.safetensors"))
    got = read_state_dict(tmp_path / "a.safetensors")
    assert_same_bits(dict(sorted(got.items())), model.state_dict())


NO_VALUES = {
    "meta": (torch.ones(2, device="meta"), "on meta"),
    "sparse": (torch.eye(2).to_sparse(), "torch.sparse_coo"),
}


@pytest.mark.parametrize("values, text", NO_VALUES.values(), ids=NO_VALUES)
def test_tensor_without_plain_values_is_refused(tmp_path, values, text):
    torch.save({"a": values}, tmp_path / "a.pt")
    state_dict = read_state_dict(tmp_path / "a.pt")
    assert_raises(ValueError, text, lambda: state_dict["a"])


def test_tensor_of_half_bytes_is_refused(tmp_path):
    values = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file({"a": values}, tmp_path / "a.safetensors")
    torch.save({"a": values}, tmp_path / "a.pt")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        with pytest.raises(ValueError, match="which NumPy cannot hold"):
            read_state_dict(path)


# Safetensors' own library accepts the same files.


def opens(path):
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except SafetensorError:
        return None


STRICTER = {"name twice", "empty"}


@pytest.mark.parametrize("name", sorted(WRONG_FILES.keys() - STRICTER))
def test_what_we_refuse_safetensors_refuses(tmp_path, name):
    path = tmp_path / "a.safetensors"
    path.write_bytes(WRONG_FILES[name][0])
    assert opens(path) is None


def changed_files():
    """Yields a good file; with one byte of its header changed; with bytes cut."""
    header = {
        "b": tensor(4, 12, shape=(2,)),
        "a": tensor(),
        "e": tensor(12, 12, "I8", [0]),
    }
    good = packed(header, bytes(12))
    rng = np.random.default_rng(0)
    yield good
    for place in range(len(good) - 12):
        for byte in rng.integers(0, 256, 3).tolist() + list(b'0123456789,[]-"'):
            yield good[:place] + bytes([byte]) + good[place + 1 :]
    for place in range(len(good)):
        yield good[:place]
        yield good[:place] + good[place + 1 :]


def test_changed_files_are_accepted_or_refused_as_by_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    counts = collections.Counter()
    for content in changed_files():
        path.write_bytes(content)
        theirs = opens(path)
        try:
            ours = {
                name: list(spec.shape)
                for name, spec in read_state_dict(path).specs.items()
            }
        except ValueError:
            ours = None
        assert ours == theirs, content
        counts[ours is not None] += 1
    assert min(counts.values()) > 20  # both happen


# Pickles


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("notes.txt", "notes")
    return buffer.getvalue()


def cyclic():
    content = {"epoch": 3}
    content["model"] = content
    return content


WRONG_PICKLES = {
    "empty": (b"", "is empty"),
    "text": (b"not found", "is cut off, or no file of PyTorch's"),
    "zip cut": (saved({"a": torch.ones(2)})[:-100], "is cut off"),
    "zip cut early": (saved({"a": torch.ones(2)})[:40], "is cut off"),
    "zip cut late": (saved({"a": torch.ones(9999)})[:-9999], "a.pt' is cut off"),
    "another zip": (
        zipped(),
        "is a zip file, but of no known kind: it holds notes.txt.",
    ),
    "another pickle": (pickle.dumps({"a": 1}), "got a mapping with keys ['a']"),
    "a number": (pickle.dumps(3), "must hold a state_dict of tensors, got int."),
    "pickle of text": (pickle.dumps({"a": 1}, protocol=0), "no file of PyTorch's"),
    "pickle cut": (pickle.dumps({"a": 1})[:-3], "is a broken pickle: "),
    "tensor": (saved(torch.ones(2)), "must hold a state_dict of tensors, got a tensor"),
    "no tensors": (
        saved({"epoch": 3, "model": {}}),
        "must hold a state_dict of tensors, got a mapping with keys ['epoch', 'model']",
    ),
    "no names": (saved({0: torch.ones(2)}), "got names that are no strings: 0."),
    "itself": (saved(cyclic()), "got a mapping with keys ['epoch', 'model']"),
    "two models": (
        saved({"generator": ones("a"), "discriminator": ones("a")}),
        "holds several state_dicts, generator, discriminator: choose one with `wrap",
    ),
    "two known": (saved({"model": ones("a"), "net": ones("a")}), "several state_dicts"),
}


@pytest.mark.parametrize("content, text", WRONG_PICKLES.values(), ids=WRONG_PICKLES)
def test_broken_pickle_is_refused(tmp_path, content, text):
    (tmp_path / "a.pt").write_bytes(content)
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path / "a.pt"))


LIGHTNING = {
    "epoch": 3,
    "state_dict": ones("model.a"),
    "optimizer_states": [{"state": {0: ones("exp_avg")}, "param_groups": []}],
    "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.0)}},
    "hyper_parameters": {"lr": 0.1},
}
OPTIMIZER = {"state": {0: ones("exp_avg")}, "param_groups": [{"lr": 0.1}]}
BOTH = {"model_ema": ones("b"), "model": ones("a")}
WRAPPED = {
    "nothing": (ones("a", "b"), None, ones("a", "b"), ()),
    "Lightning": (
        LIGHTNING,
        None,
        ones("model.a"),
        (
            "Taken from 'state_dict', not epoch, optimizer_states, callbacks, "
            "hyper_parameters.",
        ),
    ),
    "training": (
        {"rng_state": torch.ones(2), "model": ones("a"), "optimizer": OPTIMIZER},
        None,
        ones("a"),
        ("Taken from 'model', not rng_state, optimizer.",),
    ),
    "nested": (
        {"state_dict": {"model": ones("a")}},
        None,
        ones("a"),
        ("Taken from 'state_dict'.", "Taken from 'model'."),
    ),
    "unknown wrapper": (
        {"encoder_q": ones("a")},
        None,
        ones("a"),
        ("Taken from 'encod",),
    ),
    "average beside": (
        BOTH,
        None,
        ones("a"),
        (
            "Taken from 'model', not model_ema. Each of model_ema, model may be the "
            "`wrapper`.",
        ),
    ),
    "average chosen": (
        BOTH,
        "model_ema",
        ones("b"),
        ("Taken from 'model_ema', not model.",),
    ),
    "average alone": (
        {"params_ema": ones("a"), "iter": 3},
        None,
        ones("a"),
        ("Taken from 'params_ema', not iter.",),
    ),
    "average of a wrapped model": (
        {"ema": {"module": ones("module.a"), "decay": 0.9}},
        "ema",
        ones("a"),
        (
            "Taken from 'ema'.",
            "Taken from 'module', not decay.",
            "Prefixes of wrappers",
        ),
    ),
    "chosen by its own name": (
        {"generator": ones("a"), "discriminator": ones("b")},
        "discriminator",
        ones("b"),
        ("Taken from 'discriminator', not generator.",),
    ),
    "other things among tensors": (
        {**ones("a"), "_extra_state": None, "version": 3},
        None,
        ones("a"),
        ("Left out, as they are no parameters: _extra_state, version.",),
    ),
}


@pytest.mark.parametrize("content, wrapper, want, notes", WRAPPED.values(), ids=WRAPPED)
def test_state_dict_is_taken_out_of_its_wrapper(
    tmp_path, content, wrapper, want, notes
):
    torch.save(content, tmp_path / "a.pt")
    state_dict = read_state_dict(tmp_path / "a.pt", wrapper=wrapper)
    assert_same_bits(state_dict, want)
    for got, start in zip(state_dict.notes, notes, strict=True):
        assert got.startswith(start)


def test_wrapper_that_is_not_there(tmp_path):
    torch.save(BOTH, tmp_path / "a.pt")
    assert_raises(
        ValueError,
        "holds a state_dict, got 'ema'; there are model_ema, model.",
        lambda: read_state_dict(tmp_path / "a.pt", wrapper="ema"),
    )


def test_averaged_and_parallel_models_have_their_own_names(tmp_path):
    model = torch.nn.Linear(2, 3)
    wrapped = torch.optim.swa_utils.AveragedModel(torch.nn.DataParallel(model))
    assert "module.module.weight" in wrapped.state_dict()
    torch.save(wrapped.state_dict(), tmp_path / "a.pt")
    assert_same_bits(read_state_dict(tmp_path / "a.pt"), model.state_dict())


def test_an_averaged_part_of_a_model_has_its_own_names(tmp_path):
    model = torch.nn.ModuleDict({"online": torch.nn.Linear(2, 3)})
    model["target"] = torch.optim.swa_utils.AveragedModel(model["online"])
    torch.save(model.state_dict(), tmp_path / "a.pt")
    model["target"] = model["target"].module
    assert_same_bits(read_state_dict(tmp_path / "a.pt"), model.state_dict())


def test_sharded_pickles_are_read_by_their_index(tmp_path):
    want = ones("a", "b", "c")
    parts = {"p-00001-of-00002.bin": "ac", "p-00002-of-00002.bin": "b"}
    for file, names in parts.items():
        torch.save({name: want[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (index, tmp_path):
        assert_same_bits(dict(sorted(read_state_dict(path).items())), want)
