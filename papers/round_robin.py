"""Several data sets, one after the other: what Flamingo (2204.14198) compares its weighted sum with.

Documents 3 and 4 name both ways to learn from M data sets D_m with weights λ_m. train.py's loop is the first:

    (R1)  g = Σ_m λ_m ∂/∂θ E_{D_m}[−Σ_ℓ log p]                  weighted sum: every update sees every data set
    (R2)  g = λ_m ∂/∂θ E_{D_m}[−Σ_ℓ log p],   m = step mod M    round-robin: an update sees one

Flamingo-3B's overall score is 68.4 with (R1) and 59.7 with (R2), in the text of the first version. Its
weights are 1 for interleaved pages, 0.2 for the two sets of pairs, 0.03 for videos. FLAVA's steps take turns,
too, by sampling ratios: papers/flava_task.py.

The miniature: pages of `shapes` and single pictures, λ = 1 and 0.2; both ways see the same pictures, an
update of (R2) a whole batch of one set where (R1) has B/M of each.

    python train.py --recipe round-robin --data "shapes-pages + shapes * 0.2"      any --bridge
"""
from __future__ import annotations

from papers.recipe import Recipe, Task
from papers.systems import FLAMINGO


class RoundRobinTask(Task):
    """What (R2) changes of train.py's answer task, in front of which this class stands: the batch."""

    def batch(self, step: int) -> list[dict]:
        turn, m = divmod(step, len(self.sets))
        return self.pieces(m, turn)                                             #               (R2)

    def describe_batch(self, step: int) -> str:
        turn, m = divmod(step, len(self.sets))
        return f"{super().describe_batch(turn)} of {self.sets[m][0].name}"


RECIPES = {"round-robin": Recipe(
    "Flamingo's ablation (2204.14198v1): one data set an update, in turn, in the place of a weighted sum",
    **FLAMINGO, task="round-robin", toy_data="shapes-pages + shapes * 0.2")}
TASKS = {"round-robin": RoundRobinTask}
