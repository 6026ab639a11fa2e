"""eval.py: what a trained bridge is worth: metrics, texts, captions and answers, tables.

    python eval.py RUN [RUN …]                         the table: each run, the run blind, chance, oracle
    python eval.py RUN [RUN …] --saved                 the same rows as each run measured them at its end
    python eval.py compare RUN [RUN …] --shots 0,4     captions, examples in the prompt, ScienceQA, MME
    python eval.py ask MODEL --image FILE --prompt "…" an answer about a picture, or of a decoder alone
    python eval.py chat MODEL --image FILE             a conversation: lines in, streamed answers
    python eval.py look RUN --image FILE --prompt "…"  where the words of a prompt look in a picture
    python eval.py targets RUN [RUN …]                 do questions look at what they ask about? (shapes)
    python eval.py claims all --seeds 3                one miniature experiment per claim of the papers

RUN is a folder that train.py wrote. Each subcommand, also demo (a page) and draw, has its own --help.
Chapters 1 metrics · 2 texts · 3 captions and answers · 4 the table · 5 the command line
"""
from __future__ import annotations

import collections
import importlib
import math
import sys
from pathlib import Path

from support.plumbing.stop import end_at_once
if __name__ == "__main__":
    end_at_once()                   # Ctrl-C while the next lines load: no traceback
import numpy as np
import torch
from torch import Tensor

import data
from model import Decoder, IMAGE, VLM
from support.formats.benchmarks import scienceqa_choice, scienceqa_text
from support.formats.files import read_json, write_json
from support.formats.ptb import ptb_tokenize
from support.formats.tokenizers import Tokenizer
from support.formats.vqa import EVALUATORS
from support.plumbing.beams import beam_search
from support.plumbing.cli import run_cli
from support.plumbing.meter import track
from support.plumbing.packed import packed
from support.plumbing.samples import JudgedItem, print_samples, write_samples_page
from support.worlds import open_split, take_items
from support.worlds.trained import name_split

# ---- 1. Metrics, equal to the official code --------------------------------------------------------------

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


def vqa_accuracy(prediction: str, answers: list[str], evaluator: str = "vqa") -> float:
    """VQA accuracy, 0 … 1 (Antol et al., 1505.00468; over annotators as in the official evaluation code).

    (V1)  acc = mean over annotators j of min(1, number of OTHER annotators who gave the predicted answer / 3)

    With ten annotators 0, 1, 2, 3, 4 equal answers score 0, 0.3, 0.6, 0.9, 1. Answers are normalised only
    where the annotators differ (since 2021): if all wrote the same string, the prediction must be that very
    string, case and all. Other evaluators, such as TextVQA's, have other rules (formats/vqa.py: EVALUATORS).
    We tell annotators apart by position, the official code by whole records: where these have no id (VizWiz),
    it leaves equal ones out together and scores lower.
    """
    prediction, answers = EVALUATORS[evaluator](prediction, answers)
    same = [a == prediction for a in answers]
    return mean([min(1.0, (sum(same) - s) / 3) for s in same])              # (V1)  s: annotator j's own


def retrieval_recall(i2t, image_of, t2i=None, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Recall@K of retrieval, 0 … 1: {"i2t@1", …, "t2i@10", "mean" of all}, as LAVIS computes it.

    i2t     (images, captions)  score of each caption for each image; arrays or tensors on the CPU
    image_of  (captions,)       the image each caption belongs to: five captions per image are five entries
    t2i     (captions, images)  i2tᵀ unless given: BLIP-2 re-scores the best 128 of a row, so the two differ

    i2t@K: images with one of their captions among the K best captions. t2i@K: captions with their image among
    the K best. A wrong one that ties counts as better: the official order of ties is arbitrary, and a model
    that scores everything alike must not look perfect.
    """
    i2t = np.asarray(i2t)
    own = np.asarray(image_of)[None] == np.arange(len(i2t))[:, None]    # (images, captions)  True = belongs
    t2i = i2t.T if t2i is None else np.asarray(t2i)
    result = {}
    for name, scores, own in (("i2t", i2t, own), ("t2i", t2i, own.T)):
        best = np.where(own, scores, -np.inf).max(1, keepdims=True)     # of the right ones in each row
        rank = (~own & ~(scores < best)).sum(1)         # wrong ones before it: ties and NaN count, too
        result |= {f"{name}@{k}": float((rank < k).mean()) for k in ks}
    return {**result, "mean": mean(list(result.values()))}


# ---- 2. Texts --------------------------------------------------------------------------------------------

@torch.no_grad()
def generate_ids(model: VLM | Decoder, tokens: Tensor | None, max_new_tokens: int, beams: int = 1,
                 mask: Tensor | None = None, stop: tuple[int, ...] = (), **images) -> Tensor:
    """The new tokens (B, T_new) after tokens (B, T): greedy, or with beams > 1 by beam search.

    images: what a VLM sees, as in `VLM.generate`; of a decoder what `VLM.prepare` has made of it.
    """
    if beams == 1:
        return model.generate(tokens, max_new_tokens=max_new_tokens, mask=mask, stop=stop, **images)
    if isinstance(model, Decoder):
        return beam_search(model, tokens, max_new_tokens, beams, mask=mask, stop=stop, **images)
    inputs, _ = model.prepare(tokens, mask=mask, **images)
    return beam_search(model.decoder, None, max_new_tokens, beams, stop=stop, **inputs)


@torch.no_grad()
def generate_texts(model: VLM | Decoder, documents: list[data.Document], tokenizer: Tokenizer,
                   max_new_tokens: int = 48, beams: int = 1, features: Tensor | None = None, batch: int = 128,
                   pictures: list[list[int]] | None = None) -> list[str]:
    """What the model writes after each document, greedily or by beam search, without the stop token.

    features (n, N, Di): of the picture of each document; or `pictures` says which rows of it stand in each.
    Documents run in batches of similar length, padded on the left; a test holds a batch equal to its rows.
    """
    texts = [""] * len(documents)
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].tokens))
    decoder = model if isinstance(model, Decoder) else model.decoder
    device = decoder.embed.weight.device if features is None else features.device
    with packed(decoder):
        for rows in track([order[i:i + batch] for i in range(0, len(order), batch)], "texts"):
            tokens, _, mask = data.collate([documents[i] for i in rows], left=True)
            mask = None if mask.all() else mask.to(device)
            used = rows if pictures is None else [p for i in rows for p in pictures[i]]
            images = {} if features is None else {"features": features[used]}
            stop = tokenizer.stop
            ids = generate_ids(model, tokens.to(device), max_new_tokens, beams, mask, stop, **images)
            for i, line in zip(rows, ids.tolist()):
                texts[i] = tokenizer.answer_text(line)
    return texts


# ---- 3. Captions and answers; blind, chance, oracle ------------------------------------------------------

@torch.no_grad()
def vision_features(vlm: VLM, items: list[data.Item], blind: bool, batch: int = 128) -> Tensor:
    """Features (n, N, Di) of the items' pictures, one each; blind: of as many zeroed ones."""
    device, size = next(vlm.vit.parameters()).device, vlm.vit.config.image_size
    parts = []
    for i in track(range(0, len(items), batch), "pictures"):
        pixels = data.to_pixels([item.image for item in items[i:i + batch]], size, vlm.processor).to(device)
        parts.append(vlm.features(torch.zeros_like(pixels) if blind else pixels))
    return torch.cat(parts) if parts else vlm.features(None)


def evaluate(vlm: VLM, tokenizer: Tokenizer, items: list[data.Item], blind: bool = False, beams: int = 1,
             captions: bool = True, form: str = "QCM-LEA") -> dict:
    """Scores on these items: {kind of question: accuracy, "mean": over kinds, "cider", "bleu4"}.

    Accuracies and BLEU-4 are 0 … 1. The texts come with them: "answers", one per question, and "captions",
    one per item (None without a picture), where all pictures have references. form: of scienceqa_text.
    """
    pictured = [n for n, item in enumerate(items) if item.image is not None]
    features = vision_features(vlm, [items[n] for n in pictured], blind)
    row = {n: [r] for r, n in enumerate(pictured)}      # item → its row of the features

    def write(asked: list[tuple[int, str]], longest: int) -> list[str]:
        documents = [data.Document(tokenizer).ids([IMAGE] * (n in row)).add(prompt) for n, prompt in asked]
        pictures = [row.get(n, []) for n, _ in asked]
        return generate_texts(vlm, documents, tokenizer, longest, beams, features, pictures=pictures)

    questions = [q for item in items for q in item.qas]
    asked = [(n, question_text(q, form)) for n, item in enumerate(items) for q in item.qas]
    longest = max((256 if q.choices else 72 if q.reasons else 12 for q in questions), default=0)
    answers = write(asked, longest)
    result = accuracy_by_kind(questions, answers) | {"answers": answers}
    if captions and pictured and all(items[n].captions for n in pictured):
        texts = dict(zip(pictured, write([(n, data.CAPTION) for n in pictured], 64)))
        result["captions"] = [texts.get(n) for n in range(len(items))]
        result |= caption_scores([*texts.values()], [items[n].captions for n in texts])
    return result


def question_text(q: data.QA, form: str) -> str:
    return "\n" + scienceqa_text(q, form)[0] if q.choices else data.QUESTION.format(q.question)


def answer_accuracy(q: data.QA, answer: str, evaluator: str = "") -> float:
    """VQA accuracy (V1), 0 … 1. With ten equal answers the official one is exact match.

    evaluator: of EVALUATORS; without it that of the data set: TextVQA's questions are all of kind "textvqa".
    Of multiple choice it is 1 if the answer names the right choice.
    """
    if q.choices:
        answer = answer.replace("###\nANSWER:", "The answer is")                # of the form QCM-LEPA
        return float(scienceqa_choice(answer, len(q.choices)) == q.correct)
    if q.reasons:
        answer = answer.split(": ")[-1 if q.reasons == "before" else 0]
    evaluator = evaluator or (q.kind if q.kind in EVALUATORS else "vqa")
    return vqa_accuracy(answer, q.answers or [q.answer] * 10, evaluator)


def accuracy_by_kind(questions: list[data.QA], answers: list[str], evaluator: str = "") -> dict:
    """VQA accuracy per kind of question, 0 … 1, and under "mean" the mean over kinds."""
    scores: dict[str, list[float]] = {}
    for q, a in zip(questions, answers):
        scores.setdefault(q.kind, []).append(answer_accuracy(q, a, evaluator))
    result = {k: float(np.mean(v)) for k, v in sorted(scores.items())}
    return {**result, "mean": float(np.mean(list(result.values())))} if result else {}


def caption_scores(captions: list[str], references: list[list[str]]) -> dict:
    """CIDEr-D and BLEU-4 as COCO's code computes them, on its tokens."""
    candidates = [" ".join(ptb_tokenize(c)) for c in captions]
    references = [[" ".join(ptb_tokenize(r)) for r in rs] for rs in references]
    return {"cider": cider(candidates, references)[0], "bleu4": bleu(candidates, references)[0][3]}


def oracle_scores(decoder: Decoder, tokenizer: Tokenizer, items: list[data.Item]) -> dict:
    """The decoder reads each picture in words instead: the ceiling of every bridge that only feeds it."""
    questions = [(item, q) for item in items for q in item.qas]
    prompts = [data.Document(tokenizer).add(item.about).add(data.QUESTION.format(q.question))
               for item, q in questions]
    return accuracy_by_kind([q for _, q in questions], generate_texts(decoder, prompts, tokenizer, 12))


def chance_scores(world, items: list[data.Item]) -> dict:
    """The most frequent answer of each kind of question in training, whatever is asked."""
    split = world.seen if world.finite else "train"
    counts: dict[str, collections.Counter] = {}
    for item in first_items(world, split, 500):
        for q in item.qas:
            answer = f"The answer is {chr(ord('A') + q.correct)}." if q.choices else q.answer
            counts.setdefault(q.kind, collections.Counter())[answer] += 1
    questions = [q for item in items for q in item.qas]
    guesses = [counts[q.kind].most_common(1)[0][0] if q.kind in counts else "" for q in questions]
    return accuracy_by_kind(questions, guesses)


def first_items(world, split: str, count: int) -> list[data.Item]:
    """The first `count` items of a split of this world; all of them where it has fewer."""
    return take_items(open_split(world, split), count)


# ---- 4. The table ----------------------------------------------------------------------------------------

def format_table(rows: list[dict]) -> str:
    """Rows {"row", "trained", "examples", kind: accuracy, …} as text; accuracies and BLEU times 100."""
    rows = [r for r in rows if scalar_scores(r)] or rows       # of captions alone nobody guesses an answer
    scores, last = {k for r in rows for k in scalar_scores(r)}, ("mean", "cider", "bleu4")
    columns = ["row"] + [c for c in ("trained", "examples") if any(r.get(c) is not None for r in rows)]
    columns += sorted(scores - {*last}) + [c for c in last if c in scores]

    def cell(column: str, value) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        if column in ("trained", "examples"):
            return f"{value:,}"
        return f"{value:.2f}" if column in ("cider", "loss") else f"{100 * value:.1f}"
    head = ["" if c == "row" else c for c in columns]
    return align([head] + [[cell(c, r.get(c)) for c in columns] for r in rows])


def align(lines: list[list[str]]) -> str:
    """Columns as wide as their longest cell: the first aligned on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ([cell.rjust(w) if n else cell.ljust(w) for n, (cell, w) in enumerate(zip(line, widths))]
            for line in lines)
    return "\n".join("  ".join(row).rstrip() for row in rows)


def scalar_scores(result: dict) -> dict:
    return {k: v for k, v in result.items() if isinstance(v, float)}


def table_rows(vlm: VLM, tokenizer: Tokenizer, trained: list, count: int, label: dict,
               beams: int = 1, form: str = "QCM-LEA") -> tuple[list[dict], list[data.Item], dict]:
    """Rows of one run: held-out, seen, blind; then the held-out items and the full result on them.

    trained: the data sets of the run; the first is asked about. Its held-out split is called trained-on if
    the run met it. label: {"row": name, "trained": parameters, "examples": of training}; form: of `evaluate`.
    """
    name, sizes = label["row"], {k: v for k, v in label.items() if k != "row"}
    held_out = open_split(trained[0], trained[0].held_out)
    items, seen = take_items(held_out, count), first_items(trained[0], trained[0].seen, count)
    result, blind, own = (evaluate(vlm, tokenizer, asked, zeroed, beams, form=form)
                          for asked, zeroed in ((items, False), (items, True), (seen, False)))
    rows = [{"row": f"{name}, {name_split(held_out, trained)}", **sizes, **scalar_scores(result)},
            {"row": f"{name}, seen", **sizes, **scalar_scores(own)},
            {"row": f"{name}, blind", **scalar_scores(blind)}]
    return rows, items, result


def row_label(name: str, c: dict) -> dict:
    """c: the run's config.json."""
    return {"row": name, "trained": c.get("trained_parameters"), "examples": c.get("training_examples")}


def baseline_rows(vlm: VLM, tokenizer: Tokenizer, world, items: list[data.Item]) -> list[dict]:
    """Chance, and the oracle where the decoder was taught to read the world's pictures in words."""
    rows = [{"row": "chance (commonest answer)", **chance_scores(world, items)}]
    if world.says_scenes:
        rows.append({"row": "oracle (scene in words)", **oracle_scores(vlm.decoder, tokenizer, items)})
    return rows


def report_run(vlm: VLM, tokenizer, trained: list, out: Path, count: int, samples: int, form: str) -> None:
    """Print samples with verdicts, and the table; results.json and samples.html in `out` keep both."""
    world, label = trained[0], row_label(vlm.bridge.name, read_json(out / "config.json"))
    rows, items, result = table_rows(vlm, tokenizer, trained, count, label, form=form)
    split = rows[0]["row"].split(", ")[-1]              # held-out, or trained-on
    rows += baseline_rows(vlm, tokenizer, world, items)
    captions, answers = result.get("captions", [None] * len(items)), iter(result["answers"])
    judged = [JudgedItem(item, text, [judge_answer(q, a) for q, a in zip(item.qas, answers)])
              for item, text in zip(items, captions)]
    print_samples(judged[:samples], split)
    text = f"{len(items)} {split} pictures; accuracy in %, CIDEr, BLEU-4 x 100\n{format_table(rows)}\n"
    write_json(out / "results.json", {"world": world.name, "items": len(items), "rows": rows})
    title = f"{out.resolve().name}: {vlm.bridge.name} on {world.name}:{world.held_out}"
    write_samples_page(out / "samples.html", title, judged[:max(samples, 24)], text, split)
    print(f"\n{text}")


def judge_answer(q: data.QA, answer: str) -> tuple[str, str]:
    """("right", "is it red? yes"), ("WRONG", "is it red? no (it is yes)"), ("partly 0.6", …)."""
    score = answer_accuracy(q, answer)
    verdict = "right" if score == 1 else f"partly {score:.1f}" if score else "WRONG"
    return verdict, f"{q.question} {answer}" + ("" if score == 1 else f" (it is {q.answer})")


# ---- 5. The command line ---------------------------------------------------------------------------------

# The modules of support/lab stand above this file; it loads the one that is asked for, or else the table.
SUBCOMMANDS = {name: f"support.lab.{name}" for name in
               ("compare", "ask", "chat", "look", "targets", "claims", "draw", "demo")}


def main(argv: list[str] | None = None) -> None:
    argv = [*map(str, sys.argv[1:] if argv is None else argv)]
    if argv and argv[0] in SUBCOMMANDS:
        return importlib.import_module(SUBCOMMANDS[argv[0]]).main(argv[1:])
    importlib.import_module("support.lab.table").main(argv)


if __name__ == "__main__":
    run_cli(main)
