"""`ivideogpt evaluate`: measures a model's rollouts on packed episodes by a protocol and writes the numbers."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivideogpt.commands.arguments import add_model, at_least, check_place, number_from_zero

if TYPE_CHECKING:
    from rich.console import Console

# option -> field of the protocol that it changes; none of them has a default, which is the protocol's
CHANGES = ("videos", "horizon", "clips_per_episode", "num_samples", "temperature", "top_k", "runs", "stride",
           "goal")  # fmt: skip


class ListProtocols(argparse.Action):
    """Prints every preset and exits, whatever else is missing on the command line."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        """Prints them."""
        from rich.console import Console

        from ivideogpt.metrics.protocols import PROTOCOLS
        from ivideogpt.metrics.terminal import protocol_table

        console = Console(width=None if sys.stdout.isatty() else 200)
        for protocol in PROTOCOLS.values():
            console.print(protocol_table(protocol), "")
        parser.exit()


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a model on packed episodes",
        description="Rolls the model out on clips of a shard set by a protocol (docs/evaluation.md) and compares with"
        " what was recorded: metrics with intervals against repeating the last frame, rollouts with other episodes'"
        " actions, rewards; per task and overall. The same command goes on where it was killed; under torchrun several"
        " processes share the work.",
    )
    add_model(parser)
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="SHARDS", help="folders of shard sets, or `embedded:heldout`"
    )
    parser.add_argument("--protocol", default="custom", metavar="P", help="preset (default: custom)")
    parser.add_argument("--protocols", action=ListProtocols, nargs=0, help="print all presets and exit")
    parser.add_argument("--out", metavar="FILE", help="write the results as JSON; also what makes it resumable")
    parser.add_argument("--report", metavar="FILE", help="write a self-contained HTML page")
    parser.add_argument("--explain", action="store_true", help="also compute what else would give another number")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of all random numbers (default: 0)")
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="samples at once (default: 32)")
    parser.add_argument("--note", action="append", default=[], metavar="TEXT", help="a sentence for the result")
    parser.add_argument("--restart", action="store_true", help="drop what a killed evaluation has finished")
    parser.add_argument("--lpips-weights", metavar="FILE", help="weights of the LPIPS network")
    parser.add_argument(
        "--fvd-weights", metavar="FILE", help="TorchScript file of the FVD network, or `random` to try things out"
    )
    changes = parser.add_argument_group("changes of the protocol", "any of them makes it a custom one")
    changes.add_argument("--videos", type=at_least(1), help="clips, drawn once and for all; there must be so many")
    changes.add_argument("--limit", type=at_least(1), help="at most so many clips")
    changes.add_argument("--horizon", type=at_least(1), help="frames to predict")
    changes.add_argument("--clips-per-episode", type=at_least(1), help="evenly spaced; 1 starts at frame 0")
    changes.add_argument("--goal", action="store_true", default=None, help="put a clip's last frame in front of it")
    changes.add_argument("--stride", type=at_least(1), help="recorded frames for each frame of a clip")
    changes.add_argument("--num-samples", type=at_least(1), help="futures a clip")
    changes.add_argument("--temperature", type=number_from_zero, help="0 is argmax")
    changes.add_argument("--top-k", type=at_least(1), help="likeliest tokens to sample from")
    changes.add_argument("--runs", type=at_least(1), help="how often all is done, with other random numbers")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Evaluates, prints the tables and writes the results with the command that made them."""
    for option in ("out", "report"):
        check_place(option, getattr(args, option))
    from ivideogpt.metrics.journal import only_evaluation

    if args.out is not None and not int(os.environ.get("RANK", "0")):
        with only_evaluation(_journal(args.out)):
            _evaluate(args)
    else:
        _evaluate(args)


def _journal(out: str) -> Path:
    return Path(f"{out}.journal")


def _evaluate(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape

    from ivideogpt.metrics.protocols import protocol_named
    from ivideogpt.metrics.terminal import explanation_table, protocol_table, watching

    console = Console(width=None if sys.stdout.isatty() else 200)
    asked = protocol_named(args.protocol)
    asked = asked.changed(**{name: getattr(args, name) for name in CHANGES if getattr(args, name) is not None})

    import ivideogpt
    from ivideogpt.metrics.clips import ClipSet
    from ivideogpt.metrics.evaluation import evaluate
    from ivideogpt.metrics.examples import gather
    from ivideogpt.metrics.explanation import explain
    from ivideogpt.metrics.judges import judges_for, other_networks
    from ivideogpt.metrics.measuring import Work
    from ivideogpt.metrics.report import write_report
    from ivideogpt.metrics.results import write_results

    with processes() as (rank, local_rank):
        device = args.device
        if device == "cuda" and "LOCAL_RANK" in os.environ:
            device = f"cuda:{local_rank}"
        wm = ivideogpt.from_pretrained(
            args.model, revision=args.revision, device=device, dtype=args.dtype, action_space=args.action_space
        )
        clips = ClipSet.open(args.data, asked.settled(wm.config))
        if args.limit is not None:
            clips = clips.at_most(args.limit)
        settled = clips.protocol
        judges = judges_for(settled, args.lpips_weights, args.fvd_weights, wm.device)
        journal = None if args.out is None else _journal(args.out)
        if rank == 0:
            console.print(protocol_table(settled), "")
            for metric, reason in judges.missing.items():
                console.print(f"[yellow]not measured:[/] {metric}: {escape(reason)}", highlight=False)
            if args.restart and journal is not None and journal.is_dir():
                shutil.rmtree(journal)
        with watching(console if rank == 0 else None) as watch:
            result = evaluate(
                wm, clips, settled, judges=judges, seed=args.seed, batch_size=args.batch_size, name=args.model,
                journal=journal, keep_journal=True, watch=watch,
            )  # fmt: skip
    if result is None:  # another process has it
        return
    result["notes"] += args.note
    result["command"] = shlex.join(["ivideogpt", *sys.argv[1:]])
    if args.out is not None:  # before anything that could go wrong
        write_results(result, args.out)
    show(console, result)
    if args.explain:
        with watching(console, "explain") as watch:
            result["explanation"] = explain(
                wm, clips, settled, judges, seed=args.seed, result=result, watch=watch,
                **other_networks(settled, judges, wm.device),
            )  # fmt: skip
        console.print(explanation_table(result["explanation"]))
        for reason, why in result["explanation"]["not_computed"].items():
            console.print(f"[yellow]not computed:[/] {reason}: {escape(why)}", highlight=False)
    if args.report is not None:
        work = Work(wm, clips, settled, judges, args.seed, args.batch_size)
        write_report(result, gather(work, result), args.report)
        print(f"wrote {args.report}")
    if args.out is not None:
        assert journal is not None
        write_results(result, args.out)
        print(f"wrote {args.out}")
        shutil.rmtree(journal)


def show(console: Console, result: dict[str, Any]) -> None:
    """Prints a result's tables and notes."""
    from ivideogpt.metrics.terminal import result_table, task_table

    console.print(result_table(result))
    tasks = task_table(result)
    if tasks is not None:
        console.print(tasks)
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """This process's rank, and its rank on this machine; joins the others where torchrun started several."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield (dist.get_rank() if dist.is_initialized() else 0), 0
        return
    from datetime import timedelta

    # gloo is enough: the processes only wait for each other, at the end for as long as the slowest takes
    dist.init_process_group("gloo", timeout=timedelta(days=14))
    try:
        yield dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0"))
    finally:
        dist.destroy_process_group()
