"""Claim: data sets are read as people have them, and what cannot be used is skipped and counted when read."""
from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

import data
from conftest import GOLDEN
from model import IGNORE, IMAGE
from support.formats.chat import TEMPLATES
from support.formats.files import UserError
from support.worlds import open_data
from support.worlds.files import Files
from support.worlds.text import shapes_tokenizer


def picture(path: Path, red: int = 200) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 48), (red, 10, 10)).save(path, "png" if path.suffix == ".png" else "jpeg")


def dump(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- conversations ------------------------------------------------------------------------------------------

def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


GOOD = dict(id="good", image="0.png", conversations=[human("<image>\nhi?"), gpt("a")])


@pytest.fixture
def talks(tmp_path):
    """(rows, file name) → a world of LLaVA's format beside three pictures."""
    for i in range(3):
        picture(tmp_path / f"{i}.png", 80 * i)

    def world(rows: list[dict], name: str = "chat.json", as_lines: bool = False, **options) -> Files:
        (tmp_path / name).write_text(lines(rows) if as_lines else json.dumps(rows, indent=1))
        return open_data(f"llava:{tmp_path / name}:all", **options)
    return world


def items(world: Files) -> dict[str, data.Item]:
    return {item.id: item for item in map(world.item, range(len(world)))}


def test_a_conversation_may_show_several_pictures(talks):
    world = talks([GOOD, dict(id="two", image=["1.png", "2.png"],
                              conversations=[human("<image>\n<image>\nwhat differs?"), gpt("the colour")]),
                   dict(id="one", images=["1.png"], conversations=[human("<image>\nwhat?"), gpt("red")])])
    found = items(world)
    assert {i: len(item.pictures) for i, item in found.items()} == {"good": 1, "two": 2, "one": 1}
    assert [p[0, 0, 0] for p in found["two"].pictures] == [80, 160]             # in the order of the list
    assert found["two"].turns[0]["content"] == "<image>\n<image>\nwhat differs?"
    for template in (TEMPLATES["llava_v0"], TEMPLATES["plain"]):
        d = data.training_document(found["two"], shapes_tokenizer(), template=template)
        assert d.tokens.count(IMAGE) == 2


def test_a_picture_of_a_later_turn_stands_there(talks):
    turns = [human("hello"), gpt("hi"), human("what is this?\n<image>"), gpt("red")]
    item = items(talks([dict(id="1", image="1.png", conversations=turns)]))["1"]
    assert [t["content"] for t in item.turns] == ["hello", "hi", "<image>\nwhat is this?", "red"]


@pytest.mark.parametrize("turns, kept", [
    ([gpt("welcome"), human("q"), gpt("a")], ["q", "a"]),
    ([human("q"), gpt("a"), human("thanks")], ["q", "a"]),
    ([{"from": "system", "value": "be brief"}, human("q"), gpt("a")], ["be brief", "q", "a"]),
    ([{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"},
      {"role": "assistant", "content": "a"}], ["be brief", "q", "a"]),
])
def test_first_turns_of_gpt_and_last_ones_of_the_human_go_and_a_system_text_stays(talks, turns, kept):
    rows = [GOOD, dict(id="talk", conversations=turns), dict(id="messages", messages=turns)]
    world = talks(rows, strict=True)
    assert len(world) == 3
    assert [[t["content"] for t in items(world)[i].turns] for i in ("talk", "messages")] == [kept, kept]
    if len(kept) == 3:
        assert items(world)["talk"].turns[0]["role"] == "system"


def test_openais_messages_name_their_pictures_in_parts_or_beside_them(talks):
    def user(*pictures: dict) -> dict:
        return {"role": "user", "content": [*pictures, {"type": "text", "text": "what differs?"}]}
    answer = {"role": "assistant", "content": "the colour"}
    one = {"type": "image"}
    world = talks([
        dict(id="beside", images=["1.png", "2.png"], messages=[user(one, one), answer]),
        dict(id="parts", messages=[user({"type": "image", "image": "1.png"},
                                        {"type": "image_url", "image_url": {"url": "2.png"}}), answer]),
        dict(id="text", messages=[user(), answer]),
        dict(id="bad", messages=[user({"type": "video"}), answer])])
    found = items(world)
    assert [*world.broken.values()] == ['"text" is missing'] and {*found} == {"beside", "parts", "text"}
    for i, count in (("beside", 2), ("parts", 2), ("text", 0)):
        assert found[i].turns[0]["content"] == "<image>\n" * count + "what differs?"
        assert [p[0, 0, 0] for p in found[i].pictures] == [80, 160][:count]


def test_the_first_stage_of_llava_learns_the_answer_after_a_system_text_too(talks):
    turns = [{"from": "system", "value": "be brief"}, *GOOD["conversations"]]
    item = items(talks([{**GOOD, "conversations": turns}]))["good"]
    t = shapes_tokenizer()
    d = data.training_document(item, t, template=TEMPLATES["plain"])
    assert t.decode([x for x in d.labels if x != IGNORE]).strip() == "a" and d.tokens.count(IMAGE) == 1


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.json", "talks"])
@pytest.mark.parametrize("as_lines", [False, True])
def test_a_json_list_and_json_lines_are_read_whatever_the_file_is_called(talks, name, as_lines):
    assert len(talks([GOOD] * 3, name, as_lines)) == 3


UNUSABLE = {
    "two pictures, one <image>": dict(image=["0.png", "1.png"], conversations=GOOD["conversations"]),
    "a picture, no <image>": dict(image="0.png", conversations=[human("q"), gpt("a")]),
    "<image>, no picture": dict(conversations=GOOD["conversations"]),
    "<image> in an answer": dict(image="0.png", conversations=[human("q"), gpt("a <image>")]),
    "a dropped turn had it": dict(image="0.png", conversations=[gpt("<image>"), human("q"), gpt("a")]),
    "two of gpt": dict(conversations=[human("q"), gpt("a"), gpt("b")]),
    "nobody answers": dict(conversations=[human("q")]),
    "no turn": dict(conversations=[]),
    "empty answer": dict(image="0.png", conversations=[human("<image>\nq"), gpt("  ")]),
    "unknown speaker": dict(conversations=[{"from": "narrator", "value": "q"}, gpt("a")]),
    "a list where a text belongs": dict(messages=[{"role": "user", "content": [{"type": "text"}]}, gpt("a")]),
    "no list": dict(conversations="q"),
    "leaves the folder": dict(image="../0.png", conversations=GOOD["conversations"]),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_conversation_that_cannot_be_used_is_counted_when_read_and_stops_a_strict_run(talks, case, capsys):
    rows = [GOOD, dict(id="bad", **UNUSABLE[case])]
    world = talks(rows)
    assert [*items(world)] == ["good"] and len(world.broken) == 1
    assert "1 broken records" in capsys.readouterr().err
    with pytest.raises(UserError, match="chat.json, sample 2: .*; repair it, or leave --strict out"):
        talks(rows, strict=True)


def test_alpacas_input_may_be_missing_and_an_image_token_in_it_is_counted(tmp_path):
    rows = [dict(instruction="hi", output="a"), dict(instruction="hi", input=None, output="b"),
            dict(instruction="hi", input="", output="c"), dict(instruction="show <image>", output="d")]
    dump(tmp_path / "alpaca_data.json", rows)
    world = open_data(f"alpaca:{tmp_path}:all")
    assert len(world) == 3 and len(world.broken) == 1
    assert len({item.turns[0]["content"] for item in items(world).values()}) == 1
    (tmp_path / "alpaca_data.json").write_text("\ufeff" + lines(rows[:3]), encoding="utf-8")
    assert len(open_data(f"alpaca:{tmp_path}:all", strict=True)) == 3


# --- captions and answers -----------------------------------------------------------------------------------

def coco(folder: Path, captions: list, ids=int, **more) -> Path:
    dump(folder / "annotations/captions_train2014.json", {
        "images": [dict(id=i, file_name=f"{i}.jpg") for i in range(len(captions))],
        "annotations": [dict(image_id=ids(i), caption=c) for i, c in enumerate(captions)]} | more)
    for i in range(len(captions)):
        picture(folder / f"train2014/{i}.jpg", 40 * i)
    return folder


def textvqa(folder: Path, answers: list[list[str]]) -> Path:
    dump(folder / "TextVQA_0.5.1_train.json", {"data": [
        dict(question_id=i, image_id=f"i{i}", question="what?", answers=a) for i, a in enumerate(answers)]})
    for i in range(len(answers)):
        picture(folder / f"train_images/i{i}.jpg", 40 * i)
    return folder


def test_an_empty_caption_or_answer_is_skipped_and_counted(tmp_path, capsys):
    for spec in (f"coco:{coco(tmp_path / 'a', ['  ', 'a dog', 'a cat'])}:train",
                 f"textvqa:{textvqa(tmp_path / 'b', [[''] * 9, ['nokia'] * 9, [''] * 6 + ['x'] * 3])}:train"):
        world = open_data(spec)
        assert len(world) == 2 and len(world.broken) == 1
        for i in range(6):
            item = world.item(i, turns=5)
            assert item.captions or item.qas[0].answer in ("nokia", "x")
        with pytest.raises(UserError, match="are empty; repair it"):
            open_data(spec, strict=True)


@pytest.mark.parametrize("ids", [str, float])
def test_ids_that_are_texts_in_one_file_and_numbers_in_the_other_are_the_same(tmp_path, ids):
    world = open_data(f"coco:{coco(tmp_path, ['a dog', 'a cat'], ids)}:train", strict=True)
    assert sorted(world.item(i).captions[0] for i in range(2)) == ["a cat", "a dog"]


def vqa(folder: Path, part: str, ids=int, image: int = 1) -> Path:
    dump(folder / f"v2_OpenEnded_mscoco_{part}_questions.json",
         {"questions": [dict(question_id=11, image_id=ids(image), question="what?")]})
    if "test" not in part:
        dump(folder / f"v2_mscoco_{part}_annotations.json", {"annotations": [
            dict(question_id=ids(11), question_type="is", answer_type="other", multiple_choice_answer="x",
                 answers=[dict(answer="x", answer_id=k) for k in range(10)])]})
    return folder


def test_vqas_test_dev_has_questions_of_its_own_and_the_pictures_of_test(tmp_path):
    picture(vqa(tmp_path, "test-dev2015") / "test2015/COCO_test2015_000000000001.jpg")
    world = open_data(f"vqav2:{tmp_path}:test-dev", strict=True)
    assert len(world) == 1 and world.item(0).qas[0].answers == []


@pytest.mark.parametrize("split", ["test2014", "test2015", "test-dev2015", "test2017", "test-dev2017"])
def test_cocos_test_sets_have_pictures_without_captions(tmp_path, split):
    dump(tmp_path / f"annotations/image_info_{split}.json", {"images": [dict(id=1, file_name="1.jpg")]})
    picture(tmp_path / split.replace("-dev", "") / "1.jpg")
    assert open_data(f"coco:{tmp_path}:{split}", strict=True).item(0).captions == []


def test_the_pictures_of_coco_2014_are_found_under_their_names_of_2017_and_the_other_way_round(tmp_path):
    rows = [("train2014", "train", 9), ("val2014", "test", 42), ("val2014", "restval", 43)]
    dump(tmp_path / "dataset_coco.json", {"images": [
        dict(filepath=part, filename=f"COCO_{part}_{i:012d}.jpg", split=split, cocoid=str(i), sentids=[i],
             sentences=[dict(raw="a dog")]) for part, split, i in rows]})
    for file in ("train2017/000000000009.jpg", "val2017/000000000042.jpg", "train2017/000000000043.jpg"):
        picture(tmp_path / file)
    vqa(tmp_path, "val2014", str, 42)
    dump(tmp_path / "annotations/captions_train2014.json", {
        "images": [dict(id=9, file_name="COCO_train2014_000000000009.jpg")],
        "annotations": [dict(image_id=9, caption="a dog")]})
    for spec, count in (("karpathy:{}:train", 2), ("karpathy:{}:test", 1), ("vqav2:{}:val", 1),
                        ("coco:{}:train2014", 1)):
        world = open_data(spec.format(tmp_path), strict=True)
        assert len(world) == count and {world.item(i).image.shape for i in range(count)} == {(48, 48, 3)}
    new = tmp_path / "new"
    dump(new / "annotations/captions_train2017.json", {
        "images": [dict(id=43, file_name="000000000043.jpg")],
        "annotations": [dict(image_id=43, caption="a dog")]})
    picture(new / "val2014/COCO_val2014_000000000043.jpg")
    assert open_data(f"coco:{new}:train2017", strict=True).item(0).captions == ["a dog"]


@pytest.mark.parametrize("text, ending", [
    ("Is it?\tYes\nIs it not?\tNo\n\n", ".jpg"), ("Is it?\tyes\nIs it not?\tNO\n", ".jpg"),
    ("Is it?\tYes\nIs it not?\tNo\n", ".JPG"), ("Is it?\tYes\nIs it not?\tNo\n", ".jpeg"),
    ("\ufeffIs it?\tYes.\t\r\nIs it not?\t No \r\n", ".PNG"), ("Is it?\tYes\nIs it not?\tNo", ".png"),
])
def test_mme_files_differ_in_blank_lines_case_and_endings(tmp_path, text, ending):
    folder = tmp_path / "MME_Benchmark_release_version/existence"
    picture(folder / f"0001{ending}")
    (folder / "0001.txt").write_text(text, encoding="utf-8")
    item = open_data(f"mme:{tmp_path}:test", strict=True).item(0)
    assert [(q.question, q.answer) for q in item.qas] == [("Is it?", "Yes"), ("Is it not?", "No")]


# --- wrong types --------------------------------------------------------------------------------------------

def places(value, at=()):
    """Every place in a JSON value, of a list the first two entries."""
    yield at
    if isinstance(value, (dict, list)):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value[:2]):
            yield from places(entry, (*at, key))


def replaced(value, at, new):
    if not at:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[at[0]] = replaced(value[at[0]], at[1:], new)
    return changed


@pytest.mark.parametrize("spec, file", [
    ("coco:coco_captions:val2014", "annotations/captions_val2014.json"),
    ("karpathy:coco_captions:train", "dataset_coco.json"),
    ("textcaps:textcaps:train", "TextCaps_0.1_train.json"),
    ("vqav2:vqav2:val", "v2_OpenEnded_mscoco_val2014_questions.json"),
    ("vqav2:vqav2:val", "v2_mscoco_val2014_annotations.json"),
    ("textvqa:textvqa:train", "TextVQA_0.5.1_train.json"),
    ("vizwizvqa:vizwiz_vqa:train", "Annotations/train.json"), ("scienceqa:scienceqa:train", "problems.json"),
    ("scienceqa:scienceqa:train", "pid_splits.json"),
    ("llava:llava_instruct:all", "llava_instruct_150k.json"), ("alpaca:alpaca:all", "alpaca_data.json"),
])
def test_a_value_of_the_wrong_type_is_counted_or_refused_in_one_sentence(spec, file, tmp_path):
    kind, name, split = spec.split(":")
    shutil.copytree(GOLDEN / "datasets" / name, tmp_path, dirs_exist_ok=True)
    original, generator = json.loads((tmp_path / file).read_text(encoding="utf-8")), random.Random(0)
    for at in generator.sample(found := [*places(original)], min(12, len(found))):
        for new in generator.sample(WRONG, 4):
            (tmp_path / file).write_text(json.dumps(replaced(original, at, new)))
            try:
                world = open_data(f"{kind}:{tmp_path}:{split}")
                for i in range(len(world)):
                    world.item(i, turns=2)
            except UserError as e:
                assert "\n" not in str(e)


WRONG = [None, 0, -1, 1.5, 1e400, float("nan"), "", "x", "<image>", "../x", [], {}, [None], ["a", 1],
         {"a": 1}, True]


# --- your own pictures --------------------------------------------------------------------------------------

ROWS = [("cat.jpg", "a cat, sitting"), ("dog.jpg", "a dog")]
TABLES = {
    "captions.jsonl": lines(dict(image=i, text=t) for i, t in ROWS) + "\n\n",
    "captions.json": json.dumps([dict(image=i, caption=t) for i, t in ROWS]),
    "metadata.jsonl": lines(dict(file_name=i, text=[t, t + "!"]) for i, t in ROWS),
    "captions.csv": "\ufeffimage,text\r\n" + "".join(f'{i},"{t}"\r\n' for i, t in ROWS),
    "metadata.csv": "file_name;text\n" + "".join(f"{i};{t}\n" for i, t in ROWS),
    "captions.tsv": "image\tcaption\n" + "".join(f"{i}\t{t}\n" for i, t in ROWS),
    "captions.txt": "image,caption\n" + "".join(f'{i},"{t}"\n' for i, t in ROWS),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_own_pictures_may_be_listed_in_json_or_a_table(tmp_path, name, encoding):
    for file, _ in ROWS:
        picture(tmp_path / file)
    text = TABLES[name].removeprefix("\ufeff" if encoding == "utf-16" else "")
    (tmp_path / name).write_text(text, encoding=encoding)
    for spec in (f"folder:{tmp_path}:all", f"folder:{tmp_path / name}:all"):
        world = open_data(spec, strict=True)
        captions = sorted(c for item in items(world).values() for c in item.captions)
        assert {c.rstrip("!") for c in captions} == {t for _, t in ROWS} and len(world) == 2
        assert len(captions) == (4 if name == "metadata.jsonl" else 2)


def test_a_quoted_text_of_a_table_may_go_on_in_the_next_line_and_a_broken_quote_is_named(tmp_path):
    picture(tmp_path / "images/cat.jpg")
    table = tmp_path / "captions.csv"
    table.write_text('image,text\ncat.jpg,"a cat\nthat sits"\n')
    assert open_data(f"folder:{tmp_path}:all").item(0).captions == ["a cat\nthat sits"]
    for broken, where in (('cat.jpg,"a cat\ncat.jpg,a cat\n', "lines 3 to 4"),
                          ('cat.jpg,"a" cat\n', "line 3")):
        table.write_text("image,text\ncat.jpg,a\n" + broken)
        with pytest.raises(UserError, match=f"captions.csv, {where}: .*; repair the table"):
            open_data(f"folder:{tmp_path}:all")


def test_empty_lines_are_no_records(tmp_path, capsys):
    picture(tmp_path / "0.png")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": "0.png", "text": "a cat"}) + "\n\n  \n")
    open_data(f"folder:{tmp_path}:all")
    open_data(f"folder:{tmp_path}:all", strict=True)
    assert not capsys.readouterr().err


def test_a_row_of_a_table_with_an_unquoted_separator_is_not_cut_in_silence(tmp_path):
    picture(tmp_path / "cat.jpg")
    (tmp_path / "captions.csv").write_text("image,text\ncat.jpg,a cat, sitting\ncat.jpg,a cat\ncat.jpg\n")
    world = open_data(f"folder:{tmp_path}:all")
    assert world.item(0).captions == ["a cat"] and len(world.broken) == 2
    (tmp_path / "captions.csv").write_text("cat.jpg,a cat\n")
    with pytest.raises(UserError, match="its first line is .* but it must name the columns"):
        open_data(f"folder:{tmp_path}:all")


@pytest.mark.parametrize("listed, there", [
    ("cat.jpg", "cat.JPG"), ("cat.JPG", "cat.jpeg"), ("cat", "cat.png"), ("sub\\cat.png", "sub/cat.png"),
    ("cat.v2", "cat.v2.jpg"), ("deep/er/cat.png", "deep/er/cat.png"),
])
def test_a_picture_is_found_under_another_spelling_of_its_name(tmp_path, listed, there):
    picture(tmp_path / there)
    (tmp_path / "captions.jsonl").write_text(lines([dict(image=listed, text="a cat")]))
    assert open_data(f"folder:{tmp_path}:all", strict=True).item(0).captions == ["a cat"]


def test_another_kind_of_file_is_another_picture_and_a_whole_path_must_lie_in_the_folder(tmp_path):
    picture(tmp_path / "d/cat.png")
    own = tmp_path / "d/captions.jsonl"
    own.write_text(lines([dict(image="cat.jpg", text="a cat")]))
    with pytest.raises(UserError, match="cat.jpg: no such picture file"):
        open_data(f"folder:{tmp_path / 'd'}:all", strict=True).item(0)
    own.write_text(lines([dict(image=str(tmp_path / "d/cat.png"), text="a cat")]))
    assert open_data(f"folder:{tmp_path / 'd'}:all", strict=True).item(0).captions == ["a cat"]
    for outside in (f"{tmp_path}/cat.png", "..\\cat.png", "a/../../cat.png", f"{tmp_path}/d/../cat.png", ""):
        own.write_text(lines([dict(image=outside, text="a cat")]))
        with pytest.raises(UserError, match="lies outside the folder"):
            open_data(f"folder:{tmp_path / 'd'}:all", strict=True)


# --- splits -------------------------------------------------------------------------------------------------

def test_several_captions_of_a_picture_are_its_references_and_lie_in_one_split(tmp_path):
    for i in range(20):
        picture(tmp_path / f"{i}.png", 12 * i)
    (tmp_path / "captions.jsonl").write_text(
        lines(dict(image=("./" * (i % 2)) + f"{i // 5}.png", text=f"caption {i}") for i in range(100)))
    train, val = (open_data(f"folder:{tmp_path}:{split}") for split in ("train", "val"))
    assert len(train) == 18 and len(val) == 2 and not train.pictures & val.pictures
    assert len(val.item(0).captions) == 5 == len(train.item(0, turns=1).captions)


def test_conversations_and_pages_about_one_picture_lie_in_one_split(tmp_path):
    for i in range(12):
        picture(tmp_path / f"{i}.png", 12 * i)
    turns = GOOD["conversations"]
    dump(tmp_path / "chat.json", [dict(id=f"{i}-{k}", image=f"{i}.png", conversations=turns)
                                  for k in range(3) for i in range(12)])
    train, val = (open_data(f"llava:{tmp_path}:{split}") for split in ("train", "val"))
    assert (len(train), len(val)) == (33, 3) and not train.pictures & val.pictures
    both = [human("<image>\n<image>\nq"), gpt("a")]                # 0 1 · 1 2 · …: all are linked
    dump(tmp_path / "chat.json", [dict(id=str(i), image=[f"{i}.png", f"{i + 1}.png"], conversations=both)
                                  for i in range(11)])
    assert len(open_data(f"llava:{tmp_path}:train")) == 11
    with pytest.raises(UserError, match="share one picture, so none is left for val"):
        open_data(f"llava:{tmp_path}:val")


@pytest.mark.parametrize("count", [1, 2, 5, 9, 10, 25])
def test_no_picture_is_in_train_and_val_however_few_there_are(tmp_path, count):
    for i in range(count):
        picture(tmp_path / f"{i}.png", 9 * i)
    (tmp_path / "captions.jsonl").write_text(lines(dict(image=f"{i}.png", text="x") for i in range(count)))
    train = open_data(f"folder:{tmp_path}:train").pictures
    if count == 1:
        with pytest.raises(UserError, match="none is left for val"):
            open_data(f"folder:{tmp_path}:val")
        return
    val = open_data(f"folder:{tmp_path}:val").pictures
    assert val and not train & val and len(train | val) == count
