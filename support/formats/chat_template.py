"""formats/chat_template.py: the chat template that a model's folder publishes, as its publisher wrote it.

A chat template is a program in Jinja's language: messages in, one text out. Three things are asked of it that
it does not tell: which parts of the text are a user's words, and so no special tokens whatever they spell;
which parts a model learns to write; which token ends a turn. All three come from a second rendering, with a
mark in place of each message.

    rendered   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
    marked     <|im_start|>user\n⟨0⟩<|im_end|>\n<|im_start|>assistant\n⟨1⟩<|im_end|>\n
    learned                                                            ~~~~~~~~~~~~~

chapters: PublishedTemplate · from a rendered text to spans. Source: transformers 5.24 (apply_chat_template).
"""
from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from support.formats.files import UserError

MARK = "\ue000{}\ue001"                                 # characters for private use
MARKS = re.compile("\ue000(\\d+)\ue001")


def marks_of(message: dict) -> list[str]:
    """The numbers of the marks in a message."""
    return MARKS.findall(json.dumps(message["content"], ensure_ascii=False))


def any_of(texts: set[str]) -> re.Pattern:
    """A regular expression of these texts, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


@dataclass(frozen=True, eq=False)
class PublishedTemplate:
    """A chat template in Jinja's language, and what it needs of the tokenizer; used as a chat.Template.

    source, where   the program, and the file that holds it
    variables       what the program may read beside the messages: bos_token, eos_token, …
    special         texts of the special tokens;  rules: Tokenizer.rules
    image           the token that stands for a picture, if there is one
    processor       the folder is a vision-language model's, whose tokenizer adds `begin` to what has no bos
    words           tokens that were added to the vocabulary and are no special ones
    """
    source: str
    where: str
    variables: dict[str, str]
    special: tuple[str, ...]
    rules: dict[str, frozenset[str]]
    image: str | None = None
    processor: bool = False
    words: tuple[str, ...] = ()
    name = "published"
    caption_only = ends_with_eos = False
    text_end = ""

    # --- rendering ------------------------------------------------------------------------------------------

    @functools.cached_property
    def program(self) -> Callable[..., str]:
        try:
            import jinja2
            import jinja2.sandbox
        except ImportError:
            raise UserError(f"{self.where}: this chat template is none of those that are known here, and to "
                            "render it takes jinja2: pip install jinja2; or choose a known one with "
                            "--template.") from None

        def raise_exception(message: str):
            raise jinja2.TemplateError(message)

        def tojson(value, ensure_ascii=False, **settings) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = tojson
        environment.globals |= {"raise_exception": raise_exception,
                                "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
        # transformers' own blocks {% generation %} … {% endgeneration %} write what is inside.
        source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", self.source)
        source = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)
        try:
            return environment.from_string(source).render
        except jinja2.TemplateError as e:
            raise UserError(f"{self.where}: this chat template is not valid Jinja ({e}); choose a known one "
                            "with --template.") from None

    def render(self, messages: list[dict], answer: bool) -> str:
        """The text of a conversation; answer=True ends where the assistant answers."""
        try:
            return self.program(messages=messages, add_generation_prompt=answer, tools=None, documents=None,
                                **self.variables)
        except UserError:
            raise
        except Exception as e:          # a published program: whatever it raises, the conversation is refused
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(f"{self.where}: the chat template refuses a conversation of {roles}: "
                            f"{e or type(e).__name__}; choose a known one with --template.") from None

    @functools.cached_property
    def reads_lists(self) -> bool:
        """Whether a message's content must be a list of parts: a text alone is not written."""
        try:
            return MARK.format(0) not in self.render([{"role": "user", "content": MARK.format(0)}], True)
        except UserError:
            return True

    @functools.cached_property
    def whole(self) -> bool:
        """Whether it writes the first token of a text itself, if the text has one."""
        bos = self.variables.get("bos_token")
        if not self.processor:
            return True
        return bool(bos) and self.render(self.fill([{"role": "user", "content": "x"}]), True).startswith(bos)

    @functools.cached_property
    def turn_end(self) -> str | None:
        """The token that ends an answer; None where there is none, or nothing to render it with."""
        try:
            text = self.render(self.fill([{"role": "user", "content": MARK.format(0)},
                                          {"role": "assistant", "content": MARK.format(1)}]), False)
        except UserError:
            return None
        names = any_of({*self.special, *self.words})
        after = names.search(text, text.rfind(MARK.format(1)) + len(MARK.format(1)))
        return after and (after[0] or None)

    @functools.cached_property
    def names(self) -> re.Pattern:
        """A regular expression of the special tokens and of a picture."""
        return any_of({*self.special, "<image>"})

    def fill(self, messages: list[dict], pictures: bool = False) -> list[dict]:
        """The messages with contents as the template reads them: texts, or lists of texts and pictures."""
        if not (self.reads_lists or pictures and "image" in self.source):
            return messages
        filled = []
        for m in messages:
            parts = []
            for n, text in enumerate(m["content"].split("<image>")):
                parts += [{"type": "image"}] * (n > 0)
                text = text.strip("\n") if "<image>" in m["content"] else text
                parts += [{"type": "text", "text": text}] * bool(text)
            filled.append({**m, "content": parts})
        return filled

    # --- spans ----------------------------------------------------------------------------------------------

    def spans(self, messages: str | list[dict], answer: bool = True) -> list[tuple[str, bool, bool]]:
        """(text, learn, special) from left to right, as chat.Template.spans.

        Learned is, of each answer, what follows the prompt for it, up to the first special token behind it.
        """
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else [*messages]
        if not messages:
            raise UserError("a conversation without messages cannot be written.")
        pictures = sum(m["content"].count("<image>") for m in messages)
        contents: list[str] = []                        # of the messages, at the places of the marks

        def mark(text: str) -> str:
            contents.append(text)
            return MARK.format(len(contents) - 1)

        def marked_content(text: str) -> str:           # <image> stays, and what is empty stays empty
            return "".join(part if part in ("", "<image>") else mark(part)
                           for part in re.split("(<image>)", text))

        plain, marked = self.fill(messages, pictures > 0), []
        for m in plain:
            if isinstance(m["content"], str):
                content = marked_content(m["content"])
            else:
                content = [{**p, "text": mark(p["text"])} if "text" in p else p for p in m["content"]]
            marked.append({**m, "content": content})
        text = self.render(marked, answer)
        said = {n for m in marked if m["role"] != "system" for n in marks_of(m)}
        if not said <= {*MARKS.findall(text)}:          # some templates leave out a system text
            raise UserError(f"{self.where}: the chat template leaves out a message; choose a known one with "
                            "--template.")
        rendered = self.render(plain, answer)
        try:
            written = self.written_contents(text, rendered, contents)
        except UserError:
            if not answer or any(name in content for content in contents for name in self.special):
                raise
            text, written = rendered, []                # a prompt whose words spell no special token
        learned = [] if answer else self.learned(text, marked)
        spans = self.cut(text, written, learned)
        if sum(special and part == "<image>" for part, _, special in spans) != pictures:
            raise UserError(f"{self.where}: the chat template does not write the {pictures} pictures of a "
                            "conversation, each once; choose a known one with --template.")
        return self.strip_beside_tokens(spans)

    def written_contents(self, marked: str, rendered: str, contents: list[str]) -> list[str]:
        """What the template wrote at each mark of a marked text: the content, or a part of it.

        A template may strip a message, or leave out what an answer thought before "</think>".
        """
        pattern = ""
        for n, part in enumerate(MARKS.split(marked)):  # text, number of a mark, text, …
            if n % 2 == 0:
                pattern += re.escape(part)
                continue
            content = contents[int(part)]
            forms = {form for text in (content, content.split("</think>")[-1])
                     for form in (text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"))}
            pattern += f"({'|'.join(map(re.escape, sorted(forms, key=len, reverse=True)))})"
        match = re.fullmatch(pattern, rendered)
        if match is None:
            raise UserError(f"{self.where}: the chat template rewrites its messages in a way that cannot be "
                            "followed; choose a known one with --template.")
        return [*match.groups()]

    def learned(self, text: str, messages: list[dict]) -> list[tuple[int, int]]:
        """(start, end) in a marked text of what a model learns to write."""
        found = []
        for n, m in enumerate(messages):
            marks = marks_of(m)
            if m["role"] != "assistant" or not marks:
                continue
            start = text.index(MARK.format(marks[0]))
            before = MARKS.split(text[:start])[-1]      # what stands between a message and its answer
            prompt = MARKS.split(self.render(messages[:n], True))[-1] if n else before
            if before.startswith(prompt):
                start += len(prompt) - len(before)
            end = text.index(MARK.format(marks[-1])) + len(MARK.format(marks[-1]))
            after, following = self.names.search(text, end), MARKS.search(text, end)
            if after and not (following and following.start() < after.start()):
                end = after.end()
            found.append((start, end))
        return found

    def cut(self, text: str, written: list[str],
            learned: list[tuple[int, int]]) -> list[tuple[str, bool, bool]]:
        """The spans of a marked text. What the template wrote has special tokens, a content has none."""
        tokens = {m.start(): m for pattern in (MARKS, self.names) for m in pattern.finditer(text)}
        edges = {0, len(text), *(at for m in tokens.values() for at in m.span()),
                 *(at for interval in learned for at in interval)}
        edges, contents = sorted(edges), iter(written)
        spans: list[tuple[str, bool, bool]] = []

        def put(part: str, learn: bool, special: bool) -> None:
            if spans and not special and spans[-1][1:] == (learn, False):
                spans[-1] = (spans[-1][0] + part, learn, False)
            elif part:
                spans.append((part, learn, special))

        for start, end in zip(edges, edges[1:]):
            learn = any(first <= start < last for first, last in learned)
            if start not in tokens:
                put(text[start:end], learn, False)
            elif tokens[start].re is MARKS:
                put(next(contents), learn, False)
            else:
                name = tokens[start][0]
                put("<image>" if name == self.image else name, learn, True)
        return spans

    def strip_beside_tokens(self, spans: list[tuple[str, bool, bool]]) -> list[tuple[str, bool, bool]]:
        """The spans without the blanks that the tokenizer's rules take from beside a special token."""
        def strip(order, side: str, stripped: Callable[[str], str]):
            strips = False
            for text, learn, special in order:
                text = stripped(text) if strips and not special else text
                strips = side in self.rules.get(text, ()) if special else strips and not text
                yield text, learn, special

        spans = [*strip(spans, "rstrip", str.lstrip)]
        spans = [*strip(reversed(spans), "lstrip", str.rstrip)][::-1]
        return [span for span in spans if span[0]]
