"""Speculation: several tokens of a frame at a time, checked against what one at a time would have drawn.

A frame's tokens are guessed, all guesses of a window are fed in one pass, and each position draws its token with the
random number that it would have had anyway. As long as the draws agree with the guesses they are exactly the tokens
that plain decoding draws, because they were conditioned on the same tokens; the first that disagrees is right too, and
the next pass goes on behind it. So the result is that of plain decoding with the same random numbers (up to rounding
of the logits), and its distribution too. It takes fewer passes the more often the guess is right: a token is accepted
with the probability that the model gives it, which no other scheme with a fixed guess exceeds.

Stopped after a few passes the result is an approximation.

R rows, L lead tokens, n tokens of a frame, w tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ivideogpt.rollout.decoder import Branch, Decoder, Sampled
from ivideogpt.rollout.sampling import Sampling, sample_token

ORDERS = ("raster", "diagonal")


@dataclass(frozen=True)
class Speculation:
    """How a frame's tokens are guessed and checked; the guess is the frame before.

    Attributes:
        window: tokens that are drawn in one pass, or None for all that are left.
        passes: None goes on until every token is checked, which is exact. A number stops there and takes the draws as
            they are: approximate, with ``window`` None.
        order: ``"raster"`` draws all tokens anew in each pass. ``"diagonal"`` draws one anti-diagonal of the grid in
            each pass, all rows of the grid at once, with what the frame before had at tokens that are not drawn yet:
            2*side - 1 passes, approximate.
    """

    window: int | None = 4
    passes: int | None = None
    order: str = "raster"

    def __post_init__(self) -> None:
        for name, value in (("window", self.window), ("passes", self.passes)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} of a speculation must be an integer >= 1 or None, got {value!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order of a speculation must be one of {', '.join(ORDERS)}, got {self.order!r}")
        if not self.exact and self.window is not None:
            raise ValueError(
                f"an approximate speculation (passes {self.passes}, order {self.order}) draws whole frames: "
                f"give window=None, got {self.window}"
            )

    @property
    def exact(self) -> bool:
        """Whether the result is distributed as that of plain decoding."""
        return self.passes is None and self.order == "raster"


def sample_checked(
    decoder: Decoder,
    branch: Branch,
    lead: Tensor,
    actions: Tensor | None,
    uniforms: Tensor,
    sampling: Sampling,
    guess: Tensor,
    window: int | None,
) -> Sampled:
    """As ``decoder.sample``, by passes over a window of guessed tokens until all are checked.

    Rows go forward together, as far as the one that agrees least.

    Args:
        decoder: runs the transformer.
        branch: grows by L + n - 1 positions.
        lead: (R, L).
        actions: (R, A), added at the last of ``lead``.
        uniforms: (R, n).
        sampling: how tokens are drawn.
        guess: (R, n) ids.
        window: tokens of a pass, None for all that are left.
    """
    count = uniforms.shape[1]
    tokens = guess.clone()
    hidden, done = None, 0  # done: tokens that are final; the last of them is not fed yet
    while done < count:
        width = count - done if window is None else min(window, count - done)
        start = branch.length
        first = lead if hidden is None else tokens[:, done - 1 : done]
        fed = torch.cat([first, tokens[:, done : done + width - 1]], dim=1)
        if hidden is None:
            states = decoder.feed(branch, fed, actions, lead.shape[1] - 1)
            hidden = states[:, : lead.shape[1]]
        else:
            states = decoder.feed(branch, fed)
        drawn = sample_token(
            decoder.logits(states[:, first.shape[1] - 1 :], sampling), uniforms[:, done : done + width], sampling
        )
        agree = (drawn == tokens[:, done : done + width])[:, : width - 1].cumprod(dim=1).sum(dim=1)
        right = int(agree.min()) + 1  # the first that disagrees was drawn behind right tokens: it is right too
        tokens[:, done : done + width] = drawn
        done += right
        branch.length = start + first.shape[1] + right - 1
    assert hidden is not None
    return Sampled(tokens, hidden)


def sample_approximate(
    decoder: Decoder,
    branch: Branch,
    lead: Tensor,
    actions: Tensor | None,
    uniforms: Tensor,
    sampling: Sampling,
    guess: Tensor,
    speculation: Speculation,
) -> Sampled:
    """A frame in a fixed number of passes over all of its tokens; the branch ends behind ``lead``.

    The keys and values of the tokens belong to guesses, so the caller feeds all n tokens in front of the next frame.
    """
    count = uniforms.shape[1]
    tokens = guess.clone()
    rounds = _diagonals(count, tokens.device) if speculation.order == "diagonal" else None
    passes = speculation.passes or (len(rounds) if rounds is not None else count)
    hidden = None
    start = branch.length
    for index in range(passes):
        if hidden is None:
            states = decoder.feed(branch, torch.cat([lead, tokens[:, :-1]], dim=1), actions, lead.shape[1] - 1)
            hidden = states[:, : lead.shape[1]]
            states = states[:, lead.shape[1] - 1 :]
        else:
            branch.length = start + lead.shape[1]
            later = decoder.feed(branch, tokens[:, :-1])
            states = torch.cat([hidden[:, -1:], later], dim=1)
        drawn = sample_token(decoder.logits(states, sampling), uniforms, sampling)
        tokens = drawn if rounds is None or index >= len(rounds) else torch.where(rounds[index], drawn, tokens)
    branch.length = start + lead.shape[1]
    assert hidden is not None
    return Sampled(tokens, hidden)


def _diagonals(count: int, device: torch.device) -> list[Tensor]:
    """Masks (n,) of the anti-diagonals of a square grid of n tokens in raster order."""
    side = int(count**0.5)
    if side * side != count:
        raise ValueError(f"the diagonal order needs a square grid of tokens, got {count} tokens a frame")
    index = torch.arange(count, device=device)
    diagonal = index // side + index % side
    return [diagonal == step for step in range(2 * side - 1)]
