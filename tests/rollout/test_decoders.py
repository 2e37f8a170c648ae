"""Decoders in torch, op by op and in fixed buffers as a CUDA graph needs them: the module's own hidden states."""

import gc
from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from torch import Tensor

from ivideogpt.config import TransformerConfig
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout import workspace
from ivideogpt.rollout.cache import KVCache, Prefix
from ivideogpt.rollout.fused import TorchDecoder
from ivideogpt.rollout.graphs import GraphDecoder
from ivideogpt.rollout.sampling import Sampling, sample_token
from ivideogpt.rollout.workspace import GraphBranch

VOCAB = 50
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.inference_mode():
        yield


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(seed: int = 0, device: str = "cpu", **changes: Any) -> Transformer:
    fields: dict[str, Any] = dict(
        vocab_size=VOCAB, num_layers=2, num_heads=4, embed_dim=64, mlp_dim=80, max_positions=128, action_dim=3
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(TransformerConfig(**{**fields, **changes}))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(device).eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=seeded(seed))


def uncached(model: Transformer, context: Tensor, own: Tensor, actions: dict[int, Tensor]) -> Tensor:
    """Hidden states of the own positions, from one pass over everything."""
    tokens = torch.cat([context.repeat_interleave(len(own) // len(context), dim=0), own], dim=1)
    embeddings = model.embed(tokens).clone()
    for position, action in actions.items():
        embeddings[:, context.shape[1] + position] += model.embed_actions(action)
    return model.backbone(embeddings)[:, context.shape[1] :]


VARIANTS: list[Any] = [
    pytest.param({}, id="plain"),
    pytest.param({"num_kv_heads": 2}, id="grouped"),
    pytest.param({"num_kv_heads": 1, "attention_bias": True, "mlp_bias": True}, id="one-kv-head-biases"),
    pytest.param({"rope_base": 500.0, "head_dim": 8, "norm_eps": 1e-3}, id="other-rope-head-eps"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [TorchDecoder, GraphDecoder])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("clips", "samples"), [(1, 1), (2, 1), (1, 5), (2, 3)])
def test_fed_in_parts_equals_one_pass(
    kind: type[TorchDecoder], variant: dict[str, Any], clips: int, samples: int, device: str
) -> None:
    model = build(device=device, **variant)
    rows = clips * samples
    context, own = ids(clips, 20).to(device), ids(rows, 9, seed=1).to(device)
    first, second = (torch.randn(rows, 3, generator=seeded(seed)).to(device) for seed in (2, 3))
    decoder = kind(model, "float32")
    branch = decoder.branch(decoder.prefill(context), samples, 12)
    parts = [
        decoder.feed(branch, own[:, :1], first),
        decoder.feed(branch, own[:, 1:2]),
        decoder.feed(branch, own[:, 2:5], second),
        decoder.feed(branch, own[:, 5:]),
    ]
    expected = uncached(model, context, own, {0: first, 4: second})
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=2e-4, rtol=1e-4)
    assert branch.length == 9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [TorchDecoder, GraphDecoder])
@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(1.0, 5), Sampling(0.8, None), Sampling(1.0, 5, first_id=10, last_id=39)]
)
def test_sample_is_feeding_and_drawing(kind: type[TorchDecoder], sampling: Sampling, device: str) -> None:
    model = build(device=device)
    context, lead = ids(2, 20).to(device), ids(6, 2, seed=1).to(device)
    actions, chance = (torch.rand(6, n, generator=seeded(n)).to(device) for n in (3, 4))
    decoder = kind(model, "float32")
    branch = decoder.branch(decoder.prefill(context), 3, 20)
    for _ in range(2):  # behind something and in front of something
        start = branch.length
        sampled = decoder.sample(branch, lead, actions, chance, sampling)
        assert branch.length == start + 5
        branch.length = start
        hidden = decoder.feed(branch, lead, actions)
        torch.testing.assert_close(sampled.hidden, hidden, atol=1e-4, rtol=1e-4)
        for index in range(4):
            drawn = sample_token(decoder.logits(hidden[:, -1], sampling), chance[:, index], sampling)
            assert torch.equal(drawn, sampled.tokens[:, index])
            if index < 3:
                hidden = decoder.feed(branch, drawn[:, None])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [TorchDecoder, GraphDecoder])
def test_forks_and_rewinds_go_their_own_ways(kind: type[TorchDecoder], device: str) -> None:
    model, decoder = build(device=device), None
    context = ids(2, 20).to(device)
    decoder = kind(model, "float32")
    prefix = decoder.prefill(context)
    branch = decoder.branch(prefix, 1, 12)
    one, two, three = (ids(2, 4, seed=seed).to(device) for seed in (1, 2, 3))
    decoder.feed(branch, one)
    fork = branch.fork()
    unused = fork.fork()
    first = decoder.feed(fork, two)
    second = decoder.feed(branch, three)
    torch.testing.assert_close(decoder.feed(unused, two), first, atol=1e-5, rtol=1e-5)
    expected = uncached(model, context, torch.cat([one, two], dim=1), {})[:, 4:]
    torch.testing.assert_close(first, expected, atol=2e-4, rtol=1e-4)
    expected = uncached(model, context, torch.cat([one, three], dim=1), {})[:, 4:]
    torch.testing.assert_close(second, expected, atol=2e-4, rtol=1e-4)
    fork.length = 2
    again = decoder.feed(fork, torch.cat([one[:, 2:], three], dim=1))[:, 2:]
    torch.testing.assert_close(again, second, atol=1e-4, rtol=1e-4)
    # another branch of the same prefix starts from nothing
    fresh = decoder.branch(prefix, 1, 12)
    torch.testing.assert_close(
        decoder.feed(fresh, one), uncached(model, context, one, {}), atol=2e-4, rtol=1e-4
    )  # fmt: skip


def test_a_workspace_serves_the_next_prefix() -> None:
    model = build()
    decoder = GraphDecoder(model, "float32")
    own = ids(2, 5, seed=4)
    for seed in range(6):
        context = ids(2, 20, seed=seed)
        branch = decoder.branch(decoder.prefill(context), 1, 12)
        torch.testing.assert_close(
            decoder.feed(branch, own), uncached(model, context, own, {}), atol=2e-4, rtol=1e-4
        )  # fmt: skip
        del branch
    assert len(decoder._workspaces.all) == 1
    held = [decoder.branch(decoder.prefill(ids(2, 20)), 1, 12) for _ in range(3)]
    assert len({id(branch.workspace) for branch in held}) == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [TorchDecoder, GraphDecoder])
def test_a_branch_at_rest_goes_on_as_if_it_had_not_been(kind: type[TorchDecoder], device: str) -> None:
    model = build(device=device)
    decoder = kind(model, "float32")
    contexts = [ids(2, 20, seed=seed).to(device) for seed in range(3)]
    one, two, three = (ids(2, 4, seed=seed).to(device) for seed in (1, 2, 3))
    branch = decoder.branch(decoder.prefill(contexts[0]), 1, 12)
    decoder.feed(branch, one)
    branch.rest()
    branch.rest()
    for context in contexts[1:]:  # others are in its place meanwhile
        other = decoder.branch(decoder.prefill(context), 1, 12)
        expected = uncached(model, context, two, {})
        torch.testing.assert_close(decoder.feed(other, two), expected, atol=2e-4, rtol=1e-4)
        other.rest()
    fork, later = branch.fork(), branch.fork()
    for continued, own in ((fork, two), (branch, three), (later, three)):
        expected = uncached(model, contexts[0], torch.cat([one, own], dim=1), {})[:, 4:]
        torch.testing.assert_close(decoder.feed(continued, own), expected, atol=2e-4, rtol=1e-4)
    other.length = 0
    torch.testing.assert_close(
        decoder.feed(other, one), uncached(model, contexts[2], one, {}), atol=2e-4, rtol=1e-4
    )  # fmt: skip


def test_branches_at_rest_need_no_workspace() -> None:
    decoder = GraphDecoder(build(), "float32")
    resting = []
    for seed in range(5):
        branch = decoder.branch(decoder.prefill(ids(1, 20, seed=seed)), 1, 12)
        decoder.feed(branch, ids(1, 3))
        branch.rest()
        resting.append(branch)
    assert len(decoder._workspaces.all) == 1
    assert resting[0].workspace is decoder._workspaces.all[0]  # which is taken from here on
    resting[1].fork()
    assert len(decoder._workspaces.all) == 2


def test_a_rest_without_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = GraphDecoder(build(), "float32")
    branch = decoder.branch(decoder.prefill(ids(1, 20)), 1, 12)
    decoder.feed(branch, ids(1, 3))
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "Prefix", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            branch.rest()
    decoder.feed(branch, ids(1, 4, seed=1))
    model, own = build(), torch.cat([ids(1, 3), ids(1, 4, seed=1), ids(1, 2, seed=2)], dim=1)
    expected = uncached(model, ids(1, 20), own, {})[:, 7:]
    torch.testing.assert_close(decoder.feed(branch.fork(), own[:, 7:]), expected, atol=2e-4, rtol=1e-4)


def test_who_left_a_workspace_is_not_saved_from_it() -> None:
    model, context = build(), ids(1, 20)
    decoder = GraphDecoder(model, "float32")
    branch = decoder.branch(decoder.prefill(context), 1, 12)
    one, two, three, four = (ids(1, 3, seed=seed) for seed in range(1, 5))
    decoder.feed(branch, one)
    stays = branch.fork()
    branch.rest()
    decoder.feed(branch, two)  # in another place
    decoder.feed(stays, three)
    for fork, own in ((branch.fork(), [one, two, four]), (stays.fork(), [one, three, four])):
        expected = uncached(model, context, torch.cat(own, dim=1), {})[:, 6:]
        torch.testing.assert_close(decoder.feed(fork, four), expected, atol=2e-4, rtol=1e-4)


def test_nobody_marks_buffers_that_he_has_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another stream the mark would hide work that is still under way."""
    decoder = GraphDecoder(build(), "float32")
    branch = decoder.branch(decoder.prefill(ids(1, 20)), 1, 12)
    decoder.feed(branch, ids(1, 3))
    order: list[str] = []
    monkeypatch.setattr(workspace.Workspace, "wait", lambda self: order.append("wait"))
    monkeypatch.setattr(workspace.Workspace, "mark", lambda self: order.append("mark"))
    for use in (branch.rest, branch.fork, branch.fork, lambda: decoder.feed(branch, ids(1, 1)), branch.fork):
        order.clear()
        use()
        assert order[0] == "wait" and order[-1] == "mark", order


def no_memory(*args: Any) -> Any:
    raise torch.OutOfMemoryError("no room")


def test_a_workspace_forgets_what_was_not_finite() -> None:
    model = build()
    decoder = GraphDecoder(model, "float32")
    own = ids(2, 5, seed=4)
    branch = decoder.branch(decoder.prefill(ids(2, 20)), 1, 12)
    assert decoder.feed(branch, own, torch.full((2, 3), float("nan"))).isnan().any()
    del branch
    branch = decoder.branch(decoder.prefill(ids(2, 20)), 1, 12)
    assert decoder.feed(branch, own).isfinite().all()


def test_captures_do_not_pile_up() -> None:
    decoder = GraphDecoder(build(), "float32")
    branch = decoder.branch(decoder.prefill(ids(1, 20)), 1, 12)
    for step in range(40):
        branch.length = 0
        decoder.sample(branch, ids(1, 1), None, torch.zeros(1, 2), Sampling(1.0 + step))
    assert len(branch.workspace.frames) <= 20


@pytest.mark.parametrize("kind", [TorchDecoder, GraphDecoder])
def test_the_prefix_is_not_repeated_for_the_samples(kind: type[TorchDecoder]) -> None:
    decoder = kind(build(), "float32")
    prefix = decoder.prefill(ids(1, 60))
    branch = decoder.branch(prefix, 500, 3)
    cache = getattr(branch, "workspace", None)
    cache = branch if cache is None else cache.cache
    assert cache.prefix.keys.shape == (2, 1, 4, 60, 16)
    assert cache.keys.shape == (2, 500, 4, 3, 16)


def test_bfloat16_is_close() -> None:
    model = build()
    context, own = ids(2, 20), ids(2, 6, seed=1)
    exact, rounded = (TorchDecoder(model, precision) for precision in ("float32", "bfloat16"))
    hidden = [decoder.feed(decoder.branch(decoder.prefill(context), 1, 6), own) for decoder in (exact, rounded)]
    assert rounded.bytes_per_step * 2 == exact.bytes_per_step
    torch.testing.assert_close(hidden[1], hidden[0], atol=0.3, rtol=0.1)
    assert hidden[1].dtype == torch.float32


def test_decoders_own_their_weights() -> None:
    model = build()
    decoder = TorchDecoder(model, "float32")
    branch = decoder.branch(decoder.prefill(ids(1, 20)), 1, 3)
    before = decoder.feed(branch, ids(1, 3))
    for parameter in model.parameters():
        parameter.zero_()
    branch.length = 0
    assert torch.equal(decoder.feed(branch, ids(1, 3)), before)


def test_no_room_is_an_assertion() -> None:
    for kind in (TorchDecoder, GraphDecoder):
        decoder = kind(build(), "float32")
        branch = decoder.branch(decoder.prefill(ids(1, 20)), 1, 3)
        with pytest.raises(AssertionError):
            decoder.feed(branch, ids(1, 4))


def test_every_golden_logit(golden: Callable[[str], Any]) -> None:
    import ivideogpt

    recorded = golden("bair-64-act-cond")
    model = ivideogpt.from_pretrained(recorded.folder)
    tokens, layout = recorded.tensors["tokens"], model.layout
    decoder = TorchDecoder(model.transformer, "float32")
    future = layout.num_frames(tokens.shape[1]) - layout.context_length
    branch = decoder.branch(decoder.prefill(tokens[:, : layout.context_span]), 1, layout.frame_stride * future)
    frames = tokens[:, layout.context_span :].unflatten(1, (future, -1))
    actions = layout.slot_actions(recorded.tensors["actions"], future)
    logits = []
    for index in range(future):
        for states in (
            decoder.feed(branch, frames[:, index, :1], actions[:, index]),
            decoder.feed(branch, frames[:, index, 1:]),
        ):
            logits.append(decoder.logits(states, Sampling()))
    expected = recorded.tensors["logits_last64"]
    torch.testing.assert_close(torch.cat(logits, dim=1)[:, -64:], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [TorchDecoder, GraphDecoder])
def test_a_decoder_goes_with_its_last_user(kind: type[TorchDecoder]) -> None:
    """At once, not when Python next looks for cycles: weights that change would pile up on a GPU."""
    gc.disable()
    try:
        decoder = kind(build(), "float32")
        branch: Any = decoder.branch(decoder.prefill(ids(1, 20)), 1, 12)
        decoder.sample(branch, ids(1, 1), None, torch.zeros(1, 2), Sampling())
        gone = ref(decoder)
        del decoder
        assert gone() is None
        if isinstance(branch, GraphBranch):
            buffers = ref(branch.workspace.cache.keys)
            del branch
            assert buffers() is None
    finally:
        gc.enable()


def test_what_waits_for_branches_counts_as_free() -> None:
    decoder = GraphDecoder(build(), "float32")
    prefix = decoder.prefill(ids(2, 20))
    branch = decoder.branch(prefix, 3, 12)
    assert decoder.idle_bytes == 0
    own = branch.workspace.cache.keys.nbytes + branch.workspace.cache.values.nbytes
    del branch
    assert decoder.idle_bytes == own


def test_workspaces_are_given_up_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = GraphDecoder(build(), "float32")
    prefix = decoder.prefill(ids(1, 20))
    decoder.branch(prefix, 3, 12)  # gone at once, its workspace stays
    made: list[int] = []
    tried: list[ReferenceType[Tensor]] = []
    left: list[object] = []

    class Tight(KVCache):
        def __init__(self, prefix: Prefix, samples: int, capacity: int) -> None:
            made.append(len(decoder._workspaces.all))
            tried.append(ref(prefix.keys))
            if decoder._workspaces.all:
                raise torch.OutOfMemoryError("no room")
            super().__init__(prefix, samples, capacity)

    monkeypatch.setattr(workspace, "KVCache", Tight)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.extend(tensor() for tensor in tried))
    branch = decoder.branch(prefix, 4, 12)
    assert left == [None]  # nothing of the first try is there while the second one is made
    assert made == [1, 0] and decoder._workspaces.all == [branch.workspace]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_models_on_two_gpus() -> None:
    """Whichever is the current one, and whichever was captured on first."""
    expected = None
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        decoder = GraphDecoder(build(device=device), "float32")
        branch = decoder.branch(decoder.prefill(ids(1, 20).to(device)), 1, 12)
        for seed in (1, 2, 1):  # captured, replayed
            branch.length = 0
            hidden = decoder.feed(branch, ids(1, 3, seed=seed).to(device)).cpu()
        expected = hidden if expected is None else expected
        torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
