import os
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def test_readme_has_its_python_blocks():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{n}" for n in range(len(BLOCKS))])
def test_a_reader_can_run_each_block(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    # As a reader has it: JAX's own defaults, not the strict ones of these tests.
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        exec(compile(block, "README.md", "exec"), {})


def test_every_file_that_readme_names_exists():
    for name in re.findall(r"\]\(([^)#]+)\)|`((?:examples|tests)/[^` ]+)`", README):
        assert os.path.exists(ROOT / (name[0] or name[1])), name
