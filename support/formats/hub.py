"""support/formats/hub.py: models by their name on the Hugging Face hub, and their licences."""
from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from support.formats.files import UserError, read_json

ROOT = Path(__file__).parents[2]        # the project's folder: weights/ is found from any working directory
NO_OWNERS = ("out", "weights")          # names of folders here: "out/run" is a run, not a model on the hub
TRUE = ("1", "ON", "YES", "TRUE")       # what the hub's own library takes for true, in upper or lower case

# what is fetched of a model
HUB_FILES = ("*config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab.*",
             "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.*", "README.md")
PICKLE_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")   # older models have no other tensors
OTHER_FORMATS = ("*/*", "consolidated*")                # not fetched: the same weights once more
# what the library's exceptions mean, special ones before general ones
HUB_ERRORS = {
    "GatedRepoError": "its licence must be accepted first: on its page on the hub, "
                      "then log in with `hf auth login`",
    "RepositoryNotFoundError": "no such model, or a private one; check the spelling, "
                               "or log in with `hf auth login`",
    "RevisionNotFoundError": "the hub has no such revision of it; correct what follows the @, "
                             "or leave it out",
    "HFValidationError": "this is no name of the hub; write owner/name or owner/name@revision, "
                         "or give a folder",
    "LocalEntryNotFoundError": "not all of it is in the local cache, and the hub is out of reach; "
                               "go online once",
}


def tower_folder(run: Path, name: str) -> Path:
    """Where the tower of a run is: in the run, in the project (bundled ones), at its path, or on the hub."""
    for folder in (run / name, ROOT / name, Path(name)):
        if folder.is_dir():
            return folder
    if is_hub_name(name):
        return fetch(name)
    raise UserError(f'{run}/config.json: the tower "{name}" is neither in the run nor beside model.py; '
                    "put it back or edit the path.")


def is_hub_name(name: str) -> bool:
    """Whether a name is owner/name or owner/name@revision.

    Where `owner` is a folder here, the name means a folder in it that is missing.
    """
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", name):
        return False
    owner = name.partition("/")[0]
    return owner not in NO_OWNERS and not any((base / owner).is_dir() for base in (Path(), ROOT))


def fetch(name: str | os.PathLike, offline: bool = False) -> Path:
    """The folder of a model: as given, in the project, or on the Hugging Face hub; else a UserError.

    offline, or HF_HUB_OFFLINE=1: a name is looked up in the hub's local cache, the network is not touched.
    """
    for folder in (Path(name), ROOT / name):
        if folder.is_dir():
            return folder
    if not is_hub_name(str(name)):
        raise UserError(f"{name}: no such folder; give one with config.json and *.safetensors, "
                        "or a hub's owner/name.")
    repo, _, revision = str(name).partition("@")
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in TRUE
    return download(repo, revision or None, offline)


@functools.cache
def download(repo: str, revision: str | None, offline: bool) -> Path:
    """The folder of a model in the hub's cache; what is not there yet is fetched."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{repo}: no such folder; "
                        "to fetch it from the hub: pip install huggingface_hub") from None

    def get(files: tuple[str, ...], but: tuple[str, ...] = ()) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files),
                                      ignore_patterns=list(but), local_files_only=offline))

    try:
        folder = get(HUB_FILES, OTHER_FORMATS)
        if not any(folder.glob("*.safetensors")):
            get(PICKLE_FILES, OTHER_FORMATS)
        config = folder / "config.json"
        if config.exists() and read_json(config).get("model_type") == "instructblip":
            get(("qformer_tokenizer/*",))               # the words that its Q-Former reads
        return folder
    except Exception as e:                              # of the library, of its HTTP client, of the disk
        at = f"@{revision}" if revision else ""
        raise UserError(f"{repo}{at}: {hub_error(e)}.") from None


def hub_error(e: Exception) -> str:
    """What an exception of huggingface_hub means and what to do."""
    kinds = [kind.__name__ for kind in type(e).__mro__]
    for kind, meaning in HUB_ERRORS.items():
        if kind in kinds:
            return meaning
    first_line = (str(e).splitlines() or [""])[0][:200]
    return (f"could not be fetched ({type(e).__name__}: {first_line}); "
            "try again, or download it and give the folder")


def pin_revision(name: str) -> str:
    """A hub name with the commit that it stands for now, so that a run finds the same weights again.

    Any other name comes back as it is.
    """
    if Path(name).is_dir() or not is_hub_name(name):
        return name
    repo, commit = name.partition("@")[0], fetch(name).name         # the cache names a snapshot by its commit
    return f"{repo}@{commit}"


def print_licence(name: str, folder: Path, file=None) -> None:
    if field := read_licence(folder):
        print(f"licence  {name}: {field}", file=file)


def read_licence(folder: str | os.PathLike) -> str | None:
    """The licence field at the head of a model's README.md, with its name if that is "other", or None."""
    file = Path(folder) / "README.md"
    text = file.read_text(encoding="utf-8-sig", errors="replace") if file.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.S)
    head = head[1] if head else ""
    fields = dict(re.findall(r"""^(license|license_name):(?: |\n *-)*["'[]*([\w.+-]+)""", head, re.M))
    name = fields.get("license_name")
    return f"{fields['license']} ({name})" if name and "license" in fields else fields.get("license")
