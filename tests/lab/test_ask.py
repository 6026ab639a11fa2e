"""What MODEL holds decides how it is asked: a run about a picture, a decoder alone (published models: see
tests/formats/test_published.py)."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import data
import eval as evaluation
from support.formats.files import UserError


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "scene.png"
    Image.fromarray(data.Shapes("test").item(0).image).save(file)
    return str(file)


@pytest.mark.parametrize("flags", [[], ["--prompt", "what color is the ring?"], ["--beams", "3"]])
def test_a_run_answers_about_a_picture_file_or_captions_it(untrained_run, picture, flags, capsys):
    evaluation.main(["ask", untrained_run, "--image", picture, *flags])
    assert capsys.readouterr().out.strip()


def test_a_decoder_answers_without_a_picture(capsys):
    evaluation.main(["ask", "weights/decoder", "--prompt", "a red circle", "--max-new-tokens", "2"])
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize("beams", ["1", "2"])
@pytest.mark.parametrize("kind", ["run", "decoder"])
def test_an_answer_past_what_the_decoder_was_trained_on_is_warned_of(kind, beams, untrained_run, picture,
                                                                     monkeypatch, capsys):
    """A run's and a decoder's, as a published model's; a picture counts for the positions that it takes."""
    model = [untrained_run, "--image", picture] if kind == "run" else ["weights/decoder"]
    argv = ["ask", *model, "--prompt", "what color is the ring?", "--max-new-tokens", "2", "--beams", beams]
    real, room = evaluation.generate_ids, []

    def small(decoder, tokens, *rest, embeds, **kw):
        room.append(embeds.shape[1])
        ids = real(decoder, tokens, *rest, embeds=embeds, **kw)
        decoder.config = replace(decoder.config, context=room[-1] + len(ids[0]) - short)
        return ids

    monkeypatch.setattr("support.lab.ask.generate_ids", small)
    for short in (0, 1):
        evaluation.main(argv)
        assert ("warning: the answer runs past" in capsys.readouterr().err) == bool(short)
    assert kind == "decoder" or room[0] > 9             # the patches of the picture


@pytest.mark.parametrize("command", ["", "ask", "chat", "compare", "look", "targets"])
@pytest.mark.parametrize("ended", [True, False])
def test_a_run_without_a_bridge_is_called_what_it_is(command, ended, picture, tmp_path):
    facts = {"settings": {"recipe": "clip"}, **({"steps": 9, "seconds": 1.5} if ended else {})}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    shown = ["--image", picture, "--prompt", "where?"] if command in ("ask", "look") else []
    with pytest.raises(UserError) as e:
        evaluation.main([*filter(None, [command]), str(tmp_path), *shown])
    assert str(e.value) == f"{tmp_path}: " + (
        "its recipe, clip, makes no bridge, so nobody can ask it about a picture; its numbers are in "
        "log.jsonl and the .json files beside it." if ended else
        f"this run has not ended; go on with: python train.py --resume {tmp_path}")


def test_a_mistake_is_one_sentence(untrained_run, picture, tmp_path):
    run = untrained_run
    text, wide = tmp_path / "text.png", tmp_path / "wide.png"
    text.write_text("this is no picture")
    Image.fromarray(np.zeros((1, 20_001, 3), np.uint8)).save(wide)
    for argv, words in (
        ([run, "--image", text], ["text.png", "not a picture"]),
        ([run, "--image", wide], ["wide.png", "20001", "20,000"]),
        ([run, "--image", tmp_path / "none.png"], ["none.png"]),
        ([run, "--prompt", "what?"], ["--image"]),
        (["weights/decoder"], ["--prompt"]),
        (["weights/decoder", "--image", picture, "--prompt", "what?"], ["sees no picture"]),
        (["weights/decoder", "--prompt", "<image> what?"], ["<image>"]),
        (["no/lm", "--prompt", "hi"], ["no/lm"]),
        ([run, "--image", picture, "--dtype", "float8"], ["float8"]),
        ([run, "--image", picture, "--beams", "0"], ["at least 1"]),
    ):
        with pytest.raises(UserError) as e:
            evaluation.main(["ask", *argv])
        assert all(word in str(e.value) for word in words), e.value
