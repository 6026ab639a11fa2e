"""formats/tokenizer_files.py: a tokenizer from the files of a model's folder."""
from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np

from support.formats.chat import template_of
from support.formats.files import UserError, read_json
from support.formats.tokenizers import (ByteLevel, ClipBPE, GPT2_SPLIT, LLAMA3_SPLIT, SentencePiece,
                                        Tokenizer, WordPiece, byte_letters)

USUAL = {"bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"), "image": ("<image>", "<|image|>"),
         "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "[SEP]")}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder, from the first of these that is there: tokenizer.json (any of the four kinds),
    tokenizer.model (SentencePiece, or Llama-3's ranks), vocab.txt (BERT), vocab.json with merges.txt (CLIP, GPT-2); with the
    settings beside it.

    Tokens added to a vocabulary count as special, whatever their file says. A damaged or foreign file is a UserError.
    """
    folder = Path(folder)
    file = next((folder / name for name in READERS if (folder / name).exists()), None)
    if file is None:
        raise UserError(f"{folder / 'tokenizer.json'}: no such file, nor {', '.join([*READERS][1:])}; give a folder that "
                        "holds one.")
    try:
        settings = {}
        for name in SETTINGS:
            if (folder / name).exists():
                settings |= {"added": read_json(folder / name)} if name == "added_tokens.json" else read_json(folder / name)
        tokenizer = READERS[file.name](file, settings)
        tokenizer.template = template_of(folder, settings, tokenizer.special)
        return tokenizer
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError):      # something is missing or cut off
        raise UserError(f"{file}: with the settings beside it no vocabulary that is known here (byte-level BPE, SentencePiece "
                        "BPE with byte fallback, WordPiece, CLIP's BPE); get the files again, or another model.") from None


def special_tokens(settings: dict, vocab: dict[str, int], added: dict[str, int]) -> tuple[dict[str, int], dict]:
    """({text: id} of the added tokens and of those in the vocabulary that the settings name, {"bos": text, "eos", "image"})."""
    spelled = lambda token: token["content"] if isinstance(token, dict) else token
    named = {k: spelled(settings[f"{k}_token"]) for k in (*USUAL, "cls", "sep", "mask") if f"{k}_token" in settings}
    special = {**{t: vocab[t] for t in named.values() if t in vocab}, **settings.get("added", {}),
               **{spelled(t): int(i) for i, t in settings.get("added_tokens_decoder", {}).items()}, **added}
    usual = {k: next((t for t in texts if t in special), None) for k, texts in USUAL.items()}
    return special, {k: named.get(k, usual[k]) for k in usual}


def from_json(file: Path, settings: dict, data: dict) -> Tokenizer:
    """data: the content of a tokenizer.json; the older pairs of files are put into that form below."""
    model, vocab = data["model"], data["model"]["vocab"]
    added = {t["content"]: t["id"] for t in data["added_tokens"] if t["special"] or t["content"] not in vocab}
    special, names = special_tokens(settings, vocab, added)
    steps = [s for key in ("normalizer", "pre_tokenizer") if (entry := data.get(key))
             for s in entry.get("normalizers") or entry.get("pretokenizers") or [entry]]
    unknown = lambda step: UserError(f"{file}: the step {json.dumps(step)} is not supported for a vocabulary of its kind.")
    if model.get("type") == "WordPiece":
        bert, rest = steps
        if ((bert["type"], rest["type"]) != ("BertNormalizer", "BertPreTokenizer")
                or bert.get("strip_accents") not in (None, bert["lowercase"])):
            raise unknown(steps)
        return WordPiece(vocab, special, bert["lowercase"], model["unk_token"], **names)
    if model.get("type", "BPE") != "BPE":
        raise ValueError
    merges = [tuple(m if isinstance(m, list) else m.split(" ")) for m in model["merges"]]
    made, order = [vocab[a + b] for a, b in merges], {pair: n for n, pair in enumerate(merges)}
    if model.get("end_of_word_suffix") == "</w>":
        return ClipBPE(vocab, order, special, **names)
    if model.get("byte_fallback"):
        prefix = SentencePiece.NEVER
        for step in steps:
            if step["type"] == "Prepend" and step["prepend"] == "▁":
                prefix = SentencePiece.ALWAYS
            elif step["type"] == "Metaspace" and not step.get("split", True):
                prefix = (*getattr(SentencePiece, step.get("prepend_scheme", "always").upper()), "lazy")
            elif step["type"] != "Replace" or (step["pattern"], step["content"]) != ({"String": " "}, "▁"):
                raise unknown(step)
        return SentencePiece(vocab, order, special, prefix, model.get("unk_token"), **names)
    if data.get("normalizer"):
        raise unknown(data["normalizer"])
    value = {letter: b for b, letter in byte_letters().items()}
    ranks = {bytes(value[c] for c in token): i for token, i in vocab.items() if token not in special}
    if made != sorted(made):                            # tiktoken merges in the order of ids
        raise UserError(f"{file}: its merges are not in the order of its ids; such a vocabulary cannot be read here.")
    return ByteLevel(split_pattern(data.get("pre_tokenizer"), file), ranks, special, **names)


def read_vocab_txt(file: Path, settings: dict) -> Tokenizer:
    vocab = {line.rstrip("\r"): n for n, line in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"))}
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    own = [{"content": t, "id": vocab[t], "special": True} for t in names if t in vocab]
    return from_json(file, settings, {
        "added_tokens": own, "model": {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]"},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "normalizer": {"type": "BertNormalizer", "lowercase": settings.get("do_lower_case", True)}})


def read_vocab_json(file: Path, settings: dict) -> Tokenizer:
    vocab, lines = read_json(file), (file.parent / "merges.txt").read_text(encoding="utf-8").split("\n")
    own = [{"content": t, "id": vocab[t], "special": True} for t in ("<|startoftext|>", "<|endoftext|>") if t in vocab]
    merges = [line.split() for line in lines if line and not line.startswith("#version")]
    end = "</w>" if "a</w>" in vocab else None
    return from_json(file, settings, {"added_tokens": own, "model": {"vocab": vocab, "merges": merges, "end_of_word_suffix": end}})


def read_tokenizer_model(file: Path, settings: dict) -> Tokenizer:
    """Llama-3's lines "base64 rank", or a SentencePiece model (sentencepiece_model.proto: the fields that LLaMA's kind needs)."""
    raw = file.read_bytes()
    if re.match(rb"[\w+/]+=* \d+\s", raw):
        lines = (line.split() for line in raw.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        reserved = [f"<|reserved_special_token_{n}|>" for n in range(251)]
        own = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>", "<|end_header_id|>", reserved[4],
               "<|eot_id|>", *reserved[5:]]
        if settings.get("added_tokens_decoder"):        # Llama-3.1 gave names to some of the reserved ones
            own = []
        special, names = special_tokens(settings, {}, {t: len(ranks) + n for n, t in enumerate(own)})
        return ByteLevel(LLAMA3_SPLIT, ranks, special, **names)
    fields = [*protobuf(raw)]
    trainer, normalizer = ({k: v for n, message in fields if n == number for k, v in protobuf(message)} for number in (2, 3))
    bpe, fallback = trainer.get(3) == 2, trainer.get(35)
    rules, dummy, collapse = normalizer.get(2), normalizer.get(3, 1), normalizer.get(4, 1)      # collapse: blanks into one
    if not (bpe and fallback) or rules or collapse:
        raise UserError(f"{file}: a SentencePiece model, but not BPE with byte fallback that leaves the text as it is; no other "
                        "is known.")
    vocab, control, score = {}, {}, {}
    for i, piece in enumerate({1: b"", 3: 1, **dict(protobuf(message))} for n, message in fields if n == 1):
        text = piece[1].decode()
        (control if piece[3] in (3, 4) else vocab)[text] = i            # 1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte
        if piece[3] == 1:
            score[text] = float(np.frombuffer(piece[2], "<f4")[0])
    # two neighbours are joined where the result is a piece, the highest score first; a part is a character or a piece
    order = {(p[:k], p[k:]): -score[p] for p in score for k in range(1, len(p))
             if (k == 1 or p[:k] in score) and (k == len(p) - 1 or p[k:] in score)}
    special, names = special_tokens(settings, {}, control)
    prefix = SentencePiece.FIRST if settings.get("legacy") is False else SentencePiece.ALWAYS
    return SentencePiece(vocab, order, special, prefix if dummy else SentencePiece.NEVER, **names)


def protobuf(raw: bytes):
    """(field number, value) of one message: an int for a varint, else the bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            value, at = value | (raw[at] & 127) << shift, at + 1
            if raw[at - 1] < 128:
                return value
        raise ValueError("a number without an end")

    while at < len(raw):
        number, wire = divmod(varint(), 8)
        value = varint() if wire in (0, 2) else {1: 8, 5: 4}[wire]
        if wire:
            value, at = raw[at:at + value], at + value
            if at > len(raw):
                raise ValueError("cut off")
        yield number, value


READERS = {"tokenizer.json": lambda file, settings: from_json(file, settings, read_json(file)),
           "tokenizer.model": read_tokenizer_model, "vocab.txt": read_vocab_txt, "vocab.json": read_vocab_json}
SETTINGS = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
TOKENIZER_FILES = (*READERS, "merges.txt", *SETTINGS, "chat_template.jinja", "chat_template.json")     # of a decoder's folder


def split_pattern(pre: dict | None, file: Path) -> str:
    """One regular expression for the `pre_tokenizer` entry of a tokenizer.json."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre] if pre else []
    pattern = GPT2_SPLIT
    for step in steps:
        if step["type"] == "Digits" and step["individual_digits"]:
            # every digit alone, and BEFORE the rest is split: a run of blanks ends at a digit as it ends at the end of the text
            pattern = GPT2_SPLIT.replace(r"| ?\p{N}+", r"|\p{N}").replace(r"\s+(?!\S)", r"\s+(?=\p{N})|\s+(?!\S)")
        elif step["type"] == "Split" and "Regex" in step["pattern"]:
            pattern = step["pattern"]["Regex"]
        elif step["type"] != "ByteLevel" or step.get("add_prefix_space"):
            raise UserError(f'{file}: the pre-tokenizer {json.dumps(step)} is not supported; known: Digits, Split, ByteLevel.')
    return pattern
