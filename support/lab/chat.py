"""A conversation with a trained run, a published model or a decoder alone.

    python eval.py chat out/mlp-shapes --image scene.png
    python eval.py chat HuggingFaceTB/SmolLM2-135M-Instruct
    python eval.py chat out/mlp-shapes --image scene.png < questions.txt

A line is a question. The answer appears word by word, in the form that the model was trained in. Ctrl-C stops
an answer, Ctrl-D ends the conversation. From a file or a pipe, each line is answered on standard output;
notes go to standard error, and the first mistake ends the command.
"""
from __future__ import annotations

import contextlib
import os
import re
import readline             # input() edits its line and keeps a history
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from support.formats.files import UserError
from support.formats.pictures import read_image
from support.lab.ask import DTYPES, add_model_flags
from support.lab.attention import draw_attention
from support.lab.reads import unread_words, what_it_reads
from support.lab.speakers import Conversation, open_speaker
from support.lab.unread import given_flags
from support.plumbing.cli import mistake
from support.plumbing.flags import Parser, add_machine_flags, number, use_machine
from support.plumbing.packed import packed
from support.plumbing.start import refuse_unread

COMMANDS = {
    "/image FILE": "a new conversation about this picture",
    "/caption": "the model describes the picture",
    "/look": "where the last question looks in the picture: maps, and a table per layer",
    "/reset": "a new conversation; a picture stays",
    "/help": "these commands, and what the model reads",
    "/quit": "leave",
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")      # no answer moves a terminal's cursor


class Chat:
    """Lines in, answers out. typed: by a person at a terminal; else they come from a file or a pipe."""

    def __init__(self, conversation: Conversation, out: Path, typed: bool):
        self.conversation, self.out, self.typed = conversation, out, typed
        self.name = conversation.speaker.name

    def run(self) -> None:
        """Until the lines end, or /quit."""
        for line in self.lines():
            try:
                if line.split()[0] == "/quit":
                    return
                self.obey(line) if line.startswith("/") else self.answer(line)
            except KeyboardInterrupt:                   # it stops the answer or the command, nothing else
                if not self.typed:
                    raise
                print(" (stopped)")
            except Exception as e:
                if not self.typed or mistake(e) is None:
                    raise
                note(mistake(e))

    def lines(self) -> Iterator[str]:
        """The lines that are no blanks. A typed one has a prompt; Ctrl-C empties it."""
        if not self.typed:
            if hasattr(sys.stdin, "reconfigure"):       # a file of any machine's: what is no UTF-8 becomes �
                sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")
            yield from (line.strip() for line in sys.stdin if line.strip())
            return
        while True:
            try:
                line = input("> ").strip()
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit leaves)")
                continue
            except EOFError:
                print()
                return
            if line:
                yield line

    def answer(self, question: str) -> None:
        """Print an answer while it is written."""
        talk = self.conversation
        if words := unread_words(talk.speaker.tokenizer, question):
            note(f"{self.name} may not read {', '.join(map(repr, words))}: to it, these are letters, and "
                 "a toy decoder learned few such words; /help lists those that are whole.")
        with contextlib.closing(talk.answer(question)) as pieces:
            for piece in pieces:
                print(CONTROL.sub("", piece), end="", flush=True)
        print()
        if talk.cut:
            note(f"the answer was cut at {talk.length:,} tokens; --max-new-tokens allows more, up to the "
                 f"{talk.speaker.decoder.config.context:,} that {self.name} reads.")

    def commands(self) -> dict[str, str]:
        """Those that this model has a use for."""
        speaker = self.conversation.speaker
        unused = {"/image FILE", "/caption", "/look"} if speaker.read is None else set()
        unused |= set() if speaker.captions else {"/caption"}
        return {name: what for name, what in COMMANDS.items() if name not in unused}

    def say_what_it_reads(self) -> None:
        speaker = self.conversation.speaker
        if sentence := what_it_reads(self.name, speaker.tokenizer, speaker.facts):
            note(sentence)

    def obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command not in {name.split()[0] for name in COMMANDS}:
            raise UserError(f"unknown command {command}; known: {', '.join(self.commands())}.")
        if command not in {name.split()[0] for name in self.commands()}:
            what = "answers no empty question" if self.conversation.speaker.read else "sees no picture"
            raise UserError(f"{command}: {self.name} {what}.")
        if rest and command != "/image":
            raise UserError(f"{command} takes nothing behind it.")
        if command == "/image":
            self.show(rest.strip())
        elif command == "/caption":
            self.answer("")
        elif command == "/look":
            self.look()
        elif command == "/reset":
            self.conversation.reset()
            note("a new conversation.")
        elif command == "/help":
            print("\n".join(f"{name:12s} {what}" for name, what in self.commands().items()))
            self.say_what_it_reads()

    def show(self, file: str) -> None:
        """The picture in a file, whose name may be written as a shell reads it."""
        if not file:
            raise UserError("/image needs a file: /image scene.png.")
        picture = read_image(str(named_file(file)))
        self.conversation.look_at(picture)
        note(f"{file}: {picture.shape[1]} x {picture.shape[0]} pixels; a new conversation about it.")

    def look(self) -> None:
        """The maps of the last question, as python eval.py look draws them."""
        talk, speaker = self.conversation, self.conversation.speaker
        if talk.features is None:
            raise UserError("/look shows where a question looks in a picture; give one: /image FILE.")
        if not talk.turns:
            raise UserError("/look shows where the last question looks; ask one first.")
        document = talk.document(talk.turns[-2], alone=True)
        print(draw_attention(speaker.model, speaker.tokenizer, talk.pixels, talk.features, document,
                             self.out, **talk.bridge_text(talk.turns[-2])))


def named_file(text: str) -> Path:
    """The file of this name: as it stands, in quotes, or with \\ before blanks as a terminal writes what is
    dragged into it; each may begin with ~."""
    bare = text.strip("'\"")
    names = [os.path.expanduser(name) for name in (text, bare, re.sub(r"\\(.)", r"\1", bare))]
    return Path(next(filter(os.path.exists, names), names[1]))


def complete(line: str, n: int) -> str | None:
    """What TAB makes of a whole line: its n-th completion, of a command or of the file behind /image."""
    head, blank, rest = line.partition(" ")
    if not blank:
        found = [name.split()[0] for name in COMMANDS if name.startswith(line) and line]
    else:
        given, slash, begin = rest.rpartition("/")
        folder = Path(os.path.expanduser(given + slash))
        found = [f"{head} {given}{slash}{p.name}{'/' * p.is_dir()}" for p in sorted(folder.glob("*"))
                 if p.name.startswith(begin) and (begin or p.name[0] != ".")] if head == "/image" else []
    return found[n] if n < len(found) else None


def use_tab() -> None:
    """TAB completes lines; macOS has libedit in readline's place, which binds keys in other words."""
    libedit = "libedit" in (readline.__doc__ or "") or getattr(readline, "backend", "") == "editline"
    readline.set_completer_delims("")                   # a name may hold blanks
    readline.set_completer(complete)
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def note(text: str) -> None:
    """What is said beside the answers."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While it lasts, Ctrl-C is a KeyboardInterrupt each time it is pressed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


def make_parser() -> Parser:
    commands = "\n".join(f"    {name:14s}{what}" for name, what in COMMANDS.items())
    parser = Parser("eval.py chat", f"{__doc__}A line that begins with / is a command:\n\n{commands}\n")
    _, answer = add_model_flags(parser, "the first picture", 256)
    answer.add_argument("--temperature", type=number(float, least=0, most=100), default=0.0, metavar="X",
                        help="0 = the likeliest word each time (0)")
    answer.add_argument("--seed", type=number(least=0), default=0, metavar="N",
                        help="of what a temperature draws (0)")
    answer.add_argument("--out", default="out/look", metavar="FOLDER", help="of the maps of /look (out/look)")
    add_machine_flags(parser)
    return parser


def main(argv: list[str]) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.temperature:
        refuse_unread(given_flags(parser, args), {"seed"}, "--temperature 0")
    speaker = open_speaker(args.model, use_machine(args), DTYPES[args.dtype], args.template)
    talk = Conversation(speaker, args.max_new_tokens, args.temperature, args.seed)
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    chat = Chat(talk, Path(args.out), typed)
    if args.image:
        chat.show(args.image)
    if typed:
        use_tab()
        chat.say_what_it_reads()
        note("Ask, or /help; Ctrl-C stops an answer, Ctrl-D leaves."
             + (" First give it a picture: /image FILE" if speaker.needs and not args.image else ""))
    with interruptible(), packed(speaker.decoder):
        chat.run()
