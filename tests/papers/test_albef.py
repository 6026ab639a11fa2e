"""ALBEF computes what its authors' code does: states, three losses, gradients, queues, the teacher, a second
step."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, check, golden
from data import Shapes
from model import IGNORE, ViT, ViTConfig
from papers.albef import Albef, Towers
from papers.albef_task import AlbefTask
from papers.recipe import Ingredients
from papers.unread import UNREAD
from support.formats import load_vit
from support.formats.albef import load_albef
from support.worlds.text import shapes_tokenizer


@pytest.fixture
def case():
    folder, case, x, expected = golden("albef")
    model = load_albef(folder)
    model.place.copy_(load_file(folder / "model.safetensors")["queue_ptr"][0])
    return case, x, expected, model


def hardest(model: Albef, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> tuple:
    """(A5) with the likeliest row instead of a draw, as the case has it."""
    towers, teacher = model.towers, model.teacher
    f, g = towers.embed(towers.picture(pixels), towers.text(tokens, mask))
    f_slow, g_slow = teacher.embed(teacher.picture(pixels), teacher.text(tokens, mask))
    own = torch.eye(len(f), dtype=torch.bool)
    return tuple((x @ y.T).masked_fill(own, -torch.inf).argmax(1) for x, y in ((g, f_slow), (f, g_slow)))


def step(model: Albef, pixels, tokens, mask, masked, labels) -> dict:
    model.update_teacher()
    losses = model.losses(pixels, tokens, mask, masked, labels, 0.4, hardest(model, pixels, tokens, mask))
    model.enqueue(*model.entering)
    return losses


def test_two_steps_are_the_authors(case):
    case, x, expected, model = case
    mask, real = x["attention_mask"].bool(), x["attention_mask"][..., None]
    towers = model.towers
    picture, text = towers.picture(x["image"]), towers.text(x["input_ids"], mask)
    check(case, "image_embeds", picture, expected["image_embeds"])
    check(case, "text_embeds", text * real, expected["text_embeds"] * real)
    check(case, "fusion_embeds", towers.fuse(text, picture, mask) * real, expected["fusion_embeds"] * real)
    losses = step(model, x["image"], x["input_ids"], mask, x["input_ids_masked"], x["labels"])
    for ours, theirs in (("itc", "loss_ita"), ("itm", "loss_itm"), ("mlm", "loss_mlm")):
        check(case, theirs, losses[ours], expected[theirs])
    sum(losses.values()).backward()
    cross = "text_encoder.bert.encoder.layer.1.crossattention.self.value.weight"
    for name, p in (("temp", model.temperature), ("vision_proj.weight", towers.image_projection.weight),
                    ("itm_head.weight", model.match_head.weight),
                    (cross, towers.fusion[0].cross.v.weight)):
        torch.testing.assert_close(p.grad, expected[f"grad.{name}"], atol=1e-4, rtol=1e-4)
    check(case, "queue", model.image_queue.T, expected["image_queue_after"])
    check(case, "queue", model.text_queue.T, expected["text_queue_after"])
    check(case, "queue", model.place[None], expected["queue_ptr_after"])
    check(case, "momentum", model.teacher.image_projection.weight,
          expected["momentum.vision_proj_m.weight"])
    assert all(p.grad is None for p in model.teacher.parameters())

    tokens, chosen = x["input_ids_2"], torch.arange(6) == 1     # the second call masks position 1
    losses = step(model, x["image_2"], tokens, tokens != 0, tokens.masked_fill(chosen, 4),
                  tokens.masked_fill(~chosen, IGNORE))
    for ours, theirs in (("itc", "loss_ita"), ("itm", "loss_itm"), ("mlm", "loss_mlm")):
        check(case, theirs, losses[ours], expected[f"second.{theirs}"])
    check(case, "queue", model.place[None], expected["second.queue_ptr_after"])


def test_a_teacher_that_is_updated_behind_its_forward_pass_is_another(case):
    """The order of a step: the teacher moves first, and the batch enters the queues last."""
    case, x, expected, model = case
    batch = [x[key] for key in ("image", "input_ids", "attention_mask", "input_ids_masked", "labels")]
    batch[2] = batch[2].bool()
    late = model.losses(*batch, 0.4, hardest(model, *batch[:3]))
    assert abs(late["itc"] - expected["loss_ita"]) > 1e-3
    model.update_teacher()
    model.losses(*batch, 0.4, hardest(model, *batch[:3]))
    model.enqueue(*model.entering)
    early = model.losses(*batch, 0.4, hardest(model, *batch[:3]))
    assert abs(early["itc"] - expected["loss_ita"]) > 1e-3


def test_a_queue_is_a_ring():
    model = Albef(Towers(ViT(ViTConfig(8, 4, 8, 1, 2, 8)), 10, 8, 2, 2, 8, 8, 4), queue=5)
    rows = torch.arange(12.0).view(3, 4)
    for _ in range(3):
        model.enqueue(rows, rows)
    # 9 rows in a ring of 5: the third batch lies at 1, 2, 3, of the second is left what lay at 4 and 0
    assert model.place == 4 and torch.equal(model.image_queue, rows[[2, 0, 1, 2, 1]])
    assert torch.equal(model.text_queue, model.image_queue)


def test_the_published_sizes_are_123_7_and_85_8_million_each_twice():
    with torch.device("meta"):
        vit = ViT(ViTConfig(256, 16, 768, 12, 12, 3072, "gelu", 1e-6, pre_norm=False, patch_bias=True))
        model = Albef(Towers(vit, 30522))
    parts = [sum(p.numel() for p in m.parameters()) for m in (model.towers, vit)]
    heads = 2 * (768 * 256 + 256)
    assert (parts[0] - parts[1] - heads, parts[1]) == (123_697_722, 85_844_736)
    assert sum(p.numel() for p in model.parameters()) == 2 * parts[0] + 2 * 769 + 1
    assert model.image_queue.shape == (65536, 256)


@pytest.fixture(scope="module")
def task() -> AlbefTask:
    torch.manual_seed(0)
    given = Ingredients(torch.device("cpu"), seed=0, batch=4, steps=60, world=Shapes("train"),
                        tokenizer=shapes_tokenizer(), vit=load_vit(ROOT / "weights/vit"))
    return AlbefTask(given, queue=6)


def test_a_batch_of_two_processes_is_that_of_one(task):
    whole, = task.batch(1)
    parts = []
    for number in range(2):
        task.given.part = number, 2
        parts += task.batch(1)
    task.given.part = 0, 1
    assert torch.equal(torch.cat([part["pixels"] for part in parts]), whole["pixels"])
    for key in ("tokens", "masked", "labels"):
        rows = [row[real].tolist() for part in parts for row, real in zip(part[key], part["mask"])]
        assert rows == [row[real].tolist() for row, real in zip(whole[key], whole["mask"])]
    assert whole["alpha"] == pytest.approx(0.2) and task.batch(9)[0]["alpha"] == 0.4


def test_behind_a_step_the_batch_enters_the_queues_and_the_teacher_follows(task):
    task.freeze(("towers", "match_head"), torch.float32)
    memory = task.memory()
    before = {name: tensor.clone() for name, tensor in memory.items()}
    assert {"image_queue", "text_queue", "place", "teacher.vit.cls"} <= memory.keys()
    task.loss(**task.batch(0)[0]).backward()
    assert {*task.last} == {"itc", "itm", "mlm"}
    assert all(torch.equal(memory[name], tensor) for name, tensor in before.items())    # a saved step repeats
    with torch.no_grad():
        for p in task.module.towers.parameters():
            p.add_(1.0)
        task.module.temperature.fill_(0.9)
    task.after_step()
    assert task.module.temperature == 0.5 and memory["place"] == 4
    assert not torch.equal(memory["image_queue"][:4], before["image_queue"][:4])
    assert torch.equal(memory["image_queue"][4:], before["image_queue"][4:])
    torch.testing.assert_close(memory["teacher.vit.cls"], before["teacher.vit.cls"] + 0.1)


def test_the_teacher_moves_whatever_frozen_parts_are_stored_in(task):
    """A step moves it by a share of what the weights are ahead, which bfloat16 would round off."""
    task.freeze(("towers", "match_head"), torch.bfloat16)
    slow, fast = task.module.teacher.vit.positions, task.module.towers.vit.positions
    assert slow.dtype == torch.float32 and not slow.requires_grad and not task.mixed
    with torch.no_grad():
        fast.copy_(slow + 0.01 * slow.abs())
    before = slow.clone()
    task.module.update_teacher()
    torch.testing.assert_close(slow - before, 0.1 * (fast - before).detach(), rtol=1e-2, atol=1e-7)
    assert "frozen" in UNREAD["albef"]                  # the flag would have nothing to say
