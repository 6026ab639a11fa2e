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
import base64
import collections
import contextlib
import csv
import fnmatch
import functools
import html
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from model import (VLM, Bridge, Decoder, TiledViT, Tiles, UserError, ViT, atomically, fetch, is_hub_name, load_decoder, load_vlm, nearest,
                   packed, print_licence, read_json, tower_folder, write_json)

# ------------------------------------------------------------------------------------------------------------------
# 1. Metrics, equal to the official code
# ------------------------------------------------------------------------------------------------------------------
# A caption is scored as one string, its tokens joined by single blanks. A caption metric takes n candidates
# and n lists of references and returns the score of the corpus and the list of the images' own scores.
# "Official" is pycocoevalcap 1.2, GT-Vision-Lab/VQA at a013f00, lupantech/ScienceQA at 2cbf831, haotian-liu/LLaVA at
# c121f04, MME's evaluation tool at dd29509, salesforce/LAVIS at 506965b and open_flamingo at 655f693;
# tests/test_metrics.py and tests/test_scores.py hold their numbers.

LETTER = r"(?:[^\W\d_²³¹¼-¾⅐-⅟]|[\u0300-\u036f])"                   # combining accents belong to the word
ALNUM = rf"(?:\d|{LETTER})"
WORD = rf"{LETTER}{ALNUM}*(?:[.!?]{LETTER}{ALNUM}*)*"                # also photo.jpg and a!b
PART = rf"(?:[dol]['’]{LETTER})?{ALNUM}+"
THING = rf"{PART}(?:[-_‐‑]{PART})*"                                  # two-story, 5x5, o'clock
CLITIC, NOT = r"['’](?:[msd]|re|ve|ll)", r"n['’`]t"
SLASHED = r"[a-z0-9]+(?:-[a-z]+){0,2}"
ABBREVIATIONS = "|".join(r"""(?:ph|ed)\.d adj adm adv al alex apr assn assoc asst atty aug ave bhd bldg blvd
    brig bros capt cf cie co cos col corp cpl ct dec dept det dr drs elec esq etc feb fri ft gen gov govs hon
    inc insp intl jan jos jr jul jun lieut lt ltd maj mar messrs mfg mlle mme mon mr mrs ms mt natl nov oct
    ph plc pres prof profs pty pvt rd rep reps rev rt sen sens sep sept seq sgt sq sr st ste supt sys thu
    thurs tue tues treas univ vs wed wm""".split())
STATES = "|".join("""Ala Ariz Ark Az Calif Colo Conn Dak Del Fla Ga Ill Ind Kan Kans Ky La Mass Md Mich Minn
    Miss Mo Mont Neb Nev Okla Ore Pa Penn Tenn Tex Va Vt Wash Wis Wisc Wyo""".split())

PTB_RULES = [re.compile(f"(?i:({token})(?:{ahead}))") for token, ahead in (  # token, what must follow
    ("can", "not"), ("gon|wan", "na"), ("got", "ta"), ("lem|gim", "me"), ("'t", "is|was"),  # can not, 't is
    (WORD, ""), (THING, ""), (WORD, CLITIC), (THING, CLITIC), ("[a-z]*[a-mo-z]", NOT),      # dog 's, do n't
    (f"{CLITIC}|{NOT}", "(?![a-z])"),
    (rf"(?:{ABBREVIATIONS}|(?-i:{STATES})|[a-z](?:\.[a-z])*)\.", ""),                       # mr. etc. p.m.
    (r"(?:art|ca|est|figs?|nos?|op|pp|prop|tel)\.", r"\s?\d"),                              # no. 5 (no way)
    (r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)", ""), (r"\d{1,4}[- \u00a0]\d{1,4}/\d{1,4}", ""),      # 1,000 3:30 3 1/2
    (rf"{SLASHED}(?:\\?/{SLASHED}){{1,2}}", ""),                                            # and/or, 9/11/01
    (r"[a-z0-9][a-z0-9.,]*(?:-(?:[a-z0-9]+|[a-z](?:\.[a-z])*\.))+", ""),                    # u.s.-based
    (r"(?-i:[A-Z]+(?:[+&][A-Z]+)+|[A-Z]*\$)|c\+\+|[cf]\#", ""),                             # at&t, us$, c++
    (r"['’](?:n['’]|n(?![a-z])|em|cause|till?|[2-9]0s)", ""), (r"['’]\d\d", r"\s|\Z"),      # 'n', '80s, '98
    ("(?:[ldj]|ol|dunkin|somethin)['’]", ""), ("y['’]", LETTER),                            # ol', y' all
    (r"[cs]['’]mo\w+|nor['’]easter|li['’]l|nat['’]l|ev['’]ry|e['’]er|cont['’]d\.", ""),     # c'mon, s'mores
    (rf"(?-i:[A-HJ-XZn]['’]{LETTER}{{2,}}|{LETTER}+[aeiouyAEIOUY]['’][aeiouA-Z]{LETTER}*)", ""),  # ma'am
    (r"</?[a-z][\w:.-]*(?:\s[^>]*)?/?>|&\#\d+;|-[lr][rsc]b-", ""),                          # <b>
    (r"(?:https?://|www\.)[^\s<>\"|(){}]+[^\s<>\"|.!?(){},-]", ""),
    (r"[a-z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+|@[a-z_]\w*|\#[^\W\d_]+", ""),
    (r"(?-i:[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])", "(?![a-z])"), ("[-^x=~<>']_[-^x=~<>']", ""),   # :-) ^_^
    (r"[?!]+|\*+|\#+|@+|_+|<<|>>|-+|\.{3,5}|''|``|\S", ""),                                 # whatever is left
)]
PTB_DROPPED = re.compile("[-–—‒―.…,:;?!\"'`“”‘’‛«»‹›「」]|-{2,4}|\\.{3,5}|''|``")
PTB_REWRITTEN = {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "€": "$", "¢": "cents",
                 "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
INVISIBLE = re.compile("[\0-\x1f\u200b-\u200f\u2060\ue000-\uf8ff\ufe00-\ufe0f\ufeff\U00010000-\U0010ffff]")
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " ", "\u00ad": ""}


def ptb_tokenize(text: str) -> list[str]:
    """Penn Treebank tokens, lower case, no punctuation: what COCO's code gets from CoreNLP 3.4.1 (Java).

        "A man (in red) doesn't use No. 5!"  →  a man -lrb- in red -rrb- does n't use no. 5

    A lexer like the original: at each position the rule that reaches furthest wins (what it looks ahead at
    counts; of equals the first). Brackets survive as words, because the official list of dropped punctuation
    is upper case and the tokens no longer are; so do "!!" and "?!", because the list has single marks. Emoji
    vanish; 3 1/2 is one token with a no-break space inside. Left out: telephone numbers with blanks,
    "plan b. The" (b loses its period, even if The begins the next caption), a curly apostrophe in mid-word.
    """
    for entity, character in ENTITIES.items():
        text = text.replace(entity, character)
    text, tokens, at = INVISIBLE.sub(" ", text), [], 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        match = max((m for rule in PTB_RULES if (m := rule.match(text, at))), key=lambda m: m.end())
        at, token = match.end(1), match[1].lower()
        if re.fullmatch(f"{CLITIC}|{NOT}", token):
            token = token.replace("’", "'")                             # elsewhere (o’clock) it stays curly
        if not PTB_DROPPED.fullmatch(token):
            token = PTB_REWRITTEN.get(token, token)
            tokens.append(token.replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\u00a0"))
    return tokens


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


def java_scorer(name: str, candidates: list[str], references: list[list[str]]) -> tuple[float, list]:
    """The scores of pycocoevalcap's scorer of this name (corpus, images), which runs the official Java program."""
    try:
        scorer = getattr(importlib.import_module(f"pycocoevalcap.{name}.{name}"), name.capitalize())
    except ImportError:
        raise UserError(f"{name.upper()} needs Java and the package pycocoevalcap (pip install pycocoevalcap); BLEU, "
                        f"ROUGE-L and CIDEr need neither.") from None
    if shutil.which("java") is None:
        raise UserError(f'{name.upper()} is a Java program, and no "java" is on the PATH; install a Java runtime.')
    try:
        return scorer().compute_score(dict(enumerate(references)), {i: [c] for i, c in enumerate(candidates)})
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        raise UserError(f"{name.upper()}: pycocoevalcap failed to run its Java program ({e}); METEOR takes 2 GB of "
                        f"memory, SPICE 8 GB and, the first time, a download of CoreNLP 3.6.0.") from None


def meteor(candidates: list[str], references: list[list[str]]) -> tuple[float, list]:
    """METEOR 1.5 (Denkowski & Lavie, W14-3348): words matched exactly, by stem, synonym or paraphrase, and their order.

    (M1)  P, R = matches (exact 1, stem 0.6, synonym 0.8, paraphrase 0.6) / words of the candidate, of the reference;
          a content word counts 0.75, a function word 0.25
    (M2)  F = P · R / (0.85 · P + 0.15 · R)
    (M3)  METEOR = F · (1 − 0.6 · (chunks / matched words)^0.2),  of the best reference

    The corpus sums matches and chunks before (M1): not the mean of the images. WordNet and the paraphrases (62 MB)
    live in the official program, so we call it instead of writing another.
    """
    return java_scorer("meteor", candidates, references)


def spice(candidates: list[str], references: list[list[str]]) -> tuple[float, list]:
    """SPICE (Anderson et al., 1607.08822): F1 of scene graphs, which CoreNLP parses; mean over images."""
    total, images = java_scorer("spice", candidates, references)
    return float(total), [float(image["All"]["f"]) for image in images]


def scienceqa_choice(text: str, choices: int, direct: bool = True, guess: random.Random | None = None) -> int:
    """Index of the choice that an answer names; −1 (never right) if it names none, several, or one past the last.

        "B"   "B. because …"   "Because … The answer is B."  →  1           "(B)"  "B."  "b"  " B"  →  −1

    direct=True is LLaVA's reading. ScienceQA's own code knows the sentence only (direct=False) and, where that
    fails, guesses: pass a random.Random, whose draws are those of the official code's generator.
    """
    letter = direct and (re.fullmatch("[A-E]", text) or re.match(r"[A-E](?=\. )", text))
    stated = re.findall(r"The answer is ([A-Z]).", text)            # sic: any character may follow, but one must
    named = letter[0] if letter else stated[0] if len(stated) == 1 else ""
    index = ord(named) - ord("A") if named else choices
    return index if index < choices else guess.randrange(choices) if guess else -1


def scienceqa(problems: dict[str, dict], picked: dict[str, int]) -> dict[str, float]:
    """ScienceQA accuracy, 0 … 1, per column of the papers' tables (Lu et al., 2209.09513): subject, context, grade.

    problems: records of problems.json of the evaluated split (test: 4,241); picked: problem id → index of the choice.
    No prediction is a wrong one. TXT (has a hint) and IMG (has a picture) overlap, NO has neither; a column without
    problems is left out. LLaVA's "IMG-Accuracy" skips missing predictions: it is IMG of the problems that have one.
    """
    right: dict[str, list[bool]] = {}
    for pid, p in problems.items():
        columns = [p["subject"][:3].upper(), "G1-6" if int(p["grade"].removeprefix("grade")) <= 6 else "G7-12", "Avg"]
        columns += [name for name, there in (("TXT", p["hint"]), ("IMG", p["image"])) if there] or ["NO"]
        for column in columns:
            right.setdefault(column, []).append(picked.get(pid, -1) == p["answer"])
    return {c: mean(right[c]) for c in "NAT SOC LAN TXT IMG NO G1-6 G7-12 Avg".split() if c in right}


MME = data.MME                      # {"perception" | "cognition": its tasks}


def yes_no(response: str) -> str:
    """MME's reading of a response: its first four characters decide (know → no, eyes → yes, "I say no" → other)."""
    start = response.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_tasks(rows: list[tuple]) -> dict[str, list[tuple]]:
    """Rows (task, image, question, Yes | No, response) by task; the two questions about a picture follow each other."""
    tasks: dict[str, list[tuple]] = {}
    for task, *line in rows:
        tasks.setdefault(task, []).append(tuple(line))
    for task, lines in tasks.items():
        if task not in (known := MME["perception"] + MME["cognition"]):
            raise UserError(f'"{task}" is no task of MME; {nearest(task, known)}')
        for n in range(0, len(lines), 2):
            images = [image for image, *_ in lines[n:n + 2]]
            if len(images) < 2 or images[0] != images[1]:
                raise UserError(f"MME task {task}, rows {n + 1} and {n + 2}: pictures {' and '.join(images)}, but each "
                                f"pair of rows must ask about one picture; keep the data set's order.")
    return tasks


def mme(rows: list[tuple]) -> dict:
    """MME (Fu et al., 2306.13394): {task: {"acc", "acc+", "score"}, "perception": 0 … 2000, "cognition": 0 … 800}.

    rows: (task, image, question, Yes | No, response), two rows per picture.

    (E1)  acc  = questions answered right / questions           anything but yes or no is wrong
    (E2)  acc+ = pictures with both answers right / pictures    chance is 1/4
    (E3)  score of a task = 100 acc + 100 acc+;  perception, cognition: sums over their 10 and 4 tasks

    A sum is left out while one of its tasks is missing.
    """
    result = {}
    for task, lines in mme_tasks(rows).items():
        right = [yes_no(response) == truth.lower() for _, _, truth, response in lines]
        acc, both = mean(right), mean([a and b for a, b in zip(right[::2], right[1::2])])       # (E1), (E2)
        result[task] = {"acc": acc, "acc+": both, "score": 100 * acc + 100 * both}              # (E3)
    sums = {group: sum(result[t]["score"] for t in tasks) for group, tasks in MME.items() if set(tasks) <= set(result)}
    return result | sums


def recall(i2t, image_of, t2i=None, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
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


OUTER = r"\A\s+|\s+\Z"
ENDS = {                    # paper: before what its answer ends, what is deleted then
    "mapl": (r"\.", OUTER),                                # the token "." stops; the published code leaves it in
    "flamingo": (r"<EOC>|<\|endofchunk\|>", OUTER),
    "openflamingo-vqa": ("Question|Answer|Short|, ", ""),  # blanks stay: the metric strips them
    "openflamingo-caption": ("Output", '"'),
    "llava": ("</s>|###", OUTER),                          # separators of its conversation formats v1 and v0
    "blip2": ("\n", OUTER),                                # OPT's stop token in LAVIS
}


def tidy(paper: str, text: str) -> str:
    """The answer or caption within what a model wrote, by the rule of one paper (the table above).

        openflamingo-vqa:  "two, three Question: what"  →  "two"

    Left out, because it takes spaCy or WordNet: for OK-VQA, BLIP-2 lemmatises the answer and OpenFlamingo stems it, so
    their OK-VQA scores do not compare with (V1) of these answers.
    """
    if paper not in ENDS:
        raise UserError(f'no rule to tidy answers is called "{paper}"; {nearest(paper, ENDS)}')
    end, dropped = ENDS[paper]
    return re.sub(dropped, "", re.split(end, text, maxsplit=1)[0])


RECORDS = {"vqav2": ("question_id", "answer"), "okvqa": ("question_id", "answer"), "vizwiz": ("image", "answer"),
           "coco": ("image_id", "caption")}


def save_predictions(kind: str, rows: list[tuple], path: str | Path) -> None:
    """Predictions in the form that the benchmark's own evaluation reads; written atomically.

    kind           a row                                       the file
    vqav2, okvqa   (question id, answer)                       [{"question_id": 9000, "answer": "yes"}, …]
    vizwiz         (image name, answer)                        [{"image": "VizWiz_val_1.jpg", "answer": "yes"}, …]
    coco           (image id, caption)                         [{"image_id": 9, "caption": "a box"}, …]
    scienceqa      (problem id, index of the choice, text)     {"results": {"4": 0}, "outputs": {"4": "A. because"}}
    mme            (task, image, question, Yes | No, response) a folder: TASK.txt, a line per question, tabs between

    The VQA evaluation wants every question of the split. A tab or line break inside a field of MME's becomes a blank,
    one for one, so that no reading of yes or no changes.
    """
    if kind == "mme":
        for task, lines in mme_tasks(rows).items():
            with atomically(Path(path) / f"{task}.txt") as tmp:
                text = ["\t".join(re.sub(r"[\t\r\n]", " ", field) for field in line) + "\n" for line in lines]
                tmp.write_text("".join(text), encoding="utf-8")
        return
    if kind not in (known := [*RECORDS, "scienceqa", "mme"]):
        raise UserError(f'no benchmark is called "{kind}"; {nearest(kind, known)}')
    twice = [i for i, n in collections.Counter(str(row[0]) for row in rows).items() if n > 1]
    if twice:
        raise UserError(f'{path}: more than one {kind} prediction for "{twice[0]}"; give one per question or picture.')
    if kind == "scienceqa":
        write_json(path, {"results": {i: choice for i, choice, _ in rows}, "outputs": {i: text for i, _, text in rows}})
    else:
        name, what = RECORDS[kind]
        write_json(path, [{name: int(i) if str(i).isdecimal() else i, what: text} for i, text in rows])


# ------------------------------------------------------------------------------------------------------------------
# 2. Answers
# ------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def write(generate, documents: list[data.Document], tokenizer: data.Tokenizer, max_new_tokens: int = 48, beams: int = 1,
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
def see(vlm: VLM, items: list[data.Item], blind: bool, batch: int = 128) -> Tensor:
    """Features (n, N, Di) of the items' pictures; blind: of as many zeroed ones."""
    device, size = next(vlm.vit.parameters()).device, vlm.vit.config.image_size
    parts = []
    for i in range(0, len(items), batch):
        pixels = data.to_pixels([item.image for item in items[i:i + batch]], size, vlm.processor).to(device)
        parts.append(vlm.features(torch.zeros_like(pixels) if blind else pixels))
    return torch.cat(parts)


def evaluate(vlm: VLM, tokenizer: data.Tokenizer, items: list[data.Item], blind: bool = False, beams: int = 1, captions: bool = True) -> dict:
    """{kind: accuracy, "mean": their mean, "cider", "bleu4", "captions": the texts, "answers": the texts} on these items."""
    features = see(vlm, items, blind)
    asked = [(n, q) for n, item in enumerate(items) for q in item.qas]
    prompts = [data.Document(tokenizer).image().add(data.QUESTION.format(q.question)) for _, q in asked]
    rows = torch.tensor([n for n, _ in asked], dtype=torch.long, device=features.device)
    answers = write(vlm.generate, prompts, tokenizer, 12, beams, features[rows])
    result = by_kind([q for _, q in asked], answers)
    result["answers"] = answers
    if captions and all(item.captions for item in items):
        prompts = [data.Document(tokenizer).image().add(data.CAPTION) for _ in items]
        result["captions"] = write(vlm.generate, prompts, tokenizer, 64, beams, features)
        result |= caption_scores(result["captions"], [item.captions for item in items])
    return result


def accuracy(q: data.QA, answer: str) -> float:
    """VQA accuracy, 0 … 1. With ten equal answers it is exact match."""
    return vqa_accuracy(answer, q.answers or [q.answer] * 10)


def by_kind(questions: list[data.QA], answers: list[str]) -> dict:
    """VQA accuracy per kind of question and the mean over kinds."""
    hits: dict[str, list[float]] = {}
    for q, a in zip(questions, answers):
        hits.setdefault(q.kind, []).append(accuracy(q, a))
    result = {k: float(np.mean(v)) for k, v in sorted(hits.items())}
    return {**result, "mean": float(np.mean(list(result.values())))} if result else {}


def caption_scores(captions: list[str], references: list[list[str]]) -> dict:
    """CIDEr-D and BLEU-4 as COCO's code computes them."""
    candidates = [" ".join(ptb_tokenize(c)) for c in captions]
    references = [[" ".join(ptb_tokenize(r)) for r in rs] for rs in references]
    return {"cider": cider(candidates, references)[0], "bleu4": bleu(candidates, references)[0][3]}


def oracle(decoder: Decoder, tokenizer: data.Tokenizer, items: list[data.Item]) -> dict:
    """The decoder given each picture in words: the ceiling of every bridge that only feeds it."""
    asked = [(item, q) for item in items for q in item.qas]
    prompts = [data.Document(tokenizer).add(item.about).add(data.QUESTION.format(q.question)) for item, q in asked]
    return by_kind([q for _, q in asked], write(decoder.generate, prompts, tokenizer, 12))


def chance(world, items: list[data.Item]) -> dict:
    """The commonest answer of each kind in training, whatever is asked."""
    train = data.open_data(f"{world.name}:{world.seen if isinstance(world, data.Files) else 'train'}", seed=world.seed)
    seen: dict[str, collections.Counter] = {}
    for i in range(min(500, len(train)) if isinstance(train, data.Files) else 500):
        for q in train.item(i).qas:
            seen.setdefault(q.kind, collections.Counter())[q.answer] += 1
    asked = [q for item in items for q in item.qas]
    return by_kind(asked, [seen[q.kind].most_common(1)[0][0] if q.kind in seen else "" for q in asked])


def reading(decoder: Decoder, tokenizer: data.Tokenizer, count: int = 400, styles=("at", "in", "terse")) -> dict:
    """How well a decoder reads scenes in words: exact answers per kind of question, and per number of objects.

    The style "place" ("top left: a small red circle; …") is measured apart: at the distance where "at" has a thing's place, it has
    the next thing's, and a decoder of this size mixes them up when there are three or four.
    """
    world, hits = data.Shapes("all", seed=1), {}
    for style in styles:
        documents, facts = [], []
        for i in range(count):
            rng = world.rng(10_000_000 + i)
            things = world.scene(rng)
            for q in world.questions(things, rng):
                documents.append(data.Document(tokenizer).add(data.describe(things, style)).add(data.QUESTION.format(q.question)))
                facts.append((q, len(things)))
        for (q, n), a in zip(facts, write(decoder.generate, documents, tokenizer, 6)):
            for key in (q.kind, f"{n} objects"):
                hits.setdefault(key, []).append(a == q.answer)
    return {k: float(np.mean(v)) for k, v in sorted(hits.items())}


def probe(vit: ViT, layer: int = -2, train: int = 3000, test: int = 1500) -> dict:
    """Linear probe of ONE token: logistic regression from the token of an object's cell to its colour, shape, size and place.

    Trained on seen colour-shape pairs, tested on held-out ones; accuracies. Needs one patch per cell.
    """
    def tokens(split: str, count: int):
        world = data.Shapes(split, seed=2)
        scenes = [(world.scene(rng), rng) for rng in map(world.rng, range(count))]
        with torch.no_grad():
            x = torch.cat([vit.features(data.to_pixels([data.draw(t, r) for t, r in scenes[i:i + 250]], world.size), layer)
                           for i in range(0, count, 250)])                      # (count, 9, Di)
        things = [(n, t) for n, (ts, _) in enumerate(scenes) for t in ts if split == "val" or t.pair in data.HELD_OUT]
        return torch.stack([x[n, t.cell] for n, t in things]), [t for _, t in things]
    (x, seen), (y, held) = tokens("val", train), tokens("test", test)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, y = (x - mean) / std, (y - mean) / std
    result = {}
    for attribute, names in (("color", list(data.COLORS)), ("shape", list(data.SHAPES)), ("size", list(data.SIZES)),
                             ("place", list(data.PLACES))):
        target, truth = (torch.tensor([names.index(getattr(t, attribute)) for t in ts]) for ts in (seen, held))
        head = torch.nn.Linear(x.shape[1], len(names))
        torch.nn.init.zeros_(head.weight)
        solver = torch.optim.LBFGS(head.parameters(), max_iter=100)

        def closure():
            solver.zero_grad()
            loss = F.cross_entropy(head(x), target) + 1e-4 * head.weight.square().sum()
            loss.backward()
            return loss
        solver.step(closure)
        result[attribute] = (head(y).argmax(1) == truth).float().mean().item()
    return result


# --- protocols: how a paper asks, with and without examples -------------------------------------------------------

@dataclass(frozen=True)
class Protocol:
    """How a paper words what stands after a picture, and how its examples end."""
    question: str                           # {}: the question
    caption: str = ""
    first: str = ""                         # said once, before the first question
    answer: str = " {}"                     # of an example
    stop: bool = True                       # an example ends with <|endofchunk|>, or the stop token of a tokenizer that has none
    between: str = ""                       # … and then with this
    bare: int = 0                           # zero-shot shows so many examples, their pictures left out
    rules: tuple[str, str] = ("", "")       # of `tidy`: for answers, for captions
    chat: bool = False                      # a conversation, as the model's own template writes it


PROTOCOLS = {
    "ours": Protocol(data.QUESTION, data.CAPTION),                              # what train.py teaches
    "mapl": Protocol("Question: {} Answer:", "", "Please answer the question. ", " {}.", stop=False, rules=("mapl", "mapl")),
    "flamingo": Protocol("Question: {} Answer:", "Output:", bare=2, rules=("flamingo", "flamingo")),
    "openflamingo": Protocol("Question:{} Short answer:", "Output:", answer="{}", between="\n", bare=2,
                             rules=("openflamingo-vqa", "openflamingo-caption")),
    "blip2": Protocol("Question: {} Short answer:", "a photo of", rules=("blip2", "blip2")),
    "llava": Protocol("{}\nAnswer the question using a single word or phrase.", "Describe the image concisely.", answer="{}",
                      rules=("llava", "llava"), chat=True),
    "scienceqa": Protocol("\n{}", data.CAPTION),                                # {}: the problem as scienceqa_text words it
    "mme": Protocol(data.QUESTION.format("{} Please answer yes or no."), data.CAPTION),
}


def prompt(tokenizer: data.Tokenizer, protocol: str, item: data.Item, question: data.QA | None = None, support: list[data.Item] = (),
           form: str = "QCM-LEA") -> data.Document:
    """What is asked about an item (for a caption, without a question) after examples that bring their own first question and answer.

        mapl, one example:   <image>Please answer the question. Question: is it red? Answer: yes.<image>Question: is it blue? Answer:

    A picture stands before its text. MAPL's wording with examples is not published: the instruction once is our reading of the one
    prompt that is. form: of scienceqa_text.
    """
    p, d, said = PROTOCOLS[protocol], data.Document(tokenizer), []
    for n, (seen, q) in enumerate([*((other, question and other.qas[0]) for other in support), (item, question)]):
        text, told = p.caption, next(iter(seen.captions), "")
        if q is not None:
            if protocol == "scienceqa" and not (q.record and q.record.choices):
                raise UserError('the protocol "scienceqa" asks multiple choice, and these questions have no choices; take another.')
            text, told = data.scienceqa_text(q.record, form) if protocol == "scienceqa" else (q.question, q.answer)
            text = p.first * (n == 0) + p.question.format(text.removesuffix(" Please answer yes or no.") if protocol == "mme" else text)
        said.append((seen.image is not None, text, p.answer.format(told)))
    if p.chat:
        turns = [turn for pictured, text, told in said for turn in (("user", "<image>\n" * pictured + text), ("assistant", told))]
        return d.chat([{"role": role, "content": text} for role, text in turns[:-1]])
    for n, (pictured, text, told) in enumerate(said):
        (d.image() if pictured else d).add(text)
        if n < len(support):
            d.add(told).ids([tokenizer.special.get("<|endofchunk|>", tokenizer.eos)] * p.stop).add(p.between)
    return d


def dice(seed: int, item: data.Item) -> np.random.Generator:
    """Random numbers that belong to an item, whatever else is asked and in which order."""
    return np.random.default_rng((seed, zlib.crc32(item.id.encode())))


def shots(train, item: data.Item, k: int, seed: int = 0, pool: int = 2048) -> list[data.Item]:
    """k examples for an item, each with one of its questions, among the first 2,048 items of the training split (as OpenFlamingo draws them);
    never the item itself or its picture. The first four of eight are the four."""
    rng, found, pool = dice(seed, item), [], min(pool, len(train)) if isinstance(train, data.Files) else pool
    for other in (train.item(int(i)) for i in rng.permutation(pool)) if k else ():
        same = other.image is not None and item.image is not None and np.array_equal(other.image, item.image)
        if other.id != item.id and not same:
            asked = [q for q in other.qas if q.answer]
            found.append(replace(other, qas=[asked[rng.integers(len(asked))]] if asked else []))
        if len(found) == k:
            break
    if len(found) < k:
        raise UserError(f"the training split of {train.name} has {len(found)} other items, too few for {k} examples.")
    return found


def multiple_choice(items: list[data.Item], seed: int = 0) -> Iterator[tuple[int, data.QA]]:
    """ScienceQA's form of a question of each item: the answer among up to three others to questions of its kind, in random order."""
    known = collections.defaultdict(set)
    for item in items:
        for q in item.qas:
            known[q.kind].add(q.answer)
    for n, item in enumerate(items):
        rng = dice(seed, item)
        for q in item.qas[n % len(item.qas):][:1] if item.qas else ():
            if others := rng.permutation(sorted(known[q.kind] - {q.answer}))[:3].tolist():
                options = rng.permutation([q.answer, *others]).tolist()
                yield n, replace(q, record=data.Record(item.id, question=q.question, choices=options, answer=options.index(q.answer)))


def yes_no_pairs(items: list[data.Item], seed: int = 0) -> Iterator[tuple[int, data.QA]]:
    """MME's form of a question of each picture of `shapes`, whose kind is the task: one whose answer is Yes, then one whose answer is No.

    The bundled decoder was taught no sentence for counts and places but "how many …" and "where is …"; it meets these two here first.
    """
    named = sorted({q.question[:-1].split(maxsplit=3)[3] for item in items for q in item.qas if q.kind == "existence"})
    for n, item in enumerate(items):
        rng, there = dice(seed, item), re.findall(r"(?:small|large) ((\w+) (\w+)) at the (\w+ \w+)", item.about)
        pairs = [pair for pair, *_ in there]
        pick = lambda options: options[int(rng.integers(len(options)))]
        q = item.qas[n % len(item.qas)]
        words, yes, form = q.question[:-1].split(), q.answer, "is there {}?"
        if q.kind == "existence":                       # about the pairs that the other pictures are asked about
            yes = " ".join(words[3:]) if yes == "yes" else pick([p for p in pairs if p in named] or pairs)
            no = " ".join(words[3:]) if q.answer == "no" else pick([p for p in named if p not in pairs])
        elif q.kind == "color":
            shape = next(s for _, c, s, place in there if c == yes and (s == words[-1] or q.question.endswith(f"at the {place}?")))
            yes, no = f"{yes} {shape}", pick([p for c in data.COLORS if (p := f"{c} {shape}") not in pairs])
        else:
            no = pick([a for a in (data.NUMBERS if q.kind == "count" else data.PLACES) if a != yes])
            form = f"is the number of {' '.join(words[2:-2])} {{}}?" if q.kind == "count" else f"is {' '.join(words[2:])} at the {{}}?"
        for a, truth in ((yes, "Yes"), (no, "No")):
            yield n, data.QA(q.kind, form.format(data.an(a) if q.kind in ("existence", "color") else a), truth)


@torch.no_grad()
def likelihoods(vlm: VLM, documents: list[data.Document], features: Tensor, pictures: list[list[int]], batch: int = 128) -> list[float]:
    """log p of what each document learns, given what stands before it; pictures: the rows of `features` in each."""
    found = []
    for at in range(0, len(documents), batch):
        tokens, labels, mask = (x.to(features.device) for x in data.collate(documents[at:at + batch]))
        inputs, labels = vlm.prepare(tokens, features[sum(pictures[at:at + batch], [])], None if mask.all() else mask, labels)
        keep = labels[:, 1:] != data.IGNORE
        logits = vlm.decoder.head(vlm.decoder.states(**inputs)[-1][:, :-1][keep])
        loss = F.cross_entropy(logits.float(), labels[:, 1:][keep], reduction="none")
        found += loss.new_zeros(len(tokens)).index_add(0, keep.nonzero()[:, 0], -loss).tolist()
    return found


class Exam:
    """A model before a data set: each picture is seen once, each text written once and kept in `file`, a line of JSON each."""

    def __init__(self, vlm: VLM, tokenizer: data.Tokenizer, blind: bool = False, beams: int = 1, file: Path | None = None, about: str = ""):
        self.vlm, self.tokenizer, self.blind, self.beams, self.file, self.about = vlm, tokenizer, blind, beams, file, about
        size = vlm.vit.config.image_size
        self.features = vlm.features(next(vlm.vit.parameters()).new_zeros(0, 3, size, size)).detach()
        self.rows, self.known = {}, {}                                          # picture → row of the features, key → text
        for line in file.read_bytes().split(b"\n") if file and file.exists() else ():
            with contextlib.suppress(ValueError):                               # the line that a crash cut short
                self.known.update([json.loads(line)])

    def look(self, shown: list[list[data.Item]]) -> list[list[int]]:
        """Rows of the features: the pictures of each prompt."""
        names = [[(hash(i.image.tobytes()), i) for i in items if i.image is not None] for items in shown]
        if new := {name: i for row in names for name, i in row if name not in self.rows}:
            self.features = torch.cat((self.features, see(self.vlm, [*new.values()], self.blind)))
            self.rows |= {name: len(self.rows) + n for n, name in enumerate(new)}
        return [[self.rows[name] for name, _ in row] for row in names]

    def texts(self, keys: list[str], documents: list[data.Document], shown: list[list[data.Item]], longest: int, part: int = 512) -> list[str]:
        """What is written after each document, or with longest 0 the log p of what it learns; kept `part` by `part` under its key."""
        keys = [f"{self.about}, {key}" for key in keys]
        todo = sorted((n for n, key in enumerate(keys) if key not in self.known), key=lambda n: len(documents[n].tokens))
        for rows in (todo[i:i + part] for i in range(0, len(todo), part)):
            asked, pictures = [documents[n] for n in rows], self.look([shown[n] for n in rows])
            told = (write(self.vlm.generate, asked, self.tokenizer, longest, self.beams, self.features, pictures=pictures) if longest
                    else map(repr, likelihoods(self.vlm, asked, self.features, pictures)))
            new = dict(zip((keys[n] for n in rows), told))
            self.known |= new
            if self.file:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("ab") as f:
                    f.write(b"".join(b"\n" + json.dumps(pair).encode() for pair in new.items()))
        return [self.known[key] for key in keys]


# ------------------------------------------------------------------------------------------------------------------
# 3. Tables
# ------------------------------------------------------------------------------------------------------------------

def table(rows: list[dict]) -> str:
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


def numbers(result: dict) -> dict:
    return {k: v for k, v in result.items() if isinstance(v, float)}


def items_of(world, split: str, count: int) -> list[data.Item]:
    """The first items of another split of the same world."""
    other = data.open_data(f"{world.name}:{split}", seed=world.seed)
    return [other.item(i) for i in range(min(count, len(other)) if isinstance(other, data.Files) else count)]


def measure(vlm: VLM, tokenizer: data.Tokenizer, world, count: int, facts: dict, name: str,
            beams: int = 1) -> tuple[list[dict], list[data.Item], dict]:
    """Rows of the final table: held-out, seen, blind; then the items and the full result on the held-out ones."""
    facts = {"trained": facts.get("trained_parameters"), "examples": facts.get("training_examples")}
    items = items_of(world, world.held_out, count)
    seen = items_of(world, world.seen, count)
    result = evaluate(vlm, tokenizer, items, beams=beams)
    rows = [{"row": f"{name}, held-out", **facts, **numbers(result)},
            {"row": f"{name}, seen", **facts, **numbers(evaluate(vlm, tokenizer, seen, beams=beams))},
            {"row": f"{name}, blind", **numbers(evaluate(vlm, tokenizer, items, blind=True, beams=beams))}]
    return rows, items, result


def baselines(vlm: VLM, tokenizer: data.Tokenizer, world, items: list[data.Item]) -> list[dict]:
    """chance, and the oracle where the world can say its pictures in words and the decoder was taught to read them."""
    rows = [{"row": "chance (commonest answer)", **chance(world, items)}]
    if world.name == "shapes":
        rows.append({"row": "oracle (scene in words)", **oracle(vlm.decoder, tokenizer, items)})
    return rows


def report(vlm: VLM, tokenizer: data.Tokenizer, world, out: Path, count: int, samples: int) -> None:
    """What a run says at its end: answers, right or wrong, and the table; results.json and samples.html hold them."""
    facts = read_json(out / "config.json")
    rows, items, result = measure(vlm, tokenizer, world, count, facts, vlm.bridge.name)
    rows += baselines(vlm, tokenizer, world, items)
    captions, answers = result.get("captions", [None] * len(items)), iter(result["answers"])
    told = [(item, text, [verdict(q, a) for q, a in zip(item.qas, answers)]) for item, text in zip(items, captions)]
    for item, text, asked in told[:samples]:
        print(f"\nheld-out {item.id}")
        if text is not None:
            print(f"  reference  {item.captions[0]}\n  caption    {text}")
        for word, line in asked:
            print(f"  {word:10s} {line}")
    text = f"{len(items)} held-out pictures; accuracy in %, CIDEr, BLEU-4 x 100\n{table(rows)}\n"
    write_json(out / "results.json", {"world": world.name, "items": len(items), "rows": rows})
    title = f"{out.resolve().name}: {vlm.bridge.name} on {world.name}:{world.held_out}"
    write_samples(out / "samples.html", title, told[:max(samples, 24)], text)
    print(f"\n{text}")


def verdict(q: data.QA, answer: str) -> tuple[str, str]:
    """("right", "is it red? yes"), ("WRONG", "is it red? no (it is yes)"); "partly 0.6" where some annotators agree."""
    right = accuracy(q, answer)
    word = "right" if right == 1 else f"partly {right:.1f}" if right else "WRONG"
    return word, f"{q.question} {answer}" + ("" if right == 1 else f" (it is {q.answer})")


PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>$title</title>
<style>body { margin: 1rem; font: 1rem/1.4 sans-serif; color: #1b1b1b; background: #fff; overflow-wrap: anywhere }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem }
article { border: 1px solid #999; border-radius: .4rem; padding: .8rem; break-inside: avoid } h2 { font-size: 1rem }
img { max-width: 100% } img:not(.zoom1) { image-rendering: pixelated } ul { list-style: none; padding: 0 }
.right b { color: #0b5d1e } .wrong b { color: #b3140c } .partly b { color: #7a4a00 }
pre { font-size: .75rem; overflow-x: auto } @media print { html { font-size: 8pt } }</style></head>
<body><h1>$title</h1><p>$summary</p><pre>$text</pre><main>$cards</main></body></html>
""")


def write_samples(file: Path, title: str, told: list[tuple], text: str) -> None:
    """One page that needs no other file and no script; told: (item, our caption or None, verdicts) per picture."""
    from PIL import Image
    show, cards, words = html.escape, [], [word for *_, asked in told for word, _ in asked]
    for item, caption, asked in told:
        picture, png = Image.fromarray(item.image), io.BytesIO()
        picture.thumbnail((384, 384))
        picture.save(png, "png")
        zoom = max(1, 192 // max(picture.size))         # a small one is enlarged by a whole number and stays sharp
        cards += [f"<article><h2>{show(item.id)}</h2>", f'<img class="zoom{zoom}" width="{zoom * picture.width}" alt=""',
                  f'src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">']
        if caption is not None:
            cards.append(f"<p>reference: {show(item.captions[0])}</p><p>our caption: {show(caption)}</p>")
        lines = [f'<li class="{word.split()[0].lower()}"><b>{word}</b> {show(line)}</li>' for word, line in asked]
        cards += ["<ul>", *lines, "</ul></article>"]
    counted = f"; {words.count('right')} of {len(words)} answers are right" if words else ""
    page = dict(title=show(title), summary=f"{len(told)} held-out pictures{counted}.", text=show(text), cards="\n".join(cards))
    with atomically(file) as tmp:
        tmp.write_text(PAGE.substitute(page), encoding="utf-8")


# --- the full comparison: captions, questions with 0, 4, 8 examples, ScienceQA's and MME's form ---------------------

OFFICIAL = {"vqav2": "vqav2", "okvqa": "okvqa", "vizwizvqa": "vizwiz", "coco": "coco", "karpathy": "coco", "vizwiz": "coco",
            "scienceqa": "scienceqa", "mme": "mme"}     # kind of data → form of `save_predictions`
LONGEST = {"CIDEr": 64, "SQA": 256, "SQA rank": 0, "MME": 6}         # tokens that are written; else 12


def questionnaire(world, items: list[data.Item], ks: tuple[int, ...], seed: int) -> dict[str, list[tuple[int, data.QA | None]]]:
    """What is asked for each measure: (number of the item, question; None for a caption).

    CIDEr       captions; BLEU-4 comes with it
    0-shot …    open questions, with 0, … examples
    SQA         multiple choice in ScienceQA's words, of data that has choices: the choice that is written counts
    SQA rank    of worlds that are generated: the choice that is likeliest to be written, and then the stop token; so a bridge that has
                never met a letter can be asked, too
    MME         two questions a picture; "yes" or "no" is read as its evaluation reads it
    """
    files = isinstance(world, data.Files)
    asked = [(n, q) for n, item in enumerate(items) for q in item.qas]
    chosen = [(n, q) for n, q in asked if q.record is not None and q.record.choices]
    told = [(n, None) for n, item in enumerate(items) if item.image is not None and (item.captions or not item.qas)]
    if files and world.kind == "mme":
        return {"MME": sorted(asked, key=lambda a: a[1].record.id)}
    if files:
        return {"CIDEr": told, **{f"{k}-shot": [a for a in asked if a not in chosen] for k in ks}, "SQA": chosen}
    pairs = [*yes_no_pairs(items, seed)] if isinstance(world, data.Shapes) else []
    return {"CIDEr": told, **{f"{k}-shot": asked for k in ks}, "SQA": chosen, "SQA rank": [*multiple_choice(items, seed)], "MME": pairs}


def examine(exam: Exam, world, items: list[data.Item], support, protocol: str = "ours", ks: tuple[int, ...] = (0, 4, 8),
            form: str = "QCM-LEA", seed: int = 0) -> tuple[dict, dict, list[str]]:
    """Cells {(measure,): number, (part, measure): number}, predictions {measure: rows of `save_predictions`}, and why a measure is missing.

    In %, CIDEr and BLEU-4 x 100, MME in points. Parts: kinds of question, of which VQA of a generated world is the mean; the columns of
    ScienceQA's tables; MME's tasks, of which perception is summed. support: k → `shots` for each item.
    """
    files, cells, predictions, notes = isinstance(world, data.Files), {}, {}, []
    for measure, asked in questionnaire(world, items, ks, seed).items():
        k, ranked = int(measure[:-5]) if measure.endswith("-shot") else 0, measure == "SQA rank"
        words = "scienceqa" if measure == "SQA" else protocol
        bare = PROTOCOLS[words].bare if k == 0 and not ranked else 0
        rows = [(n, q, c) for n, q in asked for c in (q.record.choices if ranked else [""])]
        keys = [", ".join([measure, items[n].id, *([q.question] if q else []), *([c] if c else [])]) for n, q, c in rows]
        try:
            examples = [[replace(i, image=None) if bare else i for i in row] for row in support(k or bare)]
            documents = [prompt(exam.tokenizer, words, items[n], q, examples[n], form) for n, q, _ in rows]
            documents = [d.add(" " + c, learn=True).end() if c else d for d, (*_, c) in zip(documents, rows)]
            said = exam.texts(keys, documents, [[*examples[n], items[n]] for n, *_ in rows], LONGEST.get(measure, 12))
        except UserError as e:                          # a bridge that takes one picture; too few examples on disk
            notes.append(f"{measure} is empty: {e}")
            continue
        if not asked:
            continue
        if (rule := PROTOCOLS[words].rules[measure == "CIDEr"]) and not ranked:
            said = [tidy(rule, text) for text in said]
        questions, ids = [q for _, q in asked], [q.record.id if files and q else items[n].id for n, q in asked]
        predictions[measure] = [*zip(ids, said)]
        if measure == "CIDEr" and all(items[n].captions for n, _ in asked):
            scores = caption_scores(said, [items[n].captions for n, _ in asked])
            cells |= {("CIDEr",): 100 * scores["cider"], ("B@4",): 100 * scores["bleu4"]}
        elif measure == "MME":
            names = [Path(q.record.images[0]).name if files else i for q, i in zip(questions, ids)]
            predictions[measure] = [(q.kind, name, q.question, q.answer, text) for q, name, text in zip(questions, names, said)]
            cells |= mme_cells({task: x["score"] for task, x in mme(predictions[measure]).items() if isinstance(x, dict)})
        elif measure.endswith("-shot") and all(q.answer for q in questions):
            cells |= vqa_cells(measure, by_kind(questions, said), mean([*map(accuracy, questions, said)]) if files else None)
        elif measure.startswith("SQA"):
            logp = iter(said)
            picked = [int(np.argmax([float(next(logp)) for _ in q.record.choices])) if ranked else
                      scienceqa_choice(next(logp), len(q.record.choices)) for q in questions]
            predictions[measure] = [*zip(ids, picked, said)]
            told = {n: {**q.record.more, "image": q.record.images, "answer": q.record.answer} for n, q in enumerate(questions)}
            parts = scienceqa(told, dict(enumerate(picked))) if files else {}
            parts["Avg"] = mean([c == q.record.answer for c, q in zip(picked, questions)])
            cells |= {(measure,) if part == "Avg" else (part, measure): 100 * x for part, x in parts.items()}
    return cells, predictions, notes


def vqa_cells(measure: str, kinds: dict[str, float], whole: float | None) -> dict:
    """Of kinds of question and of all: `whole`, the official mean over questions, or the mean over kinds."""
    whole, kinds = kinds["mean"] if whole is None else whole, {kind: x for kind, x in kinds.items() if kind != "mean"}
    return {(kind, measure): 100 * x for kind, x in kinds.items()} | {(measure,): 100 * whole}


def mme_cells(tasks: dict[str, float]) -> dict:
    return {(task, "MME"): x for task, x in tasks.items()} | {("MME",): sum(tasks.get(task, 0) for task in MME["perception"])}


def chances(world, train, items: list[data.Item], ks: tuple[int, ...], seed: int) -> dict:
    """Cells for who sees nothing: open questions: the commonest answer of their kind in training; choices, yes or no: dice."""
    files, cells = isinstance(world, data.Files), {}
    for measure, asked in questionnaire(world, items, ks, seed).items():
        questions = [q for _, q in asked]
        if measure.endswith("-shot") and asked and all(q.answer for q in questions):
            kinds = chance(train(), items)
            cells |= vqa_cells(measure, kinds, mean([kinds[q.kind] for q in questions]) if files else None)
        elif measure.startswith("SQA") and asked:
            cells[(measure,)] = 100 * mean([1 / len(q.record.choices) for q in questions])
        elif measure == "MME" and asked:
            cells |= mme_cells({q.kind: 75.0 for q in questions})               # acc 1/2, acc+ 1/4
    return cells


def overall(cells: dict, sets: dict[str, list[str]]) -> dict:
    """The documents' Overall: of each measure the plain mean over the data sets of the table, nothing where one is missing; MME has one.

        MAPL, 0-shot:  (33.54 + 13.84 + 8.26 + 11.72) / 4 = 16.84
    """
    found = {m: [cells.get((name, m)) for name in names] for m, names in sets.items()}
    return {(m,): mean(x) for m, x in found.items() if None not in x}


PAPER_ROWS = {          # bridge → row | trained | examples | source | measure: data set and number …; never on the data of our rows
    "linear": ["LLaVA 13B | 13B | 158K | 2304.08485v2, fine-tuned on ScienceQA | SQA: scienceqa 90.92"],
    "mlp": ["LLaVA-1.5 13B | 13B | 1.2M | its model zoo and MME's leaderboard; it is trained on VQAv2, reads OCR in TextVQA, and is asked only "
            "ScienceQA's pictured problems | 0-shot: vqav2 80.0 textvqa 61.3 vizwizvqa 53.6 | SQA: scienceqa 71.6 | MME: mme 643.33"],
    "mapl": ["MAPL | 3.4M | 374K | 2210.07179v2, trained on CC-clean | CIDEr: cc 79.75 coco 54.3 textcaps 22.95 vizwiz 20.95 | "
             "B@4: cc 6.75 coco 12.3 textcaps 5.8 vizwiz 4.95 | 0-shot: vqav2 33.54 okvqa 13.84 textvqa 8.26 vizwizvqa 11.72 | "
             "4-shot: vqav2 45.13 okvqa 24.25 textvqa 8.88 vizwizvqa 18.46 | 8-shot: vqav2 45.21 okvqa 23.93 textvqa 8.77 vizwizvqa 19.52",
             "MAPL-blind | 3.4M | 374K | 2210.07179v2, trained on CC-clean without seeing | CIDEr: cc 5.05 coco 5.75 textcaps 2.15 vizwiz 1.8 | "
             "B@4: cc 0.35 coco 2.75 textcaps 1.35 vizwiz 1.5 | 0-shot: vqav2 20.62 okvqa 4.84 textvqa 3.68 vizwizvqa 3.18 | "
             "4-shot: vqav2 35.01 okvqa 14.68 textvqa 5.43 vizwizvqa 8.65 | 8-shot: vqav2 35.11 okvqa 14.28 textvqa 5.82 vizwizvqa 9.55"],
    "frozen": ["Frozen | 40.3M | 374K | MAPL's authors' run of 2106.13884, on CC-clean | CIDEr: cc 22.6 coco 13.9 textcaps 4.6 vizwiz 2.65 | "
               "B@4: cc 2.45 coco 5.25 textcaps 2.65 vizwiz 2.05 | 0-shot: vqav2 25.98 okvqa 5.51 textvqa 5.11 vizwizvqa 4.33 | "
               "4-shot: vqav2 37.80 okvqa 18.86 textvqa 6.15 vizwizvqa 11.28 | 8-shot: vqav2 38.52 okvqa 19.91 textvqa 6.30 vizwizvqa 16.68"],
    "qformer": ["BLIP-2 | 104M | 129M | 2301.12597v3, fine-tuned on COCO; with FlanT5-XXL on MME's leaderboard | CIDEr: coco 145.3 | "
                "B@4: coco 43.7 | MME: mme 516.66"],
    "zero_init": ["LLaMA-Adapter | 1.2M | | 2303.16199v3, trained on ScienceQA; its V2 on COCO, its V2.1 on MME's leaderboard | CIDEr: coco 122.2 | "
                  "B@4: coco 36.2 | SQA: scienceqa 85.19 | MME: mme 493.33"],
    "flamingo": ["Flamingo-80B | 10.2B | 2.1B | 2204.14198v2 | CIDEr: coco 84.3 | 0-shot: vqav2 56.3 okvqa 50.6 textvqa 35.0 vizwizvqa 31.6 | "
                 "4-shot: vqav2 63.1 okvqa 57.4 textvqa 36.5 vizwizvqa 39.6 | 8-shot: vqav2 65.6 okvqa 57.5 textvqa 37.3 vizwizvqa 44.8"],
}                       # MME: existence, count, position and color, of 800


def paper_rows(bridges: list[str]) -> tuple[list[dict], list[str]]:
    """The published rows of these systems with their Overall, and the sentences that say what they are."""
    rows, notes = [], []
    for name, trained, examples, source, *measures in (map(str.strip, row.split("|")) for b in bridges for row in PAPER_ROWS.get(b, ())):
        words = {m: text.split() for m, text in (measure.split(":") for measure in measures)}
        cells = {(part, m): float(x) for m, line in words.items() for part, x in zip(line[::2], line[1::2])}
        rows.append({"row": f"[{name}]", "trained": trained, "examples": examples,
                     "cells": cells | overall(cells, {m: line[::2] for m, line in words.items()})})
        notes.append(f"[{name}] is published, on other data ({', '.join(dict.fromkeys(part for part, _ in cells))}): {source}")
    return rows, notes


def compare(runs: list[str], specs: list[str] = (), protocol: str = "ours", ks: tuple[int, ...] = (0, 4, 8), count: int = 400, seed: int = 0,
            beams: int = 1, folder: str | None = None, device="cpu") -> tuple[list[dict], list[str]]:
    """Rows {"row", "trained", "examples", "cells"} of each run, the same run blind, and chance, on the data of the runs or on `specs`; footnotes.

    folder: FOLDER/RUN.jsonl keeps every text, and none is written twice. Beside it lie the predictions in each benchmark's official form:
    RUN-DATA-MEASURE.json, and a folder for MME.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f'no protocol is called "{protocol}"; {nearest(protocol, PROTOCOLS)}')
    if twice := [kind for kind, n in collections.Counter(spec.split(":")[0] for spec in specs).items() if n > 1]:
        raise UserError(f"--data names {twice[0]} twice, and a table has a column for each kind; ask about one at a time.")
    rows, notes, opened, base = [], {}, {}, {}

    def open_set(spec: str):
        """The world, its held-out items (or those of the split that the spec names), and examples for them."""
        world = data.open_data(spec, seed)
        items = items_of(world, world.split if spec.endswith(f":{world.split}") else world.held_out, count)
        train = functools.cache(lambda: data.open_data(world.name, seed))
        return world, items, train, functools.cache(lambda k: [shots(train(), i, k, seed) if k else [] for i in items])

    for run, blind in ((run, blind) for run in runs for blind in (False, True)):
        if not blind:
            vlm, tokenizer, facts = open_run(run, device)
            settings, name = facts.get("settings", {}), Path(run).name
            stamp = f"{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"         # another training, other texts
        row, start = {"row": name + ", blind" * blind, "cells": {}}, time.monotonic()
        row |= {} if blind else {"trained": facts.get("trained_parameters"), "examples": facts.get("training_examples")}
        if not specs and "data" not in settings:
            raise UserError(f"{run} was trained elsewhere; name what to ask it about: --data SPEC, such as --data vqav2:PATH:val.")
        for spec in specs or [settings["data"].split(" + ")[0].split(" * ")[0]]:
            world, items, train, support = opened[spec] = opened.get(spec) or open_set(spec)
            kind, about = world.name.split(":")[0], f"{stamp}, {spec}, {protocol}, seed {seed}, beams {beams}" + ", blind" * blind
            exam = Exam(vlm, tokenizer, blind, beams, folder and Path(folder) / f"{name}.jsonl", about)
            cells, told, missing = examine(exam, world, items, support, protocol, ks, settings.get("form", "QCM-LEA"), seed)
            row["cells"] |= {(kind, *key): x for key, x in cells.items()}
            notes |= {f"{name}, {text}": None for text in missing}
            for measure, lines in told.items() if folder and kind in OFFICIAL and not blind else ():
                save_predictions(OFFICIAL[kind], lines, Path(folder) / f"{name}-{kind}-{measure}{'' if kind == 'mme' else '.json'}")
        rows.append(row)
        print(f"{row['row']}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    for world, items, train, _ in opened.values():
        try:
            base |= {(world.name.split(":")[0], *key): x for key, x in chances(world, train, items, ks, seed).items()}
        except UserError as e:
            notes[f"chance is empty: {e}"] = None
    rows.append({"row": "chance", "cells": base})
    sets = collections.defaultdict(dict)
    for kind, measure in (key for row in rows for key in row["cells"] if len(key) == 2):
        sets[measure][kind] = None
    alone = len(opened) == 1 and not isinstance(world, data.Files)
    for row in rows:
        row["cells"] = ({key[1:]: x for key, x in row["cells"].items()} if alone else
                        row["cells"] | overall(row["cells"], {m: [*kinds] for m, kinds in sets.items()}))
    return rows, [*notes]


def lay_out(rows: list[dict], form: str = "text", each: bool = False) -> str:
    """Rows of `compare` as text, Markdown or CSV: trained parameters, training examples, each data set's columns, Overall.

    The data set of one generated world is its kinds of question, and Overall alone is shown; `each` shows kinds of question everywhere.
    """
    keys = dict.fromkeys(key for row in rows for key in row["cells"])
    own = {key for row in rows if not row["row"].startswith("[") for key in row["cells"]}
    wide = any(key[0] in {*data.WORLDS, *data.FORMATS} for key in own)
    order = ("CIDEr", "B@4", *sorted({key[-1] for key in keys if key[-1].endswith("-shot")}, key=lambda m: int(m[:-5])), "SQA", "SQA rank", "MME")
    shown = sorted((key for key in keys if len(key) == 1 or key in own and len(key) <= 1 + wide + each),
                   key=lambda key: (order.index(key[-1]), len(key) == 1, key[:1], len(key) == 2))
    head = ["", "trained", "examples", *("Overall " * ((wide or each) and len(key) == 1) + " ".join(key) for key in shown)]
    digits, comma = (2, "") if form == "csv" else (1, ",")
    cell = lambda x: "" if x is None else f"{x:.{digits}f}" if isinstance(x, float) else f"{x:{comma}}" if isinstance(x, int) else x
    lines = [head] + [[row["row"], *map(cell, (row.get("trained"), row.get("examples"), *map(row["cells"].get, shown)))] for row in rows]
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(lines)
        return out.getvalue().rstrip("\n")
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [[v.rjust(w) if n else v.ljust(w) for n, (v, w) in enumerate(zip(line, widths))] for line in lines]
    if form == "markdown":
        lines.insert(1, [("-" * (w - 1) + ":") if n else "-" * w for n, w in enumerate(widths)])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)


# ------------------------------------------------------------------------------------------------------------------
# 4. Analyses: where the words look, and what the visual tokens say
# ------------------------------------------------------------------------------------------------------------------
# A map of attention shows what was read, not what was made of it; so a measured number goes with the pictures.

@torch.no_grad()
def gaze(vlm: VLM, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Where one text (1, T) about one picture (1, N, Di) looks: words (L, H, T', K) and patches (K, N), float32.

    words[l, h, t]: attention of the t-th of the T' words behind the picture to its K visual tokens, in the l-th layer
    that reads them. Soft tokens share a softmax with the words: a row sums to the picture's share. Prompts and latents
    have one of their own: a row sums to 1, and a gate decides. patches[k]: of which ViT tokens visual token k is made
    (Bridge.made_of). words @ patches (L, H, T', N) leads from the words to the picture.
    """
    at = (tokens == data.IMAGE).nonzero()
    if len(tokens) != 1 or len(at) != 1:
        raise UserError(f"gaze reads one text about one picture, not {len(tokens)} about {len(at)}; call it for each.")
    first = int(at[0, 1])
    behind = tokens.shape[1] - first - 1                                        # T'
    _, attention = vlm(tokens, features=features, return_attention=True)
    patches = vlm.bridge.made_of(attention, features)[0]
    looks = [w for name, w in attention.items() if fnmatch.fnmatch(name, vlm.bridge.looks)]
    words = torch.stack([w[0, :, w.shape[2] - behind:] for w in looks])
    return words if words.shape[-1] == len(patches) else words[..., first:first + len(patches)], patches


@torch.no_grad()
def prefix_words(vlm: VLM, tokenizer: data.Tokenizer, features: Tensor, k: int = 5) -> list[list[tuple[str, float]]]:
    """The k words nearest to each soft token h of one picture (1, N, Di): K lists of (word, cosine), the nearest first.

    (A1)  cos(h, e_v) = h · e_v / (‖h‖ ‖e_v‖)        e_v: row v of the embedding matrix

    Lengths are left out because soft tokens are far longer than words (mlp on shapes: 54 against 1.8 of the world's own words).
    """
    if type(vlm.bridge).prefix is Bridge.prefix:
        raise UserError(f"a {vlm.bridge.name} bridge puts no soft tokens among the words, so none has a nearest word.")
    soft = vlm.bridge.prefix(vlm.bridge.see(features))[0].float()               # (K, D)
    words = vlm.decoder.embed.weight[:vlm.decoder.config.vocab_size].float()
    near = (F.normalize(soft, dim=-1) @ F.normalize(words, dim=-1).T).topk(k)   # (K, k) (A1)
    return [[(tokenizer.decode([v], special=True), c) for v, c in zip(*row)]
            for row in zip(near.indices.tolist(), near.values.tolist())]


def joint_projection(visual: Tensor, words: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Visual tokens (K, D) and words (V, D) in one plane: (K, 2), (V, 2), and the shares of the variance on its axes.

    The first two principal components of all directions h / ‖h‖; an axis points to where its largest coordinate is.
    """
    x = F.normalize(torch.cat((visual, words)).detach().double(), dim=-1)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    plane = u[:, :2] * s[:2]
    plane = plane * plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()
    return *plane.float().tensor_split([len(visual)]), (s[:2].square() / s.square().sum()).tolist()


def gate_history(run: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps (S,) and gates (S, layers, heads) of a run, signed, after tanh; of flamingo (S, blocks, 2)."""
    file = Path(run) / "log.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    logged = [(line["step"], line["gates"]) for line in lines if "gates" in line]
    if not logged:
        raise UserError(f"{file}: holds no gates; give the run of a zero_init, flamingo or idefics bridge.")
    return tuple(np.array(column) for column in zip(*logged))


def overlay(picture: np.ndarray, weights, top: float | None = None, side: int = 144) -> np.ndarray:
    """(side, side, 3) uint8: the square picture (S, S, 3) in grey, redder where its weights (g·g,) are large.

    top: the weight of full red (None: the largest). Of g·g + 1 weights the first is the class token's and has no place.
    """
    from PIL import Image
    grow = lambda x: np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.NEAREST))[..., None]
    g, weights = math.isqrt(len(weights)), np.asarray(weights, np.float32)
    heat = 0.7 * grow((weights[len(weights) - g * g:] / (top or weights.max() or 1)).clip(0, 1).reshape(g, g))
    return ((1 - heat) * grow(picture.mean(-1, dtype=np.float32)) + heat * (255, 40, 0)).round().astype(np.uint8)


def need_cells(vlm: VLM) -> None:
    if (grid := vlm.vit.config.image_size // vlm.vit.config.patch) != 3:
        raise UserError(f"this takes a ViT with 3 x 3 patches, one for a cell of `shapes`, not {grid} x {grid}; use weights/vit.")


def attention_on_target(vlm: VLM, tokenizer: data.Tokenizer, count: int = 200, split: str = "test") -> list[dict]:
    """Does a question look at what it asks about? Rows for `table`: attention in each layer that reads the picture.

    Mean over heads and over questions about colour and position that were answered right, on `shapes` of 2 to 4 things:

        question: asked, another, picture   to the cell of the thing asked about, of another thing, to all nine cells;
                                            from the last word of the question (ring in "what color is the ring?")
        answer: asked, another, picture     the same from the last word of the prompt, behind which the answer comes
        all words: picture                  about 1 where the picture has a softmax of its own

    By chance a cell has a ninth of the picture's. Needs one patch per cell.
    """
    need_cells(vlm)
    world, ends = data.Shapes(split), len(tokenizer.encode("? Answer:"))
    named = lambda q, t: 2 * (t.place in q) + (t.color in q) + (t.shape in q)
    asked = [(q, i, max(things, key=lambda t: named(q.question, t)), things) for i in range(count)
             if len(things := world.scene(world.rng(i))) > 1
             for q in world.item(i).qas if q.kind in ("color", "position")]
    features = see(vlm, [world.item(i) for i in range(count)], blind=False)
    documents = [data.Document(tokenizer).image().add(data.QUESTION.format(q.question)) for q, *_ in asked]
    answers, found = write(vlm.generate, documents, tokenizer, 12, features=features[[i for _, i, *_ in asked]]), []
    for (q, i, target, things), document, answer in zip(asked, documents, answers):
        if answer == q.answer:
            words, patches = gaze(vlm, torch.tensor([document.tokens], device=features.device), features[i:i + 1])
            x = (words.mean(1) @ patches)[..., -9:]                             # (L, T', 9)
            others = x[..., [t.cell for t in things if t is not target]]
            x = torch.stack((x[..., target.cell], others.mean(-1), x.sum(-1)))  # (3, L, T')
            found.append(torch.stack((*x[..., -1 - ends], *x[..., -1], x[2].mean(-1))))     # (7, L)
    names = [f"{word}: {cell}" for word in ("question", "answer") for cell in ("asked", "another", "picture")]
    shares = torch.stack(found).mean(0).tolist() if found else []               # 7 lists of L
    return [{"row": row, **{f"layer {l}": x for l, x in enumerate(share)}}
            for row, share in zip((*names, "all words: picture"), shares)]


@torch.no_grad()
def words_on_target(vlm: VLM, tokenizer: data.Tokenizer, count: int = 200, split: str = "test") -> list[dict]:
    """Do soft tokens spell what they stand for? Rows for `table`, over the things in pictures of `shapes`.

    own: how often a thing's colour, shape, … is among the 5 words nearest to the soft token that holds most of its
    cell; another's: how often another thing's in the picture is, where the two differ. Needs one patch per cell.
    """
    need_cells(vlm)
    world, hits = data.Shapes(split), {"own": [], "another's": []}
    says = lambda t: (t.color, t.shape, t.size, *t.place.split())
    start = torch.tensor([data.Document(tokenizer).image().add(data.CAPTION).tokens])
    for i, features in enumerate(see(vlm, [world.item(i) for i in range(count)], blind=False).split(1)):
        near, patches = prefix_words(vlm, tokenizer, features), gaze(vlm, start.to(features.device), features)[1]
        for t, o in itertools.product(world.scene(world.rng(i)), repeat=2):
            words = {word.strip() for word, _ in near[int(patches[:, t.cell - 9].argmax())]}
            hit = [w in words if o is t or w != own else math.nan for w, own in zip(says(o), says(t))]
            hits["own" if o is t else "another's"].append(hit)
    kinds = ("color", "shape", "size", "top/middle/bottom", "left/center/right")
    return [{"row": row, **dict(zip(kinds, np.nanmean(x, 0).tolist()))} for row, x in hits.items() if x]


@torch.no_grad()
def look(vlm: VLM, tokenizer: data.Tokenizer, pixels: Tensor, prompt: str, out: Path) -> str:
    """Where a prompt looks in a picture (1, 3, S, S): words.png, tokens.png in `out`; returns a legend and tables."""
    from PIL import Image, ImageDraw
    document, features = data.Document(tokenizer).image().add(prompt), vlm.features(pixels)
    words, patches = gaze(vlm, torch.tensor([document.tokens], device=pixels.device), features)
    p, prefix = vlm.processor or data.PROCESSORS["clip"], type(vlm.bridge).prefix is not Bridge.prefix
    picture = pixels[0].cpu().movedim(0, -1) * torch.tensor(p.std) + torch.tensor(p.mean)   # as the ViT sees it
    picture = (255 * picture).clip(0, 255).numpy()
    gates = vlm.bridge.gates().abs().mean(-1) if hasattr(vlm.bridge, "gates") else [None] * len(words)
    said = [ascii(tokenizer.decode([t])) for t in document.tokens[-words.shape[2]:]]
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for file, says, heads, maps in (
            ("words.png", "a column per word, a row per layer", said, (words.mean(1) @ patches).cpu()),
            ("tokens.png", "of which patches each visual token is made", range(len(patches)), patches[None].cpu())):
        canvas, top = Image.new("RGB", (150 * maps.shape[1], 150 * len(maps) + 20), "white"), float(maps.max())
        for column, head in enumerate(heads):
            ImageDraw.Draw(canvas).text((150 * column + 4, 4), str(head), "black")
            for row, weights in enumerate(maps[:, column]):
                canvas.paste(Image.fromarray(overlay(picture, weights, top)), (150 * column + 3, 150 * row + 20))
        canvas.save(out / file)
        lines.append(f"{out / file}: {says}; full red = {top:.2f}")
    for l, (w, gate) in enumerate(zip(words, gates)):
        lines.append(f"layer {l:3d}  attention to the picture {100 * float(w.sum(-1).mean()):5.1f} %")
        lines[-1] += "" if gate is None else f"  mean |gate| {gate:.3f}"
    for n, row in enumerate(prefix_words(vlm, tokenizer, features) if prefix else ()):
        lines.append(f"token {n:3d}  nearest words  " + "  ".join(f"{w!r} {c:.2f}" for w, c in row))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------------
# 5. Claims: one miniature experiment per claim of the papers
# ------------------------------------------------------------------------------------------------------------------
# An arm is a run of train.py, shared by all claims that need it: what differs from COMMON, and what is measured of it. "{mlp}" in its
# flags is the run folder of that arm with the same seed, which is trained first. Every arm sees 32 pictures a step on one core.

COMMON = "--steps 300 --batch 32 --threads 1 --log-every 25 --eval-items 1 --samples 1"
REASONS = "--recipe llava-2 --init {llava-1} --captions 0 --turns 2"
ARMS = {
    "linear": ("--bridge linear", "answers"),
    "mlp": ("--bridge mlp", "answers"),
    "transformer": ("--bridge mapl", "answers"),
    "zero-init": ("--bridge zero_init", "answers loss gates"),
    "random-init": ("--bridge zero_init --option gate_init=random", "answers loss gates"),
    "15 epochs": ("--bridge zero_init --examples 256 --steps 120", "answers loss"),
    "30 epochs": ("--bridge zero_init --examples 256 --steps 240", "answers loss"),
    "60 epochs": ("--bridge zero_init --examples 256 --steps 480", "answers loss"),
    "llava-1": ("--recipe llava-1", ""),
    "stages 1, 2": ("--recipe llava-2 --init {llava-1}", "answers loss"),
    "llava-1-last": ("--recipe llava-1 --option reads_layer=-1", ""),
    "stages 1, 2, last layer": ("--recipe llava-2 --init {llava-1-last} --option reads_layer=-1", "answers"),
    "stage 2 alone": ("--recipe llava-2 --init none", "answers loss"),
    "reasoning first, early": (f"{REASONS} --data shapes-reasons --steps 100", "reasons"),
    "answer first, early": (f"{REASONS} --data shapes-answers --steps 100", "reasons"),
    "reasoning first": (f"{REASONS} --data shapes-reasons", "reasons"),
    "answer first": (f"{REASONS} --data shapes-answers", "reasons"),
    "MAPL": ("--bridge mapl --captions 1", "answers captions blind shots"),
    "MAPL, 1 %": ("--bridge mapl --captions 1 --examples 96", "answers captions"),
    "Frozen": ("--bridge frozen --vit random --captions 1", "answers captions"),
    "Frozen, 1 %": ("--bridge frozen --vit random --captions 1 --examples 96", "answers captions"),
    "MAPL, pages": ("--bridge mapl --data shapes-pages --batch 16", "shots"),
    "MAPL, alt-texts": ("--bridge mapl --captions 1 --data shapes-web", "answers captions"),
    "prefix 1": ("--bridge mapl --captions 1 --option constants=1", "answers captions"),
    "prefix 4": ("--bridge mapl --captions 1 --option constants=4", "answers captions"),
    "blip2-1": ("--recipe blip2-1", ""),
    "BLIP-2, both stages": ("--recipe blip2-2 --init {blip2-1}", "answers"),
    "16 queries": ("--recipe blip2-2 --init none", "answers"),
    "2 queries": ("--recipe blip2-2 --init none --option queries=2", "answers"),
    "4 queries": ("--recipe blip2-2 --init none --option queries=4", "answers"),
    "sees the last image": ("--bridge flamingo --data shapes-pages --batch 16", "answers pages"),
    "sees all images": ("--bridge flamingo --data shapes-pages --batch 16 --option see_all=true", "answers pages"),
}


@dataclass(frozen=True)
class Claim:
    says: str                       # what the document claims, in one sentence
    source: str                     # where, with the paper's numbers
    expect: tuple[tuple[str, ...], ...]     # (arm[: number], ">" or "≥", arm[: number], the paper's numbers for the two)
    columns: str                    # the numbers to show; the first is the one compared where an expectation names none
    note: str = ""                  # written after looking: what was tried where the effect did not appear


BY_KIND = "mean color count existence position"
CLAIMS = {
    "zero-init": Claim(
        "Attention whose gates start at zero ends far better than with random gates.", "document 0, LLaMA-Adapter on ScienceQA",
        (("zero-init", ">", "random-init", "83.85, 40.77"),
         ("random-init: first loss", ">", "zero-init: first loss", "early training is disturbed"),
         ("random-init: loss", ">", "zero-init: loss", "its curve is higher")), f"{BY_KIND} first_loss loss",
        "Random gates, N(0, 1), are our reading of an ablation that the paper does not define. Looked at: the logs. They disturb the first "
        "batch, as the paper says, but recover within 25 steps and then learn faster: an open gate gives its prompts a gradient at once, a "
        "shut one takes about 150 steps to reach half of theirs. Four layers are not deep enough for the disturbance to last."),
    "gates": Claim(
        "The gates grow through training, and more in upper layers.", "document 0, LLaMA-Adapter on Alpaca, a figure without numbers",
        (("zero-init: gate at the end", ">", "zero-init: gate halfway", ""), ("zero-init: upper layers", ">", "zero-init: lower layers", "")),
        "gate_halfway gate_at_the_end lower_layers upper_layers"),
    "epochs": Claim(
        "More epochs on the same pictures hardly overfit: the training loss falls, the accuracy stays.",
        "document 0, LLaMA-Adapter on ScienceQA",
        (("15 epochs: loss", ">", "60 epochs: loss", "0.022, 0.001"), ("60 epochs", "≥", "15 epochs", "83.94, 82.08"),
         ("60 epochs", "≥", "30 epochs", "83.94, 83.85")), f"{BY_KIND} loss"),
    "layer": Claim(
        "Features before the last layer of the ViT serve better than the last.", "document 2, LLaVA on ScienceQA",
        (("stages 1, 2", ">", "stages 1, 2, last layer", "90.92, 89.96"),), BY_KIND),
    "alignment": Claim(
        "Without pre-training for alignment, the fine-tuned system is worse.", "document 2, LLaVA on ScienceQA",
        (("stages 1, 2", ">", "stage 2 alone", "90.92, 85.81"),), f"{BY_KIND} loss"),
    "reasoning": Claim(
        "Reasoning before the answer converges sooner, but ends no higher.", "document 2, LLaVA on ScienceQA",
        (("reasoning first, early", ">", "answer first, early", "89.77 after 6 epochs against 12"),
         ("answer first", "≥", "reasoning first", "89.77, 89.77")), BY_KIND,
        "Reasoning is the caption of the scene. Looked at: what is written. The decoder was taught to answer about a scene at once, so the "
        "answer needs no help; a thing that the caption leaves out or gets wrong spoils it, and some captions never end. Tried before: "
        "ScienceQA's letters (shapes-choices; options in random and in fixed order), where both orders chose by chance after 300 steps."),
    "data": Claim(
        "MAPL beats Frozen and its own blind self, and needs little data.", "document 1, trained on CC-clean, four caption sets together",
        (("MAPL", ">", "Frozen", "CIDEr 44.49, 10.94"), ("MAPL", ">", "MAPL: blind cider", "CIDEr 44.49, 3.69"),
         ("MAPL, 1 %", ">", "Frozen, 1 %", "CIDEr 11.94, 3.71"), ("MAPL", ">", "MAPL, 1 %", "CIDEr 44.49, 11.94"),
         ("MAPL: mean", ">", "Frozen: mean", "0-shot VQA 16.84, 10.23")), f"cider {BY_KIND} blind_cider blind_mean"),
    "domain": Claim(
        "Training on the domain's own captions beats training on alt-texts from the web.", "document 1, MAPL with COCO against CC-clean",
        (("MAPL", ">", "MAPL, alt-texts", "CIDEr on COCO 125.2, 54.3"),
         ("MAPL: mean", ">", "MAPL, alt-texts: mean", "0-shot VQAv2 43.51, 33.54")), f"cider {BY_KIND}"),
    "shots": Claim(
        "Examples in the prompt help: four much, four more little.", "document 1, MAPL, four VQA sets together",
        (("MAPL: 4 shots", ">", "MAPL: 0 shots", "24.18, 16.84"), ("MAPL: 8 shots", "≥", "MAPL: 4 shots", "24.36, 24.18"),
         ("MAPL, pages: 4 shots", ">", "MAPL, pages: 0 shots", "")), "0_shots 1_shots 4_shots 8_shots",
        "The decoder has read one scene per document and never an example; we think that it takes a second picture for more of the first. "
        "Tried: one example, which already ruins the answer, and training on pages of two to four pictures (MAPL, pages)."),
    "stage-1": Claim(
        "Without its first stage, the Q-Former answers much worse.", "document 1, BLIP-2 Figure 5, curves without numbers",
        (("BLIP-2, both stages", ">", "16 queries", ""),), BY_KIND,
        "Looked at: retrieval after stage 1 (seed 0), where one picture in eight finds its caption among 100: 300 steps of 32 pictures align "
        "too little to be a start. Both arms saw the same second stage; the paper's first stage has three times the steps of its second."),
    "queries": Claim(
        "A fixed number of queries, whatever the resolution, may lose information.", "document 0, BLIP-2, a question without numbers",
        (("16 queries", ">", "2 queries", ""), *((f"16 queries: {what}", ">", f"2 queries: {what}", "") for what in
                                                 ("color", "count", "position", "1 thing", "4 things")), ("4 queries", ">", "2 queries", "")),
        f"{BY_KIND} 1_thing 4_things"),
    "mapping": Claim(
        "Other maps than LLaVA's linear one may serve better; with a frozen decoder it must be a transformer.",
        "document 0, a plan without numbers; document 4, ClipCap",
        (("mlp", ">", "linear", ""), ("transformer", ">", "linear", ""), ("transformer", ">", "mlp", "")), BY_KIND,
        "At 300 steps of 32 pictures the mlp is in the middle of its fall, so seeds differ much; at the recipes' own steps (README) it leads."),
    "prefix": Claim(
        "A longer prefix is better.", "document 4, ClipCap, without numbers",
        (("prefix 4", ">", "prefix 1", ""), ("MAPL", ">", "prefix 4", ""), ("MAPL: mean", ">", "prefix 1: mean", "")), f"cider {BY_KIND}",
        "MAPL has 16 tokens. A scene has at most four things, and four tokens hold them."),
    "last-image": Claim(
        "Words that attend to the last image alone do better than words that attend to all images before them.",
        "document 4, Flamingo-3B's ablation", (("sees the last image", ">", "sees all images", "68.4, 60.8"),),
        "3_pictures_before 0_pictures_before",
        "Both are near the commonest answer (32 %): 300 steps of 16 pages teach little of the pictures, so the size of the difference says "
        "little; its direction is the paper's."),
}


def look_answers(vlm: VLM, tokenizer: data.Tokenizer, items: list[data.Item], run: Path) -> dict:
    """VQA accuracy on held-out pictures by kind, their mean, and that of the pictures with one thing and with four."""
    result = evaluate(vlm, tokenizer, items, captions=False)
    answers, by_things = iter(result["answers"]), collections.defaultdict(list)
    for item in items:
        by_things[item.about.count(";") + 1] += [accuracy(q, next(answers)) for q in item.qas]
    return {**numbers(result), "1 thing": mean(by_things[1] or [0.0]), "4 things": mean(by_things[4] or [0.0])}


def look_loss(vlm, tokenizer, items, run) -> dict:
    """The training loss of the first batch, and its running mean at the end, in nats per learned token."""
    from train import read_log
    log = [line for line in read_log(run / "log.jsonl") if "ema" in line]
    return {"first loss": log[0]["loss"], "loss": log[-1]["ema"]}


def look_gates(vlm, tokenizer, items, run) -> dict:
    """Mean |gate| over heads: of all layers halfway and at the end, and at the end of the lower and upper half of the adapted layers."""
    gates = np.abs(gate_history(run)[1]).mean(-1)                                               # (logged steps, layers)
    lower, upper = np.array_split(gates[-1], 2)
    halves = {"lower layers": lower, "upper layers": upper, "gate halfway": gates[len(gates) // 2], "gate at the end": gates[-1]}
    return {name: float(g.mean()) for name, g in halves.items()}


def look_reasons(vlm, tokenizer, items, run) -> dict:
    """VQA accuracy of the answer within what is written, whose reasoning stands before or after it (data.ShapesReasons)."""
    before = read_json(run / "config.json")["settings"]["data"] == "shapes-reasons"
    asked = [(n, q) for n, item in enumerate(items) for q in item.qas]
    prompts = [data.Document(tokenizer).image().add(data.QUESTION.format(q.question)) for _, q in asked]
    texts = write(vlm.generate, prompts, tokenizer, 72, features=see(vlm, items, False), pictures=[[n] for n, _ in asked])
    return by_kind([q for _, q in asked], [text.split(": ")[-before] for text in texts])


def fewshot(vlm: VLM, tokenizer: data.Tokenizer, items: list[data.Item], k: int) -> float:
    """Mean VQA accuracy where k other pictures of training, each with a question and its answer, stand before the picture asked about."""
    train = data.Shapes()
    asked = [(item, q, support) for item in items for support in [shots(train, item, k)] for q in item.qas]
    documents = [prompt(tokenizer, "ours", item, q, support) for item, q, support in asked]
    shown = [[*support, item] for item, _, support in asked]
    return by_kind([q for _, q, _ in asked], Exam(vlm, tokenizer).texts([str(n) for n in range(len(asked))], documents, shown, 12))["mean"]


LOOKS = {               # what can be measured of an arm, given (vlm, tokenizer, held-out items, run folder): {name: number}
    "answers": look_answers, "loss": look_loss, "gates": look_gates, "reasons": look_reasons,
    "captions": lambda vlm, tokenizer, items, run: {"cider": evaluate(vlm, tokenizer, [replace(i, qas=[]) for i in items])["cider"]},
    "blind": lambda *a: {f"blind {k}": v for k, v in evaluate(*a[:3], blind=True).items() if k in ("mean", "cider")},
    "shots": lambda vlm, tokenizer, items, run: {f"{k} shots": fewshot(vlm, tokenizer, items[:len(items) // 4], k) for k in (0, 1, 4, 8)},
    "pages": lambda vlm, tokenizer, items, run: {f"{k} pictures before": fewshot(vlm, tokenizer, items, k) for k in (0, 3)},
}


def run_arm(arm: str, seed: int, out: Path, flags: list[str], looks: list[str], count: int = 200) -> dict:
    """Train an arm unless its finished run lies in its folder, look at it, and keep there what was seen: {look: {its name: number}}."""
    import train
    run = Path(arm_folder(out, arm, seed))
    done = read_json(run / "seen.json") if (run / "seen.json").exists() else {}
    if done.get("flags") != flags:
        run.mkdir(parents=True, exist_ok=True)
        with open(run / "output.txt", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            train.main(flags)
        done = {"flags": flags, "seconds": (config := read_json(run / "config.json"))["seconds"], "steps": config["steps"]}
        write_json(run / "seen.json", done)
    if missing := [name for name in looks if name not in done]:
        torch.set_num_threads(1)
        vlm, tokenizer, _ = open_run(str(run), "cpu")
        items = items_of(data.open_data("shapes"), "test", count)               # the same pictures for every seed
        for name in missing:
            done[name] = LOOKS[name](vlm, tokenizer, items, run)
        write_json(run / "seen.json", done)
    return done


def arm_folder(out: Path, arm: str, seed: int) -> str:
    return str(Path(out) / f"{re.sub('[^a-z0-9]+', '-', arm.lower()).strip('-')}-s{seed}")


def arm_flags(arm: str, seed: int, out: Path, arms=None, common: str = COMMON) -> list[str]:
    """The command line of an arm's run."""
    own = [arm_folder(out, word[1:-1], seed) if word[0] == "{" else word for word in (arms or ARMS)[arm][0].split()]
    return [*common.split(), *own, "--seed", str(seed), "--out", arm_folder(out, arm, seed)]


def judge(left: list[float], right: list[float], relation: str = ">") -> str:
    """The verdict on "left > right", numbers of several seeds each: "shown", "opposite" or "not shown" (of one: "one seed").

    With d = difference of the means and e = its standard error √(s²_left / n_left + s²_right / n_right):
    "shown" where d > 2 e, "opposite" where d < −2 e, else "not shown". "≥" (no worse) is "shown" unless it is "opposite".
    Three seeds make 2 e a weak test (about one false alarm in ten): read the size of d beside it.
    """
    if min(len(left), len(right)) < 2:
        return "one seed"
    d, e = mean(left) - mean(right), math.sqrt(np.var(left, ddof=1) / len(left) + np.var(right, ddof=1) / len(right))
    return "opposite" if d < -2 * e else "shown" if d > 2 * e or relation == "≥" else "not shown"


def arms_of(claim: Claim) -> list[str]:
    return list(dict.fromkeys(side.split(": ")[0] for left, _, right, _ in claim.expect for side in (left, right)))


def claim_report(name: str, claim: Claim, seen: dict[tuple[str, int], dict], seeds: int) -> tuple[str, list[str]]:
    """The claim, its table (mean ± standard deviation over seeds) and its verdicts as text; the verdicts."""
    def values(arm: str, number: str) -> list[float]:
        found = [x[number] for s in range(seeds) for x in seen[arm, s].values() if isinstance(x, dict) and number in x]
        return found if re.search("loss|cider|gate|layers", number) else [100 * v for v in found]

    columns, verdicts, shown = [c.replace("_", " ") for c in claim.columns.split()], [], set(arms_of(claim))
    rows = [["", *columns]]
    for arm in (arm for arm, seed in seen if arm in shown and seed == 0):
        rows.append([arm, *(f"{mean(v):.3g} ± {np.std(v, ddof=seeds > 1):.2g}" if v else "" for v in (values(arm, c) for c in columns))])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["    " + "  ".join(v.ljust(w) if v is row[0] else v.rjust(w) for v, w in zip(row, widths)).rstrip() for row in rows]
    for left, relation, right, paper in claim.expect:
        sides = [values(*(side if ": " in side else f"{side}: {columns[0]}").split(": ")) for side in (left, right)]
        verdicts.append(judge(*sides, relation))
        paper = f"   (document: {paper})" if paper else ""
        lines.append(f"    {verdicts[-1]:9s}  {left} {relation} {right}: {mean(sides[0]):.4g} against {mean(sides[1]):.4g}{paper}")
    note = textwrap.fill(claim.note, 118, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([f"{name}: {claim.says} ({claim.source})", *lines, *filter(None, [note])]), verdicts


def run_claims(names: list[str], seeds: int = 3, jobs: int = 2, out: str | Path = "out/claims", file: str | Path = "weights/claims.txt",
               claims=None, arms=None, common: str = COMMON, count: int = 200) -> str:
    """Train and look at every arm of these claims with seeds 0 … seeds−1, `jobs` runs at a time, and write the report.

    Finished runs in `out` are kept, so that the command goes on where it was stopped. claims and arms: tables, default CLAIMS and ARMS.
    """
    claims, arms = claims or CLAIMS, arms or ARMS
    needed = {arm for name in names for arm in arms_of(claims[name])}
    before = {arm: re.findall("{(.*?)}", arms[arm][0]) for arm in arms}         # what must be trained first
    needed |= {b for arm in needed for b in before[arm]}
    seen: dict[tuple[str, int], dict] = {}
    for seed, later in itertools.product(range(seeds), (False, True)):
        ready = [arm for arm in arms if arm in needed and bool(before[arm]) == later]
        work = [(arm, seed, Path(out), arm_flags(arm, seed, out, arms, common), arms[arm][1].split(), count) for arm in ready]
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) if jobs > 1 else contextlib.nullcontext() as pool:
            for arm, done in zip(ready, (pool.map if pool else map)(run_arm, *zip(*work)) if work else ()):
                seen[arm, seed] = done
                print(f"seed {seed}: {arm}: {done['steps']} steps, {done['seconds'] / 60:.1f} minutes", flush=True)
    reports = {name: claim_report(name, claims[name], seen, seeds) for name in names}
    minutes = sum(done["seconds"] for done in seen.values()) / 60
    head = (f"python eval.py --claim {'all' if len(names) == len(claims) else ' '.join(names)}: seeds 0 to {seeds - 1}, {len(seen)} runs, "
            f"{minutes:.0f} minutes of training on one core each; every run: {common}\n"
            f"Mean ± standard deviation over seeds: accuracy in %, CIDEr, loss in nats per learned token; {count} held-out pictures.\n"
            "The documents' numbers are of other data and models: compare the direction. The verdicts are computed (eval.judge).")
    summary = [f"    {name:12s}{', '.join(verdicts)}" for name, (_, verdicts) in reports.items()]
    text = "\n".join([head, "", *summary, "", *(f"{text}\n" for text, _ in reports.values())])
    with atomically(Path(file)) as tmp:
        tmp.write_text(text, encoding="utf-8")
    return text


# ------------------------------------------------------------------------------------------------------------------
# 6. The command line
# ------------------------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
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
    parser.add_argument("--claim", nargs="+", metavar="NAME", help="train and judge miniatures of the papers' claims, and write weights/claims.txt: "
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
        tokenizer, decoder = data.load_tokenizer(folder), load_decoder(folder, device, dtype)
        ids = data.Document(tokenizer).chat(args.prompt).tokens
        if data.IMAGE in ids:
            raise UserError('--lm asks a decoder alone, which sees no picture; leave "<image>" out of --prompt.')
        stop = () if tokenizer.eos is None else (tokenizer.eos,)
        out = decoder.generate(torch.tensor([ids], device=device), max_new_tokens=args.max_new_tokens, beams=args.beams, stop=stop)
        print(tokenizer.decode(out[0]).strip())
        return
    if not args.runs:
        raise UserError("give at least one run folder, for example: python eval.py out/mapl-shapes (python train.py writes it).")
    if args.image:
        vlm, tokenizer, _ = open_run(args.runs[0], device)
        pixels = data.to_pixels([data.read_image(args.image)], vlm.vit.config.image_size, vlm.processor).to(device)
        prompt = data.QUESTION.format(args.prompt) if args.prompt else data.CAPTION
        document = data.Document(tokenizer).image().add(prompt)
        print(write(vlm.generate, [document], tokenizer, args.max_new_tokens, args.beams, vlm.features(pixels))[0])
        if args.look:
            print(look(vlm, tokenizer, pixels, prompt, Path(args.look)))
        return
    if args.look:
        raise UserError("--look needs --image FILE: the picture to look at.")
    if args.table:
        full_table(args, device)
        return
    if args.analyse:
        for run in args.runs:
            vlm, tokenizer, _ = open_run(run, device)
            rows = attention_on_target(vlm, tokenizer, args.items)
            print(f"{Path(run).name}: attention in %, by chance a cell has a ninth of the picture's\n"
                  f"{table(rows) if rows else 'no question was answered right'}\n")
            if type(vlm.bridge).prefix is not Bridge.prefix:
                rows = words_on_target(vlm, tokenizer, args.items)
                print(f"its words among the 5 nearest to the soft token of a thing, in %\n{table(rows)}\n")
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
        world = data.open_data(facts["settings"]["data"], seed=facts["settings"]["seed"])
        rows, items, _ = measure(vlm, tokenizer, world, args.items, facts, Path(run).name, args.beams)
        worlds.setdefault(world.name, []).extend(rows)
        last[world.name] = baselines(vlm, tokenizer, world, items)
    for name, rows in worlds.items():
        rows += last[name]
        print(f"{name}: {args.items} pictures a row; accuracy in %, CIDEr, BLEU-4 x 100\n{table(rows)}\n")


def full_table(args, device: str) -> None:
    """`--table`: prints the full comparison, its footnotes and its minutes; CSV alone goes to standard output, the rest to standard error."""
    start, text = time.monotonic(), args.shots.split(",")
    if not all(k.isdecimal() for k in text):
        raise UserError(f'--shots "{args.shots}" is no list of numbers; write for example 0,4,8.')
    rows, notes = compare(args.runs, args.data, args.protocol, tuple(map(int, text)), args.items, args.seed, args.beams, args.predictions, device)
    if args.paper:
        bridges = dict.fromkeys(read_json((fetch(run) if is_hub_name(run) else Path(run)) / "config.json").get("bridge") for run in args.runs)
        rows, notes = [both + more for both, more in zip((rows, notes), paper_rows([*bridges]))]
    text = lay_out(rows, args.format, args.each)
    notes = [f"{args.items} pictures a row, seed {args.seed}, prompts \"{args.protocol}\"; trained parameters, training examples; %, CIDEr and "
             "BLEU-4 x 100, MME in points (200 a task)", "Overall: the plain mean over data sets; of a generated world the mean over its kinds of question, and MME's sum of tasks", *notes,
             f"{(time.monotonic() - start) / 60:.1f} minutes on {device}, {torch.get_num_threads()} threads"]
    print(text)
    print("\n" + "\n".join(notes), file=sys.stderr if args.format == "csv" else sys.stdout)
    if args.out:
        with atomically(Path(args.out)) as tmp:
            tmp.write_text(text + "\n" if args.format == "csv" else "\n".join([text, "", *notes]) + "\n", encoding="utf-8")


ASKED = {               # model_type → how a question about a picture is written; elsewhere "<image>" opens a conversation
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
    kind, tokenizer, processor = facts["model_type"], data.load_tokenizer(folder), data.load_processor(folder)
    vit, like = model.vit, next(model.vit.parameters())
    put = lambda pixels: pixels.to(like.device, like.dtype)
    picture = [data.read_image(image)]
    if isinstance(vit, TiledViT):
        pixels, aspect, there = data.tile_pixels(picture, vit.config.image_size, processor=processor)
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
            document.chat(ASKED[kind].format(prompt))
            if facts.get("mm_use_im_start_end") and {"<im_start>", "<im_end>"} <= tokenizer.special.keys():     # LLaVA v1
                at = document.tokens.index(data.IMAGE)
                document.tokens[at:at + 1] = [tokenizer.special["<im_start>"], data.IMAGE, tokenizer.special["<im_end>"]]
        else:
            for part in re.split(r"(<[a-z_]+>|\{\})", ASKED[kind]):             # what the user writes stays plain text
                special = part == "<image>" or part in tokenizer.special
                document.add(prompt, False) if part == "{}" else document.add(part, False, special)
        if kind == "instructblip":                      # the Q-Former reads the question, too, in BERT's words
            document.tokens = [data.IMAGE, *(t for t in document.tokens if t != data.IMAGE)]
            words = data.load_tokenizer(folder / "qformer_tokenizer")
            text = {"bridge_tokens": torch.tensor([[words.bos, *words.encode(prompt), words.eos]], device=like.device)}
        stop = () if tokenizer.eos is None else (tokenizer.eos,)
        ids = model.generate(torch.tensor([document.tokens], device=like.device), pixels, longest, beams=beams, stop=stop, **text)[0]
    return tokenizer.decode(ids).strip()


def open_run(run: str, device) -> tuple[VLM, data.Tokenizer, dict]:
    folder = fetch(run) if is_hub_name(run) else Path(run)
    vlm = load_vlm(folder, device)
    facts, vlm.processor = read_json(folder / "config.json"), data.load_processor(folder)
    towers = {facts[k]: tower_folder(folder, facts[k]) for k in ("decoder", "vit") if k in facts} or {run: folder}
    for name, where in towers.items():                  # a published model is its own
        print_licence(name, where, sys.stderr)
    return vlm, data.load_tokenizer(towers.get(facts.get("decoder"), folder)), facts


if __name__ == "__main__":
    from train import run
    run(main)
