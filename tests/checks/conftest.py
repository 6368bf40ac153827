import functools

import numpy as np
import pytest

from tests.raising import assert_raises, eager, jitted, traced


@pytest.fixture(params=[eager, traced, jitted])
def assert_call_raises(request):
    """`assert_raises` for a call whose arrays are concrete, or only shapes."""

    def check(error, text, call, arguments):
        arrays = {n: a for n, a in arguments.items() if isinstance(a, np.ndarray)}
        others = {n: a for n, a in arguments.items() if n not in arrays}
        call = functools.partial(call, **others)
        assert_raises(error, text, lambda: request.param(call, arrays))

    return check
