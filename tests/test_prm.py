"""prm.py: what labels and losses have beside the exercises, the scorer itself and its files. (The
labels of the verifiable case and of case A and the Bradley-Terry loss are exercises 5 to 7.)"""
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

from data import InputError, OBJECTIVES, pad
from interop.datasets import encode_steps
from interop.score import score_sequences
from mah_dpo import Pair
from model import GPT, GPTConfig, load_safetensors, save_hf, save_safetensors
from prm import (PRM, STEP, STEP_OUTPUT, Labelled, bce_loss, load_prm, matching_steps, mse_loss,
                 pair_scores, save_prm, step_loss, step_scores, worst_mix)

NAMES = ["math_accuracy", "math_engagement", "tutor_engagement"]
OUTPUTS = [OBJECTIVES[name] for name in NAMES]


def backbone(d_model, generator=None, **sizes):
    """A tiny random backbone."""
    config = dict(vocab_size=50, n_layer=1, n_head=2, n_kv_head=2, d_ff=8, objectives=())
    return GPT(GPTConfig(d_model=d_model, **(config | sizes)), generator)


@pytest.fixture(scope="module")
def prm(tokenizer):
    """A tiny random PRM with three outputs, its biases and scales set so that leaving one out
    shows."""
    generator = torch.Generator().manual_seed(1)
    base = backbone(32, generator, vocab_size=tokenizer.n_vocab, n_layer=2, n_head=4, d_ff=40,
                    max_len=64, init_std=0.2)
    model = PRM(base, OUTPUTS, generator)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
        model.scale.copy_(torch.tensor([2.0, 4.0, 0.5]))
    base.tokenizer = tokenizer
    return model


# -- labels

# Responses as letters, for each letter that ends a step its place.
@pytest.mark.parametrize("chosen, rejected, chosen_ends, rejected_ends, expected", [
    ("abcdef", "xyz", [1, 3, 5], [2], [(1, 2), (5, 2)]),     # the rest of the longer one
    ("xyz", "abcdef", [2], [1, 3, 5], [(2, 1), (2, 5)]),
    ("abcd", "xyz", [1, 3], [0, 2], [(1, 0), (3, 2)]),       # the full comparison counts once
    ("abcd", "abx", [1, 3], [1, 2], [(3, 2)]),               # equal prefixes are skipped
    ("acc", "bcc", [0, 2], [0, 2], [(0, 0), (2, 2)])])       # an equal step is no equal prefix
def test_matching_steps(chosen, rejected, chosen_ends, rejected_ends, expected):
    """Prevents: the longer response's remaining steps dropped, or compared with nothing; a full
    comparison that counts twice; a prefix compared with itself, a constant ln 2 in the loss."""
    found = matching_steps(list(chosen), list(rejected), chosen_ends, rejected_ends)
    assert found == expected


# -- losses

def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_mse_hand_value_and_mask():
    """Prevents: unlabelled steps in the mean, and a sum where a mean belongs."""
    scores = torch.tensor([1.0, 2.0, 50.0])
    targets = torch.tensor([0.5, 4.0, -3.0])
    found = mse_loss(scores, targets, torch.tensor([1, 1, 0]))
    assert float(found) == pytest.approx((0.25 + 4) / 2, abs=1e-6)
    nothing = torch.zeros(3, dtype=torch.bool)
    assert float(mse_loss(scores, targets, nothing)) == 0.0


def test_bce_hand_value_and_mask():
    """Prevents: probabilities where logits are expected, swapped targets, unlabelled steps in the
    mean."""
    scores = torch.tensor([0.0, 2.0, -1.0, 9.0])
    targets = torch.tensor([1.0, 0.0, 0.25, 0.0])
    half = 0.25 * log_sigmoid(-1) + 0.75 * log_sigmoid(1)
    expected = -(log_sigmoid(0) + log_sigmoid(-2) + half) / 3
    found = bce_loss(scores, targets, torch.tensor([1, 1, 1, 0]))
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_step_loss_dispatches_by_case():
    """Prevents: the value model trained with BCE (its targets exceed 1) or a judge's labels with
    MSE."""
    nan = math.nan
    scores = torch.tensor([[1.5, 2.0, 0.3],
                           [0.0, -1.0, 0.4],
                           [4.0, 9.0, -0.2]])
    targets = torch.tensor([[1.9, 1.0, nan],
                            [nan, 0.0, nan],
                            [1.0, nan, nan]])
    mse = (0.4 ** 2 + 3.0 ** 2) / 2
    bce = -(log_sigmoid(2.0) + log_sigmoid(1.0)) / 2
    found = step_loss(OUTPUTS, scores, targets)
    assert found.tolist() == pytest.approx([mse, bce, 0.0], abs=1e-5)


def test_parts_of_a_batch_add_up():
    """Prevents: a batch in parts, on several processes say, whose steps weigh by the part that
    they happen to lie in."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 3, generator=generator)
    targets = torch.rand(5, 3, generator=generator)
    targets[0, 0] = math.nan
    targets[:3, 1] = math.nan
    targets[:, 2] = math.nan
    count = (~targets.isnan()).sum(0)
    first = step_loss(OUTPUTS, scores[:3], targets[:3], count)
    rest = step_loss(OUTPUTS, scores[3:], targets[3:], count)
    torch.testing.assert_close(first + rest, step_loss(OUTPUTS, scores, targets))


def test_step_loss_missing_labels_have_no_gradient():
    """Prevents: NaN targets that leak into the gradient (0 * NaN), and unlabelled outputs that
    learn something."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 3, generator=generator).requires_grad_()
    targets = torch.full((4, 3), math.nan)
    assert step_loss(OUTPUTS, scores, targets).tolist() == [0.0] * 3
    targets[0, 0] = 1.2
    targets[2, 1] = 1.0
    losses = step_loss(OUTPUTS, scores, targets)
    losses.sum().backward()
    missed = scores[0, 0].item() - 1.2
    assert losses[0].item() == pytest.approx(missed ** 2)
    assert bool(scores.grad.isfinite().all())
    learnt = scores.grad != 0
    assert torch.equal(learnt, ~targets.isnan())


# -- scorer

def test_forward_is_linear_relu_linear_per_token(prm):
    """Prevents: an output squashed into [0, 1] (values exceed 1), or scores read from the heads'
    logits."""
    ids = torch.tensor([[5, 60, 7, 300]])
    first, second = prm.score[0], prm.score[2]
    inside = F.relu(prm.backbone(ids) @ first.weight.T + first.bias)
    expected = inside @ second.weight.T + second.bias
    assert prm(ids).shape == (1, 4, 3)
    torch.testing.assert_close(prm(ids), expected, atol=1e-6, rtol=1e-5)


def test_cached_equals_uncached(prm):
    """Prevents: a PRM whose scores depend on how the text was cut into pieces, or on a neighbour's
    padding."""
    prm = copy.deepcopy(prm).double()
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 400, (n,), generator=generator) for n in (9, 4, 12)]
    cuts = [3, 1, 3]
    cache = prm.backbone.new_cache(3, 20)
    first, n = pad([row[:cut].tolist() for row, cut in zip(rows, cuts)], 0)
    prm(first, cache)
    cache.rollback(n)
    rest, _ = pad([row[cut:].tolist() for row, cut in zip(rows, cuts)], 0)
    scores = prm(rest, cache)
    for b, row in enumerate(rows):
        alone = prm(row[None])[0, cuts[b]:]
        together = scores[b, :len(alone)]
        torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)


@pytest.fixture
def other_prm(gpt):
    """A PRM with an output whose steps are sentences, and in another order than the objectives'."""
    outputs = [OBJECTIVES["honesty"], OBJECTIVES["math_accuracy"]]
    return PRM(gpt.with_heads(()), outputs, torch.Generator().manual_seed(0))


def test_step_scores_read_the_labelled_tokens(other_prm):
    """Prevents: a score read one token early, from a neighbour's row, or a target under another
    objective's output."""
    targets = [{"math_accuracy": 0.5, "honesty": 1.0}, {"math_engagement": 1.0}]
    rows = [Labelled([5, 6, 7, 8, 9], [1, 4], targets, "train"),
            Labelled([50, 60, 70], [2], [{"math_accuracy": 2.0, "math_engagement": 0.0}], "train")]
    scores, targets = step_scores(other_prm, rows)
    prefixes = [rows[0].ids[:2], rows[0].ids, rows[1].ids]
    expected = torch.stack([other_prm(torch.tensor([ids]))[0, -1] for ids in prefixes])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert str(targets.tolist()) == str([[1.0, 0.5], [math.nan, math.nan], [math.nan, 2.0]])


@torch.no_grad()
def test_pair_scores_compare_matching_steps(other_prm, tokenizer):
    """Prevents: comparisons of case C at the wrong tokens or between different pairs, or full
    responses left out."""
    prompt = tokenizer.encode_chat([{"role": "user", "content": "4 + 5 - 2 = ?"}])
    texts = [("the color is red . the size is tall .",
              "the color is red . the size remains unknown . ok ."),
             ("no idea .", "the job is pilot . the food is rice .")]
    pairs = []
    for i, (chosen, rejected) in enumerate(texts):
        chosen, rejected = (tokenizer.encode(text) + [tokenizer.eos_id]
                            for text in (chosen, rejected))
        pairs.append(Pair("honesty", prompt[i:], chosen, rejected, "train"))
    # Lengths of the steps' ends. Pair 0: step 1 is equal and skipped, steps 2 and 3, then full
    # against full. Pair 1: steps 1 and 2, then full.
    steps = [(0, 10, 10), (0, 11, 12), (0, 11, 13), (1, 3, 5), (1, 4, 10), (1, 4, 11)]
    expected = []
    for i, c, r in steps:
        pair = pairs[i]
        ends = [pair.prompt + pair.chosen[:c], pair.prompt + pair.rejected[:r]]
        expected.append([other_prm(torch.tensor([ids]))[0, -1, 0] for ids in ends])
    chosen, rejected, output = pair_scores(other_prm, pairs)
    found = torch.stack([chosen, rejected], 1)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert output.tolist() == [0] * 6


SCORES = torch.tensor([[6.0, -8.0, 1.0],
                       [2.0, 4.0, 3.0]])                # the scales are 2, 4 and 0.5


def test_guide_single_output(prm):
    """Prevents: a guide that reads another objective's score, or shows it in another unit."""
    values, compared = prm.guide(SCORES, "math_engagement", "newline")
    assert compared.tolist() == [-2.0, 1.0] and values.tolist() == [[-8.0], [4.0]]
    values, compared = prm.guide(SCORES[None], "tutor_engagement", "newline")
    assert compared.tolist() == [[2.0, 6.0]] and values.tolist() == [[[1.0], [3.0]]]


def test_guide_unified_is_the_scaled_mean_of_the_boundarys_domain(prm):
    """Prevents: a unified guide that averages scores of other domains, or in their raw, unequal
    units."""
    values, compared = prm.guide(SCORES, "unified", "newline")
    assert compared.tolist() == [(3 - 2) / 2, 1.0] and values.tolist() == SCORES[:, :2].tolist()
    assert prm.guide(SCORES, "unified", "turn")[1].tolist() == [2.0, 6.0]


def test_guide_of_several_is_their_weighted_mean(prm):
    """Prevents: weights on raw scores of unequal units, or on the wrong output; a mix that depends
    on the sum of its weights, or is wider than what has a weight."""
    for weights in ({"math_engagement": 3.0, "math_accuracy": 1.0},
                    {"math_accuracy": 0.25, "math_engagement": 0.75, "tutor_engagement": 0.0}):
        values, compared = prm.guide(SCORES, weights, "newline")
        assert values.tolist() == SCORES[:, :2].tolist()
        assert compared.tolist() == [(3 - 3 * 2) / 4, (1 + 3 * 1) / 4]


@pytest.mark.parametrize("scores, weights", [
    # Only the second output tells the candidates apart: the mix by which they gain least is the
    # first. Opposed ones cancel, whatever they say beside their differences.
    ([[5.0, 2.0], [5.0, -1.0], [5.0, 0.0]], [1, 0]),
    ([[5.0, -2.0], [3.0, 0.0]], [0.5, 0.5]), ([[9.0, 0.0], [3.0, 2.0]], [0.25, 0.75]),
    ([[1.0, 1.0]], [0.5, 0.5])])
def test_the_worst_served_objective_weighs_most(scores, weights):
    """Prevents: weights of the best served objective, of another sequence's candidates, of scores
    that are compared although they have no zero, an iteration that has not arrived."""
    other = torch.tensor([[-3.0, 1.0]] * len(scores))
    found = worst_mix(torch.stack([torch.tensor(scores), other])).squeeze(1)
    assert found[0].tolist() == pytest.approx(weights, abs=0.05)
    assert found[1].tolist() == pytest.approx([0.5, 0.5])


def test_worst_mix_finds_the_minimum():
    """Prevents: a step that is too long for large scores, or too short for small ones."""
    V = torch.randn(60, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    V[::2, :, 1] = 0.3 * V[::2, :, 2] - V[::2, :, 0]
    V[::3] *= 3
    centred = V - V.mean(1, keepdim=True)

    def value(w):
        return (centred * w).sum(-1).logsumexp(1)
    grid = [(a, b, 20 - a - b) for a in range(21) for b in range(21 - a)]
    least = torch.stack([value(torch.tensor(w).double() / 20) for w in grid]).min(0).values
    assert float((value(worst_mix(V)) - least).max()) < 0.02
    other = worst_mix(0.1 * V)
    assert (value(other) - value(worst_mix(V))).max() > 0


def test_guide_worst_looks_at_the_candidates_of_a_step(prm):
    """Prevents: raw units in the worst mix, one mix for all sequences, outputs of other worlds."""
    better = SCORES[[0, 0]]
    better[1] += torch.tensor([4, 8, 0])
    scores = torch.stack([SCORES, better])
    values, compared = prm.guide(scores, "worst", "newline")
    # First scaled (3, -2), (1, 1): gains -2 and 3 cancel under .6, .4. Then both gain 2.
    assert values.tolist() == scores[..., :2].tolist()
    assert compared[0].tolist() == pytest.approx([1, 1], abs=0.05)
    assert float(compared[1, 1] - compared[1, 0]) == pytest.approx(2)


@pytest.mark.parametrize("guide, boundary", [
    ("honesty", "sentence"), ("unified", "sentence"), ("worst", "sentence"),
    ("nonsense", "newline"), ({"math_accuracy": 1.0, "honesty": 1.0}, "newline"),
    ({"math_accuracy": 0.0}, "newline")])
def test_guide_unknown(prm, guide, boundary):
    """Prevents: guidance by an output that was never trained, or by the mean of nothing (NaN)."""
    with pytest.raises(InputError, match="^no PRM output"):
        prm.guide(torch.zeros(2, 3), guide, boundary)


def test_guide_of_unlike_steps_is_refused(prm):
    """Prevents: an output that is read where none of its steps ends."""
    words = "^the steps of the outputs that guide end differently: newline, turn$"
    with pytest.raises(InputError, match=words):
        prm.guide(SCORES, {"math_accuracy": 1.0, "tutor_engagement": 1.0}, "newline")


def test_weights_come_from_the_generator():
    """Prevents: runs that differ although their seed is the same; scores of the wrong size."""
    def weights(seed, d=8):
        generator = torch.Generator().manual_seed(seed)
        score = PRM(backbone(d), OUTPUTS, generator).score
        return torch.cat([p.detach().flatten() for p in score.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))
    first_map = weights(0, d=64)[:64 * 64]
    assert float(first_map.std()) == pytest.approx(1 / 8, rel=0.05)      # keeps the size of h


@torch.no_grad()
def test_step_correctness_is_read_before_the_last_block(prm):
    """Prevents: an output for training that changes the others, or that the last block has a part
    in."""
    ids = torch.arange(10).view(2, 5)
    taught, shorter = copy.deepcopy(prm), copy.deepcopy(prm)
    taught.names = [*NAMES[:2], STEP]
    del shorter.backbone.layers[-1]
    found = taught(ids)
    torch.testing.assert_close(found[..., :2], prm(ids)[..., :2])
    torch.testing.assert_close(found[..., 2], shorter(ids)[..., 2])


# -- sequences

def test_steps_are_encoded_as_decoding_ends_them(tokenizer):
    """Prevents: steps of published rows that end otherwise than those of guided decoding, where
    the PRM has learnt to be read; an empty step that gets its neighbour's score."""
    prompt = [{"role": "user", "content": "2 + 3 = ?"}]
    head, end = tokenizer.encode_chat(prompt), [tokenizer.eos_id]
    one, line, two = map(tokenizer.encode, ("a 2", "a 2\n", "answer 5"))
    for first in ("a 2", "a 2\n\n"):
        ids, ends = encode_steps(tokenizer, prompt, [first, "answer 5"], "newline")
        assert ids == head + line + two + end
        assert ends == [len(head + line) - 1, len(ids) - 1]
    steps = ["a 2", "answer 5"]
    ids, _ = encode_steps(tokenizer, prompt, steps, "sentence")
    assert ids == head + one + two + end
    ids, ends = encode_steps(tokenizer, prompt, steps, "newline", marker=7)
    assert ids == head + one + [7] + two + [7]
    assert ends == [len(head + one), len(ids) - 1]
    assert encode_steps(tokenizer, prompt, ["a 2", ""], "sentence") is None


@torch.no_grad()
def test_sequences_get_their_own_scores(prm):
    """Prevents: scores in another order than the sequences, of another output or of padding."""
    sequences = [([5, 60, 7, 300], [1, 3]),
                 ([9], [0]),
                 ([8, 7, 6, 5, 4, 3], [0, 2, 5])]
    found = score_sequences(prm, "math_engagement", sequences)
    for (ids, ends), scores in zip(sequences, found, strict=True):
        alone = prm(torch.tensor([ids]))[0, ends, 1]
        assert scores == pytest.approx(alone.tolist(), abs=1e-5)


# -- files

def test_save_and_load_bit_exact(prm, tmp_path):
    """Prevents: a reloaded PRM that scores differently, or without its scales, names or
    tokenizer."""
    save_prm(prm, tmp_path)
    loaded = load_prm(tmp_path)
    ids = torch.tensor([[5, 60, 7, 300, 2]])
    assert loaded.outputs == OUTPUTS and loaded.names == NAMES
    assert torch.equal(loaded.scale, prm.scale)
    assert torch.equal(loaded(ids), prm(ids))
    assert loaded.backbone.tokenizer.pieces == prm.backbone.tokenizer.pieces
    assert load_prm(tmp_path, torch.float64)(ids).dtype == torch.float64


@pytest.mark.parametrize("names", [NAMES, list(OBJECTIVES)])
def test_step_correctness_is_not_saved(tmp_path, names):
    """Prevents: an output for training that guides; an output saved under another's name. A PRM
    of all objectives comes back too."""
    outputs = [OBJECTIVES[name] for name in names]
    taught = PRM(backbone(8, n_layer=2), [*outputs, STEP_OUTPUT])
    save_prm(taught, tmp_path)
    loaded = load_prm(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    assert loaded.names == names and len(loaded.scale) == len(names)
    torch.testing.assert_close(loaded(ids), taught(ids)[..., :-1])


def test_load_refuses_a_policy(gpt, tmp_path):
    """Prevents: a policy's directory taken for a reward model, which would score with random
    weights."""
    save_hf(gpt, tmp_path)
    with pytest.raises(InputError, match="no reward model"):
        load_prm(tmp_path)


@pytest.mark.parametrize("name, tensor", [
    ("score.2.weight", None), ("score.4.weight", torch.zeros(2)),
    ("score.2.weight", torch.zeros(2, 32)), ("score_scale", torch.zeros(2))])
def test_load_names_the_bad_tensor(prm, tmp_path, name, tensor):
    """Prevents: a half-loaded PRM: every tensor of the file is used and every weight comes from
    it. Missing, unknown, of a wrong shape."""
    save_prm(prm, tmp_path)
    path = str(tmp_path / "model.safetensors")
    tensors = {key: value.clone() for key, value in load_safetensors(path).items()}
    tensors[name] = tensor
    if tensor is None:
        del tensors[name]
    save_safetensors(tensors, path)
    with pytest.raises(InputError, match=name):
        load_prm(tmp_path)


RECORD = vars(OUTPUTS[0])


@pytest.mark.parametrize("records", [
    NAMES, "math_accuracy", [RECORD | {"more": "x"}, RECORD, RECORD], [{"name": "math_accuracy"}],
    5, [RECORD]])
def test_load_refuses_broken_records(prm, tmp_path, records):
    """Prevents: outputs without a case or a boundary, met only in the middle of decoding; fewer
    than there are scores. Earlier versions stored names alone."""
    save_prm(prm, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"prm_outputs": records}))
    with pytest.raises(InputError, match="prm_outputs:? |score.2.weight") as e:
        load_prm(tmp_path)
    assert str(e.value).startswith(str(tmp_path))
