"""formats/hub.py: models by their name on the Hugging Face hub, and the licence that comes with them."""
from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from support.formats.files import UserError, read_json

ROOT = Path(__file__).parents[2]      # the project's folder: weights/ is found from anywhere


def tower_folder(run: Path, name: str) -> Path:
    """Where a run's tower is: inside the run, beside this file (the bundled ones), at its path, or on the hub."""
    for folder in (run / name, ROOT / name, Path(name)):
        if folder.is_dir():
            return folder
    if is_hub_name(name):
        return fetch(name)
    raise UserError(f'{run}/config.json: the tower "{name}" is neither in the run nor beside model.py; put it back or edit the path.')


# Names on the Hugging Face hub: what is fetched of a model, and what the library's exceptions mean, special ones first.
HUB_FILES = ("*config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab.*", "merges.txt",
             "added_tokens.json", "special_tokens_map.json", "chat_template.*", "README.md")
HUB_ERRORS = {
    "GatedRepoError": "its licence must be accepted first: on its page on the hub, then log in with `hf auth login`",
    "RepositoryNotFoundError": "no such model, or a private one; check the spelling, or log in with `hf auth login`",
    "RevisionNotFoundError": "the hub has no such revision of it; correct what follows the @, or leave it out",
    "HFValidationError": "this is no name of the hub; write owner/name or owner/name@revision, or give a folder",
    "LocalEntryNotFoundError": "not all of it is in the local cache, and the hub is out of reach; go online once",
}


def is_hub_name(name: str) -> bool:
    """owner/name or owner/name@revision, where `owner` is no folder here: then a folder is meant, and is missing."""
    owner = name.partition("/")[0]
    return (re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", name) is not None and owner not in ("out", "weights")
            and not any((base / owner).is_dir() for base in (Path(), ROOT)))


def fetch(name: str | os.PathLike, offline: bool = False) -> Path:
    """The folder of a model: as given, beside this file (weights/ works from anywhere), or on the Hugging Face hub.

    offline, or HF_HUB_OFFLINE=1: a name is only looked up in the hub's local cache, the network is not touched.
    """
    for folder in (Path(name), ROOT / name):
        if folder.is_dir():
            return folder
    if not is_hub_name(str(name)):
        raise UserError(f"{name}: no such folder; give one with config.json and *.safetensors, or a hub's owner/name.")
    repo, _, revision = str(name).partition("@")
    return download(repo, revision or None, offline or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"))


@functools.cache
def download(repo: str, revision: str | None, offline: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{repo}: no such folder; to fetch it from the hub: pip install huggingface_hub") from None
    others = ["*/*", "consolidated*"]                   # other formats, and second copies of the same weights
    get = lambda files, but: Path(snapshot_download(repo, revision=revision, allow_patterns=files, ignore_patterns=but, local_files_only=offline))
    try:
        folder = get(list(HUB_FILES), others)
        if not any(folder.glob("*.safetensors")):       # older models: their tensors alone are read out of the pickle (open_tensors)
            get(["pytorch_model*.bin", "pytorch_model.bin.index.json"], others)
        if (folder / "config.json").exists() and read_json(folder / "config.json").get("model_type") == "instructblip":
            get(["qformer_tokenizer/*"], [])            # the words that its Q-Former reads
        return folder
    except Exception as e:                              # of the library, of its HTTP client, of the disk
        kinds, first = [k.__name__ for k in type(e).__mro__], (str(e).splitlines() or [""])[0][:200]
        other = f"could not be fetched ({type(e).__name__}: {first}); try again, or download it and give the folder"
        why = next((why for kind, why in HUB_ERRORS.items() if kind in kinds), other)
        raise UserError(f"{repo}{'@' * bool(revision)}{revision or ''}: {why}.") from None


def pin_revision(name: str) -> str:
    """A hub name with the commit that it stands for now, so that a run finds the same weights again; else the name."""
    if Path(name).is_dir() or not is_hub_name(name):
        return name
    return f"{name.partition('@')[0]}@{fetch(name).name}"           # the hub's cache names a snapshot by its commit


def print_licence(name: str, folder: Path, file=None) -> None:
    if field := read_licence(folder):
        print(f"licence  {name}: {field}", file=file)


def read_licence(folder: str | os.PathLike) -> str | None:
    """The licence field at the head of a model's README.md, with its name where it is "other"; None without one."""
    file = Path(folder) / "README.md"
    text = file.read_text(encoding="utf-8-sig", errors="replace") if file.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.S)
    head = head[1] if head else ""
    fields = dict(re.findall(r"""^(license|license_name):(?: |\n *-)*["'[]*([\w.+-]+)""", head, re.M))
    name = fields.get("license_name")
    return f"{fields['license']} ({name})" if name and "license" in fields else fields.get("license")
