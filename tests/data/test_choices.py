"""Choices by source: strides and cameras, and recordings of several cameras held out together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ivideogpt.data import VideoDataModule

Sets = Callable[..., Path]


def module_of(train: Any, **options: Any) -> VideoDataModule:
    defaults: dict[str, Any] = {
        "segment_length": 3, "resolution": 16, "batch_size": 1, "num_workers": 0, "augment": False, "use_rewards": False
    }  # fmt: skip
    module = VideoDataModule(train, **(defaults | options))
    module.setup()
    return module


def strides(module: VideoDataModule) -> dict[str, int]:
    """Stride of the clips of each set: the first pixel's red is the frame's number."""
    found: dict[str, int] = {}
    for batch in module.train_dataloader():
        numbers = batch["video"][0, :, 0, 0, 0].long()
        found[batch["key"][0].partition("-")[0]] = int(numbers[1] - numbers[0])
    return found


def test_strides_by_source(make_set: Sets) -> None:
    sets = [str(make_set(name, source=f"{group}/{name}", fps=12.0, lengths=[30])) for group, name in (
        ("oxe", "arm"), ("oxe", "hand"), ("own", "desk"))]  # fmt: skip
    assert strides(module_of(sets, stride=2)) == {"arm": 2, "hand": 2, "desk": 2}
    assert strides(module_of(sets, stride={"own/desk": 5})) == {
        "arm": 4,
        "hand": 4,
        "desk": 5,
    }  # 12 to 3 frames a second
    assert strides(module_of(sets, stride={"oxe/hand": 1, "oxe/*": 3, "*": 2})) == {"arm": 3, "hand": 1, "desk": 2}
    assert strides(module_of(sets, stride={"oxe/*": None, "*": 1}, target_rate=6.0)) == {"arm": 2, "hand": 2, "desk": 1}
    validation = module_of(sets[0], val=sets[1:], stride={"own/*": 7, "*": 1}).val_dataloader()
    steps = {
        batch["key"][0][:4]: int(batch["video"][0, 1, 0, 0, 0] - batch["video"][0, 0, 0, 0, 0]) for batch in validation
    }
    assert steps == {"hand": 1, "desk": 7}


def test_strides_that_cannot_be(make_set: Sets) -> None:
    folder = str(make_set("arm", source="oxe/arm"))
    with pytest.raises(ValueError, match=r"stride names 'oxe/leg', and the sources are 'oxe/arm'"):
        module_of(folder, stride={"oxe/leg": 2})
    with pytest.raises(ValueError, match="stride must be a whole number of at least 1, got 0"):
        module_of(folder, stride={"oxe/arm": 0})


def keys(module: VideoDataModule) -> list[str]:
    return sorted(key for batch in module.train_dataloader() for key in batch["key"])


def test_camera(make_set: Sets) -> None:
    two = str(make_set("two", episodes=3, cameras=("left", "right"), source="desk"))
    one = str(make_set("one", episodes=2, camera="wrist", source="lab"))
    assert len(keys(module_of([two, one]))) == 8
    assert keys(module_of(two, camera="right")) == ["two-000-right", "two-001-right", "two-002-right"]
    both = module_of([two, one], camera={"desk": "left"})
    assert keys(both) == ["one-000", "one-001", "two-000-left", "two-001-left", "two-002-left"]
    with pytest.raises(ValueError, match=r"lab in .*one has no camera 'left'; it has 'wrist'"):
        module_of([two, one], camera="left")
    with pytest.raises(ValueError, match=r"camera names 'bench', and the sources are 'desk', 'lab'"):
        module_of([two, one], camera={"bench": "left"})


def test_the_cameras_of_a_recording_are_held_out_together(make_set: Sets) -> None:
    folder = str(make_set("set", episodes=6, cameras=("left", "right", "top")))
    train, val = module_of(folder, holdout_every=3).mixtures()
    assert val is not None
    held, kept = (
        {mixture.sets[name].key(i).rpartition("-")[0] for name, i in mixture.episodes} for mixture in (val, train)
    )
    assert held == {"set-002", "set-005"} and len(val) == 6
    assert not held & kept and len(train) == 12
    with pytest.raises(ValueError, match="holdout_every=7 of 6 recordings leaves none"):
        module_of(folder, holdout_every=7)


def test_a_crop_is_taken_out_of_the_whole_frame(make_set: Sets) -> None:
    """Frames of another size than the clips' are cropped before they are resized: pixels of every column are seen."""
    from ivideogpt.data.transforms import Augmentation, augment, random_crop

    folder = str(make_set("set", size=32, lengths=[12]))
    module = module_of(folder, augment=True, segment_length=4, stride=1)
    batch = next(iter(module.train_dataloader()))
    assert batch["video"].dtype == torch.uint8 and batch["cropped"].tolist() == [True]
    done = module.on_after_batch_transfer(dict(batch))
    assert done["video"].shape == (1, 4, 3, 16, 16) and "cropped" not in done
    assert not torch.equal(done["video"], batch["video"] / 255)  # colours came on the device

    ramp = torch.arange(48, dtype=torch.uint8).expand(2, 3, 32, 48) * 5
    config = Augmentation()
    seen = torch.cat([random_crop(ramp, config, seed, 16)[0, 0, 0] for seed in range(60)])
    assert seen.min() < 5 * 4 and seen.max() > 5 * 43  # a centred square ends at columns 8 and 39
    same = module_of(folder, augment=True, segment_length=4, stride=1, resolution=32)
    assert next(iter(same.train_dataloader()))["cropped"].tolist() == [False]
    clips = torch.rand(2, 3, 3, 16, 16)
    whole = augment(clips, config, [1, 2], 16, cropped=[True, True])
    mixed = augment(clips, config, [1, 2], 16, cropped=[True, False])
    assert torch.equal(mixed[0], whole[0]) and torch.equal(mixed[1], augment(clips, config, [1, 2], 16)[1])
