"""The reference has every public name, and the site has every page."""

import pathlib
import re

import flax_mha
from flax_mha import convert, functional, sharding, training

DOCS = pathlib.Path(__file__).parents[1] / "docs"
MODULES = {"convert", "functional", "linen", "nnx", "sharding", "training"}


def public_names():
    names = {f"flax_mha.{name}" for name in set(dir(flax_mha)) - MODULES}
    for module in (convert, flax_mha.nnx, functional, sharding, training):
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    return names


def test_the_reference_has_each_public_name_once():
    listed = re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.M)
    assert len(listed) == len(set(listed))
    assert set(listed) == public_names()


def test_the_site_leads_to_every_page():
    config = (DOCS.parent / "mkdocs.yml").read_text()
    pages = re.findall(r"^ +- .*: (\w+\.md)$", config, re.M)
    assert sorted(pages) == sorted(path.name for path in DOCS.glob("*.md"))
