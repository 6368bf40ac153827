"""The ways that libraries name and store the weights of an attention layer: a table.

To add a library is to add an entry; `tests/parity/convert/test_families.py` holds each
against the library's own module.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """How one kind of library stores what `torch.nn.MultiheadAttention` computes.

    Attributes:
        projections: Its modules of queries, keys and values; or the one that has the
            rows of all three; or none, as PyTorch's own have no modules.
        out: Its module of the output.
        transposed: Weights are (in, out), as those of GPT-2's Conv1D.
        by_head: The one projection has, head after head, the rows of that head's
            queries, keys and values.
        beside: Names below the layer's of parameters that are used before or after it,
            and stay parameters of their own.
        buffers: Names of tensors without which it computes the same, given the masks.
        other_output: Its output may have other features than its input.
        sure: The first projection's name says that this is attention.
        unseen: What such layers mostly compute besides, which no tensor shows.
        unseen_with: Of those with which biases: of "in", "out", "both" or "none".
        told: What config.json says of such layers; nothing else tells them.
    """

    projections: tuple[str, ...]
    out: str
    transposed: bool = False
    by_head: bool = False
    beside: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    other_output: bool = False
    sure: bool = True
    unseen: str = ""
    unseen_with: tuple[str, ...] = ("in", "out", "both", "none")
    told: str = ""

    def names(self, param: str) -> tuple[str, ...]:
        """Returns its names for one of PyTorch's parameters.

        Several are the rows of one matrix, below each other.
        """
        if param.startswith("out_proj."):
            return (param.replace("out_proj", self.out),)
        if self.projections and param.startswith("in_proj_"):
            kind = param.removeprefix("in_proj_")
            return tuple(f"{module}.{kind}" for module in self.projections)
        if len(self.projections) == 3 and param.endswith("_proj_weight"):
            return (f"{self.projections['qkv'.index(param[0])]}.weight",)
        return (param,)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names that a layer of it has, all of them; none for PyTorch's own."""
        if not self.projections:
            return ()
        return tuple(f"{module}.weight" for module in (*self.projections, self.out))

    @property
    def signs(self) -> tuple[str, ...]:
        """Names of which each says that such a layer, or the like of it, is there."""
        if not self.projections:
            return ("in_proj_weight", "q_proj_weight", "in_proj_bias")
        return self.weights[:1]


_LINEARS = ("q_proj", "k_proj", "v_proj")
_WORDS = ("query", "key", "value")
_ROTARY = "positions (rotary, as in most language models by these names)"
_NORM = ("norm.weight", "norm.bias")
_GROUP_NORM = ("group_norm.weight", "group_norm.bias")
_BERT_NORM = ("LayerNorm.weight", "LayerNorm.bias")
_CAUSAL = ("bias", "masked_bias")  # masks that forbid later keys
_ANGLES = ("rotary_emb.inv_freq",)  # of the positions that are unseen anyway

FAMILIES: dict[str, Family] = {
    "torch": Family((), "out_proj"),
    # fairseq, ESM, Whisper, CLIP and others in Hugging Face's files
    "linears": Family(
        _LINEARS,
        "out_proj",
        unseen="logits that are not scaled (GPT-Neo's), or positions (GPT-J's)",
        unseen_with=("out", "none"),
    ),
    # transformers 5 in memory: ViT, DINOv2, DETR and others
    "o_proj": Family(_LINEARS, "o_proj", unseen=_ROTARY, unseen_with=("in", "none")),
    # CLIP's AttentionPool2d
    "clip_pool": Family(
        _LINEARS, "c_proj", beside=("positional_embedding",), other_output=True
    ),
    # timm; a mask of biases, as DINOv3 has it, is one of the keys' alone
    "timm": Family(("qkv",), "proj", buffers=("qkv.bias_mask",)),
    # BERT, RoBERTa, ELECTRA; its norm is after the attention
    "bert": Family(
        tuple(f"self.{word}" for word in _WORDS),
        "output.dense",
        beside=tuple(f"output.{name}" for name in _BERT_NORM),
        sure=False,
    ),
    # ViT, DeiT, DINOv2 in Hugging Face's files
    "vit": Family(
        tuple(f"attention.{word}" for word in _WORDS), "output.dense", sure=False
    ),
    # openai-whisper
    "whisper": Family(_WORDS, "out", sure=False),
    "albert": Family(_WORDS, "dense", beside=_BERT_NORM, sure=False),
    "distilbert": Family(("q_lin", "k_lin", "v_lin"), "out_lin"),
    # GPT-2, GPT, ImageGPT in Hugging Face's files; and nanoGPT
    "gpt2": Family(("c_attn",), "c_proj", transposed=True, buffers=_CAUSAL),
    "nanogpt": Family(
        ("c_attn",), "c_proj", buffers=_CAUSAL, unseen=_ROTARY, unseen_with=("in",)
    ),
    "bark": Family(("att_proj",), "out_proj", buffers=_CAUSAL),
    # GPTBigCode with as many heads of keys as of queries
    "gpt_bigcode": Family(
        ("c_attn",), "c_proj", by_head=True, buffers=_CAUSAL, told="multi_query: False"
    ),
    # diffusers' Attention; its norm is before the attention
    "diffusers": Family(("to_q", "to_k", "to_v"), "to_out.0", beside=_GROUP_NORM),
    # vit-pytorch; likewise
    "to_qkv": Family(("to_qkv",), "to_out.0", beside=_NORM),
    # flash-attn's MHA, MPT
    "flash_attn": Family(
        ("Wqkv",),
        "out_proj",
        buffers=_ANGLES,
        unseen="positions (rotary or ALiBi, as most by these names)",
    ),
    # GPT-NeoX, BLOOM, Falcon
    "gpt_neox": Family(
        ("query_key_value",),
        "dense",
        by_head=True,
        buffers=_CAUSAL + _ANGLES,
        unseen="positions (GPT-NeoX's are rotary, BLOOM's are ALiBi: an attn_mask)",
    ),
    # T5 without biases, MPNet with; theirs by position is beside the layers
    "t5": Family(
        ("q", "k", "v"),
        "o",
        sure=False,
        unseen="logits that are not scaled, and positions (T5's)",
        unseen_with=("none",),
    ),
    "prophetnet": Family(
        tuple(f"{word}_proj" for word in _WORDS), "out_proj", sure=False
    ),
    "deberta": Family(
        tuple(f"self.{word}_proj" for word in _WORDS),
        "output.dense",
        beside=tuple(f"output.{name}" for name in _BERT_NORM),
        sure=False,
        unseen="positions (DeBERTa's are relative)",
    ),
    # ESPnet, WeNet, Wav2Vec2-BERT
    "espnet": Family(("linear_q", "linear_k", "linear_v"), "linear_out"),
    # opacus' DPMultiheadAttention
    "opacus": Family(("qlinear", "klinear", "vlinear"), "out_proj"),
    # tutorials
    "q_linear": Family(("q_linear", "k_linear", "v_linear"), "out"),
    "w_q": Family(("W_q", "W_k", "W_v"), "W_o"),
}

# Names that only attention of other kinds has.
OTHER_KINDS = {
    "query.kernel": "Flax's MultiHeadDotProductAttention, which `from_stock` takes",
    "qkv_proj.weight": (
        "layers whose rows have an order of their own (CodeGen's), or that have "
        "rotary positions (Phi-3's)"
    ),
    "self.q_bias": "DeBERTa's attention, which has relative positions",
    "kv_b_proj.weight": "DeepSeek's attention, of which keys and values are compressed",
    "q_proj.linear.weight": "layers that wrap their Linears and mostly have positions",
}

# What else may be below a layer: {regular expression of the name: what it is}.
EXTRAS = {
    r"(.*\.)?(lora_\w+|base_layer)\..*": (
        "LoRA that is not merged: merge_and_unload() in peft, and save again"
    ),
    r".*(rel\w*_pos|rpb|position_bias|relative|distance_embedding|rel_attn"
    r"|pos_bias_|linear_pos).*": (
        "a bias by position, which MultiheadAttention has only as an attn_mask"
    ),
    r".*(rot|rope|inv_freq|freqs).*": (
        "rotary positions, which MultiheadAttention has not"
    ),
    r".*((q|k|query|key)_?(norm|ln|layernorm)|(norm|ln)_(q|k|added_q|added_k))\b.*": (
        "norms of queries and keys, which MultiheadAttention has not"
    ),
    r".*gat(e|ing).*": "a gate, which MultiheadAttention has not",
    r".*(norm|ln)\d?\.(weight|bias|scale)": (
        "a norm inside of the layer, which MultiheadAttention has not"
    ),
    r"(.*\.)?(bias_mask|mask)": "a mask of its parameters: apply it to them first",
    r"(.*\.)?(scale|zero_point|_packed_params.*|\w*_scale|\w*absmax|\w*quant\w*)": (
        "quantized: dequantize it in PyTorch first"
    ),
    r"(.*\.)?(parametrizations\..*|\w+_(orig|mask|g|v|u))": (
        "parametrized: save it, and `read_state_dict` folds what it can"
    ),
    r"(q_attn\..*|to_kv\..*|kv\..*|add_\w+_proj\..*|seq_bias_\w\..*)": (
        "more projections than MultiheadAttention has"
    ),
}
