"""formats/chat.py: how each family of models writes a conversation.

Which form a folder's model has (`template_of`): the chat template that the folder publishes, one of TEMPLATES
where its exact text is known, else rendered (chat_template.py). A model that publishes none has no form, but
for the families whose authors wrote theirs in code alone. Nothing is guessed.
"""
from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from support.formats.chat_template import PublishedTemplate
from support.formats.files import UserError, read_json


SPECIAL = r"<\|\w+\|>|</?s>|<image>|<end_of_utterance>|<fake_token_around_image>"


@dataclass(frozen=True)
class Template:
    """How a family writes a conversation: {} is the text of a message, ⟦ ⟧ enclose what is supervised.

    What SPECIAL matches in these strings is a special token. In a message it is plain text, but "<image>" is
    a picture.
    """
    name: str                       # key in TEMPLATES
    system: str
    user: str
    assistant: str                  # a prompt ends where ⟦ begins
    begin: str = ""
    end: str = ""                   # after the last message
    image: str = "<image>"          # how a picture is written
    default: str = ""               # system text of a conversation that has none
    strip: bool = False             # messages lose the blanks around them
    system_in_user: bool = False    # the system text is part of the first message
    caption_only: bool = False      # a training document is a picture and its caption, without the question
    ends_with_eos: bool = False     # a training document ends with the tokenizer's eos
    whole: bool = False             # it writes the first token of a text itself, if the text has one
    prompt: Template | None = None  # prompts are spelled in another way than documents

    @property
    def turn_end(self) -> str | None:
        """The special token that ends an answer; None where only plain text does."""
        learned = self.assistant.partition("⟦")[2]
        return next(iter(re.findall(SPECIAL, learned)), None)

    @property
    def tokens(self) -> list[str]:
        """The special tokens that it writes, but for a picture's."""
        forms = (self.begin, self.system, self.user, self.assistant, self.end)
        return [text for text in re.findall(SPECIAL, " ".join(forms)) if text != "<image>"]

    @property
    def text_end(self) -> str:
        """The plain text that ends an answer where no special token does: "###", or the end of a line."""
        form = (self.prompt or self).assistant
        return "" if self.turn_end else form.partition("{}")[2].removesuffix("⟧")

    def spans(self, messages: str | list[dict], answer: bool = True) -> list[tuple[str, bool, bool]]:
        """(text, learn, special) from left to right; special: the text is a special token or "<image>".

        messages: a question, or turns {"role": system | user | assistant, "content"}. answer=True ends where
        the assistant answers. A UserError for roles in an order that no template can write.
        """
        if answer and self.prompt:
            return self.prompt.spans(messages)
        forms = {"system": self.system, "user": self.user, "assistant": self.assistant}
        spans: list[tuple[str, bool, bool]] = []
        messages = self.with_system([{"role": "user", "content": messages}] if isinstance(messages, str)
                                    else [*messages])

        def put(text: str, learn: bool, special: bool) -> None:
            if spans and not special and spans[-1][1:] == (learn, False):
                spans[-1] = (spans[-1][0] + text, learn, False)     # one text is split into tokens as one
            elif text:
                spans.append((text, learn, special))

        def write(form: str, content: str = "") -> None:
            learn = False
            for n, part in enumerate(re.split(rf"({SPECIAL}|\{{\}}|[⟦⟧])", form)):     # odd parts are matches
                if part in ("⟦", "⟧"):
                    learn = part == "⟦"
                elif part == "{}":
                    for text in re.split("(<image>)", content):
                        if text == "<image>":
                            write(self.image)
                        else:
                            put(text, learn, False)
                else:
                    put(part, learn, n % 2 == 1)

        write(self.begin)
        for m in messages:
            write(forms[m["role"]], m["content"].strip() if self.strip else m["content"])
        write(self.assistant.partition("⟦")[0] if answer else self.end)
        return spans

    def with_system(self, messages: list[dict]) -> list[dict]:
        """The messages, checked, with the default system text where they have none, at its place."""
        roles = [m["role"] for m in messages]
        if not roles or not {*roles} <= {"system", "user", "assistant"} or roles[-1] == "system":
            raise UserError(f"a conversation of {roles} cannot be written: it may begin with a system text, "
                            "then user and assistant take turns.")
        if self.default and roles[0] != "system":
            messages = [{"role": "system", "content": self.default}, *messages]
        if self.system_in_user and messages[0]["role"] == "system":
            text = self.system.replace("{}", messages[0]["content"])
            messages = [{**messages[1], "content": text + messages[1]["content"]}, *messages[2:]]
        return messages

    def text(self, messages: str | list[dict], answer: bool = True) -> str:
        """The same as one string; encode it with special=True only if no user wrote the messages."""
        return "".join(text for text, *_ in self.spans(messages, answer))


POLITE = ("A chat between a curious {0} and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the {0}'s questions.")
VICUNA = Template("vicuna", "{} ", "USER: {} ", "ASSISTANT:⟦ {}</s>⟧", default=POLITE.format("user"))
CHATML = Template("chatml", "<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n",
                  "<|im_start|>assistant\n⟦{}<|im_end|>⟧\n", whole=True)
TEMPLATES = {template.name: template for template in (
    CHATML,
    replace(CHATML, name="smollm2",
            default="You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    replace(CHATML, name="qwen2", default="You are a helpful assistant."),
    Template("llama3",
             "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
             "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
             "<|start_header_id|>assistant<|end_header_id|>\n\n⟦{}<|eot_id|>⟧",
             begin="<|begin_of_text|>", strip=True, whole=True),
    Template("llama2", "<<SYS>>\n{}\n<</SYS>>\n\n", "<s>[INST] {} [/INST]", "⟦ {} </s>⟧", strip=True,
             system_in_user=True, whole=True),
    VICUNA,                                             # LLaVA-1.5, in the authors' code "vicuna_v1"
    replace(VICUNA, name="llava_v1", default=POLITE.format("human")),
    # LLaVA's first release also supervises "###", which stops the answer, and "### Assistant:"
    Template("llava_v0", "{}\n\n", "⟦###⟧ Human: {}\n", "⟦### Assistant: {}\n⟧", end="⟦### ⟧",
             default=POLITE.format("human"),
             prompt=Template("llava_v0", "{}###", "Human: {}###", "Assistant:⟦ {}###⟧",
                             default=POLITE.format("human"))),
    Template("idefics", "{}\n", "User:{}<end_of_utterance>\n", "Assistant:⟦ {}<end_of_utterance>⟧\n",
             image="<fake_token_around_image><image><fake_token_around_image>"),
    # LLaMA-Adapter: the user's message is the full prompt (alpaca_prompt)
    Template("alpaca", "{}\n\n", "{}", "⟦{}⟧", ends_with_eos=True),
    # LLaVA's first stage: <image>, caption, end of line, no eos
    Template("plain", "{}\n", "{}", "⟦{}\n⟧", caption_only=True),
)}


# digest of a published chat template → its form here: what jinja2 would write, without jinja2
KNOWN = {"872be49dbb638044": "smollm2", "153280e3ff55d19d": "chatml", "793202280c0910ab": "qwen2",
         "ba03a121d097859c": "llama3", "e8d5b5a546d3f19d": "llama2"}
# model_type → the form of models whose authors publish none: LLaVA, IDEFICS
BY_MODEL_TYPE = {"llava": "vicuna", "llava_llama": "vicuna", "idefics": "idefics"}


def template_of(folder: Path, settings: dict, tokenizer) -> Template | PublishedTemplate:
    """The chat template of a folder's model; settings: of its tokenizer (tokenizers.Tokenizer)."""
    source, where = read_template(folder, settings)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if source is None:
        name = BY_MODEL_TYPE.get(config.get("model_type"), "plain")
        files = {file.name for file in folder.iterdir()}
        meta = "tokenizer.model" in files and not files & {"tokenizer.json", "tokenizer_config.json"}
        # Meta's own files have no place for a template.
        return TEMPLATES["llama3" if meta and "<|eot_id|>" in tokenizer.special else name]
    known = KNOWN.get(template_digest(source))
    if known:
        make_special(TEMPLATES[known], tokenizer)
        return TEMPLATES[known]
    texts = {i: text for text, i in tokenizer.special.items()}
    variables = {f"{role}_token": texts[i] for role, i in (("bos", tokenizer.bos), ("eos", tokenizer.eos))
                 if i is not None}
    for key, token in settings.items():
        text = token.get("content") if isinstance(token, dict) else token
        if key.endswith("_token") and isinstance(text, str):
            variables.setdefault(key, text)
    files = ("processor_config.json", "preprocessor_config.json")
    processor = any((folder / name).exists() for name in files)
    return PublishedTemplate(source, where, variables, tuple(tokenizer.special), tokenizer.rules,
                             texts.get(tokenizer.image), processor, tuple(tokenizer.words))


def make_special(template: Template, tokenizer) -> None:
    """The tokens that the template writes become special: some folders add them as words of the text."""
    for text in tokenizer.words.keys() & template.tokens:
        tokenizer.special[text] = tokenizer.words.pop(text)


def choose_template(name: str, tokenizer) -> Template:
    """The template of --template NAME; a UserError for a special token of it that the tokenizer lacks."""
    template = TEMPLATES[name]
    make_special(template, tokenizer)
    for text in template.tokens:
        if text not in tokenizer.special:
            raise UserError(f"--template {name} writes {text}, and this model's tokenizer has no such token; "
                            "take another template.")
    return template


def use_template(name: str, tokenizer, trained: bool = False) -> None:
    """From now on the tokenizer writes conversations by --template NAME, and its answers end as there.

    trained: a model has learned it. Only then does a line of "plain" end an answer: it is no chat form, and a
    model that publishes none goes on with the text.
    """
    tokenizer.template = choose_template(name, tokenizer)
    tokenizer.text_end = tokenizer.template.text_end if trained or name != "plain" else ""


def template_digest(source: str) -> str:
    return hashlib.sha256(source.strip().encode()).hexdigest()[:16]


def read_template(folder: Path, settings: dict) -> tuple[str | None, str]:
    """(source, file) of the chat template that a folder publishes, (None, "") without one.

    As in transformers: chat_template.jinja comes first, then the files of a processor, then the tokenizer's
    settings. Of several with names it is the one called "default".
    """
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        try:
            return jinja.read_text(encoding="utf-8"), str(jinja)
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{jinja}: no text in UTF-8 that can be read ({type(e).__name__}).") from None
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        content = settings
        if name != "tokenizer_config.json":
            content = read_json(folder / name) if (folder / name).exists() else {}
        source, where = content.get("chat_template"), str(folder / name)
        if source is None or source == "":
            continue
        if isinstance(source, list):                    # [{"name": …, "template": …}, …]
            source = {entry["name"]: entry["template"] for entry in source}
        if isinstance(source, dict):
            names, source = [*source], source.get("default")
            if source is None:
                raise UserError(f"{where}: its chat templates are {', '.join(names)}; none is the default.")
        if not isinstance(source, str):
            raise UserError(f"{where}: chat_template is neither a text nor a list of texts with names.")
        return source, where
    return None, ""


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Stanford Alpaca's two prompts, which LLaMA-Adapter trains on; the answer follows without a blank."""
    also = ", paired with an input that provides further context" if context else ""
    section = f"### Input:\n{context}\n\n" if context else ""
    return (f"Below is an instruction that describes a task{also}. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{instruction}\n\n{section}### Response:")
