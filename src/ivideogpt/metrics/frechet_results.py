"""The Frechet distance of an evaluation, summed up from the features in its journal, video by video.

R runs, N videos, S samples, D features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ivideogpt.metrics.frechet import FrechetDistance
from ivideogpt.metrics.journal import Journal
from ivideogpt.metrics.judges import Judges
from ivideogpt.metrics.measuring import PREDICTED, REAL
from ivideogpt.metrics.protocols import EvaluationProtocol


def frechet_summary(
    kept: Journal, protocol: EvaluationProtocol, judges: Judges, videos: int, notes: list[str]
) -> dict[str, Any] | None:
    """The distance of every run; also that of half of the videos and of one sample of each, which are larger.

    Args:
        kept: the finished journal.
        protocol: of the evaluation.
        judges: with a feature network.
        videos: N.
        notes: gets what a reader must know.

    Returns:
        JSON; None where there is no distance, which the notes then say.
    """
    network = judges.features
    try:
        runs = [_distance(kept, network, run, range(videos)) for run in range(protocol.runs)]
    except ValueError as error:  # too few videos, or all the same
        notes.append(f"no {network.label}: {error}")
        return None
    notes += [f"{network.label}: {note}" for note in runs[0].notes()]
    values = [float(run.compute()) for run in runs]
    half = range(0, videos, 2)
    try:
        of_half = float(_distance(kept, network, 0, half).compute()) if len(half) > 1 else None
    except ValueError:  # every second video alike
        of_half = None
    return {
        "label": network.label,
        "network": network.name,
        "is_reference": network.is_reference,
        "features": network.num_features,
        "videos": {"real": runs[0].counts[0], "predicted": runs[0].counts[1]},
        "value": float(np.mean(values)),
        "std_over_runs": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "runs": values,
        "half_the_videos": of_half,
        "one_sample": (
            float(_distance(kept, network, 0, range(videos), 1).compute()) if protocol.num_samples > 1 else None
        ),
    }


def _distance(kept: Journal, network: Any, run: int, videos: range, samples: int | None = None) -> FrechetDistance:
    """The distance with the features of one run in it, added in the order of the videos."""
    metric = FrechetDistance(network.num_features, sync_on_compute=False)  # the journal holds what all have seen
    for video in videos:
        real = kept.features(kept.records[0, video], REAL)
        predicted = kept.features(kept.records[run, video], PREDICTED)
        assert real is not None and predicted is not None
        metric.update(torch.from_numpy(real.copy()), real=True)
        metric.update(torch.from_numpy(predicted[:samples].copy()), real=False)
    metric.compute()
    return metric
