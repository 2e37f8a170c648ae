"""Writing several files of a folder as one: a reader finds all of the old ones or all of the new ones.

The files are written into a staging folder inside the target and synced to the disk; then one rename turns the staging
folder into the *saved* folder, which is the moment at which the save has happened; then its files move over the old
ones. What dies before that moment (a full disk, a kill) leaves the old files untouched; what dies after it leaves a
saved folder, and the next reader or writer finishes the move.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

_SAVED = ".ivideogpt-saved"
_STAGING = ".ivideogpt-saving"


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Gives an empty folder; what is in it when the block ends without an error replaces the same files of ``folder``.

    Other files of ``folder`` stay. ``folder`` is made if it does not exist.

    Raises:
        OSError: if something cannot be written; ``folder`` is then as it was.
    """
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    finish_interrupted_save(folder)
    _remove_abandoned(folder)
    staging = Path(tempfile.mkdtemp(prefix=f"{_STAGING}-{socket.gethostname()}-{os.getpid()}-", dir=folder))
    try:
        yield staging
        for path in sorted(staging.rglob("*"), reverse=True):
            _sync(path)
        _sync(staging)
        os.rename(staging, folder / _SAVED)
        _sync(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):  # another process may have written there meanwhile
                folder.rmdir()
        raise
    finish_interrupted_save(folder)


def finish_interrupted_save(folder: Path) -> None:
    """Moves the files of a save that was complete when its process died; does nothing where there is none.

    Raises:
        OSError: if ``folder`` cannot be written.
    """
    saved = folder / _SAVED
    if not saved.is_dir():
        return
    try:
        for path in sorted(path for path in saved.rglob("*") if path.is_file()):
            target = folder / path.relative_to(saved)
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process that loads the model has just moved it
                os.replace(path, target)
            _sync(target.parent)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(saved)
    except OSError as error:
        raise OSError(
            f"{folder} holds a save that was interrupted ({saved.name}), and it cannot be finished: {error}; copy the "
            f"files of {saved.name} over those beside it"
        ) from error


def _remove_abandoned(folder: Path) -> None:
    """Removes staging folders of processes of this machine that are dead."""
    for path in folder.glob(f"{_STAGING}-*"):
        host, _, pid = path.name.removeprefix(f"{_STAGING}-").rpartition("-")[0].rpartition("-")
        if host == socket.gethostname() and pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(path: Path) -> None:
    """Has the disk hold what was written to the file or folder ``path``, where the system can promise that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return  # Windows opens no folders
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
