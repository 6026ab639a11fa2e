"""Write tests/golden/tokenizer-steps: what each step of a tokenizer.json makes of a text, by the library.

    python tests/benchmarks/make_steps_golden.py            (needs tokenizers)

normalizers: [step, [text, …]]; pre_tokenizers: [step, [[piece, …], …]], for the same texts; vocabularies:
files of byte-level BPE, without the bytes, with ids: the sequences of Qwen2, DeepSeek and GPT-2's relatives.
"""
from __future__ import annotations

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

OUT = Path(__file__).parents[1] / "golden" / "tokenizer-steps"
N, P = normalizers, pre_tokenizers
SIGNS = list("aB cé\n\t -_.!?12٣½ⅣｆÀß\u0301\u0345中国ñ\u00a0\u2003\x1c\x85’'sLLª²İΣς\u0903\u20dd한ﬁ…—\r$^`|~+=<>"
             "\x00\u200d\ufffd")
BEHAVIORS = ("removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous")
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")
DEEPSEEK = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
            r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CODE = ["x = 1", "for i in range(10):\n\tprint(i)\n", "12345 apples, 3.14", "a += b;  // c\n\n\n    0",
        "cafe\u0301 naïve", "你好 world 42",
        " Hello  World ", "<think>\nso\n</think>  yes <Tag>x", "def f():\n    return 1",
        "ABC<tag>", "don't"]


def split(expression: str, behavior: str = "isolated", invert: bool = False):
    return P.Split(Regex(expression), behavior, invert)


def byte_level(normalizer, steps: list, added: tuple = ()) -> dict:
    """A trained vocabulary as its file, and the ids and decoded texts of CODE."""
    t = Tokenizer(models.BPE())
    t.normalizer, t.decoder = normalizer, decoders.ByteLevel()
    t.pre_tokenizer = P.Sequence(steps)
    t.train_from_iterator(CODE * 9 + ["y = 22\n\tz == 333"] * 9, trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=P.ByteLevel.alphabet(), show_progress=False))
    t.add_special_tokens(["<|end|>"])
    t.add_tokens([*added])
    encoded = [t.encode(text).ids for text in CODE]
    file = json.loads(t.to_str())
    file["model"]["vocab"] = {piece: i for piece, i in file["model"]["vocab"].items() if len(piece) > 1}
    return {"tokenizer": file, "bytes": "".join(t.id_to_token(i) for i in range(256)), "ids": encoded,
            "decoded": [t.decode(ids) for ids in encoded]}


def main() -> None:
    rng = random.Random(0)
    texts = ["", " ", *("".join(rng.choice(SIGNS) for _ in range(rng.randint(1, 30))) for _ in range(25))]
    normal = [N.NFC(), N.NFD(), N.NFKC(), N.NFKD(), N.Lowercase(), N.StripAccents(), N.Strip(),
              N.Strip(True, False), N.Strip(False, True), N.Prepend("▁"), N.Replace(" ", "▁"),
              N.Replace(Regex(r"\s+"), "_"),
              N.Replace(Regex(r"\s+$"), ""), N.BertNormalizer(), N.BertNormalizer(lowercase=False),
              N.BertNormalizer(strip_accents=False), N.BertNormalizer(strip_accents=True, lowercase=False),
              N.BertNormalizer(clean_text=False, handle_chinese_chars=False),
              N.Sequence([N.NFD(), N.Lowercase(), N.StripAccents(), N.Sequence([N.Strip()])]), N.Sequence([])]
    pre = [P.Digits(True), P.Digits(False), P.Punctuation(), P.Punctuation("contiguous"), P.Whitespace(),
           P.WhitespaceSplit(), P.CharDelimiterSplit("-"), P.BertPreTokenizer()]
    for expression in (r"\s+", r"(?=[A-Z])", r"\w"):
        pre += [split(expression, behavior, invert) for behavior in BEHAVIORS for invert in (False, True)]
    pre += [split(expression) for expression in (r"\p{N}{1,3}", r"[\r\n]", r"\s+$", r"[\w.]+")]
    pre += [P.Split("-", behavior) for behavior in BEHAVIORS]
    pre.append(P.Sequence([split(r"\p{N}{1,3}"), split("[\u4e00-\u9fa5]+"), split(DEEPSEEK)]))
    last = P.ByteLevel(add_prefix_space=False, use_regex=False)
    flags = {"special": False, "normalized": False}
    files = {
        "Qwen2": byte_level(N.NFC(), [split(QWEN2), last]),
        "no normalizers": byte_level(N.Sequence([]), [split(QWEN2), last]),
        "DeepSeek": byte_level(None, [split(r"\p{N}{1,3}"), split("[\u4e00-\u9fa5]+"), split(DEEPSEEK),
                                      last]),
        "lines, words, signs, digits": byte_level(None, [
            split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), P.Digits(individual_digits=True),
            last]),
        "separators removed": byte_level(None, [split(r"\s+", "removed"), last]),
        "digits, then GPT-2's words": byte_level(None, [P.Digits(individual_digits=True),
                                                        P.ByteLevel(add_prefix_space=False)]),
        "a blank in front": byte_level(None, [P.ByteLevel(add_prefix_space=True)]),
        "lower case, stripped": byte_level(N.Sequence([N.NFKC(), N.Lowercase(), N.Strip()]), [
            P.ByteLevel(add_prefix_space=False)]),
        "added words": byte_level(None, [P.ByteLevel(add_prefix_space=False)], (
            AddedToken("<think>", **flags), AddedToken("</think>", rstrip=True, **flags),
            AddedToken("    ", **flags), AddedToken("World", lstrip=True, **flags),
            AddedToken("on", single_word=True, **flags))),
        "added words, normalized": byte_level(N.Lowercase(), [P.ByteLevel(add_prefix_space=False)], (
            AddedToken("<tag>", special=False, normalized=True), AddedToken("ABC", **flags))),
    }
    OUT.mkdir(exist_ok=True)
    (OUT / "expected.json").write_text(json.dumps({
        "texts": texts, "code": CODE,
        "normalizers": [[json.loads(n.__getstate__()), [n.normalize_str(t) for t in texts]] for n in normal],
        "pre_tokenizers": [[json.loads(p.__getstate__()),
                            [[t[a:b] for _, (a, b) in p.pre_tokenize_str(t)] for t in texts]] for p in pre],
        "vocabularies": files}, ensure_ascii=True) + "\n")
    (OUT / "case.json").write_text(json.dumps({
        "case": "tokenizer-steps", "reference": f"tokenizers {tokenizers.__version__}", "tolerance": "exact",
        "made_by": "tests/benchmarks/make_steps_golden.py"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
