"""What README.md and docs/ show is run, as a reader would at the root of a clone."""

import contextlib
import importlib
import io
import pathlib
import re
import shlex
import tomllib

import jax
import numpy as np
import pytest

from flax_mha._cli import main

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
README_BLOCKS = [
    code for kind, code in BLOCK.findall(README.read_text()) if kind == "python"
]
PICTURES = sorted((ROOT / "docs" / "pictures").iterdir())


def name(path):
    return path.name


@pytest.fixture(autouse=True)
def _as_a_reader_has_it(tmp_path, monkeypatch):
    """JAX's own defaults, not these tests' strict ones, and a folder to write in."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def test_readme_has_its_python_blocks():
    assert len(README_BLOCKS) >= 3


@pytest.mark.parametrize("block", README_BLOCKS, ids=range(len(README_BLOCKS)))
def test_a_reader_can_run_each_block(block):
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=name
)
def test_a_reader_can_run_a_page_from_top_to_bottom(page):
    names = {}
    printed = ""
    for kind, block in BLOCK.findall(page.read_text()):
        if kind == "text":  # what the block before printed
            assert words(printed)[-len(words(block)) :] == words(block)
            continue
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            if kind == "python":
                exec(compile(block, page.name, "exec"), names)
            else:
                run_commands(block)
        printed = stream.getvalue()


def words(text):
    return re.findall(r"[^\s─]+", text)


def run_commands(block):
    """Runs the lines of flax-mha; those of other programs are for readers."""
    for line in block.splitlines():
        program, *argv = shlex.split(line)
        if program == "flax-mha":
            assert main(argv) == 0, line
        else:
            assert program in ("pip", "export"), line


@pytest.mark.parametrize("page", [README, *PAGES], ids=name)
def test_every_file_and_extra_that_a_page_names_exists(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"(?:`|python )((?:docs|examples|tests)/[^` \n]+)", text):
        assert (ROOT / path).exists(), path
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r'"\.\[([^]]+)\]"', text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), extras


@pytest.mark.parametrize("picture", PICTURES, ids=name)
def test_a_picture_is_what_its_script_draws(picture):
    module = importlib.import_module(f"docs.draw.{picture.stem}")
    number = re.compile(r"\d+\.\d+")
    (drawn, here) = (module.drawing(), picture.read_text())
    assert number.sub("", drawn) == number.sub("", here)
    numbers = (np.array(number.findall(svg), float) for svg in (drawn, here))
    np.testing.assert_allclose(
        *numbers, atol=0.011
    )  # the last digit may round otherwise
