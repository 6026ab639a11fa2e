"""A recipe without a bridge goes on from a run of its own kind, and says so of a run of another."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT
from papers.recipe import Task
from support.formats.files import UserError

RECIPES = {"visualbert": "model", "vilbert": "model", "vilt": "model", "albef": "model", "blip2-1": "stage1"}


def run(out, recipe: str, *flags: str) -> None:
    train.main(["--recipe", recipe, "--steps", "1", "--batch", "4", "--eval-items", "4", "--workers", "0",
                "--out", str(out), *flags])


@pytest.fixture
def modules(monkeypatch):
    """What each run's module began as."""
    begun, freeze = [], Task.freeze

    def watched(self, *args):
        begun.append({name: p.detach().clone() for name, p in self.module.named_parameters()})
        freeze(self, *args)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Task, "freeze", watched)
    return begun


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_begins_as_the_run_of_init_ended(recipe, tmp_path, modules):
    run(tmp_path / "first", recipe)
    run(tmp_path / "second", recipe, "--init", str(tmp_path / "first"), "--seed", "1")
    learned = load_file(tmp_path / "first" / f"{RECIPES[recipe]}.safetensors")
    assert learned and all(torch.equal(modules[1][name], p) for name, p in learned.items())
    towers = [name for name in modules[1] if name.startswith("teacher.")]
    assert all(torch.equal(modules[1][n], modules[1][n.replace("teacher.", "towers.", 1)]) for n in towers)
    assert (recipe == "albef") == bool(towers)


def test_another_recipe_s_run_is_refused_and_named(tmp_path, modules):
    run(tmp_path / "vilbert", "vilbert")
    with pytest.raises(UserError, match='"bert.*" is not part of this recipe.s model'):
        run(tmp_path / "out", "visualbert", "--init", str(tmp_path / "vilbert"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a run of this recipe nor one that made a ViT"):
        run(tmp_path / "out", "visualbert", "--init", str(tmp_path / "empty"))
