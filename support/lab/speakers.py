"""lab/speakers.py: a loaded model that answers turn by turn, in the form that it was trained in."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from model import Decoder, IMAGE, VLM
from papers.mllama_vit import Tiles
from support.formats.files import UserError, at_the_door, read_json
from support.formats.hub import fetch, print_licence
from support.formats.llama import load_decoder
from support.formats.tokenizer_files import load_tokenizer
from support.formats.tokenizers import Tokenizer
from support.formats.vlm import LAYOUTS, load_vlm, open_run, refuse_bridgeless
from support.lab.ask import (QUESTION_FORMS, as_messages, open_tokenizer, picture_pixels, question_document,
                             question_tokens)
from support.lab.protocols import learned_chat
from support.plumbing.stream import Reader, stream_text


@dataclass
class Speaker:
    """A model, and the form in which it is asked.

    write       turns, whether there is a picture → the conversation up to its next answer; turns are
                questions and answers, the last a question
    read        a picture (h, w, 3) → pixels; None: a decoder alone, which sees no picture
    needs       it answers about a picture only
    single      it was trained on one question at a time: each stands alone
    captions    an empty question asks for a caption
    words       of an InstructBLIP: the tokenizer of its Q-Former, which reads the question, too
    """
    name: str
    facts: dict
    model: VLM | Decoder
    tokenizer: Tokenizer
    write: Callable[[list[str], bool], data.Document]
    read: Callable[[np.ndarray], Tensor | Tiles] | None = None
    needs: bool = False
    single: bool = False
    captions: bool = False
    words: Tokenizer | None = None

    @property
    def decoder(self) -> Decoder:
        return self.model.decoder if isinstance(self.model, VLM) else self.model


def open_speaker(name: str, device: str, dtype: torch.dtype | None = None, template: str = "") -> Speaker:
    """The model of a run, a published folder or a hub name; what the folder holds decides its form."""
    folder = fetch(name)
    facts = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if "bridge" in facts:
        return open_trained(name, device, dtype, template)
    if facts.get("model_type") in LAYOUTS:
        return open_published(name, folder, facts, device, dtype, template)
    refuse_bridgeless(facts, name)
    tokenizer = open_tokenizer(folder, template)
    decoder = load_decoder(folder, device, dtype)
    print_licence(name, folder, sys.stderr)

    def write(turns: list[str], pictured: bool) -> data.Document:
        return data.Document(tokenizer).chat(as_messages(turns))

    return Speaker(name, facts, decoder, tokenizer, write)


def open_trained(name: str, device: str, dtype: torch.dtype | None, template: str) -> Speaker:
    """A run of train.py, asked as its first data set taught it."""
    vlm, tokenizer, facts = open_run(name, device, dtype)
    chat = learned_chat(facts, tokenizer, template)
    weight = next(vlm.vit.parameters())

    def write(turns: list[str], pictured: bool) -> data.Document:
        return question_document(tokenizer, turns, chat)

    def read(picture: np.ndarray) -> Tensor:
        pixels = data.to_pixels([picture], vlm.vit.config.image_size, vlm.processor)
        return pixels.to(weight.device, weight.dtype)

    single = chat in ("alpaca", "plain")
    return Speaker(name, facts, vlm, tokenizer, write, read, needs=True, single=single, captions=True)


def open_published(name: str, folder: Path, facts: dict, device: str, dtype: torch.dtype | None,
                   template: str) -> Speaker:
    """A vision-language model as its publisher asks it."""
    kind, model = facts["model_type"], load_vlm(folder, device, dtype)
    if not isinstance(model, VLM):
        raise UserError(f"{name} is BLIP-2's first stage, which answers no question; "
                        "python eval.py ask says how well a caption fits.")
    if template and kind not in QUESTION_FORMS:
        raise UserError(f"{name} is not asked in a chat template; leave out --template.")
    print_licence(name, folder, sys.stderr)
    tokenizer = open_tokenizer(folder, template)

    def write(turns: list[str], pictured: bool) -> data.Document:
        document = data.Document(tokenizer)
        document.tokens = []
        return document.ids(question_tokens(facts, tokenizer, turns, pictured))

    def read(picture: np.ndarray) -> Tensor | Tiles:
        return picture_pixels(model.vit, folder, picture)

    blip = kind not in QUESTION_FORMS
    words = load_tokenizer(folder / "qformer_tokenizer") if blip else None
    return Speaker(name, facts, model, tokenizer, write, read, needs=blip, single=blip, words=words)


class Conversation:
    """Turns with a speaker about one picture, or none.

    turns: questions and answers in turn; pixels, features: of the picture; length: tokens of the last answer;
    cut: it was not at its end.
    """

    def __init__(self, speaker: Speaker, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0):
        self.speaker, self.max_new_tokens, self.temperature = speaker, max_new_tokens, temperature
        self.generator = torch.Generator(speaker.decoder.embed.weight.device).manual_seed(seed)
        self.reader = Reader(speaker.decoder)
        self.turns: list[str] = []
        self.pixels = self.features = None
        self.length, self.cut = 0, False

    @torch.no_grad()
    def look_at(self, picture: np.ndarray) -> None:
        """From here on the conversation, a new one, is about this picture (h, w, 3)."""
        if self.speaker.read is None:
            raise UserError(f"{self.speaker.name} is a decoder alone, which sees no picture.")
        self.pixels = self.speaker.read(picture)
        self.features = self.speaker.model.features(self.pixels)
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the picture stays."""
        self.turns = []
        self.reader.forget()

    def document(self, question: str, alone: bool = False) -> data.Document:
        """The conversation with a next question; alone: without what was said before."""
        s = self.speaker
        if s.needs and self.features is None:
            raise UserError(f"{s.name} answers about a picture: give it one first.")
        if not question and not s.captions:
            raise UserError("the question is empty.")
        turns = [question] if s.single or alone else [*self.turns, question]
        with at_the_door(f"{s.name}, chat template {s.tokenizer.template.name}"):
            document = s.write(turns, self.features is not None)
        if document.tokens.count(IMAGE) != (self.features is not None):
            raise UserError('"<image>" in a question would be a second picture; leave it out.')
        return document

    def answer(self, question: str) -> Iterator[str]:
        """The answer in pieces, while it is written; what was written becomes a turn, however it ends."""
        s, ids = self.speaker, self.document(question).tokens
        tokens = torch.tensor([ids], device=s.decoder.embed.weight.device)
        with torch.no_grad():
            inputs = self.embed(tokens, question)
        T, context = inputs["embeds"].shape[1], s.decoder.config.context
        if T > context:
            again = "begin a new conversation" if self.turns else "ask a shorter question"
            raise UserError(f"the conversation has {T:,} tokens, the picture's included, and {s.name} reads "
                            f"{context:,}; {again}.")
        count = max(1, min(self.max_new_tokens, context - T))
        tail = ids[::-1].index(IMAGE) if IMAGE in ids else len(ids)
        taken, written = [], ""

        def new_ids() -> Iterator[int]:
            for i in self.reader.stream(max_new_tokens=count, tail=tail, temperature=self.temperature,
                                        generator=self.generator, **inputs):
                taken.append(i)
                yield i

        try:
            for piece in stream_text(new_ids(), s.tokenizer):
                written += piece
                yield piece
        finally:
            self.length = len(taken)
            self.cut = len(taken) == count and taken[-1] not in s.tokenizer.stop
            self.turns += [question, written]

    def bridge_text(self, question: str) -> dict[str, Tensor]:
        """The question for a bridge that reads it, as VLM.prepare takes it; {} for any other."""
        words = self.speaker.words
        if words is None:
            return {}
        ids = [*words.begin, *words.encode(question), *words.end]
        return {"bridge_tokens": torch.tensor([ids], device=self.speaker.decoder.embed.weight.device)}

    def embed(self, tokens: Tensor, question: str) -> dict:
        """What the decoder reads of tokens (1, T): embeds (1, T', D), and what its seams need."""
        s = self.speaker
        if isinstance(s.model, Decoder):
            return {"embeds": s.model.embed(tokens)}
        inputs, _ = s.model.prepare(tokens, features=self.features, **self.bridge_text(question))
        return {name: value for name, value in inputs.items() if name != "mask"}     # one row has no padding
