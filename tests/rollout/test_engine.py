"""Rollouts: the original's results, the same as without a cache, samples, seeds, modes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt.rollout import Rollout
from ivideogpt.rollout import engine as engine_module

Build = Callable[..., Any]
ACTION_DIM = 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(batch: int = 2, frames: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(batch, frames, 3, 32, 32, generator=seeded(seed))


def some_actions(batch: int = 2, frames: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, frames, ACTION_DIM, generator=seeded(seed))


def assert_same(first: Rollout, second: Rollout) -> None:
    assert torch.equal(first.tokens, second.tokens)
    torch.testing.assert_close(first.video, second.video, atol=1e-5, rtol=0)
    assert (first.rewards is None) == (second.rewards is None)
    if first.rewards is not None:
        torch.testing.assert_close(first.rewards, second.rewards, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["oxe-64-act-free", "bair-64-act-cond"])
def test_argmax_rollout_is_the_originals(golden: Build, name: str) -> None:
    import ivideogpt

    recorded = golden(name)
    model = ivideogpt.from_pretrained(recorded.folder)
    expected = recorded.tensors["greedy_tokens"]
    horizon = model.layout.num_frames(expected.shape[1]) - model.config.context_length
    context = recorded.video[:, : model.config.context_length]
    out = model.rollout(context, recorded.tensors.get("actions"), horizon=horizon, temperature=0)
    assert torch.equal(out.tokens, expected)
    torch.testing.assert_close(out.video, recorded.tensors["greedy_video"].float(), atol=4e-3, rtol=0)
    assert out.rewards is None


def test_free_argmax_rollout_is_the_originals(golden: Build) -> None:
    import ivideogpt

    recorded = golden("oxe-64-act-free")
    model = ivideogpt.from_pretrained(recorded.folder)
    expected = recorded.tensors["greedy_tokens_unforced"]
    horizon = model.layout.num_frames(expected.shape[1]) - model.config.context_length
    out = model.rollout(recorded.video[:, :2], horizon=horizon, temperature=0, force_slots=False)
    assert torch.equal(out.tokens, expected)


@torch.no_grad()
def uncached_argmax(model: Any, context_frames: Tensor, actions: Tensor, horizon: int) -> Tensor:
    """Tokens of an argmax rollout that runs the whole sequence through the transformer for every token."""
    layout = model.layout
    tokens = layout.prompt(model.tokenizer.encode_context(context_frames)[0])
    slot_actions = layout.slot_actions(actions, horizon)
    for frame in range(1, horizon + 1):
        for _ in range(layout.dynamics_tokens_per_frame):
            out = model.transformer(tokens, slot_actions[:, :frame], layout.slot_positions(frame))
            tokens = torch.cat([tokens, out.logits[:, -1:].argmax(-1)], dim=1)
        if frame < horizon:
            tokens = torch.cat([tokens, tokens.new_full((len(tokens), 1), layout.dynamics_slot_id)], dim=1)
    return tokens


def test_cached_rollout_equals_uncached(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    actions = some_actions()
    out = model.rollout(clip(), actions, horizon=4, temperature=0)
    assert torch.equal(out.tokens, uncached_argmax(model, clip(), actions, 4))
    with torch.no_grad():
        teacher_forced = model(out.tokens, actions).rewards  # read from the same positions, all at once
        video = model.tokenizer.detokenize(out.tokens).clamp(0, 1)
    torch.testing.assert_close(out.rewards, teacher_forced, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.video, video, atol=1e-5, rtol=0)
    assert out.video.shape == (2, 6, 3, 32, 32)
    assert out.rewards.shape == (2, 4)


def test_each_action_leads_to_the_next_frame(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM)
    actions = some_actions()
    before = model.rollout(clip(), actions, horizon=4, temperature=0).tokens
    for index, first_changed in [
        (0, None),
        (1, 0),
        (3, 2),
        (5, None),
    ]:  # context_length 2: actions[:, 1] leads to frame 2
        changed = actions.clone()
        changed[:, index] += 5.0
        after = model.rollout(clip(), changed, horizon=4, temperature=0).tokens
        start = model.layout.context_span + model.layout.frame_stride * (4 if first_changed is None else first_changed)
        assert torch.equal(before[:, :start], after[:, :start])
        assert first_changed is None or not torch.equal(before[:, start:], after[:, start:])


def test_same_seed_same_video(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    first, second = (model.rollout(clip(), some_actions(), generator=seeded(4)) for _ in range(2))
    assert_same(first, second)
    assert not torch.equal(first.tokens, model.rollout(clip(), some_actions(), generator=seeded(5)).tokens)


def test_frames_are_decoded_in_what_is_asked_for(tiny_world_model: Build) -> None:
    model = tiny_world_model()
    usual, full, half = (
        model.rollout(clip(), horizon=3, temperature=0, frame_precision=name) for name in (None, "float32", "bfloat16")
    )
    assert torch.equal(usual.video, full.video) and usual.video.dtype == half.video.dtype == torch.float32
    assert torch.equal(usual.tokens, half.tokens)
    assert 1e-4 < float((full.video - half.video).abs().max()) < 0.1
    # frames stay exact where the transformer is not
    rough = model.rollout(clip(), horizon=3, temperature=0, precision="bfloat16", frame_precision="float32")
    same = (rough.tokens == full.tokens).all(1)
    torch.testing.assert_close(rough.video[same], full.video[same], atol=1e-5, rtol=0)
    context = model.tokenizer.context_length
    torch.testing.assert_close(rough.video[:, :context], full.video[:, :context], atol=1e-5, rtol=0)


def test_global_seed_governs_without_a_generator(tiny_world_model: Build) -> None:
    model, outs = tiny_world_model(), []
    for _ in range(2):
        torch.manual_seed(11)
        outs.append(model.rollout(clip(), horizon=2))
    assert_same(*outs)
    assert not torch.equal(outs[0].tokens, model.rollout(clip(), horizon=2).tokens)


def test_the_generator_is_advanced(tiny_world_model: Build) -> None:
    model, generator = tiny_world_model(), seeded(0)
    first, second = (model.rollout(clip(), horizon=2, generator=generator).tokens for _ in range(2))
    assert not torch.equal(first, second)


def test_samples_of_a_clip_stand_side_by_side(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    context, actions = clip(), some_actions()
    single = model.rollout(context, actions, horizon=3, temperature=0)
    out = model.rollout(context, actions, horizon=3, temperature=0, num_samples=3)
    assert out.video.shape == (6, 5, 3, 32, 32)
    for row in range(6):
        assert torch.equal(out.tokens[row], single.tokens[row // 3])
        torch.testing.assert_close(out.video[row], single.video[row // 3], atol=1e-5, rtol=0)
        torch.testing.assert_close(out.rewards[row], single.rewards[row // 3], atol=1e-5, rtol=1e-5)
    sampled = model.rollout(context, actions, horizon=3, num_samples=3, generator=seeded()).tokens
    span = model.layout.context_span
    assert len({tuple(row.tolist()) for row in sampled[:, span:]}) == 6
    assert torch.equal(sampled[:, :span], single.tokens[:, :span].repeat_interleave(3, dim=0))


@pytest.mark.parametrize("rows", [1, 2, 4, 7])
def test_little_memory_changes_nothing(tiny_world_model: Build, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    settings: dict[str, Any] = {"horizon": 4, "num_samples": 4}
    whole = model.rollout(clip(3), some_actions(3), generator=seeded(), **settings)
    ran = []

    def watched(decoder: Any, layout: Any, prefix: Any, samples: int, *rest: Any) -> Any:
        ran.append(len(rest[1][0]))
        return imagine(decoder, layout, prefix, samples, *rest)

    imagine = engine_module._imagine
    monkeypatch.setattr(engine_module, "_imagine", watched)
    monkeypatch.setattr(engine_module, "rows_that_fit", lambda *_: rows)
    assert_same(whole, model.rollout(clip(3), some_actions(3), generator=seeded(), **settings))
    assert sum(ran) == 12
    assert max(ran) <= max(rows, 4 if rows >= 4 else rows)


def test_out_of_memory_splits_the_batch_and_says_so(tiny_world_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    settings: dict[str, Any] = {"horizon": 3, "num_samples": 4}
    whole = model.rollout(clip(3), some_actions(3), generator=seeded(), **settings)

    def narrow(decoder: Any, layout: Any, prefix: Any, samples: int, *rest: Any) -> Any:
        if len(rest[1][0]) > 3:
            raise torch.OutOfMemoryError("no room")
        return imagine(decoder, layout, prefix, samples, *rest)

    imagine = engine_module._imagine
    monkeypatch.setattr(engine_module, "_imagine", narrow)
    with pytest.warns(UserWarning, match="out of memory with 12 rows at once") as warned:
        assert_same(whole, model.rollout(clip(3), some_actions(3), generator=seeded(), **settings))
    assert len(warned) == 1

    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine_module, "_imagine", never)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="out of memory"):
        model.rollout(clip(3), some_actions(3), **settings)


def test_each_sample_takes_its_own_actions(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    actions = some_actions(6)
    together = model.rollout(clip(2), actions, horizon=3, num_samples=3, temperature=0)
    for row in range(6):
        alone = model.rollout(clip(2)[row // 3][None], actions[row][None], horizon=3, temperature=0)
        assert torch.equal(together.tokens[row], alone.tokens[0])
        torch.testing.assert_close(together.rewards[row], alone.rewards[0], atol=1e-4, rtol=1e-4)


def test_only_the_frames_that_are_asked_for(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    settings: dict[str, Any] = {"horizon": 4, "num_samples": 3}
    every, last, none = (
        model.rollout(clip(), some_actions(), generator=seeded(), return_frames=frames, **settings)
        for frames in ("all", "last", None)
    )
    assert none.frames is None
    with pytest.raises(ValueError, match="return_frames=None"):
        _ = none.video
    assert last.video.shape == (6, 3, 3, 32, 32)
    torch.testing.assert_close(last.video, every.video[:, [0, 1, -1]], atol=1e-5, rtol=0)
    assert torch.equal(every.tokens, none.tokens)
    assert torch.equal(every.tokens, last.tokens)
    assert torch.equal(every.rewards, none.rewards)
    with pytest.raises(ValueError, match="'all', 'last' or None, got 'first'"):
        model.rollout(clip(), some_actions(), return_frames="first")


def test_frames_that_are_decoded_as_they_come(tiny_world_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    settings: dict[str, Any] = {"horizon": 4, "num_samples": 3}
    at_the_end = model.rollout(clip(3), some_actions(3), generator=seeded(), **settings)
    monkeypatch.setattr(engine_module, "OVERLAPPING", ("cpu",))
    assert_same(at_the_end, model.rollout(clip(3), some_actions(3), generator=seeded(), **settings))
    monkeypatch.setattr(engine_module, "rows_that_fit", lambda *_: 2)
    assert_same(at_the_end, model.rollout(clip(3), some_actions(3), generator=seeded(), **settings))


def test_a_row_with_its_own_seed_does_not_depend_on_the_others(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM)
    together = model.rollout(
        clip(), some_actions(), horizon=3, num_samples=2, generator=[seeded(seed) for seed in range(4)]
    )
    for row in range(4):
        alone = model.rollout(
            clip()[row // 2][None], some_actions()[row // 2][None], horizon=3, generator=seeded(row)
        )  # fmt: skip
        assert torch.equal(together.tokens[row], alone.tokens[0])
    with pytest.raises(ValueError, match="one for each of the 4 rows, got 2"):
        model.rollout(clip(), some_actions(), num_samples=2, generator=[seeded(), seeded()])


def test_changed_weights_are_noticed(tiny_world_model: Build) -> None:
    model, other = tiny_world_model(ACTION_DIM, reward=True), tiny_world_model(ACTION_DIM, reward=True, seed=1)
    settings: dict[str, Any] = {"horizon": 3, "temperature": 0}
    before = model.rollout(clip(), some_actions(), **settings)
    model.load_state_dict(other.state_dict())
    assert_same(other.rollout(clip(), some_actions(), **settings), model.rollout(clip(), some_actions(), **settings))
    assert not torch.equal(before.tokens, model.rollout(clip(), some_actions(), **settings).tokens)


def test_weights_written_past_the_count_are_noticed(tiny_world_model: Build) -> None:
    model = tiny_world_model()
    before = model.rollout(clip(), horizon=2, temperature=0).tokens
    model.transformer.lm_head.weight.data.mul_(-1.0)
    assert not torch.equal(model.rollout(clip(), horizon=2, temperature=0).tokens, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(tiny_world_model: Build, dtype: torch.dtype) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    expected = model.rollout(clip(), some_actions(), generator=seeded())
    context, actions = clip(), some_actions()
    torch.set_default_dtype(dtype)
    try:
        out = model.rollout(context, actions, generator=seeded())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(expected, out)
    assert out.video.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_models_of_other_dtypes(tiny_world_model: Build, dtype: torch.dtype) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True).to(dtype)
    out = model.rollout(clip(), some_actions(), horizon=2, generator=seeded())
    assert out.video.isfinite().all()
    assert out.video.dtype == torch.float32


def test_threads_do_not_switch_each_others_dropout_on(tiny_world_model: Build) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = tiny_world_model(ACTION_DIM)
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    model.train()
    settings: dict[str, Any] = {"horizon": 1, "temperature": 0}
    expected = model.rollout(clip(), some_actions(), **settings).tokens
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda _: model.rollout(clip(), some_actions(), **settings).tokens, range(40)))
    assert all(torch.equal(out, expected) for out in outs)
    assert all(module.training for module in model.modules())


def test_an_unknown_layer_is_refused(tiny_world_model: Build) -> None:
    class Adapter(torch.nn.Linear):
        pass

    model = tiny_world_model()
    model.transformer.layers[0].self_attn.q_proj.__class__ = Adapter
    with pytest.raises(ValueError, match="a layer is a Adapter: merge adapters"):
        model.rollout(clip(), horizon=1)


def test_a_model_that_rolled_out_is_freed(tiny_world_model: Build) -> None:
    import gc
    import weakref

    model = tiny_world_model()
    model.rollout(clip(), horizon=2)
    gone = [weakref.ref(part) for part in (model.transformer, model.tokenizer)]
    del model
    gc.collect()
    assert [part() for part in gone] == [None, None]


def test_default_horizon(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM)
    assert model.rollout(clip(), some_actions(frames=5), temperature=0).video.shape[1] == 5
    free = tiny_world_model()
    longest = free.layout.max_horizon(free.config.transformer.max_positions)
    assert free.rollout(clip(1), temperature=0).video.shape[1] == 2 + longest


def test_modules_keep_their_mode_and_dropout_is_off(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    expected = model.rollout(clip(), some_actions(), temperature=0)
    model.train()
    model.tokenizer.decoder.eval()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    modes = {name: module.training for name, module in model.named_modules()}
    assert_same(expected, model.rollout(clip(), some_actions(), temperature=0))
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_nothing_is_left_behind_that_training_trips_over(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    names = {name for module in model.modules() for name in vars(module)}
    out = model.rollout(clip(), some_actions(), horizon=2, generator=seeded())
    assert {name for module in model.modules() for name in vars(module)} == names
    assert not out.video.is_inference()
    assert not out.rewards.is_inference()
    labels = model.layout.labels(out.tokens)
    model(out.tokens, some_actions(frames=4), labels).loss.backward()  # imagined tokens and the model itself train
    reconstruction = model.tokenizer(out.video[:, :2], out.video[:, 2:]).future_reconstruction
    reconstruction.square().mean().backward()


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_runs_in_any_gradient_mode(tiny_world_model: Build, context: Callable[[], Any]) -> None:
    model = tiny_world_model()
    expected = model.rollout(clip(), horizon=2, temperature=0)
    with context():
        assert_same(expected, model.rollout(clip(), horizon=2, temperature=0))


def test_bfloat16(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True).to(torch.bfloat16)
    out = model.rollout(clip(), some_actions(), horizon=2, generator=seeded())
    assert out.video.dtype == torch.float32
    assert out.rewards.dtype == torch.float32
    assert out.video.isfinite().all()


def test_under_autocast(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.rollout(clip(), some_actions(), horizon=2, generator=seeded())
    assert out.video.isfinite().all()
