"""prm.py: labels of the four cases, losses, the scorer itself and its files."""
import copy
import json
import math
import os

import pytest
import torch

from data import InputError, OBJECTIVES, pad
from model import GPT, GPTConfig, load_safetensors, save_hf, save_safetensors
from prm import (PRM, STEP, STEP_OUTPUT, bce_loss, bradley_terry_loss, hindsight_targets, load_prm,
                 majority_labels, matching_steps, mse_loss, save_prm, step_loss)

NAMES = ["math_accuracy", "math_engagement", "tutor_engagement"]
OUTPUTS = [OBJECTIVES[name] for name in NAMES]


@pytest.fixture(scope="module")
def prm(tokenizer):
    """A tiny random PRM with three outputs, its MLP biases and scales set so that leaving one out shows."""
    generator = torch.Generator().manual_seed(1)
    config = GPTConfig(tokenizer.n_vocab, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=40, max_len=64,
                       init_std=0.2, objectives=())
    model = PRM(GPT(config, generator), OUTPUTS, generator)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
        model.scale.copy_(torch.tensor([2.0, 4.0, 0.5]))
    model.backbone.tokenizer = tokenizer
    return model


# -- labels

def test_hindsight_hand_values():
    """Prevents: gamma^(n-t) off by one, one n used for all rollouts, rollouts summed instead of averaged, r_t left out."""
    rewards = torch.tensor([1.0, 0.0, 0.5])
    lengths = torch.tensor([[3, 4], [3, 2], [3, 3]])
    correct = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    expected = [1 + (0.9 ** 2 + 0.9 ** 3) / 2, (0 + 0.9 ** 0) / 2, 0.5 + (0.9 ** 0 + 0) / 2]
    assert hindsight_targets(rewards, lengths, correct, 0.9).tolist() == pytest.approx(expected, abs=1e-6)


def test_hindsight_last_step_is_not_discounted():
    """Prevents: a discount of gamma at t = n, where the answer is already there."""
    one = torch.ones(1, 1)
    assert float(hindsight_targets(torch.zeros(1), one.long(), one, 0.5)) == 1.0
    assert float(hindsight_targets(torch.zeros(1), one.long() * 4, one, 0.5)) == 0.125


def test_hindsight_wrong_rollouts_leave_the_step_reward():
    """Prevents: step rewards that are weighted by the end's correctness."""
    rewards = torch.tensor([1.0, 0.0])
    assert hindsight_targets(rewards, torch.full((2, 3), 5), torch.zeros(2, 3), 0.9).tolist() == [1.0, 0.0]


def test_hindsight_refuses_a_rollout_shorter_than_its_prefix():
    """Prevents: rollouts matched with the wrong prefix, which would give powers gamma^-1 > 1 in silence."""
    with pytest.raises(ValueError, match="fewer than t steps"):
        hindsight_targets(torch.zeros(2), torch.tensor([[1], [1]]), torch.ones(2, 1), 0.9)


def test_majority_is_strict():
    """Prevents: a tie counted as positive, and a label per rollout instead of per prefix."""
    even = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    assert majority_labels(even).tolist() == [0.0, 1.0, 0.0, 0.0]
    odd = torch.tensor([[True, True, False], [True, False, False]])      # as train.py passes them: bool
    assert majority_labels(odd).tolist() == [1.0, 0.0]


def test_matching_steps_by_index_then_full():
    """Prevents: the longer response's remaining steps dropped, or compared with nothing: full stands against full."""
    chosen, rejected = [1, 2, 3, 4, 5, 6], [7, 8, 9]
    assert matching_steps(chosen, rejected, [1, 3, 5], [2]) == [(1, 2), (5, 2)]
    assert matching_steps(rejected, chosen, [2], [1, 3, 5]) == [(2, 1), (2, 5)]


def test_matching_steps_full_not_twice():
    """Prevents: responses with the same number of steps that count their full comparison twice."""
    assert matching_steps([1, 2, 3, 4], [5, 6, 7], [1, 3], [0, 2]) == [(1, 0), (3, 2)]


def test_matching_steps_skip_equal_prefixes():
    """Prevents: comparing a prefix with itself, a constant ln 2 in the loss with no gradient but a weight in the mean."""
    assert matching_steps([1, 2, 3, 4], [1, 2, 9], [1, 3], [1, 2]) == [(3, 2)]
    # The same step text behind different first steps is no equal prefix.
    assert matching_steps([1, 5, 5], [2, 5, 5], [0, 2], [0, 2]) == [(0, 0), (2, 2)]


# -- losses

def test_mse_hand_value_and_mask():
    """Prevents: unlabelled steps in the mean, and a sum where a mean belongs."""
    scores, targets = torch.tensor([1.0, 2.0, 50.0]), torch.tensor([0.5, 4.0, -3.0])
    assert float(mse_loss(scores, targets, torch.tensor([1, 1, 0]))) == pytest.approx((0.25 + 4) / 2, abs=1e-6)
    assert float(mse_loss(scores, targets, torch.tensor([False] * 3))) == 0.0


def test_bce_hand_value_and_mask():
    """Prevents: probabilities where logits are expected, swapped targets, unlabelled steps in the mean."""
    scores, targets = torch.tensor([0.0, 2.0, -1.0, 9.0]), torch.tensor([1.0, 0.0, 0.25, 0.0])
    log_sigmoid = lambda x: -math.log1p(math.exp(-x))
    expected = -(log_sigmoid(0) + log_sigmoid(-2) + 0.25 * log_sigmoid(-1) + 0.75 * log_sigmoid(1)) / 3
    assert float(bce_loss(scores, targets, torch.tensor([1, 1, 1, 0]))) == pytest.approx(expected, abs=1e-6)


def test_bradley_terry_hand_value_sign_and_mask():
    """Prevents: the sign of the comparison turned round, and masked comparisons in the mean."""
    chosen, rejected = torch.tensor([3.0, 0.0, 7.0]), torch.tensor([1.0, 0.5, -7.0])
    expected = (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(0.5))) / 2
    assert float(bradley_terry_loss(chosen, rejected, torch.tensor([1, 1, 0]))) == pytest.approx(expected, abs=1e-6)
    assert float(bradley_terry_loss(chosen[:1], chosen[:1], torch.ones(1))) == pytest.approx(math.log(2), abs=1e-7)


def test_step_loss_dispatches_by_case():
    """Prevents: the value model trained with BCE (its targets exceed 1) or a judge's labels with MSE."""
    nan = math.nan
    scores = torch.tensor([[1.5, 2.0, 0.3], [0.0, -1.0, 0.4], [4.0, 9.0, -0.2]])
    targets = torch.tensor([[1.9, 1.0, nan], [nan, 0.0, nan], [1.0, nan, nan]])
    mse = (0.4 ** 2 + 3.0 ** 2) / 2
    bce = (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(-1.0))) / 2
    assert step_loss(OUTPUTS, scores, targets).tolist() == pytest.approx([mse, bce, 0.0], abs=1e-5)


def test_parts_of_a_batch_add_up():
    """Prevents: a batch in parts, on several processes say, whose steps weigh by the part that they happen to lie in."""
    generator = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(5, 3, generator=generator), torch.rand(5, 3, generator=generator)
    targets[0, 0] = targets[:3, 1] = targets[:, 2] = math.nan
    count = (~targets.isnan()).sum(0)
    parts = sum(step_loss(OUTPUTS, scores[part], targets[part], count) for part in (slice(0, 3), slice(3, 5)))
    torch.testing.assert_close(parts, step_loss(OUTPUTS, scores, targets))


def test_step_loss_missing_labels_have_no_gradient():
    """Prevents: NaN targets that leak into the gradient (0 * NaN), and unlabelled outputs that learn something."""
    scores = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.full((4, 3), math.nan)
    targets[0, 0], targets[2, 1] = 1.2, 1.0
    losses = step_loss(OUTPUTS, scores, targets)
    losses.sum().backward()
    assert float(losses[0].detach()) == pytest.approx((scores[0, 0].item() - 1.2) ** 2)
    assert bool(scores.grad.isfinite().all())
    assert (scores.grad != 0).nonzero().tolist() == [[0, 0], [2, 1]]
    assert step_loss(OUTPUTS, scores, torch.full((4, 3), math.nan)).tolist() == [0.0] * 3


# -- scorer

def test_forward_is_linear_relu_linear_per_token(prm):
    """Prevents: an output squashed into [0, 1] (values exceed 1), or scores read from the heads' logits."""
    ids = torch.tensor([[5, 60, 7, 300]])
    h = prm.backbone(ids)
    first, second = prm.score[0], prm.score[2]
    expected = (h @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias
    assert prm(ids).shape == (1, 4, 3)
    torch.testing.assert_close(prm(ids), expected, atol=1e-6, rtol=1e-5)


def test_cached_equals_uncached(prm):
    """Prevents: a PRM whose scores depend on how the text was cut into pieces, or on a neighbour's padding."""
    prm = copy.deepcopy(prm).double()
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 400, (n,), generator=generator).tolist() for n in (9, 4, 12)]
    cache = prm.backbone.new_cache(3, 20)
    first, n = pad([r[:3] if len(r) > 4 else r[:1] for r in rows], 0)
    prm(first, cache)
    cache.rollback(n)
    rest, m = pad([r[k:] for r, k in zip(rows, n.tolist())], 0)
    scores = prm(rest, cache)
    for b, row in enumerate(rows):
        alone = prm(torch.tensor([row]))[0, int(n[b]):]
        torch.testing.assert_close(scores[b, :int(m[b])], alone, atol=1e-9, rtol=0)


def test_guide_single_output(prm):
    """Prevents: a guide that reads another objective's score."""
    scores = torch.tensor([[6.0, -8.0, 1.0], [2.0, 4.0, 3.0]])
    assert prm.guide(scores, "math_engagement", "newline").tolist() == [-2.0, 1.0]
    assert prm.guide(scores, "tutor_engagement", "newline").tolist() == [2.0, 6.0]
    assert prm.guide(scores[None], "math_engagement").tolist() == [[-2.0, 1.0]]


def test_guide_unified_is_the_scaled_mean_of_the_boundarys_domain(prm):
    """Prevents: a unified guide that averages scores of other domains, or in their raw, unequal units."""
    scores = torch.tensor([[6.0, -8.0, 1.0], [2.0, 4.0, 3.0]])
    assert prm.guide(scores, "unified", "newline").tolist() == [(6 / 2 - 8 / 4) / 2, (2 / 2 + 4 / 4) / 2]
    assert prm.guide(scores, "unified", "turn").tolist() == [2.0, 6.0]


@pytest.mark.parametrize("guide, boundary", [("honesty", "sentence"), ("unified", "sentence"), ("nonsense", "newline")])
def test_guide_unknown(prm, guide, boundary):
    """Prevents: guidance by an output that was never trained, or by the mean of nothing (NaN)."""
    with pytest.raises(InputError, match="no PRM output"):
        prm.guide(torch.zeros(2, 3), guide, boundary)


def test_weights_come_from_the_generator(tokenizer):
    """Prevents: runs that differ although their seed is the same."""
    backbone = GPT(GPTConfig(50, n_layer=1, d_model=8, n_head=2, n_kv_head=2, d_ff=8, objectives=()))
    make = lambda seed: PRM(backbone, OUTPUTS, torch.Generator().manual_seed(seed)).score.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(make(3).values(), make(3).values()))
    assert not torch.equal(make(3)["0.weight"], make(4)["0.weight"])
    wide = PRM(GPT(GPTConfig(50, n_layer=1, d_model=64, n_head=2, n_kv_head=2, d_ff=8, objectives=())), OUTPUTS,
               torch.Generator().manual_seed(0))
    assert float(wide.score[0].weight.detach().std()) == pytest.approx(1 / 8, rel=0.05)         # keeps the size of h


@torch.no_grad()
def test_step_correctness_is_read_before_the_last_block(prm):
    """Prevents: an output for training that changes the others, or that the last block has a part in."""
    taught, ids = copy.deepcopy(prm), torch.tensor([[5, 60, 7, 300, 2], [9, 8, 7, 6, 5]])
    taught.names = [*NAMES[:2], STEP]
    shorter = copy.deepcopy(prm)
    del shorter.backbone.layers[-1]
    torch.testing.assert_close(taught(ids), torch.cat((prm(ids)[..., :2], shorter(ids)[..., 2:]), -1))


# -- files

def test_save_and_load_bit_exact(prm, tmp_path):
    """Prevents: a reloaded PRM that scores differently, or without its scales, names or tokenizer."""
    save_prm(prm, tmp_path)
    loaded = load_prm(tmp_path)
    ids = torch.tensor([[5, 60, 7, 300, 2]])
    assert loaded.outputs == OUTPUTS and loaded.names == NAMES and torch.equal(loaded.scale, prm.scale)
    assert torch.equal(loaded(ids), prm(ids))
    assert loaded.backbone.tokenizer.pieces == prm.backbone.tokenizer.pieces


def test_a_prm_of_all_objectives_comes_back(tokenizer, tmp_path):
    """Prevents: the default PRM of --objective all, refused because nothing is left that it does not score."""
    backbone = GPT(GPTConfig(tokenizer.n_vocab, n_layer=1, d_model=8, n_head=2, n_kv_head=2, d_ff=8, objectives=()))
    backbone.tokenizer = tokenizer
    save_prm(PRM(backbone, OBJECTIVES.values()), tmp_path)
    assert load_prm(tmp_path).names == list(OBJECTIVES)


def test_load_refuses_a_policy(gpt, tmp_path):
    """Prevents: a policy's directory taken for a reward model, which would score with random weights."""
    save_hf(gpt, tmp_path)
    with pytest.raises(InputError, match="no reward model"):
        load_prm(tmp_path)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_load_names_the_bad_tensor(prm, tmp_path, change):
    """Prevents: a half-loaded PRM: every tensor of the file is used and every weight comes from it."""
    save_prm(prm, tmp_path)
    path = os.path.join(tmp_path, "model.safetensors")
    tensors = {k: v.clone() for k, v in load_safetensors(path).items()}
    if change == "missing":
        del tensors["score.2.weight"]
    elif change == "unknown":
        tensors["score.4.weight"] = torch.zeros(2)
    else:
        tensors["score.2.weight"] = torch.zeros(2, 32)
    save_safetensors(tensors, path)
    with pytest.raises(InputError, match=r"score\.[24]\.weight"):
        load_prm(tmp_path)


def test_load_refuses_unknown_outputs(prm, tmp_path):
    """Prevents: an output name that no objective has, met only in the middle of decoding."""
    save_prm(prm, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"prm_outputs": ["math_accuracy", "nonsense", "honesty"]}))
    with pytest.raises(InputError, match="prm_outputs"):
        load_prm(tmp_path)
