"""Beam search is its definition; answers do not depend on how they are batched; tables count what they say; a
command names what it did not understand."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import train
from conftest import tiny_decoder
from eval import beam_search, generate_ids
from support.formats.files import UserError, write_tensors
from support.formats.llama import load_decoder
from support.formats.tokenizer_files import load_tokenizer
from support.formats.vision import load_vit
from papers.linear_probe import linear_probe
from support.worlds.text import measure_reading, shapes_tokenizer

ROOT = Path(__file__).parent.parent


# --- beam search

PROMPT = torch.randint(61, (3, 4), generator=torch.Generator().manual_seed(5))


def total_logp(decoder, prompt, new):
    with torch.no_grad():
        logp = decoder(torch.cat((prompt, new), 1)).log_softmax(-1)[:, prompt.shape[1] - 1:-1]
    return logp.gather(2, new[..., None]).sum((1, 2))


def test_one_beam_is_greedy(decoder):
    assert torch.equal(beam_search(decoder, PROMPT, 9, beams=1), decoder.generate(PROMPT, 9))
    assert torch.equal(generate_ids(decoder, PROMPT, 9, beams=1), decoder.generate(PROMPT, 9))


def test_more_beams_find_sequences_at_least_as_likely_as_greedy():
    gained = 0
    for seed in range(4):
        decoder = tiny_decoder(seed)
        greedy, beam = decoder.generate(PROMPT, 6), beam_search(decoder, PROMPT, 6, beams=5)
        gain = total_logp(decoder, PROMPT, beam) - total_logp(decoder, PROMPT, greedy)
        assert (gain > -1e-4).all()  # float32 sums of 6 log-probabilities
        gained += int((gain > 1e-3).sum())
    assert gained > 0  # and somewhere it is a real gain


def test_as_many_beams_as_words_search_exhaustively():
    decoder = tiny_decoder(vocab_size=7)  # 7 beams and 2 steps: all 49 continuations are seen
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    best = [pairs[total_logp(decoder, row.expand(49, -1), pairs).argmax()] for row in prompt]
    assert torch.equal(beam_search(decoder, prompt, 2, beams=7), torch.stack(best))


def beams_by_hand(decoder, row, steps, W, stop=(), penalty=1.0):
    """Beam search of one row as a loop, everything recomputed: an ended beam keeps its score."""
    def rank(beam):
        return beam[0] / beam[2] ** penalty
    beams = [(0.0, row, 0, False)]  # log p, text, words written, ended
    for _ in range(steps):
        grown = [b for b in beams if b[3]]
        for score, text, n, _ in (b for b in beams if not b[3]):
            with torch.no_grad():
                logp = decoder(text[None])[0, -1].log_softmax(-1)
            grown += [
                (score + float(p), torch.cat((text, i[None])), n + 1, int(i) in stop)
                for p, i in zip(*logp.topk(W))
            ]
        beams = sorted(grown, key=rank, reverse=True)[:W]
    return max(beams, key=rank)[1][len(row):].tolist()


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beam_search_is_the_loop_without_a_cache(seed, stopping, penalty):
    decoder = tiny_decoder(seed)
    stop = tuple(int(t) for t in decoder.generate(PROMPT, 3)[:, 2]) if stopping else ()
    rows = [beams_by_hand(decoder, row, 6, 3, stop, penalty) for row in PROMPT]
    if penalty < 2:  # which is the largest reward for going on
        assert (min(map(len, rows)) < 6) == stopping                            # something does stop early
    kw = dict(max_new_tokens=6, beams=3, stop=stop, length_penalty=penalty)
    mask = torch.tensor([[0] * 3 + [1] * 4] * 3).bool()  # left padding changes nothing here either
    padded = torch.cat((torch.zeros(3, 3, dtype=torch.long), PROMPT), 1)
    padded = beam_search(decoder, padded, mask=mask, **kw)
    for mine in (beam_search(decoder, PROMPT, **kw), padded):
        for ids, row in zip(mine.tolist(), rows):
            assert ids == row + [row[-1]] * (len(ids) - len(row))


def test_all_rows_that_have_stopped_end_the_search(decoder):
    stop = tuple(decoder.generate(PROMPT, 12)[:, 2].tolist())
    assert beam_search(decoder, PROMPT, 12, beams=3, stop=stop).shape[1] <= 12


def test_at_least_one_token_must_be_asked_for(decoder):
    for beams in (1, 3):
        with pytest.raises(ValueError, match="max_new_tokens is 0"):
            generate_ids(decoder, PROMPT, 0, beams)


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


def test_the_comparison_table_has_a_row_per_run_and_the_baselines(run):
    out, _ = run
    measured, saved = cli(out, "--items", "4"), cli(out, "--saved")
    for done in (measured, saved):
        assert done.returncode == 0, done.stderr
        for row in ("held-out", "seen", "blind", "chance", "oracle"):
            assert row in done.stdout
    assert measured.stdout == saved.stdout  # the run's own report had 4 items, too
    assert "trained" in done.stdout and "examples" in done.stdout and "cider" in done.stdout


def test_a_mistake_is_one_sentence_and_exit_code_2():
    for argv, words in (
        (["compair"], ['"compair"', 'did you mean "compare"']),
        (["ask", "no/lm", "--prompt", "hi"], ["no/lm"]),
    ):
        done = cli(*argv)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert all(w in done.stderr for w in words), done.stderr


@pytest.mark.parametrize("argv, words", [
    ([], "run folder"),
    (["no/run"], "no/run"),
    (["--itms", "3", "out/x"], 'unknown argument "--itms"; did you mean "--items"'),
    (["out/x", "--items", "few"], "--items"),
    (["out/x", "--items", "0"], "at least 1"),
    (["out/x", "--claim", "all"], '"--claim"'),     # its spelling before there were subcommands
    (["compare"], "run folder"),
    (["compare", "out/x", "--protocl", "mapl"], 'did you mean "--protocol"'),
    (["claims", "--seed", "3", "all"], 'did you mean "--seeds"'),
    (["targets"], "RUN"),
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
