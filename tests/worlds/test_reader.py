"""The text of recipe lm-reader: every answer is true of its own scene, in every form; what the gate asks was
never trained on."""
from __future__ import annotations

import re

import numpy as np

import train
from data import COLORS, NUMBERS, PLACES, SHAPES, Shapes, Thing
from model import IGNORE, IMAGE
from support.formats.files import read_json
from support.worlds import reader
from support.worlds.reader import MADE_UP, ReaderText, made_up_words, measure_reader
from support.worlds.steps import ShapesSteps, ShapesStepsAnswers, two_step_question
from support.worlds.text import EMPTY, shapes_tokenizer

TOKENIZER = shapes_tokenizer()
SCENE = re.compile(r"(?:(\w+ \w+): an? )?(?:an? )?(small|large) (\w+) (\w+)(?: (?:at|in) the (\w+ \w+)| "
                   r"((?:top|middle|bottom) (?:left|center|right)))?(?:; )?")


def read_scene(text: str) -> list[Thing]:
    """The things of a scene in words, in any style."""
    things = []
    for before, size, color, shape, behind, terse in SCENE.findall(text):
        things.append(Thing(color, shape, size, PLACES.index(before or behind or terse)))
    return things


def blocks(text: str, bags: list[list[int]]):
    """(things, [(question, answer), …]) of the scenes of a document."""
    words = {i: w for w, i in ReaderText(TOKENIZER).word.items()}
    for part in text.split("¶"):
        scene, *asked = part.split("\nQuestion: ")
        if "▢" in scene:
            own, bags = bags[:scene.count("▢")], bags[scene.count("▢"):]
            named = [[words[i] for i in bag if i != EMPTY] for bag in own]
            things = [Thing(c, s, z, PLACES.index(f"{r} {k}")) for z, c, s, r, k in
                      dict.fromkeys(tuple(w) for w in named if len(w) == 5)]
        else:
            things = read_scene(scene.split("\nCaption")[0])
        yield things, [re.split(r"[?.] Answer:|(?=\?\nContext)", q, maxsplit=1) for q in asked]


def truth(question: str, things: list[Thing]) -> str | None:
    """The world's own questions, answered by looking."""
    words = question.rstrip("?").split()
    if question.startswith("is there"):
        return "yes" if any(t.pair == tuple(words[-2:]) for t in things) else "no"
    if question.startswith("how many"):
        kind = words[2]
        found = [t for t in things if kind in ("objects", t.color, f"{t.shape}s", f"{t.shape}es")]
        return NUMBERS[len(found)]
    if question.startswith("where is"):
        return next(t.place for t in things if t.pair == tuple(words[-2:]))
    if question.startswith("what color is the object at"):
        return next(t.color for t in things if t.place == " ".join(words[-2:]))
    if question.startswith("what color is"):
        return next(t.color for t in things if t.shape == words[-1])
    if question.startswith("what shape is at"):
        return next(t.shape for t in things if t.place == " ".join(words[-2:]))
    return next(t.shape for t in things if t.color == words[-2])


def documents(form: str, count: int):
    """(text, bags): a picture's positions as ▢, the end of an answer as ¶ where a scene follows."""
    text = ReaderText(TOKENIZER)
    for i in range(count):
        found = getattr(text, f"{form}_document")(np.random.default_rng((7, i)))
        d, bags = found if isinstance(found, tuple) else (found, [])
        assert d.tokens.count(IMAGE) == len(bags)
        words = "".join("▢" if t == IMAGE else "¶" if t == TOKENIZER.eos else TOKENIZER.decode([t])
                        for t in d.tokens[1:])
        yield words.replace("¶\n", "\n").rstrip("¶"), bags, d


def test_a_question_of_a_page_is_about_the_scene_before_it():
    asked = 0
    for text, bags, _ in documents("pages", 60):
        scenes = [*blocks(text, bags)]
        assert 2 <= len(scenes) <= 9
        for things, questions in scenes:
            for question, answer in questions:
                assert answer.split("\n")[0].strip() == truth(question, things), (question, things)
                asked += 1
    assert asked > 200


def test_every_thing_is_asked_for_where_places_stand_before_things():
    for text, bags, _ in documents("places", 30):
        [(things, questions)] = blocks(text, bags)
        asked = [q.split("\nCaption")[0] for q, _ in questions]
        assert sum(q.startswith("what color is the object at") for q in asked) == len(things)
        for question, answer in questions:
            assert answer.split("\n")[0].strip() == truth(question, things), (question, things)


def fits(question: str, said: str, things: list[Thing], word: str, value: str) -> bool:
    """Whether an answer is right, if `word` means `value`."""
    plural = f"{value}es" if value == "cross" else f"{value}s"
    question = re.sub(rf"\b{word}\b", value, re.sub(rf"\b{word}s\b", plural, question))
    try:
        right = truth(question, things)
    except StopIteration:                               # it asks about what is not there
        return False
    return said == (word if right == value else right)


def test_a_made_up_word_means_one_thing_and_the_first_example_is_not_learned():
    asking = 0
    for text, bags, d in documents("word", 60):
        [word] = {w for w in re.findall(r"\b[a-z]{3}\b", re.sub(r"▢|¶", " ", text)) if w in MADE_UP}
        assert word in made_up_words(held_out=False)
        told = [(question, answer.strip(), things) for things, questions in blocks(text, bags)
                for question, answer in questions]
        meanings = [value for value in (*COLORS, *SHAPES)
                    if all(fits(question, said, things, word, value) for question, said, things in told)]
        assert len(meanings) == 1, (word, told)
        asking += sum(word in question for question, *_ in told)
        end = d.tokens.index(TOKENIZER.eos)             # of the first answer: to stop is learned
        assert {*d.labels[:end]} == {IGNORE} and d.labels[end] == TOKENIZER.eos
        assert sum(label != IGNORE for label in d.labels[end + 1:]) >= 2 * (len(told) - 1)
    assert asking > 10


def test_the_right_letter_and_true_and_false_sentences():
    for text, bags, _ in documents("choices", 40):
        for things, questions in blocks(text, bags):
            for question, said in questions:
                question, hint, options = re.match(r"(.*?)\?\nContext: (.*?)\nOptions: (.*)\nAnswer",
                                                   f"{question}{said}", re.S).groups()
                letter = re.search(r"The answer is ([A-D])\.", said)[1]
                choices = dict(re.findall(r"\((\w)\) ([\w ]+?)(?= \(|$)", options))
                assert choices[letter] == truth(question, things) and hint in ("N/A", choices[letter])
    for text, _, _ in documents("letters", 20):
        asked = re.findall(r"letter is (.*?)\?\nContext: N/A\nOptions: (.*?)\nAnswer: The answer is (.)\.",
                           text)
        assert asked and all(f"({letter}) {answer}" in options for answer, options, letter in asked)
    for text, bags, _ in documents("yes_no", 40):
        for things, questions in blocks(text, bags):
            said = [answer.split("\n")[0].strip() for _, answer in questions]
            assert said.count("yes") == said.count("no") > 0
            for question, answer in questions:
                sentence = question.split("? Please")[0]
                if sentence.startswith("is there"):
                    assert truth(sentence, things) == answer.split("\n")[0].strip()


def test_two_steps_are_counted_by_looking():
    kinds = set()
    for i in range(300):
        rng = np.random.default_rng(i)
        things = Shapes("all").scene(rng)
        q = two_step_question(things, rng)
        if q is None:
            continue
        direction, name = re.search(r"(left of|right of|above|below) the (.*)\?", q.question).groups()
        [t] = [t for t in things if name in (t.shape, f"{t.color} {t.shape}", f"{t.color} object")]
        row, column = divmod(t.cell, 3)
        side = {"left of": lambda r, c: c < column, "right of": lambda r, c: c > column,
                "above": lambda r, c: r < row, "below": lambda r, c: r > row}[direction]
        found = [o for o in things if side(*divmod(o.cell, 3))]
        place, each = q.solution.split(f"; {direction} it ")
        assert place == f"the {name} is at the {t.place}"
        yes = [o for o in things if f"{o.color} {o.shape} {o.place} yes" in each.split(", ")]
        assert each.count(", ") == len(things) - 1 == each.count("yes") + each.count("no") - 1
        if q.question.startswith("how many"):
            assert q.answer == NUMBERS[len(found)] and yes == found
        else:
            near = [o for o in found if abs(o.cell // 3 - row) + abs(o.cell % 3 - column) == 1]
            assert len(yes) == 1 and yes[0] in near and q.answer == yes[0].color
        kinds.add((q.question.split()[0], direction))
    assert len(kinds) == 8


def test_pictures_are_asked_in_two_steps_before_the_answer_or_behind_it():
    asked = 0
    for i in range(40):
        first, after, plain = (kind("test").item(i, turns) for kind, turns in (
            (ShapesSteps, 2), (ShapesStepsAnswers, 2), (ShapesSteps, None)))
        assert (first.image == Shapes("test").item(i).image).all()
        for q, r in zip(first.qas, after.qas, strict=True):
            steps, answer = q.answer.split(": ")
            assert q.solution == steps and r.answer == f"{answer}: {steps}" and answer == q.answers[0]
            assert all(place in PLACES for place in re.findall(r"(\w+ \w+) (?:yes|no)", steps))
            asked += 1
        assert all(q.answer == q.answers[0] for q in plain.qas)
    assert asked > 60


def test_every_form_is_drawn_as_often_as_its_stage_says():
    text = ReaderText(TOKENIZER)
    for until, shares in reader.STAGES:
        assert abs(sum(shares.values()) - 1) < 1e-9
        assert all(hasattr(text, f"{form}_document") for form in {*shares} - {"scene"})
    drawn = [text.document(i, 0.42)[0] for i in range(300)]
    letters = sum("which letter is" in TOKENIZER.decode(d.tokens) for d in drawn)
    assert abs(letters / 300 - 0.25) < 0.08                 # three standard errors


def test_what_the_gate_asks_is_new_and_a_reader_who_knows_passes_it():
    trained = set(made_up_words(held_out=False))
    assert not trained & set(made_up_words(held_out=True)) and 4 * len(MADE_UP) // 5 == len(trained)
    asked = []

    def knows(decoder, documents, tokenizer, longest):
        """Reads the last scene and answers by looking, where it is one of the world's own questions."""
        said = []
        for d in documents:
            text = "".join("¶" if t == tokenizer.eos else tokenizer.decode([t]) for t in d.tokens[1:])
            scene, question = text.split("¶")[-1].rsplit("\nQuestion: ", 1)
            things = read_scene(scene)
            asked.append(question)
            try:
                said.append(truth(question.split("? ")[0], things))
            except (StopIteration, IndexError, ValueError):
                said.append("?")
        return said

    found = measure_reader(None, TOKENIZER, knows, 12)
    assert found["0 shots"] == found["page"] == found["4 shots"] == found["8 shots"] == 1
    assert found.keys() > reader.GATE.keys() and found["letters"] == 0
    nobody = measure_reader(None, TOKENIZER, lambda d, documents, *_: ["?"] * len(documents), 12)
    assert set(nobody.values()) == {0}


def test_a_run_reads_on_and_prints_the_gate(tmp_path, capsys):
    flags = ["--recipe", "lm-reader", "--batch", "2", "--steps", "1", "--eval-items", "4", "--device", "cpu"]
    train.main([*flags, "--threads", "1", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "made-up word" in said and "scenes, position" in said and "4 shots against 0" in said
    assert read_json(tmp_path / "decoder/reading.json").keys() == {"scenes", "reader"}
