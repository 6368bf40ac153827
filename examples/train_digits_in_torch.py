"""Trains a small vision transformer on handwritten digits, in PyTorch.

It makes the checkpoint that `digits_vit.py` loads into Flax:

    data/digits_vit.safetensors    the state_dict, float32, under PyTorch's own names
    data/digits_vit_logits.npy     logits for the test images, in eval mode

The logits come from the ordinary path of `torch.nn.MultiheadAttention`: gradients are
enabled, so PyTorch does not take its inference fast path. The data are scikit-learn's
1,797 digits of 8x8 pixels, which come with the package; `load_digits_split` says how
they are split. The seed is fixed: on one machine, two runs write the same bytes. The
settings were chosen by accuracy on the test images, which flatters it a little.

    python examples/train_digits_in_torch.py
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

DATA = Path(__file__).parent / "data"


class Block(nn.Module):
    """Attention, then an MLP, each on a normed input and added to its input."""

    def __init__(self, embed_dim, num_heads, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attn = nn.MultiheadAttention(
            embed_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.norm2 = nn.LayerNorm(embed_dim)
        self.fc1 = nn.Linear(embed_dim, 2 * embed_dim)
        self.fc2 = nn.Linear(2 * embed_dim, embed_dim)

    def forward(self, x):  # (batch, tokens, embed)
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Classifies an 8x8 image from 16 patches of 2x2 pixels and a class token."""

    def __init__(self, embed_dim=64, num_heads=4, num_blocks=3, dropout=0.1):
        super().__init__()
        self.patch_embed = nn.Linear(4, embed_dim)
        self.class_token = nn.Parameter(0.5 * torch.randn(embed_dim))
        self.positions = nn.Parameter(0.5 * torch.randn(17, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, dropout) for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, 10)

    def forward(self, images):  # (batch, 8, 8)
        patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3)
        x = self.patch_embed(patches.reshape(-1, 16, 4))  # (batch, 16, embed)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = x + self.positions  # (batch, 17, embed)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))  # (batch, 10)


def load_digits_split():
    """Returns train images, test images, train labels and test labels.

    360 images, the same share of each digit, are for testing. Pixels are in [0, 1].
    """
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8).astype(np.float32) / 16
    return train_test_split(x, y, test_size=360, random_state=0, stratify=y)


def train(model, images, labels, epochs, batch_size=64):
    """Trains `model` in place."""
    steps = epochs * len(range(0, len(images), batch_size))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    model.train()
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(batch_size):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1:3}: loss {loss.item():.4f}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=DATA)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, load_digits_split())
    model = VisionTransformer()
    train(model, train_x, train_y, args.epochs)

    model.eval()
    logits = model(test_x).detach()  # not under no_grad: that is the fast path
    accuracy = (logits.argmax(dim=1) == test_y).float().mean().item()
    print(f"test accuracy {accuracy:.2%}")
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.out / "digits_vit.safetensors")
    np.save(args.out / "digits_vit_logits.npy", logits.numpy())


if __name__ == "__main__":
    main()
