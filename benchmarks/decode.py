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

import jax.numpy as jnp  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from benchmarks import measure  # noqa: E402
from benchmarks.decoders import (  # noqa: E402
    CONTENDERS,
    EMBED,
    OURS,
    TOKENS,
    Ours,
    parameters,
)
from examples import (  # noqa: E402
    numbers_in_words,
    train_translate_in_torch,
    translate,
)
from flax_mha._attention import multi_head_attention  # noqa: E402


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
