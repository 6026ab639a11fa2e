"""python eval.py chat: lines in, answers out; in a terminal one edits a line, and Ctrl-C stops an answer."""
import contextlib
import fcntl
import io
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time

import pytest
from conftest import GOLDEN, ROOT, speaking
from PIL import Image

import data
import eval as evaluation
from support.formats.files import UserError
from support.lab.chat import CONTROL, complete, named_file, use_tab
from support.lab.reads import unread_words, what_it_reads
from support.lab.speakers import Conversation, open_speaker
from support.worlds.text import shapes_tokenizer

PHOTO = str(GOLDEN / "image-processors" / "images" / "coffee_73x151.png")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "a scene.png"
    Image.fromarray(data.Shapes("test").item(0).image).save(file)
    return str(file)


def converse(lines, *argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    evaluation.main(["chat", *argv])
    return capsys.readouterr()


def test_a_script_of_lines_gives_the_answers_of_ask(untrained_run, picture, monkeypatch, capsys):
    """The first turn and a caption are those of `ask`; notes are not among the answers."""
    told = ["where is the ring?", "", f'/image "{picture}"', "/caption", "/quit", "never asked"]
    said = converse(told, untrained_run, "--image", picture, "--max-new-tokens", "12",
                    monkeypatch=monkeypatch, capsys=capsys)
    expected = []
    for flags in (["--prompt", told[0]], []):
        evaluation.main(["ask", untrained_run, "--image", picture, "--max-new-tokens", "12", *flags])
        expected += capsys.readouterr().out.splitlines()
    assert said.out.splitlines() == expected and "a new conversation" in said.err
    assert "\x1b" not in said.out + said.err and "> " not in said.out


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"", b"\xef\xbb\xbf\r\n"])
def test_lines_of_any_encoding_are_read(mark, untrained_run, picture, monkeypatch, capsys):
    """A mark of the order of bytes is no part of the first line; a byte that is no UTF-8 is a letter."""
    told = mark + f"/image {picture}\r\nwhere is the ring?\r\n".encode() + b"where is the caf\xe9?\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(told), encoding="utf-8"))
    evaluation.main(["chat", untrained_run, "--max-new-tokens", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_later_turns_stand_in_the_form_of_training(untrained_run, picture):
    talk = Conversation(open_speaker(untrained_run, "cpu"), max_new_tokens=6)
    talk.look_at(data.Shapes("test").item(0).image)
    first = "".join(talk.answer("where is the ring?"))
    learned = data.Document(talk.speaker.tokenizer).image()
    learned.turn(data.QUESTION.format("where is the ring?"), first).add(data.QUESTION.format("what color?"))
    assert talk.document("what color?").tokens == learned.tokens
    assert talk.document("what color?", alone=True).tokens.count(talk.speaker.tokenizer.eos) == 0
    talk.reset()
    assert talk.turns == [] and talk.features is not None
    assert "".join(talk.answer("where is the ring?")) == first


def test_an_answer_that_is_stopped_is_a_turn(untrained_run):
    talk = Conversation(open_speaker(untrained_run, "cpu"), max_new_tokens=30)
    talk.look_at(data.Shapes("test").item(0).image)
    pieces = talk.answer("where is the ring?")
    said = next(pieces)
    pieces.close()
    assert talk.turns == ["where is the ring?", said]


@pytest.mark.parametrize("case", ["llava-hf", "idefics-plain", "mllama", "instructblip-llama"])
def test_a_published_model_talks_in_its_own_form(case, tmp_path, monkeypatch, capsys):
    folder, flags = str(speaking(tmp_path, case)), ["--max-new-tokens", "4"]
    evaluation.main(["ask", folder, "--image", PHOTO, "--prompt", "hello", *flags])
    asked = capsys.readouterr().out
    said = converse(["hello", "again"], folder, "--image", PHOTO, *flags, monkeypatch=monkeypatch,
                    capsys=capsys)
    assert said.out.startswith(CONTROL.sub("", asked)) and said.out.count("\n") >= 2
    talk = Conversation(open_speaker(folder, "cpu"), 4)
    if case == "instructblip-llama":                    # it has one form, for one question
        with pytest.raises(UserError, match="about a picture"):
            [*talk.answer("hello")]
        return
    [*talk.answer("hello")]                             # no picture, no sentinel
    template = talk.speaker.tokenizer.template
    turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), (*talk.turns, "again"))]
    assert talk.document("again").tokens == data.Document(talk.speaker.tokenizer).chat(turns).tokens, template


def test_a_decoder_talks_alone(monkeypatch, capsys):
    said = converse(["a red circle", "/reset", "a red circle"], "weights/decoder", "--max-new-tokens", "5",
                    monkeypatch=monkeypatch, capsys=capsys)
    first, second = said.out.splitlines()
    assert first == second and "cut at 5 tokens" in said.err
    for command in ("/image x.png", "/caption", "/look"):
        with pytest.raises(UserError, match=f"^{command.split()[0]}: weights/decoder sees no picture"):
            converse([command], "weights/decoder", monkeypatch=monkeypatch, capsys=capsys)


def test_a_temperature_draws_the_same_for_the_same_seed():
    talks = [Conversation(open_speaker("weights/decoder", "cpu"), 8, 2.0, seed) for seed in (1, 1, 2)]
    texts = ["".join(talk.answer("a red circle")) for talk in talks]
    assert texts[0] == texts[1] != texts[2]


def test_it_says_what_a_toy_cannot_read(untrained_run, picture, monkeypatch, capsys):
    said = converse(["Where is the elephant?", "where is the ring?"], untrained_run, "--image", picture,
                    monkeypatch=monkeypatch, capsys=capsys)
    assert said.err.count("may not read") == 1 and "'Where', 'elephant'" in said.err
    facts = {"settings": {"data": "shapes", "seed": 0}}
    sentence = what_it_reads("out/mlp-shapes", shapes_tokenizer(), facts)
    assert "orange" in sentence and "triangle" in sentence and "elephant" not in sentence
    for spec, some in (("folder:gone", False), ("folder:gone + shapes", True)):
        facts = {"settings": {"data": spec, "seed": 0}}
        sentence = what_it_reads("out/own", shapes_tokenizer(), facts)
        assert f"trained on {spec}, which is not here" in sentence and ("orange" in sentence) == some
        assert "these" not in sentence
    assert unread_words(shapes_tokenizer(), "is there an orange ring at the top left?") == []
    large = type("Large", (), {"vocab_size": 49152})()
    assert unread_words(large, "Where is the elephant?") == []
    assert "trained on the pictures of emoji" in what_it_reads("r", large, {"settings": {"data": "emoji"}})


@pytest.mark.parametrize("lines, flags, words", [
    (["hello"], [], ["answers about a picture"]),
    (["/image"], [], ["needs a file"]),
    (["/image none.png"], [], ["none.png"]),
    (["/caption x"], [], ["/caption takes nothing"]),
    (["/caption now"], [], ["takes nothing"]),
    (["/imag x.png"], [], ["unknown command /imag", "/image"]),
    (["/look"], [], ["give one"]),
    ([], ["--temperature", "-1"], ["at least 0"]),
    ([], ["--seed", "3"], ["--temperature 0 does not read --seed"]),
    ([], ["--max-new-tokens", "0"], ["at least 1"]),
    ([], ["--template", "no"], ["no"]),
])
def test_a_mistake_is_one_sentence(untrained_run, lines, flags, words, monkeypatch, capsys):
    with pytest.raises(UserError) as e:
        converse(lines, untrained_run, *flags, monkeypatch=monkeypatch, capsys=capsys)
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value), e.value


def test_a_conversation_beyond_the_context_is_one_sentence(tmp_path):
    talk = Conversation(open_speaker("weights/decoder", "cpu"), 4)
    with pytest.raises(UserError, match=r"has 2,5\d\d tokens.*reads 2,048; ask a shorter question"):
        [*talk.answer("red " * 2500)]
    talk.turns = ["red " * 2500, "yes"]
    with pytest.raises(UserError, match="begin a new conversation"):
        [*talk.answer("red")]
    with pytest.raises(UserError, match="decoder alone"):
        talk.look_at(data.Shapes().item(0).image)
    with pytest.raises(UserError, match="<image>"):
        [*talk.answer("what is in <image> here?")]


def test_look_draws_the_last_question(untrained_run, picture, tmp_path, monkeypatch, capsys):
    said = converse(["where is the ring?", "what color is the ring?", "/look"], untrained_run, "--image",
                    picture, "--out", str(tmp_path / "maps"), monkeypatch=monkeypatch, capsys=capsys)
    assert "attention to the picture" in said.out and (tmp_path / "maps" / "words.png").exists()


def test_a_file_is_named_as_it_stands_in_quotes_or_as_a_terminal_writes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("my photo (1).jpg", "back\\slash.jpg", "plain.jpg"):
        (tmp_path / name).touch()
    dragged = "my\\ photo\\ \\(1\\).jpg"
    for text in ("my photo (1).jpg", dragged, "'my photo (1).jpg'", f"~/{dragged}"):
        assert named_file(text).name == "my photo (1).jpg" and named_file(text).exists(), text
    assert named_file("back\\slash.jpg").name == "back\\slash.jpg"
    assert str(named_file("'no file.jpg'")) == "no file.jpg"
    assert str(named_file("~nobody-here/a")) == "~nobody-here/a" and len(str(named_file("x" * 9999))) == 9999


def test_tab_completes_commands_and_names_with_blanks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos").mkdir()
    (tmp_path / "my photos" / "a cat.png").touch()
    (tmp_path / ".hidden").touch()

    def completions(line: str) -> list[str]:
        found = []
        while (text := complete(line, len(found))) is not None:
            found.append(text)
        return found
    assert completions("/i") == ["/image"] and completions("/re") == ["/reset"]
    assert completions("/image my p") == completions("/image ") == ["/image my photos/"]
    assert completions("/image my photos/a c") == ["/image my photos/a cat.png"]
    assert completions(f"/image {tmp_path}/my photos/") == [f"/image {tmp_path}/my photos/a cat.png"]
    assert completions("where is") == completions("") == completions("/image none") == []


@pytest.mark.parametrize("says, binds", [("… uses GNU readline.", "tab: complete"),
                                         ("… uses libedit.", "bind ^I rl_complete")])
def test_tab_is_bound_in_the_words_of_the_line_editor(says, binds, monkeypatch):
    import readline
    bound = []
    monkeypatch.setattr(readline, "__doc__", says)
    monkeypatch.setattr(readline, "parse_and_bind", bound.append)
    use_tab()
    assert bound == [binds]


# ---- in a terminal -----------------------------------------------------------------------------------------

class Terminal:
    """The command in a pseudo-terminal."""

    def __init__(self, *argv: str):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, "eval.py", "chat", *argv], cwd=ROOT, stdin=slave,
                                        stdout=slave, stderr=slave, env=environment, start_new_session=True,
                                        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(slave)
        self.text = ""

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """What was shown since the last call, up to and with the pattern."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text, re.S)):
            assert time.monotonic() < end, f"{pattern!r} was not shown in {self.text!r}"
            if select.select([self.master], [], [], 1)[0]:
                self.text += os.read(self.master, 65536).decode("utf-8", "replace")
        shown, self.text = self.text[:match.end()], self.text[match.end():]
        return shown

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def interrupt(self, pattern: str) -> str:
        """What Ctrl-C shows. Python's line editor does not notice one that comes between its prompt and its
        waiting for keys, so it is pressed until it is."""
        for _ in range(12):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.wait_for(pattern, 5)
        raise AssertionError(f"Ctrl-C does not show {pattern!r}, but {self.text!r}")


@pytest.mark.slow
def test_in_a_terminal(untrained_run, picture):
    terminal = Terminal(untrained_run, "--max-new-tokens", "2000")
    try:
        assert "First give it a picture" in terminal.wait_for("> ")
        terminal.type(f"/image {picture}\r")
        terminal.wait_for("a new conversation about it.*> ")
        terminal.type("where is the ring?\r")
        terminal.wait_for(r"ring\?\r\n.*\w+")
        terminal.interrupt(r"(\(stopped\)|\n).*> ")                 # Ctrl-C stops the answer …
        terminal.type("half a line")
        terminal.interrupt("Ctrl-D or /quit leaves.*> ")            # … empties the line …
        terminal.type("/nonsense\r")                                # … a mistake is a sentence …
        terminal.wait_for("unknown command /nonsense.*> ")
        terminal.type("\x1b[A\x1b[A\r")                             # … the arrow brings back the question …
        terminal.wait_for(r"where is the ring\?.*\n")
        terminal.interrupt("> ")
        terminal.type("\x04")                                       # … and Ctrl-D leaves.
        assert terminal.process.wait(20) == 0
    finally:
        if terminal.process.poll() is None:
            terminal.process.kill()
        os.close(terminal.master)
