"""Measures the conversion of a large checkpoint: time, and memory beyond the result."""

import argparse
import gc
import json
import statistics
import tempfile
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")

import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from benchmarks import measure  # noqa: E402
from flax_mha.convert import convert_tree, read_state_dict, save_safetensors  # noqa: E402

EMBED, HEADS = 1024, 16
LAYER = {
    "self_attn.in_proj_weight": (3 * EMBED, EMBED),
    "self_attn.in_proj_bias": (3 * EMBED,),
    "self_attn.out_proj.weight": (EMBED, EMBED),
    "self_attn.out_proj.bias": (EMBED,),
    "linear1.weight": (4 * EMBED, EMBED),
    "linear1.bias": (4 * EMBED,),
    "linear2.weight": (EMBED, 4 * EMBED),
    "linear2.bias": (EMBED,),
    **{f"norm{n}.{kind}": (EMBED,) for n in (1, 2) for kind in ("weight", "bias")},
}
LAYER_BYTES = 4 * sum(map(np.prod, LAYER.values()))
# Ours, and the same work without us. Without a device, nothing needs to be transposed:
# kernels are views.
PAIRS = {
    "convert_tree": "load_file, copy",
    "convert_tree(place=...)": "load_file, transpose, device_put",
}


def main() -> None:
    options = _parse()
    layers = round(options.gigabytes * 1e9 / LAYER_BYTES)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        shard_bytes = _generate(Path(folder), layers, options.shards)
        contenders = _contenders(Path(folder))
        extra = {
            name: measure.peak_bytes(call) - layers * LAYER_BYTES
            for name, call in contenders.items()
        }
        times = {name: [] for name in contenders}
        for _ in range(options.repeats):
            for name, call in contenders.items():
                gc.collect()
                times[name].append(measure.seconds_of(call))
    text = _markdown(options, layers, shard_bytes, times, extra)
    options.out.write_text(text)
    print(text)


def _generate(folder: Path, layers: int, shards: int) -> int:
    """Writes the state_dict of an encoder in parts; returns the largest part's size."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape) for name, shape in LAYER.items()}
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    weight_map = {}
    for shard, numbers in enumerate(np.array_split(range(layers), shards), 1):
        part = {f"layers.{n}.{name}": tensors[name] for n in numbers for name in LAYER}
        file = f"model-{shard:05}-of-{shards:05}.safetensors"
        save_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def _contenders(folder: Path) -> dict:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    parts = sorted(folder.glob("*.safetensors"))

    def load_and_copy() -> dict:
        return {
            name: array.copy()
            for part in parts
            for name, array in load_file(part).items()
        }

    def load_and_put() -> dict:
        loaded = {
            name: jax.device_put(array.T if "linear" in name else array, device)
            for part in parts
            for name, array in load_file(part).items()
        }
        return jax.block_until_ready(loaded)

    def convert(**options) -> dict:
        return convert_tree(read_state_dict(folder), HEADS, **options)

    return {
        "load_file, copy": load_and_copy,
        "convert_tree": convert,
        "load_file, transpose, device_put": load_and_put,
        "convert_tree(place=...)": lambda: convert(place=lambda *_: device),
    }


def _markdown(
    options: argparse.Namespace,
    layers: int,
    shard_bytes: int,
    times: dict[str, list[float]],
    extra: dict[str, int],
) -> str:
    machine = measure.machine()
    versions = ", ".join(f"{name} {it}" for name, it in machine["versions"].items())
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows = [
        f"| {ours} | {theirs} | {medians[ours]:.2f} | {medians[theirs]:.2f} "
        f"| {medians[ours] / medians[theirs]:.2f} | {extra[ours] / 2**20:.0f} "
        f"| {extra[theirs] / 2**20:.0f} |"
        for ours, theirs in PAIRS.items()
    ]
    lines = [
        f"{machine['device']}, {machine['cores']} cores, {machine['date']}, "
        f"load average {machine['load_average']:.1f} after the run. {versions}.",
        "",
        f"A float32 encoder of {layers} layers, {layers * LAYER_BYTES / 1e9:.2f} GB in "
        f"{options.shards} files of up to {shard_bytes / 2**20:.0f} MiB, which the "
        f"system has in its cache; a layer has {LAYER_BYTES / 2**20:.0f} MiB, the "
        f"largest tensor {4 * EMBED * EMBED * 4 / 2**20:.0f} MiB.",
        f"Medians of {options.repeats} turns; extra is the peak of memory beyond the "
        "result.",
        "",
        "| ours | the same by others | s | s | ratio | extra MiB | extra MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _parse() -> argparse.Namespace:
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert", description=__doc__
    )
    add = parser.add_argument
    add("--gigabytes", type=float, default=2.0, metavar="N")
    add("--shards", type=int, default=4, metavar="N")
    add("--repeats", type=int, default=7, metavar="N")
    add("--out", type=Path, default=results / "convert.md", metavar="FILE")
    add("--scratch", type=Path, metavar="FOLDER", help="where the checkpoint is made")
    return parser.parse_args()


if __name__ == "__main__":
    main()
