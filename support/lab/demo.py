"""A page in the browser: draw or load a picture, ask, and see what each bridge answers and where it looks.

    pip install gradio
    python eval.py demo out/mlp-shapes out/flamingo-shapes
    python eval.py demo out/mlp-shapes --port 7861

RUN is a run of train.py, or a published vision-language model. The page is served to this machine alone
(127.0.0.1); Ctrl-C ends it.
"""
from __future__ import annotations

import contextlib
import html
import os
from collections.abc import Iterator

import numpy as np
import torch

from data import BACKGROUND
from support.formats.files import UserError
from support.lab.attention import attention_to_patches, overlay_attention, seen_picture
from support.lab.reads import trained_items, unread_words, what_it_reads
from support.lab.speakers import Conversation, Speaker, open_speaker
from support.plumbing.flags import Parser, add_machine_flags, number, use_machine
from support.worlds.trained import known_sets

CANVAS = 384                    # pixels: side of what one draws on
EXAMPLES = 24                   # pictures of the first run's data to leaf through


def gradio():
    """The package, which neither reports its use nor asks for anything outside this machine."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as package
    except ImportError:
        raise UserError("the page is made by gradio, which is not installed; pip install gradio.") from None
    return package


def flatten(drawn: dict | np.ndarray | None) -> np.ndarray:
    """What the canvas holds as a picture (h, w, 3) uint8, dark where nothing is drawn, as scenes are."""
    picture = drawn.get("composite") if isinstance(drawn, dict) else drawn
    if picture is None or not picture.any():
        raise UserError("draw or load a picture first.")
    picture = np.asarray(picture, np.float32)
    if picture.shape[-1] == 4:
        alpha = picture[..., 3:] / 255
        picture = alpha * picture[..., :3] + (1 - alpha) * np.array(BACKGROUND, np.float32)
    return picture.round().astype(np.uint8)


def where_it_looks(talk: Conversation, question: str) -> tuple[np.ndarray | None, str]:
    """The picture, redder where the words of the question look, mean of words, layers and heads; a note."""
    vlm, features = talk.speaker.model, talk.features
    if not isinstance(features, torch.Tensor) or features.shape[1] == 1:
        return None, "This model reads tiles, or the picture as a whole: there is no map."
    tokens = torch.tensor([talk.document(question).tokens], device=features.device)
    text = talk.bridge_text(question)
    words, patches = attention_to_patches(vlm, tokens, features, **text)        # (L, H, T', K), (K, N)
    weights = (words.mean((0, 1, 2)) @ patches).cpu()                           # (N,)
    picture = overlay_attention(seen_picture(vlm, talk.pixels), weights, side=CANVAS)
    if not vlm.bridge.soft_tokens:
        return picture, "The words read the picture in a softmax of its own, behind a gate."
    return picture, f"{100 * float(words.sum(-1).mean()):.0f} % of the words' attention goes to the picture."


def answer_all(speakers: list[Speaker], count: int, drawn, question: str) -> Iterator[list]:
    """For each speaker its answer, its map and a note, again and again while they are written."""
    shown = [["", None, ""] for _ in speakers]
    try:
        picture = flatten(drawn)
    except UserError as e:
        yield [cell for row in shown for cell in (str(e), None, "")]
        return
    for n, speaker in enumerate(speakers):
        talk = Conversation(speaker, count)
        try:
            talk.look_at(picture)
            shown[n][1:] = where_it_looks(talk, question)
            if words := unread_words(speaker.tokenizer, question):
                shown[n][2] += f" It may not read {', '.join(words)}."
            for piece in talk.answer(question):
                shown[n][0] += piece
                yield [cell for row in shown for cell in row]
        except UserError as e:
            shown[n][0] = str(e)
        yield [cell for row in shown for cell in row]


def examples_of(speaker: Speaker) -> list[tuple[np.ndarray, str]]:
    """Pictures of the data that a run was trained on, with a question about each, where they are here."""
    with contextlib.suppress(KeyError, UserError):
        items = trained_items(known_sets(speaker.facts))[:EXAMPLES]
        items = [item for item in items if item.image is not None]
        return [(item.image, item.qas[-1].question if item.qas else "") for item in items]
    return []


def enlarge(picture: np.ndarray) -> np.ndarray:
    """A small picture, each pixel a square, so that there is room to draw."""
    zoom = max(1, CANVAS // max(picture.shape[:2]))
    return picture.repeat(zoom, axis=0).repeat(zoom, axis=1)


def make_page(speakers: list[Speaker], count: int):
    """The page as gradio's Blocks."""
    gr = gradio()
    examples = examples_of(speakers[0])
    empty = np.full((CANVAS, CANVAS, 3), BACKGROUND, np.uint8)
    first, question = (enlarge(examples[0][0]), examples[0][1]) if examples else (empty, "")
    colors = ["rgb(230, 40, 40)", "rgb(40, 180, 60)", "rgb(90, 90, 245)", "rgb(245, 220, 50)",
              "rgb(245, 245, 245)", "rgb(24, 24, 32)"]
    with gr.Blocks(title="Bridges", analytics_enabled=False) as page:
        gr.Markdown("# What do the bridges see?\n" + "\n\n".join(reading_lines(speakers)))
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                canvas = gr.ImageEditor(first, type="numpy", image_mode="RGBA",
                                        sources=("upload", "clipboard"),
                                        brush=gr.Brush(20, colors=colors, color_mode="fixed"), transforms=(),
                                        layers=False, canvas_size=(CANVAS, CANVAS), height=CANVAS + 40,
                                        label="the picture: load one, or draw", elem_id="canvas")
                with gr.Row():
                    example, blank = gr.Button("another example"), gr.Button("empty canvas")
                asked = gr.Textbox(question, label="the question; empty asks for a caption",
                                   elem_id="question")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=3, min_width=320), gr.Row():
                cells = [cell for speaker in speakers for cell in answer_cells(gr, speaker)]
        turn = gr.State(0)

        def show_next(n: int):
            n = (n + 1) % max(len(examples), 1)
            picture, text = examples[n] if examples else (empty, "")
            return enlarge(picture), text, n

        def answers(drawn, text):
            yield from answer_all(speakers, count, drawn, text.strip())

        example.click(show_next, turn, [canvas, asked, turn])
        blank.click(lambda: empty, None, canvas)
        for event in (ask.click, asked.submit):
            event(answers, [canvas, asked], cells)
    return page


def answer_cells(gr, speaker: Speaker) -> list:
    """An answer, a map and a note, below the speaker's name."""
    with gr.Column(min_width=220):
        gr.Markdown(f"### {html.escape(speaker.name)}")
        text = gr.Textbox(label="answer", lines=3, interactive=False, elem_classes="answer")
        image = gr.Image(label="where it looks", interactive=False, elem_classes="map",
                         buttons=["download", "fullscreen"])
        return [text, image, gr.Markdown()]


def reading_lines(speakers: list[Speaker]) -> list[str]:
    """What the speakers can read; once where several read the same."""
    lines: dict[str, list[str]] = {}
    for speaker in speakers:
        said = what_it_reads(speaker.name, speaker.tokenizer, speaker.facts).removeprefix(speaker.name)
        lines.setdefault(said, []).append(speaker.name)
    return [html.escape(f"{', '.join(names)}{said}") for said, names in lines.items() if said]


def main(argv: list[str]) -> None:
    parser = Parser("eval.py demo", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs of train.py, published models")
    parser.add_argument("--port", type=number(least=1, most=65535), default=7860, metavar="N",
                        help="of the page (7860)")
    parser.add_argument("--max-new-tokens", type=number(least=1, most=10**6), default=64, metavar="N",
                        help="longest answer (64)")
    add_machine_flags(parser)
    args = parser.parse_args(argv)
    gr, device = gradio(), use_machine(args)
    speakers = [open_speaker(run, device) for run in args.runs]
    for speaker in speakers:
        if speaker.read is None:
            raise UserError(f"{speaker.name} is a decoder alone, which sees no picture; "
                            "python eval.py chat talks with it.")
    page = make_page(speakers, args.max_new_tokens)
    try:
        _, address, _ = page.launch(server_name="127.0.0.1", server_port=args.port, share=False, quiet=True,
                                    prevent_thread_lock=True, ssr_mode=False, footer_links=[],
                                    theme=gr.themes.Default(font="sans-serif", font_mono="monospace"))
    except OSError:
        raise UserError(f"--port {args.port} is in use; give another.") from None
    print(f"page     {address}   (Ctrl-C ends it)", flush=True)
    page.block_thread()
