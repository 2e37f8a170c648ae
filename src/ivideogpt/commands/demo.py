"""`ivideogpt demo`: fine-tunes, rolls out and reports on the recordings that the package carries."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivideogpt.commands.arguments import at_least

if TYPE_CHECKING:
    from ivideogpt.metrics.clips import ClipSet
    from ivideogpt.metrics.protocols import EvaluationProtocol
    from ivideogpt.report import Example, Report
    from ivideogpt.world_model import WorldModel

MODEL = "ivideogpt-metaworld-nano"
SPLITS = {"train": "train", "heldout": "held-out"}  # folder -> what a person calls it
METHODS = {"last frame": "repeat_last_frame", "before": "model", "after": "model"}
HORIZON = 10
CLIPS_PER_EPISODE = 2


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "demo",
        help="fine-tune, roll out and report on the embedded recordings",
        description="Packs the embedded recordings, fine-tunes the embedded model on them for a short while, rolls it"
        " out on held-out episodes and writes OUT/report.html. A second run goes on where the first one stopped.",
    )
    parser.add_argument("--out", default="runs/demo", help="folder of everything that it writes (default: runs/demo)")
    parser.add_argument("--updates", type=at_least(1), help="updates of fine-tuning (default: the recipe's)")
    parser.add_argument("--model", default=MODEL, metavar="M", help=f"where to start from (default: {MODEL})")
    parser.add_argument("--data", default="embedded", metavar="DIR", help="folder with train/ and heldout/ shard sets")
    parser.add_argument("--recipe", default="demo", help="recipe that fine-tunes (default: demo)")
    parser.add_argument("--prepare-only", action="store_true", help="stop after packing")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Packs, fine-tunes, compares, reports."""
    out = Path(args.out)
    counts = {split: prepare(args.data, split, out / "data" / split) for split in SPLITS}
    if args.prepare_only:
        return

    from rich.console import Console

    import ivideogpt
    from ivideogpt import recipes
    from ivideogpt.metrics.clips import ClipSet
    from ivideogpt.metrics.results import write_results
    from ivideogpt.report import write_report

    console = Console()
    start = ivideogpt.from_pretrained(args.model)
    clips = ClipSet.open(str(out / "data" / "heldout"), protocol_of(start))
    before = score(start, clips, "before fine-tuning")
    overrides = recipe_overrides(args.recipe, out, args.model, start, args.updates)
    console.print("Fine-tuning; Ctrl-C stops it, the same command goes on.", highlight=False)
    folder = recipes.run(args.recipe, overrides)
    assert folder is not None
    tuned = ivideogpt.from_pretrained(folder / "model")
    tuned.save_pretrained(out / "model")
    again = ivideogpt.from_pretrained(out / "model")
    examples = roll_out(tuned, clips)
    if [one.prediction.tobytes() for one in roll_out(again, clips)] != [one.prediction.tobytes() for one in examples]:
        raise RuntimeError(
            f"the model that was loaded from {out / 'model'} rolls out differently than the one saved there"
        )
    console.print(f"Saved {out / 'model'}; loaded again, its rollouts are identical.", highlight=False)
    after = score(again, clips, "after fine-tuning")

    for name, result in (("before", before), ("after", after)):
        write_results(result, out / f"{name}.json")
    record = _training_record(folder)
    report = make_report(args, out, overrides, counts, tuned, before, after, examples, record)
    write_report(report, out / "report.html")
    console.print(as_table(report))
    print(f"Report: {out / 'report.html'}")


def prepare(source: str, split: str, folder: Path) -> dict[str, int]:
    """Packs one split, verified record by record, unless it is there and whole; returns the manifest's counts.

    Raises:
        ValueError: the source is damaged.
    """
    from ivideogpt.data.packing import pack
    from ivideogpt.data.reader import ShardError, load_manifest, resolve_source
    from ivideogpt.data.verification import verify_set

    name = f"embedded:{split}" if source == "embedded" else str(Path(source) / split)
    faults = verify_set(name)
    if faults:
        raise ValueError(f"{name} is damaged: {faults[0]}; install the package again")
    wanted = load_manifest(resolve_source(name))["counts"]
    try:
        whole = not verify_set(folder) and load_manifest(folder)["counts"]["episodes"] == wanted["episodes"]
    except (ShardError, OSError):
        whole = False
    if not whole:
        pack(
            name, folder, overwrite=True, command=shlex.join(["ivideogpt", "data", "pack", name, "--out", str(folder)])
        )
    counts = load_manifest(folder)["counts"]
    what = "Packed" if not whole else "Found"
    print(f"{what} {counts['episodes']} {SPLITS[split]} episodes, {counts['frames']} frames, hashes verified: {folder}")
    return counts


def protocol_of(wm: WorldModel) -> EvaluationProtocol:
    """How the demo measures: argmax rollouts."""
    from ivideogpt.metrics.protocols import EvaluationProtocol

    changes = {"horizon": HORIZON, "clips_per_episode": CLIPS_PER_EPISODE, "temperature": 0.0}
    return EvaluationProtocol().changed(**changes).settled(wm.config)


def score(wm: WorldModel, clips: ClipSet, when: str) -> dict[str, Any]:
    """Scores argmax rollouts on every clip, with a progress display."""
    from rich.console import Console

    from ivideogpt.metrics.evaluation import evaluate
    from ivideogpt.metrics.terminal import watching

    console = Console()
    console.print(f"Rolling out on {len(clips)} held-out clips {when}", highlight=False)
    with watching(console) as watch:
        result = evaluate(wm, clips, protocol_of(wm), name=when, watch=watch)
    assert result is not None
    return result


def recipe_overrides(recipe: str, out: Path, model: str, wm: WorldModel, updates: int | None) -> list[str]:
    """The `key=value` words that point a recipe at the demo's data, model and folder."""
    from ivideogpt import recipes

    words = [f"output={out / 'training'}", "on_change=rerun"]
    for name, stage in recipes.load(recipe)["stages"].items():
        data = {split: out / "data" / folder for split, folder in (("train", "train"), ("val", "heldout"))}
        words += [f"{name}.data.{key}={folder}" for key, folder in data.items()]
        if model != MODEL:
            words.append(f"{name}.data.resolution={wm.config.tokenizer.resolution}")
            words.append(f"{name}.data.context_length={wm.config.context_length}")
            for part, spec in stage["module"]["init_args"].items():
                if isinstance(spec, Mapping) and spec.get("from") == MODEL:
                    words.append(f"{name}.module.{part}.from={model}")
        if updates is not None:
            words.append(f"{name}.trainer.max_steps={updates}")
    return words


def roll_out(wm: WorldModel, clips: ClipSet) -> list[Example]:
    """Argmax rollouts of one clip a task: the median in how much changes, neither the easiest nor the hardest."""
    import torch

    from ivideogpt.data.transforms import to_float
    from ivideogpt.drawing import to_uint8
    from ivideogpt.metrics.video import mse, psnr
    from ivideogpt.report import Example

    changes: dict[str, list[tuple[float, int]]] = {}
    t0 = wm.config.context_length
    for number in range(len(clips)):
        clip = clips.clip(number)
        video = to_float(clip["video"])
        change = float(mse(video[None, t0:], video[None, t0 - 1 : t0].expand_as(video[None, t0:])).mean())
        changes.setdefault(clip["source"], []).append((change, number))
    numbers = [sorted(changes[task])[len(changes[task]) // 2][1] for task in sorted(changes)]
    batch = clips.batch(numbers)
    truth = to_float(batch["video"])
    actions = batch.get("actions") if wm.config.action_dim is not None else None
    pred = wm.rollout(
        truth[:, :t0], actions, horizon=HORIZON, temperature=0.0, generator=torch.Generator().manual_seed(0)
    )
    last = truth[:, t0 - 1 : t0].expand(-1, HORIZON, -1, -1, -1)
    scores, baseline = psnr(pred.video[:, t0:], truth[:, t0:]).mean(1), psnr(last, truth[:, t0:]).mean(1)
    return [
        Example(
            task=task_name(batch["source"][row]),
            name=f"episode {batch['key'][row]}, frames {clips.clip(number)['start']} on",
            truth=to_uint8(truth[row]),
            prediction=to_uint8(pred.video[row]),
            context_length=t0,
            psnr=float(scores[row]),
            baseline_psnr=float(baseline[row]),
            true_rewards=batch["rewards"][row].numpy() if "rewards" in batch else None,
            predicted_rewards=None if pred.rewards is None else pred.rewards[row].numpy(),
        )
        for row, number in enumerate(numbers)
    ]


def task_name(source: str) -> str:
    """`plate-slide-v3` of `metaworld/plate-slide-v3`."""
    return source.rpartition("/")[2]


def make_report(
    args: argparse.Namespace,
    out: Path,
    overrides: list[str],
    counts: Mapping[str, Mapping[str, int]],
    wm: WorldModel,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    examples: list[Example],
    record: Mapping[str, Any],
) -> Report:
    """Puts the page together."""
    from ivideogpt.report import Report, Row

    results = {"last frame": after, "before": before, "after": after}
    rows = []
    for task in [*after["tasks"], "overall"]:
        entries = {
            method: (result["tasks"] | {"overall": result["overall"]})[task] for method, result in results.items()
        }
        scores = {method: entry[METHODS[method]] for method, entry in entries.items()}
        rows.append(Row(task_name(task), entries["after"]["clips"], scores))
    parameters = sum(parameter.numel() for parameter in wm.parameters())
    overall = {method: rows[-1].scores[method]["psnr"] for method in METHODS}
    episode = examples[0].name.split()[1].rstrip(",")
    model, heldout = out / "model", out / "data" / "heldout"
    evaluate = ["ivideogpt", "evaluate", "--model", str(model), "--data", str(heldout), "--temperature", "0"]
    evaluate += ["--horizon", str(HORIZON), "--clips-per-episode", str(CLIPS_PER_EPISODE)]
    predict = ["ivideogpt", "predict", "--model", str(model), "--input", str(heldout), "--episode", episode]
    return Report(
        title="A world model, fine-tuned and rolled out",
        summary=f"{record['updates']} updates on {counts['train']['episodes']} recordings of a simulator took"
        f" {record['seconds']:.0f} seconds. Predicting {HORIZON} frames from {wm.config.context_length} and the actions"
        f" on held-out recordings, the model reached {overall['after']:.2f} dB PSNR"
        f" ({overall['before']:.2f} dB before); repeating the last frame reaches {overall['last frame']:.2f} dB.",
        facts=[
            ("Model", f"{args.model}, {parameters / 1e6:.1f}M parameters"),
            ("Fine-tuned", f"{record['updates']} updates, seed {record['seed']}"),
            ("Episodes", f"{counts['train']['episodes']} to train on, {counts['heldout']['episodes']} held out"),
            ("Machine", _machine()),
            ("Versions", ", ".join(f"{name} {number}" for name, number in after["versions"].items())),
            ("Written", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())),
        ],
        methods=list(METHODS),
        rows=rows,
        notes=[
            f"{CLIPS_PER_EPISODE} clips of each held-out episode, evenly spaced; {HORIZON} frames predicted from"
            f" {wm.config.context_length}, argmax; means over frames and clips, pixels in [0, 1].",
            "last frame: the last given frame repeated. before, after: the model before and after fine-tuning.",
            "Below, one clip a task: the median in how much changes after the given frames.",
        ],
        checks=_checks(after),
        examples=examples,
        loss=record["loss"],
        commands=[
            ("This demo", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
            (
                "Its fine-tuning alone (the same as `lightning run`)",
                shlex.join(["ivideogpt", "run", args.recipe, *overrides]),
            ),
            ("The column “after”", shlex.join(evaluate)),
            ("One rollout as a GIF", shlex.join([*predict, "--temperature", "0", "--output", "rollout.gif"])),
            ("In Python", f'import ivideogpt\n\nwm = ivideogpt.from_pretrained("{model}")'),
        ],
    )


def _checks(result: Mapping[str, Any]) -> list[list[str]]:
    """Whether the model follows its actions and sees rewards coming, by task."""
    table = [["task", "MSE × 1000, own actions", "another episode's actions", "ratio", "reward correlation"]]
    for task, entry in (result["tasks"] | {"overall": result["overall"]}).items():
        cells = [task_name(task)]
        following, reward = entry["shuffled_actions"], entry["reward"]
        if following is None:
            cells += ["-"] * 3
        else:
            cells += [f"{following[which]['mse'] * 1000:.2f}" for which in ("own", "shuffled")]
            cells.append("-" if following["mse_ratio"] is None else f"{following['mse_ratio']:.2f}")
        correlation = None if reward is None else reward["pearson_r"]
        cells.append("-" if correlation is None else f"{correlation:.2f}")
        table.append(cells)
    return table


def as_table(report: Report) -> Any:
    """The report's scores for the terminal."""
    from rich import box
    from rich.table import Table

    from ivideogpt.report import METRICS, best

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Held-out episodes", title_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("", no_wrap=True)
    for metric in METRICS:
        table.add_column(metric.label, justify="right", no_wrap=True)
    for row in report.rows:
        for method in report.methods:
            values = [
                f"{'[bold]' if best(row, metric) == method else ''}"
                f"{row.scores[method][metric.key] * metric.scale:.{metric.digits}f}"
                for metric in METRICS
            ]
            first, last = method == report.methods[0], method == report.methods[-1]
            table.add_row(row.task if first else "", method, *values, end_section=last)
    return table


def _training_record(folder: Path) -> dict[str, Any]:
    """Updates, seconds, seed and loss curve of the recipe's last stage."""
    import csv
    import json

    records = [
        json.loads(path.read_text(encoding="utf-8")) | {"folder": path.parent} for path in folder.glob("*/stage.json")
    ]
    last = max(
        (one for one in records if one["state"] == "finished" and ".previous-" not in one["folder"].name),
        key=lambda one: one["finished"],
    )
    loss = []
    if (last["folder"] / "metrics.csv").exists():  # a few updates may be fewer than it takes to log
        with open(last["folder"] / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
        loss = [(float(row["step"]), float(row["train/loss"])) for row in rows]
    return {"updates": last["updates"], "seconds": last["seconds"], "seed": last["settings"]["seed"], "loss": loss}


def _machine() -> str:
    """Processor, or the machine's type, and cores."""
    import os
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {os.cpu_count()} cores"
