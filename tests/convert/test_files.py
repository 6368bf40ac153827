"""Files and folders that are read without PyTorch: safetensors and their indexes."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha.convert import read_state_dict, save_safetensors

DTYPES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "float8_e4m3fn"),
    *("float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"),
]
ONES = {"a": np.ones((2, 3), "float32"), "b": np.ones(2, "float32")}


def arrays(names="ab", offset=0):
    return {
        name: np.arange(6.0, dtype="float32").reshape(2, 3) + number + offset
        for number, name in enumerate(names)
    }


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].dtype, got[name].shape) == (
            want[name].dtype,
            want[name].shape,
        )
        assert np.asarray(got[name]).tobytes() == np.asarray(want[name]).tobytes()


def assert_raises(error, text, call):
    with pytest.raises(error) as raised:
        call()
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


# Safetensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_round_trip_keeps_every_bit(tmp_path, dtype):
    bits = np.arange(48, dtype="uint8")
    want = {
        "matrix": (bits % 2 if dtype == "bool" else bits).view(dtype).reshape(2, -1),
        "scalar": np.ones((), dtype),
        "empty": np.zeros((0, 3), dtype),
    }
    save_safetensors(tmp_path / "a.safetensors", want)
    assert_same(read_state_dict(tmp_path / "a.safetensors"), want)


def test_safetensors_are_aligned_whatever_the_order(tmp_path):
    state_dict = {"flag": np.ones(3, "bool"), "wide": np.ones(2), "half": ONES["a"]}
    save_safetensors(tmp_path / "a.safetensors", state_dict, {"made by": "us"})
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt", "made by": "us"}
    for name, info in header.items():
        assert (8 + length + info["data_offsets"][0]) % state_dict[name].itemsize == 0


def test_a_transposed_array_is_written_in_order(tmp_path):
    want = {"a": np.arange(6.0).reshape(2, 3).T, "b": jnp.ones(2)}
    save_safetensors(tmp_path / "a.safetensors", want)
    assert_same(read_state_dict(tmp_path / "a.safetensors"), want)


def test_opening_reads_no_tensor_and_reading_reads_one(tmp_path):
    path = tmp_path / "huge.safetensors"
    size = 2**36  # more than any memory; the file is a hole
    header = {
        "huge": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        "small": {"dtype": "U8", "shape": [2], "data_offsets": [size, size + 2]},
    }
    path.write_bytes(packed(header))
    os.truncate(path, path.stat().st_size + size + 2)
    state_dict = read_state_dict(path)
    assert str(state_dict.specs["huge"]) == f"uint8[{size}]"
    assert "huge" in state_dict and "other" not in state_dict
    np.testing.assert_array_equal(state_dict["small"], [0, 0])


def test_each_read_gives_an_array_of_its_own(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", ONES)
    state_dict = read_state_dict(tmp_path / "a.safetensors")
    state_dict["a"][:] = 2
    np.testing.assert_array_equal(state_dict["a"], ONES["a"])


def test_a_file_that_is_replaced_is_not_read_on(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, ONES)
    state_dict = read_state_dict(path)
    save_safetensors(path, arrays(), overwrite=True)
    assert_raises(ValueError, "has changed since", lambda: state_dict["a"])


@pytest.mark.parametrize("length", [128, 640, 0x4B50, 0x8B1F, 0x3C])
def test_content_decides_whatever_a_header_begins_like(tmp_path, length):
    """Lengths that a pickle, a zip file or others might begin with."""
    text = json.dumps({"a": tensor()}).ljust(length).encode()
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(packed(text, bytes(4)))
        assert_same(read_state_dict(tmp_path / name), {"a": np.zeros(1, "float32")})


def test_names_that_save_model_left_out_are_there(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", ONES, {"tied": "a", "about": "x"})
    state_dict = read_state_dict(tmp_path / "a.safetensors")
    assert_same(state_dict, {**ONES, "tied": ONES["a"]})


def test_header_may_say_nothing(tmp_path):
    header = {"__metadata__": None, "a": {**tensor(), "more": 3}}
    (tmp_path / "a.safetensors").write_bytes(packed(header, bytes(4)))
    assert_same(read_state_dict(tmp_path / "a.safetensors"), {"a": np.zeros(1, "f4")})


def packed(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + data


def tensor(first=0, last=4, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


WRONG_FILES = {
    "empty": (b"", "is empty"),
    "seven bytes": (b"\0" * 7, "its header must have 0 bytes, but 0 follow"),
    "length beyond the file": (
        packed({"a": tensor()}, length=10**6),
        "its header must have 1000000 bytes, but",
    ),
    "length of 2**63": (packed({}, length=2**63), "its header must have 9223372036"),
    "header cut": (packed({"a": tensor()}, bytes(4), length=20), "is not JSON"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "is not JSON"),
    "UTF-16": (packed('{"a": 3}'.encode("utf-16")), "is not JSON"),
    "byte order mark": (packed(b"\xef\xbb\xbf{}"), "is not JSON"),
    "nested deeply": (packed(b"[" * 100_000), "is not JSON"),
    "a list": (packed([]), "must be a JSON object"),
    "data cut": (packed({"a": tensor()}, bytes(3)), "must have 73 bytes, got 72"),
    "data too long": (packed({"a": tensor()}, bytes(5)), "must have 73 bytes, got 74"),
    "overlap": (
        packed({"a": tensor(), "b": tensor(2, 6)}, bytes(6)),
        "'b' must begin at byte 4, got 2",
    ),
    "the same bytes": (
        packed({"a": tensor(), "b": tensor()}, bytes(4)),
        "'b' must begin at byte 4, got 0",
    ),
    "gap": (
        packed({"a": tensor(), "b": tensor(5, 9)}, bytes(9)),
        "'b' must begin at byte 4, got 5",
    ),
    "backwards": (packed({"a": tensor(4, 0)}, bytes(4)), "'a' must have a dtype"),
    "negative": (packed({"a": tensor(-4, 0)}, bytes(4)), "'a' must have a dtype"),
    "too few bytes": (
        packed({"a": tensor(shape=(2,))}, bytes(4)),
        "'a' must have a dtype, a shape and the data_offsets of as many bytes",
    ),
    "shape of text": (packed({"a": tensor(shape="1")}, bytes(4)), "'a' must have a d"),
    "shape of floats": (packed({"a": tensor(shape=[1.0])}, bytes(4)), "'a' must have"),
    "shape too large": (packed({"a": tensor(0, 0, shape=[0, 2**64])}), "'a' must hav"),
    "no tensor": (packed({"a": 3}), "'a' must have a dtype"),
    "no offsets": (packed({"a": {"dtype": "F32", "shape": []}}), "'a' must have"),
    "three offsets": (
        packed({"a": {**tensor(), "data_offsets": [0, 2, 4]}}, bytes(4)),
        "'a' must have a dtype",
    ),
    "unknown dtype": (packed({"a": tensor(dtype="F3")}, bytes(4)), "dtype 'F3', which"),
    "metadata of numbers": (packed({"__metadata__": {"a": 1}}), "__metadata__ must"),
    "name twice": (
        packed(
            b'{"a": %b, "a": %b}' % ((json.dumps(tensor()).encode(),) * 2), bytes(4)
        ),
        "a name occurs twice",
    ),
}


@pytest.mark.parametrize("content, text", WRONG_FILES.values(), ids=WRONG_FILES)
def test_broken_safetensors_is_refused(tmp_path, content, text):
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(content)
    assert_raises(ValueError, text, lambda: read_state_dict(path))
    assert_raises(ValueError, str(path), lambda: read_state_dict(path))


def archive():
    """Returns the bytes of a tar archive with one file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        made.addfile(tarfile.TarInfo("model.pt"))
    return file.getvalue()


OTHER_KINDS = {
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "is a pointer of Git LFS, not the file: `git lfs pull`.",
    ),
    "gzip": (gzip.compress(packed({})), "is compressed by gzip: gunzip it first."),
    "bzip2": (bz2.compress(packed({})), "is compressed by bzip2: bunzip2 it first."),
    "xz": (lzma.compress(packed({})), "is compressed by xz: unxz it first."),
    "zstd": (b"\x28\xb5\x2f\xfd\x20", "is compressed by zstd: unzstd it first."),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c", "is an archive of 7-Zip: extract it first."),
    "tar": (archive(), "is a tar archive: extract it first, and give the file in it."),
    "web page": (b"<!doctype html>", "is a web page or XML, no checkpoint: download"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "is HDF5, as Keras writes it, whose weights have"),
    "GGUF": (b"GGUF\3\0\0\0", "is GGUF, of llama.cpp: give the checkpoint that it "),
}


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("content, text", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_what_people_have_besides_is_told_by_its_content(tmp_path, content, text, name):
    path = tmp_path / name
    path.write_bytes(content)
    assert_raises(ValueError, f"{str(path)!r} {text}", lambda: read_state_dict(path))


def test_infinite_and_nan_weights_are_read(tmp_path):
    want = {"a": np.array([np.nan, np.inf, -np.inf], "float32")}
    save_safetensors(tmp_path / "a.safetensors", want)
    assert_same(read_state_dict(tmp_path / "a.safetensors"), want)


FORMATS = {
    "mlx": "format: mlx (MLX, whose convolutions have their channels last)",
    "np": "format: np (NumPy, which Paddle writes too",
    "flax": "format: flax (Flax, whose kernels are transposed)",
    "something": "format: something: load it in PyTorch",
}


@pytest.mark.parametrize("written_for, text", FORMATS.items(), ids=FORMATS)
def test_tensors_of_another_framework_are_refused(tmp_path, written_for, text):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, ONES, {"format": written_for})
    assert_raises(ValueError, text, lambda: read_state_dict(path))


# Float8 with scales


def scaled(shape, scale, dtype="float32", name="weight_scale"):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype("float8_e4m3fn")
    scales = rng.uniform(0.5, 2, size=scale).astype(dtype)
    return {"a.weight": weight, f"a.{name}": scales, "a.bias": np.ones(2, "float32")}


SCALES = {
    "one": scaled((3, 4), ()),
    "one of shape 1": scaled((3, 4), (1,)),
    "each row": scaled((3, 4), (3, 1), "bfloat16"),
    "each row of shape n": scaled((3, 4), (3,)),
    "blocks": scaled((200, 257), (2, 3), name="weight_scale_inv"),
}


@pytest.mark.parametrize("stored", SCALES.values(), ids=SCALES)
def test_float8_is_multiplied_by_its_scale(tmp_path, stored):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, stored)
    state_dict = read_state_dict(path)
    weight, scale, _ = (array.astype("float64") for array in stored.values())
    if scale.shape == (2, 3):
        scale = scale.repeat(128, 0).repeat(128, 1)[:200, :257]
    scale = scale.reshape(scale.shape + (1,) * (2 - scale.ndim))
    dtype = [*stored.values()][1].dtype
    want = {"a.weight": (weight * scale).astype(dtype), "a.bias": stored["a.bias"]}
    assert_same(dict(sorted(state_dict.items())), dict(sorted(want.items())))
    assert state_dict.notes == ("Multiplied by their scales: a.weight.",)


def test_scales_of_an_unknown_kind_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, scaled((64, 64), (2, 2)))
    text = "a.weight is float8 with a scale float32[2, 2] for float8_e4m3fn[64, 64]: kn"
    assert_raises(ValueError, text, lambda: read_state_dict(path))


PACKED = {
    "GPTQ": (["a.qweight", "a.qzeros", "a.scales"], "a.qweight by GPTQ or AWQ"),
    "4 bits": (["a.weight", "a.weight.absmax"], "a.weight.absmax by bitsandbytes"),
    "8 bits": (["a.weight", "a.SCB"], "a.SCB by bitsandbytes"),
    "packed": (
        ["weight_packed", "weight_scale"],
        "weight_packed by compressed-tensors",
    ),
    "scaled": (["a.weight", "a.weight_scale"], "a.weight by one with int8 and scales"),
}


@pytest.mark.parametrize("names, text", PACKED.values(), ids=PACKED)
def test_integers_that_are_weights_are_refused(tmp_path, names, text):
    save_safetensors(tmp_path / "a.safetensors", dict.fromkeys(names, np.ones(2, "i1")))
    text = f"weights must not be quantized, got {text}: dequantize the model with"
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path / "a.safetensors"))


# Names


NAMES = {
    "DDP": (["module.a", "module.b.c"], ["a", "b.c"]),
    "twice": (["module.module.a"], ["a"]),
    "compiled DDP": (["_orig_mod.module.a"], ["a"]),
    "DDP of compiled": (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]),
    "compiled blocks": (["blocks.0._orig_mod.a", "b"], ["blocks.0.a", "b"]),
    "compiled twice": (["a._orig_mod._orig_mod.b"], ["a.b"]),
    "FSDP": (
        ["_fsdp_wrapped_module.a._checkpoint_wrapped_module.b"],
        ["a.b"],
    ),
    "AveragedModel": (["n_averaged", "module.a"], ["a"]),
    "a model's own module": (["module.a", "b"], ["module.a", "b"]),
    "a model's own n_averaged": (["n_averaged", "a"], ["n_averaged", "a"]),
}


@pytest.mark.parametrize("theirs, ours", NAMES.values(), ids=NAMES)
def test_prefixes_of_wrappers_are_peeled(tmp_path, theirs, ours):
    given = {name: np.full(2, n) for n, name in enumerate(reversed(theirs))}
    save_safetensors(tmp_path / "a.safetensors", given)
    state_dict = read_state_dict(tmp_path / "a.safetensors")
    want = dict(zip(reversed(theirs), reversed(ours), strict=False))
    assert set(state_dict) == set(ours)
    for name, peeled in want.items():
        np.testing.assert_array_equal(state_dict[peeled], given[name])
    assert len(state_dict.notes) == (theirs != ours)


def test_names_that_become_the_same_are_refused(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", arrays(["a", "_orig_mod.a"]))
    assert_raises(
        ValueError,
        "'a' and '_orig_mod.a' are both 'a'",
        lambda: read_state_dict(tmp_path / "a.safetensors"),
    )
