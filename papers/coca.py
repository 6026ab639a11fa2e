"""CoCa (2205.01917v2): one forward gives CLIP's contrast and a caption.

Document 4 has the attentional pooler, a layer of attention with n learned queries: n = 256 for captions and
1 for the contrast. It does not say that the two are cascaded; its "JTB-3B" is JFT-3B.

    symbol   shape          here               meaning
    x        (B, N, Di)     x                  the ViT's last state
    Q        (n, D)         pool.queries       learned; the output has one token for each
    G        (B, n, D)      image              what the captions read
    u, w     (B, E)         u, w               vectors of picture and text, of length 1
    y        (B, T)         tokens             begin, words, end; padding behind them
    h        (B, T, D)      states             of the lower half of the decoder, which sees no picture

    (P1)  Pool(x) = MHA(LN Q, LN x, LN x)                                no residual, no feed-forward
    (P2)  G = Pool_gen(x);   u = unit(W_u Pool_con(G))                   cascade, Pool_con with 1 query
    (P3)  [h ; h_CLS] = n_uni causal blocks on [y ; CLS];   w = unit(W_w LN h_CLS)
    (P4)  h ← h + MHA(LN h, LN G, LN G);   h ← h + MLP(LN h)             after each of n_multi causal blocks
    (P5)  logits = W_v LN h
    (P6)  L_con = ½ (CE(S) + CE(Sᵀ)),   S = e^σ u wᵀ,   σ = ln(1/0.07) at the start       (paper: Eq. 2)
    (P7)  L_cap = −mean log P(y_t | y_<t, x)                                              (paper: Eq. 3)
    (P8)  L = 1 · L_con + 2 · L_cap;   n_uni = n_multi                                    (paper: Eq. 4)

[CLS] stands last, so the words do not see it: one pass through the lower half serves both losses.
Paper and code (open_clip, whose weights are public): the paper cascades its two poolers, (P2);
pool="parallel" is its ablation, u from Pool_con(x). open_clip has pool="one": [u ; G] = LN Pool(x), with 256
queries together. Its text hides padding by a mask one place too far right, shifted=True: key j is seen if
y_{j−1} is no padding, so the first padding is seen, and [CLS] of a padded text does not see itself.

The point, by the paper's ablation (zero-shot ImageNet, VQA): contrast alone 70.7, 59.2; captions alone –,
68.9; both 71.6, 69.0, at 1.18 times the cost of the contrast; parallel 71.2, 68.7; 1 query 69.3, 64.4.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORE, Attend, EncoderBlock, ViT, causal_mask, merge_heads, split_heads, visible_to_bias
from papers.clip import PAPER, TextConfig, TextTransformer
from papers.contrasts import clip_loss, mean_count
from papers.recipe import Numbers, Recipe


class Pooler(nn.Module):
    """n learned queries read an image: (B, N, source) → (B, n, width)."""

    def __init__(self, width: int, source: int, queries: int, heads: int):
        super().__init__()
        self.heads, self.queries = heads, nn.Parameter(torch.randn(queries, width))
        self.norm_q, self.norm_k = nn.LayerNorm(width), nn.LayerNorm(source)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)
        self.o, self.attend = nn.Linear(width, width), Attend()

    def forward(self, x: Tensor) -> Tensor:
        x, q = self.norm_k(x), self.norm_q(self.queries).expand(len(x), -1, -1)
        q, k, v = (split_heads(y, self.heads) for y in (self.q(q), self.k(x), self.v(x)))
        return self.o(merge_heads(self.attend(q, k, v)))                        #               (P1)


class CrossBlock(EncoderBlock):
    """A pre-norm block whose keys and values are the picture's."""

    def __init__(self, width: int, heads: int, hidden: int, act: str, eps: float):
        super().__init__(width, heads, hidden, act, eps)
        self.norm_image = nn.LayerNorm(width, eps=eps)

    def forward(self, h: Tensor, image: Tensor) -> Tensor:
        q, G = self.q(self.norm1(h)), self.norm_image(image)
        q, k, v = (split_heads(y, self.heads) for y in (q, self.k(G), self.v(G)))
        h = h + self.o(merge_heads(self.attend(q, k, v)))                       #               (P4)
        return h + self.mlp(self.norm2(h))                                      #               (P4)


class LowerHalf(TextTransformer):
    """The half of the decoder that sees no picture. `context` of its config is T, [CLS] left out."""

    def __init__(self, config: TextConfig, pad: int, shifted: bool = False):
        super().__init__(config)
        self.pad, self.shifted = pad, shifted
        self.positions = nn.Parameter(torch.randn(config.context + 1, config.width) * 0.01)
        self.cls = nn.Parameter(torch.randn(config.width) * 0.01)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) → h (B, T, D), not normed, and LN h_CLS (B, D)."""
        self.check_length(tokens)
        x = torch.cat((self.embed(tokens), self.cls.expand(len(tokens), 1, -1)), dim=1)
        x = x + self.positions[:x.shape[1]]
        words = F.pad(tokens != self.pad, (1, 0) if self.shifted else (0, 1), value=True)       # (B, T + 1)
        bias = visible_to_bias(causal_mask(x.shape[1], x.device) & words[:, None], x.dtype)[:, None]
        for block in self.blocks:
            x = block(x, bias=bias)                                             #               (P3)
        return x[:, :-1], self.norm(x[:, -1])


class CoCa(nn.Module):
    """253,560,065 parameters as open_clip's coca_ViT-B-32."""

    def __init__(self, vit: ViT, text: LowerHalf, joint: int, layers: int, queries: int = 256,
                 pool_heads: int = 8, pool: str = "cascade"):
        super().__init__()
        if pool not in ("cascade", "parallel", "one"):
            raise ValueError(f'there is no pool "{pool}"; known: cascade, parallel, one.')
        c, Di, D = text.config, vit.config.width, text.config.width
        self.vit, self.text, self.one, self.cascade = vit, text, pool == "one", pool == "cascade"
        self.pool = Pooler(D, Di, queries, pool_heads)
        self.contrast_pool = None if self.one else Pooler(D, D if self.cascade else Di, 1, pool_heads)
        vit.post_norm = nn.LayerNorm(D) if self.one else vit.post_norm          # then behind the pooler
        self.image_projection, self.text_projection = (nn.Linear(D, joint, bias=False) for _ in range(2))
        block = (D, c.heads, c.hidden, c.act, c.norm_eps)
        self.blocks = nn.ModuleList(EncoderBlock(*block) for _ in range(layers))
        self.cross = nn.ModuleList(CrossBlock(*block) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, c.vocab_size, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) → u (B, E) and G (B, n, D)."""
        x, norm = self.vit(pixels), self.vit.post_norm
        if self.one:
            pooled, G = norm(self.pool(x)).tensor_split([1], dim=1)
        else:
            G = self.pool(norm(x))
            pooled = self.contrast_pool(G if self.cascade else norm(x))         #               (P2)
        return F.normalize(self.image_projection(pooled[:, 0]), dim=-1), G

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) → w (B, E) and h (B, T, D)."""
        h, cls = self.text(tokens)
        return F.normalize(self.text_projection(cls), dim=-1), h                #               (P3)

    def write(self, h: Tensor, image: Tensor) -> Tensor:
        """h (B, T, D), G (B, n, D) → logits (B, T, V) of the next word."""
        for block, cross in zip(self.blocks, self.cross):
            h = cross(block(h, causal=True), image)                             #               (P4)
        return self.head(self.norm(h))                                          #               (P5)

    def word_losses(self, tokens: Tensor, h: Tensor, image: Tensor) -> Tensor:
        """−log P(y_t | y_<t, x) of the words from the second on: (B, T − 1), 0 at padding."""
        target = tokens[:, 1:].masked_fill(tokens[:, 1:] == self.text.pad, IGNORE)
        logits = self.write(h[:, :-1], image).float()
        return F.cross_entropy(logits.transpose(1, 2), target, reduction="none", ignore_index=IGNORE)

    def losses(self, pixels: Tensor, tokens: Tensor, gather=lambda x: x) -> dict[str, Tensor]:
        """tokens (B + n, T): row i belongs to picture i, n more to none. gather: see Ingredients."""
        (u, G), (w, h), B = self.see(pixels), self.read(tokens), len(pixels)
        w = torch.cat([gather(part) for part in w.tensor_split([B])])
        contrast = clip_loss((self.logit_scale.exp() * gather(u) @ w.T).float())            #      (P6)
        count = (tokens[:B, 1:] != self.text.pad).sum()
        caption = self.word_losses(tokens[:B], h[:B], G).sum() / mean_count(count, gather)      # (P7)
        return {"contrast": contrast, "caption": caption}

    @torch.no_grad()
    def generate(self, pixels: Tensor, begin: int, end: int) -> Tensor:
        """Greedy captions (B, T_new), which repeat `end`. Nothing is cached: captions are short."""
        (_, G), y = self.see(pixels), pixels.new_full((len(pixels), 1), begin, dtype=torch.long)
        while y.shape[1] < self.text.config.context and not bool((y == end).any(1).all()):
            word = self.write(self.read(y)[1], G)[:, -1].argmax(-1)
            y = torch.cat((y, torch.where(y[:, -1] == end, end, word)[:, None]), dim=1)
        return y[:, 1:]


PARTS = tuple("text pool contrast_pool image_projection text_projection blocks cross norm head".split())
RECIPES = {name: Recipe(
    f"CoCa (2205.01917v2 §3.2): contrast + 2 · caption; the ViT is bundled and stays; {queries} read it",
    "JFT-3B and ALIGN, half a batch each", Numbers(8e-4, 65536, 500_000, 0.02, "linear", 0.01, 0.999),
    Numbers(1.5e-3, 32, 300, weight_decay=0.05), task=name, one_file=True, trained=PARTS)
    for name, queries in (("coca", "16 queries"), ("coca-1", "one query"))}
RECIPES |= {f"coca-{loss}": Recipe(
    f"CLIP (2103.00020v1 §2.3, Fig. 2): {loss} alone teaches a new ViT, in CoCa's parts",
    "400M pairs", PAPER, Numbers(1.5e-3, 32, 1500, weight_decay=0.05), task=f"coca-{loss}", one_file=True,
    trained=("vit", *PARTS)) for loss in ("contrast", "caption")}
