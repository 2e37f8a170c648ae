"""Sessions: n steps equal a rollout of n; forks, rewinds and errors behave as documented."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt.rollout import Session

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
    before = session.frames
    with pytest.raises(ValueError, match="256 positions hold 25 future frames and all were used"):
        session.step(action)
    assert torch.equal(session.frames, before)
    session.rewind(2)
    assert session.horizon_left == 2
    session.step(action)


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
        patch.setattr(model.tokenizer, "decode_future", interrupt)  # all tokens are sampled by then
        with pytest.raises(KeyboardInterrupt):
            session.step(actions[:, 2])
    assert_same(walk(session, actions[:, 2:4]), walk(start(model), actions[:, :4]))


@pytest.mark.parametrize("steps", [3, -1, 1.0, True])
def test_bad_rewind(tiny_world_model: Build, steps: Any) -> None:
    session = walk(start(tiny_world_model(ACTION_DIM, reward=True)), some_actions(2))
    with pytest.raises(ValueError, match=f"cannot rewind {steps} steps: 2 were taken"):
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
