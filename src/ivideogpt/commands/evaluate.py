"""`ivideogpt evaluate`: measures a model's rollouts on packed episodes and writes the numbers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ivideogpt.commands.arguments import add_model, add_sampling, at_least


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a model on packed episodes",
        description="Rolls the model out on clips of a shard set and compares with what was recorded: PSNR, SSIM, MSE"
        " against repeating the last frame, rollouts with other episodes' actions, and rewards; per task and overall.",
    )
    add_model(parser)
    parser.add_argument("--data", required=True, metavar="SHARDS", help="a shard set's folder, or `embedded:heldout`")
    parser.add_argument("--out", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--horizon", type=at_least(1), default=10, help="frames to predict (default: 10)")
    parser.add_argument(
        "--clips-per-episode", type=at_least(1), default=1, help="evenly spaced; 1 starts at frame 0 (default: 1)"
    )
    parser.add_argument("--limit", type=at_least(1), help="at most so many clips (default: all)")
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="clips at once (default: 16)")
    parser.add_argument("--num-samples", type=at_least(1), default=1, help="futures a clip, best of them (default: 1)")
    add_sampling(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Evaluates, prints the table and writes the results with the command that made them."""
    if args.out is not None and not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {Path(args.out).parent}")
    import shlex
    import sys

    from rich.console import Console

    import ivideogpt
    from ivideogpt.commands.clips import ClipSet
    from ivideogpt.metrics.evaluation import evaluate_rollouts, format_table, write_results

    wm = ivideogpt.from_pretrained(args.model, revision=args.revision, device=args.device, dtype=args.dtype)
    clips = ClipSet(args.data, wm, args.horizon, args.clips_per_episode, args.batch_size, args.limit)
    result = evaluate_rollouts(
        wm,
        clips,
        horizon=args.horizon,
        temperature=args.temperature,
        seed=args.seed,
        num_samples=args.num_samples,
        top_k=args.top_k,
        name=args.model,
    )
    result["data"] = {"set": args.data, "shards": {s["name"]: s["sha256"] for s in clips.shards.manifest["shards"]}}
    result["command"] = shlex.join(["ivideogpt", *sys.argv[1:]])
    Console(width=None if sys.stdout.isatty() else 200).print(format_table(result))
    if args.out is not None:
        write_results(json.loads(json.dumps(result)), args.out)
        print(f"wrote {args.out}")
