"""What must not leave this machine with a model: paths of its disk, and secrets.

Paths are cut down to their last part, because a recipe or a result is of use without the rest. A secret is not taken
out silently: whoever wrote it into a file should know that it was nearly published.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

_START = r"(?:file://)?(?:~[\w.-]*/|/(?=[\w.~-]+/)|/(?=(?:home|root|tmp|mnt|data|scratch|Users)\b)|[A-Za-z]:[\\/]|\\\\[\w.-]+\\)"
# /home/me/data, ~/data, ~me/data, C:\data, \\host\data, file:///data; not a//b, http://host/path, </b> or 3/4
_PATH = re.compile(rf"(?<![\w.~/\\:<-]){_START}[^\s'\"`,;:|<>()\[\]{{}}=]*")
_QUOTED = re.compile(rf"(?<=['\"]){_START}[^'\"\n]*(?=['\"])")  # with blanks in it, perhaps
_WHOLE = re.compile(rf"{_START}[^:=\n]*")
_HOME = re.compile(r"(?:file://)?(?:/home/|/Users/|[A-Za-z]:[\\/]Users[\\/])[^\\/]+")
_CLIMBING = re.compile(r"(?<![\w./\\-])(?:\.\.[\\/])+")
_SECRETS = (
    ("a Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{8,}|\bapi_org_[A-Za-z0-9]{8,}")),
    ("a GitHub token", re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}")),
    ("an AWS key", re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    ("an API key", re.compile(r"\bsk-[A-Za-z0-9_-]{20,}")),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
    ("a password in a URL", re.compile(r"\w://[^\s/:@]+:[^\s/@]+@")),
    (
        "a password or key",
        re.compile(
            r"\b(?:api_?key|password|passwd|secret|(?:access|auth|api)_?token)['\"]?\s*[:=]\s*['\"]?[^\s'\",{}\[\]]{6,}",
            re.I,
        ),
    ),
)


def without_paths(text: str) -> str:
    """``text`` with every path of a disk cut down to its last part, and without climbing out of a folder."""
    return _CLIMBING.sub("", _PATH.sub(_last_part, _QUOTED.sub(_last_part, text)))


def _last_part(found: re.Match[str]) -> str:
    path = found.group().rstrip("\\/")
    if _HOME.fullmatch(path):  # whose last part is somebody's name
        return "home"
    return re.split(r"[\\/]", path)[-1] or "."


def without_paths_in(value: Any) -> Any:
    """Plain data (of JSON or YAML) with :func:`without_paths` done to each text, keys included."""
    if isinstance(value, str):
        whole = _WHOLE.fullmatch(value)
        if whole:
            return _last_part(whole)
        return without_paths(value)
    if isinstance(value, dict):
        return {without_paths_in(key): without_paths_in(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths_in(item) for item in value]
    return value


def check_nothing_private(text: str, where: object, secrets: Sequence[str] = ()) -> None:
    """Refuses a text that holds a path of a disk or a secret.

    Args:
        text: what would be published.
        where: what to call it in an error.
        secrets: texts that are known to be secret.

    Raises:
        ValueError: naming the file and the kind of what was found, never a secret itself.
    """
    for kind, pattern in _SECRETS:
        found = pattern.search(text)
        if found:
            line = text.count("\n", 0, found.start()) + 1
            raise ValueError(f"{where}, line {line}, holds {kind}; take it out (and replace it, where others saw it)")
    for what, secret in (*((_TOKEN, secret) for secret in secrets), *_known_secrets()):
        if len(secret) >= 8 and secret in text:
            raise ValueError(f"{where} holds {what}; take it out")
    paths = [found.group() for found in _PATH.finditer(text)]
    if paths:
        raise ValueError(f"{where} holds a path of this machine, {paths[0]!r}; take it out, or write it relative")


_TOKEN = "the token that you are logged in with"


def _known_secrets() -> list[tuple[str, str]]:
    """What a secret is, and the secret."""
    from huggingface_hub import get_token

    found = [(_TOKEN, get_token())]
    found += [(f"the value of {name}", os.environ.get(name)) for name in ("WANDB_API_KEY", "GITHUB_TOKEN")]
    return [(what, secret) for what, secret in found if secret]
