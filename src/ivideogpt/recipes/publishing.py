"""Publishes what a recipe made: finds the model, its results, its pictures and its training data in the output folder.

A folder that `save_pretrained` wrote can be published as well; it has no results unless they are given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ivideogpt.recipes.reading import STAGE_NAME, Node, nearest, parse_yaml
from ivideogpt.recipes.results import read_record
from ivideogpt.zoo.adapter import is_adapter
from ivideogpt.zoo.card import entry_card, results_files
from ivideogpt.zoo.card_results import read_card_results
from ivideogpt.zoo.checkpoint import RECIPE, TRANSFORMER_WEIGHTS, load_parts
from ivideogpt.zoo.folder import finish_interrupted_save
from ivideogpt.zoo.push import Evidence, Publication, push_parts
from ivideogpt.zoo.registry import ZooEntry, cards_folder, find_entry

EXAMPLES = "examples.gif"


@dataclass(frozen=True)
class PublishSettings:
    """A recipe's ``publish``: where its model goes when all stages are done.

    Attributes:
        repo_id: ``user/name`` on the Hub.
        private: make a new repository private.
        revision: branch; the main one if None.
        tag: name for the commit.
        licence: of the weights, an SPDX identifier; that of the base model if None.
        datasets: Hub ids of data sets, to be linked.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    tag: str | None = None
    licence: str | None = None
    datasets: list[str] = field(default_factory=list)


def publish_settings(node: Any) -> PublishSettings:
    """What the ``publish`` of a recipe says.

    Raises:
        ValueError: naming what is wrong.
    """
    known = [item.name for item in fields(PublishSettings)]
    if not isinstance(node, dict) or not isinstance(node.get("repo_id"), str) or node["repo_id"].count("/") != 1:
        raise ValueError(f"publish must be a mapping with repo_id: USER/NAME, got {node!r}")
    for key, value in node.items():
        if key not in known:
            raise ValueError(f"publish: unknown key {key!r}; {nearest(str(key), known)}")
        wanted: Any = {"private": bool, "datasets": list}.get(key, (str, type(None)))
        if not isinstance(value, wanted):
            raise ValueError(f"publish.{key}: {value!r} is of the wrong type")
    if not all(isinstance(name, str) for name in node.get("datasets", [])):
        raise ValueError(f"publish.datasets: {node['datasets']!r} must be Hub ids")
    return PublishSettings(**node)


def publish(
    folder: str | os.PathLike[str],
    settings: PublishSettings,
    *,
    results: Sequence[Path] = (),
    rollout: Path | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Uploads the model in ``folder``; see :func:`ivideogpt.zoo.push.push_parts`.

    Args:
        folder: the output of a recipe, a model, or the zoo name of one inside this package, which has its own card.
        settings: where it goes.
        results: files of ``ivideogpt evaluate`` beside those of the recipe.
        rollout: a GIF; that of the recipe's evaluation if None.
        message: of the commit.
        dry_run: upload nothing.

    Raises:
        ValueError: if there is no model, or something may not be published.
        OSError: if a file cannot be read or the Hub does not take it.
    """
    entry = None if Path(folder).is_dir() else find_entry(os.fspath(folder))
    card = None
    if entry is not None and entry.folder is not None:
        if settings.licence is not None or settings.datasets:
            raise ValueError(
                f"{entry.name} has a card of its own, with licence and data: leave out --licence and --dataset"
            )
        model, found = entry.folder, _entry_evidence(entry)
    else:
        model = model_folder(Path(folder))
        found = gather(Path(folder), model)
    given = {path.stem: path for path in results}
    for name in given.keys() & found.results.keys():
        raise ValueError(f"two results files would be called {name}.json: {given[name]} and {found.results[name]}")
    evidence = Evidence(
        results={**found.results, **given},
        rollout=rollout or found.rollout,
        data=found.data,
        datasets=settings.datasets,
        compute=found.compute,
        licence=settings.licence,
    )
    if entry is not None and entry.folder is not None:
        card = entry_card(entry, [read_card_results(path) for path in evidence.results.values()], settings.repo_id)
    return push_parts(
        load_parts(model),
        settings.repo_id,
        evidence=evidence,
        private=settings.private or None,
        revision=settings.revision,
        tag=settings.tag,
        commit_message=message,
        card=card,
        dry_run=dry_run,
    )


def model_folder(folder: Path) -> Path:
    """The model in a recipe's output folder, or ``folder`` itself if it is one.

    Raises:
        ValueError: if there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one that a recipe or `save_pretrained` wrote")
    for found in (folder, folder / "model"):
        if found.is_dir():
            finish_interrupted_save(found)
        if (found / TRANSFORMER_WEIGHTS).is_file() or is_adapter(found):
            return found
    raise ValueError(
        f"{folder} holds no world model, neither itself nor in {folder / 'model'}; a recipe writes that when its "
        "stages are done, `ivideogpt consolidate` makes a model of a training checkpoint"
    )


def _entry_evidence(entry: ZooEntry) -> Evidence:
    folder = cards_folder()
    rollout = folder / entry.rollout["file"] if entry.rollout else None
    return Evidence({path.stem: path for path in results_files(entry.name, folder / "results")}, rollout)


def gather(folder: Path, model: Path) -> Evidence:
    """What the output folder of a recipe tells about its model."""
    path = model / RECIPE
    recipe = parse_yaml(path.read_text(encoding="utf-8", errors="replace"), path) if path.is_file() else None
    named = recipe.get("stages") if isinstance(recipe, dict) else None
    settings = named if isinstance(named, dict) else {}
    stages = [stage for stage in settings if STAGE_NAME.fullmatch(stage)]  # a name that climbs is no stage's
    records = {stage: read_record(folder / stage) or {} for stage in stages}
    results = {stage: file for stage in stages if (file := folder / stage / "results.json").is_file()}
    examples = [file for stage in stages if (file := folder / stage / EXAMPLES).is_file()]
    return Evidence(
        results=results,
        rollout=examples[-1] if examples else None,
        data=list(_training_data(settings)),
        compute="; ".join(_compute(records)) or "not recorded",
    )


def _compute(records: Mapping[str, Node]) -> Iterator[str]:
    for stage, record in records.items():
        if record.get("state") != "finished":
            continue
        trainer = record.get("settings", {}).get("trainer", {})
        where = (
            f"{trainer.get('devices', 1)} x {trainer.get('accelerator', 'auto')}, {trainer.get('num_nodes', 1)} node(s)"
        )
        yield f"{stage}: {record.get('updates', 0)} updates in {record.get('seconds', 0):.0f} s on {where}"


def _training_data(stages: Node) -> Iterator[dict[str, str]]:
    """The sets that the stages train on, with what their manifests say of sources and licences."""
    seen = set()
    for stage in stages.values():
        node = stage
        for key in ("data", "init_args", "train"):
            node = node.get(key) if isinstance(node, dict) else None
        for name in [node] if isinstance(node, str) else list(node) if isinstance(node, list | dict) else []:
            if name not in seen:
                seen.add(name)
                yield from _set_rows(str(name))


def _set_rows(name: str) -> Iterator[dict[str, str]]:
    from ivideogpt.data.reader import ShardError, load_manifest, resolve_source

    try:
        sources = load_manifest(resolve_source(name)).get("sources", {})
        for source, row in sources.items():
            what = f"{source}: {row['episodes']:,} episodes, {row['frames']:,} frames"
            yield {"name": what, "licence": row.get("licence") or "not recorded"}
    except (ShardError, KeyError, TypeError, AttributeError):  # a mixture, or a set that is no longer here
        yield {"name": name, "licence": "not recorded"}


def describe(publication: Publication) -> Iterator[str]:
    """Lines that say what a push did, or would do."""
    for name, size in publication.files.items():
        yield f"{size:>14,}  {name}"
    total = sum(publication.files.values())
    if publication.url is None:
        yield f"{total:>14,}  bytes would go to {publication.repo_id}; nothing was uploaded"
    elif publication.changed:
        yield f"{total:>14,}  bytes: {publication.url}"
    else:
        yield f"{publication.repo_id} holds all of it already; nothing was changed: {publication.url}"
