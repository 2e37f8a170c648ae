"""The formats of recordings that can be packed: what reads each, with which options, and how it is recognised."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ivideogpt.data.sources.frames import Job

SOURCES = "ivideogpt.data.sources"
LOOKED_AT = 20_000
"""Files of a folder that are looked at to recognise its format."""


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Args:
        about: A line about it.
        module: Name of the module that reads it, imported when it is needed.
        options: Name of its options class there.
        jobs: Name of the function that lists its episodes.
        view: Option that chooses one of several cameras; None for a format with one.
        cameras: Name of the function that lists them.
    """

    about: str
    module: str
    options: str
    jobs: str
    view: str | None = None
    cameras: str = ""

    def there(self) -> bool:
        """Whether this version has the module."""
        return importlib.util.find_spec(f"{SOURCES}.{self.module}") is not None

    def options_class(self) -> Any:
        """The frozen dataclass of its options."""
        return getattr(importlib.import_module(f"{SOURCES}.{self.module}"), self.options)


_LINES = {
    "npz": Format("a folder of .npz files, one an episode", "npz", "NpzOptions", "npz_jobs"),
    "rlds": Format(
        "RLDS, Open X-Embodiment: a folder of tensorflow-datasets",
        "rlds",
        "RldsOptions",
        "rlds_jobs",
        "video_key",
        "rlds_cameras",
    ),
    "bair": Format(
        "BAIR robot pushing: softmotion .tfrecords", "bair", "NpzOptions", "bair_jobs", "video_key", "bair_cameras"
    ),
    "hdf5": Format(
        "HDF5: robomimic, robosuite, or any by its keys", "hdf5", "Hdf5Options", "hdf5_jobs", "camera", "hdf5_cameras"
    ),
    "vp2": Format(
        "VP2's HDF5 files, with its cameras and masks", "hdf5", "Hdf5Options", "vp2_jobs", "camera", "hdf5_cameras"
    ),
    "robonet": Format("RoboNet's HDF5 files", "robonet", "RobonetOptions", "robonet_jobs", "camera", "robonet_cameras"),
    "video": Format("videos or folders of images, actions beside them", "video", "VideoOptions", "video_jobs"),
    "sthsth": Format("Something-Something v2 with its label files", "sthsth", "SthSthOptions", "sthsth_jobs"),
    "lerobot": Format(
        "LeRobotDataset v3 folders", "lerobot", "LerobotOptions", "lerobot_jobs", "camera", "lerobot_cameras"
    ),
}
FORMATS = {name: form for name, form in _LINES.items() if form.there()}


def known_format(name: str) -> Format:
    """The format of a name.

    Raises:
        ValueError: There is none; the message lists them.
    """
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is not known; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def list_jobs(source: str | Path, name: str, options: Any = None) -> tuple[Iterable[Job], int | None]:
    """The episodes of a source, in a fixed order, as (name, how to read it); and their number where it is known.

    Args:
        source: The folder or file.
        name: Its format.
        options: What the format's options class makes; None for its defaults.

    Raises:
        ValueError: The format is not known, the options are another format's, or nothing of it is there.
    """
    form = known_format(name)
    wanted = form.options_class()
    if options is not None and type(options) is not wanted:
        raise ValueError(f"format {name!r} takes {wanted.__name__}, got {type(options).__name__}")
    found = getattr(importlib.import_module(f"{SOURCES}.{form.module}"), form.jobs)(source, options)
    return found if isinstance(found, tuple) else (found, len(found))


def choose_views(source: str | Path, name: str, options: Any, cameras: Sequence[str]) -> list[Any]:
    """The options for each camera to read.

    Args:
        source: The folder or file.
        name: Its format.
        options: What all of them share; None for the format's defaults.
        cameras: Names, or `all` alone; none for the one that the format takes.

    Raises:
        ValueError: The format has one camera only, a name is given twice, or none can be found.
    """
    if not cameras:
        return [options]
    form = known_format(name)
    if form.view is None:
        several = ", ".join(other for other, line in FORMATS.items() if line.view)
        raise ValueError(f"a recording of the format {name!r} has one camera; formats with several are {several}")
    options = form.options_class()() if options is None else options
    names: list[Any] = list(cameras)
    if names == ["all"]:
        names = getattr(importlib.import_module(f"{SOURCES}.{form.module}"), form.cameras)(source, options)
        if not names:
            raise ValueError(f"{source}: no recording could be read to see which cameras there are; name them")
    if len(set(names)) < len(names) or "all" in names:
        raise ValueError(f"cameras {', '.join(map(str, names))}: each may be named once, `all` only alone")
    whole = int in _choices(_type(form, form.view))
    if whole and (wrong := [camera for camera in names if not str(camera).isdecimal()]):
        raise ValueError(f"--camera needs a number for the format {name!r}, got {wrong[0]!r}")
    return [dataclasses.replace(options, **{form.view: int(view) if whole else view}) for view in names]


# What a person types


def option_fields() -> dict[str, list[str]]:
    """Every option that a person can give, and the formats that have it."""
    found: dict[str, list[str]] = {}
    for name, form in FORMATS.items():
        for field in dataclasses.fields(form.options_class()):
            if typing.get_origin(_type(form, field.name)) is not tuple:
                found.setdefault(field.name, []).append(name)
    return found


def describe_option(option: str) -> str:
    """What an option is for, from the documentation of the first format that has it, and the formats that do."""
    names = option_fields()[option]
    everywhere = len(names) == len(FORMATS)
    words = document_option(names[0], option).rstrip(".")
    return f"{words} [{'every format' if everywhere else ', '.join(names)}]".replace("%", "%%")


def document_option(name: str, option: str) -> str:
    """What an option is for in a format, from the documentation of its options class."""
    documented = FORMATS[name].options_class().__doc__ or ""
    text = re.search(rf"^ {{8}}{option}: (.+?)(?=^ {{8}}\w+: |\Z)", documented, re.M | re.S)
    return " ".join(text.group(1).split()) if text else ""


def is_flag(option: str) -> bool:
    """Whether an option is yes or no."""
    return bool in _choices(_type(FORMATS[option_fields()[option][0]], option))


def make_options(name: str, given: dict[str, Any]) -> Any:
    """The options of a format from what a person gave, texts and flags by option; what is None was not given.

    Raises:
        ValueError: An option that the format does not have, or a text that is no number where one is needed.
    """
    form, values = known_format(name), {}
    fields = {field.name for field in dataclasses.fields(form.options_class())}
    for option, value in given.items():
        if value is None:
            continue
        flag = f"--{option.replace('_', '-')}"
        if option not in fields:
            raise ValueError(
                f"{flag} is no option of the format {name!r}; it belongs to {', '.join(option_fields()[option])}"
            )
        choices = _choices(_type(form, option))
        for kind in (int, float):
            if kind in choices and not isinstance(value, bool):
                try:
                    value = kind(value)
                except ValueError:
                    raise ValueError(f"{flag} needs a number for the format {name!r}, got {value!r}") from None
        values[option] = value
    return form.options_class()(**values)


def _type(form: Format, option: str) -> Any:
    return typing.get_type_hints(form.options_class())[option]


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


# Recognising


def guess_format(source: str | Path) -> str:
    """The format of a folder or file, where it can be told safely.

    Raises:
        ValueError: Nothing that is known is there, or it may be several; the message names them.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{source} does not exist")
    found: dict[str, Path] = {}
    for file in islice(_files(path), LOOKED_AT):
        kind = _kind(file)
        if kind is not None:
            found.setdefault(kind, file)
    for leading in ("rlds", "lerobot"):  # what else is there belongs to them
        if leading in found and len(found.keys() & {"rlds", "lerobot"}) == 1:
            known_format(leading)
            return leading
    if "sthsth" in found:  # its videos stand beside the label files
        found.pop("video", None)
    if not found:
        formats = ", ".join(FORMATS)
        raise ValueError(f"{source} holds nothing that any format knows; name one with --format ({formats})")
    if len(found) > 1:
        seen = " or ".join(f"{name} ({file.name})" for name, file in sorted(found.items()))
        raise ValueError(f"{source} may be {seen}; say which with --format")
    return next(iter(found))


def _files(path: Path) -> Iterable[Path]:
    if path.is_file():
        yield path
        return
    for folder, below, names in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


def _kind(file: Path) -> str | None:
    """The format that a file speaks for."""
    from ivideogpt.data.sources.hdf5 import SUFFIXES
    from ivideogpt.data.sources.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES

    suffix = file.suffix.lower()
    if file.name == "features.json" and (file.parent / "dataset_info.json").is_file():
        return "rlds"
    if file.name == "info.json" and file.parent.name == "meta" and _is_lerobot(file):
        return "lerobot"
    if re.fullmatch(r"traj_\d+_to_\d+\.tfrecords", file.name):
        return "bair"
    if re.fullmatch(r"something-something-v2-\w+\.json", file.name):
        return "sthsth"
    if suffix == ".npz":
        return "npz"
    if suffix in SUFFIXES:
        return _hdf5_kind(file)
    return "video" if suffix in (*VIDEO_SUFFIXES, ".webm", *IMAGE_SUFFIXES) else None


def _is_lerobot(file: Path) -> bool:
    try:
        return "codebase_version" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _hdf5_kind(file: Path) -> str:
    from ivideogpt.data.sources.hdf5 import open_hdf5

    try:
        with open_hdf5(file) as opened:
            return "robonet" if "env" in opened and "policy" in opened else "hdf5"
    except ValueError:  # not readable: reading it says why
        return "hdf5"
