"""Claim: a name on the Hugging Face hub stands where a folder stands; --offline and every failure keep their
promises.

No network: `huggingface_hub` is a module made here, which notes how it is called and raises what the real one
raises.
"""
from __future__ import annotations

import json
import re
import shutil
import sys
import types
from fnmatch import fnmatch
from pathlib import Path

import pytest

import data
from support.formats.hub import download
from support.formats.llama import load_decoder
from support.formats.pictures import load_processor
from support.formats.tokenizer_files import TOKENIZER_FILES
import eval as evaluation
import train
from conftest import GOLDEN
from support.formats.files import UserError
from support.formats.hub import fetch, is_hub_name, pin_revision, read_licence, tower_folder
from support.formats.vlm import load_vlm, open_run

ROOT, COMMIT, NAME = (
    Path(train.__file__).parent,
    "0123456789abcdef0123456789abcdef01234567",
    "owner/tiny-model",
)
NEEDED = """config.json generation_config.json preprocessor_config.json adapter_config.json model.safetensors
    model-00001-of-00002.safetensors model.safetensors.index.json tokenizer.json tokenizer.model
    tokenizer_config.json vocab.json vocab.txt merges.txt special_tokens_map.json added_tokens.json
    chat_template.jinja README.md""".split()
OTHERS = """pytorch_model.bin pytorch_model.bin.index.json consolidated.safetensors original/params.json
    onnx/model.onnx original/consolidated.00.pth unet/model.safetensors flax_model.msgpack .gitattributes
    LICENSE cat.png""".split()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """calls: what snapshot_download was asked; error: what it raises; it answers a folder with the bundled
    decoder."""
    folder = tmp_path / "cache" / "snapshots" / COMMIT
    shutil.copytree(ROOT / "weights/decoder", folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    fake = types.ModuleType("huggingface_hub")
    fake.calls, fake.error, fake.folder = [], None, folder

    def snapshot_download(repo_id, **asked):
        fake.calls.append({"repo_id": repo_id, **asked})
        if fake.error:
            raise fake.error
        return str(folder)
    fake.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.chdir(tmp_path)
    download.cache_clear()
    yield fake
    download.cache_clear()


def raised(name: str, *bases: str, text: str = "details\non two lines") -> Exception:
    """An exception whose class has these names, as the library's do."""
    cls = Exception
    for base in (*reversed(bases), name):
        cls = type(base, (cls,), {})
    return cls(text)


def test_a_folder_is_a_folder_and_never_asks_the_hub(hub, tmp_path):
    (tmp_path / "owner" / "tiny-model").mkdir(parents=True)
    assert fetch(NAME) == Path(NAME) and fetch(tmp_path) == tmp_path
    assert fetch("weights/vit") == ROOT / "weights/vit"  # beside model.py, from anywhere
    for missing in (
        "owner/other-model",
        "weights/other",
        "out/run",
        "no/such/folder",
        "nowhere",
        "/no/where",
        "../x",
    ):
        with pytest.raises(
            UserError, match=re.escape(missing) + ": no such folder; give one with config.json"
        ):
            fetch(missing)
    assert hub.calls == []


@pytest.mark.parametrize("name, is_one", [
    (NAME, True), ("HuggingFaceTB/SmolLM2-135M-Instruct", True), ("a_b/c.d-1", True), (NAME + "@v1.0", True),
    (NAME + "@refs/pr/3", True), ("weights/decoder", False), ("out/mapl-shapes", False), ("gpt2", False),
    ("a/b/c", False), ("../b", False), ("./b", False), ("/a/b", False), ("a/b@", False), ("a b/c", False),
    ("tests/golden", False),
])
def test_what_is_a_name_on_the_hub(name, is_one):
    assert is_hub_name(name) == is_one


def test_only_the_needed_files_are_asked_for(hub):
    assert fetch(NAME) == hub.folder
    call, = hub.calls
    assert call["repo_id"] == NAME and call["revision"] is None and call["local_files_only"] is False
    match = lambda f, which: any(fnmatch(f, pattern) for pattern in call[which])
    wanted = [f for f in NEEDED + OTHERS if match(f, "allow_patterns") and not match(f, "ignore_patterns")]
    assert wanted == NEEDED
    assert all(match(f, "allow_patterns") for f in TOKENIZER_FILES)


def test_a_revision_stands_after_an_at_sign_and_a_model_is_asked_for_once(hub):
    fetch(f"{NAME}@refs/pr/3")
    fetch(f"{NAME}@refs/pr/3")
    assert [(c["repo_id"], c["revision"]) for c in hub.calls] == [(NAME, "refs/pr/3")]
    assert pin_revision(NAME) == f"{NAME}@{COMMIT}"
    assert pin_revision("weights/vit") == "weights/vit" and pin_revision("nowhere") == "nowhere"


def test_offline_asks_the_cache_alone(hub, monkeypatch):
    fetch(NAME, offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch(f"{NAME}@other")
    assert [c["local_files_only"] for c in hub.calls] == [True, True]


@pytest.mark.parametrize("value, offline", [
    *((value, True) for value in ("1", "on", "Yes", "TRUE")),
    *((value, False) for value in ("", "0", "false", "no", "OFF"))])
def test_the_environment_says_offline_in_the_librarys_own_words(hub, monkeypatch, value, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    fetch(NAME)
    assert hub.calls[0]["local_files_only"] == offline


def test_no_offline_outdoes_the_environment(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    train.main(["--lm", NAME, "--no-offline", "--out", "run", *SMALL])
    assert {c["local_files_only"] for c in hub.calls} == {False}


def test_without_the_package_one_sentence_names_the_command(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # import raises ImportError
    with pytest.raises(
        UserError, match=f"^{NAME}: no such folder; to fetch it .*: pip install huggingface_hub$"
    ):
        fetch(NAME)


@pytest.mark.parametrize(
    "error, said",
    [
        (
            raised("GatedRepoError", "RepositoryNotFoundError", "HfHubHTTPError"),
            "its licence must be accepted first",
        ),
        (
            raised("RepositoryNotFoundError", "HfHubHTTPError"),
            "no such model, or a private one; check the spelling",
        ),
        (raised("RevisionNotFoundError", "HfHubHTTPError"), "no such revision"),
        (raised("HFValidationError"), "write owner/name"),
        (raised("LocalEntryNotFoundError", "EntryNotFoundError"), "not all of it is in the local cache"),
        (raised("IncompleteSnapshotError", "LocalEntryNotFoundError"), "not all of it is in the local cache"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (raised("ConnectError", "TransportError"), "(ConnectError: details); try again"),
        (RuntimeError(), "(RuntimeError: )"),
    ],
)
def test_every_failure_of_the_hub_is_one_sentence(hub, error, said):
    hub.error = error
    with pytest.raises(UserError) as e:
        fetch(f"{NAME}@v1")
    sentence = str(e.value)
    assert (
        sentence.startswith(f"{NAME}@v1: ")
        and said in sentence
        and sentence.endswith(".")
        and "\n" not in sentence
    )
    hub.error = None                                                            # a failure is not remembered
    assert fetch(f"{NAME}@v1") == hub.folder


# --- licence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, field", [
    ("---\nlicense: apache-2.0\n---\n# A model", "apache-2.0"),
    ("---\r\nlanguage:\r\n- en\r\nlicense: mit\r\n---\r\n", "mit"),
    ("\ufeff---\nlicense: 'cc-by-nc-4.0'\n---\n", "cc-by-nc-4.0"),
    ("---\nlicense:\n- openrail\nlanguage: en\n---\n", "openrail"),
    ("---\nlicense: other\nlicense_name: llama3.2\nlicense_link: LICENSE\n---\n", "other (llama3.2)"),
    ("---\nlicense: [mit]\n---\n", "mit"),
    ("---\nlicense:\nlanguage: en\n---\n", None),
    ("---\nlanguage: en\n---\nlicense: mit\n", None),
    ("# A model\nlicense: mit\n", None), ("", None), ("---\nlicense: mit\n", None),
])
def test_the_licence_is_the_field_at_the_head_of_the_readme(text, field, tmp_path):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_licence(tmp_path) == field


def test_a_folder_without_a_readable_readme_has_no_licence(tmp_path):
    assert read_licence(tmp_path) is None and read_licence(tmp_path / "nowhere") is None
    (tmp_path / "README.md").write_bytes(b"---\nname: \xff\xfe\nlicense: mit\n---\n")
    assert read_licence(tmp_path) == "mit"


# --- the commands -------------------------------------------------------------------------------------------

SMALL = ["--steps", "1", "--batch", "2", "--eval-items", "2", "--samples", "0", "--data", "shapes"]


def test_a_run_with_a_hub_model_names_its_commit_and_loads_again(hub, tmp_path, capsys):
    train.main(["--lm", NAME, "--out", "run", *SMALL])
    assert f"licence  {NAME}@{COMMIT}: apache-2.0\n" in capsys.readouterr().out
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (
        config["decoder"] == config["settings"]["lm"] == f"{NAME}@{COMMIT}" and config["vit"] == "weights/vit"
    )
    assert tower_folder(tmp_path / "run", config["decoder"]) == hub.folder
    assert {(c["revision"], c["local_files_only"]) for c in hub.calls} == {(None, False), (COMMIT, False)}
    vlm = load_vlm("run")
    assert vlm.decoder.config == load_decoder(ROOT / "weights/decoder").config
    download.cache_clear()
    hub.error = raised("LocalEntryNotFoundError")
    with pytest.raises(UserError, match=f"{NAME}@{COMMIT}: not all of it is in the local cache"):
        load_vlm("run")


def test_offline_holds_for_both_commands(hub, capsys):
    evaluation.main(["ask", NAME, "--prompt", "a red circle", "--offline", "--max-new-tokens", "2"])
    out = capsys.readouterr()
    assert out.err == f"licence  {NAME}: apache-2.0\n" and "licence" not in out.out
    hub.error = raised("LocalEntryNotFoundError")
    with pytest.raises(UserError, match="other/model: not all of it is in the local cache"):
        train.main(["--lm", "other/model", "--offline", *SMALL])
    with pytest.raises(UserError, match="other/run: not all of it is in the local cache"):
        evaluation.main(["compare", "other/run", "--offline"])
    assert [c["local_files_only"] for c in hub.calls] == [True] * 3


def test_the_bundled_towers_have_their_own_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("support.formats.towers.HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="weights/decoder: no such folder; make the bundled towers again: python train.py"
    ):
        train.resolve_folder("weights/decoder")


# --- the tower's own image processor in a run ---------------------------------------------------------------


def test_a_run_trains_and_answers_with_its_towers_image_processor(tmp_path, monkeypatch):
    """The bundled ViT in a folder that says SigLIP's mean: pixels and features are those, in training and in
    eval."""
    tower = tmp_path / "tower"
    shutil.copytree(ROOT / "weights/vit", tower)
    shutil.copy(
        GOLDEN / "image-processors/preprocessor_config.siglip.json", tower / "preprocessor_config.json"
    )
    used, to_pixels = [], data.to_pixels
    monkeypatch.setattr(
        data, "to_pixels", lambda images, size, p=None: used.append(p) or to_pixels(images, size, p)
    )
    vlm = train.main(["--vit", str(tower), "--out", str(tmp_path / "run"), *SMALL])
    expected = load_processor(tower)
    assert (
        expected.how == "squash" and vlm.processor == expected and len(used) > 3 and set(used) == {expected}
    )
    again, _, _ = open_run(str(tmp_path / "run"), "cpu")
    assert again.processor == expected


def test_a_model_without_safetensors_and_a_qformers_words_are_fetched_as_well(hub):
    fetch(NAME)
    assert len(hub.calls) == 1                                                  # nothing more than is needed
    download.cache_clear()
    (hub.folder / "model.safetensors").rename(hub.folder / "pytorch_model.bin")
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps({**config, "model_type": "instructblip"}))
    fetch(NAME + "@v2")
    asked = [call["allow_patterns"] for call in hub.calls[1:]]
    assert asked[1:] == [["pytorch_model*.bin", "pytorch_model.bin.index.json"], ["qformer_tokenizer/*"]]
    assert {call["revision"] for call in hub.calls[1:]} == {"v2"}
