"""What is measured: named cases, and their inputs."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of self-attention; its name says all that is not the default."""

    batch: int
    length: int
    embed: int
    heads: int
    attention_only: bool = False  # query, key and value are given, split into heads
    backward: bool = False  # also the gradient of every parameter and input
    weights: str = "no_weights"  # or weights_used, or weights_dropped: asked for only
    is_causal: bool = False
    padding: bool = False  # the second half of the keys is ignored
    dropout: float = 0.0
    dtype: str = "float32"

    @property
    def name(self) -> str:
        parts = [
            "x".join(map(str, (self.batch, self.length, self.embed, self.heads))),
            self.attention_only and "attention",
            "forward_backward" if self.backward else "forward",
            not self.attention_only and self.weights,
            self.is_causal and "causal",
            self.padding and "padding",
            self.dropout and f"dropout{self.dropout}",
            self.dtype != "float32" and self.dtype,
        ]
        return "-".join(filter(None, parts))

    def arrays(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Returns inputs and the output's cotangent, in PyTorch's axis order."""
        shape = (self.batch, self.length, self.embed)
        if self.attention_only:
            head_dim = self.embed // self.heads
            shape = (self.batch, self.heads, self.length, head_dim)
        rng = np.random.default_rng(0)
        count = 3 if self.attention_only else 1
        *inputs, cotangent = rng.normal(size=(count + 1, *shape)).astype(np.float32)
        return inputs, cotangent

    def key_padding_mask(self) -> np.ndarray | None:
        """Returns PyTorch's: (batch, length), True is ignored."""
        if not self.padding:
            return None
        ignored = np.arange(self.length) >= self.length // 2
        return np.tile(ignored, (self.batch, 1))

    def allowed(self) -> np.ndarray | None:
        """Returns Flax's mask: broadcasts to the logits, True may attend."""
        if self.padding:
            return ~self.key_padding_mask()[:, None, None, :]
        if self.is_causal:
            return np.tri(self.length, dtype=bool)[None, None]
        return None


_LONG = [(1, 2048, 768, 12), (8, 512, 512, 8), (1, 4096, 768, 12)]
_SHORT = [(32, 128, 512, 8), (32, 64, 256, 4)]
_ATTENTION = [(1, 2048, 768, 12), (1, 4096, 768, 12)]

_CASES = [
    *[
        Case(*size, weights=weights)
        for size in _LONG
        for weights in ("no_weights", "weights_used", "weights_dropped")
    ],
    *[Case(*size, backward=True) for size in _LONG],
    *[Case(*size, backward=backward) for size in _SHORT for backward in (False, True)],
    Case(8, 512, 512, 8, is_causal=True),
    Case(1, 4096, 768, 12, is_causal=True),
    Case(8, 512, 512, 8, padding=True),
    Case(8, 512, 512, 8, dropout=0.1, backward=True),
    Case(8, 512, 512, 8, dtype="bfloat16"),
    *[
        Case(*size, attention_only=True, backward=backward, is_causal=is_causal)
        for size in _ATTENTION
        for is_causal in (False, True)
        for backward in (False, True)
    ],
]
CASES = {case.name: case for case in _CASES}
