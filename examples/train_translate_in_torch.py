"""Trains a small nn.Transformer to translate numbers, in PyTorch.

It makes the checkpoint that `translate.py` loads into Flax:

    data/translate.safetensors    the state_dict, float32, under PyTorch's own names

`numbers_in_words.py` makes the data. The seed is fixed: on one machine, two runs write
the same bytes.

    python -m examples.train_translate_in_torch
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from examples import numbers_in_words
from examples.numbers_in_words import END, LENGTH, PADDING, START, VOCABULARY

DATA = Path(__file__).parent / "data"


class Translator(nn.Module):
    """nn.Transformer on characters, with learned positions."""

    def __init__(self, d_model=64, nhead=4, num_layers=2):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, d_model)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, d_model))
        self.transformer = nn.Transformer(
            d_model,
            nhead,
            num_encoder_layers=num_layers,
            num_decoder_layers=num_layers,
            dim_feedforward=2 * d_model,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
        )
        self.head = nn.Linear(d_model, VOCABULARY)

    def forward(self, src, tgt):  # (batch, src), (batch, tgt) -> (batch, tgt, VOCAB)
        return self.decode(tgt, self.encode(src), src == PADDING)

    def encode(self, src):
        x = self.embed(src) + self.positions[: src.shape[1]]
        return self.transformer.encoder(x, src_key_padding_mask=src == PADDING)

    def decode(self, tgt, memory, is_padding):
        length = tgt.shape[1]
        x = self.embed(tgt) + self.positions[:length]
        x = self.transformer.decoder(
            x,
            memory,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(length),
            memory_key_padding_mask=is_padding,
            tgt_is_causal=True,
        )
        return self.head(x)


@torch.no_grad()
def translate(model, src):
    """Returns (batch, LENGTH), as one decodes nn.Transformer greedily."""
    memory, is_padding = model.encode(src), src == PADDING
    tokens = torch.full((len(src), 1), START)
    finished = torch.zeros(len(src), dtype=torch.bool)
    while tokens.shape[1] < LENGTH and not finished.all():
        logits = model.decode(tokens, memory, is_padding)[:, -1]
        new = logits.argmax(dim=-1).masked_fill(finished, PADDING)
        tokens = torch.cat([tokens, new[:, None]], dim=1)
        finished |= new == END
    return F.pad(tokens, (0, LENGTH - tokens.shape[1]), value=PADDING)


@torch.no_grad()
def beam_search(model, src, beams):
    """Returns (batch, LENGTH): the likeliest of `beams` that are followed."""
    batch = len(src)
    memory = model.encode(src).repeat_interleave(beams, 0)
    is_padding = (src == PADDING).repeat_interleave(beams, 0)
    tokens = torch.full((batch * beams, 1), START)
    scores = torch.full((batch, beams), -torch.inf)
    scores[:, 0] = 0  # all beams are equal at first
    finished = torch.zeros(batch * beams, dtype=torch.bool)
    while tokens.shape[1] < LENGTH and not finished.all():
        steps = model.decode(tokens, memory, is_padding)[:, -1].log_softmax(-1)
        only_padding = torch.full_like(steps, -torch.inf)
        only_padding[:, PADDING] = 0
        steps = torch.where(finished[:, None], only_padding, steps)
        total = (scores[..., None] + steps.view(batch, beams, -1)).flatten(1)
        scores, best = total.topk(beams)
        first = torch.arange(batch)[:, None] * beams
        origin = (first + best // VOCABULARY).flatten()
        new = (best % VOCABULARY).flatten()
        tokens = torch.cat([tokens[origin], new[:, None]], dim=1)
        finished = finished[origin] | (new == END)
    tokens = tokens.view(batch, beams, -1)[:, 0]
    return F.pad(tokens, (0, LENGTH - tokens.shape[1]), value=PADDING)


def train(model, src, tgt, steps, batch_size=128):
    """Trains `model` in place."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    model.train()
    for step in range(steps):
        batch = torch.randint(len(src), (batch_size,))
        x, y = src[batch], tgt[batch]
        x, y = x[:, : (x != PADDING).sum(1).max()], y[:, : (y != PADDING).sum(1).max()]
        logits = model(x, y[:, :-1])
        loss = F.cross_entropy(
            logits.flatten(0, 1), y[:, 1:].flatten(), ignore_index=PADDING
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:4}: loss {loss.item():.4f}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=DATA)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    split = (torch.from_numpy(x).long() for x in numbers_in_words.load_split())
    train_src, train_tgt, test_src, test_tgt = split
    model = Translator()
    train(model, train_src, train_tgt, args.steps)

    model.eval()
    accuracy = (translate(model, test_src) == test_tgt).all(dim=1).float().mean().item()
    print(f"{accuracy:.1%} of the test numbers are translated without a mistake")
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.out / "translate.safetensors")


if __name__ == "__main__":
    main()
