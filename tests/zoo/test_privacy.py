"""Paths of a disk and secrets are found in texts, and what only looks like one is left alone."""

from __future__ import annotations

import pytest

from ivideogpt.zoo.privacy import check_nothing_private, without_paths, without_paths_in


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/jane/data/shards", "shards"),
        ("--data=/mnt/disk 3", "--data=disk 3"),
        (
            "ivideogpt evaluate --model '/home/jane doe/out' --data /srv/x/y --n 3",
            "ivideogpt evaluate --model 'out' --data y --n 3",
        ),
        ('say "/home/jane doe/my log.txt"', 'say "my log.txt"'),
        ("from /home/jane", "from home"),
        ("~/data and ~jane/data", "data and data"),
        (r"C:\Users\jane\data", "data"),
        (r"\\server\share\data", "data"),
        ("file:///srv/x/data", "data"),
        ("../../sets/train", "sets/train"),
        ("[/srv/a/b, /srv/c/d]", "[b, d]"),
        ("/tmp", "tmp"),
    ],
)
def test_paths_are_cut_down(text: str, public: str) -> None:
    assert without_paths(text) == public
    check_nothing_private(public, "here")
    assert without_paths(public) == public


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/thuml/ivideogpt-oxe", "hf://someone/mine", "s3://bucket/key",
        "thuml/ivideogpt-oxe-64-act-free", "runs/data/train", "16/9", "and/or", "a </b> b", "a / b",
        "<details><summary>x</summary>",
        "model_cards/results/x.json", "~ 3", "metaworld/plate-slide-v3: 8 episodes", "key: value",
        "token perplexity: 12345678",
    ],
)  # fmt: skip
def test_what_is_no_path_stays(text: str) -> None:
    assert without_paths(text) == text
    assert without_paths_in({"a": [text]}) == {"a": [text]}
    check_nothing_private(text, "here")


def test_plain_data_is_gone_through_with_its_keys() -> None:
    found = without_paths_in({"train": {"/srv/jane doe/a": 1.0}, "val": ["/home/j d/b", 3, None], "n": ("/a/b c/d e",)})
    assert found == {"train": {"a": 1.0}, "val": ["b", 3, None], "n": ["d e"]}


@pytest.mark.parametrize(
    "text",
    [
        "hf_abcdefghijklmnop", "ghp_" + "a" * 36, "AKIAABCDEFGHIJKLMNOP", "sk-" + "a" * 30, "password = hunter22",
        "-----BEGIN RSA PRIVATE KEY-----", "https://jane:hunter22@host/", '"access_token": "abcdefgh"',
        "/home/jane/x", "~/x",
    ],
)  # fmt: skip
def test_secrets_and_paths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^notes.json(, line 2,)? holds ") as caught:
        check_nothing_private(f"first line\n{text}\n", "notes.json")
    if not text.startswith(("/", "~")):
        assert text not in str(caught.value)


def test_the_token_that_one_is_logged_in_with_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-an-odd-form-123")
    with pytest.raises(ValueError, match="card holds the token that you are logged in with"):
        check_nothing_private("see of-an-odd-form-123 there", "card")
    with pytest.raises(ValueError, match="the token that you are logged in with"):
        check_nothing_private("see anothersecret there", "card", ["anothersecret"])
