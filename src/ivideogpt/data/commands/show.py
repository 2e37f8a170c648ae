"""`ivideogpt data show`: pictures of the episodes of a shard set, as a contact sheet or as an animation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction

    from ivideogpt.data.episode import Episode
    from ivideogpt.data.reader import ShardSet

SUFFIXES = (".png", ".gif", ".mp4")


def add(commands: _SubParsersAction) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "show",
        help="draw episodes of a shard set: a contact sheet (.png) or an animation (.gif, .mp4)",
        description="Draws episodes: as strips of frames below each other, or moving beside each other at their speed.",
    )
    command.add_argument("shards", help="folder of the shard set, or embedded:train|heldout")
    command.add_argument("--out", required=True, metavar="FILE", help="what to write: .png, .gif or .mp4")
    command.add_argument(
        "--episode", action="append", metavar="KEY", help="an episode's key or number; may be repeated"
    )
    command.add_argument("--episodes", type=int, default=6, metavar="N", help="or so many, evenly spread (6)")
    command.add_argument("--frames", type=int, default=12, metavar="N", help="frames of a strip, evenly spread (12)")
    command.set_defaults(func=_show)


def _show(args: Namespace) -> int:
    from ivideogpt.data.reader import ShardSet
    from ivideogpt.drawing import contact_sheet, save_png, save_video

    out = Path(args.out)
    if out.suffix not in SUFFIXES:
        raise ValueError(f"--out {args.out} must end in one of {', '.join(SUFFIXES)}")
    if args.episodes < 1 or args.frames < 1:
        raise ValueError(f"--episodes {args.episodes} and --frames {args.frames} must be at least 1")
    shards = ShardSet(args.shards)
    numbers = chosen(shards, args.episode, args.episodes)
    found: list[tuple[str, Episode]] = []
    for number in numbers:
        episode = shards.episode(number)
        assert episode is not None, "the policy is `error`"
        found.append((shards.key(number), episode))
    if out.suffix == ".png":
        spread = [
            episode.video[np.unique(np.linspace(0, len(episode) - 1, args.frames).round().astype(int))]
            for _, episode in found
        ]
        captions = [f"{key}  {len(episode)} frames  {episode.source} {episode.camera}" for key, episode in found]
        scale = -(-96 // min(video.shape[1] for video in spread))
        save_png(out, contact_sheet(spread, captions, scale=scale))
    else:
        save_video(out, side_by_side([episode.video for _, episode in found]), found[0][1].fps)
    print(f"{out}: {', '.join(key for key, _ in found)}")
    return 0


def chosen(shards: ShardSet, named: list[str] | None, count: int) -> list[int]:
    """Numbers of the episodes to draw.

    Args:
        shards: The set.
        named: Keys or numbers; None: `count` episodes, evenly spread.
        count: How many then.

    Raises:
        ValueError: There is no such episode.
    """
    if not named:
        return np.unique(np.linspace(0, len(shards) - 1, count).round().astype(int)).tolist()
    numbers = []
    for name in named:
        keys = (index for index in range(len(shards)) if shards.key(index) == name)
        number = next(keys, int(name) if name.isdecimal() else -1)
        if not 0 <= number < len(shards):
            raise ValueError(
                f"there is no episode {name!r} in {shards.folder}: keys are {shards.key(0)} to "
                f"{shards.key(len(shards) - 1)}, numbers 0 to {len(shards) - 1}"
            )
        numbers.append(number)
    return numbers


def side_by_side(videos: list[np.ndarray]) -> np.ndarray:
    """Videos (T, H, W, 3) as one, beside each other; a shorter one stays at its last frame, a lower one at the top."""
    length, height = max(map(len, videos)), max(video.shape[1] for video in videos)
    columns = []
    for video in videos:
        rest = length - len(video), height - video.shape[1]
        whole = np.pad(video, ((0, rest[0]), (0, 0), (0, 0), (0, 0)), mode="edge")
        columns.append(np.pad(whole, ((0, 0), (0, rest[1]), (0, 2), (0, 0))))
    return np.concatenate(columns, axis=2)
