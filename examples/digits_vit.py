"""Takes a vision transformer from PyTorch to Flax, fine-tunes it, and takes it back.

Needs no PyTorch. It loads the checkpoint of `train_digits_in_torch.py`, compares its
logits with those PyTorch recorded, draws what the class token of one digit attends to,
fine-tunes for one epoch on digits moved by a pixel, which the checkpoint never saw, and
writes the result as a state_dict that PyTorch's `load_state_dict` takes.

    python examples/digits_vit.py --out digits_vit_out
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from flax_mha import MultiheadAttention, convert

EMBED_DIM, NUM_HEADS, NUM_BLOCKS = 64, 4, 3
TOLERANCE = 1e-4  # on logits of about 10, computed in float32


class Block(nn.Module):
    """Attention, then an MLP, each on a normed input and added to its input."""

    @nn.compact
    def __call__(self, x, deterministic):  # (batch, tokens, embed)
        attn = MultiheadAttention(
            EMBED_DIM, NUM_HEADS, dropout=0.1, batch_first=True, name="attn"
        )
        y = nn.LayerNorm(epsilon=1e-5, name="norm1")(x)  # torch's; Flax's is 1e-6
        y, weights = attn(
            y, y, y, average_attn_weights=False, deterministic=deterministic
        )  # weights: (batch, heads, tokens, tokens); under jit, free if not used
        x = x + y
        y = nn.LayerNorm(epsilon=1e-5, name="norm2")(x)
        y = nn.Dense(2 * EMBED_DIM, name="fc1")(y)
        y = nn.gelu(y, approximate=False)  # as torch; Flax approximates
        return x + nn.Dense(EMBED_DIM, name="fc2")(y), weights


class VisionTransformer(nn.Module):
    """Classifies an 8x8 image from 16 patches of 2x2 pixels and a class token."""

    @nn.compact
    def __call__(self, images, deterministic=True):
        """Returns logits, (batch, 10), and a list of each block's attention weights."""
        normal = nn.initializers.normal(0.5)
        class_token = self.param("class_token", normal, (EMBED_DIM,))
        positions = self.param("positions", normal, (17, EMBED_DIM))
        x = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = nn.Dense(EMBED_DIM, name="patch_embed")(x)  # (batch, 16, embed)
        first = jnp.broadcast_to(class_token, (len(x), 1, EMBED_DIM))
        x = jnp.concatenate([first, x], axis=1) + positions  # (batch, 17, embed)
        weights = [None] * NUM_BLOCKS
        for i in range(NUM_BLOCKS):
            x, weights[i] = Block(name=f"blocks_{i}")(x, deterministic)
        x = nn.LayerNorm(epsilon=1e-5, name="norm")(x[:, 0])
        return nn.Dense(10, name="head")(x), weights


model = VisionTransformer()


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


@jax.jit
def predict(params, images):
    # GPUs and TPUs round float32 inputs of a product to fewer bits unless told not to.
    with jax.default_matmul_precision("highest"):
        return model.apply({"params": params}, images)[0]


def accuracy(params, images, labels):
    return np.mean(predict(params, images).argmax(axis=1) == labels)


def finetune(params, images, labels, rng, batch_size=64):
    """Trains for one epoch with dropout, and returns the new params."""
    steps = len(images) // batch_size
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, steps))

    def loss_fn(params, rng, images, labels):
        logits, _ = model.apply(
            {"params": params}, images, deterministic=False, rngs={"dropout": rng}
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state, rng, images, labels):
        grads = jax.grad(loss_fn)(params, rng, images, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    order = np.random.default_rng(0).permutation(len(images))[: steps * batch_size]
    for batch in track(order.reshape(steps, batch_size), description="fine-tuning"):
        rng, step_rng = jax.random.split(rng)
        params, state = step(params, state, step_rng, images[batch], labels[batch])
    return params


def draw_attention(params, image, path):
    """Draws what the class token attends to: a row per layer, a column per head."""
    _, weights = model.apply({"params": params}, image[None])
    maps = np.stack(weights)[:, 0, :, 0, 1:].reshape(NUM_BLOCKS, NUM_HEADS, 4, 4)
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.2])
    bare = {"xticks": [], "yticks": []}
    left.add_subplot(title="Test digit", **bare).imshow(image, cmap="gray_r")
    axes = right.subplots(NUM_BLOCKS, NUM_HEADS, subplot_kw=bare)
    for (i, j), ax in np.ndenumerate(axes):
        ax.imshow(image, cmap="gray_r", extent=(-0.5, 3.5, 3.5, -0.5))  # one per patch
        drawn = ax.imshow(maps[i, j], cmap="Reds", vmin=0, vmax=1, alpha=0.6)
        ax.set_title(f"layer {i + 1}, head {j + 1}", fontsize=9)
    right.colorbar(drawn, ax=axes, label="attention from the class token")
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--out", type=Path, default=Path("digits_vit_out"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    state_dict = convert.read_state_dict(args.data / "digits_vit.safetensors")
    conversion = convert.plan_tree(state_dict, NUM_HEADS)
    params = conversion.params(state_dict)
    convert.verify(state_dict, params, conversion=conversion)
    train_x, test_x, train_y, test_y = load_digits_split()
    recorded = np.load(args.data / "digits_vit_logits.npy")
    difference = np.abs(predict(params, test_x) - recorded).max()
    print(f"test accuracy: {accuracy(params, test_x, test_y):.2%}")
    print(f"largest difference from PyTorch's logits: {difference:.1e}")
    if not difference < TOLERANCE:  # NaN fails too
        raise SystemExit(f"The logits differ by {difference:.1e}, not < {TOLERANCE}.")
    draw_attention(params, test_x[0], args.out / "attention.png")

    moved_test = moved(test_x, test_y)
    print(f"moved digits, before fine-tuning: {accuracy(params, *moved_test):.2%}")
    params = finetune(params, *moved(train_x, train_y), jax.random.key(0))
    print(f"moved digits, after fine-tuning: {accuracy(params, *moved_test):.2%}")
    path = args.out / "digits_vit_finetuned.safetensors"
    convert.save_safetensors(path, conversion.state_dict(params), overwrite=True)
    print(f"wrote attention.png and digits_vit_finetuned.safetensors to {args.out}")


if __name__ == "__main__":
    main()
