"""Parts of tensors, and folders of torch.distributed.checkpoint."""

import os
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as meta
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

from flax_mha.convert import read_state_dict
from tests.convert.test_files import assert_raises
from tests.parity.convert.test_files import assert_same_bits, ones, saved, transformer
from tests.parity.convert.test_pickles import Small


def save_distributed(state_dict, folder):
    dcp.save(state_dict, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")  # that there are no processes
def test_distributed_checkpoint_is_read(tmp_path):
    model, want = transformer(), transformer().state_dict()
    optimizer = torch.optim.AdamW(model.parameters())
    want["scalar"], want["half"] = torch.tensor(3.0), torch.ones(2).half()
    content = {"model": want, "optimizer": optimizer.state_dict(), "epoch": 3}
    save_distributed(content, tmp_path / "nested")
    save_distributed(want, tmp_path / "flat")
    for name, notes in (
        ("nested", ("Taken from 'model', not optimizer, epoch.",)),
        ("flat", ()),
    ):
        state_dict = read_state_dict(tmp_path / name)
        assert_same_bits(state_dict, want)
        assert state_dict.notes == notes


def parts(folder, **changes):
    """Writes a (4, 3) tensor in two parts, as two processes would."""
    whole = torch.arange(12.0).reshape(4, 3)
    chunks, storage = [], {}
    for rank, start in enumerate((0, 2)):
        content = saved(whole[start : start + 2].clone())
        (folder / f"__{rank}_0.distcp").write_bytes(bytes(100) + content)
        offsets = torch.Size([start, 0])
        chunks.append(meta.ChunkStorageMetadata(offsets, torch.Size([2, 3])))
        place = dict(relative_path=f"__{rank}_0.distcp", offset=100)
        place |= dict(length=len(content)) | (changes if rank else {})
        storage[meta.MetadataIndex("a", offsets)] = _StorageInfo(**place)
    properties = meta.TensorProperties(dtype=torch.float32)
    tensors = {"a": meta.TensorStorageMetadata(properties, whole.shape, chunks)}
    content = pickle.dumps(meta.Metadata(tensors, storage_data=storage))
    (folder / ".metadata").write_bytes(content)
    return {"a": whole}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_parts_of_a_distributed_tensor_are_joined(tmp_path):
    want = parts(tmp_path)
    assert_same_bits(read_state_dict(tmp_path), want)
    theirs = {"a": torch.zeros(4, 3)}
    dcp.load(theirs, checkpoint_id=tmp_path, no_dist=True)
    assert theirs["a"].equal(want["a"])


WRONG_PARTS_OF_TENSORS = {
    "outside": (
        dict(relative_path="../__1_0.distcp"),
        ValueError,
        "must name files of its own folder, got '../__1_0.distcp'",
    ),
    "missing": (
        dict(relative_path="__7_0.distcp"),
        FileNotFoundError,
        "names __7_0.distcp, which is missing",
    ),
    "compressed": (
        dict(transform_descriptors=["zstd"]),
        ValueError,
        "a must be stored as it is, got ['zstd']",
    ),
}


@pytest.mark.parametrize(
    "changes, error, text",
    WRONG_PARTS_OF_TENSORS.values(),
    ids=WRONG_PARTS_OF_TENSORS,
)
def test_wrong_part_of_a_distributed_tensor_is_refused(tmp_path, changes, error, text):
    parts(tmp_path, **changes)
    assert_raises(error, text, lambda: read_state_dict(tmp_path))


@pytest.mark.parametrize(
    "content, text",
    [
        (saved(torch.ones(2, 2)), "must hold float32[2, 3] of a, got float32[2, 2]"),
        (saved(torch.ones(2, 3).half()), "of a, got float16[2, 3]"),
        (saved(torch.ones(2, 3))[:50], "is cut off, or no whole zip file"),
    ],
    ids=["shape", "dtype", "cut"],
)
def test_broken_part_of_a_distributed_tensor_is_refused(tmp_path, content, text):
    parts(tmp_path, offset=0, length=len(content))
    (tmp_path / "__1_0.distcp").write_bytes(content)
    state_dict = read_state_dict(tmp_path)
    assert_raises(ValueError, text, lambda: state_dict["a"])


def test_distributed_metadata_that_would_run_code_does_not(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    want = parts(tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.planner_data = Evil()
    content = pickle.dumps(metadata)
    (tmp_path / ".metadata").write_bytes(content)
    assert_same_bits(read_state_dict(tmp_path), want)
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)  # what PyTorch does
    assert (tmp_path / "ran").exists()


BROKEN_METADATA = {
    "empty": (b"", ".metadata' is cut off"),
    "text": (b"<html>", ".metadata' is cut off"),
    "cut": (pickle.dumps(meta.Metadata({}))[:-5], ".metadata' is a broken pickle"),
    "a number": (pickle.dumps(3), "is broken"),
    "other fields": (pickle.dumps(meta.Metadata(3)), "is broken"),
    "part not stored": (
        pickle.dumps(
            meta.Metadata(
                {
                    "a": meta.TensorStorageMetadata(
                        meta.TensorProperties(),
                        torch.Size([2]),
                        [meta.ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))],
                    )
                },
                storage_data={},
            )
        ),
        "is broken",
    ),
    "no parts": (
        pickle.dumps(
            meta.Metadata(
                {
                    "a": meta.TensorStorageMetadata(
                        meta.TensorProperties(), torch.Size([2]), []
                    )
                },
                storage_data={},
            )
        ),
        "must name all parts of a, and each once",
    ),
    "name within a tensor": (
        pickle.dumps(
            meta.Metadata(
                dict.fromkeys("ab", meta.BytesStorageMetadata()),
                planner_data={"b": ("a", "b")},
            )
        ),
        "is broken",
    ),
}


@pytest.mark.parametrize("content, text", BROKEN_METADATA.values(), ids=BROKEN_METADATA)
def test_broken_distributed_metadata_is_refused(tmp_path, content, text):
    (tmp_path / ".metadata").write_bytes(content)
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path))


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
def test_a_tensor_of_one_process_is_whole(tmp_path, mesh, placement):
    want = ones("a")
    parts = {"a": DTensor.from_local(want["a"], mesh, [placement])}
    torch.save(parts, tmp_path / "a.pt")
    assert_same_bits(read_state_dict(tmp_path / "a.pt"), want)


def test_a_part_of_a_tensor_is_refused(tmp_path, mesh):
    part = DTensor.from_local(
        torch.ones(2, 3), mesh, [Shard(0)], shape=torch.Size([4, 3]), stride=(3, 1)
    )
    torch.save({"a": part}, tmp_path / "a.pt")
    assert_raises(
        ValueError,
        "a is one process's part, [2, 3], of a DTensor of [4, 3]: save what "
        "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))",
        lambda: read_state_dict(tmp_path / "a.pt"),
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("consolidated", [True, False])
def test_huggingface_writer(tmp_path, mesh, consolidated):
    want = ones("a", "b")
    parts = {n: DTensor.from_local(v, mesh, [Shard(0)]) for n, v in want.items()}
    writer = dcp.HuggingFaceStorageWriter(
        str(tmp_path), save_distributed=True, enable_consolidation=consolidated
    )
    dcp.save(parts, storage_writer=writer)
    if consolidated:
        assert_same_bits(dict(sorted(read_state_dict(tmp_path).items())), want)
        return
    (path,) = tmp_path.iterdir()
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed" / "a.safetensors").hardlink_to(path)
    for shard in (tmp_path, path, tmp_path / "renamed"):
        assert_raises(
            ValueError,
            "was written by one of several processes of torch.distributed.checkpoint, "
            "and does not say of how many: join all with PyTorch's "
            "consolidate_safetensors_files",
            lambda shard=shard: read_state_dict(shard),
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_huggingface_writer_of_one_process(tmp_path):
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=False)
    dcp.save(ones("a", "b"), storage_writer=writer, no_dist=True)
    assert_same_bits(dict(sorted(read_state_dict(tmp_path).items())), ones("a", "b"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_weights_in_a_distributed_checkpoint(tmp_path):
    """A tuple is stored there as bytes."""
    model = torch.ao.quantization.quantize_dynamic(Small(), {torch.nn.Linear})
    dcp.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state_dict = read_state_dict(tmp_path)
    np.testing.assert_array_equal(
        state_dict["fc.weight"], model.fc.weight().dequantize()
    )
