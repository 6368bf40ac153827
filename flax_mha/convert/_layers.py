"""What `find_layers` and `find_look_alikes` return."""

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """One `torch.nn.MultiheadAttention`, or what computes the same, in a state_dict.

    Attributes:
        prefix: Its name in the model, "encoder.layers.0.self_attn" say; "" if the
            state_dict is the layer's own.
        family: How it is stored: "torch" (`in_proj_weight` or `q_proj_weight` ...),
            "linears" (`q_proj.weight`, ..., `out_proj.weight`, as fairseq, ESM and
            Hugging Face have them), "timm" (`qkv` and `proj`), "bert", "gpt2", ...
        embed_dim: Features of query.
        kdim: Features of key.
        vdim: Features of value.
        output_dim: Features of the output; `embed_dim` but in CLIP's AttentionPool2d.
        bias: Whether it has biases.
        add_bias_kv: Whether it has `bias_k` and `bias_v`.
        dtype: Of its weights.
        keys: For each parameter of `MultiheadAttention`, by its dotted name, the names
            in the state_dict of the tensors whose rows it has, one below the other.
        absent: Of `keys`, those of biases that the state_dict lacks while others are
            there (Whisper's `k_proj`, timm's `qkv_bias=False`): they are zero.
        buffers: Names of its tensors without which it computes the same.
        unseen: What such layers mostly compute besides, though no tensor of theirs
            shows it, such as rotary positions; "" if nothing is known.
    """

    prefix: str
    family: str
    embed_dim: int
    kdim: int
    vdim: int
    output_dim: int
    bias: bool
    add_bias_kv: bool
    dtype: np.dtype
    keys: Mapping[str, tuple[str, ...]]
    absent: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    unseen: str = ""

    @property
    def present(self) -> tuple[str, ...]:
        """Its names in the state_dict, but for `buffers`."""
        names = [name for names in self.keys.values() for name in names]
        return tuple(name for name in names if name not in self.absent)


@dataclasses.dataclass(frozen=True)
class LookAlike:
    """What has some of the names of an attention layer, but is not one.

    Attributes:
        prefix: Its name in the model.
        keys: Its names in the state_dict.
        reason: What is not as in a `torch.nn.MultiheadAttention`, in one line.
    """

    prefix: str
    keys: tuple[str, ...]
    reason: str
