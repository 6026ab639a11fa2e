"""plumbing/state.py: everything the next step depends on, in one file."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from support.formats.files import UserError, write_tensors
from support.plumbing.ranks import Ranks, gather_to_cpu, shard_like


def save_state(ranks: Ranks, out: Path, trained, optimizers, mean: dict, step: int, smooth: float | None, spent: float) -> None:
    """Everything the next step depends on, in one safetensors file: parameters, optimiser moments, means, random state, counters."""
    tensors = {f"parameter.{n}": p for n, p in trained} | {f"mean.{n}": p for n, p in mean.items()}
    for i, o in enumerate(optimizers):
        for j, state in o.state_dict()["state"].items():
            tensors.update({f"optimizer.{i}.{j}.{k}": v for k, v in state.items() if isinstance(v, Tensor)})
    tensors = gather_to_cpu(tensors, ranks.first)
    on_gpu = {"cuda": torch.cuda.get_rng_state(ranks.device)} if ranks.device.type == "cuda" else {}
    random = ranks.collect({"cpu": torch.get_rng_state(), **on_gpu})
    tensors.update({f"random.{rank}.{k}": state for rank, states in enumerate(random) for k, state in states.items()})
    if ranks.first:
        write_tensors(out / "state.safetensors", tensors, {"step": str(step), "smooth": repr(smooth), "spent": repr(spent)})


def load_state(ranks: Ranks, out: Path, trained, optimizers, mean: dict) -> tuple[int, float | None, float]:
    """What save_state wrote, into its places; the number of processes may be another one."""
    from support.formats.checkpoint import Checkpoint
    file = out / "state.safetensors"
    if not file.exists():
        raise UserError(f"{file}: no state was saved before this run ended; start it again without --resume.")
    halves = (*out.glob(".*.safetensors.*"), *out.glob(".tmp*"))                # of a save that was killed
    for rest in halves if ranks.first else ():
        rest.unlink(missing_ok=True)
    checkpoint = Checkpoint(file)
    with torch.no_grad():
        for n, p in trained:
            p.copy_(shard_like(checkpoint.get(f"parameter.{n}"), p))
        for n, m in mean.items():
            m.copy_(shard_like(checkpoint.get(f"mean.{n}"), m))
    for i, o in enumerate(optimizers):
        state: dict[int, dict] = {}
        owners = [p for group in o.param_groups for p in group["params"]]
        for name in checkpoint.where:
            kind, *rest = name.split(".")
            if kind == "optimizer" and rest[0] == str(i):
                value, owner = checkpoint.get(name), owners[int(rest[1])]
                state.setdefault(int(rest[1]), {})[rest[2]] = shard_like(value, owner) if value.shape == owner.shape else value
        o.load_state_dict({**o.state_dict(), "state": state})
    on_gpu = lambda state: torch.cuda.set_rng_state(state, ranks.device)
    for kind, restore in (("cpu", torch.set_rng_state), ("cuda", on_gpu)):
        if (name := f"random.{ranks.rank}.{kind}") in checkpoint.where:
            restore(checkpoint.get(name))
    facts = checkpoint.files[file].metadata()
    return int(facts["step"]), None if facts["smooth"] == "None" else float(facts["smooth"]), float(facts["spent"])
