"""Optimizer parts of the training modules: weight-decay groups, learning-rate schedule, gradients of all processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["cosine", "constant"]

DECAYED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
"""Modules whose ``weight`` is a matrix or kernel, and so decays; everything else (embeddings, codebooks, norms,
position tables, biases) does not."""


FUSED = ("cpu", "cuda", "xpu", "mps")
"""Devices that torch updates weights on in one pass over weights, gradients and moments, in place of some six."""


MESSAGE = 2**24
"""Numbers that :func:`average_over_processes` sends at once: 64 MB of float32."""


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients of an optimizer's parameters, in their order."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@torch.no_grad()
def average_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its mean over all processes, which have the same ones: a few large messages."""
    processes = torch.distributed.get_world_size()
    message: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        message.append(tensor)
        following = tensors[index + 1] if index + 1 < len(tensors) else None
        same = following is not None and (following.dtype, following.device) == (tensor.dtype, tensor.device)
        if same and sum(part.numel() for part in message) < MESSAGE:
            continue
        flat = torch.cat([part.flatten() for part in message]).div_(processes)
        torch.distributed.all_reduce(flat)
        for part, mean in zip(message, flat.split([part.numel() for part in message]), strict=True):
            part.copy_(mean.view(part.shape))
        message = []


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters of ``modules`` into a decayed and an undecayed group, by module type.

    Raises:
        ValueError: if nothing is trainable.
    """
    modules = list(modules)
    decayed: dict[int, nn.Parameter] = {}
    undecayed: dict[int, nn.Parameter] = {}
    for root in modules:
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    decays = isinstance(module, DECAYED) and name == "weight"
                    (decayed if decays else undecayed)[id(parameter)] = parameter
    expected = {id(p) for root in modules for p in root.parameters() if p.requires_grad}
    both = decayed.keys() & undecayed.keys()
    assert not both, f"{len(both)} parameters stand in both weight-decay groups (shared by modules of different types)"
    assert decayed.keys() | undecayed.keys() == expected, "the weight-decay groups do not cover the parameters"
    if not expected:
        raise ValueError("nothing to train: every parameter is frozen; take a name out of `freeze`")
    groups = [
        {"params": list(decayed.values()), "weight_decay": weight_decay, "name": "decay"},
        {"params": list(undecayed.values()), "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in groups if group["params"]]


def learning_rate_factor(update: int, total: int, warmup: int, schedule: Schedule) -> float:
    """Multiplier of the learning rate at ``update`` (from 0): linear warm-up, then a cosine down to 0, or constant."""
    if update < warmup:
        return (update + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min((update - warmup) / max(total - warmup, 1), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def scheduler(optimizer: Optimizer, total: int, warmup: int, schedule: Schedule) -> LambdaLR:
    """Learning-rate schedule over ``total`` updates of which ``warmup`` rise linearly."""
    return LambdaLR(optimizer, lambda update: learning_rate_factor(update, total, warmup, schedule))


def schedules_of(configured: Any) -> list[LambdaLR]:
    """The schedules in what a module's ``configure_optimizers`` gives."""
    if isinstance(configured, dict):
        return [configured["lr_scheduler"]["scheduler"]]
    return list(configured[1])


def use_settings(schedules: Sequence[LambdaLR], fresh: Sequence[LambdaLR]) -> None:
    """Gives ``schedules``, and their optimizers, the learning rates and other settings of ``fresh`` ones.

    How far they have come, and what the optimizers have gathered, stays.
    """
    for schedule, new in zip(schedules, fresh, strict=True):
        schedule.base_lrs = new.base_lrs
        schedule._last_lr = [
            base * factor(schedule.last_epoch) for base, factor in zip(new.base_lrs, new.lr_lambdas, strict=True)
        ]
        groups = zip(schedule.optimizer.param_groups, new.optimizer.param_groups, schedule._last_lr, strict=True)
        for group, settings, rate in groups:
            group.update({name: value for name, value in settings.items() if name != "params"}, lr=rate)


def adamw(modules: Iterable[nn.Module], learning_rate: float, weight_decay: float, betas: tuple[float, float]) -> AdamW:
    """AdamW over the trainable parameters of ``modules``, in one kernel (``fused``) where torch has one for them."""
    groups = parameter_groups(modules, weight_decay)
    fused = all(p.device.type in FUSED and p.is_floating_point() for group in groups for p in group["params"])
    optimizer = AdamW(groups, lr=learning_rate, betas=betas, fused=fused or None)
    # Lightning refuses to clip where the kernel says that it unscales float16's gradients by itself
    optimizer._step_supports_amp_scaling = False
    return optimizer
