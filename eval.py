"""eval.py: what a trained bridge is worth: metrics, answers, the blind baseline, tables.

    python eval.py out/RUN [out/RUN …]                          the comparison table over run folders
    python eval.py out/RUN --image FILE --prompt "what is on the left?"     an answer about one picture; without --prompt a caption
    python eval.py --lm FOLDER --prompt "…"                     the decoder alone, no picture
Chapters 1 metrics (equal to the official code) · 2 answers · 3 tables · 4 the command line
"""
from __future__ import annotations

import argparse
import collections
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from model import VLM, Decoder, UserError, ViT, load_decoder, load_vlm, read_json, tower_folder, write_json

# ------------------------------------------------------------------------------------------------------------------
# 1. Metrics, equal to the official code
# ------------------------------------------------------------------------------------------------------------------
# A caption is scored as one string, its tokens joined by single blanks. A caption metric takes n candidates
# and n lists of references and returns the score of the corpus and the list of the images' own scores.
# "Official" is pycocoevalcap 1.2 and GT-Vision-Lab/VQA at a013f00; tests/test_metrics.py holds their numbers.

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


# ------------------------------------------------------------------------------------------------------------------
# 2. Answers
# ------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def write(generate, documents: list[data.Document], tokenizer: data.Tokenizer, max_new_tokens: int = 48, beams: int = 1,
          features: Tensor | None = None, batch: int = 128) -> list[str]:
    """What the model writes after each document, greedily or by beam search, without the stop token.

    generate: VLM.generate or Decoder.generate; features (n, N, Di): the picture of each document. Documents run in batches of
    similar length, padded on the left; a test holds a batch equal to its rows one by one.
    """
    answers, order = [""] * len(documents), sorted(range(len(documents)), key=lambda i: len(documents[i].tokens))
    for start in range(0, len(order), batch):
        rows = order[start:start + batch]
        tokens, _, mask = data.collate([documents[i] for i in rows], left=True)
        device = features.device if features is not None else generate.__self__.embed.weight.device
        extra = {} if features is None else {"features": features[rows]}
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
        pixels = data.to_pixels([item.image for item in items[i:i + batch]], size).to(device)
        parts.append(vlm.features(torch.zeros_like(pixels) if blind else pixels))
    return torch.cat(parts)


def evaluate(vlm: VLM, tokenizer: data.Tokenizer, items: list[data.Item], blind: bool = False, beams: int = 1, captions: bool = True) -> dict:
    """{kind: accuracy, "mean": their mean, "cider", "bleu4", "captions": the texts, "answers": the texts} on these items."""
    features = see(vlm, items, blind)
    asked = [(n, q) for n, item in enumerate(items) for q in item.qas]
    prompts = [data.Document(tokenizer).image().add(data.QUESTION.format(q.question)) for _, q in asked]
    rows = torch.tensor([n for n, _ in asked], device=features.device)
    answers = write(vlm.generate, prompts, tokenizer, 12, beams, features[rows])
    result = by_kind([q for _, q in asked], answers)
    result["answers"] = answers
    if captions:
        prompts = [data.Document(tokenizer).image().add(data.CAPTION) for _ in items]
        result["captions"] = write(vlm.generate, prompts, tokenizer, 64, beams, features)
        result |= caption_scores(result["captions"], [item.captions for item in items])
    return result


def by_kind(questions: list[data.QA], answers: list[str]) -> dict:
    """VQA accuracy per kind of question and the mean over kinds. With ten equal answers it is exact match."""
    hits: dict[str, list[float]] = {}
    for q, a in zip(questions, answers):
        hits.setdefault(q.kind, []).append(vqa_accuracy(a, q.answers or [q.answer] * 10))
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
    train = data.open_data(f"{world.name}:train", seed=world.seed)
    seen: dict[str, collections.Counter] = {}
    for i in range(500):
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
    return [other.item(i) for i in range(count)]


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
    """What a run prints at its end: samples beside their references, right or wrong, and the table; results.json beside them."""
    facts = read_json(out / "config.json")
    rows, items, result = measure(vlm, tokenizer, world, count, facts, vlm.bridge.name)
    rows += baselines(vlm, tokenizer, world, items)
    at = 0
    for n, item in enumerate(items[:samples]):
        print(f"\nheld-out {item.id}\n  reference  {item.captions[0]}\n  caption    {result['captions'][n]}")
        for q in item.qas:
            answer = result["answers"][at]
            at += 1
            right = answer == q.answer
            print(f"  {'right' if right else 'WRONG'}      {q.question} {answer}" + ("" if right else f" (it is {q.answer})"))
    write_json(out / "results.json", {"world": world.name, "items": count, "rows": rows})
    print(f"\n{count} held-out pictures; accuracy in %, CIDEr, BLEU-4 x 100\n{table(rows)}\n")


# ------------------------------------------------------------------------------------------------------------------
# 4. The command line
# ------------------------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     exit_on_error=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", help="run folders of train.py")
    parser.add_argument("--saved", action="store_true",
                        help="the rows that each run measured at its end (results.json) instead of measuring again")
    parser.add_argument("--items", type=int, default=400, help="pictures per row (default 400)")
    parser.add_argument("--beams", type=int, default=1, help="beam width; 1 = greedy (default)")
    parser.add_argument("--image", help="a picture file to ask about")
    parser.add_argument("--prompt", help="the question; without it the picture is captioned")
    parser.add_argument("--lm", help="a decoder folder: answer --prompt without any picture")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer in tokens (default 64)")
    parser.add_argument("--device", default="auto", help="cpu | cuda | auto")
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"{e}; see python eval.py --help.") from None
    if unknown:
        raise UserError(f'unknown argument "{unknown[0]}"; see python eval.py --help.')
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if args.items < 1 or args.beams < 1:
        raise UserError("--items and --beams must be at least 1.")

    if args.lm:
        if not args.prompt:
            raise UserError('--lm needs --prompt "…": what to ask the decoder.')
        tokenizer, decoder = data.load_tokenizer(args.lm), load_decoder(args.lm, device)
        chat = "<|im_start|>" in tokenizer.special
        ids = tokenizer.encode(data.chatml(args.prompt), special=True) if chat else data.Document(tokenizer).add(args.prompt).tokens
        stop = () if tokenizer.eos is None else (tokenizer.eos,)
        out = decoder.generate(torch.tensor([ids], device=device), max_new_tokens=args.max_new_tokens, beams=args.beams, stop=stop)
        print(tokenizer.decode(out[0]).strip())
        return
    if not args.runs:
        raise UserError("give at least one run folder, for example: python eval.py out/mapl-shapes (python train.py writes it).")
    if args.image:
        vlm, tokenizer, _ = open_run(args.runs[0], device)
        pixels = data.to_pixels([data.read_image(args.image)], vlm.vit.config.image_size).to(device)
        prompt = data.QUESTION.format(args.prompt) if args.prompt else data.CAPTION
        document = data.Document(tokenizer).image().add(prompt)
        print(write(vlm.generate, [document], tokenizer, args.max_new_tokens, args.beams, vlm.features(pixels))[0])
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


def open_run(run: str, device) -> tuple[VLM, data.Tokenizer, dict]:
    vlm = load_vlm(run, device)
    facts = read_json(Path(run) / "config.json")
    return vlm, data.load_tokenizer(tower_folder(Path(run), facts["decoder"])), facts


if __name__ == "__main__":
    from train import run
    run(main)
