"""PyTorch checkpoints to Flax parameters and back.

A conversion only reshapes: parameters are views of the checkpoint's
bytes, and the way back is exact, bit for bit, in every dtype. PyTorch itself is needed
only to read its pickle files, and for `from_torch`.
"""

from flax_mha.convert._layer import from_torch as from_torch
from flax_mha.convert._layer import params_from_state_dict as params_from_state_dict
from flax_mha.convert._layer import state_dict_from_params as state_dict_from_params
from flax_mha.convert._read import Checkpoint as Checkpoint
from flax_mha.convert._read import read_state_dict as read_state_dict
from flax_mha.convert._write import load_params as load_params
from flax_mha.convert._write import save_params as save_params
from flax_mha.convert._write import save_safetensors as save_safetensors

__all__ = [
    "Checkpoint",
    "from_torch",
    "load_params",
    "params_from_state_dict",
    "read_state_dict",
    "save_params",
    "save_safetensors",
    "state_dict_from_params",
]
