"""A run is asked in the form that it was trained in; a flag given by hand takes another one."""
from __future__ import annotations

import json

import pytest
from PIL import Image

import data
import eval as evaluation
import support.lab.ask
import support.lab.protocols
import train
from conftest import shapes_vlm
from model import IMAGE
from papers.word import ASK
from support.formats import save_vlm
from support.formats.chat import TEMPLATES, use_template
from support.formats.files import UserError, read_json
from support.formats.vlm import open_run
from support.lab.speakers import Conversation, open_speaker
from support.worlds.text import shapes_tokenizer

RUN = "--bridge linear --steps 1 --batch 2 --threads 1 --device cpu --dtype float32 --log-every 1".split()


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A folder of conversations, each about a picture of its own."""
    folder = tmp_path_factory.mktemp("talks")
    rows = []
    for n in range(6):
        Image.new("RGB", (48, 48), (40 * n, 0, 9)).save(folder / f"{n}.png")
        rows.append({"id": n, "image": f"{n}.png", "conversations": [
            {"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": f"thing {n}"}]})
    (folder / "chat.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def runs(talks):
    """{template: run on the conversations}; "" is the decoder's own. "plain" has trained, for a step."""
    data, vlm = f"llava:{talks}", shapes_vlm("linear")
    for name in ("", "llava_v0", "alpaca"):
        settings = {"settings": {"data": data, "seed": 0, "template": name}}
        save_vlm(vlm, talks / f"run-{name}", settings, vit="weights/vit", decoder="weights/decoder")
    train.main(["--data", data, *RUN, "--template", "plain", "--out", str(talks / "run-plain")])
    return {name: str(talks / f"run-{name}") for name in ("", "plain", "llava_v0", "alpaca")}


def asked(monkeypatch, module):
    """The documents that are written after, as they are spelled."""
    seen, t = [], shapes_tokenizer()

    def spell(tokens: list[int]) -> str:
        return "".join("<image>" if i == IMAGE else t.decode([i], special=True) for i in tokens)

    def generate(model, documents, *_, **__):
        seen.extend(spell(d.tokens) for d in documents)
        return ["red"] * len(documents)

    def write(model, tokens, *_, **__):
        seen.append(spell(tokens[0].tolist()))
        return "red"
    name, stand_in = ("write_answer", write) if module is support.lab.ask else ("generate_texts", generate)
    monkeypatch.setattr(module, name, stand_in)
    return seen


@pytest.mark.parametrize("template, flags, want", [
    ("", [], "<image>\nwhat?"),
    ("plain", [], "<image>what?"),
    ("llava_v0", [], f"{TEMPLATES['llava_v0'].default}###Human: <image>\nwhat?###Assistant:"),
    ("llava_v0", ["--template", "plain"], "<image>what?"),
    ("alpaca", [], "### Instruction:\nwhat?\n\n### Response:"),
])
def test_ask_writes_the_form_of_training_and_says_so(template, flags, want, runs, talks, monkeypatch, capsys):
    seen = asked(monkeypatch, support.lab.ask)
    evaluation.main(["ask", runs[template], "--image", str(talks / "0.png"), "--prompt", "what?", *flags])
    assert seen[0].replace("<s>", "").lower().endswith(want.lower()), seen
    said = capsys.readouterr().err
    name = flags[-1] if flags else template or "plain"
    assert said.count("asked in the chat template") == 1 and f"chat template {name}" in said


def test_a_run_on_questions_is_asked_as_before_but_for_template(untrained_run, talks, monkeypatch, capsys):
    seen, ask = asked(monkeypatch, support.lab.ask), ["ask", untrained_run, "--image", str(talks / "0.png")]
    evaluation.main([*ask, "--prompt", "what?"])
    assert seen[-1].endswith("<image>\nQuestion: what? Answer:") and "template" not in capsys.readouterr().err
    evaluation.main([*ask, "--prompt", "what?", "--template", "llava_v0"])
    assert "Human: " in seen[-1] and "llava_v0, by --template" in capsys.readouterr().err
    with pytest.raises(UserError, match="--template llama3 writes .* no such token"):
        evaluation.main([*ask, "--prompt", "what?", "--template", "llama3"])


@pytest.mark.parametrize("prompt, want", [
    ("", "what is a<image>? answer in one sentence."),
    ("where does it live?", "this is a<image>. where does it live?"),
    ("where does a<image> live?", "where does a<image> live?")])
def test_a_picture_that_is_a_word_is_asked_about_as_the_recipes_report_asks(prompt, want, talks, tmp_path,
                                                                            monkeypatch, capsys):
    """In the language model's own template or --template's, never as "Question: … Answer:"."""
    save_vlm(shapes_vlm("mapl", constants=1), tmp_path, {"settings": {"data": "emoji", "recipe": "word"}},
             vit="weights/vit", decoder="weights/decoder")
    seen, ask = asked(monkeypatch, support.lab.ask), ["ask", str(tmp_path), "--image", str(talks / "0.png")]
    evaluation.main([*ask, "--prompt", prompt])
    evaluation.main([*ask, "--prompt", prompt, "--template", "llava_v0"])
    assert seen[0].removeprefix("<|begin|>").lower() == want
    assert seen[1].lower().endswith(f"###human: {want}###assistant:")
    said = capsys.readouterr().err
    assert "chat template plain, its language model's own" in said and "llava_v0, by --template" in said
    talk = Conversation(open_speaker(str(tmp_path), "cpu"), 4)
    talk.look_at(data.Shapes("test").item(0).image)
    spelled = talk.document(prompt).tokens
    again = talk.document(prompt, alone=True).tokens
    assert spelled == again == data.Document(talk.speaker.tokenizer).chat(
        ASK if not prompt else prompt if "<image>" in prompt else f"This is a<image>. {prompt}").tokens
    [*talk.answer(prompt)]
    assert talk.document("").tokens.count(IMAGE) == 1                           # it is about the same picture
    with pytest.raises(UserError, match="second picture"):
        talk.document("and a<image>?")


def test_an_answer_ends_where_the_form_of_training_ends_it(runs):
    ends = {"": "", "plain": "\n", "llava_v0": "###", "alpaca": ""}
    for name, end in ends.items():
        _, tokenizer, _ = open_run(runs[name], "cpu")
        assert tokenizer.text_end == end
        text = tokenizer.answer_text(tokenizer.encode("a ring\nand a cross### Human: more"))
        whole = "a ring\nand a cross### Human: more"
        assert text == (whole.partition(end)[0] if end else whole)


def test_plain_by_hand_leaves_a_text_its_lines():
    t = shapes_tokenizer()
    use_template("plain", t)
    assert "\n" in t.answer_text(t.encode("a ring\na cross"))
    use_template("plain", t, trained=True)
    assert t.answer_text(t.encode("a ring\na cross")) == "a ring"


def test_the_table_of_a_run_on_conversations_is_its_loss_in_that_form(runs, capsys):
    evaluation.main([runs["plain"], "--items", "64", "--device", "cpu"])
    out = capsys.readouterr().out
    trained = read_json(f"{runs['plain']}/results.json")["held-out loss"]
    row = next(line for line in out.splitlines() if "held-out" in line)
    assert f"{trained:.2f}" in row and "nan" not in out and "blind" in out and "seen" in out
    with pytest.raises(UserError, match="a table without a run that writes texts does not read --beams"):
        evaluation.main([runs["plain"], "--beams", "4"])


def test_a_comparison_asks_in_the_form_of_training_unless_a_protocol_is_named(runs, monkeypatch, capsys):
    seen = asked(monkeypatch, support.lab.protocols)
    compare = ["compare", runs["llava_v0"], "--data", "shapes", "--shots", "0", "--items", "2"]
    evaluation.main(compare)
    assert any("Human: " in text for text in seen) and "asked as LLaVA asks" in capsys.readouterr().out
    seen.clear()
    evaluation.main([*compare, "--protocol", "ours"])
    assert not any("Human: " in text for text in seen) and "LLaVA asks" not in capsys.readouterr().out


def test_multiple_choice_is_asked_in_the_form_of_training(monkeypatch, tmp_path):
    """--form CQM-A: context, question, choices, where the table asked QCM."""
    q = data.QA("natural", "which?", "a", choices=("a", "b"), correct=0, hint="look", source=object())
    assert evaluation.question_text(q, "CQM-A").startswith("\nContext: look\nQuestion: which?")
    assert evaluation.question_text(q, "QCM-LEA").startswith("\nQuestion: which?\nContext: look")
