"""Models from PyPI with PyTorch's layer inside: found, converted and compared.

Their weights are random; nothing is downloaded.
"""

import dataclasses
import functools
import shutil

import jax
import pytest
import torch
import transformers

from flax_mha import MultiheadAttention, convert
from tests.parity._live import assert_same, to_array

SMALL = dict(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
)
SWIN = dict(
    embed_dim=4,
    depths=[1, 1, 1, 1],
    num_heads=[1, 1, 2, 2],
    window_size=2,
    image_size=32,
    out_features=["stage1", "stage2", "stage3", "stage4"],
)
DECODER = dict(
    encoder_layers=1,
    decoder_layers=3,
    num_attention_heads=4,
    encoder_feedforward_dim=8,
    dim_feedforward=8,
)
EMBEDDINGS = {r".*(token|position)_embedding": "embedding"}
SWIN_ATTENTION = {
    r".*\.self\.(query|key|value)": "kernel",
    r".*\.self\..*bias(_table)?": "weight",
}
QUERIES = {
    r".*downsample\.reduction": "kernel",
    r".*(level_embed|queries_\w+)": "embedding",
}


def siglip():
    config = transformers.SiglipConfig(
        text_config=SMALL
        | dict(
            vocab_size=16, max_position_embeddings=4, bos_token_id=0, eos_token_id=1
        ),
        vision_config=SMALL | dict(num_attention_heads=4, image_size=8, patch_size=4),
    )
    return transformers.SiglipModel(config), dict(
        input_ids=torch.arange(4)[None], pixel_values=torch.randn(1, 3, 8, 8)
    )


def siglip2():
    config = transformers.Siglip2VisionConfig(**SMALL, num_patches=4, patch_size=4)
    return transformers.Siglip2VisionModel(config), dict(
        pixel_values=torch.randn(2, 4, 48),
        pixel_attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        spatial_shapes=torch.tensor([[1, 3], [2, 2]]),
    )


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        num_queries=3,
        **DECODER,
    )
    pixels = torch.randn(1, 3, 64, 64)
    return transformers.Mask2FormerModel(config), dict(pixel_values=pixels)


def oneformer():
    config = transformers.OneFormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN),
        conv_dim=128,
        mask_dim=128,
        hidden_dim=128,
        num_queries=5,
        text_encoder_width=128,  # 64 for each head
        text_encoder_context_length=6,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=20,
        text_encoder_n_ctx=2,
        task_seq_len=6,
        query_dec_layers=1,
        is_training=True,
        **DECODER,
    )
    return transformers.OneFormerModel(config), dict(
        pixel_values=torch.randn(1, 3, 64, 64),
        task_inputs=torch.arange(6.0)[None],
        text_inputs=torch.arange(18).reshape(1, 3, 6),
    )


# How it is built, its heads (None: config.json says it), and what shapes do not tell.
CLIENTS = {
    "siglip": (siglip, None, EMBEDDINGS),
    "siglip2": (siglip2, None, EMBEDDINGS),
    "mask2former": (mask2former, 4, QUERIES | SWIN_ATTENTION),
    "oneformer": (
        oneformer,
        {r"text_mapper\..*": 2, ".*": 4},
        QUERIES
        | SWIN_ATTENTION
        | EMBEDDINGS
        | {r"text_mapper\.prompt_ctx": "embedding"},
    ),
}


@dataclasses.dataclass
class Client:
    """A model that ran once, and what became of its checkpoint."""

    model: torch.nn.Module
    calls: list  # (name, module, arguments by name, result) of each attention layer
    checkpoint: convert.Checkpoint
    conversion: convert.Conversion
    params: dict


@pytest.fixture(scope="module", params=CLIENTS.values(), ids=CLIENTS)
def client(request, tmp_path_factory):
    make, num_heads, kinds = request.param
    torch.manual_seed(0)
    model, inputs = make()
    model = model.double().eval()
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            record_calls(name, module, calls)
    with torch.no_grad():
        model(
            **{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        )
    folder = tmp_path_factory.mktemp("client")
    model.save_pretrained(folder)
    checkpoint = convert.read_state_dict(folder)
    conversion = convert.plan_tree(checkpoint, num_heads, kinds=kinds)
    return Client(model, calls, checkpoint, conversion, conversion.params(checkpoint))


def record_calls(name, module, calls):
    def record(module, args, kwargs, result):
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        calls.append((name, module, named, result))

    module.register_forward_hook(record, with_kwargs=True)


def torch_layers(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.MultiheadAttention)
    }


def test_every_torch_layer_is_found_with_its_number_of_heads(client):
    found = {
        layer.prefix
        for layer in convert.find_layers(client.checkpoint)
        if layer.family == "torch"
    }
    modules = torch_layers(client.model)
    assert found == modules.keys() and modules
    heads = {layer.prefix: layer.num_heads for layer in client.conversion.layers}
    for name, module in modules.items():
        assert heads[name] == module.num_heads


def test_each_layer_computes_what_it_did_inside_the_model(client):
    assert {name for name, *_ in client.calls} == torch_layers(client.model).keys()
    places = {layer.prefix: layer for layer in client.conversion.layers}
    for name, module, arguments, (output, weights) in client.calls:
        ours = MultiheadAttention(
            module.embed_dim, places[name].num_heads, batch_first=module.batch_first
        )
        params = client.params
        for part in places[name].path.split("/"):
            params = params[part]
        arrays = {argument: given(value) for argument, value in arguments.items()}
        run = jax.jit(functools.partial(ours.apply, **arrays))
        got, got_weights = run({"params": params})
        assert_same(got, to_array(output), name)
        assert_same(got_weights, to_array(weights), name)


def given(value):
    return value.numpy() if isinstance(value, torch.Tensor) else value


def test_all_layers_verify_also_those_of_separate_linears(client):
    reports = convert.verify(
        client.checkpoint, client.params, conversion=client.conversion
    )
    assert len(reports) == len(client.conversion.layers) >= len(client.calls)
    assert all(report.finite and report.torch_error < 1e-12 for report in reports)


def test_its_own_from_pretrained_takes_what_comes_back(client, tmp_path):
    folder = tmp_path / "model"
    state_dict = client.conversion.state_dict(client.params)
    convert.save_safetensors(folder, state_dict, max_file_size=10_000)
    assert (folder / "model.safetensors.index.json").exists()
    shutil.copy(client.checkpoint.path / "config.json", folder)
    loaded, info = type(client.model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    want = client.model.state_dict()
    assert loaded.state_dict().keys() == want.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == want[name].dtype and torch.equal(tensor, want[name])
