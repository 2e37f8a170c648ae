"""The zoo: named world models, one YAML file each beside its card in ``model_cards/``.

A zoo name stands for a Hub repository, or for a folder inside this package (``hub_id`` is null there). The folder of
the entries is the repository's in a checkout, and ``_model_cards`` inside the package when it is installed.
"""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_PACKAGE = Path(__file__).resolve().parents[1]
EMBEDDED = _PACKAGE / "assets" / "models"
"""Folder of the models that the package carries, one folder each by its zoo name."""


def cards_folder() -> Path:
    """Folder of the entries, the cards, their template and their results.

    Raises:
        FileNotFoundError: if the installation is incomplete.
    """
    for folder in (_PACKAGE / "_model_cards", _PACKAGE.parents[1] / "model_cards"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the zoo's entries are neither in {_PACKAGE / '_model_cards'} nor beside the sources")


@dataclass(frozen=True)
class ZooEntry:
    """One named world model.

    Attributes:
        name: zoo name.
        hub_id: Hub repository, None for a model inside this package.
        licence: of the weights; SPDX identifier, lower case.
        summary: one sentence, or a few.
        resolution: height and width of a frame in pixels.
        context_length: context frames (a goal frame counted in).
        action_dim: size of an action, None without actions.
        rewards: whether the model predicts rewards.
        goal: whether the first context frame is the goal.
        parameters: counts by part, ``tokenizer`` and ``transformer``; empty where they are not known.
        data: what the model was trained on, each with ``name``, ``url``, ``licence`` and, where the Hub has it,
            ``hub_id``.
        preprocessing: what frames and actions it expects.
        source: where the model and its description come from.
        compute: what the training took, and who says so.
        base_model: zoo name of the model that its training started from, None where it started from nothing.
        recipe: path of the recipe in this repository that trains such a model, None where there is none.
        limits: what it cannot do, a sentence each.
        failures: how it fails, a sentence each; empty where nobody looked.
        rollout: an animation, with ``file`` in the folder of the cards, the ``command`` that made it and ``what`` it
            shows; None where there is none.
        authors_results: numbers that the authors published for this setting, each with ``benchmark``, ``metric``,
            ``value`` and ``protocol``; not measured by this package.
        aliases: other names for it.
    """

    name: str
    hub_id: str | None
    licence: str
    summary: str
    resolution: int
    context_length: int
    action_dim: int | None
    rewards: bool
    goal: bool
    parameters: dict[str, int]
    data: list[dict[str, str]]
    preprocessing: str
    source: str
    compute: str
    base_model: str | None = None
    recipe: str | None = None
    limits: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    rollout: dict[str, str] | None = None
    authors_results: list[dict[str, Any]] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path | None:
        """Folder inside this package, None for a model on the Hub."""
        return None if self.hub_id else EMBEDDED / self.name


@cache
def entries() -> dict[str, ZooEntry]:
    """All entries by zoo name, sorted."""
    known = {item.name for item in fields(ZooEntry)}
    found = {}
    for path in sorted(cards_folder().glob("*.yaml"), key=lambda path: path.stem):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert set(values) <= known, f"{path}: unknown fields {set(values) - known}"
        found[path.stem] = ZooEntry(**values)
        assert found[path.stem].name == path.stem, f"{path} must be named after its entry"
    return found


def find_entry(name: str) -> ZooEntry | None:
    """The entry that ``name`` (a zoo name or an alias) stands for, None if it stands for none."""
    found = entries().get(name)
    return found or next((entry for entry in entries().values() if name in entry.aliases), None)


def nearest_names(name: str, count: int = 3) -> list[str]:
    """Zoo names and aliases that look like ``name``, best first; none if ``name`` is the Hub id of an entry."""
    if name in (entry.hub_id for entry in entries().values()):
        return []
    names = [known for entry in entries().values() for known in (entry.name, *entry.aliases)]
    return difflib.get_close_matches(name, names, n=count, cutoff=0.6)


def list_models(pattern: str = "*") -> list[str]:
    """Zoo names that match ``pattern`` (shell wildcards), sorted.

    >>> list_models("*bair*")
    ['ivideogpt-bair-64-act-cond', 'ivideogpt-bair-64-act-free']
    """
    return fnmatch.filter(entries(), pattern)
