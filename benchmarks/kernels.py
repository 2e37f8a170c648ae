"""Benchmark of the Triton kernels of a decode step: each against the torch operations that it replaces.

    python benchmarks/kernels.py [--rows 1 16 200] [--sweep]

On a GPU; chains of launches inside a CUDA graph, all sides in turn. On a CPU the kernels run in Triton's interpreter
(``TRITON_INTERPRET=1``), which tests this program: those times mean nothing. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a file: the folder above holds the package `benchmarks`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.kernels_step import COLD, Launch, Step
from ivideogpt.config import TransformerConfig, WorldModelConfig
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.gpu import why_unavailable

VERSION = 1
REPLAYS = 4  # in a row, of which the last is timed
OVERLAPS = {"ours": 1, "ours, launched behind the wait": 2, "ours, not overlapped": 0}
"""Sides of ours: where a kernel lets the next one start: as it starts, behind its wait for the one in front, never."""
SWEEP: dict[str, list[tuple[int, int]]] = {
    "qkv": [(2, 1), (2, 2), (4, 1), (4, 2), (8, 2), (8, 4)],
    "out": [(4, 2), (8, 4), (8, 8), (16, 4), (16, 8)],
    "gate_up": [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 4)],
    "down": [(2, 2), (2, 4), (2, 8), (4, 8), (4, 16)],
    "head": [(4, 1), (8, 1), (8, 2), (16, 4)],
    "attend": [(32, 1), (32, 2), (64, 1), (64, 2), (64, 4), (128, 4)],
    "sample": [(0, 4), (0, 8), (0, 16)],
}
"""Outputs of a program (of ``attend``: positions of a part) and warps that ``--sweep`` tries."""


def chain_of(instances: list[list[Launch]], chain: int, cache_bytes: int) -> list[list[Launch]]:
    """At least ``chain`` instances, whose cold arguments fill ``cache_bytes`` four times before one comes again."""
    originals = {id(x): x for one in instances for launch in one for n, x in launch.named.items() if n in COLD}
    size = sum(x.nbytes for x in originals.values())
    copies = -(-4 * cache_bytes // size) if size else 1
    held = [*instances]
    for _ in range(copies - 1):
        made: dict[int, Tensor] = {}
        held += [[launch.copied(made) for launch in one] for one in instances]
    return held * max(1, -(-chain // len(held)))


def replayed(works: list[Callable[[], Any]], device: torch.device) -> Callable[[], Any]:
    """All ``works`` one after another, on a GPU as one CUDA graph."""

    def run() -> None:
        for work in works:
            work()

    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(
    chains: dict[str, list[Callable[[], Any]]], moved: int, bandwidth: float, repeats: int, device: torch.device
) -> dict[str, Any]:
    """All sides in turn, seconds a launch; a side that fails is reported and the others go on."""
    sides: dict[str, Any] = {}
    runs: dict[str, Callable[[], list[float]]] = {}

    def once(run: Callable[[], Any], count: int) -> list[float]:
        """A replay behind others, so that the host's launch of it is not waited for."""
        in_a_row = REPLAYS if device.type == "cuda" else 1
        return [common.timed_in_a_row(run, in_a_row, device)[-1] / count]

    for name, works in chains.items():
        try:
            run = replayed(works, device)
            run()  # a warm-up, which is not counted
            common.synchronize(device)
        except Exception as error:
            traceback.print_exc()
            sides[name] = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
            continue
        runs[name] = partial(once, run, len(works))
    for name, raw in common.alternate(runs, dict.fromkeys(runs, repeats)).items():
        stats = common.summary([seconds for one in raw for seconds in one])
        share = moved / stats["median"] / bandwidth
        sides[name] = {"status": "done", "launches": len(chains[name]), "seconds": raw, "stats": stats,
                       "bandwidth_share": share}  # fmt: skip
    return {"bytes_moved": moved, "sides": sides}


def run_all(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


def measure(step: Step, chain: int, repeats: int, bandwidth: float, cache_bytes: int) -> dict[str, Any]:
    """Every part of the step, and the step itself, by every side."""
    device = step.decoder.device
    overlaps = OVERLAPS if step.overlaps else {"ours": 1}
    whole: dict[str, list[Callable[[], Any]]] = {name: [step.ours(overlap)] for name, overlap in overlaps.items()}
    results = {"step": timed(whole | {"torch": [step.torch()]}, step.bytes_of("step"), bandwidth, repeats, device)}
    parts = {name: step.instances(overlap) for name, overlap in overlaps.items()}
    for part in parts["ours"]:
        chains: dict[str, list[Callable[[], Any]]] = {}
        for name, found in parts.items():
            launches = chain_of(found[part], chain, cache_bytes)
            chains[name] = [partial(run_all, one) for one in launches]
            if name == "ours":
                plain = {id(one): step.plain_part(part, one) for one in launches}
                chains["torch"] = [plain[id(one)] for one in launches]
        results[part] = timed(chains, step.bytes_of(part), bandwidth, repeats, device)
    for result in results.values():
        medians = {name: side["stats"]["median"] for name, side in result["sides"].items() if "stats" in side}
        if "torch" in medians and "ours" in medians:
            result["ratio"] = medians["torch"] / medians["ours"]
    return results


def sweep(step: Step, chain: int, repeats: int, bandwidth: float, cache_bytes: int) -> dict[str, Any]:
    """Every launch shape that :data:`SWEEP` names, of the parts that these rows have; one that fails is told."""
    from ivideogpt.rollout.gpu import decoder as module

    few = len(step.tokens) <= module.ROWS
    names = ("SPLIT", "ATTEND_WARPS", "MANY_ATTEND_WARPS", "SAMPLE_WARPS")
    kept = {name: getattr(module, name) for name in names} | {"SHAPES": dict(module.SHAPES)}
    results: dict[str, Any] = {}
    for part, shapes in SWEEP.items():
        if not few and part not in ("attend", "sample"):
            continue
        chains: dict[str, list[Callable[[], Any]]] = {}
        for outs, warps in shapes:
            if part == "attend":
                module.SPLIT, module.ATTEND_WARPS, module.MANY_ATTEND_WARPS = outs, warps, warps
            elif part == "sample":
                module.SAMPLE_WARPS = warps
            else:
                module.SHAPES[part] = (outs, warps)
            try:
                launches = chain_of(step.instances(1)[part], chain, cache_bytes)
                chains[f"{outs} x {warps}"] = [partial(run_all, one) for one in launches]
            except Exception:
                traceback.print_exc()
            for name, value in kept.items():
                setattr(module, name, dict(value) if isinstance(value, dict) else value)
        results[part] = timed(chains, step.bytes_of(part), bandwidth, repeats, step.decoder.device)
        medians = {name: side["stats"]["median"] for name, side in results[part]["sides"].items() if "stats" in side}
        results[part]["best"] = min(medians, key=lambda name: medians[name], default=None)
    return results


def show(title: str, results: dict[str, Any]) -> None:
    """Prints microseconds a launch, shares of the bandwidth, and how many times faster than torch we are."""
    rows = []
    for part, result in results.items():
        for name, side in result["sides"].items():
            if side["status"] != "done":
                rows.append([part, name, "failed", "", ""])
                continue
            ratio = f"{result['ratio']:.2f}x" if name == "ours" and "ratio" in result else ""
            best = "best" if result.get("best") == name else ratio
            rows.append([part, name, f"{1e6 * side['stats']['median']:.2f}", f"{side['bandwidth_share']:.0%}", best])
    common.print_table(title, ["part", "side", "us a launch", "bandwidth", "vs torch"], rows)


def build(size: str, device: torch.device) -> tuple[Transformer, int, int]:
    """A random transformer, positions of its context, and of the frames behind it that there is room for."""
    torch.manual_seed(0)
    if size == "tiny":
        config = TransformerConfig(45, 1, 2, embed_dim=64, mlp_dim=80, head_dim=32, max_positions=64)
        return Transformer(config).to(device).eval(), 20, 12
    whole = WorldModelConfig.preset(f"64-{size}")
    layout = whole.tokenizer.layout
    return Transformer(whole.transformer).to(device).eval(), layout.context_span, layout.frame_stride * 10


def main(words: list[str] | None = None) -> int:
    """Measures and writes the JSON; 1 if a side failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "medium", "tiny"], default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 200])
    parser.add_argument("--chain", type=int, default=96, help="launches that are timed together, at least")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="try launch shapes too, and print the best of each")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/kernels-DEVICE.json")
    args = parser.parse_args(words)
    out = args.out or Path(__file__).parent / "results" / f"kernels-{args.device}.json"
    device = torch.device(args.device)
    transformer, prefix, capacity = build(args.size, device)
    if device.type == "cpu":
        try:
            from ivideogpt.rollout.gpu.launch import INTERPRETED
        except ImportError:
            parser.error("Triton is not installed")
        if not INTERPRETED:
            parser.error("on a CPU set TRITON_INTERPRET=1: times mean nothing there, but the program can be tested")
    elif (reason := why_unavailable(transformer, args.precision)) is not None:
        parser.error(f"the kernels cannot run here: {reason}")
    small = {"size": 2**20} if args.size == "tiny" else {}
    rates = common.measure_bandwidth(device, **small)
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    record: dict[str, Any] = {
        "benchmark": "kernels",
        "version": VERSION,
        "date": common.now(),
        "machine": common.describe_machine(device) | {"last_cache_bytes": cache_bytes},
        "versions": common.describe_versions(("torch", "triton", "ivideogpt")),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "rates": {"bandwidth_bytes_per_second": rates},
        "rows": {},
    }
    failed = False
    with torch.inference_mode():
        for rows in args.rows:
            step = Step(transformer, args.precision, rows, prefix, capacity)
            result: dict[str, Any] = {"hidden_difference": step.check()}  # nothing is timed that differs
            settings = (args.chain, args.repeats, rates["best"], cache_bytes)
            result["parts"] = measure(step, *settings)
            show(f"{args.size}, {args.precision}, {rows} rows", result["parts"])
            if args.sweep:
                result["sweep"] = sweep(step, *settings)
                show(f"launch shapes (outputs or positions x warps), {rows} rows", result["sweep"])
            timings = [*result["parts"].values(), *result.get("sweep", {}).values()]
            failed |= any(side["status"] == "failed" for one in timings for side in one["sides"].values())
            record["rows"][str(rows)] = result
            record["machine"]["load_average_at_end"] = common.describe_machine(device)["load_average"]
            common.write_json(out, record)
    print(f"Written: {out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
