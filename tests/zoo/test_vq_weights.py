"""Tokenizers that start from the weights of an image VQGAN; the oracle is diffusers' own VQModel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.recipes.parts import PartBuilder, check_initial_weights, check_part
from ivideogpt.zoo.vq_weights import FILE, find_vq_weights, start_from_vq_weights


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small VQModel of diffusers with random weights, and the folder of a pipeline that it was saved in."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.VQModel(
        block_out_channels=(8, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, num_vq_embeddings=32,
        norm_num_groups=4, sample_size=32, mid_block_add_attention=False, lookup_from_codebook=True,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(model.quantize.embedding.weight)
    folder = tmp_path_factory.mktemp("pipeline")
    model.save_pretrained(folder / "vqvae")
    return model, folder


@pytest.fixture
def tokenizer(tiny_config: Callable[..., Any]) -> CompressiveTokenizer:
    torch.manual_seed(1)
    return CompressiveTokenizer(tiny_config().tokenizer).eval()


@torch.no_grad()
def test_context_frames_are_those_of_the_vqgan(vqgan: tuple[Any, Path], tokenizer: CompressiveTokenizer) -> None:
    model, folder = vqgan
    start_from_vq_weights(tokenizer, folder)
    frames = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    indices, _ = tokenizer.encode_context(frames)
    _, _, (_, _, expected) = model.quantize(model.encode(frames.flatten(0, 1)).latents)  # frames in [0, 1], as aMUSEd's
    wanted = expected.view(2, 2, -1)
    assert torch.equal(indices.view(2, 2, -1), wanted)
    assert len(wanted.unique()) > 3
    decoded, _ = tokenizer.decode_context(indices)
    theirs = model.decode(wanted.flatten(), force_not_quantize=True, shape=(4, 8, 8, 4)).sample
    torch.testing.assert_close(decoded.flatten(0, 1), theirs, rtol=1e-4, atol=1e-4)


def test_what_is_shared_and_what_stays_fresh(vqgan: tuple[Any, Path], tokenizer: CompressiveTokenizer) -> None:
    model, folder = vqgan
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    start_from_vq_weights(tokenizer, folder / "vqvae" / FILE)
    after, given = tokenizer.state_dict(), model.state_dict()
    for name, value in given.items():
        assert torch.equal(after[name], value)
        conditional = f"cond_{name}"
        if name.startswith(("encoder.", "decoder.")):
            assert torch.equal(after[conditional], value)
    fresh = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert any("cross_att_blocks" in name for name in fresh)
    assert {"dynamics_quantize.embedding.weight", "quant_linear.weight", "post_quant_linear.weight"} <= fresh


def test_other_sizes_change_nothing(vqgan: tuple[Any, Path], tokenizer: CompressiveTokenizer, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    tensors = load_file(vqgan[1] / "vqvae" / FILE)
    path = tmp_path / "other.safetensors"
    for change, says in (
        (
            {"quantize.embedding.weight": torch.zeros(16, 4)},
            r"of another size: quantize\.embedding\.weight is \(32, 4\)",
        ),
        ({"encoder.more.weight": torch.zeros(2)}, r"not of this tokenizer: encoder\.more\.weight"),
    ):
        save_file({**tensors, **change}, path)
        with pytest.raises(ValueError, match=says):
            start_from_vq_weights(tokenizer, path)
    save_file({name: value for name, value in tensors.items() if name != "decoder.conv_in.bias"}, path)
    with pytest.raises(ValueError, match=r"missing: decoder\.conv_in\.bias"):
        start_from_vq_weights(tokenizer, path)
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "diffusion_pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="holds no VQGAN"):
        find_vq_weights(tmp_path / "pickle")
    with pytest.raises(ValueError, match="no file, no folder, and no Hub id"):
        find_vq_weights("no/such/thing")


def test_in_a_recipe(vqgan: tuple[Any, Path], tiny_config: Callable[..., Any]) -> None:
    fields = {name: getattr(tiny_config().tokenizer, name) for name in (
        "resolution", "layers_per_block", "latent_channels", "norm_num_groups", "codebook_size",
        "dynamics_codebook_size", "max_attention_resolution")}  # fmt: skip
    spec = {**fields, "block_channels": [8, 32, 32], "initial_weights": str(vqgan[1])}
    check_part("tokenizer", spec, "tokenizer")
    check_initial_weights(spec, "tokenizer")
    built = PartBuilder({}).build("tokenizer", spec, "tokenizer")
    assert torch.equal(built.encoder.conv_in.weight, vqgan[0].encoder.conv_in.weight)
    with pytest.raises(ValueError, match=r"tokenizer\.initial_weights: .*holds no VQGAN"):
        check_initial_weights({**spec, "initial_weights": str(vqgan[1].parent)}, "tokenizer")
    fresh = {**spec, "initial_weights": None}  # as a command line takes it away
    check_part("tokenizer", fresh, "tokenizer")
    check_initial_weights(fresh, "tokenizer")
    assert not torch.equal(
        PartBuilder({}).build("tokenizer", fresh, "x").encoder.conv_in.weight, built.encoder.conv_in.weight
    )
    with pytest.raises(ValueError, match="must name a file, a folder or a Hub id, got 3"):
        check_part("tokenizer", {**spec, "initial_weights": 3}, "tokenizer")
    with pytest.raises(ValueError, match="unknown key 'initial_weights'"):
        check_part("transformer", {"preset": "nano", "initial_weights": "x"}, "transformer")
