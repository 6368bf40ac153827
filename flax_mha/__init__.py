"""`torch.nn.MultiheadAttention` for Flax."""

from typing import TYPE_CHECKING

from flax_mha._lazy import lazy

if TYPE_CHECKING:
    from flax_mha import convert as convert
    from flax_mha import functional as functional
    from flax_mha._explain import Explanation as Explanation
    from flax_mha._explain import explain as explain
    from flax_mha._module import MultiheadAttention as MultiheadAttention
    from flax_mha._ragged import RaggedArray as RaggedArray

__version__ = "0.1.0"
__getattr__, __dir__ = lazy(
    __name__,
    {
        "convert": (),
        "functional": (),
        "_explain": ("Explanation", "explain"),
        "_module": ("MultiheadAttention",),
        "_ragged": ("RaggedArray",),
    },
)
