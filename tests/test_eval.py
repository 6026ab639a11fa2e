"""Answers do not depend on how they are batched, the tables count what they say, and a picture from a file gets an answer."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from support.formats.files import write_tensors
from support.formats.tokenizer_files import load_tokenizer
from papers.clip import linear_probe
from support.worlds.text import measure_reading
from support.worlds.text import shapes_tokenizer
import eval as evaluation
import train
from support.formats.files import UserError
from support.formats.llama import load_decoder
from support.formats.vision import load_vit

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder after a few steps: its answers are poor, but they are answers."""
    out = tmp_path_factory.mktemp("run")
    module = train.main(
        [
            "--bridge",
            "mapl",
            "--steps",
            "5",
            "--batch",
            "8",
            "--dtype",
            "float32",
            "--eval-items",
            "4",
            "--samples",
            "0",
            "--out",
            str(out),
        ]
    )
    return out, module


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "scene.png"
    Image.fromarray(data.Shapes("test").item(0).image).save(file)
    return file


def prompts(n: int = 12):
    tokenizer = shapes_tokenizer()
    items = [data.Shapes("test").item(i) for i in range(n)]
    return (
        tokenizer,
        items,
        [
            data.Document(tokenizer).image().add(data.QUESTION.format(q.question))
            for item in items
            for q in item.qas[:1]
        ],
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_of_answers_equals_one_by_one(run, beams):
    _, vlm = run
    tokenizer, items, documents = prompts()
    features = evaluation.vision_features(vlm, items, blind=False)
    together = evaluation.generate_texts(vlm.generate, documents, tokenizer, 12, beams, features)
    single = evaluation.generate_texts(vlm.generate, documents, tokenizer, 12, beams, features, batch=1)
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
    assert evaluation.accuracy_by_kind(questions, ["x", "x", "z", "z"]) == {
        "a": 2 / 3,
        "b": 0.0,
        "mean": 1 / 3,
    }
    world = data.Shapes("test")
    result = evaluation.chance_scores(world, [world.item(i) for i in range(200)])
    assert (
        abs(result["existence"] - 0.5) < 0.1
        and result["color"] < 0.25
        and result["position"] < 0.25
        and result["mean"] < 0.4
    )


def test_a_kind_of_question_may_be_called_name():
    """The emoji world has such a kind; it once overwrote the labels of the rows."""
    text = evaluation.format_table(
        [{"row": "mapl, held-out", "name": 0.5, "mean": 0.5}, {"row": "chance", "mean": 0.25}]
    )
    assert text.splitlines() == [
        "                name  mean",
        "mapl, held-out  50.0  50.0",
        "chance                25.0",
    ]


def test_the_bundled_decoder_reads_above_97_percent_in_every_kind_and_number_of_objects():
    tokenizer, decoder = load_tokenizer(ROOT / "weights/decoder"), load_decoder(ROOT / "weights/decoder")
    result = measure_reading(decoder, tokenizer, evaluation.generate_texts, 120)  # the full gate (400 per style) stands in weights/
    assert set(result) == {*data.KINDS, "1 objects", "2 objects", "3 objects", "4 objects"}
    assert min(result.values()) > 0.97, result


def test_one_token_of_the_bundled_vit_names_color_shape_and_place_of_held_out_pairs_above_95_percent():
    result = linear_probe(load_vit(ROOT / "weights/vit"), train=1500, test=600)
    assert min(result["color"], result["shape"], result["place"]) > 0.95, result


def cli(*argv) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "eval.py", *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_a_picture_from_a_file_gets_an_answer_and_a_caption(run, picture):
    out, _ = run
    for extra in ([], ["--prompt", "what color is the ring?"], ["--beams", "3"]):
        done = cli(out, "--image", picture, *extra)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_comparison_table_has_a_row_per_run_and_the_baselines(run):
    out, _ = run
    measured, saved = cli(out, "--items", "4"), cli(out, "--saved")
    for done in (measured, saved):
        assert done.returncode == 0, done.stderr
        for row in ("held-out", "seen", "blind", "chance", "oracle"):
            assert row in done.stdout
    assert measured.stdout == saved.stdout  # the run's own report had 4 items, too
    assert "trained" in done.stdout and "examples" in done.stdout and "cider" in done.stdout


def test_a_mistake_is_one_sentence_and_exit_code_2(run, tmp_path):
    out, _ = run
    text, wide = tmp_path / "text.png", tmp_path / "wide.png"
    text.write_text("this is no picture")
    Image.fromarray(np.zeros((1, 20_001, 3), np.uint8)).save(wide)
    for argv, words in (
        ([out, "--image", text], ["text.png", "not a picture"]),
        ([out, "--image", wide], ["wide.png", "20001", "20,000"]),
        ([out, "--image", tmp_path / "none.png"], ["none.png"]),
        (["no/run"], ["no/run"]),
        ([], ["run folder"]),
        (["--lm", "no/lm", "--prompt", "hi"], ["no/lm"]),
        ([out, "--itms", "3"], ["--itms"]),
    ):
        done = cli(*argv)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, (
            done.stderr
        )
        assert all(w in done.stderr for w in words), done.stderr


def test_a_damaged_run_names_the_tensor_and_both_shapes(run, tmp_path):
    out, vlm = run
    for name in ("config.json", "bridge.safetensors"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    state = {k: v.clone() for k, v in vlm.bridge.state_dict().items()}
    state["const"] = state["const"][:, :5]
    write_tensors(tmp_path / "bridge.safetensors", state, {"bridge": "mapl"})
    with pytest.raises(UserError, match=r"const.*\(16, 5\).*\(16, 128\)"):
        evaluation.open_run(str(tmp_path), "cpu")
    write_tensors(tmp_path / "bridge.safetensors", state, {"bridge": "flamingo"})
    with pytest.raises(UserError, match="flamingo"):
        evaluation.open_run(str(tmp_path), "cpu")
