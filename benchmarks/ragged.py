"""Measures ragged batches beside padded ones, and beside PyTorch's nested tensors."""

import argparse
import dataclasses
import itertools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

# As in `__main__`: before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import torch

jax.config.update("jax_platforms", "cpu")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import contenders, measure, report  # noqa: E402
from benchmarks.cases import Case  # noqa: E402
from benchmarks.contenders import _jax_step  # noqa: E402
from flax_mha import MultiheadAttention, RaggedArray, _dispatch  # noqa: E402
from flax_mha._attention import _linear, _project  # noqa: E402
from flax_mha._call import Call  # noqa: E402
from flax_mha._layouts import Ragged  # noqa: E402
from flax_mha._masks import Mask  # noqa: E402
from flax_mha._params import parameter_table  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Batch(Case):
    """Sequences of different lengths, at most `length`."""

    lengths: tuple[int, ...] = ()

    def arrays(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Returns zeros in the padding: also the cotangent's, for no loss sees that."""
        is_token = ~self.key_padding_mask()[..., None]
        if self.attention_only:
            is_token = is_token[:, None]
        return jax.tree.map(lambda x: x * is_token, super().arrays())

    def key_padding_mask(self) -> np.ndarray:
        return np.arange(self.length) >= np.array(self.lengths)[:, None]

    def pack(self, padded: np.ndarray) -> jax.Array:
        """Returns the values of a `RaggedArray`, with as much slack as by default."""
        return RaggedArray.from_padded(padded, np.array(self.lengths)).values

    def offsets(self) -> jax.Array:
        """Returns an argument for programs: these know no lengths, and run for any."""
        return jnp.cumsum(jnp.array([0, *self.lengths]))

    def part(self, power: int) -> float:
        """Returns what part of the padded tokens (1), or logits (2), is no padding."""
        return float(np.mean((np.array(self.lengths) / self.length) ** power))


_BATCH, _LENGTH, _EMBED, _HEADS = _SIZE = (16, 512, 512, 8)
_SCALE = (_EMBED // _HEADS) ** -0.5
_LENGTHS = {
    "32 to 512": np.random.default_rng(0).integers(32, _LENGTH + 1, _BATCH).tolist(),
    "90 % padding": [_LENGTH] + [20] * (_BATCH - 1),
    "no padding": [_LENGTH] * _BATCH,
}
BATCHES = {
    name: Batch(*_SIZE, padding=True, lengths=tuple(lengths))
    for name, lengths in _LENGTHS.items()
}


def padded_projections(case: Batch, **options) -> measure.Step:
    rng = jax.random.key(0)
    table = parameter_table(case.embed, case.heads)
    params = {name: spec.init(rng, spec.shape) for name, spec in table.items()}

    def apply(params, inputs):
        (x,) = inputs
        q, k, v = _project(params, x, x, x, None)
        weight, bias = params["out_proj.weight"], params["out_proj.bias"]
        # The sum stands for attention: it needs all three, so XLA leaves out none.
        return _linear("bqhd,ehd->bqe", q + k + v, weight, bias, None)

    return _jax_step(case, apply, params, **options)


def ragged_projections(case: Batch) -> measure.Step:
    # As one long sequence, which is how the module calls them.
    return padded_projections(case, prepare=lambda x: case.pack(x)[None])


def padded_attention(case: Batch, *, masked: bool) -> measure.Step:
    def apply(params, inputs, *padding):
        mask = Mask(blocked=padding)
        return _dispatch.dot_product_attention(Call(*inputs, mask, _SCALE))[0]

    padding = [jnp.asarray(case.key_padding_mask()[:, None, None])] if masked else []
    return _jax_step(case, apply, extra=padding, prepare=lambda x: x.swapaxes(1, 2))


def ragged_attention(case: Batch) -> measure.Step:
    def apply(params, inputs, offsets):
        max_lens = (case.length, case.length)
        layout = Ragged(offsets, offsets, max_lens, same_lengths=True)
        call = Call(*(x[None] for x in inputs), scale=_SCALE)
        out, _ = _dispatch.dot_product_attention(call, layout=layout)
        return out[0]

    def prepare(x):
        return case.pack(x.swapaxes(1, 2))

    return _jax_step(case, apply, extra=[case.offsets()], prepare=prepare)


def ragged_module(case: Batch) -> measure.Step:
    module = MultiheadAttention(case.embed, case.heads, batch_first=True)
    token = jnp.ones((1, 1, case.embed))
    params = module.init(jax.random.key(0), token, token, token, deterministic=True)

    def apply(params, inputs, offsets):
        x = RaggedArray(*inputs, offsets, case.length)
        options = dict(need_weights=False, deterministic=True)
        out, _ = module.apply(params, x, x, x, **options)
        return out.values

    return _jax_step(case, apply, params, [case.offsets()], case.pack)


def torch_nested(case: Batch) -> measure.Step | str:
    if case.backward:
        return "the module takes nested tensors only for inference"
    module = torch.nn.MultiheadAttention(case.embed, case.heads, batch_first=True)
    (padded,), _ = case.arrays()
    elements = zip(torch.from_numpy(padded), case.lengths, strict=True)
    x = torch.nested.nested_tensor([element[:length] for element, length in elements])
    call = partial(module.eval(), x, x, x, need_weights=False)
    return measure.Step(torch.no_grad()(call))


def torch_padded(case: Batch) -> measure.Step | str:
    build = contenders.torch_module if case.backward else contenders.torch_inference
    return build(case)


class Level(NamedTuple):
    """Who takes turns."""

    contenders: dict[str, Callable]
    attention_only: bool = False
    power: int | None = None  # of the length, that work grows with


LEVELS = {
    "projections": Level(
        {"ragged": ragged_projections, "padded": padded_projections}, power=1
    ),
    "attention": Level(
        {
            "ragged": ragged_attention,
            "padded, masked": partial(padded_attention, masked=True),
            "padded, no mask": partial(padded_attention, masked=False),
        },
        attention_only=True,
        power=2,
    ),
    "module": Level(
        {
            "ragged": ragged_module,
            "padded": partial(contenders.flax_mha_module, implementation="blockwise"),
            "torch, nested": torch_nested,
            "torch, padded": torch_padded,
        }
    ),
}


def main() -> None:
    options = _parse()
    torch.set_num_threads(measure.CORES)
    options.out.mkdir(parents=True, exist_ok=True)
    machine, rows, results = measure.machine(), [], {}
    for level, batch, backward in itertools.product(LEVELS, BATCHES, (False, True)):
        known, attention_only, power = LEVELS[level]
        case = dataclasses.replace(
            BATCHES[batch], attention_only=attention_only, backward=backward
        )
        name = f"{level}, {batch}, {'training' if backward else 'inference'}"
        results[name] = measure.compare(case, known, options.repeats)
        rows += _rows(name, results[name], power and case.part(power))
        print(f"{name}: done", flush=True)
    text = _markdown(machine, options.repeats, rows, report.reasons(results))
    (options.out / "ragged.md").write_text(text)
    print(text)


def _rows(name: str, results: dict[str, dict], work: float | None) -> list[str]:
    """Returns a line for each contender that ran."""
    rows, ours = [], results["ragged"]
    for contender, it in results.items():
        if "reason" in it:
            continue
        cells = [name, contender, f"{it['median_ms']:.1f}", f"{it['min_ms']:.1f}"]
        if it is ours or "reason" in ours:
            cells += "---"
        else:
            ratio = ours["median_ms"] / it["median_ms"]
            cells += [f"{ratio:.2f}", f"{ours['min_ms'] / it['min_ms']:.2f}"]
            cells += [f"{ratio / work:.2f}" if work else "-"]
        if it["compile_s"] is None:  # PyTorch
            cells += "--"
        else:
            cells += [f"{it['temp_bytes'] / 2**20:.1f}", f"{it['compile_s']:.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _markdown(machine: dict, repeats: int, rows: list[str], reasons: list[str]) -> str:
    versions = ", ".join(f"{name} {it}" for name, it in machine["versions"].items())
    gemm = ", ".join(f"{name} {it:.0f}" for name, it in machine["gemm_gflops"].items())
    batches = [
        f"- {name}: {case.part(1):.3f} of the padded tokens, with the slack "
        f"{len(case.pack(case.key_padding_mask())) / _BATCH / _LENGTH:.3f}; "
        f"{case.part(2):.3f} of the logits."
        for name, case in BATCHES.items()
    ]
    lines = [
        f"{machine['device']}, {machine['cores']} cores, {machine['date']}, "
        f"load average {machine['load_average']:.1f} before the run. {versions}.",
        f"Float32 matrix product, GFLOP/s: {gemm}.",
        "",
        f"Self-attention in {_BATCH} sequences of up to {_LENGTH} tokens, which is how "
        f"long they are with padding; {_EMBED} features, {_HEADS} heads, float32:",
        "",
        *batches,
        "",
        f"{repeats} turns, fewer of slow ones. Ratios are ragged / this line, of "
        "medians and of minima. Over work: that of medians, divided by the part of the "
        "tokens (projections; target 1.15) or of the logits (attention; target 1.25). "
        "Target beside nested tensors: 1.0. Temp is XLA's own count.",
        "",
        "| what | contender | median ms | min ms | ratio | of minima | over work "
        "| temp MiB | compile s |",
        f"| --- | --- |{' ---: |' * 7}",
        *rows,
        "",
        *[f"Not measured: {reason}." for reason in reasons],
    ]
    return "\n".join(lines) + "\n"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ragged", description=__doc__
    )
    add = parser.add_argument
    add("--repeats", type=int, default=7, metavar="N")
    add("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    return parser.parse_args()


if __name__ == "__main__":
    main()
