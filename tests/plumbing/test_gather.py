"""A contrast of two processes is that of one: the global batch, with gradients through what is gathered."""
from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from papers.contrasts import mean_count
from papers.recipe import Ingredients
from support.plumbing.ranks import Ranks

ROOT = Path(__file__).parents[2]
RECIPES = ("clip", "blip2-1", "fromage", "vlkd", "albef", "flava-2")
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch was built without gloo, which joins processes on CPUs",
)


def first_step(recipe: str, images: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of step 0, as train.py's loop computes them, in float64; images: a run of vq."""
    start = ["--init", str(images)] if train.RECIPES[recipe].start == "vq" else []
    s = train.with_recipe(train.settings_from(["--recipe", recipe, "--batch", "4", *start])[0], recipe)
    ranks = Ranks("cpu")
    torch.manual_seed(0)
    task = train.load_task(s, train.RECIPES[recipe], ranks, [(train.open_data(s.data, 0), 1.0)],
                           torch.float32)
    for part in filter(None, (task.module, task.given.images)):
        part.double()
    forward = ranks.wrap(task.module, task.loss)
    if ranks.rank:
        torch.manual_seed(1)        # as in the loop: what another process draws is not what counts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)          # and what a step would round to float32
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        pieces = task.to_device(task.batch(0))
        loss = sum(forward(**piece) * scale for piece, scale in zip(pieces, ranks.loss_scales(pieces)))
        loss.backward()
    gradients = {n: p.grad for n, p in task.module.named_parameters() if p.grad is not None}
    return ranks.average(loss.detach()), gradients


def ragged(ranks: Ranks) -> torch.Tensor:
    """Rows and lengths differ between the processes."""
    return ranks.gather(torch.full((1 + ranks.rank, 2 + ranks.rank), 7 + ranks.rank))


def start_two(*argv) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [subprocess.Popen([sys.executable, __file__, *map(str, argv)], cwd=ROOT,
                                env={**where, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("gather")
    train.main(["--recipe", "vq", "--steps", "1", "--batch", "2", "--eval-items", "2", "--out",
                str(folder / "vq")])
    start_two(folder)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_contrast_the_batch_of_one(recipe, two):
    loss, gradients = first_step(recipe, two[0] / "vq")
    for theirs in two[1]:
        assert theirs[recipe][0] == pytest.approx(loss, rel=1e-5)
        assert theirs[recipe][1].keys() == gradients.keys() and gradients
        for name, gradient in gradients.items():
            # 1e-5 of the largest entry; that of a temperature is a sum of B² terms near 1 that cancel, so
            # there 1e-5 of 1. A key's bias has gradient 0, and 1e-20 of it is left.
            close = 1e-5 * (gradient.abs().max() if gradient.numel() > 1 else 1) + 1e-12
            assert (theirs[recipe][1][name] - gradient).abs().max() <= close, name


@pytest.mark.slow
def test_rows_of_different_number_and_length_are_gathered(two):
    for theirs in two[1]:
        assert theirs["ragged"].tolist() == [[7, 7, 0], [8, 8, 8], [8, 8, 8]]


def test_processes_read_the_parts_of_a_batch_and_one_process_gathers_itself():
    given = dict(device=torch.device("cpu"), seed=0, batch=6, steps=1, world=None)
    parts = [Ingredients(**given, part=(number, 3)).indices(2) for number in range(3)]
    assert sum(parts, []) == Ingredients(**given).indices(2) == [12, 13, 14, 15, 16, 17]
    assert Ingredients(**given, examples=4, part=(1, 2)).indices(0) == [3, 0, 1]
    x = torch.randn(2, 3)
    assert Ranks("cpu").gather(x) is x and Ingredients(**given).gather(x) is x
    # 2 words here and 6 there: this part's sum counts for half of the mean that one process would have
    assert mean_count(torch.tensor(2), lambda x: torch.cat((x, x + 4))) == 4


if __name__ == "__main__":
    results = {recipe: first_step(recipe, Path(sys.argv[1]) / "vq") for recipe in RECIPES}
    results["ragged"] = ragged(Ranks("cpu"))
    torch.save(results, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
