"""Writes docs/pictures/: `python -m docs.draw`, at the root of a clone."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # for the mesh

from docs.draw import attention, mesh, ragged_blocks, scaling
from docs.draw.svg import PICTURES

if __name__ == "__main__":
    for module in (attention, mesh, ragged_blocks, scaling):
        name = module.__name__.rpartition(".")[2]
        (PICTURES / f"{name}.svg").write_text(module.drawing())
