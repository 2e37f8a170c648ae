"""What a model card shows of the results files that ``ivideogpt evaluate`` wrote: tables, conditions, what is missing.

Every number of a card's results comes from here, and so from a file; what a file does not hold is said to be not
evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivideogpt.metrics.results import SCHEMA_VERSION
from ivideogpt.zoo.published import read_json

OVERALL = "overall"
_HEAD = ("schema_version", "model", "tasks", OVERALL, "videos", "missing", "notes", "protocol")
_LONGEST = 600  # characters of a condition
_DIGITS = 4  # significant ones on a card; the file has them all


@dataclass(frozen=True)
class CardResults:
    """One results file, as a card shows it.

    Attributes:
        file: name of the file.
        protocol: name of the protocol.
        data: names of the sets that it was measured on.
        seed: of the sampling.
        rows: task -> column -> text; the last row is over all tasks.
        numbers: task -> metric -> value of the model.
        conditions: how it was measured, name -> text.
        curves: metric -> values over the predicted frames, as text.
        missing: metric -> why it was not evaluated.
        notes: sentences of the evaluation about itself.
    """

    file: str
    protocol: str
    data: str
    seed: str
    rows: dict[str, dict[str, str]]
    numbers: dict[str, dict[str, float]]
    conditions: dict[str, str]
    curves: dict[str, str]
    missing: dict[str, str]
    notes: list[str]

    @property
    def columns(self) -> list[str]:
        """Every column that a row has, in order."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))


def read_card_results(path: Path) -> CardResults:
    """What a card shows of the results file ``path``.

    Raises:
        ValueError: if it is no results file, or one of a schema that this version does not know.
    """
    results = read_json(path)
    schema = results.get("schema_version")
    if schema != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: results of schema {schema!r}; cards are made of schema {SCHEMA_VERSION}. Measure again with "
            "`ivideogpt evaluate`"
        )
    try:
        tasks = {**results["tasks"], OVERALL: results[OVERALL]}
        protocol = results.get("protocol") or {}
        return CardResults(
            file=path.name,
            protocol=str(protocol.get("name", "not recorded")),
            data=_data(results),
            seed=_text(results.get("seed", "not recorded")),
            rows={task: _row(found) for task, found in tasks.items()},
            numbers={task: _numbers(found) for task, found in tasks.items()},
            conditions=_conditions(protocol, results),
            curves={
                metric: ", ".join(map(number, values))
                for metric, values in (results[OVERALL].get("curves") or {}).get("model", {}).items()
            },
            missing={str(name): _text(why) for name, why in (results.get("missing") or {}).items()},
            notes=[str(note) for note in results.get("notes") or []],
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is no results file of `ivideogpt evaluate`: {error!r}") from error


def number(value: object) -> str:
    """A number as a card shows it."""
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else _text("-" if value is None else value)


def _data(results: Mapping[str, Any]) -> str:
    hashes = (results.get("hashes") or {}).get("data")
    return ", ".join(hashes) if hashes else str((results.get("data") or {}).get("set", "recordings without a name"))


def _conditions(protocol: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, str]:
    found = {name: value for name, value in protocol.items() if name != "name"}
    found |= {name: value for name, value in results.items() if name not in _HEAD}
    texts = {name: _text(value) for name, value in found.items() if value is not None}
    return {name: text if len(text) <= _LONGEST else "see the file" for name, text in texts.items()}


def _row(found: Mapping[str, Any]) -> dict[str, str]:
    """The cells of one task: mean, deviation over runs and interval of each metric, and what to hold it against."""
    row = {name: number(found[name]) for name in ("clips", "episodes") if name in found}
    for metric, value in found["model"].items():
        text = number(value)
        deviation = (found.get("std_over_runs") or {}).get(metric)
        if deviation is not None:
            text += f" ± {number(deviation)}"
        ends = (found.get("interval") or {}).get(metric)
        if ends is not None:
            text += f" [{number(ends[0])}, {number(ends[1])}]"
        row[metric] = text
        if metric in (found.get("repeat_last_frame") or {}):
            row[f"{metric}, last frame repeated"] = number(found["repeat_last_frame"][metric])
    if (found.get("shuffled_actions") or {}).get("mse_ratio") is not None:
        row["mse ratio, actions shuffled"] = number(found["shuffled_actions"]["mse_ratio"])
    if (found.get("reward") or {}).get("pearson_r") is not None:
        row["reward r"] = number(found["reward"]["pearson_r"])
    if found.get("tokens"):
        row["token perplexity"] = number(found["tokens"]["perplexity"])
    return row


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {metric: value for metric, value in found["model"].items() if isinstance(value, int | float)}


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
