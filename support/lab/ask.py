"""lab/ask.py: a published model answers about one picture."""
from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

import data
from model import IMAGE, VLM
from papers.mllama_vit import TiledViT, Tiles
from support.formats.files import read_json
from support.formats.hub import print_licence
from support.formats.pictures import load_processor, read_image, tile_pixels
from support.formats.tokenizer_files import load_tokenizer
from support.formats.vlm import load_vlm

QUESTION_FORMS = {               # model_type → how a question about a picture is written; elsewhere "<image>" opens a conversation
    "llava": "<image>\n{}", "llava_llama": "<image>\n{}", "mllama": "<image>{}",
    "idefics": "User:<fake_token_around_image><image><fake_token_around_image>{}<end_of_utterance>\nAssistant:",
    "instructblip": "<image>{}",                        # the soft tokens come first, then <s> and the question alone
}


def ask(folder: Path, image: str, prompt: str, longest: int = 64, beams: int = 1, device=None, dtype=None) -> str:
    """What a published model answers to a question about a picture file, in the form that it was trained with.

    BLIP-2's first stage answers no question: it says how well the prompt, as a caption, fits the picture.
    """
    model, facts = load_vlm(folder, device, dtype), read_json(folder / "config.json")
    print_licence(str(folder), folder, sys.stderr)
    kind, tokenizer, processor = facts["model_type"], load_tokenizer(folder), load_processor(folder)
    vit, like = model.vit, next(model.vit.parameters())
    put = lambda pixels: pixels.to(like.device, like.dtype)
    picture = [read_image(image)]
    if isinstance(vit, TiledViT):
        pixels, aspect, there = tile_pixels(picture, vit.config.image_size, processor=processor)
        pixels = Tiles(put(pixels), aspect.to(like.device), there.to(like.device))
    else:
        pixels = put(data.to_pixels(picture, vit.config.image_size, processor))
    with torch.no_grad():
        if not isinstance(model, VLM):
            ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(prompt), tokenizer.eos]], device=like.device)
            features = model.features(pixels)
            cosine = model.itc(features, ids)[0, 0] * (model.temperature if model.full else 1)
            return f"match: {model.itm(features, ids).softmax(-1)[0, 1]:.3f} (ITM: text and picture belong together), similarity: {cosine:.3f} (ITC: cosine)"
        document, text = data.Document(tokenizer), {}
        if kind in ("llava", "llava_llama", "mllama"):
            document.chat(QUESTION_FORMS[kind].format(prompt))
            if facts.get("mm_use_im_start_end") and {"<im_start>", "<im_end>"} <= tokenizer.special.keys():     # LLaVA v1
                at = document.tokens.index(IMAGE)
                document.tokens[at:at + 1] = [tokenizer.special["<im_start>"], IMAGE, tokenizer.special["<im_end>"]]
        else:
            for part in re.split(r"(<[a-z_]+>|\{\})", QUESTION_FORMS[kind]):             # what the user writes stays plain text
                special = part == "<image>" or part in tokenizer.special
                document.add(prompt, False) if part == "{}" else document.add(part, False, special)
        if kind == "instructblip":                      # the Q-Former reads the question, too, in BERT's words
            document.tokens = [IMAGE, *(t for t in document.tokens if t != IMAGE)]
            words = load_tokenizer(folder / "qformer_tokenizer")
            text = {"bridge_tokens": torch.tensor([[words.bos, *words.encode(prompt), words.eos]], device=like.device)}
        stop = () if tokenizer.eos is None else (tokenizer.eos,)
        ids = model.generate(torch.tensor([document.tokens], device=like.device), pixels, longest, beams=beams, stop=stop, **text)[0]
    return tokenizer.decode(ids).strip()
