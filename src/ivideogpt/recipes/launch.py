"""Who started the processes of a run and how many there are; what they say and how they part when it fails."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch import distributed

PATIENCE = 5.0
"""Seconds that processes wait for each other when a run fails."""


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together.

    Args:
        rank: its number; the process of number 0 writes and prints.
        processes: how many were started; None where the trainer starts them itself.
        nodes: machines that they are on.
        is_child: whether the trainer of the first process started this one.
    """

    rank: int
    processes: int | None = None
    nodes: int = 1
    is_child: bool = False

    @classmethod
    def find(cls) -> Launch:
        """What the launcher says of this process, found as the trainer will find it.

        Raises:
            ValueError: if the launcher was used in a way that Lightning cannot follow.
        """
        own = LightningEnvironment()
        environment = _environment()
        if environment is None:  # a process that the trainer starts knows its place on its machine
            started = os.environ.get("WORLD_SIZE") if own.creates_processes_externally else None
            processes = None if started is None else int(started)
            return cls(own.local_rank() or own.node_rank(), processes, is_child=own.local_rank() > 0)
        number, nodes = environment.world_size(), 1
        if isinstance(environment, TorchElasticEnvironment):
            nodes = number // int(os.environ.get("LOCAL_WORLD_SIZE", number))
        elif isinstance(environment, SLURMEnvironment):
            nodes = int(os.environ.get("SLURM_NNODES", 1))
        return cls(environment.global_rank() or own.local_rank(), number, nodes)

    def check(self, wanted: dict[str, int]) -> None:
        """Refuses stages whose number of processes is not that of the run: each would train by itself, into one folder.

        Args:
            wanted: processes of each stage that all of them take part in.

        Raises:
            ValueError: with both numbers.
        """
        last = None
        for name, number in wanted.items():
            if self.processes is not None and number != self.processes:
                devices = f"trainer.devices={self.processes // self.nodes}"
                if self.nodes > 1:
                    devices = f"trainer.num_nodes={self.nodes} {devices}"
                raise ValueError(
                    f"stages.{name}.trainer uses {_count(number)}, and {_count(self.processes)} of this run "
                    f"{'was' if self.processes == 1 else 'were'} started: set {devices}, or start {number}"
                )
            if last is not None and last[1] > 1 and number != last[1]:
                raise ValueError(
                    f"stages.{name}.trainer uses {_count(number)}, and stages.{last[0]}.trainer {last[1]}: give both "
                    f"the same trainer.devices, or run {last[0]} first, with {name}=null"
                )
            last = name, number

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Ends this process silently if the first one reports the same mistake of the user's; takes leave in any case.

        Raises:
            ValueError: a mistake that only this process found, with its number.
        """
        try:
            yield
        except SystemExit as error:  # asked to end
            if not self.is_child:
                raise
            raise SystemExit(0) from error
        except (ValueError, OSError, ImportError) as error:
            if self.rank == 0:
                self._tell(str(error))
                raise
            if self._heard() == str(error):
                # Lightning kills the first process where it sees that a child of it has failed
                raise SystemExit(0 if self.is_child else 2) from error
            raise ValueError(f"process {self.rank}: {error}") from error
        finally:
            leave_group(failed=True)  # where the run has not done so at its end

    def _tell(self, message: str) -> None:
        """Tells the others, and waits a moment for those that have failed too."""
        with contextlib.suppress(Exception):  # what matters is the error that is being reported
            store = _store()
            if store is not None:
                store.set(_SAID, message)
                number = distributed.get_world_size() if distributed.is_initialized() else self.processes or 1
                store.wait([f"{_HEARD}/{rank}" for rank in range(1, number)], timedelta(seconds=PATIENCE))

    def _heard(self) -> str | None:
        """What the first process reports; None if it says nothing for a while."""
        with contextlib.suppress(Exception):
            store = _store()
            if store is not None:
                store.wait([_SAID], timedelta(seconds=PATIENCE))
                said = store.get(_SAID).decode()
                store.set(f"{_HEARD}/{self.rank}", "")
                return said
        time.sleep(PATIENCE)  # launchers end the others when the first process ends with an error
        return None


_SAID, _HEARD = "ivideogpt/error", "ivideogpt/heard"


def _store() -> distributed.TCPStore | None:
    """The store through which the processes meet; None where there is none yet."""
    if not (distributed.is_initialized() or TorchElasticEnvironment.detect()):
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))


def _environment() -> ClusterEnvironment | None:
    """The cluster that started this process, in the order in which Lightning's trainer looks; None for none."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    try:
        # a shell inside of an allocation has the job's variables, but is no task of it
        if SLURMEnvironment.detect() and "SLURM_PROCID" in os.environ:
            return SLURMEnvironment()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if LSFEnvironment.detect():
        return LSFEnvironment()
    return MPIEnvironment() if MPIEnvironment.detect() else None


def _count(processes: int) -> str:
    return f"{processes} process{'' if processes == 1 else 'es'}"


def leave_group(failed: bool) -> None:
    """Takes leave of the other processes, whose threads would otherwise be cut off at the end of this one.

    Args:
        failed: the run ends with an error, and the others may never answer: it is waited for a moment only, and only
            with gloo. NCCL's threads belong to the device, and waiting for it can take forever.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if not failed:
        distributed.destroy_process_group()
    elif distributed.get_backend() == "gloo":
        thread = threading.Thread(target=distributed.destroy_process_group, daemon=True)
        thread.start()
        thread.join(PATIENCE)
