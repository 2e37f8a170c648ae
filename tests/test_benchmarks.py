"""Benchmarks: every case runs on a tiny model, both sides are shown to do the same work, results have their fields.

No time is asserted: what is tested is that the numbers are of what they are said to be.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # the folder that holds the package `benchmarks`, which is not installed
    sys.path.insert(0, str(ROOT))
baselines, common, decoding, rollout, sides = (
    importlib.import_module(f"benchmarks.{name}")
    for name in ("baselines", "common", "decoding", "rollout", "rollout_sides")
)

RESULTS = ROOT / "benchmarks" / "results"
SIDES = {"original", "hf-cached", "ours:float32"}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """``run(*words)`` gives the exit code and the JSON of a benchmark of the tiny model, with one or two repeats."""

    def run(*words: str, repeats: int = 1) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "result.json"
        fixed = ["--size", "tiny", "--device", "cpu", "--repeats", str(repeats), "--out", str(out)]
        code = rollout.main([*fixed, "--precisions", "float32", *words])
        return code, json.loads(out.read_text())

    return run


def check_record(record: dict[str, Any]) -> None:
    """The fields that a result needs to be read by somebody who was not there."""
    assert record["benchmark"] == "rollout" and record["version"] == 1
    assert record["date"].endswith("+00:00")
    assert record["machine"]["cpu"] and record["machine"]["cores"] >= 1 and record["machine"]["torch_threads"] >= 1
    if record["machine"]["device"] == "cuda":
        assert record["machine"]["gpu"]
    assert all(record["versions"][name] for name in ("python", "torch", "transformers"))
    assert {"commit", "uncommitted_changes"} <= set(record["versions"])
    assert {"repeats", "size", "quick", "precisions", "slow_seconds"} <= set(record["settings"])
    rates = record["rates"]
    assert rates["bandwidth_bytes_per_second"]["best"] == max(rates["bandwidth_bytes_per_second"].values()) > 0
    assert rates["matrix_flops_float32"] > 0 and rates["matrix_flops_bfloat16"] > 0
    assert record["cases"]
    for result in record["cases"]:
        assert result["status"] in ("done", "failed") and result["settings"]["kind"]
        if "sides" not in result:
            assert result["status"] == "failed" and result["error"]
            continue
        assert min(result["bandwidth_bytes_per_second"]) > 0
        for name, side in result["sides"].items():
            if side["status"] == "failed":
                assert result["status"] == "failed" and side["error"]
                continue
            raw = [seconds for block in side["seconds"] for seconds in block]
            assert len(side["seconds"]) == side["repeats"] >= 1 and all(seconds > 0 for seconds in raw)
            assert side["stats"]["count"] == len(raw)
            assert min(raw) == side["stats"]["min"] <= side["stats"]["median"] <= side["stats"]["p99"] <= max(raw)
            assert side["frames_per_second"] > 0
            assert {"precision", "bytes_moved", "bandwidth_share", "memory_growth_bytes"} <= set(side)
            if name.startswith("ours"):
                timed = {other for other, one in result["sides"].items() if "stats" in one}
                assert set(result["ratios"][name]) == {other for other in timed if not other.startswith("ours")}
        for target in result["targets"]:
            assert target["text"] and target["reached"] in (True, False, None)


@pytest.mark.parametrize("case", ["interactive", "clip", "candidates", "decode_step", "mbrl", "nano"])
def test_case_of_a_tiny_model(run: Callable[..., Any], case: str) -> None:
    code, record = run("--cases", case, repeats=2)
    check_record(record)
    for result in record["cases"]:
        assert result["status"] == "done", result
        assert set(result["sides"]) == (SIDES - {"original"} if case == "decode_step" else SIDES)
        assert all(side["repeats"] == 2 for side in result["sides"].values())
    assert code == 0
    for check in record["checks"].values():
        assert all(check[name]["equal_ids"] > 0 for name in ("original", "hf-cached"))


def test_interactive_goes_on_past_the_positions(run: Callable[..., Any]) -> None:
    code, record = run("--cases", "interactive", "--frames", "10")  # the tiny model's positions hold 6 future frames
    assert code == 0
    assert record["cases"][0]["sides"]["ours:float32"]["stats"]["count"] == 10


@pytest.mark.parametrize("rewards", [False, True])
def test_baselines_roll_out_the_same_video(rewards: bool) -> None:
    wm = rollout.build_model("tiny", rewards, torch.device("cpu"))
    torch.manual_seed(3)
    context, actions = torch.rand(2, 2, 3, 32, 32), torch.randn(2, 6, 4)
    expected = wm.rollout(context, actions=actions, horizon=4, temperature=0.0)
    for kind in (baselines.Original, baselines.HfCached):
        baseline = kind(wm, sample=False)
        torch.testing.assert_close(baseline.rollout(context, actions, 4), expected.video, atol=1e-4, rtol=0)
        session = baseline.session(context)
        steps = [session.step(actions[:, 1 + index]) for index in range(4)]
        torch.testing.assert_close(
            torch.stack([frame for frame, _ in steps], dim=1), expected.video[:, 2:], atol=1e-4, rtol=0
        )
        if rewards:
            found = torch.stack([reward for _, reward in steps], dim=1)
            torch.testing.assert_close(found, expected.rewards, atol=1e-4, rtol=0)
        else:
            assert steps[0][1] is None


def test_baselines_split_batches_and_repeat_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    wm = rollout.build_model("tiny", False, torch.device("cpu"))
    context, actions = torch.rand(1, 2, 3, 32, 32), torch.randn(5, 4, 4)
    baseline = baselines.HfCached(wm, sample=False)
    whole = baseline.rollout(context, actions, 2, samples=5)
    monkeypatch.setattr(baselines, "ROWS_AT_ONCE", 2)
    torch.testing.assert_close(baseline.rollout(context, actions, 2, samples=5), whole, atol=1e-4, rtol=0)
    alone = baseline.rollout(context, actions[3:4], 2)
    torch.testing.assert_close(whole[3:4], alone, atol=1e-4, rtol=0)


def other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    build = baselines.llama_of

    def perturbed(wm: Any) -> Any:
        llama = build(wm)
        norm = torch.nn.Parameter(llama.model.norm.weight * 1.5)
        llama.model.norm.weight = norm  # a parameter of its own: the world model's stays
        return llama

    monkeypatch.setattr(baselines, "llama_of", perturbed)


def no_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = baselines.Baseline.action_embeddings
    monkeypatch.setattr(baselines.Baseline, "action_embeddings", lambda self, actions: 0 * plain(self, actions))


def other_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    start = baselines._CachedClip.__init__

    def shifted(self: Any, *args: Any) -> None:
        start(self, *args)
        self.positions = 2 * self.positions

    monkeypatch.setattr(baselines._CachedClip, "__init__", shifted)


@pytest.mark.parametrize("change", [other_weights, no_actions, other_positions])
def test_check_finds_other_work(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    wm = rollout.build_model("tiny", False, torch.device("cpu"))
    assert baselines.check_same_work(wm)["original"]["logits_max_difference"] < 1e-3
    change(monkeypatch)
    with pytest.raises(baselines.DifferentWorkError, match=r"(logits|argmax ids) differ"):
        baselines.check_same_work(wm)
    code, record = run("--cases", "clip")
    check_record(record)
    assert code == 1
    assert all("differ" in result["error"] for result in record["cases"])  # nothing was timed


def test_failing_side_leaves_the_others(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *args: Any) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(baselines.Original, "rollout", fail)
    code, record = run("--cases", "candidates", "interactive")
    check_record(record)
    assert code == 1
    by_name = {result["case"]: result for result in record["cases"]}
    assert by_name["interactive"]["status"] == "done"
    failed = by_name["candidates 3 x 2"]
    assert failed["status"] == "failed" and "no memory left" in failed["sides"]["original"]["error"]
    assert failed["sides"]["ours:float32"]["status"] == failed["sides"]["hf-cached"]["status"] == "done"


def test_killed_run_keeps_finished_cases(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure = rollout.measure_case

    def stop_at_second(case: Any, *args: Any) -> Any:
        if case.batch == 2:
            raise KeyboardInterrupt
        return measure(case, *args)

    monkeypatch.setattr(rollout, "measure_case", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run("--cases", "clip")
    record = json.loads((tmp_path / "result.json").read_text())
    check_record(record)
    assert [result["case"] for result in record["cases"]] == ["clip 1 x 2+2"]


def test_bytes_of_a_frame() -> None:
    wm = rollout.build_model("tiny", False, torch.device("cpu"))
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    head = wm.config.tokenizer.vocab_size * 32
    # 4 ids a frame; context of 2 x 64 ids and a slot between; keys and values of 2 layers, 32 wide
    own = 5 * 2 / 2
    case = rollout.Case("candidates", "clip", batch=1, samples=3, frames=2)
    expected = 4 * 4 * (layers + head) + 4 * 2 * 2 * 32 * 4 * (129 + 3 * own)
    assert rollout.bytes_per_frame(wm, case, "float32") == expected
    assert rollout.bytes_per_frame(wm, case, "bfloat16") == expected / 2
    assert rollout.bytes_per_frame(wm, case, "unknown") is None


def test_targets_are_judged_by_the_last_of_our_sides() -> None:
    side = {"status": "done", "frames_per_second": 26.0}
    result = {
        "case": "nano interactive",
        "settings": {"model": "nano"},
        "sides": {"original": side, "ours:float32": {**side, "frames_per_second": 3.0}, "ours:auto": side},
        "ratios": {},
    }
    (judged,) = rollout.judge(result, "cpu", "nano")
    assert judged["reached"] is True and judged["measured"] == 26.0 and judged["side"] == "ours:auto"
    assert rollout.judge(result, "cpu", "tiny") == []
    for device in ("cpu", "cuda"):  # a target of a case that nobody runs would never be reported
        names = {case.name for cases in rollout.cases_of(device, False, False).values() for case in cases}
        assert {target.case for target in rollout.TARGETS[device]} <= names


def test_sides_take_turns() -> None:
    order: list[str] = []

    def run_of(name: str) -> Callable[[], list[float]]:
        def one() -> list[float]:
            order.append(name)
            return [1.0]

        return one

    seconds = common.alternate({name: run_of(name) for name in "abc"}, {"a": 3, "b": 1, "c": 3})
    assert "".join(order) == "abcacac"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 1, "c": 3}


def test_summary() -> None:
    assert common.summary([3.0, 1.0, 2.0]) == {
        "count": 3, "median": 2.0, "min": 1.0, "max": 3.0, "mean": 2.0, "p99": 3.0
    }  # fmt: skip
    assert common.summary([float(value) for value in range(1, 1001)])["p99"] == 990.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_peak_memory_sees_what_was_freed_again() -> None:
    with common.peak_memory(torch.device("cpu")) as memory:
        torch.ones(2**24).sum()  # 64 MiB
    assert memory["growth"] is not None and 0.9 * 2**26 < memory["growth"] < 2**27
    with common.peak_memory(torch.device("cpu")) as memory:
        pass
    assert memory["growth"] is not None and memory["growth"] < 2**24


@pytest.mark.parametrize("path", sorted(RESULTS.glob("rollout-*.json")), ids=lambda path: path.name)
def test_committed_result(path: Path) -> None:
    record = json.loads(path.read_text())
    check_record(record)
    assert record["settings"]["size"] in ("small", "medium") and not record["settings"]["quick"]
    assert all(record["checks"].values())
    assert record["versions"]["commit"]
    assert str(ROOT) not in path.read_text()  # of nobody's concern


def test_the_page_says_what_a_cpu_with_avx2_did() -> None:
    record = json.loads((RESULTS / "rollout-cpu-avx2.json").read_text())
    page = (ROOT / "benchmarks" / "README.md").read_text()
    rows = page.partition("`results/rollout-cpu-avx2.json`")[2].partition("**What was tried")[0].splitlines()
    names = {"interactive": "interactive", "decode_step": "decode steps", "nano interactive": "nano, interactive"}
    assert {case["case"] for case in record["cases"]} == names.keys()
    for case in record["cases"]:
        row = next(row for row in rows if row.startswith(f"| {names[case['case']]} |"))
        for side in case["sides"].values():
            assert f" {1e3 * side['stats']['median']:.0f} ms" in row
        best = case["sides"]["ours:auto"]
        assert f"| {100 * best['bandwidth_share']:.0f} % |" in row
        for ratio in case["ratios"]["ours:auto"].values():
            assert ratio is None or f"{ratio:.1f}x" in row
        (target,) = case["targets"]
        assert f"{target['text'].split(' original')[0]}: {'reached' if target['reached'] else 'not reached'}" in row


def check_decoding(record: dict[str, Any]) -> None:
    assert record["benchmark"] == "decoding" and record["versions"]["commit"]
    assert {report["precision"] for report in record["precisions"]} >= {"float32", "bfloat16"}
    for result in record["temperatures"].values():
        assert set(result["options"]) == set(decoding.OPTIONS)
        for name, option in result["options"].items():
            assert option["seconds_per_frame"]["median"] > 0
            if name.startswith("speculation"):  # exact
                assert option["same_tokens"] > 0.99
                assert 1 <= option["passes_per_frame"] <= 16
        assert result["options"]["2 passes (approximate)"]["passes_per_frame"] == 2
        assert result["options"]["diagonals (approximate)"]["passes_per_frame"] == 7


@pytest.mark.slow
def test_decoding(tmp_path: Path) -> None:
    out = tmp_path / "decoding.json"
    assert (
        decoding.main(["--clips", "1", "--horizon", "3", "--repeats", "1", "--device", "cpu", "--out", str(out)]) == 0
    )
    check_decoding(json.loads(out.read_text()))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("decoding-*.json")), ids=lambda p: p.name
)
def test_committed_decoding(path: Path) -> None:
    check_decoding(json.loads(path.read_text()))


def test_passes_of_fixed_guesses() -> None:
    still = torch.tensor([[[1, 2, 3, 4]] * 3])
    assert decoding.drafts(still, 4) == {"previous": 1.0, "n-gram": 1.0}
    assert decoding.drafts(still, 2) == {"previous": 2.0, "n-gram": 2.0}
    moved = torch.tensor([[[1, 2, 3, 4], [5, 6, 3, 4], [1, 2, 3, 4]]])
    # frame 1: wrong at places 0 and 1, then right; frame 2: wrong at place 0, after which 1 was once followed by 2
    assert decoding.drafts(moved, 4) == {"previous": 3.0, "n-gram": 2.5}


def test_readmes_quote_what_was_measured_on_a_gpu() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "rollout-cuda.json").read_text())
    cases = {case["case"]: case for case in record["cases"]}
    front, page = (path.read_text() for path in (ROOT / "README.md", ROOT / "benchmarks" / "README.md"))
    for name, digits in (("interactive", 0), ("clip 16 x 2+14", 1), ("candidates 200 x 10", 1), ("mbrl 32 x 10", 1)):
        sides = cases[name]["sides"]
        fastest = {side: 1e3 * sides[side]["stats"]["min"] for side in ("original", "hf-cached", "ours:bfloat16")}
        ratio = f"{cases[name]['ratios_of_fastest']['ours:bfloat16']['original']:.{digits}f}x"
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} |") and "H200" not in line
                   and ratio in line)  # fmt: skip
        for time in fastest.values():
            quoted = f"{time:.1f} ms" if time < 10 else f"{time:.0f} ms" if time < 1000 else f"{time / 1e3:.2f} s"
            assert quoted in row
        if name != "mbrl 32 x 10":
            shown = next(line for line in front.splitlines() if ratio in line)
            assert f"{fastest['ours:bfloat16']:.0f} ms" in shown or f"{fastest['ours:bfloat16']:.1f} ms" in shown
    assert f"{cases['interactive']['sides']['ours:bfloat16']['frames_per_second']:.0f} frames/s" in front
    assert f"| {100 * cases['decode_step']['sides']['ours:bfloat16']['bandwidth_share']:.0f} % |" in page
