"""Files with a few bytes changed, moved or missing: read or refused, and no more."""

import numpy as np
import pytest

from tests.fuzz_files import TARGETS, seeds

CHANGED = 40  # of each seed


def changed(content, rng):
    """Returns it with a piece replaced by other bytes, its own or none."""
    start, end = sorted(rng.integers(0, len(content) + 1, 2).tolist())
    if rng.random() < 0.5:  # mostly a small one
        end = min(end, start + 4)
    own = rng.integers(0, len(content)).item()
    pieces = (rng.bytes(end - start), content[own : own + 8], b"")
    return content[:start] + pieces[rng.integers(3)] + content[end:]


@pytest.mark.parametrize("kind", TARGETS)
def test_changed_files_are_read_or_refused(tmp_path, kind):
    rng = np.random.default_rng(0)
    for seed in seeds(kind):
        TARGETS[kind](tmp_path, seed)
        for _ in range(CHANGED):
            TARGETS[kind](tmp_path, changed(seed, rng))
