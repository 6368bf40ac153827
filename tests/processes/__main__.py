"""Four processes train, are killed, go on, and load two gigabytes; for minutes.

    python -m tests.processes [train|load] [--gigabytes 2] [--folder F]

It checks what the tests do with two processes and little data, and prints times.
"""

import argparse
import pathlib
import shutil
import signal
import tempfile
import time

from flax_mha.convert import save_safetensors
from tests.processes import Processes, a_model, losses

DEADLINE = 600  # seconds
STEPS = 40
SMALL = "--layers 2 --width 128 --save-every 10 --log-every 1".split()


def train(folder):
    alone = _run(folder, 1, folder / "alone")
    assert len(alone) == STEPS
    together = _run(folder, 4, folder / "four", "--fsdp", 2, "--tensor", 2)
    _report("4 processes, from the start", together, alone)
    for when in ("between", "while saving"):
        for index in (3, 0):
            killed = folder / f"killed_{index}"
            first = _run_and_kill(folder, killed, index, when)
            _report(f"killed {when} in process {index}, before", first, alone)
            for count, mesh in ((4, ["--fsdp", 4]), (2, ["--tensor", 2])):
                copy = shutil.copytree(killed, folder / "copy")
                then = _run(folder, count, copy, *mesh)
                assert min(then) > 1 and max(then) == STEPS
                _report(f"resumed by {count}", then, alone)
                shutil.rmtree(copy)
            shutil.rmtree(killed)

    _stop(folder, alone)


def _stop(folder, alone):
    """Tells one of four to end, as a cluster does: all save the same step, and end."""
    argv = [folder / "told", *SMALL, "--steps", 10 * STEPS, "--fsdp", 4]
    with Processes(folder, 4, "examples.train", *argv) as processes:
        processes.wait_until(lambda: "step 14:" in processes.output(), DEADLINE)
        processes.running[2].terminate()
        seconds = processes.wait(DEADLINE)
        assert set(processes.codes.values()) == {0}, processes.output()
        got = losses(processes.output())
    assert (folder / "told" / str(max(got))).is_dir()
    _report(f"told to end, which took {seconds:.1f} s", got, alone)


def _run(folder, count, path, *argv):
    argv = [path, *SMALL, "--steps", STEPS, *argv]
    with Processes(folder, count, "examples.train", *argv) as processes:
        processes.wait(DEADLINE)
        assert set(processes.codes.values()) == {0}, processes.output()
        return losses(processes.output())


def _run_and_kill(folder, path, index, when):
    """Returns the losses until a process is killed, between two savings or in one."""

    def reached():
        if when == "between":
            return "step 24:" in processes.output()
        return any(path.glob("20.orbax-checkpoint-tmp/*/ocdbt.process_*/d/*"))

    argv = [path, *SMALL, "--steps", 10 * STEPS, "--fsdp", 2, "--tensor", 2]
    with Processes(folder, 4, "examples.train", *argv) as processes:
        processes.wait_until(reached, DEADLINE)
        processes.kill(index)
        seconds = processes.wait(DEADLINE)
        codes = {code for n, code in processes.codes.items() if n != index}
        # JAX itself ends who waits to save, or whose coordinator, the first, is gone.
        assert seconds < 60 and codes <= {1, -signal.SIGABRT}, processes.output(1)
        there = sorted(found.name for found in path.iterdir())
        assert when == "between" or "20.orbax-checkpoint-tmp" in there, there
        print(
            f"killed: the others ended {seconds:.2f} s later with {codes}, and left "
            f"{there}"
        )
        return {n: v for n, v in losses(processes.output()).items() if n <= STEPS}


def _report(what, got, want):
    steps = sorted(got.keys() & want.keys())
    difference = max(abs(got[n] - want[n]) for n in steps)
    print(f"{what}: steps {steps[0]} to {steps[-1]}, losses differ by {difference:.1e}")
    assert difference <= 1e-5


def load(folder, gigabytes):
    source = folder / "model.safetensors"
    width = 2048
    tensors = a_model(
        layers=max(1, round(gigabytes * 1e9 / (48 * width**2))), width=width
    )
    save_safetensors(source, tensors)
    del tensors
    print(f"a checkpoint of {source.stat().st_size / 1e9:.2f} GB")
    source.read_bytes()  # so that all find it in the system's cache
    for count in (1, 4):
        out = folder / f"out_{count}"
        start = time.monotonic()
        argv = [source, out]
        with Processes(folder, count, "tests.processes.load", *argv) as processes:
            processes.wait(DEADLINE)
            assert set(processes.codes.values()) == {0}, processes.output()
            reports = [processes.report(index) for index in range(count)]
        for index, report in enumerate(reports):
            share = {name: report[name] / report["own"] for name in ("read", "system")}
            print(
                f"process {index} of {count}: its part {report['own'] / 1e9:.3f} GB; "
                f"read {share['read']:.4f} of it, by the system's count "
                f"{share['system']:.4f}; loaded in {report['seconds']:.2f} s, "
                f"{report['cpu']:.2f} s of a core; all written in "
                f"{report['writing']:.2f} s"
            )
            assert max(share.values()) <= 1.1
        print(f"{count} processes in all: {time.monotonic() - start:.1f} s")
        shutil.rmtree(out)
    source.unlink()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("part", nargs="?", choices=["train", "load"])
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--folder", type=pathlib.Path, help="for temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = pathlib.Path(folder)
        if args.part != "train":
            load(folder, args.gigabytes)
        if args.part != "load":
            train(folder)


if __name__ == "__main__":
    main()
