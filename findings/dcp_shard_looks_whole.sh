#!/usr/bin/env bash
# torch.distributed.checkpoint.HuggingFaceStorageWriter(save_distributed=True) lets each
# process write its part as safetensors. Hugging Face's names say, by "-00001-of-00002",
# which part a file is, of how many, and an index lists all.
# A good guess: so do these, and a lost part is noticed.
# It is wrong: with two processes both files are named "-of-00001", there is no index, and
# nothing in a header has the number of processes or the size of a whole tensor. A part has
# the model's own names with smaller shapes: safetensors reads it as a smaller model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
cd "$folder"

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import json
import os
import pathlib
import struct

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.tensor import Shard, distribute_tensor

PROCESSES, FOLDER = 2, pathlib.Path("saved")


def write(rank):
    dist.init_process_group(
        "gloo", init_method="file://" + os.path.abspath("store"),
        rank=rank, world_size=PROCESSES,
    )
    mesh = dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    linear = torch.nn.Linear(8, 32)
    state_dict = {
        name: distribute_tensor(tensor.detach(), mesh, [Shard(0)])
        for name, tensor in linear.named_parameters()
    }
    writer = dcp.HuggingFaceStorageWriter(path=str(FOLDER), save_distributed=True)
    dcp.save(state_dict, storage_writer=writer)
    dist.destroy_process_group()


FOLDER.mkdir()
children = []
for rank in range(PROCESSES):
    child = os.fork()
    if not child:
        write(rank)
        os._exit(0)
    children.append(child)
assert not any(os.waitpid(child, 0)[1] for child in children)

print("torch", torch.__version__)
files = sorted(path.name for path in FOLDER.iterdir())
print(PROCESSES, "processes wrote", *files, sep="\n  ")
assert files == [f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2)]
for name in files:
    path = FOLDER / name
    shapes = {key: tuple(value.shape) for key, value in load_file(path).items()}
    print(name, "holds", shapes)
    assert shapes == {"weight": (16, 8), "bias": (16,)}
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    print("  says of itself", header["__metadata__"])
    said = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    assert all(list(one) == ["saved_offsets"] for one in said.values())
print("whole are (32, 8) and (32,)")
torch.nn.Linear(8, 16).load_state_dict(load_file(FOLDER / files[0]))  # strict
print("a Linear(8, 16) takes the first file, strictly")
PYTHON
