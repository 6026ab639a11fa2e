"""lab/answerers.py: systems without training as rows of the table: PICa, MAGiC, Socratic Models.

    python train.py --recipe lm-prompts                 the bundled decoder reads their forms of prompt
    python eval.py out/mlp-shapes pica magic socratic --lm out/lm-prompts-shapes
    python train.py --recipe clip-text                  another text tower for the ViT, for --clip

An answerer has answer(items) → texts: PICa one per question, the others one caption per item.
"""
from __future__ import annotations

import argparse
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import data
from data import CAPTION, COLORS, QA, SHAPES, Document, Item, Shapes
from eval import accuracy_by_kind, caption_scores, first_items, generate_texts, scalar_scores, vision_features
from model import VLM, Decoder
from papers import magic, pica, socratic
from support.formats.files import UserError, at_the_door
from support.formats.hub import fetch
from support.formats.llama import load_decoder
from support.formats.tokenizer_files import load_tokenizer
from support.formats.tokenizers import Tokenizer
from support.formats.towers import OpenedClip, TEXT_TOWER, WEIGHTS, open_clip
from support.formats.vlm import open_run
from support.plumbing.flags import Parser, number
from support.plumbing.start import refuse_unread
from support.worlds import open_data
from support.worlds.prompts import OBJECTS, count_phrase, object_names

TRUTH = "truth"                                         # --captions-by: the picture's own first caption
POOL = 128                                              # pictures of training that PICa's examples are from


def add_answerer_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("systems without training: pica, magic, socratic in place of a RUN")
    group.add_argument("--clip", default=TEXT_TOWER, metavar="RUN",
                       help=f"a run of recipe clip-text or clip, or a CLIP ({TEXT_TOWER})")
    group.add_argument("--lm", default=f"{WEIGHTS}/decoder", metavar="RUN",
                       help="the language model: a run of recipe lm-prompts, or a decoder (weights/decoder)")
    group.add_argument("--captions-by", default="", metavar="RUN",
                       help=f"whose captions PICa reads: a run's (the table's first), or {TRUTH}, an oracle")
    group.add_argument("--shots", type=number(least=0, most=1000), default=4, metavar="S",
                       help="PICa: examples in a prompt (4)")
    group.add_argument("--ensemble", type=number(least=1, most=1000), default=1, metavar="J",
                       help="PICa: prompts for a question (1)")
    group.add_argument("--similarity", default=pica.SIMILARITIES[0], choices=pica.SIMILARITIES,
                       help=f"PICa: how examples are chosen ({pica.SIMILARITIES[0]})")
    group.add_argument("--candidates", type=number(least=1, most=10**6), default=10, metavar="K",
                       help="MAGiC: tokens that CLIP chooses from (10)")
    group.add_argument("--alpha", type=number(float, least=0, most=1), default=0.1, metavar="X",
                       help="MAGiC: weight of the penalty on repetition (0.1)")
    group.add_argument("--beta", type=number(float, least=0), default=2.0, metavar="X",
                       help="MAGiC: weight of the picture (2)")
    group.add_argument("--drafts", type=number(least=1, most=1000), default=10, metavar="N",
                       help="Socratic: captions that CLIP chooses from (10)")
    group.add_argument("--answer-seed", type=number(least=0, most=2**31), default=0, metavar="N",
                       help="of PICa's random examples and of Socratic's captions (0)")


def write_captions(vlm: VLM, tokenizer: Tokenizer, items: list[Item]) -> list[str]:
    prompts = [Document(tokenizer).image().add(CAPTION) for _ in items]
    return generate_texts(vlm, prompts, tokenizer, 64, features=vision_features(vlm, items, blind=False))


@dataclass
class Models:
    """The models that the answerers of a table share; each is opened when it is first needed."""
    args: argparse.Namespace                            # the flags of add_answerer_flags
    device: str

    @functools.cached_property
    def language(self) -> tuple[Decoder, Tokenizer]:
        folder = fetch(self.args.lm)
        folder = folder / "decoder" if (folder / "decoder").is_dir() else folder
        return load_decoder(folder, self.device), load_tokenizer(folder)

    @functools.cached_property
    def clip(self) -> OpenedClip:
        return open_clip(self.args.clip, self.device)

    def images(self, items: list[Item]) -> Tensor:
        return self.clip.embed_images([item.image for item in items])

    def captions(self, items: list[Item]) -> dict[str, str]:
        """{id of an item: the words for its picture}."""
        if not self.args.captions_by:
            raise UserError("pica reads captions; give --captions-by RUN, or "
                            f"{TRUTH} for the pictures' own.")
        if self.args.captions_by == TRUTH:
            if without := [item.id for item in items if not item.captions]:
                raise UserError(f"--captions-by {TRUTH}: item {without[0]} has no caption of its own.")
            return {item.id: item.captions[0] for item in items}
        vlm, tokenizer, _ = open_run(self.args.captions_by, self.device)
        return {item.id: text for item, text in zip(items, write_captions(vlm, tokenizer, items))}

    def embed_pairs(self, pairs: list[tuple[Item, QA]]) -> tuple[Tensor, Tensor]:
        """CLIP's embeddings of questions and of their pictures; a picture with several is embedded once."""
        items = {item.id: item for item, _ in pairs}
        rows = {key: n for n, key in enumerate(items)}
        pictures = self.images([*items.values()])[[rows[item.id] for item, _ in pairs]]
        return self.clip.embed_texts([qa.question for _, qa in pairs]), pictures


def make_pica(models: Models, world, items: list[Item]) -> pica.PICa:
    args, (decoder, tokenizer) = models.args, models.language
    captions = models.captions(items)
    pool = first_items(world, world.splits[0], POOL) if args.shots else []
    examples = [item for item in pool if item.image is not None and item.qas]
    return pica.PICa(examples, models.embed_pairs, lambda item: captions[item.id],
                     lambda prompts: pica.greedy_replies(decoder, tokenizer, prompts),
                     args.shots, args.ensemble, args.similarity, args.answer_seed)


def make_magic(models: Models, world, items: list[Item]) -> magic.MAGiC:
    args, (decoder, tokenizer), clip = models.args, models.language, models.clip
    settings = magic.Settings(args.candidates, args.alpha, args.beta, steps=64)
    return magic.MAGiC(decoder, tokenizer, models.images, clip.embed_texts, clip.scale, settings)


def make_socratic(models: Models, world, items: list[Item]) -> socratic.Socratic:
    """With the lists of shapes; another world has no lists here."""
    (decoder, tokenizer), clip = models.language, models.clip
    if not isinstance(world, Shapes):
        raise UserError(f"socratic chooses from the words of shapes, and {world.name} has others.")
    generator = torch.Generator(models.device).manual_seed(models.args.answer_seed)
    lists = socratic.Lists(object_names((c, s) for c in COLORS for s in SHAPES), types=("photo",), people=(),
                           numbers=tuple(map(count_phrase, (1, 2, 3, 4))), told_objects=OBJECTS)
    return socratic.Socratic(
        models.images, clip.embed_texts,
        lambda prompt, n: socratic.sample_captions(decoder, tokenizer, prompt, n, 64, generator),
        lists, models.args.drafts)


ANSWERERS = {"pica": make_pica, "magic": make_magic, "socratic": make_socratic}


READS = {"pica": {"clip", "lm", "captions_by", "shots", "ensemble", "similarity", "answer_seed"},
         "magic": {"clip", "lm", "candidates", "alpha", "beta"},
         "socratic": {"clip", "lm", "drafts", "answer_seed"}}               # answerer → its flags


def refuse_unread_flags(args: argparse.Namespace, names: list[str]) -> None:
    """A UserError for a flag of add_answerer_flags that was given and that no answerer of the table reads."""
    parser = Parser("eval.py", "")
    add_answerer_flags(parser)
    given = {flag for flag, value in vars(parser.parse_args([])).items() if getattr(args, flag) != value}
    read = set().union(*(READS[name] for name in names))
    refuse_unread(given, given - read, f"a table with {', '.join(names) or 'runs alone'}")
    if "pica" in names:
        how, unread = "--shots 0", {"clip", "ensemble", "similarity", "answer_seed"}
        if args.shots:
            how = f"--similarity {args.similarity}"
            unread = {"clip"} if args.similarity == "random" else {"answer_seed"}
        others = set().union(*(READS[name] for name in names if name != "pica"))
        refuse_unread(given, unread - others, f"pica {how}")


def describe_answerer(name: str, args: argparse.Namespace) -> str:
    """The name of its row."""
    if name == "pica":
        by = Path(args.captions_by).name
        chosen = "random" if args.similarity == "random" else "similar"
        chosen = f"{args.shots} {chosen} shots" if args.shots else "0 shots"
        return f"pica, {chosen}{f' x {args.ensemble}' * (args.ensemble > 1)}, captions: {by}"
    return f"magic, beta {args.beta:g}" if name == "magic" else f"socratic, {args.drafts} drafts"


def answer_items(name: str, models: Models, world, items: list[Item]) -> dict:
    """Scores and texts as `eval.evaluate` returns them: PICa's of answers, the others' of captions."""
    without = [item.id for item in items if item.image is None]
    if without:
        raise UserError(f"{name} answers about pictures, and item {without[0]} of {world.name} has none.")
    with at_the_door(name):
        texts = ANSWERERS[name](models, world, items).answer(items)
    if name == "pica":
        return accuracy_by_kind([q for item in items for q in item.qas], texts) | {"answers": texts}
    if not all(item.captions for item in items):
        raise UserError(f"{name} writes captions, and {world.name} has none to compare them with.")
    return caption_scores(texts, [item.captions for item in items]) | {"captions": texts}


def answerer_rows(names: list[str], models: Models, world, items: list[Item]) -> list[dict]:
    rows = {describe_answerer(name, models.args): answer_items(name, models, world, items) for name in names}
    return [{"row": row, **scalar_scores(result)} for row, result in rows.items()]


# For the miniatures -----------------------------------------------------------------------------------------

THING = re.compile(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?: at the ({'|'.join(data.PLACES)}))?")


def named_things(texts: list[str], items: list[Item]) -> dict[str, float]:
    """How right captions of shapes are, 0 … 1.

    objects   F measure of the pairs of a colour and a shape: those named, those in the picture
    places    of the things named right, those named at their place; "a guess" is what nine places give
    """
    hits = named = true = placed = right = 0
    for text, item in zip(texts, items):
        said, seen = THING.findall(text), THING.findall(item.about)
        left = [pair for *pair, _ in seen]
        named, true = named + len(said), true + len(seen)
        for *pair, place in said:
            if pair in left:
                left.remove(pair)
                hits += 1
                placed += bool(place)
                right += (*pair, place) in seen
    return {"objects": 2 * hits / (named + true), "places": right / max(placed, 1), "a guess": 1 / 9}


def measure_answerer(name: str, flags: list[str], seed: int, count: int) -> dict[str, float]:
    """What a miniature measures of an answerer, on the first held-out items of shapes."""
    parser = Parser("eval.py", "")
    add_answerer_flags(parser)
    models = Models(parser.parse_args([*flags, "--answer-seed", str(seed)]), "cpu")
    world = open_data("shapes")
    items = first_items(world, world.held_out, count)
    result = answer_items(name, models, world, items)
    more = named_things(result["captions"], items) if "captions" in result else {}
    return scalar_scores(result) | more
