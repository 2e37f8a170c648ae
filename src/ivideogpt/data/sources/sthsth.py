"""Reads Something-Something v2: <id>.webm files or <id>/ folders of images, with the label files and a class filter.

The label files are JSON lists with an object for each video: `id`, `label` (the sentence), `template` (the class, with
[something] where the label names an object) and `placeholders`. The classes to keep are data as well: a file with one
template a line or a JSON list (or an object whose keys are the templates, such as the data set's labels file, whose
values are the numbers of the classes). Brackets count for nothing when templates are compared.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from ivideogpt.data.sources.frames import Job, failing
from ivideogpt.data.sources.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoOptions, read_video


@dataclasses.dataclass(frozen=True)
class SthSthOptions:
    """How to read the data set.

    Args:
        labels: Label file of the split; None: `*<split>.json` in the folder, or in `labels` or `annotations` there.
        split: `train`, `validation` or `test`; what is looked for without `labels`.
        classes: File with the templates to keep; None: all.
        fps: Frames a second; None: what the video says, 1 for folders of images.
        source: Where the recordings come from; None: `sthsth`.
        licence: Their licence.
    """

    labels: str | Path | None = None
    split: str = "train"
    classes: str | Path | None = None
    fps: float | None = None
    source: str | None = None
    licence: str = "unknown"


def sthsth_jobs(source: str | Path, options: SthSthOptions | None = None) -> list[Job]:
    """The videos of the label file that pass the filter, in the order of the file, and how to read each.

    A video that is not there is a job that raises this, so that a conversion can leave it out and count it.

    Raises:
        ValueError: No folder, no label file or a wrong one, an unknown class in the filter, or no video that passes.
    """
    source, options = Path(source), options or SthSthOptions()
    if not source.is_dir():
        raise ValueError(f"{source} is no folder")
    label_file = Path(options.labels) if options.labels is not None else _find_labels(source, options.split)
    entries = read_labels(label_file)
    keep = None if options.classes is None else read_classes(options.classes)
    if keep is not None:
        there = {plain_template(entry["template"]) for entry in entries if "template" in entry}
        # The file may list classes by another spelling; a filter that silently drops a class is found out too late.
        if unknown := sorted(name for name in keep if name not in there):
            raise ValueError(f"{options.classes}: {len(unknown)} classes have no video in {label_file}: {unknown[0]!r}")
        entries = [entry for entry in entries if plain_template(entry.get("template", "")) in keep]
    if not entries:
        raise ValueError(f"{label_file} lists no video")
    jobs: list[Job] = []
    for entry in entries:
        path = _find_video(source, entry["id"])
        if path is None:
            jobs.append((entry["id"], partial(failing, f"{source} holds no video and no folder {entry['id']}")))
            continue
        reading = VideoOptions(fps=options.fps, source=options.source or "sthsth", licence=options.licence)
        metadata: dict[str, Any] = {
            name: entry[name] for name in ("id", "label", "template", "placeholders") if name in entry
        }
        if keep is not None and (number := keep[plain_template(entry["template"])]) is not None:
            metadata["class"] = number
        jobs.append((entry["id"], partial(read_video, path, reading, metadata)))
    return jobs


def read_labels(path: str | Path) -> list[dict[str, Any]]:
    """Entries of a label file.

    Raises:
        ValueError: No such file, no JSON, or no list of objects with different ids that are plain names.
    """
    found = _load(path)
    if not isinstance(found, list) or not all(isinstance(entry, dict) and "id" in entry for entry in found):
        raise ValueError(f"{path} must be a JSON list of objects with `id`")
    entries = [entry | {"id": str(entry["id"])} for entry in found]
    seen: set[str] = set()
    for entry in entries:
        name = entry["id"]
        if not name.isalnum():  # it becomes part of a path
            raise ValueError(f"{path}: the id {name!r} is not made of letters and digits")
        if name in seen:
            raise ValueError(f"{path} lists the id {name} twice")
        if not isinstance(entry.get("template", ""), str):
            raise ValueError(f"{path}: the template of {name} is {entry['template']!r}; a text is needed")
        seen.add(name)
    return entries


def read_classes(path: str | Path) -> dict[str, int | None]:
    """Templates to keep, without brackets, and the number of each class where the file has one.

    Raises:
        ValueError: No such file, or no template in it.
    """
    if Path(path).suffix.lower() == ".json":
        found = _load(path)
        if isinstance(found, dict):
            try:
                classes = {plain_template(name): int(number) for name, number in found.items()}
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: the numbers of the classes must be whole: {error}") from error
            found = list(classes)
        elif isinstance(found, list) and all(isinstance(name, str) for name in found):
            classes = {}
        else:
            raise ValueError(f"{path} must hold a list of templates, or an object of template and number")
    else:
        found, classes = [line.strip() for line in _text(path).splitlines()], {}
    names = [plain_template(name) for name in found if name]
    if not names:
        raise ValueError(f"{path} names no class")
    return {name: classes.get(name) for name in names}


def plain_template(template: str) -> str:
    """A template without the brackets around its objects, as the data set's list of classes has it.

    >>> plain_template("Putting [something] on a surface")
    'Putting something on a surface'
    """
    return template.replace("[", "").replace("]", "").strip()


def _find_labels(source: Path, split: str) -> Path:
    folders = [source, source / "labels", source / "annotations"]
    found = sorted(file for folder in folders for file in folder.glob(f"*{split}.json"))
    if len(found) != 1:
        what = f"several: {', '.join(map(str, found))}" if found else f"no *{split}.json in {source}"
        raise ValueError(f"the label file of the split {split!r} is needed: {what}")
    return found[0]


def _find_video(source: Path, name: str) -> Path | None:
    """The video or folder of images with a name."""
    for suffix in (".webm", *VIDEO_SUFFIXES):
        if (path := source / f"{name}{suffix}").is_file():
            return path
    folder = source / name
    if folder.is_dir() and any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.iterdir()):
        return folder
    return None


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _load(path: str | Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
