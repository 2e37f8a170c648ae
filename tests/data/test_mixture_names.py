"""Mixtures by name, and by the sizes of their sets: shares, what is missing, what is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ivideogpt.data import VideoDataModule
from ivideogpt.data.mixture_names import mixture_table, named_mixture, temperature_weights
from ivideogpt.data.sources.rlds import oxe_table


def test_shares_are_the_published_ones() -> None:
    table = mixture_table()
    select = table["select"]
    assert len(select) == 35 and sum(select.values()) == pytest.approx(1)
    assert select["oxe/bridge"] == pytest.approx(0.15) and select["oxe/language_table"] == pytest.approx(0.05)
    assert select["oxe/uiuc_d3field"] == pytest.approx(4 * 0.2 / 31, rel=1e-5)
    assert {name.removeprefix("oxe/") for name in select} == {n for n, row in oxe_table().items() if row.get("weight")}
    both = table["select+sthsth"]
    assert both["sthsth"] == pytest.approx(0.15) and both["oxe/kuka"] == pytest.approx(0.85 * 0.10)
    for shares in table.values():
        assert sum(shares.values()) == pytest.approx(1)


def test_what_is_missing_is_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no mixture 'selected'; there are select, select.sthsth, bair"):
        named_mixture("selected", str(tmp_path))
    with pytest.raises(ValueError, match=r"needs 36 shard sets, 36 are missing: .*fractal20220817_data, .* 32 more"):
        VideoDataModule("mixture:select+sthsth", root=str(tmp_path)).setup()


def test_a_named_mixture_trains(make_set: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "data" / "bair"
    folder.mkdir(parents=True)
    make_set(episodes=3).rename(folder / "train")
    data = VideoDataModule("mixture:bair", root=str(tmp_path / "data"), segment_length=4, resolution=16, num_workers=0)
    train, _ = data.mixtures()
    assert train.weights == {str(folder / "train"): 1.0}
    assert next(iter(data.train_dataloader()))["video"].shape[1] == 4


def test_sets_are_drawn_by_size_and_temperature(make_set: Callable[..., Path]) -> None:
    small, large = make_set("small", episodes=1, lengths=[10]), make_set("large", lengths=[10])
    sizes = {"small": 10, "large": 80}
    assert temperature_weights(sizes, 1.0) == pytest.approx({"small": 1 / 9, "large": 8 / 9})
    assert temperature_weights(sizes, 3.0)["large"] == pytest.approx(2 / 3)
    assert temperature_weights(sizes, 1e9)["small"] == pytest.approx(0.5)
    assert temperature_weights({"a": 1, "b": 10**300}, 0.1)["b"] == 1.0
    data = VideoDataModule([str(small), str(large)], segment_length=4, resolution=16, temperature=3.0, num_workers=0)
    train, _ = data.mixtures()
    count = 4000
    drawn = Counter(train.episodes[train.draw(0, position)][0] for position in range(count))
    expected = {name: weight * count for name, weight in (train.weights or {}).items()}
    chi_square = sum((drawn[name] - wanted) ** 2 / wanted for name, wanted in expected.items())
    assert expected[str(large)] == pytest.approx(count * 2 / 3, rel=0.02) and chi_square < 10.8  # one in a thousand
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        VideoDataModule([str(small), str(large)], temperature=0.0).mixtures()
    with pytest.raises(ValueError, match="temperature 2.0 and weights were given"):
        VideoDataModule({str(small): 1.0, str(large): 2.0}, temperature=2.0)
