"""Sizes of the blocks of `mosaic`, by the schedules of the compiler for v5e and v6e."""

import dataclasses

import jax.numpy as jnp

from flax_mha._call import Call
from flax_mha._masks import is_padding

# Keys of a head in the vector memory where no loop visits them, in the backward pass
# without masks: more take as long, and longer to compile.
_MOST_KEYS = 4096
_MASK_KEYS = 2048  # of these in a block of a mask's gradient
_MOST_MIB = 36  # of the vector memory, beside what is computed
_TILE = 512  # rows of a block, and columns of a chunk
# Rows of a block in the forward pass, if there is no dropout and no mask but of keys,
# or causal: 512 take up to an eighth more cycles there.
_TALL = 1024
# Keys that are skipped together.
_SKIPPED = 1024
# Logits of a group of chunks, where all are visited: a loop over several groups takes 2
# to 3 % more cycles than what it replaces, but half as long to compile.
_GROUP = 2**20
_SHORT = 640  # tokens of sequences that are read as they lie, several heads a step
_MOST_SHORT_MIB = 28  # of the vector memory for them, beside what is computed
# Logits of these heads together, as each is compiled for itself: those of a block of
# rows and a span of other sequences.
_MOST_LOGITS = _TILE * _MOST_KEYS


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Where the blocks of a call begin."""

    tgt: int  # with padding
    rows: int  # of a block, a multiple of 128
    columns: int  # of a chunk, a multiple of 128; of 16 if heads are flat
    chunks: int  # of a span
    spans: int
    skips: bool  # some chunk may be hidden from a whole block
    heads: int = 0  # of a step that reads flat arrays, (batch, length, heads * dim)

    @classmethod
    def of(cls, call: Call, *, is_forward: bool) -> "Sizes":
        _, _, tgt_len, src_len = call.logits
        if heads := _heads_of_step(call):
            tgt = padded(128, tgt_len)
            return cls(tgt, tgt, padded(16, src_len), 1, 1, False, heads)
        is_tall = is_forward and _tile(call) == _TILE and call.dropout is None
        is_tall &= all(map(is_padding, call.mask.arrays))
        rows = part(tgt_len, _TALL if is_tall else _tile(call))
        columns = part(src_len, _tile(call))
        chunks = -(-src_len // columns)
        most, skips = _most_keys(call, is_forward), _skips(call)
        if not is_forward and not skips:
            most = min(most, _MOST_KEYS)
        spans = _spans(chunks, most // columns)
        tgt = padded(rows, tgt_len)
        return cls(tgt, rows, columns, -(-chunks // spans), spans, skips)

    @classmethod
    def of_masks(cls, call: Call) -> "Sizes":
        """Returns those of the pass for a mask's gradient, which has whole blocks."""
        columns = part(call.logits[3], _tile(call))
        chunks = -(-call.logits[3] // columns)
        spans = -(-chunks // max(1, _MASK_KEYS // columns))
        rows = part(call.logits[2], _tile(call))
        tgt = padded(rows, call.logits[2])
        return cls(tgt, rows, columns, -(-chunks // spans), spans, _skips(call))

    @property
    def blocks(self) -> int:
        return self.tgt // self.rows

    @property
    def group(self) -> int:
        """How many chunks are compiled together, as what a loop does."""
        size = _SKIPPED if self.skips else _GROUP // self.rows
        # Two or more: what is begun is not where the others are read.
        return max(2, size // self.columns)

    @property
    def span(self) -> int:
        """How many keys the vector memory holds at a time."""
        return self.chunks * self.columns

    @property
    def src(self) -> int:
        """How many keys there are, with padding."""
        return self.spans * self.span


def _skips(call: Call) -> bool:
    mask = call.mask
    is_short = mask.is_causal or mask.tgt_lens is not None
    return is_short or any(map(is_padding, mask.arrays))


def _heads_of_step(call: Call) -> int:
    """Returns how many heads are read at once of flat arrays, or 0."""
    _, heads, tgt_len, src_len = call.logits
    dims = call.query.shape[3], call.value.shape[3]
    length = padded(128, max(tgt_len, src_len))
    if length > _SHORT or any(dim % 16 for dim in dims):
        return 0
    size = call.query.dtype.itemsize
    of_head = length * sum(dims) * (8 * size + 16)
    shared = 6 * 4 * length**2 + 2 * 4 * 128 * length * (call.dropout is not None)
    for x in call.mask.arrays:
        of_mask = 2 * 4 * length * (128 if is_padding(x) else length)
        if x.shape[1] == 1:
            shared += of_mask
        else:
            of_head += of_mask
    for group in range(min(heads, _MOST_LOGITS // length**2), 0, -1):
        is_whole = group == heads or not any(group * dim % 128 for dim in dims)
        if heads % group == 0 and is_whole:
            if shared + group * of_head <= _MOST_SHORT_MIB * 2**20:
                return group
    return 0


def _tile(call: Call) -> int:
    return _TILE if call.query.dtype == jnp.bfloat16 else 256


def _most_keys(call: Call, is_forward: bool) -> int:
    """Returns how many keys of a head the vector memory holds."""
    dims = call.query.shape[3], call.value.shape[3]
    # Everything is there twice: the next step's is fetched meanwhile.
    size = 2 * call.query.dtype.itemsize * sum(padded(128, dim) for dim in dims)
    if not is_forward:
        size += 2 * 4 * sum(dims)  # gradients
    of_keys, of_rows = [], []
    for x in call.mask.arrays:
        (of_keys if is_padding(x) else of_rows).append(x.dtype.itemsize)
    size += 2 * _tile(call) * sum(of_rows) + 2 * 4 * 128 * bool(of_keys)
    size += 2 * 4 * 128 * (call.dropout is not None)
    return _MOST_MIB * 2**20 // size


def _spans(chunks: int, most: int) -> int:
    """Returns how many spans of at most so many chunks there are."""
    fewest = -(-chunks // most)
    # If they are alike, keys need no padding: a copy, and one of their gradients.
    alike = (n for n in range(fewest, 2 * fewest) if chunks % n == 0)
    return next(alike, fewest)


def part(length: int, most: int) -> int:
    """Returns the size of as few parts as `most` allows, all but equal."""
    parts = -(-length // most)
    return padded(128, -(-length // parts))


def padded(multiple: int, length: int) -> int:
    return -(-length // multiple) * multiple
