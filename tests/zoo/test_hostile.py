"""Hostile Hub repositories: each is refused with a reason, before its weights are fetched or any memory is spent."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ivideogpt.zoo.card import check_card
from ivideogpt.zoo.checkpoint import load_parts
from tests.zoo.hub_client import ClientError, HubClient
from tests.zoo.hub_server import Hub

TOKENIZER, TRANSFORMER = "tokenizer/diffusion_pytorch_model.safetensors", "transformer/model.safetensors"
LOAD = """
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    ivideogpt.from_pretrained(name)
finally:
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000, f"{grown} kB"
"""
Files = dict[str, bytes]


class Bomb:
    """Unpickled, it would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("open('/tmp/unpickled-by-ivideogpt', 'w').write('x')",))


def torch_archive() -> bytes:
    file = io.BytesIO()
    torch.save({"model.norm.weight": torch.zeros(32)}, file)
    return file.getvalue()


def header(rows: dict[str, Any], length: int | None = None, tail: bytes = b"") -> bytes:
    text = json.dumps(rows).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + tail


def first_header(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def lying(change: Callable[[dict[str, Any]], None], name: str = TRANSFORMER) -> Callable[[Files], None]:
    """Changes the rows of a header; the tensors behind it stay as they are."""

    def damage(files: Files) -> None:
        rows = first_header(files[name])
        length = struct.unpack("<Q", files[name][:8])[0]
        change(rows)
        files[name] = header(rows, tail=files[name][8 + length :])

    return damage


def config(part: str, **fields: Any) -> Callable[[Files], None]:
    def damage(files: Files) -> None:
        files[f"{part}/config.json"] = json.dumps(json.loads(files[f"{part}/config.json"]) | fields).encode()

    return damage


def put(name: str, data: bytes) -> Callable[[Files], None]:
    return lambda files: files.update({name: data})


def ten_terabytes(files: Files) -> None:
    """A configuration and a header that agree on an embedding of 10 TB, in a file of some kilobytes."""
    size = 10**13 // 4 // 32
    config("transformer", vocab_size=size)(files)
    rows = {"dtype": "F32", "shape": [size, 32], "data_offsets": [0, 4 * size * 32]}
    lying(lambda header: header.update({"model.embed_tokens.weight": rows}))(files)


BIG = 2**20 + 1
CASES: dict[str, tuple[Callable[[Files], None], str]] = {
    "a pickle under the name of safetensors": (
        put(TRANSFORMER, pickle.dumps(Bomb())), "holds a pickle under the name of a safetensors file.*never does"
    ),
    "an archive of torch.save": (put(TOKENIZER, torch_archive()), "a pickle under the name of a safetensors file"),
    "a header longer than the file": (
        put(TRANSFORMER, header({}, length=2**40)), "no safetensors file: a header of 1,099,511,627,776 bytes in a file"
    ),
    "a header that is not JSON": (put(TRANSFORMER, struct.pack("<Q", 10) + b"x" * 100), "is not to be believed"),
    "a header of a thousand lists": (
        put(TRANSFORMER, struct.pack("<Q", 200_000) + b"[" * 200_000), "is not to be believed"
    ),
    "a header that claims more than there is": (
        lying(lambda rows: rows["lm_head.weight"].update(data_offsets=[0, 10**13], shape=[10**13 // 4])),
        "header of model.safetensors is not to be believed",
    ),
    "a shape that the bytes do not hold": (
        lying(lambda rows: rows["model.norm.weight"].update(shape=[10**12])), r"tensor 'model.norm.weight' of shape"
    ),
    "a negative shape": (lying(lambda rows: rows["model.norm.weight"].update(shape=[-1, -32])), "cannot lie in"),
    "tensors that overlap": (
        lying(lambda rows: rows.update(extra=dict(rows["model.norm.weight"]))), "cannot lie in the bytes"
    ),
    "bytes behind the last tensor": (
        lambda files: files.update({TRANSFORMER: files[TRANSFORMER] + b"x" * 64}), "it tells of .* and the file has"
    ),
    "a type that is no number": (
        lying(lambda rows: rows["model.norm.weight"].update(dtype="OBJECT")), "is of type OBJECT; only"
    ),
    "an embedding of 10 TB": (config("transformer", vocab_size=10**13 // 4 // 32), "vocab_size|vocabulary|ids"),
    "an embedding of 10 TB, and a header that agrees": (ten_terabytes, "not to be believed|vocab"),
    "a codebook of 10 TB": (config("tokenizer", num_vq_embeddings=10**12), "vocab|ids|codebook"),
    "a trillion positions": (config("transformer", max_position_embeddings=10**12), "max_positions must be at most"),
    "a million layers": (config("transformer", num_hidden_layers=10**6), "asks for 1000000 layers"),
    "code of its own": (config("transformer", auto_map={"AutoModel": "evil.Model"}), "auto_map .* is not supported"),
    "a path that climbs": (put("transformer/../../../climbed", b"x"), "a path that leads out of its folder"),
    "an absolute path": (put("/etc/cron.d/x", b"x"), "a path that leads out of its folder"),
    "a path of Windows that climbs": (put("..\\..\\climbed", b"x"), "a path that leads out of its folder"),
    "a configuration of a megabyte": (put("tokenizer/config.json", b"{}" + b" " * BIG), "which no such file needs"),
    "a card of a megabyte": (put("README.md", b"x" * BIG), "README.md of .* which no such file needs"),
    "a card with a script": (put("README.md", b"# hi\n<script>alert(1)</script>"), "'<script', which can run a script"),
    "a card that runs on loading a picture": (put("README.md", b"<img src=x onerror='alert(1)'>"), "can run a script"),
    "a card with Python in its metadata": (
        put("README.md", b"---\nlicense: !!python/object/apply:os.system [id]\n---\n"), "'!!python/', which can run"
    ),
    "a side file of another size of action": (
        put("ivideogpt.json", b'{"action_mean": [0.0], "action_std": [0]}'), "action_std must be as many positive"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_before_anything_is_spent(case: str, hub: Hub, client: HubClient, published: Files) -> None:
    damage, message = CASES[case]
    files = dict(published)
    damage(files)
    number = list(CASES).index(case)
    hub.add(f"evil/case-{number}", files)
    with pytest.raises(ClientError, match=message) as caught:
        client.run(LOAD, name=f"evil/case-{number}")
    assert caught.value.kind == "RefusedRepositoryError"
    assert f"'evil/case-{number}'" in str(caught.value)
    cached = [path for path in client.home.rglob(f"*evil--case-{number}/**/*") if path.is_file()]
    assert not [path for path in cached if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in cached) < BIG  # less than any weights
    assert max((hub.sent.get(name, 0) for name in (TOKENIZER, TRANSFORMER)), default=0) < 2**18  # headers at most
    assert not [path for path in client.home.rglob("*") if "climbed" in path.name]
    assert not list(Path("/etc").glob("cron.d/x")) and not Path("/tmp/unpickled-by-ivideogpt").exists()


def test_only_pickles(hub: Hub, client: HubClient) -> None:
    hub.add("evil/model", {"tokenizer/config.json": b"{}", "pytorch_model.bin": pickle.dumps(Bomb())})
    with pytest.raises(ClientError, match="never loaded because they can run any code. It holds .*bin") as caught:
        client.run(LOAD, name="evil/model")
    assert caught.value.kind == "ModelNotFoundError"
    assert hub.sent == {}


@pytest.mark.parametrize("data", [pickle.dumps(Bomb()), torch_archive()], ids=["pickle", "torch.save"])
def test_a_pickle_in_a_folder_of_this_disk(data: bytes, published: Files, tmp_path: Path) -> None:
    for name, content in {**published, TRANSFORMER: data}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors holds a pickle under the name of a safetensors file"):
        load_parts(tmp_path)


def test_more_than_the_disk_holds(hub: Hub, client: HubClient, published: Files) -> None:
    """The listing and the header agree on a petabyte."""
    size = 10**15 // 4 // 32
    files = dict(published)
    rows = first_header(files[TRANSFORMER])
    place = 0
    config("transformer", intermediate_size=size)(files)
    for name, row in rows.items():
        if name == "__metadata__":
            continue
        shape = [size if length == 48 else length for length in row["shape"]]
        count = 4
        for length in shape:
            count *= length
        rows[name], place = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + count]}, place + count
    files[TRANSFORMER] = header(rows)
    repository = hub.add("evil/petabyte", files)
    repository.claimed_sizes[TRANSFORMER] = len(files[TRANSFORMER]) + place
    with pytest.raises(ClientError, match=r"have [\d,]+ bytes, and the disk of the cache .* has room for"):
        client.run(LOAD, name="evil/petabyte")
    assert not [path for path in client.home.rglob("*evil--petabyte*/**/*") if path.suffix == ".safetensors"]


def test_a_listing_without_end(hub: Hub, client: HubClient, published: Files) -> None:
    hub.add("evil/model", {**published, **{f"file-{number}": b"" for number in range(10_001)}})
    with pytest.raises(ClientError, match="which is too many"):
        client.run(LOAD, name="evil/model")


@pytest.mark.parametrize(
    "text",
    [
        "# fine\n\n<details><summary>x</summary>\n\ntext\n\n</details>",
        "![a](b.gif) <img src='https://host/a.png' width=300> <p align='center'>",
        "Frames are in [0, 1]; 3 < 4 and a <b>bold</b> word, `a < b`, <!-- a note -->\n",
        "description: one=1, on=2",
    ],
)
def test_ordinary_cards_pass(text: str) -> None:
    check_card(text, "card")


@pytest.mark.parametrize("text", ["<" * 200_000, "<a" * 10_000, "x" * 300_000])
def test_cards_that_would_take_for_ever_are_not_read(text: str) -> None:
    with pytest.raises(ValueError, match="more than a card needs"):
        check_card(text, "card")


@pytest.mark.parametrize(
    "text",
    [
        "<SCRIPT src=//host/x>", "< script >", "<iframe src=x>", "<a href='javascript:alert(1)'>x</a>",
        "<svg/onload=alert(1)>", "[x](javascript:alert(1))", "<img\nsrc=x\nonerror=alert(1)>", "<form action=x>",
        "```\nnot closed\n<script>", "<img/src=x/onerror=alert(1)>", "<img src='x'onerror='alert(1)'>",
        "a\\`<script>\\`",
        "<img src='a>b' onerror=alert(1)>", "<a href='java&#115;cript:alert(1)'>", "[x](java\tscript:alert(1))",
        "```\nx\n  ```\n<script>\n```", "<p style='position:fixed'>",
    ],
)  # fmt: skip
def test_cards_that_run_something_do_not(text: str) -> None:
    with pytest.raises(ValueError, match=r"card holds .*, which can run a script; a model card needs none"):
        check_card(text, "card")
