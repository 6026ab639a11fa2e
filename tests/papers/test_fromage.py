"""FROMAGe captions and retrieves as the authors' code does, and its decoder keeps every row it had."""
from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import check, golden, tiny_vlm
from data import Document, Item
from model import IGNORE, IMAGE, VLM, Decoder, DecoderConfig
from papers import make_bridge
from papers.fromage import caption_loss, concatenate, read_ret, recall, retrieval_losses
from support.formats import load_bridge, load_decoder, load_vlm
from support.formats.files import UserError
from support.formats.vlm import open_run
from support.plumbing.log import read_log
from support.worlds import open_data

THEIRS = {"map": "visual_embeddings", "image_head": "visual_fc", "text_head": "text_hidden_fcs.0.0"}


def theirs(name: str) -> str:
    module, _, leaf = name.partition(".")
    return f"{THEIRS[module]}.{leaf}" if leaf else name


@pytest.fixture(scope="module")
def case():
    """(case.json, inputs, expected, VLM): the golden decoder without its last row, which is the bridge's."""
    folder, case, x, expected = golden("fromage")
    whole = load_decoder(folder / "lm")
    decoder = Decoder(replace(whole.config, vocab_size=32))
    rows = whole.embed.weight.detach()
    decoder.load_state_dict(whole.state_dict() | {"embed.weight": rows[:32]})
    bridge = make_bridge("fromage", decoder.config, 20, joint=10)
    tensors = load_file(folder / "model.safetensors") | {"ret": rows[32]}
    with torch.no_grad():
        for name, p in bridge.named_parameters():
            p.copy_(tensors.pop(theirs(name)))
    assert not tensors
    return case, x, expected, VLM(None, bridge, decoder.requires_grad_(False)).eval()


def documents(x: dict) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of (F1): the picture and the words; [RET] and padding are not needed."""
    rows = [row[:n - 1].tolist() for row, n in zip(x["labels"], x["caption_len"])]
    return [([IMAGE, *row], [IGNORE, *row]) for row in rows]


def pad(rows: list[list[int]], fill: int) -> torch.Tensor:
    return torch.tensor([row + [fill] * (max(map(len, rows)) - len(row)) for row in rows])


def batch(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, labels = zip(*rows)
    return pad(tokens, 0), pad(labels, IGNORE), pad([[1] * len(t) for t in tokens], 0).bool()


def losses(case_vlm, x) -> dict[str, torch.Tensor]:
    vlm, features = case_vlm, x["features"][:, None]
    tokens, labels, mask = batch(documents(x))
    text = pad([tokens for tokens, _ in documents(x)], 0)[:, 1:]
    words, contrast = retrieval_losses(vlm, text, features, mask[:, 1:])
    return {"caption.loss": caption_loss(vlm, tokens, labels, features, mask),
            "retrieval.lm_loss": words, "retrieval.contrastive_loss": contrast}


def test_every_loss_and_gradient_is_the_authors(case):
    case, x, expected, vlm = case
    found = losses(vlm, x)
    for key, value in found.items():
        check(case, key, value, expected[key])
    total = sum(found.values())
    check(case, "total_loss", total, expected["total_loss"])                    # (F3)
    vlm.zero_grad()
    total.backward()
    for name, p in vlm.bridge.named_parameters():
        key = "grad.ret_embedding" if name == "ret" else f"grad.{theirs(name)}"
        check(case, key, p.grad, expected.pop(key))
    assert not [key for key in expected if key.startswith("grad.")]
    assert all(p.grad is None for p in vlm.decoder.parameters())


@torch.no_grad()
def test_soft_tokens_logits_and_unit_vectors_are_the_authors(case):
    case, x, expected, vlm = case
    features = x["features"][:, None]
    check(case, "caption.soft_tokens", vlm.bridge.prefix(features), expected["caption.soft_tokens"])
    tokens, labels, mask = batch(documents(x))
    hidden, is_ret = read_ret(vlm, tokens, mask, features)                      # their rows end with [RET]
    logits = vlm.bridge.logits(hidden, vlm.decoder.head)
    for row, n in enumerate(x["caption_len"]):                                  # padding is theirs alone
        check(case, "caption.logits", logits[row, :n + 1], expected["caption.logits"][row, :n + 1])
        assert is_ret[row].nonzero().item() == n
        target = expected["caption.labels"][row]
        assert target[target != IGNORE].tolist() == labels[row][labels[row] != IGNORE].tolist()
    hidden, is_ret = read_ret(vlm, tokens[:, 1:], mask[:, 1:], features[:0])
    check(case, "retrieval.text", vlm.bridge.embed_state(hidden[is_ret]), expected["retrieval.text"])
    scaled = vlm.bridge.logit_scale.exp() * vlm.bridge.embed_pictures(features)
    check(case, "retrieval.image_scaled", scaled, expected["retrieval.image_scaled"])


class Words:
    """A tokenizer whose documents begin with nothing."""
    begin = ()


@torch.no_grad()
def test_two_examples_in_one_text_are_the_authors(case):
    case, x, expected, vlm = case
    pairs = []
    for tokens, labels in documents(x):
        d = Document(Words())
        d.tokens, d.labels = tokens, labels
        pairs.append((d, Item("picture", [], [])))
    joined = concatenate(pairs)
    assert [len(item.pictures) for _, item in joined] == [2, 2] and len(concatenate(pairs[:3])) == 2
    rows = [(d.tokens, d.labels) for d, _ in joined]
    for (_, labels), target in zip(rows, expected["caption_pairs.labels"]):
        assert target.tolist()[:len(labels)] == labels and set(target.tolist()[len(labels):]) == {IGNORE}
    tokens, labels, mask = batch(rows)
    loss = caption_loss(vlm, tokens, labels, x["features"][:, None], mask)
    check(case, "caption_pairs.loss", loss, expected["caption_pairs.loss"])


@torch.no_grad()
def test_misreadings_are_seen(case):
    """Without [RET] among the words, or with vectors that keep their lengths, the numbers are others."""
    case, x, expected, vlm = case
    features = x["features"][:, None]
    tokens, labels, mask = batch(documents(x))
    total, n = vlm.loss(tokens, labels, mask=mask, features=features)           # 32 words compete, not 33
    assert abs(total / n - expected["caption.loss"]) > 1e-3
    hidden, is_ret = read_ret(vlm, tokens[:, 1:], mask[:, 1:], features[:0])
    last = hidden[is_ret.roll(-1, 1)]                                           # of the last word, not [RET]
    assert (vlm.bridge.embed_state(last) - expected["retrieval.text"]).abs().max() > 1e-2


def test_the_published_size():
    with torch.device("meta"):
        bridge = make_bridge("fromage", DecoderConfig(width=4096), 1024)
    assert sum(p.numel() for p in bridge.parameters()) == 5_513_729
    scale = make_bridge("fromage", DecoderConfig(), 8).logit_scale.exp().item()
    assert math.isclose(scale, 1 / 0.07, rel_tol=1e-6)


@torch.no_grad()
def test_ret_stands_behind_each_text_and_sees_its_pictures_alone():
    vlm = tiny_vlm("fromage", tokens=1)
    features = torch.randn(3, 1, 20, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[3, IMAGE, 5, 7], [IMAGE, IMAGE, 6, 0]])
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    hidden, is_ret = read_ret(vlm, tokens, mask, features)
    assert is_ret.nonzero().tolist() == [[0, 4], [1, 3]] and hidden.shape == (2, 5, 32)
    alone, _ = read_ret(vlm, tokens[1:, :3], None, features[1:])
    torch.testing.assert_close(hidden[1, 3], alone[0, 3], atol=1e-5, rtol=1e-5)     # another length of sums
    other = features.clone()
    other[0] += 1
    moved = read_ret(vlm, tokens, mask, other)[0]
    assert (moved[0, 4] - hidden[0, 4]).abs().max() > 1e-3 and torch.equal(moved[1], hidden[1])


@torch.no_grad()
def test_a_factor_makes_a_ret_below_zero_less_likely():
    bridge = make_bridge("fromage", DecoderConfig(width=2), 3)
    bridge.ret.copy_(torch.tensor([1.0, 0.0]))
    head = torch.nn.Linear(2, 1, bias=False)
    head.weight.copy_(torch.tensor([[0.0, 1.0]]))
    h = torch.tensor([[2.0, 1.0], [-1.0, 1.0]])
    assert bridge.logits(h, head).tolist() == [[1.0, 2.0], [1.0, -1.0]]
    assert bridge.logits(h, head, boost=3).tolist() == [[1.0, 6.0], [1.0, -3.0]]    # the second one falls


def publish(folder, **changes) -> None:
    """The authors' files, made of the golden case's tensors: a checkpoint and model_args.json."""
    source = golden("fromage")[0]
    tensors = {f"model.{name}": t for name, t in load_file(source / "model.safetensors").items()}
    rows = load_file(source / "lm" / "model.safetensors")["model.embed_tokens.weight"]
    tensors |= {"ret_input_embeddings.weight": rows[32], **changes.pop("tensors", {})}
    torch.save({"state_dict": {k: t for k, t in tensors.items() if t is not None}},
               folder / "pretrained_ckpt.pth.tar")
    args = {"opt_version": "facebook/opt-6.7b", "freeze_lm": True, "n_visual_tokens": 1, "shared_emb_dim": 10,
            "use_image_embed_norm": False, "image_embed_dropout_prob": 0.0, "text_emb_layers": [-1],
            "retrieval_token_idx": 50266}
    (folder / "model_args.json").write_text(json.dumps(args | changes))


@torch.no_grad()
def test_the_published_file_is_the_bridge(case, tmp_path):
    _, x, expected, vlm = case
    publish(tmp_path)
    bridge = load_bridge("fromage", tmp_path, decoder=vlm.decoder.config)
    assert all(torch.equal(a, b) for a, b in zip(bridge.parameters(), vlm.bridge.parameters(), strict=True))
    assert (bridge.tokens, bridge.training) == (1, False)


@pytest.mark.parametrize("changes, message", [
    (dict(tensors={"ret_input_embeddings.weight": None}), '"ret_input_embeddings.weight" is missing'),
    (dict(tensors={"model.visual_fc.bias": torch.zeros(9)}), r'"model.visual_fc.bias" has shape \(9,\)'),
    (dict(tensors={"model.prompt": torch.zeros(9)}), 'first: "model.prompt"'),
    (dict(n_visual_tokens=4), "n_visual_tokens is 4, but the tensors say 1"),
    (dict(text_emb_layers=[-1, 12]), "text_emb_layers is"),
    (dict(use_image_embed_norm=True), "use_image_embed_norm is true"),
])
def test_what_does_not_fit_the_published_file_is_refused(tmp_path, changes, message):
    publish(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load_bridge("fromage", tmp_path)


def test_a_loss_of_its_own_goes_with_its_own_bridge(tmp_path):
    with pytest.raises(UserError, match="--bridge mlp: recipe fromage has a loss of its own"):
        train.main(["--recipe", "fromage", "--bridge", "mlp", "--out", str(tmp_path)])
    for flags in (["--accumulate", "2"], ["--pack"]):
        with pytest.raises(UserError, match=f"recipe fromage does not read {flags[0]}"):
            train.main(["--bridge", "fromage", *flags, "--out", str(tmp_path)])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("fromage")
    train.main(["--bridge", "fromage", "--steps", "4", "--batch", "8", "--eval-items", "8", "--samples", "0",
                "--log-every", "1", "--dtype", "float32", "--out", str(out)])
    return out


def test_a_run_logs_its_three_losses_finds_pictures_and_opens_again(run):
    lines = [line for line in read_log(run / "log.jsonl") if "loss" in line]
    for line in lines:                                                          # (F3)
        assert math.isclose(line["loss"], line["caption"] + line["text"] + line["retrieval"], rel_tol=1e-5)
    assert set(json.loads((run / "retrieval.json").read_text())) == {"caption", "dialogue"}
    vlm = load_vlm(run)
    length = vlm.decoder.embed.weight.norm(dim=1).mean()
    torch.testing.assert_close(vlm.bridge.ret.norm(), length, rtol=1e-5, atol=0)       # (F5)


@torch.no_grad()
def test_recall_knows_the_right_picture_and_takes_equal_captions_for_one(run, monkeypatch):
    vlm, tokenizer, _ = open_run(str(run), "cpu")
    items = [open_data("shapes").item(i) for i in range(4)]
    items = [replace(item, captions=[c]) for item, c in zip(items, ("red", "blue", "blue", "two"))]
    features = torch.eye(4, 128)[:, None]
    monkeypatch.setattr(vlm.bridge, "embed_pictures", lambda z: z[:, 0, :4])
    answers = torch.tensor([0, 2, 2, 1])                # right, right by an equal caption, right, wrong
    monkeypatch.setattr(vlm.bridge, "embed_state", lambda state: torch.eye(4)[answers])
    assert recall(vlm, tokenizer, items, features) == {"caption": 0.75, "dialogue": 0.75}
