"""Cases of the rollout benchmark: their sizes, models and targets, and the bytes that each must read.

B clips, S candidates a clip, R = B*S rows, F future frames, n tokens of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ivideogpt import WorldModel, from_pretrained
from ivideogpt.config import RewardHeadConfig, TokenizerConfig, TransformerConfig, WorldModelConfig

ACTION_DIM = 4


@dataclass(frozen=True)
class Case:
    """One thing that is timed.

    Attributes:
        name: as in the table and the JSON.
        kind: ``"interactive"``, ``"clip"`` (candidates too), ``"mbrl"`` or ``"decode_step"``.
        batch: B.
        samples: candidates S of one context.
        frames: F; of an interactive case, how many steps of this package are timed in all.
        baseline_frames: steps of an interactive case for the baselines; 0 for as many.
        rewards: whether the model has a reward head.
        model: ``"main"``, or ``"nano"`` for the embedded checkpoint on the CPU.
    """

    name: str
    kind: str
    batch: int = 1
    samples: int = 1
    frames: int = 1
    baseline_frames: int = 0
    rewards: bool = False
    model: str = "main"

    @property
    def rows(self) -> int:
        return self.batch * self.samples


def cases_of(
    device: str, quick: bool, tiny: bool, frames: int | None = None, baseline_frames: int | None = None
) -> dict[str, list[Case]]:
    """Cases by the word that chooses them; a clip's worth of steps is 30 frames for the published models."""
    if tiny:
        steps, clips, candidates, loop = (6, 3), [(1, 2), (2, 2)], [(3, 2)], (2, 2)
    elif device == "cuda":
        steps, clips, candidates, loop = (1000, 300), [(1, 14), (16, 14)], [(200, 10), (800, 10)], (32, 10)
    else:
        steps, clips, candidates, loop = (120, 30), [(4, 4), (1, 14)], [(16, 3)], (8, 3)
    if quick and not tiny:
        steps = (steps[0] // 4, steps[1] // 5)
        clips, candidates = [max(clips)], candidates[:1]
        if device == "cpu":
            candidates, loop = [(8, 2)], (4, 2)
    if frames is not None:
        steps = (frames, min(frames, steps[1]))
    if baseline_frames is not None:
        steps = (steps[0], min(baseline_frames, steps[0]))
    nano = steps if tiny else (150, 60)
    return {
        "interactive": [Case("interactive", "interactive", frames=steps[0], baseline_frames=steps[1])],
        "clip": [Case(f"clip {batch} x 2+{horizon}", "clip", batch, frames=horizon) for batch, horizon in clips],
        "candidates": [Case(f"candidates {many} x {h}", "clip", 1, many, h) for many, h in candidates],
        "decode_step": [Case("decode_step", "decode_step", frames=2 if tiny else 6 if quick else 11)],
        "mbrl": [Case(f"mbrl {loop[0]} x {loop[1]}", "mbrl", loop[0], frames=loop[1], rewards=True)],
        "nano": [Case("nano interactive", "interactive", frames=nano[0], baseline_frames=nano[1], model="nano")],
    }


@dataclass(frozen=True)
class Target:
    """What the project asks for: at least ``least`` of ``value`` (of a side's result, or ``"ratio_original"``)."""

    case: str
    value: str
    least: float
    text: str


TARGETS = {
    "cpu": [
        Target("interactive", "ratio_original", 8.0, ">= 8x original"),
        Target("clip 4 x 2+4", "ratio_original", 5.0, ">= 5x original"),
        Target("candidates 16 x 3", "ratio_original", 8.0, ">= 8x original"),
        Target("decode_step", "bandwidth_share", 0.6, ">= 60 % of bandwidth"),
        Target("nano interactive", "frames_per_second", 25.0, ">= 25 frames/s"),
    ],
    "cuda": [
        Target("interactive", "ratio_original", 40.0, ">= 40x original"),
        Target("interactive", "frames_per_second", 300.0, ">= 300 frames/s"),
        Target("clip 16 x 2+14", "ratio_original", 20.0, ">= 20x original"),
        Target("candidates 200 x 10", "ratio_original", 15.0, ">= 15x original"),
        Target("decode_step", "bandwidth_share", 0.5, ">= 50 % of bandwidth"),
        Target("nano interactive", "frames_per_second", 25.0, ">= 25 frames/s"),
    ],
}


def tiny_config(rewards: bool = False) -> WorldModelConfig:
    """Smallest model that has every part, for testing this program: its times mean nothing."""
    tokenizer = TokenizerConfig(
        resolution=32, block_channels=(8, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        codebook_size=32, dynamics_codebook_size=48, patch_size=4, max_attention_resolution=8, context_length=2,
    )  # fmt: skip
    transformer = TransformerConfig(
        vocab_size=tokenizer.vocab_size, num_layers=2, num_heads=2, embed_dim=32, mlp_dim=48, max_positions=160,
        action_dim=ACTION_DIM,
    )  # fmt: skip
    return WorldModelConfig(tokenizer, transformer, RewardHeadConfig(32) if rewards else None)


def build_model(size: str, rewards: bool, device: torch.device) -> WorldModel:
    """A seeded random model of a published size, the tiny one, or the embedded checkpoint; in eval mode."""
    if size == "nano":
        model = from_pretrained("ivideogpt-metaworld-nano", device=device)
        head = model.reward_head if rewards else None
        return WorldModel.from_parts(model.tokenizer, model.transformer, head, model.extras).eval()
    torch.manual_seed(0)
    if size == "tiny":
        config = tiny_config(rewards)
    else:
        config = WorldModelConfig.preset(f"64-{size}", action_dim=ACTION_DIM, reward=rewards)
    model = WorldModel(config).eval()
    if size == "tiny":  # so narrow a model with fresh weights looks at all positions alike, which would hide mistakes
        for layer in model.transformer.layers.parameters():
            if layer.ndim == 2:
                nn.init.normal_(layer, std=0.3)
    assert model.transformer.action_linear is not None
    # a fresh action layer is zero, which would hide an action that is added at the wrong place
    nn.init.normal_(model.transformer.action_linear.weight, std=0.2)
    return model.to(device)


def bytes_per_frame(wm: WorldModel, case: Case, precision: str | None) -> float | None:
    """Bytes that the token loop must at least read for one frame of all rows, averaged over the case's frames.

    n passes over the weights of the layers and the head (one more over the layers where a reward is read), each of
    which serves all rows, and in each pass the keys and values of the positions so far: the context's once a clip,
    since rows of one clip can share it, the others once a row. Weights count in the precision in which they are stored,
    keys and values in 4 bytes for float32 and 2 otherwise. Embeddings, activations and pixels are not counted. None
    where the precision is not known.
    """
    widths = {"float32": (4, 4), "bfloat16": (2, 2), "float16": (2, 2), "int8": (1, 2)}
    if precision not in widths:
        return None
    width, cache_width = widths[precision]
    layout, config = wm.layout, wm.transformer.config
    passes = layout.dynamics_tokens_per_frame
    layers = sum(parameter.numel() for parameter in wm.transformer.layers.parameters())
    weights = width * (passes * (layers + wm.transformer.lm_head.weight.numel()) + case.rewards * layers)
    assert config.num_kv_heads is not None and config.head_dim is not None
    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * cache_width
    longest = wm.config.max_horizon if case.kind == "interactive" else case.frames
    own = layout.frame_stride * longest / 2
    return weights + (passes + case.rewards) * position * (case.batch * layout.context_span + case.rows * own)
