"""Make the tokenizer cases of tests/golden: small vocabularies trained here, encoded by the published
libraries; chat templates.

Run      python tests/benchmarks/make_tokenizer_golden.py [FOLDER]
needs transformers, tokenizers and tiktoken

Without FOLDER: wordpiece-bert-style, clip-bpe-style, llama3-tiktoken-style, sentencepiece-metaspace. FOLDER
adds chat-templates; it holds llama/tokenizer.json (LLaMA-1's published vocabulary with the legacy
normalizer), llama2.jinja and llama3.jinja (the published chat templates) and llava/ (the authors' package
llava-torch 1.2.2.post1, unpacked), of which only texts, ids and a cut of the vocabulary are kept.
"""
from __future__ import annotations

import ast
import base64
import copy
import json
import sys
import types
from pathlib import Path

import jinja2
import tiktoken
import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

GOLDEN = Path(__file__).parents[1] / "golden"

STRINGS = [
    "",
    "a",
    " ",
    "  ",
    "   ",
    " a",
    "a ",
    " a ",
    "  a",
    "a  ",
    "Hello",
    "Hello world",
    " Hello  world ",
    "hello, world!",
    "Hello, World! How are you?",
    "It's they're we've I'm he'll she'd can't won't",
    "IT'S THEY'RE WE'VE I'M",
    "don ' t do not ' m",
    "a red circle",
    "a large blue ring at the middle center",
    "is there a red square? yes",
    "how many rings are there? two; one; three.",
    "the unaffable unhappiness of running runners",
    "$5.00 + 10% = 7",
    "1234567890",
    "1,234.56",
    "3.14e-10",
    "x=y*(z-1)/2",
    "a_b-c.d/e\\f",
    "e-mail@example.org",
    "https://example.org/a?b=c&d=e#f",
    "\"quoted\" 'single' `back` “curly” ‘curly’ «guillemets»",
    "…",
    "—–-",
    "?!.,",
    "café naïve résumé",
    "cafe\u0301 nai\u0308ve",
    "Ångström Å A\u030a",
    "ñandú",
    "ﬁne ﬂow",
    "Straße STRASSE ẞ",
    "İstanbul ıstanbul",
    "ΣΑΣ ΟΔΟΣ σας",
    "ПРИВЕТ, мир",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好，世界",
    "こんにちは世界",
    "カタカナ",
    "안녕하세요 세계",
    "中a文b",
    "𠀀𪛖",
    "😀",
    "👍🏽",
    "👩\u200d👩\u200d👧\u200d👦",
    "🇫🇷🇩🇪",
    "a😀b",
    "½ ⅓ ① Ⅷ ㎏",
    "x² H₂O",
    "√2 ≈ 1.41",
    "zero\u200bwidth",
    "soft\u00adhyphen",
    "bom\ufeffbom",
    "line\u2028sep\u2029par",
    "nbsp\u00a0here",
    "thin\u2009space",
    "wide\u3000space",
    "\x01\x02control\x7f",
    "\x00",
    "next\x85line",
    "tab\there",
    "new\nline",
    "\r\n",
    "a\r\nb",
    "\n\n\n",
    "  \n  ",
    "\t\t",
    "trailing ",
    "trailing  ",
    "a  1",
    "a   b    c",
    "replacement\ufffd",
    "private\ue000",
    "##ing",
    "</w>",
    "a</w>b",
    "<0x41>",
    "▁",
    "▁▁a",
    "a▁b",
    "[UNK]",
    "[MASK] me",
    "a [SEP]b",
    "<s>",
    "a<s>b",
    "a </s> b",
    "</s></s>",
    "<|endoftext|>",
    "a photo of <|startoftext|> b",
    "<|eot_id|>",
    "<|begin_of_text|>Hi<|eot_id|>",
    "<|reserved_special_token_7|> x",
    "supercalifragilisticexpialidocious",
    "a" * 50,
    "b" * 101,
    "c" * 100 + " d",
    " " * 50,
    "\n" * 30,
    "é" * 20,
    "The quick brown fox jumps over the lazy dog.",
]
CORPUS = STRINGS + [
    f"{a} {s} {c} {o} at the {r} {k}"
    for a in ("a", "one", "the")
    for s in ("small", "large")
    for c in ("red", "blue", "green")
    for o in ("circle", "square", "ring", "triangle")
    for r in ("top", "middle")
    for k in ("left", "center", "right")
]


def save(name: str, files: dict, reference: str, **notes) -> None:
    """A case: its files (text, bytes or JSON) by path, and case.json."""
    folder = GOLDEN / name
    case = {"case": name, "reference": reference, "tolerance": "exact", **notes,
            "made_by": "tests/benchmarks/make_tokenizer_golden.py"}
    for path, content in {**files, "case.json": case}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, (str, bytes)):
            rows = isinstance(content, dict) and "case" not in content and "rows" in content
            content = (
                '{"rows": [\n'
                + ",\n".join(json.dumps(r, ensure_ascii=True) for r in content["rows"])
                + "\n]}\n"
                if rows
                else json.dumps(content, ensure_ascii=True, indent=None if "model" in content else 2) + "\n"
            )
        (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)
    print(name, sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()), "bytes")


def version(*libraries) -> str:
    return ", ".join(f"{m.__name__} {m.__version__}" for m in libraries)


def plain(t: Tokenizer) -> Tokenizer:
    """The same without any special token: what a text is that nobody may put special tokens into."""
    data = json.loads(t.to_str())
    data["added_tokens"], data["post_processor"] = [], None
    return Tokenizer.from_str(json.dumps(data))


def rows(t: Tokenizer, decode, strings=STRINGS) -> dict:
    bare = plain(t)
    return {
        "rows": [
            {
                "text": s,
                "ids": (ids := t.encode(s, add_special_tokens=False).ids),
                "plain_ids": bare.encode(s, add_special_tokens=False).ids,
                "decoded": decode(ids),
            }
            for s in strings
        ]
    }


def wordpiece() -> None:
    trained = transformers.BertTokenizer(
        vocab={t: i for i, t in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
    ).backend_tokenizer
    trained.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(
            vocab_size=500,
            show_progress=False,
            limit_alphabet=150,
            special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        ),
    )
    vocab = trained.get_vocab()
    bert = transformers.BertTokenizer(vocab=dict(sorted(vocab.items(), key=lambda item: item[1])))
    bert.add_special_tokens({"bos_token": "[DEC]"})                             # as BLIP-2 does
    text = "".join(t + "\n" for t in sorted(vocab, key=vocab.get))
    save(
        "wordpiece-bert-style",
        {
            "old/vocab.txt": text,
            "old/added_tokens.json": {"[DEC]": len(vocab)},
            "old/special_tokens_map.json": {"bos_token": "[DEC]"},
            "new/tokenizer.json": json.loads(bert.backend_tokenizer.to_str()),
            "new/tokenizer_config.json": {"bos_token": "[DEC]", "cls_token": "[CLS]"},
            "expected.json": rows(
                bert.backend_tokenizer,
                lambda ids: bert.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True),
            ),
        },
        f"BertTokenizer of {version(transformers, tokenizers)}",
        dec=len(vocab),
        notes="decoded: special tokens skipped, blanks before punctuation removed "
        "(clean_up_tokenization_spaces)",
    )


def clip() -> None:
    t = transformers.CLIPTokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    t.train_from_iterator(CORPUS, trainer)
    model = json.loads(t.to_str())["model"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [
        *letters,
        *(c + "</w>" for c in letters),
        *dict.fromkeys("".join(m) for m in model["merges"]),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    clip = transformers.CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in model["merges"]])
    merges = "#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in model["merges"])
    save(
        "clip-bpe-style",
        {
            "old/vocab.json": json.dumps(vocab) + "\n",
            "old/merges.txt": merges,
            "new/tokenizer.json": json.loads(clip.backend_tokenizer.to_str()),
            "new/tokenizer_config.json": {
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
            },
            "expected.json": rows(
                clip.backend_tokenizer, lambda ids: clip.decode(ids, skip_special_tokens=True)
            ),
        },
        f"CLIPTokenizer of {version(transformers, tokenizers)}",
        notes="the openai/CLIP repository also runs ftfy over the text; this library does not",
    )


def llama3() -> None:
    split = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    t = Tokenizer(models.BPE(ignore_merges=True))
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    vocab = t.get_vocab()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte = {
        **{chr(b): b for b in printable},
        **{chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)},
    }
    ranks = {bytes(byte[c] for c in token): i for token, i in sorted(vocab.items(), key=lambda item: item[1])}
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *(f"<|reserved_special_token_{n}|>" for n in range(4)),
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_4|>",
        "<|eot_id|>",
        *(f"<|reserved_special_token_{n}|>" for n in range(5, 251)),
    ]
    t.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in special])
    expected = rows(t, lambda ids: t.decode(ids, skip_special_tokens=True))
    second = tiktoken.Encoding(
        "llama3",
        pat_str=split,
        mergeable_ranks=ranks,
        special_tokens={s: len(ranks) + n for n, s in enumerate(special)},
    )
    for row in expected["rows"]:  # two libraries, one answer
        assert (
            second.encode(row["text"], allowed_special="all") == row["ids"]
            and second.encode_ordinary(row["text"]) == row["plain_ids"]
        )
    save(
        "llama3-tiktoken-style",
        {
            "old/tokenizer.model": b"".join(
                base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()
            ),
            "new/tokenizer.json": json.loads(t.to_str()),
            "new/tokenizer_config.json": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
            "expected.json": expected,
        },
        f"{version(tokenizers, tiktoken)}, which agree on every row",
        notes="tokenizer.model is the form of Meta's release: one token in base64 and its rank a line",
    )


def metaspace() -> None:
    """The newer form of a SentencePiece vocabulary in tokenizer.json, on the vocabulary of
    sentencepiece-llama-style."""
    data = json.loads((GOLDEN / "sentencepiece-llama-style" / "tokenizer.json").read_text(encoding="utf-8"))
    legacy = Tokenizer.from_str(json.dumps(data))
    found = []
    for scheme in ("legacy", "first", "always", "never"):
        if scheme != "legacy":
            data["normalizer"], data["pre_tokenizer"] = (
                None,
                {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
            )
        t = legacy if scheme == "legacy" else Tokenizer.from_str(json.dumps(data))
        found += [
            {"scheme": scheme, "text": s, "ids": t.encode(s, add_special_tokens=False).ids} for s in STRINGS
        ]
    save(
        "sentencepiece-metaspace",
        {"expected.json": {"rows": found}},
        version(tokenizers),
        notes="scheme legacy: tokenizer.json of sentencepiece-llama-style as it is; else its normalizer is "
        "null and its pre_tokenizer "
        "Metaspace with this prepend_scheme and split false. Special tokens in the text are recognised.",
    )


CONVERSATIONS = [
    ["<image>\nWhat is this?", "A cat."],
    ["<image>\nWhat is in the picture?", "Two dogs.", "Are they big?", "No, small ones!\nVery small."],
    ["What is this? <image>", "It's a red circle."],
    ["Hello!", " Hi there. "],
    ["1 + 1 = ?", "2", "And 2 + 2?", "4", "Thanks", "###"],
]
SYSTEM = "Answer briefly."


def chat(sources: Path) -> None:
    llama = json.loads((sources / "llama" / "tokenizer.json").read_text(encoding="utf-8"))
    library, texts = Tokenizer.from_str(json.dumps(llama)), set()

    class Legacy:
        """LlamaTokenizer(legacy=True) as LLaVA calls it: bos in front, </s> and <s> recognised, a blank
        before every text."""

        bos_token_id, pad_token_id, model_max_length, legacy = 1, 0, 2048, True

        def __call__(self, text, **_):
            texts.update(text.replace("<s>", "</s>").split("</s>"))
            return types.SimpleNamespace(input_ids=library.encode(text, add_special_tokens=True).ids)

    sys.path.insert(0, str(sources / "llava"))
    package = types.ModuleType("llava")
    package.__path__ = [str(sources / "llava" / "llava")]
    sys.modules["llava"] = package  # without its __init__, which imports every model
    import llava.constants as constants
    import llava.conversation as conversation

    names = dict(
        vars(constants),
        torch=torch,
        transformers=transformers,
        tokenizers=tokenizers,
        copy=copy,
        conversation_lib=conversation,
        IS_TOKENIZER_GREATER_THAN_0_14=True,
        Sequence=list,
        Dict=dict,
    )
    for file in ("mm_utils.py", "train/train.py"):
        tree = ast.parse((sources / "llava" / "llava" / file).read_text())
        tree.body = [
            n
            for n in tree.body
            if isinstance(n, ast.FunctionDef)
            and (
                n.name.startswith("preprocess")
                or n.name in ("tokenizer_image_token", "_mask_targets", "_add_speaker_and_signal")
            )
        ]
        for f in tree.body:
            f.returns, f.args = (
                None,
                ast.parse(
                    "def f("
                    + ", ".join(
                        a.arg + (f"={ast.unparse(d)}" if d is not None else "")
                        for a, d in zip(
                            f.args.args, [None] * (len(f.args.args) - len(f.args.defaults)) + f.args.defaults
                        )
                    )
                    + "): 0"
                )
                .body[0]
                .args,
            )
        exec(compile(tree, file, "exec"), names)
    found = []
    for template, theirs in (
        ("vicuna", "vicuna_v1"),
        ("llava_v1", "llava_v1"),
        ("llava_v0", "llava_v0"),
        ("llama2", "llava_llama_2"),
        ("plain", "plain"),
    ):
        conversation.default_conversation = style = conversation.conv_templates[theirs]
        for turns in (
            CONVERSATIONS if template != "plain" else [["<image>", "a cat"], ["<image>", "two red dogs"]]
        ):
            system = [{"role": "system", "content": style.system}] if template == "llama2" else []
            messages = system + [
                {"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(turns)
            ]
            if template == "llama2" and any(
                t != t.strip() for t in turns
            ):  # Meta's own code strips, LLaVA's does not
                continue
            source = [{"from": ("human", "gpt")[n % 2], "value": t} for n, t in enumerate(turns)]
            result = names["preprocess"]([source], Legacy(), has_image=True)
            ids, labels = result["input_ids"][0].tolist(), result["labels"][0].tolist()
            found.append(
                {"template": template, "answer": False, "messages": messages, "ids": ids, "labels": labels}
            )
            if template != "plain":
                c = style.copy()
                for n, t in enumerate(turns[:-1]):
                    c.append_message(c.roles[n % 2], t)
                c.append_message(c.roles[1], None)
                text = (
                    {} if template == "llama2" else {"text": c.get_prompt()}
                )  # LLaVA's lacks the first <s>: its tokenizer adds it
                found.append({"template": template, "answer": True, "messages": messages[:-1], **text,
                              "ids": names["tokenizer_image_token"](c.get_prompt(), Legacy())})
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)      # as the library renders
    for template, bos, eos in (("llama2", "<s>", "</s>"), ("llama3", "<|begin_of_text|>", "<|end_of_text|>")):
        form = environment.from_string((sources / f"{template}.jinja").read_text())
        for system in ([], [{"role": "system", "content": SYSTEM}]):
            for turns in CONVERSATIONS:
                messages = system + [
                    {"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(turns[:-1])
                ]
                found.append(
                    {
                        "template": template,
                        "answer": True,
                        "messages": messages,
                        "text": form.render(messages=messages, bos_token=bos, eos_token=eos),
                    }
                )
    written = {"▁" + t.replace(" ", "▁") for t in texts}
    vocab = {
        t: i for t, i in llama["model"]["vocab"].items() if i < 259 or any(t in text for text in written)
    }
    pairs = [m if isinstance(m, list) else m.split(" ") for m in llama["model"]["merges"]]
    llama["model"]["vocab"], llama["model"]["merges"] = (
        vocab,
        [m for m in pairs if {m[0], m[1], m[0] + m[1]} <= vocab.keys()],
    )
    cut = Tokenizer.from_str(json.dumps(llama))
    assert all(cut.encode(t).ids == library.encode(t).ids for t in texts)
    save(
        "chat-templates",
        {
            "llama-cut/tokenizer.json": llama,
            "llama-cut/tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"},
            "expected.json": {"rows": found},
        },
        f"llava-torch 1.2.2.post1 (train.preprocess, conversation.get_prompt) on {version(tokenizers)}; "
        f"{version(jinja2)} for llama2 and llama3",
        notes="llama-cut: the pieces of LLaMA-1's vocabulary that can occur in these texts, with their own "
        "ids. ids: -200 for a picture; "
        "labels: -100 where nothing is learned. Rows with labels are training documents, the others prompts.",
    )


if __name__ == "__main__":
    wordpiece()
    clip()
    llama3()
    metaspace()
    if len(sys.argv) > 1:
        chat(Path(sys.argv[1]))
