"""Model cards: what they say, where their numbers come from, and that their code runs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from ivideogpt import cli
from ivideogpt.config import TokenizerConfig, TransformerConfig, WorldModelConfig
from ivideogpt.world_model import WorldModel
from ivideogpt.zoo import card
from ivideogpt.zoo.card_results import read_card_results
from ivideogpt.zoo.registry import ZooEntry, cards_folder, entries
from tests.zoo.conftest import files_of
from tests.zoo.hub_client import ClientError, HubClient
from tests.zoo.hub_server import Hub

NAMES = list(entries())
FOLDER = cards_folder()
SECTIONS = ["How to load it", "Training data", "Training", "Results", "Limits", "Failures"]
# arXiv 2405.15223v3, sections on video prediction and visual planning
AUTHORS = {
    "ivideogpt-bair-64-act-free": [75.0, 20.4, 82.3, 9.5],
    "ivideogpt-bair-64-act-cond": [60.8, 24.5, 90.2, 5.0],
    "ivideogpt-robonet-64-act-cond": [63.2, 27.8, 90.6, 4.9],
    "ivideogpt-vp2-robosuite-64-act-cond": [78.33],
    "ivideogpt-vp2-robodesk-64-act-cond": [3.33, 37.5, 16.11, 95.56, 82.5, 92.22, 44.72],
}


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text()


def section(text: str, heading: str) -> str:
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]


def test_rendered_cards_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert card.main(["--check"]) == 0, f"run `python -m ivideogpt.zoo.card`:\n{capsys.readouterr().out}"


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_everything(name: str) -> None:
    entry, text = entries()[name], text_of(name)
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == SECTIONS
    for row in entry.data:
        assert row["url"] in section(text, "Training data")
    assert entry.compute.split(":")[0] in section(text, "Training")
    data: Any = ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "ivideogpt", "robotics")
    assert data.base_model == (f"thuml/{entry.base_model}" if entry.base_model else None)
    assert data.datasets == ([row["hub_id"] for row in entry.data if "hub_id" in row] or None)


def test_the_hub_validates_every_card(hub: Hub, client: HubClient) -> None:
    code = "from huggingface_hub import ModelCard\nfor text in texts: ModelCard(text).validate()"
    client.run(code, texts=[text_of(name) for name in NAMES])
    asked = [json.loads(body) for body in hub.received]
    assert [one["content"].partition("# ")[2].split("\n")[0] for one in asked] == NAMES
    with pytest.raises(ClientError):  # the server's answer counts
        client.run(code, texts=["---\nbase_model_relation: nonsense\n---\n# x\n"])


@pytest.mark.parametrize("name", NAMES)
def test_authors_numbers_are_theirs_and_marked_so(name: str) -> None:
    rows = entries()[name].authors_results
    assert [row["value"] for row in rows] == AUTHORS.get(name, [])
    results = section(text_of(name), "Results")
    before, _, theirs = results.partition("Published by the authors for this setting")
    assert bool(theirs) == bool(rows)
    for row in rows:
        assert f"| {row['benchmark']} | {row['metric']} | {row['value']} |" in theirs
        assert f"| {row['value']} |" not in before


def test_a_number_needs_a_results_file() -> None:
    """Without results files the only numbers are the authors', and nobody can write one into an entry's prose."""
    for name, entry in entries().items():
        results = section(card.entry_card(entry), "Results")
        measured = results.partition("Published by the authors")[0]
        assert measured.strip() == "Not evaluated by this project."
        files = card.results_files(name, FOLDER / "results")
        assert bool(files) == ("Measured by this project" in text_of(name))
        for prose in (entry.summary, *entry.limits, *entry.failures):
            assert not re.search(r"\d+\.\d|\d\s*(dB|%|x\b|times)|(PSNR|SSIM|LPIPS|FVD|MSE)\W+\d", prose), prose


def test_an_entry_has_no_place_for_measured_numbers() -> None:
    assert not {"results", "metrics", "psnr", "fvd"} & set(ZooEntry.__dataclass_fields__)


SCHEMA_2: dict[str, Any] = {
    "schema_version": 2, "model": "x", "seed": 3, "device": "cpu", "versions": {"torch": "2.15"},
    "protocol": {"name": "bair", "horizon": 15, "runs": 3, "top_k": None, "metrics": ["psnr", "fvd"]},
    "missing": {"fvd": "no weights of i3d; get them <here>"},
    "notes": ["an interval over 4 videos is itself uncertain"],
    "hashes": {"model": "ab", "data": {"a/set": {"x.tar": "cd"}, "b/set": {}}}, "explanation": {"rows": ["x" * 1000]},
    "videos": [{"key": "a", "best": {"psnr": [20.0]}}],
    "tasks": {
        "plate|slide": {
            "clips": 4, "episodes": 2, "model": {"psnr": 31.2345678}, "std_over_runs": {"psnr": 0.5},
            "interval": {"psnr": [30.0, 32.5]}, "repeat_last_frame": {"psnr": 20.0}, "tokens": {"perplexity": 7.25},
            "shuffled_actions": {"mse_ratio": 1.5}, "reward": {"pearson_r": 0.875},
        }
    },
    "overall": {
        "clips": 4, "model": {"psnr": 31.0, "fvd": 75.25}, "std_over_runs": {"fvd": 0.5},
        "curves": {"model": {"psnr": [33.0, 30.0]}},
        "fvd": {"value": 75.25, "std_over_runs": 0.5}, "distance_of_other_features": {"label": "x", "value": 1234.5},
    },
}  # fmt: skip


def test_results_are_shown_with_protocol_seed_and_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "ivideogpt-metaworld-nano"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{name}.bair.json").write_text(json.dumps(SCHEMA_2))
    other = {"schema_version": 2, "tasks": {}, "overall": {"model": {"psnr": 12.5}}}
    (tmp_path / "results" / f"{name}.json").write_text(json.dumps(other))
    assert card.main(["--folder", str(tmp_path), "--check"]) == 1
    assert not list(tmp_path.glob("*.md"))
    assert card.main(["--folder", str(tmp_path)]) == 0
    assert card.main(["--folder", str(tmp_path), "--check"]) == 0
    text = section((tmp_path / f"{name}.md").read_text(), "Results")
    assert text.index("protocol `not recorded`") < text.index("protocol `bair`")
    assert f"on `a/set, b/set`: protocol `bair`, seed 3,\nfile `results/{name}.bair.json`" in text
    assert (
        "| task | clips | episodes | psnr | psnr, last frame repeated | mse ratio, actions shuffled | reward r | token "
        "perplexity | fvd |\n" in text
    )
    assert (
        "| plate\\|slide | 4 | 2 | 31.23 ± 0.5 [30, 32.5] | 20 | 1.5 | 0.875 | 7.25 | - |\n| overall | 4 | - | 31 |"
        in text
    )
    assert "75.25 ± 0.5" in text
    assert "1234" not in text  # a distance of other features is no FVD
    assert "- fvd: not evaluated: no weights of i3d; get them &lt;here&gt;" in text
    assert "- psnr, frame by frame (means of all samples): 33, 30" in text
    assert '- horizon: 15\n- runs: 3\n- metrics: ["psnr", "fvd"]\n- seed: 3\n' in text
    assert "- explanation: see the file\n" in text
    assert "an interval over 4 videos" in text
    data: Any = ModelCard((tmp_path / f"{name}.md").read_text()).data
    rows = data.eval_results
    found = [(r.dataset_config.removeprefix(name), r.dataset_type, r.metric_type, r.metric_value) for r in rows]
    assert found == [
        ("", "overall", "psnr", 12.5), (".bair", "plate|slide", "psnr", 31.2345678), (".bair", "overall", "psnr", 31.0),
        (".bair", "overall", "fvd", 75.25),
    ]  # fmt: skip
    assert rows[1].task_name == "video prediction, protocol bair"


def test_the_committed_results_are_read(tmp_path: Path) -> None:
    found = [read_card_results(path) for path in sorted((FOLDER / "results").glob("*.json"))]
    assert found
    for result in found:
        assert {"psnr", "ssim", "mse"} <= result.numbers["overall"].keys()
        assert any(result.file.startswith(name) for name in NAMES), f"{result.file} is of no entry"


# code


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ZooEntry], dict[str, bytes]]:
    """Files of a checkpoint with the shapes of an entry's frames, context and actions, and few weights."""

    def make(entry: ZooEntry) -> dict[str, bytes]:
        channels = (8, 32, 32) if entry.resolution == 64 else (8, 8, 8, 32, 32)
        tokens = TokenizerConfig(
            resolution=entry.resolution, block_channels=channels, layers_per_block=1, latent_channels=4,
            norm_num_groups=4, codebook_size=32, dynamics_codebook_size=32, patch_size=4, max_attention_resolution=16,
            context_length=entry.context_length,
        )  # fmt: skip
        transformer = TransformerConfig(tokens.vocab_size, 1, 2, embed_dim=32, mlp_dim=48, max_positions=1024,
                                        action_dim=entry.action_dim)  # fmt: skip
        folder = tmp_path_factory.mktemp(entry.name)
        return files_of(WorldModel(WorldModelConfig(tokens, transformer)).save_pretrained(folder))

    return make


@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_a_card_runs(
    name: str, hub: Hub, client: HubClient, stand_ins: Callable[[ZooEntry], dict[str, bytes]]
) -> None:
    entry = entries()[name]
    if entry.hub_id:
        hub.add(entry.hub_id, stand_ins(entry))
    (code,) = re.findall(r"^```python\n(.*?)^```", text_of(name), re.MULTILINE | re.DOTALL)
    client.run(code)
    said = re.search(r"print\(pred.video.shape\)  # (\(.*?\)):", code)
    assert said is not None
    assert client.printed == f"torch.Size([{said[1][1:-1]}])\n"


def test_the_animation_is_what_its_command_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [entry for entry in entries().values() if entry.rollout]
    assert [entry.name for entry in shown] == ["ivideogpt-metaworld-nano"]
    for entry in shown:
        assert entry.rollout is not None
        committed = FOLDER / entry.rollout["file"]
        assert f"]({committed.name})" in text_of(entry.name)
        assert committed.stat().st_size < 150_000
        words = shlex.split(entry.rollout["command"])
        assert words[-2:] == ["--output", f"model_cards/{committed.name}"]
        (tmp_path / "model_cards").mkdir()
        monkeypatch.chdir(tmp_path)
        assert cli.main(words[1:]) == 0
        with Image.open(committed) as one, Image.open(tmp_path / "model_cards" / committed.name) as other:
            assert (one.size, getattr(one, "n_frames", 1)) == (other.size, getattr(other, "n_frames", 1))
            for frame in range(getattr(one, "n_frames", 1)):
                one.seek(frame)
                other.seek(frame)
                first, second = (np.asarray(image.convert("RGB"), np.float32) for image in (one, other))
                assert np.abs(first - second).mean() < 2.0  # another processor may choose another token now and then
