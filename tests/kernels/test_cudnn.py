"""What surrounds cuDNN's attention: exactly, on any machine, with a stand-in for it.

`test_cuda_compiler.py` has XLA compile the real one.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha._call import Call
from flax_mha._dropout import Dropout
from flax_mha._kernels import _cudnn_calls, cudnn, reference
from flax_mha._masks import Mask

BATCH, HEADS = 3, 2
# Relative to the largest element, against the definition in float64.
TOLERANCE = {"float32": 2e-4, "bfloat16": 3e-2, "float16": 4e-3}


def logits_of_cudnn(query, key, bias, lengths, is_causal):
    """Returns the logits as cuDNN computes them; -inf at what it never reads."""
    assert query.dtype == key.dtype and query.shape[::3] == key.shape[::3]
    tgt, src = query.shape[1], key.shape[1]
    assert tgt % 2 == 0 and src % 2 == 0 and query.shape[3] % 8 == 0
    assert query.shape[3] <= 128
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type="float32")
    if bias is not None:
        assert bias.dtype == query.dtype and bias.shape[2:] == (tgt, src)
        logits = logits + bias.astype("float32")
    read = jnp.ones((1, 1, tgt, src), bool)
    if is_causal:
        read = jnp.tril(read)
    if lengths is not None:
        assert lengths.dtype == jnp.int32 and lengths.shape == query.shape[:1]
        read = (
            read
            & (jnp.arange(src, dtype="int32")[None] < lengths[:, None])[:, None, None]
        )
    return jnp.where(read, logits, -jnp.inf)


def run_forward(query, key, value, bias, lengths, *, is_causal):
    logits = logits_of_cudnn(query, key, bias, lengths, is_causal)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value.astype("float32"))
    # Where there is nothing to read, there may be anything.
    out = jnp.where(nothing_to_read(lengths), jnp.nan, out)
    return [out.astype(query.dtype), jax.nn.logsumexp(logits, axis=-1)]


def nothing_to_read(lengths):
    return False if lengths is None else (lengths == 0)[:, None, None, None]


def run_backward(
    query, key, value, bias, lengths, lse, out, d_out, *, is_causal, with_bias
):
    logits = logits_of_cudnn(query, key, bias, lengths, is_causal)
    q, k, v, o, d_o = (x.astype("float32") for x in (query, key, value, out, d_out))
    probs = jnp.exp(logits - lse[..., None])
    wrong = nothing_to_read(lengths) | ~jnp.isfinite(lse)[..., None]
    probs = jnp.where(wrong, jnp.nan, probs)
    delta = jnp.sum(o * d_o, axis=-1).swapaxes(1, 2)[..., None]
    d_logits = probs * (jnp.einsum("bqhd,bkhd->bhqk", d_o, v) - delta)
    gradients = [
        jnp.einsum("bhqk,bkhd->bqhd", d_logits, k),
        jnp.einsum("bhqk,bqhd->bkhd", d_logits, q),
        jnp.einsum("bhqk,bqhd->bkhd", probs, d_o),
    ]
    if lengths is not None:  # what lies beyond may be anything
        beyond = jnp.arange(key.shape[1], dtype="int32")[None] >= lengths[:, None]
        beyond = beyond[..., None, None]
        gradients[1:] = [jnp.where(beyond, jnp.nan, d) for d in gradients[1:]]
    if with_bias:
        axes = tuple(n for n in (0, 1) if bias.shape[n] == 1)
        gradients.append(jnp.sum(d_logits, axis=axes, keepdims=True))
    return [d.astype(query.dtype) for d in gradients]


@pytest.fixture
def given(monkeypatch):
    """Puts the stand-in in place. Returns a list of what its forward pass is given."""
    calls = []

    def bind(name, operands, *, is_causal, with_bias=False, is_training=False):
        assert is_training == (name == "fwd")
        if name == "bwd":
            return run_backward(*operands, is_causal=is_causal, with_bias=with_bias)
        query, _, _, bias, lengths = operands
        calls.append(dict(bias=bias, lengths=lengths, width=query.shape[3]))
        return run_forward(*operands, is_causal=is_causal)

    monkeypatch.setattr(_cudnn_calls, "_bind", bind)
    return calls


def padding(rng, tgt, src):
    """The second sequence is much shorter; all of the third is padding."""
    length = np.array([src, src // 3, 0]).reshape(-1, 1, 1, 1)
    return np.arange(src) >= length


def holes(rng, tgt, src):
    return rng.random((BATCH, 1, 1, src)) < 0.3


def boolean(rng, tgt, src):
    """The first query is allowed nothing."""
    return (rng.random((1, 1, tgt, src)) < 0.3) | (np.arange(tgt) == 0)[:, None]


LOWEST = float(np.finfo(np.float16).min)  # finite in each dtype


def huge_row(rng, tgt, src):
    """Of the first query, all is hugely negative."""
    row = np.full((1, 1, tgt, src), LOWEST)
    return np.where((np.arange(tgt) == 0)[:, None], row, additive(rng, row.shape))


def additive(rng, shape):
    return np.where(rng.random(shape) < 0.2, -np.inf, rng.normal(size=shape))


MASKS = {
    "none": lambda *_: Mask(),
    "open": lambda *_: Mask(open_columns=1),
    "causal": lambda *_: Mask(is_causal=True),
    "causal-open1": lambda *_: Mask(is_causal=True, open_columns=1),
    "causal-open2": lambda *_: Mask(is_causal=True, open_columns=2),
    "padding": lambda *a: Mask(blocked=(padding(*a),)),
    "padding-open2": lambda *a: Mask(blocked=(padding(*a),), open_columns=2),
    "holes": lambda *a: Mask(allowed=(~holes(*a),), blocked=(padding(*a),)),
    "causal-padding": lambda *a: Mask(blocked=(holes(*a),), is_causal=True),
    "causal-padding-open2": lambda *a: Mask(
        blocked=(padding(*a),), is_causal=True, open_columns=2
    ),
    "float-padding": lambda rng, tgt, src: Mask(
        attn_bias=(additive(rng, (BATCH, 1, 1, src)),)
    ),
    "bool": lambda *a: Mask(blocked=(boolean(*a),)),
    "bool-padding-open1": lambda *a: Mask(
        blocked=(boolean(*a), padding(*a)), open_columns=1
    ),
    "float": lambda rng, tgt, src: Mask(attn_bias=(additive(rng, (1, 1, tgt, src)),)),
    "float-row-huge": lambda rng, tgt, src: Mask(
        blocked=(padding(rng, tgt, src),),
        attn_bias=(huge_row(rng, tgt, src),),
    ),
    "float-padding-huge": lambda rng, tgt, src: Mask(
        attn_bias=(np.where(padding(rng, tgt, src), LOWEST, 0.0),)
    ),
    "per_head": lambda rng, tgt, src: Mask(
        blocked=(padding(rng, tgt, src),),
        attn_bias=(additive(rng, (BATCH, HEADS, tgt, src)),),
    ),
    "everything": lambda rng, tgt, src: Mask(
        allowed=(~holes(rng, tgt, src),),
        blocked=(boolean(rng, tgt, src),),
        attn_bias=(
            additive(rng, (1, 1, tgt, src)),
            rng.normal(size=(BATCH, 1, 1, src)),
            rng.normal(size=(1, HEADS, tgt, src)),
        ),
        is_causal=True,
        open_columns=2,
    ),
}


def inputs(mask_name, tgt, src, head_dim, dtype):
    """Returns query, key, value, mask, scale, and a cotangent."""
    rng = np.random.default_rng([tgt, src])
    mask = MASKS[mask_name](rng, tgt, src)
    # So that no test is one of how a mask is rounded.
    rounded = lambda x: jnp.asarray(x if x.dtype == bool else x.astype(dtype))  # noqa
    shapes = ((BATCH, n, HEADS, head_dim) for n in (tgt, src, src, tgt))
    shapes = list(shapes)
    for n in (1, 2):
        shapes[n] = (BATCH, src + mask.open_columns, HEADS, head_dim)
    query, key, value, d_out = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    return query, key, value, mask.map(rounded), jnp.float32(0.25), d_out


def expected(query, key, value, mask, scale, d_out, dtype="float64"):
    """Returns the definition's result and gradients, computed in this dtype."""
    wide = lambda x: x if x.dtype == bool else x.astype(dtype)  # noqa: E731
    query, key, value, scale, d_out = map(wide, (query, key, value, scale, d_out))

    def attend(query, key, value, attn_bias, scale):
        parts = dataclasses.replace(mask.map(wide), attn_bias=attn_bias)
        return reference.attend(Call(query, key, value, parts, scale))[0]

    args = (query, key, value, jax.tree.map(wide, mask.attn_bias), scale)

    @jax.jit
    def out_and_gradients(*args):
        out, pull_back = jax.vjp(attend, *args)
        return out, pull_back(d_out)

    return out_and_gradients(*args)


def both_passes(query, key, value, mask, scale, d_out):
    call = Call(query, key, value, mask, scale)
    out, lse = cudnn.forward(call)
    return out, lse, tuple(cudnn.backward(call, out, lse, d_out))[:-1]


def results(*args):
    # A new function each time: what is traced depends on the fixtures.
    return jax.jit(lambda *args: both_passes(*args))(*args)


def assert_close(actual, expected, tolerance):
    def compare(a, e):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        largest = np.max(np.abs(e), initial=0.1)
        np.testing.assert_allclose(a / largest, e / largest, rtol=0, atol=tolerance)

    jax.tree.map(compare, actual, expected)


@pytest.mark.parametrize(
    "mask_name, tgt, src, head_dim",
    [
        *((name, 9, 13, 8) for name in MASKS),
        ("everything", 1, 1, 8),
        ("everything", 8, 6, 128),
        ("padding", 8, 12, 128),
        ("causal-padding", 8, 6, 100),
    ],
)
@pytest.mark.usefixtures("given")
def test_the_definition_and_its_gradients(mask_name, tgt, src, head_dim):
    args = inputs(mask_name, tgt, src, head_dim, "float32")
    out, _, gradients = results(*args)
    assert_close((out, gradients), expected(*args), TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mask_name", ["padding", "float", "everything"])
@pytest.mark.usefixtures("given")
def test_narrow_dtypes_are_close_to_the_truth_and_keep_their_dtype(mask_name, dtype):
    args = inputs(mask_name, 33, 48, 16, dtype)
    out, lse, gradients = results(*args)
    assert {x.dtype for x in (out, *jax.tree.leaves(gradients[:4]))} == {
        jnp.dtype(dtype)
    }
    assert lse.dtype == gradients[4].dtype == jnp.float32
    assert_close((out, gradients), expected(*args), TOLERANCE[dtype])


@pytest.mark.parametrize(
    "mask_name", ["none", "padding", "float", "causal-padding-open2"]
)
@pytest.mark.usefixtures("given")
def test_lse_is_the_log_of_each_rows_sum(mask_name):
    query, key, value, mask, scale, _ = inputs(mask_name, 7, 9, 8, "float32")
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * scale
    mask_of_all = mask.additive(*logits.shape[2:], jnp.float32)
    if mask_of_all is not None:
        logits = logits + mask_of_all
    _, lse = cudnn.forward(Call(query, key, value, mask, scale))
    sums = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(
        jnp.sum(lse, axis=-1), jnp.where(sums == -jnp.inf, jnp.inf, sums), rtol=1e-5
    )


@pytest.mark.usefixtures("given")
def test_the_lowest_finite_bias_is_not_minus_infinity():
    query, key, value, _, scale, _ = inputs("none", 8, 12, 8, "bfloat16")
    row = np.where(np.arange(12) % 3, -np.inf, np.finfo(np.float32).min)
    mask = Mask(attn_bias=(jnp.broadcast_to(jnp.float32(row), (1, 1, 8, 12)),))
    out, _ = cudnn.forward(Call(query, key, value, mask, scale))
    mean = jnp.mean(value[:, ::3].astype("float32"), axis=1, keepdims=True)
    np.testing.assert_allclose(out.astype("float32") - mean, 0, atol=1e-2)


@pytest.mark.parametrize(
    "mask_name, bias, has_lengths, width",
    [
        ("none", None, False, 64),
        ("causal-open2", None, False, 64),
        ("padding", None, True, 64),
        ("padding-open2", None, True, 64),
        ("causal-padding-open2", None, False, 72),
        ("float-padding", None, False, 72),
        ("bool", (1, 1, 16, 12), False, 64),
        ("bool-padding-open1", (1, 1, 16, 14), True, 72),
        ("per_head", (BATCH, HEADS, 16, 12), False, 72),
    ],
)
def test_no_mask_is_made_larger_than_it_must_be(
    given, mask_name, bias, has_lengths, width
):
    query, key, value, mask, scale, _ = inputs(mask_name, 16, 12, 64, "bfloat16")
    jax.eval_shape(
        lambda *args: cudnn.forward(Call(*args)), query, key, value, mask, scale
    )
    (call,) = given
    assert (None if call["bias"] is None else call["bias"].shape) == bias
    assert (call["lengths"] is not None, call["width"]) == (has_lengths, width)


@pytest.mark.parametrize("mask_name", ["padding", "everything"])
@pytest.mark.usefixtures("given")
def test_vmap_is_a_larger_batch(mask_name):
    query, key, value, mask, scale, d_out = inputs(mask_name, 7, 9, 8, "float32")
    stacked = jnp.stack([query, query[::-1] + 1, -query], axis=2)

    def run(query, attn_bias):
        parts = dataclasses.replace(mask, attn_bias=attn_bias)
        return both_passes(query, key, value, parts, scale, d_out)

    for bias_axis in (None, -1):
        bias = mask.attn_bias
        if bias_axis is not None:
            bias = jax.tree.map(lambda x: jnp.stack([x, x, x + 1], axis=-1), bias)
        actual = jax.jit(jax.vmap(run, in_axes=(2, bias_axis)))(stacked, bias)
        for n in range(3):
            one = bias if bias_axis is None else jax.tree.map(lambda x: x[..., n], bias)  # noqa: B023
            assert_close(
                jax.tree.map(lambda x: jnp.nan_to_num(x[n]), actual),  # noqa: B023
                jax.tree.map(jnp.nan_to_num, run(stacked[:, :, n], one)),
                1e-5,
            )


def test_a_mask_for_all_is_not_copied_by_vmap(given):
    query, key, value, mask, scale, d_out = inputs("bool", 8, 12, 64, "bfloat16")
    jax.vmap(both_passes, in_axes=(0, 0, 0, None, None, 0))(
        *(x[:, None] for x in (query, key, value)), mask, scale, d_out[:, None]
    )
    assert [call["bias"].shape for call in given] == [(1, 1, 8, 12)] * 2


def test_unsupported_says_why():
    query = key = value = jnp.ones((2, 3, 2, 8), jnp.bfloat16)
    wide = jnp.ones((2, 3, 2, 136), jnp.bfloat16)
    dropout = Dropout.from_rng(jax.random.key(0), 0.1)

    def reason(query=query, key=key, value=value, mask=Mask(), dropout=None):  # noqa: B008
        return cudnn.unsupported(Call(query, key, value, mask, dropout=dropout))

    assert reason() is None
    assert reason(*[query.astype("float16")] * 3) is None
    assert reason(*[query.astype("float32")] * 3) == (
        "cuDNN takes bfloat16 and float16, not float32"
    )
    assert reason(key=key.astype("float16")) == (
        "dtypes differ: bfloat16, float16 and bfloat16"
    )
    assert reason(value=value[..., :6]) == (
        "values have 6 elements for each head, keys 8"
    )
    assert reason(wide, wide, wide) == "head_dim is 136, more than 128"
    assert reason(key=key[:, :0], value=value[:, :0]) == (
        "an axis is empty: query (2, 3, 2, 8), key (2, 0, 2, 8)"
    )
    assert reason(mask=Mask(attn_bias=(jnp.ones((1, 1, 3, 3)),))) == (
        "cuDNN would round the float64 mask to bfloat16; cast it to allow that"
    )
    assert reason(dropout=dropout) == (
        "cuDNN does not drop the same probabilities as the other kernels"
    )


@pytest.mark.parametrize(
    "shapes, head_dim, reason",
    [
        ([(1, 1, 8, 12)], 64, None),
        ([(3, 1, 8, 12), (3, 1, 1, 12)], 64, None),
        ([(3, 1, 1, 12)], 128, None),
        (
            [(1, 1, 8, 12), (3, 1, 1, 12)],
            128,
            "its masks would become one of (3, 1, 8, 12), larger than each",
        ),
        (
            [(3, 2, 8, 12)],
            64,
            "its masks would be copied, (3, 2, 8, 12), as large as all the logits",
        ),
    ],
)
def test_large_masks_are_left_to_others(shapes, head_dim, reason):
    query, key, value, *_ = inputs("none", 8, 12, head_dim, "bfloat16")
    mask = Mask(blocked=tuple(jnp.ones(shape, bool) for shape in shapes))
    assert cudnn.unwise(Call(query, key, value, mask)) == reason


@pytest.mark.parametrize("mask_value", [-1e9, float(np.finfo("float32").min)])
@pytest.mark.parametrize("mask_name", ["float-row-huge", "float-padding-huge"])
@pytest.mark.usefixtures("given")
def test_gradients_under_masks_that_leave_nothing_of_the_logs(mask_name, mask_value):
    args = inputs(mask_name, 9, 13, 8, "float32")
    huge = args[3].map(
        lambda x: x if x.dtype == bool else jnp.where(x == LOWEST, mask_value, x)
    )
    args = (*args[:3], huge, *args[4:])
    out, _, gradients = results(*args)
    # In float64, something would be left of the logits beside -1e9.
    in_float32 = expected(*args, dtype="float32")
    assert_close((out, gradients), in_float32, TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mask_name", ["holes", "causal-padding", "bool"])
@pytest.mark.usefixtures("given")
def test_blocked_keys_get_nothing_however_large_their_logits(mask_name, dtype):
    query, key, value, mask, scale, d_out = inputs(mask_name, 9, 12, 8, dtype)
    query, key = jnp.abs(query) * 30, jnp.abs(key) * 30
    args = (query, key, value, mask, scale, d_out)
    out, _, _ = results(*args)
    assert_close(out, expected(*args)[0], TOLERANCE[dtype])


def test_the_gradient_of_a_mask_is_not_computed_for_nobody(monkeypatch):
    wanted = []

    def bind(name, operands, *, is_causal, with_bias=False, is_training=False):
        wanted.append(with_bias)
        run = run_forward if is_training else run_backward
        options = {} if is_training else dict(with_bias=with_bias)
        return run(*operands, is_causal=is_causal, **options)

    monkeypatch.setattr(_cudnn_calls, "_bind", bind)
    *args, d_out = inputs("float", 9, 12, 8, "float32")
    call = Call(*args)
    out, lse = cudnn.forward(call)
    d_bias = cudnn.backward(call, out, lse, d_out, with_bias=False).attn_bias
    assert d_bias == () and wanted == [False, False]


def test_lengths_are_of_all_queries_and_of_the_keys_to_read(monkeypatch):
    given = []
    fused = _cudnn_calls._fused()
    primitive = types.SimpleNamespace(bind=lambda *args, **_: given.extend(args))
    monkeypatch.setattr(fused, "_dot_product_attention_fwd_p", primitive)
    query, key = jnp.ones((3, 8, 2, 64)), jnp.ones((3, 12, 2, 64))
    lengths = jnp.array([12, 5, 1], jnp.int32)
    operands = (query, key, key, None, lengths)
    _cudnn_calls._bind("fwd", operands, is_causal=False, is_training=True)
    np.testing.assert_array_equal(given[4], [8, 8, 8])
    np.testing.assert_array_equal(given[5], lengths)


def test_this_jax_calls_cudnn_as_expected():
    assert cudnn.missing() is None


def test_missing_says_why(monkeypatch):
    turing = types.SimpleNamespace(
        platform="gpu", device_kind="Tesla T4", compute_capability="7.5"
    )
    with monkeypatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: [turing])
        assert cudnn.missing() == (
            "Tesla T4 is older than cuDNN's fused attention (Ampere)"
        )
    amd = types.SimpleNamespace(platform="gpu", compute_capability="gfx942")
    with monkeypatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: [amd])
        assert cudnn.missing() is None
    fused = _cudnn_calls._fused()
    unknown = f"jax {jax.__version__} calls cuDNN in a way that flax_mha does not know"
    for change in ("setattr", "delattr"):
        with monkeypatch.context() as patch:
            new = [lambda ctx, query: None] if change == "setattr" else []
            getattr(patch, change)(
                fused, "_dot_product_attention_bwd_cuda_lowering", *new
            )
            assert cudnn.missing() == unknown
