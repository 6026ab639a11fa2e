"""plumbing/doctor.py: what to look at before a run spends the evening.

Is the image used, what is learned, which parts get a gradient? `advise` says what is likely to go wrong, in a
sentence each, and `advise_at_end` what did; neither stops a run.
"""
from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from model import Bridge, IGNORE, IMAGE, VLM, next_token_loss
from support.formats.files import atomically
from support.plumbing.log import append_line, read_log
from support.plumbing.ranks import Ranks, full_tensor


@torch.no_grad()
def blind_loss(vlm: VLM, piece: dict) -> Tensor:
    """The summed loss of a piece for the decoder without any image: a bridge that adds nothing scores it."""
    tokens, labels, mask = piece["tokens"], piece["labels"], piece["mask"]
    nothing = tokens.new_zeros(int((tokens == IMAGE).sum()), 0, 0)
    inputs, labels = VLM(vlm.vit, Bridge(), vlm.decoder).prepare(tokens, nothing, mask, labels)
    return next_token_loss(vlm.decoder, labels, **inputs)[0]


def report_blind_loss(vlm: VLM, pieces: list[dict], scales: list[float], ranks: Ranks) -> float:
    """The blind loss of an update; the first process prints it, and the share of tokens that are learned."""
    blind = ranks.average(sum(scale * blind_loss(vlm, piece) for piece, scale in zip(pieces, scales)))
    counts = ranks.all_gather((sum(p["count"] for p in pieces), sum(p["tokens"].numel() for p in pieces)))
    learned, total = map(sum, zip(*counts))
    if ranks.first:
        print(f"doctor   the decoder without any image: loss {blind:.3f}; {learned:,} of {total:,} tokens "
              f"are learned ({100 * learned / total:.0f} %)")
    return blind


SCENES_VIT = "weights/vit"      # the bundled ViT of `shapes`
LONG_WORD = 4                   # letters; a shorter word may well be as many tokens
DEEP = 12                       # layers from which the toy's options of a bridge inside the layers are wrong


def advise(task, pieces: list[dict], blind: float, loss: float) -> list[str]:
    """What to change before the evening is spent, a sentence each; none where all is well.

    task: an AnswerTask; pieces: the first update; blind, loss: its losses without and with images.
    """
    return [sentence for sentence in (advise_on_words(task, pieces, blind, loss), advise_on_pictures(task),
                                      advise_on_size(task), advise_on_depth(task)) if sentence]


def advise_on_words(task, pieces: list[dict], blind: float, loss: float) -> str:
    """Can this decoder write these words?"""
    uniform = math.log(task.module.decoder.config.vocab_size)
    words = learned_words(pieces, task.tokenizer)
    tokens = {word: len(task.tokenizer.encode(f" {word}", preceded_by="text")) for word in words}
    spelled = [word for word in words if 2 * tokens[word] > len(word)]
    if "decoder" not in task.trained and 2 * len(spelled) > len(words):
        longest = max(spelled, key=len)
        return (f"the decoder {task.s.lm} spells {len(spelled)} of the {len(words)} longer words of this "
                f'batch in letters ("{longest}" takes {tokens[longest]} tokens): it never read them, and '
                "frozen it hardly learns to write them; give a language model, --lm FOLDER")
    if blind > uniform:
        return (f"the decoder finds these texts less likely than a uniform guess does ({blind:.2f} > "
                f"{uniform:.2f}): it knows another language, or has another model's tokenizer; give another "
                "--lm")
    if loss > uniform:
        return (f"the first loss is above a uniform guess ({loss:.2f} > {uniform:.2f}): what the new bridge "
                "writes disturbs the decoder; give a lower --lr or a longer --warmup")
    return ""


def advise_on_pictures(task) -> str:
    """Has the bundled ViT met such pictures? Scenes on disk have the size that it reads."""
    s, size = task.s, task.module.vit.config.image_size
    own = s.init and (Path(s.init) / "vit" / "config.json").exists()            # the ViT of the run --init
    if s.vit != SCENES_VIT or own or "vit" in task.trained:
        return ""
    for world in (world for world, _ in task.sets if not getattr(world, "says_scenes", False)):
        sizes = {picture.shape[:2] for picture in task.example(world, 0)[1].pictures}
        if sizes - {(size, size)} or sizes and getattr(world, "renderings", ""):
            return (f"the ViT {s.vit} has met scenes of {size} x {size} pixels alone, and {world.name} shows "
                    f"other pictures; give --vit {s.vit}-pictures or a published ViT")
    return ""


def advise_on_size(task) -> str:
    """Does more learn than there is to learn? A generated data set has no end."""
    sets = [world for world, _ in task.sets if hasattr(world, "words")]
    learned = sum(p.numel() for p in task.module.parameters() if p.requires_grad)
    words, items = sum(world.words for world in sets), sum(map(len, sets))
    if len(sets) < len(task.sets) or learned <= words:
        return ""
    times = task.s.steps * task.s.batch / items
    return (f"{learned:,} parameters learn from {words:,} words of {items:,} items, each shown {times:,.0f} "
            "times: they can be learned by heart, so trust the held-out row alone; more data, fewer --steps "
            "or a smaller bridge help")


def advise_on_depth(task) -> str:
    """Are the toy's options those of a bridge in a shallow decoder?"""
    s, bridge, layers = task.s, task.module.bridge, task.module.decoder.config.layers
    own = {option.partition("=")[0] for option in s.option}
    if s.scale != "toy" or layers < DEEP:
        return ""
    if s.bridge in ("flamingo", "idefics") and bridge.every == 1 and "every" not in own:
        return (f"the toy's every=1 puts a block before each of the {layers} layers, where the papers have "
                "one before every fourth; give --option every=4")
    if s.bridge == "zero_init" and 2 * len(bridge.gated_layers) < layers and "adapted" not in own:
        return (f"the toy's adapted={len(bridge.gated_layers)} reaches few of the {layers} layers, where the "
                f"paper adapts all but two; give --option adapted={layers - 2}")
    return ""


def learned_words(pieces: list[dict], tokenizer) -> list[str]:
    """The long words of what is learned, each once."""
    rows = [row for piece in pieces for row in piece["labels"].cpu()]
    texts = [tokenizer.decode(row[row != IGNORE].tolist()) for row in rows]
    return sorted({word for text in texts for word in re.findall(rf"[^\W\d_]{{{LONG_WORD},}}", text)})


def advise_at_end(out: Path, vocab_size: int) -> str:
    """What the last line of the log says of the run; the line of step 1 says nothing of it."""
    lines = [line for line in read_log(out / "log.jsonl") if "loss" in line and line["step"] > 1]
    uniform = math.log(vocab_size)
    if not lines or lines[-1]["loss"] <= uniform:
        return ""
    return (f"at step {lines[-1]['step']} the loss is {lines[-1]['loss']:.2f}, still above a uniform guess "
            f"({uniform:.2f}): nothing was learned; give more --steps, another --lr, or a language model "
            "that knows these words (--lm)")


def first_look(task, pieces: list[dict], scales: list[float], out: Path, loss: float) -> None:
    """Is the image used, what is learned, what is likely to go wrong? The first picture and its document."""
    blind = report_blind_loss(task.module, pieces, scales, task.ranks)
    if task.ranks.first:
        append_line(out / "log.jsonl", {"step": 0, "blind": blind})
        for sentence in advise(task, pieces, blind, loss):
            print(f"doctor   {sentence}")
        document, item = task.example(task.world, 0)
        print_first_document(document, item.pictures, task.tokenizer, out)


def gradient_norms(trained: list[tuple[str, nn.Parameter]]) -> str:
    """|g| of each part, two names deep: a part that is stuck at zero is seen at the first step."""
    squares: dict[str, float] = {}
    for n, p in trained:
        if p.grad is not None:
            name = ".".join(n.split(".")[:2])
            squares[name] = squares.get(name, 0.0) + full_tensor(p.grad.float().square().sum()).item()
    return "  ".join(f"{name} {math.sqrt(v):.2g}" for name, v in squares.items())


def gate_details(bridge: Bridge, heads: int) -> dict:
    """Gates (layers, gates of a layer), the layers, and whether a gate belongs to a head; {} without any."""
    gates = bridge.gates()
    if gates is None:
        return {}
    return {"gates": gates.tolist(), "layers": bridge.gated_layers, "per_head": gates.shape[1] in (1, heads)}


def print_first_document(document, pictures: list[np.ndarray], tokenizer, out: Path) -> None:
    """The first picture as first.png, and the document's tokens above what is learned of them."""
    for picture in pictures[:1]:
        with atomically(out / "first.png") as tmp:
            Image.fromarray(picture).save(tmp, "png")
    print(f"first    {out}/first.png, and its text; the second line is what is learned, ~ a blank")
    for line in align_tokens(document, tokenizer):
        print(f"         {line}")


def align_tokens(document, tokenizer, width: int = 110) -> list[str]:
    """Pairs of lines of at most `width` columns: tokens, and below each what is learned there (a blank is ~).

    document: has `tokens` and `labels` of one length.
    """
    def text(token: int) -> str:
        if token in (IMAGE, IGNORE):
            return "<image>" if token == IMAGE else ""
        return tokenizer.decode([token], special=True).replace(" ", "~").replace("\n", "↵")

    lines, top, low = [], "", ""
    for token, label in zip(document.tokens, document.labels):
        columns = max(len(text(token)), len(text(label))) + 1
        if top and len(top) + columns > width:
            lines, top, low = [*lines, top, low], "", ""
        top, low = top + text(token).ljust(columns), low + text(label).ljust(columns)
    return [*lines, top, low]


def print_modules(module: nn.Module) -> None:
    """The first thing to check of a run: what is trained and what is frozen."""
    print(f"{'module':18s}{'parameters':>14s}{'trained':>14s}{'MB':>9s}")
    parts = [(name, list(part.parameters())) for name, part in module.named_children()]
    parts += [(name, [p]) for name, p in module.named_parameters(recurse=False)]
    for name, parameters in parts:
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        megabytes = sum(p.numel() * p.element_size() for p in parameters) / 1e6
        print(f"{name:18s}{total:14,d}{trained:14,d}{megabytes:9.1f}   {'trained' if trained else 'frozen'}")
