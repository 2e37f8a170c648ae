"""Starts a tokenizer from the weights of an image VQGAN, as the published 256-px one started from aMUSEd's.

The file is that of diffusers' VQModel, whose names of the parts are the same. Context encoder, decoder and codebook
get its weights, and the conditional encoder and decoder those of the layers that they share with the others; what they
have beside them (attention), the patch layers and the dynamics codebook stay fresh.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.zoo.tensors import listed, read_header, read_tensors

FILE = "diffusion_pytorch_model.safetensors"
_PLACES = (FILE, f"vqvae/{FILE}")
_TAKEN = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
_SHARED = {"encoder.": "cond_encoder.", "decoder.": "cond_decoder."}


def find_vq_weights(source: str | os.PathLike[str]) -> Path:
    """The weight file of an image VQGAN: a file, a folder that holds one, or a Hub repository such as a pipeline's.

    Raises:
        ValueError: if there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        found = next((path / place for place in _PLACES if (path / place).is_file()), None)
        if found is None:
            raise ValueError(f"{path} holds no VQGAN: there is no {' or '.join(_PLACES)}")
        return found
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    errors: list[EntryNotFoundError] = []
    try:
        for place in reversed(_PLACES):
            try:
                return Path(hf_hub_download(os.fspath(source), place, library_name="ivideogpt"))
            except EntryNotFoundError as error:
                errors.append(error)
    except HFValidationError as error:
        raise ValueError(f"there is no VQGAN at {source!r}: no file, no folder, and no Hub id ({error})") from error
    except OSError as error:
        raise ValueError(f"the VQGAN {source!r} cannot be fetched: {error}") from error
    said = "; ".join(dict.fromkeys(str(error).splitlines()[0] for error in errors))
    if any(isinstance(error, LocalEntryNotFoundError) for error in errors):
        raise ValueError(f"the VQGAN {source!r} cannot be fetched: {said}")
    raise ValueError(f"{source!r} holds no VQGAN: {said}")


@torch.no_grad()
def start_from_vq_weights(tokenizer: CompressiveTokenizer, source: str | os.PathLike[str]) -> None:
    """Gives a tokenizer the weights of an image VQGAN of the same sizes.

    Args:
        tokenizer: fresh.
        source: see :func:`find_vq_weights`.

    Raises:
        ValueError: if the file is no such VQGAN; nothing is changed then.
    """
    header = read_header(find_vq_weights(source))
    state = tokenizer.state_dict()
    targets: dict[str, list[str]] = {}
    for name in header.shapes:
        targets[name] = [name]
        for own, conditional in _SHARED.items():
            if name.startswith(own):
                targets[name].append(conditional + name.removeprefix(own))
    wanted = [name for name in state if name.startswith(_TAKEN)]
    missing = [name for name in wanted if name not in header.shapes]
    extra = [name for name in header.shapes if name not in state]
    misshaped = [
        f"{target} is {tuple(state[target].shape)} and there {shape}"
        for name, shape in header.shapes.items()
        for target in targets[name]
        if target in state and tuple(state[target].shape) != shape
    ]
    problems = [
        f"{what}: {listed(names)}"
        for what, names in (("missing", missing), ("not of this tokenizer", extra), ("of another size", misshaped))
        if names
    ]
    if problems:
        raise ValueError(f"{header.path} is no VQGAN of this tokenizer's sizes; {'; '.join(problems)}")
    device = next(tokenizer.parameters()).device
    for name, tensor in read_tensors(header, device, None).items():
        for target in targets[name]:
            if target in state:
                state[target].copy_(tensor)
