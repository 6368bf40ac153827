"""Of files only those bytes are read that make the parts that are asked for."""

import io

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mha.convert import plan_tree, read_state_dict, save_safetensors
from flax_mha.convert._files import strided
from flax_mha.convert._files.source import Source

HEADS = 4


class Counting(io.BytesIO):
    count = 0

    def readinto(self, buffer):
        self.count += len(buffer)
        return super().readinto(buffer)


WIDE = np.arange(6 * 8 * 300, dtype="float32").reshape(6, 8, 300)
VIEWS = {
    "all": (lambda x: x, 1),
    "rows": (lambda x: x[2:4], 1),
    "columns": (lambda x: x[:, 2:5], 1),
    "far-columns": (lambda x: x[..., :64], 1),  # 944 bytes from one to the next
    "near-columns": (lambda x: x[..., 100:], 1.5),  # 400 bytes, and they are read too
    "turned": (lambda x: x.transpose(2, 0, 1)[100:200, 1:3], 1),
    "one": (lambda x: x[5, 7, 299:], 1),
    "heads": (lambda x: x.reshape(2, 3, 4, 2, 300)[1, :, 2:4], 1),
    "none": (lambda x: x[:, :0], 1),
    "every-other": (lambda x: x[::2, ::4], 1),
    "backwards": (lambda x: x[::-1, 0], 8),
    "no-view": (lambda x: x[0] + 1, 48),
}


@pytest.mark.parametrize("view, most", VIEWS.values(), ids=VIEWS)
def test_a_view_of_an_array_in_a_file_is_what_it_sees(view, most):
    file = Counting(b"before" + WIDE.tobytes() + b"behind")
    got = strided.read_view(file, 6, WIDE.shape, WIDE.dtype, view)
    want = view(WIDE)
    np.testing.assert_array_equal(got, want, strict=True)
    assert file.count <= most * want.nbytes


def test_a_file_that_ends_before_a_part_is_told(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"a": WIDE})
    source = Source(path)
    for view in (lambda a: a[4:], lambda a: a[..., :64]):
        with pytest.raises(ValueError, match=r"a\.safetensors' has been cut off"):
            source.array(source.size - 100, WIDE.shape, WIDE.dtype, view)


@pytest.fixture
def reads(monkeypatch):
    """The bytes of each read."""
    fill, reads = strided._fill, []

    def count(file, offset, array):
        reads.append(array.nbytes)
        fill(file, offset, array)

    monkeypatch.setattr(strided, "_fill", count)
    return reads


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


W = 256
PACKED = {"weight": (3 * W, W), "bias": (3 * W,)}
TURNED = {"weight": (W, 3 * W), "bias": (3 * W,)}
ONE = {"weight": (W, W), "bias": (W,)}
FAMILIES = {
    "torch": {
        "in_proj_weight": PACKED["weight"],
        "in_proj_bias": PACKED["bias"],
        "out_proj": ONE,
    },
    "linears": {
        "q_proj": ONE,
        "k_proj": {"weight": (W, W)},  # whose bias is absent
        "v_proj": ONE,
        "out_proj": ONE,
    },
    "gpt2": {"c_attn": TURNED, "c_proj": ONE},
    "gpt_neox": {"query_key_value": PACKED, "dense": ONE},
}


def a_model(family):
    """Returns two layers of attention, each with a Linear."""
    rng = np.random.default_rng(0)
    layer = {"attention": FAMILIES[family], "linear": {"weight": (4 * W, W)}}
    layer["linear"]["bias"] = (4 * W,)
    shapes = flatten_dict({f"layers.{n}": layer for n in range(2)}, sep=".")
    return {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}


def place_on(mesh):
    """Heads, or else the longest axis, over "tensor"."""

    def place(path, axes, spec):
        axis = axes.index("heads") if "heads" in axes else np.argmax(spec.shape)
        names = ["tensor" if n == axis else None for n in range(len(axes))]
        return NamedSharding(mesh, P(*names))

    return place


@pytest.mark.parametrize("stack", [(), ("layers",)], ids=["list", "scan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_devices_get_their_parts_and_no_byte_is_read_twice(
    tmp_path, reads, family, stack
):
    tensors = a_model(family)
    save_safetensors(tmp_path / "a.safetensors", tensors)
    state_dict = read_state_dict(tmp_path / "a.safetensors")
    kinds = {r".*attention": "attention"}
    conversion = plan_tree(state_dict, HEADS, kinds=kinds, stack=stack)
    place = place_on(jax.make_mesh((2, HEADS), ("data", "tensor")))
    params = conversion.params(state_dict, place)
    assert sum(reads) == sum(tensor.nbytes for tensor in tensors.values())
    want = conversion.params(tensors)
    jax.tree.map(np.testing.assert_array_equal, params, want)

    for entry in conversion.entries:  # and of one device's part, no other byte
        sharding = place(entry.path, entry.axes, entry)
        at = sharding.addressable_devices_indices_map(entry.shape)[jax.devices()[1]]
        reads.clear()
        part = entry.param(state_dict, at)
        assert sum(reads) <= part.nbytes
        assert part.size * HEADS == np.prod(entry.shape)


def test_what_is_computed_of_others_is_read_as_a_whole(tmp_path, reads):
    tensors = {"l.weight_g": numbers(8, 1), "l.weight_v": numbers(8, 64)}
    save_safetensors(tmp_path / "a.safetensors", tensors)
    state_dict = read_state_dict(tmp_path / "a.safetensors")
    conversion = plan_tree(state_dict, kinds={"l": "kernel"})
    place = place_on(jax.make_mesh((2, HEADS), ("data", "tensor")))
    params = conversion.params(state_dict, place)
    assert sum(reads) == 4 * (8 + 8 * 64)  # once, not for each device
    np.testing.assert_array_equal(params["l"]["kernel"], state_dict["l.weight"].T)
