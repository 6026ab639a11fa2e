"""plumbing/ranks.py: one or several processes, with the same losses."""
from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
from datetime import timedelta
from typing import Callable, ContextManager, Iterator

import torch
from torch import Tensor, nn

if "WORLD_SIZE" in os.environ and torch.distributed.is_available():     # torchrun's: a second of imports
    from torch.distributed.fsdp import fully_shard

from support.formats.files import UserError
from support.plumbing.cli import is_error_of_the_math
from support.plumbing.device import pick_device


class Step(nn.Module):
    """A task's loss as a forward: DistributedDataParallel, FSDP2 and torch.compile hook into that."""

    def __init__(self, module: nn.Module, loss: Callable[..., Tensor]):
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, **piece) -> Tensor:
        """The loss. Every parameter outside the decoder takes part, if only with 0.

        Texts without a picture leave some of a bridge's parameters without a gradient, and processes that add
        up their gradients must all bring the same ones.
        """
        learned = [p for n, p in self.module.named_parameters()
                   if p.requires_grad and not n.startswith("decoder.")]
        return self.loss(**piece) + 0 * sum(p.sum() for p in learned)


class Gather(torch.autograd.Function):
    """x of every process, stacked by rank. Backward: the sum of the gradients that all have for this one's x.

    Each process has a loss of its own, and the loss of an update is their average. The sum here and the
    average of the parameters' gradients give the gradient of that.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        everyone = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everyone, x)
        return torch.stack(everyone)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient[torch.distributed.get_rank()]


class Ranks:
    """The processes that torchrun started, or this one.

    Each reads its own part of a batch; sums go over all. compile: layers by torch.compile; shard: parameters,
    gradients and moments in slices (FSDP2) instead of copies (DDP).
    """

    def __init__(self, device: str = "auto", compile: bool = False, shard: bool = False):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.part = self.rank, self.size                            # of a batch: its number, how many
        self.first, self.compile, self.sharded = self.rank == 0, compile, shard
        self.device = pick_device(device)
        if self.size > 1 and str(self.device) == "cuda":            # each process has a GPU of its own
            self.device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        if shard and self.size == 1:
            raise UserError("--shard slices parameters over processes, and this is one; start several: "
                            "torchrun --nproc-per-node 2 train.py …")
        if self.size > 1 and not torch.distributed.is_initialized():    # once for all stages of a system
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            day = timedelta(days=1)                     # the others wait while the first one evaluates
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, timeout=day)

    def require_splits(self, recipe: str, splits: bool) -> None:
        if self.size > 1 and not splits:
            raise UserError(f"recipe {recipe} draws a batch as a whole, so it runs in one process; start it "
                            "without torchrun.")

    def require_divisible(self, batch: int, sets: int) -> None:
        """Every process must get as many items of every data set, and at least one."""
        parts = self.size * sets
        if batch < parts:
            raise UserError(f"--batch {batch} has no item for each of {sets} data sets and {self.size} "
                            f"processes; make it a multiple of {parts}.")
        if batch % sets and self.size == 1:
            print(f"note: --batch {batch} is {batch // sets} items of each of the {sets} data sets, "
                  f"{batch // sets * sets} in all", file=sys.stderr)
        if self.size > 1 and batch % parts:
            names = f" of {sets} data sets" if sets > 1 else ""
            raise UserError(f"--batch {batch} does not divide among {self.size} processes{names}; "
                            f"make it a multiple of {parts}.")

    def wrap(self, module: nn.Module, loss: Callable[..., Tensor]) -> nn.Module:
        """`loss` as a module of several processes.

        Gradients are averaged (DDP), or layers and all that learns lie in slices (FSDP2).
        """
        step, decoder = Step(module, loss), getattr(module, "decoder", None)
        layers = decoder.layers if decoder is not None else []
        if self.compile:                        # one graph for all layers, unless a bridge has blocks there
            torch._dynamo.config.recompile_limit = 8 + 2 * len(layers)
            for layer in layers:
                layer.compile(dynamic=True)     # of any length: no second compilation at the second batch
        if self.sharded:                        # a layer is put together while it runs, the rest for a step
            for name, p in module.named_parameters():
                if p.requires_grad and not p.ndim:
                    raise UserError(f"--shard cuts what learns into slices, but {name} is a single number; "
                                    "leave --shard out.")
            mesh = torch.distributed.init_device_mesh(self.device.type, (self.size,))
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            frozen = {p for p in step.parameters() if not p.requires_grad}
            fully_shard(step, mesh=mesh, ignored_params=frozen)
        elif self.size > 1:
            return nn.parallel.DistributedDataParallel(step)
        return step

    def eager_layers(self) -> ContextManager:
        """Compiled layers run uncompiled: generation calls a layer with a new length for every token."""
        return torch.compiler.set_stance("force_eager") if self.compile else contextlib.nullcontext()

    @contextlib.contextmanager
    def unsharded(self, forward: nn.Module) -> Iterator[None]:
        """For an evaluation between two steps: parameters outside the layers are put together meanwhile.

        Every process must take part, because a layer in slices is put together when it runs.
        """
        with self.eager_layers():
            if self.sharded:
                forward.unshard()
            yield
            if self.sharded:
                forward.reshard()

    def sync_gradients(self, forward: nn.Module, sync: bool) -> ContextManager:
        """Processes exchange gradients at the last piece of an update only."""
        if self.sharded:
            forward.set_requires_gradient_sync(sync)
        elif self.size > 1 and not sync:
            return forward.no_sync()
        return contextlib.nullcontext()

    def loss_scales(self, pieces: list[dict]) -> list[float]:
        """What each piece's summed loss is multiplied with: λ_m ÷ the tokens of data set m in the whole
        update.

        So the update's loss is Σ_m λ_m (mean over the tokens of data set m). DDP and FSDP2 average gradients
        over processes, so each process's part counts `size` times.
        """
        dtype = torch.float32 if self.device.type == "mps" else torch.float64       # all that Apple has
        counts = torch.zeros(1 + max(p["set"] for p in pieces), dtype=dtype, device=self.device)
        for p in pieces:
            counts[p["set"]] += p["count"]
        if self.size > 1:
            torch.distributed.all_reduce(counts)
        return [self.size * p["weight"] / max(counts[p["set"]].item(), 1) for p in pieces]

    def average(self, loss: Tensor) -> float:
        """The mean over processes."""
        if self.size > 1:
            torch.distributed.all_reduce(loss)
        return loss.item() / self.size

    def any(self, fact: bool | int) -> bool:
        """Whether it is so in one of the processes."""
        flag = torch.tensor(float(fact), device=self.device)
        if self.size > 1:
            torch.distributed.all_reduce(flag)
        return flag.item() > 0

    def gather(self, x: Tensor) -> Tensor:
        """The rows of x of all processes, by rank, through which gradients return; all must call it.

        The number of rows may differ. Other dimensions are filled with zeros up to the longest.
        """
        if self.size == 1:
            return x
        shapes = Gather.apply(torch.tensor(x.shape, device=x.device))           # (processes, dimensions)
        missing = shapes.amax(0).tolist()
        padding = [n for have, want in zip(reversed(x.shape), reversed(missing)) for n in (0, want - have)]
        rows = Gather.apply(nn.functional.pad(x.contiguous(), padding))
        return torch.cat([part[:n] for part, (n, *_) in zip(rows, shapes.tolist())])

    def all_gather(self, value) -> list:
        """The value of every process, by rank."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def gather_module(self, module: nn.Module, rebuild: Callable[[], nn.Module]) -> nn.Module:
        """After training: on the first process a module without FSDP2's hooks that holds all parameters.

        rebuild: makes the module anew, as it was before `wrap`. Without --shard the module returns as it is.
        """
        if not self.sharded:
            return module
        tensors = gather_to_cpu(dict(module.named_parameters()), self.first)
        if self.first:
            module = rebuild()
            module.load_state_dict(tensors)
        return module.eval()

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


class Steps(torch.utils.data.Dataset):
    """Batches as a data set: item i is the batch of step i."""

    def __init__(self, batch: Callable[[int], list[dict]]):
        self.batch = batch

    def __getitem__(self, step: int) -> list[dict] | UserError:
        """A user's mistake returns: raised here, it would arrive with a traceback of this process."""
        try:
            return self.batch(step)
        except ValueError as e:
            if isinstance(e, UserError) or is_error_of_the_math(e):
                return UserError(str(e))
            raise


def prefetch(batch: Callable[[int], list[dict]], step: int, workers: int, pin: bool) -> Iterator[list[dict]]:
    """batch(step), batch(step + 1), … on the CPU. With workers, other processes read ahead.

    pin: into page-locked memory, from which a GPU copies faster.
    """
    if not workers:
        yield from map(batch, itertools.count(step))
    batches = iter(torch.utils.data.DataLoader(
        Steps(batch), sampler=range(step, 2**40), batch_size=None, num_workers=workers, pin_memory=pin,
        worker_init_fn=leave_the_terminal, generator=torch.Generator()))        # not the run's random numbers
    while True:
        try:
            pieces = next(batches)
        except RuntimeError as e:
            if "DataLoader worker" not in str(e):
                raise
            raise UserError(f"a process of --workers {workers} ended, perhaps for want of memory ({e}); "
                            "use fewer workers.") from None
        if isinstance(pieces, UserError):
            raise pieces
        yield pieces


def leave_the_terminal(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal's group. A run stops itself, and needs its readers then."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a slice. Every process must call it at the same time."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_to_cpu(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies on the CPU, one slice after the other put together; {} on a process that does not keep them."""
    full = ((n, full_tensor(t.detach())) for n, t in tensors.items())
    return {n: t.to("cpu", copy=True) for n, t in full if keep}


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A full tensor cut as `other` is."""
    if not hasattr(other, "full_tensor"):
        return tensor
    return torch.distributed.tensor.distribute_tensor(tensor.to(other.device), other.device_mesh,
                                                      other.placements)
