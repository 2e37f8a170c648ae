"""Benchmark of rollouts: this package against transformers' LLaMA with the same weights, in one process, alternately.

    python benchmarks/rollout.py [--quick] [--cases interactive clip ...] [--device cpu|cuda]

See README.md beside this file for what each case is and how the numbers are to be read; ``baselines.py`` says what the
two baselines do. Every case is written to the JSON as soon as it is done.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the folder above holds the package `benchmarks`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.baselines import HfCached, Original, check_same_work
from benchmarks.rollout_cases import TARGETS, Case, build_model, bytes_per_frame, cases_of
from benchmarks.rollout_sides import Ours, Run, Side, prepare, supports
from ivideogpt import WorldModel

SLOW_REPEATS = 2
"""Runs of a side that takes longer than ``--slow-seconds`` (the JSON has the count of each side)."""
VERSION = 1
IDS_ONLY = ", dynamics ids only"
"""Behind the name of a side that draws among the dynamics ids; targets are not about it."""


def measure_case(
    case: Case, sides: dict[str, Side], repeats: int, bandwidth: Callable[[], dict[str, float]], slow_seconds: float
) -> dict[str, Any]:
    """Times ``case`` on all ``sides``; a side that fails is reported as failed and the others go on."""
    device = next(iter(sides.values())).wm.device
    results: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    counts: dict[str, int] = {}
    rates = [bandwidth()["best"]]
    for name, side in sides.items():
        print(f"{case.name}: {name}, warm-up", flush=True)
        try:
            warm_up, run = prepare(case, side, repeats)
            if isinstance(side, Ours):
                prepare(replace(case, frames=min(case.frames, 2), baseline_frames=0), side, 1)[0]()
            with common.peak_memory(device) as memory:
                first = warm_up()
        except Exception as error:
            traceback.print_exc()
            results[name] = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
            continue
        runs[name] = run
        slow = sum(first) > slow_seconds and case.kind != "interactive"
        counts[name] = min(repeats, SLOW_REPEATS) if slow else repeats
        results[name] = {"status": "done", "warm_up_seconds": first, "memory_growth_bytes": memory["growth"]}
    gc.collect()

    def tell(name: str, index: int) -> None:
        print(f"{case.name}: {name}, {index + 1} of {counts[name]}", flush=True)

    seconds = common.alternate(runs, counts, tell)
    rates.append(bandwidth()["best"])
    for name, raw in seconds.items():
        results[name] |= _side_result(case, sides[name], raw, max(rates))
    return {
        "case": case.name,
        "status": "done" if all(side["status"] == "done" for side in results.values()) else "failed",
        "settings": asdict(case),
        "bandwidth_bytes_per_second": rates,
        "sides": results,
        "ratios": _ratios(results),
    }


def _side_result(case: Case, side: Side, raw: list[list[float]], bandwidth: float) -> dict[str, Any]:
    samples = [value for run in raw for value in run]
    stats = common.summary(samples)
    frames_a_sample = case.rows * (case.frames if case.kind in ("clip", "mbrl") else 1)
    moved = bytes_per_frame(side.wm, case, side.precision)
    if moved is not None and case.kind in ("clip", "mbrl"):
        moved *= case.frames
    return {
        "precision": side.precision,
        "repeats": len(raw),
        "seconds": raw,
        "stats": stats,
        # of an interactive case the mean counts, so that rare slow frames are not left out
        "frames_per_second": frames_a_sample / (stats["mean"] if case.kind == "interactive" else stats["median"]),
        "bytes_moved": moved,
        "bandwidth_share": None if moved is None else moved / stats["median"] / bandwidth,
    }


def _ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times faster each of our sides is than each baseline, by medians."""
    medians = {name: side["stats"]["median"] for name, side in results.items() if "stats" in side}
    return {
        name: {other: medians[other] / own for other in medians if not other.startswith("ours")}
        for name, own in medians.items()
        if name.startswith("ours")
    }


def judge(result: dict[str, Any], device: str, size: str = "small") -> list[dict[str, Any]]:
    """The targets of a case, each with what was measured on the last of our sides (``precision="auto"``).

    They are about the small model, and about nano in its own case.
    """
    if size not in ("small", "nano") or (size == "nano") != (result["settings"]["model"] == "nano"):
        return []
    ours = [name for name in result.get("sides", {}) if name.startswith("ours") and not name.endswith(IDS_ONLY)]
    judged = []
    for target in TARGETS[device]:
        if target.case != result["case"] or not ours:
            continue
        side = result["sides"][ours[-1]]
        value = side.get(target.value)
        if target.value == "ratio_original":
            value = result["ratios"].get(ours[-1], {}).get("original")
        reached = None if value is None else value >= target.least
        judged.append(asdict(target) | {"side": ours[-1], "measured": value, "reached": reached})
    return judged


def make_sides(wm: WorldModel, precisions: list[str], names: list[str], ids_only: bool) -> dict[str, Side]:
    """What is timed against each other, by name."""
    sides: dict[str, Side] = {}
    if "original" in names:
        sides["original"] = Original(wm)
    if "hf-cached" in names:
        sides["hf-cached"] = HfCached(wm)
    if "ours" in names and not supports("precision"):
        return sides | {"ours:float32": Ours(wm, None)}
    sides |= {f"ours:{one}": Ours(wm, one) for one in precisions if "ours" in names}
    if ids_only and "ours" in names:
        sides[f"ours:{precisions[-1]}{IDS_ONLY}"] = Ours(wm, precisions[-1], dynamics_ids_only=True)
    return sides


def show(result: dict[str, Any]) -> None:
    """Prints a case as a table."""
    rows = []
    for name, side in result.get("sides", {}).items():
        if side["status"] != "done":
            rows.append([name, "failed", *[""] * 7])
            continue
        ratios = result["ratios"].get(name, {})
        share, memory = side["bandwidth_share"], side["memory_growth_bytes"]
        rows.append(
            [
                f"{name} ({side['precision']})" if not name.endswith(str(side["precision"])) else name,
                f"{1e3 * side['stats']['median']:.1f}",
                f"{1e3 * side['stats']['p99']:.1f}" if result["settings"]["kind"] == "interactive" else "",
                str(side["stats"]["count"]),
                f"{side['frames_per_second']:.2f}",
                *(f"{ratios[other]:.2f}x" if other in ratios else "" for other in ("original", "hf-cached")),
                "" if share is None else f"{100 * share:.0f} %",
                "" if memory is None else f"{memory / 2**20:.0f}",
            ]
        )
    notes = [f"failed: {result['error']}"] if "error" in result else []
    notes += [f"{name}: {side['error']}" for name, side in result.get("sides", {}).items() if "error" in side]
    for target in result["targets"]:
        word = {True: "reached", False: "not reached", None: "not measured"}[target["reached"]]
        value = "" if target["measured"] is None else f" ({target['measured']:.3g}, {target['side']})"
        notes.append(f"target {target['text']}: {word}{value}")
    columns = ["side", "median ms", "p99 ms", "times", "frames/s", "vs original", "vs hf-cached", "bandwidth", "MiB"]
    common.print_table(result["case"], columns, rows, notes)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = list(cases_of("cpu", False, False))
    parser.add_argument("--cases", nargs="+", choices=choices, default=choices, metavar="CASE", help=", ".join(choices))
    parser.add_argument(
        "--size", choices=["small", "medium", "nano", "tiny"], default="small", help="model (not nano's)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precisions", nargs="+", default=["float32", "auto"], help="of ours; targets read the last")
    parser.add_argument("--sides", nargs="+", choices=["original", "hf-cached", "ours"],
                        default=["original", "hf-cached", "ours"])  # fmt: skip
    parser.add_argument("--dynamics-ids-only", action="store_true", help="one more side of ours, single steps only")
    parser.add_argument("--repeats", type=int, help="default 5, with --quick 2")
    parser.add_argument("--frames", type=int, help="steps of the interactive case")
    parser.add_argument("--baseline-frames", type=int, help="likewise, of the baselines")
    parser.add_argument("--only", metavar="REGEX", help="of the chosen cases, those whose name it is found in")
    parser.add_argument("--slow-seconds", type=float, default=60.0, help="a side that takes longer is repeated twice")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter cases: a few minutes")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/rollout-DEVICE.json")
    args = parser.parse_args(words)
    args.repeats = args.repeats or (2 if args.quick else 5)
    args.out = args.out or Path(__file__).parent / "results" / f"rollout-{args.device}.json"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU: use --device cpu")
    return args


def main(words: list[str] | None = None) -> int:
    """Runs the chosen cases; 1 if one of them failed."""
    args = parse(words)
    device, tiny = torch.device(args.device), args.size == "tiny"
    small: dict[str, int] = {"size": 2**20} if tiny else {}
    started = time.perf_counter()
    record: dict[str, Any] = {
        "benchmark": "rollout",
        "version": VERSION,
        "date": common.now(),
        "machine": common.describe_machine(device),
        "versions": common.describe_versions(),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "rates": {
            "bandwidth_bytes_per_second": common.measure_bandwidth(device, **small),
            **{
                f"matrix_flops_{name}": common.measure_matrix_rate(device, dtype, 256 if tiny else None)
                for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
            },
        },
        "checks": {},
        "cases": [],
    }
    record["settings"]["slow_repeats"] = SLOW_REPEATS
    rates = record["rates"]
    print(
        f"{record['machine'].get('gpu', record['machine']['cpu'])}: "
        f"{rates['bandwidth_bytes_per_second']['best'] / 1e9:.1f} GB/s, {rates['matrix_flops_float32'] / 1e9:.0f} "
        f"GFLOP/s float32, {rates['matrix_flops_bfloat16'] / 1e9:.0f} bfloat16"
    )
    models: dict[tuple[str, bool], WorldModel] = {}
    cases = cases_of(args.device, args.quick, tiny, args.frames, args.baseline_frames)
    for word in args.cases:
        for case in [case for case in cases[word] if args.only is None or re.search(args.only, case.name)]:
            where = torch.device("cpu") if case.model == "nano" else device
            try:
                key = ("nano" if case.model == "nano" else args.size, case.rewards)
                if key not in models:
                    models.clear()
                    model = build_model(*key, where)
                    record["checks"][f"{key[0]}{' with rewards' if key[1] else ''}"] = check_same_work(model)
                    models[key] = model  # only now: no case is timed with a model that was not found equal
                names = [name for name in args.sides if case.kind != "decode_step" or name != "original"]
                ids_only = args.dynamics_ids_only and case.kind in ("interactive", "decode_step")
                sides = make_sides(models[key], args.precisions, names, ids_only)
                bandwidth = partial(common.measure_bandwidth, where, repeats=3, **small)
                result = measure_case(case, sides, args.repeats, bandwidth, args.slow_seconds)
            except Exception as error:
                traceback.print_exc()
                result = {
                    "case": case.name,
                    "status": "failed",
                    "settings": asdict(case),
                    "error": f"{type(error).__name__}: {error}"[:2000],
                }
            result["targets"] = judge(result, args.device, "nano" if case.model == "nano" else args.size)
            record["cases"].append(result)
            record["seconds_in_all"] = time.perf_counter() - started
            record["machine"]["load_average_at_end"] = common.describe_machine(device)["load_average"]
            common.write_json(args.out, record)
            show(result)
    print(f"Written: {args.out}")
    return int(any(result["status"] == "failed" for result in record["cases"]))


if __name__ == "__main__":
    sys.exit(main())
