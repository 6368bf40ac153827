"""Decoding with a cache: every step equals the full forward pass."""

import functools
import re

import flax.linen as nn
import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flax_mha.nnx
from flax_mha import KeyValueCache, MultiheadAttention, RaggedArray
from flax_mha._attention import multi_head_attention
from flax_mha._params import parameter_table
from flax_mha.functional import multi_head_attention_forward
from tests.collectives import collectives

EMBED, HEADS, BATCH, LENGTH = 12, 3, 2, 40
ROOM = LENGTH + 5


def raises(error, text):
    return pytest.raises(error, match=re.escape(text))


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def parameters(dtype=np.float64, **options):
    table = parameter_table(EMBED, HEADS, **options)
    return {
        name: jnp.asarray(normal(*spec.shape, seed=n, dtype=dtype) / 2)
        for n, (name, spec) in enumerate(table.items())
    }


def attend(params, x, key=None, *, self_attention=True, **options):
    key = x if self_attention else key
    return multi_head_attention(params, x, key, key, batch_first=True, **options)


def empty(dtype=jnp.float64, batch=BATCH, length=ROOM):
    return KeyValueCache.empty(batch, length, HEADS, EMBED // HEADS, dtype)


# A prefill, pieces, one and several tokens at a time, on both sides of `_FEW` queries.
CHUNKS = {
    "at-once": [40],
    "by-one": [17] + [1] * 23,
    "pieces": [20, 3, 17],
    "few-then-many": [5, 1, 1, 30, 3],
}
OPTIONS = {
    "plain": dict(),
    "weights": dict(need_weights=True),
    "mean": dict(need_weights=True, average_attn_weights=True),
    "extra": dict(add_zero_attn=True, need_weights=True),
    "key_padding": dict(key_padding=True),
    "float_mask": dict(attn_mask="float", add_zero_attn=True),
    "boolean_mask": dict(attn_mask="bool", key_padding=True, need_weights=True),
}


def call_masks(options, first, new, columns):
    """Returns the masks of some rows, for so many columns."""
    masks = {}
    if options.get("key_padding"):
        hidden = np.arange(ROOM)[None] % 7 == np.array([[3], [5]])
        masks["key_padding_mask"] = hidden[:, :columns]
    if "attn_mask" in options:
        mask = normal(BATCH * HEADS, ROOM, ROOM, seed=9)
        mask = np.where(np.tri(ROOM, dtype=bool), mask, -np.inf)
        if options["attn_mask"] == "bool":
            mask = (mask > 0.5) | ~np.tri(ROOM, dtype=bool)
            mask[..., 0] = False
        masks["attn_mask"] = mask[:, first : first + new, :columns]
    return masks


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_step_equals_the_full_forward_pass(options, chunks):
    flags = dict(need_weights=False, average_attn_weights=False) | {
        name: flag for name, flag in options.items() if isinstance(flag, bool)
    }
    flags.pop("key_padding", None)
    flags["is_causal"] = "attn_mask" not in options  # which is causal itself
    params = parameters(add_bias_kv="add_zero_attn" in options)
    x = normal(BATCH, LENGTH, EMBED, seed=20)
    masks = call_masks(options, 0, LENGTH, LENGTH)
    want, want_weights = attend(params, x, **flags, **masks)
    step = jax.jit(functools.partial(attend, **flags))
    cache, first = empty(), 0
    for new in chunks:
        masks = call_masks(options, first, new, ROOM)
        rows = slice(first, first + new)
        out, weights, cache = step(params, x[:, rows], cache=cache, **masks)
        np.testing.assert_allclose(out, want[:, rows], rtol=1e-12, atol=1e-12)
        if want_weights is not None:
            keys, room, extra = np.split(weights, [LENGTH, ROOM], axis=-1)
            assert not room.any()
            got = np.concatenate([keys, extra], axis=-1)
            expected = want_weights[..., rows, :]
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
        first += new
    assert cache.position.tolist() == [LENGTH] * BATCH


def test_weights_of_nothing_are_nan_for_all_that_there_is_room_for():
    blocked = np.zeros((40, ROOM), bool)
    blocked[7] = True
    params, x = parameters(), normal(BATCH, 40, EMBED, seed=21)
    _, weights, _ = attend(params, x, cache=empty(), attn_mask=blocked)
    assert (np.isnan(weights) == blocked).all()


@pytest.mark.parametrize(
    "dtype, cache_dtype, tolerance",
    [
        ("float32", "float32", 3e-5),
        ("bfloat16", "bfloat16", 3e-2),
        ("float32", "bfloat16", 3e-2),
        ("float16", "float16", 4e-3),
    ],
)
def test_narrow_dtypes_are_near_the_truth(dtype, cache_dtype, tolerance):
    length = 300  # several blocks of keys, the last of which overlaps
    x = normal(BATCH, length, EMBED, seed=1).astype(dtype)
    params = jax.tree.map(lambda p: p.astype(dtype), parameters())
    truth, _ = attend(
        *jax.tree.map(lambda p: jnp.asarray(p, "float64"), (params, x)),
        is_causal=True,
        need_weights=False,
    )
    step = jax.jit(functools.partial(attend, is_causal=True, need_weights=False))
    cache = empty(cache_dtype, length=length)
    for rows in [
        slice(0, 290),
        slice(290, 297),
        *(slice(n, n + 1) for n in (297, 298)),
    ]:
        out, _, cache = step(params, x[:, rows], cache=cache)
        assert out.dtype == dtype
        error = np.abs(np.asarray(out, "float64") - truth[:, rows]).max()
        assert error <= tolerance * np.abs(truth).max()


def test_sequences_at_different_positions():
    params, lengths = parameters(), [7, 31]
    x = normal(BATCH, LENGTH, EMBED, seed=3)
    want, _ = attend(params, x, is_causal=True, need_weights=False)
    step = jax.jit(functools.partial(attend, is_causal=True, need_weights=False))
    prompts = RaggedArray.from_padded(x[:, :31], np.array(lengths))
    out, _, cache = step(params, prompts, cache=empty())
    assert cache.position.tolist() == lengths
    for n, length in enumerate(lengths):
        np.testing.assert_allclose(out[n], want[n, :length], rtol=1e-12, atol=1e-12)
    for _ in range(3):
        at = cache.position[:, None, None]
        new = jnp.take_along_axis(x, at, axis=1)
        expected = jnp.take_along_axis(want, at, axis=1)
        out, _, cache = step(params, new, cache=cache)
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    # One sequence is finished: its step has no token.
    last = RaggedArray(x[1, 34:35], np.array([0, 0, 1]), 1)
    out, _, cache = step(params, last, cache=cache)
    np.testing.assert_allclose(out[1], want[1, 34:35], rtol=1e-12, atol=1e-12)
    assert cache.position.tolist() == [10, 35]


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("tgt_len", [4, 20])
def test_padding_is_in_no_gradient(tgt_len, implementation):
    """Neither a masked row, nor a sequence that has nothing and gets nothing."""
    blocked = np.zeros((BATCH * HEADS, tgt_len, ROOM), bool)
    blocked[:, -1] = True
    x = normal(BATCH, tgt_len, EMBED, seed=22)
    cache = empty()
    cache = KeyValueCache(cache.keys, cache.values + 1e9, cache.position, cache.dtype)

    @functools.partial(jax.jit, static_argnums=2)
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, x, need_weights):
        query = RaggedArray.from_padded(x, np.array([3, 0]))
        out, _, _ = attend(
            *(params, query),
            need_weights=need_weights,
            implementation=implementation,
            attn_mask=blocked,
            cache=cache,
        )
        return jnp.sum(out.only_tokens().values ** 2)

    want, got = (gradients(parameters(), x, wanted) for wanted in (False, True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-12), got, want)


@pytest.mark.parametrize("tgt_len", [1, 20])
@pytest.mark.parametrize("lengths", [None, [9, 40]], ids=["full", "ragged"])
def test_cross_attention_projects_its_keys_once(tgt_len, lengths):
    params, memory = parameters(), normal(BATCH, LENGTH, EMBED, seed=4)
    x = normal(BATCH, tgt_len, EMBED, seed=5)
    padding, filled = None, memory
    if lengths is not None:
        padding = np.arange(LENGTH) >= np.array(lengths)[:, None]
        filled = RaggedArray.from_padded(memory, np.array(lengths))
        queries = RaggedArray.from_padded(x)
    else:
        queries = x
    options = dict(self_attention=False, need_weights=False)
    want, _ = attend(params, x, memory, key_padding_mask=padding, **options)
    first, _, cache = attend(params, queries, filled, cache=empty(), **options)
    if lengths is not None:
        first = first.to_padded()
    again, _, same = attend(params, x, None, cache=cache, **options)
    for out in (first, again):
        np.testing.assert_allclose(out, want, rtol=1e-12, atol=1e-12)
    assert same is cache
    program = jax.jit(lambda x: attend(params, x, None, cache=cache, **options)[0])
    projections = re.findall(r"dot_general", program.lower(x).as_text())
    assert len(projections) <= 4  # of the query and of the result, and two products


def test_a_full_cache_is_an_error():
    params, x = parameters(), normal(BATCH, 3, EMBED)
    step = functools.partial(attend, is_causal=True, need_weights=False)
    _, _, cache = step(params, x, cache=empty(length=5))
    with raises(ValueError, "3 tokens more, got one with room for 5 that holds 3"):
        step(params, x, cache=cache)
    with raises(ValueError, "got one with room for 2 that holds some"):
        jax.eval_shape(lambda c: step(params, x, cache=c), empty(length=2))


@pytest.mark.parametrize("new", [3, 20], ids=["few", "many"])
def test_what_does_not_fit_is_nan_for_ever_where_nothing_can_be_raised(new):
    params, x = parameters(), normal(BATCH, new, EMBED)
    step = jax.jit(functools.partial(attend, is_causal=True, need_weights=True))
    room = empty(length=new + 2)
    cache = KeyValueCache(room.keys, room.values, jnp.array([3, 1], "int32"), "float64")
    out, weights, cache = step(params, x, cache=cache)
    for result in (out, weights):
        assert np.isnan(result[0]).all() and np.isfinite(result[1]).all()
    out, _, cache = step(params, x[:, :1], cache=cache)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
    read = jax.jit(functools.partial(attend, self_attention=False))
    out, _, _ = read(params, x[:, :1], cache=cache)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_a_beam_is_reordered_by_its_batch():
    params, x = parameters(), normal(BATCH, 6, EMBED, seed=6)
    step = jax.jit(functools.partial(attend, is_causal=True, need_weights=False))
    _, _, cache = step(params, x[:, :5], cache=empty())
    order = jnp.array([1, 1, 0])
    beams = jax.tree.map(lambda array: array[order], cache)
    out, _, _ = step(params, x[order, 5:], cache=beams)
    want, _ = attend(params, x, is_causal=True, need_weights=False)
    np.testing.assert_allclose(out, want[order, 5:], rtol=1e-12, atol=1e-12)


@functools.cache
def layer(**options):
    return MultiheadAttention(
        EMBED, HEADS, batch_first=True, param_dtype="float64", decode=True, **options
    )


def test_linen_keeps_the_cache_in_its_collection():
    x = normal(BATCH, LENGTH, EMBED, seed=7)
    shapes = jax.eval_shape(layer().init, jax.random.key(0), x, x, x)
    assert shapes["cache"]["kv"].keys.shape == (BATCH, HEADS, LENGTH, 4)
    variables = layer().init(jax.random.key(0), x, x, x)
    params, cache = variables["params"], variables["cache"]
    assert cache["kv"].position.tolist() == [0, 0] and not cache["kv"].keys.any()
    plain = layer().clone(decode=False)
    options = dict(need_weights=False, is_causal=True)
    want, _ = plain.apply({"params": params}, x, x, x, **options)

    traced = []

    @jax.jit
    def step(cache, x):
        traced.append(x.shape)
        variables = {"params": params, "cache": cache}
        (out, _), state = layer().apply(
            variables, x, x, x, **options, mutable=["cache"]
        )
        return state["cache"], out

    cache, out = step(cache, x[:, :30])
    np.testing.assert_allclose(out, want[:, :30], rtol=1e-12, atol=1e-12)
    for n in range(30, LENGTH):
        cache, out = step(cache, x[:, n : n + 1])
        np.testing.assert_allclose(out[:, 0], want[:, n], rtol=1e-12, atol=1e-12)
    assert traced == [(BATCH, 30, EMBED), (BATCH, 1, EMBED)]  # no other program


def test_linen_attends_to_what_is_cached_without_making_it_mutable():
    x, memory = normal(BATCH, 1, EMBED, seed=8), normal(BATCH, 9, EMBED, seed=9)
    variables = layer().init(jax.random.key(0), x, memory, memory)
    first, state = layer().apply(variables, x, memory, memory, mutable=["cache"])
    again = layer().apply(variables | state, x, None, None)
    np.testing.assert_allclose(again[0], first[0], rtol=1e-12)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["step", "scan", "while"])
def test_the_compiled_step_copies_no_cache(kind, dtype, batch):
    params, length = parameters("float32"), 2048
    cache = jax.eval_shape(lambda: empty(dtype, batch, length))
    x = jax.ShapeDtypeStruct((batch, 1, EMBED), "float32")

    def step(carry):
        options = dict(is_causal=True, need_weights=False)
        x, _, cache = attend(params, carry[0], cache=carry[1], **options)
        return x, cache

    def program(x, cache):
        if kind == "scan":
            body = lambda carry, _: (step(carry), None)  # noqa: E731
            return lax.scan(body, (x, cache), None, length=9)[0]
        if kind == "while":
            return lax.while_loop(lambda c: c[1].position[0] < 9, step, (x, cache))
        return step((x, cache))

    with jax.enable_x64(False):
        compiled = jax.jit(program, donate_argnums=1).lower(x, cache).compile()
    nbytes = cache.keys.size * cache.keys.dtype.itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * nbytes
    assert memory.temp_size_in_bytes < nbytes
    whole = f"[{','.join(map(str, cache.keys.shape))}]"
    made = [
        line
        for line in compiled.as_text().splitlines()
        if re.search(r" (copy|convert|transpose)\(", line)
        and whole in line.split(" = ")[1].split("(")[0]
    ]
    assert made == []


def test_forward_mode_is_that_of_the_full_pass():
    params, x = parameters(), normal(BATCH, 20, EMBED, seed=13)
    options = dict(is_causal=True, need_weights=False)

    def pieces(x):
        cache, outs = empty(length=80), []
        for rows in (slice(0, 19), slice(19, 20)):
            out, _, cache = attend(params, x[:, rows], cache=cache, **options)
            outs.append(out)
        return jnp.concatenate(outs, axis=1)

    def full(x):
        return attend(params, x, **options)[0]

    got, want = (jax.jvp(f, (x,), (x[::-1],)) for f in (pieces, full))
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-11)


def test_gradients_are_those_of_the_full_forward_pass():
    params, x = parameters(add_bias_kv=True), normal(BATCH, 30, EMBED, seed=10)
    options = dict(is_causal=True, need_weights=True)

    def full(params, x):
        out, weights = attend(params, x, **options)
        return jnp.sum(out**3) + jnp.sum(weights**2)

    def pieces(params, x):
        cache, total = empty(length=30), 0
        for rows in (slice(0, 20), slice(20, 29), slice(29, 30)):
            out, weights, cache = attend(params, x[:, rows], cache=cache, **options)
            total += jnp.sum(out**3) + jnp.sum(weights**2)
        return total

    got, want = (
        jax.jit(jax.grad(f, argnums=(0, 1)))(params, x) for f in (pieces, full)
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), got, want
    )
    with raises(ValueError, "a cache of bfloat16 must not be differentiated"):
        jax.grad(lambda x: attend(params, x, cache=empty("bfloat16"))[0].sum())(x)


def test_static_keys_are_attended_to_as_they_lie():
    table = parameter_table(EMBED, HEADS)
    params = {
        name.replace(".", "_"): normal(*spec.torch_shape, seed=n)
        for n, (name, spec) in enumerate(table.items())
    }
    rows, src_len = BATCH * HEADS, 300
    query = normal(1, BATCH, EMBED)
    static = [normal(rows, src_len, 4, seed=n) for n in (2, 3)]
    padding = np.arange(src_len)[None] > np.array([[100], [299]])
    source = np.zeros((src_len, BATCH, EMBED))

    def call(query, static, **options):
        return multi_head_attention_forward(
            *(query, source, source, EMBED, HEADS),
            *(params["in_proj_weight"], params["in_proj_bias"], None, None, True, 0.0),
            *(params["out_proj_weight"], params["out_proj_bias"]),
            training=False,
            key_padding_mask=padding,
            static_k=static[0],
            static_v=static[1],
            **options,
        )

    for need_weights in (False, True):
        got = jax.jit(functools.partial(call, need_weights=need_weights))(query, static)
        want = call(
            query, static, need_weights=need_weights, implementation="reference"
        )
        for one, other in zip(got, want, strict=True):
            if other is not None:
                np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
    compiled = jax.jit(functools.partial(call, need_weights=False))
    memory = compiled.lower(query, static).compile().memory_analysis()
    assert memory.temp_size_in_bytes < static[0].nbytes


def test_a_mesh_needs_only_the_sum_over_heads():
    mesh = jax.make_mesh(
        (2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    embed, heads = 16, 4
    params = {
        name: jax.ShapeDtypeStruct(
            spec.shape,
            "float32",
            sharding=NamedSharding(
                mesh, P(*("heads" if axis == "heads" else None for axis in spec.axes))
            ),
        )
        for name, spec in parameter_table(embed, heads).items()
    }
    by_heads = NamedSharding(mesh, P("data", "heads"))
    by_batch = NamedSharding(mesh, P("data"))
    cache = jax.eval_shape(lambda: KeyValueCache.empty(4, 64, heads, 4))
    cache = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=by_heads if x.ndim > 1 else by_batch
        ),
        cache,
    )
    x = jax.ShapeDtypeStruct((4, 1, embed), "float32", sharding=by_batch)
    step = jax.jit(functools.partial(attend, is_causal=True, need_weights=False))
    program = step.lower(params, x, cache=cache).compile()
    assert collectives(program) == {"all-reduce": 1}


def test_the_cache_travels():
    cache = empty("bfloat16")
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(cache)]
    assert paths == [".keys", ".values", ".position"]
    state = flax.serialization.to_bytes({"kv": cache})
    back = flax.serialization.from_bytes({"kv": cache}, state)["kv"]
    assert back.dtype == cache.dtype and back.keys.dtype == np.uint16
    exported = jax.export.export(jax.jit(lambda cache: cache))(cache)
    again = jax.export.deserialize(exported.serialize())
    assert again.call(cache).dtype == cache.dtype


@pytest.mark.parametrize("new", [1, 20])
def test_a_step_is_exported_for_any_batch(new):
    params = parameters()
    step = functools.partial(attend, params, is_causal=True, need_weights=False)
    (b,) = jax.export.symbolic_shape("b")
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((b, *a.shape[1:]), a.dtype), empty(length=80)
    )
    x = jax.ShapeDtypeStruct((b, new, EMBED), "float64")
    exported = jax.export.export(jax.jit(lambda x, cache: step(x, cache=cache)))
    exported = jax.export.deserialize(exported(x, shapes).serialize())
    x = normal(3, new, EMBED)
    out, _, cache = exported.call(x, empty(batch=3, length=80))
    want, *_ = step(x, cache=empty(batch=3, length=80))
    np.testing.assert_allclose(out, want, rtol=1e-12, atol=1e-12)
    assert cache.position.tolist() == [new] * 3


def test_layers_are_scanned_over_with_their_caches():
    layers = 3
    x = normal(BATCH, 5, EMBED, seed=11)
    params = jax.tree.map(
        lambda p: normal(layers, *p.shape, seed=p.size) / 2, parameters()
    )
    caches = jax.tree.map(lambda a: jnp.stack([a] * layers), empty())
    options = dict(is_causal=True, need_weights=False)

    def one_layer(x, layer):
        params, cache = layer
        out, _, cache = attend(params, x, cache=cache, **options)
        return x + out, cache

    got, caches = lax.scan(one_layer, x, (params, caches))
    want = x
    for n in range(layers):
        weights = jax.tree.map(lambda p, n=n: jnp.asarray(p[n]), params)
        want = want + attend(weights, want, **options)[0]
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    assert caches.position.tolist() == [[5, 5]] * layers


ERRORS = {
    "cache must be a flax_mha.KeyValueCache": dict(cache={}),
    "cache must be one of": dict(cache=empty(batch=3)),
    "key and value must both be given": dict(value=None),
    "is_causal must be False if key and value are None": dict(key=None, value=None),
    "query and key must be as long": dict(key=normal(2, 4, 12), value=normal(2, 4, 12)),
    "a 2-D attn_mask must have shape": dict(attn_mask=np.zeros((3, 3))),
    "key_padding_mask must have shape": dict(key_padding_mask=np.zeros((2, 3), bool)),
    "implementation='mosaic' cannot": dict(implementation="mosaic"),
}


@pytest.mark.parametrize("message, wrong", ERRORS.items(), ids=range(len(ERRORS)))
def test_wrong_calls_are_refused(message, wrong):
    x = normal(BATCH, 3, EMBED)
    call = dict(query=x, key=x, value=x, is_causal=True, cache=empty()) | wrong
    error = TypeError if "KeyValueCache" in message else ValueError
    with raises(error, message):
        multi_head_attention(parameters(), **call, batch_first=True)


def test_dropout_is_refused():
    x = normal(BATCH, 3, EMBED)
    dropped = layer(dropout=0.5)
    variables = dropped.init(jax.random.key(0), x, x, x, deterministic=True)
    with raises(ValueError, "dropout must be off"):
        dropped.apply(
            variables,
            *(x, x, x),
            deterministic=False,
            rngs={"dropout": jax.random.key(1)},
            mutable=["cache"],
        )


def test_decode_without_a_cache_is_refused():
    x = normal(BATCH, 3, EMBED)
    variables = layer().init(jax.random.key(0), x, x, x)
    with raises(ValueError, 'decode=True needs the "cache" collection'):
        layer().apply({"params": variables["params"]}, x, x, x)
    with raises(ValueError, "key must be given to init with decode=True"):
        layer().init(jax.random.key(0), x, None, None)


def test_nnx_keeps_the_cache_in_a_variable():
    x = normal(BATCH, 9, EMBED, seed=12, dtype=np.float32)
    plain = flax_mha.nnx.MultiheadAttention(
        EMBED, HEADS, batch_first=True, rngs=nnx.Rngs(0)
    )
    want, _ = plain(x, x, x, is_causal=True)
    mha = nnx.view(plain, decode=True, batch_size=BATCH, max_length=9)
    assert plain.cache is None and not plain.decode

    @nnx.jit
    def step(mha, x):
        return mha(x, x, x, is_causal=True, need_weights=False)[0]

    out = [step(mha, x[:, :7]), step(mha, x[:, 7:8]), step(mha, x[:, 8:])]
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), want, atol=3e-6)
    (cache,) = jax.tree.leaves(
        nnx.to_pure_dict(nnx.state(mha, nnx.Cache)),
        is_leaf=lambda x: isinstance(x, KeyValueCache),
    )
    assert cache.position.tolist() == [9, 9]
    mha.init_cache(1, 5, dtype="bfloat16")
    assert mha.cache.get_value().dtype == jnp.bfloat16
    with raises(ValueError, "decode=True needs a cache: call init_cache"):
        nnx.view(plain, decode=True)(x, x, x)


class Twice(nn.Module):
    """Two layers with caches of their own names."""

    @nn.compact
    def __call__(self, x):
        for name in ("first", "second"):
            attend = MultiheadAttention(EMBED, HEADS, decode=True, name=name)
            x = attend(x, x, x, is_causal=True)[0]
        return x


def test_each_layer_of_a_model_has_its_own_cache():
    x = normal(4, BATCH, EMBED, dtype=np.float32)
    variables = Twice().init(jax.random.key(0), x)
    assert set(variables["cache"]) == {"first", "second"}
    _, state = Twice().apply(variables, x, mutable=["cache"])
    assert state["cache"]["second"]["kv"].position.tolist() == [4, 4]
