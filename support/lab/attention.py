"""lab/attention.py: where words look in a picture, seen through hooks that change nothing."""
from __future__ import annotations

import contextlib
import fnmatch
import math
from collections import Counter
from functools import singledispatch
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

import data
from bridges import MAPL, Flamingo, QFormer, ZeroInit, ZeroInitV2
from model import IMAGE, VLM, Attend, Bridge, causal_mask, visible_to_bias, widen
from papers.clipcap import ClipCap, ClipCapTransformer
from papers.fromage import Fromage
from papers.cogvlm import CogVLM
from papers.frozen import Frozen
from papers.kosmos1 import Kosmos1
from papers.limber import Limber
from papers.llama_adapter import ZeroInitV1
from papers.minigpt4 import MiniGPT4Llama2
from papers.mllama import Mllama
from papers.mllama_vit import Tiles
from papers.vlkd import Vlkd
from papers.prompt_tuning import PrefixTuning, PromptTuning
from papers.told import Told, ToldFlamingo
from papers.vcgpt import VCGPT
from papers.visualgpt import VisualGPT
from support.formats.files import UserError
from support.formats.pictures import PROCESSORS
from support.formats.tokenizers import Tokenizer
from support.lab.words import nearest_words
from support.plumbing.log import read_log


# A map of attention shows what was read, not what was made of it. So a measured number goes with the
# pictures.

@contextlib.contextmanager
def attention_weights(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects the softmax weights (B, H, T, S) of every attention inside `module`, under the name of its
    module.

        decoder.layers.L.attention            words, and the soft tokens among them, on each other;
                                              prefix_tuning: words on [prefix ; words]
        bridge.softmax.L                      zero_init: words on prompts, a softmax of its own
        bridge.blocks.L                       mapl: [features ; constants]; zero_init: [queries ; features];
                                              flamingo, idefics, vcgpt: words on latents or patches
        bridge.blocks.L.levels.J              visualgpt: words on a level of the encoder
        bridge.blocks.L.attention             mllama: words on patches
        bridge.connector                      kosmos1: queries on [features ; queries]
        bridge.layers.L.attention, .cross     qformer: queries on each other, on the features
        bridge.resampler.layers.L             flamingo, idefics: latents on [features ; latents]
        bridge.resampler.layers.L.attention   visualgpt: patches on each other

    Hooks recompute the weights from q, k and the mask of each `Attend`, so that nothing the model computes
    changes. A later forward overwrites an earlier one. A row that may attend nowhere is uniform; its module
    multiplies it by 0.
    """
    found: dict[str, Tensor] = {}
    names, calls = {m: name for name, m in module.named_modules()}, Counter()

    def from_inputs(m: nn.Module, args: tuple, kwargs: dict) -> None:
        found[names[m].removesuffix("attend").rstrip(".")] = softmax_weights(*args, **kwargs)

    def from_output(m: nn.Module, args: tuple, output: Tensor) -> None:
        owner = module.get_submodule(names[m].rpartition(".")[0])               # its layers take turns
        found[f"{names[m]}.{calls[m] % len(owner.gated_layers)}"] = output
        calls[m] += 1

    hooks = []
    for m in names:
        if isinstance(m, Attend):
            hooks.append(m.register_forward_pre_hook(from_inputs, with_kwargs=True))
        if isinstance(m, nn.Softmax):
            hooks.append(m.register_forward_hook(from_output))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def softmax_weights(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False,
                    dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √E + bias) (B, H, T, S), as (D1) in model.py has it; arguments of `attend`."""
    scores = q @ widen(k, q.shape[1]).transpose(-2, -1) * q.shape[-1] ** -0.5
    bias = visible_to_bias(causal_mask(q.shape[2], q.device), q.dtype) if causal else bias
    return (scores if bias is None else scores + bias).softmax(-1, dtype=torch.float32)


def run_with_attention(vlm: VLM, tokens: Tensor, pixels: Tensor | None = None, mask: Tensor | None = None, *,
                       features: Tensor | None = None, **kw) -> tuple[Any, dict[str, Tensor]]:
    """vlm(tokens, …), and the weights by name of every attention in it but the ViT's
    (`attention_weights`)."""
    features = vlm.features(pixels) if features is None else features
    with attention_weights(vlm) as found:
        return vlm(tokens, None, mask, features=features, **kw), found


# --- rollout: from visual tokens to patches -----------------------------------------------------------------

def rollout_step(x: Tensor, weights: Tensor, source: Tensor) -> Tensor:
    """Attention rollout (2005.00928v2, §3): x ← ½ x + ½ A · source, A the mean of weights (·, H, T, S) over
    heads.

    x (·, T, N): of which ViT tokens each of T vectors is made, half from its residual stream, half from what
    it reads. It is a reading aid: it knows no values, norms or feed-forwards, nor that a ViT token has itself
    read its neighbours.
    """
    return (x + weights.mean(1) @ source) / 2


@singledispatch
def rollout(bridge: Bridge, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    """(ΣM, K, N): of which ViT tokens each visual token of this bridge is made; rows sum to 1.

    attention: the weights of one forward by name. Where no rule is registered, token k IS patch k.
    """
    return torch.eye(features.shape[1], device=features.device).expand(len(features), -1, -1)


@rollout.register
def _(bridge: Frozen, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    N = features.shape[1]
    return torch.full((len(features), bridge.tokens, N), 1 / N, device=features.device)


@rollout.register(PromptTuning)
@rollout.register(PrefixTuning)
def _(bridge: Bridge, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    """The mean over the patches is added to every prompt."""
    N = features.shape[1]
    return features.new_full((len(features), len(bridge.prompts), N), 0 if bridge.map is None else 1 / N)


@rollout.register
def _(bridge: Limber, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    patches = torch.eye(features.shape[1], device=features.device).repeat_interleave(bridge.tokens, dim=0)
    return patches.expand(len(features), -1, -1)


@rollout.register
def _(bridge: MiniGPT4Llama2, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    """Each soft token is made of `join` patches side by side."""
    K = features.shape[1] // bridge.join
    patches = torch.eye(K, device=features.device).repeat_interleave(bridge.join, dim=1) / bridge.join
    return patches.expand(len(features), -1, -1)


@rollout.register
def _(bridge: CogVLM, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    """A patch, or the block of patches that a convolution made one; boi and eoi hold none."""
    patches = torch.eye(features.shape[1], device=features.device)
    if bridge.conv is not None:
        side = math.isqrt(features.shape[1])
        patches = F.avg_pool2d(patches.unflatten(1, (side, side)), bridge.conv.stride).flatten(1).T
    return F.pad(patches, (0, 0, 1, 1)).expand(len(features), -1, -1)


@rollout.register(ClipCap)
@rollout.register(ClipCapTransformer)
@rollout.register(Fromage)
@rollout.register(Vlkd)
def _(bridge: Bridge, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    """Each of the K soft tokens is made of the one pooled vector: (ΣM, K, 1)."""
    return features.new_ones(len(features), bridge.prefix(bridge.see(features)).shape[1], 1)


@rollout.register
def _(bridge: MAPL, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    K, N = len(bridge.const), features.shape[1]
    x = torch.eye(N + K, N, device=features.device)                         # the constants hold no patch yet
    for l in range(len(bridge.blocks)):
        x = rollout_step(x, attention[f"bridge.blocks.{l}"], x)
    return F.normalize(x[:, -K:], p=1, dim=-1)


@rollout.register
def _(bridge: Told, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    """Its mapper's; the learned vectors around hold no patch."""
    around = 0, 0, bridge.ahead, len(bridge.prompts) - bridge.ahead
    return F.pad(rollout_of_words(bridge, attention, features), around)


@rollout.register(ToldFlamingo)
def rollout_of_words(bridge: Bridge, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    own = {name.replace("bridge.writer.mapper.", "bridge."): weights for name, weights in attention.items()}
    return rollout(bridge.writer.mapper, own, features)


@rollout.register
def _(bridge: Kosmos1, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    """No residual; the queries hold no patch."""
    return F.normalize(attention["bridge.connector"].mean(1)[..., :features.shape[1]], p=1, dim=-1)


@rollout.register
def _(bridge: QFormer, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    Q, patches = len(bridge.queries), torch.eye(features.shape[1], device=features.device)
    x = torch.zeros_like(patches[:1]).expand(Q, -1)                         # the queries hold no patch yet
    for l, layer in enumerate(bridge.layers):
        x = rollout_step(x, attention[f"bridge.layers.{l}.attention"][..., :Q, :Q], x)      # without the text
        if layer.cross is not None:
            x = rollout_step(x, attention[f"bridge.layers.{l}.cross"], patches)
    return F.normalize(x, p=1, dim=-1)


@rollout.register
def _(bridge: ZeroInit, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    """Prompts that hold no picture."""
    return features.new_zeros(len(features), bridge.prompts.shape[1], features.shape[1])


@rollout.register
def _(bridge: ZeroInitV1, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    """The class token is added to every prompt."""
    N = features.shape[1]
    return torch.eye(1, N, device=features.device).expand(len(features), bridge.prompts.shape[1], -1)


@rollout.register
def _(bridge: ZeroInitV2, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    """What is added to prompt k."""
    Q, N = bridge.prompts.shape[1], features.shape[1]
    x = torch.eye(Q + N, N, device=features.device).roll(Q, 0)              # the queries hold no patch yet
    x = x.expand(len(features), -1, -1)
    for l in range(len(bridge.blocks)):
        x = rollout_step(x, attention[f"bridge.blocks.{l}"], x)
    return F.normalize(x[:, :Q], p=1, dim=-1)


@rollout.register
def _(bridge: Flamingo, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    patches = torch.eye(features.shape[1], device=features.device).expand(len(features), -1, -1)
    if not list(bridge.resampler.parameters()):                             # IDEFICS without a resampler
        return patches
    x = torch.zeros_like(patches[:, :1]).expand(-1, len(bridge.resampler.latents), -1)
    for l in range(len(bridge.resampler.layers)):
        x = rollout_step(x, attention[f"bridge.resampler.layers.{l}"], torch.cat((patches, x), dim=1))
    return F.normalize(x, p=1, dim=-1)


@rollout.register
def _(bridge: VisualGPT, attention: dict[str, Tensor], features: Tensor) -> Tensor:
    x = torch.eye(features.shape[1], device=features.device)
    for l in range(len(bridge.resampler.layers)):
        x = rollout_step(x, attention[f"bridge.resampler.layers.{l}.attention"], x)
    return x


@rollout.register
def _(bridge: Mllama, attention: dict[str, Tensor], features: Tiles) -> Tensor:
    patches = features.pixels.flatten(1, 2)
    return torch.eye(patches.shape[1], device=patches.device).expand(len(patches), -1, -1)


@singledispatch
def reading_layers(bridge: Bridge) -> str:
    """The names (a pattern) of the attentions by which words read visual tokens; soft tokens are among the
    words."""
    return "decoder.layers.*.attention"


@reading_layers.register
def _(bridge: ZeroInit) -> str:
    return "bridge.softmax.*"


@reading_layers.register(Flamingo)
@reading_layers.register(VCGPT)
def _(bridge: Bridge) -> str:
    return "bridge.blocks.*"


@reading_layers.register
def _(bridge: ToldFlamingo) -> str:
    return "bridge.reader.blocks.*"


@reading_layers.register
def _(bridge: VisualGPT) -> str:
    return f"bridge.blocks.*.levels.{len(bridge.resampler.layers) - 1}"         # the last level


@reading_layers.register
def _(bridge: Mllama) -> str:
    return "bridge.blocks.*.attention"


@singledispatch
def first_column(bridge: Bridge, image: int) -> int:
    """The first key that is a visual token, where they share a softmax with the words; image: its place."""
    return image


@first_column.register
def _(bridge: PrefixTuning, image: int) -> int:
    return 0                                                                    # in front of all words


@torch.no_grad()
def attention_to_patches(vlm: VLM, tokens: Tensor, features: Tensor, **text) -> tuple[Tensor, Tensor]:
    """Where one text (1, T) about one picture (1, N, Di) looks: words (L, H, T', K) and patches (K, N),
    float32.

    words[l, h, t]: attention of the t-th of the T' words behind the picture to its K visual tokens, in the
    l-th layer that reads them. Soft tokens share a softmax with the words: a row sums to the picture's share.
    Prompts and latents have one of their own: a row sums to 1, and a gate decides. patches[k]: of which ViT
    tokens visual token k is made (`rollout`). words @ patches (L, H, T', N) leads from the words to the
    picture. text: bridge_tokens for a Q-Former that reads the question, as in VLM.prepare.
    """
    at = (tokens == IMAGE).nonzero()
    if len(tokens) != 1 or len(at) != 1:
        raise UserError(f"attention_to_patches reads one text about one picture, not {len(tokens)} about "
                        f"{len(at)}; call it for each.")
    first = int(at[0, 1])
    behind = tokens.shape[1] - first - 1                                        # T'
    _, attention = run_with_attention(vlm, tokens, features=features, **text)
    patches, pattern = rollout(vlm.bridge, attention, features)[0], reading_layers(vlm.bridge)
    layers = [w for name, w in attention.items() if fnmatch.fnmatch(name, pattern)]
    words = torch.stack([w[0, :, w.shape[2] - behind:] for w in layers])
    K, start = len(patches), first_column(vlm.bridge, first)
    return words if words.shape[-1] == K else words[..., start:start + K], patches


def gate_history(run: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps (S,) and gates (S, layers, heads) of a run, signed, after tanh; of flamingo (S, blocks, 2)."""
    file = Path(run) / "log.jsonl"
    logged = [(line["step"], line["gates"]) for line in read_log(file) if "gates" in line]
    if not logged:
        raise UserError(f"{file}: holds no gates; give the run of a zero_init, flamingo or idefics bridge.")
    if len({(len(gates), len(layer)) for _, gates in logged for layer in gates}) != 1:
        raise UserError(f"{file}: its gates are not of one shape; it holds the lines of two runs.")
    return tuple(np.array(column) for column in zip(*logged))


def overlay_attention(picture: np.ndarray, weights, top: float | None = None, side: int = 144) -> np.ndarray:
    """(side, side, 3) uint8: the square picture (S, S, 3) in grey, redder where its weights (g·g,) are large.

    top: the weight of full red (None: the largest). Of g·g + 1 weights the first is the class token's and has
    no place.
    """
    grow = lambda x: np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.NEAREST))[..., None]
    g, weights = math.isqrt(len(weights)), np.asarray(weights, np.float32)
    heat = 0.7 * grow((weights[len(weights) - g * g:] / (top or weights.max() or 1)).clip(0, 1).reshape(g, g))
    mixed = (1 - heat) * grow(picture.mean(-1, dtype=np.float32)) + heat * (255, 40, 0)
    return mixed.round().astype(np.uint8)


def seen_picture(vlm: VLM, pixels: Tensor) -> np.ndarray:
    """The picture (S, S, 3), 0 … 255, that the ViT sees in pixels (1, 3, S, S)."""
    p = vlm.processor or PROCESSORS["clip"]
    picture = pixels[0].float().cpu().movedim(0, -1) * torch.tensor(p.std) + torch.tensor(p.mean)
    return (255 * picture).clip(0, 255).numpy()


@torch.no_grad()
def draw_attention(vlm: VLM, tokenizer: Tokenizer, pixels: Tensor, features: Tensor,
                   document: data.Document, out: Path, **text) -> str:
    """Where a document looks in its picture: words.png, tokens.png in `out`; returns a legend and tables.

    pixels: (1, 3, S, S) of the picture; features: (1, N, Di), what the bridge reads of it; text: as in
    attention_to_patches.
    """
    tokens = torch.tensor([document.tokens], device=features.device)
    words, patches = attention_to_patches(vlm, tokens, features, **text)
    picture, prefix = seen_picture(vlm, pixels), vlm.bridge.soft_tokens
    gates = vlm.bridge.gates()
    gates = [None] * len(words) if gates is None else gates.abs().mean(-1)
    said = [ascii(tokenizer.decode([t])) for t in document.tokens[-words.shape[2]:]]
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for file, says, heads, maps in (
            ("words.png", "a column per word, a row per layer", said, (words.mean(1) @ patches).cpu()),
            ("tokens.png", "of which patches each visual token is made", range(len(patches)),
             patches[None].cpu())):
        canvas, top = Image.new("RGB", (150 * maps.shape[1], 150 * len(maps) + 20),
                                "white"), float(maps.max())
        for column, head in enumerate(heads):
            ImageDraw.Draw(canvas).text((150 * column + 4, 4), str(head), "black")
            for row, weights in enumerate(maps[:, column]):
                canvas.paste(Image.fromarray(overlay_attention(picture, weights, top)),
                             (150 * column + 3, 150 * row + 20))
        canvas.save(out / file)
        lines.append(f"{out / file}: {says}; full red = {top:.2f}")
    for l, (w, gate) in enumerate(zip(words, gates)):
        lines.append(f"layer {l:3d}  attention to the picture {100 * float(w.sum(-1).mean()):5.1f} %")
        lines[-1] += "" if gate is None else f"  mean |gate| {gate:.3f}"
    for n, row in enumerate(nearest_words(vlm, tokenizer, features, **text) if prefix else ()):
        lines.append(f"token {n:3d}  nearest words  " + "  ".join(f"{w!r} {c:.2f}" for w, c in row))
    return "\n".join(lines)
