"""Whatever ends a process that writes: there is what was there, or what is new."""

import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from flax_mha.convert import read_state_dict, save_params, save_safetensors
from flax_mha.convert._files import replacing
from tests.convert.test_files import ONES, assert_raises
from tests.convert.test_writing import ATTENTION, TREE, by_writer, files_below, small


def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@by_writer
@pytest.mark.parametrize("step", ["_sync", "_rename", "_replace_folder"])
def test_what_was_there_is_kept_when_writing_fails(
    tmp_path, monkeypatch, name, save, content, step
):
    save(tmp_path / name, small(content))
    before = files_below(tmp_path)
    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(replacing, "_rename", lambda *_: False)
    monkeypatch.setattr(replacing, step, fail)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / name, content, overwrite=True)
    assert files_below(tmp_path) == before


@by_writer
def test_where_folders_cannot_be_swapped_they_are_renamed(
    tmp_path, monkeypatch, name, save, content
):
    monkeypatch.setattr(replacing, "_rename", lambda *_: False)
    save(tmp_path / name, small(content))
    before = files_below(tmp_path)
    save(tmp_path / name, content, overwrite=True)
    assert files_below(tmp_path) != before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_cannot_be_put_in_its_place_leaves_the_old_one(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(FileNotFoundError):
        replacing._replace_folder(tmp_path / "none", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_what_killed_processes_left_is_removed_by_the_next_one(tmp_path):
    path = tmp_path / "a.safetensors"
    left, locked, other = (
        tmp_path / f".{name}.0123abc{n}.tmp"
        for n, name in enumerate([path.name, path.name, "b"])
    )
    for folder in (left, locked, other):
        (folder / "half").mkdir(parents=True)
    lock = os.open(locked, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as a process that still writes
    save_safetensors(path, ONES)
    assert {*tmp_path.iterdir()} == {path, locked, other}
    os.close(lock)
    save_safetensors(path, ONES, overwrite=True)
    assert {*tmp_path.iterdir()} == {path, other}


def test_a_folder_replaced_in_the_wrong_moment_comes_back(tmp_path):
    left = tmp_path / ".a.0123abcd.tmp"
    save_params(tmp_path / "a", TREE)
    left.mkdir()
    (tmp_path / "a").rename(left / "replaced")
    assert_raises(FileExistsError, "exists", lambda: save_params(tmp_path / "a", TREE))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


class Meanwhile(dict):
    """Tensors that, when they are written, somebody else has written already."""

    def __init__(self, path):
        super().__init__(ONES)
        self.path = path

    def __getitem__(self, name):
        save_safetensors(self.path, {"b": ONES["b"]}, overwrite=True)
        return super().__getitem__(name)


@pytest.mark.parametrize("swaps", [True, False])
def test_of_two_writers_of_one_new_file_the_second_is_told(
    tmp_path, monkeypatch, swaps
):
    if not swaps:
        monkeypatch.setattr(replacing, "_rename", lambda *_: False)
    monkeypatch.chdir(tmp_path)
    path = pathlib.Path("a.safetensors")
    text = "'a.safetensors' exists; overwrite=True replaces it."
    assert_raises(
        FileExistsError, text, lambda: save_safetensors(path, Meanwhile(path))
    )
    assert os.listdir() == [path.name] and {*read_state_dict(path)} == {"b"}
    save_safetensors(path, Meanwhile(path), overwrite=True)
    assert os.listdir() == [path.name] and {*read_state_dict(path)} == {"a", "b"}


def test_what_is_no_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(FileExistsError, match="is neither a file nor a folder"):
        save_safetensors(tmp_path / "a.safetensors", ONES, overwrite=True)


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    name = "\N{SNOWMAN}" * 80 + ".safetensors"
    save_safetensors(tmp_path / name, ONES)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@by_writer
@pytest.mark.parametrize("dangling", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(
    tmp_path, name, save, content, dangling
):
    (tmp_path / "far").mkdir()
    target = tmp_path / "far" / name
    if not dangling:
        save(target, small(content))
    (tmp_path / name).symlink_to(target)
    save(tmp_path / name, content, overwrite=not dangling)
    assert (tmp_path / name).is_symlink() and target.exists()
    assert (
        len(list(tmp_path.iterdir())) == 2 and len(list(target.parent.iterdir())) == 1
    )


STRUCK = """
import os, sys
from flax_mha._cli import program
from flax_mha.convert._files import safetensors

def write(path, *_):
    path.write_bytes(bytes(1000))
    os.kill(os.getpid(), int(number))

safetensors.write_file = write
_, number, *paths = sys.argv
sys.argv = ["flax-mha", "convert", *paths, "--num-heads", "2", "--overwrite"]
program()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_ended_leaves_what_was_there(tmp_path, number):
    paths = [tmp_path / "a.safetensors", tmp_path / "out.safetensors"]
    save_safetensors(paths[0], ATTENTION)
    save_params(paths[1], TREE)
    before = files_below(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", STRUCK, str(int(number)), *paths],
        capture_output=True,
        text=True,
    )
    if number == signal.SIGKILL:
        assert run.returncode == -signal.SIGKILL
        assert files_below(tmp_path).items() > before.items()
        save_params(paths[1], TREE, overwrite=True)  # the next one tidies
    else:
        assert run.returncode == 128 + number
        assert run.stderr == "flax-mha: interrupted\n"
    assert files_below(tmp_path) == before
