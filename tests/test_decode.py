"""decode.py: sampling, batched generation, guided decoding against a plain reference that re-encodes everything."""
import copy
import inspect
import io
import math
import os
import warnings
import zlib

import pytest
import torch

import decode
from data import InputError, OBJECTIVES, PATTERN, Tokenizer, write_json
from decode import generate, guided_decode, parse_weights, sample
from model import GPT, GPTConfig, save_hf
from prm import PRM, save_prm

# A vocabulary so small that random models often meet every kind of boundary.
PIECES = [b"ab", b" cd", b"1", b".", b"\n", b" I", b" x", b"!", b"g"]
USER, END, PAD = 9, 10, 11
NEWLINE, STOPS, DIGIT_OR_INITIAL, LETTER = {4}, {3, 7}, {2, 6}, {8}
NAMES = ("math_accuracy", "math_engagement", "helpfulness", "tutor_engagement")


def random_weights(module, generator):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return module.double()


@pytest.fixture(scope="module")
def toy():
    """-> (policy, prm): tiny random float64 models on the toy vocabulary; the PRM's context is two tokens shorter."""
    ranks = {bytes([b]): b for b in range(256)} | {p: 256 + i for i, p in enumerate(PIECES) if len(p) > 1}
    tokenizer = Tokenizer(PIECES + [b""] * 3, ranks, {"<|user|>": USER, "<|end|>": END, "<|pad|>": PAD}, PATTERN, END, PAD)
    generator = torch.Generator().manual_seed(3)
    config = dict(vocab_size=12, n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=24, init_std=0.2)
    policy = random_weights(GPT(GPTConfig(**config, max_len=50, objectives=NAMES[:2]), generator), generator)
    backbone = GPT(GPTConfig(**config, max_len=48, objectives=()), generator)
    prm = random_weights(PRM(backbone, [OBJECTIVES[name] for name in NAMES], generator), generator)
    prm.scale.copy_(torch.tensor([0.5, 2.0, 3.0, 0.7]))
    policy.tokenizer = backbone.tokenizer = tokenizer
    return policy, prm


def uniform(*key):
    return zlib.crc32(repr(key).encode()) / 2**32


@pytest.fixture
def fixed_draws(monkeypatch):
    """Replace the uniforms in decode.py by a function of (round of `draw`, token, row), so that a reference which works
    row by row sees the same ones. -> a dict; its "offset" is added to every row."""
    place, plain_draw, rand = {"round": -1, "token": 0, "offset": 0}, decode.draw, torch.rand

    def draw(*args, **kwargs):
        place["round"], place["token"] = place["round"] + 1, 0
        return plain_draw(*args, **kwargs)

    def fake(n, *, generator=None, dtype=torch.float64, device=None):
        place["token"] += 1
        return torch.tensor([uniform(place["round"], place["token"] - 1, place["offset"] + r) for r in range(n)], dtype=dtype)
    monkeypatch.setattr(decode, "draw", draw)
    monkeypatch.setattr(torch, "rand", fake)
    return place


# -- sampling

P = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)


def drawn(us, logits=P.log(), **kwargs):
    us = torch.tensor(us, dtype=torch.float64)
    return sample(logits.expand(len(us), -1), us, **kwargs).tolist()


def test_sample_inverts_the_distribution_function():
    """Prevents: tokens drawn with other probabilities than the model's: the steps of the function are at .2 and .7."""
    assert drawn([0.0, 0.199, 0.201, 0.699, 0.701, 0.999999]) == [0, 0, 1, 1, 2, 2]


def test_sample_greedy():
    """Prevents: temperature 0 that divides by zero or still draws."""
    logits = torch.tensor([[0.0, 3.0, -1.0], [9.0, 3.0, -1.0]])
    assert sample(logits, torch.tensor([0.999, 0.999]), temperature=0).tolist() == [1, 0]


def test_sample_temperature():
    """Prevents: logits multiplied by the temperature: at 0.5 probabilities are squared, at 2 square-rooted."""
    squares = [0.04 / 0.38, 0.29 / 0.38]
    assert drawn([squares[0] - 1e-6, squares[0] + 1e-6, squares[1] - 1e-6, squares[1] + 1e-6], temperature=0.5) == [0, 1, 1, 2]
    roots = [math.sqrt(p) for p in (0.2, 0.5, 0.3)]
    assert drawn([roots[0] / sum(roots) - 1e-6, roots[0] / sum(roots) + 1e-6], temperature=2.0) == [0, 1]


def test_sample_top_k():
    """Prevents: an excluded token drawn, or kept ones not renormalised: of {.5, .3} the first has .625."""
    assert drawn([0.0, 0.6249, 0.6251, 0.999999], top_k=2) == [1, 1, 2, 2]
    assert drawn([0.0, 0.999999], top_k=1) == [1, 1]
    assert drawn([0.1, 0.3, 0.9], top_k=0) == drawn([0.1, 0.3, 0.9], top_k=3) == drawn([0.1, 0.3, 0.9], top_k=99)


def test_sample_top_p():
    """Prevents: the token that crosses top_p dropped (an empty set for small p), or one token too many kept."""
    assert drawn([0.0, 0.999999], top_p=0.01) == [1, 1]
    assert drawn([0.0, 0.999999], top_p=0.49) == [1, 1]
    assert drawn([0.0, 0.6249, 0.6251, 0.999999], top_p=0.51) == [1, 1, 2, 2]
    assert set(drawn([0.0, 0.5, 0.6, 0.85, 0.999999], top_p=0.81)) == {0, 1, 2}
    assert len(set(drawn([0.0, 0.5, 0.7, 0.999999], torch.zeros(1, 4, dtype=torch.float64), top_p=0.5))) == 2  # of 4 quarters


def test_sample_top_p_after_temperature():
    """Prevents: top_p applied to the untempered distribution: at temperature 0.5 the first token alone has .66."""
    assert drawn([0.0, 0.999999], temperature=0.5, top_p=0.6) == [1, 1]


def test_sample_frequencies():
    """Prevents: a bias anywhere in the chain top-k, temperature, inverse: 20,000 draws within 4 standard errors."""
    n = 20_000
    logits = torch.tensor([0.3, -1.0, 1.2, 0.1, -5.0])
    p = torch.softmax(logits[:4] / 0.8, 0)
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    counts = sample(logits.expand(n, -1), u, temperature=0.8, top_k=4).bincount(minlength=5)
    assert counts[4] == 0
    for c, q in zip(counts[:4].tolist(), p.tolist()):
        assert abs(c - n * q) < 4 * math.sqrt(n * q * (1 - q))


def test_sample_never_draws_what_has_no_probability():
    """Prevents: u = 0 or u just below 1 that falls on a token outside the kept set."""
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    for u in (0.0, 1 - 2**-24):
        for options in ({}, {"top_k": 3}, {"top_p": 0.999}):
            assert sample(logits, torch.tensor([u]), **options).item() in (1, 2)


def test_sample_computes_in_the_precision_it_needs():
    """Prevents: a distribution function summed in bfloat16, which stops growing long before 1; float64 rounded to float32."""
    logits, u = torch.zeros(5, 3000).bfloat16(), torch.tensor([0.0, 0.25, 0.5, 0.75, 0.999])
    assert sample(logits, u).tolist() == sample(logits.float(), u).tolist() == [0, 750, 1500, 2250, 2997]
    assert drawn([0.2 - 1e-10, 0.2 + 1e-10]) == [0, 1]


# -- generation

def prompts_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 10, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("batch_size", [512, 4])
def test_ragged_batch_equals_one_by_one(toy, fixed_draws, batch_size):
    """Prevents: a row that depends on its neighbours (padding, positions, a mask, rows that stopped before it)."""
    prompts, options = prompts_of(1, 2, 3, 5, 8, 17, 30), dict(weights=[0.3, 0.7], max_new_tokens=14)
    alone = []                                              # batches go by length: in this order row = index
    for i, prompt in enumerate(prompts):
        fixed_draws.update(round=i // batch_size - 1, offset=i % batch_size)
        alone += generate(toy[0], [prompt], **options)
    fixed_draws.update(round=-1, offset=0)
    together = generate(toy[0], prompts, batch_size=batch_size, **options)
    assert together == alone
    assert len({len(r) for r in together}) > 2              # the rows do stop at different places
    fixed_draws.update(round=-1, offset=0)
    shuffled = generate(toy[0], prompts[::-1], batch_size=batch_size, **options)
    assert shuffled == together[::-1]                       # results come back in the order of the prompts


def test_samples_of_a_prompt_equal_separate_rows(toy, fixed_draws):
    """Prevents: a forked prompt whose samples share a row, or come back in another order than prompt by prompt."""
    prompts, options = prompts_of(2, 9), dict(weights=0, max_new_tokens=12)
    fixed_draws.update(round=-1, offset=0)
    forked = generate(toy[0], prompts, samples=3, **options)
    fixed_draws.update(round=-1, offset=0)
    assert forked == generate(toy[0], [prompts[0]] * 3 + [prompts[1]] * 3, **options)
    assert len({tuple(r) for r in forked}) > 2


def test_generate_equals_full_re_encoding(toy, fixed_draws):
    """Prevents: a cache that loses or repeats tokens, or a step that conditions on the wrong position."""
    prompt, = prompts_of(6)
    found, = generate(toy[0], [prompt], weights=1, max_new_tokens=12, temperature=0.9, top_k=5)
    ids = []
    while len(ids) < 12 and END not in ids:
        logits = toy[0].logits(toy[0](torch.tensor([prompt + ids])), 1)[0, -1]
        ids.append(plain_choice(logits, uniform(0, len(ids), 0), 0.9, 5))
    assert found == ids


def test_generate_ends_with_eos(toy):
    """Prevents: EOS left out of the response (it is scored in training), or tokens after it."""
    found = generate(toy[0], prompts_of(*[4] * 40), max_new_tokens=20, generator=torch.Generator().manual_seed(1))
    ended = [r for r in found if END in r]
    assert 0 < len(ended) < 40
    assert all(r.index(END) == len(r) - 1 for r in ended)
    assert all(len(r) == 20 for r in found if END not in r)


def test_generate_limit_per_prompt(toy):
    """Prevents: one prompt's limit applied to all, off by one, or lost beyond the first batch."""
    policy = copy.deepcopy(toy[0])
    with torch.no_grad():
        for head in policy.heads:
            head.weight[END] = 0
            head.weight[0] *= 100                           # some token always wins over EOS
    limits = [1, 7, 3, 20, 2]
    found = generate(policy, prompts_of(4, 9, 2, 5, 5), max_new_tokens=limits, temperature=0, batch_size=2)
    assert all(len(r) == n or r[-1] == END for r, n in zip(found, limits))
    assert any(len(r) == n > 1 for r, n in zip(found, limits))
    assert all(0 < len(r) <= n for r, n in zip(found, limits))


def test_generate_stops_at_the_context(toy):
    """Prevents: positions beyond the context, where the model was never trained: prompt and response fit into 50."""
    found = generate(toy[0], prompts_of(*[44] * 12, 49), max_new_tokens=30, generator=torch.Generator().manual_seed(0))
    assert {len(r) for r in found[:-1] if END not in r} == {6}
    assert len(found[-1]) == 1


def test_generate_reports_its_progress(toy):
    """Prevents: a bar that stands still, or counts prompts where it promised responses."""
    seen = []
    generate(toy[0], prompts_of(2, 3, 4), max_new_tokens=2, samples=2, batch_size=4, progress=seen.append)
    assert seen == [4, 2]
    generate(toy[0], prompts_of(2, 3), max_new_tokens=2, samples=3, batch_size=2, progress=seen.append)
    assert seen == [4, 2, 3, 3]                             # a batch holds at least all samples of one prompt


@pytest.mark.parametrize("prompts, message", [([[1], []], "prompt 1 is empty"), ([[1], [1] * 50], "prompt 1 has 50 tokens"),
                                              ([[1] * 60], "prompt 0 has 60 tokens, the context has room for 50")])
def test_generate_refuses_prompts_that_do_not_fit(toy, prompts, message):
    """Prevents: a prompt cut in silence, or a crash deep inside attention."""
    with pytest.raises(InputError, match=message):
        generate(toy[0], prompts, max_new_tokens=3)


def test_generate_repeats_with_the_generator(toy):
    """Prevents: draws from the global generator: same seed, same tokens; another seed, others."""
    run = lambda seed: generate(toy[0], prompts_of(4, 5), max_new_tokens=15, generator=torch.Generator().manual_seed(seed))
    first = run(1)
    torch.manual_seed(99)
    assert run(1) == first != run(2)


# -- guided: the reference

def plain_choice(logits, u, temperature, top_k):
    """One token by the definition: softmax over the top_k, likeliest first, inverse of the distribution function."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i].item())[:top_k]
    weights = [math.exp((logits[i].item() - logits[order[0]].item()) / temperature) for i in order]
    if top_k >= len(logits):                                # nothing cut: the vocabulary's own order
        order, weights = list(range(len(logits))), [w for _, w in sorted(zip(order, weights))]
    total = 0.0
    for token, w in zip(order, weights):
        total += w / sum(weights)
        if u < total:
            return token
    return order[-1]


def step_is_over(ids, boundary):
    last, before, earlier = ids[-1], ids[-2] if len(ids) > 1 else None, ids[-3] if len(ids) > 2 else None
    if last == END or (last in NEWLINE and boundary != "turn"):
        return True
    inside_a_word = before in DIGIT_OR_INITIAL or (before in LETTER and earlier in STOPS)       # 3.14, e.g.
    return boundary == "sentence" and last in STOPS and not inside_a_word


def reference(toy, prompts, *, boundary, K, weights, guide, max_new_tokens, temperature=1.0, top_k=50, first_round=0):
    """Guided best-of-K without caches, batches or padding: every candidate's every token re-encodes everything.
    -> list of (ids, [(candidates, scores, winner)])"""
    policy, prm = toy
    answers = []
    for b, prompt in enumerate(prompts):
        answer, steps, budget = [], [], min(max_new_tokens, 48 - len(prompt))
        while len(answer) < budget and END not in answer:
            candidates, scores = [], []
            for k in range(K):
                ids = []
                while not ids or not (step_is_over(ids, boundary) or len(answer) + len(ids) == budget):
                    logits = policy.logits(policy(torch.tensor([prompt + answer + ids])), weights)[0, -1]
                    ids.append(plain_choice(logits, uniform(first_round + len(steps), len(ids), b * K + k), temperature, top_k))
                raw = prm(torch.tensor([prompt + answer + ids]))[0, -1] / prm.scale
                mine = {"newline": [0, 1], "sentence": [2], "turn": [3]}[boundary] if guide == "unified" else \
                    [NAMES.index(guide)]
                candidates.append(ids)
                scores.append(sum(raw[i].item() for i in mine) / len(mine))
            winner = max(range(K), key=scores.__getitem__)
            answer = answer + candidates[winner]
            steps.append((candidates, scores, winner))
        answers.append((answer, steps))
    return answers


def assert_same(found, expected):
    assert [g.ids for g in found] == [ids for ids, _ in expected]
    for g, (_, steps) in zip(found, expected):
        assert [s.candidates for s in g.steps] == [candidates for candidates, _, _ in steps]
        for s, (candidates, scores, winner) in zip(g.steps, steps):
            assert s.scores == pytest.approx(scores, abs=1e-9)
            assert s.candidates[s.winner] == candidates[winner]      # equal candidates tie up to the last bit


@pytest.mark.parametrize("boundary, guide, K, max_new_tokens", [
    ("newline", "math_accuracy", 4, 20), ("newline", "unified", 3, 13), ("sentence", "helpfulness", 3, 20),
    ("sentence", "unified", 2, 7), ("turn", "tutor_engagement", 3, 16), ("newline", "math_engagement", 1, 20)])
@torch.no_grad()
def test_guided_equals_reference(toy, fixed_draws, boundary, guide, K, max_new_tokens):
    """Prevents: everything that caches can get wrong: no rollback after ragged scoring, a loser's cache or hidden state
    promoted, a score read one token early, candidates that do not start from the same state, a prompt's neighbours."""
    options = dict(boundary=boundary, K=K, weights=[0.4, 0.6], guide=guide, max_new_tokens=max_new_tokens, temperature=1.1)
    prompts = prompts_of(3, 9, 1, 14, seed=1)
    found = guided_decode(*toy, prompts, **options)
    assert_same(found, reference(toy, prompts, **options))
    assert len({len(g.ids) for g in found}) > 1


@torch.no_grad()
def test_guided_reference_covers_the_hard_cases(toy, fixed_draws):
    """Prevents: a reference test that proves nothing: it must see many steps, ragged candidates, later winners."""
    found = guided_decode(*toy, prompts_of(3, 9, 1, 14, seed=1), boundary="newline", K=4, weights=[0.4, 0.6],
                          guide="math_accuracy", max_new_tokens=20, temperature=1.1)
    steps = [s for g in found for s in g.steps]
    assert max(len(g.steps) for g in found) >= 3
    assert {s.winner for s in steps} >= {0, 1, 2}
    assert any(len({len(c) for c in s.candidates}) > 2 for s in steps)
    assert any(max(map(len, s.candidates)) > len(s.candidates[s.winner]) for s in steps[:-1])
    assert any(c[-1] == END and k != s.winner for s in steps for k, c in enumerate(s.candidates))


@torch.no_grad()
def test_guided_top_k_and_float_cut(toy, fixed_draws):
    """Prevents: top_k lost on the way into the candidates."""
    options = dict(boundary="newline", K=3, weights=0, guide="math_accuracy", max_new_tokens=12, top_k=3)
    prompts = prompts_of(5, 2, seed=4)
    assert_same(guided_decode(*toy, prompts, **options), reference(toy, prompts, **options))


@torch.no_grad()
def test_guided_stops_at_the_shorter_context(toy, fixed_draws):
    """Prevents: decoding past the PRM's context (48, the policy's is 50), or a budget shared between prompts."""
    options = dict(boundary="newline", K=3, weights=1, guide="math_engagement", max_new_tokens=20)
    prompts = prompts_of(40, 47, 4, 44, seed=3)
    found = guided_decode(*toy, prompts, **options)
    assert_same(found, reference(toy, prompts, **options))
    assert len(found[1].ids) == 1 and all(len(p) + len(g.ids) <= 48 for p, g in zip(prompts, found))


@pytest.mark.parametrize("K, boundary", [(1, "turn"), (3, "turn"), (3, "newline")])
@torch.no_grad()
def test_turns_continue_the_state(toy, fixed_draws, K, boundary):
    """Prevents: the student's words fed to one row only, fed twice, or behind a loser's cache: three turns with a carried
    state equal re-encoding the whole conversation."""
    guide = "tutor_engagement" if boundary == "turn" else "unified"
    options = dict(boundary=boundary, K=K, weights=[0.5, 0.5], guide=guide, max_new_tokens=6)
    texts, new, state = [[], []], prompts_of(5, 3, seed=5), None
    for turn in range(3):
        texts = [t + n for t, n in zip(texts, new)]
        first_round = fixed_draws["round"] + 1
        found = guided_decode(*toy, new, state=state, **options)
        assert_same(found, reference(toy, texts, first_round=first_round, **options))
        state = found[0].state
        texts = [t + g.ids for t, g in zip(texts, found)]
        new = prompts_of(3 + turn, 1 + 3 * turn, seed=6 + turn)
    assert state.policy.lengths.tolist() == [len(t) for t in texts]
    assert state.prm.lengths.tolist() == state.policy.lengths.tolist()


@torch.no_grad()
def test_no_token_is_fed_twice(toy):
    """Prevents: committed text encoded again: policy and PRM read each prompt, each candidate and each reply once."""
    fed = {"policy": 0, "prm": 0}
    hooks = [m.register_forward_pre_hook(lambda _, args, name=name: fed.update({name: fed[name] + args[0].numel()}))
             for name, m in (("policy", toy[0]), ("prm", toy[1].backbone))]
    state, K = None, 4
    for new in prompts_of(7, 5, seed=2):
        fed.update(policy=0, prm=0)
        found, = guided_decode(*toy, [new], boundary="newline", K=K, guide="math_accuracy", max_new_tokens=15, state=state,
                               generator=torch.Generator().manual_seed(3))
        state = found.state
        tokens = [len(c) for s in found.steps for c in s.candidates]
        widest = sum(K * max(map(len, s.candidates)) for s in found.steps)      # candidates are padded for the PRM
        assert len(found.steps) > 1
        assert fed == {"policy": len(new) + sum(tokens), "prm": len(new) + widest}
    for hook in hooks:
        hook.remove()


def test_what_has_ended_is_fed_no_more(toy):
    """Prevents: forward passes for answers that are over or for a last token that nothing follows, or graphs of any of them."""
    fed, prompts, options = [], prompts_of(*[4] * 6), dict(max_new_tokens=12, generator=torch.Generator().manual_seed(1))
    hook = toy[0].register_forward_pre_hook(lambda _, args: fed.append((args[0].numel(), torch.is_grad_enabled())))
    found = generate(toy[0], prompts, **options)
    assert len({len(r) for r in found}) > 1 and sum(n for n, _ in fed) == sum(4 + len(r) - 1 for r in found)
    tokens, fed[:] = fed + [], []
    found = guided_decode(*toy, prompts, boundary="newline", K=1, guide="math_accuracy", **options)
    assert len({len(g.steps) for g in found}) > 1 and sum(n for n, _ in fed) == sum(4 + len(g.ids) for g in found)
    assert not any(graph for _, graph in tokens + fed)
    hook.remove()


@torch.no_grad()
def test_one_candidate_is_plain_generation(toy):
    """Prevents: step borders that change the distribution: K = 1 draws exactly what `generate` draws."""
    prompt = prompts_of(6, seed=1)
    draw = lambda: torch.Generator().manual_seed(2)
    guided, = guided_decode(*toy, prompt, boundary="newline", K=1, max_new_tokens=25, generator=draw())
    plain, = generate(toy[0], prompt, max_new_tokens=25, generator=draw())
    assert guided.ids == plain and len(guided.steps) > 1
    own, other = (inspect.signature(f).parameters for f in (generate, guided_decode))
    assert all(own[k].default == other[k].default for k in ("weights", "temperature", "top_k", "top_p"))


@torch.no_grad()
def test_steps_and_text_belong_to_the_ids(toy):
    """Prevents: committed text and ids that drift apart: ids are the winners joined, text is their decoding."""
    found = guided_decode(*toy, prompts_of(*range(1, 13)), boundary="sentence", K=3, guide="helpfulness", max_new_tokens=8,
                          generator=torch.Generator().manual_seed(1))
    assert {g.ids[-1] == END for g in found} == {True, False}
    for g in found:
        assert g.ids == sum((s.candidates[s.winner] for s in g.steps), [])
        assert g.text == toy[0].tokenizer.decode(g.ids)
        assert all(s.scores[s.winner] == max(s.scores) for s in g.steps)
        assert all(END not in s.candidates[s.winner] for s in g.steps[:-1])


@pytest.mark.parametrize("boundary, guide", [("newline", "unified"), ("sentence", "unified"), ("turn", "unified")])
@torch.no_grad()
def test_steps_end_where_the_labels_end(toy, boundary, guide):
    """Prevents: decoding that cuts elsewhere than the PRM's training labels, such as past an EOS behind a digit."""
    tokenizer = toy[0].tokenizer
    found = guided_decode(*toy, prompts_of(*[4] * 80), boundary=boundary, K=2, guide=guide, max_new_tokens=15,
                          generator=torch.Generator().manual_seed(1))
    for ids in (c for g in found for s in g.steps for c in s.candidates):
        assert tokenizer.step_ends(ids, boundary) == [len(ids) - 1]
    assert {ids[-2:][0] in DIGIT_OR_INITIAL for g in found for s in g.steps for ids in s.candidates if ids[-1] == END} == \
        {True, False}


def test_boundaries_may_be_masks(toy):
    """Prevents: a boundary of one's own that is refused, or cuts elsewhere than the one it spells out."""
    decode_with = lambda boundary: guided_decode(*toy, prompts_of(3, 5), boundary=boundary, K=2, guide="math_accuracy",
                                                 max_new_tokens=12, generator=torch.Generator().manual_seed(0))
    by_name, by_masks = decode_with("newline"), decode_with(toy[0].tokenizer.boundary_masks("newline"))
    assert [g.ids for g in by_name] == [g.ids for g in by_masks] and max(len(g.steps) for g in by_name) > 1


def test_a_model_without_a_tokenizer_knows_no_boundary(toy, monkeypatch):
    """Prevents: a named boundary that is silently none at all."""
    monkeypatch.setattr(toy[0], "tokenizer", None)
    with pytest.raises(InputError, match="no tokenizer"):
        decode.stop_masks(toy[0], "newline")
    masks = decode.stop_masks(toy[0], "turn")
    assert [m.shape for m in masks] == [(13,)] * 4 and not any(bool(m.any()) for m in masks)


def test_bare_checkpoints_are_guided_too():
    """Prevents: models without a tokenizer, padded to different sizes, that are refused; an id of theirs taken for the end of
    the turn; a first token of a step that is judged as if the vocabulary's last stood before it."""
    generator = torch.Generator().manual_seed(0)
    sizes = dict(n_layer=1, n_head=1, n_kv_head=1, d_model=8, d_ff=8, max_len=32)
    policy = GPT(GPTConfig(6, **sizes), generator)
    prm = PRM(GPT(GPTConfig(7, **sizes, objectives=()), generator), [OBJECTIVES["math_accuracy"]], generator)
    masks = torch.zeros(4, 7, dtype=torch.bool)
    masks[1], masks[2, 5] = True, True                      # every token is a stop, but for one behind the last id
    found = guided_decode(policy, prm, [[1, 2]] * 8, boundary=masks, K=2, max_new_tokens=6, generator=generator)
    assert all(len(g.ids) == 6 and g.text == "" for g in found) and {i for g in found for i in g.ids[:-1]} == set(range(6))
    assert all(len(c) == 1 for g in found for s in g.steps for c in s.candidates)


# -- guided: refusals

OPTIONS = dict(boundary="newline", guide="math_accuracy", max_new_tokens=5)


@pytest.mark.parametrize("K", [0, -1])
def test_guided_refuses_no_candidates(toy, K):
    """Prevents: an empty argmax deep inside the loop."""
    with pytest.raises(InputError, match="K must be at least 1"):
        guided_decode(*toy, [[1]], K=K, **OPTIONS)


def test_guided_temperature_zero_needs_one_candidate(toy):
    """Prevents: five equal candidates scored five times; the answer is the greedy one."""
    with pytest.warns(UserWarning, match="K = 1") as told:
        found, = guided_decode(*toy, prompts_of(5), K=4, temperature=0, **OPTIONS)
    assert all(len(s.candidates) == 1 for s in found.steps) and told[0].filename == __file__
    with warnings.catch_warnings():                         # one candidate was asked for: nothing to warn of
        warnings.simplefilter("error")
        assert [g.ids for g in guided_decode(*toy, prompts_of(5), K=1, temperature=0, **OPTIONS)] == [found.ids]
    assert [found.ids] == generate(toy[0], prompts_of(5), max_new_tokens=5, temperature=0)
    with pytest.raises(InputError, match="temperature"):
        guided_decode(*toy, [[1]], temperature=-0.5, **OPTIONS)


def test_guided_refuses_scores_that_are_not_finite(toy):
    """Prevents: argmax over NaN, which picks a candidate without a reason; the message names the step."""
    policy, prm = toy
    broken, calls = copy.deepcopy(prm), []

    def spoil(module, args, scores):
        calls.append(1)
        return scores * (math.nan if len(calls) > 2 else 1)          # the prompt and the first step are fine
    broken.register_forward_hook(spoil)
    with pytest.raises(InputError, match="step 2: the PRM's scores are not finite"):
        guided_decode(policy, broken, prompts_of(4, seed=2), boundary="newline", guide="math_accuracy", max_new_tokens=40,
                      generator=torch.Generator().manual_seed(3))


def test_guided_refuses_another_tokenizer(toy):
    """Prevents: a PRM that reads the policy's ids as other words."""
    policy, prm = toy
    other = copy.deepcopy(prm)
    other.backbone.tokenizer.pieces[0] = b"zz"
    with pytest.raises(InputError, match="different tokenizers"):
        guided_decode(policy, other, [[1]], **OPTIONS)
    small = PRM(GPT(GPTConfig(11, n_layer=1, n_head=1, n_kv_head=1, d_model=8, d_ff=8, objectives=())), [OBJECTIVES["math_accuracy"]])
    with pytest.raises(InputError, match="different tokenizers"):
        guided_decode(policy, small, [[1]], **OPTIONS)


@pytest.mark.parametrize("prompts, message", [([[]], "empty"), ([[1] * 48], "48 tokens, the context has room for 48")])
def test_guided_refuses_prompts_that_do_not_fit(toy, prompts, message):
    """Prevents: a prompt that fits the policy but not the PRM."""
    with pytest.raises(InputError, match=message):
        guided_decode(*toy, prompts, **OPTIONS)


def test_guided_refuses_turns_that_do_not_fit(toy):
    """Prevents: a conversation that outgrows the context, or a state for other conversations."""
    found, = guided_decode(*toy, [[1] * 40], **OPTIONS)
    room = 48 - 40 - len(found.ids)
    with pytest.raises(InputError, match=f"prompt 0 has {room} tokens, the context has room for {room}"):
        guided_decode(*toy, [[1] * room], state=found.state, **OPTIONS)
    with pytest.raises(InputError, match="holds 1 conversations, 2"):
        guided_decode(*toy, [[1], [2]], state=found.state, **OPTIONS)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_guided_refuses_another_K_than_the_states(toy, K):
    """Prevents: rows of the carried caches read as if they belonged to other candidates or other prompts."""
    found = guided_decode(*toy, [[1, 2], [3]], K=3, **OPTIONS)
    with pytest.raises(InputError, match=f"K = 3 candidates, not {K}"):
        guided_decode(*toy, [[1], [2]], K=K, state=found[0].state, **OPTIONS)


def test_guided_refuses_an_unknown_guide(toy):
    """Prevents: guidance by nothing; the message names what there is."""
    with pytest.raises(InputError, match="no PRM output 'honesty'.*math_accuracy"):
        guided_decode(*toy, [[1]], boundary="newline", guide="honesty", max_new_tokens=5)


# -- command line

def test_parse_weights():
    """Prevents: weights given to the wrong head; names not mentioned weigh nothing."""
    assert parse_weights("b=0.3, a=0.7", ["a", "b", "c"]) == [0.7, 0.3, 0.0]
    assert parse_weights("c=2", ["a", "b", "c"]) == [0.0, 0.0, 2.0]


@pytest.mark.parametrize("text, message", [
    ("d=1", "no 'd' here.*a, b"), ("a", "'a' is not NAME=NUMBER"), ("a=x", "'a=x' is not NAME=NUMBER"),
    ("a=1,b=1, a=2", "'a' is given twice"),
    ("a=-1,b=2", "non-negative"), ("a=0,b=0", "positive sum"), ("a=nan", "non-negative"), ("a=inf", "non-negative"),
    ("", "positive sum")])
def test_parse_weights_refuses(text, message):
    """Prevents: unknown, negative, infinite or vanishing weights that give NaN logits."""
    with pytest.raises(InputError, match=f"^--weights: .*{message}"):
        parse_weights(text, ["a", "b"])


@pytest.fixture(scope="module")
def tiny_run(gpt, tmp_path_factory):
    """A run directory as decode.py needs it, of random models."""
    run = tmp_path_factory.mktemp("run")
    prm = PRM(gpt.with_heads(()), [OBJECTIVES[name] for name in NAMES[:2]], torch.Generator().manual_seed(0))
    save_hf(gpt, run / "mah_dpo")
    save_prm(prm, run / "prm")
    write_json(str(run / "config.json"), {"objectives": [vars(OBJECTIVES[name]) for name in NAMES[:2]], "temperature": 0.7})
    return str(run)


def test_main_shows_candidates_and_winner(tiny_run, capsys):
    """Prevents: a command that hides the algorithm: K scored candidates per step, the best one marked, then the text."""
    argv = [tiny_run, "--prompt", "4 + 5 - 2 = ?", "--k", "3", "--max-new-tokens", "12", "--guide", "math_engagement",
            "--weights", "math_accuracy=0.7,math_engagement=0.3"]
    decode.main(argv)
    first = capsys.readouterr().out
    lines = first.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("step ")]
    assert [lines[i] for i in starts] == [f"step {n}" for n in range(1, len(starts) + 1)] and starts[0] == 0
    for i in starts:
        shown = lines[i + 1:i + 4]
        scores = [float(line[5:13]) for line in shown]
        marked = [k for k, line in enumerate(shown) if line.startswith("  -> ")]
        assert len(marked) == 1 and scores[marked[0]] == max(scores)
    decode.main(argv)
    assert capsys.readouterr().out == first                 # --seed defaults to 0: the same again


@pytest.fixture
def asked(monkeypatch):
    """What decode.main asks of guided_decode; the answer is always "7", ended or cut off in turns."""
    calls = []

    def answer(model, prm, prompts, **options):
        calls.append(options | {"prompts": prompts, "outputs": prm.names})
        ids = model.tokenizer.encode("7") + [model.tokenizer.eos_id] * (len(calls) % 2)
        return [decode.Guided(ids, "7", [], "the state")]
    monkeypatch.setattr(decode, "guided_decode", answer)
    return calls


@pytest.mark.parametrize("argv, weights, guide, temperature", [
    ([], [1, 1], "math_accuracy", 0.7), (["--guide", "unified"], [1, 1], "unified", 0.7),
    (["--weights", "math_engagement=3,math_accuracy=1", "--temperature", "0.3"], [1, 3], "math_engagement", 0.3),
    (["--weights", "math_engagement=3", "--guide", "math_accuracy"], [0, 3], "math_accuracy", 0.7),
    (["--prm", "PRM"], [1, 1], "unified", 0.7), (["--prm", "PRM", "--guide", "math_engagement"], [1, 1], "math_engagement", 0.7)])
def test_main_derives_what_is_not_said(tiny_run, gpt, asked, tmp_path, argv, weights, guide, temperature):
    """Prevents: an option that is ignored, or a default that is not what --help says: the guide follows the heaviest head, the
    weights the guide's domain, the temperature the run."""
    save_prm(PRM(gpt.with_heads(()), [OBJECTIVES["math_engagement"]], torch.Generator().manual_seed(0)), tmp_path)
    decode.main([tiny_run, "--prompt", "2 + 3 = ?", *(str(tmp_path) if a == "PRM" else a for a in argv)])
    call, = asked
    assert (call["weights"], call["guide"], call["temperature"]) == (weights, guide, temperature)
    assert (call["K"], call["max_new_tokens"], call["boundary"], call["state"]) == (5, 64, "newline", None)
    assert call["outputs"] == (["math_engagement"] if "PRM" in argv else ["math_accuracy", "math_engagement"])
    assert call["generator"].initial_seed() == 0


def test_main_closes_an_answer_that_was_cut_off(tiny_run, gpt, asked, monkeypatch, capsys):
    """Prevents: a turn without its end, or with two, before the user's next words."""
    monkeypatch.setattr("sys.stdin", io.StringIO("2 + 3 = ?\n4 - 2 = ?\n1 + 1 = ?\n"))
    decode.main([tiny_run, "--seed", str(2**31 - 1)])
    second, third = (gpt.tokenizer.encode_turn(text) for text in ("4 - 2 = ?", "1 + 1 = ?"))
    assert [call["prompts"] for call in asked[1:]] == [[second], [[gpt.tokenizer.eos_id] + third]]
    assert {call["generator"].initial_seed() for call in asked} == {2**31 - 1}
    assert [call["state"] for call in asked] == [None, "the state", "the state"] and capsys.readouterr().out == "7\n" * 3


def test_domain_mix():
    """Prevents: heads of another domain in the mix, or no head at all where there is only one."""
    assert decode.domain_mix(["math_accuracy", "honesty", "math_engagement"], "math", OBJECTIVES.values()) == [1, 0, 1]
    assert decode.domain_mix(["policy"], "math", OBJECTIVES.values()) == [1] and decode.domain_mix(["honesty", "policy"], "math", OBJECTIVES.values()) == [0, 0]


def test_main_talks_over_several_turns(tiny_run, gpt, capsys, monkeypatch):
    """Prevents: a conversation from standard input whose second line starts again from nothing."""
    fed = []
    plain = decode.guided_decode
    monkeypatch.setattr(decode, "guided_decode", lambda model, prm, prompts, **kw: fed.append((prompts[0], kw["state"])) or
                        plain(model, prm, prompts, **kw))
    monkeypatch.setattr("sys.stdin", io.StringIO("2 + 3 = ?\n4 - 2 = ?\n"))
    decode.main([tiny_run, "--guide", "unified", "--k", "2", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.count("step 1\n") == 2
    assert fed[0][1] is None and fed[1][1] is not None
    turn = gpt.tokenizer.encode_turn("4 - 2 = ?")                     # the new words alone, behind a closed answer
    assert fed[1][0] in (turn, [gpt.tokenizer.eos_id] + turn)


@pytest.mark.parametrize("argv, message", [
    (["--guide", "cleverness"], "unknown objective 'cleverness'"), (["--guide", "honesty"], "unknown objective 'honesty'"),
    (["--weights", "honesty=1"], "no 'honesty' here"), (["--policy", "nothing"], "nothing/config.json: no such file"),
    (["--prompt", "1 + " * 100], "room for 128 with the answer; shorten the prompt"), (["--prompt", "x", "--k", "0"], "K must be"),
    (["--seed", "-1"], "--seed -1 is out of range"), (["--seed", str(2**31)], "--seed 2147483648 is out of range")])
def test_main_refuses(tiny_run, argv, message):
    """Prevents: tracebacks, or an answer by another head or guide than the one asked for."""
    with pytest.raises(InputError, match=message):
        decode.main([tiny_run, "--prompt", "2 + 3 = ?", *argv])


def test_main_refuses_a_directory_that_is_no_run(tmp_path):
    """Prevents: a traceback for a mistyped run directory."""
    with pytest.raises(InputError, match="config.json: no such file"):
        decode.main([os.path.join(tmp_path, "nowhere"), "--prompt", "x"])
    for other in ([], {"objectives": ["honesty"]}):
        write_json(str(tmp_path / "config.json"), other)
        with pytest.raises(InputError, match="config.json: not the configuration of a run"):
            decode.main([str(tmp_path), "--prompt", "x"])


def test_main_prefers_the_guides_own_prm(tiny_run, gpt, capsys, tmp_path):
    """Prevents: --prm each runs whose specialised model is never read."""
    save_hf(gpt, tmp_path / "mah_dpo")
    save_prm(PRM(gpt.with_heads(()), [OBJECTIVES["math_engagement"]], torch.Generator().manual_seed(0)), tmp_path / "prm_math_engagement")
    write_json(str(tmp_path / "config.json"), {"objectives": [vars(OBJECTIVES[name]) for name in NAMES[:2]], "temperature": 0.7})
    argv = ["--prompt", "2 + 3 = ?", "--max-new-tokens", "3", "--k", "2"]
    decode.main([str(tmp_path), "--guide", "math_engagement", *argv])
    assert "step 1" in capsys.readouterr().out
    with pytest.raises(InputError, match="prm/config.json: no such file"):
        decode.main([str(tmp_path), "--guide", "math_accuracy", *argv])
    with pytest.raises(InputError, match="no unified PRM here"):
        decode.main([str(tmp_path), "--guide", "unified", *argv])


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": 1e-40}, {"top_p": 0.0}, {"top_p": 1.5},
                                     {"max_new_tokens": 0}])
def test_sampling_options_without_a_meaning_are_refused(toy, options):
    """Prevents: top_p = 0 that returns the least likely token, a negative temperature that prefers unlikely ones, a
    tiny one whose quotients overflow, so that NaN decides."""
    with pytest.raises(InputError, match="need temperature >= 0"):
        generate(toy[0], [[1, 2]], **({"max_new_tokens": 4} | options))
    with pytest.raises(InputError, match="need temperature >= 0"):
        guided_decode(*toy, [[1, 2]], **(OPTIONS | options))
    decode.check_sampling(1, 1e-6, 1e-9)                    # as small as each may be


def test_a_full_context_is_refused(toy):
    """Prevents: a limit of 0 read as 'no limit given': garbage at a clamped position instead of an error."""
    with pytest.raises(InputError, match="prompt 1 .*room for 0"):
        decode.check_prompts([[1, 2], [1]], [3, 0])


def test_generate_without_a_tokenizer_runs_to_its_budget(toy, monkeypatch):
    """Prevents: a bare checkpoint (random weights, a benchmark) that cannot generate because it has no EOS."""
    monkeypatch.setattr(toy[0], "tokenizer", None)
    assert [len(r) for r in generate(toy[0], [[1, 2], [3]], max_new_tokens=7, temperature=0.0)] == [7, 7]


def test_parse_weights_defaults():
    """Prevents: --alpha honesty=2 that silences every objective it does not name."""
    assert parse_weights("b=2", ["a", "b"], "--alpha", 1.0) == [1.0, 2.0] and parse_weights("b=2", ["a", "b"]) == [0.0, 2.0]
