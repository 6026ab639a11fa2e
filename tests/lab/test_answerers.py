"""Systems without training stand in the table of trained bridges; their miniatures read others' runs."""
from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch

import eval as evaluation
from conftest import ROOT
from data import Item, Shapes
from papers.clip import ClipTask
from papers.recipe import Ingredients
from support.formats import load_vit
from support.formats.files import UserError, read_json, write_json
from support.formats.towers import load_clip_text_parts, open_clip
from support.formats.vlm import open_run
from support.lab.answerers import (ANSWERERS, READS, Models, add_answerer_flags, answer_items,
                                   describe_answerer, make_pica,
                                   measure_answerer, named_things)
from support.lab.claims import Setup, arm_flags, needed_arms, run_claims
from support.lab.claims_list import Arm, Claim, Expectation, Number, Side
from support.plumbing.flags import Parser
from support.worlds import open_data
from support.worlds.pairs import contrastive_pair


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory) -> str:
    """A CLIP of the bundled ViT and an untrained text tower, as recipe clip-text writes it."""
    torch.manual_seed(0)
    given = Ingredients(torch.device("cpu"), seed=0, batch=2, steps=1, world=open_data("shapes-phrases"),
                        contrastive_pair=contrastive_pair)
    load_clip_text_parts(given, "weights/decoder", "weights/vit")
    task, out = ClipTask(given), tmp_path_factory.mktemp("clip")
    task.freeze((), torch.float32)
    task.save(out, {"settings": {"recipe": "clip-text"}})
    return str(out)


def flags(*argv) -> argparse.Namespace:
    parser = Parser("eval.py", "")
    add_answerer_flags(parser)
    return parser.parse_args([*argv])


def test_a_run_of_clip_text_opens_as_it_was_saved(clip_run):
    opened = open_clip(clip_run)
    fresh = load_vit(ROOT / "weights/vit")
    assert open_clip("weights/clip-text").begin == ()
    assert all(torch.equal(a, b) for a, b in zip(opened.clip.vit.state_dict().values(),
                                                 fresh.state_dict().values()))
    assert opened.begin == () and opened.clip.text.config.end == opened.tokenizer.eos
    item = Shapes("test").item(0)
    pictures, texts = opened.embed_images([item.image] * 2), opened.embed_texts([item.captions[0], "red"])
    torch.testing.assert_close(pictures.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(opened.embed_texts(["red"])[0], texts[1])        # padding is not read
    assert torch.equal(opened.embed_texts(["red " * 200]), opened.embed_texts(["red " * 300]))


def test_what_is_no_clip_is_said_in_one_sentence(clip_run, tmp_path, untrained_run):
    with pytest.raises(UserError, match="holds no CLIP; train one: python train.py --recipe clip-text"):
        write_json(tmp_path / "config.json", {"settings": {"recipe": "clip"}})
        open_clip(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        open_clip(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="load_vit reads a vision tower alone"):
        open_clip("weights/vit")


def test_captions_are_judged_by_the_things_they_name():
    about = "a small red circle at the top left; a large blue ring at the middle center"
    item = Item(None, [], [], about=about)
    found = named_things(["a red circle at the top left and a blue ring at the top left"], [item])
    assert found == {"objects": 1.0, "places": 0.5, "a guess": 1 / 9}
    twice = named_things(["red circle, red circle and a blue cross"], [item])   # one hit of three, two true
    assert twice["objects"] == pytest.approx(2 * 1 / 5) and twice["places"] == 0
    assert named_things(["nothing"], [item])["objects"] == 0


def test_pica_reads_the_captions_it_is_told_and_answers_each_question(clip_run):
    world, items = Shapes(), [Shapes("test").item(i) for i in range(2)]
    models = Models(flags("--clip", clip_run, "--captions-by", "truth", "--shots", "2", "--ensemble", "2"),
                    "cpu")
    answerer = make_pica(models, world, items)
    assert answerer.shots == 2 and len(answerer.pool) > 400
    prompts = answerer.prompts([0, 1, 2, 3], answerer.describe(items[1]), "what is red?")
    assert prompts[0].count("\nQ: ") == 3
    assert f"Context: {items[1].captions[0]}\n===\nQ: what is" in prompts[1]
    result = answer_items("pica", models, world, items)
    assert len(result["answers"]) == sum(len(item.qas) for item in items) and 0 <= result["mean"] <= 1
    questions, pictures = models.embed_pairs([(item, q) for item in items for q in item.qas])
    assert len(questions) == len(pictures) and torch.equal(pictures[0], pictures[1])
    assert describe_answerer("pica", models.args) == "pica, 2 similar shots x 2, captions: truth"


def test_answerers_stand_beside_the_run_that_tells_pica(clip_run, untrained_run, capsys, monkeypatch):
    config = read_json(f"{untrained_run}/config.json")
    settings = {"settings": {"data": "shapes", "seed": 0}}
    monkeypatch.setattr("support.lab.table.open_run", lambda run, device: (
        *evaluation_parts(untrained_run), {**config, **settings}))
    evaluation.main(["pica", untrained_run, "socratic", "magic", "--clip", clip_run, "--items", "2",
                     "--shots", "1", "--drafts", "2", "--candidates", "2", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    name = untrained_run.split("/")[-1]
    heads = [line.split("  ")[0] for line in lines[2:] if line]
    assert heads == [f"{name}, held-out", f"{name}, seen", f"{name}, blind",
                     f"pica, 1 similar shots, captions: {name}", "socratic, 2 drafts", "magic, beta 2",
                     "chance (commonest answer)", "oracle (scene in words)"]


def evaluation_parts(run: str):
    return open_run(run, "cpu")[:2]


def test_without_a_run_the_table_is_of_shapes(capsys):
    evaluation.main(["pica", "--captions-by", "truth", "--shots", "0", "--items", "2", "--device", "cpu"])
    text = capsys.readouterr().out
    assert text.startswith("shapes: 2 pictures a row") and "pica, 0 shots, captions: truth" in text
    assert "chance" in text and "oracle" not in text


@pytest.mark.parametrize("argv, words", [
    (["magic", "--clip", "weights/vit"], "load_vit reads a vision tower alone"),
    (["pica", "--shots", "0"], "pica reads captions; give --captions-by RUN, or truth"),
    (["pica", "--shots", "600", "--captions-by", "truth", "--similarity", "random"],
     "pica: 1 prompts with 600"),
    (["magic", "socratic", "--shots", "3"], "a table with magic, socratic does not read --shots"),
    (["out/mlp-shapes", "--drafts", "3"], "a table with runs alone does not read --drafts"),
    (["pica", "--answer-seed", "5"], "pica --similarity imagequestion does not read --answer-seed"),
    (["pica", "--shots", "0", "--ensemble", "7", "--similarity", "question"],
     "pica --shots 0 does not read --ensemble, --similarity"),
    (["pica", "--similarity", "random", "--clip", "c"], "pica --similarity random does not read --clip"),
    (["pica", "--captions-by", "truth", "--beams", "7"], "does not read --beams"),
    (["magic", "--follow-links"], "data shapes does not read --follow-links"),
    (["socratics"], 'did you mean "socratic"'), (["pica", "--saved"], "no run has measured pica"),
    (["magic", "--beta", "-1"], "--beta"), (["pica", "--similarity", "same"], "invalid choice: 'same'")])
def test_a_mistake_is_one_sentence(argv, words):
    with pytest.raises(UserError, match=words) as e:
        evaluation.main(argv if "--saved" in argv else [*argv, "--items", "2", "--device", "cpu"])
    assert str(e.value).count("\n") == 0


def test_the_truth_needs_a_caption_to_tell():
    models, item = Models(flags("--captions-by", "truth"), "cpu"), replace(Shapes().item(0), captions=[])
    with pytest.raises(UserError, match="--captions-by truth: item train-0 has no caption of its own"):
        models.captions([item])


def test_every_flag_is_read_by_an_answerer():
    assert set().union(*READS.values()) == set(vars(flags())) and READS.keys() == ANSWERERS.keys()


def test_an_item_without_a_picture_has_no_answer_here(clip_run):
    models = Models(flags("--clip", clip_run), "cpu")
    item = replace(Shapes("test").item(0), image=None)
    with pytest.raises(UserError, match="magic answers about pictures, and item test-0 of shapes has none"):
        answer_items("magic", models, Shapes(), [item])
    with pytest.raises(UserError, match="socratic chooses from the words of shapes, and emoji has others"):
        world = argparse.Namespace(name="emoji")
        answer_items("socratic", models, world, [Shapes("test").item(0)])


def test_a_miniature_measures_captions_by_words(clip_run):
    found = measure_answerer("socratic", ["--clip", clip_run, "--drafts", "1"], 3, 2)
    assert found.keys() == {"cider", "bleu4", "objects", "places", "a guess"}
    assert found == measure_answerer("socratic", ["--clip", clip_run, "--drafts", "1"], 3, 2)


def test_a_claim_runs_the_arms_that_an_answerer_reads_and_measures_it(tmp_path):
    arms = {"PICa": Arm(("--captions-by", "{reader}", "--shots", "0"), answerer="pica"),
            "reader": Arm(("--bridge", "linear", "--captions", "1"), measures=("loss",))}
    claim = {"told": Claim("It tells.", "nowhere", (Expectation(Side("PICa"), "≥", Side("PICa")),),
                           (Number("mean"),))}
    setup = Setup(1, 1, tmp_path / "runs", tmp_path / "claims.txt",
                  tuple("--steps 2 --batch 2 --threads 1 --eval-items 1 --samples 0".split()), 4,
                  tmp_path / "runs.jsonl")
    assert needed_arms([claim["told"]], arms) == {"PICa", "reader"}
    assert arm_flags("PICa", arms["PICa"], 0, setup)[1] == str(tmp_path / "runs/reader-s0")
    text = run_claims(["told"], setup, claim, arms)
    seen = read_json(tmp_path / "runs/pica-s0/seen.json")
    assert seen["steps"] == 0 and f"PICa  {100 * seen['pica']['mean']:.3g} ± 0" in text
    before = (tmp_path / "runs/pica-s0/seen.json").stat().st_mtime_ns
    assert run_claims(["told"], setup, claim, arms) == text
    assert (tmp_path / "runs/pica-s0/seen.json").stat().st_mtime_ns == before
