"""formats/tokenizer_files.py: a tokenizer from the files of a model's folder.

    tokenizer.json                    Hugging Face's form of any of the four kinds of tokenizers.py
    tokenizer.model                   SentencePiece's model (protobuf), or Llama-3's ranks
    vocab.txt                         BERT
    vocab.json and merges.txt         CLIP, GPT-2

chapters: load_tokenizer · settings, added tokens and roles · the four files · ids. The older files are first
put into the form of a tokenizer.json; a step that is not known is an error (text_steps.py). Sources:
transformers 5.24, tokenizers 0.23, sentencepiece_model.proto, Meta's llama3.
"""
from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from support.formats.chat import template_of
from support.formats.files import UserError, at_the_door, atomically, read_json, refuse_device, write_json
from support.formats.generation import read_ends, read_stop_strings
from support.formats.text_steps import (GPT2_SPLIT, flat_steps, make_normalizer, make_splitter,
                                        unknown_step)
from support.formats.tokenizers import (CLIP_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT, ByteLevel, ClipBPE,
                                        SentencePiece, Tokenizer, WordPiece, byte_letters)

DECODERS = (None, "ByteLevel", "BPEDecoder", "Metaspace", "Sequence", "WordPiece")
RULES = ("lstrip", "rstrip", "single_word", "normalized")
# their code sets the blank in front of a text by the settings, whatever the tokenizer.json says
PREFIX_BY_SETTINGS = ("GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast")
USUAL = {"bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"), "image": ("<image>", "<|image|>"),
         "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "[SEP]")}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder, from the first file of READERS that it holds and the SETTINGS beside
    it.

    A damaged or unknown file is a UserError.
    """
    folder = Path(folder)
    file = next((folder / name for name in READERS if (folder / name).exists()), None)
    if file is None:
        raise UserError(f"{folder / 'tokenizer.json'}: no such file, nor {', '.join([*READERS][1:])}; "
                        "give a folder that holds one.")
    for name in TOKENIZER_FILES:
        refuse_device(folder / name)
    try:
        settings = read_settings(folder)
        with at_the_door(str(file)):
            tokenizer = READERS[file.name](file, settings)
            tokenizer.template = template_of(folder, settings, tokenizer)
            check_model_vocabulary(tokenizer, folder)
        read_texts_that_end(tokenizer, folder)
        files = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
        tokenizer.digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:32]
        return tokenizer
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, OSError):                  # missing or cut off
        raise UserError(f"{file}: with the settings beside it no vocabulary that is known here (byte-level "
                        "BPE, SentencePiece BPE with byte fallback, WordPiece, CLIP's BPE); get the files "
                        "again, or another model.") from None


def read_settings(folder: Path) -> dict:
    """The content of the SETTINGS together; "added" is that of added_tokens.json.

    An empty text is as good as none. As in transformers, tokenizer_config.json overrides
    special_tokens_map.json only if it lists the added tokens, too.
    """
    files = {name: read_json(folder / name) for name in SETTINGS if (folder / name).exists()}
    config = files.get("tokenizer_config.json", {})
    both = [files.get("special_tokens_map.json", {}), config]
    if "added_tokens_decoder" not in config:
        both.reverse()
    settings = {key: value for content in both for key, value in content.items() if value != ""}
    return {**settings, "added": files.get("added_tokens.json", {})}


def read_texts_that_end(tokenizer: Tokenizer, folder: Path) -> None:
    """Set `ends` and `stop_texts`; a stop string that is one token is an id as any other."""
    texts, tokens = read_stop_strings(folder), {**tokenizer.words, **tokenizer.special}
    tokenizer.ends = read_ends(folder) | {tokens[text] for text in texts if text in tokens}
    tokenizer.stop_texts = tuple(text for text in texts if text not in tokens)


def token_text(token) -> str | None:
    """The text of a token in the settings: a string, or an object with its content."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise TypeError("a token is a text")
    return text


def added_tokens(settings: dict, vocab: dict[str, int], entries: list[dict]) -> dict:
    """What Tokenizer asks about the tokens beside its vocabulary: special, words, rules, bos, eos, image.

    entries: the added_tokens of a tokenizer.json. Special is a token that its entry calls so, one without an
    entry of its own, and one that has a role in the settings. A role that the settings do not name has the
    usual token, if it is there.
    """
    check_ids(settings["added"])
    found = {text: {"id": i} for text, i in settings["added"].items()}
    for i, token in settings.get("added_tokens_decoder", {}).items():
        found[token_text(token)] = {**(token if isinstance(token, dict) else {}), "id": int(i)}
    found |= {entry["content"]: entry for entry in entries}
    if "" in found:
        raise ValueError("an added token is the empty text, which is everywhere.")
    check_ids({**{text: entry["id"] for text, entry in found.items()}}, vocab)
    roles = {key[:-6]: token_text(token) for key, token in settings.items()
             if key.endswith("_token") and key != "pad_token" and isinstance(token, str | dict | None)}
    extra = [token_text(t) for key in ("additional_special_tokens", "extra_special_tokens")
             if isinstance(settings.get(key), list) for t in settings[key]]
    for role, texts in USUAL.items():
        roles.setdefault(role, next((t for t in texts if t in found), None))
    named = {text for text in (*roles.values(), *extra) if text is not None}
    for role in ("bos", "eos"):
        if roles[role] is not None and roles[role] not in {**vocab, **found}:
            raise ValueError(f"the settings beside it name {roles[role]!r} as {role}_token, and the "
                             "vocabulary has no such token; correct the name, or remove it.")
    ids = {**{text: vocab[text] for text in named if text in vocab}, **{t: e["id"] for t, e in found.items()}}
    special = {text: i for text, i in ids.items() if text in named or found[text].get("special", True)}
    rules = {text: frozenset(rule for rule in RULES if entry.get(rule)) for text, entry in found.items()}
    return {"special": special, "words": {text: i for text, i in ids.items() if text not in special},
            "rules": {text: rule for text, rule in rules.items() if rule},
            **{role: roles[role] for role in USUAL}}


def text_frame(processor: dict | None) -> tuple[list[int], list[int]]:
    """The ids that the post_processor of a tokenizer.json writes in front of a text and behind it."""
    kind = processor["type"] if processor is not None else None
    if kind == "Sequence":
        frames = [text_frame(part) for part in processor["processors"]]
        return ([i for begin, _ in reversed(frames) for i in begin], [i for _, end in frames for i in end])
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]], [processor["sep"][1]]
    if kind == "TemplateProcessing":
        sides, side = ([], []), 0
        for part in processor["single"]:
            if "Sequence" in part:
                side = 1
            else:
                sides[side].extend(processor["special_tokens"][part["SpecialToken"]["id"]]["ids"])
        return sides
    if kind not in (None, "ByteLevel"):
        raise ValueError(f"the post-processor {kind} is not supported.")
    return [], []


def frame_texts(tokenizer: Tokenizer, settings: dict, data: dict) -> Tokenizer:
    """Set `begin` and `end`: as the post_processor of data writes them, unless the settings say otherwise.

    Data that does not have that key leaves them as the kind of vocabulary has them.
    """
    if "post_processor" in data:
        begin, end = text_frame(data["post_processor"])
        for i in (*begin, *end):
            if type(i) is not int or i not in {*tokenizer.special.values(), *tokenizer.text_ids}:
                raise ValueError(f"its post-processor writes the id {json.dumps(i)}, which no token has.")
        tokenizer.begin, tokenizer.end = tuple(begin), tuple(end)
    sides = {"add_bos_token": ("begin", tokenizer.bos), "add_eos_token": ("end", tokenizer.eos)}
    for key, (side, token) in sides.items():
        if settings.get(key) is not None:
            setattr(tokenizer, side, (token,) if settings[key] and token is not None else ())
    return tokenizer


def from_json(file: Path, settings: dict, data: dict) -> Tokenizer:
    """The tokenizer that data describes, the content of a tokenizer.json. file: for the errors."""
    model, vocab = data["model"], data["model"]["vocab"]
    check_ids(vocab)
    sentencepiece = bool(model.get("byte_fallback"))
    added = added_tokens(settings, vocab, [      # ▁a, added to its own vocabulary, stays a piece
        entry for entry in data["added_tokens"]
        if entry["special"] or not (sentencepiece and entry["content"] in vocab)])
    normalizers, splits = flat_steps(data.get("normalizer")), flat_steps(data.get("pre_tokenizer"))
    if settings.get("tokenizer_class") in PREFIX_BY_SETTINGS:
        splits = [{**step, "add_prefix_space": bool(settings.get("add_prefix_space"))}
                  if step["type"] == "ByteLevel" else step for step in splits]
    if (data.get("decoder") or {}).get("type") not in DECODERS:
        raise ValueError(f"the decoder {json.dumps(data['decoder'])} is not known.")
    if model.get("dropout") or model.get("continuing_subword_prefix") not in (None, "", "##"):
        raise ValueError("its model leaves out merges at random, or marks pieces inside a word by a prefix "
                         "other than ##; such a vocabulary cannot be read here.")
    if model.get("type") == "WordPiece":
        tokenizer = WordPiece(vocab, split=make_splitter(splits), unk=model["unk_token"],
                              longest=model.get("max_input_chars_per_word", 100),
                              normalize=make_normalizer(normalizers), **added)
        return frame_texts(tokenizer, settings, data)
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"a {model['type']} vocabulary; known are BPE and WordPiece.")
    merges = [tuple(m if isinstance(m, list) else m.split(" ")) for m in model["merges"]]
    if odd := [m for m in merges if len(m) != 2]:
        raise ValueError(f"the merge {' '.join(map(str, odd[0]))!r} is no pair of tokens.")
    ids, order = [vocab[a + b] for a, b in merges], {pair: n for n, pair in enumerate(merges)}
    if sentencepiece:
        first, prefix = dummy_prefix(normalizers + splits)
        tokenizer = SentencePiece(vocab, order, prefix=prefix, unk=model.get("unk_token"),
                                  normalize=make_normalizer(first), **added)
    elif model.get("end_of_word_suffix") == "</w>":
        tokenizer = ClipBPE(vocab, order, split=make_splitter(without_names(splits, added["special"])),
                            normalize=make_normalizer(normalizers), **added)
    else:
        byte_of = {letter: b for b, letter in byte_letters().items()}
        ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items()
                 if token not in added["special"]}
        # tiktoken merges in the order of ids, whatever two parts make a token; this fits most vocabularies
        made, whole_words = {*ids}, model.get("ignore_merges")
        fits = ids == sorted(ids) and (whole_words or all(len(t) == 1 or i in made for t, i in ranks.items()))
        if not fits:
            order = {tuple(bytes(byte_of[c] for c in part) for part in pair): n for pair, n in order.items()}
            if whole_words:
                raise ValueError("its merges are not in the order of its ids, and it ignores them for whole "
                                 "words; such a vocabulary cannot be read here.")
        pattern, before = byte_level_splits(splits)
        tokenizer = ByteLevel(pattern, ranks, split=before, order=None if fits else order,
                              normalize=make_normalizer(normalizers), **added)
    return frame_texts(tokenizer, settings, data)


def byte_level_splits(steps: list[dict]):
    """(pattern, function) of ByteLevel: the function cuts first, the pattern is left to tiktoken, which is
    faster. A pattern goes there only if it is known to match every character."""
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise ValueError("its pre-tokenizer does not end with ByteLevel.")
    *before, last = steps
    if last.get("add_prefix_space"):
        return None, make_splitter(steps)
    pattern = GPT2_SPLIT
    if not last.get("use_regex", True):
        step = before[-1] if before else {}
        pattern = step.get("pattern", {}).get("Regex") if step.get("behavior") == "Isolated" else None
        if pattern not in (GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT) or step.get("invert"):
            return None, make_splitter(steps)
        before = before[:-1]
    return pattern, make_splitter(before) if before else None


def without_names(steps: list[dict], special: dict[str, int]) -> list[dict]:
    """The steps without the names of special tokens in their patterns: what a user types is no such token."""
    steps = json.loads(json.dumps(steps))
    for pattern in (step["pattern"] for step in steps if "Regex" in step.get("pattern", {})):
        for name in special:
            pattern["Regex"] = pattern["Regex"].replace(name.replace("|", r"\|") + "|", "")
    return steps


def dummy_prefix(steps: list[dict]) -> tuple[list[dict], tuple]:
    """The steps that change the text, and where a SentencePiece vocabulary puts a blank in front: its
    `prefix`."""
    prefix, first, marked = SentencePiece.NEVER, [], False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = SentencePiece.ALWAYS
        elif step["type"] == "Metaspace" and not step.get("split", True):
            prefix = (*getattr(SentencePiece, step.get("prepend_scheme", "always").upper()), "lazy")
            marked = True
        elif step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, "▁"):
            marked = True
        elif step["type"] == "Split" and step["pattern"] == {"String": " "} and marked:
            continue                                    # Gemma's: no blank is left
        elif marked or prefix or step["type"] in ("Metaspace", "Prepend"):
            raise unknown_step(step)
        else:
            first.append(step)
    if not marked:
        raise ValueError("neither its normalizer nor its pre-tokenizer writes ▁ for a blank.")
    return first, prefix


def read_tokenizer_json(file: Path, settings: dict) -> Tokenizer:
    """Its post_processor alone says what stands around a text; transformers 5 drops the settings as well."""
    data = read_json(file)
    if "post_processor" in data:
        settings = {**settings, "add_bos_token": None, "add_eos_token": None}
    return from_json(file, settings, data)


def read_vocab_txt(file: Path, settings: dict) -> Tokenizer:
    """BERT's vocabulary: one piece a line, its id the number of the line from 0."""
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocab = {line.rstrip("\r"): n for n, line in enumerate(lines)}
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    own = [{"content": text, "id": vocab[text], "special": True} for text in names if text in vocab]
    frame = {text[1:4].lower(): [text, vocab[text]] for text in ("[CLS]", "[SEP]") if text in vocab}
    return from_json(file, settings, {
        "added_tokens": own, "model": {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]"},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", **frame} if len(frame) == 2 else None,
        "normalizer": {"type": "BertNormalizer", "lowercase": settings.get("do_lower_case", True),
                       "strip_accents": settings.get("strip_accents"),
                       "handle_chinese_chars": settings.get("tokenize_chinese_chars", True)}})


def read_vocab_json(file: Path, settings: dict) -> Tokenizer:
    """CLIP's or GPT-2's {piece: id}, with the pairs of merges.txt, one a line, beside it."""
    vocab, lines = read_json(file), (file.parent / "merges.txt").read_text(encoding="utf-8").split("\n")
    names = ("<|startoftext|>", "<|endoftext|>")
    own = [{"content": text, "id": vocab[text], "special": True} for text in names if text in vocab]
    merges = [line.split() for line in lines if line and not line.startswith("#version")]
    model = {"vocab": vocab, "merges": merges}
    if "a</w>" not in vocab:
        steps = byte_level_steps(settings)
        return from_json(file, settings,
                         {"added_tokens": own, "model": model, "post_processor": None, **steps})
    words = {"type": "Split", "pattern": {"Regex": CLIP_SPLIT}, "behavior": "Removed", "invert": True}
    frame = {side: [text, vocab[text]] for side, text in zip(("cls", "sep"), names)}
    return from_json(file, settings, {
        "added_tokens": own, "model": {**model, "end_of_word_suffix": "</w>"}, "pre_tokenizer": words,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        "post_processor": {"type": "RobertaProcessing", **frame}})


def byte_level_steps(settings: dict) -> dict:
    """The steps that a class of tokenizers has in its code, where there is no tokenizer.json to say them."""
    kind = (settings.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    last = {"type": "ByteLevel", "add_prefix_space": settings.get("add_prefix_space") or False}
    if kind == "GPT2Tokenizer":
        return {"pre_tokenizer": last}
    if kind == "Qwen2Tokenizer":
        words = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated"}
        return {"normalizer": {"type": "NFC"}, "pre_tokenizer": {
            "type": "Sequence", "pretokenizers": [words, {**last, "use_regex": False}]}}
    raise ValueError(f"no file of its folder says how a {kind} cuts a text; a tokenizer.json would.")


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
    entries = [{"content": text, "id": len(ranks) + n} for n, text in enumerate(own)]
    check_ids({token.decode("latin-1"): i for token, i in ranks.items()})
    return frame_texts(ByteLevel(LLAMA3_SPLIT, ranks, **added_tokens(settings, {}, entries)), settings, {})


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
    vocab, control, score, entries = {}, {}, {}, []
    pieces = [{1: b"", 3: 1, **dict(protobuf(message))} for n, message in fields if n == 1]
    for i, piece in enumerate(pieces):
        text = piece[1].decode()
        (control if piece[3] in (3, 4) else vocab)[text] = i
        entries += [{"content": text, "id": i, "special": piece[3] == 3}] * (text in control)
        if piece[3] == 1:
            score[text] = float(np.frombuffer(piece[2], "<f4")[0])
    # Two neighbours are joined where the result is a piece, the highest score first. A part is a character or
    # a piece.
    order = {(p[:k], p[k:]): -score[p] for p in score for k in range(1, len(p))
             if (k == 1 or p[:k] in score) and (k == len(p) - 1 or p[k:] in score)}
    added = added_tokens(settings, vocab, entries)
    prefix = SentencePiece.FIRST if settings.get("legacy") is False else SentencePiece.ALWAYS
    tokenizer = SentencePiece(vocab, order, prefix=prefix if dummy else SentencePiece.NEVER, **added)
    return frame_texts(tokenizer, settings, {})


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


def check_ids(tokens: dict[str, int], vocab: dict[str, int] | None = None) -> None:
    """A ValueError for an id that is none, or that a second token has, here or in vocab."""
    pairs = {**(vocab or {}), **tokens}
    ids = {*pairs.values()} if {*map(type, pairs.values())} <= {int} else ()
    if len(ids) == len(pairs) and all(0 <= i < 2**31 for i in ids):     # at once: a vocabulary has 100,000
        return
    holders: dict[int, str] = {}
    for text, i in pairs.items():
        if type(i) is not int or not 0 <= i < 2**31:
            raise ValueError(f"the token {text!r} has the id {json.dumps(i)}, which is no id.")
        if holders.setdefault(i, text) != text:
            raise ValueError(f"the tokens {holders[i]!r} and {text!r} both have the id {i}.")


def check_model_vocabulary(tokenizer: Tokenizer, folder: Path) -> None:
    """A ValueError for a token of text that the model beside the tokenizer has no row for.

    A special token beyond its rows (a padding token that was added later) is none: what needs it is refused.
    The picture's may be beyond, as Llama 3.2 Vision's: it is read and never written.
    """
    file = folder / "config.json"
    config = read_json(file) if file.exists() else {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    sizes = [part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)]
    if not sizes:
        return
    size = max(sizes) + sum(part.get("additional_vocab_size") or 0 for part in parts[:1])
    used = [i for i in (*tokenizer.text_ids, *tokenizer.begin, *tokenizer.end, tokenizer.bos, tokenizer.eos)
            if i is not None and i >= size]
    tokenizer.special = {text: i for text, i in tokenizer.special.items() if i < size or i == tokenizer.image}
    if used:
        raise ValueError(f"the id {used[0]} is beyond the vocabulary of the model beside it "
                         f"(config.json: vocab_size {size}); the two belong to different models.")


def copy_tokenizer(source: Path, target: Path) -> None:
    """The files of a tokenizer, as they are, from one folder into another, and the ids and texts that end a
    text."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            with atomically(target / name) as tmp:
                tmp.write_bytes((source / name).read_bytes())
    ends, texts = sorted(read_ends(source)), read_stop_strings(source)
    content = {"eos_token_id": ends} if ends else {}
    if ends or texts:                                   # the target has a config.json of its own
        content |= {"stop_strings": list(texts)} if texts else {}
        write_json(target / "generation_config.json", content)


READERS = {"tokenizer.json": read_tokenizer_json, "tokenizer.model": read_tokenizer_model,
           "vocab.txt": read_vocab_txt, "vocab.json": read_vocab_json}
SETTINGS = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
TOKENIZER_FILES = (*READERS, "merges.txt", *SETTINGS,           # those of a decoder's folder
                   "chat_template.jinja", "chat_template.json")
