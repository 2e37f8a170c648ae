"""Builds of the CPU decoder's kernel: once, by whoever is first, and loaded only if they are ours and right."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from ivideogpt.config import TransformerConfig
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.cpu import build, load_kernel, packing, supported, why_unavailable


@pytest.fixture(scope="module", autouse=True)
def _kernel() -> None:
    if load_kernel() is None:
        pytest.skip(f"no compiled kernel: {why_unavailable()}")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and a process that has not loaded the kernel yet."""
    monkeypatch.setattr(build, "_loaded", [])
    monkeypatch.setenv("IVIDEOGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache"


def fake_compiler(folder: Path, body: str) -> str:
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo fake && exit 0\n{body}\n')
    path.chmod(0o755)
    return str(path)


def built(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_one_openmp_runtime() -> None:
    assert len(build.openmp_runtimes()) <= 1


def test_switched_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IVIDEOGPT_KERNEL", "0")
    assert load_kernel() is None
    assert "IVIDEOGPT_KERNEL=0" in str(why_unavailable())
    assert "IVIDEOGPT_KERNEL=0" in str(supported(Transformer(TransformerConfig.preset("nano"))))
    assert not fresh.exists()


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    assert load_kernel() is None
    assert "no C++ compiler found" in str(why_unavailable())


def test_compiler_that_is_not_there(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    assert "'/nowhere/g++', which is no program" in str(why_unavailable())


def test_failing_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "echo 'kernel.cpp:1: no room' >&2; exit 1"))
    assert load_kernel() is None
    assert "kernel.cpp:1: no room" in str(why_unavailable())
    assert built(fresh) == []  # nothing half-made is left


def test_compiler_that_builds_no_library(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, 'for last; do :; done; echo rubbish > "$last"'))
    assert load_kernel() is None
    assert why_unavailable() is not None


def test_wrong_results_are_refused(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = packing.pack

    def pack_wrongly(library: ctypes.CDLL, weight: Tensor, precision: str, out: Tensor) -> packing.Matrix:
        return pack(library, weight.flip(0), precision, out)

    monkeypatch.setattr(packing, "pack", pack_wrongly)
    installed(fresh)
    assert load_kernel() is None
    assert "relative error" in str(why_unavailable())


def _real_folder() -> Path:
    """The folder that the kernel of this process was loaded from."""
    lines = [line.removesuffix(" (deleted)") for line in Path("/proc/self/maps").read_text().splitlines()]
    return Path(next(line for line in lines if line.endswith("/kernel.so")).split(maxsplit=5)[5]).parent


def installed(cache: Path) -> Path:
    """The library of this process, put where it is looked for in another cache."""
    real = _real_folder()
    folder = cache / "kernels" / real.name
    folder.mkdir(parents=True, mode=0o700)
    shutil.copy2(real / "kernel.so", folder / "kernel.so")
    return folder / "kernel.so"


def test_a_built_library_is_found_again(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = installed(fresh)
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    assert isinstance(load_kernel(), ctypes.CDLL)
    assert why_unavailable() is None
    assert load_kernel() is load_kernel()
    assert built(fresh) == [library]


def test_a_broken_library_is_built_again(fresh: Path) -> None:
    library = installed(fresh)
    good = library.stat().st_size
    library.unlink()
    library.write_bytes(b"\x7fELF cut short")
    library.chmod(0o700)
    assert isinstance(load_kernel(), ctypes.CDLL), why_unavailable()
    assert library.stat().st_size == good
    assert built(fresh) == [library]


def test_what_others_can_write_is_refused(fresh: Path) -> None:
    library = installed(fresh)
    library.parent.chmod(0o777)
    assert load_kernel() is None
    assert "can be written by others" in str(why_unavailable())
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o777


def test_a_library_that_others_can_write_is_refused(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = installed(fresh)
    library.chmod(0o666)
    monkeypatch.setattr(build, "_build", lambda *_: None)  # built again, if it could
    assert load_kernel() is None


def test_processes_that_build_at_once(fresh: Path) -> None:
    code = "from ivideogpt.rollout.cpu import build; assert build.load_kernel() is not None, build.why_unavailable()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE) for _ in "ab"]
    for process in running:
        assert process.wait() == 0, process.communicate()[1].decode()
        assert process.stderr is not None
        process.stderr.close()
    assert [path.name for path in built(fresh)] == ["kernel.so"]
