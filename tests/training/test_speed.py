"""What makes training fast changes nothing else: compiled blocks, one-kernel AdamW, formats, what is computed again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivideogpt import from_pretrained
from ivideogpt.models import processor
from ivideogpt.models.autoencoder import ResidualBlock
from ivideogpt.models.discriminator import PatchDiscriminator
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import padded_logits, project
from ivideogpt.rollout.cpu import why_unavailable
from ivideogpt.training import TokenizerModule, TransformerModule
from ivideogpt.training.frozen_tokenizer import FrozenTokenizer
from ivideogpt.training.optim import adamw

COMPILING = pytest.mark.filterwarnings(
    # torch reads a gradient while it traces, and silences the warning itself where warnings are no errors
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor",
    "ignore:.torch.jit.script:DeprecationWarning",  # inside torch 2.11
)


def video(frames: int = 5, size: int = 32) -> Tensor:
    return torch.rand(2, frames, 3, size, size, generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of all parameters that have one."""
    model.zero_grad()
    torch.manual_seed(0)
    value = loss()
    value.backward()
    return value.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("has", [False, True])
def test_bfloat16_is_warned_of_where_it_is_slow(
    has: bool, machine: str, precision: str, tiny_world_model, data, trainer, monkeypatch
) -> None:
    monkeypatch.setattr(processor, "has_bfloat16_products", lambda: has)
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    model = tiny_world_model(action_dim=3)
    module = TransformerModule(model.transformer, model.tokenizer, warmup_updates=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_steps=1, precision=precision).fit(module, datamodule=data())
    said = [
        str(warning.message) for warning in caught if "no instructions for products of bfloat16" in str(warning.message)
    ]
    slow = not has and machine == "x86_64" and precision != "32-true"
    assert len(said) == slow
    assert all(f"trainer.precision={precision}" in text and "32-true" in text for text in said)


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=needs_gpu)])
@pytest.mark.parametrize("kind", ["transformer", "tokenizer", "critic"])
def test_gradients_are_clipped_in_mixed_precision(kind: str, accelerator: str, tiny_world_model, data, trainer) -> None:
    model = tiny_world_model(action_dim=3)
    if kind == "transformer":
        module: Any = TransformerModule(model.transformer, model.tokenizer, gradient_clip=1e-3, warmup_updates=0)
    else:
        critic = PatchDiscriminator(base_channels=8, num_layers=2) if kind == "critic" else None
        module = TokenizerModule(
            model.tokenizer, perceptual_weight=0.0, discriminator=critic, discriminator_start=0, gradient_clip=1e-3
        )
    norms: list[float] = []
    finish = module.finish_gradients

    def finishing(optimizers: Any, *args: Any) -> bool:
        good = finish(optimizers, *args)
        for optimizer in optimizers:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return good

    module.finish_gradients = finishing
    fit = trainer(max_steps=2, precision="bf16-mixed", limit_val_batches=0, accelerator=accelerator, devices=1)
    fit.fit(module, datamodule=data())
    assert len(norms) >= 2 and max(norms) <= 1.01e-3


def test_adamw_is_one_kernel_and_makes_the_same_updates(tiny_world_model) -> None:
    first, second = tiny_world_model(action_dim=3), tiny_world_model(action_dim=3)
    second.load_state_dict(first.state_dict())
    fused = adamw([first.transformer], 1e-2, 0.01, (0.9, 0.999))
    assert fused.defaults["fused"] is True
    plain = adamw([second.transformer], 1e-2, 0.01, (0.9, 0.999))
    for group in plain.param_groups:
        group["fused"] = False
    for _ in range(4):
        for one, other in zip(first.transformer.parameters(), second.transformer.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        fused.step()
        plain.step()
    for one, other in zip(first.transformer.parameters(), second.transformer.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_norms_are_computed_again_and_convolutions_are_not(tiny_world_model) -> None:
    tokenizer: CompressiveTokenizer = tiny_world_model().tokenizer.train()
    clip = video()

    def loss() -> Tensor:
        output = tokenizer(clip[:, :2], clip[:, 2:])
        return output.future_reconstruction.square().mean() + output.context_reconstruction.square().mean()

    block = next(module for module in tokenizer.modules() if isinstance(module, ResidualBlock))
    calls: list[str] = []
    block.norm1.register_forward_hook(lambda *_: calls.append("norm"))
    block.conv1.register_forward_hook(lambda *_: calls.append("convolution"))
    kept, expected = gradients(tokenizer, loss)
    assert calls == ["norm", "convolution"]
    calls.clear()
    tokenizer.save_memory()
    value, found = gradients(tokenizer, loss)
    assert calls == ["norm", "convolution", "norm"]  # the second convolution stops before it computes
    assert torch.equal(value, kept)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    tokenizer.save_memory(False)
    calls.clear()
    gradients(tokenizer, loss)
    assert calls == ["norm", "convolution"]


def test_a_trained_tokenizer_is_channels_last_and_its_state_the_same(tiny_world_model, data, trainer) -> None:
    tokenizer = tiny_world_model().tokenizer
    names = list(tokenizer.state_dict())
    module = TokenizerModule(tokenizer, perceptual_weight=0.0)
    trainer(max_steps=1).fit(module, datamodule=data(use_actions=False, use_rewards=False))
    weight = tokenizer.encoder.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert list(tokenizer.state_dict()) == names


def test_a_frozen_tokenizer_in_bfloat16_gives_nearly_the_same_ids_and_stays_as_it_is() -> None:
    wm = from_pretrained("ivideogpt-metaworld-nano")
    from ivideogpt.data import ShardSet

    episode = ShardSet("embedded:heldout").episode(0)
    assert episode is not None
    clip = torch.from_numpy(episode.video[:8].copy()).permute(0, 3, 1, 2)[None].float() / 255
    with torch.no_grad():
        expected = wm.tokenizer.encode(clip)
    before = copy.deepcopy(wm.tokenizer.state_dict())
    module = TransformerModule(wm.transformer, wm.tokenizer, tokenizer_precision="bfloat16")
    names = list(module.state_dict())
    found = module.tokenize({"video": clip})
    assert found.shape == expected.shape and found.dtype == expected.dtype
    share = (found == expected).float().mean()
    assert 0.9 < share < 1.0  # of another precision indeed
    assert list(module.state_dict()) == names  # the copy is in no checkpoint
    assert all(torch.equal(value, before[name]) for name, value in wm.tokenizer.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in wm.tokenizer.parameters())
    exact = TransformerModule(wm.transformer, wm.tokenizer).tokenize({"video": clip})
    assert (exact == expected).float().mean() > 0.999
    with pytest.raises(ValueError, match="tokenizer_precision must be one of .* got 'float16'"):
        FrozenTokenizer(wm.tokenizer, "float16")  # type: ignore[arg-type]


@pytest.mark.slow
@COMPILING
def test_compiled_blocks_compute_the_same_under_the_same_names(tiny_world_model) -> None:
    import torch._dynamo

    model = tiny_world_model(action_dim=3, reward=True)
    clip = video()
    with torch.no_grad():
        tokens = model.tokenizer.encode(clip)
    batch: dict[str, Any] = {
        "video": clip,
        "tokens": tokens,
        "actions": torch.rand(2, 5, 3),
        "rewards": torch.rand(2, 5),
    }
    eager = TransformerModule(model.transformer, model.tokenizer, model.reward_head)
    names = list(eager.state_dict())

    def loss(module: TransformerModule) -> Tensor:
        return module.losses(module.predict_clip(batch), batch)["loss"]

    value, expected = gradients(eager, lambda: loss(eager))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = TransformerModule(model.transformer, model.tokenizer, model.reward_head, compile=True)
    assert list(module.state_dict()) == names
    compiled, found = gradients(module, lambda: loss(module))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4  # all blocks but the last, that one, head, loss
    torch.testing.assert_close(compiled, value, rtol=1e-5, atol=1e-6)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)

    copied = copy.deepcopy(module)  # as averaged weights are
    with torch.no_grad():
        for parameter in copied.transformer.parameters():
            parameter.zero_()
    changed, _ = gradients(copied, lambda: loss(copied))
    assert not torch.allclose(changed, compiled)
    again, _ = gradients(module, lambda: loss(module))
    torch.testing.assert_close(again, compiled)
    module.imagine(batch)  # rollouts are not compiled
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


@pytest.mark.slow
@COMPILING
def test_a_compiled_tokenizer_computes_the_same(tiny_world_model) -> None:
    tokenizer = tiny_world_model().tokenizer
    names, clip = list(tokenizer.state_dict()), video(4)
    for block in tokenizer.modules():  # random numbers come in another order from a compiled graph
        if hasattr(block, "dropout"):
            block.dropout = 0.0
        if isinstance(block, nn.Dropout):
            block.p = 0.0

    def loss(module: TokenizerModule) -> Tensor:
        context, future = module.split(clip)
        return module.losses(module.tokenizer(context, future), context, future)["loss"]

    eager = TokenizerModule(tokenizer, perceptual_weight=0.0)
    value, expected = gradients(eager, lambda: loss(eager))
    module = TokenizerModule(tokenizer, perceptual_weight=0.0, compile=True)
    compiled, found = gradients(module, lambda: loss(module))
    torch.testing.assert_close(compiled, value, rtol=1e-4, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-5)
    assert list(tokenizer.state_dict()) == names


def test_blocks_hand_on_bfloat16_and_the_loss_is_nearly_the_same(tiny_world_model) -> None:
    model = tiny_world_model()
    clip = video()
    seen: list[torch.dtype] = []
    model.transformer.layers[1].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].dtype))
    losses = []
    for precision in ("trainer", "bfloat16"):
        module = TransformerModule(model.transformer, model.tokenizer, residual_precision=precision)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(module.losses(module.predict_clip({"video": clip}), {})["loss"])
    assert seen == [torch.float32, torch.bfloat16]
    assert 0 < (losses[0] - losses[1]).abs() < 0.02 * losses[0]
    with pytest.raises(ValueError, match="residual_precision must be one of .* got 'half'"):
        TransformerModule(model.transformer, model.tokenizer, residual_precision="half")  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [False, True])
def test_projections_of_one_input_are_one_product_while_they_are_compiled(bias: bool, monkeypatch) -> None:
    layers = [nn.Linear(6, width, bias=bias) for width in (4, 2, 2)]
    x = torch.randn(3, 5, 6)
    expected = [layer(x) for layer in layers]
    products: list[tuple[int, ...]] = []
    linear = torch.nn.functional.linear

    def counted(*args: Tensor) -> Tensor:
        products.append(args[1].shape)
        return linear(*args)

    monkeypatch.setattr("torch.nn.functional.linear", counted)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    found = project(x, *layers)
    assert products == ([(4, 6), (2, 6), (2, 6)] if bias else [(8, 6)])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_padded_logits_are_the_logits() -> None:
    hidden, weight = torch.randn(2, 3, 8), torch.randn(70, 8, requires_grad=True)
    found = padded_logits(hidden, weight)
    torch.testing.assert_close(found, hidden @ weight.T)
    (gradient,) = torch.autograd.grad(found.square().sum(), weight)
    (expected,) = torch.autograd.grad((hidden @ weight.T).square().sum(), weight)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.slow
@needs_gpu
@pytest.mark.filterwarnings("ignore::UserWarning")  # hints of the compiler about float32 products and softmax
@COMPILING
def test_on_a_gpu_compiled_training_is_that_of_float32_but_for_rounding(tiny_world_model) -> None:
    model = tiny_world_model(action_dim=3, reward=True).to("cuda")
    clip = video().to("cuda")
    with torch.no_grad():
        tokens = model.tokenizer.encode(clip)
    batch: dict[str, Any] = {
        "tokens": tokens, "actions": torch.rand(2, 5, 3, device="cuda"), "rewards": torch.rand(2, 5, device="cuda"),
    }  # fmt: skip

    def loss(module: TransformerModule) -> Tensor:
        return module.losses(module.predict_clip(batch), batch)["loss"]

    parts = (model.transformer, model.tokenizer, model.reward_head)
    value, expected = gradients(model, lambda: loss(TransformerModule(*parts)))
    fast = TransformerModule(*parts, compile=True, tokenizer_precision="bfloat16", residual_precision="bfloat16")
    with torch.autocast("cuda", torch.bfloat16):
        found_value, found = gradients(model, lambda: loss(fast))
    torch.testing.assert_close(found_value, value, rtol=2e-2, atol=0)
    one, other = (torch.cat([gradient.flatten() for gradient in side]) for side in (found, expected))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.99
    assert (fast.tokenize({"video": clip}) == tokens).float().mean() > 0.5  # a random codebook is full of near ties


@pytest.mark.skipif(why_unavailable() is not None, reason=f"no compiled kernels: {why_unavailable()}")
def test_a_frozen_tokenizer_on_a_cpu_encodes_in_float32_by_kernels(tiny_world_model, monkeypatch) -> None:
    wm = tiny_world_model(block_channels=(64, 64, 64))
    clip, encoding = video(), []

    def encode(tokenizer: CompressiveTokenizer, clip: Tensor) -> Tensor:
        encoding.append(tokenizer is not wm.tokenizer)
        return plain(tokenizer, clip)

    with torch.no_grad():
        expected = wm.tokenizer.encode(clip)
    plain = CompressiveTokenizer.encode
    monkeypatch.setattr(CompressiveTokenizer, "encode", encode)
    module = TransformerModule(wm.transformer, wm.tokenizer)
    names = list(module.state_dict())
    assert (module.tokenize({"video": clip}) == expected).float().mean() > 0.99  # random entries are near each other
    with torch.autocast("cpu", torch.bfloat16):
        module.tokenize({"video": clip})
    FrozenTokenizer(wm.tokenizer, compile=True)(clip)
    assert encoding == [True, False, True]
    assert list(module.state_dict()) == names


@pytest.mark.slow
@needs_gpu
@pytest.mark.filterwarnings("ignore::UserWarning")  # hints of the compiler about float32 products and softmax
@COMPILING
def test_on_a_gpu_a_compiled_frozen_tokenizer_gives_nearly_the_same_ids() -> None:
    from ivideogpt.data import ShardSet

    wm = from_pretrained("ivideogpt-metaworld-nano", device="cuda")
    episode = ShardSet("embedded:heldout").episode(0)
    assert episode is not None
    clip = torch.from_numpy(episode.video[:8].copy()).permute(0, 3, 1, 2)[None].to("cuda").float() / 255
    with torch.no_grad():
        expected = wm.tokenizer.encode(clip)
    found = FrozenTokenizer(wm.tokenizer, "bfloat16", compile=True)(clip)
    assert (found == expected).float().mean() > 0.9
