"""What tests of errors share: tables of wrong calls, and the full texts they raise.

Sizes are 4 queries, 5 keys, a batch of 2, and 3 heads of 2 features.
"""

import jax
import numpy as np
import pytest


def table(cases):
    """Parametrises over {id: (what is called with, error, text)}."""
    return pytest.mark.parametrize("given, error, text", cases.values(), ids=cases)


def by_text(wrong):
    """Parametrises over [(error, text, [(a call, what fills the text), ...])]."""
    cases = [
        (call, error, text.format(*said))
        for error, text, calls in wrong
        for call, *said in calls
    ]
    return pytest.mark.parametrize("call, error, text", cases)


def assert_raises(error, text, call):
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert str(raised.value) == text


def floats(*shape):
    return np.zeros(shape, np.float32)


def bools(*shape):
    return np.zeros(shape, bool)


def ints(*shape):
    return np.zeros(shape, np.int32)


def eager(call, arrays):
    return call(**arrays)


def traced(call, arrays):
    return jax.eval_shape(call, **_specs(arrays))


def jitted(call, arrays):
    return jax.jit(call).lower(**_specs(arrays))


def _specs(arrays):
    return {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()}


CALL = dict(query=floats(4, 2, 6), key=floats(5, 2, 6), value=floats(5, 2, 6))
UNBATCHED = dict(query=floats(4, 6), key=floats(5, 6), value=floats(5, 6))
