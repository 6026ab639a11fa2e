"""Claim: `Decoder` is the published LLaMA to float32 rounding, however it is run: from one file or shards, in
new or old layouts, padded or not, with a cache or without; and a weight file that does not fit is refused by
name."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from conftest import TINY, check_decoder, golden, stir, tiny_decoder
from eval import generate_ids
from model import (Bridge, Cache, Decoder, DecoderConfig, RMSNorm, attend, attend_explicit, causal_mask,
                   next_token_loss, rope_frequencies, sample, visible_to_bias)
from papers.rope_scaling import Llama3Scaling
from support.formats.files import UserError
from support.formats.llama import load_decoder, save_decoder
from support.plumbing.beams import beam_search

CASES = ["llama-mha", "llama-gqa-tied", "llama-rope-llama3", "llama-sharded", "llama-bf16"]


def folder_of(name: str, layout: str, tmp_path):
    """The case as a model folder: as today's library writes it, or as published checkpoints look
    (config.hub.json, …)."""
    folder = golden(name)[0]
    if layout == "library":
        return folder
    for file in folder.iterdir():
        if file.name.startswith("model") and ".hub." not in file.name:
            shutil.copy(file, tmp_path)
    for hub in folder.glob("*.hub.*"):
        shutil.copy(hub, tmp_path / hub.name.replace(".hub", ""))
    return tmp_path


# --- the published numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["library", "hub"])
@pytest.mark.parametrize("name", CASES)
def test_logits_states_and_greedy_ids_are_the_published_ones(name, layout, tmp_path):
    check_decoder(name, load_decoder(folder_of(name, layout, tmp_path)))


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_stays_close_to_float32(name):
    folder, _, x, expected = golden(name)
    with torch.no_grad():
        mine = load_decoder(folder, dtype=torch.bfloat16)(x["input_ids"]).float()
    # bfloat16 keeps 8 bits: each rounding is up to 2^-9 = 0.2 %, a few dozen of them in a row add like a
    # random walk to about 1 %
    assert (mine - expected["logits"]).norm() <= 2e-2 * expected["logits"].norm()


def test_llama3_frequencies_are_the_published_values():
    # Llama 3.2 1B: 15 pairs unchanged, three interpolated, the rest divided by 32
    scaling = Llama3Scaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    plain = DecoderConfig(head_width=64, rope_theta=5e5)
    ratio = rope_frequencies(
        DecoderConfig(head_width=64, rope_theta=5e5, rope_scaling=scaling)
    ) / rope_frequencies(plain)
    published = torch.tensor([1.0] * 15 + [0.605573, 0.303743, 0.103448] + [1 / 32] * 14)
    torch.testing.assert_close(ratio, published, atol=1e-6, rtol=1e-6)          # six digits were published


def test_rmsnorm_rounds_before_it_multiplies_by_the_weight():
    x, norm = (
        torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16(),
        stir(RMSNorm(32, 1e-5)).bfloat16(),
    )
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(
        norm(x), norm.weight * y.bfloat16()
    )  # as published; the other order differs in the last bit
    assert not torch.equal(norm(x), (norm.weight.float() * y).bfloat16())


# --- attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_a_long_text_take_the_fused_kernel_and_agree(padded, monkeypatch):
    """Around EXPLICIT keys a decoder's logits and gradients on a CPU are the same by both roads, with padding
    and without."""
    decoder, T = tiny_decoder(), 24
    tokens = torch.randint(61, (2, T), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[0, :5] = not padded
    results = []
    for limit in (T, T - 1):  # the explicit road up to T keys, the fused kernel above
        monkeypatch.setattr("model.EXPLICIT", limit)
        logits = decoder(tokens, mask)[mask]
        results.append([logits, *torch.autograd.grad(logits.square().mean(), list(decoder.parameters()))])
    for a, b in zip(*results):                          # 1e-5 of the largest: float32, sums in another order
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


@pytest.mark.parametrize("kind", ["plain", "causal", "bias"])
def test_explicit_attention_equals_the_fused_kernel_with_gradients(kind):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=g, requires_grad=True) for _ in range(3))
    weight = torch.randn(2, 3, 7, 8, generator=g)
    visible = torch.rand(2, 1, 7, 7, generator=g) < 0.5
    bias = visible_to_bias(visible | torch.eye(7, dtype=torch.bool), q.dtype) if kind == "bias" else None
    fused = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=kind == "causal"
    )
    explicit_bias = visible_to_bias(causal_mask(7), q.dtype) if kind == "causal" else bias
    results = [fused, attend_explicit(q, k, v, explicit_bias), attend(q, k, v, bias, causal=kind == "causal")]
    with torch.no_grad():
        results.append(attend(q, k, v, bias, causal=kind == "causal"))
    for y in results:  # 1e-5: float32, sums of 8 terms in another order
        torch.testing.assert_close(y, fused, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in results[:3]]
    for mine in grads[1:]:
        for a, b in zip(mine, grads[0]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("T, kind", [(1, "plain"), (1, "bias"), (1, "heads"), (7, "causal"), (7, "bias")])
def test_query_heads_share_key_heads_on_every_road(T, kind):
    """(D5) by its own words: query head h reads key and value head h·G // H."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, m, 8, generator=g) for n, m in ((6, T), (2, 7), (2, 7)))
    bias = None if kind in ("plain", "causal") else \
        visible_to_bias(torch.rand(2, 6 if kind == "heads" else 1, T, 7, generator=g) < 0.7, q.dtype)
    full = visible_to_bias(causal_mask(T), q.dtype)[None, None] if kind == "causal" else bias
    of = lambda h: full if full is None or full.shape[1] == 1 else full[:, [h]]
    want = [attend_explicit(q[:, [h]], k[:, [h * 2 // 6]], v[:, [h * 2 // 6]], of(h)) for h in range(6)]
    found = [attend(q, k, v, bias, kind == "causal"), attend_explicit(q, k, v, full)]
    with torch.no_grad():
        found.append(attend(q, k, v, bias, kind == "causal"))
    for y in found:                                     # 1e-5: float32, sums of 7 terms in another order
        torch.testing.assert_close(y, torch.cat(want, 1), atol=1e-5, rtol=1e-5)


def test_a_query_sees_itself_and_the_past_only():
    decoder, tokens = tiny_decoder(), torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 61
    with torch.no_grad():
        a, b = decoder(tokens), decoder(changed)
    assert torch.equal(a[:, :5], b[:, :5])  # bit for bit: masked keys weigh exactly 0
    assert (a[:, 5:] - b[:, 5:]).abs().amax(-1).min() > 1e-4                    # all later positions move


# --- padding and cache --------------------------------------------------------------------------------------

# 1e-5 below: float32; another shape of the matrices sums the same terms in another order, and logits are of
# order 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(decoder, side):
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(61, (n,), generator=g) for n in (3, 8, 5)]
    tokens, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(8 - len(row), 8) if side == "left" else slice(0, len(row))
        tokens[i, at], mask[i, at] = row, True
    with torch.no_grad():
        logits = decoder(tokens, mask)
        assert torch.isfinite(logits).all()  # padding rows too: nothing is NaN
        for i, row in enumerate(rows):
            torch.testing.assert_close(logits[i][mask[i]], decoder(row[None])[0], atol=1e-5, rtol=1e-5)


def test_what_stands_under_the_padding_does_not_matter(decoder):
    tokens = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    other = torch.where(mask, tokens, (tokens + 7) % 61)
    with torch.no_grad():
        assert torch.equal(decoder(tokens, mask)[mask], decoder(other, mask)[mask])


@pytest.mark.parametrize("chunks", [[9], [4, 1, 1, 3], [1] * 9])
@pytest.mark.parametrize("padded", [False, True])
def test_the_cache_changes_nothing(decoder, chunks, padded):
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.bool)
    if padded:
        mask[1, :3] = False
    cache, at, parts = Cache(decoder.config, 2, 9, "cpu", torch.float32), 0, []
    with torch.no_grad():
        for n in chunks:
            parts.append(decoder(tokens[:, at:at + n], mask[:, at:at + n] if padded else None, cache=cache))
            at += n
        whole = decoder(tokens, mask if padded else None)
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], atol=1e-5, rtol=1e-5)


def test_greedy_with_a_cache_is_greedy_by_recomputation(decoder):
    tokens = torch.randint(61, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    text, real = tokens, mask
    with torch.no_grad():
        for _ in range(8):
            text = torch.cat((text, decoder(text, real)[:, -1].argmax(-1, keepdim=True)), 1)
            real = torch.cat((real, real.new_ones(2, 1)), 1)
    assert torch.equal(decoder.generate(tokens, max_new_tokens=8, mask=mask), text[:, 5:])
    assert torch.equal(
        decoder.generate(tokens[:1, 2:], max_new_tokens=8), text[:1, 5:]
    )  # and a batch is its singles


# --- generation ---------------------------------------------------------------------------------------------

PROMPT = torch.randint(61, (3, 4), generator=torch.Generator().manual_seed(5))


def test_a_row_that_has_stopped_repeats_its_stop_id_and_all_stopped_ends_it(decoder):
    free = decoder.generate(PROMPT, 12)
    stop = (int(free[0, 3]), int(free[1, 5]))
    ids = decoder.generate(PROMPT, 12, stop=stop)
    for mine, row in zip(ids, free):
        ends = [i for i, t in enumerate(row.tolist()) if t in stop]
        end = ends[0] if ends else len(row)
        assert torch.equal(mine[:end + 1], row[:end + 1][:len(mine)])           # untouched up to the stop id
        assert (mine[end:] == row[end:end + 1]).all()                           # and then that id
    every = tuple(free[:, 2].tolist())
    assert decoder.generate(PROMPT, 12, stop=every).shape[1] <= 3  # all rows have stopped: no further step


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_padded_on_either_side_goes_on_as_it_does_alone(decoder, beams):
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    tokens = torch.randint(61, mask.shape, generator=torch.Generator().manual_seed(8))
    together = generate_ids(decoder, tokens, 6, beams, mask=mask)           # an integer mask of 0 and 1, too
    assert torch.equal(together, generate_ids(decoder, tokens, 6, beams, mask=mask.bool()))
    for row, real, ids in zip(tokens, mask.bool(), together):
        assert torch.equal(ids[None], generate_ids(decoder, row[None, real], 6, beams))


@pytest.mark.parametrize("arguments, words", [
    (dict(temperature=-1.0), "temperature -1.0"), (dict(temperature=math.nan), "temperature nan"),
    (dict(temperature=math.inf), "temperature inf"), (dict(top_k=-1), "top_k -1"),
    (dict(top_k=2.5), "top_k 2.5"), (dict(top_k=math.nan), "top_k nan"), (dict(top_p=0.0), "top_p 0.0"),
    (dict(top_p=-0.1), "top_p -0.1"), (dict(top_p=1.1), "top_p 1.1"), (dict(top_p=math.nan), "top_p nan"),
    (dict(temperature=0.0, top_p=math.inf), "top_p inf"), (dict(max_new_tokens=0), "max_new_tokens is 0"),
    (dict(max_new_tokens=math.nan), "max_new_tokens is nan")])
def test_a_number_of_sampling_outside_its_bounds_is_named(decoder, arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)) as e:
        decoder.generate(PROMPT, **{"temperature": 1.0, **arguments})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_that_is_empty_or_beyond_the_context_is_refused(beams):
    decoder = tiny_decoder(context=4)
    assert generate_ids(decoder, PROMPT[:, :4], 3, beams).shape == (3, 3)
    padded = torch.tensor([[False] * 3 + [True] * 4] * 3)
    assert generate_ids(decoder, PROMPT.repeat(1, 2)[:, :7], 3, beams, mask=padded).shape == (3, 3)
    for tokens, mask, count in ((PROMPT.repeat(1, 2)[:, :5], None, 5), (PROMPT[:, :0], None, 0),
                                (PROMPT, torch.arange(4) < torch.tensor([[4], [0], [2]]), 0)):
        with pytest.raises(ValueError, match=f"a prompt has {count} tokens.*reads 1 to 4"):
            generate_ids(decoder, tokens, 3, beams, mask=mask)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_packed_row_is_no_prompt(decoder, beams):
    """Its numbers say where a document ends; read as plain padding, two documents would be one text."""
    with pytest.raises(ValueError, match="a prompt is one document"):
        generate_ids(decoder, PROMPT, 3, beams, mask=torch.tensor([[1, 1, 2, 2]] * len(PROMPT)))


def test_the_likeliest_of_one_is_greedy(decoder):
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        assert torch.equal(
            decoder.generate(PROMPT, 8, temperature=1.3, top_k=1, generator=g), decoder.generate(PROMPT, 8)
        )
        assert torch.equal(
            decoder.generate(PROMPT, 8, temperature=1.3, top_p=1e-6, generator=g), decoder.generate(PROMPT, 8)
        )
        for temperature in (1e-9, 1e-29, 1e-45, 5e-324):        # the limit: no quotient overflows
            assert torch.equal(decoder.generate(PROMPT, 8, temperature), decoder.generate(PROMPT, 8))


@pytest.mark.parametrize("top_k, top_p, kept", [
    (0, 1.0, {0, 1, 2, 3, 4}), (3, 1.0, {0, 1, 2}), (99, 1.0, {0, 1, 2, 3, 4}),
    (0, 0.45, {0}), (0, 0.5, {0, 1}), (0, 0.7, {0, 1}), (0, 0.75, {0, 1, 2}),   # p: .48 .24 .16 .08 .04
    (3, 0.9, {0, 1, 2}), (2, 0.6, {0}), (2, 0.7, {0, 1})])                      # after top_k=2, p is 2/3, 1/3
def test_sampling_keeps_exactly_the_nucleus_in_its_proportions(top_k, top_p, kept):
    p = torch.tensor([0.48, 0.24, 0.16, 0.08, 0.04])
    order = torch.tensor([3, 0, 4, 1, 2])  # the likeliest is not the first id
    logits = torch.empty(5).scatter(0, order, p.log())
    n = 20000
    drawn = sample(logits.expand(n, -1), 1.0, top_k, top_p, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=5)[order] / n
    assert {i for i in range(5) if share[i] > 0} == kept
    want = torch.where(torch.tensor([i in kept for i in range(5)]), p, 0.0)
    # 0.015: four standard deviations of a share of 1/2 over 20,000 draws
    assert (share - want / want.sum()).abs().max() < 0.015


def test_temperature_sharpens():
    logits = torch.tensor([[1.0, 0.0]]).expand(20000, -1)
    for t in (0.5, 2.0):
        share = (sample(logits, t, 0, 1.0, torch.Generator().manual_seed(0)) == 0).float().mean()
        assert abs(share - torch.sigmoid(torch.tensor(1 / t))) < 0.015          # four standard deviations


# --- weights on disk ----------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    def copy(name="llama-mha"):
        for file in golden(name)[0].iterdir():
            if file.name.startswith(("model", "config.json")) and ".hub." not in file.name:
                shutil.copy(file, tmp_path)
        return tmp_path
    return copy


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


DOWN = "model.layers.1.mlp.down_proj.weight"


def test_a_missing_tensor_is_named(copy):
    rewrite(folder := copy(), lambda t: t.pop(DOWN))
    with pytest.raises(UserError, match=rf'"{DOWN}" is missing.*\(32, \d+\)') as e:
        load_decoder(folder)
    assert str(folder) in str(e.value)


def test_an_extra_tensor_is_named(copy):
    rewrite(folder := copy(), lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    with pytest.raises(UserError, match=r'1 tensors.*"model\.layers\.0\.self_attn\.q_proj\.bias"'):
        load_decoder(folder)


def test_a_wrongly_shaped_tensor_is_named_with_both_shapes(copy):
    rewrite(folder := copy(), lambda t: t.update({DOWN: t[DOWN].T.contiguous()}))
    with pytest.raises(
        UserError, match=rf'model\.safetensors: tensor "{DOWN}" has shape \(\d+, 32\).* expects \(32, \d+\)'
    ):
        load_decoder(folder)


def test_an_untied_model_never_ties_silently(copy):
    rewrite(folder := copy(), lambda t: t.pop("lm_head.weight"))
    with pytest.raises(UserError, match='"lm_head.weight" is missing'):
        load_decoder(folder)


def test_a_truncated_file_is_named(copy):
    file = copy() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file.*truncated"):
        load_decoder(file.parent)


def test_a_missing_folder_config_or_shard_is_named(copy, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_decoder(tmp_path / "nowhere")
    folder = copy("llama-sharded")
    (folder / "model-00003-of-00005.safetensors").unlink()
    with pytest.raises(UserError, match="model-00003-of-00005.safetensors, which is missing"):
        load_decoder(folder)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(UserError, match="no .safetensors file"):
        load_decoder(folder)
    (folder / "config.json").write_text("{not json")
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        load_decoder(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": None}, "hidden_size.* is missing"),
        ({"rope_scaling": {"rope_type": "longrope"}}, '"longrope" is not supported'),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'factor' is missing"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"head_dim": 7}, "must be even, not 7"),
    ],
)
def test_a_config_that_cannot_work_is_refused_in_words(copy, change, message):
    file = copy() / "config.json"
    config = {
        k: v
        for k, v in {**json.loads(file.read_text()), "rope_parameters": None, **change}.items()
        if v is not None
    }
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_decoder(file.parent)


@pytest.mark.parametrize("name", CASES)
def test_saving_writes_the_published_names_and_loads_back_to_the_bit(name, tmp_path):
    folder, _, x, _ = golden(name)
    decoder = load_decoder(folder)
    save_decoder(decoder, tmp_path, bos_token_id=1)
    theirs = {
        k: v.shape
        for file in folder.glob("model*.safetensors")
        if ".hub." not in file.name
        for k, v in load_file(file).items()
    }
    assert {k: v.shape for k, v in load_file(tmp_path / "model.safetensors").items()} == theirs
    assert json.loads((tmp_path / "config.json").read_text())["bos_token_id"] == 1
    again = load_decoder(tmp_path)
    assert again.config == decoder.config
    with torch.no_grad():
        assert torch.equal(again(x["input_ids"]), decoder(x["input_ids"]))


def test_biases_are_saved_and_loaded(tmp_path):
    decoder = stir(Decoder(DecoderConfig(**{**TINY.__dict__, "attention_bias": True, "mlp_bias": True})))
    save_decoder(decoder, tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert {f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkvo"} | {
        f"model.layers.3.mlp.{p}_proj.bias" for p in ("gate", "up", "down")
    } <= keys
    again = load_decoder(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(PROMPT), decoder(PROMPT))


def test_loading_into_bfloat16_leaves_no_float32_behind():
    decoder = load_decoder(golden("llama-mha")[0], dtype=torch.bfloat16)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert not decoder.training and not any(p.is_meta for p in decoder.parameters())


# --- sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V, D, hidden, L, H, G, E, tied, published", [
    (32000, 4096, 11008, 32, 32, 32, 128, False, 6_738_415_616),                # LLaMA 7B, Llama-2 7B
    (32000, 5120, 13824, 40, 40, 40, 128, False, 13_015_864_320),               # LLaMA 13B
    (128256, 4096, 14336, 32, 32, 8, 128, False, 8_030_261_248),                # Llama-3 8B
    (128256, 2048, 8192, 16, 32, 8, 64, True, 1_235_814_400),                   # Llama-3.2 1B
    (128256, 3072, 8192, 28, 24, 8, 128, True, 3_212_749_824),                  # Llama-3.2 3B
    (32000, 2048, 5632, 22, 32, 4, 64, False, 1_100_048_384),                   # TinyLlama
    (49152, 576, 1536, 30, 9, 3, 64, True, 134_515_008),                        # SmolLM2 135M
    (49152, 960, 2560, 32, 15, 5, 64, True, 361_821_120),                       # SmolLM2 360M
    (49152, 2048, 8192, 24, 32, 32, 64, True, 1_711_376_384)])  # SmolLM2 1.7B
def test_the_published_sizes_have_the_published_number_of_parameters(
    V, D, hidden, L, H, G, E, tied, published
):
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(V, D, L, H, G, E, hidden, tied=tied))
    assert sum(p.numel() for p in decoder.parameters()) == published


class Recorder(Bridge):
    """Writes down which seam is called where, and adds to the logits what `finish` remembers."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def before(self, layer, x, visual):
        self.calls.append(f"{layer} before")
        return x

    def between(self, layer, x, visual):
        self.calls.append(f"{layer} between")
        return x

    def around(self, layer, part, f, visual, *x):
        self.calls.append(f"{layer} {part}")
        return f(*x)

    def rope_positions(self, p, visual):
        return p + 5

    def finish(self, h, visual):
        return torch.cat((h, h.square()), dim=-1)

    def head(self, h, head):
        h, more = h.chunk(2, dim=-1)
        return head(h) + 3 * head(more)


def test_each_seam_of_a_layer_is_called_once_and_in_the_order_of_the_block(decoder):
    bridge = Recorder()
    decoder(torch.tensor([[1, 2, 3]]), bridge=bridge)
    parts = ("before", "attention", "qkv", "attend", "o", "between", "mlp")
    assert bridge.calls == [f"{layer} {part}" for layer in range(decoder.config.layers) for part in parts]


def test_rope_sees_differences_of_positions_alone(decoder):
    tokens = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(decoder.states(tokens, bridge=Recorder())[-2], decoder.states(tokens)[-2],
                               atol=1e-5, rtol=1e-5)        # another angle, the same products up to rounding


def test_logits_a_bridge_adds_are_those_of_the_forward_the_loss_and_both_ways_to_generate(decoder):
    tokens, bridge = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), Recorder()
    logits = decoder(tokens, bridge=bridge)
    h = decoder.states(tokens, bridge=Recorder())[-1][..., :decoder.config.width]
    torch.testing.assert_close(logits, decoder.head(h) + 3 * decoder.head(h.square()))
    total, count = next_token_loss(decoder, tokens, embeds=decoder.embed(tokens), bridge=bridge)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(total, expected)
    new = decoder.generate(tokens, 4, bridge=bridge)
    text = tokens
    for _ in range(4):
        text = torch.cat((text, decoder(text, bridge=bridge)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(new, text[:, 4:])
    assert torch.equal(beam_search(decoder, tokens, 4, beams=1, bridge=bridge), new)
