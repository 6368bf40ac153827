"""Checkpoints of several files, and what lies beside them."""

import json

import pytest

from flax_mha.convert import read_state_dict, save_safetensors
from tests.convert.test_files import ONES, arrays, assert_raises, assert_same


def sharded(folder, files, index="model.safetensors.index.json", **weight_map):
    """Writes files of arrays and an index that tells what they hold, then says more."""
    for file, names in files.items():
        save_safetensors(folder / file, arrays(names))
    told = {name: file for file, names in files.items() for name in names}
    content = {"metadata": {}, "weight_map": told | weight_map}
    (folder / index).write_text(json.dumps(content))
    return folder / index


PARTS = {"m-00001-of-00002.safetensors": "ac", "m-00002-of-00002.safetensors": "b"}


def test_sharded_safetensors_are_read_by_index_and_by_folder(tmp_path):
    index = sharded(tmp_path, PARTS)
    want = arrays("ac") | arrays("b")
    assert_same(read_state_dict(index), want)
    assert_same(read_state_dict(tmp_path), want)


def test_parts_may_be_links_as_in_hugging_face_cache(tmp_path):
    for folder in ("blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    index = sharded(tmp_path / "snapshot", PARTS)
    for number, file in enumerate(PARTS):
        (tmp_path / "snapshot" / file).rename(tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / file).symlink_to(f"../blobs/{number}")
    assert_same(read_state_dict(index), arrays("ac") | arrays("b"))


def test_all_parts_of_a_folder_without_an_index_are_read(tmp_path):
    for file, names in PARTS.items():
        save_safetensors(tmp_path / file, arrays(names))
    assert_same(read_state_dict(tmp_path), arrays("ac") | arrays("b"))
    for number, file in enumerate(PARTS, 1):
        text = f"is part {number} of 2 of a model: give its folder, or the .index.json"
        path = tmp_path / file
        assert_raises(ValueError, text, lambda path=path: read_state_dict(path))
    save_safetensors(tmp_path / file, arrays("a"), overwrite=True)
    text = "must hold what no other part does, got a."
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path))


@pytest.mark.parametrize(
    "files",
    [
        ["consolidated.00.safetensors", "consolidated.01.safetensors"],
        ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
    ],
)
def test_part_by_one_of_several_processes_is_refused(tmp_path, files):
    for file in files:
        save_safetensors(tmp_path / "a.safetensors", ONES)
        (tmp_path / "a.safetensors").rename(tmp_path / file)
    text = f"is one of several parts of a model, {', '.join(files)}: join them"
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path / files[1]))
    (tmp_path / files[0]).unlink()
    assert_same(read_state_dict(tmp_path / files[1]), ONES)


OUTSIDE = "must name files of its own folder, got"
WRONG_INDEXES = {
    "above": (dict(b="../outside.safetensors"), ValueError, OUTSIDE),
    "absolute": (dict(b="/etc/passwd"), ValueError, OUTSIDE),
    "below": (dict(b="more/inside.safetensors"), ValueError, OUTSIDE),
    "Windows path": (dict(b="..\\outside.safetensors"), ValueError, OUTSIDE),
    "Windows drive": (dict(b="C:outside.safetensors"), ValueError, OUTSIDE),
    "parent": (dict(b=".."), ValueError, OUTSIDE),
    "nothing": (dict(b=""), ValueError, OUTSIDE),
    "number": (dict(b=3), ValueError, OUTSIDE),
    "list": (dict(b=["x"]), ValueError, OUTSIDE),
    "missing part": (
        dict(d="m-3.safetensors", e="m-4.safetensors"),
        FileNotFoundError,
        "names 4 files, of which 2 are missing: m-3.safetensors, m-4.safetensors.",
    ),
    "missing tensor": (
        dict(d="m-00002-of-00002.safetensors"),
        ValueError,
        "must hold the tensors that model.safetensors.index.json says; it lacks d, "
        "and has besides none.",
    ),
    "tensor in another part": (
        dict(a="m-00002-of-00002.safetensors"),
        ValueError,
        "it lacks a, and has besides none.",
    ),
}


@pytest.mark.parametrize(
    "weight_map, error, text", WRONG_INDEXES.values(), ids=WRONG_INDEXES
)
def test_wrong_index_is_refused(tmp_path, weight_map, error, text):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_safetensors(tmp_path / "outside.safetensors", arrays("b"))
    index = sharded(folder, PARTS, **weight_map)
    assert_raises(error, text, lambda: read_state_dict(index))


def test_index_that_leaves_out_a_tensor_is_refused(tmp_path):
    index = sharded(tmp_path, {"m-1.safetensors": "ac", "m-2.safetensors": "ab"})
    assert_raises(
        ValueError, "it lacks none, and has besides a.", lambda: read_state_dict(index)
    )


@pytest.mark.parametrize(
    "content, text",
    [
        ("{", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[]", "must have a weight_map of names to files"),
        ('{"weight_map": {}}', "must have a weight_map of names to files"),
        ('{"architectures": ["A"]}', "must have a weight_map of names to files"),
    ],
)
def test_file_that_is_no_index_is_refused(tmp_path, content, text):
    (tmp_path / "a.index.json").write_text(content)
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path / "a.index.json"))


FOLDERS = {
    "one of any name": (["x.safetensors", "notes.txt"], "x.safetensors"),
    "Hugging Face's name": (
        ["adapter_model.safetensors", "model.safetensors", "model.fp16.safetensors"],
        "model.safetensors",
    ),
    "safetensors before pickles": (
        ["x.safetensors", "pytorch_model.bin", "training_args.bin", "optimizer.pt"],
        "x.safetensors",
    ),
    "index before another": (
        ["model.safetensors.index.json", "consolidated.safetensors"],
        "model.safetensors.index.json",
    ),
    "index of a variant": (
        ["x.safetensors.index.fp16.json", "x.fp16-00001-of-00001.safetensors"],
        "x.safetensors.index.fp16.json",
    ),
}


@pytest.mark.parametrize("files, chosen", FOLDERS.values(), ids=FOLDERS)
def test_file_that_a_folder_is_read_from(tmp_path, files, chosen):
    for file in files:
        (tmp_path / file).touch()
    assert_raises(ValueError, chosen, lambda: read_state_dict(tmp_path))  # it is empty
    if chosen.endswith(".json"):
        index = {"weight_map": {"a": "y-1-of-1.safetensors"}}
        (tmp_path / chosen).write_text(json.dumps(index))
        chosen = "y-1-of-1.safetensors"
    save_safetensors(tmp_path / chosen, arrays("a"), overwrite=True)
    assert_same(read_state_dict(tmp_path), arrays("a"))


def test_files_that_a_folder_is_not_read_from_are_told(tmp_path):
    save_safetensors(tmp_path / "model.safetensors", ONES)
    assert not read_state_dict(tmp_path).notes
    (tmp_path / "older.pt").touch()
    note = "Read from model.safetensors, not older.pt."
    assert read_state_dict(tmp_path).notes == (note,)


WRONG_FOLDERS = {
    "nothing": ([], "got no files"),
    "other things": (["train.py"], "must hold a .safetensors file, one of .pt"),
    "two of an older ending": (["a.pth.tar", "b.pt.tar"], "got a.pth.tar, b.pt.tar;"),
    "two": (["a.safetensors", "b.safetensors"], "got a.safetensors, b.safetensors;"),
    "whole and in parts": (
        ["model.safetensors", "model.safetensors.index.json"],
        "got model.safetensors.index.json, model.safetensors;",
    ),
    "part without index": (
        ["model-00001-of-00002.safetensors"],
        "must hold all 2 parts of a model, got model-00001-of-00002.safetensors; there "
        "is no part 2.",
    ),
    "parts of two models": (
        ["a-00001-of-00002.bin", "b-00002-of-00002.bin"],
        "must hold the parts of one model, got a-00001-of-00002.bin, b-00002-of-00002.",
    ),
    "by several processes": (
        [f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2)],
        "was written by one of several processes of torch.distributed.checkpoint, and",
    ),
}


@pytest.mark.parametrize("files, text", WRONG_FOLDERS.values(), ids=WRONG_FOLDERS)
def test_folder_without_one_checkpoint_is_refused(tmp_path, files, text):
    for file in files:
        (tmp_path / file).touch()
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path))


def test_config_beside_a_file_or_in_a_folder(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", ONES)
    assert read_state_dict(tmp_path).config is None
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    for path in (tmp_path, tmp_path / "a.safetensors"):
        assert read_state_dict(path).config == {"num_attention_heads": 3}


@pytest.mark.parametrize("content", ["{", "[3]"])
def test_broken_config_is_told_when_it_is_asked_for(tmp_path, content):
    save_safetensors(tmp_path / "a.safetensors", ONES)
    (tmp_path / "config.json").write_text(content)
    state_dict = read_state_dict(tmp_path)
    assert_raises(ValueError, "config.json' must be", lambda: state_dict.config)


def test_paths_that_are_nothing_to_read(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    missing = tmp_path / "missing.safetensors"
    for error, text, path in (
        (FileNotFoundError, "path must be a file or folder, got", missing),
        (ValueError, "got no files", tmp_path / "model.safetensors"),
        (
            FileNotFoundError,
            "path must be a file or folder, got 'some",
            "someone/model",
        ),
    ):
        assert_raises(error, text, lambda path=path: read_state_dict(path))
    save_safetensors(tmp_path / "a.safetensors", ONES)
    assert_raises(
        ValueError,
        "wrapper must be a key of",
        lambda: read_state_dict(tmp_path / "a.safetensors", wrapper="ema"),
    )
