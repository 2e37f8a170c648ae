"""Fetching from a Hub repository: what can be refused is refused before anything large is fetched.

In this order: the list of files with their sizes, the small files, the headers of the weight files, and only when all
of these fit each other the weights. So a repository that lies about its sizes costs neither disk nor memory. The files
themselves are fetched by huggingface_hub, which puts a file into its cache when all of it has arrived.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ivideogpt.models.transformer import Transformer
from ivideogpt.zoo.action_spaces import ACTION_SPACES
from ivideogpt.zoo.adapter import check_reachable, is_adapter, read_config
from ivideogpt.zoo.card import CARD, check_card
from ivideogpt.zoo.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    ADAPTER_LAYERS,
    ADAPTER_WEIGHTS,
    FILES,
    RECIPE,
    TOKENIZER_WEIGHTS,
    TRANSFORMER_WEIGHTS,
    describe,
)
from ivideogpt.zoo.side_file import SIDE_FILE, read_side_file
from ivideogpt.zoo.tensors import LARGEST_HEADER, PICKLE_SUFFIXES, Header, header_length, listed, parse_header

WEIGHTS = (TOKENIZER_WEIGHTS, TRANSFORMER_WEIGHTS)
_LARGEST_ADAPTER = 2**32  # bytes; one of rank 1024 for the medium model has 1.4e9
LARGEST_SMALL_FILE = 2**20  # bytes of a configuration, recipe or card; the published ones have some thousand
LARGEST_ACTION_SPACES = 2**26
_MOST_FILES = 10_000
_LONGEST_WAIT = 60.0  # seconds; a Hub that asks for more patience is told of instead
_BUSY = (429, 500, 502, 503, 504)

Result = TypeVar("Result")


class RefusedRepositoryError(ValueError):
    """A Hub repository holds what cannot be a world model, or what this package never loads; nothing was loaded."""


class IncompleteRepositoryError(RefusedRepositoryError):
    """A Hub repository lacks files of a world model."""


def fetch(repo_id: str, revision: str | None = None, fits: Callable[[Transformer], None] | None = None) -> Path:
    """Snapshot folder of the world model ``repo_id``; only files of a checkpoint are fetched, never code or a pickle.

    What was fetched before is found without a network.

    Args:
        repo_id: of the repository.
        revision: branch, tag or commit.
        fits: raises ValueError where the model's transformer, which has no weights yet, is not the one that is needed.

    Raises:
        RefusedRepositoryError: if it is no world model, does not fit, or the disk has no room for it, naming what is
            wrong.
        Exception: huggingface_hub's own, where the Hub does not give it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    def snapshot(files: tuple[str, ...], at: str | None, **options: Any) -> Path:
        # a glob would match as well, but each of these is a name without wildcards
        return Path(
            snapshot_download(repo_id, revision=at, allow_patterns=[*files], library_name="ivideogpt", **options)
        )

    try:
        sizes = patiently(lambda: _listing(repo_id, revision))
    except (RefusedRepositoryError, RevisionNotFoundError):
        raise
    except Exception as error:  # of several libraries; what is in the cache does not need the Hub
        try:
            folder = snapshot((*FILES, CARD), revision, local_files_only=True)
        except Exception:
            raise error from None
        if is_adapter(folder) or all((folder / file).is_file() for file in FILES[:4]):
            return folder
        raise
    _check_names(repo_id, sizes)
    if ADAPTER_CONFIG in sizes:
        return _fetch_adapter(repo_id, revision, sizes, snapshot)
    missing = [file for file in FILES[:4] if file not in sizes]
    if missing:
        raise IncompleteRepositoryError(_why_incomplete(repo_id, missing, list(sizes)))
    small = tuple(file for file in (*FILES, CARD) if file not in (*WEIGHTS, *ADAPTER_FILES))
    folder = _fetch_small(repo_id, revision, small, sizes, snapshot)
    if not all((folder / file).is_file() for file in WEIGHTS):
        headers = {file: _remote_header(repo_id, file, folder.name, sizes[file], folder / file) for file in WEIGHTS}
        described = _refusing(repo_id, lambda: describe(folder, headers))
        if fits is not None:
            try:
                fits(described.transformer)
            except ValueError as error:
                raise RefusedRepositoryError(str(error)) from error
        _check_room(repo_id, sum(sizes[file] for file in WEIGHTS))
    patiently(lambda: snapshot(WEIGHTS, folder.name), tries=2)
    return folder


def _fetch_small(
    repo_id: str,
    revision: str | None,
    small: tuple[str, ...],
    sizes: Mapping[str, int],
    snapshot: Callable[..., Path],
) -> Path:
    """Snapshot folder with the small files of a repository, whose card is checked."""
    for file in small:
        _check_small(repo_id, file, sizes)
    folder: Path = patiently(lambda: snapshot(small, revision), tries=2)  # it has patience of its own
    if (folder / CARD).is_file():
        _refusing(repo_id, lambda: check_card((folder / CARD).read_text(encoding="utf-8", errors="replace"), CARD))
    return folder


def _fetch_adapter(repo_id: str, revision: str | None, sizes: Mapping[str, int], snapshot: Callable[..., Path]) -> Path:
    """Snapshot folder of a LoRA adapter; its base is fetched when it is loaded, and compared with it then."""
    weights = tuple(file for file in (ADAPTER_WEIGHTS, ADAPTER_LAYERS) if file in sizes)
    missing = [file for file in (SIDE_FILE, ADAPTER_WEIGHTS) if file not in sizes]
    if missing:
        raise IncompleteRepositoryError(_why_incomplete(repo_id, missing, list(sizes)))
    small = (ADAPTER_CONFIG, SIDE_FILE, RECIPE, CARD)
    folder = _fetch_small(repo_id, revision, small, sizes, snapshot)
    _refusing(repo_id, lambda: read_config(folder / ADAPTER_CONFIG))
    base = _refusing(repo_id, lambda: read_side_file(folder)).get("adapter_base")
    _refusing(repo_id, lambda: check_reachable(base))
    if not all((folder / file).is_file() for file in weights):
        for file in weights:
            if sizes[file] > _LARGEST_ADAPTER:
                raise RefusedRepositoryError(f"{file} of the Hub repository {repo_id!r} has {sizes[file]:,} bytes")
            _remote_header(repo_id, file, folder.name, sizes[file], folder / file)
        _check_room(repo_id, sum(sizes[file] for file in weights))
    patiently(lambda: snapshot(weights, folder.name), tries=2)
    return folder


def fetch_recipe(repo_id: str, revision: str | None = None) -> Path:
    """File of the recipe that rides with the weights of ``repo_id``; nothing else is fetched.

    Raises:
        RefusedRepositoryError: if there is none, or it cannot be one.
        Exception: huggingface_hub's own, where the Hub does not give it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RevisionNotFoundError

    def download(**options: Any) -> Path:
        return Path(hf_hub_download(repo_id, RECIPE, revision=revision, library_name="ivideogpt", **options))

    try:
        sizes = patiently(lambda: _listing(repo_id, revision))
    except (RefusedRepositoryError, RevisionNotFoundError):
        raise
    except Exception as error:
        try:
            return download(local_files_only=True)
        except Exception:
            raise error from None
    _check_names(repo_id, sizes)
    if RECIPE not in sizes:
        raise IncompleteRepositoryError(
            f"the Hub repository {repo_id!r} has no {RECIPE}. It holds {listed(list(sizes))}"
        )
    _check_small(repo_id, RECIPE, sizes)
    return patiently(download)


def patiently(call: Callable[[], Result], tries: int = 4) -> Result:
    """``call()``, again where the Hub was busy or the connection broke; huggingface_hub does so for some calls only.

    Raises:
        Exception: of the last call.
    """
    for wait in (*(2.0**number for number in range(tries - 1)), None):
        try:
            return call()
        except Exception as error:
            asked = _asked_to_wait(error)
            if wait is None or asked is None or asked > _LONGEST_WAIT:
                raise
            time.sleep(max(wait, asked))
    raise AssertionError("the last try returns or raises")


def _asked_to_wait(error: BaseException | None) -> float | None:
    """Seconds after which the call may work, None where another try is of no use."""
    seen = 0
    while error is not None and seen < 10:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status is not None:
            if status not in _BUSY:
                return None
            after = response.headers.get("Retry-After", "") if response is not None else ""
            return float(after) if after.isdigit() else 0.0
        if type(error).__name__ in ("ReadError", "WriteError", "RemoteProtocolError", "ReadTimeout"):
            return 0.0
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None


def _listing(repo_id: str, revision: str | None) -> dict[str, int]:
    """Sizes in bytes of all files of a repository."""
    from huggingface_hub import HfApi

    # fails at once where there is no network; listing the tree would wait for it
    info = HfApi(library_name="ivideogpt").model_info(repo_id, revision=revision, files_metadata=True)
    siblings = info.siblings or []
    if len(siblings) > _MOST_FILES:
        raise RefusedRepositoryError(f"the Hub repository {repo_id!r} has {len(siblings)} files, which is too many")
    return {item.rfilename: (item.lfs.size if item.lfs else item.size) or 0 for item in siblings}


def _check_names(repo_id: str, sizes: Mapping[str, int]) -> None:
    for name in sizes:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in parts:
            raise RefusedRepositoryError(
                f"the Hub repository {repo_id!r} lists {name!r}, a path that leads out of its folder; it was refused"
            )


def _check_small(repo_id: str, file: str, sizes: Mapping[str, int]) -> None:
    largest = LARGEST_ACTION_SPACES if file == ACTION_SPACES else LARGEST_SMALL_FILE
    if sizes.get(file, 0) > largest:
        raise RefusedRepositoryError(
            f"{file} of the Hub repository {repo_id!r} has {sizes[file]:,} bytes, which no such file needs (at most "
            f"{largest:,}); it was not fetched"
        )


def _remote_header(repo_id: str, file: str, revision: str, size: int, path: Path) -> Header:
    """Header of a weight file on the Hub, of which only the first bytes are fetched."""
    length = _refusing(repo_id, lambda: header_length(_first_bytes(repo_id, file, revision, 8), size, file))
    start = _first_bytes(repo_id, file, revision, 8 + length)
    return _refusing(repo_id, lambda: parse_header(start, size, path))


def _first_bytes(repo_id: str, file: str, revision: str, count: int) -> bytes:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    assert count <= LARGEST_HEADER + 8
    headers = build_hf_headers(library_name="ivideogpt") | {"Range": f"bytes=0-{count - 1}"}

    def get() -> bytes:
        data = b""
        url = hf_hub_url(repo_id, file, revision=revision)
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            for chunk in response.iter_bytes():  # a server that knows no ranges would send all of it
                data += chunk
                if len(data) >= count:
                    break
        return data[:count]

    return patiently(get)


def _refusing(repo_id: str, check: Callable[[], Result]) -> Result:
    try:
        return check()
    except ValueError as error:
        raise RefusedRepositoryError(f"the Hub repository {repo_id!r} was refused: {error}") from error


def _check_room(repo_id: str, size: int) -> None:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size > free:
        raise RefusedRepositoryError(
            f"weights of {repo_id!r} have {size:,} bytes, and the disk of the cache {folder} has room for {free:,}: "
            "make room, or set HF_HOME to a folder of another disk"
        )


def _why_incomplete(repo_id: str, missing: list[str], there: list[str]) -> str:
    from huggingface_hub import constants

    text = f"the repository {repo_id!r} at {constants.ENDPOINT} is no world model: it has no {', '.join(missing)}"
    if any(file.endswith(PICKLE_SUFFIXES) for file in there):
        text += "; pickle files, which it has, are never loaded because they can run any code"
    return f"{text}. It holds {listed(there)}"
