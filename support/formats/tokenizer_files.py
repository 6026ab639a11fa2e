"""formats/tokenizer_files.py: a tokenizer from the files of a model's folder.

    tokenizer.json                    Hugging Face's form of any of the four kinds of tokenizers.py
    tokenizer.model                   SentencePiece's model (protobuf), or Llama-3's ranks
    vocab.txt                         BERT
    vocab.json and merges.txt         CLIP, GPT-2

chapters: load_tokenizer · the four files · one step or pattern that is not known is an error. The older files
are first put into the form of a tokenizer.json. Sources: transformers 5.23, sentencepiece_model.proto, Meta's
llama3.
"""
from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np

from support.formats.chat import template_of
from support.formats.files import UserError, atomically, read_json, write_json
from support.formats.tokenizers import (ByteLevel, ClipBPE, GPT2_SPLIT, LLAMA3_SPLIT, SentencePiece,
                                        Tokenizer, WordPiece, byte_letters)

USUAL = {"bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"), "image": ("<image>", "<|image|>"),
         "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "[SEP]")}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder, from the first file of READERS that it holds and the SETTINGS beside
    it.

    Tokens added to a vocabulary count as special, whatever their file says. A damaged or unknown file is a
    UserError.
    """
    folder = Path(folder)
    file = next((folder / name for name in READERS if (folder / name).exists()), None)
    if file is None:
        raise UserError(f"{folder / 'tokenizer.json'}: no such file, nor {', '.join([*READERS][1:])}; "
                        "give a folder that holds one.")
    try:
        settings = {}
        for name in SETTINGS:
            if (folder / name).exists():
                content = read_json(folder / name)
                settings |= {"added": content} if name == "added_tokens.json" else content
        tokenizer = READERS[file.name](file, settings)
        tokenizer.template = template_of(folder, settings, tokenizer.special)
        tokenizer.ends = read_ends(folder)
        return tokenizer
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError):      # missing or cut off
        raise UserError(f"{file}: with the settings beside it no vocabulary that is known here (byte-level "
                        "BPE, SentencePiece BPE with byte fallback, WordPiece, CLIP's BPE); get the files "
                        "again, or another model.") from None


def read_ends(folder: Path) -> frozenset[int]:
    """The eos ids of generation_config.json and config.json: each has one, a list, or none."""
    ends = set()
    for file in (folder / "generation_config.json", folder / "config.json"):
        content = read_json(file) if file.exists() else {}
        text = content.get("text_config")
        for part in (content, text if isinstance(text, dict) else {}):
            ids = part.get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            if not all(i is None or type(i) is int for i in ids):
                raise UserError(f"{file}: eos_token_id is {json.dumps(part['eos_token_id'])}; "
                                "it must be a token id, a list of them, or null.")
            ends |= {i for i in ids if i is not None and i >= 0}        # early LLaMA files write −1 for none
    return frozenset(ends)


def special_tokens(settings: dict, vocab: dict[str, int],
                   added: dict[str, int]) -> tuple[dict[str, int], dict]:
    """Special tokens {text: id}, and the texts of {"bos", "eos", "image"}.

    Special are the added tokens and those of the vocabulary that the settings name. A role that the settings
    do not name has the usual token, if it is there.
    """
    def content(token) -> str:
        return token["content"] if isinstance(token, dict) else token

    roles = [role for role in (*USUAL, "cls", "sep", "mask") if f"{role}_token" in settings]
    named = {role: content(settings[f"{role}_token"]) for role in roles}
    special = {text: vocab[text] for text in named.values() if text in vocab}
    special |= settings.get("added", {})
    special |= {content(token): int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    special |= added
    usual = {role: next((text for text in texts if text in special), None) for role, texts in USUAL.items()}
    return special, {role: named.get(role, usual[role]) for role in usual}


def from_json(file: Path, settings: dict, data: dict) -> Tokenizer:
    """The tokenizer that data describes, the content of a tokenizer.json. file: for the errors.

    The steps of its normalizer and pre-tokenizer must be those of one of the four kinds.
    """
    model, vocab = data["model"], data["model"]["vocab"]
    added = {t["content"]: t["id"] for t in data["added_tokens"] if t["special"] or t["content"] not in vocab}
    special, names = special_tokens(settings, vocab, added)
    entries = [data[key] for key in ("normalizer", "pre_tokenizer") if data.get(key)]
    steps = [step for entry in entries
             for step in entry.get("normalizers") or entry.get("pretokenizers") or [entry]]
    if model.get("type") == "WordPiece":
        return WordPiece(vocab, special, bert_lowercase(steps, file), model["unk_token"], **names)
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"a {model['type']} vocabulary")
    merges = [tuple(m if isinstance(m, list) else m.split(" ")) for m in model["merges"]]
    ids, order = [vocab[a + b] for a, b in merges], {pair: n for n, pair in enumerate(merges)}
    if model.get("end_of_word_suffix") == "</w>":
        return ClipBPE(vocab, order, special, **names)
    if model.get("byte_fallback"):
        prefix = dummy_prefix(steps, file)
        return SentencePiece(vocab, order, special, prefix, model.get("unk_token"), **names)
    if data.get("normalizer"):
        raise unknown_step(data["normalizer"], file)
    byte_of = {letter: b for b, letter in byte_letters().items()}
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items() if token not in special}
    if ids != sorted(ids):                              # tiktoken merges in the order of ids
        raise UserError(f"{file}: its merges are not in the order of its ids; such a vocabulary "
                        "cannot be read here.")
    return ByteLevel(split_pattern(data.get("pre_tokenizer"), file), ranks, special, **names)


def unknown_step(step, file: Path) -> UserError:
    return UserError(f"{file}: the step {json.dumps(step)} is not supported for a vocabulary of its kind.")


def bert_lowercase(steps: list[dict], file: Path) -> bool:
    """Whether BERT's two steps make lower case (and then, as the library does, drop accents)."""
    normalizer, splitter = steps
    accents = normalizer.get("strip_accents")
    known = (normalizer["type"], splitter["type"]) == ("BertNormalizer", "BertPreTokenizer")
    if not known or accents not in (None, normalizer["lowercase"]):
        raise unknown_step(steps, file)
    return normalizer["lowercase"]


def dummy_prefix(steps: list[dict], file: Path) -> tuple:
    """Where a SentencePiece vocabulary puts a blank in front: SentencePiece's `prefix`, from the steps of the
    JSON."""
    prefix = SentencePiece.NEVER
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = SentencePiece.ALWAYS
        elif step["type"] == "Metaspace" and not step.get("split", True):
            prefix = (*getattr(SentencePiece, step.get("prepend_scheme", "always").upper()), "lazy")
        elif step["type"] != "Replace" or (step["pattern"], step["content"]) != ({"String": " "}, "▁"):
            raise unknown_step(step, file)
    return prefix


def read_tokenizer_json(file: Path, settings: dict) -> Tokenizer:
    return from_json(file, settings, read_json(file))


def read_vocab_txt(file: Path, settings: dict) -> Tokenizer:
    """BERT's vocabulary: one piece a line, its id the number of the line from 0."""
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocab = {line.rstrip("\r"): n for n, line in enumerate(lines)}
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    own = [{"content": text, "id": vocab[text], "special": True} for text in names if text in vocab]
    return from_json(file, settings, {
        "added_tokens": own, "model": {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]"},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "normalizer": {"type": "BertNormalizer", "lowercase": settings.get("do_lower_case", True)}})


def read_vocab_json(file: Path, settings: dict) -> Tokenizer:
    """CLIP's or GPT-2's {piece: id}, with the pairs of merges.txt, one a line, beside it."""
    vocab, lines = read_json(file), (file.parent / "merges.txt").read_text(encoding="utf-8").split("\n")
    names = ("<|startoftext|>", "<|endoftext|>")
    own = [{"content": text, "id": vocab[text], "special": True} for text in names if text in vocab]
    merges = [line.split() for line in lines if line and not line.startswith("#version")]
    end = "</w>" if "a</w>" in vocab else None
    return from_json(file, settings, {
        "added_tokens": own, "model": {"vocab": vocab, "merges": merges, "end_of_word_suffix": end}})


def read_tokenizer_model(file: Path, settings: dict) -> Tokenizer:
    """Llama-3's lines "base64 rank", or a SentencePiece model."""
    raw = file.read_bytes()
    if re.match(rb"[\w+/]+=* \d+\s", raw):
        return llama3_ranks(raw, settings)
    return sentencepiece_model(raw, settings, file)


def llama3_ranks(raw: bytes, settings: dict) -> ByteLevel:
    """Llama-3's vocabulary, with the 256 special tokens that its own code puts behind the ranks."""
    lines = (line.split() for line in raw.splitlines() if line)
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    reserved = [f"<|reserved_special_token_{n}|>" for n in range(251)]
    own = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>", "<|end_header_id|>",
           reserved[4], "<|eot_id|>", *reserved[5:]]
    if settings.get("added_tokens_decoder"):            # Llama-3.1 gave names to some of the reserved ones
        own = []
    special, names = special_tokens(settings, {}, {text: len(ranks) + n for n, text in enumerate(own)})
    return ByteLevel(LLAMA3_SPLIT, ranks, special, **names)


def sentencepiece_model(raw: bytes, settings: dict, file: Path) -> SentencePiece:
    """The fields of sentencepiece_model.proto that LLaMA's kind of vocabulary needs.

    ModelProto: 1 pieces, 2 trainer, 3 normalizer. Piece: 1 text, 2 score, 3 type (1 normal, 2 unknown, 3
    control, 4 user-defined, 6 byte). Trainer: 3 model type (2 = BPE), 35 byte fallback. Normalizer: 2 rules,
    3 dummy prefix, 4 several blanks become one.
    """
    fields = list(protobuf(raw))
    trainer = {key: value for n, message in fields if n == 2 for key, value in protobuf(message)}
    normalizer = {key: value for n, message in fields if n == 3 for key, value in protobuf(message)}
    is_bpe, fallback = trainer.get(3) == 2, trainer.get(35)
    rules, dummy, one_blank = normalizer.get(2), normalizer.get(3, 1), normalizer.get(4, 1)
    if not (is_bpe and fallback) or rules or one_blank:
        raise UserError(f"{file}: a SentencePiece model, but not BPE with byte fallback that leaves the "
                        "text as it is; no other is known.")
    vocab, control, score = {}, {}, {}
    pieces = [{1: b"", 3: 1, **dict(protobuf(message))} for n, message in fields if n == 1]
    for i, piece in enumerate(pieces):
        text = piece[1].decode()
        (control if piece[3] in (3, 4) else vocab)[text] = i
        if piece[3] == 1:
            score[text] = float(np.frombuffer(piece[2], "<f4")[0])
    # Two neighbours are joined where the result is a piece, the highest score first. A part is a character or
    # a piece.
    order = {(p[:k], p[k:]): -score[p] for p in score for k in range(1, len(p))
             if (k == 1 or p[:k] in score) and (k == len(p) - 1 or p[k:] in score)}
    special, names = special_tokens(settings, {}, control)
    prefix = SentencePiece.FIRST if settings.get("legacy") is False else SentencePiece.ALWAYS
    return SentencePiece(vocab, order, special, prefix if dummy else SentencePiece.NEVER, **names)


def protobuf(raw: bytes):
    """(field number, value) of one protobuf message: an int for a varint, else the bytes."""
    offset = 0

    def varint() -> int:                        # seven bits a byte, the lowest first; the eighth: more follow
        nonlocal offset
        value = 0
        for shift in range(0, 70, 7):
            byte = raw[offset]
            value |= (byte & 127) << shift
            offset += 1
            if byte < 128:
                return value
        raise ValueError("a number without an end")

    while offset < len(raw):
        number, wire = divmod(varint(), 8)     # wire type 0 varint, 1 eight bytes, 2 length and bytes, 5 four
        value = varint() if wire in (0, 2) else {1: 8, 5: 4}[wire]
        if wire:
            start, offset = offset, offset + value
            value = raw[start:offset]
            if offset > len(raw):
                raise ValueError("cut off")
        yield number, value


def split_pattern(pre_tokenizer: dict | None, file: Path) -> str:
    """One regular expression for the `pre_tokenizer` entry of a tokenizer.json."""
    steps = [pre_tokenizer] if pre_tokenizer else []
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    pattern = GPT2_SPLIT
    for step in steps:
        if step["type"] == "Digits" and step["individual_digits"]:
            # Every digit is alone BEFORE the rest is split: a run of blanks ends at a digit as at the end of
            # the text.
            pattern = GPT2_SPLIT.replace(r"| ?\p{N}+", r"|\p{N}")
            pattern = pattern.replace(r"\s+(?!\S)", r"\s+(?=\p{N})|\s+(?!\S)")
        elif step["type"] == "Split" and "Regex" in step["pattern"]:
            pattern = step["pattern"]["Regex"]
        elif step["type"] != "ByteLevel" or step.get("add_prefix_space"):
            raise UserError(f"{file}: the pre-tokenizer {json.dumps(step)} is not supported; "
                            "known: Digits, Split, ByteLevel.")
    return pattern


def copy_tokenizer(source: Path, target: Path) -> None:
    """The files of a tokenizer, as they are, from one folder into another, and the ids that end a text."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            with atomically(target / name) as tmp:
                tmp.write_bytes((source / name).read_bytes())
    ends = read_ends(source)
    if ends:                                            # the target has a config.json of its own
        write_json(target / "generation_config.json", {"eos_token_id": sorted(ends)})


READERS = {"tokenizer.json": read_tokenizer_json, "tokenizer.model": read_tokenizer_model,
           "vocab.txt": read_vocab_txt, "vocab.json": read_vocab_json}
SETTINGS = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
TOKENIZER_FILES = (*READERS, "merges.txt", *SETTINGS,           # those of a decoder's folder
                   "chat_template.jinja", "chat_template.json")
