"""All metrics in one of several processes, for the tests: `torchrun ... parallel_metrics.py OUT.json`.

Each process measures its share of the same 7 videos of 4 samples; the first writes what all found together.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torchmetrics import MetricCollection

from ivideogpt.metrics.frechet import VideoFrechetDistance
from ivideogpt.metrics.networks import random_network
from ivideogpt.metrics.rollouts import ActionFollowing, FrameMetric, RewardAccuracy
from ivideogpt.metrics.tokens import CodebookUse, TokenPerplexity

VIDEOS, SAMPLES, HORIZON = 7, 4, 3


def recordings() -> dict[str, Tensor]:
    """What is measured, the same in every process."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    truth = noise(VIDEOS, HORIZON, 3, 16, 16)
    return {
        "truth": truth,
        "samples": (truth[:, None] + 0.3 * noise(VIDEOS, SAMPLES, HORIZON, 3, 16, 16) - 0.15).clamp(0, 1),
        "shuffled": (truth[:, None] + 0.6 * noise(VIDEOS, SAMPLES, HORIZON, 3, 16, 16) - 0.3).clamp(0, 1),
        "rewards": noise(2, VIDEOS, HORIZON) * 10,
        "logits": 3 * noise(VIDEOS, 9, 20),
        "labels": torch.randint(0, 20, (VIDEOS, 9), generator=generator),
    }


def measure(numbers: list[tuple[int, list[int]]]) -> dict[str, Any]:
    """Measures samples of videos: (video, samples), of which several processes may have a part each."""
    given = recordings()
    metrics = {
        "psnr": FrameMetric("psnr", VIDEOS, HORIZON),
        "ssim": FrameMetric("ssim", VIDEOS, HORIZON),
        "mse": FrameMetric("mse", VIDEOS, HORIZON),
        "l1": FrameMetric(lambda a, b: (a - b).abs().mean((2, 3, 4)), VIDEOS, HORIZON, higher_is_better=False),
        "following": ActionFollowing(VIDEOS),
        "rewards": RewardAccuracy(),
        "perplexity": TokenPerplexity(left_out=(3,)),
        "codebook": CodebookUse(20),
        "frechet": VideoFrechetDistance(random_network(5)),
    }
    together = MetricCollection(dict(list(metrics.items())[:4]))
    for video, samples in numbers:
        row, which = slice(video, video + 1), torch.tensor([video])
        prediction = given["samples"][video, samples]
        together.update(prediction, given["truth"][row], which)
        metrics["following"].update(prediction, given["shuffled"][video, samples], given["truth"][row], which)
        metrics["frechet"].update(prediction, real=False)
        if 0 in samples:
            metrics["frechet"].update(given["truth"][row], real=True)
            metrics["rewards"].update(given["rewards"][0, row], given["rewards"][1, row])
            metrics["perplexity"].update(given["logits"][row], given["labels"][row])
            metrics["codebook"].update(given["labels"][row])
    found: dict[str, Any] = dict(together.compute())
    for name in ("following", "rewards", "perplexity", "codebook", "frechet"):
        value = metrics[name].compute()
        found |= {f"{name}_{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value.tolist() for name, value in found.items()}


def main(out: Path) -> None:
    """Measures a share and writes what all processes found."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    # uneven shares; video 3 is in both: half of its samples here, half there
    shares = [[(0, [0, 1, 2, 3]), (3, [2, 3])], [(video, [0, 1, 2, 3]) for video in (1, 2, 4, 5, 6)] + [(3, [0, 1])]]
    found = measure(shares[rank])
    if rank == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
