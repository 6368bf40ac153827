"""Whole models: what becomes of every tensor."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from flax_mha import MultiheadAttention, convert
from flax_mha.convert import Conversion, convert_tree, params_from_state_dict, plan_tree
from tests.parity._live import TOLERANCE, normal
from tests.parity.convert.test_find import LINEAR, Linears, arrays_of, assert_same_bits


@pytest.fixture
def standard_promotion():
    """Flax's layers start in float32, and are given float64."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def conv(*size, features=4, **options):
    return nn.Conv(features, size, padding="VALID", **options)


NEIGHBOURS = {
    "linear": (
        lambda: torch.nn.Linear(4, 4),
        nn.Dense(4),
        normal(2, 4),
        {},
    ),
    "linear_no_bias": (
        lambda: torch.nn.Linear(4, 4, bias=False),
        nn.Dense(4, use_bias=False),
        normal(2, 4),
        {"layer": "kernel"},
    ),
    "embedding": (
        lambda: torch.nn.Embedding(4, 4),
        nn.Embed(4, 4),
        np.arange(4),
        {"layer": "embedding"},
    ),
    "layer_norm": (
        lambda: torch.nn.LayerNorm(4),
        nn.LayerNorm(epsilon=1e-5, use_fast_variance=False),
        normal(2, 4),
        {},
    ),
    "rms_norm": (
        lambda: torch.nn.RMSNorm(4, eps=1e-6),
        nn.RMSNorm(epsilon=1e-6),
        normal(2, 4),
        {},
    ),
    "group_norm": (
        lambda: torch.nn.GroupNorm(2, 4),
        nn.GroupNorm(2, epsilon=1e-5, use_fast_variance=False),
        normal(2, 3, 4),
        {},
    ),
    "conv1d": (
        lambda: torch.nn.Conv1d(4, 4, 3),
        conv(3),
        normal(2, 7, 4),
        {"layer": "kernel"},
    ),
    "conv2d": (
        lambda: torch.nn.Conv2d(4, 6, (3, 2), bias=False),
        conv(3, 2, features=6, use_bias=False),
        normal(2, 7, 6, 4),
        {},
    ),
    "conv2d_grouped": (
        lambda: torch.nn.Conv2d(4, 4, 3, groups=2),
        conv(3, 3, feature_group_count=2),
        normal(2, 7, 6, 4),
        {},
    ),
    "conv3d": (
        lambda: torch.nn.Conv3d(4, 4, 2),
        conv(2, 2, 2),
        normal(2, 3, 4, 3, 4),
        {},
    ),
    "conv_transpose": (
        lambda: torch.nn.ConvTranspose2d(4, 4, (3, 2), stride=2),
        nn.ConvTranspose(
            4, (3, 2), strides=(2, 2), padding="VALID", transpose_kernel=True
        ),
        normal(2, 5, 3, 4),
        {},
    ),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make, ours, x, kinds", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_other_layers_compute_the_same(make, ours, x, kinds):
    theirs = torch.nn.ModuleDict({"layer": make().double()})
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    state_dict = theirs.state_dict()
    shapes = jax.eval_shape(lambda: ours.init(jax.random.key(0), x)["params"])
    target = {"layer": jax.tree.map(lambda s: s.update(dtype="float64"), shapes)}
    params = convert_tree(state_dict, kinds=kinds, target=target)
    assert_same_bits(plan_tree(state_dict, kinds=kinds).state_dict(params), state_dict)
    moved = x if x.ndim < 3 else np.moveaxis(x, -1, 1)
    want = theirs["layer"](torch.tensor(moved)).detach().numpy()
    want = want if x.ndim < 3 else np.moveaxis(want, 1, -1)
    got = ours.apply({"params": params["layer"]}, x)
    np.testing.assert_allclose(got, want, **TOLERANCE)


class Block(nn.Module):
    """torch.nn.TransformerEncoderLayer without dropout, as nn.scan takes it."""

    @nn.compact
    def __call__(self, x, _):
        attn = MultiheadAttention(6, 3, batch_first=True, name="self_attn")
        norm1, norm2 = (nn.LayerNorm(1e-5, name=f"norm{n}") for n in (1, 2))
        x = norm1(x + attn(x, x, x)[0])
        y = nn.Dense(6, name="linear2")(nn.relu(nn.Dense(8, name="linear1")(x)))
        return norm2(x + y), None


class Encoder(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x):
        if self.scan:
            stack = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            return stack(name="layers")(x, None)[0]
        for n in range(2):
            x, _ = Block(name=f"layers_{n}")(x, None)
        return x


def encoder(dtype=torch.float64):
    layer = torch.nn.TransformerEncoderLayer(6, 3, 8, batch_first=True, dtype=dtype)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def target(scan):
    shapes = jax.eval_shape(
        lambda: Encoder(scan).init(jax.random.key(0), jnp.ones((1, 2, 6)))["params"]
    )
    return jax.tree.map(lambda s: s.update(dtype="float64"), shapes)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("scan", [False, True], ids=["list", "scan"])
def test_an_encoder_runs_as_a_list_of_layers_and_stacked_for_scan(scan):
    theirs = encoder()
    conversion = plan_tree(
        theirs.state_dict(), 3, stack=["layers"] if scan else [], target=target(scan)
    )
    params = conversion.params(theirs.state_dict())
    x = normal(2, 4, 6)
    got = Encoder(scan).apply({"params": params}, x)
    np.testing.assert_allclose(got, theirs(torch.tensor(x)).detach(), **TOLERANCE)
    assert_same_bits(conversion.state_dict(params), theirs.state_dict())
    assert [layer.index for layer in conversion.layers] == (
        [0, 1] if scan else [None] * 2
    )
    convert.verify(theirs.state_dict(), params, conversion=conversion)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("stack", [[], ["layers"]], ids=["list", "scan"])
def test_round_trip_is_exact_in_every_dtype_also_through_json(dtype, stack):
    theirs = encoder(getattr(torch, dtype))
    conversion = plan_tree(theirs.state_dict(), 3, stack=stack)
    assert Conversion.from_json(conversion.to_json()) == conversion
    params = jax.tree.map(jnp.asarray, conversion.params(theirs.state_dict()))
    back = Conversion.from_json(conversion.to_json()).state_dict(params)
    assert_same_bits(back, theirs.state_dict())


def test_float8_is_refused_as_no_layer_computes_with_it():
    layer = torch.nn.MultiheadAttention(4, 2).to(torch.float8_e4m3fn).state_dict()
    text = "where they are float8: got (attn.)?in_proj_weight float8_e4m3fn.12, 4., "
    with pytest.raises(ValueError, match=text):
        plan_tree({f"attn.{name}": tensor for name, tensor in layer.items()}, 2)
    with pytest.raises(ValueError, match=text):
        params_from_state_dict(layer, 2)


def copies_of(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_placed_parameters_do_not_change_with_the_tensors(dtype):
    theirs = torch.nn.ModuleDict(
        {"attn": torch.nn.MultiheadAttention(64, 4), "fc": torch.nn.Linear(64, 64)}
    ).to(getattr(torch, dtype))
    device = SingleDeviceSharding(jax.devices()[0])
    with jax.enable_x64():
        conversion = plan_tree(theirs.state_dict(), 4)
        params = conversion.params(theirs.state_dict(), lambda *_: device)
        views = conversion.params(theirs.state_dict())
        before = copies_of(params)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(1.0)
        after, changed = copies_of(params), copies_of(views)
    assert all(map(np.array_equal, before, after))
    assert not any(map(np.array_equal, before, changed))


def test_prefix_rename_and_ignore():
    state_dict = {f"model.{k}": v for k, v in encoder().state_dict().items()}
    state_dict |= {"model.position_ids": torch.arange(3), "head.weight": torch.ones(2)}
    conversion = plan_tree(
        state_dict,
        3,
        prefix="model",
        rename={r"^layers\.": "blocks.", "self_attn": "attn", "kernel$": "w"},
        ignore=[r"model\.position_ids"],
    )
    params = conversion.params(state_dict)
    assert params.keys() == {"blocks_0", "blocks_1"}
    assert params["blocks_0"]["attn"]["out_proj"]["weight"].shape == (6, 3, 2)
    assert params["blocks_1"]["linear1"]["w"].shape == (6, 8)
    assert conversion.layers[1].prefix == "model.layers.1.self_attn"
    assert conversion.layers[1].path == "blocks_1/attn"
    assert conversion.ignored == ("model.position_ids",)
    assert state_dict.keys() - conversion.state_dict(params).keys() == {
        "model.position_ids",
        "head.weight",
    }


@pytest.mark.parametrize("kind", ["kernel", "embedding", "weight"])
def test_the_target_tells_what_a_matrix_is(kind):
    state_dict = {"head.weight": torch.randn(4, 4)}
    wanted = {"head": {kind: jax.ShapeDtypeStruct((4, 4), np.float32)}}
    params = convert_tree(state_dict, target=wanted)
    turned = (
        state_dict["head.weight"].T if kind == "kernel" else state_dict["head.weight"]
    )
    np.testing.assert_array_equal(params["head"][kind], turned)


def test_a_name_that_no_tree_can_hold_is_refused():
    state_dict = {"a." * 1600 + "bias": np.ones(2)}
    with pytest.raises(ValueError, match=r"at most 200 modules .*got 1601: 'a\.a\."):
        plan_tree(state_dict)
    assert plan_tree(state_dict, rename={r"^(a\.)+": "a."}).params(state_dict)


def test_a_root_weight_is_named_by_its_own_name():
    params = convert_tree({"weight": torch.ones(2, 3)}, kinds={"weight": "kernel"})
    assert params["kernel"].shape == (3, 2)


def test_a_target_in_flaxs_boxes():
    wanted = {
        "head": {"kernel": nn.Partitioned(jnp.ones((3, 2), np.float32), (None,) * 2)}
    }
    assert convert_tree({"head.weight": torch.ones(2, 3)}, target=wanted)


def test_a_transposed_convolution_is_told_by_its_bias():
    state_dict = torch.nn.ModuleDict({"up": torch.nn.ConvTranspose2d(4, 6, 2)})
    params = convert_tree(state_dict.state_dict())
    assert params["up"]["kernel"].shape == (2, 2, 6, 4)


def test_integers_are_parameters_if_the_caller_says_so():
    params = convert_tree({"ids": np.arange(3)}, kinds={"ids": "weight"})
    np.testing.assert_array_equal(params["ids"], np.arange(3))


def test_numbers_in_paths():
    state_dict = {
        "0.weight": torch.ones(2),
        "mlp.0.1.weight": torch.ones(2),
        "prompts.3": torch.ones(2),
    }
    paths = [entry.path for entry in plan_tree(state_dict).entries]
    assert paths == ["0/scale", "mlp_0_1/scale", "prompts_3"]


def test_batch_norm_without_its_statistics():
    state_dict = torch.nn.ModuleDict({"bn": torch.nn.BatchNorm1d(3)}).state_dict()
    params = convert_tree(state_dict, ignore=[r".*\.(running_\w+|num_batches_tracked)"])
    assert params["bn"].keys() == {"scale", "bias"}


def test_a_conversion_is_shown_as_a_table_in_which_equal_layers_are_one_row():
    state_dict = encoder().state_dict()
    shown = repr(plan_tree(state_dict, 3, ignore=[".*norm2.*"]))
    first, *lines = shown.splitlines()
    assert first == "Conversion: 20 parameters, 2 attention layers, 4 names ignored"
    rows = [re.split("  +", line) for line in lines]
    assert rows[0] == ["in Flax", "in PyTorch", "shape", "dtype", "number"]
    name = "self_attn.in_proj_weight"
    assert rows[1] == [
        "layers_*/self_attn/in_proj_weight",
        f"layers.*.{name}",
        *("(3, 3, 2, 6)", "float64", "2"),
    ]
    assert len(rows) == 11
    assert f"  2 layers.*.{name}  " in repr(plan_tree(state_dict, 3, stack=["layers"]))


# Placement


def mesh():
    return jax.make_mesh(
        (2, 3), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:6]
    )


def place(path, axes, spec):
    """Heads of attention layers over the model axis, all else over all devices."""
    assert len(axes) == len(spec.shape)
    names = {"heads": "model"}
    return NamedSharding(mesh(), P(*(names.get(axis) for axis in axes)))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("stack", [[], ["layers"]], ids=["list", "scan"])
def test_parameters_land_in_their_sharding_and_compute_the_same(stack):
    theirs = encoder()
    params = convert_tree(theirs.state_dict(), 3, place=place, stack=stack)
    layer = params["layers" if stack else "layers_0"]
    weight = layer["self_attn"]["in_proj_weight"]
    heads_axis = weight.ndim - 3
    assert weight.sharding.spec[heads_axis] == "model"
    parts = {shard.data.shape[heads_axis] for shard in weight.addressable_shards}
    assert parts == {1} and weight.shape[heads_axis] == 3
    assert layer["linear1"]["kernel"].sharding.is_fully_replicated
    x = normal(2, 4, 6)
    got = jax.jit(Encoder(bool(stack)).apply)({"params": params}, x)
    np.testing.assert_allclose(got, theirs(torch.tensor(x)).detach(), **TOLERANCE)
    conversion = plan_tree(theirs.state_dict(), 3, stack=stack)
    assert_same_bits(conversion.state_dict(params), theirs.state_dict())


def test_place_may_leave_a_parameter_to_numpy():
    params = convert_tree(LINEAR, place=lambda path, axes, spec: None)
    assert type(params["l"]["kernel"]) is np.ndarray


def test_place_says_when_jax_would_halve_the_bits():
    with jax.enable_x64(False), pytest.raises(ValueError, match="set jax_enable_x64"):
        convert_tree(encoder().state_dict(), 3, place=place)


def test_tensors_are_read_once_each_and_one_after_the_other():
    """The host holds one at a time, even where three make one parameter."""
    source = {f"a.{k}": v for k, v in arrays_of(Linears().state_dict()).items()}
    source |= LINEAR
    alive, most, read = set(), [], []

    class Watched(np.ndarray):
        def __del__(self):
            alive.discard(id(self))

    class Lazy(dict):
        specs = convert._arrays.specs(source)

        def __getitem__(self, name):
            size, shape = source[name].size, source[name].shape
            # JAX would go on using memory on the CPU that is aligned.
            owner = Watched(size + 1, source[name].dtype)
            owner[1:] = source[name].ravel()
            alive.add(id(owner))
            most.append(len(alive))
            read.append(name)
            return owner[1:].reshape(shape)

    lazy = Lazy.fromkeys(source)
    kinds = {"l": "kernel"}
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = convert_tree(lazy, 3, kinds=kinds, place=lambda *_: one)
    assert sorted(read) == sorted(source)
    assert max(most) <= 2  # JAX may let go of the one before a little later
    assert_same_bits(plan_tree(source, 3, kinds=kinds).state_dict(params), source)
