"""Precision of the weights in a rollout: how far each is from float32, and the fastest that draws the same tokens.

B clips, P positions of the context, F future frames, n tokens of a frame, A action size, V ids.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ivideogpt.layout import TokenLayout
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.capture import capturing
from ivideogpt.rollout.choice import available_precisions, decoder_for, forget
from ivideogpt.rollout.decoder import Branch, Decoder
from ivideogpt.rollout.frame import Drawing, FrameState, next_frame
from ivideogpt.rollout.sampling import Sampling

TIE = 1e-3
"""Two logits that are closer than this count as a tie: either id may be called the likeliest."""

_chosen: WeakKeyDictionary[Transformer, dict[str, str]] = WeakKeyDictionary()
_lock = threading.Lock()


@dataclass(frozen=True)
class PrecisionReport:
    """One precision against float32 on the same tokens, teacher-forced.

    Attributes:
        precision: its name.
        seconds_per_frame: median time of drawing one frame's tokens.
        kl: mean Kullback-Leibler divergence of its next-token distributions from those of float32, in nats.
        logit_error: largest absolute difference of a logit.
        worst_gap: where its likeliest id is another one, by how much float32 prefers its own; 0 if there is none.
    """

    precision: str
    seconds_per_frame: float
    kl: float
    logit_error: float
    worst_gap: float

    @property
    def agrees(self) -> bool:
        """Whether argmax decoding gives the ids of float32, up to ties."""
        return self.worst_gap <= TIE


def compare_precisions(
    transformer: Transformer,
    layout: TokenLayout,
    context_tokens: Tensor,
    slot_actions: Tensor | None = None,
    precisions: tuple[str, ...] | None = None,
    num_frames: int = 6,
    repeats: int = 3,
) -> list[PrecisionReport]:
    """Measures precisions on an argmax rollout of float32; run in inference mode.

    Args:
        transformer: whose weights are measured.
        layout: token arithmetic of the model.
        context_tokens: (B, P).
        slot_actions: (B, F, A), normalised; the frames take theirs from it in turn.
        precisions: names; None for all that this machine has.
        num_frames: frames that are compared, or as many as the positions hold.
        repeats: of the timing.
    """
    device = context_tokens.device
    num_frames = min(num_frames, layout.max_horizon(transformer.config.max_positions))
    batch = len(context_tokens)
    greedy = Drawing(Sampling(temperature=0.0))
    blank = torch.zeros(batch, layout.dynamics_tokens_per_frame, device=device)
    capacity = layout.frame_stride * num_frames

    def action(index: int) -> Tensor | None:
        return None if slot_actions is None else slot_actions[:, index % slot_actions.shape[1]]

    def logits(decoder: Decoder, branch: Branch, tokens: Tensor) -> Tensor:
        """(B, F, n, V) of the frames ``tokens`` (B, F, n + 1), teacher-forced."""
        branch.length = 0
        hidden = [decoder.feed(branch, tokens[:, 0, :1], action(0))]
        for index in range(num_frames):
            inner = tokens[:, index, 1:]
            if index + 1 < num_frames:  # with the next frame's slot, which its action is added to
                last, slot = inner, tokens[:, index + 1, :1]
                hidden.append(decoder.feed(branch, torch.cat([last, slot], dim=1), action(index + 1)))
            else:
                hidden.append(decoder.feed(branch, inner))
        states = torch.cat(hidden, dim=1).unflatten(1, (num_frames, layout.frame_stride))
        return decoder.logits(states[:, :, :-1], greedy.sampling)

    def seconds(decoder: Decoder, branch: Branch) -> float:
        times = []
        for _ in range(repeats + 1):
            _wait(device)
            start = time.perf_counter()
            next_frame(decoder, branch, layout, FrameState.start(batch, device), action(0), blank, greedy)
            _wait(device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    reference = decoder_for(transformer, "float32")
    branch = reference.branch(reference.prefill(context_tokens), 1, capacity)
    state, drawn = FrameState.start(batch, device), []
    for index in range(num_frames):
        frame = next_frame(reference, branch, layout, state, action(index), blank, greedy)
        state = frame.state
        drawn.append(frame.tokens)
    tokens = torch.stack(drawn, dim=1)
    wanted = logits(reference, branch, tokens)
    reports = []
    for precision in precisions or available_precisions(transformer):
        decoder = decoder_for(transformer, precision)
        branch = decoder.branch(decoder.prefill(context_tokens), 1, capacity)
        found = logits(decoder, branch, tokens)
        log_p, log_q = wanted.log_softmax(-1), found.log_softmax(-1)
        likeliest = wanted.gather(-1, found.argmax(-1, keepdim=True))
        reports.append(
            PrecisionReport(
                precision=precision,
                seconds_per_frame=seconds(decoder, branch),
                kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp_min(0)),
                logit_error=float((wanted - found).abs().max()),
                worst_gap=float((wanted.amax(-1, keepdim=True) - likeliest).max()),
            )
        )
    return reports


def resolve_precision(
    precision: str | None,
    transformer: Transformer,
    layout: TokenLayout,
    context_tokens: Tensor,
    slot_actions: Tensor | None = None,
) -> str | None:
    """``precision``, with ``"auto"`` replaced by the fastest on this machine whose argmax ids are those of float32.

    Up to ties, that is, and on some frames that follow the first context it is asked with: a probe, not a proof, which
    takes some seconds for a model of full size. It is done once for a transformer on a device; training the model
    further does not repeat it. Sampled tokens may differ from those of float32 where a draw falls between two.
    """
    if precision != "auto":
        return precision
    device = str(context_tokens.device)
    with _lock:
        chosen = _chosen.setdefault(transformer, {})
        if device not in chosen:
            one_action = None if slot_actions is None else slot_actions[:1]
            reports = compare_precisions(transformer, layout, context_tokens[:1], one_action)
            agreeing = [report for report in reports if report.agrees]  # none of weights that are not finite
            best = min(agreeing, key=lambda report: report.seconds_per_frame, default=reports[0])
            chosen[device] = best.precision
            for report in reports:
                if report.precision != best.precision:
                    forget(transformer, report.precision)
        return chosen[device]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        with capturing:  # which waiting for the device would break
            torch.cuda.synchronize(device)
