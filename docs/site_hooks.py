"""What pages link to outside of docs/ becomes pages of the site, by mkdocs's hooks.

So that the same links work in a clone, on a forge, and here.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(\.\./([^)#]+)\)")  # to a file of the repository
PREFIX = "repository"


def on_files(files, config):
    """Adds a page for each file that is linked to, and for what these link to."""
    new = [name for page in files.documentation_pages() for name in _linked(page)]
    for name in sorted(set(new)):
        path = ROOT / name
        text = path.read_text()
        if path.suffix != ".md":
            text = f"# {name}\n\n```{path.suffix[1:]}\n{text}```\n"
        where = dict(inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(File.generated(config, _page(name), content=text, **where))
    return files


def on_page_markdown(markdown, page, **_):
    here = posixpath.dirname(page.file.src_uri)

    def link(match):
        return f"]({posixpath.relpath(_page(match[1]), here or '.')})"

    return LINK.sub(link, markdown)


def _linked(page):
    return LINK.findall(page.content_string)


def _page(name):
    return posixpath.join(PREFIX, name.removesuffix(".md") + ".md")
