"""`RaggedArray` itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import RaggedArray


def ragged(*lengths, features=(2,), **options):
    """Tokens are numbered, from 0 on, in each feature."""
    total = sum(lengths)
    values = np.arange(total, dtype=float).reshape(-1, *[1] * len(features))
    values = np.broadcast_to(values, (total, *features))
    parts = np.split(values, np.cumsum(lengths)[:-1])
    return RaggedArray.from_list(parts, **options)


def first_feature(x):
    return np.asarray(x)[..., 0].tolist()


class TestFromList:
    def test_elements_come_back(self):
        lengths = (3, 0, 5)
        assert [len(x) for x in ragged(*lengths)] == list(lengths)
        np.testing.assert_array_equal(ragged(3, 2)[1][:, 0], [3, 4])
        np.testing.assert_array_equal(ragged(3, 2)[-1], ragged(3, 2)[1])

    @pytest.mark.parametrize(
        "lengths, capacity, max_len",
        [
            ((3, 2), 5, 4),
            ((17,), 18, 32),
            ((2000, 2097), 4608, 4096),
            ((4096,), 4096, 4096),
            ((0,), 1, 1),
        ],
        ids=str,
    )
    def test_sizes_are_rounded_up_to_buckets(self, lengths, capacity, max_len):
        x = ragged(*lengths)
        assert (x.capacity, x.max_len) == (capacity, max_len)

    def test_there_are_at_most_eight_capacities_for_each_doubling(self):
        capacities = {ragged(n, features=()).capacity for n in range(513, 1025)}
        assert len(capacities) == 8

    def test_under_jit(self):
        x = jax.jit(lambda a, b: RaggedArray.from_list([a, b]))(
            jnp.ones((3, 2)), jnp.zeros((1, 2))
        )
        np.testing.assert_array_equal(x.values[:, 0], [1, 1, 1, 0])

    def test_keeps_the_dtype(self):
        x = RaggedArray.from_list([np.ones(3, jnp.bfloat16)])
        assert x.dtype == x.values.dtype == jnp.bfloat16


class TestPadding:
    def test_there_and_back(self):
        x = ragged(3, 0, 5, capacity=11, max_len=6)
        padded = x.to_padded(-1)
        assert padded.shape == x.shape == (3, 6, 2)
        assert padded.ndim == x.ndim
        assert first_feature(padded) == [
            [0, 1, 2, -1, -1, -1],
            [-1] * 6,
            [3, 4, 5, 6, 7, -1],
        ]
        back = RaggedArray.from_padded(padded, np.array([3, 0, 5]), capacity=11)
        np.testing.assert_array_equal(back.offsets, x.offsets)
        np.testing.assert_array_equal(back.values[:8], x.values[:8])

    def test_true_in_the_mask_is_left_out_wherever_it_is(self):
        mask = np.array([[True, False, False], [False, True, False]])
        x = RaggedArray.from_padded(np.arange(6).reshape(2, 3), key_padding_mask=mask)
        assert [list(element) for element in x] == [[1, 2], [3, 5]]

    def test_without_lengths_all_tokens_are_kept(self):
        x = RaggedArray.from_padded(np.arange(6).reshape(2, 3))
        assert [list(element) for element in x] == [[0, 1, 2], [3, 4, 5]]

    def test_traced_lengths_fit_in_any_case(self):
        x = jax.jit(RaggedArray.from_padded)(jnp.ones((2, 3)), jnp.array([1, 2]))
        assert (x.capacity, x.max_len) == (6, 3)
        np.testing.assert_array_equal(x.values, [1, 1, 1, 0, 0, 0])

    @pytest.mark.parametrize("room", [dict(capacity=3), dict(max_len=2)])
    def test_traced_tokens_that_do_not_fit_are_nan(self, room):
        @jax.jit
        def lay(lengths):
            padded = jnp.ones((2, 3))
            return RaggedArray.from_padded(padded, lengths, **room).values

        assert not np.any(np.isnan(lay(jnp.array([1, 2]))))
        assert np.all(np.isnan(lay(jnp.array([1, 3]))))

    def test_the_gradient_of_padding_is_that_of_the_tokens(self):
        x = ragged(3, 0, 2, capacity=7)
        weights = jnp.arange(12.0).reshape(3, 4)

        def loss(values):
            padded = RaggedArray(values, x.offsets, 4).to_padded()
            return jnp.sum(padded * weights[..., None])

        gradient = jax.grad(loss)(x.values)
        np.testing.assert_array_equal(gradient[:, 0], [0, 1, 2, 8, 9, 0, 0])

    def test_no_tokens_at_all(self):
        x = ragged(0, 0, max_len=0)
        assert x.to_padded().shape == (2, 0, 2)
        assert RaggedArray.from_padded(x.to_padded()).shape == (2, 0, 2)


class TestTokens:
    def test_where_they_are(self):
        x = ragged(3, 0, 2, capacity=7)
        assert x.segment_ids.tolist() == [0, 0, 0, 2, 2, 3, 3]
        assert x.positions.tolist() == [0, 1, 2, 0, 1, 0, 0]
        assert x.is_token.tolist() == [True] * 5 + [False] * 2
        assert x.lengths.tolist() == [3, 0, 2]

    def test_neighbours_share_the_values_and_the_others_are_slack(self):
        x = jax.jit(lambda x: x[1:3])(ragged(3, 1, 2, 1))
        assert x.segment_ids.tolist() == [2, 2, 2, 0, 1, 1, 2]
        assert x.positions.tolist() == [0, 0, 0, 0, 0, 1, 0]
        assert [len(element) for element in x] == [1, 2]
        assert len(x[2:]) == len(x[1:0]) == 0

    def test_zeros_in_the_slack_if_only_tokens_are_wanted(self):
        x = ragged(3, 1).map(lambda values: values + 1)
        assert first_feature(x[1:].only_tokens().values) == [0, 0, 0, 4]

    def test_map_takes_several(self):
        x = ragged(2, 1)
        assert first_feature(x.map(jnp.add, x).values) == [0, 2, 4]


class TestWhatCannotBeRaisedIsNan:
    """What is wrong, but is found out only when a compiled program runs."""

    @pytest.mark.parametrize(
        "offsets, max_len",
        [([0, 3, 2], 5), ([0, 6, 7], 6), ([0, 4, 5], 3), ([-1, 2, 5], 5)],
    )
    def test_offsets_and_lengths_that_do_not_fit(self, offsets, max_len):
        @jax.jit
        def pad(values, offsets):
            return RaggedArray(values, offsets, max_len).to_padded()

        offsets = np.array(offsets)
        assert np.all(np.isnan(pad(np.ones((5, 2)), offsets)))
        with pytest.raises(ValueError, match=r"^(offsets|max_len) must not"):
            RaggedArray(np.ones((5, 2)), jnp.asarray(offsets), max_len)

    def test_a_map_over_other_elements(self):
        x, y = ragged(3, 1, max_len=4), ragged(2, 2, max_len=4)
        add = jax.jit(lambda x, y: x.map(jnp.add, y).values)
        assert np.all(np.isnan(add(x, y)))
        np.testing.assert_array_equal(add(x, x), 2 * x.values)


class TestPytree:
    def test_is_one_of_both_arrays(self):
        x = ragged(3, 2)
        assert len(jax.tree.leaves(x)) == 2
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(x)]
        assert [str(path[0]) for path in paths] == [".values", ".offsets"]

    def test_stacked_ones_can_be_mapped_over(self):
        parts = ragged(3, 2, max_len=4), ragged(1, 4, max_len=4)
        stacked = RaggedArray.stack(parts)
        lengths = jax.vmap(lambda x: x.to_padded()[:, 0, 0])(stacked)
        assert lengths.tolist() == [[0, 3], [0, 1]]
        assert stacked[1].lengths.tolist() == [1, 4]
        traced = jax.jit(lambda *parts: RaggedArray.stack(parts))(*parts)
        np.testing.assert_array_equal(traced.values, stacked.values)
        assert "values=float64[2, 5, 2]" in repr(stacked)

    def test_prints_what_is_known(self):
        x = ragged(3, 2, capacity=8)
        text = "features=(2,), float64, capacity=8, max_len=4)"
        assert repr(x) == f"RaggedArray(lengths=[3, 2], {text}"
        seen = []
        jax.jit(lambda x: seen.append(repr(x)))(x)
        assert seen == [f"RaggedArray(batch=2, {text}"]
        assert "lengths=[1, 1, 1, 1, 1, 1, 1, 1, ...]" in repr(ragged(*[1] * 9))
        assert "values=None" in repr(jax.tree.map(lambda _: None, x))
        gradient = jax.grad(lambda x: jnp.sum(x.values), allow_int=True)(x)
        assert "values=float64[8, 2]" in repr(gradient)

    def test_any_integers_are_offsets(self):
        x = RaggedArray(np.ones((3, 2)), np.array([0, 3], np.int64))
        assert (x.offsets.dtype, x.max_len) == (np.int32, 3)


VALUES, OFFSETS = np.ones((4, 2)), np.array([0, 3])
PADDED = np.ones((2, 3))


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: RaggedArray([1], OFFSETS), TypeError, "values must be a JAX or NumPy"),
        (lambda: RaggedArray(np.ones(()), OFFSETS), ValueError, "an axis of tokens"),
        (lambda: RaggedArray(VALUES, VALUES[0]), TypeError, "offsets must have an int"),
        (
            lambda: RaggedArray(VALUES, OFFSETS[None]),
            ValueError,
            "offsets must have shape (batch + 1,), got shape (1, 2).",
        ),
        (
            lambda: RaggedArray(VALUES, np.array([0, 3, 2])),
            ValueError,
            "offsets must not decrease, from 0 or more to the capacity = 4",
        ),
        (lambda: RaggedArray(VALUES, np.array([0, 5])), ValueError, "capacity = 4"),
        (
            lambda: RaggedArray(VALUES, np.array([1, 3])),
            ValueError,
            "offsets must begin with 0, got [1 3]. Of lengths, make them by np.cumsum(",
        ),
        (
            lambda: RaggedArray(VALUES, OFFSETS, 2),
            ValueError,
            "max_len must not be less than an element is long, got max_len=2 and",
        ),
        (lambda: RaggedArray(VALUES, OFFSETS, 3.0), TypeError, "max_len must be a Py"),
        (lambda: RaggedArray.from_list([]), ValueError, "at least one array, got none"),
        (
            lambda: RaggedArray.from_list("a"),
            TypeError,
            "arrays[0] must be a JAX or Num",
        ),
        (
            lambda: RaggedArray.stack([]),
            ValueError,
            "at least one RaggedArray, got none",
        ),
        (
            lambda: RaggedArray.stack([ragged(3), ragged(4)]),
            ValueError,
            "arrays[1] must have the batch, capacity, max_len, features and dtype of",
        ),
        (
            lambda: np.sum(ragged(3)),
            TypeError,
            "a RaggedArray is not an array: use x.m",
        ),
        (lambda: jnp.asarray(ragged(3)), TypeError, "a RaggedArray is not an array"),
        (lambda: jnp.tanh(ragged(3)), TypeError, "a RaggedArray is not an array"),
        (
            lambda: RaggedArray.from_list([VALUES, VALUES[:, 0]]),
            ValueError,
            "arrays[1] must be of shape (length, ...)",
        ),
        (
            lambda: RaggedArray.from_list([VALUES], capacity=3),
            ValueError,
            "capacity must not be less than the sum of all lengths, 4, got 3.",
        ),
        (
            lambda: RaggedArray.from_list([VALUES], max_len=3),
            ValueError,
            "max_len must not be less than the longest length, 4, got 3.",
        ),
        (
            lambda: RaggedArray.from_padded(PADDED, np.array([1, 4])),
            ValueError,
            "lengths must be from 0 to length = 3, got 1 to 4.",
        ),
        (
            lambda: RaggedArray.from_padded(PADDED, np.array([1])),
            ValueError,
            "lengths must have shape (batch,) = (2,), got (1,).",
        ),
        (
            lambda: RaggedArray.from_padded(PADDED, np.array([1, 2]), PADDED > 0),
            ValueError,
            "lengths must be None if key_padding_mask is given, got both.",
        ),
        (
            lambda: RaggedArray.from_padded(PADDED, key_padding_mask=PADDED),
            TypeError,
            "key_padding_mask must be boolean (True = is left out)",
        ),
        (
            lambda: jax.jit(
                lambda n: RaggedArray.from_padded(np.ones((2, 3), int), n, capacity=2)
            )(OFFSETS),
            TypeError,
            "padded must have a floating-point dtype",
        ),
        (
            lambda: ragged(3, 2).to_padded(max_len=2),
            ValueError,
            "max_len must not be less than the longest length, 3, got 2.",
        ),
        (
            lambda: jax.jit(lambda x: x.to_padded(max_len=3))(ragged(3, 2)),
            ValueError,
            "max_len must not be less than the max_len of the array, under jit, 4",
        ),
        (
            lambda: jax.jit(lambda x: x[0])(ragged(3, 2)),
            ValueError,
            "offsets must be known to return elements, whose shapes depend on",
        ),
        (lambda: ragged(3, 2)[2], IndexError, "one of 2 elements, got 2."),
        (lambda: ragged(3, 2)[::-1], ValueError, "must have step 1, got -1."),
        (lambda: ragged(3, 2)["a"], TypeError, "an integer or a slice of elements"),
        (
            lambda: ragged(3).map(lambda values: values[1:]),
            ValueError,
            "the result of function must have as many tokens as the array, 3",
        ),
        (
            lambda: ragged(3).map(jnp.add, ragged(2)),
            ValueError,
            "others[0] must have capacity = 3, as this array; got 2.",
        ),
        (
            lambda: ragged(3, 1).map(jnp.add, ragged(2, 2, max_len=4)),
            ValueError,
            "others[0] must have the offsets of this array, [0 3 4], got [0 2 4].",
        ),
    ],
)
def test_wrong_calls_are_told(call, error, text):
    with pytest.raises(error) as raised:
        call()
    assert text in str(raised.value)
