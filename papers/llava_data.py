"""papers/llava_data.py: LLaVA's data generation: a picture as text, prompts for its teacher.

Paper     Visual Instruction Tuning, 2304.08485v2, §3 and Table 1: a language model that cannot see (the
          teacher) reads a picture's captions and boxes, and writes instructions about it, of three kinds.
Here      The wording of the prompts and of their example is ours. An open chat model, or rules for the world
          `shapes` (support/worlds/teacher.py), takes the place of GPT-4. A prompt holds one example.
Chapters  1 a picture as text · 2 the form of a reply · 3 prompts · 4 asking a decoder
Run       python data.py generate shapes out/instruct 1000
"""
from __future__ import annotations

import re

import torch

from data import Document, collate

SHARES = {"conversation": 58, "detail": 23, "reasoning": 77}    # thousands of samples in LLaVA-Instruct-158K

# ---- 1. A picture as text --------------------------------------------------------------------------------


def symbolic_context(captions, boxes=()) -> str:
    """A picture as text (Table 1): its captions, one a line, an empty line, `category: [x1, y1, x2, y2]`.

    boxes: (category, (left, top, right, bottom)), in 0 … 1 of the picture's width and height.
    """
    texts = [" ".join(c.replace("<image>", " ").split()) for c in captions]
    places = [f"{category}: [{', '.join(f'{x:.3f}' for x in box)}]" for category, box in boxes]
    return "\n\n".join("\n".join(part) for part in (texts, places) if part)


# ---- 2. The form of a reply ------------------------------------------------------------------------------

TURN_TEXT = "((?:(?!===|Question:|Answer:).)+)"
TURN = re.compile(rf"Question:{TURN_TEXT}===\s*Answer:{TURN_TEXT}(?:===\s*|$)", re.S)


def write_turns(turns: list[tuple[str, str]]) -> str:
    """Questions and answers in the form that a teacher's reply must have."""
    return "\n===\n".join(f"Question:\n{q}\n===\nAnswer:\n{a}" for q, a in turns)


def read_turns(reply: str, kind: str, question: str = "") -> list[tuple[str, str]]:
    """The questions and answers of a reply; a description is the answer to `question`.

    A ValueError for a reply of another form, or for a copy of the example.
    """
    reply = reply.strip()
    turns = [(q.strip(), a.strip()) for q, a in TURN.findall(reply)]
    if kind == "detail":
        turns = [] if re.search("===|Question:|Answer:", reply) else [(question, reply)]
    elif TURN.sub("", reply) or kind == "reasoning" and len(turns) > 1:
        turns = []
    copied = reply == TEACHER_PROMPTS[kind][1]          # small models copy the example
    if not turns or not all(map(all, turns)) or "<image>" in reply or copied:
        problem = f"{reply!r:.60} is no {kind} as asked for" if reply else "the reply did not come to its end"
        raise ValueError(problem)
    return turns


# ---- 3. Prompts ------------------------------------------------------------------------------------------

TEACHER_RULES = ("You cannot see the picture. You read what people wrote about it, and for each thing in it "
                 "the box [left, top, right, bottom] in parts of its width and height. Write as if you saw "
                 "it: never mention a text or a box. ")
REPLY_FORM = ' Write "Question:", the question, "===", "Answer:" and the answer, each on a line of its own{}.'
EXAMPLE = symbolic_context(
    ["A woman in a yellow raincoat walks two dogs along the beach.",
     "Two dogs pull a woman over the wet sand.",
     "Somebody in a bright coat with two dogs beside a grey sea."],
    [("person", (0.48, 0.21, 0.62, 0.85)),
     ("dog", (0.15, 0.64, 0.30, 0.86)), ("dog", (0.31, 0.66, 0.44, 0.85)),
     ("boat", (0.80, 0.18, 0.93, 0.24))])
TEACHER_PROMPTS = {                 # kind: the rules, and a reply to EXAMPLE that follows them
    "conversation": (
        TEACHER_RULES + "Write a conversation about it. A person asks what is there, how many, of what "
        "color, doing what, where, and where in relation to what; an assistant answers. Ask only "
        "what has one certain answer."
        + REPLY_FORM.format(', and "===" before the next question'),
        write_turns([("What is the woman wearing?", "She is wearing a yellow raincoat."),
                     ("How many animals are with her?", "There are two, both of them dogs."),
                     ("Where are the dogs, seen from the woman?", "Both dogs are to the left of her."),
                     ("Is there a boat?",
                      "Yes, there is one in the upper right, above and to the right of her.")])),
    "detail": (
        TEACHER_RULES + "Answer the last line with a paragraph that describes the picture: every thing, "
        "how many there are, what they look like and do, where they are and how they stand to "
        "each other. Make nothing up.",
        "A woman in a yellow raincoat is walking along a beach, a little to the right of the middle of "
        "the picture. Two dogs are side by side to the left of her, low in the picture, and pull her over "
        "the wet sand. The sea is grey. In the upper right there is a boat, and it looks small."),
    "reasoning": (
        TEACHER_RULES + "Ask one question about it that takes more than naming what is there: about a "
        "cause, a purpose, a danger, or what would follow from a change. Answer it step by step, "
        "from what is there to the conclusion."
        + REPLY_FORM.format(""),
        write_turns([("What does the picture suggest about the weather?",
                      "The woman wears a raincoat, so it rains, or she expects that it will. The sea is "
                      "grey, as it is under clouds. Nobody else is on the beach, and people stay away "
                      "from it in bad weather. So it is probably a rainy day.")]))}
DESCRIBE = (                        # one of these asks for a description; EXAMPLE has the first
    "Describe the picture in detail.",
    "What can be seen in this picture? Be thorough.",
    "Say in full what you see.",
    "Go through the picture thing by thing.",
    "Tell me all that it shows.",
    "What is in the picture, and where?",
    "Explain this picture to somebody who cannot see it.",
    "Write a detailed description of the scene.")


def teacher_messages(kind: str, context: str, question: str = "") -> list[dict]:
    """The conversation that asks a teacher: the rules, EXAMPLE and its reply, then the picture's context.

    question: what a description answers, "" for the other kinds. The messages are for Document.chat.
    """
    rules, reply = TEACHER_PROMPTS[kind]
    example, picture = f"{EXAMPLE}\n", f"{context}\n"
    if question:
        example, picture = f"{example}\n{DESCRIBE[0]}\n", f"{picture}\n{question}\n"
    return [{"role": "system", "content": rules}, {"role": "user", "content": example},
            {"role": "assistant", "content": reply}, {"role": "user", "content": picture}]


# ---- 4. Asking a decoder ---------------------------------------------------------------------------------



def ask_teacher(decoder, tokenizer, conversations: list[list[dict]], max_new_tokens: int = 512,
                temperature: float = 0.7, generator: torch.Generator | None = None) -> list[str]:
    """A decoder's reply to each conversation, generated as one batch; "" where a reply has no end."""
    tokens, _, mask = collate([Document(tokenizer).chat(messages) for messages in conversations], left=True)
    device, stop = decoder.embed.weight.device, tokenizer.stop
    new = decoder.generate(tokens.to(device), max_new_tokens, temperature, mask=mask.to(device), stop=stop,
                           generator=generator)
    return [tokenizer.answer_text(ids) if not stop or ids[-1] in stop else "" for ids in new.tolist()]
