"""What the test files share: published code's own numbers (tests/golden) and small models that hide nothing
behind zeros.

A golden case is a folder with a small model of random weights, the tensors that went in and what a published
implementation made of them (case.json names it and its version); nothing in there was computed by our code.
"""
from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))

from papers import make_bridge
from papers.mllama import Mllama
from papers.mllama_vit import TiledViT, TiledViTConfig, Tiles                   # noqa: E402  (after the path)
from model import Decoder, DecoderConfig, VLM, ViT, ViTConfig                   # noqa: E402
from support.formats import load_decoder, load_tokenizer, load_vit, save_vlm      # noqa: E402
from support.formats.files import write_tensors                                 # noqa: E402
from support.formats.tokenizers import byte_letters                            # noqa: E402
from support.worlds.text import shapes_tokenizer                                # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a minute or more; runs with --slow alone")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


def golden(name: str):
    """(folder, case.json, inputs, expected) of a case."""
    folder = GOLDEN / name
    return (folder, json.loads((folder / "case.json").read_text(encoding="utf-8")),
            load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors"))


def check(case: dict, key: str, mine: torch.Tensor, expected: torch.Tensor) -> None:
    """Integers exactly; gradients against their largest entry; the rest elementwise. The bounds are the
    case's own (1e-4 in float32: the references are within 1e-5 of float64, so this leaves room for another
    order of summation and for nothing else)."""
    tolerance = case["tolerance"]
    assert mine.shape == expected.shape, f"{key}: shape {tuple(mine.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(mine, expected), key
    elif key.startswith("grad.") and key != "grad.loss":
        worst = (mine - expected).abs().max()
        assert worst <= tolerance["grad_rtol_of_max"] * expected.abs().max() + 1e-7, (
            f"{key}: off by {worst:.2e}"
        )
    else:
        torch.testing.assert_close(
            mine, expected, atol=tolerance["atol"], rtol=tolerance["rtol"], msg=lambda m: f"{key}: {m}"
        )


def check_states(case: dict, hidden: list, expected: dict) -> None:
    """All hidden states; a failure names the first that differs (0 = embeddings, i = after layer i) and by
    how much."""
    names = [k for k in expected if k.startswith("hidden_states.")]
    assert len(hidden) == len(names)
    for i, mine in enumerate(hidden):
        theirs = expected[f"hidden_states.{i}"]
        if not torch.allclose(mine, theirs, atol=case["tolerance"]["atol"], rtol=case["tolerance"]["rtol"]):
            pytest.fail(f"{case['case']}: hidden state {i} of 0..{len(names) - 1} is the first that differs, "
                        f"by {(mine - theirs).abs().max():.3e} at most")


def check_decoder(name: str, decoder: Decoder) -> None:
    """Logits, every state, a padded batch and greedy tokens of a golden case."""
    _, case, x, expected = golden(name)
    with torch.no_grad():
        logits, hidden = decoder(x["input_ids"], return_hidden=True)
        check_states(case, hidden, expected)
        check(case, "logits", logits, expected["logits"])
        mask = x["padded_attention_mask"].bool()
        check(
            case,
            "padded_logits",
            decoder(x["padded_input_ids"], mask) * mask[..., None],
            expected["padded_logits"],
        )
    check(
        case, "generated_ids", decoder.generate(x["prompt_ids"], max_new_tokens=12), expected["generated_ids"]
    )


def fixed_loss(y: torch.Tensor) -> torch.Tensor:
    """The scalar whose gradients the golden cases hold: 10 · mean_i( y_i · cos(0.37 i + 0.1) ), i counts y in
    C order."""
    wave = torch.cos(0.37 * torch.arange(y.numel(), dtype=torch.float64) + 0.1).to(y.dtype)
    return 10 * (y.flatten() * wave).mean()


def stir(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values for every parameter, so that nothing hides behind a zero: gates open, norm weights not 1,
    biases not 0."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if name.endswith("gate"):
                p.copy_(0.7 * noise + 0.3)
            elif p.ndim < 2:
                p.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
            else:
                p.copy_(noise / math.sqrt(p[0].numel()))
    return module.eval()


TINY = DecoderConfig(
    vocab_size=61, width=32, layers=4, heads=4, kv_heads=2, head_width=8, hidden=48, tied=False
)
TINY_VIT = ViTConfig(
    image_size=24, patch=8, width=20, layers=3, heads=2, hidden=40
)  # 9 patches and a class token

# every bridge with options that fit the tiny decoder and ViT
SMALL = {
    "linear": {}, "mlp": {}, "frozen": {}, "limber": {}, "clipcap": dict(tokens=3),
    "clipcap_transformer": dict(tokens=3, image_tokens=2, layers=2, heads=2),
    "mapl": dict(constants=3, width=16, layers=2, heads=2),
    "qformer": dict(queries=3, width=16, layers=3, heads=2, hidden=24),
    "minigpt4": dict(queries=3, width=16, layers=3, heads=2, hidden=24), "minigpt4_llama2": dict(join=1),
    "kosmos1": dict(queries=3, heads=2), "cogvlm": {},
    "magma": dict(attention="scaled_parallel", adapter_norm=True),
    "fromage": dict(tokens=3, joint=12), "vlkd": dict(joint=12),
    "gligen": dict(layers=2, heads=2, context=6, hidden=12, tuned=True),
    "prompt_tuning": dict(prompts=3), "prefix_tuning": dict(prompts=3, hidden=12),
    "zero_init": dict(prompts=3, adapted=3, width=16, depth=2, heads=2),
    "flamingo": dict(every=2, first=1, latents=3, depth=2, heads=2, head_width=8),
    "idefics": dict(every=2, latents=3, depth=2, resampler_heads=2, resampler_head_width=8),
    "told": dict(slots=1, tokens=3, ahead=1, behind=1, vocabulary=40, width=16, layers=2, heads=2),
    "told_flamingo": dict(every=2, slots=1, tokens=3, vocabulary=40, width=16, layers=2, heads=2),
    "visualgpt": dict(levels=2, heads=2, hidden=24), "vcgpt": dict(layers=2, heads=2, hidden=24),
}


def writes_first(text: str, i: int) -> dict:
    """The post-processor of a tokenizer.json that puts a special token in front of a text."""
    return {"type": "TemplateProcessing", "pair": [], "special_tokens": {
                text: {"id": text, "ids": [i], "tokens": [text]}},
            "single": [{"SpecialToken": {"id": text, "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}]}


def write_byte_tokenizer(folder: Path, special: tuple[str, ...], post_processor: dict | None = None,
                         normalizer: dict | None = None, pre_tokenizer: dict | None = None, added: tuple = (),
                         **settings) -> None:
    """A published folder's tokenizer.json whose words are the 256 bytes, id = byte; its special tokens follow
    from 256 on, then `added`, entries of added_tokens. settings: of tokenizer_config.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    entries = [{"content": text} for text in special] + list(added)
    content = {
        "version": "1.0", "added_tokens": [{"id": 256 + n, **flags, **e} for n, e in enumerate(entries)],
        "normalizer": normalizer, "post_processor": post_processor, "decoder": {"type": "ByteLevel"},
        "pre_tokenizer": pre_tokenizer or {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": {letter: b for b, letter in byte_letters().items()}, "merges": []}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def speaking(tmp_path, case: str) -> Path:
    """A golden model whose vocabulary is as large as that of a small tokenizer: words and head get random
    rows, config.json knows."""
    source = golden(case)[0]
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    for other in tmp_path.glob("model.*.safetensors"):
        other.unlink()
    content = json.loads((GOLDEN / "sentencepiece-llama-style" / "tokenizer.json").read_text())
    if "idefics" in case:
        marks = ("<fake_token_around_image>", "<end_of_utterance>")
        content["added_tokens"] += [{"id": 640 + n, "content": mark, "special": True}
                                    for n, mark in enumerate(marks)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((tmp_path / "config.json").read_text())
    V = 1 + max(*content["model"]["vocab"].values(), *(entry["id"] for entry in content["added_tokens"]))
    text = config.get("text_config", config)
    words = text["vocab_size"]
    tensors = load_file(tmp_path / "model.safetensors")
    g = torch.Generator().manual_seed(0)
    for name, t in tensors.items():
        grown = {"embed_tokens.weight": words + (8 if case == "mllama" else 0), "lm_head.weight": words}
        if any(name.endswith(end) and len(t) == rows for end, rows in grown.items()):
            tensors[name] = torch.cat((t, torch.randn(V, t.shape[1], generator=g)))
    text["vocab_size"] = words + V
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path / "model.safetensors", tensors)
    if case in ("instructblip-llama", "blip2-itm-itc"):  # the Q-Former reads BERT's words
        (tmp_path / "tokenizer.json").rename(tmp_path / "llama.json") if case == "blip2-itm-itc" else None
        folder = tmp_path / ("" if case == "blip2-itm-itc" else "qformer_tokenizer")
        shutil.copytree(GOLDEN / "wordpiece-bert-style" / "old", folder, dirs_exist_ok=True)
        rows = load_tokenizer(folder).vocab_size
        config["qformer_config"]["vocab_size"] += rows
        for name in [n for n in tensors if n.endswith("word_embeddings.weight")]:
            tensors[name] = torch.cat((tensors[name], torch.randn(rows, tensors[name].shape[1], generator=g)))
        (tmp_path / "config.json").write_text(json.dumps(config))
        write_tensors(tmp_path / "model.safetensors", tensors)
    return tmp_path


def chain_decoder(vocab_size: int, follow: dict[int, int]) -> Decoder:
    """A decoder whose next token depends on the last one alone: `follow` maps a token to the next."""
    model = Decoder(DecoderConfig(vocab_size=vocab_size, width=vocab_size, layers=1, heads=1, kv_heads=1,
                                  head_width=8, hidden=8, tied=False)).requires_grad_(False).eval()
    model.embed.weight.copy_(torch.eye(vocab_size))
    for p in model.layers[0].parameters():
        if p.ndim == 2:
            p.zero_()
    model.lm_head.weight.zero_()
    for token, after in follow.items():
        model.lm_head.weight[after, token] = 1
    return model


def tiny_decoder(seed: int = 0, **changes) -> Decoder:
    return stir(Decoder(DecoderConfig(**{**TINY.__dict__, **changes})), seed)


def shapes_vlm(name: str, **options) -> VLM:
    """An untrained bridge between the bundled towers."""
    torch.manual_seed(0)
    decoder = load_decoder(ROOT / "weights/decoder")
    return VLM(load_vit(ROOT / "weights/vit"), make_bridge(name, decoder.config, 128, **options), decoder,
               shapes_tokenizer().special["<image>"]).eval()


def tiny_vlm(
    name: str, seed: int = 0, image_token: int | None = None, stirred: bool = True, **options
) -> VLM:
    """ViT, bridge and decoder of width 32; `stirred=False` leaves the bridge as it is born (gates at
    zero)."""
    torch.manual_seed(seed)
    bridge = make_bridge(name, TINY, TINY_VIT.width, **{**SMALL[name], **options})
    bridge = stir(bridge, seed + 1) if stirred else bridge.eval()
    return VLM(stir(ViT(TINY_VIT), seed + 2), bridge, tiny_decoder(seed + 3), image_token).eval()


SMALL_TILES = TiledViTConfig(
    image_size=8,
    patch=4,
    width=24,
    inner=12,
    layers=2,
    heads=2,
    hidden=16,
    global_layers=1,
    taps=(0,),
    tiles=3,
    aspects=5,
)


def small_vlm(leak: bool = False, layers: tuple = (0, 2, 2)) -> VLM:
    torch.manual_seed(0)
    bridge = stir(Mllama(TINY, SMALL_TILES.width, list(layers), leak), 1)
    return VLM(stir(TiledViT(SMALL_TILES), 2), bridge, tiny_decoder(3), image_token=7).eval()


def small_pictures(n: int = 4, seed: int = 0) -> Tiles:
    """1, 2, 3, 1, … tiles; absent ones are zeros."""
    mask = torch.arange(3) < 1 + torch.arange(n)[:, None] % 3
    pixels = torch.randn(n, 3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Tiles(pixels * mask[..., None, None, None], 1 + torch.arange(n), mask)


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory) -> str:
    """A run folder between the bundled towers: its answers are poor, but they are answers."""
    folder = tmp_path_factory.mktemp("run")
    save_vlm(shapes_vlm("linear"), folder, vit="weights/vit", decoder="weights/decoder")
    return str(folder)


@pytest.fixture(autouse=True)
def own_threads():
    """A run with --threads 1 must not slow down the tests after it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """A run draws its curves where matplotlib is, which takes longer than the steps of a test's run."""
    train = sys.modules.get("train")
    if train is not None and request.path.name not in ("test_curves.py", "test_ranks.py"):
        monkeypatch.setattr(train, "draw_curves", lambda *a, **kw: [])


@pytest.fixture
def decoder() -> Decoder:
    return tiny_decoder()
