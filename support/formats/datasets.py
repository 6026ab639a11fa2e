"""formats/datasets.py: one short reader per data set on disk; each docstring shows the layout that it reads."""
from __future__ import annotations

import functools
import json
import os
from pathlib import Path

from support.formats.chat import alpaca_prompt
from support.formats.records import (BrokenRecord, Record, checked_text, first_existing, load_lists,
                                     parse_rows, path_inside, read_lines)


def read_coco(folder: Path, split: str, names=("captions_{}2014", "captions_{}2017", "captions_{}")):
    """COCO Captions (1504.00325); VizWiz-Captions (2002.08565), without those marked rejected or pre-canned:
        annotations/captions_{train,val}{2014,2017}.json     val2014/COCO_val2014_000000000042.jpg …     val2017/ …
        annotations/{train,val,test}.json                    val/VizWiz_val_00000000.jpg …"""
    file = first_existing(folder / "annotations", *(name.format(split) + ".json" for name in names))
    part, said = file.stem.removeprefix("captions_"), {}
    images, notes = (load_lists(file, "images"), []) if split == "test" else load_lists(file, "images", "annotations")

    def note(n, row):
        caption = checked_text(row["caption"]), bool(row.get("is_rejected") or row.get("is_precanned"))
        said.setdefault(row["image_id"], []).append(caption)

    def image(n, row):
        captions = [] if split == "test" else said.pop(row["id"], None)
        if captions is None:
            raise ValueError(f"image {row['id']} has no caption")
        kept = [c for c, unfit in captions if not unfit]
        more = {"captions_all": [c for c, _ in captions]} if len(kept) < len(captions) else {}
        return Record(row["id"], [path_inside(folder / part, row["file_name"])], part, kept, more=more)

    yield from parse_rows(f"{file}, annotation", notes, note)
    yield from parse_rows(f"{file}, image", images, image)
    yield from (BrokenRecord(f"{file}, captions of image {i}", "there is no such image") for i in said)


def read_karpathy(folder: Path, split: str, name="dataset_coco.json", pictures=""):
    """COCO and Flickr30k in Karpathy's splits (1412.2306); train takes restval along, 113,287 images of COCO:
        dataset_coco.json          train2014/COCO_train2014_000000000009.jpg …     val2014/ …
        dataset_flickr30k.json     flickr30k-images/1000092795.jpg …"""
    def image(n, row):
        part, sentences, where = row["split"], row["sentences"], row.get("filepath", pictures)
        if part not in ("train", "restval", "val", "test") or not sentences:
            raise ValueError(f'split "{part}" with {len(sentences)} sentences')
        if split == part or (split, part) == ("train", "restval"):
            path = path_inside(folder, f"{where}/{row['filename']}")
            return Record(row.get("cocoid", row["filename"]), [path], part, [s["raw"] for s in sentences],
                          more={"coco_split": where, "sentids": row.get("sentids")})

    return parse_rows(f"{folder / name}, image", load_lists(folder / name, "images"), image)


def read_flickr8k(folder: Path, split: str):
    """Flickr8k (Hodosh et al., JAIR 47); its token file also names a picture that does not exist and no split lists:
        Flickr8k_text/Flickr8k.token.txt                                   name.jpg#0, tab, caption; five a picture
        Flickr8k_text/Flickr_8k.{trainImages,devImages,testImages}.txt     name.jpg
        Flicker8k_Dataset/1000268201_693b08cb0e.jpg …                      (sic)"""
    file = folder / "Flickr8k_text" / "Flickr8k.token.txt"
    listed = file.with_name(f"Flickr_8k.{split.replace('val', 'dev')}Images.txt")
    said: dict[str, list[str]] = {name: [] for name in read_lines(listed)}

    def caption(n, line):
        head, _, text = line.partition("\t")
        name, _, number = head.rpartition("#")
        if not (name and number.isdecimal() and text.strip()):
            raise ValueError(f'"{line:.40}" is not "name.jpg#0", a tab and a caption')
        said.get(name, []).append(text)

    image = lambda name, captions: Record(name, [path_inside(folder / "Flicker8k_Dataset", name)], split, captions)
    yield from parse_rows(f"{file}, line", read_lines(file), caption)
    yield from parse_rows(f"{listed},", said, image)


def read_cc(folder: Path, split: str):
    """Conceptual Captions (Sharma et al., P18-1238); a picture is named by its row, and dead links leave gaps:
        Train_GCC-training.tsv                      training/00000000.jpg …       a row: caption, tab, URL
        Validation_GCC-1.1.0-Validation.tsv         validation/00000000.jpg …
        cc_clean.txt                                for split `clean`: rows of the training file, from 0, one a line
    `clean` is for MAPL's CC-clean (2210.07179v2, 398K rows). Neither their rule nor their list is published with their
    code: the filter keeps the rows of a list that you make, and cannot make theirs again."""
    part = "validation" if split == "val" else "training"
    file = folder / ("Validation_GCC-1.1.0-Validation.tsv" if split == "val" else "Train_GCC-training.tsv")
    there = set(os.listdir(folder / part)) if (folder / part).is_dir() else ()
    listed, chosen = folder / "cc_clean.txt", set()

    def pair(n, line):
        if split == "clean" and n - 1 not in chosen:
            return None
        caption, url = line.split("\t") if line.count("\t") == 1 else ("", "")
        if not (caption.strip() and url.strip()):
            raise ValueError(f'"{line:.40}" is not a caption, a tab and a URL')
        images = [f"{folder / part}/{n - 1:08d}.jpg"] if f"{n - 1:08d}.jpg" in there else []
        return Record(n - 1, images, split.replace("clean", "train"), [caption], more={"url": url})

    if split == "clean":
        yield from parse_rows(f"{listed}, line", read_lines(listed), lambda n, line: chosen.add(int(line)))
    yield from parse_rows(f"{file}, line", read_lines(file), pair)


def read_textcaps(folder: Path, split: str):
    """TextCaps (2003.12462): a row per caption, with all of the picture's; validation lies among the train images:
        TextCaps_0.1_{train,val,test}.json     train_images/0a1b2c3d4e5f6071.jpg …     test_images/ …"""
    file, seen = folder / f"TextCaps_0.1_{split}.json", set()

    def image(n, row):
        i, captions = row["image_id"], [] if split == "test" else row["reference_strs"]
        if i not in seen:
            seen.add(i)
            return Record(i, [path_inside(folder, f"{split.replace('val', 'train')}_images/{i}.jpg")], split, captions)

    return parse_rows(f"{file}, row", load_lists(file, "data"), image)


def read_folder(folder: Path, split: str):
    """Your own pictures:
        captions.jsonl     {"image": "cat.jpg", "text": "a cat"}
        cat.jpg …"""
    def image(n, line):
        row = json.loads(line)
        if not row["text"].strip():
            raise ValueError("the text is empty")
        return Record(f"line {n}", [path_inside(folder, row["image"])], captions=[row["text"]])

    return parse_rows(f"{folder / 'captions.jsonl'}, line", read_lines(folder / "captions.jsonl"), image)


def read_vqa(folder: Path, split: str, version="v2_"):
    """VQAv2 (1612.00837), and without the "v2_" OK-VQA (1906.00067); ten annotators answer, for test nobody:
        v2_OpenEnded_mscoco_{train2014,val2014,test2015}_questions.json     train2014/COCO_train2014_000000000009.jpg …
        v2_mscoco_{train2014,val2014}_annotations.json                      val2014/ …     test2015/ …"""
    part, notes = {"train": "train2014", "val": "val2014", "test": "test2015"}[split], {}
    asked = folder / f"{version}OpenEnded_mscoco_{part}_questions.json"
    told = folder / f"{version}mscoco_{part}_annotations.json"

    def note(n, row):
        more = {"question_type": row["question_type"], "most_common": row.get("multiple_choice_answer")}
        answers = [a["answer"] for a in row["answers"]]
        notes[row["question_id"]] = dict(answers=answers, kind=row["answer_type"], more=more)

    def question(n, row):
        i, path = row["question_id"], f"{folder}/{part}/COCO_{part}_{row['image_id']:012d}.jpg"
        if split != "test" and i not in notes:
            raise ValueError(f"question {i} has no annotation, or is asked twice")
        return Record(i, [path], part, question=row["question"], **notes.pop(i, {}))

    if split != "test":
        yield from parse_rows(f"{told}, annotation", load_lists(told, "annotations"), note)
    yield from parse_rows(f"{asked}, question", load_lists(asked, "questions"), question)
    yield from (BrokenRecord(f"{told}, answers to question {i}", "there is no such question") for i in notes)


def read_textvqa(folder: Path, split: str):
    """TextVQA (1904.08920); validation lies among the train images:
        TextVQA_0.5.1_{train,val,test}.json     train_images/aa00bb11cc22dd33.jpg …     test_images/ …"""
    file = folder / f"TextVQA_0.5.1_{split}.json"

    def question(n, row):
        path = path_inside(folder, f"{split.replace('val', 'train')}_images/{row['image_id']}.jpg")
        answers = [] if split == "test" else row["answers"]
        return Record(row["question_id"], [path], split, question=row["question"], answers=answers)

    return parse_rows(f"{file}, row", load_lists(file, "data"), question)


def read_vizwizvqa(folder: Path, split: str):
    """VizWiz-VQA (1802.08218), one question a picture, whose name is its id:
        Annotations/{train,val,test}.json     train/VizWiz_train_00000000.jpg …"""
    file = folder / "Annotations" / f"{split}.json"

    def question(n, row):
        told = {} if split == "test" else dict(answers=[a["answer"] for a in row["answers"]], kind=row["answer_type"],
                                               more={"answerable": row["answerable"]})
        return Record(row["image"], [path_inside(folder / split, row["image"])], split, question=row["question"], **told)

    return parse_rows(f"{file}, question", load_lists(file), question)


def read_scienceqa(folder: Path, split: str):
    """ScienceQA (2209.09513), half of it without a picture; more["hint"], ["lecture"], ["solution"] hold its texts:
        problems.json     pid_splits.json     images/{train,val,test}/4/image.png …"""
    file, listed = folder / "problems.json", folder / "pid_splits.json"
    problems = load_lists(file, kind=dict)

    def problem(pid, row):
        if row is None:
            raise ValueError(f"{listed.name} lists it, but there is no such problem")
        more = {key: checked_text(row[key]) for key in ("hint", "lecture", "solution", "subject", "grade")}
        name = row["image"]
        images = [] if name is None else [path_inside(folder / "images", f"{row['split']}/{pid}/{checked_text(name)}")]
        return Record(pid, images, row["split"], kind=row["subject"], question=row["question"], choices=row["choices"],
                      answer=row["answer"], more=more)

    return parse_rows(f"{file}, problem", {pid: problems.get(pid) for pid in load_lists(listed, split)}, problem)


MME = {"perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
       "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()}


def read_mme(folder: Path, split: str):
    """MME (2306.13394), 14 tasks, two questions a picture; a text file has two lines: question, tab, Yes or No:
        MME_Benchmark_release_version/existence/0001.txt …     existence/0001.jpg …                      nine tasks
        MME_Benchmark_release_version/artwork/questions_answers_YN/0001.txt …     artwork/images/ …      five tasks"""
    top = first_existing(folder, "MME_Benchmark_release_version", ".")

    def question(n, file):
        rows, task = [line.split("\t") for line in read_lines(file)], file.relative_to(top).parts[0]
        if len(rows) != 2 or any(len(row) != 2 or row[1].strip() not in ("Yes", "No") for row in rows):
            raise ValueError("the file must have two lines: a question, a tab, Yes or No")
        paths = [top / task / place / (file.stem + end) for place in ("images", ".") for end in (".jpg", ".png")]
        path = next((p for p in paths if p.exists()), paths[-2])
        group = next(group for group, tasks in MME.items() if task in tasks)
        return Record(f"{task}/{path.name}/{n - 1}", [str(path)], "test", kind=task, question=rows[n - 1][0],
                      answers=[rows[n - 1][1].strip()], more={"group": group})

    for task in MME["perception"] + MME["cognition"]:
        for file in sorted([*(top / task).glob("*.txt"), *(top / task / "questions_answers_YN").glob("*.txt")]):
            yield from parse_rows(f"{file}, question", [file, file], question)


def read_llava(path: Path, split: str):
    """LLaVA-Instruct, LCS-558K, CC-595K (2304.08485), LLaVA-1.5's mixture (2310.03744); the path may name the file:
        llava_instruct_150k.json                      coco/train2017/000000033471.jpg …
        blip_laion_cc_sbu_558k.json, chat.json        images/00453/004539375.jpg …
        llava_v1_5_mix665k.json                       coco/train2017/…, gqa/… (some samples have no picture)"""
    file = first_existing(path, "llava_instruct_150k.json", "llava_v1_5_mix665k.json", "blip_laion_cc_sbu_558k.json", "chat.json")

    def sample(n, row):
        turns, image = tuple((t["from"], checked_text(t["value"])) for t in row["conversations"]), row.get("image")
        if not turns or [who for who, _ in turns] != ["human", "gpt"] * (len(turns) // 2):
            raise ValueError("human and gpt must take turns, and gpt must speak last")
        if [text.count("<image>") for _, text in turns] != [int(image is not None)] + [0] * (len(turns) - 1):
            raise ValueError("<image> must stand once in the first turn if the sample has a picture, and nowhere else")
        images = [] if image is None else [path_inside(file.parent, image, ".", "images", "coco/train2017")]
        return Record(row.get("id", n), images, turns=turns)

    return parse_rows(f"{file}, sample", load_lists(file), sample)


def read_alpaca(path: Path, split: str):
    """Alpaca's 52K instructions (Taori et al., 2023), text alone; the path may name the file:
        alpaca_data.json     [{"instruction": …, "input": … or "", "output": …}, …]"""
    file = first_existing(path, "alpaca_data.json")

    def sample(n, row):
        more = {key: checked_text(row[key]) for key in ("instruction", "input", "output")}
        prompt = alpaca_prompt(more["instruction"], more["input"])
        return Record(n - 1, turns=(("human", prompt), ("gpt", more["output"])), more=more)

    return parse_rows(f"{file}, sample", load_lists(file), sample)


def read_interleaved(path: Path, split: str):
    """MMC4 (2304.06939), unpacked; a document keeps the pictures that were downloaded; the path may name a file:
        docs_shard_0_v2.jsonl …     {"url", "text_list": […], "image_info": [{"image_name", "matched_text_index"}, …]}
        images/aaaaaaaaaaaa.jpg …"""
    def document(n, line):
        row, folder = json.loads(line), path.parent if path.is_file() else path
        matched = [[i["image_name"], i["matched_text_index"], i.get("matched_sim")] for i in row["image_info"]]
        for name, at, _ in matched:
            if at not in range(len(row["text_list"])):
                raise ValueError(f"{name} stands before sentence {at} of 0 to {len(row['text_list']) - 1}")
        there = [(p, at) for name, at, _ in matched if os.path.exists(p := path_inside(folder, name, "images", "."))]
        more = {"matched": matched, "places": [at for _, at in there]}
        return Record(row["url"], [p for p, _ in there], texts=row["text_list"], more=more)

    for file in [path] if path.is_file() else sorted(path.glob("docs*.jsonl")):
        yield from parse_rows(f"{file}, line", read_lines(file), document)


def split_at_pictures(r: Record) -> list[tuple[int | None, str]]:
    """An interleaved document, cut before each picture: [(None, text before all), (0, text from picture 0 on), …]."""
    parts: list[tuple[int | None, list[str]]] = [(None, [])]
    for at, sentence in enumerate(r.texts):
        parts += [(image, []) for image, place in enumerate(r.more["places"]) if place == at]
        parts[-1][1].append(sentence)
    return [(image, " ".join(part)) for image, part in parts if part or image is not None]


OWN = "train val all"               # no split on disk: every tenth record is val, the others are train
FORMATS = {                         # kind: reader, splits (the first is the default), what the final table holds out
    "coco": (read_coco, "train val train2014 val2014 train2017 val2017", "val"),
    "karpathy": (read_karpathy, "train restval val test", "test"),
    "flickr30k": (functools.partial(read_karpathy, name="dataset_flickr30k.json", pictures="flickr30k-images"),
                  "train val test", "test"),
    "flickr8k": (read_flickr8k, "train val test", "test"),
    "cc": (read_cc, "train clean val", "val"),
    "textcaps": (read_textcaps, "train val test", "val"),
    "vizwiz": (functools.partial(read_coco, names=["{}"]), "train val test", "val"),
    "vqav2": (read_vqa, "train val test", "val"),
    "okvqa": (functools.partial(read_vqa, version=""), "train val", "val"),
    "textvqa": (read_textvqa, "train val test", "val"),
    "vizwizvqa": (read_vizwizvqa, "train val test", "val"),
    "scienceqa": (read_scienceqa, "train val test trainval minitrain minival minitest", "test"),
    "mme": (read_mme, "test", "test"),
    "llava": (read_llava, OWN, "val"), "alpaca": (read_alpaca, OWN, "val"),
    "interleaved": (read_interleaved, OWN, "val"), "folder": (read_folder, OWN, "val"),
}
MME = MME                      # {"perception" | "cognition": its tasks}
