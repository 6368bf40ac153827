"""Who is measured. Each function builds a `Step` for a case, or says why it cannot.

Equal work: the same shapes, options and dtype, inputs on the device, and gradients of
all parameters and inputs for the same cotangent. Parameters are each library's own.
"""

import functools
from collections.abc import Callable

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import flax_mha
from benchmarks.cases import Case
from benchmarks.measure import Step, jax_step


def flax_mha_module(case: Case, *, implementation: str) -> Step:
    module = flax_mha.MultiheadAttention(
        case.embed,
        case.heads,
        dropout=case.dropout,
        batch_first=True,
        param_dtype=case.dtype,
        implementation=implementation,
    )
    token = jnp.ones((1, 1, case.embed), case.dtype)
    params = module.init(jax.random.key(0), token, token, token, deterministic=True)

    def apply(params, inputs, padding, rng):
        (x,) = inputs
        out, weights = module.apply(
            params,
            x,
            x,
            x,
            key_padding_mask=padding,
            need_weights=case.weights != "no_weights",
            is_causal=case.is_causal,
            deterministic=case.dropout == 0,
            rngs={"dropout": rng},
        )
        return _used(case, out, weights)

    padding = _on_device(case.key_padding_mask())
    return _jax_step(case, apply, params, (padding, _rng()))


def flax_linen(case: Case) -> Step:
    module = nn.MultiHeadDotProductAttention(
        num_heads=case.heads,
        dropout_rate=case.dropout,
        broadcast_dropout=False,
        param_dtype=case.dtype,
        deterministic=case.dropout == 0,
    )
    token = jnp.ones((1, 1, case.embed), case.dtype)
    params = module.init(jax.random.key(0), token)

    def apply(params, inputs, mask, rng):
        out, state = module.apply(
            params,
            *inputs,
            mask=mask,
            sow_weights=case.weights != "no_weights",
            rngs={"dropout": rng},
            mutable=["intermediates"],
        )
        if case.weights != "weights_used":
            return out
        (weights,) = state["intermediates"]["attention_weights"]
        return out, weights.mean(axis=1)  # over heads, as PyTorch's

    return _jax_step(case, apply, params, (_on_device(case.allowed()), _rng()))


def flax_nnx(case: Case) -> Step:
    module = nnx.MultiHeadAttention(
        case.heads,
        case.embed,
        dropout_rate=case.dropout,
        broadcast_dropout=False,
        param_dtype=jnp.dtype(case.dtype),
        deterministic=case.dropout == 0,
        decode=False,
        keep_rngs=False,
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(module, nnx.Param)
    mask = None if case.is_causal else _on_device(case.allowed())

    def apply(params, inputs, mask, rng):
        module = nnx.merge(graphdef, params)
        out = module(
            *inputs,
            mask=mask,
            is_causal=case.is_causal,
            sow_weights=case.weights != "no_weights",
            rngs=nnx.Rngs(dropout=rng),
        )
        if case.weights != "weights_used":
            return out
        (weights,) = nnx.pop(module, nnx.Intermediate)["attention_weights"].get_value()
        return out, weights.mean(axis=1)

    return _jax_step(case, apply, params, (mask, _rng()))


def equinox(case: Case) -> Step | str:
    if case.weights != "no_weights":
        return "returns no weights"
    module = eqx.nn.MultiheadAttention(
        case.heads,
        case.embed,
        use_query_bias=True,
        use_key_bias=True,
        use_value_bias=True,
        use_output_bias=True,
        dropout_p=case.dropout,
        dtype=jnp.dtype(case.dtype),
        key=jax.random.key(0),
    )
    params, static = eqx.partition(module, eqx.is_array)

    def apply(params, inputs, mask, rng):
        module = eqx.combine(params, static)

        def one(x, mask, rng):
            return module(x, x, x, mask, key=rng)

        (x,) = inputs
        return jax.vmap(one)(x, mask, jax.random.split(rng, case.batch))

    mask = case.allowed()
    if mask is not None:  # it takes no mask that broadcasts
        mask = np.broadcast_to(mask[:, 0], (case.batch, case.length, case.length))
    return _jax_step(case, apply, params, (_on_device(mask), _rng()))


def torch_module(case: Case, *, train: bool = True, compiled: bool = False) -> Step:
    dtype = getattr(torch, case.dtype)
    module = torch.nn.MultiheadAttention(
        case.embed, case.heads, dropout=case.dropout, batch_first=True, dtype=dtype
    ).train(train)
    padding = case.key_padding_mask()
    causal = None  # PyTorch wants the mask also where `is_causal` lets it ignore it
    if case.is_causal:
        causal = torch.from_numpy(~case.allowed()[0, 0])

    def forward(x):
        out, weights = module(
            x,
            x,
            x,
            key_padding_mask=None if padding is None else torch.from_numpy(padding),
            need_weights=case.weights != "no_weights",
            attn_mask=causal,
            is_causal=case.is_causal,
        )
        return _used(case, out, weights)

    if compiled:
        torch._dynamo.reset()  # or the case before would count as the same function
        forward = torch.compile(forward, dynamic=False)
    return _torch_step(case, forward, list(module.parameters()))


def torch_inference(case: Case) -> Step | str:
    if case.backward or case.dropout:
        return "the fast path is for inference"
    step = torch_module(case, train=False)
    return Step(torch.no_grad()(step.call))


def torch_compile(case: Case) -> Step | str:
    return _why_no_torch_compile() or torch_module(case, compiled=True)


def flax_mha_attention(case: Case, *, implementation: str) -> Step:
    def apply(params, inputs):
        return flax_mha.functional.scaled_dot_product_attention(
            *inputs, is_causal=case.is_causal, implementation=implementation
        )

    return _jax_step(case, apply)


def jax_nn(case: Case) -> Step:
    def apply(params, inputs):
        return jax.nn.dot_product_attention(*inputs, is_causal=case.is_causal)

    # Its own axis order, (batch, length, heads, head_dim), from the start.
    return _jax_step(case, apply, prepare=lambda x: x.swapaxes(1, 2))


def torch_attention(case: Case) -> Step:
    def forward(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=case.is_causal
        )

    return _torch_step(case, forward)


OURS = "flax_mha"
REFERENCE = "flax_mha-reference"
MODULES = {
    OURS: functools.partial(flax_mha_module, implementation="blockwise"),
    REFERENCE: functools.partial(flax_mha_module, implementation="reference"),
    "torch": torch_module,
    "torch-inference": torch_inference,
    "torch-compile": torch_compile,
    "flax.linen": flax_linen,
    "flax.nnx": flax_nnx,
    "equinox": equinox,
}
ATTENTIONS = {
    OURS: functools.partial(flax_mha_attention, implementation="blockwise"),
    REFERENCE: functools.partial(flax_mha_attention, implementation="reference"),
    "torch-sdpa": torch_attention,
    "jax.nn": jax_nn,
}
NAMES = list(MODULES | ATTENTIONS)


def _used(case: Case, out, weights):
    return (out, weights) if case.weights == "weights_used" else out


def _on_device(mask):
    return None if mask is None else jnp.asarray(mask)


def _rng() -> jax.Array:
    return jax.random.key(1)


def _jax_step(
    case: Case, apply: Callable, params=(), extra=(), prepare: Callable = lambda x: x
) -> Step:
    """Compiles `apply(params, inputs, *extra)`, or it and its gradient."""
    arrays = jax.tree.map(prepare, case.arrays())
    inputs, cotangent = jax.tree.map(lambda x: jnp.asarray(x, case.dtype), arrays)
    if not case.backward:
        return jax_step(apply, params, inputs, *extra)

    def forward_backward(params, inputs, cotangent, *extra):
        # The output is returned because PyTorch computes it too; for a gradient alone,
        # XLA would leave out the output projection.
        out, pullback = jax.vjp(lambda *args: apply(*args, *extra), params, inputs)
        return out, pullback(cotangent)

    return jax_step(forward_backward, params, inputs, cotangent, *extra)


def _torch_step(case: Case, forward: Callable, params=()) -> Step:
    dtype = getattr(torch, case.dtype)
    inputs, cotangent = case.arrays()
    inputs = [torch.from_numpy(x).to(dtype).requires_grad_() for x in inputs]
    cotangent = torch.from_numpy(cotangent).to(dtype)

    def call():
        out = forward(*inputs)
        if not case.backward:
            return out
        return out, torch.autograd.grad(out, [*params, *inputs], cotangent)

    return Step(call)


@functools.cache
def _why_no_torch_compile() -> str | None:
    """Tries it once: it needs a C++ compiler and Python's headers."""
    try:
        torch_module(Case(1, 4, 8, 2), compiled=True).call()
    except Exception as error:
        return f"torch.compile fails here: {type(error).__name__}"
