"""`torch.nn.MultiheadAttention` for Flax."""

from typing import TYPE_CHECKING

from flax_mha._lazy import lazy

if TYPE_CHECKING:
    from flax_mha import convert as convert
    from flax_mha import functional as functional
    from flax_mha import linen as linen
    from flax_mha import nnx as nnx
    from flax_mha import sharding as sharding
    from flax_mha import training as training
    from flax_mha._cache import KeyValueCache as KeyValueCache
    from flax_mha._explain import Explanation as Explanation
    from flax_mha._explain import explain as explain
    from flax_mha._ragged.array import RaggedArray as RaggedArray
    from flax_mha.linen import MultiheadAttention as MultiheadAttention

__version__ = "0.1.0"
__getattr__, __dir__ = lazy(
    __name__,
    {
        "convert": (),
        "functional": (),
        "linen": ("MultiheadAttention",),
        "nnx": (),
        "sharding": (),
        "training": (),
        "_cache": ("KeyValueCache",),
        "_explain": ("Explanation", "explain"),
        "_ragged.array": ("RaggedArray",),
    },
)
