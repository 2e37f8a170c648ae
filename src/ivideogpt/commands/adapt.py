"""`ivideogpt adapt tokenizer`: a tokenizer for new recordings under a transformer that stays as it is."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivideogpt.commands.arguments import at_least

if TYPE_CHECKING:
    from ivideogpt.metrics.clips import ClipSet
    from ivideogpt.world_model import WorldModel

RECIPE = "adapt"
COLUMNS = ("reconstruction PSNR", "prediction PSNR", "prediction SSIM", "prediction MSE")


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser("adapt", help="adapt a model's tokenizer to new recordings")
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    command = parts.add_parser(
        "tokenizer",
        help="train the tokenizer, leave the transformer, measure before and after",
        description="Trains a model's tokenizer on new recordings, leaves its transformer as it is (the zero-shot "
        "setting of arXiv 2405.15223), and compares reconstructions and predictions of held-out episodes before and "
        "after. The same command goes on where it was stopped.",
    )
    command.add_argument("--model", required=True, metavar="M", help="zoo name, Hub id or folder")
    command.add_argument("--data", required=True, metavar="SHARDS", help="shard set to train on")
    command.add_argument("--heldout", required=True, metavar="SHARDS", help="shard set to measure on")
    command.add_argument("--out", required=True, metavar="FOLDER", help="folder of everything that it writes")
    command.add_argument("--updates", type=at_least(1), help="updates (default: the recipe's)")
    command.add_argument("--horizon", type=at_least(1), default=10, help="frames that are predicted (10)")
    command.add_argument("--limit", type=at_least(1), default=64, help="held-out clips at most (64)")
    command.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help=f"replace any value of the recipe `{RECIPE}`"
    )
    command.set_defaults(func=run)


def run(args: argparse.Namespace) -> None:
    """Measures, trains, puts the tokenizer under the transformer, measures again."""
    from rich.console import Console
    from rich.table import Table

    import ivideogpt
    from ivideogpt import recipes
    from ivideogpt.metrics.clips import ClipSet
    from ivideogpt.metrics.protocols import EvaluationProtocol
    from ivideogpt.recipes.results import load_tokenizer

    out = Path(args.out)
    wm = ivideogpt.from_pretrained(args.model)
    protocol = (
        EvaluationProtocol()
        .changed(horizon=args.horizon, temperature=0.0, metrics=("psnr", "ssim", "mse"), fvd=None)
        .settled(wm.config)
    )
    clips = ClipSet.open(args.heldout, protocol).at_most(args.limit)
    before = measure(wm, clips)
    words = [f"output={out / 'training'}", f"tokenizer.module.tokenizer.from={args.model}"]
    words += [f"tokenizer.data.train={args.data}", f"tokenizer.data.val={args.heldout}"]
    words += [f"tokenizer.data.resolution={wm.config.tokenizer.resolution}"]
    words += [f"tokenizer.data.context_length={wm.config.context_length}"]
    words += [] if args.updates is None else [f"tokenizer.trainer.max_steps={args.updates}"]
    folder = recipes.run(RECIPE, [*words, *args.overrides])
    assert folder is not None
    wm.tokenizer.load_state_dict(load_tokenizer(folder / "tokenizer").state_dict())
    wm.save_pretrained(out / "model")
    after = measure(ivideogpt.from_pretrained(out / "model"), clips)
    table = Table("", *COLUMNS, title=f"{args.model} on {len(clips)} clips of {args.heldout}", title_justify="left")
    for name, found in (("before", before), ("after", after)):
        table.add_row(name, *(f"{found[column]:.4g}" for column in COLUMNS))
    Console().print(table)
    record = {"command": shlex.join(["ivideogpt", *sys.argv[1:]]), "model": args.model, "data": args.data,
              "heldout": args.heldout, "clips": len(clips), "before": before, "after": after}  # fmt: skip
    (out / "adapt.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{out / 'model'}: the adapted model; {out / 'adapt.json'}: what was measured")


def measure(wm: WorldModel, clips: ClipSet) -> dict[str, float]:
    """PSNR of the future frames' reconstructions, and of argmax predictions PSNR, SSIM and MSE: means over clips.

    Args:
        wm: the model.
        clips: held-out ones.
    """
    import torch

    from ivideogpt.data.transforms import to_float
    from ivideogpt.metrics.evaluation import evaluate
    from ivideogpt.metrics.video import psnr

    context, values = wm.config.context_length, []
    with torch.inference_mode():
        for batch in clips:
            video = to_float(batch["video"])
            tokens, _ = wm.tokenizer.tokenize(video)
            again = wm.tokenizer.detokenize(tokens).clamp(0, 1)
            values.append(psnr(again[:, context:], video[:, context:]).mean(dim=1))
    result = evaluate(wm, clips, clips.protocol)
    assert result is not None
    predicted = (result["overall"]["model"][name] for name in ("psnr", "ssim", "mse"))
    return dict(zip(COLUMNS, (torch.cat(values).mean().item(), *map(float, predicted)), strict=True))
