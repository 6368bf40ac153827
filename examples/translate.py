"""A Transformer that PyTorch trained, converted, and decoded in Flax with a cache.

Needs no PyTorch. It loads the checkpoint of `train_translate_in_torch.py`, translates
numbers from French to English, greedily and with a beam, and prints how many it got
right. Each step attends to what is cached, of the memory too, in one compiled loop.

    python -m examples.translate
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from examples import numbers_in_words
from examples.numbers_in_words import END, LENGTH, PADDING, START, VOCABULARY
from examples.transformer import Transformer
from flax_mha import convert

CHECKPOINT = Path(__file__).parent / "data" / "translate.safetensors"
NUM_HEADS = 4


class Translator(nn.Module):
    """`train_translate_in_torch.Translator`."""

    d_model: int = 64
    num_layers: int = 2
    decode: bool = False

    def setup(self):
        self.embed = nn.Embed(VOCABULARY, self.d_model)
        shape = LENGTH, self.d_model
        self.positions = self.param("positions", nn.initializers.normal(0.1), shape)
        self.transformer = Transformer(
            self.d_model,
            NUM_HEADS,
            num_encoder_layers=self.num_layers,
            num_decoder_layers=self.num_layers,
            dim_feedforward=2 * self.d_model,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
            decode=self.decode,
        )
        self.head = nn.Dense(VOCABULARY)

    def __call__(self, src, tgt):
        memory = self.encode(src)
        return self.logits(tgt, jnp.arange(tgt.shape[1]), memory, src == PADDING)

    def encode(self, src):
        x = self.embed(src) + self.positions[: src.shape[1]]
        padding = src == PADDING
        encoder = self.transformer.encoder
        return encoder(x, src_key_padding_mask=padding, deterministic=True)

    def logits(self, tgt, positions, memory, is_padding):
        """Returns those of the tokens `tgt`, which are at these positions."""
        x = self.transformer.decoder(
            self.embed(tgt) + self.positions[positions],
            memory,
            memory_key_padding_mask=is_padding,
            tgt_is_causal=True,
            deterministic=True,
        )
        return self.head(x)


MODEL = Translator(decode=True)


def start(params, src):
    """Returns a function for steps, and the state after START: caches and logits."""
    is_padding = src == PADDING
    memory = MODEL.apply({"params": params}, src, method="encode")
    first, room = jnp.full((len(src), 1), START), jnp.zeros((len(src), LENGTH), int)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), src, room)["cache"]
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def step(cache, tokens, position, memory=None, is_padding=is_padding):
        logits, state = MODEL.apply(
            {"params": params, "cache": cache},
            *(tokens, position[None], memory, is_padding),
            method="logits",
            mutable=["cache"],
        )
        return state["cache"], logits[:, 0]

    return step, *step(cache, first, jnp.int32(0), memory)


@jax.jit
def translate(params, src):
    """Returns (batch, LENGTH) tokens, each time the likeliest."""
    step, cache, logits = start(params, src)
    batch = len(src)
    tokens = jnp.full((batch, LENGTH), PADDING).at[:, 0].set(START)

    def unfinished(state):
        position, _, _, _, finished = state
        return (position < LENGTH) & ~finished.all()

    def one(state):
        position, cache, logits, tokens, finished = state
        new = jnp.where(finished, PADDING, logits.argmax(-1))
        tokens = tokens.at[:, position].set(new)
        cache, logits = step(cache, new[:, None], position)
        return position + 1, cache, logits, tokens, finished | (new == END)

    state = jnp.int32(1), cache, logits, tokens, jnp.zeros(batch, bool)
    return lax.while_loop(unfinished, one, state)[3]


@functools.partial(jax.jit, static_argnames="beams")
def beam_search(params, src, beams):
    """Returns (batch, LENGTH): the likeliest of `beams` that are followed."""
    batch = len(src)
    step, cache, logits = start(params, src)
    step = functools.partial(step, is_padding=jnp.repeat(src == PADDING, beams, 0))
    cache, logits = jax.tree.map(lambda x: jnp.repeat(x, beams, 0), (cache, logits))
    tokens = jnp.full((batch * beams, LENGTH), PADDING).at[:, 0].set(START)
    scores = jnp.full((batch, beams), -jnp.inf).at[:, 0].set(0)  # all are equal
    only_padding = jnp.full(VOCABULARY, -jnp.inf).at[PADDING].set(0)
    first = jnp.arange(batch)[:, None] * beams

    def unfinished(state):
        position, _, _, _, _, finished = state
        return (position < LENGTH) & ~finished.all()

    def one(state):
        position, cache, logits, tokens, scores, finished = state
        steps = jax.nn.log_softmax(logits)
        steps = jnp.where(finished[:, None], only_padding, steps)
        total = scores[..., None] + steps.reshape(batch, beams, -1)
        scores, best = lax.top_k(total.reshape(batch, -1), beams)
        origin = (first + best // VOCABULARY).ravel()
        new = (best % VOCABULARY).ravel()
        # All that a beam is: its tokens, whether it is finished, and its caches.
        tokens, finished, cache = jax.tree.map(
            lambda x: x[origin], (tokens, finished, cache)
        )
        tokens = tokens.at[:, position].set(new)
        cache, logits = step(cache, new[:, None], position)
        return position + 1, cache, logits, tokens, scores, finished | (new == END)

    finished = jnp.zeros(batch * beams, bool)
    state = jnp.int32(1), cache, logits, tokens, scores, finished
    return lax.while_loop(unfinished, one, state)[3].reshape(batch, beams, -1)[:, 0]


def load():
    """Returns the parameters, converted."""
    state_dict = convert.read_state_dict(CHECKPOINT)
    return convert.convert_tree(state_dict, NUM_HEADS, kinds={"embed": "embedding"})


def main():
    params = load()
    _, _, src, tgt = map(jnp.asarray, numbers_in_words.load_split())
    for name, tokens in (
        ("greedy", translate(params, src)),
        ("beam of 4", beam_search(params, src, beams=4)),
    ):
        right = float(np.mean((tokens == tgt).all(axis=1)))
        print(f"{name}: {right:.1%} of {len(src)} numbers without a mistake")
    words = map(numbers_in_words.decode, (src[:3], tokens[:3]))
    print(*(f"{a} -> {b}" for a, b in zip(*words, strict=True)), sep="\n")


if __name__ == "__main__":
    main()
