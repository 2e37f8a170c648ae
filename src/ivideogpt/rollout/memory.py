"""How many rows of a rollout run at once: as many as the device has memory for.

B clips, S samples a clip, R = B*S rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from warnings import warn

import torch

from ivideogpt.config import TransformerConfig

SHARE = 0.5
"""Part of the free memory that the rows' own positions may fill: the rest is for the frames and the allocator."""

HOST_MEMORY = Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Span:
    """Rows that run together: samples ``first_sample`` .. ``last_sample`` - 1 of clips ``first`` .. ``last`` - 1."""

    first: int
    last: int
    first_sample: int
    last_sample: int

    @property
    def clips(self) -> int:
        return self.last - self.first

    @property
    def samples(self) -> int:
        return self.last_sample - self.first_sample

    def halves(self) -> tuple[Span, Span]:
        """The span in two: clips apart, or the samples of the only clip."""
        if self.clips > 1:
            middle = (self.first + self.last) // 2
            return (
                Span(self.first, middle, self.first_sample, self.last_sample),
                Span(middle, self.last, self.first_sample, self.last_sample),
            )
        middle = (self.first_sample + self.last_sample) // 2
        return (
            Span(self.first, self.last, self.first_sample, middle),
            Span(self.first, self.last, middle, self.last_sample),
        )

    def rows(self, samples: int, device: torch.device) -> torch.Tensor:
        """Which of all rows these are, (R,) int64; ``samples`` is the S of the whole rollout."""
        clips = torch.arange(self.first, self.last, device=device)
        return (clips[:, None] * samples + torch.arange(self.first_sample, self.last_sample, device=device)).flatten()


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``, None if nobody tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not HOST_MEMORY.exists():
        return None
    line = next(line for line in HOST_MEMORY.read_text().splitlines() if line.startswith("MemAvailable"))
    available = int(line.split()[1]) * 1024
    try:  # a container may have less than the machine
        limit, used = (int((CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # none, or "max"
        return available
    return max(0, min(available, limit - used))


def row_bytes(config: TransformerConfig, own: int, shared: int) -> int:
    """Bytes of one row in float32: its keys and values, a layer's scores, and the logits with what is made of them.

    Args:
        config: of the transformer.
        own: positions of the row.
        shared: positions of the prefix.
    """
    scores = 2 * 4 * config.num_heads * 3 * (own + shared)
    return _cache_bytes(config, own) + scores + 4 * 6 * config.vocab_size + 4 * 4 * (config.embed_dim + config.mlp_dim)


def clip_bytes(config: TransformerConfig, shared: int) -> int:
    """Bytes of one clip in float32 while its context of ``shared`` positions is put through the transformer.

    The prefix, what the layers gave of it before it is put together, and one layer's activations.
    """
    return 4 * _cache_bytes(config, shared) + 4 * shared * (8 * config.embed_dim + 3 * config.mlp_dim)


def _cache_bytes(config: TransformerConfig, positions: int) -> int:
    assert config.num_kv_heads is not None and config.head_dim is not None
    return 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim * positions


def rows_that_fit(budget: int, samples: int, row: int, clip: int) -> int:
    """Rows that run at once: as many clips with all their samples as fit, or as many samples of one clip."""
    clips = budget // (clip + samples * row)
    return clips * samples if clips else max(1, (budget - clip) // row)


def spans(clips: int, samples: int, rows: int) -> list[Span]:
    """All clips and samples in spans of at most ``rows`` rows (or one)."""
    if rows >= samples:
        step = max(1, rows // samples)
        return [Span(start, min(start + step, clips), 0, samples) for start in range(0, clips, step)]
    return [
        Span(clip, clip + 1, start, min(start + max(1, rows), samples))
        for clip in range(clips)
        for start in range(0, samples, max(1, rows))
    ]


def run_in_spans(clips: int, samples: int, rows: int | None, run: Callable[[Span], None]) -> None:
    """Runs all rows span by span; one that is out of memory is split in two, which is said once.

    Args:
        clips: B.
        samples: S.
        rows: how many run at once, None for all.
        run: computes the rows of a span.

    Raises:
        torch.OutOfMemoryError: if a single row does not fit.
    """
    waiting = spans(clips, samples, clips * samples if rows is None else rows)[::-1]
    said = False
    while waiting:
        span = waiting.pop()
        try:
            run(span)
            continue
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or span.clips * span.samples == 1:
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not said:
            warn(
                f"out of memory with {span.clips * span.samples} rows at once: the rollout goes on in smaller batches",
                stacklevel=4,
            )
            said = True
        waiting += span.halves()[::-1]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory is short, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
