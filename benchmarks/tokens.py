"""Benchmark of training from tokens: updates a second of a transformer from pixels against those from its token set.

    python benchmarks/tokens.py [--updates 2] [--repeats 5] [--segment-length 16] [--batch-size 4] [--device cuda]

Both sides train copies of the same model on clips of the same recordings, in one process, in turn. The pixel side reads
and decodes clips, runs the frozen tokenizer on them and updates; the token side reads tokens and updates. Loading is in
the same process on both sides, so that all of its work is counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if str(Path(__file__).resolve().parents[1]) not in sys.path:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from ivideogpt import from_pretrained
from ivideogpt.data import TokenDataModule, TokenSet, VideoDataModule
from ivideogpt.data.reader import load_manifest, resolve_source
from ivideogpt.training import TransformerModule
from ivideogpt.training.tokenization import tokenize_clips

DATA = "embedded:train"
SIDES = ("pixels", "pixels, augmented", "tokens")


def batches_of(data: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """Training batches without end, on ``device``."""
    while True:
        for batch in data.train_dataloader():
            moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
            yield data.on_after_batch_transfer(moved)


def trainer_of(model: str, data: Any, device: torch.device) -> Callable[[], float]:
    """A function that makes one update from the next batch and gives its loss."""
    wm = from_pretrained(model, device=device)
    module = TransformerModule(wm.transformer, wm.tokenizer, wm.reward_head).to(device)
    module.train()
    parameters = [p for part in module.trained_parts() for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    batches = batches_of(data, device)

    def update() -> float:
        batch = next(batches)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = module.losses(module.predict_clip(batch), batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return update


def check_equal(model: str, tokens: TokenSet, device: torch.device) -> int:
    """Clips of which the token set has what the tokenizer gives for the pixels; all that were looked at.

    Raises:
        RuntimeError: one differs in more than a hundredth of its ids (near ties may fall otherwise in another batch).
    """
    from ivideogpt.data import ShardSet

    wm, sets, frames = from_pretrained(model, device=device), ShardSet(DATA), tokens.manifest["segment_length"]
    chosen = range(0, len(tokens), max(len(tokens) // 4, 1))
    for number in chosen:
        clip = tokens[number]
        episode = sets.episode(clip["episode"])
        assert episode is not None
        video = torch.from_numpy(episode.video[clip["start"] : clip["start"] + frames].copy())
        expected, _ = wm.tokenizer.tokenize(video.permute(0, 3, 1, 2)[None].to(device).float() / 255)
        if (expected[0].cpu() != clip["tokens"]).float().mean() > 0.01:
            raise RuntimeError(f"clip {number} of the token set is not what the tokenizer gives")
    return len(chosen)


def main(words: list[str] | None = None) -> int:
    """Measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ivideogpt-metaworld-nano", help="zoo name, Hub id or folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--updates", type=int, default=2, help="updates of a run (2)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side (5)")
    parser.add_argument("--segment-length", type=int, default=16, help="frames of a clip (16)")
    parser.add_argument("--batch-size", type=int, default=4, help="clips of a batch (4)")
    parser.add_argument("--out", type=Path, help="JSON (results/tokens-DEVICE.json)")
    args = parser.parse_args(words)
    device = torch.device(args.device)
    out = args.out or Path(__file__).parent / "results" / f"tokens-{device.type}.json"
    machine = common.describe_machine(device)

    with tempfile.TemporaryDirectory() as folder:
        context_length = from_pretrained(args.model).config.context_length
        common_options = {"segment_length": args.segment_length, "batch_size": args.batch_size, "num_workers": 0}
        options: dict[str, Any] = common_options | {"context_length": context_length}
        model = from_pretrained(args.model)
        tokenizing = common.timed(
            lambda: tokenize_clips(
                model.tokenizer, [DATA], folder, args.segment_length, clips_per_episode=1,
                batch_size=args.batch_size, device=device,
            ),
            device,
        )  # fmt: skip
        tokens = TokenSet(folder)
        checked = check_equal(args.model, tokens, device)
        resolution = tokens.manifest["resolution"]
        options["resolution"] = resolution
        sides = {
            "pixels": VideoDataModule(DATA, augment=False, **options),
            "pixels, augmented": VideoDataModule(DATA, augment=True, **options),
            "tokens": TokenDataModule(folder, **common_options),
        }
        updates = {name: trainer_of(args.model, data, device) for name, data in sides.items()}
        losses = {name: update() for name, update in updates.items()}  # the warm-up, not counted
        print("losses of the first update:", losses, file=sys.stderr)

        def run(name: str) -> Callable[[], list[float]]:
            return lambda: [common.timed(updates[name], device) for _ in range(args.updates)]

        seconds = common.alternate(
            {name: run(name) for name in sides},
            dict.fromkeys(sides, args.repeats),
            lambda name, index: print(f"{name}, run {index + 1}", file=sys.stderr),
        )
    results: dict[str, Any] = {}
    for name in SIDES:
        stats = common.summary([second for block in seconds[name] for second in block])
        results[name] = {"seconds": seconds[name], "stats": stats, "updates_per_second": 1 / stats["median"]}
    counts, pixels = tokens.manifest["counts"], load_manifest(resolve_source(DATA))
    raw = args.segment_length * resolution**2 * 3
    record: dict[str, Any] = {
        "benchmark": "tokens",
        "version": 1,
        "date": common.now(),
        "machine": machine | {"load_average_at_end": common.describe_machine(device)["load_average"]},
        "versions": common.describe_versions(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"},
        "checked_clips": checked,
        "sides": results,
        "ratios": {
            name: results["tokens"]["updates_per_second"] / results[name]["updates_per_second"] for name in SIDES[:-1]
        },
        "bytes": {
            "per_clip": counts["bytes"] / counts["clips"],
            "per_clip_raw_pixels": raw,
            "per_frame_in_shards": sum(s["size"] for s in pixels["shards"]) / pixels["counts"]["frames"],
        },
        "tokenizing": {
            "clips": counts["clips"],
            "seconds": tokenizing,
            "clips_per_second": counts["clips"] / tokenizing,
        },
    }
    common.write_json(out, record)
    rows = [
        (name, f"{r['stats']['median'] * 1e3:.0f} ms", f"{r['updates_per_second']:.2f}",
         f"{record['ratios'][name]:.2f}x" if name in record["ratios"] else "")
        for name, r in results.items()
    ]  # fmt: skip
    notes = [
        f"{record['bytes']['per_clip']:.0f} bytes a clip of {args.segment_length} frames, {raw} as raw pixels",
        f"tokenized {record['tokenizing']['clips_per_second']:.1f} clips/s",
    ]
    common.print_table("Training updates", ("side", "an update", "updates/s", "tokens are"), rows, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
