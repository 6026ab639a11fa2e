"""formats/datasets.py: one short reader per data set on disk; its docstring shows the layout that it reads.

A reader is a generator: read_NAME(folder, split) yields a Record for each entry that can be used and a
BrokenRecord (where, why) for each that cannot; a file that cannot be read at all is a UserError. The inner
function of a reader makes a Record of one row. From records.py:

    load_lists, read_lines      the rows of a JSON file, the lines of a text file
    read_rows, row_object       the rows of a JSON list or of JSON lines, and the object of a row
    parse_rows                  calls the inner function for every row; an exception becomes a BrokenRecord,
                                None (a row of another split, or one that is only collected) nothing
    path_inside                 the path of a picture, refused if it leads out of the folder
    same_id                     7, "7" and 7.0 are one id

map: captions (COCO first) · questions (VQA, TextVQA, VizWiz, ScienceQA, MME) · conversations (LLaVA, Alpaca)
· interleaved pages (MMC4) · FORMATS, the table of kinds. Sources: each docstring names its paper.
"""
from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

from support.formats.chat import alpaca_prompt
from support.formats.own_pictures import read_folder
from support.formats.records import (BrokenRecord, Record, checked_text, find_picture, first_existing,
                                     load_lists, parse_rows, path_inside, read_lines, read_rows, row_object,
                                     same_id)

COCO_PARTS = ("train2014", "val2014", "test2014", "test2015", "val2017", "train2017", "test2017")


def coco_pictures(folder: Path) -> Callable[[str, str], str]:
    """A function (part, file name) → the path of a picture of COCO.

    Where the part has no folder, the picture is looked for under its name in another year's: 2017 gave the
    pictures of 2014 new names and new parts, COCO_val2014_000000000042.jpg is now train2017/000000000042.jpg.
    """
    present = [(f"{root}{part}", part) for root in ("", "images/") for part in COCO_PARTS
               if (folder / root / part).is_dir()]

    def find(part: str, name: str) -> str:
        name = name.removeprefix(f"{part}/")
        path = path_inside(folder, f"{part}/{name}" if part else name)
        number = re.search(r"(?:^|_)(\d{12}\.jpg)$", name)
        if (part, part) in present or part not in COCO_PARTS or not number:
            return path
        same = [f"{folder}/{where}/{name}" for where, other in present if other == part]
        renamed = [f"{folder}/{where}/{number[1]}" if "2017" in other
                   else f"{folder}/{where}/COCO_{other}_{number[1]}" for where, other in present]
        return next((p for p in same + renamed if os.path.exists(p)), path)
    return find


def read_coco(folder: Path, split: str, names=("captions_{}2014", "captions_{}2017", "captions_{}")):
    """COCO Captions (1504.00325); VizWiz-Captions (2002.08565), without those marked rejected or pre-canned:
        annotations/captions_{train,val}{2014,2017}.json     annotations/image_info_test2014.json …
        val2014/COCO_val2014_000000000042.jpg …     val2017/ …     test2014/ …
        annotations/{train,val,test}.json                    val/VizWiz_val_00000000.jpg …"""
    if split.startswith("test2") or split.startswith("test-"):
        names = ("image_info_{}",)                      # nobody has their captions
    file = first_existing(folder, *(f"annotations/{name.format(split)}.json" for name in names),
                          *(f"{name.format(split)}.json" for name in names))
    part = file.stem.removeprefix("captions_").removeprefix("image_info_")      # train2014 …
    find, pictures = coco_pictures(folder), part.replace("-dev", "")            # the folder of the pictures
    captions_of: dict[int | str, list[tuple[str, bool]]] = {}       # image id → (caption, rejected)
    if split.startswith("test"):
        images, annotations = load_lists(file, "images"), []
    else:
        images, annotations = load_lists(file, "images", "annotations")

    def collect_caption(n, row):
        caption = checked_text(row["caption"])
        rejected = bool(row.get("is_rejected") or row.get("is_precanned"))
        captions_of.setdefault(same_id(row["image_id"]), []).append((caption, rejected))

    def image_record(n, row):
        i = same_id(row["id"])
        captions = [] if split.startswith("test") else captions_of.pop(i, None)
        if captions is None:
            raise ValueError(f"image {i} has no caption")
        kept = [caption for caption, rejected in captions if not rejected]
        more = {"captions_all": [caption for caption, _ in captions]} if len(kept) < len(captions) else {}
        return Record(i, [find(pictures, row["file_name"])], part, kept, more=more)

    yield from parse_rows(f"{file}, annotation", annotations, collect_caption)
    yield from parse_rows(f"{file}, image", images, image_record)
    for i in captions_of:                               # image_record has taken the others
        yield BrokenRecord(f"{file}, captions of image {i}", "there is no such image")


def read_karpathy(folder: Path, split: str, name="dataset_coco.json", pictures=""):
    """COCO and Flickr30k in Karpathy's splits (1412.2306); train includes restval, 113,287 images of COCO:
        dataset_coco.json          train2014/COCO_train2014_000000000009.jpg …     val2014/ …
        dataset_flickr30k.json     flickr30k-images/1000092795.jpg …"""
    find, file = coco_pictures(folder), first_existing(folder, name, f"karpathy/{name}")
    pictures = next((p for p in (pictures, *FLICKR30K) if pictures and (folder / p).is_dir()), pictures)

    def image(n, row):
        part, sentences, subfolder = row["split"], row["sentences"], row.get("filepath", pictures)
        if part not in ("train", "restval", "val", "test") or not sentences:
            raise ValueError(f'split "{part}" with {len(sentences)} sentences')
        if split == part or (split, part) == ("train", "restval"):
            path = find(subfolder, row["filename"])
            i, captions = same_id(row.get("cocoid", row["filename"])), [s["raw"] for s in sentences]
            return Record(i, [path], part, captions,
                          more={"coco_split": subfolder, "sentids": row.get("sentids")})

    return parse_rows(f"{file}, image", load_lists(file, "images"), image)


FLICKR30K = ("flickr30k_images", "flickr30k_images/flickr30k_images", "images", "Images")     # its pictures


def read_flickr8k(folder: Path, split: str):
    """Flickr8k (Hodosh et al., JAIR 47); its token file also names a missing picture, which no split lists:
        Flickr8k_text/Flickr8k.token.txt                             name.jpg#0, tab, caption; five a picture
        Flickr8k_text/Flickr_8k.{trainImages,devImages,testImages}.txt     name.jpg
        Flicker8k_Dataset/1000268201_693b08cb0e.jpg …                      (sic)"""
    file = folder / "Flickr8k_text" / "Flickr8k.token.txt"
    listed = file.with_name(f"Flickr_8k.{split.replace('val', 'dev')}Images.txt")
    captions_of: dict[str, list[str]] = {name.strip(): [] for name in read_lines(listed) if name.strip()}

    def collect_caption(n, line):
        head, _, text = line.partition("\t")
        name, _, number = head.rpartition("#")
        if not (name and number.isdecimal() and text.strip()):
            raise ValueError(f'"{line:.40}" is not "name.jpg#0", a tab and a caption')
        captions_of.get(name, []).append(text)          # a picture of another split is left out

    def image(name, captions):
        return Record(name, [path_inside(folder / "Flicker8k_Dataset", name)], split, captions)

    yield from parse_rows(f"{file}, line", read_lines(file), collect_caption)
    yield from parse_rows(f"{listed},", captions_of, image)


def read_cc(folder: Path, split: str):
    """Conceptual Captions (Sharma et al., P18-1238); a picture is named by its row, and dead links leave
    gaps:
        Train_GCC-training.tsv                      training/00000000.jpg …       a row: caption, tab, URL
        Validation_GCC-1.1.0-Validation.tsv         validation/00000000.jpg …
        cc_clean.txt                                for split `clean`: rows of the training file, from 0
    `clean` is for MAPL's CC-clean (2210.07179v2, 398K rows). Neither its rule nor its list is published with
    the code: the filter keeps the rows of a list that you make, and cannot reproduce MAPL's."""
    part = "validation" if split == "val" else "training"
    file = folder / ("Validation_GCC-1.1.0-Validation.tsv" if split == "val" else "Train_GCC-training.tsv")
    names = os.listdir(folder / part) if (folder / part).is_dir() else ()
    downloaded = {os.path.splitext(name)[0]: name for name in names}            # row → 00000000.jpg
    listed, chosen = folder / "cc_clean.txt", set()

    def pair(n, line):
        if split == "clean" and n - 1 not in chosen:
            return None
        caption, url = line.split("\t") if line.count("\t") == 1 else ("", "")
        if not (caption.strip() and url.strip()) or caption.startswith(("http://", "https://")):
            raise ValueError(f'"{line:.40}" is not a caption, a tab and a URL')
        name = downloaded.get(f"{n - 1:08d}")
        images = [f"{folder / part}/{name}"] if name else []
        return Record(n - 1, images, split.replace("clean", "train"), [caption], more={"url": url})

    if split == "clean":
        yield from parse_rows(f"{listed}, line", read_lines(listed), lambda n, line: chosen.add(int(line)))
    yield from parse_rows(f"{file}, line", read_lines(file), pair)


def read_textcaps(folder: Path, split: str):
    """TextCaps (2003.12462): a row per caption, with all of the picture's; validation lies among the train
    images:
        TextCaps_0.1_{train,val,test}.json     train_images/0a1b2c3d4e5f6071.jpg …     test_images/ …"""
    file, seen = first_existing(folder, f"TextCaps_0.1_{split}.json"), set()       # seen: image ids

    def image(n, row):
        i, captions = row["image_id"], [] if split == "test" else row["reference_strs"]
        if i not in seen:
            seen.add(i)
            path = path_inside(folder, f"{split.replace('val', 'train')}_images/{i}.jpg", *TEXTVQA)
            return Record(i, [path], split, captions)

    return parse_rows(f"{file}, row", load_lists(file, "data"), image)


def read_vqa(folder: Path, split: str, version="v2_"):
    """VQAv2 (1612.00837), and without the "v2_" OK-VQA (1906.00067); ten annotators answer, for test nobody:
        v2_OpenEnded_mscoco_{train2014,val2014,test2015,test-dev2015}_questions.json
        v2_mscoco_{train2014,val2014}_annotations.json
        train2014/COCO_train2014_000000000009.jpg …     val2014/ …     test2015/ …"""
    part = split + ("2015" if split.startswith("test") else "2014")
    find, pictures = coco_pictures(folder), part.replace("-dev", "")
    questions = first_existing(folder, f"{version}OpenEnded_mscoco_{part}_questions.json")
    annotations = first_existing(folder, f"{version}mscoco_{part}_annotations.json")
    fields_of: dict[int, dict] = {}                     # question id → the fields that its annotation fills

    def collect_answers(n, row):
        chosen = row.get("multiple_choice_answer")
        more = {"question_type": row.get("question_type"), "most_common": chosen and checked_text(chosen)}
        answers = one_or_more([a["answer"] for a in row["answers"]])
        fields_of[same_id(row["question_id"])] = dict(answers=answers, kind=row.get("answer_type") or "",
                                                      more=more)

    def question(n, row):
        i = same_id(row["question_id"])
        path = find(pictures, f"COCO_{pictures}_{same_id(row['image_id']):012d}.jpg")
        if not split.startswith("test") and i not in fields_of:
            raise ValueError(f"question {i} has no annotation, or is asked twice")
        return Record(i, [path], part, question=row["question"], **fields_of.pop(i, {}))

    if not split.startswith("test"):
        rows = load_lists(annotations, "annotations")
        yield from parse_rows(f"{annotations}, annotation", rows, collect_answers)
    yield from parse_rows(f"{questions}, question", load_lists(questions, "questions"), question)
    for i in fields_of:                                 # `question` has taken the others
        yield BrokenRecord(f"{annotations}, answers to question {i}", "there is no such question")


def one_or_more(answers: list) -> list:
    """The answers; a ValueError where there is none, so that nothing can be right or learned."""
    if not answers:
        raise ValueError("it has no answers")
    return answers


def read_textvqa(folder: Path, split: str):
    """TextVQA (1904.08920); validation lies among the train images:
        TextVQA_0.5.1_{train,val,test}.json     train_images/aa00bb11cc22dd33.jpg …     test_images/ …"""
    file = first_existing(folder, f"TextVQA_0.5.1_{split}.json")

    def question(n, row):
        path = path_inside(folder, f"{split.replace('val', 'train')}_images/{row['image_id']}.jpg", *TEXTVQA)
        answers = [] if split == "test" else one_or_more(row["answers"])
        return Record(row["question_id"], [path], split, question=row["question"], answers=answers)

    return parse_rows(f"{file}, row", load_lists(file, "data"), question)


TEXTVQA = (".", "train_val_images", "images")           # where the folders of its pictures may lie


def read_vizwizvqa(folder: Path, split: str):
    """VizWiz-VQA (1802.08218), one question a picture, whose name is its id:
        Annotations/{train,val,test}.json     train/VizWiz_train_00000000.jpg …"""
    file = first_existing(folder, f"Annotations/{split}.json", f"{split}.json")

    def question(n, row):
        annotation = {}
        if split != "test":
            answers = one_or_more([a["answer"] for a in row["answers"]])
            more = {"answerable": row.get("answerable")}
            annotation = dict(answers=answers, kind=row.get("answer_type") or "", more=more)
        path = path_inside(folder, f"{split}/{row['image']}", ".", "images", "Images")
        return Record(row["image"], [path], split, question=row["question"], **annotation)

    return parse_rows(f"{file}, question", load_lists(file), question)


def read_scienceqa(folder: Path, split: str):
    """ScienceQA (2209.09513), half of it without a picture; more["hint"], ["lecture"], ["solution"] hold its
    texts:
        problems.json     pid_splits.json     images/{train,val,test}/4/image.png …"""
    file, listed = folder / "problems.json", folder / "pid_splits.json"
    problems = load_lists(file, kind=dict)

    def problem(pid, row):
        if row is None:
            raise ValueError(f"{listed.name} lists it, but there is no such problem")
        texts = ("hint", "lecture", "solution", "subject", "grade")
        more = {key: checked_text(row.get(key, "")) for key in texts}
        images = []
        if row.get("image"):
            name = f"{row['split']}/{pid}/{checked_text(row['image'])}"
            images = [path_inside(folder, name, "images", ".")]
        return Record(pid, images, row["split"], kind=more["subject"], question=row["question"],
                      choices=row["choices"], answer=same_id(row["answer"]), more=more)

    chosen = {str(pid): problems.get(str(pid)) for pid in load_lists(listed, split)}
    return parse_rows(f"{file}, problem", chosen, problem)


# MME's tasks, by group
MME = {"perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
       "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()}


def read_mme(folder: Path, split: str):
    """MME (2306.13394), 14 tasks, two questions a picture; a text file has two lines: question, tab, Yes or
    No (in any case, as its evaluation reads them):
        MME_Benchmark_release_version/existence/0001.txt …     existence/0001.jpg …                 nine tasks
        MME_Benchmark_release_version/artwork/questions_answers_YN/0001.txt …  artwork/images/ … five tasks"""
    top = first_existing(folder, "MME_Benchmark_release_version", "MME_Benchmark", ".")

    def question(n, file):
        task = file.relative_to(top).parts[0]
        parts = [line.rstrip().rpartition("\t") for line in read_lines(file) if line.strip()]
        rows = [(asked, answer.strip(" .").capitalize()) for asked, _, answer in parts]
        if len(rows) != 2 or any(not asked.strip() or answer not in ("Yes", "No") for asked, answer in rows):
            raise ValueError("the file must have two lines: a question, a tab, Yes or No")
        paths = [Path(find_picture(f"{top / task / subfolder}/{file.stem}")) for subfolder in ("images", ".")]
        path = next((p for p in paths if p.exists()), top / task / f"{file.stem}.jpg")
        group = next(group for group, tasks in MME.items() if task in tasks)
        asked, answer = rows[n - 1]
        return Record(f"{task}/{path.name}/{n - 1}", [str(path)], "test", kind=task, question=asked,
                      answers=[answer], more={"group": group})

    for task in MME["perception"] + MME["cognition"]:
        files = [*(top / task).glob("*.txt"), *(top / task / "questions_answers_YN").glob("*.txt")]
        for file in sorted(files):
            yield from parse_rows(f"{file}, question", [file, file], question)


SPEAKERS = {"system": "system", "human": "human", "user": "human",              # in any case
            **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "gpt")}   # ShareGPT's


def message_text(content) -> str:
    """A message's text; of OpenAI's parts {"type": text | image | image_url, …} the texts, with <image> for
    pictures."""
    if not isinstance(content, list):
        return checked_text(content)
    return "\n".join("<image>" if part["type"] in ("image", "image_url") else checked_text(part["text"])
                     for part in content)


def message_pictures(turns: list[dict]) -> list[str]:
    """The pictures that OpenAI's parts name."""
    parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
    names = [part[part["type"]] for part in parts if part["type"] in ("image", "image_url")]
    return [name["url"] if isinstance(name, dict) and "url" in name else name for name in names]


def read_turns(turns: list[dict]) -> tuple[tuple[str, str], ...]:
    """Turns {"from", "value"}, or as OpenAI calls them {"role", "content"}, as (speaker, text).

    A first turn of gpt is left out, as LLaVA's code does, and so is a last one of the human, which nothing
    answers. A ValueError where the speakers do not take turns.
    """
    said = []
    for turn in turns:
        speaker, text = (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
        if checked_text(speaker).lower() not in SPEAKERS:
            raise ValueError(f'the speaker "{speaker}" is none of {", ".join(SPEAKERS)}')
        said.append((SPEAKERS[speaker.lower()], message_text(text)))
    system = said[:1] if said and said[0][0] == "system" else []
    talk = said[len(system):]
    talk = talk[1:] if talk and talk[0][0] == "gpt" else talk
    talk = talk[:-1] if talk and talk[-1][0] == "human" else talk
    if not talk or [speaker for speaker, _ in talk] != ["human", "gpt"] * (len(talk) // 2):
        raise ValueError("human and gpt must take turns")
    if not any(text.strip() for speaker, text in talk if speaker == "gpt"):
        raise ValueError("all of gpt's turns are empty")
    return (*system, *talk)


def read_llava(path: Path, split: str):
    """LLaVA-Instruct, LCS-558K, CC-595K (2304.08485), LLaVA-1.5's mixture (2310.03744); path: folder or file:
        llava_instruct_150k.json                      coco/train2017/000000033471.jpg …
        blip_laion_cc_sbu_558k.json, chat.json        images/00453/004539375.jpg …
        llava_v1_5_mix665k.json                       coco/train2017/…, gqa/… (some have no picture)
    "image" may be a list ("images", too), with an <image> for each in the human's turns. A JSON list or JSON
    lines, whatever the file is called."""
    file = first_existing(path, "llava_instruct_150k.json", "llava_v1_5_mix665k.json",
                          "blip_laion_cc_sbu_558k.json", "chat.json", "chat.jsonl", *only_list(path))

    def sample(n, row):
        row = row_object(row)
        turns = row[next((name for name in ("messages", "conversation") if name in row), "conversations")]
        images = row.get("image") or row.get("images") or message_pictures(turns)
        images = images if isinstance(images, list) else [images]
        images = [image.get("path") if isinstance(image, dict) else image for image in images]
        paths = [path_inside(file.parent, image, ".", "images", "coco/train2017") for image in images]
        return Record(n if row.get("id") is None else row["id"], paths, turns=read_turns(turns))

    return parse_rows(f"{file}, sample", read_rows(file), sample)


def only_list(folder: Path) -> list[str]:
    """The name of the JSON file of a folder that has one alone."""
    names = [file.name for file in folder.glob("*.json*") if file.suffix in (".json", ".jsonl")]
    return names if len(names) == 1 else []


def read_alpaca(path: Path, split: str):
    """Alpaca's 52K instructions (Taori et al., 2023), text alone; the path may name the file:
        alpaca_data.json     [{"instruction": …, "input": … or "" or not there, "output": …}, …]"""
    file = first_existing(path, "alpaca_data.json", "alpaca_data.jsonl", "alpaca_data_cleaned.json",
                          "alpaca_gpt4_data.json", *only_list(path))

    def sample(n, row):
        row = row_object(row)
        texts = {"instruction": row["instruction"], "input": row.get("input") or "", "output": row["output"]}
        more = {key: checked_text(text) for key, text in texts.items()}
        if not more["instruction"].strip():
            raise ValueError("its instruction is empty")
        prompt = alpaca_prompt(more["instruction"], more["input"])
        return Record(n - 1, turns=(("human", prompt), ("gpt", more["output"])), more=more)

    return parse_rows(f"{file}, sample", read_rows(file), sample)


def read_interleaved(path: Path, split: str):
    """MMC4 (2304.06939), unpacked; a document keeps its downloaded pictures; the path may name a file:
        docs_shard_0_v2.jsonl …     {"url", "text_list": […],
                                     "image_info": [{"image_name", "matched_text_index"}, …]}
        images/aaaaaaaaaaaa.jpg …"""
    def document(n, line):
        row, folder = row_object(line), path.parent if path.is_file() else path
        matched = [[info["image_name"], info["matched_text_index"], info.get("matched_sim")]
                   for info in row["image_info"]]
        paths, places = [], []                      # of the downloaded pictures; place: the sentence after it
        for name, sentence, _ in matched:
            if sentence not in range(len(row["text_list"])):
                last = len(row["text_list"]) - 1
                raise ValueError(f"{name} stands before sentence {sentence} of 0 to {last}")
        for name, sentence, _ in matched:
            path_of_picture = path_inside(folder, name, "images", ".")
            if os.path.exists(path_of_picture):
                paths.append(path_of_picture)
                places.append(sentence)
        more = {"matched": matched, "places": places}
        return Record(row["url"], paths, texts=row["text_list"], more=more)

    for file in [path] if path.is_file() else sorted({*path.glob("docs*.jsonl"), *path.glob("docs*.json")}):
        yield from parse_rows(f"{file}, line", read_rows(file), document)


def split_at_pictures(r: Record) -> list[tuple[int | None, str]]:
    """An interleaved document, cut before each picture: [(None, text before all), (0, text from picture 0
    on), …]."""
    parts: list[tuple[int | None, list[str]]] = [(None, [])]
    for n, sentence in enumerate(r.texts):
        parts += [(image, []) for image, place in enumerate(r.more["places"]) if place == n]
        parts[-1][1].append(sentence)
    return [(image, " ".join(part)) for image, part in parts if part or image is not None]


OWN = "train val all"               # no split on disk: every tenth picture is val, the others are train
OWN_TEST = "train val test all"     # of 200 pictures and more every tenth is test, too
FORMATS = {                     # kind: reader, splits (the first is the default), held-out split of the table
    "coco": (read_coco, "train val train2014 val2014 train2017 val2017 test2014 test2015 test-dev2015 "
                        "test2017 test-dev2017", "val"),
    "karpathy": (read_karpathy, "train restval val test", "test"),
    "flickr30k": (functools.partial(read_karpathy, name="dataset_flickr30k.json",
                                    pictures="flickr30k-images"), "train val test", "test"),
    "flickr8k": (read_flickr8k, "train val test", "test"),
    "cc": (read_cc, "train clean val", "val"),
    "textcaps": (read_textcaps, "train val test", "val"),
    "vizwiz": (functools.partial(read_coco, names=["{}"]), "train val test", "val"),
    "vqav2": (read_vqa, "train val test test-dev", "val"),
    "okvqa": (functools.partial(read_vqa, version=""), "train val", "val"),
    "textvqa": (read_textvqa, "train val test", "val"),
    "vizwizvqa": (read_vizwizvqa, "train val test", "val"),
    "scienceqa": (read_scienceqa, "train val test trainval minitrain minival minitest", "test"),
    "mme": (read_mme, "test", "test"),
    "llava": (read_llava, OWN, "val"), "alpaca": (read_alpaca, OWN, "val"),
    "interleaved": (read_interleaved, OWN, "val"), "folder": (read_folder, OWN_TEST, "val"),
}
LAYOUTS = {                     # kind: what lies in PATH, in a line
    "folder": "cat.jpg and cat.txt, or captions.jsonl, captions.csv; sub-folders",
    "parquet": "train-00000-of-00002.parquet …: columns image, text, question …",
    "wds": "00000.tar …: cat.jpg, cat.txt or cat.json …: WebDataset's shards",
    "coco": "annotations/captions_train2014.json …, train2014/, val2014/ …",
    "karpathy": "dataset_coco.json, train2014/, val2014/",
    "flickr30k": "dataset_flickr30k.json, flickr30k-images/",
    "flickr8k": "Flickr8k_text/, Flicker8k_Dataset/",
    "cc": "Train_GCC-training.tsv, training/00000000.jpg …, validation/ …",
    "textcaps": "TextCaps_0.1_train.json …, train_images/, test_images/",
    "textvqa": "TextVQA_0.5.1_train.json …, train_images/, test_images/",
    "vizwiz": "captions: annotations/train.json …, train/, val/, test/",
    "vizwizvqa": "questions: Annotations/train.json …, train/, val/, test/",
    "vqav2": "v2_OpenEnded_mscoco_*.json, v2_mscoco_*.json, train2014/ …",
    "okvqa": "the same files without v2_",
    "scienceqa": "problems.json, pid_splits.json, images/train/4/image.png …",
    "mme": "MME_Benchmark_release_version/existence/0001.txt, 0001.jpg …",
    "llava": "llava_instruct_150k.json, chat.json … or its path; pictures beside it",
    "alpaca": "alpaca_data.json or its path",
    "interleaved": "docs_shard_0_v2.jsonl …, images/: MMC4's pages",
}
