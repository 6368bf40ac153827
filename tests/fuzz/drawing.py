"""Configurations: drawn from tables of options, and made simple again.

A configuration is a dict of plain values, so that it can be pasted into Python. Tables
list the simplest value of each option first, and a value twice that is to be drawn
twice as often.
"""

import numpy as np


def drawn(part, seed, n):
    """Returns the n-th configuration of a seed.

    Where a part says so, `SAME` of them differ in `VALUES` alone, and share a program.
    """
    same, values = getattr(part, "SAME", 1), getattr(part, "VALUES", ())
    config = draw(part.OPTIONS, np.random.default_rng([seed, n // same]))
    if same > 1:
        rng = np.random.default_rng([seed, n, 0])
        config |= draw(pick(part.OPTIONS, *values), rng)
    part.settle(config)
    return config


def draw(options, rng):
    """Returns a value of each option, and `numbers`, the seed of its arrays."""
    config = {
        name: values[rng.integers(len(values))] for name, values in options.items()
    }
    return config | {"numbers": int(rng.integers(2**31))}


def simplest(config, options, settle, fails):
    """Returns a configuration that still fails, each option as simple as can be."""
    is_simpler = True
    while is_simpler:
        is_simpler = False
        for name, values in options.items():
            # All of them are simpler than a value that `settle` has made.
            own = values.index(config[name]) if config[name] in values else None
            for value in values[:own]:
                candidate = config | {name: value}
                settle(candidate)
                if candidate[name] == value and fails(candidate):
                    config, is_simpler = candidate, True
                    break
    return config


def pick(config, *names):
    """Returns keyword arguments of a configuration."""
    return {name: config[name] for name in names}


def generator(config):
    """Returns the generator of a configuration's arrays."""
    return np.random.default_rng(config["numbers"])
