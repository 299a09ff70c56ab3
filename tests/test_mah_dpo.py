"""mah_dpo.py: log-probabilities, which parameters a pair touches, the soup. (Hand values of the
losses are exercises 1 to 4.) Every docstring states the bug that its test prevents."""
import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import mah_dpo
from data import pad, response_mask
from mah_dpo import (Pair, combine, mah_dpo_loss, make_optimizer, pair_logps, pair_metrics,
                     policy_logps, response_logps, soup)
from model import GPT, GPTConfig

NAMES = ("math_accuracy", "math_engagement", "honesty")
CONFIG = GPTConfig(23, n_layer=2, n_head=2, n_kv_head=1, d_model=12, d_ff=16, max_len=32,
                   init_std=0.3, objectives=NAMES)
HEADS = torch.tensor([2, 0, 1, 0, 2, 1, 0])       # of the seven pairs below


def make(config):
    """A tiny float64 model with three different heads."""
    return GPT(config, torch.Generator().manual_seed(5)).double()


@pytest.fixture
def model():
    return make(CONFIG)


@pytest.fixture(scope="module")
def rows():
    """Ragged (prompt, response) pairs of ids below 23, responses of 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(6)
    found = []
    for sizes in ((3, 5), (6, 1), (1, 7), (4, 4), (2, 3), (5, 2)):
        found.append([torch.randint(0, 23, (n,), generator=generator).tolist() for n in sizes])
    return found


@pytest.fixture(scope="module")
def pairs(rows):
    """Seven ragged pairs; the third and the last have a prompt of one token or response of one."""
    found = []
    for k, (i, j) in enumerate(((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (2, 0))):
        name = NAMES[HEADS[k]]
        found.append(Pair(name, rows[i][0], rows[i][1], rows[j][1], "train"))
    return found


def batch(rows):
    """-> ids, mask"""
    ids, lengths = pad([prompt + response for prompt, response in rows], 0)
    prompts = torch.tensor([len(prompt) for prompt, _ in rows])
    return ids, response_mask(prompts, lengths, ids.shape[1])


def slow_logps(model, head, prompt, response):
    """One row, one token at a time, by the definition: sum_t log pi(y_t | x, y_<t)."""
    total = 0.0
    for t, token in enumerate(response):
        h = model(torch.tensor([prompt + response[:t]]))[0, -1]
        logits = model.heads[head].weight @ h
        total += F.log_softmax(logits, 0)[token].item()
    return total


def test_response_logps_in_chunks(model, rows, monkeypatch):
    """Prevents: a chunk border at which a row's tokens are lost, counted twice or added to another
    row."""
    ids, mask = batch(rows)
    h, W = model(ids), model.heads[0].weight
    whole = response_logps(h, W, ids, mask)
    for size in (1, 3, 5):
        monkeypatch.setattr(mah_dpo, "CHUNK", size)
        found = response_logps(h, W, ids, mask)
        torch.testing.assert_close(found, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [{}, {"position": "learned", "norm": "layer", "mlp": "gelu"},
                                   {"n_kv_head": 2, "qk_norm": True}])
def test_pairs_each_through_its_own_head(shape, pairs):
    """Prevents: responses that see each other or a prompt's padding, positions that do not restart,
    a first token predicted by anything but the last prompt token (trap 8), pairs scored by another
    objective's head, results in the order of their heads."""
    model = make(replace(CONFIG, **shape))
    chosen, rejected = policy_logps(model, pairs, HEADS)
    for k, p in enumerate(pairs):
        head = int(HEADS[k])
        found = chosen[k].item(), rejected[k].item()
        expected = [slow_logps(model, head, p.prompt, y) for y in (p.chosen, p.rejected)]
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", [{}, {"position": "learned", "norm": "layer", "mlp": "gelu"},
                                   {"n_kv_head": 2}])
@pytest.mark.parametrize("again", [False, True])
def test_a_shared_prompt_changes_no_gradient(shape, again, pairs):
    """Prevents: a prompt that gets the gradient of one response only, padding that gets any, blocks
    that are computed again (checkpointing) with another mask, positions or keys than before."""
    plain = make(replace(CONFIG, **shape))
    other = copy.deepcopy(plain)
    other.grad_checkpoint = again
    weight = torch.linspace(-1, 1, 14, dtype=torch.float64).view(2, 7)
    (policy_logps(other, pairs, HEADS) * weight).sum().backward()
    for k, p in enumerate(pairs):
        W = plain.heads[int(HEADS[k])].weight
        for side, y in enumerate((p.chosen, p.rejected)):
            ids, mask = batch([(p.prompt, y)])
            logps = response_logps(plain(ids), W, ids, mask)
            (logps[0] * weight[side, k]).backward()
    same_gradients(plain, other, 1e-10)


def same_gradients(a, b, atol):
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("n, chosen, rejected", [(3, 1, 1), (10, 20, 21)])       # context 32
def test_very_short_and_very_long_pairs(model, n, chosen, rejected):
    """Prevents: a step without tokens, which is what is left of them to feed where a response is a
    single one; pairs refused because prompt and both responses together exceed the context, which
    each response alone does not."""
    pair = Pair("honesty", [1] * n, [2] * chosen, [3] * rejected, "train")
    found = policy_logps(model, [pair], torch.tensor([0])).flatten().tolist()
    expected = [slow_logps(model, 0, pair.prompt, y) for y in (pair.chosen, pair.rejected)]
    assert len(pair) == n + chosen + rejected and found == pytest.approx(expected, abs=1e-9)


def test_bfloat16_keeps_losses_and_weights_in_float32(model, pairs):
    """Prevents: log-probabilities summed, or weights stored, in bfloat16, where a DPO margin is
    lost in rounding; a mask of another type than the queries."""
    model = model.float()
    exact = policy_logps(model, pairs, HEADS)
    with torch.autocast("cpu", torch.bfloat16):
        found = policy_logps(model, pairs, HEADS)
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, atol=0.2, rtol=0.02)
    found.sum().backward()
    for p in model.parameters():
        assert p.dtype == p.grad.dtype == torch.float32


def test_the_head_sees_responses_only(model, pairs, monkeypatch):
    """Prevents: logits of prompts, padding or other objectives' heads, which cost most of a step's
    time where the vocabulary is large."""
    rows, plain = [], mah_dpo.linear

    def counted(x, W):
        rows.append(len(x))
        return plain(x, W)
    monkeypatch.setattr(mah_dpo, "linear", counted)
    policy_logps(model, pairs, HEADS)
    assert sum(rows) == sum(len(p.chosen) + len(p.rejected) for p in pairs)


def test_pair_logps_in_batches_of_any_size(model, pairs, monkeypatch):
    """Prevents: log-probabilities in the order of length instead of the pairs', a graph that fills
    the memory; a pair that is left out where processes cannot share all pairs evenly."""
    seen, graphs = [], []

    def remember(module, args, h):
        graphs.append(h.requires_grad)
    model.register_forward_hook(remember)
    whole = pair_logps(model, pairs, progress=seen.append)
    assert sum(seen) == len(pairs) and not any(graphs)
    for tokens in (1, 40):
        found = pair_logps(model, pairs, tokens=tokens)
        assert torch.allclose(found, whole, atol=1e-6)
    for k, p in enumerate(pairs):
        expected = [slow_logps(model, int(HEADS[k]), p.prompt, y) for y in (p.chosen, p.rejected)]
        assert whole[k].tolist() == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(mah_dpo, "ranks", lambda: 2)             # 7 pairs, 8 rows
    assert torch.allclose(pair_logps(model, pairs, progress=seen.append), whole, atol=1e-6)
    assert sum(seen) == len(pairs) + 2 * 8


# -- losses

def test_metrics_by_hand():
    """Prevents: an accuracy that asks for a margin above 1, moves from the reference that are not
    differences, or swapped; a number for an objective without a pair. Delta = 0.5, -2.5."""
    pi_c, pi_r = torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -4.0])
    ref_c, ref_r = torch.tensor([-3.5, -8.5]), torch.tensor([-5.0, -6.0])
    losses, head = torch.tensor([0.3, 0.7]), torch.tensor([0, 2])
    metrics = pair_metrics(losses, pi_c, pi_r, ref_c, ref_r, head, 3, 0.1)
    expected = {"loss": [0.3, 0.7],
                "margin": [0.05, -0.25],
                "accuracy": [1.0, 0.0],
                "chosen": [0.5, -0.5],
                "rejected": [0.0, 2.0],
                "kl": [0.25 / 4, (0.25 + 4) / 4]}
    assert metrics.keys() == expected.keys()
    for name, (first, last) in expected.items():
        values = [first, math.nan, last]
        assert metrics[name].tolist() == pytest.approx(values, abs=1e-6, nan_ok=True), name


def test_metrics_count_a_tie_as_wrong():
    """Prevents: an untrained policy (Delta = 0 everywhere) reported as perfectly accurate."""
    metrics = pair_metrics(torch.ones(2), *torch.zeros(4, 2), torch.tensor([0, 0]), 1, 0.1)
    assert metrics["accuracy"].tolist() == [0.0] and metrics["margin"].tolist() == [0.0]


def loss_of(model, reference, pairs, head, count=None):
    """MAH-DPO loss and metrics in float64."""
    pi = policy_logps(model, pairs, head)
    with torch.no_grad():
        ref = policy_logps(reference, pairs, torch.zeros_like(head))
    alpha = torch.ones(len(model.heads), dtype=pi.dtype)
    return mah_dpo_loss(*pi, *ref, head, alpha, 0.1, count)


def test_exact_copies_start_at_ln2(model, pairs):
    """Prevents: any difference between how policy and reference are scored: exact copies lose
    exactly ln 2 each."""
    copies = model.with_heads(NAMES)
    loss, metrics = loss_of(copies, model, pairs, HEADS)
    assert loss.requires_grad and not any(v.requires_grad for v in metrics.values())
    assert metrics["loss"].tolist() == pytest.approx([math.log(2)] * 3, abs=1e-12)
    assert metrics["margin"].tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    assert float(loss.detach()) == pytest.approx(3 * math.log(2), abs=1e-12)


def test_idle_head_is_left_alone(model, pairs):
    """Prevents: weight decay or momentum that moves a head which saw no pair: its gradient stays
    None."""
    policy = model.with_heads(NAMES)
    before = copy.deepcopy(policy.state_dict())
    optimizer = make_optimizer(policy, 1e-3, 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss, _ = loss_of(policy, model, pairs, torch.tensor([0, 2, 0, 2, 0, 2, 0]))
        loss.backward()
        assert policy.heads[1].weight.grad is None
        optimizer.step()
    after = policy.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == set(before) - {"heads.1.weight"}


def test_one_pair_touches_its_head_and_the_backbone(model, pairs):
    """Prevents: gradients that leak into other heads through a full H x V product or a mixed
    head."""
    for i in range(3):
        policy = model.with_heads(NAMES)
        loss_of(policy, model, pairs[:1], torch.tensor([i]))[0].backward()
        for name, p in policy.named_parameters():
            touched = p.grad is not None and bool((p.grad != 0).any())
            wanted = not name.startswith("heads.") or name == f"heads.{i}.weight"
            assert touched == wanted, name


def test_accumulation_equals_the_full_batch(model, pairs):
    """Prevents: micro-batches, with objectives split between them, whose gradients do not add up to
    the whole batch's."""
    head = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    full = model.with_heads(NAMES, 0.1, torch.Generator().manual_seed(0))
    parts = copy.deepcopy(full)
    loss, metrics = loss_of(full, model, pairs, head)
    loss.backward()
    found = {name: 0 for name in metrics}
    for part in (slice(0, 3), slice(3, 5), slice(5, 7)):
        loss, some = loss_of(parts, model, pairs[part], head[part], head.bincount())
        loss.backward()
        found = {name: found[name] + some[name] for name in found}
    for name, values in metrics.items():
        torch.testing.assert_close(found[name], values)
    same_gradients(full, parts, 1e-12)


def test_training_raises_the_margin(model, pairs):
    """Prevents: descending the wrong way: after some steps every objective's margin is positive."""
    policy = model.with_heads(NAMES)
    optimizer = make_optimizer(policy, 1e-4, 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(policy, model, pairs, HEADS)[0].backward()
        optimizer.step()
    _, metrics = loss_of(policy, model, pairs, HEADS)
    assert bool((metrics["margin"] > 0).all())


# -- baselines

def test_soup_is_the_weighted_average():
    """Prevents: weights that are not divided by their sum, or that go to the wrong model."""
    a = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor(0.0)}
    b = {"x": torch.tensor([5.0, -2.0]), "y": torch.tensor(4.0)}
    mixed = soup([a, b], [3.0, 1.0])
    assert mixed["x"].tolist() == [2.0, 1.0]
    assert mixed["y"].item() == 1.0
    for only_b in (soup([a, b], [0.0, 2.0]), soup([b], [0.5])):
        assert only_b["x"].tolist() == [5.0, -2.0]
    assert a["x"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("weights", [[1.0], [1.0, -0.5], [0.0, 0.0], [1.0, 1.0, 1.0]])
def test_soup_refuses_bad_weights(weights):
    """Prevents: extrapolation by negative weights, division by zero, a model that is left out in
    silence."""
    words = r"^need one non-negative weight per model, not all zero: got \[.*\] for 2$"
    with pytest.raises(ValueError, match=words):
        soup([{"x": torch.ones(1)}, {"x": torch.ones(1)}], weights)


def test_soup_refuses_different_models():
    """Prevents: averaging what is not the same parameter."""
    with pytest.raises(ValueError, match="^the models of a soup must have the same parameters$"):
        soup([{"x": torch.ones(1)}, {"y": torch.ones(1)}], [1.0, 1.0])


# -- rules for the backbone

def update(gradients, alpha, rule, c=0.4):
    """The backbone's gradient that a rule makes of the objectives' (H, N), in float64."""
    gradients = torch.tensor(gradients).double()
    shares = combine(gradients @ gradients.T, torch.tensor(alpha).double(), rule, c)
    return (shares @ gradients).tolist()


OPPOSED = [[1.0, 0.0], [-1.0, 0.0]]
EQUAL = [[1.0, 0.0], [1.0, 0.0]]
PLANE = [[2.0, 0.0], [0.0, 1.0], [2.0, 1.0]]
CANCEL = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
ZERO = [[1.0, 0.0], [0.0, 0.0]]
ONES = [1.0, 1.0, 1.0]


@pytest.mark.parametrize("gradients, alpha, rule, expected", [
    (OPPOSED, [1.4, 0.6], "sum", [0.8, 0]),
    (OPPOSED, [1.4, 0.6], "mgda", [0, 0]),
    # g_0 = (.4, 0); the second is the worst served, and is served by c |g_0| = .16.
    (OPPOSED, [1.4, 0.6], "cagrad", [0.48, 0]),
    (OPPOSED, [1.4, 0.6], "raco", [0.48, 0]),
    # Where all agree, the step grows by c.
    (EQUAL, ONES[:2], "sum", [2, 0]),
    (EQUAL, ONES[:2], "mgda", [2, 0]),
    (EQUAL, ONES[:2], "cagrad", [2.8, 0]),
    (EQUAL, ONES[:2], "raco", [2.8, 0]),
    # The point of the triangle next to 0 is 1/5 (2, 0) + 4/5 (0, 1).
    (PLANE, ONES, "mgda", [1.2, 2.4]),
    (PLANE, [1.0, 1.0, 0.0], "mgda", [0.8, 1.6]),
    # Two that cancel leave no direction in which all gain; so does one that asks for nothing.
    (CANCEL, ONES, "mgda", [0, 0]),
    (CANCEL, ONES, "raco", [0, 1]),
    (ZERO, ONES[:2], "mgda", [0, 0]),
    (ZERO, ONES[:2], "cagrad", [1, 0]),
    (ZERO, ONES[:2], "raco", [1, 0]),
    (ZERO, [1.0, 0.0], "mgda", [1, 0]),
    (ZERO[::-1], [1.0, 0.0], "cagrad", [0, 0])])
def test_rules_on_hand_made_gradients(gradients, alpha, rule, expected):
    """Prevents: a rule of the wrong sign, of another length than the sum's, a division by a
    gradient of 0, an objective of weight 0 that has a say."""
    assert update(gradients, alpha, rule) == pytest.approx(expected, abs=1e-6)


def closed_form(gram, w, c):
    """The shares (l, 1 - l) that minimise G_p . g_0 + c |g_0| |G_p| for two objectives: the best
    of 0, 1 and the roots of a quadratic."""
    (h11, h12), (_, h22) = gram.tolist()
    b1, b2 = (gram @ w).tolist()
    d = b1 - b2
    s = c * math.sqrt(float(w @ gram @ w))
    # |G_p|^2 = q2 l^2 + q1 l + q0
    q2 = h11 + h22 - 2 * h12
    q1 = 2 * (h12 - h22)
    steep = d * d - s * s * q2
    x, y = steep * q2, steep * q1
    z = d * d * h22 - s * s * q1 * q1 / 4
    root = math.sqrt(max(0.0, y * y - 4 * x * z))
    tried = [0.0, 1.0]
    for sign in (-1, 1):
        tried.append((sign * root - y) / (2 * x))

    def value(l):
        square = q2 * l * l + q1 * l + h22
        return d * l + s * math.sqrt(max(0.0, square))
    l = min([l for l in tried if 0 <= l <= 1], key=value)
    return torch.tensor([l, 1 - l]).double()


def test_raco_of_two_is_the_closed_form():
    """Prevents: an iteration that stops beside the minimum, RACO without its clip or divided by its
    sum again, CAGrad with a clip."""
    generator, clipped = torch.Generator().manual_seed(0), 0
    for k in range(200):
        g = torch.randn(2, 3, generator=generator).double()
        g[1] *= 0.1 + k / 50
        alpha = torch.rand(2, generator=generator).double() + 0.1
        c = (0.1, 0.4, 0.9)[k % 3]
        w = alpha / alpha.sum()
        gram = g @ g.T
        p = closed_form(gram, w, c)
        clip = torch.minimum(p, w)
        clipped += bool(0 < p.min() and not torch.allclose(p, clip / clip.sum()))
        for rule, share in (("cagrad", p), ("raco", clip)):
            direction = share @ g
            expected = w @ g + c * (w @ g).norm() * direction / direction.norm()
            found = combine(gram, alpha, rule, c) @ g
            torch.testing.assert_close(found, alpha.sum() * expected, atol=1e-6, rtol=1e-6)
    assert clipped > 20


def test_rules_of_many_do_what_they_promise():
    """Prevents: for more than two objectives, a minimum along one edge for that of the simplex: no
    step of CAGrad's length serves the worst served objective better, no mix is shorter than
    MGDA's."""
    generator = torch.Generator().manual_seed(1)
    for k in range(10):
        g = torch.randn(6, 8, generator=generator).double() + 0.3
        alpha = torch.rand(6, generator=generator).double()
        gram = g @ g.T
        mean = alpha @ g / alpha.sum()
        reach = 0.5 * mean.norm()
        best = combine(gram, alpha, "cagrad", 0.5) @ g / alpha.sum() - mean
        torch.testing.assert_close(best.norm(), reach)
        # Others as long, in all directions and in nearly the same one.
        others = torch.randn(5000, 8, generator=generator).double()
        for steps in (others, best + 0.05 * reach * others):
            steps = reach * steps / steps.norm(dim=1, keepdim=True)
            worst = ((mean + steps) @ g.T).min(1).values
            assert worst.max() <= (g @ (mean + best)).min() + 1e-6
        shortest = combine(gram, alpha, "mgda") @ g / alpha.sum()
        assert (g @ shortest).min() >= shortest @ shortest - 1e-4
        assert torch.equal(combine(gram, alpha, "sum"), alpha)
        assert torch.allclose(combine(gram, alpha, "raco", 0.0), alpha)


def test_optimizer_covers_every_parameter_once(model):
    """Prevents: a parameter that is never trained, or trained at two rates, or heads at the
    backbone's rate."""
    optimizer = make_optimizer(model, 1e-5, 4e-4)
    names = {id(p): name for name, p in model.named_parameters()}
    listed = {}
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0
        listed[group["name"]] = [names[id(p)] for p in group["params"]]
    assert sorted(listed["backbone"] + listed["heads"]) == sorted(names.values())
    assert listed["heads"] == [f"heads.{i}.weight" for i in range(3)]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 4e-4]
