"""A model answers about a picture file, or a decoder alone answers a question.

    python eval.py ask out/mapl-shapes --image scene.png                        a caption
    python eval.py ask out/mapl-shapes --image scene.png --prompt "where is the red ring?"
    python eval.py ask llava-hf/llava-1.5-7b-hf --image cat.jpg --prompt "What is this?" --dtype bfloat16
    python eval.py ask HuggingFaceTB/SmolLM2-135M-Instruct --prompt "What is the capital of France?"
    python eval.py ask lmsys/vicuna-7b-v1.5 --template vicuna --prompt "What is the capital of France?"

MODEL is a run of train.py, a published vision-language model (LLaVA, InstructBLIP, BLIP-2's first stage,
IDEFICS, Llama 3.2 Vision) or a decoder: a folder, or a name on the Hugging Face hub. What it holds decides.
A run is asked in the form that it was trained in, a published model in the chat template that its folder
publishes; one that publishes none continues the prompt as it stands. --template takes another one. After
recipe word the picture stands where <image> does: --prompt "Where does a<image> live?".
"""
from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import data
from eval import generate_ids
from model import Decoder, IMAGE, VLM, ViT
from papers.mllama_vit import TiledViT, Tiles
from papers.word import ASK
from support.formats.chat import TEMPLATES, alpaca_prompt, use_template
from support.formats.files import UserError, at_the_door, read_json
from support.formats.generation import left_out
from support.formats.hub import fetch, print_licence
from support.formats.llama import load_decoder
from support.formats.pictures import load_processor, read_image, tile_pixels
from support.formats.tokenizer_files import load_tokenizer
from support.formats.tokenizers import Tokenizer
from support.formats.vlm import LAYOUTS, load_vlm, open_run, refuse_bridgeless
from support.lab.protocols import PROTOCOLS, WORD, learned_chat
from support.plumbing.flags import Parser, add_machine_flags, number, use_machine
from support.plumbing.packed import packed
from support.plumbing.start import refuse_unread

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUESTION_FORMS = {      # model_type → a user's message about a picture, for the model's chat template
    "llava": "<image>\n{}", "llava_llama": "<image>\n{}", "llava_mistral": "<image>\n{}",
    "llava_qwen": "<image>\n{}", "mllama": "<image>{}", "idefics": "<image>{}",
}


@dataclass(frozen=True)
class Request:
    """What is asked, and how the answer is generated."""
    image: str = ""                             # a file
    prompt: str = ""
    max_new_tokens: int = 64
    beams: int = 1
    device: str | None = None
    dtype: torch.dtype | None = None            # None = float32
    template: str = ""                          # a key of TEMPLATES; "" = the folder's own


def ask_run(run: str, request: Request) -> str:
    """The answer of a run of train.py, asked in the form that it was trained in; without a prompt a caption.

    The form is that of its first data set: questions, or conversations in its chat template, in whose place
    request.template stands.
    """
    vlm, tokenizer, facts = open_run(run, request.device, request.dtype)
    chat = learned_chat(facts, tokenizer, request.template)
    if chat:
        why = "its language model's own" if chat == WORD else "in which it was trained"
        why = "by --template" if request.template else why
        print(f"{run}: asked in the chat template {tokenizer.template.name}, {why}.", file=sys.stderr)
    pixels, document = read_question(vlm, tokenizer, request.image, request.prompt, chat)
    features = vlm.features(pixels.to(request.device, next(vlm.vit.parameters()).dtype))
    tokens = torch.tensor([document.tokens], device=features.device)
    return write_answer(vlm, tokens, tokenizer, request, features=features)


def read_question(vlm: VLM, tokenizer: Tokenizer, image: str, prompt: str,
                  chat: str = "") -> tuple[Tensor, data.Document]:
    """Pixels (1, 3, S, S) of a picture file, and the question about it; without a prompt a caption.

    chat: as a conversation, in the tokenizer's chat template; see learned_chat.
    """
    pixels = data.to_pixels([read_image(image)], vlm.vit.config.image_size, vlm.processor)
    return pixels, question_document(tokenizer, [prompt], chat)


def question_document(tokenizer: Tokenizer, turns: list[str], chat: str = "") -> data.Document:
    """A run's conversation about one picture, up to the place of its next answer.

    turns: questions and answers in turn, the last a question; "" asks for a caption. chat: see learned_chat;
    of WORD the picture stands where the first question has <image>, or in a sentence of its own before it.
    """
    if chat == WORD:
        turns = [q if n % 2 else q or ASK.replace("a<image>", "it" if n else "a<image>")
                 for n, q in enumerate(turns)]
        first, *rest = turns
        first = first if "<image>" in first else f"This is a<image>. {first}"
        return data.Document(tokenizer).chat(as_messages([first, *rest]))
    if not chat:
        document, forms = data.Document(tokenizer).image(), [data.QUESTION.format(q) if q else data.CAPTION
                                                             for q in turns[::2]]
        for form, answer in zip(forms, turns[1::2]):
            document.turn(form, answer)
        return document.add(forms[-1])
    asked = [q if n % 2 or chat == "plain" else q or PROTOCOLS["llava"].caption for n, q in enumerate(turns)]
    asked = [alpaca_prompt(q) if chat == "alpaca" and n % 2 == 0 else q for n, q in enumerate(asked)]
    mark = "<image>" if chat == "plain" else "<image>\n"    # plain: it has learned captions alone
    return data.Document(tokenizer).chat(as_messages([mark + asked[0], *asked[1:]]))


def as_messages(turns: list[str]) -> list[dict]:
    """A user's texts and the answers in turn, as a chat template reads them."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def ask_decoder(name: str, folder: Path, request: Request) -> str:
    """The answer of a decoder alone, asked in its own chat template."""
    print_licence(name, folder, sys.stderr)     # not among the answers
    tokenizer = open_tokenizer(folder, request.template)
    decoder = load_decoder(folder, request.device, request.dtype)
    if not request.template and tokenizer.template is TEMPLATES["llama3"]:
        print(f"{name}: Meta's own files do not say whether a model chats; asked in Llama 3's chat template. "
              "For a base model use --template plain.", file=sys.stderr)
    with at_the_door(f"{name}, chat template {tokenizer.template.name}"):
        ids = data.Document(tokenizer).chat(request.prompt).tokens
    if IMAGE in ids:
        raise UserError('a decoder alone sees no picture; leave "<image>" out of --prompt.')
    return write_answer(decoder, torch.tensor([ids], device=request.device), tokenizer, request)


def open_tokenizer(folder: Path, template: str) -> Tokenizer:
    """The tokenizer of a published model with a chat template of TEMPLATES, or "" for the folder's own.

    What the folder says about generation and is not done is said on stderr.
    """
    tokenizer, sentence = load_tokenizer(folder), left_out(folder)
    if sentence:
        print(sentence, file=sys.stderr)
    if template:
        use_template(template, tokenizer)
    return tokenizer


@torch.no_grad()
def ask_published(folder: Path, request: Request) -> str:
    """The answer of a published vision-language model, asked in the form that it was trained with.

    Without a picture the question stands alone, where the model takes that. BLIP-2's first stage answers no
    question: it says how well the prompt, as a caption, fits the picture.
    """
    model = load_vlm(folder, request.device, request.dtype)
    print_licence(str(folder), folder, sys.stderr)
    tokenizer = open_tokenizer(folder, request.template)
    facts = read_json(folder / "config.json")
    if not request.image and facts["model_type"] not in QUESTION_FORMS:
        raise UserError(f"{folder} answers about a picture only: give it one, --image FILE.")
    pixels = picture_pixels(model.vit, folder, read_image(request.image)) if request.image else None
    if not isinstance(model, VLM):
        given = {name for name in ("beams", "max_new_tokens")
                 if getattr(request, name) != getattr(Request, name)}
        refuse_unread(given, given, f"{folder}, which writes nothing,")
        return match_caption(model, tokenizer, pixels, request.prompt)
    with at_the_door(f"{folder}, chat template {tokenizer.template.name}"):
        tokens = question_tokens(facts, tokenizer, [request.prompt], bool(request.image))
    images, device = {"pixels": pixels}, model.decoder.embed.weight.device
    if facts["model_type"] == "instructblip":   # the Q-Former reads the question, too, in BERT's words
        words = load_tokenizer(folder / "qformer_tokenizer")
        ids = [*words.begin, *words.encode(request.prompt), *words.end]
        images["bridge_tokens"] = torch.tensor([ids], device=device)
    return write_answer(model, torch.tensor([tokens], device=device), tokenizer, request, **images)


def check_length(decoder: Decoder, request: Request) -> None:
    """A cache has room for all that is asked for, so nobody asks for far more than the decoder can read."""
    if request.max_new_tokens > max(decoder.config.context, 4096):
        raise UserError(f"--max-new-tokens {request.max_new_tokens}: this decoder reads "
                        f"{decoder.config.context} positions; ask for fewer.")


@torch.no_grad()
def write_answer(model: nn.Module, tokens: Tensor, tokenizer: Tokenizer, request: Request, **images) -> str:
    """The answer after tokens (1, T); images: what a VLM sees, as in `VLM.prepare`."""
    decoder = model.decoder if isinstance(model, VLM) else model
    check_length(decoder, request)
    inputs = model.prepare(tokens, **images)[0] if isinstance(model, VLM) else {"embeds": model.embed(tokens)}
    long = request.max_new_tokens >= 16         # for fewer, packing costs more than it saves
    with packed(decoder) if long else contextlib.nullcontext():
        ids = generate_ids(decoder, None, request.max_new_tokens, request.beams, stop=tokenizer.stop,
                           **inputs)[0]
    if inputs["embeds"].shape[1] + len(ids) > decoder.config.context:
        print(f"warning: the answer runs past the {decoder.config.context} positions that this decoder was "
              "trained on; its end means little.", file=sys.stderr)
    return tokenizer.answer_text(ids)


def picture_pixels(vit: ViT | TiledViT, folder: Path, picture: np.ndarray) -> Tensor | Tiles:
    """A picture (h, w, 3) as this tower reads it: (1, 3, S, S), or tiles; on its device, in its dtype."""
    weight, image, processor = next(vit.parameters()), [picture], load_processor(folder)
    if not isinstance(vit, TiledViT):
        return data.to_pixels(image, vit.config.image_size, processor).to(weight.device, weight.dtype)
    pixels, aspect, mask = tile_pixels(image, vit.config.image_size, processor=processor)
    return Tiles(pixels.to(weight.device, weight.dtype), aspect.to(weight.device), mask.to(weight.device))


def match_caption(stage1: nn.Module, tokenizer: Tokenizer, pixels: Tensor, caption: str) -> str:
    """BLIP-2's two scores of a caption: does it belong to the picture, and how similar are they?"""
    ids = [*tokenizer.begin, *tokenizer.encode(caption), *tokenizer.end]
    ids = torch.tensor([ids], device=pixels.device)
    features = stage1.features(pixels)
    cosine = stage1.itc(features, ids)[0, 0] * (stage1.temperature if stage1.full else 1)
    match = stage1.itm(features, ids).softmax(-1)[0, 1]
    return (f"match: {match:.3f} (ITM: text and picture belong together), "
            f"similarity: {cosine:.3f} (ITC: cosine)")


def question_tokens(facts: dict, tokenizer: Tokenizer, turns: list[str], pictured: bool = True) -> list[int]:
    """The ids of a conversation in the model's own form, about a picture or alone; facts: its config.json.

    turns: questions and answers in turn, the last a question.
    """
    kind, document = facts["model_type"], data.Document(tokenizer)
    if kind == "instructblip":                  # the soft tokens come first, then <s> and the question alone
        return [IMAGE, *document.add(turns[-1]).tokens]
    first = QUESTION_FORMS[kind].format(turns[0]) if pictured else turns[0]
    tokens = document.chat(as_messages([first, *turns[1:]])).tokens
    marks = ("<im_start>", "<im_end>")
    if pictured and facts.get("mm_use_im_start_end") and {*marks} <= tokenizer.special.keys():    # LLaVA v1
        at = tokens.index(IMAGE)
        tokens[at:at + 1] = [tokenizer.special[marks[0]], IMAGE, tokenizer.special[marks[1]]]
    return tokens


def add_model_flags(parser: Parser, picture: str, longest: int) -> tuple:
    """What is asked and who answers; returns the groups of the question and of the answer."""
    parser.add_argument("model", metavar="MODEL", help="a run, a published model or a decoder")
    question, answer = (parser.add_argument_group(f"the {name}") for name in ("question", "answer"))
    question.add_argument("--image", default="", metavar="FILE", help=picture)
    question.add_argument("--template", default="", choices=[*TEMPLATES], metavar="NAME",
                          help=f"a chat template in place of the model's own: {', '.join(TEMPLATES)}")
    answer.add_argument("--max-new-tokens", type=number(least=1, most=10**6), default=longest, metavar="N",
                        help=f"longest answer ({longest})")
    answer.add_argument("--dtype", default="float32", choices=[*DTYPES], help="of the weights (float32)")
    return question, answer


def make_parser() -> Parser:
    parser = Parser("eval.py ask", __doc__)
    question, answer = add_model_flags(parser, "a picture file", 64)
    question.add_argument("--prompt", default="", metavar="TEXT", help="without it a run writes a caption")
    answer.add_argument("--beams", type=number(least=1, most=1000), default=1, metavar="W",
                        help="beam width; 1 = greedy (1)")
    add_machine_flags(parser)
    return parser


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    device = use_machine(args)
    folder = fetch(args.model)
    facts = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    request = Request(args.image, args.prompt, args.max_new_tokens, args.beams, device,
                      DTYPES[args.dtype], args.template)
    kind = facts.get("model_type")
    if args.template and kind in LAYOUTS and kind not in QUESTION_FORMS:
        raise UserError(f"{args.model} is not asked in a chat template; leave out --template.")
    if "bridge" in facts:
        if not args.image:
            raise UserError(f"{args.model} is a run: give it a picture, --image FILE.")
        print(ask_run(args.model, request))
    elif kind in LAYOUTS:
        if not args.prompt:
            raise UserError(f"{args.model} needs --prompt TEXT, and --image FILE if it is about a picture.")
        print(ask_published(folder, request))
    else:
        refuse_bridgeless(facts, args.model)
        if args.image or not args.prompt:
            raise UserError(f"{args.model} is a decoder, which sees no picture: give it --prompt TEXT alone.")
        print(ask_decoder(args.model, folder, request))
