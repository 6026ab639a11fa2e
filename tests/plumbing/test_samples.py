"""The page of a run says what results.json says, and needs nothing beside itself."""
from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import eval as evaluation
import train
from support.plumbing.samples import write_samples_page

RUN = ["--steps", "4", "--batch", "8", "--dtype", "float32", "--log-every", "1", "--samples", "0"]


class Page(HTMLParser):
    """Every tag that opens is closed by its own name; `texts` holds what stands in which tag."""
    EMPTY = ("meta", "img")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in self.EMPTY else [tag]
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        for tag in self.open:
            self.texts[tag][-1] += text

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(samples: list, file: Path) -> Page:
    write_samples_page(file, "a <b>run</b> & its page", samples, "the $table <i>")
    return Page(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train.main(["--bridge", "mlp", "--eval-items", "24", "--out", str(out), *RUN])
    return out


def test_the_page_marks_exactly_as_many_answers_right_as_results_json_counts(run):
    page = Page((run / "samples.html").read_text(encoding="utf-8"))
    results = json.loads((run / "results.json").read_text())
    row, world = results["rows"][0], data.Shapes("test")
    questions = {f"{q.question} {item.id}": q for item in map(world.item, range(24)) for q in item.qas}
    hits: dict[str, list] = {}
    for article in "".join(page.texts["main"]).split("test-")[1:]:
        assert "reference: " in article and "our caption: " in article
        number, *_ = article.split()
        for line in article.splitlines():
            verdict, _, text = line.strip().partition(" ")
            if verdict in ("right", "WRONG"):
                q = questions[f"{text.split('?')[0]}? test-{number}"]
                right = verdict == "right"
                assert text == f"{q.question} {q.answer}" if right else text.endswith(f" (it is {q.answer})")
                hits.setdefault(q.kind, []).append(right)
    assert set(hits) == set(data.KINDS)
    assert {k: np.mean(v) for k, v in hits.items()} == {k: row[k] for k in hits}
    classes, right = [li["class"] for li in page.all("li")], sum(map(sum, hits.values()))
    assert len(page.all("article")) == results["items"] == 24
    assert classes.count("right") == right and classes.count("wrong") == 96 - right
    assert f"{right} of 96 answers are right" in page.texts["p"][0]
    # the word says what the colour says
    assert [b == "right" for b in page.texts["b"]] == [c == "right" for c in classes]


def test_the_page_needs_no_other_file_and_no_script_and_holds_the_pictures_bit_for_bit(run):
    text = (run / "samples.html").read_text(encoding="utf-8")
    page, world = Page(text), data.Shapes("test")
    assert not any(page.all(tag) for tag in ("script", "link", "a")) and "http" not in text
    for n, img in enumerate(page.all("img")):
        head, _, code = img["src"].partition(",")
        picture = Image.open(io.BytesIO(base64.b64decode(code, validate=True)))
        assert head == "data:image/png;base64" and img["class"] == "zoom4"
        assert img["width"] == str(4 * picture.width)
        np.testing.assert_array_equal(np.asarray(picture), world.item(n).image)
    assert n == 23


def test_the_page_escapes_text_and_marks_partly_right_answers_and_a_large_picture_comes_down(tmp_path):
    wicked = '<script>alert("1")</script> & $title'
    q = data.QA("other", wicked, wicked, [wicked] * 2 + ["no"] * 8)             # two of ten: 0.6 officially
    item = data.Item(np.full((300, 800, 3), 7, np.uint8), [wicked], [q], wicked)
    verdicts = [evaluation.judge_answer(q, a) for a in (wicked, "no", "<")]
    page = page_of([(item, wicked, verdicts)], tmp_path / "samples.html")
    assert not page.all("script")
    assert page.texts["title"] == ["a <b>run</b> & its page"] and page.texts["pre"] == ["the $table <i>"]
    assert page.texts["h2"] == [wicked]
    assert page.texts["p"][1:] == [f"reference: {wicked}", f"our caption: {wicked}"]
    assert page.texts["li"] == [f"partly 0.6 {wicked} {wicked} (it is {wicked})", f"right {wicked} no",
                                f"WRONG {wicked} < (it is {wicked})"]
    assert [li["class"] for li in page.all("li")] == ["partly", "right", "wrong"]
    assert page.all("img")[0]["class"] == "zoom1" and page.all("img")[0]["width"] == "384"
    bare = page_of([(item, None, [])], tmp_path / "bare.html")                  # neither caption nor question
    assert bare.texts["p"] == ["1 held-out pictures."] and "li" not in bare.texts


def test_the_page_shows_as_many_pictures_as_asked_for_and_24_at_least(monkeypatch, tmp_path):
    counts = []
    monkeypatch.setattr("eval.write_samples_page", lambda file, title, samples,
                        text, split: counts.append(len(samples)))
    items = [data.Shapes("test").item(i) for i in range(30)]
    answers = {"answers": [q.answer for item in items for q in item.qas]}
    monkeypatch.setattr("eval.table_rows", lambda *a, **_: ([{"row": "x, held-out"}], items, answers))
    monkeypatch.setattr("eval.baseline_rows", lambda *a: [])
    (tmp_path / "config.json").write_text("{}")
    vlm = type("VLM", (), {"bridge": type("B", (), {"name": "mlp"})})
    for samples in (0, 26, 99):
        evaluation.report_run(vlm, None, [data.Shapes("val")], tmp_path, 30, samples, "QCM-LEA")
    assert counts == [24, 26, 30]
