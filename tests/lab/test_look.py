"""eval.py look writes the maps that it promises."""

import numpy as np
import pytest
from PIL import Image

import data
import eval as evaluation
from conftest import shapes_vlm
from support.formats.files import UserError
from support.formats.vlm import save_vlm

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained runs of two bridges, and a picture."""
    folder = tmp_path_factory.mktemp("runs")
    sizes = {"mapl": dict(constants=4, layers=2), "zero_init": dict(prompts=4, adapted=2, depth=1)}
    for name, options in sizes.items():
        vlm = shapes_vlm(name, width=16, heads=2, **options)
        save_vlm(vlm, folder / name, vit="weights/vit", decoder="weights/decoder")
    Image.fromarray(data.Shapes("test").item(0).image).save(folder / "scene.png")
    return folder


@pytest.mark.parametrize("name, layers", [("mapl", 4), ("zero_init", 2)])
def test_look_writes_a_map_per_word_and_layer_and_one_per_visual_token(runs, name, layers, capsys, tmp_path):
    asked = ["--image", str(runs / "scene.png"), "--prompt", "what color is the ring?"]
    evaluation.main(["look", str(runs / name), *asked, "--out", str(tmp_path / "maps")])
    text = capsys.readouterr().out
    with Image.open(tmp_path / "maps/words.png") as words, Image.open(tmp_path / "maps/tokens.png") as tokens:
        assert words.size == (150 * 11, 150 * layers + 20)  # \n Question : what … ? Answer :
        assert tokens.size == (150 * 4, 170)
        assert np.asarray(words).std() > 0
    assert text.count("attention to the picture") == layers
    assert ("nearest" in text) == (name == "mapl") and ("mean |gate| 0.000" in text) == (name == "zero_init")


def test_look_without_a_picture_is_one_sentence(runs):
    with pytest.raises(UserError, match="look needs --image"):
        evaluation.main(["look", str(runs / "mapl")])
