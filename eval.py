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

# METRICS
from eval_metrics_part import *  # METRICS

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
    return {**result, "mean": float(np.mean(list(result.values())))}


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


def reading(decoder: Decoder, tokenizer: data.Tokenizer, count: int = 400) -> dict:
    """How well a decoder reads scenes in words: exact answers per kind of question, and per number of objects, over all styles."""
    world, hits = data.Shapes("all", seed=1), {}
    for style in data.STYLES:
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
    """Linear probe of ONE token: logistic regression from the token of an object's cell to its colour, shape and size.

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
    for attribute, names in (("color", list(data.COLORS)), ("shape", list(data.SHAPES)), ("size", list(data.SIZES))):
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
    """Rows of {"name", "trained", "examples", kind: accuracy, …} as aligned text; accuracies and BLEU × 100, missing cells empty."""
    columns = ["name"] + [c for c in ("trained", "examples") if any(c in r for r in rows)]
    columns += sorted({k for r in rows for k, v in r.items() if isinstance(v, float)} - {"mean", "cider", "bleu4"})
    columns += [c for c in ("mean", "cider", "bleu4") if any(c in r for r in rows)]

    def cell(column: str, value) -> str:
        if value is None:
            return ""
        if column in ("trained", "examples"):
            return f"{value:,}"
        return value if isinstance(value, str) else f"{value:.2f}" if column == "cider" else f"{100 * value:.1f}"
    text = [[c if c != "name" else "" for c in columns]] + [[cell(c, r.get(c)) for c in columns] for r in rows]
    widths = [max(map(len, column)) for column in zip(*text)]
    return "\n".join("  ".join(v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths))).rstrip() for line in text)


def numbers(result: dict) -> dict:
    return {k: v for k, v in result.items() if isinstance(v, float)}


def measure(vlm: VLM, tokenizer: data.Tokenizer, world, count: int, facts: dict, name: str, beams: int = 1) -> tuple[list[dict], list[data.Item], dict]:
    """Rows of the final table: held-out, seen, blind; then the items and the full result on the held-out ones."""
    facts = {"trained": facts.get("trained_parameters"), "examples": facts.get("training_examples")}
    items = [data.open_data(f"{world.name}:{world.held_out}", seed=world.seed).item(i) for i in range(count)]
    seen = [data.open_data(f"{world.name}:val", seed=world.seed).item(i) for i in range(count)]
    result = evaluate(vlm, tokenizer, items, beams=beams)
    rows = [{"name": f"{name}, held-out", **facts, **numbers(result)},
            {"name": f"{name}, seen", **facts, **numbers(evaluate(vlm, tokenizer, seen, beams=beams))},
            {"name": f"{name}, blind", **numbers(evaluate(vlm, tokenizer, items, blind=True, beams=beams))}]
    return rows, items, result


def baselines(vlm: VLM, tokenizer: data.Tokenizer, world, items: list[data.Item]) -> list[dict]:
    """chance, and the oracle where the world can say its pictures in words and the decoder was taught to read them."""
    rows = [{"name": "chance (commonest answer)", **chance(world, items)}]
    if world.name == "shapes":
        rows.append({"name": "oracle (scene in words)", **oracle(vlm.decoder, tokenizer, items)})
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
            print(f"  {'right' if answer == q.answer else 'WRONG'}      {q.question} {answer}" + ("" if answer == q.answer else f" (it is {q.answer})"))
    write_json(out / "results.json", {"world": world.name, "items": count, "rows": rows})
    print(f"\n{count} held-out pictures; accuracy in %, CIDEr, BLEU-4 x 100\n{table(rows)}\n")


# ------------------------------------------------------------------------------------------------------------------
# 4. The command line
# ------------------------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", help="run folders of train.py")
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
        ids = data.chatml(tokenizer, args.prompt) if "<|im_start|>" in tokenizer.special else data.Document(tokenizer).add(args.prompt).tokens
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
    worlds: dict[str, list[dict]] = {}
    for run in args.runs:
        vlm, tokenizer, facts = open_run(run, device)
        world = data.open_data(facts["settings"]["data"], seed=facts["settings"]["seed"])
        rows, items, _ = measure(vlm, tokenizer, world, args.items, facts, Path(run).name, args.beams)
        worlds.setdefault(world.name, []).extend(rows)
        if run == [r for r in args.runs][-1] or world.name != "shapes":
            worlds[world.name] += baselines(vlm, tokenizer, world, items)
    for name, rows in worlds.items():
        print(f"{name}: {args.items} pictures a row; accuracy in %, CIDEr, BLEU-4 x 100\n{table(rows)}\n")


def open_run(run: str, device) -> tuple[VLM, data.Tokenizer, dict]:
    vlm = load_vlm(run, device)
    facts = read_json(Path(run) / "config.json")
    return vlm, data.load_tokenizer(tower_folder(Path(run), facts["decoder"])), facts


if __name__ == "__main__":
    from train import run
    run(main)
