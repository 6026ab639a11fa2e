"""Operations are counted as they run, and an unknown card promises nothing."""
from __future__ import annotations

import pytest
import torch

from conftest import tiny_vlm
from model import IGNORE, IMAGE
from support.plumbing.meter import Meter, count_flops, count_positions, peak_flops


@pytest.mark.parametrize("learning, factor", [(("bridge",), 4), (("bridge", "decoder"), 6)])
def test_a_frozen_decoder_counts_four_operations_per_parameter_and_position_and_a_trained_one_six(learning,
                                                                                                  factor):
    """The products with its matrices: forward and gradients of the activations, 2 + 2; gradients of the
    weights, 2.

    2 %: the bridge's own, and in the lowest layer the gradient of the embeddings.
    """
    vlm = tiny_vlm("linear")
    for part, module in vlm.named_children():
        module.requires_grad_(part in learning)
    B, T = 3, 10
    tokens = torch.randint(1, 61, (B, T))
    tokens[:, 2] = IMAGE
    labels = torch.where(torch.arange(T) > 6, tokens, IGNORE)
    features = torch.randn(B, 9, 20)
    counted = count_flops(lambda: vlm.loss(tokens, labels, features=features)[0], vlm)
    P = count_positions(dict(tokens=tokens, labels=labels), 9)
    assert P == B * (T + 8)
    c = vlm.decoder.config
    matrices = sum(p.numel() for n, p in vlm.decoder.named_parameters() if p.ndim == 2 and "layers" in n)
    # two products, once forward and twice backward
    attention = 3 * 4 * c.layers * B * (T + 8) ** 2 * c.heads * c.head_width
    head = factor * c.width * c.vocab_size * B * 3      # at the three supervised positions of each row
    bridge = 4 * 20 * 32 * B * 9                        # forward and weights; features need no gradient
    assert abs(counted - factor * matrices * P - attention - head - bridge) <= 0.02 * counted
    assert all(p.grad is None for p in vlm.parameters())


def test_an_unknown_card_has_no_utilisation():
    assert peak_flops(torch.device("cpu")) == 0
    meter = Meter(10, flops=1e6, K=9)
    meter.add([dict(tokens=torch.zeros(2, 5), count=3)])
    rates = meter.rates(torch.device("cpu"))
    assert rates["tflop_per_s"] > 0 and "mfu" not in rates


def test_the_line_of_progress_fits_into_120_characters():
    x = dict(step=99999, loss=12.345, ema=12.345, grad_norm=123.45, gate=0.123, lr=1e-4,
             learned_per_s=123456.0,
             tokens_per_s=1234567.0, memory_gb=79.9)
    assert len(Meter(100000).line(x, 1e5)) <= 130       # the widest numbers that a run of a day may bring
    x = dict(step=120, loss=1.842, ema=1.901, grad_norm=0.74, lr=9.8e-4, learned_per_s=4100.0,
             tokens_per_s=31200.0)
    line = Meter(1200).line(x, 60.0)
    assert "step    120/1200  10%  loss 1.842 (ema 1.901)" in line and "eta 9m00s" in line
    assert len(line) <= 120
