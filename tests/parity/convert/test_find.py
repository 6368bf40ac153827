"""What is found in a state_dict: attention layers, and what only looks like one."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from flax_mha import MultiheadAttention, convert
from flax_mha.convert import convert_tree, find_layers, find_look_alikes, plan_tree
from tests.parity._live import TOLERANCE, inputs, to_array
from tests.parity.convert.test_layer import torch_module


class Linears(torch.nn.Module):
    """Attention as fairseq, ESM and Hugging Face store it, and CLIP's with `out`."""

    def __init__(self, kdim=6, vdim=6, bias=True, bias_kv=False, out="out_proj", m=6):
        super().__init__()
        for name, features in (("q", 6), ("k", kdim), ("v", vdim)):
            self.add_module(f"{name}_proj", torch.nn.Linear(features, 6, bias))
        self.add_module(out, torch.nn.Linear(6, m, bias))
        for name in ("bias_k", "bias_v") if bias_kv else ():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(1, 1, 6)))
        self.out = getattr(self, out)

    def forward(self, query, key, value):
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if hasattr(self, "bias_k"):
            k = torch.cat([k, self.bias_k.repeat(len(k), 1, 1)], 1)
            v = torch.cat([v, self.bias_v.repeat(len(v), 1, 1)], 1)
        q, k, v = (x.unflatten(2, (3, 2)).transpose(1, 2) for x in (q, k, v))
        heads = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(heads.transpose(1, 2).flatten(2))

    def state_dict(self, **kwargs):
        return {
            name: tensor
            for name, tensor in super().state_dict(**kwargs).items()
            if ".out." not in f".{name}"  # the same module by its other name
        }


class Timm(torch.nn.Module):
    """timm's Attention."""

    def __init__(self, bias=True):
        super().__init__()
        self.qkv = torch.nn.Linear(6, 18, bias)
        self.proj = torch.nn.Linear(6, 6, bias)

    def forward(self, x, *_):
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, 3, 2).permute(2, 0, 3, 1, 4)
        heads = torch.nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(heads.transpose(1, 2).flatten(2))


class Torch(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = torch_module(**options, batch_first=True)

    def forward(self, *arrays):
        return self.attn(*arrays)[0]

    def state_dict(self, **kwargs):
        return self.attn.state_dict(**kwargs)


# family, module, and what its layer is beside that
FAMILIES = {
    "packed": ("torch", lambda: Torch(), {}),
    "no_bias": ("torch", lambda: Torch(bias=False), dict(bias=False)),
    "bias_kv": ("torch", lambda: Torch(add_bias_kv=True), dict(add_bias_kv=True)),
    "kdim": ("torch", lambda: Torch(kdim=4, vdim=7), dict(kdim=4, vdim=7)),
    "linears": ("linears", lambda: Linears(), {}),
    "linears_kdim": ("linears", lambda: Linears(4, 7), dict(kdim=4, vdim=7)),
    "linears_no_bias": ("linears", lambda: Linears(bias=False), dict(bias=False)),
    "esm": ("linears", lambda: Linears(bias_kv=True), dict(add_bias_kv=True)),
    "clip_pool": (
        "clip_pool",
        lambda: Linears(out="c_proj", m=4),
        dict(output_dim=4),
    ),
    "timm": ("timm", lambda: Timm(), {}),
    "timm_no_bias": ("timm", lambda: Timm(bias=False), dict(bias=False)),
}
by_family = pytest.mark.parametrize(
    "family, make, differs", FAMILIES.values(), ids=FAMILIES
)


def arrays_of(state_dict):
    return {name: to_array(tensor) for name, tensor in state_dict.items()}


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name in want:
        a, b = np.asarray(got[name]), to_array(want[name])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), name


LINEAR = {"l.weight": np.zeros((2, 3), "f"), "l.bias": np.zeros(2, "f")}
LAYER = {
    name: array.astype("f") for name, array in arrays_of(Torch().state_dict()).items()
}
BELOW = {f"a.{name}": array for name, array in LAYER.items()}


@by_family
def test_each_family_is_found_and_described(family, make, differs):
    state_dict = {f"a.b.{k}": v for k, v in make().double().state_dict().items()}
    (layer,) = find_layers(state_dict)
    wanted = dict(embed_dim=6, kdim=6, vdim=6, output_dim=6, bias=True) | differs
    assert (layer.prefix, layer.family, layer.dtype) == ("a.b", family, np.float64)
    assert wanted.items() <= dataclasses.asdict(layer).items()
    assert layer.add_bias_kv == differs.get("add_bias_kv", False)
    assert sorted(k for ks in layer.keys.values() for k in ks) == sorted(state_dict)
    assert find_look_alikes(state_dict) == []


@by_family
def test_each_family_computes_what_it_does_in_torch(family, make, differs):
    theirs = make().double()
    (layer,) = convert.find_layers(theirs.state_dict())
    kinds = {"": "attention"} if layer.unseen else None
    conversion = plan_tree(theirs.state_dict(), 3, kinds=kinds)
    params = conversion.params(theirs.state_dict())
    features = (6, differs.get("kdim", 6), differs.get("vdim", 6))
    query, key, value = (x.swapaxes(0, 1) for x in inputs(5, 5, features=features))
    key = query if family == "timm" else key
    value = query if family == "timm" else value
    want = theirs(*map(torch.tensor, (query, key, value))).detach()
    if "output_dim" in differs:
        got = clip_pool(params, query, key, value)
    else:
        ours = MultiheadAttention(
            6, 3, batch_first=True, **{k: v for k, v in differs.items()}
        )
        got, _ = ours.apply({"params": params}, query, key, value)
    np.testing.assert_allclose(got, want, **TOLERANCE)
    assert_same_bits(conversion.state_dict(params), theirs.state_dict())
    (report,) = convert.verify(theirs.state_dict(), params, conversion=conversion)
    assert max(report.error, report.torch_error) < 1e-12


def clip_pool(params, query, key, value):
    from flax_mha.functional import multi_head_attention_forward

    out, _ = multi_head_attention_forward(
        *(x.swapaxes(0, 1) for x in (query, key, value)),
        6,
        3,
        params["in_proj_weight"].reshape(18, 6),
        params["in_proj_bias"].reshape(18),
        None,
        None,
        False,
        0.0,
        params["out_proj"]["weight"].reshape(4, 6),
        params["out_proj"]["bias"],
        training=False,
    )
    return out.swapaxes(0, 1)


def test_the_position_embedding_beside_clips_pool_is_a_parameter_of_its_own():
    state_dict = Linears(out="c_proj").state_dict()
    state_dict["positional_embedding"] = torch.ones(5, 6)
    params = convert_tree(state_dict, 3)
    assert params["positional_embedding"].shape == (5, 6)
    assert params["out_proj"]["weight"].shape == (6, 3, 2)


def changed(make, **changes):
    """A state_dict with some entries replaced, or left out where None."""
    names = {name.replace("__", "."): array for name, array in changes.items()}
    state_dict = dict(make().state_dict()) | names
    return {name: array for name, array in state_dict.items() if array is not None}


NOT = "which MultiheadAttention has not"
NO_OUTPUT = (
    "no {}.weight for the output: rename the layer that it is, in the state_dict, if "
    "there is one"
)
LOOK_ALIKES = {
    "audiocraft_fewer_rows": (
        changed(Torch, in_proj_weight=torch.ones(10, 6)),
        "in_proj_weight (10, 6), wanted (18, 6): fewer heads of keys and values "
        "(grouped queries), or heads of another size",
    ),
    "normed_queries": (
        changed(Timm, q_norm__weight=torch.ones(2)),
        f"q_norm.weight: norms of queries and keys, {NOT}",
    ),
    "swin": (
        changed(
            Timm,
            relative_position_bias_table=torch.ones(9, 3),
            relative_position_index=torch.ones(4, 4, dtype=torch.int64),
        ),
        "relative_position_bias_table, relative_position_index: a bias by position, "
        "which MultiheadAttention has only as an attn_mask",
    ),
    "lora": (
        changed(Timm, qkv__lora_A__weight=torch.ones(2, 6)),
        "qkv.lora_A.weight: LoRA that is not merged: merge_and_unload() in peft, and "
        "save again",
    ),
    "gated": (
        changed(Timm, gate__weight=torch.ones(6, 6)),
        f"gate.weight: a gate, {NOT}",
    ),
    "inner_norm": (
        changed(Linears, ln__weight=torch.ones(6), ln__bias=torch.ones(6)),
        f"ln.weight, ln.bias: a norm inside of the layer, {NOT}",
    ),
    "esm2": (
        changed(Linears, rot_emb__inv_freq=torch.ones(1)),
        f"rot_emb.inv_freq: rotary positions, {NOT}",
    ),
    "unknown": (
        changed(Torch, extra=torch.ones(1)),
        "unexpected: extra (1,)",
    ),
    "grouped_queries": (
        changed(
            Linears,
            k_proj__weight=torch.ones(2, 6),
            k_proj__bias=torch.ones(2),
            v_proj__weight=torch.ones(2, 6),
            v_proj__bias=torch.ones(2),
        ),
        "6 rows of queries, 2 of keys and values: fewer heads of these (grouped "
        "queries); repeat the rows of each of their heads to convert it",
    ),
    "wide_heads": (
        changed(
            lambda: Linears(bias=False),
            **{f"{n}_proj__weight": torch.ones(12, 6) for n in "qkv"},
        ),
        "heads of 12 features together, wanted 6: MultiheadAttention's have as many as "
        "its input",
    ),
    "separate_but_all_square": (
        changed(lambda: Torch(kdim=4), k_proj_weight=torch.ones(6, 6)),
        "q_proj_weight, k_proj_weight, v_proj_weight: three projections of one shape "
        "are packed in PyTorch: another layer; concatenate their rows to "
        "in_proj_weight if it computes the same",
    ),
    "weight_norm": (
        changed(Torch, in_proj_weight=None, in_proj_weight_g=torch.ones(18, 1)),
        "in_proj_weight_g: parametrized: save it, and `read_state_dict` folds what it "
        "can",
    ),
    "integers": (
        changed(Torch, in_proj_weight=torch.ones(18, 6, dtype=torch.int8)),
        "of other dtypes: in_proj_weight int8",
    ),
    "mixed_dtypes": (
        changed(Linears, k_proj__bias=torch.ones(6, dtype=torch.float16)),
        "of other dtypes: q_proj.bias float32; k_proj.bias float16; "
        "v_proj.bias float32",
    ),
    "no_matrix": (
        {"in_proj_bias": torch.ones(18)},
        "no weight, or an empty one, tells embed_dim",
    ),
    "empty": (
        changed(Torch, in_proj_weight=torch.ones(0, 0), out_proj__weight=None),
        "no weight, or an empty one, tells embed_dim",
    ),
    "modernbert": (
        {"Wqkv.weight": torch.ones(18, 6), "Wo.weight": torch.ones(6, 6)},
        NO_OUTPUT.format("out_proj"),
    ),
    "gpt2_cross_attention": (
        {
            "c_attn.weight": torch.ones(6, 12),
            "q_attn.weight": torch.ones(6, 6),
            "c_proj.weight": torch.ones(6, 6),
        },
        "q_attn.weight: more projections than MultiheadAttention has; c_attn.weight "
        "(6, 12), wanted (6, 18): fewer heads of keys and values (grouped queries), or "
        "heads of another size",
    ),
    "query_key_value": (
        {f"{name}.weight": torch.ones(6, 6) for name in ("query", "key", "value")},
        NO_OUTPUT.format("out"),
    ),
    "alphafold": (
        {f"{name}_linear.weight": torch.ones(6, 6) for name in "qkv"}
        | {"gating.weight": torch.ones(6, 6), "gating.bias": torch.ones(6)},
        f"gating.weight, gating.bias: a gate, {NOT}; " + NO_OUTPUT.format("out"),
    ),
    "flax": (
        {"query.kernel": torch.ones(6, 3, 2)},
        "query.kernel belongs to Flax's MultiHeadDotProductAttention, which "
        "`from_stock` takes",
    ),
}


@pytest.mark.parametrize("state_dict, reason", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alikes_are_told_with_the_reason_and_never_converted(state_dict, reason):
    state_dict = {f"attn.{name}": tensor for name, tensor in state_dict.items()}
    assert find_layers(state_dict) == []
    (found,) = find_look_alikes(state_dict)
    assert (found.prefix, found.reason) == ("attn", reason)
    assert found.keys and set(found.keys) <= state_dict.keys()
    with pytest.raises(ValueError) as raised:
        plan_tree(state_dict, 3)
    line = f"\n  'attn' can only be taken module by module, not as attention ({reason}"
    assert line in str(raised.value)


def test_what_is_ignored_makes_no_layer_of_a_look_alike():
    """Its numbers would be another model's."""
    alone = {"attn." + name: tensor for name, tensor in Timm().state_dict().items()}
    for name in ("swin", "normed_queries", "lora", "gated"):
        state_dict = {f"attn.{k}": v for k, v in LOOK_ALIKES[name][0].items()}
        more = [re.escape(key) for key in state_dict if key not in alone]
        assert more
        with pytest.raises(ValueError, match="not as attention"):
            plan_tree(state_dict, 3, ignore=more)
        kinds = {r"attn\.(qkv|proj)": "kernel"}
        conversion = plan_tree(state_dict, ignore=more, kinds=kinds)
        assert conversion.layers == () and len(conversion.entries) == 4
    assert len(plan_tree(alone, 3).layers) == 1


def test_a_part_of_a_layer_is_none():
    state_dict = {f"attn.{k}": v for k, v in Linears().state_dict().items()}
    for given in (dict(ignore=[".*out_proj.*"]), dict(prefix="attn.q_proj")):
        with pytest.raises(ValueError, match=r"without attn\.\S+"):
            plan_tree(state_dict, 3, **given)
    everything = plan_tree(
        state_dict | LINEAR, kinds={"l": "kernel"}, ignore=["attn.*"]
    )
    assert [entry.path for entry in everything.entries] == ["l/kernel", "l/bias"]


def test_buffers_that_change_nothing_are_ignored_by_name():
    """DINOv3 masks the bias of its keys, which adds the same to all of a query's."""
    state_dict = {f"attn.{k}": v for k, v in Timm().state_dict().items()}
    state_dict["attn.qkv.bias_mask"] = torch.ones(18)
    (layer,) = find_layers(state_dict)
    assert layer.buffers == ("attn.qkv.bias_mask",)
    with pytest.raises(ValueError, match=r'ignore=\[r"attn\\.qkv\\.bias_mask"\]'):
        plan_tree(state_dict, 3)
    conversion = plan_tree(state_dict, 3, ignore=[r".*bias_mask"])
    assert len(conversion.layers) == 1


def test_the_inner_layer_of_lora_is_none():
    """All of it is there, but what is added to its weights lies beside it."""
    state_dict = {f"attn.base_layer.{k}": v for k, v in Torch().state_dict().items()}
    state_dict["attn.lora_A.default.weight"] = torch.ones(2, 6)
    (found,) = find_look_alikes(state_dict)
    assert found.reason.startswith("base_layer: LoRA that is not merged")
    with pytest.raises(ValueError, match="may be LoRA that is not merged") as raised:
        plan_tree(state_dict, 3)
    assert "not as attention (base_layer: LoRA" in str(raised.value)


def test_a_query_alone_is_no_attention():
    state_dict = {"detr.query.weight": torch.ones(5, 6)}
    assert find_look_alikes(state_dict) == []
    conversion = plan_tree(state_dict, kinds={r".*\.query": "embedding"})
    assert conversion.entries[0].path == "detr/query/embedding"


def test_a_look_alike_is_converted_as_what_the_caller_says_it_is():
    state_dict = {f"attn.{k}": v for k, v in LOOK_ALIKES["swin"][0].items()}
    kinds = {r"attn\.(qkv|proj)": "kernel", r"attn\.(.*bias|relat.*)": "weight"}
    params = convert_tree(state_dict, kinds=kinds)["attn"]
    np.testing.assert_array_equal(
        params["qkv"]["kernel"].T, state_dict["attn.qkv.weight"]
    )
    assert params["relative_position_bias_table"].shape == (9, 3)


def test_an_attention_layer_is_converted_as_linears_if_the_caller_says_so():
    kinds = {r".*_proj": "kernel"}
    params = convert_tree(Linears().state_dict(), kinds=kinds)
    assert params.keys() == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert params["q_proj"].keys() == {"kernel", "bias"}


def test_finding_reads_no_tensor():
    class Unreadable(dict):
        specs = convert._arrays.specs(Linears().state_dict())

        def __getitem__(self, name):
            raise AssertionError(name)

    unreadable = Unreadable.fromkeys(Unreadable.specs)
    assert len(find_layers(unreadable)) == 1
    assert len(plan_tree(unreadable, 3).layers) == 1


def test_find_layers_of_something_else():
    with pytest.raises(TypeError, match="state_dict must map names to arrays"):
        find_layers([1])
