"""Sampling of a token from the logits of a position: temperature, top-k, and a generator per call."""

from __future__ import annotations

import torch
from torch import Tensor


def check_sampling(temperature: float, top_k: int | None) -> None:
    """Refuses settings that :func:`sample_token` has no meaning for.

    Raises:
        ValueError: if ``temperature`` is negative or not finite, or ``top_k`` below 1.
    """
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number >= 0 (0 is argmax), got {temperature!r}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be an integer >= 1, or None for the whole vocabulary, got {top_k!r}")


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token per row from softmax(logits / temperature), cut to the ``top_k`` likeliest tokens.

    The draw is the Gumbel-max trick: one exponential number per candidate, taken from ``generator`` in row order, and
    an argmax; nothing waits for the device. The same logits and the same generator state give the same tokens. Rows
    are independent draws from one stream, so a row's token depends on its place in the batch too.

    Args:
        logits: (B, V).
        temperature: 0 takes the likeliest token and draws nothing from the generator.
        top_k: candidates a row; None, or more than V, is all of them.
        generator: on the device of ``logits``; the global one of that device if None.

    Returns:
        Token ids (B,), int64.
    """
    if temperature == 0.0 or top_k == 1:
        return logits.argmax(dim=-1)
    candidates = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, candidates = logits.topk(top_k, dim=-1)  # (B, k)
    scores = logits.float() / temperature
    noise = torch.empty_like(scores).exponential_(generator=generator)
    # argmax of logits + Gumbel noise, which is -log of an exponential number; a noise of zero would give inf
    choice = (scores - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()).argmax(dim=-1, keepdim=True)
    return (choice if candidates is None else candidates.gather(-1, choice)).squeeze(-1)


def copy_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """A generator on ``device`` in the state of ``generator``, which stays as it is.

    Without a generator the copy is seeded from torch's global one, so that ``torch.manual_seed`` governs it.

    Raises:
        ValueError: if ``generator`` lives on another kind of device.
    """
    copy = torch.Generator(device)
    if generator is None:
        return copy.manual_seed(int(torch.randint(2**62, ()).item()))
    check_generator(generator, device)
    return copy.set_state(generator.get_state())


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Refuses a generator that does not live on ``device``, where the logits are.

    Raises:
        ValueError: if it does not.
    """
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"the generator lives on {generator.device}, the model on {device}: "
            f"make it with torch.Generator({str(device)!r}).manual_seed(...)"
        )
