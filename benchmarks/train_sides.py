"""What the training benchmark times: one update of a transformer or of a tokenizer, on either side and rung by rung.

All sides of a case train the same parameters: a side makes its optimizer when its turn comes and drops it behind it.
B clips, T frames, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.baselines import llama_of
from ivideogpt import WorldModel
from ivideogpt.config import TokenizerConfig, WorldModelConfig
from ivideogpt.metrics.lpips import LPIPS
from ivideogpt.metrics.networks import Weights
from ivideogpt.models import transformer as blocks
from ivideogpt.models.dropout import dropped_attention
from ivideogpt.models.processor import has_slow_bfloat16
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.rollout.cpu.encoder import tiled_tokenizer_for
from ivideogpt.training import TokenizerModule, TransformerModule, frozen_tokenizer
from ivideogpt.training.optim import adamw

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Measures:
    """What a side does for speed.

    Args:
        ours: whether our modules train; the transformer otherwise is transformers' LLaMA with logits everywhere.
        fused: AdamW in one kernel.
        channels_last: memory format of the convolutions.
        masks: attention's dropout on a CPU in blocks, with masks of a few random words.
        kernels: the frozen tokenizer by compiled kernels, as far as these are for the device and the precision.
        tokenizer_bfloat16: the frozen tokenizer as a copy in bfloat16, outside of autocast.
        recompute: norms and activations of the tokenizer that is trained again in the backward pass.
        bfloat16: autocast to bfloat16 (``bf16-mixed``).
        compile: ``torch.compile``.
        residual_bfloat16: what the blocks hand on to each other, in bfloat16.
        tokens: batches of token ids, no tokenizer in the update.
    """

    ours: bool = True
    fused: bool = False
    channels_last: bool = False
    masks: bool = False
    kernels: bool = False
    tokenizer_bfloat16: bool = False
    recompute: bool = False
    bfloat16: bool = False
    compile: bool = False
    residual_bfloat16: bool = False
    tokens: bool = False


def has_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than those of float32 on ``device``: no side uses them elsewhere."""
    return device.type == "cuda" or not has_slow_bfloat16()


def transformer_sides(device: torch.device, compile: bool) -> dict[str, Measures]:  # noqa: A002
    """Sides by name; each but the first and those from tokens adds one measure to the one before it."""
    gpu = device.type == "cuda"  # autocast as published, on both sides
    rung = Measures(ours=False, bfloat16=gpu)
    sides = {"original": rung}
    rung = replace(rung, ours=True)
    sides["+ logits where there are labels"] = rung
    if not gpu:
        rung = replace(rung, masks=True)
        sides["+ attention with fast dropout"] = rung
    rung = replace(rung, fused=True)
    sides["+ fused AdamW"] = rung
    rung = replace(rung, channels_last=True)
    sides["+ channels-last tokenizer"] = rung
    if not gpu:
        rung = replace(rung, kernels=True)
        sides["+ kernels for the tokenizer"] = rung
    if not gpu and has_bfloat16(device):
        sides["ours, float32, from tokens"] = replace(rung, tokens=True)
    if has_bfloat16(device):
        rung = replace(rung, tokenizer_bfloat16=True)
        sides["+ bfloat16 tokenizer"] = rung
    if not gpu and has_bfloat16(device):
        rung = replace(rung, bfloat16=True)
        sides["+ bf16-mixed"] = rung
    if compile:
        rung = replace(rung, compile=True, masks=False)  # compiled blocks have torch's attention
        sides["+ torch.compile"] = rung
    if gpu:
        sides["ours, residual stream in float32, from tokens"] = replace(rung, tokens=True)
        rung = replace(rung, residual_bfloat16=True)
        sides["+ residual stream in bfloat16"] = rung
    sides["ours, from tokens"] = replace(rung, tokens=True)
    return sides


def tokenizer_sides(device: torch.device, compile: bool) -> dict[str, Measures]:  # noqa: A002
    """The same for the training of a tokenizer; the first side is the same module, run eagerly in NCHW."""
    gpu = device.type == "cuda"
    rung = Measures(bfloat16=gpu)
    sides = {"original": rung}
    rung = replace(rung, fused=True)
    sides["+ fused AdamW"] = rung
    rung = replace(rung, channels_last=True)
    sides["+ channels-last"] = rung
    rung = replace(rung, recompute=True)
    sides["+ recomputed activations"] = rung
    if not gpu and has_bfloat16(device):
        rung = replace(rung, bfloat16=True)
        sides["+ bf16-mixed"] = rung
    if compile:
        sides["+ torch.compile, which recomputes itself"] = replace(rung, compile=True, recompute=False)
    return sides


class Side(Protocol):
    """One way to train; ``flops`` of an update, as the model needs them."""

    measures: Measures
    flops: float

    def start(self) -> None:
        """Takes the parameters over."""

    def update(self) -> Tensor:
        """One update, and its loss."""

    def stop(self) -> None:
        """Gives everything back but the parameters."""


class _Trained:
    """What both kinds of side share: an optimizer that lives for one turn, autocast, and the update itself."""

    def __init__(self, parts: list[nn.Module], measures: Measures, device: torch.device, flops: float) -> None:
        self.parts, self.measures, self.device, self.flops = parts, measures, device, flops
        self.optimizer: AdamW | None = None

    def loss(self) -> Tensor:
        raise NotImplementedError

    def start(self) -> None:
        parameters = [p for part in self.parts for p in part.parameters() if p.requires_grad]
        if self.measures.fused:
            optimizer = adamw(self.parts, LEARNING_RATE, 0.01, (0.9, 0.999))
            assert optimizer.defaults["fused"]
        else:  # what torch picks when it is asked for nothing: many tensors at once on a GPU, one by one on a CPU
            optimizer = AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments, so that no update that is timed has to
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer = optimizer

    def update(self) -> Tensor:
        assert self.optimizer is not None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.measures.bfloat16):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def stop(self) -> None:
        self.optimizer = None


def _torchs_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def _no_tokenizer(tokenizer: CompressiveTokenizer) -> None:
    return None


class TransformerSide(_Trained):
    """A transformer on the tokens of a frozen tokenizer."""

    def __init__(self, wm: WorldModel, batch: Mapping[str, Tensor], measures: Measures) -> None:
        self.batch = {"tokens": batch["tokens"]} if measures.tokens else {"video": batch["video"]}
        self.wm, self.layout = wm, wm.layout
        self.run: Callable[[], Tensor]
        if measures.ours:
            options: dict[str, Any] = {
                "tokenizer_precision": "bfloat16" if measures.tokenizer_bfloat16 else "trainer",
                "residual_precision": "bfloat16" if measures.residual_bfloat16 else "trainer",
                "compile": measures.compile,
            }
            module = TransformerModule(wm.transformer, wm.tokenizer, **options)
            module.train()
            trained: nn.Module = wm.transformer
            self.run = lambda: module.losses(module.predict_clip(self.batch), self.batch)["loss"]
        else:
            self.llama = llama_of(wm).train()
            for layer in self.llama.model.layers:
                layer.self_attn.attention_dropout = wm.transformer.config.attention_dropout
            trained = self.llama
            self.run = self._original
        flops = transformer_flops(wm, batch["tokens"].shape)
        super().__init__([trained], measures, batch["video"].device, flops)

    def _original(self) -> Tensor:
        with torch.no_grad():
            tokens = self.batch["tokens"] if self.measures.tokens else self.wm.tokenizer.encode(self.batch["video"])
            labels = self.layout.labels(tokens)
        return self.llama(input_ids=tokens, labels=labels, use_cache=False).loss

    def loss(self) -> Tensor:
        return self.run()

    def start(self) -> None:
        set_format(self.wm.tokenizer, self.measures.channels_last)
        measures = self.measures
        blocks.dropped_attention = dropped_attention if measures.masks else _torchs_attention
        frozen_tokenizer.tiled_tokenizer_for = tiled_tokenizer_for if measures.kernels else _no_tokenizer
        if measures.kernels and not (measures.tokens or measures.bfloat16 or measures.tokenizer_bfloat16):
            tiled_tokenizer_for(self.wm.tokenizer)  # transforms the weights, once a training
        self.wm.transformer.compiles = self.measures.compile
        for layer in self.wm.transformer.layers:
            layer.compiles = self.measures.compile  # type: ignore[assignment]
        super().start()

    def stop(self) -> None:
        super().stop()
        blocks.dropped_attention = dropped_attention
        frozen_tokenizer.tiled_tokenizer_for = tiled_tokenizer_for


class TokenizerSide(_Trained):
    """A tokenizer with its pixel and perceptual losses; VGG's weights are random, which costs the same."""

    def __init__(self, module: TokenizerModule, video: Tensor, measures: Measures, flops: float = 0.0) -> None:
        self.module, self.video = module, video
        super().__init__([module.tokenizer], measures, video.device, flops)

    def loss(self) -> Tensor:
        context, future = self.module.split(self.video)
        return self.module.losses(self.module.tokenizer(context, future), context, future)["loss"]

    def start(self) -> None:
        tokenizer = self.module.tokenizer
        set_format(self.module, self.measures.channels_last)
        tokenizer.compiles = self.measures.compile
        tokenizer.save_memory(self.measures.recompute)
        super().start()


def set_format(module: nn.Module, channels_last: bool) -> None:
    """Lays the kernels of convolutions in ``module`` out as asked."""
    module.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def build_world_model(size: str, dropout: float, device: torch.device) -> WorldModel:
    """Random weights of a published size, or of the embedded model's."""
    config = WorldModelConfig.preset("nano" if size == "nano" else f"64-{size}")
    config = replace(config, transformer=replace(config.transformer, attention_dropout=dropout))
    torch.manual_seed(0)
    with device:  # a GPU draws half a billion weights at once
        return WorldModel(config)


def build_tokenizer_module(size: str, device: torch.device) -> TokenizerModule:
    """A tokenizer with random weights, and LPIPS over a random VGG."""
    import torchvision
    from safetensors.torch import save

    torch.manual_seed(0)
    with device:
        module = TokenizerModule(CompressiveTokenizer(TokenizerConfig.preset(size)))
    content = save(torchvision.models.vgg16(weights=None).features.state_dict(prefix="features."))
    module.perceptual = LPIPS("vgg", Weights(Path("random.safetensors"), "", False, content))
    module.freeze_part("perceptual")
    module.to(device)
    module.train()
    return module


def transformer_flops(wm: WorldModel, shape: tuple[int, ...]) -> float:
    """Arithmetic of an update: forward and backward of the transformer, without what no label needs.

    The frozen tokenizer does not count, on either side.
    """
    batch, length = shape
    return batch * wm.transformer.flops_per_sequence(length, wm.layout.context_span)


def counted_flops(update: Callable[[], Any]) -> float:
    """Arithmetic of ``update``, counted while it runs."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        update()
    return float(counter.get_total_flops())


class DifferentWorkError(AssertionError):
    """The sides do not compute the same, so that comparing their times would mean nothing."""


def check_same_work(wm: WorldModel, video: Tensor, gradients: bool, tolerance: float = 1e-3) -> dict[str, float]:
    """Compares loss (and gradients) of both sides in float32 without dropout.

    Returns:
        How far they differ, relative to the original's.

    Raises:
        DifferentWorkError: by more than ``tolerance``.
    """
    tokens = wm.tokenizer.encode(video)
    batch = {"video": video, "tokens": tokens}
    found: list[tuple[Tensor, list[Tensor]]] = []
    for ours in (False, True):
        side = TransformerSide(wm, batch, Measures(ours=ours, tokens=True))  # random codebooks are full of near ties
        for part in side.parts:
            part.eval()
        with torch.set_grad_enabled(gradients):
            loss = side.loss()
        if gradients:
            loss.backward()
        parameters = list(wm.transformer.parameters())  # the same tensors on both sides
        found.append((loss.detach(), [p.grad.clone() for p in parameters if p.grad is not None]))
        wm.zero_grad()
    (loss, expected), (own, grads) = found
    report = {"loss": float((own - loss).abs() / loss.abs())}
    if gradients:
        if len(grads) != len(expected):
            raise DifferentWorkError(f"gradients of {len(grads)} parameters and of {len(expected)}")
        difference = torch.stack([(a - b).norm() for a, b in zip(grads, expected, strict=True)]).norm()
        report["gradients"] = float(difference / torch.stack([g.norm() for g in expected]).norm())
    if not all(value <= tolerance for value in report.values()):
        raise DifferentWorkError(f"original and ours differ: {report}")
    return report


def equal_ids(device: torch.device, clips: int = 8) -> dict[str, float]:
    """Share of ids of the embedded model, for held-out recordings, that are float32's in each precision."""
    from ivideogpt import from_pretrained
    from ivideogpt.data import ShardSet
    from ivideogpt.training.frozen_tokenizer import FrozenTokenizer

    tokenizer = from_pretrained("ivideogpt-metaworld-nano", device=device).tokenizer
    shards, videos = ShardSet("embedded:heldout"), []
    for index in range(min(clips, len(shards))):
        episode = shards.episode(index)
        assert episode is not None
        videos.append(torch.from_numpy(episode.video[:16].copy()))
    video = torch.stack(videos).permute(0, 1, 4, 2, 3).to(device).float() / 255
    with torch.no_grad():
        exact = tokenizer.encode(video)
        with torch.autocast(device.type, torch.bfloat16):
            mixed = tokenizer.encode(video)
        own = FrozenTokenizer(tokenizer, "bfloat16")(video)
    return {
        "bf16-mixed": float((mixed == exact).float().mean()),
        "tokenizer_precision: bfloat16": float((own == exact).float().mean()),
    }
