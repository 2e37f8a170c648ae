"""What the recipe `grpo` changed: errors of sampled futures of held-out clips, before and after, on the same clips.

    lightning run recipes/grpo.yaml
    python benchmarks/grpo.py --after runs/grpo/model [--samples 4]

No times here. Both models imagine the same clips with generators of the same seeds; the interval is a bootstrap over
clips.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if str(Path(__file__).resolve().parents[1]) not in sys.path:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from ivideogpt import from_pretrained
from ivideogpt.data import VideoDataModule
from ivideogpt.metrics.video import psnr
from ivideogpt.training import GRPOModule

BEFORE, HELDOUT = "ivideogpt-metaworld-nano", "embedded:heldout"
BOOTSTRAPS = 10_000


def errors_of(name: str, data: VideoDataModule, samples: int) -> dict[str, Tensor]:
    """``l1`` and ``psnr`` (N,) of a model's sampled futures of each held-out clip, means over samples and frames."""
    wm = from_pretrained(name)
    module = GRPOModule(wm.transformer, wm.tokenizer, wm.reward_head, perceptual_weight=0.0, kl_weight=0.0)
    found: dict[str, list[Tensor]] = {"l1": [], "psnr": []}
    for number, batch in enumerate(data.val_dataloader()):
        batch = data.on_after_batch_transfer(batch)
        imagined = module.futures(batch, samples, torch.Generator().manual_seed(number))
        context = wm.config.context_length
        truth = batch["video"][:, context:].repeat_interleave(samples, dim=0)
        values = {"l1": module.judge(imagined, batch)["l1"], "psnr": psnr(imagined.video[:, context:], truth).mean(1)}
        for metric, value in values.items():
            found[metric].append(value.unflatten(0, (-1, samples)).mean(dim=1))
    return {metric: torch.cat(values) for metric, values in found.items()}


def interval(differences: Tensor) -> list[float]:
    """2.5 % and 97.5 % of the mean of (N,) differences, by bootstraps over clips."""
    rows = torch.randint(len(differences), (BOOTSTRAPS, len(differences)), generator=torch.Generator().manual_seed(0))
    return differences[rows].mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()


def main(words: list[str] | None = None) -> int:
    """Measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default=BEFORE, help=f"zoo name, Hub id or folder ({BEFORE})")
    parser.add_argument("--after", required=True, help="the trained one")
    parser.add_argument("--samples", type=int, default=4, help="futures of a clip (4)")
    parser.add_argument("--clips-per-episode", type=int, default=4, help="of each held-out episode (4)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "grpo-cpu.json")
    args = parser.parse_args(words)
    data = VideoDataModule(
        HELDOUT, HELDOUT, segment_length=6, context_length=2, batch_size=16, augment=False, num_workers=0,
        val_clips_per_episode=args.clips_per_episode,
    )  # fmt: skip
    before, after = (errors_of(name, data, args.samples) for name in (args.before, args.after))
    record: dict[str, Any] = {
        "benchmark": "grpo",
        "version": 1,
        "date": common.now(),
        "machine": common.describe_machine(torch.device("cpu")),
        "versions": common.describe_versions(),
        "settings": {"data": HELDOUT, "clips": len(before["l1"]), "samples": args.samples, "context": 2, "horizon": 4},
        "metrics": {},
    }
    rows = []
    for metric in before:
        change = after[metric] - before[metric]
        values = {"before": before[metric].mean().item(), "after": after[metric].mean().item()}
        values |= {"difference": change.mean().item()}
        record["metrics"][metric] = values | {"interval": interval(change), "per_clip": change.tolist()}
        low, high = record["metrics"][metric]["interval"]
        rows.append((metric, *(f"{value:.5g}" for value in values.values()), f"{low:.3g} to {high:.3g}"))
    common.write_json(args.out, record)
    common.print_table("Held-out futures", ("", "before", "after", "difference", "95 %"), rows, [])
    return 0


if __name__ == "__main__":
    sys.exit(main())
