"""The modules of libraries that store attention in ways of their own.

Those of libraries that need more than a test can have are written out in a few lines,
in the names and the layout that the library publishes; `LAYOUTS` has them.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import transformers
from diffusers.models.attention_processor import Attention
from torch.nn import functional as F
from transformers.models.albert import modeling_albert
from transformers.models.bark import modeling_bark
from transformers.models.bert import modeling_bert
from transformers.models.bloom import modeling_bloom
from transformers.models.deberta_v2 import modeling_deberta_v2
from transformers.models.distilbert import modeling_distilbert
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt_bigcode import modeling_gpt_bigcode
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.mpnet import modeling_mpnet
from transformers.models.mpt import modeling_mpt
from transformers.models.openai import modeling_openai
from transformers.models.prophetnet import modeling_prophetnet
from transformers.models.vit import modeling_vit
from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert
from transformers.models.whisper import modeling_whisper

from tests.parity.convert.test_find import Timm

WIDTH, HEADS, LENGTH = 6, 3, 5
CAUSAL = ~np.tri(LENGTH, dtype=bool)
SMALL = dict(
    hidden_size=WIDTH,
    num_attention_heads=HEADS,
    num_hidden_layers=1,
    intermediate_size=8,
    vocab_size=11,
    attn_implementation="sdpa",
)
PLAIN = SMALL | {"attn_implementation": "eager"}
GPT = dict(n_embd=WIDTH, n_head=HEADS, n_positions=LENGTH, attn_implementation="sdpa")


@dataclasses.dataclass
class Case:
    """A module, and how to call it and ours with the same.

    Attributes:
        family: As which it is found.
        make: Makes the module.
        call: Calls it with (batch, length, features) of queries and of keys.
        prefix: Of the attention in the module.
        kdim: Features of keys and values.
        mask: That ours is given for what its code does.
        exact: Whether it computes in float64 throughout.
        said: What has to be said of it in kinds.
        config: What config.json has to say.
    """

    family: str
    make: Callable[[], torch.nn.Module]
    call: Callable
    prefix: str = ""
    kdim: int = WIDTH
    mask: np.ndarray | None = None
    exact: bool = True
    said: str | None = None
    config: dict | None = None


class Layout(torch.nn.Module):
    """Attention by published names of its linears: one of each, or all three in one."""

    def __init__(self, projections, out, *, no_bias=(), masked=False, norm=False):
        super().__init__()
        self.linears = *projections, out
        self.masked = masked
        rows = 3 * WIDTH // len(projections)
        for name in self.linears:
            features = WIDTH if name == out else rows
            bias = name not in no_bias
            place(self, name, torch.nn.Linear(WIDTH, features, bias))
        if norm:  # before the attention: ours is given what it gives
            place(self, "norm", torch.nn.LayerNorm(WIDTH))

    def forward(self, x):
        *projections, out = [self.get_submodule(name) for name in self.linears]
        qkv = torch.cat([linear(x) for linear in projections], -1)
        q, k, v = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)
        )
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=self.masked)
        return out(heads.transpose(1, 2).flatten(2))


def place(module, name, child):
    """Puts a child at a dotted name."""
    *above, last = name.split(".")
    for part in above:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    module.add_module(last, child)


def layout(*args, **kwargs):
    return lambda: Layout(*args, **kwargs)


def alone(module, query, _):
    return module(query)


def first(module, query, _):
    return module(query)[0]


def before_the_norm(name):
    """Returns a call that takes what a linear in the module gave."""

    def call(module, query, _, *more):
        outputs = []
        linear = module.get_submodule(name)
        hook = linear.register_forward_hook(lambda *args: outputs.append(args[-1]))
        module(query, *more)
        hook.remove()
        return outputs[0]

    return call


def bert():
    return modeling_bert.BertAttention(transformers.BertConfig(**SMALL))


def gpt2(module, query, _):
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    return module(query, attention_mask=mask.to(query.dtype))[0]


def neox():
    config = transformers.GPTNeoXConfig(**SMALL, rotary_pct=1.0)
    return modeling_gpt_neox.GPTNeoXAttention(config, layer_idx=0)


def without_rotation(module, query, _):
    """All tokens at position 0, where rotary positions rotate by nothing."""
    size = WIDTH // HEADS
    still = torch.ones(1, LENGTH, size), torch.zeros(1, LENGTH, size)
    return module(query, attention_mask=None, position_embeddings=still)[0]


def bloom():
    config = transformers.BloomConfig(hidden_size=WIDTH, n_head=HEADS)
    return modeling_bloom.BloomAttention(config, layer_idx=0)


def alibi(batch):
    ones = torch.ones(batch, LENGTH)
    return modeling_bloom.build_alibi_tensor(ones, HEADS, torch.float64)


def with_alibi(module, query, _):
    bias = alibi(len(query)).expand(-1, LENGTH, -1)
    return module(query, torch.zeros_like(query), bias, None)[0]


def mpt():
    config = transformers.MptConfig(d_model=WIDTH, n_heads=HEADS, max_seq_len=LENGTH)
    return modeling_mpt.MptAttention(config, layer_idx=0)


def whisper():
    config = transformers.WhisperConfig(attn_implementation="sdpa")
    return modeling_whisper.WhisperAttention(WIDTH, HEADS, config=config)


BIG_CODE = dict(multi_query=False, attention_softmax_in_fp32=False)


def big_code():
    config = transformers.GPTBigCodeConfig(**GPT, **BIG_CODE)
    return modeling_gpt_bigcode.GPTBigCodeAttention(config, layer_idx=0)


def bark():
    config = modeling_bark.BarkSubModelConfig(hidden_size=WIDTH, num_heads=HEADS)
    return modeling_bark.BarkSelfAttention(config)


def prophetnet():
    config = transformers.ProphetNetConfig(hidden_size=WIDTH)
    return modeling_prophetnet.ProphetNetAttention(config, HEADS)


def deberta(module, query, _):
    everything = torch.ones(len(query), 1, LENGTH, LENGTH, dtype=torch.bool)
    return before_the_norm("output.dense")(module, query, None, everything)


def espnet():
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, position_embeddings_type=None
    )
    return modeling_wav2vec2_bert.Wav2Vec2BertSelfAttention(config)


def vit(**options):
    return lambda: modeling_vit.ViTAttention(
        transformers.ViTConfig(**SMALL | {"vocab_size": None}, **options)
    )


def diffusers(cross=None, **options):
    sizes = dict(heads=HEADS, dim_head=WIDTH // HEADS, cross_attention_dim=cross)
    return lambda: Attention(WIDTH, **sizes, **options)


def after_the_norm(module, query, _):
    module.group_norm.forward = lambda x: x  # ours is given what it gives
    return module(query)


def both(module, query, key):
    return module(query, encoder_hidden_states=key)


CASES = {
    "vit_in_memory": Case("o_proj", vit(), first),
    "vit_without_qkv_bias": Case("o_proj", vit(qkv_bias=False), first),
    "bert": Case("bert", bert, before_the_norm("output.dense")),
    "albert": Case(
        "albert",
        lambda: modeling_albert.AlbertAttention(transformers.AlbertConfig(**SMALL)),
        before_the_norm("dense"),
    ),
    "distilbert": Case(
        "distilbert",
        lambda: modeling_distilbert.DistilBertSelfAttention(
            transformers.DistilBertConfig(
                dim=WIDTH, n_heads=HEADS, attn_implementation="sdpa"
            )
        ),
        first,
    ),
    "whisper_in_transformers": Case("linears", whisper, first),
    "gpt2": Case(
        "gpt2",
        lambda: modeling_gpt2.GPT2Attention(transformers.GPT2Config(**GPT)),
        gpt2,
        mask=CAUSAL,
    ),
    "gpt": Case(
        "gpt2",
        lambda: modeling_openai.Attention(
            WIDTH, LENGTH, transformers.OpenAIGPTConfig(**GPT), scale=True
        ),
        first,
        mask=CAUSAL,
    ),
    "bark": Case("bark", bark, first),
    "gpt_bigcode": Case(
        "gpt_bigcode", big_code, gpt2, mask=CAUSAL, config={"multi_query": False}
    ),
    "mpnet": Case(
        "t5",
        lambda: modeling_mpnet.MPNetSelfAttention(transformers.MPNetConfig(**SMALL)),
        first,
    ),
    "prophetnet": Case("prophetnet", prophetnet, first),
    "deberta": Case(
        "deberta",
        lambda: modeling_deberta_v2.DebertaV2Attention(
            transformers.DebertaV2Config(**SMALL)
        ),
        deberta,
        exact=False,
        said="attention",
    ),
    "espnet": Case("espnet", espnet, first),
    "diffusers": Case("diffusers", diffusers(), alone),
    "diffusers_with_norm": Case(
        "diffusers", diffusers(bias=True, norm_num_groups=2), after_the_norm
    ),
    "diffusers_cross": Case("diffusers", diffusers(cross=4), both, kdim=4),
    "gpt_neox": Case("gpt_neox", neox, without_rotation, mask=CAUSAL, said="attention"),
    "bloom": Case(
        "gpt_neox",
        bloom,
        with_alibi,
        mask=alibi(2).expand(-1, LENGTH, -1).numpy(),
        exact=False,
        said="attention",
    ),
    "mpt": Case(
        "flash_attn",
        mpt,
        lambda module, query, _: module(query, None)[0],
        exact=False,
        said="attention",
    ),
}
LAYOUTS = {
    "timm": Case("timm", lambda: Timm(), alone),
    "timm_without_qkv_bias": Case(
        "timm", layout(["qkv"], "proj", no_bias=["qkv"]), alone
    ),
    "openai_whisper": Case(
        "whisper", layout(["query", "key", "value"], "out", no_bias=["key"]), alone
    ),
    "vit_in_files": Case(
        "vit",
        layout([f"attention.{n}" for n in ("query", "key", "value")], "output.dense"),
        alone,
    ),
    "nanogpt": Case(
        "nanogpt", layout(["c_attn"], "c_proj", masked=True), alone, mask=CAUSAL
    ),
    "vit_pytorch": Case(
        "to_qkv", layout(["to_qkv"], "to_out.0", no_bias=["to_qkv"], norm=True), alone
    ),
    "flash_attn": Case(
        "flash_attn", layout(["Wqkv"], "out_proj"), alone, said="attention"
    ),
    "opacus": Case("opacus", layout([f"{n}linear" for n in "qkv"], "out_proj"), alone),
    "w_q": Case("w_q", layout([f"W_{n}" for n in "qkv"], "W_o"), alone),
    "q_linear": Case("q_linear", layout([f"{n}_linear" for n in "qkv"], "out"), alone),
}
EVERY = CASES | LAYOUTS
