"""formats/benchmarks.py: how benchmarks read answers, score them, and want predictions written.

chapters: METEOR and SPICE through the official Java programs · ScienceQA · MME (its tasks: MME in
datasets.py) · postprocess_answer, what each paper cuts off a generated answer · save_predictions, the
official files. Sources: pycocoevalcap 1.2, lupantech/ScienceQA at 2cbf831, haotian-liu/LLaVA at c121f04,
MME's evaluation tool at dd29509, salesforce/LAVIS at 506965b, open_flamingo at 655f693. BLEU, ROUGE-L, CIDEr
and VQA accuracy: eval.py.
"""
from __future__ import annotations

import collections
import importlib
import random
import re
import shutil
import subprocess
from pathlib import Path

from data import QA
from papers.bounds import nearest
from support.formats.datasets import MME
from support.formats.files import UserError, atomically, write_json


def mean(values: list) -> float:
    return sum(values) / len(values)


def java_scorer(name: str, candidates: list[str], references: list[list[str]]) -> tuple[float, list]:
    """The scores of pycocoevalcap's scorer of this name (corpus, images), which runs the official Java
    program."""
    try:
        scorer = getattr(importlib.import_module(f"pycocoevalcap.{name}.{name}"), name.capitalize())
    except ImportError:
        raise UserError(f"{name.upper()} needs Java and the package pycocoevalcap (pip install "
                        "pycocoevalcap); BLEU, ROUGE-L and CIDEr need neither.") from None
    if shutil.which("java") is None:
        raise UserError(f'{name.upper()} is a Java program, and no "java" is on the PATH; install a Java '
                        "runtime.")
    try:
        return scorer().compute_score(dict(enumerate(references)), {i: [c] for i, c in enumerate(candidates)})
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        raise UserError(f"{name.upper()}: pycocoevalcap failed to run its Java program ({e}); METEOR takes "
                        f"2 GB of memory, SPICE 8 GB and, the first time, a download of CoreNLP 3.6.0."
                        ) from None


def meteor(candidates: list[str], references: list[list[str]]) -> tuple[float, list]:
    """METEOR 1.5 (Denkowski & Lavie, W14-3348): words matched exactly, by stem, synonym or paraphrase, and
    their order.

    (M1)  P, R = matches (exact 1, stem 0.6, synonym 0.8, paraphrase 0.6) / words of candidate, of reference;
          a content word counts 0.75, a function word 0.25
    (M2)  F = P · R / (0.85 · P + 0.15 · R)
    (M3)  METEOR = F · (1 − 0.6 · (chunks / matched words)^0.2),  of the best reference

    The corpus sums matches and chunks before (M1): not the mean of the images. WordNet and the paraphrases
    (62 MB) live in the official program, so we call it instead of writing another.
    """
    return java_scorer("meteor", candidates, references)


def spice(candidates: list[str], references: list[list[str]]) -> tuple[float, list]:
    """SPICE (Anderson et al., 1607.08822): F1 of scene graphs, which CoreNLP parses; mean over images."""
    total, images = java_scorer("spice", candidates, references)
    return float(total), [float(image["All"]["f"]) for image in images]


def scienceqa_text(q: QA, form: str = "QCM-LEA") -> tuple[str, str]:
    """(prompt, answer) of a multiple-choice question, worded as ScienceQA and LLaVA do:

        Question: …\\nContext: …\\nOptions: (A) … (B) …\\nAnswer:     lecture solution The answer is B.

    form: the parts of the prompt (Q question, C context, M choices), a hyphen, the parts of the answer
    (A letter, L lecture, E solution), in order. "QCM-LEA" is LLaVA's reasoning first, "QCM-ALE" its answer
    first, "QCM-A" the letter alone. Double blanks are halved once, as in the published code. The published
    "AL" and "AE" swap lecture and solution; these do not. "QCM-LEPA" sets the letter apart, for LLaVA's
    answer prompter: LECTURE: …\\nSOLUTION: …\\n###\\nANSWER: B.
    """
    if not re.fullmatch("[QCMLE]+-([ALE]+|LEPA)", form):
        raise UserError(f'--form "{form}": write the parts of the prompt (of QCM), a hyphen and the parts of '
                        'the answer (of ALE), such as QCM-LEA; or QCM-LEPA.')
    prompt_parts, answer_parts = form.split("-")
    letters = [chr(ord("A") + i) for i in range(len(q.choices))]
    part = {"Q": f"Question: {q.question}",
            "C": f"Context: {q.hint.strip() or 'N/A'}",
            "M": "Options: " + " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, q.choices)),
            "A": f"The answer is {letters[q.correct]}." + " BECAUSE:" * (answer_parts[0] == "A"),
            "L": q.lecture,
            "E": q.solution}
    prompt = "\n".join(part[p] for p in prompt_parts)
    if answer_parts == "LEPA":
        reasons = {"LECTURE": q.lecture, "SOLUTION": q.solution}
        answer = "".join(f"{name}: {text}\n" for name, text in reasons.items() if text.strip())
        answer += f"###\nANSWER: {letters[q.correct]}."
    else:
        answer = " ".join(["Answer:", *(part[p] for p in answer_parts)])
    prompt, answer = (text.replace("  ", " ").rstrip() for text in (prompt, answer))
    return prompt + "\nAnswer:", answer.removesuffix("BECAUSE:").rstrip().removeprefix("Answer: ")


def scienceqa_choice(text: str, choices: int, direct: bool = True, guess: random.Random | None = None) -> int:
    """Index of the choice that an answer names; −1 (never right) if it names none, several, or one past the
    last.

        "B"   "B. because …"   "Because … The answer is B."  →  1           "(B)"  "B."  "b"  " B"  →  −1

    direct=True is LLaVA's reading. ScienceQA's own code knows the sentence only (direct=False) and, where
    that fails, guesses: pass a random.Random, whose draws are those of the official code's generator.
    """
    letter = direct and (re.fullmatch("[A-E]", text) or re.match(r"[A-E](?=\. )", text))
    stated = re.findall(r"The answer is ([A-Z]).", text)         # sic: any character may follow, but one must
    named = letter[0] if letter else stated[0] if len(stated) == 1 else ""
    index = ord(named) - ord("A") if named else choices
    return index if index < choices else guess.randrange(choices) if guess else -1


def scienceqa_accuracy(problems: dict[str, dict], picked: dict[str, int]) -> dict[str, float]:
    """ScienceQA accuracy, 0 … 1, per column of the papers' tables (Lu et al., 2209.09513): subject, context,
    grade.

    problems: records of problems.json of the evaluated split (test: 4,241); picked: problem id → index of the
    choice. No prediction is a wrong one. TXT (has a hint) and IMG (has a picture) overlap, NO has neither; a
    column without problems is left out. LLaVA's "IMG-Accuracy" skips missing predictions: it is IMG of the
    problems that have one.
    """
    right: dict[str, list[bool]] = {}
    for pid, p in problems.items():
        grade = int(p["grade"].removeprefix("grade"))
        columns = [p["subject"][:3].upper(), "G1-6" if grade <= 6 else "G7-12", "Avg"]
        columns += [name for name, content in (("TXT", p["hint"]), ("IMG", p["image"])) if content] or ["NO"]
        for column in columns:
            right.setdefault(column, []).append(picked.get(pid, -1) == p["answer"])
    return {c: mean(right[c]) for c in "NAT SOC LAN TXT IMG NO G1-6 G7-12 Avg".split() if c in right}


def yes_no(response: str) -> str:
    """MME's reading of a response: its first four characters decide (know → no, eyes → yes, "I say no" →
    other)."""
    start = response.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_tasks(rows: list[tuple]) -> dict[str, list[tuple]]:
    """Rows (task, image, question, Yes | No, response) by task; the two questions about a picture follow each
    other."""
    tasks: dict[str, list[tuple]] = {}
    for task, *line in rows:
        tasks.setdefault(task, []).append(tuple(line))
    for task, lines in tasks.items():
        known = MME["perception"] + MME["cognition"]
        if task not in known:
            raise UserError(f'"{task}" is no task of MME; {nearest(task, known)}')
        for n in range(0, len(lines), 2):
            images = [image for image, *_ in lines[n:n + 2]]
            if len(images) < 2 or images[0] != images[1]:
                raise UserError(f"MME task {task}, rows {n + 1} and {n + 2}: pictures "
                                f"{' and '.join(images)}, but each pair of rows must ask about one picture; "
                                "keep the data set's order.")
    return tasks


def mme_scores(rows: list[tuple]) -> dict:
    """MME (Fu et al., 2306.13394): {task: {"acc", "acc+", "score"}, "perception": 0 … 2000, "cognition": 0 …
    800}.

    rows: (task, image, question, Yes | No, response), two rows per picture.

    (E1)  acc  = questions answered right / questions           anything but yes or no is wrong
    (E2)  acc+ = pictures with both answers right / pictures    chance is 1/4
    (E3)  score of a task = 100 acc + 100 acc+;  perception, cognition: sums over their 10 and 4 tasks

    A sum is left out while one of its tasks is missing.
    """
    result = {}
    for task, lines in mme_tasks(rows).items():
        right = [yes_no(response) == truth.lower() for _, _, truth, response in lines]
        acc, both = mean(right), mean([a and b for a, b in zip(right[::2], right[1::2])])       # (E1), (E2)
        result[task] = {"acc": acc, "acc+": both, "score": 100 * acc + 100 * both}              # (E3)
    sums = {group: sum(result[task]["score"] for task in tasks)
            for group, tasks in MME.items() if set(tasks) <= set(result)}
    return result | sums


# Protocol: (pattern before whose first match the answer ends, pattern that is deleted from what is left).
OUTER_BLANKS = r"\A\s+|\s+\Z"                                  # at the start or at the end
ANSWER_ENDS = {
    "mapl": (r"\.", OUTER_BLANKS),                          # the token "." stops; the published code keeps it
    "flamingo": (r"<EOC>|<\|endofchunk\|>", OUTER_BLANKS),
    "openflamingo-vqa": ("Question|Answer|Short|, ", ""),       # blanks stay: the metric strips them
    "openflamingo-caption": ("Output", '"'),
    "llava": ("</s>|###", OUTER_BLANKS),                    # separators of its conversation formats v1 and v0
    "blip2": ("\n", OUTER_BLANKS),                              # OPT's stop token in LAVIS
}


def postprocess_answer(protocol: str, text: str) -> str:
    """The answer or caption within what a model wrote, by the rule of one paper in ANSWER_ENDS.

        openflamingo-vqa:  "two, three Question: what"  →  "two"

    Left out, because it takes spaCy or WordNet: for OK-VQA, BLIP-2 lemmatises the answer and OpenFlamingo
    stems it, so their OK-VQA scores do not compare with (V1) of these answers.
    """
    if protocol not in ANSWER_ENDS:
        raise UserError(f'no rule to postprocess answers is called "{protocol}"; '
                        f'{nearest(protocol, ANSWER_ENDS)}')
    end, deleted = ANSWER_ENDS[protocol]
    return re.sub(deleted, "", re.split(end, text, maxsplit=1)[0])


# Benchmark: (name of the id, name of the text) in its file of predictions.
RESULT_KEYS = {"vqav2": ("question_id", "answer"), "okvqa": ("question_id", "answer"),
               "textvqa": ("question_id", "answer"), "vizwiz": ("image", "answer"),
               "coco": ("image_id", "caption"), "textcaps": ("image_id", "caption")}


def save_predictions(kind: str, rows: list[tuple], path: str | Path) -> None:
    """Predictions in the form that the benchmark's own evaluation reads; written atomically.

    kind           a row                                       the file
    vqav2, okvqa,  (question id, answer)                       [{"question_id": 9000, "answer": "yes"}, …]
    textvqa
    vizwiz         (image name, answer)                        [{"image": "V_val_1.jpg", "answer": "yes"}, …]
    coco           (image id, caption)                         [{"image_id": 9, "caption": "a box"}, …]
    textcaps       (image id, caption)                         [{"image_id": "0a1b", "caption": "a box"}, …]
    scienceqa      (problem id, index of the choice, text)     {"results": {"4": 0}, "outputs": {"4": "A. …"}}
    mme            (task, image, question, Yes | No, response) a folder: TASK.txt, a line per question, tabs

    The VQA evaluation wants every question of the split. A tab or line break inside a field of MME's becomes
    a blank, one for one, so that no reading of yes or no changes.
    """
    if kind == "mme":
        for task, lines in mme_tasks(rows).items():
            with atomically(Path(path) / f"{task}.txt") as tmp:
                text = ["\t".join(re.sub(r"[\t\r\n]", " ", field) for field in line) + "\n" for line in lines]
                tmp.write_text("".join(text), encoding="utf-8")
        return
    known = [*RESULT_KEYS, "scienceqa", "mme"]
    if kind not in known:
        raise UserError(f'no benchmark is called "{kind}"; {nearest(kind, known)}')
    twice = [i for i, n in collections.Counter(str(row[0]) for row in rows).items() if n > 1]
    if twice:
        raise UserError(f'{path}: more than one {kind} prediction for "{twice[0]}"; give one per question or '
                        "picture.")
    if kind == "scienceqa":
        write_json(path, {"results": {i: choice for i, choice, _ in rows},
                          "outputs": {i: text for i, _, text in rows}})
    else:
        id_key, text_key = RESULT_KEYS[kind]
        numbers = kind != "textcaps"            # whose ids are hexadecimal, some of them without a letter
        write_json(path, [{id_key: int(i) if numbers and str(i).isdecimal() else i, text_key: text}
                          for i, text in rows])
