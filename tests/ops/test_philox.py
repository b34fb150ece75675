"""Random numbers depend on the entry alone."""

from __future__ import annotations

import numpy as np

from mergelab.ops.philox import bernoulli, stream_key, words


def test_the_stream_is_the_one_it_has_always_been() -> None:
    assert stream_key(0, "a", "x") == 279455060654749101251920987806433490894
    drawn = words(stream_key(0, "a", "x"), 0, 10)
    assert drawn[:4].tolist() == [1788718252, 3331730418, 1977674875, 1576088930]
    assert drawn[8:].tolist() == [978212393, 543523649]


def test_the_words_are_numpys_philox_from_the_start_of_its_counter() -> None:
    raw = np.random.Philox(key=12345).random_raw(8)
    expected = [int(word) >> shift & 0xFFFFFFFF for word in raw for shift in (0, 32)]
    assert words(12345, 0, 16).tolist() == expected


def test_any_part_can_be_drawn_alone() -> None:
    key = stream_key(3, "expert", "layer.weight")
    whole = words(key, 0, 1000)
    for start, count in ((0, 1), (1, 7), (8, 8), (13, 400), (997, 3), (500, 0)):
        assert np.array_equal(words(key, start, count), whole[start : start + count])


def test_seed_expert_and_tensor_make_different_streams() -> None:
    keys = {
        stream_key(seed, *names)
        for seed in (0, 1)
        for names in (("a", "x"), ("x", "a"), ("ax", ""), ("", "ax"), ("a", "y"), ("b", "x"))
    }
    assert len(keys) == 12


def test_words_are_uniform_and_independent_between_streams() -> None:
    count = 1 << 18
    first, second = (words(stream_key(0, name, "x"), 0, count).astype(np.float64) / 2**32 for name in ("a", "b"))
    assert abs(first.mean() - 0.5) < 0.003
    assert abs(first.var() - 1 / 12) < 0.001
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.01


def test_bernoulli_compares_integers() -> None:
    key = stream_key(0, "a", "x")
    drawn = words(key, 5, 10_000)
    assert np.array_equal(bernoulli(key, 5, 10_000, 0.25), drawn < 2**30)
    assert bernoulli(key, 5, 100, 1.0).all()
    assert abs(bernoulli(key, 0, 1 << 18, 0.9).mean() - 0.9) < 0.003
