"""Mixtures by name: which shard sets they are made of, and with which weights (`mixtures.yaml`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import yaml

from ivideogpt.data.file_cache import is_url
from ivideogpt.data.manifest import MANIFEST
from ivideogpt.data.sources.rlds import oxe_table

PREFIX = "mixture:"
"""What stands in front of a mixture's name where a shard set may be named as well."""
SELECT, OXE = "select", "oxe"


@cache
def mixture_table() -> dict[str, dict[str, float]]:
    """Shares of the data sets, adding up to 1, of every mixture by name."""
    select = {f"{OXE}/{name}": float(row["weight"]) for name, row in oxe_table().items() if row.get("weight")}
    table = {SELECT: _scaled(select)}
    for name, parts in yaml.safe_load(Path(__file__).with_name("mixtures.yaml").read_text(encoding="utf-8")).items():
        shares: dict[str, float] = {}
        for part, share in parts.items():
            inside = table.get(part, {part: 1.0})  # a mixture from above, or a data set
            shares |= {data_set: share * weight for data_set, weight in inside.items()}
        table[name] = _scaled(shares)
    return table


def _scaled(shares: dict[str, float]) -> dict[str, float]:
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def named_mixture(name: str, root: str) -> dict[str, float]:
    """The shard sets of a mixture with their weights, by folder.

    Args:
        name: Of the mixture.
        root: Folder that the data sets' shards lie in, each under its name; or its URL.

    Raises:
        ValueError: There is no such mixture, or shards of it are missing; the message lists them.
    """
    table = mixture_table()
    if name not in table:
        raise ValueError(f"there is no mixture {name!r}; there are {', '.join(table)}")
    if is_url(root):
        return {f"{root.rstrip('/')}/{data_set}": share for data_set, share in table[name].items()}
    folders = {str(Path(root) / data_set): share for data_set, share in table[name].items()}
    missing = [folder for folder in folders if not (Path(folder) / MANIFEST).is_file()]
    if missing:
        listed = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ValueError(
            f"the mixture {name!r} needs {len(folders)} shard sets, {len(missing)} are missing: {listed}; make each "
            f"with `ivideogpt data pack RECORDINGS --out {missing[0]}`, or say with `root` where they are"
        )
    return folders


def temperature_weights(sizes: dict[str, int], temperature: float) -> dict[str, float]:
    """Weights in proportion to ``size ** (1 / temperature)``: 1 goes by size, much more makes all sets alike.

    Raises:
        ValueError: The temperature is not positive.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")
    logs = np.log(np.array(list(sizes.values()), np.float64)) / temperature
    weights = np.exp(logs - logs.max())  # far from overflow, whatever the sizes
    return dict(zip(sizes, (weights / weights.sum()).tolist(), strict=True))
