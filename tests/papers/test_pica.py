"""PICa writes the authors' prompts, chooses their examples and their answer, and cleans it as they do."""
from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import GOLDEN, ROOT, chain_decoder
from data import QA, Item
from papers.pica import (PICa, Reply, clean_answer, end_reply, greedy_replies, rough_accuracy, with_tags,
                         write_prompt)
from support.formats import load_decoder
from support.worlds.text import shapes_tokenizer

FOLDER = GOLDEN / "pica-prompt"
CASE = json.loads((FOLDER / "inputs.json").read_text(encoding="utf-8"))
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))


class Words:
    """A tokenizer whose ids count the pieces of one reply."""
    stop = ()

    def __init__(self, pieces: list[str]):
        self.pieces = pieces

    def decode(self, ids) -> str:
        return "".join(self.pieces[i] for i in ids)


def case_items(part: str) -> list[Item]:
    result = []
    for key, r in CASE[part].items():
        qa = QA("", r["question"], r.get("answer", ""), r.get("answers", []))
        result.append(Item(None, [r["caption"]], [qa], key))
    return result


def case_embeddings(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    vectors, rows = load_file(FOLDER / "inputs.safetensors"), {}
    for part in ("train", "val"):
        for n, key in enumerate(CASE[part]):
            rows[key] = vectors[f"{part}_question"][n], vectors[f"{part}_image"][n]
    questions, pictures = zip(*(rows[item.id] for item, _ in pairs))
    return torch.stack(questions), torch.stack(pictures)


def true_caption(item: Item) -> str:
    return item.captions[0]


@pytest.mark.parametrize("n", range(len(CASE["runs"])))
def test_prompts_choice_and_answer_are_the_authors(n):
    run, expected, sent = CASE["runs"][n], EXPECTED["runs"][n], []

    def reply(prompts: list[str]) -> list[Reply]:
        sent.extend(prompts)
        replies = []
        for r in run["replies"]:
            replies.append(end_reply(Words(r["tokens"]), [*range(len(r["tokens"]))], r["token_logprobs"]))
            assert replies[-1].text == r["text"]
        return replies

    pica = PICa(case_items("train"), case_embeddings, true_caption, reply, run["n_shot"], run["n_ensemble"],
                run["similarity_metric"])
    asked = next(item for item in case_items("val") if item.id == run["key"])
    answer, = pica.answer([asked])
    assert sent == expected["prompts"] and answer == expected["answer"]
    assert rough_accuracy(answer, asked.qas[0].answers) == expected["rough_accuracy"]
    chosen, = pica.choose([(asked, asked.qas[0])])
    keys = [pica.pool[i][0].id for i in chosen]
    assert keys == (expected["context_keys"] if run["n_shot"] else [])       # theirs: [-0:] is the whole list


@pytest.mark.parametrize("text, clean", [*zip(CASE["strings"], EXPECTED["process_answer"])])
def test_answers_are_cleaned_as_the_authors_do(text, clean):
    assert clean_answer(text) == clean


def test_the_prompt_of_the_docstring():
    context = with_tags("a dog on a mat", ["dog", "mat"])
    assert context == "a dog on a mat. dog, mat" and with_tags("a dog", []) == "a dog"
    assert write_prompt([("a red box", "what is red?", "box")], context, "what lies?") == (
        "Please answer the question according to the above context.\n===\nContext: a red box\n===\n"
        "Q: what is red?\nA: box\n\n===\nContext: a dog on a mat. dog, mat\n===\nQ: what lies?\nA:")


def items(count: int) -> list[Item]:
    return [Item(None, [f"caption {n}"], [QA("", f"what {n}{x}?", f"answer {n}{x}") for x in "ab"], str(n))
            for n in range(count)]


def one_hot(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.eye(8)[[int(item.id) for item, _ in pairs]]
    return rows, rows


def echo(prompts: list[str]) -> list[Reply]:
    return [Reply(p.split("A: ", 1)[-1].split("\n")[0], -float(n)) for n, p in enumerate(prompts)]


def test_there_is_one_answer_per_question_in_the_order_of_the_items():
    pica = PICa(items(4), one_hot, true_caption, echo, shots=2, ensemble=2)
    asked = items(3)[::-1]
    assert len(pica.answer(asked)) == 6 and pica.answer([]) == []
    for n, numbers in enumerate(pica.choose([(i, q) for i in asked for q in i.qas])):
        assert {pica.pool[i][0].id for i in numbers[:2]} == {asked[n // 2].id}
        assert len({*numbers}) == 4


def test_random_examples_need_no_embedding_and_follow_the_seed():
    def draw(seed: int) -> list[list[int]]:
        pica = PICa(items(8), None, true_caption, echo, 3, 2, "random", seed)
        return pica.choose([(i, i.qas[0]) for i in items(5)])
    first = draw(1)
    assert first == draw(1) != draw(2)
    assert all(len({*row}) == 6 for row in first) and first[0] != first[1]


def test_the_first_of_equally_likely_replies_wins_and_length_counts_against():
    def reply(prompts):
        return [Reply(" long answer", -1.5), Reply(" yes", -1.0), Reply(" no", -1.0)]
    assert PICa([], one_hot, true_caption, reply, 0, 3).answer(items(1)) == ["yes", "yes"]


@pytest.mark.parametrize("change, words", [
    (dict(shots=5, ensemble=2), "10 examples; there are 8"),
    (dict(shots=-1), "-1 shots"), (dict(ensemble=0), "at least one prompt"),
    (dict(similarity="pictures"), 'no similarity "pictures"'),
    (dict(examples=[Item(None, [], [QA("", "q", "a")], "7")], shots=1, ensemble=1), '"7" has no caption'),
])
def test_settings_that_fit_no_prompt_are_refused(change, words):
    settings = dict(examples=items(4), embed=one_hot, describe=true_caption, reply=echo, shots=2, ensemble=2)
    with pytest.raises(ValueError, match=words):
        PICa(**{**settings, **change})


def test_a_reply_ends_ahead_of_a_line_break_or_of_the_end_token():
    words = Words([" red", " box", ".\n", "x", "</s>"])
    words.stop = (4,)
    assert end_reply(words, [0, 1, 2, 3], [-1.0, -2.0, -4.0, -8.0]) == (" red box.", -3.0)
    assert end_reply(words, [0, 4, 1], [-1.0, -2.0, -4.0]) == (" red", -1.0)
    assert end_reply(words, [4], [-1.0]) == ("", 0)
    assert end_reply(words, [0, 1], [-1.0, -2.0]) == (" red box", -3.0)


def test_replies_in_a_batch_are_those_of_single_prompts_and_of_generate():
    decoder, tokenizer = load_decoder(ROOT / "weights/decoder"), shapes_tokenizer()
    prompts = [write_prompt([], "a red circle", "what color is the circle?"),
               write_prompt([("a blue square", "is it red?", "no")], "a green ring", "is there a ring?")]
    together = greedy_replies(decoder, tokenizer, prompts)
    for prompt, reply in zip(prompts, together):
        alone, = greedy_replies(decoder, tokenizer, [prompt])
        assert alone.text == reply.text
        assert alone.log_probability == pytest.approx(reply.log_probability, abs=1e-4)
        tokens = torch.tensor([[*tokenizer.begin, *tokenizer.encode(prompt)]])
        ids = decoder.generate(tokens, max_new_tokens=5)[0]
        logits = decoder(torch.cat((tokens, ids[None]), dim=1))[0, tokens.shape[1] - 1:-1]
        log_p = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0].tolist()
        again = end_reply(tokenizer, ids.tolist(), log_p)
        assert again.text == reply.text
        assert again.log_probability == pytest.approx(reply.log_probability, abs=1e-4)


def test_pica_answers_with_a_decoder_that_knows_the_form():
    """The decoder says one word, then ends: the whole way from an item to its answer."""
    tokenizer = shapes_tokenizer()
    word, colon = tokenizer.encode(" red", preceded_by="text"), tokenizer.encode("A:")[-1]
    decoder = chain_decoder(tokenizer.vocab_size, {colon: word[0], word[-1]: tokenizer.eos,
                                                   **dict(zip(word, word[1:]))})
    pica = PICa(items(4), one_hot, true_caption, lambda prompts: greedy_replies(decoder, tokenizer, prompts),
                shots=1, ensemble=2)
    assert pica.answer(items(2)) == ["red"] * 4
