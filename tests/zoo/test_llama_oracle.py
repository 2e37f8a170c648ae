"""Checkpoints of other shapes than the published ones, written by transformers, against its LLaMA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ivideogpt.world_model import WorldModel

transformers = pytest.importorskip("transformers")

CASES: dict[str, dict[str, Any]] = {
    "grouped-query attention": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "one key/value head, wide heads": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
    "rope base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "norm epsilon, three layers": {"rms_norm_eps": 1e-2, "num_hidden_layers": 3},
}


@pytest.mark.parametrize("old_style", [False, True], ids=["transformers 5 fields", "transformers 4 fields"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(checkpoint: Callable[..., Any], case: str, old_style: bool) -> None:
    saved = checkpoint(codebook_size=40, dynamics_codebook_size=24, action_dim=3 if old_style else None)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 66, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 256, **CASES[case],
        },
        attn_implementation="eager",
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    write_transformer(saved.folder, llama, old_style)

    model = WorldModel.from_pretrained(saved.folder)
    tokens = torch.randint(0, 66, (2, model.layout.sequence_length(4)))
    actions = torch.randn(2, 4, 3) if old_style else None
    with torch.no_grad():
        embeddings = llama.get_input_embeddings()(tokens)
        if actions is not None:
            assert model.transformer.action_linear is not None
            embeddings[:, model.layout.slot_positions(2)] += model.transformer.action_linear(actions[:, 1:3])
        expected = llama(inputs_embeds=embeddings).logits
        found = model(tokens, actions).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def write_transformer(folder: Path, llama: Any, old_style: bool) -> None:
    """Puts ``llama`` into ``folder``: alone, as an action-free model is, or in older fields beside an action layer."""
    fields = json.loads(llama.config.to_json_string())
    tensors = {name: tensor.contiguous() for name, tensor in llama.state_dict().items()}
    path = folder / "transformer" / "model.safetensors"
    if old_style:
        fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
        fields |= {"rope_scaling": None, "torch_dtype": "float32", "transformers_version": "4.44.2"}
        tensors = {f"llm.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {"action_linear.weight": torch.randn(32, 3), "action_linear.bias": torch.randn(32)}
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "transformer" / "config.json").write_text(json.dumps(fields))
