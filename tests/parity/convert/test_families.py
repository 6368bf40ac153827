"""Each way of storing attention, against the library's own module."""

import ast
import re

import numpy as np
import peft
import pytest
import torch
import transformers
from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert

from flax_mha import MultiheadAttention, convert
from flax_mha.convert._families import FAMILIES
from tests.parity._live import normal
from tests.parity.convert._family_cases import (
    BIG_CODE,
    EVERY,
    HEADS,
    LENGTH,
    PLAIN,
    SMALL,
    WIDTH,
    layout,
)
from tests.parity.convert.test_find import arrays_of, assert_same_bits


class Configured(dict):
    """A state_dict with what lies beside it, as a `Checkpoint` has it."""

    config = None


def made(case):
    """Returns the module and its state_dict, below a name, with random numbers."""
    torch.manual_seed(0)
    theirs = case.make().double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    parent = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"attn": theirs})})
    state_dict = Configured(parent.state_dict())
    state_dict.config = case.config
    return theirs, state_dict


def planned(case, state_dict, num_heads=HEADS, **options):
    kinds = {r"model\.attn": case.said} if case.said else {}
    options |= dict(kinds=kinds, config=case.config)
    return convert.plan_tree(state_dict, num_heads, **options)


def test_every_family_is_held_against_something():
    assert {case.family for case in EVERY.values()} | {"torch", "clip_pool"} == {
        *FAMILIES
    }


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
def test_a_family_computes_what_its_library_does_and_comes_back_exactly(case):
    theirs, state_dict = made(case)
    (layer,) = convert.find_layers(state_dict)
    assert (layer.prefix, layer.family) == ("model.attn", case.family)
    assert (layer.embed_dim, layer.kdim, layer.vdim) == (WIDTH, case.kdim, case.kdim)

    conversion = planned(case, state_dict)
    params = conversion.params(state_dict)
    attention = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
    attention |= {"in_proj_bias", "out_proj"}
    ours = params["model"]["attn"]
    query, key = normal(2, LENGTH, WIDTH), normal(2, LENGTH, case.kdim, seed=1)
    key = key if case.kdim != WIDTH else query
    got, _ = MultiheadAttention(
        WIDTH,
        HEADS,
        bias=layer.bias,
        kdim=case.kdim,
        vdim=case.kdim,
        batch_first=True,
    ).apply(
        {"params": {name: ours[name] for name in attention & ours.keys()}},
        *(query, key, key),
        attn_mask=case.mask,
    )
    with torch.no_grad():
        want = case.call(theirs, torch.tensor(query), torch.tensor(key)).numpy()
    tolerance = 1e-12 if case.exact else 3e-6
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)

    assert_same_bits(conversion.state_dict(params), arrays_of(state_dict))
    assert convert.Conversion.from_json(conversion.to_json()) == conversion
    (report,) = convert.verify(state_dict, params, conversion=conversion)
    assert max(report.error, report.torch_error) < 1e-12


@pytest.mark.parametrize("family", ["timm", "gpt2", "nanogpt", "gpt_neox"])
def test_what_is_one_tensor_there_is_a_view_of_it(family):
    case = next(case for case in EVERY.values() if case.family == family)
    _, state_dict = made(case)
    arrays = arrays_of(state_dict)
    params = planned(case, arrays).params(arrays)["model"]["attn"]
    for name, param in (("in_proj", params["in_proj_weight"]),):
        assert any(np.shares_memory(param, array) for array in arrays.values()), name


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
def test_stacked_layers_come_back_exactly(case):
    _, one = made(case)
    state_dict = {
        name.replace("model.", f"model.{n}."): tensor + n
        for n in range(2)
        for name, tensor in one.items()
    }
    kinds = {r".*\.attn": case.said} if case.said else {}
    conversion = convert.plan_tree(
        state_dict, HEADS, kinds=kinds, stack=["model"], config=case.config
    )
    params = conversion.params(state_dict)
    assert_same_bits(conversion.state_dict(params), arrays_of(state_dict))
    reports = convert.verify(state_dict, params, conversion=conversion)
    assert len(reports) == 2 and max(report.error for report in reports) < 1e-12


BIASES = ["timm_without_qkv_bias", "whisper_in_transformers", "vit_without_qkv_bias"]


@pytest.mark.parametrize("name", BIASES)
def test_biases_that_were_not_there_must_still_be_zero_on_the_way_back(name):
    _, state_dict = made(EVERY[name])
    conversion = planned(EVERY[name], state_dict)
    params = conversion.params(state_dict)
    absent = [key for entry in conversion.entries for key in entry.absent]
    (layer,) = convert.find_layers(state_dict)
    assert absent and tuple(absent) == layer.absent
    params["model"]["attn"]["in_proj_bias"] = np.ones((3, HEADS, WIDTH // HEADS))
    with pytest.raises(ValueError) as raised:
        conversion.state_dict(params)
    assert str(raised.value) == (
        "params must have zeros for biases that PyTorch's layer lacks (set them to "
        "zero, those of keys change no result; or take them by all_biases=True, for a "
        f"layer that has them), but\n  no longer zero: {'; '.join(absent)}"
    )
    back = conversion.state_dict(params, all_biases=True)
    assert back.keys() == state_dict.keys() | set(absent)
    assert all((back[key] == 1).all() for key in absent)
    with pytest.raises(ValueError, match=f"{re.escape(absent[0])} is not zero"):
        convert.verify(state_dict, params, conversion=conversion)


def test_a_bias_that_was_not_planned_for_is_no_silent_loss():
    _, state_dict = made(EVERY["whisper_in_transformers"])
    conversion = planned(EVERY["whisper_in_transformers"], state_dict)
    later = state_dict | {"model.attn.k_proj.bias": torch.ones(WIDTH)}
    with pytest.raises(ValueError, match=r"unexpected: model\.attn\.k_proj\.bias \(6,"):
        conversion.params(later)


UNSEEN = {name: case for name, case in EVERY.items() if case.said}


@pytest.mark.parametrize("name", UNSEEN)
def test_layers_that_mostly_have_positions_are_converted_only_if_told(name):
    _, state_dict = made(EVERY[name])
    (layer,) = convert.find_layers(state_dict)
    assert layer.unseen.startswith("positions")
    with pytest.raises(ValueError) as raised:
        convert.plan_tree(state_dict, HEADS)
    assert layer.unseen in str(raised.value)
    assert str(raised.value).endswith(': kinds={r"model\\.attn": "attention"}')


ALIKE = {
    "llama": (
        lambda: transformers.LlamaModel(
            transformers.LlamaConfig(**SMALL, num_key_value_heads=HEADS)
        ),
        "o_proj",
        "rotary",
    ),
    "qwen2": (
        lambda: transformers.Qwen2Model(
            transformers.Qwen2Config(**SMALL, num_key_value_heads=HEADS)
        ),
        "o_proj",
        "rotary",
    ),
    "gpt_neo": (
        lambda: transformers.GPTNeoModel(
            transformers.GPTNeoConfig(
                hidden_size=WIDTH,
                num_heads=HEADS,
                num_layers=1,
                attention_types=[[["global"], 1]],
                vocab_size=11,
            )
        ),
        "linears",
        "not scaled",
    ),
    "gptj": (
        lambda: transformers.GPTJModel(
            transformers.GPTJConfig(
                n_embd=WIDTH, n_head=HEADS, n_layer=1, rotary_dim=2, vocab_size=11
            )
        ),
        "linears",
        "GPT-J",
    ),
    "layoutlmv3": (
        lambda: transformers.LayoutLMv3Model(
            transformers.LayoutLMv3Config(
                **SMALL, coordinate_size=1, shape_size=1, visual_embed=False
            )
        ),
        "bert",
        "there is encoder",
    ),
    "qwen": (layout(["c_attn"], "c_proj", no_bias=["c_proj"]), "nanogpt", "rotary"),
    "t5": (
        lambda: transformers.T5Model(
            transformers.T5Config(
                d_model=WIDTH,
                d_kv=2,
                num_heads=HEADS,
                d_ff=8,
                num_layers=1,
                vocab_size=9,
            )
        ),
        "t5",
        "not scaled",
    ),
    "mpnet": (
        lambda: transformers.MPNetModel(transformers.MPNetConfig(**PLAIN)),
        "t5",
        "there is encoder.relative_attention_bias",
    ),
    "roformer": (
        lambda: transformers.RoFormerModel(transformers.RoFormerConfig(**PLAIN)),
        "bert",
        "there is encoder.embed_positions",
    ),
}


@pytest.mark.parametrize("make, family, unseen", ALIKE.values(), ids=ALIKE)
def test_biases_tell_layers_that_compute_more(make, family, unseen):
    """They have the names of others, which compute no more than their tensors show."""
    state_dict = make().state_dict()
    (layer,) = convert.find_layers(state_dict)
    assert layer.family == family and unseen in layer.unseen
    with pytest.raises(ValueError, match=f"than tensors show .*{unseen}"):
        convert.plan_tree(state_dict, HEADS)


@pytest.mark.parametrize(
    "name", ["rope_embed.periods", "rotary_emb.inv_freq", "rel_pos_bias.weight"]
)
def test_positions_beside_layers_are_of_all_below_the_same_module(name):
    """As DINOv3's own files have them; nothing in a layer shows it."""
    layer = {
        f"{linear}.{kind}": torch.ones(shape)
        for linear, rows in (("qkv", 3 * WIDTH), ("proj", WIDTH))
        for kind, shape in (("weight", (rows, WIDTH)), ("bias", (rows,)))
    }
    prefixes = ["trunk.blocks.0.attn", "trunk.blocks.1.attn", "head.attn"]
    state_dict = {f"{p}.{key}": layer[key] for p in prefixes for key in layer}
    state_dict[f"trunk.{name}"] = torch.ones(2)
    *inside, outside = convert.find_layers(state_dict)
    assert [layer.unseen for layer in inside] == [
        f"positions: there is trunk.{name}"
    ] * 2
    assert not outside.unseen
    with pytest.raises(ValueError, match=r"more than tensors show .*there is trunk"):
        convert.plan_tree(state_dict, HEADS)


def test_grouped_queries_are_named():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1)
    (alike,) = convert.find_look_alikes(transformers.LlamaModel(config).state_dict())
    assert "grouped queries" in alike.reason


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
def test_a_fault_in_a_family_is_found(case):
    """Heads and their features change places, which keeps all shapes."""
    _, state_dict = made(case)
    conversion = planned(case, state_dict)
    params = conversion.params(state_dict)
    weight = params["model"]["attn"]["out_proj"]["weight"]
    turned = weight.swapaxes(1, 2).reshape(weight.shape)
    params["model"]["attn"]["out_proj"] |= {"weight": turned}
    with pytest.raises(ValueError, match=r"layers that compute other .*'model\.attn'"):
        convert.verify(state_dict, params, conversion=conversion)


class Adapted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(WIDTH, HEADS)
        self.fc = torch.nn.Linear(WIDTH, WIDTH)


def adapted(targets):
    config = peft.LoraConfig(r=2, target_modules=targets)
    return peft.get_peft_model(Adapted().double(), config)


@pytest.mark.parametrize("targets", [["attn", "fc"], ["fc"]], ids=["all", "fc"])
@pytest.mark.parametrize(
    "state_dict_of",
    [lambda model: model.state_dict(), peft.get_peft_model_state_dict],
    ids=["whole", "adapter"],
)
def test_lora_is_named_and_converted_when_it_is_merged(targets, state_dict_of):
    model = adapted(targets)
    state_dict = state_dict_of(model)
    for ignore in ([], [".*lora_.*"]):
        if ignore and all("lora_" in name for name in state_dict):
            continue  # nothing would be left of the adapter
        with pytest.raises(ValueError, match=r"LoRA that is not merged.*merge_and_"):
            convert.plan_tree(state_dict, HEADS, ignore=ignore)
    merged = model.merge_and_unload()
    conversion = convert.plan_tree(merged.state_dict(), HEADS)
    assert [layer.prefix for layer in conversion.layers] == ["attn"]


OTHERS = {
    "codegen": (
        lambda: transformers.CodeGenModel(
            transformers.CodeGenConfig(
                n_embd=16, n_head=4, n_layer=1, rotary_dim=2, vocab_size=9
            )
        ),
        "h.0.attn",
        "an order of their own",
    ),
    "deberta": (
        lambda: transformers.DebertaModel(transformers.DebertaConfig(**PLAIN)),
        "encoder.layer.0.attention",
        "relative positions",
    ),
    "t5": (
        ALIKE["t5"][0],
        "encoder.block.0.layer.0.SelfAttention",
        "a bias by position",
    ),
    "conformer": (
        lambda: modeling_wav2vec2_bert.Wav2Vec2BertSelfAttention(
            transformers.Wav2Vec2BertConfig(
                hidden_size=WIDTH,
                num_attention_heads=HEADS,
                position_embeddings_type="relative",
            )
        ),
        "",
        "a bias by position",
    ),
}


@pytest.mark.parametrize("make, prefix, reason", OTHERS.values(), ids=OTHERS)
def test_other_attention_is_listed_with_what_it_is(make, prefix, reason):
    found = {one.prefix: one for one in convert.find_look_alikes(make().state_dict())}
    assert reason in found[prefix].reason


GPT_SMALL = dict(n_embd=WIDTH, n_head=HEADS, n_layer=2, n_positions=8, vocab_size=11)
SAVED = {
    "bert": (transformers.BertModel, transformers.BertConfig(**SMALL)),
    "albert": (
        transformers.AlbertModel,
        transformers.AlbertConfig(**SMALL, embedding_size=4),
    ),
    "distilbert": (
        transformers.DistilBertModel,
        transformers.DistilBertConfig(dim=WIDTH, n_heads=HEADS, hidden_dim=8),
    ),
    "vit": (
        transformers.ViTModel,
        transformers.ViTConfig(**SMALL, image_size=8, patch_size=4),
    ),
    "gpt2": (transformers.GPT2Model, transformers.GPT2Config(**GPT_SMALL)),
    "gpt_bigcode": (
        transformers.GPTBigCodeModel,
        transformers.GPTBigCodeConfig(**GPT_SMALL, **BIG_CODE),
    ),
    "gpt_neox": (transformers.GPTNeoXModel, transformers.GPTNeoXConfig(**SMALL)),
    "bloom": (
        transformers.BloomModel,
        transformers.BloomConfig(hidden_size=WIDTH, n_head=HEADS, n_layer=2),
    ),
    "mpt": (
        transformers.MptModel,
        transformers.MptConfig(d_model=WIDTH, n_heads=HEADS, n_layers=2),
    ),
    "whisper": (
        transformers.WhisperModel,
        transformers.WhisperConfig(
            d_model=WIDTH,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=2,
            encoder_layers=1,
            decoder_layers=1,
            vocab_size=11,
            max_source_positions=8,
            pad_token_id=0,
        ),
    ),
}


def pasted(message):
    """Returns the arguments that a message says."""
    said = {"kinds": {}, "ignore": []}
    for name, text in re.findall(r"(kinds|ignore)=(\S.*?[\]}])(?= |$)", message, re.M):
        value = ast.literal_eval(text)
        said[name] = said[name] | value if name == "kinds" else said[name] + value
    return said


@pytest.mark.parametrize("make, config", SAVED.values(), ids=SAVED)
def test_what_transformers_save_is_converted_in_two_tries_at_most(
    make, config, tmp_path
):
    """The first says all that has to be said; config.json says the heads."""
    model = make(config)
    model.save_pretrained(tmp_path)
    checkpoint = convert.read_state_dict(tmp_path)
    try:
        conversion = convert.plan_tree(checkpoint)
    except ValueError as error:
        conversion = convert.plan_tree(checkpoint, **pasted(str(error)))
    params = conversion.params(checkpoint)
    reports = convert.verify(checkpoint, params, conversion=conversion)
    assert max(report.error for report in reports) < 1e-12
    modules = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    assert 0 < len(reports) <= len(modules)
    decoder = [report for report in reports if "decoder" in report.prefix]
    assert {report.num_heads for report in reports if report not in decoder} == {HEADS}
    assert {report.num_heads for report in decoder} <= {2}
    assert conversion.state_dict(params).keys() == checkpoint.keys()


def test_only_config_json_tells_the_order_of_rows():
    """The same names and shapes are nanoGPT's."""
    _, state_dict = made(EVERY["gpt_bigcode"])
    (layer,) = convert.find_layers(dict(state_dict))
    assert layer.family == "nanogpt"
    here, there = (
        convert.plan_tree(state_dict, HEADS, config=config).params(state_dict)["model"]
        for config in ({"multi_query": True}, state_dict.config)
    )
    weights = [params["attn"]["in_proj_weight"] for params in (here, there)]
    assert not np.array_equal(*weights)
    assert np.array_equal(*(np.sort(weight, axis=None) for weight in weights))


def test_a_vision_transformer_without_positions_is_asked_about():
    """Qwen2-VL's, of which no tensor shows that its positions are rotary."""
    _, state_dict = made(EVERY["timm"])
    state_dict["model.patch_embed.proj.weight"] = torch.ones(WIDTH, 3, 2, 2)
    (layer,) = convert.find_layers(state_dict)
    lacking = "positions: there are none beside model.patch_embed.proj.weight"
    assert layer.unseen == lacking
    with pytest.raises(ValueError, match=f"may compute more .*{lacking}"):
        convert.plan_tree(state_dict, HEADS)
    assert convert.plan_tree(state_dict, HEADS, config={}).layers
    state_dict["model.pos_embed"] = torch.ones(1, 4, WIDTH)
    assert not convert.find_layers(state_dict)[0].unseen


def test_attention_over_something_else_is_told_by_its_name():
    """DaViT's, as Florence-2 has it, is over channels; its tensors are timm's."""
    _, state_dict = made(EVERY["timm"])
    names = {name.replace(".attn.", ".channel_attn.fn."): name for name in state_dict}
    (layer,) = convert.find_layers({new: state_dict[old] for new, old in names.items()})
    assert layer.unseen == "another attention: channel_attn"


def test_positions_of_a_head_beside_layers_are_seen():
    """LightGlue's, of which only the number of features tells."""
    _, state_dict = made(EVERY["vit_in_memory"])
    for rows, unseen in ((WIDTH, ""), (2, "positions: there is positional_encoder.p")):
        beside = {"positional_encoder.p.weight": torch.ones(rows, 2)}
        (layer,) = convert.find_layers(state_dict | beside)
        assert layer.unseen == unseen + ".weight" * bool(unseen)
