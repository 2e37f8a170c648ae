"""`ivideogpt predict`: rolls one recording out and writes truth | prediction | error."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivideogpt.commands.arguments import add_model, add_sampling, at_least

if TYPE_CHECKING:
    from ivideogpt.data.episode import Episode

FORMATS = (".gif", ".mp4", ".png")


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "predict",
        help="roll one recording out and write truth | prediction | error",
        description="Takes the first frames and the actions of a recording, imagines the rest and writes it beside the"
        " recording: .gif and .mp4 move, .png is a strip of frames.",
    )
    add_model(parser)
    parser.add_argument(
        "--input",
        required=True,
        metavar="EPISODE",
        help="an .npz recording, or a shard set (a folder, or `embedded:heldout`) with --episode",
    )
    parser.add_argument("--episode", metavar="KEY", help="key or number of the episode in a shard set (default: 0)")
    parser.add_argument("--output", required=True, metavar="FILE", help=f"where to write it: {', '.join(FORMATS)}")
    parser.add_argument("--horizon", type=at_least(1), help="frames to predict (default: as many as can be compared)")
    parser.add_argument("--start", type=at_least(0), default=0, help="first context frame (default: 0)")
    add_sampling(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Reads, rolls out, writes and prints the scores."""
    output = Path(args.output)
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"--output {args.output} ends in {output.suffix!r}; choose one of {', '.join(FORMATS)}")
    if not output.parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no folder {output.parent}")
    if output.suffix.lower() == ".mp4" and importlib.util.find_spec("av") is None:
        raise ValueError("writing .mp4 needs PyAV: pip install 'ivideogpt[video]', or choose .gif or .png")
    episode = read_episode(args.input, args.episode)

    import torch

    import ivideogpt
    from ivideogpt.data.transforms import fit_uint8, to_float
    from ivideogpt.drawing import save_comparison
    from ivideogpt.metrics.video import mse, psnr, ssim

    wm = ivideogpt.from_pretrained(
        args.model, revision=args.revision, device=args.device, dtype=args.dtype, action_space=args.action_space
    )
    t0 = wm.config.context_length
    horizon = args.horizon or _default_horizon(len(episode) - args.start - t0, wm)
    stop = args.start + t0 + horizon
    if len(episode) < stop:
        raise ValueError(
            f"{args.input} has {len(episode)} frames; frames {args.start} to {stop - 1} are needed"
            f" ({t0} given and {horizon} predicted from --start {args.start})"
        )
    frames = torch.from_numpy(episode.video[args.start : stop].copy()).permute(0, 3, 1, 2)  # (T, C, H, W) uint8
    truth = to_float(fit_uint8(frames, wm.config.tokenizer.resolution))[None]  # (1, T, C, S, S)
    actions = None
    if wm.config.action_dim is not None:
        if episode.actions is None:
            raise ValueError(f"{args.input} has no actions, and {args.model} needs {wm.config.action_dim} a frame")
        actions = torch.from_numpy(episode.actions[args.start : stop].copy())[None]
    generator = torch.Generator(wm.device).manual_seed(args.seed)
    pred = wm.rollout(
        truth[:, :t0].to(wm.device),
        actions,
        horizon=horizon,
        temperature=args.temperature,
        top_k=args.top_k,
        generator=generator,
    )
    video = pred.video.cpu()
    save_comparison(output, truth[0], video[0], t0)

    future, last = truth[:, t0:], truth[:, t0 - 1 : t0].expand(-1, horizon, -1, -1, -1)
    print(f"{output}: {horizon} frames predicted from {t0}")
    for name, other in (("prediction", video[:, t0:]), ("last frame repeated", last)):
        scores = [float(metric(other, future).mean()) for metric in (psnr, ssim, mse)]
        print(f"  {name:<20} PSNR {scores[0]:6.2f} dB   SSIM {scores[1]:.3f}   MSE {scores[2]:.5f}")
    if pred.rewards is not None:
        print(f"  predicted rewards    sum {float(pred.rewards.sum()):.2f}", end="")
        known = None if episode.rewards is None else float(episode.rewards[args.start + t0 : stop].sum())
        print("" if known is None else f", recorded {known:.2f}")


def read_episode(source: str, key: str | None) -> Episode:
    """The recording that `--input` and `--episode` name.

    Raises:
        ValueError: there is no such thing, or it is not a recording.
    """
    if source.lower().endswith(".npz"):
        if key is not None:
            raise ValueError(f"--episode {key} chooses from a shard set, but {source} is one recording")
        from ivideogpt.data.sources.npz import read_npz

        return read_npz(Path(source))
    from ivideogpt.data.reader import ShardSet

    shards = ShardSet(source)
    keys = [shards.key(index) for index in range(len(shards))]
    key = "0" if key is None else key
    if key not in keys and not (key.isdigit() and int(key) < len(keys)):
        raise ValueError(
            f"{source} has no episode {key!r}; give a number below {len(keys)} or a key such as {keys[0]!r}"
        )
    episode = shards.episode(keys.index(key) if key in keys else int(key))
    assert episode is not None  # the set's policy is to raise
    return episode


def _default_horizon(available: int, wm: Any) -> int:
    """As many frames as the recording can be compared with and the model has positions for; at least one."""
    return max(1, min(available, wm.layout.max_horizon(wm.config.transformer.max_positions)))
