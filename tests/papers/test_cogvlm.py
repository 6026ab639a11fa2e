"""CogVLM's visual expert is the published one, starts as a prefix model to the bit, and leaves text alone."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import (ROOT, TINY, TINY_VIT, check, check_states, fixed_loss, golden, shapes_vlm, stir,
                      tiny_decoder, tiny_vlm)
from model import IGNORE, IMAGE, VLM, Bridge, DecoderConfig, ImagePositions
from papers import cogvlm, make_bridge
from papers.qk_norm import QKNorm
from support.formats import load_bridge, load_decoder, load_tokenizer, load_vlm
from support.formats.cogvlm import vision_names
from support.formats.names import as_source
from support.lab.miniatures.cogvlm import measure_text
from support.plumbing.ranks import Ranks

C7 = DecoderConfig(width=4096, layers=32, heads=32, kv_heads=32, head_width=128, hidden=11008)
C8 = DecoderConfig(width=4096, layers=32, heads=32, kv_heads=8, head_width=128, hidden=14336)


def published() -> tuple[VLM, dict, dict, dict, torch.Tensor]:
    """(model, case, inputs, expected, tokens): the case's ids, an IMAGE in the place of [boi; image; eoi]."""
    folder, case, x, expected = golden("cogvlm-expert")
    vlm = VLM(None, load_bridge("cogvlm", folder), load_decoder(folder)).eval()
    rows = []
    for ids, kinds in zip(x["input_ids"], x["token_type_ids"]):
        first, last = kinds.nonzero()[0, 0], kinds.nonzero()[-1, 0]
        rows.append(torch.cat((ids[:first], torch.tensor([IMAGE]), ids[last + 1:])))
    return vlm, case, x, expected, torch.stack(rows)


def where_of(tokens: torch.Tensor, K: int) -> ImagePositions:
    """Where K tokens of each image stand in the text, as `prepare` lays them out."""
    vlm = VLM(None, make_bridge("linear", TINY, 20), tiny_decoder())
    return vlm.prepare(tokens, torch.zeros(int((tokens == IMAGE).sum()), K, 20))[0]["visual"]


def test_the_expert_is_the_published_one():
    vlm, case, x, expected, tokens = published()
    positions = []
    turn = vlm.bridge.rope_positions
    vlm.bridge.rope_positions = lambda p, visual: positions.append(turn(p, visual)) or positions[-1]
    soft = vlm.bridge.prefix(vlm.bridge.see(x["features"]))
    check(case, "soft_tokens", soft.detach(), expected["soft_tokens"])
    logits, hidden = vlm(tokens, features=x["features"], return_hidden=True)
    check_states(case, [h.detach() for h in hidden], expected)
    check(case, "logits", logits.detach(), expected["logits"])
    check(case, "position_ids", positions[0], expected["position_ids"])
    where = where_of(tokens, 7)
    check(case, "mask", where.image & ~cogvlm.ends(where)[1], expected["vision_token_mask"])

    loss = fixed_loss(logits)
    loss.backward()
    check(case, "grad.loss", loss.detach(), expected["grad.loss"])
    fused = {}
    for ours, theirs in vision_names(1, 1).items():
        if ours in dict(vlm.bridge.named_parameters()):
            grad = vlm.bridge.get_parameter(ours).grad
            fused.setdefault(as_source(theirs).names[0], []).append(grad)
    stored = [key.removeprefix("grad.") for key in expected if key.startswith("grad.model")]
    assert set(fused) == set(stored)
    for name in stored:
        grad = torch.cat(fused[name]).view(expected[f"grad.{name}"].shape)      # q, k, v in this order
        check(case, f"grad.{name}", grad, expected[f"grad.{name}"])

    text = vlm(x["text_ids"], features=x["features"][:0]).detach()
    check(case, "text_only.logits", text, expected["text_only.logits"])
    wrote = vlm.generate(tokens, features=x["features"], max_new_tokens=6)
    check(case, "generated_ids", wrote, expected["generated_ids"])


def eoi_too(where: ImagePositions) -> tuple[torch.Tensor, torch.Tensor]:
    boi, _ = ENDS(where)
    return boi, torch.zeros_like(boi)


ENDS = cogvlm.ends
MISREADINGS = {
    "eoi through the expert": lambda patch: patch.setattr(
        cogvlm.CogVLM, "rope_positions", with_true_ends(cogvlm.CogVLM.rope_positions, patch)),
    "plain positions": lambda patch: patch.setattr(
        cogvlm.CogVLM, "rope_positions", lambda self, p, visual: p),
    "a shared output projection": lambda patch: patch.setattr(
        cogvlm.Expert, "part", lambda self, name, part=cogvlm.Expert.part: None if name == "o"
        else part(self, name)),
    "no GELU ahead of the GLU": lambda patch: patch.setattr(cogvlm.F, "gelu", lambda x: x),
}


def with_true_ends(positions, patch):
    """Positions stay right while `ends` hides eoi from the expert's mask."""
    patch.setattr(cogvlm, "ends", eoi_too)

    def turn(self, p, visual):
        patch.setattr(cogvlm, "ends", ENDS)
        y = positions(self, p, visual)
        patch.setattr(cogvlm, "ends", eoi_too)
        return y
    return turn


@pytest.mark.parametrize("what", MISREADINGS)
def test_a_misreading_fails_the_case(what, monkeypatch):
    vlm, case, x, expected, tokens = published()
    MISREADINGS[what](monkeypatch)
    with torch.no_grad():
        _, hidden = vlm(tokens, features=x["features"], return_hidden=True)
    assert (hidden[-1] - expected["hidden_states.2"]).abs().max() > 100 * case["tolerance"]["atol"]


# --- the start, and text ------------------------------------------------------------------------------------

DECODERS = {"plain": {}, "biases": dict(attention_bias=True, mlp_bias=True), "Qwen3": dict(qk_norm=QKNorm)}
TOKENS = torch.tensor([[3, 4, IMAGE, 5, IMAGE, 6], [IMAGE, IMAGE, 7, 8, 9, 10]])


def twins(changes: dict, **options) -> tuple[VLM, VLM]:
    """A new bridge beside a decoder, and one without experts whose adapter is the same."""
    decoder = tiny_decoder(3, **changes)
    bridge = make_bridge("cogvlm", decoder.config, 20, **options)
    bridge.adopt(decoder)
    plain = make_bridge("cogvlm", decoder.config, 20, attention=False, mlp=False)
    for p, q in zip(plain.parameters(), bridge.parameters()):
        assert p.shape == q.shape
        p.data.copy_(q.data)
    return VLM(None, bridge, decoder).eval(), VLM(None, plain, decoder).eval()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DECODERS)
def test_at_the_start_it_is_a_plain_prefix_model_to_the_bit(kind, dtype, gradients):
    features = torch.randn(4, 9, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    for options in ({}, dict(every=3), dict(bias=True)):
        vlm, plain = (v.to(dtype) for v in twins(DECODERS[kind], **options))
        with torch.set_grad_enabled(gradients):
            assert torch.equal(vlm(TOKENS, features=features), plain(TOKENS, features=features))


def test_experts_that_start_at_random_are_another_model():
    vlm, plain = twins({}, copied=False)
    features = torch.randn(4, 9, 20)
    assert not torch.allclose(vlm(TOKENS, features=features), plain(TOKENS, features=features), atol=1e-2)


@pytest.mark.parametrize("options", [{}, dict(full_mask=True)])
def test_text_without_an_image_is_the_decoders_own_to_the_bit(options):
    vlm, text = tiny_vlm("cogvlm", **options), torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    with torch.no_grad():
        assert torch.equal(vlm(text), vlm.decoder(text))
        assert torch.equal(vlm.decoder(text, bridge=vlm.bridge), vlm.decoder(text))
        assert torch.equal(vlm.generate(text, max_new_tokens=4), vlm.decoder.generate(text, max_new_tokens=4))
        prompt = torch.tensor([[3, 4, 5, 6, 7], [8, 9, IMAGE, 7, 8]])           # beside a picture, too
        before = vlm(prompt, features=torch.randn(1, 9, 20))[0, :5]
    torch.testing.assert_close(before, vlm.decoder(prompt[:1])[0].detach(), atol=1e-5, rtol=1e-5)


def test_the_miniature_measures_that_text_does_not_change():
    vlm = shapes_vlm("cogvlm")                          # the decoder that runs begin with
    arm = SimpleNamespace(vlm=vlm, tokenizer=load_tokenizer(ROOT / "weights/decoder"))
    same = measure_text(arm, 8)
    assert same["text change"] == 0 and same["text loss"] < 1
    vlm.decoder.layers[0].mlp.up.weight.data *= 1.5
    assert measure_text(arm, 8)["text change"] > 0.1


def test_training_by_name_starts_from_the_decoders_matrices():
    s = train.with_recipe(train.settings_from(["--bridge", "cogvlm"])[0], "cogvlm")
    sets = [(train.open_data(s.data, s.seed), 1.0)]
    vlm = train.load_task(s, train.RECIPES["cogvlm"], Ranks(), sets, torch.float32).module
    assert len(vlm.bridge.experts) == len(vlm.decoder.layers)
    for expert, layer in zip(vlm.bridge.experts, vlm.decoder.layers):
        theirs = dict(layer.named_parameters())
        assert all(torch.equal(p, theirs[n]) and p.requires_grad for n, p in expert.named_parameters())
        assert not any(p.requires_grad for p in layer.parameters())
    assert not vlm.bridge.boi.any() and not vlm.bridge.eoi.any()


# --- positions and masks ------------------------------------------------------------------------------------

def test_the_tokens_of_each_image_share_one_position():
    tokens = torch.tensor([[3, IMAGE, IMAGE, 4, 5], [6, IMAGE, 7, IMAGE, 8]])
    where, bridge = where_of(tokens, 5), make_bridge("cogvlm", TINY, 20)
    turned = bridge.rope_positions(torch.arange(13)[None], where)
    #                            boi  i  i  i eoi boi  i  i  i eoi
    assert turned.tolist() == [[0, 1, 2, 2, 2, 3, 4, 5, 5, 5, 6, 7, 8],
                               [0, 1, 2, 2, 2, 3, 4, 5, 6, 6, 6, 7, 8]]
    assert bridge.rope_positions(torch.tensor([[13]]), where).tolist() == [[9], [9]]        # the next word
    left = torch.tensor([[0, 0, *range(13)]])                                   # two positions of padding
    last, image = (F.pad(t, (2, 0)) for t in (where.last, where.image))
    padded = ImagePositions(where.row, where.order, last, image)
    assert bridge.rope_positions(left, padded)[:, 2:].tolist() == turned.tolist()


def test_packed_documents_do_not_meet():
    vlm = tiny_vlm("cogvlm")
    documents = [[3, IMAGE, 4, 5, 6], [7, IMAGE, 8], [9, IMAGE, 10, 11]]
    features = torch.randn(3, 9, 20, generator=torch.Generator().manual_seed(0))
    losses = []
    for rows in ([documents[:2], documents[2:]], [[d] for d in documents]):
        tokens, number = torch.zeros(2, len(rows), 8, dtype=torch.long)         # 0: padding
        for row, t, n in zip(rows, tokens, number):
            words = [(word, i) for i, d in enumerate(row, 1) for word in d]
            t[:len(words)], n[:len(words)] = torch.tensor(words).T
        first = number != F.pad(number, (1, 0))[:, :-1]             # no document predicts another's
        labels = tokens.masked_fill((tokens <= 0) | first, IGNORE)
        losses.append(vlm.loss(tokens, labels, mask=number, features=features)[0].detach())
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-5)       # float32 sums of other lengths


def test_a_full_mask_lets_image_tokens_look_ahead_and_words_never():
    """What moves when the last patch of the second picture changes."""
    features = torch.randn(2, 9, 20, generator=torch.Generator().manual_seed(0))
    changed = features.clone()
    changed[1, -1] += 1
    tokens = torch.tensor([[3, IMAGE, 4, IMAGE, 5]])
    moved = {}
    for full in (False, True):
        vlm = tiny_vlm("cogvlm", full_mask=full)
        with torch.no_grad():
            a, b = (vlm(tokens, features=f)[0] for f in (features, changed))
        moved[full] = ((a - b).abs().amax(-1) > 1e-4).nonzero().flatten().tolist()
    boi, patch, end = 13, 13 + 9, 25                    # 3, 11 of the first, 4, then 11 of the second, 5
    assert moved[False] == list(range(patch, end)) and moved[True] == list(range(boi, end))


# --- sizes --------------------------------------------------------------------------------------------------

def size(config: DecoderConfig, **options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make_bridge("cogvlm", config, 1792, **options).parameters())


def test_table_4_and_cogvlm2_have_the_published_sizes():
    ends = 2 * 4096                                     # boi and eoi
    assert size(C7) == 6_618_628_096
    assert size(C7, attention=False) - ends == 4_471_136_256
    assert size(C7, every=4) - ends == 1_761_615_872
    assert size(C7, attention=False, mlp=False) - ends == 142_614_528
    with torch.device("meta"):
        experts = make_bridge("cogvlm", C8, 1792, bias=True, stride=2).experts
    assert sum(p.numel() for p in experts[0].parameters()) == 218_109_952
    assert sum(p.numel() for p in experts.parameters()) == 6_979_518_464


def test_a_stride_makes_one_token_of_a_block_of_patches():
    bridge = stir(make_bridge("cogvlm", TINY, 20, stride=3))
    z = torch.randn(2, 36, 20)
    block = z.view(2, 6, 6, 20)[0, 3:, :3]                                      # second row, first column
    by_hand = torch.einsum("yxc,dcyx->d", block, bridge.conv.weight) + bridge.conv.bias
    torch.testing.assert_close(bridge.see(z)[0, 2], by_hand, atol=1e-4, rtol=1e-4)
    assert bridge.prefix(bridge.see(z)).shape == (2, 4 + 2, 32)
    with pytest.raises(ValueError, match="10 tokens of the ViT are no square"):
        bridge.see(torch.randn(1, 10, 20))


def test_its_run_opens(tmp_path):
    argv = ["--bridge", "cogvlm", "--steps", "1", "--batch", "2", "--eval-items", "1", "--samples", "0",
            "--pack", "--option", "every=2", "full_mask=true", "--dtype", "float32"]
    module = train.main([*argv, "--out", str(tmp_path)])
    saved = load_vlm(tmp_path)
    assert len(saved.bridge.experts) == 2 and saved.bridge.full_mask
    assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(), module.state_dict().values()))


def test_a_bridge_adopts_nothing_unless_it_says_so():
    decoder = tiny_decoder()
    bridge = stir(make_bridge("mlp", TINY, TINY_VIT.width))
    before = [p.clone() for p in bridge.parameters()]
    bridge.adopt(decoder)
    Bridge().adopt(decoder)
    assert all(torch.equal(a, b) for a, b in zip(before, bridge.parameters()))
