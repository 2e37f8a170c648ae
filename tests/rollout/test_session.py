"""Sessions: n steps equal a rollout of n; forks, rewinds and errors behave as documented."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt.rollout import Session
from ivideogpt.rollout import session as session_module
from ivideogpt.rollout.graphs import GraphDecoder
from ivideogpt.rollout.pixels import PixelDecoder

Build = Callable[..., Any]
ACTION_DIM = 3
SAMPLING = [
    pytest.param({"temperature": 0.0}, id="argmax"),
    pytest.param({"temperature": 1.0, "top_k": 20}, id="sampled"),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(batch, 2, 3, 32, 32, generator=seeded(seed))


def some_actions(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(2, count, ACTION_DIM, generator=seeded(seed))


def start(model: Any, **settings: Any) -> Session:
    return model.session(clip(), generator=seeded(9), **settings)


def walk(session: Session, actions: Tensor) -> Session:
    for action in actions.unbind(1):
        session.step(action)
    return session


def assert_same(first: Session, second: Session) -> None:
    """Two sessions are in the same state, down to what they would sample next."""
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.frames, second.frames)
    assert torch.equal(first.rewards, second.rewards)  # type: ignore[arg-type]
    assert first.horizon_left == second.horizon_left
    action = torch.full((2, ACTION_DIM), 0.3)
    one, other = first.fork(), second.fork()
    assert torch.equal(one.step(action)[0], other.step(action)[0])
    assert torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_n_steps_equal_a_rollout_of_n(tiny_world_model: Build, sampling: dict[str, Any]) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    actions = some_actions(7)
    rolled = model.rollout(clip(), actions, horizon=5, generator=seeded(9), **sampling)
    session = start(model, **sampling)
    for index in range(5):
        frame, reward = session.step(actions[:, 1 + index])  # taken at the latest frame, the first at context frame 1
        torch.testing.assert_close(frame, rolled.video[:, 2 + index], atol=1e-5, rtol=0)
        torch.testing.assert_close(reward, rolled.rewards[:, index], atol=1e-5, rtol=1e-5)
    assert torch.equal(session.tokens, rolled.tokens)
    torch.testing.assert_close(session.frames, rolled.video, atol=1e-5, rtol=0)
    torch.testing.assert_close(session.rewards, rolled.rewards, atol=1e-5, rtol=1e-5)


def test_action_free_session(tiny_world_model: Build) -> None:
    model = tiny_world_model()
    rolled = model.rollout(clip(), horizon=3, generator=seeded(9))
    session = start(model)
    rewards = [session.step()[1] for _ in range(3)]
    assert torch.equal(session.tokens, rolled.tokens)
    assert rewards == [None] * 3
    assert session.rewards is None
    with pytest.raises(ValueError, match="takes no actions"):
        session.step(torch.zeros(2, ACTION_DIM))


def test_before_the_first_step(tiny_world_model: Build) -> None:
    session = start(tiny_world_model(ACTION_DIM, reward=True))
    assert session.frames.shape == (2, 2, 3, 32, 32)
    assert session.rewards is not None
    assert session.rewards.shape == (2, 0)
    assert session.horizon_left == 25


@pytest.mark.parametrize("sampling", SAMPLING)
def test_fork_continues_like_the_original(tiny_world_model: Build, sampling: dict[str, Any]) -> None:
    model, actions, others = tiny_world_model(ACTION_DIM, reward=True), some_actions(), some_actions(seed=1)
    session = walk(start(model, **sampling), actions[:, :3])
    fork = session.fork()
    walk(fork, others[:, :3])  # the fork goes first and elsewhere: the session must not notice
    walk(session, actions[:, 3:])
    assert_same(session, walk(start(model, **sampling), actions))
    assert_same(fork, walk(start(model, **sampling), torch.cat([actions[:, :3], others[:, :3]], dim=1)))
    assert not torch.equal(fork.frames[:, -1], session.frames[:, -1])


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("steps", [0, 1, 3, 4])
def test_rewind_equals_never_having_been_there(tiny_world_model: Build, sampling: dict[str, Any], steps: int) -> None:
    model, actions, others = tiny_world_model(ACTION_DIM, reward=True), some_actions(), some_actions(seed=1)
    session = walk(start(model, **sampling), actions[:, :4])
    session.rewind(steps)
    assert_same(session, walk(start(model, **sampling), actions[:, : 4 - steps]))
    walk(session, others[:, :2])
    assert_same(session, walk(start(model, **sampling), torch.cat([actions[:, : 4 - steps], others[:, :2]], dim=1)))


def test_fork_can_be_rewound_behind_the_fork(tiny_world_model: Build) -> None:
    model, actions = tiny_world_model(ACTION_DIM, reward=True), some_actions()
    session = walk(start(model), actions[:, :3])
    fork = session.fork()
    fork.rewind(2)
    walk(fork, actions[:, 4:])
    assert_same(fork, walk(start(model), actions[:, [0, 4, 5]]))
    assert_same(session, walk(start(model), actions[:, :3]))


def test_the_callers_generator_and_outputs_are_its_own(tiny_world_model: Build) -> None:
    model, generator = tiny_world_model(ACTION_DIM, reward=True), seeded(9)
    state = generator.get_state()
    session = model.session(clip(), generator=generator)
    frame, reward = session.step(torch.zeros(2, ACTION_DIM))
    assert torch.equal(generator.get_state(), state)
    assert not any(tensor.is_inference() for tensor in (frame, reward, session.frames, session.tokens))
    before = session.frames
    frame.zero_()
    reward.zero_()
    session.frames.zero_()
    assert torch.equal(session.frames, before)


def test_raw_actions_are_normalised_like_in_a_rollout(tiny_world_model: Build) -> None:
    model, actions = tiny_world_model(ACTION_DIM, reward=True), some_actions()
    plain = model.rollout(clip(), actions, horizon=3, temperature=0)
    model.extras |= {"action_mean": [1.0, 2.0, 3.0], "action_std": [0.5, 2.0, 4.0]}
    raw = actions * torch.tensor([0.5, 2.0, 4.0]) + torch.tensor([1.0, 2.0, 3.0])
    session = walk(start(model, temperature=0), raw[:, 1:4])
    assert torch.equal(session.tokens, plain.tokens)


def test_stepping_to_the_last_position(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    session, action = start(model), torch.zeros(2, ACTION_DIM)
    for _ in range(session.horizon_left):
        session.step(action)
    assert session.frames.shape[1] == 27
    assert session.horizon_left == 0
    session.rewind(2)
    assert session.horizon_left == 2
    session.step(action)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_past_the_positions_the_latest_frames_are_the_context(
    tiny_world_model: Build, sampling: dict[str, Any]
) -> None:
    model, actions = tiny_world_model(ACTION_DIM, reward=True), some_actions(14)
    session = walk(start(model, anchor_every=4, **sampling), actions[:, :4])
    context = session.frames[:, -2:]
    state = session._generator.get_state()  # type: ignore[union-attr]
    walk(session, actions[:, 4:7])
    fresh = model.session(context, generator=torch.Generator().set_state(state), **sampling)
    walk(fresh, actions[:, 4:7])
    assert torch.equal(fresh.tokens, session.tokens)
    torch.testing.assert_close(fresh.frames[:, 2:], session.frames[:, -3:], atol=1e-5, rtol=0)
    assert session.steps == 7
    walk(session, actions[:, 7:])
    assert session.frames.shape[1] == 2 + 4 + 2  # the segment that runs, and the one before it
    assert session.rewards is not None
    assert session.rewards.shape == (2, 6)
    assert (session.steps, session.horizon_left) == (14, 2)


def test_anchoring_by_itself_at_the_last_position(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    session, actions = start(model), some_actions(27)
    walk(session, actions)
    assert session.horizon_left == 23
    assert session.frames.shape[1] == 2 + 27


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6])
def test_rewind_over_an_anchor(
    tiny_world_model: Build, monkeypatch: pytest.MonkeyPatch, steps: int, graphs: bool
) -> None:
    if graphs:  # the decoder of GPUs, whose buffers the steps of all contexts share
        made: dict[Any, GraphDecoder] = {}
        monkeypatch.setattr(
            session_module, "decoder_for", lambda model, _: made.setdefault(model, GraphDecoder(model, "float32"))
        )
    model, actions, others = tiny_world_model(ACTION_DIM, reward=True), some_actions(10), some_actions(3, seed=1)
    session = walk(start(model, anchor_every=4), actions)  # anchored at 4 and 8, so the steps from 5 on are kept
    fork = session.fork()
    session.rewind(steps)
    walk(session, others)
    expected = walk(start(model, anchor_every=4), torch.cat([actions[:, : 10 - steps], others], dim=1))
    assert torch.equal(session.frames[:, -3:], expected.frames[:, -3:])
    assert session.steps == expected.steps
    walk(fork, others)  # must not notice
    expected = walk(start(model, anchor_every=4), torch.cat([actions, others], dim=1))
    assert torch.equal(fork.frames, expected.frames)
    with pytest.raises(ValueError, match="cannot rewind 9 steps: 13 were taken and 5 are kept"):
        fork.rewind(9)


def test_a_long_drive_stays_small(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM)
    session, action = start(model), torch.zeros(2, ACTION_DIM)
    for _ in range(120):
        frame, _ = session.step(action)
        assert frame is not None
        assert frame.isfinite().all()
        assert len(session._segments) <= 2
    assert session.frames.shape[1] <= 2 + 2 * 25


@pytest.mark.slow
def test_nano_drives_for_two_thousand_frames() -> None:
    import tracemalloc

    import ivideogpt

    model = ivideogpt.from_pretrained("ivideogpt-metaworld-nano")
    actions = torch.randn(2000, 1, 4, generator=seeded()).clamp(-1, 1)
    session = model.session(torch.rand(1, 2, 3, 64, 64, generator=seeded()), generator=seeded())
    tracemalloc.start()
    sizes = []
    for index, action in enumerate(actions):
        frame, reward = session.step(action)
        assert frame is not None
        assert frame.isfinite().all()
        assert reward is not None and reward.isfinite().all()
        if index % 500 == 499:
            sizes.append(tracemalloc.get_traced_memory()[0])
    assert session.steps == 2000
    assert session.frames.shape[1] <= 2 + 2 * 30
    assert sizes[-1] < sizes[1] + 2**20


def test_advance_decodes_only_what_is_asked_for(tiny_world_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, actions = tiny_world_model(ACTION_DIM, reward=True), some_actions()
    plain = walk(start(model, anchor_every=4), actions)
    session = start(model, anchor_every=4)
    pixels, decoded = session._segments[0].pixels, []

    def watched(indices: Tensor, context: Any) -> Tensor:
        decoded.append(indices.shape[1])
        return PixelDecoder.decode(pixels, indices, context)

    monkeypatch.setattr(pixels, "decode", watched)
    rewards = [session.advance(action) for action in actions.unbind(1)]
    assert decoded == [1, 1]  # the two frames that became the context
    assert torch.equal(torch.stack(rewards, dim=1), plain.rewards)  # type: ignore[arg-type]
    assert torch.equal(session.frames, plain.frames)
    assert len(decoded) == 6
    assert torch.equal(session.frames, plain.frames)
    assert len(decoded) == 6


def test_rows_with_their_own_seeds(tiny_world_model: Build) -> None:
    model, actions = tiny_world_model(ACTION_DIM, reward=True), some_actions()
    together = walk(model.session(clip(), generator=[seeded(1), seeded(2)]), actions)
    for row in range(2):
        alone = walk(model.session(clip()[row][None], generator=seeded(1 + row)), actions[row][None])
        assert torch.equal(together.tokens[row], alone.tokens[0])
    fork = together.fork()
    together.rewind(2)
    walk(together, actions[:, 4:])
    assert torch.equal(fork.tokens, together.tokens)


def test_two_sessions_in_two_threads(tiny_world_model: Build) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, actions = tiny_world_model(ACTION_DIM, reward=True), some_actions(20)
    with ThreadPoolExecutor(2) as pool:
        sessions = [model.session(clip(seed=seed), generator=seeded(seed), anchor_every=7) for seed in range(2)]
        list(pool.map(lambda session: walk(session, actions), sessions))
    for seed, session in enumerate(sessions):
        alone = walk(model.session(clip(seed=seed), generator=seeded(seed), anchor_every=7), actions)
        assert torch.equal(alone.frames, session.frames)
        assert torch.equal(alone.rewards, session.rewards)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, 26, 2.0, True])
def test_bad_anchor(tiny_world_model: Build, steps: Any) -> None:
    with pytest.raises(ValueError, match=rf"anchor_every must be 1..25 steps.*got {steps}"):
        start(tiny_world_model(), anchor_every=steps)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (None, "needs actions of width 3, got None"),
        (torch.zeros(2, 4), r"shape \(2, 3\).*got \(2, 4\)"),
        (torch.zeros(3, 3), r"shape \(2, 3\).*got \(3, 3\)"),
        (torch.zeros(3), r"got \(3,\)"),
        (torch.tensor([[0.0, float("nan"), 0.0]] * 2), "finite, got nan"),
    ],
)
def test_a_bad_action_does_no_harm(tiny_world_model: Build, action: Any, message: str) -> None:
    model, actions = tiny_world_model(ACTION_DIM, reward=True), some_actions()
    session = walk(start(model), actions[:, :2])
    with pytest.raises(ValueError, match=message):
        session.step(action)
    assert_same(session, walk(start(model), actions[:, :2]))


def test_an_interrupted_step_was_not_taken(tiny_world_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, actions = tiny_world_model(ACTION_DIM, reward=True), some_actions()
    session = walk(start(model), actions[:, :2])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(session), "_frame", interrupt)  # all tokens are sampled by then
        with pytest.raises(KeyboardInterrupt):
            session.step(actions[:, 2])
    assert_same(walk(session, actions[:, 2:4]), walk(start(model), actions[:, :4]))


@pytest.mark.parametrize("steps", [3, -1, 1.0, True])
def test_bad_rewind(tiny_world_model: Build, steps: Any) -> None:
    session = walk(start(tiny_world_model(ACTION_DIM, reward=True)), some_actions(2))
    with pytest.raises(ValueError, match=f"cannot rewind {steps} steps: 2 were taken and 2 are kept"):
        session.rewind(steps)
    assert session.frames.shape[1] == 4


def test_use_after_close(tiny_world_model: Build) -> None:
    with start(tiny_world_model(ACTION_DIM, reward=True)) as session:
        session.step(torch.zeros(2, ACTION_DIM))
        fork = session.fork()
    assert session.closed
    for use in (lambda: session.step(torch.zeros(2, ACTION_DIM)), session.fork, session.rewind):
        with pytest.raises(ValueError, match="session is closed"):
            use()
    session.close()
    assert session.frames.shape[1] == 3
    fork.step(torch.zeros(2, ACTION_DIM))  # outlives what it came from


def test_bad_context(tiny_world_model: Build) -> None:
    model = tiny_world_model()
    with pytest.raises(ValueError, match="takes 2 context frames, got 1"):
        model.session(clip()[:, :1])
    with pytest.raises(ValueError, match="temperature"):
        model.session(clip(), temperature=-1.0)


def test_training_mode_is_kept(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    expected = walk(start(model, temperature=0), some_actions(2)).tokens
    model.train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    assert torch.equal(walk(start(model, temperature=0), some_actions(2)).tokens, expected)
    assert all(module.training for module in model.modules())
