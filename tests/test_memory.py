"""What XLA keeps in memory, read from the compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import MultiheadAttention

BATCH, HEADS, EMBED = 2, 4, 32
LENGTH = 2048


def padding(length):
    return jax.ShapeDtypeStruct((BATCH, length), jnp.bool_)


def attn_mask(length, dtype=jnp.bool_):
    return jax.ShapeDtypeStruct((length, length), dtype)


# Constructor options, and forward options as functions of the length.
OPTIONS = {
    "plain": ({}, {}),
    "padding": ({}, {"key_padding_mask": padding}),
    "attn_mask": ({}, {"attn_mask": attn_mask}),
    "float_mask": ({}, {"attn_mask": lambda n: attn_mask(n, jnp.float32)}),
    "both_masks": ({}, {"key_padding_mask": padding, "attn_mask": attn_mask}),
    "causal": ({}, {"is_causal": lambda n: True}),
    "bias_kv": ({"add_bias_kv": True}, {}),
    "zero_attn": ({"add_zero_attn": True}, {"key_padding_mask": padding}),
    "dropout": ({"dropout": 0.1}, {}),
}


def compiled(build, call, length, *, grad, need_weights, implementation=None):
    """Compiles a training or inference step that returns no weights."""
    mha = MultiheadAttention(
        EMBED, HEADS, batch_first=True, implementation=implementation, **build
    )
    x = jax.ShapeDtypeStruct((BATCH, length, EMBED), jnp.float32)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    options = {name: make(length) for name, make in call.items()}
    masks = {name: m for name, m in options.items() if not isinstance(m, bool)}
    flags = {name: flag for name, flag in options.items() if isinstance(flag, bool)}

    def step(variables, x, rng, masks):
        out, _ = mha.apply(
            variables,
            x,
            x,
            x,
            need_weights=need_weights,
            deterministic=False,
            rngs={"dropout": rng},
            **masks,
            **flags,
        )
        return jnp.sum(out**2) if grad else out

    variables = jax.eval_shape(
        lambda rng, x: mha.init(rng, x, x, x, deterministic=True), rng, x
    )
    step = jax.grad(step, argnums=(0, 1)) if grad else step
    return jax.jit(step).lower(variables, x, rng, masks).compile()


def largest_array(program):
    shapes = re.findall(r"[a-z]\w*\[([\d,]+)\]", program.as_text())
    return max(int(np.prod([int(n) for n in s.split(",")])) for s in shapes)


def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("need_weights", [False, True], ids=["no_weights", "dropped"])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("name", OPTIONS)
def test_no_array_holds_all_the_logits(name, grad, need_weights):
    program = compiled(*OPTIONS[name], LENGTH, grad=grad, need_weights=need_weights)
    # A (length, length) mask is the caller's; nothing has an axis more than that.
    assert largest_array(program) <= LENGTH * (LENGTH + 2)


def test_the_test_above_can_fail():
    program = compiled(
        {}, {}, LENGTH, grad=True, need_weights=False, implementation="reference"
    )
    assert largest_array(program) >= BATCH * HEADS * LENGTH * LENGTH


def test_a_per_head_mask_is_read_block_by_block():
    def mask(length):
        return jax.ShapeDtypeStruct((BATCH * HEADS, length, length), jnp.bool_)

    program = compiled(
        {"add_bias_kv": True}, {"attn_mask": mask}, 1024, grad=True, need_weights=False
    )
    assert temporaries(program) < BATCH * HEADS * 1024 * 1024  # bytes: a copy of it


@pytest.mark.parametrize("name", [n for n in OPTIONS if "mask" not in n])
def test_memory_is_linear_in_the_length(name):
    short, long = (
        temporaries(compiled(*OPTIONS[name], n, grad=True, need_weights=False))
        for n in (4096, 8192)
    )
    assert long <= 2.2 * short


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
def test_memory_is_a_tenth_of_the_definitions(grad):
    ours, definition = (
        temporaries(
            compiled(
                {},
                {},
                4096,
                grad=grad,
                need_weights=False,
                implementation=implementation,
            )
        )
        for implementation in ("blockwise", "reference")
    )
    assert ours <= definition / 10


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
def test_weights_nobody_uses_cost_no_operations_and_one_block_of_memory(grad):
    dropped, absent = (
        compiled({}, {}, LENGTH, grad=grad, need_weights=need_weights)
        for need_weights in (True, False)
    )
    block = 512 * LENGTH * 4  # in bytes: weights want whole rows of the logits
    assert temporaries(dropped) <= temporaries(absent) + block
    for operation in (" dot(", " exponential("):
        assert dropped.as_text().count(operation) <= absent.as_text().count(operation)
