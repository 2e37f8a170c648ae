"""Benchmark of the ways to draw a frame's tokens: what each option saves, and what the approximate ones cost.

    python benchmarks/decoding.py [--model ivideogpt-metaworld-nano] [--clips 16]

On held-out recordings, with their actions: every option rolls the same clips out with the same random numbers, one clip
at a time, options in turn. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a file: the folder above holds the package `benchmarks`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ivideogpt
from benchmarks import common
from ivideogpt.metrics.clips import ClipSet
from ivideogpt.metrics.protocols import EvaluationProtocol
from ivideogpt.metrics.video import frame_metrics
from ivideogpt.rollout import Speculation
from ivideogpt.rollout.choice import decoder_for
from ivideogpt.rollout.precision import compare_precisions

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dynamics ids only": {"dynamics_ids_only": True},
    "speculation, window 2": {"speculation": Speculation(2)},
    "speculation, window 4": {"speculation": Speculation(4)},
    "speculation, window 8": {"speculation": Speculation(8)},
    "speculation, whole frame": {"speculation": Speculation(None)},
    "1 pass (approximate)": {"speculation": Speculation(None, passes=1)},
    "2 passes (approximate)": {"speculation": Speculation(None, passes=2)},
    "4 passes (approximate)": {"speculation": Speculation(None, passes=4)},
    "diagonals (approximate)": {"speculation": Speculation(None, order="diagonal")},
}


class Passes:
    """Counts how often a decoder is fed while inside, and with how many tokens; plain steps do not come by here."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.count, self.tokens = decoder, 0, 0

    def __enter__(self) -> Passes:
        feed = self.decoder.feed

        def counted(branch: Any, tokens: Tensor, *rest: Any) -> Tensor:
            self.count += 1
            self.tokens += tokens.shape[1]
            return feed(branch, tokens, *rest)

        self.decoder.feed = counted
        return self

    def __exit__(self, *_: object) -> None:
        del self.decoder.feed


def drafts(frames: Tensor, window: int) -> dict[str, float]:
    """Mean passes a frame that fixed guesses would take, from tokens (B, F, n) that were drawn; the first frame apart.

    A guess is right or not whatever else is computed, so this needs no model: ``previous`` guesses the frame before at
    each place, ``n-gram`` what last followed the same token at the same place, and the frame before where none did.
    """
    passes: dict[str, list[int]] = {"previous": [], "n-gram": []}
    for clip in frames.tolist():
        seen: dict[tuple[int, int], int] = {}
        for index, tokens in enumerate(clip):
            if index:
                for name, counts in passes.items():
                    done = count = 0
                    while done < len(tokens):
                        last, right = tokens[done - 1] if done else -1, 0
                        for place in range(done, min(done + window, len(tokens)) - 1):
                            guess = clip[index - 1][place]
                            if name == "n-gram":
                                guess = seen.get((place, last), guess)
                            if guess != tokens[place]:
                                break
                            last, right = guess, right + 1
                        done, count = done + right + 1, count + 1
                    counts.append(count)
            for place, token in enumerate(tokens):
                seen[place, tokens[place - 1] if place else -1] = token
    return {name: sum(counts) / len(counts) for name, counts in passes.items()}


def measure_options(wm: Any, batch: dict[str, Any], horizon: int, temperature: float, repeats: int) -> dict[str, Any]:
    """Every option on every clip: seconds and passes a frame, and accuracy against the recording."""
    video, actions = batch["video"], batch["actions"]
    context = wm.config.context_length
    truth = video[:, context : context + horizon]
    # without rewards, so that a step is the drawing of a frame and nothing else
    silent = ivideogpt.WorldModel.from_parts(wm.tokenizer, wm.transformer, None, wm.extras)

    def roll(clip: int, options: dict[str, Any], frames: str | None = None) -> Any:
        return wm.rollout(
            video[clip : clip + 1, :context], actions[clip : clip + 1], horizon=horizon, temperature=temperature,
            generator=torch.Generator(wm.device).manual_seed(clip), return_frames=frames, **options,
        )  # fmt: skip

    def run(options: dict[str, Any]) -> Callable[[], list[float]]:
        def seconds() -> list[float]:
            times = []
            for clip in range(len(video)):
                session = silent.session(
                    video[clip : clip + 1, :context], temperature=temperature,
                    generator=torch.Generator(wm.device).manual_seed(clip), **options,
                )  # fmt: skip
                for index in range(horizon):
                    action = actions[clip : clip + 1, context - 1 + index]
                    times.append(common.timed(partial(session.advance, action), wm.device))
                del times[-horizon]  # the first frame has nothing to guess from
            return [sum(times) / len(times)]

        return seconds

    results: dict[str, Any] = {}
    plain = [roll(clip, {}, "all") for clip in range(len(video))]
    for name, options in OPTIONS.items():
        with Passes(decoder_for(wm.transformer)) as passes:
            outs = [roll(clip, options, "all") for clip in range(len(video))]
        metrics = frame_metrics(torch.cat([out.video[:, context:] for out in outs]), truth)
        same = [(out.tokens == other.tokens).float().mean().item() for out, other in zip(outs, plain, strict=True)]
        later = len(video) * (horizon - 1)
        last = len(video) if wm.reward_head is not None else 0  # the last frame's reward takes a pass of its own
        speculates = "speculation" in options
        results[name] = {
            "passes_per_frame": (passes.count - last) / later if speculates else wm.layout.dynamics_tokens_per_frame,
            "tokens_fed_per_frame": (passes.tokens - last) / later if speculates else None,
            "same_tokens": sum(same) / len(same),
            **{metric: float(values.mean()) for metric, values in metrics.items()},
        }
    raw = common.alternate({name: run(options) for name, options in OPTIONS.items()}, dict.fromkeys(OPTIONS, repeats))
    for name, runs in raw.items():
        results[name]["seconds_per_frame"] = common.summary([value for one in runs for value in one])
    layout = wm.layout
    tokens = torch.cat([out.tokens for out in plain])[:, layout.context_span :]
    tokens = tokens.unflatten(1, (horizon, -1))[:, :, 1:]
    return {
        "options": results,
        "same_as_previous_frame": float((tokens[:, 1:] == tokens[:, :-1]).float().mean()),
        "passes_of_fixed_guesses": {str(window): drafts(tokens, window) for window in (2, 4, 8, 16)},
    }


def main(words: list[str] | None = None) -> int:
    """Measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ivideogpt-metaworld-nano", help="zoo name or folder")
    parser.add_argument("--data", default="embedded:heldout", help="shard set")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--horizon", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/decoding-DEVICE.json")
    args = parser.parse_args(words)
    out = args.out or Path(__file__).parent / "results" / f"decoding-{args.device}.json"
    device = torch.device(args.device)
    wm = ivideogpt.from_pretrained(args.model, device=device)
    protocol = EvaluationProtocol(horizon=args.horizon).settled(wm.config)
    clips = ClipSet.open(args.data, protocol).at_most(args.clips)
    batch = clips.batch(list(range(len(clips))))
    batch = {
        "video": (torch.as_tensor(batch["video"]).float() / 255).to(device),
        "actions": torch.as_tensor(batch["actions"]).float().to(device),
    }
    record: dict[str, Any] = {
        "benchmark": "decoding",
        "version": 1,
        "date": common.now(),
        "machine": common.describe_machine(device),
        "versions": common.describe_versions(),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
    }
    with torch.inference_mode():
        indices = wm.tokenizer.encode_context(batch["video"][:, : wm.config.context_length])[0]
        prompt = wm.layout.prompt(indices)[:, :-1]
        slot_actions = wm.layout.slot_actions(wm.normalize_actions(batch["actions"]), args.horizon)
        reports = compare_precisions(
            wm.transformer, wm.layout, prompt[:1], slot_actions[:1], num_frames=args.horizon, repeats=args.repeats
        )
    record["precisions"] = [vars(report) | {"agrees": report.agrees} for report in reports]
    columns = ["precision", "ms a frame", "KL", "logit error", "worst gap", "agrees"]
    rows = [
        [r.precision, f"{1e3 * r.seconds_per_frame:.1f}", f"{r.kl:.1e}", f"{r.logit_error:.1e}", f"{r.worst_gap:.1e}",
         str(r.agrees)]
        for r in reports
    ]  # fmt: skip
    common.print_table("Precisions against float32, teacher-forced", columns, rows)
    record["temperatures"] = {}
    for temperature in (0.0, 1.0):
        result = measure_options(wm, batch, args.horizon, temperature, args.repeats)
        record["temperatures"][str(temperature)] = result
        columns = ["option", "ms a frame", "passes", "same tokens", "PSNR", "SSIM", "MSE"]
        rows = [
            [name, f"{1e3 * r['seconds_per_frame']['median']:.2f}", f"{r['passes_per_frame']:.2f}",
             f"{r['same_tokens']:.3f}", f"{r['psnr']:.2f}", f"{r['ssim']:.3f}", f"{r['mse']:.5f}"]
            for name, r in result["options"].items()
        ]  # fmt: skip
        notes = [f"passes of fixed guesses, by window: {result['passes_of_fixed_guesses']}"]
        common.print_table(f"Temperature {temperature:g}", columns, rows, notes)
        record["machine"]["load_average_at_end"] = common.describe_machine(device)["load_average"]
        common.write_json(out, record)
    print(f"Written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
