"""eval.py: what a trained bridge is worth: metrics, answers, the blind baseline, tables.

    python eval.py out/RUN [out/RUN …]                          the comparison table over run folders
    python eval.py out/RUN [out/RUN …] --table                  the full one: captions, 0, 4, 8 examples, ScienceQA's and MME's form
    python eval.py out/RUN --image FILE --prompt "what is on the left?"     an answer about one picture; without --prompt a caption
    python eval.py out/RUN --image FILE --prompt "…" --look DIR      the same, and where its words look in the picture
    python eval.py --analyse out/RUN [out/RUN …]                do questions look at what they ask about? (shapes)
    python eval.py --claim all [--seeds 3 --jobs 2]             one miniature experiment per claim of the papers, half an hour on 2 cores
    python eval.py --lm FOLDER --prompt "…"                     the decoder alone, no picture
Chapters 1 metrics (equal to the official code) · 2 answers · 3 tables · 4 analyses · 5 claims · 6 the command line
"""
from __future__ import annotations

import argparse
import collections
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from model import Decoder, IMAGE, VLM
from support.formats.files import UserError, nearest, read_json, write_json
from support.formats.hub import fetch, is_hub_name, print_licence, tower_folder
from support.formats.llama import load_decoder
from support.formats.pictures import load_processor, read_image
from support.formats.ptb import ptb_tokenize
from support.formats.tokenizer_files import load_tokenizer
from support.formats.tokenizers import Tokenizer
from support.formats.vlm import load_vlm
from support.plumbing.cli import run_cli
from support.plumbing.packed import packed
from support.plumbing.samples import write_samples_page
from support.worlds import open_data
from support.worlds.files import Files


def ngrams(words: list[str], n: int) -> collections.Counter:
    return collections.Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def bleu(candidates: list[str], references: list[list[str]]) -> tuple[list[float], list]:
    """BLEU-1 … BLEU-4 (Papineni et al., ACL 2002, §2.3), as COCO's code computes them (option "closest").

    (B1)  p_n = Σ_g min(count in candidate, most in any one reference) / number of n-grams g of the candidate
    (B2)  BP  = min(1, exp(1 − r/c)),  r: reference length closest to the candidate's c, of two the shorter
    (B3)  BLEU-k = BP · (p_1 ⋯ p_k)^(1/k)

    For the corpus all counts and lengths are summed over images before (B1): not the mean of the images. The
    code adds 1e-15 above and 1e-9 below each fraction, so that no match at all scores about 1e-16.
    """
    def score(lengths: list[int], matched: list[int], total: list[int]) -> list[float]:
        ratio = (lengths[0] + 1e-15) / (lengths[1] + 1e-9)                      # c / r
        penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0                 # (B2)
        precisions = [(m + 1e-15) / (t + 1e-9) for m, t in zip(matched, total)]         # (B1)
        return [math.prod(precisions[:k]) ** (1 / k) * penalty for k in (1, 2, 3, 4)]   # (B3)

    counts = []
    for candidate, refs in zip(candidates, references):
        words, refs = candidate.split(), [r.split() for r in refs]
        closest = min((len(r) for r in refs), key=lambda r: (abs(r - len(words)), r))
        matched, total = [], []
        for n in (1, 2, 3, 4):
            most = collections.Counter()
            for r in refs:
                most |= ngrams(r, n)                                        # the larger count of each
            matched.append((ngrams(words, n) & most).total())               # the smaller count of each
            total.append(max(0, len(words) - n + 1))
        counts.append(([len(words), closest], matched, total))
    summed = [[sum(column) for column in zip(*part)] for part in zip(*counts)]
    return score(*summed), [score(*c) for c in counts]


def rouge_l(candidates: list[str], references: list[list[str]], beta: float = 1.2) -> tuple[float, list]:
    """ROUGE-L (Lin, W04-1013, §3.1, Eq. 2-4): F measure of the longest common subsequence, mean over images.

    (R1)  P = LCS / length of the candidate,  R = LCS / length of the reference
    (R2)  F = (1 + β²) · P · R / (R + β² · P)

    Paper and published code differ: the paper takes the reference with the best F, the code the best P and
    the best R of whichever; we follow the code. It splits at blanks only: the empty string is one word.
    """
    def common(a: list[str], b: list[str]) -> int:
        row = [0] * (len(b) + 1)                                    # row[j] = LCS of a so far and b[:j]
        for x in a:
            above = row[:]
            for j, y in enumerate(b):
                row[j + 1] = above[j] + 1 if x == y else max(above[j + 1], row[j])
        return row[-1]

    scores = []
    for candidate, refs in zip(candidates, references):
        words, refs = candidate.split(" "), [r.split(" ") for r in refs]
        lcs = [common(words, r) for r in refs]
        p, r = max(lcs) / len(words), max(x / len(r) for x, r in zip(lcs, refs))                # (R1)
        scores.append((1 + beta**2) * p * r / (r + beta**2 * p) if p and r else 0.0)            # (R2)
    return mean(scores), scores


def cider(candidates: list[str], references: list[list[str]], sigma: float = 6.0) -> tuple[float, list]:
    """CIDEr-D (Vedantam et al., 1411.5726v2; in COCO's code just Cider): agreement on what sets images apart.

    symbol   here          meaning
    h_g(s)   ngrams(s, n)  how often n-gram g stands in sentence s; the paper divides by all n-grams of s
    df_g     df[g]         number of images with g in any of their references;  |I| = images evaluated
    g^n(s)   weights(s)    the weights of the n-grams of s, n = 1 … 4
    l(s)     length        words of s in the paper, BIGRAMS in the code: differs only where s is empty

    (C1)  g^n(s)_g = h_g(s) · (ln |I| − ln max(1, df_g))
    (C2)  sim_n(c, s) = min(g^n(c), g^n(s)) · g^n(s) / (‖g^n(c)‖ ‖g^n(s)‖)
    (C3)  CIDEr-D = 10 · mean over references s and n of exp(−(l(c) − l(s))² / 2σ²) · sim_n(c, s)

    The corpus scores the mean over images. A score depends on the whole corpus: with one image ln |I| = 0 and
    all is 0. The paper stems words, the code does not.
    """
    df = collections.Counter()
    for refs in references:
        df.update({g for r in refs for n in (1, 2, 3, 4) for g in ngrams(r.split(), n)})

    def weights(sentence: str) -> list[dict[tuple, float]]:
        images, words = len(references), sentence.split()
        return [{g: h * (math.log(images) - math.log(max(1, df[g]))) for g, h in ngrams(words, n).items()}
                for n in (1, 2, 3, 4)]                                          # (C1)

    def similarity(c: dict, s: dict) -> float:
        norms = math.hypot(*c.values()) * math.hypot(*s.values())
        dot = sum(min(w, s[g]) * s[g] for g, w in c.items() if g in s)
        return dot / norms if norms else 0.0                                    # (C2)

    scores = []
    for candidate, refs in zip(candidates, references):
        vector, total = weights(candidate), 0.0
        for r in refs:
            length = [max(0, len(s.split()) - 1) for s in (candidate, r)]           # bigrams
            penalty = math.exp(-(length[0] - length[1])**2 / (2 * sigma**2))
            total += penalty * mean([similarity(c, s) for c, s in zip(vector, weights(r))])
        scores.append(10 * total / len(refs))                                   # (C3)
    return mean(scores), scores


NUMBER_WORDS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'ve": "could might must not should they we what where who would you",
    "": "ma'am o'clock 'twas y'all 'ow's'at"}
CONTRACTIONS = {word[:i] + word[i + 1:]: word                   # isnt → isn't: one apostrophe is missing
                for ending, stems in CONTRACTED.items() for word in (stem + ending for stem in stems.split())
                for i, letter in enumerate(word) if letter == "'"} | {"somebody'd": "somebodyd"}    # sic


def vqa_normalize(text: str) -> str:
    """An answer in the spelling that is compared: punctuation, case, number words, articles, apostrophes.

    Quirks kept: a mark disappears if it touches a blank anywhere in the text, or if a comma stands between
    two digits anywhere; else it becomes a blank (a-b → a b, but a-b 1,000 → ab 1000). Only 32 periods go: the
    official code passes the flag re.UNICODE, whose value is 32, where re.sub takes a count.
    """
    clean = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        glued = f"{mark} " in text or f" {mark}" in text or re.search(r"[0-9],[0-9]", text)
        clean = clean.replace(mark, "" if glued else " ")
    clean = re.sub(r"\.(?!\d)", "", clean, count=32)             # 3. → 3, but 1.5 and .5 stay
    words = [NUMBER_WORDS.get(w, w) for w in clean.lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """VQA accuracy, 0 … 1 (Antol et al., 1505.00468; over annotators as in the official evaluation code).

    (V1)  acc = mean over annotators j of min(1, number of OTHER annotators who gave the predicted answer / 3)

    With ten annotators 0, 1, 2, 3, 4 equal answers score 0, 0.3, 0.6, 0.9, 1. Answers are normalised only
    where the annotators differ (since 2021): if all wrote the same string, the prediction must be that very
    string, case and all. We tell annotators apart by position, the official code by whole records: where
    these have no id (VizWiz), it leaves equal ones out together and scores lower.
    """
    prediction, *answers = (re.sub(r"[\n\t]", " ", a).strip() for a in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = (vqa_normalize(a) for a in (prediction, *answers))
    same = [a == prediction for a in answers]
    return mean([min(1.0, (sum(same) - s) / 3) for s in same])              # (V1)  s: annotator j's own


def retrieval_recall(i2t, image_of, t2i=None, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Recall@K of retrieval, 0 … 1: {"i2t@1", …, "t2i@10", "mean" of all}, as LAVIS computes it.

    i2t     (images, captions)  score of each caption for each image; arrays or tensors on the CPU
    image_of  (captions,)       the image each caption belongs to: five captions per image are five entries
    t2i     (captions, images)  i2tᵀ unless given: BLIP-2 re-scores the best 128 of each row, so the two differ

    i2t@K: images with one of their captions among the K best captions. t2i@K: captions with their image among
    the K best. A wrong one that ties counts as better: the official order of ties is arbitrary, and a model that
    scores everything alike must not look perfect.
    """
    i2t = np.asarray(i2t)
    own = np.asarray(image_of)[None] == np.arange(len(i2t))[:, None]            # (images, captions)  True = belongs
    result = {}
    for name, scores, own in (("i2t", i2t, own), ("t2i", i2t.T if t2i is None else np.asarray(t2i), own.T)):
        best = np.where(own, scores, -np.inf).max(1, keepdims=True)             # of the right ones in each row
        rank = (~own & ~(scores < best)).sum(1)                                 # wrong ones before it, ties and NaN too
        result |= {f"{name}@{k}": float((rank < k).mean()) for k in ks}
    return {**result, "mean": mean(list(result.values()))}


# ------------------------------------------------------------------------------------------------------------------
# 2. Answers
# ------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def generate_texts(generate, documents: list[data.Document], tokenizer: Tokenizer, max_new_tokens: int = 48, beams: int = 1,
          features: Tensor | None = None, batch: int = 128, pictures: list[list[int]] | None = None) -> list[str]:
    """What the model writes after each document, greedily or by beam search, without the stop token.

    generate: VLM.generate or Decoder.generate; features (n, N, Di): the picture of each document; or pictures says
    which rows of it stand in each. Documents run in batches of similar length, padded on the left; a test holds a batch equal to its rows one by one.
    """
    answers, order = [""] * len(documents), sorted(range(len(documents)), key=lambda i: len(documents[i].tokens))
    decoder = getattr(generate.__self__, "decoder", generate.__self__)
    with packed(decoder):
        for start in range(0, len(order), batch):
            rows = order[start:start + batch]
            tokens, _, mask = data.collate([documents[i] for i in rows], left=True)
            device = features.device if features is not None else decoder.embed.weight.device
            picked = rows if pictures is None else [p for i in rows for p in pictures[i]]
            extra = {} if features is None else {"features": features[picked]}
            ids = generate(tokens.to(device), max_new_tokens=max_new_tokens, beams=beams, stop=(tokenizer.eos,),
                           mask=None if mask.all() else mask.to(device), **extra).tolist()
            for i, line in zip(rows, ids):
                answers[i] = tokenizer.decode(line[:line.index(tokenizer.eos)] if tokenizer.eos in line else line).strip()
    return answers


@torch.no_grad()
def vision_features(vlm: VLM, items: list[data.Item], blind: bool, batch: int = 128) -> Tensor:
    """Features (n, N, Di) of the items' pictures; blind: of as many zeroed ones."""
    device, size = next(vlm.vit.parameters()).device, vlm.vit.config.image_size
    parts = []
    for i in range(0, len(items), batch):
        pixels = data.to_pixels([item.image for item in items[i:i + batch]], size, vlm.processor).to(device)
        parts.append(vlm.features(torch.zeros_like(pixels) if blind else pixels))
    return torch.cat(parts)


def evaluate(vlm: VLM, tokenizer: Tokenizer, items: list[data.Item], blind: bool = False, beams: int = 1, captions: bool = True) -> dict:
    """{kind: accuracy, "mean": their mean, "cider", "bleu4", "captions": the texts, "answers": the texts} on these items."""
    features = vision_features(vlm, items, blind)
    asked = [(n, q) for n, item in enumerate(items) for q in item.qas]
    prompts = [data.Document(tokenizer).image().add(data.QUESTION.format(q.question)) for _, q in asked]
    rows = torch.tensor([n for n, _ in asked], dtype=torch.long, device=features.device)
    answers = generate_texts(vlm.generate, prompts, tokenizer, 12, beams, features[rows])
    result = accuracy_by_kind([q for _, q in asked], answers)
    result["answers"] = answers
    if captions and all(item.captions for item in items):
        prompts = [data.Document(tokenizer).image().add(data.CAPTION) for _ in items]
        result["captions"] = generate_texts(vlm.generate, prompts, tokenizer, 64, beams, features)
        result |= caption_scores(result["captions"], [item.captions for item in items])
    return result


def answer_accuracy(q: data.QA, answer: str) -> float:
    """VQA accuracy, 0 … 1. With ten equal answers it is exact match."""
    return vqa_accuracy(answer, q.answers or [q.answer] * 10)


def accuracy_by_kind(questions: list[data.QA], answers: list[str]) -> dict:
    """VQA accuracy per kind of question and the mean over kinds."""
    hits: dict[str, list[float]] = {}
    for q, a in zip(questions, answers):
        hits.setdefault(q.kind, []).append(answer_accuracy(q, a))
    result = {k: float(np.mean(v)) for k, v in sorted(hits.items())}
    return {**result, "mean": float(np.mean(list(result.values())))} if result else {}


def caption_scores(captions: list[str], references: list[list[str]]) -> dict:
    """CIDEr-D and BLEU-4 as COCO's code computes them."""
    candidates = [" ".join(ptb_tokenize(c)) for c in captions]
    references = [[" ".join(ptb_tokenize(r)) for r in rs] for rs in references]
    return {"cider": cider(candidates, references)[0], "bleu4": bleu(candidates, references)[0][3]}


def oracle_scores(decoder: Decoder, tokenizer: Tokenizer, items: list[data.Item]) -> dict:
    """The decoder given each picture in words: the ceiling of every bridge that only feeds it."""
    asked = [(item, q) for item in items for q in item.qas]
    prompts = [data.Document(tokenizer).add(item.about).add(data.QUESTION.format(q.question)) for item, q in asked]
    return accuracy_by_kind([q for _, q in asked], generate_texts(decoder.generate, prompts, tokenizer, 12))


def chance_scores(world, items: list[data.Item]) -> dict:
    """The commonest answer of each kind in training, whatever is asked."""
    train = open_data(f"{world.name}:{world.seen if isinstance(world, Files) else 'train'}", seed=world.seed)
    seen: dict[str, collections.Counter] = {}
    for i in range(min(500, len(train)) if isinstance(train, Files) else 500):
        for q in train.item(i).qas:
            seen.setdefault(q.kind, collections.Counter())[q.answer] += 1
    asked = [q for item in items for q in item.qas]
    return accuracy_by_kind(asked, [seen[q.kind].most_common(1)[0][0] if q.kind in seen else "" for q in asked])


# ------------------------------------------------------------------------------------------------------------------
# 3. Tables
# ------------------------------------------------------------------------------------------------------------------

def format_table(rows: list[dict]) -> str:
    """Rows of {"row", "trained", "examples", kind: accuracy, …} as aligned text; accuracies and BLEU × 100, missing cells empty."""
    columns = ["row"] + [c for c in ("trained", "examples") if any(c in r for r in rows)]
    columns += sorted({k for r in rows for k, v in r.items() if isinstance(v, float)} - {"mean", "cider", "bleu4"})
    columns += [c for c in ("mean", "cider", "bleu4") if any(c in r for r in rows)]

    def cell(column: str, value) -> str:
        if value is None:
            return ""
        if column in ("trained", "examples"):
            return f"{value:,}"
        return value if isinstance(value, str) else f"{value:.2f}" if column == "cider" else f"{100 * value:.1f}"
    text = [[c if c != "row" else "" for c in columns]] + [[cell(c, r.get(c)) for c in columns] for r in rows]
    widths = [max(map(len, column)) for column in zip(*text)]
    lines = ([v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths))] for line in text)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def scalar_scores(result: dict) -> dict:
    return {k: v for k, v in result.items() if isinstance(v, float)}


def first_items(world, split: str, count: int) -> list[data.Item]:
    """The first items of another split of the same world."""
    other = open_data(f"{world.name}:{split}", seed=world.seed)
    return [other.item(i) for i in range(min(count, len(other)) if isinstance(other, Files) else count)]


def table_rows(vlm: VLM, tokenizer: Tokenizer, world, count: int, facts: dict, name: str,
            beams: int = 1) -> tuple[list[dict], list[data.Item], dict]:
    """Rows of the final table: held-out, seen, blind; then the items and the full result on the held-out ones."""
    facts = {"trained": facts.get("trained_parameters"), "examples": facts.get("training_examples")}
    items = first_items(world, world.held_out, count)
    seen = first_items(world, world.seen, count)
    result = evaluate(vlm, tokenizer, items, beams=beams)
    rows = [{"row": f"{name}, held-out", **facts, **scalar_scores(result)},
            {"row": f"{name}, seen", **facts, **scalar_scores(evaluate(vlm, tokenizer, seen, beams=beams))},
            {"row": f"{name}, blind", **scalar_scores(evaluate(vlm, tokenizer, items, blind=True, beams=beams))}]
    return rows, items, result


def baseline_rows(vlm: VLM, tokenizer: Tokenizer, world, items: list[data.Item]) -> list[dict]:
    """chance, and the oracle where the world can say its pictures in words and the decoder was taught to read them."""
    rows = [{"row": "chance (commonest answer)", **chance_scores(world, items)}]
    if world.name == "shapes":
        rows.append({"row": "oracle (scene in words)", **oracle_scores(vlm.decoder, tokenizer, items)})
    return rows


def report_run(vlm: VLM, tokenizer: Tokenizer, world, out: Path, count: int, samples: int) -> None:
    """What a run says at its end: answers, right or wrong, and the table; results.json and samples.html hold them."""
    facts = read_json(out / "config.json")
    rows, items, result = table_rows(vlm, tokenizer, world, count, facts, vlm.bridge.name)
    rows += baseline_rows(vlm, tokenizer, world, items)
    captions, answers = result.get("captions", [None] * len(items)), iter(result["answers"])
    told = [(item, text, [judge_answer(q, a) for q, a in zip(item.qas, answers)]) for item, text in zip(items, captions)]
    for item, text, asked in told[:samples]:
        print(f"\nheld-out {item.id}")
        if text is not None:
            print(f"  reference  {item.captions[0]}\n  caption    {text}")
        for word, line in asked:
            print(f"  {word:10s} {line}")
    text = f"{len(items)} held-out pictures; accuracy in %, CIDEr, BLEU-4 x 100\n{format_table(rows)}\n"
    write_json(out / "results.json", {"world": world.name, "items": len(items), "rows": rows})
    title = f"{out.resolve().name}: {vlm.bridge.name} on {world.name}:{world.held_out}"
    write_samples_page(out / "samples.html", title, told[:max(samples, 24)], text)
    print(f"\n{text}")


def judge_answer(q: data.QA, answer: str) -> tuple[str, str]:
    """("right", "is it red? yes"), ("WRONG", "is it red? no (it is yes)"); "partly 0.6" where some annotators agree."""
    right = answer_accuracy(q, answer)
    word = "right" if right == 1 else f"partly {right:.1f}" if right else "WRONG"
    return word, f"{q.question} {answer}" + ("" if right == 1 else f" (it is {q.answer})")


# ------------------------------------------------------------------------------------------------------------------
# 6. The command line
# ------------------------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    from support.lab.ask import ask
    from support.lab.attention import draw_attention
    from support.lab.claims import run_claims
    from support.lab.claims_list import CLAIMS
    from support.lab.compare import print_full_table
    from support.lab.protocols import PROTOCOLS
    from support.lab.targets import attention_on_target, words_on_target
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     exit_on_error=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", help="run folders of train.py")
    parser.add_argument("--saved", action="store_true",
                        help="the rows that each run measured at its end (results.json) instead of measuring again")
    parser.add_argument("--items", "--limit", type=int, default=400, help="pictures per row (default 400)")
    parser.add_argument("--beams", type=int, default=1, help="beam width; 1 = greedy (default)")
    parser.add_argument("--image", help="a picture file to ask about")
    parser.add_argument("--prompt", help="the question; without it the picture is captioned")
    parser.add_argument("--look", metavar="DIR", help="with --image: write to DIR where the words look in it, print the words "
                        "nearest to its visual tokens")
    parser.add_argument("--table", action="store_true", help="the full comparison: captions, questions with 0, 4, 8 examples, ScienceQA's and "
                        "MME's form, for each run, the run blind, and chance")
    parser.add_argument("--data", action="append", default=[], metavar="SPEC", help="of --table: another data set than the run's, such as "
                        "vqav2:PATH:val; several give a column each and their Overall")
    parser.add_argument("--protocol", default="ours", help=f"of --table: whose prompts, {' | '.join(PROTOCOLS)} (default ours)")
    parser.add_argument("--shots", default="0,4,8", help="of --table: numbers of examples (default 0,4,8)")
    parser.add_argument("--seed", type=int, default=0, help="of --table: draws examples and choices (default 0)")
    parser.add_argument("--predictions", metavar="FOLDER", help="of --table: keep every text there, go on from those that are there, and write "
                        "each benchmark's official file")
    parser.add_argument("--format", default="text", choices=["text", "markdown", "csv"], help="of --table (default text)")
    parser.add_argument("--each", action="store_true", help="of --table: a column for each kind of question, too")
    parser.add_argument("--paper", action="store_true", help="of --table: published rows of the systems, on other data")
    parser.add_argument("--out", metavar="FILE", help="of --table: write the table there, too")
    parser.add_argument("--analyse", action="store_true", help="on held-out pictures of shapes: how much attention the thing "
                        "asked about gets, and whether soft tokens spell what they stand for")
    parser.add_argument("--claim", nargs="+", metavar="NAME", help="train and judge miniatures of the papers' claims, and write support/results/claims.txt: "
                        f"all, or some of {', '.join(CLAIMS)}")
    parser.add_argument("--seeds", type=int, default=3, help="of --claim: runs per arm (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="of --claim: runs at a time, one core each (default 2)")
    parser.add_argument("--vlm", help="a published vision-language model (LLaVA, InstructBLIP, BLIP-2's first stage, IDEFICS, Llama 3.2 "
                        "Vision), by its folder or its name on the hub: answer --prompt about --image")
    parser.add_argument("--dtype", default="float32", help="of a published model: float32 (default) | bfloat16 | float16")
    parser.add_argument("--lm", help="a decoder, by its folder or its name on the hub: answer --prompt without any picture")
    parser.add_argument("--offline", action="store_true", help="never touch the network: names on the hub come from the local cache")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer in tokens (default 64)")
    parser.add_argument("--device", default="auto", help="cpu | cuda | auto")
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"{e}; see python eval.py --help.") from None
    if unknown:
        raise UserError(f'unknown argument "{unknown[0]}"; see python eval.py --help.')
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"              # read by model.fetch and by the hub's own library
    if args.items < 1 or args.beams < 1:
        raise UserError("--items and --beams must be at least 1.")

    if args.claim:
        names = list(CLAIMS) if args.claim == ["all"] else args.claim
        if wrong := [name for name in names if name not in CLAIMS]:
            raise UserError(f'unknown claim "{wrong[0]}"; {nearest(wrong[0], ["all", *CLAIMS])}')
        if args.seeds < 1 or args.jobs < 1:
            raise UserError("--seeds and --jobs must be at least 1.")
        print(run_claims(names, args.seeds, args.jobs))
        return

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(args.dtype)
    if dtype is None:
        raise UserError(f'unknown --dtype "{args.dtype}"; known: float32, bfloat16, float16.')

    if args.vlm:
        if not args.image or not args.prompt:
            raise UserError("--vlm needs --image FILE and --prompt TEXT: what to ask about which picture.")
        print(ask(fetch(args.vlm), args.image, args.prompt, args.max_new_tokens, args.beams, device, dtype))
        return
    if args.lm:
        if not args.prompt:
            raise UserError('--lm needs --prompt "…": what to ask the decoder.')
        folder = fetch(args.lm)
        print_licence(args.lm, folder, sys.stderr)      # not among the answers
        tokenizer, decoder = load_tokenizer(folder), load_decoder(folder, device, dtype)
        ids = data.Document(tokenizer).chat(args.prompt).tokens
        if IMAGE in ids:
            raise UserError('--lm asks a decoder alone, which sees no picture; leave "<image>" out of --prompt.')
        stop = () if tokenizer.eos is None else (tokenizer.eos,)
        out = decoder.generate(torch.tensor([ids], device=device), max_new_tokens=args.max_new_tokens, beams=args.beams, stop=stop)
        print(tokenizer.decode(out[0]).strip())
        return
    if not args.runs:
        raise UserError("give at least one run folder, for example: python eval.py out/mapl-shapes (python train.py writes it).")
    if args.image:
        vlm, tokenizer, _ = open_run(args.runs[0], device)
        pixels = data.to_pixels([read_image(args.image)], vlm.vit.config.image_size, vlm.processor).to(device)
        prompt = data.QUESTION.format(args.prompt) if args.prompt else data.CAPTION
        document = data.Document(tokenizer).image().add(prompt)
        print(generate_texts(vlm.generate, [document], tokenizer, args.max_new_tokens, args.beams, vlm.features(pixels))[0])
        if args.look:
            print(draw_attention(vlm, tokenizer, pixels, prompt, Path(args.look)))
        return
    if args.look:
        raise UserError("--look needs --image FILE: the picture to look at.")
    if args.table:
        print_full_table(args, device)
        return
    if args.analyse:
        for run in args.runs:
            vlm, tokenizer, _ = open_run(run, device)
            rows = attention_on_target(vlm, tokenizer, args.items)
            print(f"{Path(run).name}: attention in %, by chance a cell has a ninth of the picture's\n"
                  f"{format_table(rows) if rows else 'no question was answered right'}\n")
            if vlm.bridge.soft_tokens:
                rows = words_on_target(vlm, tokenizer, args.items)
                print(f"its words among the 5 nearest to the soft token of a thing, in %\n{format_table(rows)}\n")
        return
    worlds, last = {}, {}
    for run in args.runs if args.saved else ():
        r = read_json(Path(run) / "results.json")
        args.items = r["items"]
        own = [{**row, "row": Path(run).name + ", " + row["row"].split(", ")[-1]} for row in r["rows"] if ", " in row["row"]]
        worlds.setdefault(r["world"], []).extend(own)
        last[r["world"]] = [row for row in r["rows"] if ", " not in row["row"]]
    for run in () if args.saved else args.runs:
        vlm, tokenizer, facts = open_run(run, device)
        world = open_data(facts["settings"]["data"], seed=facts["settings"]["seed"])
        rows, items, _ = table_rows(vlm, tokenizer, world, args.items, facts, Path(run).name, args.beams)
        worlds.setdefault(world.name, []).extend(rows)
        last[world.name] = baseline_rows(vlm, tokenizer, world, items)
    for name, rows in worlds.items():
        rows += last[name]
        print(f"{name}: {args.items} pictures a row; accuracy in %, CIDEr, BLEU-4 x 100\n{format_table(rows)}\n")


def open_run(run: str, device) -> tuple[VLM, Tokenizer, dict]:
    folder = fetch(run) if is_hub_name(run) else Path(run)
    vlm = load_vlm(folder, device)
    facts, vlm.processor = read_json(folder / "config.json"), load_processor(folder)
    towers = {facts[k]: tower_folder(folder, facts[k]) for k in ("decoder", "vit") if k in facts} or {run: folder}
    for name, where in towers.items():                  # a published model is its own
        print_licence(name, where, sys.stderr)
    return vlm, load_tokenizer(towers.get(facts.get("decoder"), folder)), facts


if __name__ == "__main__":
    run_cli(main)
