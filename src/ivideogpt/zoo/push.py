"""Publishing a world model on the Hub: what goes there, made ready in a folder, and its upload as one commit.

Only files that this package writes itself go there: the checkpoint, saved anew, its resolved recipe, the results, an
animation and the card. So neither a training checkpoint nor a log can be among them, whatever lies in the folder that
the model came from; texts are checked for paths of this machine and for secrets.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ivideogpt.metrics.evaluation import weights_hash
from ivideogpt.metrics.results import read_results
from ivideogpt.zoo.adapter import save_for_hub
from ivideogpt.zoo.card import CARD, MARKER, ROLLOUT, check_card, variant_card
from ivideogpt.zoo.card_results import read_card_results
from ivideogpt.zoo.checkpoint import FILES, RECIPE, Parts
from ivideogpt.zoo.privacy import check_nothing_private, without_paths_in
from ivideogpt.zoo.published import read_json
from ivideogpt.zoo.remote import patiently

RESULTS = "results"
_LARGEST_ROLLOUT = 10 * 2**20  # bytes; a card with a larger one is slow to read
_OWN = re.compile("|".join(re.escape(name) for name in (*FILES, ROLLOUT)) + rf"|{RESULTS}/[^/]+\.json")
"""Files of a repository that a later push may remove."""


class PushError(OSError):
    """The Hub did not take all of a push; the repository is whole. The same push goes on from where it stopped."""


@dataclass(frozen=True)
class Evidence:
    """What a model is published with beside its weights.

    Attributes:
        results: results files of ``ivideogpt evaluate``, by the name that each gets (without ``.json``).
        rollout: an animation, a GIF.
        data: what the model was trained on, each with ``name`` and ``licence``.
        datasets: Hub ids of data sets.
        compute: what the training took.
        licence: of the weights, an SPDX identifier; that of the base model if None.
    """

    results: Mapping[str, Path] = field(default_factory=dict)
    rollout: Path | None = None
    data: Sequence[dict[str, str]] = ()
    datasets: Sequence[str] = ()
    compute: str = "not recorded"
    licence: str | None = None


@dataclass(frozen=True)
class Publication:
    """What a push did, or would do.

    Attributes:
        repo_id: on the Hub.
        files: bytes of each file, by its path in the repository.
        url: of the commit; None for a dry run.
        commit: its hash; None for a dry run.
        changed: whether a commit was made; False where the repository held all of it already.
    """

    repo_id: str
    files: dict[str, int]
    url: str | None = None
    commit: str | None = None
    changed: bool = False


def push_parts(
    parts: Parts,
    repo_id: str,
    *,
    evidence: Evidence | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    card: str | None = None,
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Publication:
    """Uploads ``parts`` as one commit; a push of what is there already does nothing, an interrupted one goes on.

    Args:
        parts: the world model; where it was loaded from an adapter, the adapter alone goes there.
        repo_id: ``user/name``; made if it does not exist.
        evidence: what is published beside the weights.
        private: visibility of a repository that is made now; None for the account's default.
        revision: branch, made from the main one if it does not exist; the main one if None.
        tag: name for the commit.
        commit_message: of the commit.
        card: text of the model card. If None one is rendered, unless the repository has one that was written by hand,
            which is kept.
        token: as in huggingface_hub; None for the stored one.
        dry_run: make everything ready and upload nothing; the Hub is not asked.

    Raises:
        ValueError: if something may not be published, naming it, or an argument does not fit.
        PushError: if the Hub does not take it, saying why.
    """
    from huggingface_hub.utils import validate_repo_id

    if repo_id.count("/") != 1:
        raise ValueError(f"a repository is USER/NAME, got {repo_id!r}")
    validate_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="ivideogpt-push-") as name:
        folder = Path(name)
        prepare(folder, parts, repo_id, evidence or Evidence(), card, token)
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        if dry_run:
            return Publication(repo_id, files)
        with _explained(repo_id):
            return _upload(folder, files, repo_id, private, revision, tag, commit_message, card is not None, token)


def parts_hash(parts: Parts) -> str:
    """Hash of a world model's weights and settings, as its results have it."""
    transform = parts.reward_head.config.transform if parts.reward_head else None
    return weights_hash(_state(parts), parts.extras, transform)


def _state(parts: Parts) -> dict[str, torch.Tensor]:
    modules = {"tokenizer": parts.tokenizer, "transformer": parts.transformer, "reward_head": parts.reward_head}
    return {f"{name}.{key}": t for name, m in modules.items() if m is not None for key, t in m.state_dict().items()}


def check_results(path: Path, parts: Parts) -> None:
    """Refuses results that are not of these weights, or whose sums are not those of their videos.

    Raises:
        ValueError: saying which.
    """
    measured = read_results(path)["hashes"].get("model")
    if measured != parts_hash(parts):
        raise ValueError(
            f"{path} is of other weights than these (SHA-256 {str(measured)[:12]}...): measure this model, in float32, "
            "with `ivideogpt evaluate`"
        )


def prepare(
    folder: Path,
    parts: Parts,
    repo_id: str,
    evidence: Evidence,
    card: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Writes to the empty ``folder`` all that goes to ``repo_id``; the same model gives the same bytes.

    Raises:
        ValueError: if something may not be published, naming it.
    """
    for name, weight in _state(parts).items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"{name} holds NaN or infinite weights: nobody could use this model, publish an earlier one"
            )
    given, parts = parts, _public(parts)
    save_for_hub(folder, parts)
    results = []
    for name, source in sorted(evidence.results.items()):
        target = folder / RESULTS / f"{name}.json"
        target.parent.mkdir(exist_ok=True)
        text = json.dumps(without_paths_in(read_json(source)), indent=2, ensure_ascii=False)
        target.write_text(text + "\n", encoding="utf-8")
        results.append(read_card_results(target))
        check_results(source, given)
    rollout = None
    if evidence.rollout is not None:
        _copy_rollout(evidence.rollout, folder / ROLLOUT)
        rollout = {"file": ROLLOUT, "what": "recordings, what the model imagines of them, and the error"}
    if card is None:
        card = variant_card(
            repo_id,
            parts,
            results,
            data=without_paths_in(list(evidence.data)),
            datasets=evidence.datasets,
            rollout=rollout,
            compute=evidence.compute,
            licence=evidence.licence,
        )
    check_card(card, "the card")
    (folder / CARD).write_text(card, encoding="utf-8")
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".yaml", ".md"):
            where = path.relative_to(folder).as_posix()
            check_nothing_private(path.read_text(encoding="utf-8"), where, [token] if isinstance(token, str) else [])


def _public(parts: Parts) -> Parts:
    """``parts`` whose texts tell nothing of the machine that they were trained on."""
    old = parts.published
    cleaned = {
        name: without_paths_in(getattr(old, name))
        for name in ("tokenizer_fields", "transformer_fields", "generation_config")
    }
    published = replace(old, **cleaned, recipe=None if old.recipe is None else public_recipe(old.recipe))
    return replace(parts, extras=without_paths_in(parts.extras), published=published)


def public_recipe(text: str) -> str:
    """A resolved recipe without the paths of this machine, and without where it was run and published.

    Raises:
        ValueError: if it is no recipe.
    """
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{RECIPE} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{RECIPE} is no recipe: it holds {type(recipe).__name__}")
    public = without_paths_in({key: v for key, v in recipe.items() if key not in ("output", "on_change", "publish")})
    if public == recipe:
        return text
    return yaml.safe_dump(public, sort_keys=False, allow_unicode=True, width=110)


def _copy_rollout(source: Path, target: Path) -> None:
    with open(source, "rb") as file:
        start = file.read(6)
    if start not in (b"GIF87a", b"GIF89a"):
        raise ValueError(f"{source} is no GIF; a card shows one, as `ivideogpt predict --output out.gif` makes it")
    if source.stat().st_size > _LARGEST_ROLLOUT:
        raise ValueError(
            f"{source} has {source.stat().st_size:,} bytes; a card's animation has {_LARGEST_ROLLOUT:,} at most"
        )
    shutil.copyfile(source, target)


def _upload(
    folder: Path,
    files: dict[str, int],
    repo_id: str,
    private: bool | None,
    revision: str | None,
    tag: str | None,
    message: str | None,
    own_card: bool,
    token: str | bool | None,
) -> Publication:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

    api = HfApi(token=token, library_name="ivideogpt")
    patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if private and not patiently(lambda: api.model_info(repo_id)).private:
        raise ValueError(f"{repo_id} exists and is public; make it private on the Hub first, or push to another name")
    if revision is not None:
        patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    before = patiently(lambda: api.model_info(repo_id, revision=revision)).sha
    if tag is not None:
        _check_tag(api, repo_id, tag, before)
    there = set(patiently(lambda: api.list_repo_files(repo_id, revision=before)))
    keep_card = not own_card and CARD in there and not _is_rendered(api, repo_id, before)
    if not keep_card:
        patiently(ModelCard(folder.joinpath(CARD).read_text(encoding="utf-8")).validate)  # asks the Hub
    additions = [CommitOperationAdd(name, folder / name) for name in files if not (keep_card and name == CARD)]
    # of an earlier push, where this one has none
    deletions = [CommitOperationDelete(name) for name in sorted(there - files.keys()) if _OWN.fullmatch(name)]
    # large files first: those that have arrived are not sent again by the next push
    api.preupload_lfs_files(repo_id, additions, revision=revision)
    # one commit, where upload_folder may make several: nobody ever finds a half of it
    commit = patiently(
        lambda: api.create_commit(
            repo_id,
            [*additions, *deletions],
            commit_message=message or "Upload world model",
            revision=revision,
            parent_commit=before,
        )
    )
    if tag is not None:
        patiently(lambda: _tag(api, repo_id, tag, commit.oid))
    return Publication(repo_id, files, commit.commit_url, commit.oid, changed=commit.oid != before)


def _is_rendered(api: Any, repo_id: str, revision: str | None) -> bool:
    path = patiently(lambda: api.hf_hub_download(repo_id, CARD, revision=revision))
    return MARKER in Path(path).read_text(encoding="utf-8", errors="replace")


def _check_tag(api: Any, repo_id: str, tag: str, head: str | None) -> None:
    at = _tags(api, repo_id).get(tag)
    if at is not None and at != head:
        raise ValueError(f"the tag {tag!r} of {repo_id} is an earlier commit, {at[:10]}; choose another name")


def _tag(api: Any, repo_id: str, tag: str, commit: str) -> None:
    at = _tags(api, repo_id).get(tag)
    if at is None:
        api.create_tag(repo_id, tag=tag, revision=commit)
    elif at != commit:
        raise ValueError(
            f"{repo_id} was uploaded as {commit[:10]}, but the tag {tag!r} is an earlier commit, {at[:10]}, and stays "
            "there; push again with another name"
        )


def _tags(api: Any, repo_id: str) -> dict[str, str]:
    return {item.name: item.target_commit for item in patiently(lambda: api.list_repo_refs(repo_id)).tags}


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turns what the client raises into one sentence that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    whole = "the repository is whole, as it was before or as this push makes it"
    again = f"{whole}; the same command goes on from where it stopped"
    try:
        yield
    except Exception as error:  # of the client and of the libraries below it
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise
        answer = _answer(error)
        if answer is None and isinstance(error, LocalTokenNotFoundError):
            raise PushError("you are not logged in; log in with `hf auth login`, or set HF_TOKEN") from error
        if answer is None:
            broken = error.__cause__ or error
            raise PushError(
                f"the connection to {constants.ENDPOINT} broke while {repo_id} was uploaded ({type(broken).__name__}: "
                f"{' '.join(str(broken).split())}); {again}"
            ) from error
        status = answer.response.status_code
        said = " ".join((answer.server_message or "").split()) or "it gave no reason"
        reasons = {
            401: "it does not know who you are: log in with `hf auth login`, or set HF_TOKEN to a token that is valid",
            403: "your token may not write there: use one with the right to write, and a name of your own",
            404: "there is no such repository, or your token may not see it",
            412: f"the repository changed meanwhile, by somebody else or by this push, whose answer was lost; {again}",
            413: "it is too large for your account",
            429: f"you have asked it too often; wait some minutes. {again[0].upper()}{again[1:]}",
        }
        reason = reasons.get(status, again)
        raise PushError(f"{constants.ENDPOINT} did not take {repo_id}: {reason} (status {status}: {said})") from error


def _answer(error: BaseException | None) -> Any:
    """The client's error about an answer of the Hub, in ``error`` or behind it; None if it was no answer."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__ or error.__context__
    return error
