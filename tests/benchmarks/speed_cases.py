"""The cases of bench_speed.py: what is timed of ours and of the library's, on the same folder of weights.

A case is a function of (the command line's arguments, folder, side); it returns what is timed, which returns
a number that both sides must agree on.
"""
from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import peft                                                                     # noqa: E402  (after the path)
import transformers as t                                                        # noqa: E402
from safetensors.torch import save_file                                         # noqa: E402

import data                                                                     # noqa: E402
from model import IGNORE, IMAGE, VLM, next_token_loss                           # noqa: E402
from papers import make_bridge                                                  # noqa: E402
from support.formats.llama import load_decoder                                  # noqa: E402
from support.formats.tokenizer_files import load_tokenizer                      # noqa: E402
from support.formats.vision import load_vit                                     # noqa: E402
from support.formats.vlm import load_bridge, load_vlm                           # noqa: E402
from support.plumbing.beams import beam_search                                  # noqa: E402
from support.plumbing.optimizers import clip_gradients, make_optimizers         # noqa: E402
from support.plumbing.packed import packed                                      # noqa: E402

# decoder: layers, width, heads, key heads, feed-forward, words
# ViT: image, patch, width, layers, heads, feed-forward
SIZES = {
    "tiny": ((4, 128, 4, 2, 384, 512), (48, 16, 128, 4, 4, 512)),
    "135m": ((30, 576, 9, 3, 1536, 49152), (224, 16, 768, 12, 12, 3072)),
    "1b": ((16, 2048, 32, 8, 8192, 128256), (224, 14, 1024, 24, 16, 4096)),
    "7b": ((32, 4096, 32, 32, 11008, 32000), (336, 14, 1024, 24, 16, 4096)),
}
TRAINED = torch.float32     # trained parameters; frozen ones have the dtype asked for, autocast joins them
NEW = 128                   # tokens that are generated


# ---- The folder that both sides open ---------------------------------------------------------------------

def configs(size: str) -> tuple[dict, dict]:
    (L, D, H, G, hidden, V), (S, p, Di, Lv, Hv, hv) = SIZES[size]
    text = dict(num_hidden_layers=L, hidden_size=D, num_attention_heads=H, num_key_value_heads=G,
                head_dim=D // H, intermediate_size=hidden, vocab_size=V, max_position_embeddings=4096,
                tie_word_embeddings=V > 40000, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    vision = dict(image_size=S, patch_size=p, hidden_size=Di, num_hidden_layers=Lv, num_attention_heads=Hv,
                  intermediate_size=hv)
    return text, vision


def build(kind: str, size: str, folder: Path) -> None:
    """A random model of this kind in its own layout, float32."""
    text, vision = configs(size)
    torch.manual_seed(0)
    if kind == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**text))
    elif kind == "clip":
        model = t.CLIPVisionModel(t.CLIPVisionConfig(**vision, hidden_act="quick_gelu"))
    elif kind == "llava":
        model = t.LlavaForConditionalGeneration(t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**vision, hidden_act="quick_gelu"), image_token_index=3,
            text_config=t.LlamaConfig(**text), tie_word_embeddings=text["tie_word_embeddings"]))
    elif kind == "instructblip":
        former = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                      vocab_size=512 if size == "tiny" else 30523, encoder_hidden_size=vision["hidden_size"])
        if size == "tiny":
            former |= dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)
        model = t.InstructBlipForConditionalGeneration(t.InstructBlipConfig(
            vision_config=dict(vision, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True),
            qformer_config=former, text_config=dict(text, model_type="llama"), num_query_tokens=32,
            image_token_index=3))
    elif kind == "idefics":
        text.pop("num_key_value_heads"), text.pop("head_dim")
        layers = text["num_hidden_layers"]
        every = next(n for n in (5, 4, 2, 1) if layers % n == 0)    # a remainder makes the library fail
        tower = {"embed_dim" if k == "hidden_size" else k: x for k, x in vision.items()}
        resampler = dict(use_resampler=True, resampler_n_latents=64, resampler_depth=6, resampler_n_heads=8,
                         resampler_head_dim=64, qk_layer_norms_perceiver=False)
        model = t.IdeficsForVisionText2Text(t.IdeficsConfig(
            **text, additional_vocab_size=2, cross_layer_interval=every, use_resampler=True,
            alpha_initializer="ones", vision_config=dict(tower, hidden_act="gelu"),
            perceiver_config=resampler))
    model.save_pretrained(folder, max_shard_size="50GB")


class Composed(nn.Module):
    """What one would write where the library has no class: its ViT, a torch module and its LLaMA."""

    def __init__(self, vit: nn.Module, bridge: nn.Module, lm: nn.Module, layer: int, cls: bool):
        super().__init__()
        self.vit, self.bridge, self.lm, self.layer, self.cls = vit, bridge, lm, layer, cls

    def forward(self, input_ids, pixel_values, labels):
        with torch.no_grad():
            states = self.vit(pixel_values, output_hidden_states=True).hidden_states[self.layer]
        soft = self.bridge(states if self.cls else states[:, 1:])
        words = self.lm.get_input_embeddings()(input_ids)
        at = input_ids == 3
        embeds = words.masked_scatter(at[..., None], soft.to(words.dtype))
        return self.lm(inputs_embeds=embeds, attention_mask=torch.ones_like(input_ids), labels=labels)


class LibraryMAPL(nn.Module):
    """MAPL's mapper out of torch's own transformer; its names are those of the published file."""

    def __init__(self, Di: int, D: int, constants: int = 32, width: int = 256):
        super().__init__()
        self.down, self.up = nn.Linear(Di, width), nn.Linear(width, D)
        self.const = nn.Parameter(torch.randn(constants, width))
        layer = nn.TransformerEncoderLayer(width, 8, 2 * width, 0.0, norm_first=True, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x):
        x = self.down(x)
        x = torch.cat((x, self.const.expand(len(x), -1, -1).to(x.dtype)), dim=1)
        return self.up(self.transformer(x)[:, -len(self.const):])


# ---- Inputs, and a training step -------------------------------------------------------------------------

def batch(a, image: bool, rows: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens (B, T) with IMAGE at the second place, labels on the last quarter."""
    V = SIZES[a.size][0][5]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(10, V - 2, (rows or a.batch, a.text), generator=generator)
    if image:
        tokens[:, 1] = IMAGE
    labels = tokens.clone()
    labels[:, :-(a.text // 4)] = IGNORE
    return tokens.to(a.device), labels.to(a.device)


def unfold(tokens: torch.Tensor, labels: torch.Tensor, K: int, image: int = 3):
    """The library's prompt holds K image tokens where ours has one IMAGE."""
    def wide(x: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.cat((x[:, :1], torch.full((len(x), K), fill, device=x.device), x[:, 2:]), dim=1)
    return wide(tokens, image), wide(labels, IGNORE)


def pictures(a, rows: int = 0) -> torch.Tensor:
    S, generator = SIZES[a.size][1][0], torch.Generator().manual_seed(2)
    return torch.randn(rows or a.batch, 3, S, S, generator=generator).to(a.device, a.dtype)


def frozen_but(model: nn.Module, a, *trained: nn.Module) -> list[nn.Parameter]:
    """Everything frozen in the dtype asked for, these parts trained in float32."""
    model.to(a.device, a.dtype).requires_grad_(False)
    for part in trained:
        part.to(TRAINED).requires_grad_(True)
    return [p for part in trained for p in part.parameters()]


def step_of(a, parameters, loss_of, features=lambda: (), ours: bool = False):
    """The training step: forward under autocast, backward, clip, AdamW.

    ours: clipped and updated by what train.py calls; the library's by what its Trainer calls, fused too.
    features: what train.py computes before autocast.
    """
    if ours:
        module, named = nn.ParameterList(parameters), [("", p) for p in parameters]
        settings = SimpleNamespace(optimizer="adamw", lr=1e-4, beta2=0.999, weight_decay=0.01)
        optimizer, = make_optimizers(module, named, settings, None)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> float:
        seen = features()
        with torch.autocast(a.device, a.dtype, enabled=a.dtype != torch.float32):
            loss = loss_of(*seen)
        loss.backward()
        clip_gradients(named, 1.0) if ours else torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def ours_step(a, vlm: VLM, parameters, **extra):
    (tokens, labels), pixels = batch(a, True), pictures(a)

    @torch.no_grad()
    def features():
        return (vlm.features(pixels),)

    def loss(features):
        total, count = vlm.loss(tokens, labels, features=features, **extra)
        return total / count
    cached = features() if a.cached else None
    return step_of(a, parameters, loss, (lambda: cached) if a.cached else features, ours=True)


def compiled(a, model: nn.Module) -> nn.Module:
    """With --compile, the library's decoder compiled as a whole; ours is what train.py --compile does."""
    if a.compile:
        model.compile(dynamic=True)
    return model


# ---- Training cases --------------------------------------------------------------------------------------

def train_mlp(a, folder, side: str):
    """LLaVA-1.5's first stage against LlavaForConditionalGeneration."""
    if side == "ours":
        vlm = load_vlm(folder("llava"), a.device, a.dtype).train()
        return ours_step(a, compile_layers(a, vlm), frozen_but(vlm, a, vlm.bridge))
    model = t.LlavaForConditionalGeneration.from_pretrained(folder("llava"), dtype=a.dtype).train()
    parameters = frozen_but(model, a, model.model.multi_modal_projector)
    S, p = SIZES[a.size][1][:2]
    tokens, labels = unfold(*batch(a, True), (S // p) ** 2)
    pixels, mask, model = pictures(a), torch.ones_like(tokens), compiled(a, model)

    def loss():
        return model(input_ids=tokens, pixel_values=pixels, attention_mask=mask, labels=labels).loss
    return step_of(a, parameters, loss)


def compile_layers(a, vlm):
    for layer in vlm.decoder.layers if a.compile else ():
        layer.compile(dynamic=True)
    return vlm


def composed(a, folder, side: str, name: str):
    (D, (S, p, Di)), layer = (SIZES[a.size][0][1], SIZES[a.size][1][:3]), -2 if name == "linear" else -1
    torch.manual_seed(3)
    bridge = nn.ModuleDict({"map": nn.Linear(Di, D)}) if name == "linear" else LibraryMAPL(Di, D)
    if side == "ours":
        vit, decoder = (load(folder(kind), a.device, a.dtype)
                        for load, kind in ((load_vit, "clip"), (load_decoder, "llama")))
        if name == "linear":
            mine = make_bridge("linear", decoder.config, Di, reads=-2)
            mine.map.load_state_dict(bridge["map"].state_dict())
        else:
            with tempfile.TemporaryDirectory() as tmp:
                tensors = {k: v.contiguous() for k, v in bridge.state_dict().items()}
                save_file(tensors, Path(tmp) / "model.safetensors")
                mine = load_bridge("mapl", tmp)
        vlm = compile_layers(a, VLM(vit, mine, decoder).train())
        return ours_step(a, vlm, frozen_but(vlm, a, vlm.bridge))
    vit = t.CLIPVisionModel.from_pretrained(folder("clip"), dtype=a.dtype)
    lm = t.LlamaForCausalLM.from_pretrained(folder("llama"), dtype=a.dtype)
    model = Composed(vit, bridge["map"] if name == "linear" else bridge, lm, layer, name != "linear").train()
    parameters, pixels = frozen_but(model, a, model.bridge), pictures(a)
    tokens, labels = unfold(*batch(a, True), 32 if name == "mapl" else (S // p) ** 2)
    model = compiled(a, model)
    return step_of(a, parameters, lambda: model(tokens, pixels, labels).loss)


def train_linear(a, folder, side):
    """LLaVA's first stage against CLIPVisionModel + nn.Linear + LlamaForCausalLM."""
    return composed(a, folder, side, "linear")


def train_mapl(a, folder, side):
    """MAPL against CLIPVisionModel + nn.TransformerEncoder + LlamaForCausalLM."""
    return composed(a, folder, side, "mapl")


def train_qformer(a, folder, side: str):
    """InstructBLIP's Q-Former reads the instruction, too; against InstructBlipForConditionalGeneration."""
    words = torch.randint(10, 500, (a.batch, 16), generator=torch.Generator().manual_seed(4)).to(a.device)
    if side == "ours":
        vlm = compile_layers(a, load_vlm(folder("instructblip"), a.device, a.dtype).train())
        return ours_step(a, vlm, frozen_but(vlm, a, vlm.bridge), bridge_tokens=words)
    kind = t.InstructBlipForConditionalGeneration
    model = kind.from_pretrained(folder("instructblip"), dtype=a.dtype).train()
    parameters = frozen_but(model, a, model.qformer, model.language_projection,
                            model.vision_model.post_layernorm)
    model.query_tokens.data = model.query_tokens.data.to(TRAINED)
    parameters.append(model.query_tokens.requires_grad_(True))
    tokens, labels = unfold(*batch(a, True), 32)
    inputs = dict(pixel_values=pictures(a), qformer_input_ids=words, input_ids=tokens, labels=labels,
                  qformer_attention_mask=torch.ones_like(words), attention_mask=torch.ones_like(tokens))
    model = compiled(a, model)
    return step_of(a, parameters, lambda: model(**inputs).loss)


def adapter_folder(a, folder) -> Path:
    """peft's AdaptionPrompt on the LLaMA: 10 prompts in every layer but the two lowest."""
    where = Path(folder("llama")) / "adapter"
    if not where.exists():
        torch.manual_seed(5)
        base = t.LlamaForCausalLM.from_pretrained(folder("llama"), dtype=torch.float32)
        config = peft.AdaptionPromptConfig(adapter_layers=SIZES[a.size][0][0] - 2, adapter_len=10,
                                           task_type="CAUSAL_LM")
        peft.get_peft_model(base, config).save_pretrained(where)
    return where


def train_zero_init(a, folder, side: str):
    """LLaMA-Adapter on text against peft's AdaptionPrompt."""
    (tokens, labels), where = batch(a, False), adapter_folder(a, folder)
    if side == "ours":
        decoder = load_decoder(folder("llama"), a.device, a.dtype)
        bridge = load_bridge("zero_init", where, a.device)
        both = compile_layers(a, nn.ModuleDict({"decoder": decoder, "bridge": bridge}).train())

        def loss():
            total, count = next_token_loss(decoder, labels, tokens=tokens, bridge=bridge)
            return total / count
        return step_of(a, frozen_but(both, a, bridge), loss, ours=True)
    base = t.LlamaForCausalLM.from_pretrained(folder("llama"), dtype=a.dtype)
    model = peft.PeftModel.from_pretrained(base, where, is_trainable=True).to(a.device, a.dtype).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.to(TRAINED)
    mask, model = torch.ones_like(tokens), compiled(a, model)
    return step_of(a, parameters, lambda: model(input_ids=tokens, attention_mask=mask, labels=labels).loss)


def train_flamingo(a, folder, side: str):
    """Our idefics bridge (a Flamingo) against IdeficsForVisionText2Text; resampler and gated blocks learn."""
    if side == "ours":
        vlm = compile_layers(a, load_vlm(folder("idefics"), a.device, a.dtype).train())
        return ours_step(a, vlm, frozen_but(vlm, a, vlm.bridge))
    model = t.IdeficsForVisionText2Text.from_pretrained(folder("idefics"), dtype=a.dtype).train()
    parameters = frozen_but(model, a, model.model.perceiver_resampler, model.model.gated_cross_attn_layers)
    tokens, labels = batch(a, True)
    seen = torch.ones(*tokens.shape, 1, dtype=torch.long, device=a.device)
    seen[:, 0] = 0
    inputs = dict(input_ids=tokens.masked_fill(tokens == IMAGE, SIZES[a.size][0][5] + 1),
                  pixel_values=pictures(a)[:, None], attention_mask=torch.ones_like(tokens),
                  image_attention_mask=seen)
    model = compiled(a, model)

    def loss():     # by hand: its own takes the logits of the two new words for another row, and fails
        logits = model(**inputs).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
    return step_of(a, parameters, loss)


# ---- Towers and generation -------------------------------------------------------------------------------

def llama(a, folder, side: str):
    if side == "ours":
        return load_decoder(folder("llama"), a.device, a.dtype)
    return t.LlamaForCausalLM.from_pretrained(folder("llama"), dtype=a.dtype).to(a.device).eval()


def forward(a, folder, side):
    """The decoder's logits of every position."""
    model, tokens = llama(a, folder, side), batch(a, False)[0]

    @torch.no_grad()
    def run() -> float:
        out = model(tokens)
        return (out if side == "ours" else out.logits).float().square().mean().item()
    return run


def vit(a, folder, side):
    """The image tower: its state at layer −2, which is what a bridge reads."""
    pixels = pictures(a)
    if side == "ours":
        tower = load_vit(folder("clip"), a.device, a.dtype)
    else:
        tower = t.CLIPVisionModel.from_pretrained(folder("clip"), dtype=a.dtype).to(a.device).eval()

    @torch.no_grad()
    def run() -> float:
        if side == "ours":
            states = tower.features(pixels, -2)
        else:
            states = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return states.float().square().mean().item()
    return run


def generate(a, folder, side, texts: int = 1, same: int = 8, prompt: int = 32, beams: int = 1):
    """NEW tokens behind a prompt, with a cache, greedy or by beams; ours packs its matrices around a call.

    The first `same` tokens must be equal: later ones may differ where two logits tie in bfloat16.
    """
    V, generator = SIZES[a.size][0][5], torch.Generator().manual_seed(1)
    tokens = torch.randint(10, V - 2, (texts, prompt), generator=generator).to(a.device)
    model, mask = llama(a, folder, side), torch.ones_like(tokens)

    @torch.no_grad()
    def run() -> float:
        if side == "ours":
            with packed(model):
                ids = (model.generate(tokens, max_new_tokens=NEW) if beams == 1 else
                       beam_search(model, tokens, beams=beams, max_new_tokens=NEW))
        else:
            ids = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW,
                                 do_sample=False, num_beams=beams)[:, prompt:]
        return float(ids[0, :same].sum())
    return run


def generate_picture(a, folder, side, kind: str, K: int):
    """The same behind a picture and a short text."""
    tokens, pixels = batch(a, True, 1)[0][:, :16], pictures(a, 1)
    if side == "ours":
        vlm = load_vlm(folder(kind), a.device, a.dtype)
    else:
        known = {"llava": t.LlavaForConditionalGeneration, "idefics": t.IdeficsForVisionText2Text}[kind]
        model = known.from_pretrained(folder(kind), dtype=a.dtype).to(a.device).eval()
        inputs = dict(pixel_values=pixels)
        if kind == "llava":
            inputs["input_ids"] = unfold(tokens, tokens, K)[0]
        else:
            seen = torch.ones(*tokens.shape, 1, dtype=torch.long, device=a.device)
            seen[:, 0] = 0
            inputs |= dict(input_ids=tokens.masked_fill(tokens == IMAGE, SIZES[a.size][0][5] + 1),
                           pixel_values=pixels[:, None], image_attention_mask=seen)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    @torch.no_grad()
    def run() -> float:
        if side == "ours":
            with packed(vlm.decoder):
                return float(vlm.generate(tokens, pixels, max_new_tokens=NEW)[0, :4].sum())
        ids = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        return float(ids[0, inputs["input_ids"].shape[1]:][:4].sum())
    return run


def loading(a, folder, side):
    """A decoder from its folder, every byte read."""
    def run() -> float:
        return sum(p.float().abs().max().item() for p in llama(a, folder, side).parameters())
    return run


def preprocess(a, folder, side):
    """16 pictures of 640 × 480 for CLIP at 224 pixels: shortest side, bicubic, the middle."""
    images = list(np.random.default_rng(0).integers(0, 256, (16, 480, 640, 3), dtype=np.uint8))
    processor = t.CLIPImageProcessor()

    def run() -> float:
        ours = side == "ours"
        pixels = data.to_pixels(images) if ours else processor(images, return_tensors="pt")["pixel_values"]
        return pixels.abs().mean().item()
    return run


def tokenize(a, folder, side):
    """The README's paragraphs, 20 times, one by one, with the vocabulary of the folder that SMOLLM2 names."""
    where, texts = os.environ["SMOLLM2"], (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n") * 20
    if side == "ours":
        encode = load_tokenizer(where).encode
    else:           # AutoTokenizer would take GPT-2's class, which does not split digits as the file says
        tokenizer = t.PreTrainedTokenizerFast(tokenizer_file=f"{where}/tokenizer.json")
        encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    return lambda: float(sum(len(encode(text)) for text in texts))


def variant(function, **how):
    return lambda a, folder, side: function(a, folder, side, **how)


CASES = {           # name → its function
    "forward": forward, "vit": vit, "train-linear": train_linear, "train-mlp": train_mlp,
    "train-mapl": train_mapl, "train-qformer": train_qformer, "train-zero_init": train_zero_init,
    "train-flamingo": train_flamingo,
    "generate": generate, "generate-8": variant(generate, texts=8, same=4),
    "generate-long": variant(generate, prompt=1024), "generate-beams": variant(generate, beams=5, same=4),
    "generate-llava": variant(generate_picture, kind="llava", K=196),
    "generate-flamingo": variant(generate_picture, kind="idefics", K=0),
    "load": loading, "preprocess": preprocess, "tokenize": tokenize,
}
NO_MODEL = ("preprocess", "tokenize")                   # memory says nothing
DECODING = [name for name in CASES if name.startswith("generate")]
