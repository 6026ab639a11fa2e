"""What a run prints before it spends the evening is true."""
from __future__ import annotations

import torch

from conftest import tiny_vlm
from model import IGNORE, IMAGE
from support.plumbing.doctor import align_tokens, blind_loss, gradient_norms, print_modules


class Words:
    """A tokenizer of four words."""
    words = ["a", " red", " circle", "\n"]

    def decode(self, ids: list[int], special: bool = False) -> str:
        return "".join(self.words[i] for i in ids)


class Text:
    tokens = [IMAGE, 0, 1, 2, 3] * 8
    labels = [IGNORE, IGNORE, 1, 2, 3] * 8


def test_tokens_stand_above_what_is_learned_of_them():
    lines = align_tokens(Text, Words(), width=60)
    assert len(lines) % 2 == 0 and all(len(line) <= 60 for line in lines)
    assert lines[0].split()[:5] == ["<image>", "a", "~red", "~circle", "↵"]
    assert lines[1].split()[:3] == ["~red", "~circle",
                                    "↵"] and lines[0].index("~red") == lines[1].index("~red")
    assert sum(line.count("<image>") for line in lines) == 8


def test_the_blind_loss_does_not_depend_on_the_pictures_and_is_the_decoders_own():
    """The image takes no position there; so it is the loss of the text alone, from the first token on."""
    vlm = tiny_vlm("mlp")
    tokens = torch.tensor([[IMAGE, 5, 9, 17, 3]])
    labels = torch.tensor([[IGNORE, IGNORE, 9, 17, 3]])
    expected = torch.log_softmax(vlm.decoder(tokens[:, 1:])[0].detach(), -1)[[0, 1, 2], [9, 17, 3]].sum()
    piece = dict(tokens=tokens, labels=labels, mask=None)
    torch.testing.assert_close(blind_loss(vlm, piece), -expected, atol=1e-5, rtol=1e-5)     # float32 sums


def test_gradient_norms_are_those_of_parts_two_names_deep():
    a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    named = [("bridge.map.weight", a), ("bridge.map.bias", b), ("bridge.gate", c)]
    assert gradient_norms(named) == "bridge.map 5"


def test_the_table_of_modules_counts_what_is_trained(capsys):
    vlm = tiny_vlm("mlp")
    vlm.requires_grad_(False)
    vlm.bridge.requires_grad_(True)
    print_modules(vlm)
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    count = f"{sum(p.numel() for p in vlm.bridge.parameters()):,d}"
    assert rows["bridge"][1:3] == [count, count] and rows["bridge"][-1] == "trained"
    assert rows["decoder"][2] == "0" and rows["vit"][-1] == "frozen"
