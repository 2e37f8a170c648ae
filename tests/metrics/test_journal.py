"""The journal: an evaluation goes on where it was killed, alone or with others, with the same numbers to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ivideogpt
from ivideogpt import cli
from ivideogpt.metrics.evaluation import evaluate, model_hash
from ivideogpt.metrics.journal import Journal, only_evaluation
from ivideogpt.metrics.judges import Judges
from ivideogpt.metrics.networks import random_network
from ivideogpt.metrics.protocols import EvaluationProtocol
from ivideogpt.metrics.video import mse, psnr
from tests.metrics.conftest import Integrator, MemoryClips

HEADER = {"seed": 0}


def test_what_was_appended_is_read_again(tmp_path: Path) -> None:
    features = np.arange(12, dtype=np.float32).reshape(3, 4)
    first = Journal(tmp_path / "j", HEADER)
    first.append({"run": 0, "video": 2, "psnr": 0.1}, {"real": features, "predicted": 2 * features})
    first.append({"run": 1, "video": 2, "psnr": 0.2}, {})
    first.close()
    again = Journal(tmp_path / "j", HEADER)
    assert (0, 2) in again and (1, 2) in again and (0, 0) not in again
    assert again.records[0, 2]["psnr"] == 0.1
    np.testing.assert_array_equal(again.features(again.records[0, 2], "predicted"), 2 * features)
    assert again.features(again.records[1, 2], "real") is None
    again.append({"run": 0, "video": 0}, {"real": features})  # in files of its own
    again.close()
    assert len(list((tmp_path / "j").glob("part-*.jsonl"))) == 2
    again.remove()
    assert not (tmp_path / "j").exists()


def test_a_line_that_a_kill_cut_short_counts_for_nothing(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j", HEADER)
    for video in range(3):
        first.append({"run": 0, "video": video}, {"real": np.ones((1, 2), np.float32)})
    first.close()
    (part,) = (tmp_path / "j").glob("part-*.jsonl")
    whole = part.read_bytes()
    for cut in (len(whole) - 1, len(whole) - 20, whole.rindex(b"\n", 0, -1) + 1):
        part.write_bytes(whole[:cut])
        assert sorted(Journal(tmp_path / "j", HEADER).records) == [(0, 0), (0, 1)]
    part.write_bytes(whole.replace(b'"video": 1', b'"vid": 1'))
    with pytest.raises(ValueError, match=r"damaged in line 2; remove its folder"):
        Journal(tmp_path / "j", HEADER)


def test_features_that_are_damaged_are_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", HEADER)
    journal.append({"run": 0, "video": 0}, {"real": np.ones((2, 2), np.float32)})
    journal.close()
    (part,) = (tmp_path / "j").glob("part-*.bin")
    for content in (part.read_bytes()[:-1], b"\x01" + part.read_bytes()[1:]):
        part.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged at 0; remove"):
            journal.features(journal.records[0, 0], "real")


def test_another_evaluations_journal_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "j", {"seed": 0, "model": "a" * 64}).close()
    with pytest.raises(
        ValueError, match=r"begun with other settings \(seed: 0 against 1\); give another --out, or --r"
    ):
        Journal(tmp_path / "j", {"seed": 1, "model": "a" * 64})
    Journal(tmp_path / "k", {"protocol": {"name": "custom", "runs": 2, "horizon": 6}}).close()
    with pytest.raises(ValueError, match=r"other settings \(protocol\.horizon: 6 against 4\); give"):
        Journal(tmp_path / "k", {"protocol": {"name": "custom", "runs": 2, "horizon": 4}})
    (tmp_path / "j" / "header.json").write_text("{")
    with pytest.raises(ValueError, match=r"header.json is damaged"):
        Journal(tmp_path / "j", HEADER)


# Whole evaluations


def test_an_evaluation_that_fails_at_any_video_goes_on(tmp_path: Path) -> None:
    class Dying(Integrator):
        left = 0

        def rollout(self, context_frames: Tensor, actions: Tensor | None = None, **settings: Any) -> Any:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return super().rollout(context_frames, actions, **settings)

    clips = MemoryClips(["push", "lift"] * 3)
    protocol = EvaluationProtocol(horizon=3, runs=2, num_samples=3).settled(Integrator().config)
    judges = Judges({"psnr": psnr, "mse": mse}, features=random_network(4), hashes={"fvd": "0" * 64})
    options: dict[str, Any] = {"judges": judges, "batch_size": 2}
    straight = evaluate(Integrator(noise=0.1), clips, protocol, **options)
    assert straight is not None
    dying, starts, journal = Dying(noise=0.1), 0, tmp_path / "results.json.journal"
    while True:
        dying.left, starts = 7, starts + 1
        told: list[tuple[int, int]] = []
        try:
            result = evaluate(dying, clips, protocol, journal=journal, watch=lambda *at: told.append(at), **options)  # noqa: B023
        except KeyboardInterrupt:
            assert told[0] == (2 * (starts - 1), 12)  # what was finished before
            continue
        break
    assert result is not None
    assert starts > 3
    distance = straight["overall"]["distance_of_other_features"]
    assert len(distance["runs"]) == 2 and distance["value"] > 0
    assert (distance["videos"], distance["is_reference"]) == ({"real": 6, "predicted": 18}, False)
    assert "fvd" not in straight["overall"]["model"]
    assert told[-1] == (12, 12)
    assert {name: result[name] for name in ("tasks", "overall", "videos")} == {
        name: straight[name] for name in ("tasks", "overall", "videos")
    }
    assert not journal.exists()


def test_a_first_batch_that_fails_leaves_no_journal(tmp_path: Path) -> None:
    class Failing(Integrator):
        def rollout(self, context_frames: Tensor, actions: Tensor | None = None, **settings: Any) -> Any:
            if len(self.calls) == (2 if actions is not None else 0):  # each group has one call with other actions
                raise ValueError("no more")
            return super().rollout(context_frames, actions, **settings)

    clips, journal = MemoryClips(["push"] * 4), tmp_path / "results.json.journal"
    protocol = EvaluationProtocol(horizon=3, runs=1).settled(Integrator().config)
    judges = Judges({"psnr": psnr, "mse": mse})
    broken = Failing()
    broken.calls = [{}, {}]
    for seed in (0, 1):  # a journal that was left would be of another evaluation
        with pytest.raises(ValueError, match="no more"):
            evaluate(broken, clips, protocol, judges=judges, journal=journal, seed=seed)
        assert not journal.exists()
    with pytest.raises(ValueError, match="no more"):  # what is finished stays
        evaluate(Failing(), clips, protocol, judges=judges, journal=journal, batch_size=1)
    assert len(Journal(journal, json.loads((journal / "header.json").read_text())).records) == 1


def test_two_evaluations_do_not_write_to_one_place(tmp_path: Path) -> None:
    journal = tmp_path / "results.json.journal"
    with only_evaluation(journal):
        with pytest.raises(ValueError, match="another evaluation writes to .*journal: wait for it, or give an"):  # noqa: SIM117
            with only_evaluation(journal):
                pass
        with only_evaluation(tmp_path / "other.json.journal"):
            pass
        assert os.listdir(tmp_path) == ["results.json.journal.lock"]
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyError), only_evaluation(journal):
        raise KeyError
    with only_evaluation(journal):
        pass


def command(out: Path, model: Path, *extra: str) -> list[str]:
    words = ["evaluate", "--model", str(model), "--data", "embedded:heldout", "--out", str(out), "--horizon", "4"]
    words += ["--runs", "2", "--num-samples", "3", "--batch-size", "4", "--videos", "10", "--fvd-weights", "random"]
    return [*words, *extra]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(ivideogpt.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def numbers(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    return {name: result[name] for name in ("protocol", "tasks", "overall", "videos", "hashes")}


@pytest.fixture(scope="module")
def finished(tiny_world_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the results of its evaluation in one process that nobody disturbed."""
    folder = tmp_path_factory.mktemp("evaluation")
    model = tiny_world_model(4, reward=True).save_pretrained(folder / "model")
    words = [sys.executable, "-m", "ivideogpt.cli", *command(folder / "straight.json", model)]
    subprocess.run(words, env=environment(), check=True, capture_output=True, timeout=200)
    return model, folder / "straight.json"


def test_a_killed_evaluation_ends_with_the_same_numbers(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, straight = finished
    out, journal = tmp_path / "results.json", tmp_path / "results.json.journal"
    words = [sys.executable, "-m", "ivideogpt.cli", *command(out, model)]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while sum(path.read_bytes().count(b"\n") for path in journal.glob("part-*.jsonl")) < 7:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    assert cli.main(command(out, model, "--restart")) == 2
    assert "another evaluation writes to" in capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    assert cli.main(command(out, model, "--seed", "1")) == 2
    assert "begun with other settings (seed: 0 against 1)" in capsys.readouterr().err
    subprocess.run(words, env=environment(), check=True, capture_output=True, timeout=100)
    assert numbers(out) == numbers(straight)
    assert os.listdir(tmp_path) == ["results.json"]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(finished: tuple[Path, Path], tmp_path: Path) -> None:
    model, straight = finished
    out = tmp_path / "results.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "ivideogpt.cli", *command(out, model)], env=environment(), capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 1
    assert numbers(out) == numbers(straight)
    assert json.loads(out.read_text())["processes"] == 2


def test_the_model_hash_knows_weights(tiny_world_model: Callable[..., Any]) -> None:
    first, again, other = (tiny_world_model(4, seed=seed) for seed in (0, 0, 1))
    assert model_hash(first) == model_hash(again) != model_hash(other)
    with torch.no_grad():
        again.transformer.lm_head.weight[0, 0] += 1e-6
    assert model_hash(first) != model_hash(again)
    assert model_hash(Integrator()) is None
