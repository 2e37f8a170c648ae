"""Benchmark of training: ours against the original's way, and what each measure gave.

    python benchmarks/train.py                              # all cases; on a GPU add --device cuda
    python benchmarks/train.py --cases nano                 # seconds, for a first look
    python benchmarks/train.py --cases small --batch-size 1 --updates 1 --repeats 3 [--compile]

The original's way: transformers' LlamaForCausalLM and torch's AdamW, the frozen tokenizer in each update, everything
eager, float32 on a CPU and autocast to bfloat16 on a GPU, as published; a CPU without instructions for products of
bfloat16 has no side that uses them. Tokenizers: the same module, run eagerly in NCHW. All sides of a case train the
same parameters in one process, in turn. Batches are in memory on all sides (``data.py`` and ``tokens.py`` are about
loading). Each case and batch has a part of the results file of its own, which it replaces.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if str(Path(__file__).resolve().parents[1]) not in sys.path:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks import train_sides as sides_of
from ivideogpt.training.peaks import promised_rate

CASES = ("nano", "small", "medium", "tokenizer")
FRAMES = {"nano": 16, "small": 16, "medium": 16, "tokenizer": 8}
"""Frames of a clip, as published."""
BATCH = {
    "cpu": {"nano": 4, "small": 1, "medium": 1, "tokenizer": 1},
    "cuda": {"nano": 64, "small": 16, "medium": 8, "tokenizer": 16},  # of one GPU, as published
}
TARGETS: dict[str, dict[str, float]] = {
    "cpu": {"transformer": 1.5, "tokenizer": 1.5, "memory": 0.7},
    "cuda": {"transformer": 2.5, "from tokens": 5.0, "tokenizer": 1.5, "memory": 0.7, "mfu": 0.45},
}
OLDEST, FROM_TOKENS = "original", "ours, from tokens"


def run_case(case: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures one case.

    Raises:
        DifferentWorkError: before anything is timed.
    """
    machine, versions = common.describe_machine(device), common.describe_versions()  # as they are at the start
    batch_size = args.batch_size or BATCH[device.type][case]
    frames = args.frames or FRAMES[case]
    generator = torch.Generator().manual_seed(0)
    checks: dict[str, Any] = {}
    sides: dict[str, sides_of.Side] = {}
    if case == "tokenizer":
        module = sides_of.build_tokenizer_module(args.tokenizer, device)
        size = module.tokenizer.config.resolution
        video = torch.rand(batch_size, frames, 3, size, size, generator=generator).to(device)
        measures = sides_of.tokenizer_sides(device, args.compile)
        sides = {name: sides_of.TokenizerSide(module, video, measure) for name, measure in measures.items()}
        parameters, length = sum(p.numel() for p in module.tokenizer.parameters()), None
    else:
        wm = sides_of.build_world_model(case, 0.0, device)
        size = wm.config.tokenizer.resolution
        video = torch.rand(batch_size, frames, 3, size, size, generator=generator).to(device)
        checks["relative_differences"] = sides_of.check_same_work(
            wm, video[:1, : wm.config.context_length + 2], gradients=case == "nano"
        )
        del wm
        wm = sides_of.build_world_model(case, args.dropout, device)
        with torch.no_grad():
            batch = {"video": video, "tokens": wm.tokenizer.encode(video)}
        measures = sides_of.transformer_sides(device, args.compile)
        sides = {name: sides_of.TransformerSide(wm, batch, measure) for name, measure in measures.items()}
        parameters, length = sum(p.numel() for p in wm.transformer.parameters()), batch["tokens"].shape[1]
    if args.sides:
        known, sides = list(sides), {name: side for name, side in sides.items() if name in args.sides}
        if not sides:
            raise SystemExit(f"{case} has no side {' or '.join(map(repr, args.sides))}: it has {', '.join(known)}")
    dtypes = ("float32", "bfloat16") if sides_of.has_bfloat16(device) else ("float32",)
    rates = {dtype: common.measure_matrix_rate(device, getattr(torch, dtype)) for dtype in dtypes}
    results: dict[str, Any] = {}
    for name, side in sides.items():  # the first update: kernels are chosen and compiled, and memory is looked at
        print(f"{case}: {name}, first update", file=sys.stderr)
        results[name] = {}
        apart = device.type == "cuda" or side.measures.compile  # choosing kernels takes memory that training does not
        if apart:
            side.start()
            results[name]["first_update_seconds"] = common.timed(side.update, device)
            side.stop()
        with common.peak_memory(device) as memory:
            side.start()
            seconds_of_one = common.timed(side.update, device)
            if side.flops == 0.0 and OLDEST in sides:
                side.flops = sides_of.counted_flops(side.update) if name == OLDEST else sides[OLDEST].flops
        side.stop()
        results[name] = {"first_update_seconds": seconds_of_one} | results[name] | {"memory": memory}
    seconds = common.alternate(
        {name: turn(side, args.updates, device) for name, side in sides.items()},
        dict.fromkeys(sides, args.repeats),
        lambda name, index: print(f"{case}: {name}, run {index + 1}", file=sys.stderr),
    )
    for name, side in sides.items():
        stats = common.summary([second for block in seconds[name] for second in block])
        dtype = "bfloat16" if side.measures.bfloat16 else "float32"
        result = {
            "measures": vars(side.measures),
            "seconds": seconds[name],
            "stats": stats,
            "updates_per_second": 1 / stats["median"],
            "flops_per_second": side.flops / stats["median"],
            "share_of_matrix_rate": side.flops / stats["median"] / rates[dtype],
            "mfu": mfu(side.flops / stats["median"], device, dtype),
            "peak_bytes": results[name].pop("memory")["growth"],
        }
        if length is not None:
            result["tokens_per_second"] = batch_size * length / stats["median"]
        else:
            result["frames_per_second"] = batch_size * frames / stats["median"]
        results[name] |= result
    return {
        "case": case,
        "date": common.now(),
        "machine": machine | {"load_average_at_end": common.describe_machine(device)["load_average"]},
        "versions": versions,
        "settings": {
            "batch_size": batch_size, "frames": frames, "parameters": parameters, "sequence_length": length,
            "attention_dropout": None if length is None else args.dropout, "updates": args.updates,
            "repeats": args.repeats, "compile": args.compile,
        },
        "checks": checks,
        "matrix_rates": rates,
        "flops_per_update": next(iter(sides.values())).flops,
        "sides": results,
        "ratios": ratios(results),
    }  # fmt: skip


def turn(side: sides_of.Side, updates: int, device: torch.device) -> Callable[[], list[float]]:
    """Seconds of each of ``updates`` updates in a row; making the optimizer's state is not counted."""

    def run() -> list[float]:
        side.start()
        seconds = common.timed_in_a_row(side.update, updates, device)
        side.stop()
        return seconds

    return run


def mfu(flops_per_second: float, device: torch.device, dtype: str) -> float | None:
    """Share of what the GPU's data sheet promises in ``dtype``; None on a CPU, or for a GPU that is not known."""
    peak = promised_rate(device, getattr(torch, dtype))
    return flops_per_second / peak if peak else None


def ratios(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Of each side, how much faster and how much smaller it is than the original."""
    if OLDEST not in results:
        return {}
    base = results[OLDEST]
    return {
        name: {
            "speed": base["stats"]["median"] / result["stats"]["median"],
            "memory": result["peak_bytes"] / base["peak_bytes"]
            if result["peak_bytes"] and base["peak_bytes"]
            else None,
        }
        for name, result in results.items()
    }


def judge(case: str, result: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """The targets of a case, each with the side that comes nearest to it."""
    sides, found = result["sides"], result["ratios"]
    if case == "nano" or not found:
        return []
    pixels = [name for name, side in sides.items() if not side["measures"]["tokens"]]
    values: dict[str, dict[str, float]] = {}
    if case == "tokenizer":
        values["tokenizer"] = {name: found[name]["speed"] for name in sides}
        values["memory"] = {name: -found[name]["memory"] for name in sides if found[name]["memory"]}
    else:
        values["transformer"] = {name: found[name]["speed"] for name in pixels}
        values["from tokens"] = {name: found[name]["speed"] for name in sides if name == FROM_TOKENS}
    if case == "medium":
        values["mfu"] = {name: side["mfu"] for name, side in sides.items() if side["mfu"]}
    judged = []
    for target, wanted in TARGETS[device].items():
        if values.get(target):
            name, value = max(values[target].items(), key=lambda item: item[1])
            reached = value >= (-wanted if target == "memory" else wanted)
            judged.append(
                {"target": target, "wanted": wanted, "measured": abs(value), "side": name, "reached": reached}
            )
    return judged


def rows_of(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of each side of a case: its name, time, rates, share of the arithmetic, memory, and both ratios if it has any."""
    rows: list[tuple[str, ...]] = []
    for name, side in result["sides"].items():
        ratio = result["ratios"].get(name, {})
        seconds, rate = side["stats"]["median"], side.get("tokens_per_second") or side.get("frames_per_second")
        share = side["mfu"] if side["mfu"] is not None else side["share_of_matrix_rate"]
        rows.append((
            name,
            f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms",
            f"{side['updates_per_second']:.2f}",
            f"{rate:.3g}" if rate < 1000 else f"{rate:.0f}",
            f"{100 * share:.0f} %",
            "-" if side["peak_bytes"] is None else f"{side['peak_bytes'] / 2**30:.2f} GiB",
            f"{ratio['speed']:.2f}x" if ratio else "",
            f"{ratio['memory']:.2f}x" if ratio.get("memory") else "",
        ))  # fmt: skip
    return rows


def markdown(result: dict[str, Any]) -> list[str]:
    """Rows of a case as ``training.md`` has them."""
    return [f"| {' | '.join(cells)} |" for cells in rows_of(result)]


def print_case(result: dict[str, Any]) -> None:
    """The table of a case."""
    settings = result["settings"]
    unit = "tokens/s" if settings["sequence_length"] else "frames/s"
    share = "MFU" if result["machine"]["device"] == "cuda" else "of the rate"
    columns = ("side", "an update", "updates/s", unit, share, "peak memory", "speed", "memory")
    title = f"{result['case']}: {settings['batch_size']} x {settings['frames']} frames"
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in result["matrix_rates"].items())
    notes = [f"matrix products: {rates}"]
    for target in result["targets"]:
        word = "reached" if target["reached"] else "NOT reached"
        notes.append(
            f"{target['target']}: {target['measured']:.2f} by {target['side']!r}, {target['wanted']} is {word}"
        )
    common.print_table(title, columns, rows_of(result), notes)


def main(words: list[str] | None = None) -> int:
    """Measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", help="names of sides, as the table has them; all if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, help="clips of a batch (by case and device)")
    parser.add_argument("--frames", type=int, help="frames of a clip (16; tokenizers 8)")
    parser.add_argument("--updates", type=int, default=2, help="updates of a run (2)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (3)")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the attention, as published (0.1)")
    parser.add_argument("--tokenizer", default="64", help="preset of the tokenizer that is trained (64)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes on a CPU")
    parser.add_argument("--out", type=Path, help="JSON (results/train-DEVICE.json)")
    args = parser.parse_args(words)
    device = torch.device(args.device)
    out = args.out or Path(__file__).parent / "results" / f"train-{device.type}.json"
    record: dict[str, Any] = (
        json.loads(out.read_text()) if out.exists() else {"benchmark": "train", "version": 1, "cases": {}}
    )
    if sides_of.has_bfloat16(device):
        record["equal_ids"] = sides_of.equal_ids(device)
    for case in args.cases:
        result = run_case(case, args, device)
        result["targets"] = judge(case, result, device.type)
        print_case(result)
        settings = result["settings"]
        record["cases"][f"{case} {settings['batch_size']} x {settings['frames']}"] = result
        common.write_json(out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
