"""Sampling of a token from the logits of a position: temperature, top-k, and one random number a draw.

A draw inverts the cumulative distribution, in the order of the ids, at one uniform number. So a whole rollout's chance
is a small tensor that is drawn before it starts: it does not depend on how a batch is split, on which decoder runs,
or on whether tokens are found one by one or several at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One stream for all rows, one stream a row, or None for one that is seeded from torch's global generator."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: likeliest tokens that are sampled from (ties with the last of them included); None for all.
        first_id: lowest id that may be drawn.
        last_id: highest id that may be drawn, None for the end of the vocabulary. A narrower range than the vocabulary
            renormalises what is left, which changes the distribution by the mass that it cuts off.
    """

    temperature: float = 1.0
    top_k: int | None = 100
    first_id: int = 0
    last_id: int | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that no random number matters."""
        return self.temperature == 0.0 or self.top_k == 1


def check_sampling(temperature: float, top_k: int | None) -> None:
    """Refuses settings that :func:`sample_token` has no meaning for.

    Raises:
        ValueError: if ``temperature`` is negative or not finite, or ``top_k`` below 1.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number >= 0 (0 is argmax), got {temperature!r}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be an integer >= 1, or None for the whole vocabulary, got {top_k!r}")


def sample_token(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Draws one token per row from softmax(logits / temperature), cut to the ``top_k`` likeliest tokens.

    Nothing waits for the device, and no shape depends on a value.

    Args:
        logits: (..., V), of the ids ``first_id`` to ``last_id`` only where ``sampling`` has a range: V of them.
        uniforms: (...), in [0, 1), one per row.
        sampling: temperature and top-k.

    Returns:
        Token ids (...), int64: ``first_id`` is added.
    """
    if sampling.greedy:
        return logits.argmax(dim=-1) + sampling.first_id
    scores = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        threshold = scores.topk(sampling.top_k, dim=-1, sorted=True).values[..., -1:]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
    # the sum of all is not quite 1: the number is scaled to it, so that it always falls on an id with some mass
    target = uniforms[..., None] * cumulative[..., -1:]
    chosen = (cumulative <= target).sum(dim=-1)
    last = (cumulative < cumulative[..., -1:]).sum(dim=-1)  # the first id that completes the sum
    return torch.minimum(chosen, last) + sampling.first_id


def draw_uniforms(generator: Generators, rows: int, count: int, device: torch.device) -> Tensor:
    """Uniform numbers (rows, count) in [0, 1) on ``device``, from one stream, or each row's from its own."""
    if isinstance(generator, Sequence):
        drawn = [torch.rand(count, generator=one, device=one.device, dtype=torch.float32) for one in generator]
        return torch.stack([numbers.to(drawn[0].device) for numbers in drawn]).to(device)
    at = device if generator is None else generator.device
    return torch.rand(rows, count, generator=generator, device=at, dtype=torch.float32).to(device)


def copy_generator(
    generator: Generators, device: torch.device, rows: int = 1
) -> torch.Generator | list[torch.Generator]:
    """A generator in the state of ``generator``, which stays as it is, or a list of them; a new one is on ``device``.

    Without a generator the copy is seeded from torch's global one, so that ``torch.manual_seed`` governs it.

    Raises:
        ValueError: if ``generator`` lives on neither ``device`` nor a CPU, or is a list of another length than
            ``rows``.
    """
    check_generator(generator, device, rows)
    if isinstance(generator, Sequence):
        return [torch.Generator(one.device).set_state(one.get_state()) for one in generator]
    if generator is None:
        return torch.Generator(device).manual_seed(int(torch.randint(2**62, ()).item()))
    return torch.Generator(generator.device).set_state(generator.get_state())


def generator_states(generator: torch.Generator | list[torch.Generator]) -> list[Tensor]:
    """Where each stream stands, to be given to :func:`set_generator_states`."""
    return [one.get_state() for one in (generator if isinstance(generator, list) else [generator])]


def set_generator_states(generator: torch.Generator | list[torch.Generator], states: list[Tensor]) -> None:
    """Puts each stream back to where it stood."""
    for one, state in zip(generator if isinstance(generator, list) else [generator], states, strict=True):
        one.set_state(state)


def check_generator(generator: Generators, device: torch.device, rows: int = 1) -> None:
    """Refuses a generator that lives neither on ``device`` nor on a CPU, or a list of another length.

    One on a CPU draws the same numbers for every device.

    Raises:
        ValueError: if it is such a one.
    """
    if generator is None:
        return
    if isinstance(generator, Sequence):
        if len(generator) != rows:
            raise ValueError(f"a list of generators needs one for each of the {rows} rows, got {len(generator)}")
        for one in generator:
            if one is None or isinstance(one, Sequence):
                raise ValueError(f"a list of generators holds torch.Generators, got {one!r} in it")
            check_generator(one, device)
    elif not hasattr(generator, "device"):
        raise ValueError(f"generator must be a torch.Generator, a list of them or None, got {generator!r}")
    elif generator.device.type not in (device.type, "cpu"):
        raise ValueError(
            f"the generator lives on {generator.device}, the model on {device}: "
            f"make it with torch.Generator({str(device)!r}).manual_seed(...)"
        )
