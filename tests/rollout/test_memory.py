"""Splitting a rollout's rows: every row once, spans of bounded size, memory as the machine tells it."""

from pathlib import Path

import pytest
import torch

from ivideogpt.config import TransformerConfig
from ivideogpt.rollout import memory
from ivideogpt.rollout.memory import Span, clip_bytes, free_memory, row_bytes, rows_that_fit, run_in_spans, spans

CPU = torch.device("cpu")


@pytest.mark.parametrize("clips", [1, 2, 5])
@pytest.mark.parametrize("samples", [1, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 8, 20, 1000])
def test_every_row_once(clips: int, samples: int, rows: int) -> None:
    found = [span.rows(samples, CPU) for span in spans(clips, samples, rows)]
    assert torch.cat(found).tolist() == list(range(clips * samples))
    assert max(map(len, found)) <= max(rows, 1)


def test_halves() -> None:
    assert Span(0, 3, 0, 4).halves() == (Span(0, 1, 0, 4), Span(1, 3, 0, 4))
    assert Span(2, 3, 1, 4).halves() == (Span(2, 3, 1, 2), Span(2, 3, 2, 4))


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    def run(_: Span) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run_in_spans(2, 2, None, run)


def test_the_allocators_words_on_a_cpu_are_understood() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert memory.is_out_of_memory(raised.value)


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    7 kB\n")
    monkeypatch.setattr(memory, "HOST_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    assert free_memory(CPU) == 7 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000\n")
    assert free_memory(CPU) == 7 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(CPU) == 2000
    monkeypatch.setattr(memory, "HOST_MEMORY", tmp_path / "nothing")
    assert free_memory(CPU) is None


def test_800_candidates_of_the_small_model_fit_on_a_24_gb_card() -> None:
    config = TransformerConfig.preset("small")
    row, clip = row_bytes(config, own=170, shared=513), clip_bytes(config, shared=513)
    assert rows_that_fit(int(memory.SHARE * 22 * 2**30), 800, row, clip) >= 800


def test_rows_that_fit() -> None:
    assert rows_that_fit(100, samples=2, row=5, clip=10) == 10  # five clips of 20
    assert rows_that_fit(100, samples=50, row=5, clip=10) == 18  # a part of one clip's samples
    assert rows_that_fit(1, samples=50, row=5, clip=10) == 1  # try, and let the device say it
