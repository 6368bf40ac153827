"""What README.md and docs/ show is run, as a reader would."""

import contextlib
import io
import pathlib
import re
import runpy
import shlex

import jax
import pytest

from flax_mha._cli import main

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
GUIDE = ROOT / "docs" / "converting.md"
RAGGED = ROOT / "docs" / "ragged.md"
TRAINING = ROOT / "docs" / "training.md"
DECODING = ROOT / "docs" / "decoding.md"
MESHES = ROOT / "docs" / "meshes.md"


@pytest.fixture(autouse=True)
def _as_a_reader_has_it():
    """JAX's own defaults, not the strict ones of these tests."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def test_readme_has_its_python_blocks():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{n}" for n in range(len(BLOCKS))])
def test_a_reader_can_run_each_block(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(block, "README.md", "exec"), {})


def test_a_reader_can_run_the_guide_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    assert {kind for kind, _ in blocks} == {"python", "sh", "text"}
    names = {}
    printed = ""
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, GUIDE.name, "exec"), names)
        elif kind == "sh":
            printed = run_commands(block)
        else:  # what the last of these commands printed
            assert words(printed)[-len(words(block)) :] == words(block)


def words(text):
    return re.findall(r"[^\s─]+", text)


def run_commands(block):
    """Returns what these lines print, each a call of flax-mha that must succeed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for line in block.splitlines():
            program, *argv = shlex.split(line)
            assert program == "flax-mha"
            assert main(argv) == 0, line
    return printed.getvalue()


@pytest.mark.parametrize("page", [RAGGED, TRAINING, MESHES], ids=lambda page: page.name)
def test_a_reader_can_run_a_page_from_top_to_bottom(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        exec(compile(block, page.name, "exec"), names)


def test_a_reader_can_run_the_guide_to_decoding():
    names = {}
    text = DECODING.read_text()
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(compile(block, DECODING.name, "exec"), names)


def test_the_drawing_of_blocks_is_of_those_that_are_computed():
    with jax.enable_x64(False):
        drawing = runpy.run_path(str(ROOT / "docs" / "draw_ragged_blocks.py"))
    assert drawing["drawing"]() == drawing["FILE"].read_text()


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", GUIDE, RAGGED, TRAINING, DECODING, MESHES],
    ids=lambda page: page.name,
)
def test_every_file_that_a_page_names_exists(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    for link in links:
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:docs|examples|tests)/[^` ]+)`", page.read_text()):
        assert (ROOT / name).exists(), name
