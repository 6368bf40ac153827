"""PyTorch checkpoints to Flax parameters and back.

A conversion only rearranges: attention layers are views of the checkpoint's
bytes, and the way back is exact, bit for bit, in every dtype. PyTorch itself is needed
only for its own modules and tensors, as in `from_torch`; not to read its files.
"""

from typing import TYPE_CHECKING

from flax_mha._lazy import lazy

if TYPE_CHECKING:
    from flax_mha.convert._conversion import Conversion as Conversion
    from flax_mha.convert._conversion import ConvertedLayer as ConvertedLayer
    from flax_mha.convert._entries import Entry as Entry
    from flax_mha.convert._files.read import Checkpoint as Checkpoint
    from flax_mha.convert._files.read import read_state_dict as read_state_dict
    from flax_mha.convert._files.write import load_params as load_params
    from flax_mha.convert._files.write import save_params as save_params
    from flax_mha.convert._files.write import save_safetensors as save_safetensors
    from flax_mha.convert._find import AttentionLayer as AttentionLayer
    from flax_mha.convert._find import LookAlike as LookAlike
    from flax_mha.convert._find import find_layers as find_layers
    from flax_mha.convert._find import find_look_alikes as find_look_alikes
    from flax_mha.convert._layer import from_torch as from_torch
    from flax_mha.convert._layer import params_from_state_dict as params_from_state_dict
    from flax_mha.convert._layer import state_dict_from_params as state_dict_from_params
    from flax_mha.convert._nested import nested_from_ragged as nested_from_ragged
    from flax_mha.convert._nested import ragged_from_nested as ragged_from_nested
    from flax_mha.convert._nnx import nnx_params as nnx_params
    from flax_mha.convert._nnx import update_nnx as update_nnx
    from flax_mha.convert._stock import from_stock as from_stock
    from flax_mha.convert._stock import to_stock as to_stock
    from flax_mha.convert._tree import convert_tree as convert_tree
    from flax_mha.convert._tree import plan_tree as plan_tree
    from flax_mha.convert._verify import LayerReport as LayerReport
    from flax_mha.convert._verify import verify as verify

__all__ = [
    "AttentionLayer",
    "Checkpoint",
    "Conversion",
    "ConvertedLayer",
    "Entry",
    "LayerReport",
    "LookAlike",
    "convert_tree",
    "find_layers",
    "find_look_alikes",
    "from_stock",
    "from_torch",
    "load_params",
    "nested_from_ragged",
    "nnx_params",
    "params_from_state_dict",
    "plan_tree",
    "ragged_from_nested",
    "read_state_dict",
    "save_params",
    "save_safetensors",
    "state_dict_from_params",
    "to_stock",
    "update_nnx",
    "verify",
]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "_conversion": ("Conversion", "ConvertedLayer"),
        "_entries": ("Entry",),
        "_files.read": ("Checkpoint", "read_state_dict"),
        "_files.write": ("load_params", "save_params", "save_safetensors"),
        "_find": ("AttentionLayer", "LookAlike", "find_layers", "find_look_alikes"),
        "_layer": ("from_torch", "params_from_state_dict", "state_dict_from_params"),
        "_nested": ("nested_from_ragged", "ragged_from_nested"),
        "_nnx": ("nnx_params", "update_nnx"),
        "_stock": ("from_stock", "to_stock"),
        "_tree": ("convert_tree", "plan_tree"),
        "_verify": ("LayerReport", "verify"),
    },
)
