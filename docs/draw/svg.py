"""SVG in two color schemes: a viewer that prefers dark gets a dark picture."""

from pathlib import Path
from xml.sax.saxutils import escape

PICTURES = Path(__file__).parents[1] / "pictures"

STYLE = """<style>
:root { --paper: #fff; --ink: #222; --quiet: #ececec; --line: #bbb; --a: #3366aa;
  --b: #d17a00; --c: #2a8a57; --d: #a03c78 }
@media (prefers-color-scheme: dark) { :root { --paper: #1e2129; --ink: #e6e6e6;
  --quiet: #2c303a; --line: #555; --a: #7fb0ee; --b: #f0a848; --c: #6fce9c;
  --d: #e08cc0 } }
text { fill: var(--ink); font: 12px sans-serif }
</style>"""


def rect(x, y, width, height, fill="none", opacity=1, stroke=None):
    line = f' stroke="var(--{stroke})"' if stroke else ""
    fill = fill if fill == "none" else f"var(--{fill})"
    size = f'width="{width:.1f}" height="{height:.1f}"'
    shade = "" if opacity == 1 else f' fill-opacity="{opacity:.2f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{fill}"{shade}{line}/>'


def line(points, stroke, width=1):
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    pen = f'stroke="var(--{stroke})" stroke-width="{width}"'
    return f'<polyline points="{places}" fill="none" {pen}/>'


def text(x, y, words, anchor="start"):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def picture(width, height, title, parts):
    """Returns an SVG of these parts; `title` is for those who do not see it."""
    width, height = round(width), round(height)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(title)}</title>",
        STYLE,
        rect(0, 0, width, height, "paper"),
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
