"""`ivideogpt data tokenize`: the clips of shard sets as token ids, so that training never touches pixels."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from ivideogpt.commands.arguments import at_least
from ivideogpt.data.commands.arguments import part


def add(commands: Any) -> None:
    """Adds the command and its options."""
    command = commands.add_parser(
        "tokenize",
        help="turn the clips of shard sets into token ids, for training without pixels",
        description="Tokenizes clips of every episode once and writes them with their actions and rewards. A "
        "transformer or a reward head is then trained with `class_path: ivideogpt.data.TokenDataModule`. A run that "
        "was stopped goes on when the same command is given again; tokens of another tokenizer are refused.",
    )
    command.add_argument("shards", nargs="+", metavar="SHARDS", help="shard sets, or embedded:train|heldout")
    command.add_argument(
        "--model", required=True, metavar="M", help="zoo name, Hub id or folder; a folder with a tokenizer is enough"
    )
    command.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    command.add_argument("--out", required=True, metavar="TOKENS", help="folder of the token set")
    clips = command.add_argument_group("clips")
    clips.add_argument("--segment-length", type=at_least(2), default=16, metavar="T", help="frames of a clip (16)")
    clips.add_argument("--context-length", type=at_least(1), metavar="N", help="shorten the tokenizer's context")
    starts = clips.add_mutually_exclusive_group()
    starts.add_argument(
        "--clips-per-episode", type=at_least(1), metavar="N", help="evenly spaced; 1 starts at frame 0 (default: 4)"
    )
    starts.add_argument("--every", type=at_least(1), metavar="N", help="a clip at every N-th start frame; 1 for all")
    rate = clips.add_mutually_exclusive_group()
    rate.add_argument("--stride", type=at_least(1), default=1, metavar="N", help="frames to move on (1)")
    rate.add_argument("--target-rate", type=float, metavar="HZ", help="move on as much as gives HZ frames a second")
    clips.add_argument("--goal", action="store_true", help="put the clip's last frame in front, as the goal")
    clips.add_argument(
        "--draws", type=at_least(0), default=0, metavar="N", help="augmentation draws of each clip; 0: none (0)"
    )
    clips.add_argument("--seed", type=at_least(0), default=0, help="of the draws (0)")
    clips.add_argument("--skip-bad", action="store_true", help="leave bad episodes out instead of stopping")
    work = command.add_argument_group("computing")
    work.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    work.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the products (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    work.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="clips at once (16)")
    work.add_argument("--workers", type=at_least(0), default=1, metavar="N", help="processes that read clips (1)")
    work.add_argument("--shard-clips", type=at_least(1), default=8192, metavar="N", help="clips of a shard (8192)")
    work.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="make the I-th of N parts, from 1")
    command.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Loads the tokenizer, writes the tokens and says what there is."""
    if args.target_rate is not None and not 0 < args.target_rate < float("inf"):
        raise ValueError(f"--target-rate must be a positive number, got {args.target_rate}")
    import torch

    from ivideogpt.data.commands.progress import episode_progress
    from ivideogpt.data.tokenized import load_token_manifest
    from ivideogpt.recipes.results import load_tokenizer
    from ivideogpt.training.tokenization import tokenize_clips
    from ivideogpt.zoo.hub import resolve

    device = _device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = load_tokenizer(resolve(args.model, args.revision))
    if args.context_length is not None:
        tokenizer.set_context_length(args.context_length)
    with episode_progress("tokenizing", "clips") as progress:
        done = tokenize_clips(
            tokenizer,
            args.shards,
            args.out,
            args.segment_length,
            stride=args.stride if args.target_rate is None else None,
            target_rate=args.target_rate or 3.0,
            goal=args.goal,
            clips_per_episode=None if args.every is not None else args.clips_per_episode or 4,
            every=args.every,
            draws=args.draws,
            seed=args.seed,
            batch_size=args.batch_size,
            num_workers=args.workers,
            device=device,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            shard_clips=args.shard_clips,
            part=args.part,
            policy="skip" if args.skip_bad else "error",
            command=shlex.join(["ivideogpt", *sys.argv[1:]]),
            model=args.model,
            progress=progress,
        )
    if not done.complete:
        print(
            f"part {args.part[0]}/{args.part[1]}: tokenized {done.made} clips; {done.folder} waits for the other parts"
        )
        return 0
    manifest = load_token_manifest(done.folder)
    counts, skipped = manifest["counts"], manifest["skipped"]
    left_out = f", {len(skipped)} bad episodes left out" if skipped else ""
    print(
        f"tokenized {done.made} clips now{left_out}; {done.folder} holds {counts['clips']} clips of "
        f"{manifest['sequence_length']} tokens, {counts['bytes'] / counts['clips']:.0f} bytes a clip"
    )
    return 0


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
