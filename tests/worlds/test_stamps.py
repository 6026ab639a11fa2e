"""Claim: `python data.py stamps` makes a captioned folder of an installed copy of Tux Paint's stamps."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.formats.files import UserError
from support.worlds import open_data
from support.worlds.commands import main
from support.worlds.stamps import stamp_name


def stamp(file: Path, text: str | None, size=(50, 40)) -> None:
    """A made-up stamp: a dark square on a transparent ground, and what is said of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    image.paste((90, 40, 20, 255), (10, 5, size[0] - 10, size[1] - 5))
    image.save(file)
    if text is not None:
        file.with_suffix(".txt").write_text(f"{text}\nde.utf8=Etwas.\n", encoding="utf-8")


def test_photographs_with_english_names_become_a_captioned_folder(tmp_path, capsys):
    stamps, out = tmp_path / "stamps", tmp_path / "out"
    stamp(stamps / "animals" / "birds" / "crow.png", "A crow.")
    stamp(stamps / "vehicles" / "car.png", "A race car. It is fast!", (900, 300))
    stamp(stamps / "animals" / "cartoon" / "lion.png", "A happy lion!")
    stamp(stamps / "symbols" / "a.png", "The letter a.")
    stamp(stamps / "town" / "untold.png", None)
    stamp(stamps / "town" / "long.png", "A landmark made of stones that people use as a milestone.")
    main(["stamps", str(stamps), str(out)])
    assert "2 photographs with 2 names" in capsys.readouterr().out
    world = open_data(f"folder:{out}:all")
    items = {item.captions[0]: item.image for item in map(world.item, range(len(world)))}
    assert items.keys() == {"a crow", "a race car"}
    assert items["a crow"].shape == (30, 30, 3) and (items["a crow"] == (90, 40, 20)).all()     # no margin
    assert max(items["a race car"].shape) == 160
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    main(["stamps", str(stamps), str(out)])
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


@pytest.mark.parametrize("text, name", [
    ("A frog.", "a frog"), ("Anthurium", "Anthurium"), ("“T-intersection”.", "T-intersection"),
    ("Our moon.", "our moon"), ("Eat your broccoli!", "Eat your broccoli"),
    ("A St. Bernard. It is large.", "a St. Bernard"), ("", "")])
def test_a_name_is_the_first_sentence_without_its_stop(text, name):
    assert stamp_name(text) == name


def test_a_folder_without_stamps_and_a_broken_stamp_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="tuxpaint-stamps-default"):
        main(["stamps", str(tmp_path / "none"), str(tmp_path / "out")])
    with pytest.raises(UserError, match="holds no photograph"):
        main(["stamps", str(tmp_path), str(tmp_path / "out")])
    stamp(tmp_path / "crow.png", "A crow.")
    (tmp_path / "crow.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="crow.png: not a picture"):
        main(["stamps", str(tmp_path), str(tmp_path / "out")])


def test_the_picture_on_white_is_white_where_the_stamp_is_transparent(tmp_path):
    stamp(tmp_path / "in" / "ring.png", "A ring.")
    image = Image.open(tmp_path / "in" / "ring.png")
    image.putpixel((25, 20), (0, 0, 0, 0))
    image.save(tmp_path / "in" / "ring.png")
    main(["stamps", str(tmp_path / "in"), str(tmp_path / "out")])
    assert (np.asarray(Image.open(tmp_path / "out" / "images" / "ring.png"))[15, 15] == 255).all()
