"""Each element of a ragged batch is what PyTorch computes for it alone, in float64.

Over combinations of all options, drawn at random: output, weights and all gradients.
What lies in the slack is NaN, and must change nothing.
"""

import dataclasses
import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_mha import MultiheadAttention, RaggedArray
from flax_mha.convert import params_from_state_dict, state_dict_from_params
from tests.parity._torch_side import QUICK, randomize

EMBED = 6
NUM_CONFIGS = 28

# Lengths of queries, and of keys where these are others.
LENGTHS = {
    "one": ([7], [70]),
    "equal": ([5, 5], [9, 9]),
    "mixed": ([33, 1, 70, 5], [5, 64, 1, 33]),
    "empty_ones": ([0, 5, 0, 33, 0], [5, 0, 0, 70, 1]),
    "all_empty": ([0, 0], [0, 5]),
}


class Config(NamedTuple):
    lengths: str
    inputs: str  # "self", "memory": key is value, "other": all three differ
    num_heads: int
    bias: bool
    add_bias_kv: bool
    add_zero_attn: bool
    weights: str | None
    is_causal: bool
    attn_mask: str | None
    key_padding_mask: str | None
    slack: int
    max_len: str


VALUES = Config(
    lengths=list(LENGTHS),
    inputs=["self", "memory", "other"],
    num_heads=[1, 2, 3],
    bias=[True, False],
    add_bias_kv=[False, True],
    add_zero_attn=[False, True],
    weights=[None, None, "mean", "heads"],
    is_causal=[False, True],
    attn_mask=[None, None, "bool", "float", "bool_heads", "float_heads"],
    key_padding_mask=[None, None, "bool", "float"],
    slack=[0, 1, 37],
    max_len=["exact", "rounded", "capacity"],
)


def draw_configs():
    rng = random.Random(6)
    configs = []
    while len(configs) < NUM_CONFIGS:
        # Every value of every option comes in turn, so that each is drawn often.
        n = len(configs)
        config = Config(
            *(
                values[n % len(values)] if rng.random() < 0.3 else rng.choice(values)
                for values in VALUES
            )
        )
        if config.is_causal and config.attn_mask:
            continue  # a hint; tested in test_ragged_attention.py
        configs.append(config)
    return configs


CONFIGS = draw_configs()


@dataclasses.dataclass
class Case:
    """The arrays of a config, as NumPy: of each element, and laid end to end."""

    config: Config
    module: torch.nn.MultiheadAttention
    elements: dict[str, list[np.ndarray]]
    ragged: dict[str, RaggedArray]
    attn_mask: np.ndarray | None

    @classmethod
    def draw(cls, config):
        rng = np.random.default_rng([ord(c) for c in repr(config)])
        tgt, src = LENGTHS[config.lengths]
        src = tgt if config.inputs == "self" else src
        kdim, vdim = (5, 4) if config.inputs == "other" else (None, None)
        module = torch.nn.MultiheadAttention(
            EMBED,
            config.num_heads,
            bias=config.bias,
            add_bias_kv=config.add_bias_kv,
            add_zero_attn=config.add_zero_attn,
            kdim=kdim,
            vdim=vdim,
            dtype=torch.float64,
        )
        randomize(module, rng)
        features = dict(query=EMBED, key=kdim or EMBED, value=vdim or EMBED)
        elements = {
            name: [
                rng.normal(size=(n, width)) for n in (tgt if name == "query" else src)
            ]
            for name, width in features.items()
        }
        if config.key_padding_mask:
            elements["key_padding_mask"] = [rng.normal(size=n) for n in src]
            if config.key_padding_mask == "bool":
                elements["key_padding_mask"] = [
                    # The first key stays: a query that may attend to nothing is NaN.
                    (mask > 0.5) & (np.arange(len(mask)) > 0)
                    for mask in elements["key_padding_mask"]
                ]
        if config.inputs == "self":
            elements["key"] = elements["value"] = elements["query"]
        elif config.inputs == "memory":
            elements["value"] = elements["key"]
        ragged = {name: cls.lay(config, arrays) for name, arrays in elements.items()}
        mask = None
        if config.attn_mask:
            shape = ragged["query"].max_len, ragged["key"].max_len
            if config.attn_mask.endswith("heads"):
                shape = (len(tgt) * config.num_heads, *shape)
            mask = rng.normal(size=shape)
            if config.attn_mask.startswith("bool"):
                mask = (mask > 0.5) & (np.arange(shape[-1]) > 0)
        return cls(config, module, elements, ragged, mask)

    @staticmethod
    def lay(config, arrays):
        total = sum(map(len, arrays))
        capacity = max(total + config.slack, 1)
        max_len = {
            "exact": max(map(len, arrays)),
            "rounded": None,
            "capacity": capacity,
        }
        ragged = RaggedArray.from_list(
            arrays, capacity=capacity, max_len=max_len[config.max_len]
        )
        if ragged.dtype == bool:
            return ragged
        poisoned = np.array(ragged.values)
        poisoned[total:] = np.nan
        return dataclasses.replace(ragged, values=jnp.asarray(poisoned))

    def torch_results(self, cotangents):
        """Returns the results of each element, and all gradients."""
        leaves = {
            name: [torch.tensor(x) for x in arrays]
            for name, arrays in self.elements.items()
        }
        if self.config.inputs == "self":
            leaves["key"] = leaves["value"] = leaves["query"]
        elif self.config.inputs == "memory":
            leaves["value"] = leaves["key"]
        mask = None if self.attn_mask is None else torch.tensor(self.attn_mask)
        tensors = [x for arrays in leaves.values() for x in arrays]
        tensors += [] if mask is None else [mask]
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.requires_grad_()
        outs, all_weights, total = [], [], 0
        for n in range(len(leaves["query"])):
            args = {name: arrays[n] for name, arrays in leaves.items()}
            tgt_len, src_len = len(args["query"]), len(args["key"])
            args["attn_mask"] = self.of_element(mask, n, tgt_len, src_len)
            if self.config.is_causal:
                args["attn_mask"] = torch.ones(tgt_len, src_len, dtype=bool).triu(1)
            out, weights = self.module(
                **args,
                need_weights=self.config.weights is not None,
                average_attn_weights=self.config.weights != "heads",
            )
            outs.append(out.detach().numpy())
            total = total + (out * torch.tensor(cotangents[0][n])).sum()
            if weights is not None:
                all_weights.append(weights.detach().numpy())
                total = total + (weights * torch.tensor(cotangents[1][n])).sum()
        total.backward()
        gradients = {
            name: np.concatenate([self.gradient(x) for x in arrays])
            for name, arrays in leaves.items()
            if arrays[0].is_floating_point()
        }
        if mask is not None and mask.is_floating_point():
            gradients["attn_mask"] = self.gradient(mask)
        for name, parameter in self.module.named_parameters():
            gradients[name] = self.gradient(parameter)
        return outs, all_weights, gradients

    def of_element(self, mask, n, tgt_len, src_len):
        """Returns the part of an attention mask that an element sees."""
        if mask is None:
            return None
        if mask.ndim == 3:
            heads = self.config.num_heads
            mask = mask[n * heads : (n + 1) * heads]
        return mask[..., :tgt_len, :src_len]

    @staticmethod
    def gradient(tensor):
        grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        return grad.numpy()

    def our_results(self, cotangents):
        config = self.config
        ours = MultiheadAttention(
            EMBED,
            config.num_heads,
            bias=config.bias,
            add_bias_kv=config.add_bias_kv,
            add_zero_attn=config.add_zero_attn,
            kdim=self.module.kdim,
            vdim=self.module.vdim,
            param_dtype="float64",
        )
        params = params_from_state_dict(self.module.state_dict(), config.num_heads)
        values = {
            name: x.values
            for name, x in self.ragged.items()
            if x.dtype != bool and not self.is_same_as_before(name)
        }
        masks = {} if self.attn_mask is None else {"attn_mask": self.attn_mask}
        floats = {name: m for name, m in masks.items() if m.dtype != bool}

        def loss(values, floats, params):
            args = {
                name: dataclasses.replace(x, values=values.get(name, x.values))
                for name, x in self.ragged.items()
            }
            for name in ("key", "value"):
                if self.is_same_as_before(name):
                    args[name] = args["query" if config.inputs == "self" else "key"]
            out, weights = ours.apply(
                {"params": params},
                **args,
                **(masks | floats),
                is_causal=config.is_causal,
                need_weights=config.weights is not None,
                average_attn_weights=config.weights != "heads",
            )
            # The output's slack is 0, whatever it is multiplied by.
            total = jnp.sum(out.values * cotangents[0])
            total += 0 if weights is None else jnp.sum(weights * cotangents[1])
            return total, (out, weights)

        grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        (d_values, d_floats, d_params), (out, weights) = jax.jit(
            grad, compiler_options=QUICK
        )(values, floats, params)
        d_tokens = {}
        for name, d in d_values.items():
            total = int(self.ragged[name].offsets[-1])
            assert not np.any(d[total:]), f"the slack of {name} has a gradient"
            d_tokens[name] = d[:total]
        return out, weights, d_tokens | d_floats | state_dict_from_params(d_params)

    def is_same_as_before(self, name):
        same = {"self": ("key", "value"), "memory": ("value",), "other": ()}
        return name in same[self.config.inputs]

    def cotangents(self):
        """Returns those of output and weights, for each library."""
        rng = np.random.default_rng(1)
        query, key = self.ragged["query"], self.ragged["key"]
        d_out = rng.normal(size=(query.capacity, EMBED))
        extra = self.config.add_bias_kv + self.config.add_zero_attn
        heads = [self.config.num_heads] if self.config.weights == "heads" else []
        shape = len(query), *heads, query.max_len, key.max_len + extra
        d_weights = rng.normal(size=shape)
        d_outs = np.split(d_out, query.offsets[1:])[:-1]
        lengths = zip(query.lengths, key.lengths, strict=True)
        parts = [self.of_padded(d_weights[n], *pair) for n, pair in enumerate(lengths)]
        return (d_outs, parts), (d_out, d_weights)

    def of_padded(self, weights, tgt_len, src_len):
        """Returns an element's weights, or what belongs to them, without padding."""
        kept = np.r_[:src_len, self.ragged["key"].max_len : weights.shape[-1]]
        return weights[..., :tgt_len, :][..., kept]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(
    "config",
    CONFIGS,
    ids=[f"{n}-{c.lengths}-{c.inputs}" for n, c in enumerate(CONFIGS)],
)
def test_each_element_is_what_torch_computes_for_it_alone(config):
    case = Case.draw(config)
    torchs, ours = case.cotangents()
    want_outs, want_weights, want_gradients = case.torch_results(torchs)
    out, weights, gradients = case.our_results(ours)
    query = case.ragged["query"]
    assert (out.shape, out.capacity) == (query.shape, query.capacity)
    assert not np.any(out.values[int(out.offsets[-1]) :])
    close = dict(rtol=1e-9, atol=1e-11)
    for got, want in zip(out, want_outs, strict=True):
        np.testing.assert_allclose(got, want, **close)
    if config.weights:
        rest = np.array(weights)
        for n, want in enumerate(want_weights):
            src_len = want.shape[-1] - config.add_bias_kv - config.add_zero_attn
            got = case.of_padded(weights[n], want.shape[-2], src_len)
            np.testing.assert_allclose(got, want, **close)
            extra = np.r_[:src_len, case.ragged["key"].max_len : weights.shape[-1]]
            rows = np.arange(want.shape[-2])
            rest[n][..., rows[:, None], extra] = 0
        assert not np.any(rest)
    for name, want in want_gradients.items():
        if not case.is_same_as_before(name):
            np.testing.assert_allclose(gradients[name], want, **close, err_msg=name)


def test_every_value_of_every_option_is_drawn():
    for name, values in VALUES._asdict().items():
        assert {getattr(config, name) for config in CONFIGS} == set(values), name
