"""Pickles and NumPy's files: what they hold, and what they must not do."""

import collections
import io
import pickle
import struct
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from flax_mha.convert import read_state_dict
from tests.convert.test_files import arrays, assert_raises, assert_same


def written(path, content):
    path.write_bytes(content)
    return path


# What torch.save writes, without PyTorch


def tensor(key, *, size=(2, 3), stride=(3, 1), offset=0, kind="FloatStorage"):
    """Returns the opcodes of a tensor in a storage."""

    def numbers(values):
        return b"(" + b"".join(b"K" + bytes([value]) for value in values) + b"t"

    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\n"
        + kind.encode()
        + b"\nX\1\0\0\0"
        + key
        + b"X\3\0\0\0cpuK\6tQK"
        + bytes([offset])
        + numbers(size)
        + numbers(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def named(**values):
    """Returns the pickle of a dict."""
    items = (
        b"X" + struct.pack("<I", len(name)) + name.encode() + value
        for name, value in values.items()
    )
    return b"\x80\2}(" + b"".join(items) + b"u."


def saved(pickled, **storages):
    """Returns the file that torch.save would make."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key.removeprefix('_')}", content)
    return buffer.getvalue()


VALUES = np.arange(6, dtype="float32").reshape(2, 3)


def test_tensors_are_read_without_pytorch(tmp_path):
    pickled = named(
        a=tensor(b"0"),
        transposed=tensor(b"0", size=(3, 2), stride=(1, 3)),
        row=tensor(b"0", size=(3,), stride=(1,), offset=3),
        expanded=tensor(b"0", size=(2, 2), stride=(0, 1), offset=1),
        empty=tensor(b"0", size=(0, 2), stride=(2, 1)),
        half=tensor(b"1", size=(2,), stride=(1,), kind="BFloat16Storage"),
    )
    content = saved(pickled, _0=VALUES.tobytes(), _1=b"\x80\x3f\0\x40")
    want = {
        "a": VALUES,
        "transposed": VALUES.T,
        "row": VALUES[1],
        "expanded": np.array([[1, 2], [1, 2]], "float32"),
        "empty": np.zeros((0, 2), "float32"),
        "half": np.array([1, 2], "bfloat16"),
    }
    assert_same(read_state_dict(written(tmp_path / "a", content)), want)


OUTSIDE = {
    "offset": dict(offset=1),
    "size": dict(size=(3, 3)),
    "stride": dict(stride=(4, 1)),
    "dtype": dict(kind="DoubleStorage"),
}


@pytest.mark.parametrize("changes", OUTSIDE.values(), ids=OUTSIDE)
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path, changes):
    content = saved(named(a=tensor(b"0", **changes)), _0=VALUES.tobytes())
    state_dict = read_state_dict(written(tmp_path / "a.pt", content))
    text = "a.pt' is broken: a tensor ends behind its bytes."
    assert_raises(ValueError, text, lambda: state_dict["a"])


def test_a_file_that_is_replaced_is_not_read_on(tmp_path):
    content = saved(named(a=tensor(b"0")), _0=VALUES.tobytes())
    state_dict = read_state_dict(written(tmp_path / "a.pt", content))
    (tmp_path / "a.pt").write_bytes(content + b"\0")
    assert_raises(ValueError, "has changed since", lambda: state_dict["a"])


def test_a_state_dict_exported_before_pytorch_2_8_is_read(tmp_path):
    """A file of torch.save in a zip without a folder."""
    content = saved(named(a=tensor(b"0")), _0=VALUES.tobytes())
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("version", "8.4")
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", content)
    assert_same(read_state_dict(tmp_path / "a.pt2"), {"a": VALUES})


# NumPy's


UNUSUAL = {
    "big-endian": VALUES.astype(">f4"),
    "columns first": np.asfortranarray(VALUES),
    "strided": VALUES[:, ::2],
    "scalar": np.full((), 3, "float32"),
    "empty": np.zeros((0, 3), "int8"),
    "bfloat16": VALUES.astype("bfloat16"),
    "truth": VALUES > 2,
    "complex": VALUES * 1j,
}


@pytest.mark.parametrize("values", UNUSUAL.values(), ids=UNUSUAL)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_in_pickles_are_read(tmp_path, values, protocol):
    content = {"model": collections.OrderedDict(a=values, tied=values), "by": {1, 2}}
    path = written(tmp_path / "a.pkl", pickle.dumps(content, protocol))
    native = values.astype(values.dtype.newbyteorder("="))
    assert_same(read_state_dict(path), {"a": native, "tied": native})


@pytest.mark.parametrize("name", sorted(UNUSUAL.keys() - {"bfloat16"}))
def test_arrays_in_numpy_files_are_read(tmp_path, name):
    values = UNUSUAL[name]
    native = values.astype(values.dtype.newbyteorder("="))
    np.savez(tmp_path / "a.npz", a=values, b=VALUES)
    assert_same(read_state_dict(tmp_path / "a.npz"), {"a": native, "b": VALUES})
    np.save(tmp_path / "a.npy", np.array({"a": values}), allow_pickle=True)
    assert_same(read_state_dict(tmp_path / "a.npy"), {"a": native})


def test_one_array_alone_has_no_name(tmp_path):
    np.save(tmp_path / "a.npy", VALUES)
    text = "must hold a state_dict of tensors, got a tensor."
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path / "a.npy"))


def test_objects_in_an_array_are_no_tensors(tmp_path):
    content = {**arrays("a"), "names": np.array(["x", None], object)}
    path = written(tmp_path / "a.pkl", pickle.dumps(content))
    state_dict = read_state_dict(path)
    assert_same(state_dict, arrays("a"))
    assert state_dict.notes == ("Left out, as they are no parameters: names.",)


# Hostile


def test_an_import_that_fails_is_never_tried(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit")
    content = b"\x80\x02}X\x01\x00\x00\x00acevil\nrun\n)Rs."
    (tmp_path / "a.pt").write_bytes(content)
    sys.path.insert(0, str(tmp_path))
    try:
        text = "must hold a state_dict of tensors, got a mapping with keys ['a']"
        assert_raises(ValueError, text, lambda: read_state_dict(tmp_path / "a.pt"))
        with pytest.raises(SystemExit):
            pickle.loads(content)
    finally:
        sys.path.remove(str(tmp_path))


# A tuple of twice a tuple of twice a tuple ...; to hash it takes forever.
NESTED = b")" + b"2\x86" * 100


def shared(levels):
    """Returns a list of twice a list of twice a list ... of an array."""
    content = [VALUES]
    for _ in range(levels):
        content = [content, content]
    return content


def cyclic():
    content = [VALUES]
    content.append(content)
    return content


BOMBS = {
    "number of a memo": (b"\x80\x02}r\xff\xff\xff\xff.", "got a mapping with keys []"),
    "length of text": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x00.", "is a broken pickle"),
    "length of a frame": (b"\x80\x04\x95" + b"\xff" * 6 + b"\x00\x00N.", "is a broken"),
    "hash of a key": (
        b"\x80\x02}" + NESTED + b"K\x01s.",
        "got a mapping with keys [<tuple>]",
    ),
    "hash of a member": (
        b"\x80\x04\x8f(" + NESTED + b"\x90.",
        "got a mapping with keys []",
    ),
    "hash of an item": (
        b"\x80\x02ccollections\nOrderedDict\n](" + NESTED + b"K\x01\x86e\x85R.",
        "got a mapping with keys [<tuple>]",
    ),
    "shared lists": (
        pickle.dumps({"a": shared(100)}),
        "got a, which holds too much to be a model.",
    ),
    "list in itself": (pickle.dumps({"a": cyclic()}), "got a, which holds itself."),
    "key of a storage": (
        saved(
            b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\n" + NESTED + b"K\1tQ."
        ),
        "is a broken pickle: a storage of no known dtype",
    ),
    "a tuple": (b"\x80\x02).", "must hold a state_dict of tensors, got tuple"),
    "stack": (b"\x80\x02R.", "is a broken pickle"),
    "no stop": (b"\x80\x02}", "is a broken pickle"),
    "unknown code": (b"\x80\x02\xff.", "is a broken pickle"),
    "extension": (b"\x80\x02\x82\x01.", "is a broken pickle: it has the extension 1"),
    "persistent": (
        b"\x80\x02X\x01\x00\x00\x00aQ.",
        "is a broken pickle: it names what",
    ),
    "build of a class": (
        b"\x80\x02cos\nsystem\n}b.",
        "is a broken pickle: it gives a ",
    ),
    "name that is none": (
        b"\x80\x04}\x8c\x01b\x8c\x03a\n\x00\x8c\x01b\x93s.",
        "got a mapping with keys ['b']",
    ),
    "build of a number": (b"\x80\x02K\x01}b.", "is a broken pickle: it gives a state"),
    "protocol of the future": (b"\x80\x09}.", "no file of PyTorch's"),
}


@pytest.mark.parametrize("content, text", BOMBS.values(), ids=BOMBS)
def test_a_pickle_that_would_use_much_is_refused(tmp_path, content, text):
    (tmp_path / "a.pt").write_bytes(content)
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path / "a.pt"))


@pytest.mark.parametrize("code", [b"\x96", b"\x8d", b"\x8e", b"\x95"])
def test_an_announced_length_makes_no_room(tmp_path, code):
    """Of a bytearray, a text, bytes and a frame."""
    path = written(tmp_path / "a.pt", b"\x80\x05" + code + b"\0\0\0\0\1\0\0\0.")
    tracemalloc.start()
    try:
        assert_raises(ValueError, "is a broken pickle", lambda: read_state_dict(path))
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
