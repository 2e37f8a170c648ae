"""Comparison of two results, the bootstrap below it, and which results may not be compared."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ivideogpt import cli
from ivideogpt.metrics.bootstrap import bootstrap_means, interval
from ivideogpt.metrics.comparison import compare
from ivideogpt.metrics.results import read_results, write_results
from ivideogpt.metrics.terminal import comparison_table, protocol_table, result_table, task_table
from tests.metrics.conftest import Integrator, MemoryClips

Measured = Callable[..., dict[str, Any]]


def test_the_interval_is_that_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(400, 1))
    low, high = interval(values)[:, 0]
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_means_are_of_whole_videos_and_the_seed_decides() -> None:
    values = np.array([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0]])
    means = bootstrap_means(values, 500, seed=3)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 10.0)  # both columns of a video are drawn together
    np.testing.assert_array_equal(means, bootstrap_means(values, 500, seed=3))
    stretch = 4.303 / 1.96 * 1.5**0.5  # Student's for two degrees of freedom, and the bootstrap's own bias
    sums = 3 * ((means[:, 0] - 1) / stretch + 1)
    assert set(np.unique(sums.round(6)).tolist()) == set(range(7))  # all 27 draws give sums 0 to 6
    assert interval(values[:1]).tolist() == [[0.0, 10.0], [0.0, 10.0]]
    with pytest.raises(ValueError, match=r"at least one video, got shape \(0, 2\)"):
        bootstrap_means(np.empty((0, 2)))


def test_clips_of_an_episode_are_drawn_together() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=(16, 1)), 3, axis=0)  # three clips that are all alike
    episodes = np.repeat(np.arange(16), 3).tolist()
    whole = interval(values, episodes=episodes)
    np.testing.assert_allclose(whole, interval(values[::3]))  # as if there were one of each
    assert np.ptp(whole) > 1.5 * np.ptp(interval(values))
    uneven = bootstrap_means(np.array([[0.0], [0.0], [0.0], [4.0]]), 4000, episodes=["a", "a", "a", "b"])
    stretch = 12.706 / 1.96 * 2**0.5
    assert np.unique(((uneven - 1) / stretch + 1).round(6)).tolist() == [0.0, 1.0, 4.0]  # over clips, not episodes


@pytest.mark.parametrize("count", [5, 8, 16, 40])
def test_intervals_hold_what_they_promise(count: int) -> None:
    """Of two models that are alike, one in twenty comparisons may say otherwise, with few episodes as with many."""
    rng = np.random.default_rng(count)
    wrong = 0
    for trial in range(400):
        changes = rng.normal(size=(count, 1)).repeat(3, axis=0) + 0.5 * rng.normal(size=(3 * count, 1))
        episodes = np.repeat(np.arange(count), 3).tolist()
        low, high = interval(changes, resamples=400, seed=trial, episodes=episodes)[:, 0]
        wrong += not low <= 0 <= high
    assert wrong / 400 < 0.085


def test_few_episodes_tell_nothing(measured: Measured) -> None:
    clips = MemoryClips(["push"] * 4)
    first, second = (measured(Integrator(noise=noise), clips, {"name": str(noise)}) for noise in (0.004, 0.001))
    assert [one.real for one in compare(first, second)] == [None] * len(compare(first, second))
    assert "too few episodes" in compare(first, second)[0].verdict


def test_many_videos_do_not_fill_the_memory() -> None:
    values = np.random.default_rng(0).normal(size=(5000, 1))
    assert bootstrap_means(values, 2000).shape == (2000, 1)  # in several pieces
    assert bootstrap_means(values, 2000).std() == pytest.approx(1 / 5000**0.5, rel=0.1)


@pytest.fixture
def two(measured: Measured) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results of a bad and of a better model on the same 40 clips."""
    clips = MemoryClips(["push"] * 40)
    first, second = (
        measured(Integrator(noise=noise), clips, {"name": name}, runs=2, num_samples=2)
        for name, noise in (("bad", 0.04), ("better", 0.02))
    )
    return first, second


def test_a_real_difference(two: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for one in compare(*two):
        assert one.real and one.better and one.verdict == "the second is better"
        assert one.change == pytest.approx(one.second - one.first)
        assert one.interval is not None
        assert one.interval[0] <= one.change <= one.interval[1]
        assert one.p_value is not None and one.p_value < 0.01
        assert one.wins is not None and one.wins > 0.8
    for one in compare(two[1], two[0]):
        assert one.real and not one.better and one.verdict == "the first is better"


def test_chance_is_no_difference(measured: Measured) -> None:
    clips = MemoryClips(["push"] * 30)
    first, again = (measured(Integrator(noise=0.04), clips, {"seed": seed}) for seed in (0, 1))
    assert all(one.verdict == "no larger than chance" for one in compare(first, again))
    same = compare(first, first)
    assert [(one.change, one.p_value, one.wins, one.real) for one in same] == [(0.0, 1.0, 0.0, False)] * 3


def test_a_metric_without_values_of_videos_is_not_judged(two: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for result, value in zip(two, (120.0, 90.0), strict=True):
        result["overall"]["model"]["fvd"] = value
    (fvd,) = (one for one in compare(*two) if one.metric == "fvd")
    assert (fvd.change, fvd.better, fvd.real) == (-30.0, True, None)
    assert "nobody can tell" in fvd.verdict


def test_what_may_not_be_compared(two: tuple[dict[str, Any], dict[str, Any]], measured: Measured) -> None:
    first, second = two
    other = copy.deepcopy(second)
    other["protocol"] |= {"horizon": 15, "top_k": None}
    with pytest.raises(ValueError, match="different protocols.*horizon: 3 against 15; top_k: 100 against None"):
        compare(first, other)
    other = copy.deepcopy(second)
    other["hashes"]["data"] = {"other": {"a.tar": "0" * 64}}
    with pytest.raises(ValueError, match=r"on different recordings \(memory against other"):
        compare(first, other)
    other = copy.deepcopy(second)
    other["videos"] = other["videos"][:-1]
    with pytest.raises(ValueError, match="not about the same videos: 40 and 39 of them, and number 39"):
        compare(first, other)
    other = copy.deepcopy(second)
    first["hashes"]["networks"], other["hashes"]["networks"] = {"lpips": "a"}, {"lpips": "b"}
    with pytest.raises(ValueError, match="different networks.*lpips"):
        compare(first, other)


def test_the_command(two: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, capsys) -> None:
    for name, result in zip("ab", two, strict=True):
        write_results(result, tmp_path / f"{name}.json")
    assert cli.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    printed = capsys.readouterr().out
    assert "bad against better" in printed
    assert printed.count("the second is better") == 3
    assert "40 videos" in printed
    (tmp_path / "old.json").write_text(json.dumps({"schema_version": 1, "tasks": {}, "overall": {}}))
    assert cli.main(["compare", str(tmp_path / "old.json"), str(tmp_path / "b.json")]) == 2
    message = capsys.readouterr().err
    assert "old.json has an older results schema (1; this version writes 2)" in message
    assert "measure again with `ivideogpt evaluate`" in message


def test_files_that_are_no_results(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text, message in (
        ("{", "it is not JSON"),
        ("[]", "it has no schema_version"),
        ('{"schema_version": 3}', "another results schema"),
        ('{"schema_version": 2, "protocol": {}}', "is damaged: it has no 'videos'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_results(path)
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path / "none.json")


def test_files_are_written_whole(measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(Integrator(), MemoryClips(["push"] * 3))
    path = tmp_path / "results.json"
    write_results(result, path)
    assert read_results(path) == json.loads(json.dumps(result))
    with pytest.raises(ValueError, match="JSON"):
        write_results({"psnr": float("nan")}, path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_results({"other": 1}, path)
    assert read_results(path) == json.loads(json.dumps(result))
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def printed(*tables: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def test_tables(two: tuple[dict[str, Any], dict[str, Any]], measured: Measured) -> None:
    text = printed(result_table(two[0]), comparison_table(compare(*two), *two))
    for shown in ("bad: 3 frames from 2", "best of 2", "95 % over episodes", "PSNR, dB ↑", "MSE ↓", "protocol custom"):
        assert shown in text
    other = {**two[0], "hashes": {**two[0]["hashes"], "model": "of other weights"}}
    assert "bad, two sets of weights" in printed(comparison_table(compare(two[0], other), two[0], other))
    assert task_table(two[0]) is None
    tasks = task_table(measured(Integrator(), MemoryClips(["push", "lift", "lift"])))
    assert tasks is not None
    assert tasks.row_count == 2
    from ivideogpt.metrics.protocols import PROTOCOLS

    text = printed(*(protocol_table(protocol) for protocol in PROTOCOLS.values()))
    assert all(name in text for name in PROTOCOLS)
