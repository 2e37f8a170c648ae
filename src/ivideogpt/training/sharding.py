"""Fully sharded training (FSDP2): weights, gradients and optimizer states are spread over all processes.

The models say themselves which of their modules are gathered together (``shard_units``) and which of their methods
compute (``shard_methods``); this file applies that, and keeps the checkpoints of such runs whole.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import get_total_norm

from ivideogpt.training.archives import check_archive, check_checksum, write_checksum

PLAIN, TABLE = "meta.pt", ".metadata"
"""Lightning's plain data in a sharded checkpoint, and torch's table of the tensors in the shards beside them."""


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's :class:`ModelParallelStrategy` over all processes, with checkpoints that are whole or not there.

    Each process writes its own shard; the checkpoint is a folder, which gets its name when all are written. It loads
    with any number of processes, and ``ivideogpt consolidate`` makes a model of it.

    Args:
        save_distributed_checkpoint: False gathers the state on the first process and writes one file.
        process_group_backend: None takes NCCL on GPUs and gloo elsewhere.
        timeout: seconds that a process waits for the others.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: float = 1800.0,
    ) -> None:
        super().__init__(
            data_parallel_size=1,  # until it is known how many processes there are
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )

    def setup_environment(self) -> None:
        """Joins the processes; all of them share the weights."""
        assert self.cluster_environment is not None
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves into a hidden folder, then renames it; on failure the checkpoints that were there stay.

        Raises:
            OSError: naming the folder, when it cannot be written.
        """
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, Path(filepath), storage_options)
            return
        target = Path(self.broadcast(filepath))
        partial = target.with_name(f".{target.name}.partial")
        if self.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        self.barrier()
        error: Exception | None = None
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
            if self.is_global_zero:
                write_checksum(partial / TABLE)
        except Exception as caught:  # torch wraps what failed on any process in errors of its own
            error = caught
        if self.reduce_boolean_decision(error is not None, all=False):  # a file that one process alone writes may fail
            if self.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            what = error or "another process could not write its part"
            raise OSError(f"cannot write the checkpoint {target}: {what}. Earlier checkpoints are whole") from error
        if self.is_global_zero:
            for path in [*partial.iterdir(), partial]:
                sync(path)
            remove_checkpoint(target)
            os.replace(partial, target)
            sync(target.parent)
        self.barrier()


def shard(parts: Sequence[nn.Module], mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    """Spreads the parameters of ``parts`` over the processes of ``mesh``.

    Args:
        parts: models that are trained. Each module of a model's ``shard_units`` is gathered when it is used, the rest
            of the model as a whole; ``shard_methods`` compute with it beside ``forward``.
        mesh: one-dimensional.
        dtype: that the weights are gathered in; as they are if None. Gradients are reduced in float32.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype else MixedPrecisionPolicy()
    for part in parts:
        for unit in getattr(part, "shard_units", ()):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(part, mesh=mesh, mp_policy=policy)
        for name in getattr(part, "shard_methods", ()):
            register_fsdp_forward_method(part, name)


def is_sharded(module: nn.Module) -> bool:
    """Whether weights of ``module`` are spread over processes, if only while nothing gathers them."""
    return bool(_sharded_modules(module))


def gather(module: nn.Module) -> None:
    """Gathers all weights of ``module`` until :func:`scatter`; all processes have to call it.

    A validation then needs no communication, and so may have other numbers of batches on the processes.
    """
    for part in _sharded_modules(module):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def scatter(module: nn.Module) -> None:
    """Undoes :func:`gather`."""
    for part in _sharded_modules(module):
        part.reshard()
        part.set_reshard_after_forward(True, recurse=False)


def _sharded_modules(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Norm of all gradients of ``parameters``, of all processes together where these share the weights."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.redistribute(placements=[Replicate()] * norm.device_mesh.ndim)
    return norm


def local(tensor: Tensor) -> Tensor:
    """A tensor that all processes have whole, as an ordinary one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sharded ``module`` with whole tensors on the CPU of the first process, empty on the others.

    All processes have to call it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return state


def read_sharded_checkpoint(path: Path, tensors: bool = True) -> dict[str, Any]:
    """The content of a sharded checkpoint as one that a single process would have written.

    Args:
        path: its folder. Its table of tensors is a pickle of torch's: read checkpoints of your own runs only.
        tensors: False reads the plain data alone, and the weights' and the optimizers' states are empty.

    Raises:
        ValueError: if files are missing, truncated or damaged: all checksums are compared.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    try:
        check_archive(path / PLAIN)
        plain: dict[str, Any] = torch.load(path / PLAIN, map_location="cpu", weights_only=True)
        check_checksum(path / TABLE)
        table = FileSystemReader(path).read_metadata()
        places: dict[str, list[tuple[int, int]]] = {}
        for info in (table.storage_data or {}).values():
            places.setdefault(info.relative_path, []).append((info.offset, info.length))
        for name, of_file in places.items():
            shard_file = path / name
            if not shard_file.is_file() or shard_file.stat().st_size < max(map(sum, of_file)):
                raise ValueError(f"{shard_file} is missing or truncated")
            check_archive(shard_file, of_file)
        parts = {name.partition(".")[0] for name in table.state_dict_metadata}
        if not {"state_dict", "optimizer_0"} <= parts:
            raise ValueError(f"its shards hold {sorted(parts)} only")
        if not tensors:
            return plain | {"state_dict": {}, "optimizer_states": []}
        state: dict[str, Any] = {}
        _load_state_dict(state, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        raise ValueError(f"the checkpoint {path} does not load: {error}") from error
    return plain | {"state_dict": state["state_dict"]}


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, be it a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
