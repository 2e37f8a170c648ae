"""`ivideogpt adapt tokenizer`: a tokenizer for new recordings under a transformer that stays as it is."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivideogpt.commands.arguments import add_model, at_least

if TYPE_CHECKING:
    from ivideogpt.metrics.clips import ClipSet
    from ivideogpt.world_model import WorldModel
    from ivideogpt.zoo.checkpoint import Parts

RECIPE, RECIPE_STAGE = "adapt", "tokenizer"
COLUMNS = ("reconstruction PSNR", "prediction PSNR", "prediction SSIM", "prediction MSE")


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser("adapt", help="adapt a model's tokenizer to new recordings")
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    command = parts.add_parser(
        "tokenizer",
        help="train the tokenizer, leave the transformer, measure before and after",
        description="Trains the decoders of a model's tokenizer on new recordings, leaves its transformer as it is "
        "(the zero-shot setting of arXiv 2405.15223), and compares reconstructions and predictions of held-out "
        "episodes before and after. The encoders and codebooks stay, so that tokens mean what the transformer learnt "
        "of them; `tokenizer.module.freeze=[]` trains them as well. The same command goes on where it was stopped.",
    )
    add_model(command)
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
    import torch
    from lightning.pytorch.utilities import rank_zero_only
    from rich.console import Console
    from rich.table import Table

    import ivideogpt
    from ivideogpt import recipes
    from ivideogpt.metrics.clips import ClipSet
    from ivideogpt.metrics.protocols import EvaluationProtocol
    from ivideogpt.metrics.results import versions
    from ivideogpt.zoo.checkpoint import save_parts
    from ivideogpt.zoo.hub import resolve

    out = Path(args.out)
    first = not getattr(rank_zero_only, "rank", 0)  # of the processes of a training, each of which runs this command
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    open_model = partial(ivideogpt.from_pretrained, device=device, dtype=args.dtype, action_space=args.action_space)
    source = resolve(args.model, args.revision)
    wm = open_model(source)
    protocol = (
        EvaluationProtocol()
        .changed(horizon=args.horizon, temperature=0.0, metrics=("psnr", "ssim", "mse"), fvd=None)
        .settled(wm.config)
    )
    clips = ClipSet.open(args.heldout, protocol).at_most(args.limit)
    before = measure(wm, clips) if first else {}
    kind, _, number = device.partition(":")
    words = [f"output={out / 'training'}", f"tokenizer.module.tokenizer.from={args.model}"]
    words += [] if args.revision is None else [f"tokenizer.module.tokenizer.revision={args.revision}"]
    words += [f"tokenizer.trainer.accelerator={'gpu' if kind == 'cuda' else kind}"]
    words += [f"tokenizer.trainer.devices=[{number}]"] if number else []
    words += [f"tokenizer.data.train={args.data}", f"tokenizer.data.val={args.heldout}"]
    words += [f"tokenizer.data.resolution={wm.config.tokenizer.resolution}"]
    words += [f"tokenizer.data.context_length={wm.config.context_length}"]
    words += [] if args.updates is None else [f"tokenizer.trainer.max_steps={args.updates}"]
    folder = recipes.run(RECIPE, [*words, *args.overrides])
    assert folder is not None
    if not first:
        return
    save_parts(out / "model", adapted(source, args.model, folder))
    after = measure(open_model(out / "model"), clips)
    table = Table("", *COLUMNS, title=f"{args.model} on {len(clips)} clips of {args.heldout}", title_justify="left")
    for name, found in (("before", before), ("after", after)):
        table.add_row(name, *(f"{found[column]:.4g}" for column in COLUMNS))
    Console().print(table)
    trained = json.loads((folder / "tokenizer" / "summary.json").read_text(encoding="utf-8"))
    record = {"command": shlex.join(["ivideogpt", *sys.argv[1:]]), "model": args.model, "data": args.data,
              "heldout": args.heldout, "clips": len(clips), "device": device, "versions": versions(),
              "finished": trained["finished"], "updates": trained["updates"], "training_seconds": trained["seconds"],
              "before": before, "after": after}  # fmt: skip
    (out / "adapt.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{out / 'model'}: the adapted model; {out / 'adapt.json'}: what was measured")


def adapted(source: str | Path, name: str, training: Path) -> Parts:
    """The whole model with the tokenizer that the recipe has trained, and what it was made from.

    Args:
        source: folder of the model that it started from.
        name: by which the user named that.
        training: output folder of the recipe.
    """
    from ivideogpt.recipes.results import load_tokenizer, read_record
    from ivideogpt.zoo.checkpoint import load_parts

    parts, record = load_parts(source), read_record(training / RECIPE_STAGE)
    assert record is not None
    parts.tokenizer.load_state_dict(load_tokenizer(training / RECIPE_STAGE).state_dict())
    parts.extras |= {
        "recipe": RECIPE,
        "training": {"stage": RECIPE_STAGE, "updates": record["updates"], "seed": record["settings"]["seed"]},
    }
    if not Path(name).expanduser().is_dir():
        parts.extras["base_model"] = name
    parts.published.recipe = (training / RECIPE_STAGE / "recipe.yaml").read_text(encoding="utf-8")
    return parts


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
            video = to_float(batch["video"].to(wm.device))
            tokens, _ = wm.tokenizer.tokenize(video)
            again = wm.tokenizer.detokenize(tokens).clamp(0, 1)
            values.append(psnr(again[:, context:], video[:, context:]).mean(dim=1))
    result = evaluate(wm, clips, clips.protocol)
    assert result is not None
    predicted = (result["overall"]["model"][name] for name in ("psnr", "ssim", "mse"))
    return dict(zip(COLUMNS, (torch.cat(values).mean().item(), *map(float, predicted)), strict=True))
