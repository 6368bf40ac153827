"""PyTorch's nn.Transformer and its parts in Flax, built on MultiheadAttention.

Arguments, masks, the order of sublayers and the names of parameters are PyTorch's, but
that layers are `layers_0`, `layers_1`, ..., as Flax names them: what
`flax_mha.convert.convert_tree` makes of PyTorch's state_dict fits as it is. New:

- `deterministic` in each call turns dropout off, as `eval()` does in PyTorch. Dropout
  draws from the "dropout" rng.
- `is_causal=True` without a mask applies the causal mask, which PyTorch refuses. With a
  mask it is a hint, as there. PyTorch also looks for itself whether a mask is causal,
  to be faster: that changes no number.
- `dtype` is Flax's, of the computation; `param_dtype` is PyTorch's `dtype`.
- `decode=True` makes decoders keep keys and values, as `MultiheadAttention` does: give
  them `tgt` in pieces, with `tgt_is_causal=True`, and `memory` only with the first.
- Fresh Dense kernels are Xavier uniform, as nn.Transformer makes them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_mha import MultiheadAttention

ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),  # as torch; Flax approximates
}


class Layer(nn.Module):
    """What an encoder layer and a decoder layer share."""

    d_model: int
    nhead: int
    dim_feedforward: int = 2048
    dropout: float = 0.1
    activation: str | Callable[[jax.Array], jax.Array] = "relu"
    layer_norm_eps: float = 1e-5
    batch_first: bool = False
    norm_first: bool = False
    bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    decode: bool = False

    def attention(self, name, x, source, attn_mask, padding, is_causal, deterministic):
        attend = MultiheadAttention(
            self.d_model,
            self.nhead,
            dropout=self.dropout,
            bias=self.bias,
            batch_first=self.batch_first,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            decode=self.decode,
            name=name,
        )
        return attend(
            x,
            source,
            source,
            key_padding_mask=padding,
            need_weights=False,
            attn_mask=attn_mask,
            is_causal=is_causal,
            deterministic=deterministic,
        )[0]

    def feed_forward(self, x, deterministic):
        def linear(features, name):
            return nn.Dense(
                features,
                use_bias=self.bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                name=name,
            )

        activation = ACTIVATIONS.get(self.activation, self.activation)
        x = activation(linear(self.dim_feedforward, "linear1")(x))
        x = nn.Dropout(self.dropout)(x, deterministic)
        return linear(self.d_model, "linear2")(x)

    def residual(self, norm, x, sublayer, deterministic):
        """Adds to `x` what `sublayer` makes of it; the norm is before or after."""
        norm = layer_norm(self, name=norm)
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        if self.norm_first:
            return x + drop(sublayer(norm(x)))
        return norm(x + drop(sublayer(x)))


FIELDS = {field.name for field in dataclasses.fields(Layer)} - {"parent", "name"}


class TransformerEncoderLayer(Layer):
    """`torch.nn.TransformerEncoderLayer`: self-attention, then a feed-forward net."""

    @nn.compact
    def __call__(
        self,
        src,
        src_mask=None,
        src_key_padding_mask=None,
        is_causal=False,
        *,
        deterministic,
    ):
        def attend(x):
            masks = src_mask, src_key_padding_mask, is_causal
            return self.attention("self_attn", x, x, *masks, deterministic)

        def feed_forward(x):
            return self.feed_forward(x, deterministic)

        x = self.residual("norm1", src, attend, deterministic)
        return self.residual("norm2", x, feed_forward, deterministic)


class TransformerDecoderLayer(Layer):
    """`torch.nn.TransformerDecoderLayer`: attends to itself, then to `memory`."""

    @nn.compact
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
        *,
        deterministic,
    ):
        def attend(x):
            masks = tgt_mask, tgt_key_padding_mask, tgt_is_causal
            return self.attention("self_attn", x, x, *masks, deterministic)

        def attend_to_memory(x):
            masks = memory_mask, memory_key_padding_mask, memory_is_causal
            return self.attention("multihead_attn", x, memory, *masks, deterministic)

        def feed_forward(x):
            return self.feed_forward(x, deterministic)

        x = self.residual("norm1", tgt, attend, deterministic)
        x = self.residual("norm2", x, attend_to_memory, deterministic)
        return self.residual("norm3", x, feed_forward, deterministic)


class TransformerEncoder(nn.Module):
    """`torch.nn.TransformerEncoder`: `num_layers` copies of a layer, and a norm."""

    encoder_layer: TransformerEncoderLayer
    num_layers: int
    norm: nn.Module | None = None

    @nn.compact
    def __call__(
        self,
        src,
        mask=None,
        src_key_padding_mask=None,
        is_causal=False,
        *,
        deterministic,
    ):
        for n in range(self.num_layers):
            layer = self.encoder_layer.copy(name=f"layers_{n}")
            masks = mask, src_key_padding_mask, is_causal
            src = layer(src, *masks, deterministic=deterministic)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(nn.Module):
    """`torch.nn.TransformerDecoder`: `num_layers` copies of a layer, and a norm."""

    decoder_layer: TransformerDecoderLayer
    num_layers: int
    norm: nn.Module | None = None

    @nn.compact
    def __call__(self, tgt, memory, *masks, deterministic, **named_masks):
        """Takes the masks of `TransformerDecoderLayer`."""
        for n in range(self.num_layers):
            layer = self.decoder_layer.copy(name=f"layers_{n}")
            tgt = layer(tgt, memory, *masks, deterministic=deterministic, **named_masks)
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(nn.Module):
    """`torch.nn.Transformer`, but for `custom_encoder` and `custom_decoder`."""

    d_model: int = 512
    nhead: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dim_feedforward: int = 2048
    dropout: float = 0.1
    activation: str | Callable[[jax.Array], jax.Array] = "relu"
    layer_norm_eps: float = 1e-5
    batch_first: bool = False
    norm_first: bool = False
    bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    decode: bool = False

    def setup(self):
        # Without a parent until the encoder and the decoder adopt them.
        options = {name: getattr(self, name) for name in FIELDS - {"decode"}}
        encoder_layer = TransformerEncoderLayer(**options, parent=None)
        decoder_layer = TransformerDecoderLayer(
            **options, decode=self.decode, parent=None
        )
        norms = [layer_norm(self, parent=None) for _ in range(2)]
        self.encoder = TransformerEncoder(
            encoder_layer, self.num_encoder_layers, norms[0]
        )
        self.decoder = TransformerDecoder(
            decoder_layer, self.num_decoder_layers, norms[1]
        )

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
        *,
        deterministic,
    ):
        memory = self.encoder(
            src,
            src_mask,
            src_key_padding_mask,
            src_is_causal,
            deterministic=deterministic,
        )
        return self.decoder(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
            deterministic=deterministic,
        )


def layer_norm(like, **options):
    """PyTorch's LayerNorm; `like` is a module that has its arguments."""
    return nn.LayerNorm(
        epsilon=like.layer_norm_eps,
        use_bias=like.bias,
        dtype=like.dtype,
        param_dtype=like.param_dtype,
        use_fast_variance=False,  # E[x**2] - E[x]**2 cancels in float32
        **options,
    )
