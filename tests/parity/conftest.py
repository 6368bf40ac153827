"""Everything in this folder runs PyTorch beside the package."""

import os

import pytest
import torch

# Hugging Face's libraries read this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# The machine's cores are for the test processes, one each.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded_torch():
    torch.manual_seed(0)
