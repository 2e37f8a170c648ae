"""The Frechet distance of an evaluation, summed up from the features in its journal, video by video."""

from __future__ import annotations

from typing import Any

from ivideogpt.metrics.journal import Journal
from ivideogpt.metrics.judges import Judges
from ivideogpt.metrics.protocols import EvaluationProtocol


def frechet_summary(
    kept: Journal, protocol: EvaluationProtocol, judges: Judges, videos: int, notes: list[str]
) -> dict[str, Any]:
    """What the overall summary says of it."""
    return {}
