"""PyTorch's nn.Transformer and its parts in nnx; see `transformer.py`, which is linen.

Differences from PyTorch are those named there, but for dropout, which is nnx's:
`model.train()` and `model.eval()` turn it on and off, and it draws from `rngs`.
`flax_mha.convert.update_nnx` puts in what is converted from PyTorch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_mha.nnx import MultiheadAttention

ACTIVATIONS = {
    "relu": nnx.relu,
    "gelu": lambda x: nnx.gelu(x, approximate=False),  # as torch; Flax approximates
}


class Layer(nnx.Module):
    """What an encoder layer and a decoder layer share."""

    attentions = ("self_attn",)

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[jax.Array], jax.Array] = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        *,
        rngs: nnx.Rngs,
    ):
        dtypes = dict(dtype=dtype, param_dtype=param_dtype)
        for name in self.attentions:
            attention = MultiheadAttention(
                *(d_model, nhead, dropout, bias),
                batch_first=batch_first,
                **dtypes,
                rngs=rngs,
            )
            setattr(self, name, attention)
        linear = dict(
            use_bias=bias,
            kernel_init=nnx.initializers.xavier_uniform(),
            **dtypes,
            rngs=rngs,
        )
        self.linear1 = nnx.Linear(d_model, dim_feedforward, **linear)
        self.linear2 = nnx.Linear(dim_feedforward, d_model, **linear)
        for n in range(len(self.attentions) + 1):
            norm = layer_norm(d_model, layer_norm_eps, bias, **dtypes, rngs=rngs)
            setattr(self, f"norm{n + 1}", norm)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.activation = ACTIVATIONS.get(activation, activation)
        self.norm_first = norm_first

    def attend(self, attention, x, source, attn_mask, padding, is_causal):
        return attention(
            x,
            source,
            source,
            key_padding_mask=padding,
            need_weights=False,
            attn_mask=attn_mask,
            is_causal=is_causal,
        )[0]

    def feed_forward(self, x):
        return self.linear2(self.drop(self.activation(self.linear1(x))))

    def residual(self, norm, x, sublayer):
        """Adds to `x` what `sublayer` makes of it; the norm is before or after."""
        if self.norm_first:
            return x + self.drop(sublayer(norm(x)))
        return norm(x + self.drop(sublayer(x)))


class TransformerEncoderLayer(Layer):
    """`torch.nn.TransformerEncoderLayer`: self-attention, then a feed-forward net."""

    def __call__(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        def attend(x):
            masks = src_mask, src_key_padding_mask, is_causal
            return self.attend(self.self_attn, x, x, *masks)

        x = self.residual(self.norm1, src, attend)
        return self.residual(self.norm2, x, self.feed_forward)


class TransformerDecoderLayer(Layer):
    """`torch.nn.TransformerDecoderLayer`: attends to itself, then to `memory`."""

    attentions = ("self_attn", "multihead_attn")

    def __call__(
        self,
        tgt,
        memory,
        tgt_mask=None,
        memory_mask=None,
        tgt_key_padding_mask=None,
        memory_key_padding_mask=None,
        tgt_is_causal=False,
        memory_is_causal=False,
    ):
        def attend(x):
            masks = tgt_mask, tgt_key_padding_mask, tgt_is_causal
            return self.attend(self.self_attn, x, x, *masks)

        def attend_to_memory(x):
            masks = memory_mask, memory_key_padding_mask, memory_is_causal
            return self.attend(self.multihead_attn, x, memory, *masks)

        x = self.residual(self.norm1, tgt, attend)
        x = self.residual(self.norm2, x, attend_to_memory)
        return self.residual(self.norm3, x, self.feed_forward)


class TransformerEncoder(nnx.Module):
    """`torch.nn.TransformerEncoder`: layers, which `make_layer` makes, and a norm."""

    def __init__(self, make_layer, num_layers, norm=None):
        self.layers = nnx.List([make_layer() for _ in range(num_layers)])
        self.norm = nnx.data(norm)

    def __call__(self, src, mask=None, src_key_padding_mask=None, is_causal=False):
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, is_causal)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(nnx.Module):
    """`torch.nn.TransformerDecoder`: layers, which `make_layer` makes, and a norm."""

    def __init__(self, make_layer, num_layers, norm=None):
        self.layers = nnx.List([make_layer() for _ in range(num_layers)])
        self.norm = nnx.data(norm)

    def __call__(self, tgt, memory, *masks, **named_masks):
        """Takes the masks of `TransformerDecoderLayer`."""
        for layer in self.layers:
            tgt = layer(tgt, memory, *masks, **named_masks)
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(nnx.Module):
    """`torch.nn.Transformer`, but for `custom_encoder` and `custom_decoder`.

    `options` are those of `Layer`, and the same for all layers.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        *args,
        rngs: nnx.Rngs,
        **options,
    ):
        def encoder_layer():
            return TransformerEncoderLayer(d_model, nhead, *args, **options, rngs=rngs)

        def decoder_layer():
            return TransformerDecoderLayer(d_model, nhead, *args, **options, rngs=rngs)

        def norm():
            wanted = ("bias", "dtype", "param_dtype")
            own = {name: options[name] for name in wanted if name in options}
            eps = options.get("layer_norm_eps", 1e-5)
            return layer_norm(d_model, eps, own.pop("bias", True), **own, rngs=rngs)

        self.encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm())
        self.decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm())

    def __call__(
        self,
        src,
        tgt,
        src_mask=None,
        tgt_mask=None,
        memory_mask=None,
        src_key_padding_mask=None,
        tgt_key_padding_mask=None,
        memory_key_padding_mask=None,
        src_is_causal=False,
        tgt_is_causal=False,
        memory_is_causal=False,
    ):
        memory = self.encoder(src, src_mask, src_key_padding_mask, src_is_causal)
        return self.decoder(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )


def layer_norm(features, epsilon, bias, **options):
    """PyTorch's LayerNorm."""
    return nnx.LayerNorm(
        features,
        epsilon=epsilon,
        use_bias=bias,
        use_fast_variance=False,  # E[x**2] - E[x]**2 cancels in float32
        **options,
    )
