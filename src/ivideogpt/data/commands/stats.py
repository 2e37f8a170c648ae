"""`ivideogpt data stats`: what a shard set holds, by source, from its manifest and index alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from argparse import Namespace, _SubParsersAction

    from ivideogpt.data.reader import ShardSet

BARS = " ▁▂▃▄▅▆▇█"


def add(commands: _SubParsersAction) -> None:
    """Adds the command."""
    command = commands.add_parser("stats", help="show what shard sets hold: sources, lengths, actions, rewards")
    command.add_argument("shards", nargs="+", help="folder of a shard set, or embedded:train|heldout")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(func=_stats)


def _stats(args: Namespace) -> int:
    from ivideogpt.data.reader import ShardSet

    found = {name: describe(ShardSet(name)) for name in args.shards}
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, summary in found.items():
        _show(name, summary)
    return 0


def describe(shards: ShardSet) -> dict[str, Any]:
    """Counts of a shard set, and for each source its episodes, frames, hours, sizes, rates, lengths and statistics.

    Args:
        shards: The set; none of its records is read.

    Returns:
        JSON: `counts`, `codec`, `bytes_per_frame`, `statistics` (None for sets of version 1, which have none of a
        source) and `sources` by name.
    """
    index, manifest = shards.index, shards.manifest
    sources: dict[str, Any] = {}
    for number, name in enumerate(index.sources):
        rows = np.flatnonzero(index["source"] == number)
        if not len(rows):
            continue
        frames, rates = index["frames"][rows], index["fps"][rows]
        sizes = np.unique(np.stack([index["height"][rows], index["width"][rows]], axis=1), axis=0)
        counts, edges = np.histogram(frames, bins=min(16, len(np.unique(frames))))
        entry = manifest["sources"][name]
        sources[name] = {
            "licence": entry["licence"],
            "episodes": len(rows),
            "frames": int(frames.sum()),
            "hours": float((frames / rates).sum() / 3600),
            "resolutions": sizes.tolist(),
            "fps": np.unique(rates).tolist(),
            "cameras": [index.cameras[camera] for camera in np.unique(index["camera"][rows])],
            "action_dims": [int(width) or None for width in np.unique(index["action_dim"][rows])],
            "lengths": {"min": int(frames.min()), "median": float(np.median(frames)), "max": int(frames.max()),
                        "histogram": counts.tolist(), "edges": edges.tolist()},
            "statistics": entry.get("statistics"),
        }  # fmt: skip
    total = max(int(index["frames"].sum()), 1)
    return {
        "counts": manifest["counts"],
        "codec": manifest["codec"],
        "bytes_per_frame": int(index["size"].sum()) / total,
        "statistics": manifest["statistics"],
        "quarantine": manifest.get("quarantine"),
        "converter": manifest["converter"],
        "command": manifest["command"],
        "sources": sources,
    }


def bars(counts: list[int]) -> str:
    """A histogram in one line of text.

    >>> bars([0, 1, 8])
    ' ▁█'
    """
    peak = max(max(counts), 1)
    return "".join(BARS[-(-count * (len(BARS) - 1) // peak)] for count in counts)


def _show(name: str, summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    columns = ("source", "licence", "episodes", "frames", "hours", "pixels", "fps", "camera", "lengths")
    table = Table(*columns, title=name, title_justify="left")
    for source, entry in summary["sources"].items():
        lengths = entry["lengths"]
        table.add_row(
            source, entry["licence"], str(entry["episodes"]), str(entry["frames"]), f"{entry['hours']:.2f}",
            _few(f"{height} x {width}" for height, width in entry["resolutions"]), _few(f"{r:g}" for r in entry["fps"]),
            _few(entry["cameras"]), f"{lengths['min']} {bars(lengths['histogram'])} {lengths['max']}",
        )  # fmt: skip
    console.print(table)
    for kind in ("actions", "rewards"):
        _show_statistics(console, kind, summary)
    counts, codec = summary["counts"], summary["codec"]["name"]
    console.print(
        f"{counts['episodes']} episodes, {counts['frames']} frames in {counts['shards']} shards; {codec}, "
        f"{summary['bytes_per_frame']:.0f} bytes a frame; {summary['converter']}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if (summary["quarantine"] or {}).get("episodes"):
        console.print(f"{summary['quarantine']['episodes']} bad episodes were left out", highlight=False)
    console.print(f"made by: {summary['command']}", highlight=False, soft_wrap=True, markup=False)


def _show_statistics(console: Any, kind: str, summary: dict[str, Any]) -> None:
    from rich.table import Table

    rows = {"all": summary["statistics"], **{n: e["statistics"] for n, e in summary["sources"].items()}}
    if len(summary["sources"]) == 1:
        del rows["all"]
    known = {name: found[kind] for name, found in rows.items() if found and found.get(kind)}
    if not known:
        return
    table = Table("source", "dimension", "mean", "std", "min", "max", title=kind, title_justify="left")
    for name, found in known.items():
        for number in range(len(found["mean"])):
            values = (f"{found[what][number]:.4g}" for what in ("mean", "std", "min", "max"))
            table.add_row(name if number == 0 else "", str(number), *values)
    console.print(table)


def _few(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
