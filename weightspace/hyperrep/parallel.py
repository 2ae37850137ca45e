"""Training by several processes that torchrun starts: every process computes its share of each batch.

With DDP each holds the whole representation, with FSDP2 a part of every weight. The losses of a step are those of the
whole batch, so that any number of processes gives the loss curve of one, up to rounding.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from weightspace.runs import RunFailed, UserError

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others."""
LOST = re.compile(r"gloo|nccl|peer|connection|timed out|store", re.IGNORECASE)
"""What errors say when another process does not answer."""

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a training, as one of them sees them."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """This process's rows of a batch.

        Raises:
            UserError: the batch cannot be divided evenly.
        """
        if batch_size % self.count:
            raise UserError(
                f"pretrain.batch_size={batch_size} cannot be divided among {self.count} processes; choose a multiple"
            )
        each = batch_size // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def gathered(self, x: Tensor) -> Tensor:
        """The rows of all processes, in order; gradients reach this process's own rows."""
        if self.count == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x.detach().contiguous())
        parts[self.rank] = x
        return torch.cat(parts)

    def whole(self, loss: Tensor) -> Tensor:
        """A loss of `gathered` rows: its value stays, its gradient is multiplied, since processes average theirs."""
        return loss if self.count == 1 else loss.detach() + self.count * (loss - loss.detach())

    def mean(self, values: Mapping[str, float], device: torch.device) -> dict[str, float]:
        """The means over the processes."""
        if self.count == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.count).tolist(), strict=True))

    @contextmanager
    def led(self, claim: AbstractContextManager[bool]) -> Iterator[bool]:
        """Let the first process claim a folder; yields to all whether there is work to do.

        Raises:
            SystemExit: the first process cannot claim it; it tells why, the others leave without a word.
        """
        if not self.first:
            todo = self._told(None)
            if todo is None:
                raise SystemExit(2)
            yield todo
            return
        told = False
        try:
            with claim as todo:
                told = True
                self._told(todo)
                yield todo
                self.wait()  # nobody leaves before the others are done with the folder
        finally:
            if not told:
                self._told(None)

    def _told(self, todo: bool | None) -> bool | None:
        """What the first process says of the work to do; None where it cannot claim the folder."""
        if self.count == 1:
            return todo
        message = [todo]
        dist.broadcast_object_list(message, 0)
        return message[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


ALONE = Processes()


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started; without torchrun there is one.

    Raises:
        RunFailed: another process does not answer.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        here = Processes(dist.get_rank(), count)
        yield here
        if not here.first:
            here.wait()  # see `led`
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and not LOST.search(str(error)):
            raise
        reason = str(error).splitlines()[0][:200]
        raise RunFailed(
            f"another process of this training died or does not answer ({reason}); start the same command again, it "
            "goes on from the last validation"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Step(nn.Module):
    """Runs some work on modules; DDP and FSDP2 wrap it, so that they see where a step begins and ends."""

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.trained = trained

    def forward(self, work: Callable[[], T]) -> T:
        return work()


def distributed(trained: nn.Module, kind: str, here: Processes, device: torch.device) -> nn.Module:
    """A module that runs work on the trained modules, with gradients averaged over the processes.

    Args:
        trained: what is trained.
        kind: "ddp" or "fsdp".
        here: the processes.
        device: where this one computes.
    """
    step = Step(trained)
    if here.count == 1:
        return step
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(
            step,
            [device] if device.type == "cuda" else None,
            find_unused_parameters=True,
            broadcast_buffers=False,  # training changes none
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (here.count,))
    for module in {id(m): m for m in trained.modules() if isinstance(m, nn.TransformerEncoderLayer)}.values():
        fully_shard(module, mesh=mesh)
    fully_shard(step, mesh=mesh)
    return step


def _first(error: BaseException) -> str:
    """What went wrong, in a line: of several processes, for one of them."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def whole_state(trained: nn.Module, here: Processes) -> dict[str, Tensor]:
    """The state of all that is trained, put together; empty but on the first process."""
    if here.count == 1:
        return trained.state_dict()
    whole: Any = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return whole


def save_shards(folder: Path, trained: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights and the optimizer's state, every process its own part.

    Raises:
        RunFailed: it cannot be written.
    """
    weights, moments = get_state_dict(trained, optimizer)
    try:
        with warnings.catch_warnings(action="ignore"):  # that there may be one process only
            state_dict_saver.save({"trained": weights, "optimizer": moments}, checkpoint_id=folder)
    except (OSError, CheckpointException) as error:
        raise RunFailed(
            f"{folder} cannot be written ({_first(error)}); make room and start the same command again, what was "
            "finished is kept"
        ) from None


def load_shards(folder: Path, trained: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read what `save_shards` wrote, whatever the number of processes that wrote it.

    Raises:
        UserError: it is damaged.
    """
    weights, moments = get_state_dict(trained, optimizer)
    state: dict[str, Any] = {"trained": weights, "optimizer": moments}
    try:
        with warnings.catch_warnings(action="ignore"):  # as above
            state_dict_loader.load(state, checkpoint_id=folder)
    except (OSError, CheckpointException) as error:
        raise UserError(
            f"{folder} cannot be read ({_first(error)}); delete {folder.parent} to train from the start"
        ) from None
    set_state_dict(trained, optimizer, model_state_dict=state["trained"], optim_state_dict=state["optimizer"])
