"""Finding and sharing world models: zoo names, folders and the Hugging Face Hub.

Talks to the Hub through huggingface_hub's own client, so its settings hold here: ``HF_ENDPOINT``, ``HF_TOKEN``,
``HF_HOME``, ``HF_HUB_OFFLINE`` and the token that ``hf auth login`` stored.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ivideogpt.models.transformer import Transformer
from ivideogpt.zoo.checkpoint import FILES
from ivideogpt.zoo.folder import replacing_files
from ivideogpt.zoo.registry import find_entry, nearest_names


class ModelNotFoundError(OSError, ValueError):
    """A name stands for no world model that can be reached."""


def resolve(
    name: str | os.PathLike[str], revision: str | None = None, fits: Callable[[Transformer], None] | None = None
) -> Path:
    """Folder of the world model that ``name`` stands for; downloaded from the Hub where needed.

    Args:
        name: a zoo name or alias (see :mod:`ivideogpt.zoo.registry`), a folder, or else a Hub id, tried in this order.
            A path object, or a string that starts with ``.``, ``~`` or ``/``, is always a folder.
        revision: branch, tag or commit of the Hub repository.
        fits: raises ValueError where a transformer is not the one that is needed; asked before weights are fetched.

    Raises:
        ModelNotFoundError: with what was looked for, where, and how to give a folder instead.
        ValueError: if a revision is given for something that has none.
    """
    text = os.fspath(name)
    folder = Path(text).expanduser()
    is_path = not isinstance(name, str) or text.startswith((".", "~", "/", os.sep)) or folder.is_absolute()
    entry = None if is_path else find_entry(text)
    if entry is None and (is_path or folder.is_dir()):
        if not folder.is_dir():
            raise ModelNotFoundError(f"no world model at {folder}: there is no such folder (looked from {Path.cwd()})")
        if revision is not None:
            raise ValueError(f"revision {revision!r} was given, but {folder} is a folder on this disk and has none")
        return folder
    if entry is not None and entry.folder is not None:
        if revision is not None:
            raise ValueError(f"revision {revision!r} was given, but {text!r} is inside this package and has none")
        if not entry.folder.is_dir():
            raise ModelNotFoundError(f"{text!r} should be inside this package, but there is no {entry.folder}")
        return entry.folder
    return _download(text, entry.hub_id if entry is not None and entry.hub_id else text, revision, fits)


def copy_to(folder: Path, out: Path) -> Path:
    """Copies the checkpoint in ``folder`` to ``out``, all files as one; files there that are of no checkpoint stay.

    Returns:
        ``out``.

    Raises:
        ValueError: if ``out`` is a file.
        OSError: if something cannot be written; ``out`` is then as it was.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"cannot copy to {out}: it is a file; give a folder")
    names = [name for name in FILES if (folder / name).is_file()]
    with replacing_files(out) as staging:
        for name in names:
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, staging / name)
    for name in FILES:
        if name not in names:
            (out / name).unlink(missing_ok=True)  # of the model that was here before
    return out


def _download(name: str, repo_id: str, revision: str | None, fits: Callable[[Transformer], None] | None = None) -> Path:
    """Snapshot folder of ``repo_id``."""
    from ivideogpt.zoo.remote import IncompleteRepositoryError, RefusedRepositoryError, fetch

    try:
        return fetch(repo_id, revision, fits)
    except IncompleteRepositoryError as error:
        raise ModelNotFoundError(str(error)) from error
    except RefusedRepositoryError:
        raise
    except Exception as error:  # the client's errors come from several libraries, and each release adds some
        repository = f"the Hub repository {repo_id!r}" + (f" at revision {revision!r}" if revision else "")
        if repo_id != name:
            looked_for = f"what this zoo name stands for, {repository}"
        else:
            near = nearest_names(name)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            looked_for = f"a zoo name{hint}, the folder {str(Path(name).absolute())!r}, {repository}"
        raise ModelNotFoundError(
            f"no world model {name!r}. Looked for {looked_for}: {why_not_reached(error, revision)}. To use "
            "files that you have, give the folder that holds tokenizer/ and transformer/: from_pretrained('./FOLDER')"
        ) from error


def why_not_reached(error: Exception, revision: str | None) -> str:
    """What an ``error`` of huggingface_hub means, and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    hub = constants.ENDPOINT
    if isinstance(error, HFValidationError):
        return f"that is no valid id of a repository at {hub} ({_first_line(error)})"
    if isinstance(error, GatedRepoError):
        return (
            f"{hub} asks for consent first: accept the terms on the repository's page and log in with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"{hub} has no such repository, or it is private and you are not logged in (`hf auth login`)"
    if isinstance(error, RevisionNotFoundError):
        return f"{hub} has the repository, but not revision {revision!r}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{hub} does not accept the token that you are logged in with; log in anew with `hf auth login`"
    if status is not None:
        busy = "is asked too often" if status == 429 else "is in trouble"
        return (
            f"{hub} {busy} (status {status}); try again later. The cache at {constants.HF_HUB_CACHE} does not hold it"
        )
    cause = error.__cause__ or error
    return (
        f"{hub} could not be reached ({type(cause).__name__}: {_first_line(cause)}), and the cache at "
        f"{constants.HF_HUB_CACHE} does not hold it"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
