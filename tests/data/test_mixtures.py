"""Mixtures: every episode once a pass, or in the proportions of the weights; a pure function of seed and position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ivideogpt.data.mixtures import Mixture, check_weights
from ivideogpt.data.reader import ShardSet


@pytest.fixture
def sets(make_set: Callable[..., Path]) -> dict[str, ShardSet]:
    return {name: ShardSet(make_set(name, episodes=count)) for name, count in (("a", 5), ("b", 2))}


def test_a_pass_visits_every_episode_once(sets: dict[str, ShardSet]) -> None:
    mixture = Mixture(sets)
    passes = [[mixture.draw(3, turn * 7 + slot) for slot in range(7)] for turn in range(4)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert [mixture.draw(3, position) for position in range(7)] == passes[0]  # also when asked out of order
    assert [Mixture(sets).draw(4, position) for position in range(7)] != passes[0]


def test_weights_decide_the_shares(sets: dict[str, ShardSet]) -> None:
    mixture = Mixture(sets, {"a": 1, "b": 3})
    draws = [mixture.episodes[mixture.draw(0, position)] for position in range(2000)]
    counts = Counter(name for name, _ in draws)
    assert counts["b"] / 2000 == pytest.approx(0.75, abs=0.04)
    within = Counter(index for name, index in draws if name == "a")
    assert all(count / counts["a"] == pytest.approx(0.2, abs=0.06) for count in within.values())
    assert mixture.draw(0, 123) == Mixture(sets, {"a": 1, "b": 3}).draw(0, 123)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1}, r"missing \['b'\]"),
        ({"a": 1, "b": 1, "c": 1}, r"unknown \['c'\]"),
        ({"a": 1, "b": 0}, "weight of 'b' must be a positive number, got 0"),
        ({"a": 1, "b": float("nan")}, "got nan"),
    ],
)
def test_refused_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_weights(weights, ["a", "b"])


def test_empty_mixtures(sets: dict[str, ShardSet]) -> None:
    with pytest.raises(ValueError, match="at least one shard set"):
        Mixture({})
    with pytest.raises(ValueError, match="set 'b' has a weight but no episode"):
        Mixture(sets, {"a": 1, "b": 1}, [("a", 0)])
