"""What is told of a wrong call with a `RaggedArray`."""

import numpy as np
import pytest

from flax_mha import RaggedArray, functional
from tests.ragged.test_attention import EMBED, lay, module

X, DENSE = lay([5, 3], EMBED), np.ones((2, 8, EMBED))


@pytest.mark.parametrize(
    "args, options, error, text",
    [
        (
            (X, X, DENSE),
            {},
            TypeError,
            "value must be a RaggedArray, as the others are",
        ),
        (
            (DENSE, X, X),
            {},
            TypeError,
            "query must be a RaggedArray, as the others are",
        ),
        (
            (X, X[:1], X[:1]),
            {},
            ValueError,
            "query and key must have as many elements, got 2 and 1.",
        ),
        (
            (RaggedArray.stack([X, X]),) * 3,
            {},
            ValueError,
            "query must be one RaggedArray, got several, stacked to shape (2,)",
        ),
        (
            (DENSE, DENSE, DENSE),
            dict(key_padding_mask=X),
            TypeError,
            "key_padding_mask must be a JAX or NumPy array, got flax_mha.RaggedArray.",
        ),
        ((X, X, X[:1]), {}, ValueError, "value must have batch = 2, as key; got 1."),
        (
            (X, X, X),
            dict(key_padding_mask=np.zeros((2, 8), bool)),
            TypeError,
            "key_padding_mask must be None if key is a RaggedArray, which has no",
        ),
        (
            (X, X, X),
            dict(key_padding_mask=X),
            ValueError,
            "key_padding_mask must have values of shape (capacity,) = (11,)",
        ),
        (
            (X, X, X),
            dict(attn_mask=np.zeros((5, 5), bool)),
            ValueError,
            "attn_mask must have the last axes (query.max_len, key.max_len) = (8, 8)",
        ),
        (
            (X, X, X),
            dict(attn_mask=X),
            TypeError,
            "attn_mask must be an array of shape",
        ),
        (
            (lay([5], 2, 3),) * 3,
            {},
            ValueError,
            "query must have values of shape (capacity, features), got (8, 2, 3).",
        ),
        (
            (lay([5], 7),) * 3,
            {},
            ValueError,
            "query must have embed_dim = 8 as its last",
        ),
    ],
)
def test_wrong_calls_are_told(args, options, error, text):
    with pytest.raises(error) as raised:
        module()(*args, **options)
    assert text in str(raised.value)


def test_what_only_some_calls_may_not_is_told():
    mask = np.zeros((X.max_len, X.max_len), bool)
    with pytest.raises(ValueError, match=r"^attn_mask must be None if is_causal=True"):
        module(add_zero_attn=True)(X, X, X, None, False, mask, is_causal=True)
    with pytest.raises(
        ValueError, match=r"^query must have values of shape \(capacity, h"
    ):
        functional.scaled_dot_product_attention(X, X, X)
