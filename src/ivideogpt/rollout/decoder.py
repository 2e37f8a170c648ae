"""Decoder: what runs the transformer in a rollout; ``choice.py`` says which one a machine gets.

A decoder owns a copy of the transformer's weights in the form and precision that it is fast with. The context of B
clips goes through it once and becomes a *prefix*, which is never written again. Rows that continue from it are a
*branch*: R = B*S rows, where row b*S + s continues clip b. A branch holds only its own positions.

B clips, S rows a clip, P positions of the prefix, L new positions, n tokens of a frame, A action size, D embed_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ivideogpt.rollout.sampling import Sampling


@dataclass(frozen=True)
class Sampled:
    """Attributes: tokens (R, n) that were drawn, hidden (R, L, D) float32 of the positions that were fed first."""

    tokens: Tensor
    hidden: Tensor


class Branch(Protocol):
    """Keys and values of the rows' own positions, behind their clips' prefixes.

    Attributes:
        rows: R.
        length: own positions that are filled. Setting it to a smaller number rewinds: what lies behind is overwritten.
        capacity: own positions that there is room for.
    """

    rows: int
    length: int
    capacity: int

    def fork(self) -> Branch:
        """An independent branch from here on: the prefix is shared, the filled own positions are copied."""

    def rest(self) -> None:
        """Leaves to others what it holds beyond its positions; it may be used again all the same."""


class Decoder(Protocol):
    """Runs the transformer. All methods are called in inference mode and may be called from several threads.

    Attributes:
        precision: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"``: how the weights are stored.
        bytes_per_step: bytes of weights that one decode step reads.
        idle_bytes: bytes that it keeps for branches to come, and gives up where these do not fit otherwise.
    """

    precision: str
    bytes_per_step: int

    @property
    def idle_bytes(self) -> int: ...

    def prefill(self, tokens: Tensor) -> Any:
        """The prefix of ``tokens`` (B, P)."""

    def branch(self, prefix: Any, samples: int, capacity: int) -> Branch:
        """An empty branch of B * ``samples`` rows with room for ``capacity`` own positions."""

    def feed(self, branch: Any, tokens: Tensor, actions: Tensor | None = None, action_at: int = -1) -> Tensor:
        """Final normed hidden states (R, L, D), float32, of the next ``tokens`` (R, L), which the branch then holds.

        Args:
            branch: what this decoder's :meth:`branch` gave; it grows by L positions.
            tokens: (R, L) ids.
            actions: (R, A), normalised; what the action layer makes of them is added to the embedding of one token.
            action_at: which of the L tokens that is.
        """

    def logits(self, hidden: Tensor, sampling: Sampling) -> Tensor:
        """Logits (..., V) float32 of the ids that ``sampling`` allows, from ``hidden`` (..., D)."""

    def sample(
        self, branch: Any, lead: Tensor, actions: Tensor | None, uniforms: Tensor, sampling: Sampling
    ) -> Sampled:
        """Feeds ``lead`` (R, L), then draws n tokens one after another, feeding each but the last.

        The last one is left to the caller: it is fed in front of the next frame, or alone where its reward is needed
        now. So the branch grows by L + n - 1 positions.

        Args:
            branch: the rows.
            lead: (R, L) ids: the next slot, and in front of it the last token of the frame before, if still unfed.
            actions: (R, A), added at the last of ``lead``.
            uniforms: (R, n), the random numbers of the draws.
            sampling: how they are drawn.
        """
