"""What a run leaves can be looked at: a page of answers that says what results.json says, and curves where matplotlib is installed."""

import base64
import contextlib
import io
import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import data
from support.plumbing.curves import draw_curves
from support.plumbing.log import read_log
from support.plumbing.samples import write_samples_page
import eval as evaluation
import train
from support.formats.files import UserError

RUN = ["--steps", "4", "--batch", "8", "--dtype", "float32", "--log-every", "1", "--samples", "0"]


class Page(HTMLParser):
    """Every tag that opens is closed by its own name; what stands in which tag."""
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


def page_of(told: list, file) -> Page:
    write_samples_page(file, "a <b>run</b> & its page", told, "the $table <i>")
    return Page(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as errors:
        patch.setitem(sys.modules, "matplotlib", None)
        train.main(["--bridge", "mlp", "--eval-items", "24", "--out", str(out), *RUN])
    return out, errors.getvalue()


def test_the_page_marks_exactly_as_many_answers_right_as_results_json_counts(run):
    page = Page((run[0] / "samples.html").read_text(encoding="utf-8"))
    results = json.loads((run[0] / "results.json").read_text())
    row, world = results["rows"][0], data.Shapes("test")
    questions = {f"{q.question} {item.id}": q for item in map(world.item, range(24)) for q in item.qas}
    hits: dict[str, list] = {}
    for article in "".join(page.texts["main"]).split("test-")[1:]:
        assert "reference: " in article and "our caption: " in article
        number, *_ = article.split()
        for line in article.splitlines():
            word, _, said = line.strip().partition(" ")
            if word in ("right", "WRONG"):
                q = questions[f"{said.split('?')[0]}? test-{number}"]
                assert (
                    said == f"{q.question} {q.answer}"
                    if word == "right"
                    else said.endswith(f" (it is {q.answer})")
                )
                hits.setdefault(q.kind, []).append(word == "right")
    assert {k: np.mean(v) for k, v in hits.items()} == {k: row[k] for k in hits} and set(hits) == set(
        data.KINDS
    )
    classes, right = [li["class"] for li in page.all("li")], sum(map(sum, hits.values()))
    assert (
        len(page.all("article")) == results["items"] == 24
        and classes.count("right") == right
        and classes.count("wrong") == 96 - right
    )
    assert f"{right} of 96 answers are right" in page.texts["p"][0]
    assert [b == "right" for b in page.texts["b"]] == [
        c == "right" for c in classes
    ]  # the word says what the colour says


def test_the_page_needs_no_other_file_and_no_script_and_holds_the_pictures_bit_for_bit(run):
    page, world = Page((run[0] / "samples.html").read_text(encoding="utf-8")), data.Shapes("test")
    assert (
        not page.all("script")
        and not page.all("link")
        and not page.all("a")
        and "http" not in (run[0] / "samples.html").read_text()
    )
    for n, img in enumerate(page.all("img")):
        head, _, code = img["src"].partition(",")
        picture = Image.open(io.BytesIO(base64.b64decode(code, validate=True)))
        assert (
            head == "data:image/png;base64"
            and img["class"] == "zoom4"
            and img["width"] == str(4 * picture.width)
        )
        np.testing.assert_array_equal(np.asarray(picture), world.item(n).image)
    assert n == 23


def test_the_page_escapes_text_and_marks_partly_right_answers_and_a_large_picture_comes_down(tmp_path):
    wicked = '<script>alert("1")</script> & $title'
    q = data.QA("other", wicked, wicked, [wicked] * 2 + ["no"] * 8)  # two of ten: 0.6 by the official rule
    item = data.Item(np.full((300, 800, 3), 7, np.uint8), [wicked], [q], wicked)
    page = page_of(
        [(item, wicked, [evaluation.judge_answer(q, a) for a in (wicked, "no", "<")])],
        tmp_path / "samples.html",
    )
    assert (
        not page.all("script")
        and page.texts["title"] == ["a <b>run</b> & its page"]
        and page.texts["pre"] == ["the $table <i>"]
    )
    assert page.texts["h2"] == [wicked] and page.texts["p"][1:] == [
        f"reference: {wicked}",
        f"our caption: {wicked}",
    ]
    assert page.texts["li"] == [
        f"partly 0.6 {wicked} {wicked} (it is {wicked})",
        f"right {wicked} no",
        f"WRONG {wicked} < (it is {wicked})",
    ]
    assert [li["class"] for li in page.all("li")] == ["partly", "right", "wrong"]
    assert page.all("img")[0]["class"] == "zoom1" and page.all("img")[0]["width"] == "384"
    alone = page_of([(item, None, [])], tmp_path / "alone.html")                # neither caption nor question
    assert alone.texts["p"] == ["1 held-out pictures."] and "li" not in alone.texts


def test_the_page_shows_as_many_pictures_as_asked_for_and_24_at_least(monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr("eval.write_samples_page", lambda file, title, told, text: shown.append(len(told)))
    items = [data.Shapes("test").item(i) for i in range(30)]
    answers = {"answers": [q.answer for item in items for q in item.qas]}
    monkeypatch.setattr("eval.table_rows", lambda *a: ([{"row": "x"}], items, answers))
    monkeypatch.setattr("eval.baseline_rows", lambda *a: [])
    (tmp_path / "config.json").write_text("{}")
    vlm = type("VLM", (), {"bridge": type("B", (), {"name": "mlp"})})
    for samples in (0, 26, 99):
        evaluation.report_run(vlm, None, data.Shapes("val"), tmp_path, 30, samples)
    assert shown == [24, 26, 30]


def test_without_matplotlib_a_run_works_says_nothing_and_curves_asked_for_name_the_pip_command(
    run, monkeypatch
):
    out, errors = run
    assert errors == "" and {p.name for p in out.iterdir()} == {
        "bridge.safetensors",
        "config.json",
        "first.png",
        "log.jsonl",
        "results.json",
        "samples.html",
        "state.safetensors",
    }
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        train.main(["--curves", str(out)])


@pytest.mark.parametrize(
    "bridge, options, panels",
    [
        ("mlp", [], 0),
        ("zero_init", [], 1),
        ("zero_init", ["--option", "gate_per=layer"], 1),
        ("flamingo", ["--option", "every=2"], 2),
        ("idefics", ["--option", "vector_gates=true"], 2),
    ],
)
def test_with_matplotlib_a_run_draws_its_curves(bridge, options, panels, tmp_path):
    """And the same file again from the log alone; the log's layers are those that have gates."""
    pytest.importorskip("matplotlib")
    train.main(["--bridge", bridge, *options, "--eval-items", "2", "--out", str(tmp_path), *RUN])
    names = ["loss.png", "gates.png"][:1 + bool(panels)]
    first = {name: np.asarray(Image.open(tmp_path / name)) for name in names}
    assert {p.name for p in tmp_path.glob("*s.png")} == set(names)
    for name in names:
        (tmp_path / name).unlink()
    with pytest.raises(SystemExit):
        train.main(["--curves", str(tmp_path)])
    for name, picture in first.items():
        assert picture.std() > 10                                               # not an empty sheet
        np.testing.assert_array_equal(picture, np.asarray(Image.open(tmp_path / name)))
    if panels:
        last = read_log(tmp_path / "log.jsonl")[-1]
        assert last["layers"] == ([0, 2] if "every=2" in options else [0, 1, 2, 3]) and len(
            last["gates"]
        ) == len(last["layers"])


def test_the_figures_hold_the_numbers_of_the_log(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn, save = {}, figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure,
        "savefig",
        lambda self, *a, **k: drawn.update({len(drawn): self}) or save(self, *a, **k),
    )
    gates = [[[-0.1 * t * (n + 1), 0.2 * t] for n in range(3)] for t in (1, 2)]
    lines = [
        {"step": 0, "blind": 2.5},
        *(
            {"step": t, "loss": 3.0 / t, "ema": 2.9 / t, "lr": 0.1 * t, "gates": g, "layers": [1, 2, 3]}
            for t, g in zip((1, 2), gates)
        ),
        {"step": 2, "color": 0.5},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 3, "lo')
    for bridge in ("zero_init", "flamingo"):
        settings = {"recipe": bridge, "bridge": bridge, "data": "shapes", "batch": 8}
        (tmp_path / "config.json").write_text(json.dumps({"settings": settings}))
        draw_curves(tmp_path)
    for loss in (drawn[0], drawn[2]):
        raw, mean, blind = loss.axes[0].lines
        assert (
            list(raw.get_ydata()) == [3.0, 1.5]
            and list(mean.get_ydata()) == [2.9, 1.45]
            and set(blind.get_ydata()) == {2.5}
        )
        assert (
            list(loss.axes[1].lines[0].get_ydata()) == [0.1, 0.2]
            and raw.get_alpha() < 0.5
            and blind.get_linestyle() == "--"
        )
        assert (
            all(axis.get_ylabel() for axis in loss.axes)
            and "nats" in loss.axes[0].get_ylabel()
            and "step" in loss.axes[1].get_xlabel()
        )
    zero, flamingo = drawn[1], drawn[3]
    np.testing.assert_allclose(
        [x.get_ydata() for x in zero.axes[0].lines], [[0.15, 0.3], [0.2, 0.4], [0.25, 0.5]]
    )  # mean |gate| of two heads
    np.testing.assert_allclose(zero.axes[1].images[0].get_array(), np.abs(gates[1]))
    np.testing.assert_allclose(
        [x.get_ydata() for x in flamingo.axes[0].lines], [[0.1, 0.2], [0.2, 0.4], [0.3, 0.6]]
    )
    np.testing.assert_allclose([x.get_ydata() for x in flamingo.axes[1].lines], [[.2, .4]] * 3)
    assert all(
        [t.get_text() for t in f.legends[0].get_texts()] == ["layer 1", "layer 2", "layer 3"]
        for f in (zero, flamingo)
    )


def test_a_new_run_in_an_old_folder_leaves_nothing_of_the_old_one_to_be_mistaken_for_its_own(tmp_path):
    for name in ("gates.png", "loss.png", "samples.html"):
        (tmp_path / name).write_text("old")
    train.main(["--bridge", "linear", "--eval-items", "2", "--out", str(tmp_path), *RUN])
    assert not (tmp_path / "gates.png").exists() and "old" != (tmp_path / "samples.html").read_text()[:3]
    assert read_log(tmp_path / "log.jsonl")[0].keys() == {"step", "blind"}
    if (tmp_path / "loss.png").exists():
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_a_folder_without_a_run_or_a_log_are_refused_in_one_sentence(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "config.json").write_text('{"settings": {"batch": 8}}')
    with pytest.raises(UserError, match="log.jsonl: no step is logged"):
        train.main(["--curves", str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match='"settings" is missing'):
        train.main(["--curves", str(tmp_path)])
