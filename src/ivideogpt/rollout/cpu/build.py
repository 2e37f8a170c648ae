"""Compiles and loads the CPU kernels: once a machine, source and compiler, into a cache that only we can write to.

The kernel is a plain C interface without torch's headers, so it compiles in seconds and outlives versions of torch.
Where there is no compiler, or anything is wrong with what it built, :func:`load_kernel` gives None and
:func:`why_unavailable` the reason: all then runs in torch.

Environment: ``$CXX`` names the compiler; ``$IVIDEOGPT_CACHE`` the folder for compiled kernels, by default
``~/.cache/ivideogpt``; ``IVIDEOGPT_KERNEL=0`` switches the kernel off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from ivideogpt.rollout.cpu import packing

_SOURCES = (
    "kernel.cpp",
    "winograd.cpp",
    "fixed.cpp",
    "attention.h",
    "draw.h",
    "gemm.h",
    "model.h",
    "pack.h",
    "threads.h",
)
_COMPILERS = ("c++", "g++", "clang++")
_BUILD_SECONDS = 300
# Contraction to fused multiply-adds is wanted. NaN and infinity keep their meaning: no -ffast-math.
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno",
    "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-w",
)  # fmt: skip

_lock = threading.Lock()
_loaded: list[ctypes.CDLL | str] = []
"""The library, or why there is none; empty before the first call."""


class KernelUnavailableError(Exception):
    """Why the kernel can't be had."""


def load_kernel() -> ctypes.CDLL | None:
    """The kernel's library, built at the first call on a machine; None where it can't be had."""
    with _lock:
        if not _loaded:
            try:
                _loaded.append(_load())
            except (KernelUnavailableError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                _loaded.append(str(error))
        return None if isinstance(_loaded[0], str) else _loaded[0]


def why_unavailable() -> str | None:
    """Why :func:`load_kernel` gives None; None where it gives a library."""
    load_kernel()
    return _loaded[0] if isinstance(_loaded[0], str) else None


def _load() -> ctypes.CDLL:
    if os.environ.get("IVIDEOGPT_KERNEL") == "0":
        raise KernelUnavailableError("the compiled CPU kernel is switched off by IVIDEOGPT_KERNEL=0")
    if os.name != "posix" or not hasattr(os, "getuid"):
        raise KernelUnavailableError(f"the compiled CPU kernel is written for Linux, this is {platform.system()}")
    reasons = []
    for compiler in _compilers():
        try:
            return _load_with(compiler)
        except (KernelUnavailableError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            reasons.append(f"{shlex.join(compiler)}: {error}")
    raise KernelUnavailableError("; ".join(reasons) or "no C++ compiler found: install g++, or name one in $CXX")


def _compilers() -> list[list[str]]:
    """Command lines of the compilers that are there; ``$CXX`` alone where it is set."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise KernelUnavailableError(f"$CXX names {command[0]!r}, which is no program")
        return [command]
    found = {os.path.realpath(path): [name] for name in _COMPILERS if (path := shutil.which(name))}
    return list(found.values())


def _load_with(compiler: list[str]) -> ctypes.CDLL:
    sources = {name: (Path(__file__).parent / name).read_bytes() for name in _SOURCES}
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=60, check=True).stdout
    runtime = openmp_runtimes()[:1]
    machine = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    flags = [*_FLAGS, machine]
    digest = hashlib.sha256()
    for part in (*sources.values(), version, *(text.encode() for text in (*compiler, *flags, *runtime, _cpu()))):
        digest.update(len(part).to_bytes(8, "little") + part)
    folder = _private_folder(digest.hexdigest()[:24])
    library = folder / "kernel.so"
    if library.exists():
        try:
            return _open(library)
        except (KernelUnavailableError, OSError):  # cut short by a full disk, say: built again, once
            library.unlink(missing_ok=True)
    _build([*compiler, *flags], runtime, folder, library)
    return _open(library)


def openmp_runtimes() -> list[str]:
    """Files of the OpenMP runtimes in this process, torch's own first.

    The kernel is linked to the one that torch uses: two runtimes would keep two sets of threads on the same cores.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    files = {line.split(maxsplit=5)[5] for line in lines if "/" in line and "r-xp" in line}
    runtimes = [file for file in files if os.path.basename(file).startswith(("libgomp", "libiomp5", "libomp"))]
    home = os.path.dirname(torch.__file__)
    return sorted(runtimes, key=lambda file: (not file.startswith(home), file))


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keys = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(keys)}))


def _private_folder(name: str) -> Path:
    """The cache's folder ``name``, which nobody else can write to.

    Raises:
        KernelUnavailableError: if others can: what they put there would run in this process.
    """
    root = os.environ.get("IVIDEOGPT_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "ivideogpt") / "kernels" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder)
    return folder


def _check_private(path: Path) -> None:
    status = path.lstat()
    if status.st_uid not in (os.getuid(), 0):
        raise KernelUnavailableError(f"{path} belongs to another user: set IVIDEOGPT_CACHE to a folder of your own")
    if stat.S_ISLNK(status.st_mode) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KernelUnavailableError(f"{path} is a link or can be written by others: remove it, or chmod go-w")


def _build(command: list[str], runtime: list[str], folder: Path, library: Path) -> None:
    """Compiles to a temporary folder and moves the library into place, so that no other process sees half of one."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        products = []
        for source in (name for name in _SOURCES if name.endswith(".cpp")):
            products.append(os.path.join(scratch, f"{source}.o"))
            _run([*command, "-c", str(Path(__file__).parent / source), "-o", products[-1]])
        linked = os.path.join(scratch, "kernel.so")
        openmp = runtime or ["-fopenmp"]
        linker = [flag for flag in command if flag != "-fopenmp"]  # which would add the compiler's own runtime
        _run([*linker, "-shared", "-Wl,-z,defs", *products, *openmp, "-o", linked])
        os.chmod(linked, 0o700)
        os.replace(linked, library)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS, errors="replace")
    if result.returncode:
        raise KernelUnavailableError(f"the compiler failed: {(result.stderr or result.stdout).strip()[-500:]}")


def _open(path: Path) -> ctypes.CDLL:
    """Loads a built library and has it compute something known.

    Raises:
        KernelUnavailableError: if others can write the file, or if the result is wrong.
        OSError: if it is no library.
    """
    _check_private(path)
    before = openmp_runtimes()
    library = ctypes.CDLL(str(path))
    if before and openmp_runtimes() != before:
        raise KernelUnavailableError("the kernel was linked to another OpenMP runtime than torch's")
    library.ivideogpt_forward.argtypes = [
        c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int32
    ]  # fmt: skip
    library.ivideogpt_product.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32]
    library.ivideogpt_large_pages.argtypes = [c_void_p, c_int64]
    library.ivideogpt_pack.argtypes = [c_void_p, c_void_p, c_int32]
    library.ivideogpt_pack.restype = library.ivideogpt_product.restype = library.ivideogpt_large_pages.restype = None
    for precision in packing.TYPES:
        if precision != "float16" or library.ivideogpt_has_float16():
            _check_product(library, precision)
    return library


def _check_product(library: ctypes.CDLL, precision: str) -> None:
    rows, inputs, outputs = 3, 160, 70
    generator = torch.Generator("cpu").manual_seed(0)
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    weight = torch.randn(outputs, inputs, generator=generator, **kind)
    x = torch.randn(rows, inputs, generator=generator, **kind)
    packed = torch.empty(packing.packed_bytes(outputs, inputs, precision), dtype=torch.uint8, device="cpu")
    matrix = packing.pack(library, weight, precision, packed)
    out = torch.full((rows, outputs), float("nan"), **kind)
    library.ivideogpt_product(
        ctypes.byref(matrix), x.data_ptr(), rows, 0, outputs - 1, out.data_ptr(), torch.get_num_threads()
    )
    error = float((out - x @ weight.T).norm() / out.norm())
    limit = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2, "int8": 2e-2}[precision]
    if not error < limit:  # NaN is wrong too
        raise KernelUnavailableError(f"the kernel computes a {precision} product with a relative error of {error:.2g}")
