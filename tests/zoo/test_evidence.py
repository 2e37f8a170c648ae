"""What a card may claim: results of these weights, whose sums are those of their videos; bases and action spaces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ivideogpt
from ivideogpt.metrics.evaluation import model_hash
from ivideogpt.models.action_layers import ActionLayers
from ivideogpt.zoo.card import variant_card
from ivideogpt.zoo.checkpoint import Parts
from ivideogpt.zoo.push import check_results, parts_hash
from ivideogpt.zoo.registry import cards_folder

RESULTS = cards_folder() / "results" / "ivideogpt-metaworld-nano.json"


@pytest.fixture
def nano() -> ivideogpt.WorldModel:
    return ivideogpt.from_pretrained("ivideogpt-metaworld-nano")


def test_results_of_these_weights(nano: ivideogpt.WorldModel) -> None:
    for path in sorted(RESULTS.parent.glob("ivideogpt-metaworld-nano*.json")):
        check_results(path, nano.parts)
    assert parts_hash(nano.parts) == model_hash(nano)


def test_results_of_other_weights(nano: ivideogpt.WorldModel) -> None:
    with torch.no_grad():
        nano.transformer.norm.weight[0] += 1e-3
    with pytest.raises(ValueError, match="is of other weights than these .*measure this model"):
        check_results(RESULTS, nano.parts)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r["overall"]["model"].update(psnr=99.9), "psnr is 99.9 for all videos, and the videos give 24.8"),
        (lambda r: r["videos"][0]["best"].update(psnr=[float("nan")]), "NaN is no JSON number"),
        (lambda r: r["videos"][3]["best"].pop("psnr"), "is damaged: KeyError"),
        (lambda r: r.pop("hashes"), "is damaged: KeyError 'hashes'"),
        (lambda r: r["hashes"].update(data="none"), "is damaged: AttributeError"),
    ],
)
def test_results_that_were_changed(
    nano: ivideogpt.WorldModel, tmp_path: Path, change: Callable[[Any], Any], says: str
) -> None:
    content = json.loads(RESULTS.read_text())
    change(content)
    (tmp_path / "changed.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says):
        check_results(tmp_path / "changed.json", nano.parts)


def test_the_hash_knows_what_actions_are_divided_by(tiny_world_model: Callable[..., Any]) -> None:
    one, two, three = (tiny_world_model(action_dim=2) for _ in range(3))
    one.extras |= {"action_mean": [0.0, 0.0], "action_std": [1.0, 2.0]}
    two.extras |= {"action_mean": [0.0, 0.0], "action_std": [1.0, 3.0]}
    assert len({model_hash(one), model_hash(two), model_hash(three)}) == 3
    assert model_hash(three) == model_hash(tiny_world_model(action_dim=2))


def test_the_card_of_several_action_spaces(tiny_world_model: Callable[..., Any]) -> None:
    model = tiny_world_model()
    parts = Parts(model.tokenizer, model.transformer, action_layers=ActionLayers({"lab/arm": 3, "lab/hand": 2}, 32))
    card = variant_card("someone/multi", parts, [])
    assert 'from_pretrained("someone/multi", action_space="lab/arm")' in card
    assert "`lab/arm` (3), `lab/hand` (2)" in card
    assert "torch.zeros(1, 5, 3)" in card
