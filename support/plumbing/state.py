"""plumbing/state.py: everything the next step depends on, in one file."""
from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from support.formats.files import UserError, check_value, write_tensors
from support.plumbing.folder import STATE, remove_unfinished
from support.plumbing.ranks import Ranks, full_tensor, gather_to_cpu, shard_like


@dataclass
class TrainState:
    """What a run has changed since it began: parameters, moments, means, counters.

    identity: digests of what must be the same when the run goes on ("settings", "data", "weights").
    """
    trained: list[tuple[str, nn.Parameter]]
    optimizers: list[torch.optim.Optimizer]
    mean: dict[str, Tensor] = field(default_factory=dict)       # running mean of the parameters, with --ema
    identity: dict[str, str] = field(default_factory=dict)
    step: int = 0
    smooth_loss: float | None = None
    random: dict[str, Tensor] = field(default_factory=dict)     # states of the random generators
    saved: int | None = None        # the step of the state on disk

    def keep_random(self, device: torch.device) -> None:
        """Remember the random state: a step that is saved after its forward pass is repeated from here."""
        self.random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            self.random["cuda"] = torch.cuda.get_rng_state(device)


def save_state(state: TrainState, ranks: Ranks, out: Path) -> None:
    """Write `state`, and the random state of every process, to state.safetensors; only what is finite."""
    tensors = {f"parameter.{n}": p for n, p in state.trained}
    tensors |= {f"mean.{n}": p for n, p in state.mean.items()}
    for i, optimizer in enumerate(state.optimizers):
        for j, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{k}": v for k, v in moments.items() if isinstance(v, Tensor)}
    tensors = gather_to_cpu(tensors, ranks.first)
    for rank, states in enumerate(ranks.all_gather(state.random)):
        tensors |= {f"random.{rank}.{kind}": value for kind, value in states.items()}
    if ranks.first:
        if name := first_broken(tensors):
            kept = "no state" if state.saved is None else f"the state of step {state.saved}"
            raise UserError(f"{name} is not finite at step {state.step}, so it is not saved; {out}/{STATE} "
                            f"keeps {kept}; try a lower --lr.")
        facts = {"step": str(state.step), "smooth": repr(state.smooth_loss), "tensors": str(len(tensors)),
                 **state.identity}
        write_tensors(out / STATE, tensors, facts)
    state.saved = state.step


def first_broken(tensors: dict[str, Tensor]) -> str:
    """The name of a tensor with a number that is not finite; "" where there is none."""
    return next((n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), "")


def parameter_norm(trained: list[tuple[str, nn.Parameter]]) -> Tensor:
    """‖θ‖ over all that is trained: not finite as soon as a parameter is, or is absurdly large."""
    return full_tensor(nn.utils.get_total_norm([p.detach() for _, p in trained]))


def require_finite(state: TrainState, s, describe_batch: Callable[[int], str], loss: float = 0.0,
                   gradient: float = 0.0) -> None:
    """A UserError if the loss, the gradient's norm or the parameters of this step are not finite.

    It says which state is kept, names the batch, and quotes --lr, --data and --out from the settings s. The
    parameters are those that the update before has left.
    """
    what, step = "", state.step
    if not math.isfinite(size := parameter_norm(state.trained).item()):
        what, step = f"the norm of the parameters ({size}) after their update", step - 1
    elif not math.isfinite(loss) or not math.isfinite(gradient):
        what = f"loss {loss}, gradient norm {gradient}"
    if what:
        kept = "no state was saved before"
        if state.saved is not None:
            kept = f"the state of step {state.saved}, the last that was saved, is in {s.out}/{STATE}"
        raise UserError(f"loss is not finite at step {step} ({what}; batch: {describe_batch(step)} of "
                        f"{s.data}); {kept}; try --lr {s.lr / 3:.0e} or --dtype float32.")


def load_state(state: TrainState, ranks: Ranks, out: Path) -> None:
    """Read what save_state wrote into its places. The number of processes may be another one.

    A UserError for a state of another run, other settings, data or weights, or with a damaged tensor.
    """
    path = out / STATE
    if not path.exists():
        raise UserError(f"{path}: no state was saved before this run ended; start it again without --resume.")
    if ranks.first:
        remove_unfinished(out)
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            for part, digest in state.identity.items():
                if facts.get(part) != digest:
                    raise UserError(f"{path}: when this was saved, the run had other {part}; put them back, "
                                    "or start it again without --resume.")
            fill_state(state, ranks, file)
            if facts["tensors"] != str(len(file.keys())):
                raise ValueError(f"{len(file.keys())} of {facts['tensors']} tensors")
            state.step = check_value("its step", int(facts["step"]), int, least=0)
            smooth = None if facts["smooth"] == "None" else float(facts["smooth"])
            state.smooth_loss = smooth and check_value("its mean loss", smooth, float)
    except (SafetensorError, KeyError, ValueError, IndexError, TypeError, RuntimeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path}: does not hold the state of this run ({e}); "
                        "start it again without --resume.") from None
    state.saved = state.step


@torch.no_grad()
def fill_state(state: TrainState, ranks: Ranks, file) -> None:
    """SafetensorError or ValueError for a tensor that is missing, has no place, or does not fit it."""
    places = {f"parameter.{n}": p for n, p in state.trained} | {f"mean.{n}": m for n, m in state.mean.items()}
    moments: list[dict] = [{} for _ in state.optimizers]
    names = set(file.keys())
    for name in [*places, *sorted(n for n in names - set(places) if not n.startswith("random."))]:
        tensor, match = file.get_tensor(name), re.fullmatch(r"optimizer\.(\d+)\.(\d+)\.(\w+)", name)
        if first_broken({name: tensor}):
            raise ValueError(f"{name} is not finite")
        if not match and name not in places:
            raise ValueError(f"{name} has no place in it")
        if match:
            i, j, key = int(match[1]), int(match[2]), match[3]
            owner = [p for group in state.optimizers[i].param_groups for p in group["params"]][j]
        else:
            owner = places[name]
        counter = match and not tensor.ndim             # of an optimiser's steps
        if not match and tensor.dtype != owner.dtype or match and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, not {owner.dtype}")
        if not counter and tensor.shape != owner.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(owner.shape)}")
        value = tensor if counter else shard_like(tensor, owner)
        if match:
            moments[i].setdefault(j, {})[key] = value
        else:
            owner.copy_(value)
    for optimizer, own in zip(state.optimizers, moments):
        if len({frozenset(m) for m in own.values()}) > 1:
            raise ValueError("the optimiser's moments of two parameters are not of the same kinds")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": own})
    if (name := f"random.{ranks.rank}.cpu") in names:
        torch.set_rng_state(file.get_tensor(name))
    if ranks.device.type == "cuda" and (name := f"random.{ranks.rank}.cuda") in names:
        torch.cuda.set_rng_state(file.get_tensor(name), ranks.device)
