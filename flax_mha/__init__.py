"""`torch.nn.MultiheadAttention` for Flax."""

from flax_mha import convert as convert
from flax_mha import functional as functional
from flax_mha._cache import KeyValueCache as KeyValueCache
from flax_mha._explain import Explanation as Explanation
from flax_mha._explain import explain as explain
from flax_mha._ragged.array import RaggedArray as RaggedArray
from flax_mha.linen import MultiheadAttention as MultiheadAttention

__version__ = "0.1.0"
