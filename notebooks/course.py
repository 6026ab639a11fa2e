"""course.py: what the notebooks share: the bundled towers, bridges, short runs, stored tables, plots, checks.

Everything that is taught stands in the notebooks and in the five files; nothing in here does.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import re
import shlex
import sys
from pathlib import Path
from zlib import crc32

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import data                                                                     # noqa: E402  (after the path)
import train                                                                    # noqa: E402
from eval import evaluate, first_items, generate_texts, scalar_scores                   # noqa: E402
from model import Bridge, Decoder, DecoderConfig, VLM, ViT                      # noqa: E402
from papers import make_bridge                                                  # noqa: E402
from support.formats.files import read_json, write_json, write_tensors          # noqa: E402
from support.formats.llama import load_decoder                                  # noqa: E402
from support.formats.tokenizer_files import load_tokenizer                      # noqa: E402
from support.formats.tokenizers import Tokenizer                                # noqa: E402
from support.formats.vision import load_vit                                     # noqa: E402
from support.formats.vlm import open_run                                        # noqa: E402
from support.plumbing.log import read_log                                       # noqa: E402
from support.worlds import open_data                                            # noqa: E402

# The six bridges of the README's table, seed 0, trained by the recipes; bfloat16 on disk.
RUNS = ROOT / "notebooks" / "runs"
# The sizes of a published decoder; built on the meta device, it takes no memory.
LLAMA_7B = DecoderConfig(vocab_size=32000, width=4096, layers=32, heads=32, kv_heads=32, head_width=128,
                         hidden=11008, tied=False)
# The colours of the shapes world for plots, 0 … 1; white is drawn in grey.
COLORS = {name: tuple(c / 255 for c in rgb) for name, rgb in data.COLORS.items()} | {"white": (0.7, 0.7, 0.7)}
plt.rcParams.update({
    "figure.figsize": (7, 3.2), "figure.dpi": 110, "figure.constrained_layout.use": True, "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "image.interpolation": "nearest",
})


def towers() -> tuple[ViT, Decoder, Tokenizer]:
    """The bundled ViT, decoder and tokenizer, frozen."""
    vit, decoder = load_vit(ROOT / "weights" / "vit"), load_decoder(ROOT / "weights" / "decoder")
    for tower in (vit, decoder):
        tower.requires_grad_(False).eval()
    return vit, decoder, load_tokenizer(ROOT / "weights" / "decoder")


def untrained(name: str) -> Bridge:
    """A bridge between these towers as a run starts it: random, in the sizes of its recipe."""
    vit, decoder, _ = towers()
    return make_bridge(name, decoder.config, vit.config.width, **train.bridge_options(name, name)).eval()


def run_folder(run: str | Path) -> Path:
    """The folder of one of the six by its name, or a run folder as it is."""
    return RUNS / run if (RUNS / run).is_dir() else Path(run)


def trained(run: str | Path) -> tuple[VLM, Tokenizer]:
    """A trained bridge between its towers: the name of one of the six, or a run folder."""
    vlm, tokenizer, _ = open_run(str(run_folder(run)), "cpu")
    return vlm.requires_grad_(False).eval(), tokenizer


def learn(name: str, flags: str) -> Path:
    """`python train.py FLAGS` into out/notebooks/NAME: the run folder; output.txt holds what it printed."""
    out = ROOT / "out" / "notebooks" / name
    out.mkdir(parents=True, exist_ok=True)
    own = f"--log-every 10 --eval-items 1 --samples 1 --threads {torch.get_num_threads()}"
    with (open(out / "output.txt", "w", encoding="utf-8") as file,
          contextlib.redirect_stdout(file), contextlib.redirect_stderr(file)):
        train.main([*shlex.split(flags), "--out", str(out), *own.split()])
    return out


def log(run: str | Path, key: str = "ema") -> tuple[list[int], list]:
    """(steps, values) of one number of a run's log; "ema" is the smoothed training loss."""
    lines = [line for line in read_log(run_folder(run) / "log.jsonl") if key in line]
    return [line["step"] for line in lines], [line[key] for line in lines]


def scores(run: str | Path, count: int = 100, blind: bool = False, captions: bool = False) -> dict:
    """Accuracy in % per kind of question and their mean on held-out pictures.

    With captions, CIDEr and BLEU-4 (0 … 1) as well.
    """
    vlm, tokenizer = trained(run)
    items = first_items(open_data("shapes"), "test", count)
    result = scalar_scores(evaluate(vlm, tokenizer, items, blind=blind, captions=captions))
    return {k: v if k in ("cider", "bleu4") else 100 * v for k, v in result.items()}


def ask(vlm: VLM, tokenizer: Tokenizer, image, prompt: str, longest: int = 48) -> str:
    """What a model answers about a picture (S, S, 3) uint8, greedily; prompt: a question, or data.CAPTION."""
    pixels = data.to_pixels([image], vlm.vit.config.image_size, vlm.processor)
    text = prompt if prompt == data.CAPTION else data.QUESTION.format(prompt)
    document = data.Document(tokenizer).image().add(text)
    features = vlm.features(pixels)
    return generate_texts(vlm, [document], tokenizer, longest, features=features)[0]


def conversation(*pairs: tuple[str, str]) -> list[dict]:
    """Messages of a user and an assistant, from questions and answers; the first one shows a picture."""
    first, *others = ({"role": role, "content": text}
                      for pair in pairs for role, text in zip(("user", "assistant"), pair))
    return [{**first, "content": f"<image>\n{first['content']}".strip()}, *others]


def count_parameters(module: torch.nn.Module) -> int:
    """How many numbers a module holds, trained or frozen."""
    return sum(p.numel() for p in module.parameters())


def stored_table(file: str) -> dict[str, dict[str, float]]:
    """The table of a file of support/results: {row: {column: number}}; an empty cell has no entry."""
    lines = iter((ROOT / "support" / "results" / file).read_text(encoding="utf-8").splitlines())
    head = next(line for line in lines if line.startswith("  "))            # above the names of the rows
    columns = {m.end(): m[0] for m in re.finditer(r"\S+( \S+)?", head)}      # cells are aligned on the right
    table = {}
    for line in itertools.takewhile(str.strip, lines):
        name = re.split(r" {2,}", line)[0]
        cells = re.compile(r"\S+").finditer(line, len(name))
        table[name] = {columns[m.end()]: float(m[0].replace(",", "")) for m in cells}
    return table


def stored_claim(name: str) -> tuple[str, dict[str, dict[str, tuple[float, float]]]]:
    """A claim of support/results/claims.txt: its text, and {arm: {column: (mean, spread over seeds)}}."""
    claims = (ROOT / "support" / "results" / "claims.txt").read_text(encoding="utf-8")
    text = claims[claims.index(f"\n{name}, ") + 1:].split("\n\n")[0]           # "NAME, 3 seeds: …"
    lines = [re.split(r" {2,}", line.strip()) for line in text.splitlines()[1:]]
    columns, rows = lines[0], [line for line in lines if " ± " in line[-1]]
    return text, {arm: {c: tuple(map(float, cell.split(" ± "))) for c, cell in zip(columns, cells)}
                  for arm, *cells in rows}


def digest(answer) -> int | None:
    """A number for an answer (a word, a number, or several), so that a check does not show the answer.

    The order of a set does not count; None = not answered yet.
    """
    if answer is None:
        return None
    parts = [answer] if isinstance(answer, (str, int)) else answer
    words = [p if isinstance(p, str) else f"{p:g}" for p in parts]
    return crc32(" ".join(sorted(words) if isinstance(answer, set) else words).encode()) % 10_000


def check(exercise: str, answer, expected=None, atol: float = 1e-5) -> None:
    """Says whether an exercise is right, or raises AssertionError.

    answer: a number, a text, a tensor, or with no `expected` a bool; None = not answered yet.
    """
    if answer is None:
        print(f"exercise {exercise}: not answered yet")
        return
    if isinstance(answer, Tensor) or isinstance(expected, Tensor):
        torch.testing.assert_close(answer, expected, atol=atol, rtol=1e-4,
                                   msg=lambda m: f"exercise {exercise}: not yet. {m}")
    else:
        if expected is None:
            right = bool(answer)
        elif isinstance(expected, float):
            right = abs(answer - expected) <= atol
        else:
            right = answer == expected
        assert right, f"exercise {exercise}: not yet, {answer!r} is not the answer"
    print(f"exercise {exercise}: right")


def strip(notebook: dict) -> dict:
    """What is stored of a notebook: the text of its cells; no outputs, counts or machine metadata."""
    cells = []
    for n, cell in enumerate(notebook["cells"]):
        source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
        kept = {
            "cell_type": cell["cell_type"],
            "id": f"cell-{n:02d}",
            "metadata": {},
            "source": source.strip("\n").splitlines(keepends=True),
        }
        cells.append(kept | ({"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}))
    kernel = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def keep(run: Path) -> None:
    """Puts a run into notebooks/runs under its bridge's name, the bridge in bfloat16: half the bytes."""
    config = read_json(run / "config.json")
    config["settings"]["out"] = f"out/{run.name}"       # a folder of the reader, not of this machine
    out = RUNS / config["bridge"]
    tensors = {k: v.to(torch.bfloat16) for k, v in load_file(run / "bridge.safetensors").items()}
    write_tensors(out / "bridge.safetensors", tensors, {"bridge": config["bridge"]})
    write_json(out / "config.json", config)
    for name in ("log.jsonl", "results.json"):
        (out / name).write_bytes((run / name).read_bytes())


def main() -> None:
    """`python notebooks/course.py [RUN …]`: strips every notebook in place; puts RUNs into notebooks/runs."""
    for run in sys.argv[1:]:
        keep(Path(run))
    for file in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in file.parts:
            old = file.read_text(encoding="utf-8")
            new = json.dumps(strip(json.loads(old)), indent=1, ensure_ascii=False) + "\n"
            if new != old:
                file.write_text(new, encoding="utf-8")
                print(f"stripped {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
