"""formats/rows.py: a Record of one row of the hub's picture + text layout: a dict of fields.

    captions        caption, captions, text, sentences …: a text or a list; also caption_0, caption_1 …
    a question      question, with answer, answers (texts, or {"answer": …}) or multiple_choice_answer;
                    choices or options, with the index, the letter or the text of the right one as answer
    a conversation  conversations, messages (LLaVA's or OpenAI's keys), or texts: [{"user", "assistant"}, …]
"""
from __future__ import annotations

import string

from support.formats.datasets import read_turns
from support.formats.records import Record, checked_text, same_id

CAPTIONS = ("caption", "captions", "text", "sentences", "sentences_raw", "alt_text",
            *(f"caption_{n}" for n in range(10)))
CONVERSATIONS = ("conversations", "conversation", "messages", "texts")
TEXTS = (*CAPTIONS, *CONVERSATIONS, "question")         # one of these must be there
NO_TEXT = "it has no text"
IDS = ("question_id", "id", "image_id", "img_id", "filename", "file_name", "key")
FIELDS = (*TEXTS, *IDS, "answer", "answers", "multiple_choice_answer", "choices", "options", "hint",
          "lecture", "solution", "subject", "category", "answer_type")


def row_record(row: dict, name: str, images: list[str], split: str = "train") -> Record:
    """The Record of a row; a ValueError says why there is none. name: its id where the row has no own.

    A conversation places all of its images; captions and a question are about the first one alone.
    """
    row = {key.lower(): value for key, value in row.items() if value is not None}
    own = next((row[key] for key in IDS if isinstance(row.get(key), (str, int))), name)
    said = next((row[key] for key in CONVERSATIONS if row.get(key)), None)
    if said is not None:
        return Record(own, images, split, turns=conversation(said, len(images)))
    captions = [text for key in CAPTIONS if key in row for text in as_texts(row[key])]
    question = checked_text(row.get("question", ""))
    if not captions and not question:
        raise ValueError(NO_TEXT)
    return Record(own, images[:1], split, captions, **question_fields(row, question) if question else {})


def as_texts(value) -> list[str]:
    """A text, or the texts of a list; an entry may be {"raw": …} or {"answer": …}."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    return [e.get("raw", e.get("answer", e.get("caption"))) if isinstance(e, dict) else e for e in entries]


def question_fields(row: dict, question: str) -> dict:
    """Question, answers and choices, as Record calls them."""
    answer = row.get("answers") or row.get("answer", row.get("multiple_choice_answer", []))
    choices = row.get("choices") or row.get("options") or []
    more = {key: checked_text(row[key]) for key in ("hint", "lecture", "solution") if key in row}
    kind = next((row[key] for key in ("answer_type", "subject", "category") if key in row), "")
    fields = dict(question=question, kind=kind if isinstance(kind, str) else "", more=more)
    if not isinstance(choices, (list, tuple)) or not choices:
        if "multiple_choice_answer" in row:
            more["most_common"] = checked_text(row["multiple_choice_answer"])
        return fields | dict(answers=as_texts(answer))
    return fields | dict(choices=choices, answer=choice_index(answer, choices))


def choice_index(answer, choices: list[str]) -> int:
    """The index of the right choice, which is given as that, as its text or as its letter."""
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and answer.strip("(). ").upper() in [*string.ascii_uppercase[:len(choices)]]:
        return string.ascii_uppercase.index(answer.strip("(). ").upper())
    return same_id(answer)


def conversation(said: list, images: int) -> tuple[tuple[str, str], ...]:
    """Turns of any of the keys; pictures that no turn places stand in front of the first question."""
    turns = []
    for turn in said:
        if isinstance(turn, dict) and "user" in turn:
            turns += [{"from": "human", "value": turn["user"]}, {"from": "gpt", "value": turn["assistant"]}]
        else:
            turns.append(turn)
    turns = read_turns(turns)
    if images and not any("<image>" in text for _, text in turns):
        n = next(n for n, (speaker, _) in enumerate(turns) if speaker == "human")
        placed = ("human", "<image>\n" * images + turns[n][1])
        turns = (*turns[:n], placed, *turns[n + 1:])
    return turns
