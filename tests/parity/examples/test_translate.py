"""examples/translate.py decodes what PyTorch does, token for token."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from examples import numbers_in_words, train_translate_in_torch, translate
from tests.defaults import jax_defaults

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


@pytest.fixture(scope="module")
def theirs():
    model = train_translate_in_torch.Translator().eval()
    arrays = load_file(translate.CHECKPOINT)
    model.load_state_dict({n: torch.from_numpy(a) for n, a in arrays.items()})
    return model


@pytest.fixture(scope="module")
def numbers():
    _, _, src, tgt = numbers_in_words.load_split()
    return src[:100], tgt[:100]


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax_defaults():
        yield


def test_greedy_decoding_is_pytorchs_and_right(theirs, numbers):
    src, tgt = numbers
    want = train_translate_in_torch.translate(theirs, torch.from_numpy(src).long())
    got = translate.translate(translate.load(), src)
    np.testing.assert_array_equal(got, want)
    assert np.mean((got == tgt).all(axis=1)) >= 0.98


def test_a_beam_is_pytorchs(theirs, numbers):
    src = numbers[0][:20]
    want = train_translate_in_torch.beam_search(
        theirs, torch.from_numpy(src).long(), beams=4
    )
    got = translate.beam_search(translate.load(), src, beams=4)
    np.testing.assert_array_equal(got, want)


def test_the_words_are_french_and_english():
    for number, french, english in (
        (0, "zéro", "zero"),
        (71, "soixante et onze", "seventy-one"),
        (80, "quatre-vingts", "eighty"),
        (1997, "mille neuf cent quatre-vingt-dix-sept", None),
        (2300, "deux mille trois cents", "two thousand three hundred"),
    ):
        assert numbers_in_words.french(number) == french
        assert english is None or numbers_in_words.english(number) == english
    tokens = numbers_in_words.encode(["zéro", "vingt et un"])
    assert numbers_in_words.decode(tokens) == ["zéro", "vingt et un"]
