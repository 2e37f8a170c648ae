"""`ivideogpt doctor`: checks that this machine and its packages fit together, and says what to do where not."""

from __future__ import annotations

import argparse
import ctypes.util
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "note", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the report: "broken" makes the command fail, "note" names something that some commands need."""

    subject: str
    status: Status
    text: str


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine and its packages",
        description="Checks versions, the torch/torchvision pair, GPU, GL rendering and the Hub. Exit code 1 if"
        " something is broken.",
    )
    parser.add_argument("--offline", action="store_true", help="do not try to reach the Hub")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Prints the findings as a table; returns 1 if anything is broken."""
    from rich.console import Console
    from rich.table import Table

    findings = list(examine(offline=args.offline))
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "finding"):
        table.add_column(column, overflow="fold")
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}
    for finding in findings:
        table.add_row(marks[finding.status], finding.subject, finding.text)
    Console(soft_wrap=not sys.stdout.isatty()).print(table)
    return int(any(finding.status == "broken" for finding in findings))


def examine(offline: bool = False) -> Iterator[Finding]:
    """Yields every finding, from the interpreter outwards."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    yield from _packages()
    yield _torchvision()
    yield _gpu()
    yield _kernel()
    yield from _gpu_kernels()
    yield from _rendering()
    yield _lightning_script()
    yield _hub(offline)


def _packages() -> Iterator[Finding]:
    """Compares what is installed with what this package's metadata asks for."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires("ivideogpt") or []]
    except metadata.PackageNotFoundError:
        yield Finding(
            "ivideogpt", "note", "not installed (run from a checkout): `pip install -e .` installs the commands"
        )
        return
    yield Finding("ivideogpt", "ok", metadata.version("ivideogpt"))
    for requirement in requirements:
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if not optional:
                wanted = f"{requirement.name}{requirement.specifier}"
                text = f"missing: `pip install '{wanted}'`"
                yield Finding(requirement.name, "broken", text)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            if not optional:
                yield Finding(requirement.name, "ok", found)
        else:
            text = f"{found} is installed, {requirement.specifier} is asked for"
            yield Finding(requirement.name, "note" if optional else "broken", text)


def _torchvision() -> Finding:
    """Torchvision is compiled against one torch; with another, even `import lightning` fails with a strange message."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    subject = "torch + torchvision"
    try:
        torch_version, vision_version = metadata.version("torch"), metadata.version("torchvision")
        requirements = [Requirement(line) for line in metadata.requires("torchvision") or []]
    except metadata.PackageNotFoundError as error:
        return Finding(subject, "broken", f"{error.name} is missing")
    wanted = next((requirement.specifier for requirement in requirements if requirement.name == "torch"), None)
    advice = "install the pair together: `pip install --upgrade torch torchvision`"
    if wanted is not None and not wanted.contains(Version(torch_version).base_version, prereleases=True):
        return Finding(
            subject,
            "broken",
            f"torchvision {vision_version} is built for torch {wanted}, found {torch_version}; {advice}",
        )
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return Finding(subject, "broken", f"importing torchvision fails ({error}); {advice}")
    return Finding(subject, "ok", f"{torch_version} and {vision_version} belong together")


def _gpu() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("GPU", "broken", f"torch cannot be imported: {error}")
    if not torch.cuda.is_available():
        return Finding("GPU", "note", "none usable by torch: everything runs on the CPU, in float32 or bfloat16")
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    text = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in names)
    return Finding("GPU", "ok", f"{text}, CUDA {torch.version.cuda}")


def _kernel() -> Finding:
    """Builds the CPU kernels, if that was not done yet."""
    subject = "CPU kernel"
    try:
        from ivideogpt.rollout.cpu import why_unavailable
    except ImportError as error:
        return Finding(subject, "broken", f"ivideogpt.rollout cannot be imported: {error}")
    reason = why_unavailable()
    if reason is None:
        return Finding(subject, "ok", "compiled: rollouts and frozen tokenizers on the CPU use it")
    return Finding(subject, "note", f"none ({reason}): rollouts on the CPU are several times slower")


def _gpu_kernels() -> Iterator[Finding]:
    """Compiles and tries one of the kernels of rollouts on each GPU."""
    try:
        import torch

        from ivideogpt.rollout.gpu import no_kernels
    except ImportError:  # said already
        return
    for index in range(torch.cuda.device_count()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reason = no_kernels(torch.device("cuda", index))
        if reason is None:
            yield Finding(f"GPU {index} kernels", "ok", "compiled: rollouts there use them")
        else:
            yield Finding(f"GPU {index} kernels", "note", f"none ({reason}): rollouts there are several times slower")


# Rendered in a process of its own: a GL library that does not work may end the process instead of raising.
_RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='.1'/></worldbody></mujoco>")
renderer = mujoco.Renderer(model, 16, 16)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer.update_scene(data)
assert renderer.render().any()
"""


def _rendering() -> Iterator[Finding]:
    """Tries both headless GL backends; only collecting data in a simulator needs one of them."""
    try:
        metadata.version("mujoco")
    except metadata.PackageNotFoundError:
        yield Finding("simulator", "note", "mujoco is not installed; `ivideogpt data collect` needs `ivideogpt[envs]`")
        return
    libraries = {"egl": ("EGL", "libegl1 libgl1-mesa-dri"), "osmesa": ("OSMesa", "libosmesa6")}
    results = {}
    for backend, (library, packages) in libraries.items():
        if ctypes.util.find_library(library) is None:
            results[backend] = f"lib{library} is missing (Debian: `apt-get install {packages}`)"
            continue
        environment = os.environ | {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
        command = [sys.executable, "-c", _RENDER]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired:
            results[backend] = "rendering takes more than 60 s"
            continue
        if done.returncode == 0:
            results[backend] = ""
        else:
            results[backend] = f"rendering fails: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    working = any(problem == "" for problem in results.values())
    for backend, problem in results.items():
        if problem == "":
            yield Finding(f"GL: {backend}", "ok", f"renders (MUJOCO_GL={backend})")
        else:
            yield Finding(f"GL: {backend}", "note", problem + (" (not needed: the other one works)" if working else ""))


def _lightning_script() -> Finding:
    """Says whose the `lightning` command is: pip lets the last installed script of a name win."""
    path = shutil.which("lightning")
    if path is None:
        return Finding("lightning command", "note", "not on the PATH; `ivideogpt run` does the same")
    try:
        ours = "ivideogpt" in Path(path).read_text(errors="replace")
    except OSError:
        ours = False
    if ours:
        return Finding("lightning command", "ok", f"ours ({path})")
    return Finding("lightning command", "note", f"{path} belongs to another package; `ivideogpt run` runs recipes")


def _hub(offline: bool) -> Finding:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    home = next(folder for folder in [cache, *cache.parents] if folder.exists())
    where = f"cache {cache}, {shutil.disk_usage(home).free / 1e9:.0f} GB free"
    if offline or constants.HF_HUB_OFFLINE:
        return Finding("Hub", "note", f"not tried (offline); {where}")
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5):
            pass
    except HTTPError:
        pass  # any answer at all means that it is reachable
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding("Hub", "note", f"{constants.ENDPOINT} cannot be reached ({reason}); folders still load; {where}")
    return Finding("Hub", "ok", f"{constants.ENDPOINT} answers; {where}")
