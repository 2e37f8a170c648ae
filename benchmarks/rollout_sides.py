"""What the rollout benchmark times: this package by its public functions, and one run of a case on either side.

B clips, S candidates a clip, R = B*S rows, A action size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import Baseline, HfCached
from benchmarks.common import timed
from benchmarks.rollout_cases import Case
from ivideogpt import WorldModel


class Ours:
    """The package's own rollouts, through its public functions only.

    Args:
        wm: the world model.
        precision: what ``precision=`` is given; None where this version of the package has no such argument.
        dynamics_ids_only: whether a frame's tokens are drawn among the dynamics ids only.
    """

    def __init__(self, wm: WorldModel, precision: str | None, dynamics_ids_only: bool = False) -> None:
        self.wm = wm
        self.options: dict[str, Any] = {} if precision is None else {"precision": precision}
        if dynamics_ids_only:
            self.options["dynamics_ids_only"] = True
        self.precision: str | None = "float32" if precision is None else precision

    def resolve(self, context_frames: Tensor) -> None:
        """Lets ``"auto"`` choose, which is measured once a model, and notes in ``precision`` what it chose."""
        session = self.wm.session(context_frames, **self.options)
        chosen = getattr(session, "precision", getattr(session, "_precision", None))
        self.precision = chosen or self.precision
        session.close()

    def session(self, context_frames: Tensor) -> OursSession:
        return OursSession(self, context_frames)

    def rollout(
        self, context_frames: Tensor, actions: Tensor, horizon: int, samples: int = 1, return_frames: str | None = "all"
    ) -> Any:
        options = dict(self.options)
        if supports("return_frames"):
            options["return_frames"] = return_frames
        elif samples > 1:  # an older version: all candidates of a clip share its actions, which costs the same
            actions = actions[::samples]
        return self.wm.rollout(context_frames, actions=actions, horizon=horizon, num_samples=samples, **options)


class OursSession:
    """A session; in a version whose sessions end with the positions, another one starts from the newest frames."""

    def __init__(self, ours: Ours, context_frames: Tensor) -> None:
        self.ours = ours
        self._start(context_frames)

    def _start(self, context_frames: Tensor) -> None:
        self.session = self.ours.wm.session(context_frames, **self.ours.options)

    def step(self, action: Tensor) -> tuple[Any, Any]:
        if self.session.horizon_left == 0 and not supports("anchor_every", WorldModel.session):
            recent = self.session.frames[:, -self.ours.wm.layout.context_length :]
            self.session.close()
            self._start(recent)
        return self.session.step(action)


def supports(argument: str, function: Callable[..., Any] = WorldModel.rollout) -> bool:
    """Whether this version of ``function`` has ``argument``."""
    return argument in inspect.signature(function).parameters


Side = Ours | Baseline
Run = Callable[[], list[float]]


class Policy(nn.Module):
    """A small convolutional policy (B, C, H, W) -> (B, A), to stand for an agent that looks at each frame."""

    def __init__(self, channels: int, action_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride=2), nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Linear(32 * 16, action_dim), nn.Tanh(),
        )  # fmt: skip

    def forward(self, frames: Tensor) -> Tensor:
        return self.layers(frames)


def prepare(case: Case, side: Side, repeats: int, seed: int = 2) -> tuple[Run, Run]:
    """A warm-up and a timed run of ``case`` on ``side``; what they share, such as a session, is made at first use."""
    wm, device = side.wm, side.wm.device
    generator, t0 = torch.Generator().manual_seed(seed), wm.layout.context_length
    context = torch.rand(case.batch, t0, *_frame_shape(wm), generator=generator).to(device)
    if isinstance(side, Ours):
        side.resolve(context[:1])
    action_dim = wm.config.action_dim or 0
    actions = torch.randn(case.rows, t0 + case.frames, action_dim, generator=generator).to(device)

    if case.kind == "clip":

        def roll_out() -> list[float]:
            return [timed(lambda: side.rollout(context, actions, case.frames, case.samples), device)]

        return roll_out, roll_out

    if case.kind == "mbrl":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = Policy(context.shape[2], action_dim).to(device).eval()

        @torch.no_grad()
        def imagine() -> None:
            with _running(side):
                session = side.session(context)
                frame = context[:, -1]
                for _ in range(case.frames):
                    frame, _ = session.step(policy(frame))

        def loop() -> list[float]:
            return [timed(imagine, device)]

        return loop, loop

    if case.kind == "decode_step":
        return _decode_steps(case, side, context, actions)

    assert case.kind == "interactive"
    total = case.frames if isinstance(side, Ours) or not case.baseline_frames else case.baseline_frames
    block = max(1, total // repeats)
    live: list[Any] = []

    def steps(session: Any, count: int) -> list[float]:
        action = actions[:, 0]
        with _running(side):
            return [timed(lambda: session.step(action), device) for _ in range(count)]

    # on a GPU a library prepares itself for each length of a prompt when it meets it: all of them once
    lengths = wm.config.max_horizon if device.type == "cuda" and isinstance(side, Baseline) else 3

    def warm_up() -> list[float]:
        return steps(side.session(context), min(lengths, case.frames))

    def play() -> list[float]:
        if not live:  # one session for all blocks, so that all positions of a clip are seen
            live.append(side.session(context))
        return steps(live[0], block)

    return warm_up, play


def _running(side: Side) -> AbstractContextManager[None]:
    """A baseline's autocast around all steps: left at each step, it would cast the weights anew at each."""
    return side.running() if isinstance(side, Baseline) else nullcontext()


def _frame_shape(wm: WorldModel) -> tuple[int, int, int]:
    config = wm.config.tokenizer
    return config.in_channels, config.resolution, config.resolution


def _decode_steps(case: Case, side: Side, context: Tensor, actions: Tensor) -> tuple[Run, Run]:
    """Seconds of one frame's token loop, without prefill and without pixels."""
    wm, device = side.wm, side.wm.device
    if isinstance(side, HfCached):

        def cached_frames() -> list[float]:
            with side.running():
                prompt = wm.layout.prompt(wm.tokenizer.encode_context(context)[0])
                clip = side.clip(prompt, case.frames)
                clip.frame(actions[:, 0])  # holds the prefill
                return [timed(lambda: clip.frame(actions[:, 0]), device) for _ in range(case.frames - 1)]

        return cached_frames, cached_frames

    assert isinstance(side, Ours)

    def frames() -> list[float]:
        session = wm.session(context, **side.options)
        session.advance(actions[:, 0])
        return [timed(lambda: session.advance(actions[:, 0]), device) for _ in range(case.frames - 1)]

    return frames, frames
