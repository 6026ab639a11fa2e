"""plumbing/state.py: everything the next step depends on, in one file."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from support.formats.files import UserError, write_tensors
from support.plumbing.ranks import Ranks, gather_to_cpu, shard_like


@dataclass
class TrainState:
    """What a run has changed since it began: parameters, moments, means, counters."""
    trained: list[tuple[str, nn.Parameter]]
    optimizers: list[torch.optim.Optimizer]
    mean: dict[str, Tensor] = field(default_factory=dict)       # running mean of the parameters, with --ema
    step: int = 0
    smooth_loss: float | None = None
    seconds: float = 0.0            # of training, over all starts of the run


def save_state(state: TrainState, ranks: Ranks, out: Path) -> None:
    """Write `state`, and the random state of every process, to state.safetensors."""
    tensors = {f"parameter.{n}": p for n, p in state.trained}
    tensors |= {f"mean.{n}": p for n, p in state.mean.items()}
    for i, optimizer in enumerate(state.optimizers):
        for j, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{k}": v for k, v in moments.items() if isinstance(v, Tensor)}
    tensors = gather_to_cpu(tensors, ranks.first)
    random = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(ranks.device)
    for rank, states in enumerate(ranks.all_gather(random)):
        tensors |= {f"random.{rank}.{kind}": value for kind, value in states.items()}
    if ranks.first:
        facts = {"step": str(state.step), "smooth": repr(state.smooth_loss), "spent": repr(state.seconds)}
        write_tensors(out / "state.safetensors", tensors, facts)


def load_state(state: TrainState, ranks: Ranks, out: Path) -> None:
    """Read what save_state wrote into its places. The number of processes may be another one."""
    path = out / "state.safetensors"
    if not path.exists():
        raise UserError(f"{path}: no state was saved before this run ended; start it again without --resume.")
    for rest in (*out.glob(".*.safetensors.*"), *out.glob(".tmp*")) if ranks.first else ():
        rest.unlink(missing_ok=True)                    # of a save that was killed
    try:
        with safe_open(path, "pt") as file:
            fill_state(state, ranks, file)
    except SafetensorError as e:
        raise UserError(f"{path}: does not hold the state of this run ({e}); "
                        "start it again without --resume.") from None


def fill_state(state: TrainState, ranks: Ranks, file) -> None:
    names = set(file.keys())
    with torch.no_grad():
        for n, p in state.trained:
            p.copy_(shard_like(file.get_tensor(f"parameter.{n}"), p))
        for n, m in state.mean.items():
            m.copy_(shard_like(file.get_tensor(f"mean.{n}"), m))
    for i, optimizer in enumerate(state.optimizers):
        moments: dict[int, dict] = {}
        owners = [p for group in optimizer.param_groups for p in group["params"]]
        for name in sorted(n for n in names if n.startswith(f"optimizer.{i}.")):
            _, _, j, key = name.split(".")
            value, owner = file.get_tensor(name), owners[int(j)]
            sliced = value.shape == owner.shape         # a moment; a counter is a scalar
            moments.setdefault(int(j), {})[key] = shard_like(value, owner) if sliced else value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    if (name := f"random.{ranks.rank}.cpu") in names:
        torch.set_rng_state(file.get_tensor(name))
    if (name := f"random.{ranks.rank}.cuda") in names:
        torch.cuda.set_rng_state(file.get_tensor(name), ranks.device)
    facts = file.metadata()
    state.step, state.seconds = int(facts["step"]), float(facts["spent"])
    state.smooth_loss = None if facts["smooth"] == "None" else float(facts["smooth"])
