"""Evaluation of a world model by a protocol: rolls it out on recorded clips, judges each video, sums up at the end.

All numbers of predictions are autoregressive: the model sees the context frames and the actions, nothing else. The
random numbers of a sample depend on the seed, the run, the clip and the sample alone, so not on batches, processes or
interruptions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ivideogpt.metrics.journal import Journal
from ivideogpt.metrics.judges import Judges, judges_for
from ivideogpt.metrics.measuring import BATCH_SIZE, Clips, RollsOut, Work, measure
from ivideogpt.metrics.protocols import EvaluationProtocol
from ivideogpt.metrics.results import SCHEMA_VERSION, assemble, versions


def evaluate(
    model: RollsOut,
    clips: Clips,
    protocol: EvaluationProtocol,
    *,
    judges: Judges | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    name: str | None = None,
    journal: Path | None = None,
    keep_journal: bool = False,
    watch: Callable[[int, int], None] | None = None,
) -> dict[str, Any] | None:
    """Measures a model on clips; where ``torch.distributed`` runs, its processes share the work.

    Args:
        model: in eval mode.
        clips: of the protocol's length and size.
        protocol: settled for the model (:meth:`EvaluationProtocol.settled`).
        judges: what judges the predictions; None takes what is at hand.
        seed: of all random numbers.
        batch_size: samples that are rolled out at once.
        name: of the model, for the result.
        journal: folder that remembers finished videos, on a file system that all processes see. With one, the same
            call goes on where it was killed, with the same numbers. It is removed at the end.
        keep_journal: leave it, for a caller that removes it when the result is safe.
        watch: is told how many of all videos are done, by this process.

    Returns:
        The result, which JSON can hold (:mod:`ivideogpt.metrics.results`); None in all but the first process.

    Raises:
        ValueError: if clips and model do not fit, the model predicts what is no picture, or the journal is of another
            evaluation.
    """
    started = time.time()
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not len(clips):
        raise ValueError("there is no clip to evaluate")
    if journal is None:
        if processes > 1:
            raise ValueError(
                "several processes put their results together in a journal: give --out FILE (journal= in Python)"
            )
        with tempfile.TemporaryDirectory(prefix="ivideogpt-evaluation-") as folder:
            return evaluate(
                model, clips, protocol, judges=judges, seed=seed, batch_size=batch_size, name=name,
                journal=Path(folder) / "journal", watch=watch,
            )  # fmt: skip
    judges = judges or judges_for(protocol, device=model.device)
    work = Work(model, clips, protocol, judges, seed, batch_size)
    header = _header(work)
    if rank == 0:
        kept = Journal(journal, header)
    if processes > 1:
        dist.barrier()
    if rank > 0:
        kept = Journal(journal, header, begin=False)
    earlier = sum(record.get("seconds", 0.0) for record in kept.records.values())
    try:
        with contextlib.closing(kept):
            _work_through(work, work.groups[rank::processes], kept, watch)
    except BaseException:
        if processes == 1 and not kept.records:
            kept.remove()  # nothing to go on with: the next call may have other settings
        raise
    if processes > 1:
        dist.barrier()
    if rank > 0:
        return None
    if processes > 1:
        kept = Journal(journal, header)  # with what the others have written
    absent = [
        (run, video) for run in range(protocol.runs) for video in range(len(work.places)) if (run, video) not in kept
    ]
    if absent:
        raise ValueError(
            f"{len(absent)} videos are in no journal of {journal}: all processes must see the same file system"
        )
    result = assemble(kept, protocol, judges, work.places)
    head = {"schema_version": SCHEMA_VERSION, "model": name, "protocol": protocol.to_json(), "seed": seed,
            "seeding": "one stream for each sample, from SHA-256 of seed, run, episode, start frame and sample",
            "measured": "autoregressive", "device": _device_name(model.device), "processes": processes,
            "batch_size": batch_size,
            "seconds": round(earlier + time.time() - started, 1), "versions": versions(),
            "hashes": {"model": header["model"], "data": clips.data(), "networks": judges.hashes}}  # fmt: skip
    result = {**head, **result, "notes": [*clips.notes, *result["notes"]]}
    if not keep_journal:
        kept.remove()
    return result


def _work_through(
    work: Work, mine: list[tuple[int, list[int]]], kept: Journal, watch: Callable[[int, int], None] | None
) -> None:
    """Measures what the journal does not hold yet of a process's groups."""
    total = sum(len(numbers) for _, numbers in mine)
    done = sum((run, number) in kept for run, numbers in mine for number in numbers)
    if watch is not None:
        watch(done, total)
    for run, numbers in mine:
        # a group that was cut short is done again as a whole: rounding may depend on who is rolled out beside whom
        if all((run, number) in kept for number in numbers):
            continue
        before = time.perf_counter()
        found = measure(work, run, numbers)
        seconds = (time.perf_counter() - before) / len(numbers)
        for record, features in found:
            if (run, record["video"]) not in kept:
                kept.append({**record, "seconds": round(seconds, 4)}, features)
                done += 1
        if watch is not None:
            watch(done, total)


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _header(work: Work) -> dict[str, Any]:
    """Everything that decides the numbers."""
    return {
        "schema_version": SCHEMA_VERSION,
        "protocol": work.protocol.to_json(),
        "seed": work.seed,
        "batch_size": work.batch_size,
        "model": model_hash(work.model),
        "data": work.clips.data(),
        "clips": hashlib.sha256(json.dumps(work.places).encode()).hexdigest(),
        "networks": work.judges.hashes,
        "metrics": sorted(work.judges.frames),
        "device": work.model.device.type,
        "torch": versions()["torch"],
    }


def model_hash(model: Any) -> str | None:
    """SHA-256 of a model's weights, by name, shape, type and content; None for what has no weights."""
    if not isinstance(model, torch.nn.Module):
        return None
    extras, head = getattr(model, "extras", {}), getattr(model, "reward_head", None)
    return weights_hash(model.state_dict(), extras, head.config.transform if head is not None else None)


def weights_hash(state: Mapping[str, torch.Tensor], extras: Mapping[str, Any], reward_transform: str | None) -> str:
    """SHA-256 of weights, and of what else decides a model's predictions where it is not the usual."""
    digest = hashlib.sha256()
    settings = {name: extras[name] for name in ("action_mean", "action_std") if name in extras}
    if reward_transform not in (None, "symlog"):
        settings["reward_transform"] = reward_transform
    if settings:
        digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
