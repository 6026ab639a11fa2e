"""The reward model's loss and PPO's are the authors' of LLaVA-RLHF."""
from __future__ import annotations

import pytest
import torch

from conftest import check, golden, tiny_vlm
from model import IMAGE
from papers.ppo import (RewardModel, estimate_advantages, kl_clamped, kl_k3, policy_loss, reward_loss,
                        shape_rewards, value_loss)


@pytest.fixture(scope="module")
def case():
    _, case, x, expected = golden("ppo-llava-rlhf")
    kl = kl_clamped(x["logprobs"], x["ref_logprobs"])
    rewards = shape_rewards(x["rewards"], kl)
    advantages, returns = estimate_advantages(10 * rewards, x["values"])
    ours = {"kl_k1": kl, "kl_k3": kl_k3(x["logprobs"], x["ref_logprobs"]), "shaped_rewards": rewards,
            "advantages": advantages, "returns": returns,
            "policy_loss": policy_loss(x["new_logprobs"], x["logprobs"], advantages),
            "value_loss": value_loss(x["new_values"], x["values"], returns),
            "reward_model_loss": reward_loss(x["rm_rewards_0"], x["rm_rewards_1"], x["rm_choice"]),
            "reward_model_loss_pairwise_part": reward_loss(x["rm_rewards_0"], x["rm_rewards_1"],
                                                           x["rm_choice"], centre=0.0)}
    return case, x, expected, ours


def test_every_number_is_the_authors(case):
    case, _, expected, ours = case
    assert ours.keys() == expected.keys()
    for key, value in ours.items():
        check(case, key, value, expected[key])


def test_a_kl_that_is_not_clamped_and_rewards_that_are_not_scaled_are_others(case):
    _, x, expected, _ = case
    plain = x["logprobs"] - x["ref_logprobs"]
    assert (shape_rewards(x["rewards"], plain) - expected["shaped_rewards"]).abs().max() > 1e-2
    _, returns = estimate_advantages(expected["shaped_rewards"], x["values"])
    assert (returns - expected["returns"]).abs().max() > 1


def test_advantages_with_a_discount_are_the_sum_of_what_follows():
    rewards, values = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    delta = rewards + 0.9 * torch.cat((values[:, 1:], torch.zeros(1, 1)), 1) - values
    A = [sum(0.72 ** (l - t) * delta[0, l] for l in range(t, 4)) for t in range(4)]     # γλ = 0.9 · 0.8
    _, returns = estimate_advantages(rewards, values, gamma=0.9, lam=0.8)
    torch.testing.assert_close(returns - values, torch.stack(A)[None])


@torch.no_grad()
def test_the_reward_is_read_at_the_last_real_token_on_whichever_side_padding_stands():
    model = RewardModel(tiny_vlm("linear"))
    features = torch.randn(2, 9, 20, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[3, IMAGE, 5, 7], [IMAGE, 6, 8, 0]])
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    both = model(tokens, features, mask)
    alone = torch.cat([model(tokens[:1], features[:1]), model(tokens[1:, :3], features[1:])])
    left = model(tokens.roll(1, 1)[1:], features[1:], mask.roll(1, 1)[1:])
    torch.testing.assert_close(both, alone)
    torch.testing.assert_close(both[1:], left)
    assert both.shape == (2,) and (both[0] - both[1]).abs() > 1e-4
