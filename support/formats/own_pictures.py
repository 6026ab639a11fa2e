"""formats/own_pictures.py: the reader of your own pictures, which lie in a folder and its sub-folders.

    cat.jpg  cat.txt  animals/dog.png  animals/dog.txt      a caption a line; .caption is read, too
    captions.jsonl      {"image": "cat.jpg", "text": "a cat"}       or images/cat.jpg; "text" may be a list
    captions.csv        image,text, then cat.jpg,a cat              also .tsv, or with semicolons
    annotations/captions.csv                                its pictures in annotations/ or beside that folder
    train/…  val/…  test/…                                  these sub-folders are the splits

Texts beside pictures and a list may stand together. A JSON list (captions.json), and the names of Hugging
Face's image folders (metadata.csv, metadata.jsonl: file_name, text), do as well; the path may name the list.
Without a list at the top, those of the sub-folders count. The id of a picture is its path in the folder.
"""
from __future__ import annotations

import contextlib
import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

from support.formats.files import refuse_device
from support.formats.records import (BrokenRecord, ENDINGS, FOLDERS, OTHER_ENDINGS, READING, Record,
                                     UNREADABLE, Unpaired, first_existing, naming_file, parse_rows,
                                     path_inside, picture_key, read_rows, read_table, row_object)

LISTS = [f"{stem}.{ending}" for stem in ("captions", "metadata")
         for ending in ("jsonl", "json", "csv", "tsv", "txt")]
PICTURE_FIELDS = ("image", "file_name", "filename", "image_path", "path", "file")
TEXT_FIELDS = ("text", "caption", "captions")
SPLITS = {**dict.fromkeys(("train", "training"), "train"), "test": "test", "testing": "test",
          **dict.fromkeys(("val", "valid", "validation", "dev"), "val")}        # as people call them → ours
PLACES = (".", "images", "Images")                      # where the pictures of a list may lie
ADVICE = 'write cat.txt beside cat.jpg, or a line {"image": "cat.jpg", "text": "a cat"} into captions.jsonl'


@dataclass
class Walk:
    """The files of a folder and its sub-folders, in the order of their paths."""
    pictures: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)             # pictures of OTHER_ENDINGS
    texts: list[str] = field(default_factory=list)              # .txt and .caption, but no list and no README
    lists: list[Path] = field(default_factory=list)             # of each folder one


def walk_folder(folder: Path) -> Walk:
    """Hidden files and folders are left out, and so are folders behind links unless --follow-links."""
    found, met, follow = Walk(), set(), READING.get() is None
    for place, folders, names in os.walk(folder, followlinks=follow):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        if follow and (real := os.path.realpath(place)) in met:             # a link to a folder above
            folders[:] = []
            continue
        met.add(real if follow else place)
        listed = next((name for name in LISTS if name in names), None)
        found.lists += [Path(place, listed)] if listed else []
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            if name[0] == ".":
                continue
            if ending.lower() in ENDINGS:
                found.pictures.append(os.path.join(place, name))
            elif ending.lower() in OTHER_ENDINGS:
                found.others.append(os.path.join(place, name))
            elif ending.lower() in (".txt", ".caption") and name not in LISTS and (
                    stem.split(".")[0].lower() not in ("readme", "license", "licence", "requirements")):
                found.texts.append(os.path.join(place, name))
    return found


def declared_splits(folder: Path) -> set[str]:
    """The sub-folders of train, val and test, where there is one for train and one for another split."""
    names = {name for name in os.listdir(folder) if name.lower() in SPLITS and (folder / name).is_dir()}
    return names if {SPLITS[name.lower()] for name in names} > {"train"} else set()


def read_folder(path: Path, split: str) -> Iterator[Record | BrokenRecord | Unpaired]:
    """The module's docstring shows the layout; rows of one picture, and lines of a text, are references."""
    if path.is_file():
        yield from ListReader(path, path.parent).records()
        return
    top, found, parts = first_existing(path, *LISTS), walk_folder(path), declared_splits(path)
    lists = [top] if top.exists() else found.lists
    named, beside = set(), set()                        # pictures: named in a list, with a text beside them
    for file in lists:
        yield from ListReader(file, path, parts, named).records()
    yield from read_texts(found, path, parts, beside)
    for picture in found.pictures:
        if picture not in beside and picture_key(picture) not in named:
            yield Unpaired(picture, "picture", "text", ADVICE, stops=not lists)
    for picture in found.others:
        if picture_key(picture) not in named:
            yield Unpaired(picture, *UNREADABLE, stops=not lists)


@dataclass
class ListReader:
    """Reads the rows of a list that lies in `folder`; `named` receives the pictures that they name."""
    file: Path
    folder: Path
    parts: set[str] = field(default_factory=set)        # of declared_splits
    named: set[str] = field(default_factory=set)
    absent: list[str] = field(default_factory=list)     # pictures that are named and not there

    def records(self) -> Iterator[Record | BrokenRecord | Unpaired]:
        if self.file.suffix.lower() in (".csv", ".tsv", ".txt"):
            rows = read_table(self.file, PICTURE_FIELDS, TEXT_FIELDS)
            yield from parse_rows(f"{self.file}, row", rows, self.record)
        else:
            yield from parse_rows(f"{self.file}, line", read_rows(self.file), self.record)
        for picture in self.absent:                     # its record is broken when it is read
            yield Unpaired(picture, "text", "picture", f"{self.file.name} names it", stops=False)

    def record(self, n: int, row) -> Record:
        row = {key and key.lower(): value for key, value in row_object(row).items()}
        if row.get(None):
            raise ValueError("it has more fields than line 1 names; quote a text that holds the separator")
        picture, captions = (row[next((name for name in names if row.get(name) is not None), names[0])]
                             for names in (PICTURE_FIELDS, TEXT_FIELDS))
        home, places = self.file.parent, PLACES
        if home.name in FOLDERS and home != self.folder:        # annotations/captions.csv, pictures beside it
            home, places = home.parent, (*(f"{home.name}/{place}" for place in PLACES), *PLACES)
        path = path_inside(home, picture, *places)
        i = os.path.normpath(path.removeprefix(f"{self.folder}/"))
        declared = row.get("split") or part_of(i, self.parts)
        if declared.lower() not in SPLITS:
            raise ValueError(f'its split "{declared}" is none of train, val and test')
        captions = captions if isinstance(captions, list) else [captions]
        record = Record(i, [path], SPLITS[declared.lower()], captions)
        self.named.add(picture_key(path))
        if not os.path.exists(path):
            self.absent.append(path)
        return record


def read_texts(found: Walk, folder: Path, parts: set[str],
               beside: set[str]) -> Iterator[Record | BrokenRecord | Unpaired]:
    """The texts that lie beside pictures; `beside` receives these pictures."""
    pictures: dict[str, list[str]] = {}                 # path without ending → pictures
    for picture in found.pictures + found.others if found.texts else ():
        for stem in (os.path.splitext(picture)[0], picture):            # cat.txt and cat.jpg.txt
            pictures.setdefault(unicodedata.normalize("NFC", stem), []).append(picture)
    others = {*found.others}                            # they are counted in read_folder
    for text in found.texts:
        described = pictures.get(unicodedata.normalize("NFC", os.path.splitext(text)[0]), [])
        if not described:
            yield Unpaired(text, "text", "picture", "name it as its picture is named")
            continue
        described = [picture for picture in described if picture not in others]
        beside.update(described)
        try:
            captions = read_captions(text)
            for picture in described:
                i = picture.removeprefix(f"{folder}/")
                yield Record(i, [picture], SPLITS[part_of(i, parts).lower()], captions)
        except (ValueError, OSError) as e:
            yield BrokenRecord(text, str(e).removeprefix(f"{text}: ").rstrip("."))


def read_captions(file: str) -> list[str]:
    """The lines of a text, UTF-8 or UTF-16; a ValueError where it holds none."""
    refuse_device(file)
    with naming_file(Path(file)) if os.path.islink(file) else contextlib.nullcontext():
        with open(file, "rb") as f:
            captions = caption_lines(f.read())
    if not captions:
        raise ValueError("it is empty")
    return captions


def caption_lines(content: bytes) -> list[str]:
    """The lines of a text, UTF-8 or UTF-16, without the empty ones."""
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is no text in UTF-8") from None
    return [line.strip() for line in text.split("\n") if line.strip()]


def part_of(name: str, parts: set[str]) -> str:
    """The sub-folder of `parts` in which a picture lies, else train."""
    first = name.partition("/")[0]
    return first if first in parts else "train"
