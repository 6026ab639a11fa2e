"""Claim: ptb_tokenize gives the tokens of the Java tokenizer that COCO's caption evaluation calls.

tests/golden/metrics holds made-up captions with what pycocoevalcap 1.2 made of them.
"""
import json
from pathlib import Path

import pytest

from support.formats.ptb import ptb_tokenize

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
TOKENS, CAPTIONS = (json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
                    for name in ("tokenizer", "captions"))
CORPORA = {"all kinds": CAPTIONS, **CAPTIONS["corner_corpora"]}


@pytest.mark.parametrize("group", sorted({group for group, _, _ in TOKENS["cases"]}))
def test_tokens_are_those_of_the_java_tokenizer(group):
    for _, text, tokens in (case for case in TOKENS["cases"] if case[0] == group):
        assert " ".join(ptb_tokenize(text)) == tokens, repr(text)


def test_captions_are_tokenised_as_officially():
    for item in (item for corpus in CORPORA.values() for item in corpus["items"]):
        for text, tokens in zip(
            [item["candidate"], *item["references"]], [item["candidate_tokens"], *item["references_tokens"]]
        ):
            assert " ".join(ptb_tokenize(text)) == tokens, repr(text)
