"""`ivideogpt data collect`: records episodes in a simulator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ivideogpt.data.commands.progress import episode_progress

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction


def add(commands: _SubParsersAction) -> None:
    """Adds the command."""
    sources = commands.add_parser("collect", help="record episodes in a simulator").add_subparsers(
        dest="data_source", metavar="SOURCE", required=True
    )
    command = sources.add_parser("metaworld", help="scripted experts with noise in Meta-World")
    command.add_argument("--task", action="append", required=True, help="task name, such as plate-slide; repeatable")
    command.add_argument("--episodes", type=int, required=True, help="episodes of each task")
    command.add_argument("--noise", type=float, nargs="+", default=[0.0], metavar="S", help="noise scales, in turn (0)")
    command.add_argument("--out", required=True, help="folder of the shard set")
    command.add_argument("--fidelity", choices=("paper", "fast"), default="fast", help="renderer (fast: 10 x faster)")
    command.add_argument("--workers", type=int, default=2, help="simulator processes (2)")
    command.add_argument("--seed", type=int, default=0, help="seeds goals and noise (0)")
    command.add_argument("--max-steps", type=int, default=100, help="agent steps of an episode at most (100)")
    command.add_argument("--tail", type=int, default=5, help="agent steps after the first success (5)")
    command.add_argument("--action-repeat", type=int, default=2, help="simulator steps of an agent step (2)")
    command.add_argument("--success-bonus", type=float, default=10.0, help="added to the reward at success (10)")
    command.add_argument("--resolution", type=int, default=64, help="pixels (64)")
    command.add_argument("--overwrite", action="store_true", help="replace a set that is there")
    command.set_defaults(func=_collect)


def _collect(args: Namespace) -> int:
    from ivideogpt.data.reader import load_manifest
    from ivideogpt.data.sources.metaworld import collect

    with episode_progress("collecting") as progress:
        folder = collect(
            args.task,
            args.episodes,
            args.noise,
            args.out,
            fidelity=args.fidelity,
            seed=args.seed,
            workers=args.workers,
            max_steps=args.max_steps,
            tail=args.tail,
            action_repeat=args.action_repeat,
            success_bonus=args.success_bonus,
            resolution=args.resolution,
            overwrite=args.overwrite,
            progress=progress,
        )
    counts = load_manifest(folder)["counts"]
    print(f"collected {counts['episodes']} episodes ({counts['frames']} frames): {folder}")
    return 0
