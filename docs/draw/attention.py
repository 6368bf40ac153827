"""What the class token of a converted vision transformer attends to in three digits."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from docs.draw.svg import picture, rect, text
from examples.digits_vit_nnx import (
    NUM_HEADS,
    VisionTransformer,
    load_digits_split,
)
from flax_mha import convert

DIGITS = (0, 4, 7)
CHECKPOINT = Path(__file__).parents[2] / "examples" / "data" / "digits_vit.safetensors"
PIXEL, GAP, TOP, LEFT = 12, 16, 26, 16
TILE = 8 * PIXEL


def attention() -> tuple[np.ndarray, np.ndarray]:
    """Returns images, (3, 8, 8), and the last block's weights, (3, heads, 4, 4)."""
    state_dict = convert.read_state_dict(CHECKPOINT)
    model = VisionTransformer(nnx.Rngs(0))
    convert.update_nnx(model, convert.convert_tree(state_dict, NUM_HEADS))
    _, images, _, labels = load_digits_split()
    images = images[[np.flatnonzero(labels == digit)[0] for digit in DIGITS]]
    with jax.default_matmul_precision("highest"):
        _, weights = nnx.view(model, deterministic=True)(images)
    of_class_token = np.asarray(weights[-1])[:, :, 0, 1:]
    return images, of_class_token.reshape(len(DIGITS), NUM_HEADS, 4, 4)


def squares(x: float, y: float, shades: np.ndarray, fill: str) -> list[str]:
    size = TILE / len(shades)
    return [
        rect(x + column * size, y + row * size, size, size, fill, shade)
        for (row, column), shade in np.ndenumerate(shades)
        if shade >= 0.005
    ]


def drawing() -> str:
    parts = []
    titles = ["digit", *(f"head {n + 1}" for n in range(NUM_HEADS))]
    lefts = [LEFT + n * (TILE + GAP) for n in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        parts.append(text(left + TILE / 2, 17, title, "middle"))
    for row, (image, heads) in enumerate(zip(*attention(), strict=True)):
        y = TOP + row * (TILE + GAP)
        for left in lefts:
            parts.append(rect(left, y, TILE, TILE, "quiet"))
        parts += squares(lefts[0], y, image, "ink")
        for left, weights in zip(lefts[1:], heads, strict=True):
            parts += squares(left, y, 0.3 * image, "ink")
            parts += squares(left, y, 0.85 * weights / weights.max(), "b")
    width = lefts[-1] + TILE + LEFT
    height = TOP + len(DIGITS) * (TILE + GAP)
    title = "Attention of the class token to the patches of three digits, by head"
    return picture(width, height, title, parts)
