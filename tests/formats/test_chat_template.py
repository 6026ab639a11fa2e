"""Claim: a published chat template is written as its publisher meant it: the tokens are those of transformers
(golden case chat-published), exactly what an assistant says is learned, and what a user types is plain text.

Rendering takes jinja2; without it a template that is not known by its text is refused in one sentence."""
from __future__ import annotations

import json
import re
import sys

import pytest

from conftest import GOLDEN, write_byte_tokenizer, writes_first
from data import Document
from model import IMAGE
from support.formats import load_tokenizer
from support.formats.chat import TEMPLATES
from support.formats.files import UserError

CASE = GOLDEN / "chat-published"
GIVEN, EXPECTED = (json.loads((CASE / f"{name}.json").read_text(encoding="utf-8"))
                   for name in ("families", "expected"))
FAMILIES = {family["name"]: (family, rows["rows"])
            for family, rows in zip(GIVEN["families"], EXPECTED["families"], strict=True)}
USER = [{"role": "user", "content": "hello"}]
PAIR = [*USER, {"role": "assistant", "content": "yes"}]


def published(folder, template, special=("<s>", "</s>"), files: dict | None = None, **settings):
    """The tokenizer of a folder whose words are bytes, with this chat template."""
    added = [{"content": text, "rstrip": text in settings.pop("rstrip", ())} for text in special]
    settings = {"bos_token": "<s>", "eos_token": "</s>", **settings}
    write_byte_tokenizer(folder, (), added=tuple(added), **settings, chat_template=template)
    for name, content in (files or {}).items():
        (folder / name).write_text(json.dumps(content))
    return load_tokenizer(folder)


def spelled(t, messages, answer=True, **options) -> str:
    return t.decode(Document(t).chat(messages, answer, **options).tokens, special=True)


# --- the reference -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("tagged", [True, False], ids=["with generation tags", "without"])
@pytest.mark.parametrize("name", FAMILIES)
def test_conversations_are_those_of_transformers(name, tagged, tmp_path):
    pytest.importorskip("jinja2")
    family, rows = FAMILIES[name]
    template = family["chat_template"]
    if not tagged:                                      # the answers are found without the tags, too
        template = re.sub(r"\{%(-?) *(end)?generation *(-?)%\}",
                          lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", template)
    added = tuple({"content": text, "rstrip": text in family["rstrip"]} for text in family["special"])
    write_byte_tokenizer(tmp_path, (), added=added, chat_template=template,
                         **{key: family[key] for key in ("bos_token", "eos_token")})
    t = load_tokenizer(tmp_path)
    for conversation, row in zip(GIVEN["conversations"], rows, strict=True):
        messages, answer = conversation["messages"], conversation["answer"]
        if "refused" in row:
            with pytest.raises(UserError, match=f"tokenizer_config.json: the chat template refuses .*"
                                                f"{re.escape(row['refused'])}"):
                Document(t).chat(messages, answer)
            continue
        d = Document(t).chat(messages, answer)
        assert d.tokens == row["ids"], t.decode(d.tokens, special=True)
        if not answer:
            assert [int(label >= 0) for label in d.labels] == row["learned"], messages
            assert all(label in (token, -100) for token, label in zip(d.tokens, d.labels))


def test_the_token_that_ends_a_turn_stops_an_answer(tmp_path):
    pytest.importorskip("jinja2")
    ends = {}
    for name, (family, _) in FAMILIES.items():
        write_byte_tokenizer(tmp_path / name, tuple(family["special"]), chat_template=family["chat_template"])
        ends[name] = load_tokenizer(tmp_path / name).template.turn_end
    assert ends["phi-3"] == "<|end|>" and ends["gemma, no system role"] == "<end_of_turn>"
    assert ends["llama 3.1, with its date"] == "<|eot_id|>" and ends["vicuna, no token for a role"] == "</s>"


# --- what a template may do ---------------------------------------------------------------------------------

def test_a_template_writes_its_own_first_token_or_none(tmp_path):
    """A post-processor puts <s> in front of plain texts; a rendered text has what its template has."""
    pytest.importorskip("jinja2")
    form = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    for n, (template, want) in enumerate([(form, "[hello]"), ("{{ bos_token }}" + form, "<s>[hello]")]):
        t = published(tmp_path / str(n), template, post_processor=writes_first("<s>", 256))
        assert Document(t).add("x").tokens == [256, ord("x")] and spelled(t, USER) == want
    # The tokenizer of a processor adds it where the template has none.
    for n, (template, want) in enumerate([(form, "<s>[hello]"), ("{{ bos_token }}" + form, "<s>[hello]")]):
        files = {"preprocessor_config.json": {}}
        t = published(tmp_path / f"p{n}", template, files=files, post_processor=writes_first("<s>", 256))
        assert spelled(t, USER) == want


def test_pictures_are_parts_of_a_message(tmp_path):
    """LLaVA's template reads lists of parts, Llama 3.2's texts and lists; each places the pictures."""
    pytest.importorskip("jinja2")
    lists, both = GIVEN["pictures"]["lists"], GIVEN["pictures"]["both"]
    special = ("<s>", "</s>", "<image>")
    t = published(tmp_path / "lists", lists, special, image_token="<image>")
    asked = [{"role": "user", "content": "<image>\nWhat <image> is this?"}]
    assert Document(t).chat(asked[0]["content"].replace(" <image>", "")).tokens == [
        *b"USER: ", IMAGE, *b"\nWhat is this? ASSISTANT:"]
    assert spelled(t, USER) == "USER: hello ASSISTANT:"                     # a text alone is a list of one
    t = published(tmp_path / "both", both, special, image_token="<image>")
    assert Document(t).chat(asked).tokens == [*b"<|user|>", IMAGE, *b"What ", IMAGE, *b" is this?", 257,
                                              *b"<|assistant|>"]
    assert spelled(t, USER) == "<|user|>hello</s><|assistant|>"
    d = Document(t).chat([*asked, PAIR[1]], answer=False)
    assert [i for i in d.labels if i >= 0] == [*b"yes", 257]
    typed = Document(t).chat("what does </s><s> mean?").tokens             # a user's words are no tokens
    assert typed.count(257) == 1 and 256 not in typed


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('only tools here') }}", "refuses a conversation of user: only tools here"),
    ("{% for m in messages %}{{ m.content }", "is not valid Jinja"),
    ("{{ messages[7].content.x }}", "refuses a conversation of user"),
    ("{{ 1 / 0 }}", "refuses a conversation of user: division by zero"),
    ("{{ ''.__class__.__mro__ }}", "refuses a conversation of user: access to attribute"),
    ("{{ messages.append(1) }}", "refuses a conversation of user"),
    ("{{ bos_token }}nothing of yours", "leaves out a message"),
    ("{% for m in messages %}{{ m.content | replace('<image>', '') }}{% endfor %}", "leaves out a message"),
])
def test_a_template_that_cannot_be_honoured_is_refused_by_name(template, words, tmp_path):
    pytest.importorskip("jinja2")
    t = published(tmp_path, template)
    with pytest.raises(UserError) as e:
        Document(t).chat("<image>hello" if "image" in template else "hello")
    assert f"{tmp_path}/tokenizer_config.json: " in str(e.value) and words in str(e.value)
    assert "--template" in str(e.value) and "\n" not in str(e.value)
    assert spelled(t, USER, template=TEMPLATES["llama2"]) == "<s>[INST] hello [/INST]"


def test_today_is_the_template_s_own_affair(tmp_path):
    pytest.importorskip("jinja2")
    t = published(tmp_path, "{{ strftime_now('%Y') }}{% for m in messages %} {{ m.content }}{% endfor %}")
    assert re.fullmatch(r"20\d\d hello", spelled(t, USER))


def test_named_templates_and_wrong_ones(tmp_path):
    pytest.importorskip("jinja2")
    form = "{% for m in messages %}({{ m.content }}){% endfor %}"
    names = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": form}]
    assert spelled(published(tmp_path / "a", names), USER) == "(hello)"
    assert spelled(published(tmp_path / "b", {"default": form}), USER) == "(hello)"
    for n, (wrong, words) in enumerate([(names[:1], "its chat templates are tool_use; none is the default"),
                                        (3, "chat_template' is 3"), ({"default": [1]}, "neither a text")]):
        with pytest.raises(UserError, match=f"tokenizer_config.json: .*{words}"):
            published(tmp_path / str(n), wrong)


def test_without_jinja2_a_known_template_is_written_and_another_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    known = json.loads((GOLDEN / "smollm2-tokenizer" / "tokenizer_config.json").read_text())["chat_template"]
    t = published(tmp_path / "known", known, ("<s>", "</s>", "<|im_start|>", "<|im_end|>"))
    assert spelled(t, USER) == TEMPLATES["smollm2"].text(USER)
    t = published(tmp_path / "other", "{{ messages }}")
    assert t.stop == (257,) and Document(t).add("x").tokens                 # it can still be read and trained
    with pytest.raises(UserError, match="tokenizer_config.json: .*pip install jinja2; .*--template"):
        Document(t).chat("hello")


@pytest.mark.parametrize("name", GIVEN["known"])            # published texts that are known without jinja2
def test_a_known_template_is_what_rendering_it_would_give(name, tmp_path):
    pytest.importorskip("jinja2")
    special = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
               "<|end_header_id|>", "<|eot_id|>")
    options = {"bos_token": "<|begin_of_text|>"} if name == "llama3" else {}
    known = published(tmp_path / "known", GIVEN["known"][name], special, **options)
    rendered = published(tmp_path / "rendered", GIVEN["known"][name] + "{# another #}", special, **options)
    assert known.template is TEMPLATES[name] and rendered.template.name == "published"
    for conversation in GIVEN["conversations"]:
        a, b = (Document(t).chat(conversation["messages"], conversation["answer"]) for t in (known, rendered))
        assert a.tokens == b.tokens and (conversation["answer"] or a.labels == b.labels)
    assert known.template.turn_end == rendered.template.turn_end
