"""Attention within the elements of `RaggedArray`s; see also the lattice in parity/."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_mha
from flax_mha import MultiheadAttention, RaggedArray, functional
from flax_mha._call import Call
from flax_mha._dispatch import dot_product_attention
from flax_mha._dropout import Dropout
from flax_mha._kernels import _ragged_blocks, ragged
from flax_mha._layouts import Ragged
from flax_mha._masks import Mask
from flax_mha._typing import Extra
from tests.kernels.test_contract import TOLERANCE, assert_close, wave

HEADS, HEAD_DIM, VALUE_DIM = 2, 8, 6
EMBED = 8
TGT, SRC = [5, 0, 100, 33, 1], [3, 4, 0, 110, 65]


def lay(lengths, *features, dtype="float64", slack=3, max_len=None, seed=0):
    rng = np.random.default_rng([seed, *lengths])
    x = RaggedArray.from_list(
        [rng.normal(size=(n, *features)).astype(dtype) for n in lengths],
        capacity=sum(lengths) + slack,
        max_len=max_len,
    )
    values = np.array(x.values)
    values[sum(lengths) :] = np.nan  # in the slack it changes nothing
    return dataclasses.replace(x, values=jnp.asarray(values))


def arrays(tgt, src, dtype="float64", **options):
    return (
        lay(tgt, HEADS, HEAD_DIM, dtype=dtype, seed=1, **options),
        lay(src, HEADS, HEAD_DIM, dtype=dtype, seed=2, **options),
        lay(src, HEADS, VALUE_DIM, dtype=dtype, seed=3, **options),
    )


def extra(count, dtype="float64"):
    if not count:
        return None
    rng = np.random.default_rng(count)
    shapes = (count, HEADS, HEAD_DIM), (count, HEADS, VALUE_DIM)
    return Extra(*(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes))


def masks(batch, tgt_len, src_len):
    rng = np.random.default_rng(4)
    blocked = rng.random((batch, 1, 1, src_len)) < 0.2
    bias = rng.normal(size=(batch, HEADS, tgt_len, src_len))
    shared = np.where(rng.random((1, 1, tgt_len, src_len)) < 0.1, -np.inf, 1.0)
    return Mask(blocked=(blocked,), attn_bias=(bias, shared)).map(jnp.asarray)


def results(implementation, q, k, v, mask=None, more=None, dropout=None, **options):
    """Returns all gradients, and what is attended to."""
    mask = Mask() if mask is None else mask
    count = 0 if more is None else more.key.shape[0]
    mask = dataclasses.replace(mask, open_columns=count)

    def loss(q_values, k_values, v_values, attn_bias, more):
        arrays = (values[None] for values in (q_values, k_values, v_values))
        parts = dataclasses.replace(mask, attn_bias=attn_bias)
        out, weights = dot_product_attention(
            Call(*arrays, parts, 0.3, dropout, more),
            layout=Ragged.of(q, k),
            implementation=implementation,
            **options,
        )
        out = tuple(x for x in (out, weights) if x is not None)
        return sum(jnp.sum(x.astype("float64") * wave(x.shape)) for x in out), out

    grad = jax.jit(jax.grad(loss, argnums=range(5), has_aux=True))
    return grad(q.values, k.values, v.values, mask.attn_bias, more)


@pytest.fixture
def small_blocks(monkeypatch):
    """Elements are cut into several parts, and heads into groups."""
    monkeypatch.setattr(_ragged_blocks, "_ROWS", (32, 64))
    monkeypatch.setattr(_ragged_blocks, "_ROWS_WHOLE", (32, 64))
    monkeypatch.setattr(_ragged_blocks, "_FEWEST_COLUMNS", 32)
    monkeypatch.setattr(_ragged_blocks, "_LOGITS", 64 * 32)
    monkeypatch.setattr(_ragged_blocks, "_LOGITS_BACKWARD", 64 * 32)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("count", [0, 2])
def test_elements_of_many_blocks(small_blocks, is_causal, count):
    q, k, v = arrays(TGT, TGT)
    k, v = (dataclasses.replace(x, offsets=q.offsets) for x in (k, v))
    args = q, k, v, Mask(is_causal=is_causal), extra(count)
    assert q.lies_as(k)
    assert_close(results("blockwise", *args), results("reference", *args), 1e-11)


@pytest.mark.parametrize("is_causal", [False, True])
def test_keys_of_other_lengths_and_all_masks(small_blocks, is_causal):
    q, k, v = arrays(TGT, SRC, max_len=111)
    mask = dataclasses.replace(masks(5, 111, 111), is_causal=is_causal)
    args = q, k, v, mask, extra(1)
    assert_close(results("blockwise", *args), results("reference", *args), 1e-11)


@pytest.mark.parametrize("weights", [None, "mean"])
def test_dropout_is_that_of_the_padded_arrays(small_blocks, weights):
    args = *arrays(TGT, SRC), None, extra(1)
    options = dict(dropout=Dropout.from_rng(jax.random.key(0), 0.4), weights=weights)
    assert_close(
        results("blockwise", *args, **options),
        results("reference", *args, **options),
        1e-11,
    )


@pytest.mark.parametrize("same_lengths", [False, True])
def test_blocks_of_all_heads_for_accelerators(same_lengths):
    q, k, v = arrays(TGT, TGT)
    k, v = (dataclasses.replace(x, offsets=q.offsets) for x in (k, v))
    mask = dataclasses.replace(masks(5, 128, 128), is_causal=True)
    (*want, d_more), (want_out,) = results("reference", q, k, v, mask)
    call = Call(*(x.values[None] for x in (q, k, v)), mask, jnp.asarray(0.3))
    places = dataclasses.replace(Ragged.of(q, k), same_lengths=same_lengths)
    out, lse = jax.jit(functools.partial(ragged.forward, whole=True))(call, places)
    pull_back = jax.jit(functools.partial(ragged.backward, whole=True))
    *gradients, d_bias, _, d_extra = pull_back(call, places, out, lse, wave(out.shape))
    got = [*(x[0] for x in gradients), d_bias]
    assert_close((out, got, d_extra), (want_out, want, d_more), 1e-11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_dtypes_are_close_to_the_truth_and_keep_their_dtype(dtype):
    q, k, v = arrays(TGT, SRC, dtype=dtype)
    gradients, (out,) = results("blockwise", q, k, v)
    assert {x.dtype for x in (*gradients[:3], out)} == {jnp.dtype(dtype)}
    wide = [x.map(lambda x: x.astype("float64")) for x in (q, k, v)]
    want = results("reference", *wide)
    assert_close((gradients[:3], (out,)), (want[0][:3], want[1]), TOLERANCE[dtype])


def test_gradients_can_be_differentiated_again():
    q, k, v = arrays([5, 0, 33], [3, 2, 40])

    def penalty(values, implementation):
        def loss(values):
            call = Call(*(x[None] for x in (values, k.values, v.values)), scale=0.3)
            out, _ = dot_product_attention(
                call, layout=Ragged.of(q, k), implementation=implementation
            )
            return jnp.sum(jnp.sin(out))

        return jnp.sum(jax.grad(loss)(values) ** 2)

    got, want = (
        jax.jit(jax.grad(penalty), static_argnums=1)(q.values, name)
        for name in ("blockwise", "reference")
    )
    assert_close(got, want, 1e-9)


def test_a_nan_stays_in_its_element():
    x = lay(TGT, EMBED)
    bad = dataclasses.replace(x, values=x.values.at[7].set(jnp.nan))  # in the third

    def step(x):
        def loss(values):
            y = dataclasses.replace(x, values=values)
            out, _ = apply(y, y, y, is_causal=True)
            return jnp.sum(out.values[:5]) + jnp.sum(out.values[105:]), out

        return jax.grad(loss, has_aux=True)(x.values)

    apply = module()
    (gradient, out), (clean_gradient, clean) = step(bad), step(x)
    for n, (got, want) in enumerate(zip(out, clean, strict=True)):
        assert np.any(np.isnan(got)) == (n == 2)
        if n != 2:
            np.testing.assert_array_equal(got, want)
    kept = np.r_[:5, 105 : x.capacity]
    np.testing.assert_allclose(gradient[kept], clean_gradient[kept], atol=1e-12)


def module(**options):
    """Returns `apply` of a layer with parameters."""
    mha = MultiheadAttention(EMBED, HEADS, param_dtype="float64", **options)
    x = jnp.ones((1, EMBED))
    variables = mha.init(jax.random.key(0), x, x, x, deterministic=True)
    noisy = jax.tree.map(lambda p: p + 0.1 * jnp.cos(wave(p.shape) * 9), variables)
    return functools.partial(mha.apply, noisy)


def test_the_layers_dropout_is_that_of_a_padded_batch():
    x = lay([5, 0, 33], EMBED, max_len=40)
    apply = functools.partial(
        module(dropout=0.5, batch_first=True),
        deterministic=False,
        rngs={"dropout": jax.random.key(1)},
    )
    out, _ = apply(x, x, x)
    padded = x.to_padded()
    padding = np.arange(40)[None] >= x.lengths[:, None]
    want, _ = apply(padded, padded, padded, padding)
    for n, got in enumerate(out):
        np.testing.assert_allclose(got, want[n, : len(got)], rtol=1e-12)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_a_query_of_no_keys_gets_the_bias_and_one_of_masked_keys_as_in_torch(
    need_weights, implementation
):
    q, k = lay([2, 2, 2], EMBED), lay([0, 3, 3], EMBED)
    blocked = k.map(lambda x: jnp.arange(x.shape[0]) < 3)  # all of the second element
    apply = module(implementation=implementation)
    bias = apply.args[0]["params"]["out_proj"]["bias"]
    out, weights = apply(q, k, k, blocked, need_weights=need_weights)
    np.testing.assert_allclose(out[0], np.tile(bias, (2, 1)), rtol=1e-12)
    assert np.all(np.isnan(out[1])) == need_weights
    if not need_weights:
        np.testing.assert_allclose(out[1], np.tile(bias, (2, 1)), rtol=1e-12)
    else:
        assert not np.any(weights[0])
        assert np.all(np.isnan(weights[1, :2, :3]))
    assert np.all(np.isfinite(out[2]))


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_masks_say_nothing_of_an_element_without_keys(implementation):
    q, k = lay([2, 2], EMBED), lay([0, 3], EMBED)
    mask = jnp.ones((q.max_len, k.max_len), bool)
    apply = module(implementation=implementation)
    out, weights = apply(q, k, k, attn_mask=mask)
    bias = apply.args[0]["params"]["out_proj"]["bias"]
    np.testing.assert_allclose(out[0], np.tile(bias, (2, 1)), rtol=1e-12)
    assert np.all(np.isnan(out[1])) and not np.any(weights[0])


def test_what_masks_say_of_padding_is_in_no_gradient():
    x = lay([1, 3], EMBED, max_len=3)
    mask = jnp.array([[0, 1, 1], [0, 0, 1], [1, 0, 0]], bool)
    # Of the first element, its one query attends to its one key, and the two of padding
    # to nothing.

    def loss(values, implementation):
        apply = module(implementation=implementation)
        out, weights = apply(*[x.map(lambda _: values)] * 3, attn_mask=mask)
        return jnp.sum(out.values**2) + jnp.sum(weights**2)

    def second(values, implementation):
        return jnp.sum(jnp.sin(jax.grad(loss)(values, implementation)))

    values, names = x.only_tokens().values, ("reference", "blockwise")
    for function in (loss, second):
        got, want = (jax.grad(function)(values, name) for name in names)
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


def test_a_hint_replaces_the_mask_as_in_torch():
    x = lay([5, 33], EMBED)
    mask = jnp.zeros((x.max_len, x.max_len), bool)
    apply = module()
    hinted, _ = apply(x, x, x, None, False, mask, is_causal=True)
    causal, _ = apply(x, x, x, None, False, is_causal=True)
    ignored, _ = apply(x, x, x, None, True, mask, is_causal=True)
    full, _ = apply(x, x, x)
    for got, want in zip((hinted, ignored), (causal, full), strict=True):
        np.testing.assert_array_equal(got.values, want.values)


@pytest.mark.parametrize("batch_first", [False, True])
def test_batch_first_has_no_effect(batch_first):
    x = lay([5, 33], EMBED)
    out, _ = module(batch_first=batch_first)(x, x, x)
    want, _ = module()(x, x, x)
    np.testing.assert_array_equal(out.values, want.values)


def test_fifty_batches_of_a_bucket_compile_once():
    apply = module()
    count = 0

    @jax.jit
    def step(x):
        nonlocal count
        count += 1
        return jax.value_and_grad(lambda v: jnp.sum(attend(v, x).values ** 2))(x.values)

    def attend(values, x):
        x = dataclasses.replace(x, values=values)
        return apply(x, x, x)[0]

    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(0, 33, 16)
        batch = [rng.normal(size=(n, EMBED)) for n in lengths]
        step(RaggedArray.from_list(batch, capacity=512, max_len=32))
    assert count == step._cache_size() == 1


def test_offsets_that_differ_are_told_or_give_nan():
    q, other = lay([5, 3], EMBED, max_len=8), lay([4, 4], EMBED, max_len=8)
    apply = module()
    with pytest.raises(ValueError, match=r"^value must have the offsets of key, \[0 5"):
        apply(q, q, other)
    out, _ = jax.jit(apply)(q, q, other)
    assert np.all(np.isnan(out.values[:8]))
    out, _ = jax.jit(apply)(q, q, q)  # several arrays, but of the same offsets
    want, _ = apply(q, q, q)
    np.testing.assert_allclose(out.values, want.values, rtol=1e-12)


@pytest.mark.parametrize("offsets", [[0, 9, 11], [0, 5, 3], [0, 5, 12]])
def test_wrong_offsets_give_nan_under_jit(offsets):
    apply = module()

    @jax.jit
    def step(values, offsets):
        x = RaggedArray(values, offsets, max_len=8)
        return apply(x, x, x, need_weights=False)[0].map(lambda values: values + 0)

    out = step(jnp.ones((11, EMBED)), np.array(offsets))
    assert np.all(np.isnan(out.values[:3]))
    assert not np.any(
        np.isnan(step(jnp.ones((11, EMBED)), np.array([0, 3, 11])).values)
    )


class TestMemory:
    LENGTH = 128

    def program(self, count, grad=True, need_weights=True):
        mha = MultiheadAttention(32, 4)
        x = RaggedArray.from_list([np.ones((self.LENGTH, 32), np.float32)] * count)
        x = dataclasses.replace(x, offsets=jnp.asarray(x.offsets))
        variables = jax.eval_shape(mha.init, jax.random.key(0), x, x, x)

        def step(variables, x):
            out, _ = mha.apply(variables, x, x, x, need_weights=need_weights)
            return jnp.sum(out.values**2)

        step = jax.grad(step) if grad else step
        return jax.jit(step).lower(variables, x).compile()

    @pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
    def test_is_linear_in_the_tokens(self, grad):
        short, long = (self.program(n, grad) for n in (32, 64))
        sizes = [p.memory_analysis().temp_size_in_bytes for p in (short, long)]
        assert sizes[1] <= 2.2 * sizes[0]

    @pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
    def test_weights_nobody_uses_are_not_there(self, grad):
        text = self.program(32, grad).as_text()
        shapes = re.findall(r"[a-z]\w*\[([\d,]+)\]", text)
        largest = max(int(np.prod([int(n) for n in s.split(",")])) for s in shapes)
        assert largest <= 32 * self.LENGTH * 4 * 32  # tokens, projected
        assert 32 * 4 * self.LENGTH**2 > largest  # logits


class TestDevices:
    """Elements over a mesh's data axis, heads over another."""

    def stacked(self, count):
        rng = np.random.default_rng(0)
        shards = [lay(rng.integers(0, 20, 3), EMBED, max_len=20) for _ in range(count)]
        shards = [
            RaggedArray.from_list(list(shard), capacity=64, max_len=20)
            for shard in shards
        ]
        return shards, RaggedArray.stack(shards)

    def test_elements_of_each_device_inside_shard_map(self):
        mesh = Mesh(np.array(jax.devices()), ("data",))
        shards, stacked = self.stacked(8)
        apply = module()

        def step(x):
            out, _ = apply(x[0], x[0], x[0], is_causal=True)
            return RaggedArray.stack([out])

        mapped = jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        program = jax.jit(mapped).lower(stacked).compile()
        assert not re.search("all-|collective-", program.as_text())
        out = program(stacked)
        for n, shard in enumerate(shards):
            want, _ = apply(shard, shard, shard, is_causal=True)
            np.testing.assert_allclose(out.values[n], want.values, rtol=1e-12)

        def gradient(step, x):
            (values, offsets), tree = jax.tree.flatten(x)

            def loss(values):
                out = step(jax.tree.unflatten(tree, (values, offsets)))
                return jnp.sum(jnp.sin(out.values))

            return jax.jit(jax.grad(loss))(values)

        got = gradient(mapped, stacked)
        for n, shard in enumerate(shards[:2]):
            want = gradient(step, jax.tree.map(lambda x: jnp.asarray(x)[None], shard))
            np.testing.assert_allclose(got[n], want[0], rtol=1e-9, atol=1e-12)

    def test_vmap_is_one_after_the_other(self):
        shards, stacked = self.stacked(2)
        apply = module(add_bias_kv=True)
        out, weights = jax.jit(jax.vmap(lambda x: apply(x, x, x)))(stacked)
        for n, shard in enumerate(shards):
            want, want_weights = apply(shard, shard, shard)
            np.testing.assert_allclose(out.values[n], want.values, rtol=1e-12)
            np.testing.assert_allclose(weights[n], want_weights, rtol=1e-12)

    @pytest.mark.parametrize("max_len", [40, 5000], ids=["padded", "blocks"])
    def test_heads_under_plain_jit_cost_one_all_reduce(self, max_len):
        mesh = Mesh(np.array(jax.devices()[:2]), ("heads",))
        x = lay([5, 33], EMBED, slack=5000, max_len=max_len)
        apply = module()
        variables = apply.args[0]
        specs = {
            "in_proj_weight": P(None, "heads"),
            "in_proj_bias": P(None, "heads"),
            "out_proj": {"weight": P(None, "heads"), "bias": P()},
        }
        place = functools.partial(NamedSharding, mesh)
        shardings = {"params": jax.tree.map(place, specs)}
        placed = jax.device_put(variables, shardings)

        def step(variables, x):
            return apply.func(variables, x, x, x, need_weights=False)[0].values

        x = jax.device_put(x, place(P()))
        program = jax.jit(step, out_shardings=place(P())).lower(placed, x).compile()
        assert len(re.findall(r" all-reduce\(", program.as_text())) == 1
        assert not re.search("all-gather|all-to-all|permute", program.as_text())
        np.testing.assert_allclose(program(placed, x), step(variables, x), rtol=1e-9)


class TestFunctional:
    def test_scaled_dot_product_attention_is_that_of_each_element(self):
        q = lay(TGT, 4, HEAD_DIM, max_len=111)
        k, v = lay(SRC, 2, HEAD_DIM, max_len=111), lay(SRC, 2, VALUE_DIM, max_len=111)
        mask = masks(5, 111, 111).attn_bias[1][0, 0]  # one for all
        options = dict(enable_gqa=True, scale=0.2)
        attend = functools.partial(functional.scaled_dot_product_attention, **options)
        out = jax.jit(attend)(q, k, v, attn_mask=mask)
        assert (out.shape, out.capacity) == ((5, 111, 4, VALUE_DIM), q.capacity)
        for n, got in enumerate(out):
            heads_first = (jnp.swapaxes(jnp.asarray(x[n]), 0, 1) for x in (q, k, v))
            part = mask[: TGT[n], : SRC[n]]
            want = attend(*heads_first, part, implementation="reference")
            np.testing.assert_allclose(got.swapaxes(0, 1), want, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("dtype, rtol", [("float64", 1e-9), ("bfloat16", 0.1)])
    def test_scale_has_a_gradient(self, dtype, rtol):
        x = lay([5, 33], HEADS, HEAD_DIM, dtype=dtype)

        def loss(scale, implementation):
            out = functional.scaled_dot_product_attention(
                *(x, x, x), scale=scale, implementation=implementation
            )
            return jnp.sum(out.values.astype("float64") ** 2)

        got, want = (jax.grad(loss)(0.3, name) for name in ("blockwise", "reference"))
        np.testing.assert_allclose(got, want, rtol=rtol)

    @pytest.mark.parametrize(
        "shape",
        [(1, 40), (2, 1, 40, 40), (2, HEADS, 40, 40)],
        ids=["keys", "batch", "heads"],
    )
    def test_scaled_dot_product_attention_takes_masks_as_torch(self, shape):
        x = lay([5, 33], HEADS, HEAD_DIM, max_len=40)
        mask = np.random.default_rng(0).random(shape) < 0.7
        attend = functional.scaled_dot_product_attention
        out = attend(x, x, x, mask)
        heads_first = x.to_padded().swapaxes(1, 2)
        inside = np.arange(40)[None] < x.lengths[:, None]
        padded = attend(*[heads_first] * 3, mask & inside[:, None, None])
        for n, got in enumerate(out):
            want = padded[n, :, : len(got)].swapaxes(0, 1)
            np.testing.assert_allclose(got, want, rtol=1e-12)

    def test_multi_head_attention_forward_is_the_layer(self):
        x = lay([5, 0, 33], EMBED)
        apply = module(add_bias_kv=True, add_zero_attn=True)
        params = flax_mha.convert.state_dict_from_params(apply.args[0]["params"])
        out, weights = functional.multi_head_attention_forward(
            *(x, x, x, EMBED, HEADS),
            in_proj_weight=params["in_proj_weight"],
            in_proj_bias=params["in_proj_bias"],
            bias_k=params["bias_k"],
            bias_v=params["bias_v"],
            add_zero_attn=True,
            dropout_p=0.0,
            out_proj_weight=params["out_proj.weight"],
            out_proj_bias=params["out_proj.bias"],
        )
        want, want_weights = apply(x, x, x)
        np.testing.assert_allclose(out.values, want.values, rtol=1e-12)
        np.testing.assert_allclose(weights, want_weights, rtol=1e-12)


def test_explain_says_where_the_arrays_are_padded():
    x = lay([2000] * 8, 512, dtype="float32", slack=384)
    mha = MultiheadAttention(512, num_heads=8)
    explain = functools.partial(flax_mha.explain, mha.init_with_output)
    (call,) = explain(jax.random.key(0), x, x, x)
    assert (call.shape, call.is_ragged) == ((8, 8, 2048, 2048), True)
    assert (call.kernels["cpu"], call.kernels["tpu"]) == ("blockwise", "mosaic")
    assert "ragged" in str(call)
    unbounded = dataclasses.replace(x, max_len=None)
    (call,) = explain(jax.random.key(0), unbounded, unbounded, unbounded)
    assert call.kernels["tpu"] == "blockwise"
    assert call.reasons["tpu"]["mosaic"] == (
        "padded to max_len = 16384, query would have 131072 tokens, not 16384"
    )
