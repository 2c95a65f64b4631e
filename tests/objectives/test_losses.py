"""The losses and advantages of the objectives against their formulas, their limits and their gradients."""

import math

import pytest
import torch
from torch import Tensor

from peft_bundles.objectives import ppo_losses as ppo
from peft_bundles.objectives.preference_losses import dpo_loss, ipo_loss, kto_loss, kto_reference_point, orpo_loss
from peft_bundles.objectives.tokens import (
    Sampling,
    kl_divergence,
    masked_mean,
    masked_sum,
    row_mean,
    token_entropy,
    token_logprobs,
)


ROWS, TOKENS, VOCABULARY = 5, 7, 11


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(lengths: list[int] | None = None, tokens: int = TOKENS) -> Tensor:
    return (torch.arange(tokens) < torch.tensor(lengths or [7, 1, 3, 5, 2])[:, None]).double()


# ---- tokens ----


def test_token_logprobs_are_those_of_the_softmax():
    logits, ids = draw(ROWS, TOKENS, VOCABULARY), torch.randint(VOCABULARY, (ROWS, TOKENS))
    found = token_logprobs(logits, ids, Sampling(temperature=0.7))
    table = (logits / 0.7).softmax(-1)
    for row in range(ROWS):
        for t in range(1, TOKENS):
            torch.testing.assert_close(found[row, t - 1], table[row, t - 1, ids[row, t]].log())
    assert token_logprobs(logits.bfloat16(), ids).dtype == torch.float32


def test_entropy_is_zero_for_the_certain_and_log_v_for_the_uniform():
    certain = torch.zeros(1, 3, VOCABULARY).double()
    certain[..., 4] = 1e4
    torch.testing.assert_close(token_entropy(certain), torch.zeros(1, 2).double())
    uniform = torch.full((1, 2), math.log(VOCABULARY)).double()
    torch.testing.assert_close(token_entropy(torch.zeros(1, 3, VOCABULARY).double()), uniform)


def test_what_is_masked_may_be_nan():
    values, mask = draw(ROWS, TOKENS), mask_of()
    dirty = torch.where(mask > 0, values, float("nan"))
    torch.testing.assert_close(masked_mean(dirty, mask), values[mask > 0].mean())
    torch.testing.assert_close(masked_sum(dirty, mask), (values * mask).sum(1))
    assert masked_mean(dirty, torch.zeros_like(mask)) == 0
    torch.testing.assert_close(row_mean(dirty, mask), (values * mask).sum(1) / mask.sum(1))
    assert row_mean(dirty, torch.zeros_like(mask)).tolist() == [0] * ROWS


def test_kl_is_the_sum_over_the_vocabulary():
    p, q = draw(ROWS, VOCABULARY).softmax(-1), draw(ROWS, VOCABULARY, seed=1).softmax(-1)
    torch.testing.assert_close(kl_divergence(p.log(), q.log()), (p * (p / q).log()).sum(-1))
    assert not kl_divergence(p.log(), p.log()).any()


# ---- preferences ----

pair = lambda: (-draw(4, seed=i).abs() - 0.1 for i in range(4))  # noqa: E731


def gradient(function, *leaves: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    return torch.autograd.grad(function(*leaves).sum(), leaves)


def test_dpo_gradient_is_the_papers():
    """Rafailov 2023, section 4: -beta sigmoid(-beta margin) (grad chosen - grad rejected)."""
    chosen, rejected, ref_chosen, ref_rejected = pair()
    beta = 0.3
    up, down = gradient(lambda c, r: dpo_loss(c, r, ref_chosen, ref_rejected, beta=beta), chosen, rejected)
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    torch.testing.assert_close(up, -beta * torch.sigmoid(-beta * margin))
    torch.testing.assert_close(down, -up)


def test_a_model_that_is_its_reference_has_loss_log_2_and_dpop_adds_only_where_chosen_fell():
    chosen, rejected, ref_chosen, ref_rejected = pair()
    torch.testing.assert_close(dpo_loss(chosen, rejected, chosen, rejected), torch.full((4,), math.log(2)).double())
    plain = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
    positive = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, dpop=5.0)
    fell = chosen < ref_chosen
    assert fell.any() and not fell.all()
    assert torch.equal(positive[~fell], plain[~fell]) and bool((positive[fell] > plain[fell]).all())


def test_dpop_gradient_raises_a_chosen_likelihood_that_dpo_would_lower():
    """One shared parameter moves chosen by 1 and rejected by 2: DPO lowers both, DPOP does not."""
    ref = torch.zeros(1).double()
    step = lambda dpop: gradient(lambda x: dpo_loss(-3 + x, -3 + 2 * x, ref, ref, dpop=dpop), ref)[0]  # noqa: E731
    assert step(0.0) > 0 > step(5.0)


def test_ipo_is_least_at_its_target_margin():
    rejected, beta = -draw(4).abs(), 0.2
    zero = torch.zeros(4).double()
    chosen = rejected + 1 / (2 * beta)
    torch.testing.assert_close(ipo_loss(chosen, rejected, zero, zero, beta=beta), zero)
    assert bool((ipo_loss(chosen + 0.1, rejected, zero, zero, beta=beta) > 0).all())
    (found,) = gradient(lambda c: ipo_loss(c, rejected, zero, zero, beta=beta), chosen + 0.1)
    torch.testing.assert_close(found, torch.full_like(zero, 0.2))


def test_orpo_is_the_next_token_loss_plus_the_odds_ratio():
    chosen, rejected, _, _ = pair()
    odds = lambda logp: logp.exp() / (1 - logp.exp())  # noqa: E731
    expected = -chosen - 0.4 * torch.log(torch.sigmoid(torch.log(odds(chosen) / odds(rejected))))
    torch.testing.assert_close(orpo_loss(chosen, rejected, beta=0.4), expected)
    extreme = torch.tensor([-1e-12, -300.0]).double().requires_grad_()
    orpo_loss(extreme, extreme.flip(0).detach()).sum().backward()
    assert bool(torch.isfinite(extreme.grad).all())


def test_kto_saturates_both_ways_and_counts_from_its_reference_point():
    _, ref, _, _ = pair()
    desirable = torch.tensor([True, True, False, False])
    at = lambda shift: kto_loss(ref + shift, ref, desirable, torch.tensor(2.0), desirable_weight=3.0)  # noqa: E731
    weight = torch.tensor([3.0, 3.0, 1.0, 1.0]).double()
    torch.testing.assert_close(at(2.0), weight / 2)  # at z0 itself
    torch.testing.assert_close(at(1e4), weight * ~desirable)
    torch.testing.assert_close(at(-1e4), weight * desirable)
    assert kto_reference_point(ref - 1, ref) == 0 and kto_reference_point(ref + 1, ref) == pytest.approx(1)


# ---- advantages ----


def plain_gae(rewards, values, length: int, gamma: float, lam: float) -> list[float]:
    """The definition: A_t = sum_l (gamma lam)^l delta_{t+l}, one completion, no tensors."""
    value = [*values[:length], 0.0]
    delta = [rewards[t] + gamma * value[t + 1] - value[t] for t in range(length)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.99, 0.0), (0.97, 1.0)])
def test_gae_equals_its_definition(gamma, lam):
    rewards, values, mask = draw(ROWS, TOKENS), draw(ROWS, TOKENS, seed=1), mask_of()
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(mask.sum(1).int().tolist()):
        expected = plain_gae(rewards[row].tolist(), values[row].tolist(), length, gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-6)
        assert not advantages[row, length:].any() and not returns[row, length:].any()
        torch.testing.assert_close(returns[row, :length] - advantages[row, :length], values[row, :length])


def test_gae_at_lambda_1_is_the_return_minus_the_value():
    rewards, values, mask = draw(ROWS, TOKENS), draw(ROWS, TOKENS, seed=1), mask_of()
    advantages, _ = ppo.gae(rewards, values, mask, 1.0, 1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, (to_go - values) * mask)


def test_group_advantages_sum_to_zero_and_ignore_a_shift_of_the_reward():
    rewards = draw(12)
    for kind in ("grpo", "rloo"):
        found = ppo.group_advantages(rewards, 4, kind)
        torch.testing.assert_close(found.view(3, 4).sum(1), torch.zeros(3).double())
        torch.testing.assert_close(ppo.group_advantages(rewards + 7, 4, kind), found)
        assert not ppo.group_advantages(torch.ones(4), 4, kind).any()
    others = (rewards.view(3, 4).sum(1, keepdim=True) - rewards.view(3, 4)) / 3
    torch.testing.assert_close(found.view(3, 4), rewards.view(3, 4) - others)
    torch.testing.assert_close(ppo.group_advantages(1e6 * rewards, 4, "grpo").view(3, 4).std(1), torch.ones(3).double())


def test_whitened_values_have_mean_0_and_deviation_1_on_the_mask():
    mask = mask_of()
    found = ppo.whiten(5 * draw(ROWS, TOKENS) + 3, mask)
    kept = found[mask > 0]
    torch.testing.assert_close((kept.mean(), kept.std()), (torch.zeros(()).double(), torch.ones(()).double()))
    assert not found[mask == 0].any()


# ---- PPO's losses ----


def test_policy_loss_at_ratio_1_has_the_policy_gradient():
    logprobs, advantages, mask = draw(ROWS, TOKENS), draw(ROWS, TOKENS, seed=1), mask_of()
    (found,) = gradient(lambda x: ppo.policy_loss(x, logprobs, advantages, mask), logprobs)
    torch.testing.assert_close(found, -advantages * mask / mask.sum())


def test_policy_loss_has_no_gradient_beyond_the_clip_and_only_there():
    old, mask = torch.zeros(1, 4).double(), torch.ones(1, 4).double()
    logprobs = torch.log(torch.tensor([[1.3, 1.3, 0.7, 0.7]]).double())
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]]).double()
    (found,) = gradient(lambda x: ppo.policy_loss(x, old, advantages, mask, clip=0.2), logprobs)
    assert found[0, 0] == 0 and found[0, 3] == 0 and bool((found[0, 1:3] != 0).all())
    assert ppo.clip_fraction(logprobs, old, mask, clip=0.2) == 1


def test_value_loss_takes_the_worse_of_clipped_and_unclipped():
    old, returns, mask = draw(ROWS, TOKENS), draw(ROWS, TOKENS, seed=1), mask_of()
    values = old + 0.1 * draw(ROWS, TOKENS, seed=2).clamp(-1, 1)
    squared = 0.5 * (values - returns)[mask > 0].square().mean()
    torch.testing.assert_close(ppo.value_loss(values, old, returns, mask, clip=0.2), squared)
    torch.testing.assert_close(ppo.value_loss(values, old, returns, mask, clip=None), squared)
    far = lambda v: ppo.value_loss(v, torch.zeros(1, 1), torch.full((1, 1), 9.0), torch.ones(1, 1))  # noqa: E731
    (found,) = gradient(far, torch.ones(1, 1))
    assert not found.any()  # moved by more than the clip towards the return: no further


def test_explained_variance_of_the_perfect_and_the_constant_critic():
    returns, mask = draw(ROWS, TOKENS), mask_of()
    assert ppo.explained_variance(returns, returns, mask) == 1
    assert ppo.explained_variance(torch.full_like(returns, 3.0), returns, mask).item() == pytest.approx(0)


# ---- KL ----


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    """Expectations over the vocabulary are sums: no sampling error."""
    policy, reference = draw(VOCABULARY).log_softmax(0), draw(VOCABULARY, seed=1).log_softmax(0)
    kl = (policy.exp() * (policy - reference)).sum()
    expectation = lambda kind: (policy.exp() * ppo.kl_estimate(policy, reference, kind)).sum()  # noqa: E731
    torch.testing.assert_close(expectation("k1"), kl)
    torch.testing.assert_close(expectation("k3"), kl)
    assert bool((ppo.kl_estimate(policy, reference, "k3") >= 0).all())
    near = policy + 1e-3 * draw(VOCABULARY, seed=2)
    near = near.log_softmax(0)
    exact = (policy.exp() * (policy - near)).sum()
    assert (policy.exp() * ppo.kl_estimate(policy, near, "k2")).sum().item() == pytest.approx(exact.item(), rel=1e-2)


@pytest.mark.parametrize(("kind", "useful"), [("k1", False), ("k2", True), ("k3", False)])
def test_which_estimator_has_the_gradient_of_kl_when_it_is_a_loss(kind, useful):
    """E over samples of the gradient: nothing for k1, exactly that of KL for k2, that of the reverse KL for k3."""
    logits, reference = draw(VOCABULARY), draw(VOCABULARY, seed=1).log_softmax(0)
    frozen = logits.log_softmax(0).exp()
    (found,) = gradient(lambda x: frozen * ppo.kl_estimate(x.log_softmax(0), reference, kind), logits)
    (true,) = gradient(lambda x: x.softmax(0) * (x.log_softmax(0) - reference), logits)
    if kind == "k1":
        torch.testing.assert_close(found, torch.zeros_like(true))
    elif kind == "k3":
        true = logits.softmax(0) - reference.exp()
    if kind != "k1":
        torch.testing.assert_close(found, true)


def test_the_kl_coefficient_is_led_to_its_target():
    """KL that falls as 1 / coefficient ends at the target from both sides; without a target nothing moves."""
    for start in (0.01, 100.0):
        controller = ppo.KLController(start, target=6.0, horizon=100)
        for _ in range(2000):
            controller.update(6.0 / controller.coefficient, completions=10)
        assert controller.coefficient == pytest.approx(1.0, rel=1e-2)
    fixed = ppo.KLController(0.05)
    fixed.update(100.0, 64)
    assert fixed == ppo.KLController(0.05)


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="'k4' is unknown; choose one of k1, k2, k3"):
        ppo.kl_estimate(draw(2), draw(2), "k4")
    with pytest.raises(ValueError, match="kind='ppo' is unknown"):
        ppo.group_advantages(draw(4), 2, "ppo")
    with pytest.raises(ValueError, match="group=3 must be at least 2 and divide the 4"):
        ppo.group_advantages(draw(4), 3, "grpo")
