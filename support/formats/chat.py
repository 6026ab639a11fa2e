"""formats/chat.py: how each family of models writes a conversation."""
from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from support.formats.files import UserError
from support.formats.tokenizers import Tokenizer


@dataclass(frozen=True)
class Template:
    """How a family writes a conversation: {} is the text of a message, and what the model learns to say stands in ⟦ ⟧.

    <s>, </s> and <|…|> in these strings are special tokens; in a message they are plain text, but "<image>" is a picture.
    """
    system: str
    user: str
    assistant: str                  # a prompt ends where ⟦ begins
    begin: str = ""
    end: str = ""                   # after the last message
    default: str = ""               # system text of a conversation that has none
    mark: str = ""                  # how to know it by a published chat_template, or by a special token
    strip: bool = False             # messages lose the blanks around them
    inside: bool = False            # the system text is part of the first message
    prompt: Template | None = None  # prompts are spelled in another way than documents

    def spans(self, messages: str | list[dict], answer: bool = True) -> list[tuple[str, bool, bool]]:
        """(text, learn, special) from left to right; special: the text is a special token or "<image>".

        messages: a question, or turns {"role": system | user | assistant, "content"}; `answer`: end where the assistant speaks.
        """
        if answer and self.prompt:
            return self.prompt.spans(messages)
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else [*messages]
        forms, spans = {"system": self.system, "user": self.user, "assistant": self.assistant}, []
        wrong = [m["role"] for m in messages if m["role"] not in forms]
        if wrong or not messages or messages[-1]["role"] == "system":
            raise UserError(f"a conversation of {[m['role'] for m in messages]} cannot be written: it may begin with a system "
                            "text, then user and assistant take turns.")
        if self.default and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.default})
        if self.inside and messages[0]["role"] == "system":
            text = self.system.replace("{}", messages.pop(0)["content"])
            messages[0] = {**messages[0], "content": text + messages[0]["content"]}

        def put(text: str, learn: bool, special: int) -> None:
            if spans and not special and spans[-1][1:] == (learn, False):
                spans[-1] = (spans[-1][0] + text, learn, False)                 # one text: it is split into tokens as a whole
            elif text:
                spans.append((text, learn, bool(special)))

        def write(form: str, content: str = "") -> None:
            learn = False
            for n, part in enumerate(re.split(r"(<\|\w+\|>|</?s>|\{\}|[⟦⟧])", form)):   # odd parts are what is looked for
                if part in ("⟦", "⟧"):
                    learn = part == "⟦"
                elif part == "{}":
                    for k, text in enumerate(re.split("(<image>)", content)):
                        put(text, learn, k % 2)
                else:
                    put(part, learn, n % 2)

        write(self.begin)
        for m in messages:
            write(forms[m["role"]], m["content"].strip() if self.strip else m["content"])
        write(self.assistant.partition("⟦")[0] if answer else self.end)
        return spans

    def text(self, messages: str | list[dict], answer: bool = True) -> str:
        """The same as one string; encode it with special=True where nobody else wrote the messages."""
        return "".join(text for text, *_ in self.spans(messages, answer))


POLITE = ("A chat between a curious {0} and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the {0}'s questions.")
VICUNA = Template("{} ", "USER: {} ", "ASSISTANT:⟦ {}</s>⟧", default=POLITE.format("user"), mark="ASSISTANT:")
TEMPLATES = {
    "chatml": Template(                                 # SmolLM2
        "<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n⟦{}<|im_end|>⟧\n",
        default="You are a helpful AI assistant named SmolLM, trained by Hugging Face", mark="<|im_start|>"),
    "llama3": Template(
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦{}<|eot_id|>⟧",
        begin="<|begin_of_text|>", mark="<|start_header_id|>", strip=True),
    "llama2": Template("<<SYS>>\n{}\n<</SYS>>\n\n", "<s>[INST] {} [/INST]", "⟦ {} </s>⟧", mark="<<SYS>>", strip=True,
                       inside=True),
    "vicuna": VICUNA,                                   # LLaVA-1.5, in the authors' code "vicuna_v1"
    "llava_v1": replace(VICUNA, default=POLITE.format("human"), mark=""),
    # LLaVA's first release learns the "###" in front of a turn (it stops the answer before) and "### Assistant:" too
    "llava_v0": Template("{}\n\n", "⟦###⟧ Human: {}\n", "⟦### Assistant: {}\n⟧", end="⟦### ⟧", default=POLITE.format("human"),
                         mark="###Human",
                         prompt=Template("{}###", "Human: {}###", "Assistant:⟦ {}###⟧", default=POLITE.format("human"))),
    "alpaca": Template("{}\n\n", "{}", "⟦{}⟧"),         # LLaMA-Adapter: the whole prompt is the user's (alpaca_prompt); then the eos
    "plain": Template("{}\n", "{}", "⟦{}\n⟧"),           # LLaVA's first stage: <image>, caption, end of line; no eos
}
chatml = TEMPLATES["chatml"].text


def template_of(folder: Path, settings: dict, tokenizer: Tokenizer) -> str:
    """A key of TEMPLATES, by its mark in the published chat_template or, where there is none, among the special tokens."""
    read = lambda name: (folder / name).read_text(encoding="utf-8") if (folder / name).exists() else ""
    chat = json.dumps(settings.get("chat_template") or "").strip('"') + read("chat_template.jinja") + read("chat_template.json")
    if not chat and re.search('"model_type": *"llava', read("config.json")):    # the authors' folders hold no chat_template
        return "vicuna"
    chat = chat or " ".join(tokenizer.special)
    return next((name for name, t in TEMPLATES.items() if t.mark and t.mark in chat), "plain")


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Stanford Alpaca's two templates, which LLaMA-Adapter trains on; the answer follows without a blank."""
    also = ", paired with an input that provides further context" if context else ""
    section = f"### Input:\n{context}\n\n" if context else ""
    return (f"Below is an instruction that describes a task{also}. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{instruction}\n\n{section}### Response:")
