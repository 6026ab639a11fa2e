"""plumbing/ranks.py: one or several processes, with the same losses."""
from __future__ import annotations

from typing import TYPE_CHECKING
import contextlib
import itertools
import os
from datetime import timedelta

import torch
from torch import Tensor, nn

from support.formats.files import UserError

if TYPE_CHECKING:
    from papers.recipe import Task
    from train import Settings


# Below the fold: what is not the method

class Step(nn.Module):
    """A task's loss as a forward, which is what DistributedDataParallel, FSDP2 and torch.compile hook into."""

    def __init__(self, task: Task):
        super().__init__()
        self.module, self.task = task.module, task

    def forward(self, **piece) -> Tensor:
        """The loss. Every parameter outside the decoder takes part, if only with 0: texts without a picture leave some
        of a bridge's without a gradient, and processes that add up their gradients must all bring the same ones."""
        learns = (p for n, p in self.module.named_parameters() if p.requires_grad and not n.startswith("decoder."))
        return self.task.loss(**piece) + 0 * sum(p.sum() for p in learns)


class Ranks:
    """The processes that torchrun started, or this one alone. Each reads its own slice of a batch; sums go over all of them."""

    def __init__(self, s: Settings):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.s, self.first, self.sharded = s, self.rank == 0, s.shard
        device = ("cuda" if torch.cuda.is_available() else "cpu") if s.device == "auto" else s.device
        self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and self.size > 1 else device)
        if s.shard and self.size == 1:
            raise UserError("--shard slices parameters over processes, and this is one; start several: "
                            "torchrun --nproc-per-node 2 train.py …")
        if self.size > 1 and not torch.distributed.is_initialized():            # once for all stages of a system
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            day = timedelta(days=1)                     # the others wait while the first one evaluates
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=day)

    def wrap(self, task: Task, s: Settings) -> nn.Module:
        """The loss as a module: gradients averaged over processes (DDP), or layers and all that learns in slices (FSDP2)."""
        step, decoder = Step(task), getattr(task.module, "decoder", None)
        layers = decoder.layers if decoder is not None else []
        if s.compile:                                   # one graph for all layers, unless a bridge has blocks of its own there
            torch._dynamo.config.recompile_limit = 8 + 2 * len(layers)
            for layer in layers:
                layer.compile(dynamic=True)             # of any length: no second compilation at the second batch
        if s.shard:                                     # a layer is whole while it runs, what else learns during the whole step
            from torch.distributed.fsdp import fully_shard
            mesh = torch.distributed.init_device_mesh(self.device.type, (self.size,))
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(step, mesh=mesh, ignored_params={p for p in step.parameters() if not p.requires_grad})
        elif self.size > 1:
            return nn.parallel.DistributedDataParallel(step)
        return step

    @contextlib.contextmanager
    def aside(self, forward: nn.Module):
        """For what looks at the module beside the step, an evaluation say: slices outside the layers are put together
        meanwhile. Every process must take part, because layers in slices are still put together where they run."""
        with eager_layers(self.s):
            if self.sharded:
                forward.unshard()
            yield
            if self.sharded:
                forward.reshard()

    def quiet(self, forward: nn.Module, on: bool):
        """No traffic for a piece that is not the last of its update."""
        if self.sharded:
            forward.set_requires_gradient_sync(not on)
        return forward.no_sync() if on and self.size > 1 and not self.sharded else contextlib.nullcontext()

    def scales(self, pieces: list[dict]) -> list[float]:
        """What each piece's summed loss is multiplied with: Σ_m λ_m (Σ over the tokens of data set m) ÷ (their number everywhere).

        DDP and FSDP2 average gradients over processes, so each process's share counts `size` times.
        """
        counts = torch.zeros(1 + max(p["set"] for p in pieces), dtype=torch.float64, device=self.device)
        for p in pieces:
            counts[p["set"]] += p["count"]
        if self.size > 1:
            torch.distributed.all_reduce(counts)
        return [self.size * p["weight"] / max(counts[p["set"]].item(), 1) for p in pieces]

    def sum(self, loss: Tensor) -> float:
        if self.size > 1:
            torch.distributed.all_reduce(loss)
        return loss.item() / self.size

    def collect(self, value) -> list:
        """The value of every process, by rank."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def gather(self, task: Task, stored: torch.dtype) -> None:
        """Slices become whole parameters again, on the first process, in a module without FSDP2's hooks."""
        if self.sharded:
            tensors = gather_to_cpu(dict(task.module.named_parameters()), self.first)
        if self.sharded and self.first:
            task.module = task.build()
            task.freeze(task.trained, stored)
            task.module.load_state_dict(tensors)
            task.module.eval()

    def wait(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def eager_layers(s: Settings):
    """Layers compiled for training run as they are written: to generate is to meet a new length with every token."""
    return torch.compiler.set_stance("force_eager") if s.compile else contextlib.nullcontext()


def require_one_process(ranks: Ranks, s: Settings) -> None:
    if ranks.size > 1:
        raise UserError(f"recipe {s.recipe} draws or contrasts a batch as a whole, so it runs in one process; "
                        "start it without torchrun.")


def prefetch(task: Task, step: int, s: Settings):
    """The batches of step, step + 1, … on the CPU; with workers, other processes read them ahead and pin them for the GPU."""
    if not s.workers:
        return map(task.read, itertools.count(step))
    steps = type("Steps", (), {"__getitem__": lambda self, i: task.read(i)})()
    return iter(torch.utils.data.DataLoader(steps, sampler=range(step, 2**40), batch_size=None, num_workers=s.workers,
                                            pin_memory=task.device.type == "cuda"))


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a slice (every process must ask at once)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_to_cpu(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies on the CPU, slices put together one after the other; who does not keep them gets none."""
    full = ((n, full_tensor(t.detach())) for n, t in tensors.items())
    return {n: t.to("cpu", copy=True) for n, t in full if keep}


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A full tensor cut as `other` is."""
    if not hasattr(other, "full_tensor"):
        return tensor
    return torch.distributed.tensor.distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
