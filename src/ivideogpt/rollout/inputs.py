"""Checks of what a rollout is given: context frames, actions, horizon, number of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer


def check_context_frames(context_frames: Tensor, tokenizer: CompressiveTokenizer) -> None:
    """Refuses context frames that the tokenizer was not made for.

    Raises:
        ValueError: if they are not floats of shape (B, t0, C, H, W) in [0, 1].
    """
    tokenizer.check_frames(context_frames, "context_frames")
    given, wanted = context_frames.shape[1], tokenizer.context_length
    if given != wanted:
        raise ValueError(
            f"the model takes {wanted} context frames, got {given}: "
            "give the last ones of what was seen, or load the model with context_length="
        )


def check_actions(
    actions: Any,
    transformer: Transformer,
    shape: tuple[int | None, ...],
    device: Any,
    rows: tuple[int, ...] = (),
) -> Tensor | None:
    """Actions as a float tensor on ``device``, or None for an action-free model.

    Args:
        actions: tensor or array.
        transformer: whose ``action_dim`` they must have.
        shape: the expected shape without the action size; None stands for any length.
        device: where they go.
        rows: what their first size may be, where that is not fixed by ``shape``.

    Raises:
        ValueError: if they are missing, not wanted, of another shape, or not finite.
    """
    action_dim = transformer.config.action_dim
    if action_dim is None:
        if actions is not None:
            raise ValueError(
                "this model takes no actions (action_dim is None): leave them out, "
                "or load it with action_dim= to give it an action layer"
            )
        return None
    if actions is None:
        raise ValueError(f"this model needs actions of width {action_dim}, got None")
    actions = torch.as_tensor(actions, dtype=torch.float32)
    values = actions.detach().cpu()  # looked at there: one copy in place of several kernels that would be waited for
    actions = actions.to(device)
    expected = (*shape, action_dim)
    given = tuple(actions.shape)
    misfit = len(given) != len(expected) or any(e is not None and e != g for e, g in zip(expected, given, strict=True))
    if misfit or (rows and given[0] not in rows):
        wanted = ", ".join("T" if size is None else str(size) for size in expected)
        if rows:  # (T, T, A) -> (2 or 6, T, A)
            wanted = " or ".join(str(size) for size in dict.fromkeys(rows)) + wanted[1:]
        raise ValueError(f"actions must have shape ({wanted}) for this model and these context frames, got {given}")
    if not bool(torch.isfinite(values).all()):
        bad = values[~torch.isfinite(values)].flatten()[0].item()
        raise ValueError(f"actions must be finite, got {bad}")
    return actions


def check_frame_precision(precision: str | None, device: torch.device) -> torch.dtype | None:
    """What frames are decoded in; None where it is what ``device`` does unasked.

    Raises:
        ValueError: if it is no such precision.
    """
    known = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if precision not in known:
        raise ValueError(f"frame_precision must be float32, bfloat16 or None, got {precision!r}")
    return None if device.type == "cpu" and precision == "float32" else known[precision]


def check_horizon(horizon: int | None, actions: Tensor | None, tokenizer: Any, transformer: Transformer) -> int:
    """Number of future frames to predict.

    With ``horizon`` None it is what makes the video as long as ``actions`` (B, T, A), of which the last is then not
    used, as in a recording; without actions it is all that the positions allow.

    Raises:
        ValueError: if it is below 1, beyond the transformer's positions, or beyond the actions.
    """
    layout = tokenizer.layout
    longest = layout.max_horizon(transformer.config.max_positions)
    if horizon is None:
        horizon = longest if actions is None else actions.shape[1] - layout.context_length
    if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
        raise ValueError(f"horizon must be an integer >= 1, got {horizon!r}")
    if horizon > longest:
        raise ValueError(
            f"a horizon of {horizon} frames is beyond the model's {transformer.config.max_positions} positions, "
            f"which hold {longest} future frames after {layout.context_length} context frames"
        )
    if actions is not None:
        needed = layout.context_length - 1 + horizon
        if actions.shape[1] < needed:
            raise ValueError(
                f"a horizon of {horizon} frames needs at least {needed} actions "
                f"(from the first context frame on), got {actions.shape[1]}"
            )
    return horizon


def check_num_samples(num_samples: int) -> None:
    """Refuses a number of samples below one.

    Raises:
        ValueError: if it is.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples must be an integer >= 1, got {num_samples!r}")


def check_return_frames(return_frames: str | None) -> None:
    """Refuses another word than the known ones.

    Raises:
        ValueError: if it is none of ``"all"``, ``"last"`` and None.
    """
    if return_frames not in ("all", "last", None):
        raise ValueError(f"return_frames must be 'all', 'last' or None, got {return_frames!r}")


def check_anchor_every(anchor_every: int | None, longest: int, transformer: Transformer) -> int:
    """Steps that a session takes from one context.

    Raises:
        ValueError: if ``anchor_every`` is below 1 or above ``longest``, or the positions hold no future frame at all.
    """
    if longest < 1:
        raise ValueError(
            f"the context fills the model's {transformer.config.max_positions} positions: no future frame fits in"
        )
    if anchor_every is None:
        return longest
    if isinstance(anchor_every, bool) or not isinstance(anchor_every, int) or not 1 <= anchor_every <= longest:
        raise ValueError(
            f"anchor_every must be 1..{longest} steps (what the positions hold) or None, got {anchor_every!r}"
        )
    return anchor_every
