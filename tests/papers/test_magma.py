"""MAGMA is the authors' prefix and their adapters in every form and place, read under their own names."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from conftest import GOLDEN, TINY, check, fixed_loss, golden, tiny_decoder, tiny_vlm
from model import DecoderConfig
from papers import make_bridge
from papers.magma import Adapter
from support.formats import load_bridge, load_decoder
from support.formats.checkpoint import Checkpoint
from support.formats.files import UserError, write_tensors
from support.formats.magma import magma_file

CASE = "magma-adapter"
VARIANTS = sorted(file.name.split(".")[1] for file in (GOLDEN / CASE).glob("adapters.*"))


def published(variant: str) -> dict[str, torch.Tensor]:
    """The adapters of a variant, and the prefix of the same width from the case of the prefix."""
    prefix = load_file(GOLDEN / "magma-prefix" / "model.safetensors")
    return {**load_file(GOLDEN / CASE / f"adapters.{variant}.safetensors"),
            **{f"image_prefix.{name.removeprefix('magma.')}": t for name, t in prefix.items()
               if name.startswith("magma.")}}


def options_of(variant: str) -> dict:
    """What the names alone do not tell: attention's adapters in parallel."""
    return {"attention": "parallel"} if variant == "attention-parallel" else {}


def test_the_prefix_is_the_authors_per_cell_and_of_a_pooled_vector():
    """The case's loss goes over four outputs; LiMBeR's two, which have no LayerNorm, stand as they are."""
    folder, case, x, expected = golden("magma-prefix")
    tensors = load_file(folder / "model.safetensors")
    outputs = {key: expected[key] for key in ("limber", "magma", "pooled", "pooled_ln")}
    bridges = {"magma": make_bridge("magma", DecoderConfig(width=24), 20).eval(),
               "pooled_ln": make_bridge("magma", DecoderConfig(width=24), 20, tokens=3).eval()}
    names = {"map": "proj", "norm": "ln"}
    for key, visual in (("magma", x["spatial"]), ("pooled_ln", x["pooled"][:, None])):
        with torch.no_grad():
            for ours, theirs in names.items():
                for w in ("weight", "bias"):
                    bridges[key].get_parameter(f"{ours}.{w}").copy_(tensors[f"{key}.{theirs}.{w}"])
        outputs[key] = bridges[key].prefix(visual)
        check(case, key, outputs[key], expected[key])
    loss = fixed_loss(torch.cat([y.flatten() for y in outputs.values()]))
    loss.backward()
    check(case, "grad.loss", loss.detach(), expected["grad.loss"])
    for key, bridge in bridges.items():
        for ours, theirs in names.items():
            for w in ("weight", "bias"):
                name = f"grad.{key}.{theirs}.{w}"
                check(case, name, bridge.get_parameter(f"{ours}.{w}").grad, expected[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_adapters_are_the_authors_in_every_form_and_place(variant, tmp_path):
    folder, case, x, expected = golden(CASE)
    decoder = load_decoder(folder)
    check(case, "plain.logits", decoder(embeds=x["embeds"]), expected["plain.logits"])
    file = tmp_path / "magma.safetensors"
    write_tensors(file, published(variant))
    bridge = load_bridge("magma", file, decoder=decoder.config, **options_of(variant))
    names = magma_file(Checkpoint(file), {}, **options_of(variant)).names
    logits, hidden = decoder(embeds=x["embeds"], bridge=bridge, return_hidden=True)
    check(case, f"{variant}.logits", logits, expected[f"{variant}.logits"])
    check(case, f"{variant}.hidden_1", hidden[1], expected[f"{variant}.hidden_1"])
    loss = fixed_loss(logits)
    loss.backward()
    check(case, f"grad.{variant}.loss", loss.detach(), expected[f"grad.{variant}.loss"])
    mine = {f"grad.{variant}.{names[name]}": p.grad for name, p in bridge.named_parameters()
            if name.startswith("adapters.")}
    theirs = [key for key in expected if key.startswith(f"grad.{variant}.") and not key.endswith(".loss")]
    assert set(mine) == set(theirs)
    for key in theirs:
        check(case, key, mine[key], expected[key])


@pytest.mark.parametrize("variant, misread", [
    ("mlp-parallel", dict(form="normal")), ("mlp-normal", dict(form="parallel")),
    ("attention-parallel", dict(form="normal")), ("mlp-scaled_parallel", dict(scale=None))])
def test_a_misreading_fails_its_case(variant, misread, tmp_path):
    """The input of f taken for its output, and the scale forgotten."""
    folder, _, x, expected = golden(CASE)
    file = tmp_path / "magma.safetensors"
    write_tensors(file, published(variant))
    bridge = load_bridge("magma", file, **options_of(variant))
    for module in bridge.modules():
        if isinstance(module, Adapter):
            vars(module).update(misread) if "form" in misread else setattr(module, "scale", None)
    with torch.no_grad():
        logits = load_decoder(folder)(embeds=x["embeds"], bridge=bridge)
    assert (logits - expected[f"{variant}.logits"]).abs().max() > 1e-2


def test_the_authors_checkpoint_of_a_whole_model_loads_its_bridge_alone(tmp_path, capsys):
    """GPT-J's names, the wrapped decoder and the CNN beside the bridge, in a pickle under "module"."""
    tensors = {name.replace("model.layers.", "lm.transformer.h.").replace("self_attn", "attn"): t
               for name, t in published("both-normal").items()}
    rest = {"lm.transformer.h.0.mlp.0.fc_in.weight": torch.zeros(2, 2), "lm.lm_head.bias": torch.zeros(3),
            "lm.transformer.h.0.attn.attn_block.attention.bias": torch.ones(2, dtype=torch.bool),
            "image_prefix.enc.conv1.weight": torch.zeros(1)}
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {**tensors, **rest}, "lr_scheduler": None}, file)
    bridge = load_bridge("magma", file)
    assert "4 tensors are not the bridge's" in capsys.readouterr().err
    assert {part: [a.form for a in adapters] for part, adapters in bridge.adapters.items()} == {
        "mlp": ["normal", "normal"], "attention": ["normal", "normal"]}
    assert torch.equal(bridge.adapters["attention"][1].up.weight,
                       tensors["lm.transformer.h.1.attn.adapter.2.weight"])
    assert torch.equal(bridge.map.weight, tensors["image_prefix.proj.weight"])
    parallel = {name.replace("attn_block", "module").replace("mlp.1", "mlp"): t
                for name, t in {**tensors, **rest}.items()}
    write_tensors(tmp_path / "parallel.safetensors", {n: t.float() for n, t in parallel.items()})
    bridge = load_bridge("magma", tmp_path / "parallel.safetensors")
    assert {a.form for adapters in bridge.adapters.values() for a in adapters} == {"parallel"}


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.layers.1.mlp.1.adapter.2.bias"), '"model.layers.1.mlp.1.adapter.2.bias" is miss'),
    (lambda t: t.pop("image_prefix.ln.weight"), '"image_prefix.ln.weight" is missing'),
    (lambda t: t.update({"model.layers.0.mlp.1.adapter.3.weight": torch.zeros(2, 2)}), "not part of this"),
    (lambda t: t.update({"model.layers.1.self_attn.adapter.0.weight": torch.zeros(6, 24)}), "not part of"),
    (lambda t: t.update({"model.layers.1.mlp.1.adapter.0.weight": torch.zeros(5, 24)}), r"\(5, 24\).*\(6,"),
    (lambda t: [t.pop(n) for n in list(t) if "adapter" in n], "holds no adapters")])
def test_a_file_that_does_not_fit_is_refused_in_words(change, words, tmp_path):
    tensors = published("mlp-normal")
    change(tensors)
    write_tensors(tmp_path / "magma.safetensors", tensors)
    with pytest.raises(UserError, match=words):
        load_bridge("magma", tmp_path / "magma.safetensors")


def test_a_decoder_of_another_depth_is_told(tmp_path):
    write_tensors(tmp_path / "magma.safetensors", published("mlp-normal"))
    with pytest.raises(UserError, match="n_layers is 4, but the tensors say 2"):
        load_bridge("magma", tmp_path / "magma.safetensors", decoder=TINY)


@pytest.mark.parametrize("options, published_size", [
    ({}, 235_024_384), (dict(attention="normal", factor=8), 235_139_072)])
def test_the_published_sizes(options, published_size):
    with torch.device("meta"):
        bridge = make_bridge("magma", DecoderConfig(width=4096, layers=28), 3072, **options)
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(bridge.adapters) == published_size
    assert count(bridge.map) == 12_587_008 and count(bridge.norm) == 8_192


@pytest.mark.parametrize("form", ["normal", "parallel", "scaled_parallel"])
def test_an_adapter_is_born_almost_as_nothing_and_is_nothing_without_its_way_up(form):
    decoder, tokens = tiny_decoder(), torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    bridge = make_bridge("magma", TINY, 20, mlp=form, attention=form)
    weights = torch.cat([p.flatten() for n, p in bridge.adapters.named_parameters() if "scale" not in n])
    assert weights.abs().max() <= 2e-3 and 8e-4 < weights.std() < 1e-3      # the tails beyond 2 σ are cut
    with torch.no_grad():
        plain, changed = decoder(tokens), decoder(tokens, bridge=bridge)
        assert 0 < (changed - plain).abs().max() < 0.05
        for name, p in bridge.named_parameters():
            if ".up." in name:
                p.zero_()
        assert torch.equal(decoder(tokens, bridge=bridge), plain)
        bare = make_bridge("magma", TINY, 20, mlp="none")
        assert not len(bare.adapters) and torch.equal(decoder(tokens, bridge=bare), plain)


@pytest.mark.parametrize("options, words", [
    (dict(mlp="serial"), 'option mlp is one of none, normal.*"serial"'),
    (dict(attention="both"), 'option attention is one of'), (dict(factor=33), "factor is 33, more than the")])
def test_an_impossible_option_is_said_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        make_bridge("magma", TINY, 20, **options)


def test_adapters_treat_the_positions_of_a_picture_as_words():
    """Each position by itself: what an adapter adds at one word does not depend on the others."""
    adapter = tiny_vlm("magma").bridge.adapters["mlp"][0]
    n = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = adapter(torch.tanh, n)
        torch.testing.assert_close(y[:, 2:3], adapter(torch.tanh, n[:, 2:3]))
