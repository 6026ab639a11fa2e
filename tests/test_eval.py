"""Answers do not depend on how they are batched; tables count what they say; a command names what it did not
understand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import train
from support.formats.files import UserError, write_tensors
from support.formats.llama import load_decoder
from support.formats.tokenizer_files import load_tokenizer
from support.formats.vision import load_vit
from support.formats.vlm import open_run
from papers.linear_probe import linear_probe
from support.worlds.text import measure_reading, shapes_tokenizer

ROOT = Path(__file__).parent.parent


# --- answers and tables

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder after a few steps: its answers are poor, but they are answers."""
    out = tmp_path_factory.mktemp("run")
    module = train.main(["--bridge", "mapl", "--steps", "5", "--batch", "8", "--dtype", "float32",
                         "--eval-items", "4", "--samples", "0", "--out", str(out)])
    return out, module


def prompts(n: int = 12):
    tokenizer = shapes_tokenizer()
    items = [data.Shapes("test").item(i) for i in range(n)]
    documents = [data.Document(tokenizer).image().add(data.QUESTION.format(item.qas[0].question))
                 for item in items]
    return tokenizer, items, documents


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_of_answers_equals_one_by_one(run, beams):
    _, vlm = run
    tokenizer, items, documents = prompts()
    features = evaluation.vision_features(vlm, items, blind=False)
    together = evaluation.generate_texts(vlm, documents, tokenizer, 12, beams, features)
    single = evaluation.generate_texts(vlm, documents, tokenizer, 12, beams, features, batch=1)
    assert together == single


def test_blind_means_a_zeroed_picture(run):
    _, vlm = run
    tokenizer, items, _ = prompts(6)
    features = evaluation.vision_features(vlm, items, blind=True)
    # atol 1e-5: float32 sums in another order (rows of a batch; attention with and without gradients)
    torch.testing.assert_close(features, vlm.features(torch.zeros(6, 3, 48, 48)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features, features[:1].expand_as(features), atol=1e-5, rtol=1e-5)


def test_the_mean_is_over_kinds_and_chance_is_one_answer_per_kind():
    questions = [data.QA("a", "", "x", ["x"] * 10)] * 3 + [data.QA("b", "", "y", ["y"] * 10)]
    found = evaluation.accuracy_by_kind(questions, ["x", "x", "z", "z"])
    assert found == {"a": 2 / 3, "b": 0.0, "mean": 1 / 3}
    world = data.Shapes("test")
    result = evaluation.chance_scores(world, [world.item(i) for i in range(200)])
    assert abs(result["existence"] - 0.5) < 0.1 and result["mean"] < 0.4
    assert result["color"] < 0.25 and result["position"] < 0.25


def test_a_kind_of_question_may_be_called_name():
    """The emoji world has such a kind; it once overwrote the labels of the rows."""
    rows = [{"row": "mapl, held-out", "name": 0.5, "mean": 0.5}, {"row": "chance", "mean": 0.25}]
    text = evaluation.format_table(rows)
    assert text.splitlines() == [
        "                name  mean",
        "mapl, held-out  50.0  50.0",
        "chance                25.0",
    ]


def test_a_table_has_no_empty_column_and_no_empty_row():
    """A published model's training is not known, and nobody guesses a caption."""
    rows = [{"row": "llava, held-out", "trained": None, "examples": None, "cider": 0.5, "mean": None},
            {"row": "chance (commonest answer)"}]
    assert evaluation.format_table(rows).splitlines() == ["                 cider", "llava, held-out   0.50"]


def test_the_bundled_decoder_reads_above_97_percent_in_every_kind_and_number_of_objects():
    folder = ROOT / "weights/decoder"
    tokenizer, decoder = load_tokenizer(folder), load_decoder(folder)
    # the full gate, 400 scenes per style, stands in weights/decoder/reading.json
    result = measure_reading(decoder, tokenizer, evaluation.generate_texts, 120)
    assert set(result) == {*data.KINDS, "1 objects", "2 objects", "3 objects", "4 objects"}
    assert min(result.values()) > 0.97, result


def test_one_token_of_the_bundled_vit_names_color_shape_and_place_of_held_out_pairs_above_95_percent():
    result = linear_probe(load_vit(ROOT / "weights/vit"), train=1500, test=600)
    assert min(result["color"], result["shape"], result["place"]) > 0.95, result


# --- the command line

def cli(*argv) -> subprocess.CompletedProcess:
    command = [sys.executable, "eval.py", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_comparison_table_has_a_row_per_run_and_the_baselines(run, capsys):
    out, _ = run
    measured = cli(out, "--items", "4")
    assert measured.returncode == 0, measured.stderr
    for word in ("held-out", "seen", "blind", "chance", "oracle", "trained", "examples", "cider"):
        assert word in measured.stdout
    capsys.readouterr()
    evaluation.main([str(out), "--saved"])
    assert measured.stdout == capsys.readouterr().out  # the run's own report had 4 items, too
    with pytest.raises(UserError, match="data shapes does not read --follow-links; leave out"):
        evaluation.main([str(out), "--follow-links"])


def test_a_mistake_is_one_sentence_and_exit_code_2():
    done = cli("compair")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert '"compair"' in done.stderr and 'did you mean "compare"' in done.stderr


@pytest.mark.parametrize("argv, words", [
    ([], "run folder"),
    (["no/run"], "no/run"),
    (["--itms", "3", "out/x"], 'unknown argument "--itms"; did you mean "--items"'),
    (["out/x", "--items", "few"], "--items"),
    (["out/x", "--items", "0"], "at least 1"),
    (["out/x", "--claim", "all"], '"--claim"'),     # its spelling before there were subcommands
    (["compare"], "run folder"), (["compare", "./no/run"], "no/run: no such folder"),
    (["compare", "out/x", "--protocl", "mapl"], 'did you mean "--protocol"'),
    (["claims", "--seed", "3", "all"], 'did you mean "--seeds"'),
    (["targets"], "RUN"),
    (["ask", "no/lm", "--prompt", "hi"], "no/lm"),
])
def test_an_argument_that_is_not_understood_is_named_with_the_nearest(argv, words):
    with pytest.raises(UserError) as e:
        evaluation.main(argv)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["", *evaluation.SUBCOMMANDS])
def test_help_has_examples_and_fits_a_screen(name, capsys):
    with pytest.raises(SystemExit) as e:
        evaluation.main([name, "--help"] if name else ["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and len(text.splitlines()) < 60
    assert f"\n    python eval.py {name}".rstrip() in text


@pytest.mark.parametrize("content, words", [
    (None, "no such file; give a run folder of train.py that has ended, or leave out --saved"),
    ({"held-out loss": 1.5}, "this run has no table, and its numbers stand in this file; leave out --saved"),
    ({"world": "shapes", "items": 4, "rows": []}, "holds no row; leave out --saved")])
def test_a_run_whose_table_was_not_saved_is_a_sentence(content, words, tmp_path):
    if content:
        (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"results.json: {words}"):
        evaluation.main(["--saved", str(tmp_path)])


def test_a_damaged_run_names_the_tensor_and_both_shapes(run, tmp_path):
    out, vlm = run
    for name in ("config.json", "bridge.safetensors"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    state = {k: v.clone() for k, v in vlm.bridge.state_dict().items()}
    state["const"] = state["const"][:, :5]
    write_tensors(tmp_path / "bridge.safetensors", state, {"bridge": "mapl"})
    with pytest.raises(UserError, match=r"const.*\(16, 5\).*\(16, 128\)"):
        open_run(str(tmp_path), "cpu")
    write_tensors(tmp_path / "bridge.safetensors", state, {"bridge": "flamingo"})
    with pytest.raises(UserError, match="flamingo"):
        open_run(str(tmp_path), "cpu")
