"""mah_dpo.py: log-probabilities, losses against hand values, which parameters a pair touches, the baselines."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

import mah_dpo
from data import pad, response_mask
from mah_dpo import (Pair, balanced_mean, dpo_loss, log_ratio_margin, mah_dpo_loss, make_optimizer,
                     modpo_loss, pair_logps, pair_metrics, policy_logps, response_logps, soup)
from model import GPT, GPTConfig

NAMES = ("math_accuracy", "math_engagement", "honesty")
log_sigmoid = lambda x: -math.log1p(math.exp(-x))


@pytest.fixture
def model():
    """A tiny float64 model with three different heads."""
    generator = torch.Generator().manual_seed(5)
    config = GPTConfig(23, n_layer=1, n_head=2, n_kv_head=1, d_model=12, d_ff=16, max_len=32, init_std=0.3, objectives=NAMES)
    return GPT(config, generator).double()


@pytest.fixture(scope="module")
def rows():
    """Ragged (prompt, response) pairs of ids below 23, responses of 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(6)
    draw = lambda n: torch.randint(0, 23, (n,), generator=generator).tolist()
    return [(draw(p), draw(r)) for p, r in ((3, 5), (6, 1), (1, 7), (4, 4), (2, 3), (5, 2))]


def batch(rows, pad_id=0, extra=0):
    """-> ids, mask; `extra` more columns of padding."""
    ids, lengths = pad([p + r for p, r in rows], pad_id)
    ids = F.pad(ids, (0, extra), value=pad_id)
    return ids, response_mask(torch.tensor([len(p) for p, _ in rows]), lengths, ids.shape[1])


def slow_logps(model, head, prompt, response):
    """One row, one token at a time, by the definition: sum_t log pi(y_t | x, y_<t)."""
    total = 0.0
    for t, token in enumerate(response):
        h = model(torch.tensor([prompt + response[:t]]))[0, -1]
        total += F.log_softmax(model.heads[head].weight @ h, 0)[token].item()
    return total


# -- log-probabilities

def test_response_logps_equal_the_definition(model, rows):
    """Prevents: prompt tokens scored, the last token left out, logits shifted by one, padding scored."""
    ids, mask = batch(rows)
    found = response_logps(model(ids), model.heads[1].weight, ids, mask)
    expected = [slow_logps(model, 1, *row) for row in rows]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("pad_id", [0, 7, 22])
def test_response_logps_ignore_padding(model, rows, pad_id):
    """Prevents: a score that depends on how much padding follows, or on which id pads (perhaps EOS itself)."""
    ids, mask = batch(rows)
    padded, padded_mask = batch(rows, pad_id, extra=4)
    a = response_logps(model(ids), model.heads[0].weight, ids, mask)
    b = response_logps(model(padded), model.heads[0].weight, padded, padded_mask)
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_response_logps_in_chunks(model, rows, monkeypatch):
    """Prevents: a chunk border at which a row's tokens are lost, counted twice or added to another row."""
    ids, mask = batch(rows)
    h = model(ids)
    whole = response_logps(h, model.heads[0].weight, ids, mask)
    for size in (1, 3, 5):
        monkeypatch.setattr(mah_dpo, "CHUNK", size)
        torch.testing.assert_close(response_logps(h, model.heads[0].weight, ids, mask), whole, atol=1e-12, rtol=0)


def test_response_logps_sum_in_float32():
    """Prevents: a log-softmax in bfloat16, whose error over a response exceeds the margins that DPO looks for."""
    generator = torch.Generator().manual_seed(0)
    h, W = torch.randn(1, 200, 16, generator=generator).bfloat16(), torch.randn(500, 16, generator=generator).bfloat16()
    ids, mask = torch.randint(0, 500, (1, 200), generator=generator), torch.ones(1, 200, dtype=torch.bool)
    logits = F.linear(h, W).double()[0, :-1]                # what bfloat16 matrix products give; exact from here on
    exact = F.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).sum()
    found = response_logps(h, W, ids, mask)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=1e-5)


def packed(triples, pad_id=0):
    return [Pair("honesty", *t, "train") for t in triples]


def test_packed_pairs_each_through_its_own_head(model, pairs):
    """Prevents: responses that see each other, positions that do not restart, a first token predicted by anything but the
    last prompt token (trap 8), pairs scored by another objective's head, results in the order of their heads."""
    head = torch.tensor([2, 0, 1, 0, 2, 1, 0])
    found = policy_logps(model, packed(pairs), head)
    expected = [[slow_logps(model, i, x, y) for i, (x, *ys) in zip(head.tolist(), pairs) for y in [ys[side]]] for side in (0, 1)]
    assert found[0].tolist() == pytest.approx(expected[0], abs=1e-9)
    assert found[1].tolist() == pytest.approx(expected[1], abs=1e-9)


@pytest.mark.parametrize("shape", [{}, {"position": "learned", "norm": "layer", "mlp": "gelu"}, {"n_kv_head": 2}])
def test_packing_changes_no_gradient(shape, pairs):
    """Prevents: a shared prompt that gets the gradient of one response only, or padding that gets any."""
    config = dict(n_layer=2, n_head=2, n_kv_head=1, d_model=12, d_ff=16, max_len=32, init_std=0.3, objectives=NAMES) | shape
    plain = GPT(GPTConfig(23, **config), torch.Generator().manual_seed(5)).double()
    other, head = copy.deepcopy(plain), torch.tensor([0, 0, 1, 1, 2, 2, 2])
    weight = torch.linspace(-1, 1, 14, dtype=torch.float64)
    (policy_logps(other, packed(pairs, pad_id=7), head).flatten() * weight).sum().backward()
    for i, (x, *ys) in enumerate(pairs):
        for side, y in enumerate(ys):
            ids, mask = batch([(x, y)])
            (response_logps(plain(ids), plain.heads[int(head[i])].weight, ids, mask)[0] * weight[7 * side + i]).backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), other.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-9, msg=name)


def test_checkpointing_changes_no_gradient(model, pairs):
    """Prevents: blocks that are recomputed with another mask, positions or inputs than in the forward pass."""
    other, head = copy.deepcopy(model), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    other.grad_checkpoint = True
    for m in (model, other):
        policy_logps(m, packed(pairs), head).sum().backward()
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=0)


def test_bfloat16_keeps_losses_and_weights_in_float32(model, pairs):
    """Prevents: log-probabilities summed, or weights stored, in bfloat16, where a DPO margin is lost in rounding; a mask of
    another type than the queries."""
    model, head = model.float(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    exact = policy_logps(model, packed(pairs), head)
    with torch.autocast("cpu", torch.bfloat16):
        found = policy_logps(model, packed(pairs), head)
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, atol=0.2, rtol=0.02)
    found.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_packed_row_may_be_longer_than_the_context(model):
    """Prevents: pairs refused because prompt and both responses together exceed what each response alone does not."""
    x, y, z = [1] * 10, [2] * 20, [3] * 21
    found = policy_logps(model, packed([(x, y, z)]), torch.tensor([0]))                   # 51 tokens, context 32
    assert found.flatten().tolist() == pytest.approx([slow_logps(model, 0, x, y), slow_logps(model, 0, x, z)], abs=1e-9)


def test_pair_logps_in_batches_of_any_size(model, pairs):
    """Prevents: log-probabilities in the order of length instead of the pairs'."""
    items = [Pair(NAMES[i % 3], *p, "train") for i, p in enumerate(pairs)]
    seen, graphs = [], []
    model.register_forward_hook(lambda module, args, h: graphs.append(h.requires_grad))
    whole = pair_logps(model, items, NAMES.index, progress=seen.append)
    assert sum(seen) == len(items) and not any(graphs)
    for tokens in (1, 40):
        assert torch.allclose(pair_logps(model, items, NAMES.index, tokens=tokens), whole, atol=1e-6)
    assert whole[0].tolist() == pytest.approx([slow_logps(model, 0, pairs[0][0], y) for y in pairs[0][1:]], abs=1e-5)


# -- losses

PI_C, PI_R, REF_C, REF_R = torch.tensor([[-3.0, -9.0], [-5.0, -4.0], [-4.0, -8.5], [-4.5, -6.0]]).unbind()


def test_margin_and_dpo_loss_hand_values():
    """Prevents: the sign of the margin, chosen and rejected or policy and reference swapped, beta left out."""
    assert log_ratio_margin(PI_C, PI_R, REF_C, REF_R).tolist() == [1.5, -2.5]
    expected = [-log_sigmoid(0.1 * 1.5), -log_sigmoid(0.1 * -2.5)]
    assert dpo_loss(PI_C, PI_R, REF_C, REF_R, 0.1).tolist() == pytest.approx(expected, abs=1e-6)


def test_mah_dpo_loss_hand_value_and_metrics():
    """Prevents: a mean over the batch where every objective should get its own, alpha left out, wrong metrics."""
    pi_c, pi_r = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 0.0, 0.0])            # Delta = -1, 2, -1
    zero, alpha = torch.zeros(3), torch.tensor([1.0, 1.0, 3.0])
    loss, metrics = mah_dpo_loss(pi_c, pi_r, zero, zero, torch.tensor([0, 0, 2]), alpha, 0.5)
    first, last = -(log_sigmoid(-0.5) + log_sigmoid(1.0)) / 2, -log_sigmoid(-0.5)
    assert float(loss) == pytest.approx(first + 3 * last, abs=1e-6)
    assert metrics["loss"][[0, 2]].tolist() == pytest.approx([first, last], abs=1e-6)
    assert metrics["margin"][[0, 2]].tolist() == pytest.approx([0.25, -0.5], abs=1e-6)
    assert metrics["accuracy"][[0, 2]].tolist() == [0.5, 0.0]
    assert metrics["chosen"][[0, 2]].tolist() == [1.0, -1.0] and metrics["rejected"][[0, 2]].tolist() == [0.5, 0.0]
    assert metrics["kl"][[0, 2]].tolist() == pytest.approx([(1 / 4 + 4 / 4) / 2, 1 / 4], abs=1e-6)
    assert all(math.isnan(values[1]) for values in metrics.values())


def test_metrics_by_hand():
    """Prevents: an accuracy that asks for a margin above 1, moves from the reference that are not differences, or swapped."""
    pi_c, pi_r, ref_c, ref_r = torch.tensor([[-3.0, -9.0], [-5.0, -4.0], [-3.5, -8.5], [-5.0, -6.0]])     # Delta = 0.5, -2.5
    metrics = pair_metrics(torch.ones(2), pi_c, pi_r, ref_c, ref_r, torch.tensor([0, 1]), 2, 0.1)
    expected = {"margin": [0.05, -0.25], "accuracy": [1.0, 0.0], "chosen": [0.5, -0.5], "rejected": [0.0, 2.0],
                "kl": [0.25 / 4, (0.25 + 4) / 4]}
    assert {k: metrics[k].tolist() for k in expected} == {k: pytest.approx(v, abs=1e-6) for k, v in expected.items()}


def test_metrics_count_a_tie_as_wrong():
    """Prevents: an untrained policy (Delta = 0 everywhere) reported as perfectly accurate."""
    metrics = pair_metrics(torch.ones(2), *torch.zeros(4, 2), torch.tensor([0, 0]), 1, 0.1)
    assert metrics["accuracy"].tolist() == [0.0] and metrics["margin"].tolist() == [0.0]


def test_balanced_mean_does_not_reweight_absent_objectives():
    """Prevents: a division by the number of objectives that happen to be in the batch, and NaN for an absent one."""
    losses, alpha = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1.0, 1.0, 2.0])
    assert float(balanced_mean(losses, torch.tensor([0, 0, 2]), alpha)) == pytest.approx(2 + 10, abs=1e-6)
    assert float(balanced_mean(losses[:2], torch.tensor([0, 0]), alpha)) == pytest.approx(2, abs=1e-6)


def loss_of(model, reference, pairs, head, count=None):
    """MAH-DPO loss of (prompt, chosen, rejected) triples in float64."""
    pi = policy_logps(model, packed(pairs), head)
    with torch.no_grad():
        ref = policy_logps(reference, packed(pairs), torch.zeros_like(head))
    return mah_dpo_loss(*pi, *ref, head, torch.ones(len(model.heads), dtype=pi.dtype), 0.1, count)


@pytest.fixture(scope="module")
def pairs(rows):
    """Ragged triples; the last has a prompt of one token."""
    return [(rows[i][0], rows[i][1], rows[j][1]) for i, j in ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (2, 0))]


def test_exact_copies_start_at_ln2(model, pairs):
    """Prevents: any difference between how policy and reference are scored: exact copies lose exactly ln 2 each."""
    copies = model.with_heads(NAMES)
    loss, metrics = loss_of(copies, model, pairs, torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    assert loss.requires_grad and not any(v.requires_grad for v in metrics.values())
    assert metrics["loss"].tolist() == pytest.approx([math.log(2)] * 3, abs=1e-12)
    assert metrics["margin"].tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    assert float(loss.detach()) == pytest.approx(3 * math.log(2), abs=1e-12)


def test_idle_head_is_left_alone(model, pairs):
    """Prevents: weight decay or momentum that moves a head which saw no pair: its gradient stays None."""
    policy = model.with_heads(NAMES)
    before = copy.deepcopy(policy.state_dict())
    optimizer = make_optimizer(policy, 1e-3, 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(policy, model, pairs, torch.tensor([0, 2, 0, 2, 0, 2, 0]))[0].backward()
        assert policy.heads[1].weight.grad is None
        optimizer.step()
    moved = {k for k, v in policy.state_dict().items() if not torch.equal(v, before[k])}
    assert "heads.1.weight" not in moved
    assert moved == set(before) - {"heads.1.weight"}


def test_one_pair_touches_its_head_and_the_backbone(model, pairs):
    """Prevents: gradients that leak into other heads through a full H x V product or a mixed head."""
    for i in range(3):
        policy = model.with_heads(NAMES)
        loss_of(policy, model, pairs[:1], torch.tensor([i]))[0].backward()
        touched = {k for k, p in policy.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
        assert touched == {k for k, _ in policy.named_parameters() if not k.startswith("heads.")} | {f"heads.{i}.weight"}


def test_accumulation_equals_the_full_batch(model, pairs):
    """Prevents: micro-batches, with objectives split between them, whose gradients do not add up to the whole batch's."""
    head = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    full, parts = (model.with_heads(NAMES, 0.1, torch.Generator().manual_seed(0)) for _ in range(2))
    loss, metrics = loss_of(full, model, pairs, head)
    loss.backward()
    found = []
    for part in (slice(0, 3), slice(3, 5), slice(5, 7)):
        loss, some = loss_of(parts, model, pairs[part], head[part], head.bincount())
        loss.backward()
        found.append(some)
    assert all(torch.allclose(sum(f[m] for f in found), metrics[m]) for m in metrics)
    for a, b in zip(full.parameters(), parts.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=0)


def test_training_raises_the_margin(model, pairs):
    """Prevents: descending the wrong way: after a step every objective's margin is positive."""
    policy, head = model.with_heads(NAMES), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    optimizer = make_optimizer(policy, 1e-4, 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(policy, model, pairs, head)[0].backward()
        optimizer.step()
    assert bool((loss_of(policy, model, pairs, head)[1]["margin"] > 0).all())


# -- baselines

def test_modpo_hand_value():
    """Prevents: the margin added instead of subtracted, multiplied by w_k, or scaled by beta twice."""
    found = modpo_loss(PI_C, PI_R, REF_C, REF_R, torch.tensor([0.05, -0.4]), 0.25, 0.1)
    expected = [-log_sigmoid((0.15 - 0.05) / 0.25), -log_sigmoid((-0.25 + 0.4) / 0.25)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_modpo_is_dpo_without_margin():
    """Prevents: a MODPO baseline that is weak because it does not even reduce to DPO."""
    modpo = modpo_loss(PI_C, PI_R, REF_C, REF_R, torch.zeros(2), 1.0, 0.3)
    assert torch.equal(modpo, dpo_loss(PI_C, PI_R, REF_C, REF_R, 0.3))


def test_modpo_refuses_small_weights():
    """Prevents: a division by a tiny w_k, which makes the loss explode."""
    modpo_loss(PI_C, PI_R, REF_C, REF_R, torch.zeros(2), 0.1, 0.1)
    for w_k in (0.09, torch.tensor([0.5, 0.09])):
        with pytest.raises(ValueError, match="w_k >= 0.1"):
            modpo_loss(PI_C, PI_R, REF_C, REF_R, torch.zeros(2), w_k, 0.1)


def test_soup_is_the_weighted_average():
    """Prevents: weights that are not divided by their sum, or that go to the wrong model."""
    a, b = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor(0.0)}, {"x": torch.tensor([5.0, -2.0]), "y": torch.tensor(4.0)}
    mixed = soup([a, b], [3.0, 1.0])
    assert mixed["x"].tolist() == [2.0, 1.0] and float(mixed["y"]) == 1.0
    assert soup([a, b], [0.0, 2.0])["x"].tolist() == soup([b], [0.5])["x"].tolist() == [5.0, -2.0]
    assert a["x"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("weights", [[1.0], [1.0, -0.5], [0.0, 0.0], [1.0, 1.0, 1.0]])
def test_soup_refuses_bad_weights(weights):
    """Prevents: extrapolation by negative weights, division by zero, a model that is left out in silence."""
    with pytest.raises(ValueError, match="non-negative weight per model"):
        soup([{"x": torch.ones(1)}, {"x": torch.ones(1)}], weights)


def test_soup_refuses_different_models():
    """Prevents: averaging what is not the same parameter."""
    with pytest.raises(ValueError, match="same parameters"):
        soup([{"x": torch.ones(1)}, {"y": torch.ones(1)}], [1.0, 1.0])


def test_optimizer_covers_every_parameter_once(model):
    """Prevents: a parameter that is never trained, or trained at two rates, or heads at the backbone's rate."""
    optimizer = make_optimizer(model, 1e-5, 4e-4)
    groups = {g["name"]: g for g in optimizer.param_groups}
    names = {id(p): k for k, p in model.named_parameters()}
    listed = {name: sorted(names[id(p)] for p in g["params"]) for name, g in groups.items()}
    assert sorted(listed["backbone"] + listed["heads"]) == sorted(names.values())
    assert listed["heads"] == [f"heads.{i}.weight" for i in range(3)]
    assert (groups["backbone"]["lr"], groups["heads"]["lr"]) == (1e-5, 4e-4)
    assert all(g["weight_decay"] == 0 for g in groups.values())
