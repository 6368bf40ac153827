"""What README.md and docs/ show is run, as a reader would at the root of a clone."""

import contextlib
import importlib
import io
import itertools
import pathlib
import re
import shlex
import tomllib

import numpy as np
import pytest

from examples import train
from flax_mha._cli import main
from tests.defaults import jax_defaults

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
README_BLOCKS = [
    code for kind, code in BLOCK.findall(README.read_text()) if kind == "python"
]
PICTURES = sorted((ROOT / "docs" / "pictures").iterdir())


# Programs that pages name for readers, and tests do not run.
READERS = ("cd", "export", "gcloud", "pip", "python", "source", "uv")


def name(path):
    return path.name


@pytest.fixture(autouse=True)
def _as_a_reader_has_it(tmp_path, monkeypatch):
    """JAX's own defaults, not these tests' strict ones, and a folder to write in."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    with jax_defaults():
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
    """Runs flax-mha, and parses what train.py is given; the rest is for readers."""
    for line in block.splitlines():
        for program, *argv in commands(line):
            if program == "flax-mha":
                assert main(argv) == 0, line
            elif argv[:2] == ["-m", "examples.train"]:
                train.arguments(argv[2:])
            else:
                program = pathlib.Path(program).name
                assert program in READERS, line


def commands(line):
    """Yields the words of each command of a line, also of those for another machine."""
    words = shlex.split(line)
    for is_and, command in itertools.groupby(words, "&&".__eq__):
        if not is_and:
            yield list(command)
    for word in words:
        if word.startswith("--command="):
            yield from commands(word.removeprefix("--command="))


def test_a_command_for_another_machine_is_seen():
    line = "gcloud ssh --command='cd a && python -m examples.train run --stops 3'"
    assert [program for program, *_ in commands(line)] == ["gcloud", "cd", "python"]
    with pytest.raises(SystemExit):
        run_commands(line)


@pytest.mark.parametrize("page", [README, *PAGES], ids=name)
def test_every_file_and_extra_that_a_page_names_exists(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https:)([^)#]+)[^)]*\)", text):
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
