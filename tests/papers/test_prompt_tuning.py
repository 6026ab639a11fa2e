"""Prompt tuning and prefix tuning are peft's, and a picture makes the vectors as Frozen's does."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import TINY, TINY_VIT, check, fixed_loss, golden, stir, tiny_vlm
from model import IMAGE, VLM, Bridge, Decoder, DecoderConfig, attend, widen
from papers import make_bridge
from papers.frozen import Frozen
from support.formats import load_decoder

CASE = "prompt-tuning"
NAMES = {"prompts": "embedding.weight",
         **{f"{ours}.{w}": f"transform.{n}.{w}" for ours, n in (("down", 0), ("up", 2))
            for w in ("weight", "bias")}}
PREFIXES = {"prefix-network": dict(hidden=12), "prefix-direct": dict(network=False)}


def pefts(bridge: Bridge, adapter: str) -> Bridge:
    """The bridge with the tensors of one of the case's adapters, and none left over."""
    tensors = load_file(golden(CASE)[0] / "adapters.safetensors")
    own = {n.removeprefix(f"{adapter}."): t for n, t in tensors.items() if n.startswith(f"{adapter}.")}
    with torch.no_grad():
        for name, p in bridge.named_parameters():
            p.copy_(own.pop(NAMES[name]))
    assert not own
    return bridge.eval()


def check_gradients(case: dict, expected: dict, adapter: str, bridge: Bridge, logits: Tensor) -> None:
    loss = fixed_loss(logits)
    loss.backward()
    check(case, f"grad.{adapter}.loss", loss.detach(), expected[f"grad.{adapter}.loss"])
    for name, p in bridge.named_parameters():
        check(case, f"grad.{adapter}.{NAMES[name]}", p.grad, expected[f"grad.{adapter}.{NAMES[name]}"])


def test_prompt_tuning_is_pefts():
    """A text without a picture: the words stand where the sentinel does, and what it shows is not read."""
    folder, case, x, expected = golden(CASE)
    decoder = load_decoder(folder)
    bridge = pefts(make_bridge("prompt_tuning", decoder.config, 20, prompts=5, image=False), "prompt")
    vlm, ids = VLM(nn.Module(), bridge, decoder), x["input_ids"]
    front = lambda ids: dict(tokens=torch.cat((ids.new_full((len(ids), 1), IMAGE), ids), dim=1),
                             features=torch.full((len(ids), 1, 20), torch.nan))
    logits = vlm(**front(ids))
    check(case, "prompt.logits", logits, expected["prompt.logits"])
    check_gradients(case, expected, "prompt", bridge, logits)
    check(case, "prompt.generated_ids", vlm.generate(**front(ids[:, :4]), max_new_tokens=10),
          expected["prompt.generated_ids"])


def prefix(decoder: Decoder, adapter: str) -> tuple[Bridge, dict]:
    bridge = make_bridge("prefix_tuning", decoder.config, 20, prompts=5, image=False, **PREFIXES[adapter])
    bridge = pefts(bridge, adapter)
    return bridge, dict(bridge=bridge, visual=bridge.see(torch.zeros(2, 1, 20)))


@pytest.mark.parametrize("adapter", PREFIXES)
def test_prefix_tuning_is_pefts_with_the_network_and_without(adapter):
    folder, case, x, expected = golden(CASE)
    decoder = load_decoder(folder)
    check(case, "plain.logits", decoder(x["input_ids"]), expected["plain.logits"])
    bridge, seams = prefix(decoder, adapter)
    logits = decoder(x["input_ids"], **seams)
    check(case, f"{adapter}.logits", logits, expected[f"{adapter}.logits"])
    check_gradients(case, expected, adapter, bridge, logits)
    with torch.no_grad():                               # the fused kernel, and the cache
        check(case, f"{adapter}.logits", decoder(x["input_ids"], **seams), expected[f"{adapter}.logits"])
        ids = decoder.generate(x["input_ids"][:, :4], max_new_tokens=10, **seams)
    check(case, f"{adapter}.generated_ids", ids, expected[f"{adapter}.generated_ids"])


@pytest.mark.parametrize("misreading", ["positions", "softmax"])
def test_a_misreading_fails_its_case(misreading, monkeypatch):
    """Words that count from 0, and LLaMA-Adapter's softmax of its own."""
    folder, _, x, expected = golden(CASE)
    decoder = load_decoder(folder)
    bridge, seams = prefix(decoder, "prefix-network")
    if misreading == "positions":
        monkeypatch.setattr(bridge, "rope_positions", lambda p, visual: p)
    else:
        def apart(layer, part, f, visual, *args):
            if part != "attend":
                return f(*args)
            q = args[0]
            K, V = (p.repeat_interleave(2, dim=1) for p in visual[:, :, layer].permute(2, 0, 3, 1, 4))
            return f(*args) + f(q, K, V)
        monkeypatch.setattr(bridge, "around", apart)
    with torch.no_grad():
        logits = decoder(x["input_ids"], **seams)
    assert (logits - expected["prefix-network.logits"]).abs().max() > 1e-2


def test_a_learned_prompt_is_frozens_bias_so_frozen_is_prompt_tuning_by_a_picture():
    frozen = stir(Frozen(TINY, TINY_VIT.width, tokens=3))
    bridge = make_bridge("prompt_tuning", TINY, TINY_VIT.width, prompts=3)
    with torch.no_grad():
        bridge.prompts.copy_(frozen.map.bias.view(3, -1))
        bridge.map.weight.copy_(frozen.map.weight)
    visual = torch.randn(2, 9, TINY_VIT.width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bridge.prefix(visual), frozen.prefix(visual))
    bare = make_bridge("prompt_tuning", TINY, TINY_VIT.width, prompts=3, image=False)
    assert torch.equal(bare.prefix(visual)[0], bare.prefix(2 * visual)[1])      # it says nothing of a picture


def test_a_prefix_of_zeros_takes_its_share_of_the_one_softmax():
    """Hand example: with every score and the prefix's values 0, Q of them take Q / (Q + S) of the weight."""
    bridge = make_bridge("prefix_tuning", TINY, 20, prompts=3, network=False, image=False)
    q = torch.zeros(1, 4, 4, 8)                         # every score is 0: the plain weights are 1 / S
    v = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(1))     # two heads, read by two each
    with torch.no_grad():
        bridge.prompts.zero_()
        y = bridge.around(0, "attend", attend, bridge.see(torch.zeros(1, 1, 20)), q, v, v, None, True)
    mean = widen(v, 4).cumsum(2) / torch.arange(1, 5)[:, None]                  # over the words 0 … t
    share = torch.arange(1, 5) / (torch.arange(1, 5) + 3)                       # 1/4, 2/5, 3/6, 4/7
    torch.testing.assert_close(y, share[:, None] * mean)


def test_a_text_without_a_picture_has_the_learned_prefix_and_one_with_two_is_refused():
    vlm = tiny_vlm("prefix_tuning", image_token=7)
    features = torch.randn(1, 9, TINY_VIT.width, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[3, IMAGE, 5], [3, 4, 5]])
    visual = vlm.prepare(tokens, features)[0]["visual"]
    assert visual.shape == (2, 3, 4, 2, 2, 8)
    nothing = vlm.bridge.see(torch.zeros(1, 9, TINY_VIT.width))
    torch.testing.assert_close(visual[1:], nothing)
    assert (visual[0] - nothing[0]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="prefix_tuning takes one image per text"):
        vlm(torch.tensor([[IMAGE, IMAGE, 4]]), features=features.expand(2, -1, -1))
    silent = tiny_vlm("prefix_tuning", image_token=7, image=False)
    silent(torch.tensor([[IMAGE, IMAGE, 4]]), features=features.expand(2, -1, -1))


def test_the_published_sizes():
    xxl, gpt2 = DecoderConfig(width=4096), DecoderConfig(width=1024, layers=24, heads=16, kv_heads=16,
                                                         head_width=64)
    with torch.device("meta"):
        words = make_bridge("prompt_tuning", xxl, 1024, prompts=5, image=False)
        kept = make_bridge("prefix_tuning", gpt2, 1024, prompts=5, image=False, network=False)
        learned = make_bridge("prefix_tuning", gpt2, 1024, prompts=5, image=False)
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(words) == 20_480                                               # per task, T5-XXL
    assert count(kept) == 245_760                                               # the paper's 250K
    assert count(learned) == 5 * 1024 + 1024 * 512 + 512 + 512 * 49_152 + 49_152
