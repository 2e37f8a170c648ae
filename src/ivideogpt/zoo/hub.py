"""Finding and sharing world models: zoo names, folders and the Hugging Face Hub.

Talks to the Hub through huggingface_hub's own client, so its settings hold here: ``HF_ENDPOINT``, ``HF_TOKEN``,
``HF_HOME``, ``HF_HUB_OFFLINE`` and the token that ``hf auth login`` stored.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ivideogpt.zoo.card import variant_card
from ivideogpt.zoo.checkpoint import FILES, GENERATION_CONFIG, RECIPE, Parts, load_parts, save_parts
from ivideogpt.zoo.registry import find_entry, nearest_names
from ivideogpt.zoo.tensors import PICKLE_SUFFIXES, listed

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = ["ModelNotFoundError", "Parts", "load_parts", "push_parts", "resolve", "save_parts"]

CARD = "README.md"


class ModelNotFoundError(OSError, ValueError):
    """A name stands for no world model that can be reached."""


def resolve(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Folder of the world model that ``name`` stands for; downloaded from the Hub where needed.

    Args:
        name: a zoo name or alias (see :mod:`ivideogpt.zoo.registry`), a folder, or else a Hub id, tried in this order.
            A path object, or a string that starts with ``.``, ``~`` or ``/``, is always a folder.
        revision: branch, tag or commit of the Hub repository.

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
    return _download(text, entry.hub_id if entry is not None and entry.hub_id else text, revision)


def push_parts(
    parts: Parts,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    card: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Uploads ``parts`` as one commit: safetensors, configurations, side file, recipe if there is one, model card.

    Args:
        parts: the world model.
        repo_id: ``user/name``; made if it does not exist.
        private: visibility of a repository that is made now; None for the account's default.
        revision: branch, which must exist; the main one if None.
        commit_message: of the commit.
        card: text of the model card. If None one is rendered, unless the repository has one already, which is kept.
        token: as in huggingface_hub; None for the stored one.

    Returns:
        The commit, as huggingface_hub describes it.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="ivideogpt")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if card is None and not api.file_exists(repo_id, CARD, revision=revision):
        card = variant_card(repo_id, parts)
    with tempfile.TemporaryDirectory(prefix="ivideogpt-push-") as name:
        folder = save_parts(name, parts)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload world model",
            allow_patterns=[*FILES, CARD],
            delete_patterns=[RECIPE, GENERATION_CONFIG],  # of an earlier commit, where this one has none
        )


def _download(name: str, repo_id: str, revision: str | None) -> Path:
    """Snapshot folder of ``repo_id``; only files of a checkpoint are fetched, so no code and no pickle ever is."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=[*FILES, CARD], library_name="ivideogpt")
        )
    except Exception as error:  # the client's errors come from several libraries, and each release adds some
        repository = f"the Hub repository {repo_id!r}" + (f" at revision {revision!r}" if revision else "")
        if repo_id != name:
            looked_for = f"what this zoo name stands for, {repository}"
        else:
            near = nearest_names(name)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            looked_for = f"a zoo name{hint}, the folder {str(Path(name).absolute())!r}, {repository}"
        raise ModelNotFoundError(
            f"no world model {name!r}. Looked for {looked_for}: {_why_not_fetched(error, revision)}. To use "
            "files that you have, give the folder that holds tokenizer/ and transformer/: from_pretrained('./FOLDER')"
        ) from error
    if all((folder / file).exists() for file in FILES[:4]):
        return folder
    raise ModelNotFoundError(_why_incomplete(repo_id, revision, folder))


def _why_not_fetched(error: Exception, revision: str | None) -> str:
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
    cause = error.__cause__ or error
    return (
        f"{hub} could not be reached ({type(cause).__name__}: {_first_line(cause)}), and the cache at "
        f"{constants.HF_HUB_CACHE} does not hold it"
    )


def _why_incomplete(repo_id: str, revision: str | None, folder: Path) -> str:
    from huggingface_hub import HfApi, constants

    missing = [file for file in FILES[:4] if not (folder / file).exists()]
    text = f"the repository {repo_id!r} at {constants.ENDPOINT} is no world model: it has no {', '.join(missing)}"
    try:
        there = HfApi(library_name="ivideogpt").list_repo_files(repo_id, revision=revision)
    except Exception:  # it is only to tell more
        return text
    if any(file.endswith(PICKLE_SUFFIXES) for file in there):
        text += "; pickle files, which it has, are never loaded because they can run any code"
    return f"{text}. It holds {listed(there)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
