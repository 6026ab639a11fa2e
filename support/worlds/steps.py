"""worlds/steps.py: questions of two steps, where a thing is and what stands beside it, and the way there."""
from __future__ import annotations

import numpy as np

from data import KINDS, NUMBERS, QA, Thing, choose, unique
from support.worlds.forms import ShapesReasons

WHERE = {                           # direction → whether o stands there of t, and the step to the next cell
    "left of": (lambda t, o: o.cell % 3 < t.cell % 3, -1),
    "right of": (lambda t, o: o.cell % 3 > t.cell % 3, 1),
    "above": (lambda t, o: o.cell // 3 < t.cell // 3, -3),
    "below": (lambda t, o: o.cell // 3 > t.cell // 3, 3)}


def name_thing(things: list[Thing], rng: np.random.Generator) -> tuple[Thing, str] | None:
    """A thing, and words that are true of it alone: its shape, its pair or its colour."""
    forms = {"{0.shape}": lambda o: o.shape, "{0.color} {0.shape}": lambda o: o.pair,
             "{0.color} object": lambda o: o.color}
    form = str(choose([*forms], rng))
    t = choose(unique(things, things, forms[form]), rng)
    return t and (t, form.format(t))


def two_step_question(things: list[Thing], rng: np.random.Generator) -> QA | None:
    """Where a thing is, then what stands beside it; `solution` says where, and asks each thing of the scene:

    how many things are left of the ring?  the ring is at the top right; left of it red cross top left yes, …
    which color is the thing below the red cross?  the red cross is at the top left; below it red cross top …
    """
    named, direction = name_thing(things, rng), str(choose([*WHERE], rng))
    if named is None:
        return None
    (t, words), (there, step) = named, WHERE[direction]
    if rng.random() < 0.5:
        found = [o for o in things if there(t, o)]
        question, answer = f"how many things are {direction} the {words}?", NUMBERS[len(found)]
    else:
        found = [o for o in things if o.cell == t.cell + step and there(t, o)]
        if not found:
            return None
        question, answer = f"which color is the thing {direction} the {words}?", found[0].color
    each = ", ".join(f"{o.color} {o.shape} {o.place} {'yes' if o in found else 'no'}" for o in things)
    solution = f"the {words} is at the {t.place}; {direction} it {each}"
    return QA("two steps", question, answer, solution=solution)


class ShapesSteps(ShapesReasons):
    """Pictures with questions of two steps; for training each step, then the answer."""
    name = "shapes-steps"

    def questions(self, things: list[Thing], rng: np.random.Generator, kinds=KINDS) -> list[QA]:
        things = sorted(things, key=lambda t: t.cell)
        return [q for _ in kinds if (q := two_step_question(things, rng))]


class ShapesStepsAnswers(ShapesSteps):
    """The answer at once, then each step."""
    name, reasons = "shapes-steps-answers", "behind"
