"""The vision transformer of `digits_vit.py` in nnx, fine-tuned with Muon.

Needs no PyTorch. It loads the same checkpoint, compares its logits with those PyTorch
recorded, fine-tunes for one epoch on digits moved by a pixel, and writes the result as
a state_dict that PyTorch's `load_state_dict` takes.

    python examples/digits_vit_nnx.py --out digits_vit_out
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from flax_mha import convert, training
from flax_mha.nnx import MultiheadAttention

EMBED_DIM, NUM_HEADS, NUM_BLOCKS = 64, 4, 3
TOLERANCE = 1e-4  # on logits of about 10, computed in float32


class Block(nnx.Module):
    """Attention, then an MLP, each on a normed input and added to its input."""

    def __init__(self, rngs):
        self.norm1 = layer_norm(rngs)
        self.attn = MultiheadAttention(
            EMBED_DIM, NUM_HEADS, dropout=0.1, batch_first=True, rngs=rngs
        )
        self.norm2 = layer_norm(rngs)
        self.fc1 = nnx.Linear(EMBED_DIM, 2 * EMBED_DIM, rngs=rngs)
        self.fc2 = nnx.Linear(2 * EMBED_DIM, EMBED_DIM, rngs=rngs)

    def __call__(self, x):  # (batch, tokens, embed)
        y = self.norm1(x)
        y, weights = self.attn(y, y, y, average_attn_weights=False)
        x = (
            x + y
        )  # weights: (batch, heads, tokens, tokens); under jit, free if not used
        y = nnx.gelu(self.fc1(self.norm2(x)), approximate=False)  # Flax approximates
        return x + self.fc2(y), weights


class VisionTransformer(nnx.Module):
    """Classifies an 8x8 image from 16 patches of 2x2 pixels and a class token."""

    def __init__(self, rngs):
        self.class_token = nnx.Param(0.5 * rngs.normal((EMBED_DIM,)))
        self.positions = nnx.Param(0.5 * rngs.normal((17, EMBED_DIM)))
        self.patch_embed = nnx.Linear(4, EMBED_DIM, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(NUM_BLOCKS)])
        self.norm = layer_norm(rngs)
        self.head = nnx.Linear(EMBED_DIM, 10, rngs=rngs)

    def __call__(self, images):
        """Returns logits, (batch, 10), and a list of each block's attention weights."""
        x = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = self.patch_embed(x)  # (batch, 16, embed)
        first = jnp.broadcast_to(self.class_token[...], (len(x), 1, EMBED_DIM))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...]  # 17 tokens
        weights = []
        for block in self.blocks:
            x, block_weights = block(x)
            weights.append(block_weights)
        return self.head(self.norm(x[:, 0])), weights


def layer_norm(rngs):
    return nnx.LayerNorm(EMBED_DIM, epsilon=1e-5, rngs=rngs)  # torch's; Flax's is 1e-6


def load_digits_split():
    """Returns train and test images, then labels, split as in the PyTorch script."""
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8).astype(np.float32) / 16
    return train_test_split(x, y, test_size=360, random_state=0, stratify=y)


def moved(images, labels):
    """Returns nine copies of the data, moved by -1, 0 or 1 pixels each way."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    copies = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    return np.concatenate(copies), np.tile(labels, 9)


@nnx.jit
def predict(model, images):
    # GPUs and TPUs round float32 inputs of a product to fewer bits unless told not to.
    with jax.default_matmul_precision("highest"):
        return nnx.view(model, deterministic=True)(images)[0]


def accuracy(model, images, labels):
    return np.mean(predict(model, images).argmax(axis=1) == labels)


@nnx.jit
def step(model, optimizer, images, labels):
    def loss(model):
        logits, _ = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def finetune(model, images, labels, batch_size=64):
    """Trains `model` in place for one epoch with dropout."""
    steps = len(images) // batch_size
    muon = optax.contrib.muon(
        optax.cosine_decay_schedule(1e-3, steps),
        muon_weight_dimension_numbers=training.muon_dimension_numbers,
    )
    optimizer = nnx.Optimizer(model, muon, wrt=nnx.Param)
    model.train()
    order = np.random.default_rng(0).permutation(len(images))[: steps * batch_size]
    for batch in track(order.reshape(steps, batch_size), description="fine-tuning"):
        step(model, optimizer, images[batch], labels[batch])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--out", type=Path, default=Path("digits_vit_out"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    state_dict = convert.read_state_dict(args.data / "digits_vit.safetensors")
    conversion = convert.plan_tree(state_dict, NUM_HEADS)
    model = VisionTransformer(nnx.Rngs(0))
    convert.update_nnx(model, conversion.params(state_dict))
    train_x, test_x, train_y, test_y = load_digits_split()
    recorded = np.load(args.data / "digits_vit_logits.npy")
    difference = np.abs(predict(model, test_x) - recorded).max()
    print(f"test accuracy: {accuracy(model, test_x, test_y):.2%}")
    print(f"largest difference from PyTorch's logits: {difference:.1e}")
    if not difference < TOLERANCE:  # NaN fails too
        raise SystemExit(f"The logits differ by {difference:.1e}, not < {TOLERANCE}.")

    moved_test = moved(test_x, test_y)
    print(f"moved digits, before fine-tuning: {accuracy(model, *moved_test):.2%}")
    finetune(model, *moved(train_x, train_y))
    print(f"moved digits, after fine-tuning: {accuracy(model, *moved_test):.2%}")
    path = args.out / "digits_vit_nnx.safetensors"
    back = conversion.state_dict(convert.nnx_params(model))
    convert.save_safetensors(path, back, overwrite=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
