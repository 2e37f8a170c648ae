"""Evaluation protocols: everything that decides a number beside the model and the seed, as presets with a name.

A number means nothing without its protocol, so each preset fixes all of it, every result holds all fields of it, and
`compare` refuses two results whose fields differ. Figures after arXiv 2405.15223v3 unless `source` says otherwise.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

CUSTOM = "custom"
RESIZE = "largest centred square, bilinear with antialiasing, as bytes; frames of the right size are left as they are"
RANGE = "floats in [0, 1] with a data range of 1, the recording's bytes divided by 255, predictions not rounded"
BEST = "mean over the predicted frames of a sample, then the best sample, each metric on its own"


@dataclass(frozen=True)
class EvaluationProtocol:
    """How a model is measured.

    Args:
        name: of the preset; ``custom`` where anything was changed.
        data: which recordings the published numbers are of.
        split: of these recordings.
        videos: how many clips; None for all that there are.
        first_frame: ``"first"``: a clip begins with its episode; ``"even"``: ``clips_per_episode`` evenly spaced ones.
        clips_per_episode: clips of each episode.
        goal: whether a clip's last frame is put in front of it, counted in the context.
        stride: frames to move on for each frame of the clip; None for what brings the episode to ``target_rate``.
        strides: (name or pattern, stride) of sources that have one of their own.
        target_rate: frames a second to aim at where ``stride`` is None.
        resolution: height and width in pixels; None is the model's.
        resize: how frames get there.
        value_range: of the pixels.
        context_length: frames that are given; None is the model's.
        horizon: frames that are predicted.
        actions: whether the model is given the recorded actions; None is whatever the model takes.
        num_samples: futures of a clip.
        samples: what is made of them.
        temperature: of the sampling; 0 is argmax.
        top_k: likeliest tokens that are sampled from, None for all.
        runs: how often all of it is done, each time with other random numbers.
        metrics: that are reported.
        ssim: variant.
        lpips: network.
        fvd: feature network; None where there is no FVD in the protocol.
        fvd_frames: of a clip that go into it.
        shuffled_samples: futures of a clip with another clip's actions, which show whether actions are followed.
        source: where the protocol comes from.
        base: the preset that a custom protocol was made of.
    """

    name: str = CUSTOM
    data: str = "any"
    split: str = "any"
    videos: int | None = None
    first_frame: str = "first"
    clips_per_episode: int = 1
    goal: bool = False
    stride: int | None = 1
    strides: tuple[tuple[str, int | None], ...] = ()
    target_rate: float = 3.0
    resolution: int | None = None
    resize: str = RESIZE
    value_range: str = RANGE
    context_length: int | None = None
    horizon: int = 10
    actions: bool | None = None
    num_samples: int = 1
    samples: str = BEST
    temperature: float = 1.0
    top_k: int | None = 100
    runs: int = 3
    metrics: tuple[str, ...] = ("psnr", "ssim", "lpips", "mse", "fvd")
    ssim: str = "11 x 11 Gaussian, sigma 1.5, windows inside of the frame, mean over channels"
    lpips: str = "vgg"
    fvd: str | None = "i3d"
    fvd_frames: str = "all frames of the clip, the context as the model reconstructs it; all samples"
    shuffled_samples: int = 1
    source: str = "not published"
    base: str | None = None

    def __post_init__(self) -> None:
        for name in ("videos", "clips_per_episode", "stride", "resolution", "context_length", "horizon", "num_samples",
                     "top_k", "runs", "shuffled_samples"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} of a protocol must be a whole number from 1 on, got {value!r}")
        if not (isinstance(self.temperature, (int, float)) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature of a protocol must be a finite number from 0 on, got {self.temperature!r}")
        if self.first_frame not in ("first", "even") or (self.first_frame == "first" and self.clips_per_episode > 1):
            raise ValueError(
                f"first_frame must be 'first' or, for several clips an episode, 'even'; got {self.first_frame!r} and "
                f"{self.clips_per_episode}"
            )

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn, so that all runs and samples are the same."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def frames(self) -> int:
        """Frames of a clip, once the context length is known."""
        assert self.context_length is not None
        return self.context_length + self.horizon

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON has them."""
        return dataclasses.asdict(self) | {
            "metrics": list(self.metrics),
            "strides": [list(one) for one in self.strides],
        }

    def changed(self, **changes: Any) -> EvaluationProtocol:
        """With other values; it is then a custom protocol that remembers what it was made of.

        Raises:
            ValueError: for a value that makes no sense.
        """
        if changes.get("clips_per_episode", 1) > 1:
            changes["first_frame"] = "even"
        new = dataclasses.replace(self, **changes)
        if new == self:
            return self
        return dataclasses.replace(new, name=CUSTOM, base=self.base or (None if self.name == CUSTOM else self.name))

    def settled(self, config: Any) -> EvaluationProtocol:
        """With what a preset leaves to the model written out, for a model that fits it.

        Args:
            config: of the world model.

        Raises:
            ValueError: naming what does not fit.
        """
        found = {
            "context_length": config.context_length,
            "resolution": config.tokenizer.resolution,
            "actions": config.action_dim is not None,
        }
        if self.actions is not None and self.actions != found["actions"]:
            raise ValueError(
                f"the protocol {self.name!r} gives the model its recorded actions, and this model takes none; "
                f"{_other(self)}or load a model with actions"
                if self.actions
                else f"the protocol {self.name!r} is one without actions, and this model needs actions of width "
                f"{config.action_dim}; {_other(self)}or load a model without actions"
            )
        for name in ("context_length", "resolution"):
            wanted = getattr(self, name)
            if wanted is not None and wanted != found[name]:
                raise ValueError(
                    f"the protocol {self.name!r} has {name} {wanted}, this model has {found[name]}; choose a model "
                    f"that fits or --protocol custom, which takes the model's"
                )
        runs = 1 if self.greedy else self.runs  # argmax gives the same every time
        samples = 1 if self.greedy else self.num_samples
        shuffled = min(self.shuffled_samples, samples)
        return dataclasses.replace(self, **found, runs=runs, num_samples=samples, shuffled_samples=shuffled)

    def rows(self) -> list[tuple[str, str]]:
        """What a person reads of it: (what, how)."""
        named = self.name if self.base is None else f"{self.name}, made of {self.base}"
        start = "frame 0 of the episode" if self.first_frame == "first" else f"{self.clips_per_episode} evenly spaced"
        rate = f"stride {self.stride}" if self.stride is not None else f"brought to {self.target_rate:g} Hz"
        rate += "".join(f", {name}: {stride or 'by its rate'}" for name, stride in self.strides)
        actions = {True: "as recorded", False: "none", None: "as the model takes them"}[self.actions]
        sampling = "argmax" if self.greedy else f"temperature {self.temperature:g}, top-k {self.top_k or 'off'}"
        context, size = self.context_length or "the model's context", self.resolution or "the model's"
        return [
            ("protocol", named),
            ("data", f"{self.data}; split {self.split}; {self.videos or 'all'} clips, starting at {start}; {rate}"),
            ("frames", f"{self.horizon} predicted from {context}{', the goal in front' * self.goal} at {size} px; "
                       f"{self.resize}"),
            ("actions", actions),
            ("samples", f"{self.num_samples} a clip, {sampling}, {self.runs} runs; {self.samples}"),
            ("values", self.value_range),
            ("SSIM", self.ssim),
            ("LPIPS", f"network {self.lpips}"),
            ("FVD", "not in this protocol" if self.fvd is None else f"network {self.fvd}; {self.fvd_frames}"),
            ("source", self.source),
        ]  # fmt: skip


def _other(protocol: EvaluationProtocol) -> str:
    twin = {"bair": "bair-action-free", "bair-action-free": "bair"}.get(protocol.name)
    return f"choose --protocol {twin} or custom, " if twin else "choose --protocol custom, "


_PAPER = "arXiv 2405.15223v3, section 4.1 and appendix"
_STOCHASTIC: dict[str, Any] = {"num_samples": 100, "temperature": 1.0, "top_k": 100, "runs": 3, "source": _PAPER}
_BAIR: dict[str, Any] = {
    "data": "BAIR robot pushing (softmotion30_44k), camera image_aux1", "split": "test", "videos": 256,
    "resolution": 64, "context_length": 1, "horizon": 15, **_STOCHASTIC,
}  # fmt: skip
_ROBONET: dict[str, Any] = {
    "data": "RoboNet, actions padded or cut to 5 numbers", "split": "the 256 test videos", "videos": 256,
    "context_length": 2, "horizon": 10, "actions": True, **_STOCHASTIC,
}  # fmt: skip

PROTOCOLS: dict[str, EvaluationProtocol] = {
    protocol.name: protocol
    for protocol in (
        EvaluationProtocol("bair", actions=True, **_BAIR),
        EvaluationProtocol("bair-action-free", actions=False, **_BAIR),
        EvaluationProtocol("robonet-64", resolution=64, **_ROBONET),
        EvaluationProtocol("robonet-256", resolution=256, **_ROBONET),
        EvaluationProtocol(
            "vp2",
            data="VP2 robosuite or RoboDesk recordings",
            split="mask/valid",
            resolution=64,
            context_length=2,
            horizon=10,
            actions=True,
            num_samples=1,
            source=f"{_PAPER}: frames and horizon of VP2's planner. The published VP2 numbers are success rates of "
            "planning, which a video metric does not give",
        ),
        EvaluationProtocol(
            "ucf101-class",
            data="UCF-101, class-conditional",
            split="train",
            resolution=256,
            context_length=1,
            horizon=16,
            actions=False,
            num_samples=1,
            metrics=("fvd", "psnr", "ssim", "lpips"),
            fvd="i3d",
            source="a table that lists a gFVD of 254.8 for 17 x 256 x 256 clips; its data set is probably UCF-101, and "
            "its source was not found: do not quote it beside your number",
        ),
        EvaluationProtocol(
            "craftbench",
            data="Video-CraftBench",
            split="test",
            actions=False,
            context_length=1,
            num_samples=1,
            horizon=15,
            metrics=("ssim", "lpips"),
            fvd=None,
            source="arXiv 2602.10102 for the metrics (SSIM and LPIPS part only). Context, horizon and sampling are "
            "this package's choice, for they were not checked against the source",
        ),
        EvaluationProtocol(CUSTOM),
    )
}


def protocol_named(name: str) -> EvaluationProtocol:
    """The preset of that name.

    Raises:
        ValueError: naming the nearest.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    near = difflib.get_close_matches(name, PROTOCOLS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(PROTOCOLS)}"
    raise ValueError(f"there is no protocol {name!r}; {hint}")


def differing_fields(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Fields of two protocols (:meth:`EvaluationProtocol.to_json`) that differ, as ``name: x against y``.

    A field that a file of an older version lacks is as it was then, at its default.
    """
    usual = EvaluationProtocol().to_json()
    one, other = usual | first, usual | second
    return [
        f"{name}: {one.get(name)!r} against {other.get(name)!r}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]
