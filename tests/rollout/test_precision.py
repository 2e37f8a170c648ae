"""Precisions of the weights: reports against float32, the choice of the fastest that agrees, and what cannot be had."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt.rollout import choice, precision
from ivideogpt.rollout.choice import available_precisions, decoder_for
from ivideogpt.rollout.cpu import why_unavailable
from ivideogpt.rollout.precision import PrecisionReport, compare_precisions, resolve_precision

Build = Callable[..., Any]
CPU = torch.device("cpu")


def clip() -> Tensor:
    return torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


NAMES = ["oxe-64-act-free", "bair-64-act-cond"]
# On the golden checkpoints, whose small random weights leave the likeliest ids close together: by how much a logit may
# be off, by how much float32 may prefer another id than the precision does, and the divergence of the distributions.
LIMITS = {
    "float32": (1e-4, 0.0, 1e-8),
    "float16": (1e-2, precision.TIE, 1e-6),
    "bfloat16": (5e-2, 1e-2, 1e-4),
    "int8": (2e-1, 1e-1, 1e-3),
}


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_accuracy_of_every_precision(golden: Build, name: str) -> None:
    import ivideogpt

    recorded = golden(name)
    model = ivideogpt.from_pretrained(recorded.folder)
    context = model.config.context_length
    tokens = model.layout.prompt(model.tokenizer.encode_context(recorded.video[:, :context])[0])[:, :-1]
    actions = recorded.tensors.get("actions")
    slot_actions = None if actions is None else model.layout.slot_actions(actions, 3)
    reports = compare_precisions(model.transformer, model.layout, tokens, slot_actions, num_frames=6)
    assert {report.precision for report in reports} == set(available_precisions(model.transformer))
    for report in reports:
        logit_error, worst_gap, kl = LIMITS[report.precision]
        assert report.logit_error <= logit_error, report
        assert report.worst_gap <= worst_gap, report
        assert report.kl <= kl, report
        assert report.seconds_per_frame > 0
        assert report.agrees == (report.worst_gap <= precision.TIE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_argmax_rollouts_of_the_golden_checkpoints(golden: Build, name: str, stored: str) -> None:
    import ivideogpt

    recorded = golden(name)
    model = ivideogpt.from_pretrained(recorded.folder)
    if stored not in available_precisions(model.transformer):
        pytest.skip(f"{stored} needs the compiled kernel: {why_unavailable()}")
    expected = recorded.tensors["greedy_tokens"]
    horizon = model.layout.num_frames(expected.shape[1]) - model.config.context_length
    context = recorded.video[:, : model.config.context_length]
    out = model.rollout(
        context, recorded.tensors.get("actions"), horizon=horizon, temperature=0, precision=stored
    )  # fmt: skip
    assert torch.equal(out.tokens, expected)
    torch.testing.assert_close(out.video, recorded.tensors["greedy_video"].float(), atol=4e-3, rtol=0)


def test_auto_is_the_fastest_that_agrees(tiny_world_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [
        PrecisionReport("float32", 3.0, 0.0, 0.0, 0.0),
        PrecisionReport("bfloat16", 2.0, 0.0, 0.0, 5e-4),
        PrecisionReport("int8", 1.0, 0.0, 0.0, 2e-3),
    ]
    asked = []

    def measured(*_: Any, **__: Any) -> list[PrecisionReport]:
        asked.append(1)
        return reports

    monkeypatch.setattr(precision, "compare_precisions", measured)
    model = tiny_world_model()
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    assert resolve_precision("auto", model.transformer, model.layout, tokens) == "bfloat16"
    assert resolve_precision("auto", model.transformer, model.layout, tokens) == "bfloat16"
    assert len(asked) == 1
    assert resolve_precision(None, model.transformer, model.layout, tokens) is None
    assert resolve_precision("int8", model.transformer, model.layout, tokens) == "int8"


def test_auto_for_real(tiny_world_model: Build) -> None:
    model = tiny_world_model()
    out = model.rollout(clip(), horizon=3, temperature=0, precision="auto")
    expected = model.rollout(clip(), horizon=3, temperature=0)
    assert torch.equal(out.tokens, expected.tokens)
    session = model.session(clip(), temperature=0, precision="auto")
    for _ in range(3):
        session.step()
    assert torch.equal(session.tokens, expected.tokens)


def test_unknown_precision(tiny_world_model: Build) -> None:
    with pytest.raises(ValueError, match="precision must be auto or one of float32, .*got 'fp4'"):
        tiny_world_model().rollout(clip(), precision="fp4")


def test_what_needs_the_kernel_says_so(tiny_world_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "supported", lambda *_: "no compiler was found")
    model = tiny_world_model()
    for name in ("int8", "float16"):
        with pytest.raises(ValueError, match=f"'{name}' on cpu needs the compiled.*no compiler was found"):
            model.rollout(clip(), precision=name)
    assert model.rollout(clip(), horizon=1, precision="bfloat16").tokens.shape[0] == 2
    assert available_precisions(model.transformer) == ("float32", "bfloat16")


def test_a_decoder_is_made_once(tiny_world_model: Build) -> None:
    transformer = tiny_world_model().transformer
    first = decoder_for(transformer)
    assert decoder_for(transformer, "float32") is first
    with torch.no_grad():
        transformer.lm_head.weight.mul_(2.0)
    assert decoder_for(transformer) is not first


def test_auto_where_the_kernel_does_not_know_the_model(tiny_config: Build) -> None:
    from dataclasses import replace

    from ivideogpt.world_model import WorldModel

    config = tiny_config()
    model = WorldModel(replace(config, transformer=replace(config.transformer, head_dim=24))).eval()
    assert available_precisions(model.transformer) == ("float32", "bfloat16")
    assert model.rollout(clip(), horizon=2, precision="auto").tokens.shape[0] == 2


def test_auto_where_the_positions_hold_one_frame(tiny_config: Build) -> None:
    from dataclasses import replace

    from ivideogpt.world_model import WorldModel

    config = tiny_config()
    short = replace(config.transformer, max_positions=config.tokenizer.layout.context_span + 5)
    model = WorldModel(replace(config, transformer=short)).eval()
    assert model.rollout(clip(), horizon=1, precision="auto").tokens.shape[0] == 2
