"""Runs drawn configurations: python -m tests.fuzz [--seed 0] [--count 1000] [--log F].

With a log, one line of JSON for each, a run goes on where the last one stopped. A
configuration that fails is made as simple as it can be, and printed as Python to paste.
"""

import argparse
import importlib
import json
import time
from pathlib import Path

import jax

import tests.conftest  # noqa: F401  (the settings of all tests)
from tests.fuzz import PARTS
from tests.fuzz.drawing import drawn, simplest

_PROGRAMS = 300  # are kept at most: each takes memory


def main() -> int:
    options = _options()
    part = importlib.import_module(f"tests.fuzz.{options.part}")
    first = _next(options)
    failed = 0
    end = options.start + options.count
    for n in range(first, end):
        began = time.monotonic()
        config = drawn(part, options.seed, n)
        error = failure(part, config)
        _log(options.log, n, time.monotonic() - began, error)
        if error:
            failed += 1
            _report(part, options, n, config, error)
        if n % _PROGRAMS == 0:
            jax.clear_caches()
    ran = max(end - first, 0)
    print(
        f"{options.part}, seed {options.seed}: {failed} failed, of {ran} from {first}"
    )
    return bool(failed)


def failure(part, config) -> str | None:
    """Returns what goes wrong with a configuration, if anything."""
    try:
        part.check(config)
    except Exception as error:  # whatever it is, it is a finding
        return f"{type(error).__name__}: {error}"
    return None


def _report(part, options, n, config, error):
    kind = error.partition(":")[0]

    def fails(config):
        return (failure(part, config) or "").startswith(kind)

    if not options.quick:
        config = simplest(config, part.OPTIONS, part.settle, fails)
    print(f"# {n}: {error}\nfrom tests.fuzz import {options.part}")
    print(f"{options.part}.check({config!r})\n", flush=True)


def _log(path, n, seconds, error):
    if path is None:
        return
    with path.open("a") as file:
        entry = dict(n=n, seconds=round(seconds, 3), error=error)
        file.write(json.dumps(entry) + "\n")


def _next(options) -> int:
    """Returns the number of the first that no line of the log is about."""
    if options.log is None or not options.log.exists():
        return options.start
    lines = options.log.read_text().splitlines()
    return max((json.loads(line)["n"] + 1 for line in lines), default=options.start)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, default=PARTS[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--log", type=Path, help="one a run: also says where to go on")
    parser.add_argument("--quick", action="store_true", help="do not simplify failures")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
