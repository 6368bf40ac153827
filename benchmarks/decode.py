"""Measures decoding with a cache: a token at a time, a prefill, and a whole example.

python -m benchmarks.decode
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

# As in `__main__`: before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import torch

jax.config.update("jax_platforms", "cpu")

import flax.linen as nn  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from benchmarks import measure  # noqa: E402
from examples import (  # noqa: E402
    numbers_in_words,
    train_translate_in_torch,
    translate,
)
from flax_mha import KeyValueCache  # noqa: E402
from flax_mha._attention import (  # noqa: E402
    _project,
    multi_head_attention,
    project_out,
)
from flax_mha._params import parameter_table  # noqa: E402

EMBED, HEADS = 512, 8
HEAD_DIM = EMBED // HEADS
OURS = "flax_mha"
TOKENS = 16  # of a turn: short, so that what else the machine does disturbs all alike


def parameters(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=spec.shape) / EMBED**0.5, jnp.float32)
        for name, spec in parameter_table(EMBED, HEADS).items()
    }


def attend(params, x, cache):
    options = dict(batch_first=True, is_causal=True, need_weights=False)
    out, _, cache = multi_head_attention(params, x, x, x, cache=cache, **options)
    return out, cache


class Ours:
    """One call for each token, of a compiled step whose cache is donated."""

    def __init__(self, batch: int, length: int, dtype: str = "float32"):
        self.params = parameters()
        self.x = jnp.ones((batch, 1, EMBED))
        self.cache = KeyValueCache.empty(batch, length, HEADS, HEAD_DIM, dtype)
        self.step = jax.jit(attend, donate_argnums=2)

    def seek(self, position: int) -> None:
        at = jnp.full_like(self.cache.position, position)
        cache = self.cache
        self.cache = KeyValueCache(cache.keys, cache.values, at, cache.dtype)

    def decode(self, tokens: int) -> None:
        out = self.x
        for _ in range(tokens):
            out, self.cache = self.step(self.params, self.x, self.cache)
        jax.block_until_ready((out, self.cache))


class InScan(Ours):
    """All tokens in one program."""

    def __init__(self, batch: int, length: int):
        super().__init__(batch, length)

        def scan(params, x, cache):
            def body(carry, _):
                return attend(params, *carry), None

            return jax.lax.scan(body, (x, cache), None, length=TOKENS)[0]

        self.scan = jax.jit(scan, donate_argnums=2)

    def decode(self, tokens: int) -> None:
        out, self.cache = self.scan(self.params, self.x, self.cache)
        jax.block_until_ready((out, self.cache))


class Projections:
    """The products with the weights alone: less than that no step can take."""

    def __init__(self, batch: int, length: int):
        self.params, self.x = parameters(), jnp.ones((batch, 1, EMBED))

        def step(params, x):
            q, k, v = _project(params, x, x, x, precision=None)
            weight, bias = params["out_proj.weight"], params["out_proj.bias"]
            return project_out(q + k + v, weight, bias, None)

        self.step = jax.jit(step)

    def seek(self, position: int) -> None:
        pass

    def decode(self, tokens: int) -> None:
        out = self.x
        for _ in range(tokens):
            out = self.step(self.params, self.x)
        jax.block_until_ready(out)


class Flax:
    """flax.linen's own layer."""

    def __init__(self, batch: int, length: int):
        mha = nn.MultiHeadDotProductAttention(HEADS, qkv_features=EMBED, decode=True)
        full = jnp.ones((batch, length, EMBED))
        variables = mha.init(jax.random.key(0), full)
        self.params, self.cache = variables["params"], variables["cache"]
        self.x = full[:, :1]

        def step(params, cache, x):
            variables = {"params": params, "cache": cache}
            out, state = mha.apply(variables, x, mutable=["cache"])
            return out, state["cache"]

        self.step = jax.jit(step, donate_argnums=1)

    def seek(self, position: int) -> None:
        self.cache["cache_index"] = jnp.int32(position)

    def decode(self, tokens: int) -> None:
        out = self.x
        for _ in range(tokens):
            out, self.cache = self.step(self.params, self.cache, self.x)
        jax.block_until_ready((out, self.cache))


class Torch:
    """A cache by hand round scaled_dot_product_attention, of what is filled."""

    def __init__(self, batch: int, length: int):
        self.mha = torch.nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
        shape = batch, HEADS, length, HEAD_DIM
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.x = torch.ones(batch, 1, EMBED)
        self.position = 0

    def seek(self, position: int) -> None:
        self.position = position

    @torch.no_grad()
    def decode(self, tokens: int) -> None:
        mha, batch = self.mha, len(self.x)
        for _ in range(tokens):
            qkv = torch.nn.functional.linear(
                self.x, mha.in_proj_weight, mha.in_proj_bias
            )
            q, k, v = qkv.view(batch, 1, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
            at = self.position
            self.keys[:, :, at : at + 1], self.values[:, :, at : at + 1] = k, v
            out = torch.nn.functional.scaled_dot_product_attention(
                q, self.keys[:, :, : at + 1], self.values[:, :, : at + 1]
            )
            mha.out_proj(out.transpose(1, 2).reshape(batch, 1, EMBED))
            self.position += 1


CONTENDERS = {
    OURS: Ours,
    "flax_mha, bfloat16 cache": partial(Ours, dtype="bfloat16"),
    "flax_mha, in lax.scan": InScan,
    "flax_mha, projections alone": Projections,
    "flax.linen": Flax,
    "torch, by hand": Torch,
}


def turns(run: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Returns seconds by name, of turns that take turns."""
    times: dict[str, list[float]] = {name: [] for name in run}
    for turn in range(repeats + 1):
        for name, function in run.items():
            start = perf_counter()
            function()
            if turn:  # the first is to warm up
                times[name].append(perf_counter() - start)
    return times


def per_token(batch: int, length: int, repeats: int) -> dict[str, list[float]]:
    """Returns seconds per token at three places of a decoding, averaged over them."""
    contenders = {name: build(batch, length) for name, build in CONTENDERS.items()}
    places = [0, (length - TOKENS) // 2, length - TOKENS]

    def decode(contender):
        for place in places:
            contender.seek(place)
            contender.decode(TOKENS)

    run = {name: partial(decode, one) for name, one in contenders.items()}
    times = turns(run, repeats)
    count = TOKENS * len(places)
    return {name: [t / count for t in found] for name, found in times.items()}


def prefill(batch: int, repeats: int, tokens: int = 512) -> dict[str, list[float]]:
    """Returns seconds of a prefill of an empty cache, and of the same plain call."""
    params, x = parameters(), jnp.ones((batch, tokens, EMBED))
    ours = Ours(batch, 2 * tokens)
    ours.x = x

    def fill():
        ours.seek(0)
        ours.decode(1)

    @jax.jit
    def plain(params, x):
        options = dict(batch_first=True, is_causal=True, need_weights=False)
        return multi_head_attention(params, x, x, x, **options)[0]

    return turns(
        {
            OURS: fill,
            "without a cache": lambda: jax.block_until_ready(plain(params, x)),
        },
        repeats,
    )


def example(repeats: int, batch: int = 100) -> dict[str, list[float]]:
    """Returns seconds of greedy decoding by examples/translate.py, and by PyTorch."""
    src = numbers_in_words.load_split()[2][:batch]
    params, theirs = translate.load(), train_translate_in_torch.Translator().eval()
    theirs.load_state_dict(load_file(translate.CHECKPOINT))
    tokens = torch.from_numpy(src).long()
    return turns(
        {
            OURS: lambda: jax.block_until_ready(translate.translate(params, src)),
            "torch": lambda: train_translate_in_torch.translate(theirs, tokens),
        },
        repeats,
    )


def rows(what: str, times: dict[str, list[float]]) -> list[str]:
    best = {name: (median(found), min(found)) for name, found in times.items()}
    lines = []
    for name, (middle, least) in best.items():
        of_median, of_min = (
            f"{a / b:.2f}" for a, b in zip(best[OURS], best[name], strict=True)
        )
        if name.startswith(OURS):
            of_median = of_min = "-"
        lines.append(
            f"| {what} | {name} | {middle * 1e3:.3f} | {least * 1e3:.3f} | "
            f"{of_median} | {of_min} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode")
    parser.add_argument("--repeats", type=int, default=9)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / "decode.md")
    options = parser.parse_args()
    torch.set_num_threads(2)
    machine = measure.machine()
    versions = ", ".join(f"{name} {it}" for name, it in machine["versions"].items())
    lines = [
        f"{machine['device']}, {machine['cores']} cores, {machine['date']}, "
        f"load average {machine['load_average']:.1f} before the run. {versions}.",
        "",
        "Self-attention, 512 features, 8 heads, float32, two threads each. Of a token: "
        f"at the start, in the middle and at the end of the length, {TOKENS} tokens at "
        "each. Ratios are flax_mha / this line. Targets: 0.15 of flax.linen, 0.8 of "
        "torch; prefill 1.1; example 0.5. Ratios to what is itself of flax_mha: -.",
        "",
        "| what | contender | median ms | min ms | ratio | of minima |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for batch in (1, 8):
        for length in (256, 1024):
            times = per_token(batch, length, options.repeats)
            lines += rows(f"a token, batch {batch}, length {length}", times)
            print(*lines[-len(times) :], sep="\n", flush=True)
    for batch in (1, 8):
        lines += rows(
            f"prefill of 512 tokens, batch {batch}", prefill(batch, options.repeats)
        )
        print(*lines[-2:], sep="\n", flush=True)
    lines += rows("example, greedy, batch 100", example(options.repeats))
    print(*lines[-2:], sep="\n", flush=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
