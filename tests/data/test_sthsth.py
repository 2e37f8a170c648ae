"""Reading Something-Something v2: real WebM files and folders of images with label files in the published form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ivideogpt.data.sources.sthsth import SthSthOptions, sthsth_jobs

av: Any = pytest.importorskip("av")

ENTRIES: list[dict[str, Any]] = [
    {
        "id": "78687",
        "label": "holding potato next to vicks vaporub bottle",
        "template": "Holding [something] next to [something]",
        "placeholders": ["potato", "vicks vaporub bottle"],
    },
    {"id": "42326", "label": "pushing a cup", "template": "Pushing [something]", "placeholders": ["a cup"]},
    {"id": "100904", "label": "pushing a box", "template": "Pushing [something]", "placeholders": ["a box"]},
]
CLASSES = {"Holding something next to something": "39", "Pushing something": "90"}


@pytest.fixture
def source(tmp_path: Path, shared: Path) -> Path:
    """Two WebM files and one folder of images beside `labels/train.json`."""
    frames = np.load(shared / "data" / "bair_sample.npz", allow_pickle=False)["aux1_image"][:6].astype(np.uint8)
    folder = tmp_path / "sthsth"
    (folder / "labels").mkdir(parents=True)
    (folder / "labels" / "something-something-v2-train.json").write_text(json.dumps(ENTRIES))
    for name in ("78687", "42326"):
        with av.open(str(folder / f"{name}.webm"), "w") as container:
            stream = container.add_stream("libvpx", rate=12)
            stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
            for frame in frames:
                container.mux(
                    stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p"))
                )
            container.mux(stream.encode())
    (folder / "100904").mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / "100904" / f"{t:06d}.jpg", quality=95)
    return folder


def test_videos_and_folders(source: Path) -> None:
    jobs = sthsth_jobs(source)
    assert [name for name, _ in jobs] == ["78687", "42326", "100904"]
    first, last = jobs[0][1](), jobs[2][1]()
    assert first.video.shape == last.video.shape == (6, 64, 64, 3)
    assert first.actions is None and first.source == "sthsth" and first.fps == pytest.approx(12, rel=0.01)
    assert first.metadata == {"file": "78687.webm", **ENTRIES[0]}
    assert last.metadata == {"file": "100904", **ENTRIES[2]}


def test_class_filter(source: Path, tmp_path: Path) -> None:
    def kept(name: str, content: str) -> list[str]:
        (tmp_path / name).write_text(content)
        return [job for job, _ in sthsth_jobs(source, SthSthOptions(classes=tmp_path / name))]

    assert kept("keep.txt", "Pushing [something]\n\n") == ["42326", "100904"]
    assert kept("keep.json", json.dumps(["Holding something next to something"])) == ["78687"]
    assert kept("labels.json", json.dumps(CLASSES)) == ["78687", "42326", "100904"]
    numbered = sthsth_jobs(source, SthSthOptions(classes=tmp_path / "labels.json"))
    assert numbered[1][1]().metadata["class"] == 90
    for content, message in (
        ("Throwing [something]", r"1 classes have no video in .*train.json: 'Throwing something'"),
        ("\n", "names no class"),
    ):
        with pytest.raises(ValueError, match=message):
            kept("keep.txt", content)
    for content, message in (("3", "must hold a list"), ('{"a": "b"}', "must be whole"), ("{", "is no JSON")):
        with pytest.raises(ValueError, match=message):
            kept("keep.json", content)


def test_a_video_that_is_missing_or_damaged(source: Path) -> None:
    (source / "42326.webm").unlink()
    file = source / "78687.webm"
    file.write_bytes(file.read_bytes()[:300])
    jobs = dict(sthsth_jobs(source))
    with pytest.raises(ValueError, match="holds no video and no folder 42326"):
        jobs["42326"]()
    with pytest.raises(ValueError, match=r"78687.webm: the video"):
        jobs["78687"]()
    assert len(jobs["100904"]()) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("{}", "must be a JSON list of objects with `id`"),
        ('[{"label": "x"}]', "must be a JSON list of objects with `id`"),
        ("[]", "lists no video"),
        ('[{"id": "../../etc/passwd"}]', r"the id '../../etc/passwd' is not made of letters and digits"),
        ('[{"id": "1"}, {"id": 1}]', "lists the id 1 twice"),
        ('[{"id": "1", "template": 3}]', "the template of 1 is 3"),
    ],
)
def test_wrong_label_files(source: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        sthsth_jobs(source, SthSthOptions(labels=tmp_path / "x.json"))


def test_no_label_file(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split 'validation' is needed: no \*validation.json"):
        sthsth_jobs(source, SthSthOptions(split="validation"))
    with pytest.raises(ValueError, match="is no folder"):
        sthsth_jobs(tmp_path / "nowhere")
