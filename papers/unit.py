"""UniT (2102.10772v3): one decoder for every task, which asks with queries of the task's own.

Document 3 says that "image encoder, text encoder use the same ViT arch": that is FLAVA. UniT's image encoder
is ResNet-50 with six layers of DETR's encoder (256 wide, 8 heads, feed-forward 2048), its text encoder
BERT-base, projected from 768 to 256.

    symbol   shape          here        meaning
    h_v      (B, N, Di)     image       states of the image encoder
    h_t      (B, T, Dt)     text        BERT's states: of every word for VQA, of [CLS] alone for GLUE, SNLI-VE
    q^task   (Q, D)         queries     a table of its own per data set
    h        (B, N+T, D)    memory      what the task has: a picture, a text, or both

    (N1)  h = [W_v h_v ; W_t h_t]
    (N2)  x ← LN(x + MHA(x, x, x));  x ← LN(x + MHA(x, h, h));  x ← LN(x + FFN(x))      from x = q^task
    (N3)  y = W_task x: of every query (a box and a class each) or of the first one (an answer)

(N2) is a layer of the Q-Former (bridges.py), and so it is written here. What differs: the Q-Former's queries
are one table and its memory is the picture; here the tables are the tasks' and the decoder is shared. (DETR
adds q^task again in every layer.) A step draws ONE task and its loss: detection by Hungarian matching with
class, box and GIoU losses, VQA by binary cross-entropy over answers, the rest by cross-entropy. A task
embedding may stand before both encoders' inputs. 201M parameters serve eight tasks. In the published code the
shared decoder is an option (`share_decoders`), off by default: then each task has a decoder of its own.

Nothing is trained here: beside the Q-Former the experiment would show nothing new.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from bridges import QFormerLayer
from model import visible_to_bias


class UniT(nn.Module):
    """tasks: name → (number of queries, width of an answer, whether every query answers or the first)."""

    def __init__(self, tasks: dict[str, tuple[int, int, bool]], image_width: int = 256, text_width: int = 768,
                 width: int = 256, layers: int = 6, heads: int = 8, hidden: int = 2048, dropout: float = 0.1):
        super().__init__()
        self.tasks = tasks
        self.image, self.text = nn.Linear(image_width, width), nn.Linear(text_width, width)
        self.queries = nn.ParameterDict({name: torch.randn(n, width) for name, (n, *_) in tasks.items()})
        self.layers = nn.ModuleList(QFormerLayer(width, heads, hidden, width, False, dropout)
                                    for _ in range(layers))
        self.heads = nn.ModuleDict({name: nn.Linear(width, out) for name, (_, out, _) in tasks.items()})

    def forward(self, task: str, image: Tensor | None = None, text: Tensor | None = None,
                mask: Tensor | None = None) -> Tensor:
        """(B, Q, out), or (B, out) of the first query; mask (B, T) bool of the text, False = padding."""
        if task not in self.tasks:
            raise ValueError(f'this UniT has no task "{task}"; known: {", ".join(self.tasks)}.')
        parts = [f(x) for f, x in ((self.image, image), (self.text, text)) if x is not None]
        if not parts:
            raise ValueError(f"{task} needs a picture, a text or both.")
        memory, bias = torch.cat(parts, dim=1), None                            # (N1)
        if mask is not None:
            seen = torch.ones_like(memory[..., 0], dtype=torch.bool)
            seen[:, memory.shape[1] - mask.shape[1]:] = mask                # words follow the picture
            bias = visible_to_bias(seen[:, None, None], memory.dtype)
        x = self.queries[task].expand(len(memory), -1, -1)
        for layer in self.layers:
            x = layer(x, x.shape[1], memory, None, bias)                        # (N2)
        return self.heads[task](x if self.tasks[task][2] else x[:, 0])          # (N3)
