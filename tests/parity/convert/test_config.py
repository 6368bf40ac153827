"""What is not in tensors: heads, and what config.json says of them and of positions."""

import json

import jax
import numpy as np
import pytest

from flax_mha import convert
from flax_mha.convert import convert_tree, plan_tree, save_safetensors
from tests.parity.convert.test_find import BELOW, LAYER, Torch


def towers():
    return {
        f"{name}.layers.{n}.attn.{key}": tensor
        for name in ("text_model", "vision_model")
        for n in range(2)
        for key, tensor in Torch().state_dict().items()
    }


def heads(conversion):
    return {layer.prefix: layer.num_heads for layer in conversion.layers}


def with_config(tmp_path, state_dict, config):
    save_safetensors(tmp_path / "model.safetensors", state_dict)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return convert.read_state_dict(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "num_heads",
    [
        {"text.*": 2, ".*": 3},
        lambda layer: 2 if layer.prefix.startswith("text") else 3,
        {"text.*": np.int64(2), "vision.*": 3},
    ],
    ids=["patterns", "function", "numpy"],
)
def test_number_of_heads_by_layer(num_heads):
    got = heads(plan_tree(towers(), num_heads))
    assert got == {prefix: 2 if "text" in prefix else 3 for prefix in got}
    assert len(got) == 4


@pytest.mark.parametrize(
    "config, wanted",
    [
        ({"num_attention_heads": 3}, {3}),
        ({"n_head": 3, "hidden_size": 6, "vision_config": None}, {3}),
        (
            {
                "text_config": {"num_attention_heads": 2},
                "vision_config": {"num_attention_heads": 3},
            },
            {2, 3},
        ),
        ({"text_cfg": {"heads": 2}, "vision_cfg": {"heads": 3}}, {2, 3}),
        ({"model": {"stack": {"initargs": {"num_layers": 2, "nhead": 3}}}}, {3}),
        ({"model": {"text": {"n_head": 2}, "vision": {"n_head": 3}}}, {2, 3}),
        ({"nheads": 3, "id2label": {"0": "cat"}, "attn_config": {"alibi": False}}, {3}),
        ({"encoder_attention_heads": 3, "decoder_attention_heads": 3}, {3}),
    ],
    ids=["one", "gpt", "sections", "open_clip", "nested", "words", "others", "equal"],
)
def test_number_of_heads_from_config_json(tmp_path, config, wanted):
    got = heads(plan_tree(with_config(tmp_path, towers(), config)))
    assert set(got.values()) == wanted


def test_number_of_heads_of_encoder_and_decoder_from_config_json(tmp_path):
    state_dict = {
        f"{name}.layers.0.self_attn.{key}": tensor
        for name in ("encoder", "decoder")
        for key, tensor in Torch().state_dict().items()
    }
    config = {"encoder_attention_heads": 2, "decoder_attention_heads": 3}
    got = heads(plan_tree(with_config(tmp_path, state_dict, config)))
    assert got == {"encoder.layers.0.self_attn": 2, "decoder.layers.0.self_attn": 3}


def test_a_config_is_taken_with_what_was_renamed_in_python(tmp_path):
    checkpoint = with_config(tmp_path, towers(), {"nhead": 3})
    renamed = {f"net.{name}": array for name, array in checkpoint.items()}
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        plan_tree(renamed)
    got = heads(plan_tree(renamed, config=checkpoint.config))
    assert set(got.values()) == {3}


BEYOND = {
    "llama": {"rope_theta": 10000.0},
    "transformers_5": {"rope_parameters": {"rope_type": "default"}},
    "roformer": {"rotary_value": False},
    "alibi": {"attn_config": {"alibi": True}},
    "gpt_neo": {"attention_types": [[["global"], 1]]},
    "gpt2_without_scale": {"scale_attn_weights": False},
    "bert_relative": {"position_embedding_type": "relative_key"},
    "big_bird": {"attention_type": "block_sparse"},
    "layoutlmv3": {"has_relative_attention_bias": True},
    "speecht5": {"encoder_max_relative_position": 160},
    "pegasus_x": {"num_global_tokens": 32},
    "in_text": {"text_config": {"rope_theta": 1e4}, "vision_config": {}},
}


@pytest.mark.parametrize("config", BEYOND.values(), ids=BEYOND)
def test_what_config_json_says_of_more_than_tensors_show_is_asked(tmp_path, config):
    checkpoint = with_config(tmp_path, towers(), config)
    with pytest.raises(ValueError) as raised:
        plan_tree(checkpoint, 3)
    line = str(raised.value).splitlines()[1]
    assert "may compute more than tensors show (config.json says " in line
    assert r'kinds={r"text_model\.layers\.\d+\.attn": "attention"' in line
    assert ("vision_model" in line) == ("text_config" not in config)
    kinds = {".*attn": "attention"}
    assert len(plan_tree(checkpoint, 3, kinds=kinds).layers) == 4


@pytest.mark.parametrize(
    "config",
    [
        {"alibi": False, "rope_scaling": None, "scale_attn_weights": True},
        {"position_embedding_type": "absolute", "rotary_dim": None},
        {"attention_type": "original_full", "use_relative_position_bias": False},
    ],
    ids=["off", "absolute", "full"],
)
def test_what_is_off_is_not_asked(tmp_path, config):
    assert plan_tree(with_config(tmp_path, towers(), config), 3).layers


def test_a_target_answers_too(tmp_path):
    checkpoint = with_config(tmp_path, BELOW, {"rope_theta": 1.0})
    wanted = {"a": jax.eval_shape(lambda: convert_tree(LAYER, 3))}
    assert plan_tree(checkpoint, 3, target=wanted).layers


UNCLEAR = {
    "sections_differ": {"a_config": {"heads": 3}, "b_config": {"heads": 3}},
    "nested_differ": {"a": {"heads": 3}, "b": {"heads": 2}},
    # A section leaves out what is the default of its kind.
    "default_left_out": {"num_attention_heads": 3, "text_config": {}},
    "one_section": {"vision_config": {"num_attention_heads": 3}},
    "two_numbers": {"num_heads": 3, "n_heads": 2},
    "list": {"num_heads": [3, 3]},
    "nothing": {"hidden_size": 6},
}


@pytest.mark.parametrize("config", UNCLEAR.values(), ids=UNCLEAR)
def test_an_unclear_config_json_is_not_guessed_from(tmp_path, config):
    checkpoint = with_config(tmp_path, towers(), config)
    with pytest.raises(ValueError) as raised:
        plan_tree(checkpoint)
    assert "(config.json says " in str(raised.value)
    assert "'text_model.layers.0.attn' (embed_dim 6)" in str(raised.value)
