"""Write tests/golden/chat-published: conversations as transformers renders published kinds of chat templates.

    python tests/benchmarks/make_chat_golden.py            (needs transformers, tokenizers and jinja2)

The vocabulary is the 256 bytes and each family's special tokens, so an id is a byte or a token. The
templates of families.json are written for this case, after the published ones: what they do with roles,
blanks, dates and tools is theirs. {% generation %} marks what is an answer, for transformers' mask.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from support.formats.tokenizers import byte_letters                             # noqa: E402

OUT = ROOT / "tests" / "golden" / "chat-published"


def byte_tokenizer(family: dict):
    t = Tokenizer(models.BPE(vocab={letter: b for b, letter in byte_letters().items()}, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens([AddedToken(text, special=True, normalized=False, rstrip=text in family["rstrip"])
                          for text in family["special"]])
    settings = {key: family[key] for key in ("bos_token", "eos_token", "chat_template")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, **settings)


def render(theirs, messages: list[dict], answer: bool) -> dict:
    """{"ids", "learned"} of a conversation, or {"refused"}.

    Here what a user types is no special token; the reference is given other words in its place.
    """
    typed, other = "<|im_end|>", "<|im=end|>"
    safe = [{**m, "content": m["content"].replace(typed, other)} for m in messages]
    try:
        out = theirs.apply_chat_template(safe, add_generation_prompt=answer, return_dict=True,
                                         return_assistant_tokens_mask=True)
    except Exception as e:                  # the template's own words
        return {"refused": str(e)}
    ids = out["input_ids"]
    for at in range(len(ids) - len(other)):
        if ids[at:at + len(other)] == [*other.encode()]:
            ids[at:at + len(other)] = typed.encode()
    return {"ids": ids, "learned": out["assistant_masks"]}


def main() -> None:
    given, families = json.loads((OUT / "families.json").read_text(encoding="utf-8")), []
    for family in given["families"]:
        theirs = byte_tokenizer(family)
        families.append({"name": family["name"],
                         "rows": [render(theirs, **conversation) for conversation in given["conversations"]]})
    (OUT / "expected.json").write_text(json.dumps({"families": families}, ensure_ascii=False) + "\n")
    (OUT / "case.json").write_text(json.dumps({
        "case": "chat-published", "tolerance": "exact",
        "reference": f"transformers {transformers.__version__}: apply_chat_template with "
                     f"return_assistant_tokens_mask, on tokenizers {tokenizers.__version__}",
        "notes": "families.json goes in. learned: 1 where transformers' mask has an assistant's token.",
        "made_by": "tests/benchmarks/make_chat_golden.py"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
