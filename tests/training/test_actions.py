"""Actions in training: statistics from the data, the warm-up of a fresh action layer, several action spaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ivideogpt.data.datamodule import VideoDataModule
from ivideogpt.data.episode import Episode
from ivideogpt.data.shards import ShardSetWriter
from ivideogpt.models.action_layers import ActionLayers, with_action_layer
from ivideogpt.training import TransformerModule
from ivideogpt.training.callbacks import RolloutStrips

SPACES = {"lab/arm*": 3, "lab/gripper": 2}


def write(folder: Path, source: str, width: int | None, seed: int, episodes: int = 3) -> tuple[str, np.ndarray]:
    """A set of noise with actions far from unit variance, the last dimension constant; all its actions."""
    rng = np.random.default_rng(seed)
    rows = []
    with ShardSetWriter(folder) as writer:
        for number in range(episodes):
            video = rng.integers(0, 256, (8, 32, 32, 3), np.uint8)
            actions = None
            if width is not None:
                actions = (rng.normal(5.0, 20.0, (8, width))).astype(np.float32)
                actions[:, -1] = 0.25
                rows.append(actions[:-1])  # the last one is a filler in many recordings
            writer.write(f"{folder.name}-{number}", Episode(video, actions, source=source))
    return str(folder), np.concatenate(rows) if rows else np.zeros(0)


def data_of(train: Any, **options: Any) -> VideoDataModule:
    settings: dict[str, Any] = dict(
        train=train, segment_length=4, context_length=2, resolution=32, batch_size=4, num_workers=0, augment=False,
        use_rewards=False,
    )  # fmt: skip
    return VideoDataModule(**{**settings, **options})


def test_statistics_come_from_the_data(tmp_path: Path, tiny_world_model: Any, trainer: Any) -> None:
    model = tiny_world_model(action_dim=3)
    folder, actions = write(tmp_path / "arm", "lab/arm", 3, seed=0)
    module = TransformerModule(model.transformer, model.tokenizer, action_statistics_from_data=True, warmup_updates=0)
    trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=data_of(folder))
    found = module.action_statistics
    np.testing.assert_allclose(found["action_mean"], actions.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["action_std"][:2], actions.std(0)[:2], rtol=1e-5)
    assert found["action_std"][2] == 1.0  # constant: it stays 0 and does not blow up
    normalized = module.normalize_actions(torch.from_numpy(actions))
    torch.testing.assert_close(normalized.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), rtol=1e-4, atol=1e-4)
    # a checkpoint keeps them, so that a model can be made of it without the data
    fresh = TransformerModule(model.transformer, model.tokenizer, action_statistics_from_data=True)
    fresh.load_state_dict(module.state_dict())
    assert fresh.action_statistics == found


def test_statistics_of_a_mixture_go_by_its_weights(tmp_path: Path) -> None:
    one, first = write(tmp_path / "one", "lab/one", 2, seed=1, episodes=2)
    two, second = write(tmp_path / "two", "lab/two", 2, seed=2, episodes=7)
    together = np.concatenate([first, second])
    plain = data_of([one, two]).action_statistics()
    np.testing.assert_allclose(plain["action_mean"], together.mean(0), rtol=1e-6)
    np.testing.assert_allclose(plain["action_std"][0], together.std(0)[0], rtol=1e-6)
    even = data_of({one: 1.0, two: 1.0}).action_statistics()
    mean = (first.mean(0) + second.mean(0)) / 2
    np.testing.assert_allclose(even["action_mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(
        data_of([one, two]).action_statistics("lab/two")["action_mean"], second.mean(0), rtol=1e-6
    )


def test_statistics_go_to_the_first_space_that_fits(tmp_path: Path, tiny_world_model: Any, trainer: Any) -> None:
    model = tiny_world_model()
    sets = {name: write(tmp_path / name, f"oxe/{name}", width, seed) for seed, (name, width) in enumerate(
        (("bridge", 2), ("arm", 3), ("hand", 3)))}  # fmt: skip
    module = TransformerModule(
        model.transformer,
        model.tokenizer,
        action_spaces={"oxe/bridge": 2, "oxe/*": 3},
        action_statistics_from_data=True,
    )
    data = data_of([folder for folder, _ in sets.values()], pad_actions=True)
    trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=data)
    assert module.action_layers is not None
    others = np.concatenate([sets["arm"][1], sets["hand"][1]])
    np.testing.assert_allclose(module.action_layers["oxe/bridge"].mean, sets["bridge"][1].mean(0), rtol=1e-5)
    np.testing.assert_allclose(module.action_layers["oxe/*"].mean, others.mean(0), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_statistics_that_are_not_there(tmp_path: Path, tiny_world_model: Any, trainer: Any) -> None:
    model = tiny_world_model(action_dim=3)
    blind = data_of(write(tmp_path / "blind", "lab/blind", None, seed=0)[0])
    with pytest.raises(ValueError, match="cannot be normalised: there are no statistics of actions"):
        blind.action_statistics()
    module = TransformerModule(model.transformer, model.tokenizer, action_statistics_from_data=True)
    with pytest.raises(ValueError, match="needs data that know them"):
        trainer(limit_val_batches=0).fit(module, train_dataloaders=[{"video": torch.rand(1, 4, 3, 32, 32)}])
    free = tiny_world_model()
    with pytest.raises(ValueError, match="takes no actions"):
        TransformerModule(free.transformer, free.tokenizer, action_statistics_from_data=True)
    with pytest.raises(ValueError, match="takes no actions"):
        TransformerModule(free.transformer, free.tokenizer, action_warmup_updates=5)


def test_a_warm_up_trains_the_action_layer_alone(tmp_path: Path, tiny_world_model: Any, trainer: Any) -> None:
    folder, _ = write(tmp_path / "arm", "lab/arm", 3, seed=0)

    def trained(updates: int) -> tuple[set[str], Any]:
        model = tiny_world_model(action_dim=3, reward=False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        module = TransformerModule(
            model.transformer, model.tokenizer, learning_rate=1e-2, warmup_updates=0, action_warmup_updates=3,
            action_statistics_from_data=True,
        )  # fmt: skip
        trainer(max_steps=updates, limit_val_batches=0).fit(module, datamodule=data_of(folder, epoch_batches=10))
        return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}, module

    changed, _ = trained(3)
    assert changed == {"transformer.action_linear.weight", "transformer.action_linear.bias"}
    changed, module = trained(4)
    assert len(changed) > 10 and not any(name.startswith("tokenizer") for name in changed)
    state = module.optimizers().optimizer.state
    steps = {int(state[p]["step"]) for p in module.transformer.lm_head.parameters()}
    assert steps == {1}  # no moment was begun before


def test_layers_of_several_spaces() -> None:
    layers = ActionLayers(SPACES, 8)
    assert layers.spaces == SPACES
    assert [layers.space_of(source) for source in ("lab/arm-2", "lab/gripper", "else")] == [
        "lab/arm*",
        "lab/gripper",
        None,
    ]
    actions = torch.randn(4, 5, 3)
    sources = ["lab/gripper", "lab/arm", "else", "lab/arm"]
    assert torch.equal(layers(actions, sources), torch.zeros(4, 5, 8))  # fresh layers add nothing
    for name in SPACES:
        torch.nn.init.normal_(layers[name].weight)
        layers[name].mean.fill_(1.0)
        layers[name].std.fill_(2.0)
    out = layers(actions, sources)
    arm, gripper = layers["lab/arm*"], layers["lab/gripper"]
    torch.testing.assert_close(out[0], (actions[0, :, :2] - 1) / 2 @ gripper.weight.T)
    torch.testing.assert_close(out[1], (actions[1] - 1) / 2 @ arm.weight.T)
    assert torch.equal(out[2], torch.zeros(5, 8))
    out[1:2].sum().backward()
    assert gripper.weight.grad is not None  # of every space, so that processes agree on what has gradients
    assert not gripper.weight.grad.any() and arm.weight.grad is not None and arm.weight.grad.any()


@pytest.mark.parametrize(
    ("spaces", "says"), [({}, "at least one"), ({"a.b": 2}, "without a dot"), ({"a": 0}, "at least 1, got 0")]
)
def test_spaces_that_cannot_be(spaces: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ActionLayers(spaces, 8)


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    return [
        write(tmp_path / name, source, width, seed)[0]
        for seed, (name, source, width) in enumerate(
            (("arm", "lab/arm-1", 3), ("gripper", "lab/gripper", 2), ("film", "lab/film", None))
        )
    ]


def test_one_model_of_several_embodiments(sets: list[str], tiny_world_model: Any, trainer: Any) -> None:
    model = tiny_world_model()
    module = TransformerModule(
        model.transformer, model.tokenizer, action_spaces=SPACES, action_statistics_from_data=True, learning_rate=1e-2,
        warmup_updates=0,
    )  # fmt: skip
    data = data_of(sets, pad_actions=True, val=sets)
    trainer(max_steps=6, callbacks=[RolloutStrips()]).fit(module, datamodule=data)
    assert data.action_dim == 3
    assert data.action_dims == {"lab/arm-1": 3, "lab/gripper": 2, "lab/film": None}
    layers = module.action_layers
    assert layers is not None
    assert all(bool(layers[name].weight.any()) for name in SPACES)
    assert float(layers["lab/gripper"].std[0]) > 10

    # a clip of one embodiment is what the model with that one action layer makes of it
    batch = next(iter(data.val_dataloader()))
    batch = data.on_after_batch_transfer(batch)
    module.eval()
    together = module.predict_clip(batch).logits
    for name, size in SPACES.items():
        rows = [row for row, source in enumerate(batch["source"]) if layers.space_of(source) == name]
        alone = TransformerModule(
            with_action_layer(model.transformer, layers[name]), model.tokenizer,
            action_mean=layers[name].mean.tolist(), action_std=layers[name].std.tolist(),
        ).eval()  # fmt: skip
        own = {"video": batch["video"][rows], "actions": batch["actions"][rows][..., :size]}
        torch.testing.assert_close(alone.predict_clip(own).logits, together[rows], rtol=1e-4, atol=1e-4)
    imagined = module.imagine(batch, temperature=0.0)
    assert len({layers.space_of(source) for source in batch["source"]}) > 1 and imagined.shape == batch["video"].shape
    for row in range(len(batch["source"])):  # each as if it were alone, in the order of the batch
        alone_batch = {"video": batch["video"][row : row + 1], "actions": batch["actions"][row : row + 1],
                       "source": batch["source"][row : row + 1]}  # fmt: skip
        torch.testing.assert_close(module.imagine(alone_batch, temperature=0.0), imagined[row : row + 1])
    assert model.transformer.action_linear is None


def test_data_that_do_not_fit_the_spaces(sets: list[str], tiny_world_model: Any, trainer: Any) -> None:
    model = tiny_world_model()

    def fit(spaces: dict[str, int], **options: Any) -> None:
        module = TransformerModule(model.transformer, model.tokenizer, action_spaces=spaces)
        trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=data_of(sets, **options))

    with pytest.raises(ValueError, match=r"the action space 'lab/gripper' has size 4, 'lab/gripper' has 2"):
        fit({"lab/arm*": 3, "lab/gripper": 4}, pad_actions=True)
    with pytest.raises(ValueError, match=r"the actions of 'lab/gripper' belong to no action space"):
        fit({"lab/arm*": 3}, pad_actions=True)
    with pytest.raises(ValueError, match="pad_actions: true"):
        fit(SPACES, use_actions=False)
    with pytest.raises(ValueError, match="do not agree on actions"):
        fit(SPACES)
    own = tiny_world_model(action_dim=3)
    with pytest.raises(ValueError, match="action_dim must be null"):
        TransformerModule(own.transformer, own.tokenizer, action_spaces=SPACES)
