"""python eval.py demo: the page's parts, and with a browser at hand the page itself."""
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, shapes_vlm, speaking
from PIL import Image

import data
import eval as evaluation
from support.formats import save_vlm
from support.formats.files import UserError
from support.lab.chat import Chat
from support.lab.demo import answer_all, enlarge, examples_of, flatten, reading_lines, where_it_looks
from support.lab.speakers import Conversation, open_speaker

SCENE = data.Shapes("test").item(0).image


@pytest.fixture(scope="module")
def flamingo_run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("flamingo")
    facts = {"settings": {"data": "shapes", "seed": 0}}
    save_vlm(shapes_vlm("flamingo"), folder, facts, vit="weights/vit", decoder="weights/decoder")
    return str(folder)


def test_without_gradio_it_is_one_sentence(untrained_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install gradio"):
        evaluation.main(["demo", untrained_run])
    with pytest.raises(UserError, match="at most 65,535"):
        evaluation.main(["demo", untrained_run, "--port", "99999"])


def test_what_is_drawn_becomes_a_picture():
    drawn = np.zeros((4, 4, 4), np.uint8)
    drawn[0, 0], drawn[1, 1] = (230, 40, 40, 255), (230, 40, 40, 128)
    picture = flatten({"background": None, "layers": [], "composite": drawn})
    assert picture.shape == (4, 4, 3) and tuple(picture[0, 0]) == (230, 40, 40)
    assert tuple(picture[3, 3]) == data.BACKGROUND and 24 < picture[1, 1, 0] < 230
    for nothing in (None, {"composite": None}, {"composite": np.zeros((4, 4, 4), np.uint8)}):
        with pytest.raises(UserError, match="draw or load a picture"):
            flatten(nothing)
    assert enlarge(SCENE).shape == (384, 384, 3) and np.array_equal(enlarge(SCENE)[::8, ::8], SCENE)
    assert enlarge(np.zeros((900, 600, 3), np.uint8)).shape == (900, 600, 3)


def test_all_speakers_answer_side_by_side(untrained_run, flamingo_run):
    speakers = [open_speaker(run, "cpu") for run in (untrained_run, flamingo_run)]
    states = [*answer_all(speakers, 6, {"composite": SCENE}, "where is the elephant?")]
    last = states[-1]
    assert len(states) > 3 and states[0][3] == ""                   # the first one is shown while it writes
    for n, speaker in enumerate(speakers):
        talk = Conversation(speaker, 6)
        talk.look_at(SCENE)
        assert last[3 * n] == "".join(talk.answer("where is the elephant?"))
        assert last[3 * n + 1].shape == (384, 384, 3) and "may not read elephant" in last[3 * n + 2]
    assert "draw or load" in [*answer_all(speakers, 6, None, "what?")][0][0]


def test_a_bridge_without_a_grid_has_no_map_and_says_so(tmp_path):
    save_vlm(shapes_vlm("clipcap"), tmp_path, vit="weights/vit", decoder="weights/decoder")
    talk = Conversation(open_speaker(str(tmp_path), "cpu"), 4)
    talk.look_at(SCENE)
    picture, said = where_it_looks(talk, "what color is the ring?")
    assert picture is None and "as a whole" in said


def test_the_map_of_a_model_whose_bridge_reads_the_question_knows_the_question(tmp_path, monkeypatch):
    """InstructBLIP: the page, /look and their words show the very forward that answers."""
    import support.lab.attention as attention
    talk = Conversation(open_speaker(str(speaking(tmp_path, "instructblip-llama")), "cpu"), 4)
    talk.look_at(SCENE)
    given, see = [], type(talk.speaker.model.bridge).see
    monkeypatch.setattr(type(talk.speaker.model.bridge), "see", lambda self, *a, **text:
                        given.append(text.get("text")) or see(self, *a, **text))
    [*talk.answer("hello there")]
    where_it_looks(talk, "hello there")
    words = []
    monkeypatch.setattr(attention, "nearest_words", lambda *a, **text: words.append(text) or [])
    Chat(talk, tmp_path / "maps", typed=False).look()
    assert len(given) == 3 and given[0] is not None and all(torch.equal(t, given[0]) for t in given)
    assert torch.equal(words[0]["bridge_tokens"], given[0])


def test_the_page_says_what_can_be_read_and_has_examples(untrained_run, flamingo_run):
    speakers = [open_speaker(run, "cpu") for run in (flamingo_run, flamingo_run, untrained_run)]
    lines = reading_lines(speakers)
    assert len(lines) == 2 and lines[0].startswith(f"{flamingo_run}, {flamingo_run}: a toy decoder")
    assert "orange" in lines[0] and "no others" in lines[1]
    picture, question = examples_of(speakers[0])[0]
    assert picture.shape == (48, 48, 3) and question.endswith("?")
    assert examples_of(speakers[2]) == []               # a run that does not say what it was trained on


@pytest.mark.slow
def test_in_a_browser_one_loads_a_picture_asks_and_reads_the_answers(untrained_run, flamingo_run, tmp_path):
    pytest.importorskip("gradio")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.by import By
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("Debian has them as chromium and chromium-driver")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    runs, shot = (untrained_run, flamingo_run), os.environ.get("SCREENSHOT", str(tmp_path / "page.png"))
    if "DEMO_RUNS" in os.environ:
        runs = os.environ["DEMO_RUNS"].split()
    server = subprocess.Popen([sys.executable, "eval.py", "demo", *runs, "--port", str(port)], cwd=ROOT,
                              stdout=subprocess.PIPE, text=True)
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--window-size=1400,1000"):
        options.add_argument(flag)
    browser = None

    def wait(found, seconds: int = 120):
        """What is found at last; the page may exchange its elements while it builds them."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(WebDriverException, IndexError):
                if value := found():
                    return value
            time.sleep(0.5)
        raise AssertionError("the page does not show it")

    try:
        assert f"http://127.0.0.1:{port}" in server.stdout.readline()
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        browser = webdriver.Chrome(options=options, service=service)
        browser.get(f"http://127.0.0.1:{port}")
        find = lambda css: browser.find_elements(By.CSS_SELECTOR, css)                  # noqa: E731
        wait(lambda: "a toy decoder" in find("body")[0].text and find("#ask"))
        time.sleep(3)
        Image.fromarray(np.asarray(Image.fromarray(SCENE).resize((384, 384), 0))).save(tmp_path / "scene.png")
        file, asked = str(tmp_path / "scene.png"), "what color is the ring?"
        wait(lambda: find("#canvas input[type=file]")[0].send_keys(file) or True)
        time.sleep(5)                                               # the upload
        box = "#question textarea, #question input"
        wait(lambda: find(box)[0].clear() or find(box)[0].send_keys(asked)
             or find(box)[0].get_attribute("value") == asked)
        wait(lambda: find("#ask")[0].click() or True)
        answers = wait(lambda: all(texts := [e.get_attribute("value") for e in find(".answer textarea")])
                       and len(texts) == 2 and texts)
        wait(lambda: len(find(".map img")) == 2)
        time.sleep(1)
        browser.save_screenshot(shot)
        assert os.path.getsize(shot) > 10_000
        if "DEMO_RUNS" not in os.environ:
            for run, answer in zip(runs, answers):
                talk = Conversation(open_speaker(run, "cpu"), 64)
                talk.look_at(np.asarray(Image.open(tmp_path / "scene.png")))
                assert "".join(talk.answer("what color is the ring?")).startswith(answer[:20])
        else:
            assert answers == ["orange", "orange"]
    finally:
        if browser is not None:
            browser.quit()
        server.terminate()
        server.wait(20)
