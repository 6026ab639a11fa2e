"""Muon is torch.optim.Muon where bfloat16 is fast, and the same update in float32 where it is not."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import TINY
from papers.chameleon import QKLayerNorm
from support.plumbing import optimizers

SHAPES = [(12, 12), (24, 8), (8, 24)]


def three_steps(make) -> list[torch.Tensor]:
    """The matrices after three updates with the same gradients."""
    g = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]
    optimizer = make([*matrices, nn.Parameter(torch.zeros(2, 2))])          # the last one gets no gradient
    for _ in range(3):
        for p in matrices:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return [p.detach() for p in matrices]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_is_pytorchs(dtype, monkeypatch):
    monkeypatch.setattr(optimizers, "pick_dtype", lambda name, device: (dtype, ""))
    ours = three_steps(lambda matrices: optimizers.Muon(matrices, 0.02, 0.1))
    theirs = three_steps(lambda matrices: torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1))
    for a, b in zip(ours, theirs):
        # float32: their five steps round to bfloat16, 2e-2 of a direction of entries below 1, at rate 0.02 √3
        torch.testing.assert_close(a, b, rtol=0, atol=0 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("kind, parts", [
    ("muon", ["w", "b"]), ("muon", ["w"]), ("muon", ["b"]), ("adamw", ["w", "b"]), ("adamw", ["b"])])
def test_an_optimiser_that_would_have_nothing_to_do_is_not_made(kind, parts):
    """A linear bridge without a bias has matrices alone, prompts without a picture have none."""
    settings = SimpleNamespace(optimizer=kind, lr=1e-3, beta2=0.98, weight_decay=0.01)
    module = nn.Linear(3, 2)
    trained = [(n, p) for n, p in module.named_parameters() if n[0] in parts]
    made = optimizers.make_optimizers(module, trained, settings, SimpleNamespace(lr=1e-3, muon_lr=0.02))
    groups = [[p for group in o.param_groups for p in group["params"]] for o in made]
    assert all(groups) and {id(p) for group in groups for p in group} == {id(p) for _, p in trained}


def test_five_steps_bring_the_singular_values_near_one():
    for shape in SHAPES:
        G = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        values = torch.linalg.svdvals(optimizers.orthogonalize(G))
        assert 0.5 < values.min() and values.max() < 1.3, values


def test_matrices_decay_and_norms_do_not_whatever_their_shape():
    module = nn.ModuleDict({"qk_norm": QKLayerNorm(TINY), "linear": nn.Linear(3, 4), "norm": nn.LayerNorm(4),
                            "words": nn.Embedding(5, 4)})
    trained = [*module.named_parameters()]
    settings = SimpleNamespace(optimizer="adamw", lr=1e-3, beta2=0.98, weight_decay=0.1)
    optimizer, = optimizers.make_optimizers(module, trained, settings, None)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [name for name, p in trained if decays[id(p)]] == ["linear.weight", "words.weight"]
    assert len(decays) == len(trained) and {*decays.values()} == {0.0, 0.1}


@pytest.mark.parametrize("scale", [0.1, 1.0, 1 + 1e-7, 30.0, float("nan")])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_gradients_are_clipped_as_pytorch_does_to_the_bit(scale, limit):
    """0.1 lies below the limit and is left alone; 1 does not: PyTorch divides by the norm + 1e-6."""
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(5, 3, generator=g), torch.randn(4, generator=g)]
    length = torch.cat([v.flatten() for v in values]).norm()
    ours, theirs = ([nn.Parameter(torch.zeros_like(v)) for v in values] for _ in range(2))
    for p, q, v in zip(ours, theirs, values):
        p.grad, q.grad = (v / length * scale).clone(), (v / length * scale).clone()
    unused = ("unused", nn.Parameter(torch.ones(2)))                        # no gradient
    norm = optimizers.clip_gradients([*((str(n), p) for n, p in enumerate(ours)), unused], limit)
    want = nn.utils.clip_grad_norm_(theirs, limit or float("inf"))
    for a, b in zip([norm, *(p.grad for p in ours)], [want, *(p.grad for p in theirs)]):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("above", [False, True])
def test_adamw_of_many_numbers_is_fused_on_a_cpu_and_takes_the_same_steps(above, monkeypatch):
    module = nn.Linear(30, 20)
    plain = nn.Linear(30, 20)
    plain.load_state_dict(module.state_dict())
    monkeypatch.setattr(optimizers, "FUSED", 620 + (not above))             # 30 · 20 + 20 numbers
    settings = SimpleNamespace(optimizer="adamw", lr=1e-3, beta2=0.98, weight_decay=0.1)
    optimizer, = optimizers.make_optimizers(module, [*module.named_parameters()], settings, None)
    assert optimizer.defaults["fused"] == above
    decay = [{"params": [plain.weight], "weight_decay": 0.1}, {"params": [plain.bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(decay, lr=1e-3, betas=(0.9, 0.98))
    for n in range(3):
        for m, o in ((module, optimizer), (plain, reference)):
            o.zero_grad()
            m(torch.randn(4, 30, generator=torch.Generator().manual_seed(n))).square().sum().backward()
            o.step()
    for a, b in zip(module.parameters(), plain.parameters()):
        # 1e-6 of entries below 0.2: the last bits of float32, in sums of another order
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if above else 0)
