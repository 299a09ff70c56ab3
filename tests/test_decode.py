"""decode.py: sampling, batched generation, guided decoding beside a plain reference that encodes
everything again, and the command line. (Most of `sample` is exercise 10.)"""
import copy
import inspect
import io
import json
import math
import os
import zlib

import pytest
import torch

import decode
from data import InputError, OBJECTIVES, PATTERN, Tokenizer, write_json
from decode import domain_mix, generate, guided_decode, parse_weights, sample
from model import GPT, GPTConfig, save_hf
from prm import PRM, save_prm

# A vocabulary so small that random models often meet every kind of boundary.
PIECES = [b"ab", b" cd", b"1", b".", b"\n", b" I", b" x", b"!", b"g"]
USER, END, PAD = 9, 10, 11
NEWLINE, STOPS, DIGIT_OR_INITIAL, LETTER = {4}, {3, 7}, {2, 6}, {8}
NAMES = ("math_accuracy", "math_engagement", "helpfulness", "tutor_engagement")
CONTEXT = 48             # the PRM's; the policy's is two tokens longer


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def outputs(*names):
    return [OBJECTIVES[name] for name in names]


def random_weights(module, generator):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return module.double()


@pytest.fixture(scope="module")
def toy():
    """-> (policy, prm): tiny random float64 models on the toy vocabulary."""
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {piece: 256 + i for i, piece in enumerate(PIECES) if len(piece) > 1}
    specials = {"<|user|>": USER, "<|end|>": END, "<|pad|>": PAD}
    tokenizer = Tokenizer(PIECES + [b""] * 3, ranks, specials, PATTERN, END, PAD)
    generator = seeded(3)
    config = dict(vocab_size=12, n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=24,
                  init_std=0.2)
    policy = GPT(GPTConfig(**config, max_len=CONTEXT + 2, objectives=NAMES[:2]), generator)
    policy = random_weights(policy, generator)
    backbone = GPT(GPTConfig(**config, max_len=CONTEXT, objectives=()), generator)
    prm = random_weights(PRM(backbone, outputs(*NAMES), generator), generator)
    prm.scale.copy_(torch.tensor([0.5, 2.0, 3.0, 0.7]))
    policy.tokenizer = backbone.tokenizer = tokenizer
    return policy, prm


def prompts_of(*lengths, seed=0):
    generator = seeded(seed)
    return [torch.randint(0, 10, (n,), generator=generator).tolist() for n in lengths]


def uniform(*key):
    return zlib.crc32(repr(key).encode()) / 2**32


@pytest.fixture
def fixed_draws(monkeypatch):
    """Replace the uniforms in decode.py by a function of (round of `draw`, token, row), so that a
    reference which works row by row sees the same ones. -> a dict; its "offset" is added to every
    row."""
    place = {"round": -1, "token": 0, "offset": 0}
    plain_draw = decode.draw

    def draw(*args, **options):
        place.update(round=place["round"] + 1, token=0)
        return plain_draw(*args, **options)

    def rand(n, **options):
        first = place["offset"]
        key = place["round"], place["token"]
        place["token"] += 1
        numbers = [uniform(*key, row) for row in range(first, first + n)]
        return torch.tensor(numbers, dtype=torch.float64)

    monkeypatch.setattr(decode, "draw", draw)
    monkeypatch.setattr(torch, "rand", rand)
    return place


# -- sampling

def test_sample_with_nothing_cut_keeps_the_vocabularys_order():
    """Prevents: another answer to the same seed because a top_k cuts nothing off."""
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(3, -1)
    u = torch.tensor([0.1, 0.3, 0.9])
    plain = sample(logits, u).tolist()
    assert plain == [0, 1, 2]
    assert plain == sample(logits, u, top_k=3).tolist() == sample(logits, u, top_k=99).tolist()


def test_sample_top_p_among_equals():
    """Prevents: one token too many kept where the probability is reached exactly: of 4 quarters
    two are a half."""
    u = torch.tensor([0.0, 0.5, 0.7, 0.999999])
    found = sample(torch.zeros(4, 4, dtype=torch.float64), u, top_p=0.5)
    assert len(set(found.tolist())) == 2


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.999}])
def test_sample_never_draws_what_has_no_probability(u, options):
    """Prevents: u = 0 or u just below 1 that falls on a token outside the kept set."""
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    assert sample(logits, torch.tensor([u]), **options).item() in (1, 2)


def test_sample_computes_in_the_precision_it_needs():
    """Prevents: a distribution function summed in bfloat16, which stops growing long before 1;
    float64 rounded to float32."""
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.999])
    logits = torch.zeros(5, 3000)
    expected = [0, 750, 1500, 2250, 2997]
    assert sample(logits, u).tolist() == expected
    assert sample(logits.bfloat16(), u).tolist() == expected
    border = torch.tensor([0.2 - 1e-10, 0.2 + 1e-10], dtype=torch.float64)
    exact = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    assert sample(exact.expand(2, -1), border).tolist() == [0, 1]


# -- generation

@pytest.mark.parametrize("batch_size", [512, 4])
def test_ragged_batch_equals_one_by_one(toy, fixed_draws, batch_size):
    """Prevents: a row that depends on its neighbours (padding, positions, a mask, rows that
    stopped before it); results in another order than the prompts."""
    prompts = prompts_of(1, 2, 3, 5, 8, 17, 30)
    options = dict(weights=[0.3, 0.7], max_new_tokens=14)
    alone = []                                   # batches go by length: here row = index
    for i, prompt in enumerate(prompts):
        batch, row = divmod(i, batch_size)
        fixed_draws.update(round=batch - 1, offset=row)
        alone += generate(toy[0], [prompt], **options)
    assert len({len(ids) for ids in alone}) > 2  # the rows do stop at different places
    options["batch_size"] = batch_size
    fixed_draws.update(round=-1, offset=0)
    assert generate(toy[0], prompts, **options) == alone
    fixed_draws.update(round=-1, offset=0)
    assert generate(toy[0], prompts[::-1], **options) == alone[::-1]


def test_samples_of_a_prompt_equal_separate_rows(toy, fixed_draws):
    """Prevents: a forked prompt whose samples share a row, or come back in another order than
    prompt by prompt."""
    short, long = prompts_of(2, 9)
    forked = generate(toy[0], [long, short], samples=3, max_new_tokens=12)
    fixed_draws.update(round=-1, offset=0)
    rows = generate(toy[0], [short] * 3 + [long] * 3, max_new_tokens=12)
    assert forked == rows[3:] + rows[:3]
    assert len({tuple(ids) for ids in forked}) > 2


def test_generate_equals_full_re_encoding(toy, fixed_draws):
    """Prevents: a cache that loses or repeats tokens, or a step that conditions on the wrong
    position."""
    prompt, = prompts_of(6)
    found, = generate(toy[0], [prompt], weights=1, max_new_tokens=12, temperature=0.9, top_k=5)
    ids = []
    while len(ids) < 12 and END not in ids:
        h = toy[0](torch.tensor([prompt + ids]))
        logits = toy[0].logits(h, 1)[0, -1]
        ids.append(plain_choice(logits, uniform(0, len(ids), 0), 0.9, 5))
    assert found == ids


@pytest.mark.parametrize("boundary", ["newline", "sentence"])
def test_generate_ends_with_a_step(toy, boundary):
    """Prevents: whole answers where one step was asked for, or a step cut short."""
    found = generate(toy[0], prompts_of(*[4] * 40), boundary=boundary, max_new_tokens=20,
                     generator=seeded(1))
    for ids in found:
        inside = [step_is_over(ids[:n], boundary) for n in range(1, len(ids))]
        assert not any(inside)
        assert len(ids) == 20 or step_is_over(ids, boundary)
    assert sum(ids[-1] != END for ids in found) > 20


def test_generate_ends_with_eos(toy):
    """Prevents: EOS left out of the response (it is scored in training), or tokens after it."""
    found = generate(toy[0], prompts_of(*[4] * 40), max_new_tokens=20, generator=seeded(1))
    ended = [ids for ids in found if END in ids]
    assert 0 < len(ended) < 40
    assert {ids.index(END) - len(ids) for ids in ended} == {-1}
    assert {len(ids) for ids in found if END not in ids} == {20}


def test_generate_limit_per_prompt(toy):
    """Prevents: one prompt's limit applied to all, off by one, or lost beyond the first batch."""
    policy = copy.deepcopy(toy[0])
    with torch.no_grad():
        for head in policy.heads:
            head.weight[END] = 0
            head.weight[0] *= 100                # some token always wins over EOS
    limits = [1, 7, 3, 20, 2]
    found = generate(policy, prompts_of(4, 9, 2, 5, 5), max_new_tokens=limits, temperature=0,
                     batch_size=2)
    full = [len(ids) == limit for ids, limit in zip(found, limits)]
    assert all(is_full or ids[-1] == END for is_full, ids in zip(full, found))
    assert any(full[1:]) and max(map(len, found)) > 1
    assert all(0 < len(ids) <= limit for ids, limit in zip(found, limits))


def test_generate_stops_at_the_context(toy):
    """Prevents: positions beyond the context, where the model was never trained: prompt and
    response fit into 50."""
    *found, last = generate(toy[0], prompts_of(*[44] * 12, 49), max_new_tokens=30,
                            generator=seeded(0))
    assert {len(ids) for ids in found if END not in ids} == {6}
    assert len(last) == 1


def test_generate_reports_its_progress(toy):
    """Prevents: a bar that stands still, or counts prompts where it promised responses."""
    seen, options = [], dict(max_new_tokens=2)
    generate(toy[0], prompts_of(2, 3, 4), samples=2, batch_size=4, progress=seen.append, **options)
    assert seen == [4, 2]
    generate(toy[0], prompts_of(2, 3), samples=3, batch_size=2, progress=seen.append, **options)
    assert seen == [4, 2, 3, 3]                  # a batch holds at least all samples of a prompt


@pytest.mark.parametrize("prompts, message", [
    ([[1], []], "prompt 1 is empty"),
    ([[1], [1] * 50], "prompt 1 has 50 tokens"),
    ([[1] * 60], "prompt 0 has 60 tokens, the context has room for 50")])
def test_generate_refuses_prompts_that_do_not_fit(toy, prompts, message):
    """Prevents: a prompt cut in silence, or a crash deep inside attention."""
    with pytest.raises(InputError, match=message):
        generate(toy[0], prompts, max_new_tokens=3)


def test_generate_repeats_with_the_generator(toy):
    """Prevents: draws from the global generator: same seed, same tokens; another seed, others."""
    def run(seed):
        return generate(toy[0], prompts_of(4, 5), max_new_tokens=15, generator=seeded(seed))

    first = run(1)
    torch.manual_seed(99)
    assert run(1) == first != run(2)


def test_generate_without_a_tokenizer_runs_to_its_budget(toy, monkeypatch):
    """Prevents: a bare checkpoint (random weights, a benchmark) that cannot generate because it
    has no EOS."""
    monkeypatch.setattr(toy[0], "tokenizer", None)
    found = generate(toy[0], [[1, 2], [3]], max_new_tokens=7, temperature=0.0)
    assert [len(ids) for ids in found] == [7, 7]


# -- guided: the reference

def plain_choice(logits, u, temperature, top_k):
    """One token by the definition: softmax over the top_k, likeliest first (in the vocabulary's
    own order if nothing is cut), inverse of the distribution function."""
    logits = logits.tolist()
    order = list(range(len(logits)))
    if top_k < len(logits):
        order = sorted(order, key=lambda i: -logits[i])[:top_k]
    weights = [math.exp((logits[i] - max(logits)) / temperature) for i in order]
    total = 0.0
    for token, weight in zip(order, weights):
        total += weight / sum(weights)
        if u < total:
            return token
    return order[-1]


def step_is_over(ids, boundary):
    earlier, before, last = [None, None, *ids][-3:]
    if last == END:
        return True
    if boundary == "turn":
        return False
    if last in NEWLINE:
        return True
    # 3.14, I. Newton, e.g.
    inside = before in DIGIT_OR_INITIAL or (before in LETTER and earlier in STOPS)
    return boundary == "sentence" and last in STOPS and not inside


def plain_candidate(policy, text, budget, row, *, boundary, weights, temperature, top_k):
    """One step, every token of which encodes everything again. row: (round, row) of its draws."""
    ids = []
    while not ids or not (step_is_over(ids, boundary) or len(ids) == budget):
        h = policy(torch.tensor([text + ids]))
        logits = policy.logits(h, weights)[0, -1]
        number, k = row
        ids.append(plain_choice(logits, uniform(number, len(ids), k), temperature, top_k))
    return ids


GUIDES = {"newline": [0, 1], "sentence": [2], "turn": [3]}          # of "unified"


def plain_score(prm, text, boundary, guide):
    index = GUIDES[boundary] if guide == "unified" else [NAMES.index(guide)]
    scores = prm(torch.tensor([text]))[0, -1] / prm.scale
    return sum(scores[p].item() for p in index) / len(index)


def reference(toy, prompts, *, boundary, K, weights, guide, max_new_tokens, temperature=1.0,
              top_k=50, first_round=0):
    """Guided best-of-K without caches, batches or padding.
    -> list of (ids, [(candidates, scores, winner)])"""
    policy, prm = toy
    options = dict(boundary=boundary, weights=weights, temperature=temperature, top_k=top_k)
    answers = []
    for b, prompt in enumerate(prompts):
        answer, steps = [], []
        budget = min(max_new_tokens, CONTEXT - len(prompt))
        while len(answer) < budget and END not in answer:
            text, left = prompt + answer, budget - len(answer)
            candidates = []
            for row in range(b * K, (b + 1) * K):
                draws = first_round + len(steps), row
                candidates.append(plain_candidate(policy, text, left, draws, **options))
            scores = [plain_score(prm, text + ids, boundary, guide) for ids in candidates]
            winner = scores.index(max(scores))
            answer = answer + candidates[winner]
            steps.append((candidates, scores, winner))
        answers.append((answer, steps))
    return answers


def assert_same(found, expected):
    assert [answer.ids for answer in found] == [ids for ids, _ in expected]
    for answer, (_, steps) in zip(found, expected):
        for step, (candidates, scores, winner) in zip(answer.steps, steps, strict=True):
            assert step.candidates == candidates
            assert step.scores == pytest.approx(scores, abs=1e-9)
            # Equal candidates tie up to the last bit.
            assert candidates[step.winner] == candidates[winner]


HARD = dict(boundary="newline", K=4, weights=[0.4, 0.6], guide="math_accuracy",
            max_new_tokens=20, temperature=1.1)


@pytest.mark.parametrize("boundary, guide, K, max_new_tokens, top_k", [
    ("newline", "math_accuracy", 4, 20, 50), ("newline", "unified", 3, 13, 50),
    ("sentence", "helpfulness", 3, 20, 50), ("sentence", "unified", 2, 7, 50),
    ("turn", "tutor_engagement", 3, 16, 50), ("newline", "math_engagement", 1, 20, 5)])
@torch.no_grad()
def test_guided_equals_reference(toy, fixed_draws, boundary, guide, K, max_new_tokens, top_k):
    """Prevents: everything that caches can get wrong: no rollback after ragged scoring, a loser's
    cache or hidden state that goes on, a score read one token early, candidates that do not start
    from the same state, a prompt's neighbours. And top_k lost on the way."""
    options = HARD | dict(boundary=boundary, guide=guide, K=K, max_new_tokens=max_new_tokens,
                          top_k=top_k)
    prompts = prompts_of(3, 9, 1, 14, seed=1)
    found = guided_decode(*toy, prompts, **options)
    assert_same(found, reference(toy, prompts, **options))
    assert len({len(answer.ids) for answer in found}) > 1


@torch.no_grad()
def test_guided_reference_covers_the_hard_cases(toy, fixed_draws):
    """Prevents: a reference test that proves nothing: it must see many steps, ragged candidates,
    later winners, losers that are longer than the winner, losers that end the answer."""
    found = guided_decode(*toy, prompts_of(3, 9, 1, 14, seed=1), **HARD)
    assert max(len(answer.steps) for answer in found) >= 3
    winners, ragged, longer, ending = set(), False, False, False
    for answer in found:
        for step in answer.steps:
            lengths = [len(ids) for ids in step.candidates]
            winners.add(step.winner)
            ragged |= len(set(lengths)) > 2
            longer |= max(lengths) > lengths[step.winner] and step is not answer.steps[-1]
            ends = {k for k, ids in enumerate(step.candidates) if ids[-1] == END}
            ending |= bool(ends - {step.winner})
    assert winners >= {0, 1, 2} and ragged and longer and ending


@torch.no_grad()
def test_guided_stops_at_the_shorter_context(toy, fixed_draws):
    """Prevents: decoding past the PRM's context (48, the policy's is 50), or a budget shared
    between prompts."""
    prompts = prompts_of(40, 47, 4, 44, seed=3)
    found = guided_decode(*toy, prompts, **HARD)
    assert_same(found, reference(toy, prompts, **HARD))
    assert len(found[1].ids) == 1
    held = [len(prompt) + len(answer.ids) for prompt, answer in zip(prompts, found)]
    assert max(held) <= CONTEXT


@pytest.mark.parametrize("Ks, boundary, guide", [
    ([1, 1, 1], "turn", "tutor_engagement"), ([3, 3, 3], "turn", "tutor_engagement"),
    ([3, 2, 4], "newline", "unified")])
@torch.no_grad()
def test_turns_continue_the_state(toy, fixed_draws, Ks, boundary, guide):
    """Prevents: the student's words fed to one row only, fed twice, or behind a loser's cache; rows
    of the carried caches read as if they belonged to other candidates: three turns with a carried
    state, of any K, equal re-encoding the whole conversation."""
    options = HARD | dict(boundary=boundary, guide=guide, max_new_tokens=6)
    texts, new, state = [[], []], prompts_of(5, 3, seed=5), None
    for turn, K in enumerate(Ks):
        options["K"] = K
        texts = [text + ids for text, ids in zip(texts, new)]
        first_round = fixed_draws["round"] + 1
        found = guided_decode(*toy, new, state=state, **options)
        assert_same(found, reference(toy, texts, first_round=first_round, **options))
        state = found[0].state
        texts = [text + answer.ids for text, answer in zip(texts, found)]
        new = prompts_of(3 + turn, 1 + 3 * turn, seed=6 + turn)
    lengths = [len(text) for text in texts]
    assert state.policy.lengths.tolist() == lengths
    assert state.prm.lengths.tolist() == lengths


@pytest.fixture
def fed(toy):
    """-> {"policy" | "prm": list of (tokens fed to it, with a graph?)}, one entry per forward."""
    calls, hooks = {"policy": [], "prm": []}, []
    for name, net in (("policy", toy[0]), ("prm", toy[1].backbone)):
        def count(net, args, name=name):
            calls[name].append((args[0].numel(), torch.is_grad_enabled()))
        hooks.append(net.register_forward_pre_hook(count))
    yield calls
    for hook in hooks:
        hook.remove()


def tokens(calls):
    return sum(n for n, _ in calls)


@torch.no_grad()
def test_no_token_is_fed_twice(toy, fed):
    """Prevents: committed text encoded again: policy and PRM read each prompt, each candidate and
    each reply once. Of its last token, behind which nothing has been drawn yet, the policy reads
    the winner's alone."""
    state, K = None, 4
    for new in prompts_of(7, 5, seed=2):
        fed["policy"].clear()
        fed["prm"].clear()
        found, = guided_decode(*toy, [new], boundary="newline", K=K, guide="math_accuracy",
                               max_new_tokens=15, state=state, generator=seeded(3))
        state = found.state
        drawn = widest = 0
        for step in found.steps:
            lengths = [len(ids) for ids in step.candidates]
            drawn += sum(lengths) - (K - 1)
            widest += K * max(lengths)           # candidates are padded for the PRM
        assert len(found.steps) > 1
        assert tokens(fed["policy"]) == len(new) + drawn
        assert tokens(fed["prm"]) == len(new) + widest


def test_what_has_ended_is_fed_no_more(toy, fed):
    """Prevents: forward passes for answers that are over or for a last token that nothing
    follows, or graphs of any of them."""
    prompts, options = prompts_of(*[4] * 6), dict(max_new_tokens=12, generator=seeded(1))
    found = generate(toy[0], prompts, **options)
    assert len({len(ids) for ids in found}) > 1
    assert tokens(fed["policy"]) == sum(4 + len(ids) - 1 for ids in found)
    assert not any(graph for _, graph in fed["policy"])
    fed["policy"].clear()
    found = guided_decode(*toy, prompts, boundary="newline", K=1, guide="math_accuracy", **options)
    assert len({len(answer.steps) for answer in found}) > 1
    assert tokens(fed["policy"]) == sum(4 + len(answer.ids) for answer in found)
    assert not any(graph for _, graph in fed["policy"] + fed["prm"])


@torch.no_grad()
def test_one_candidate_is_plain_generation(toy):
    """Prevents: step borders that change the distribution: K = 1 draws exactly what `generate`
    draws, with the same head by default."""
    prompt = prompts_of(6, seed=1)
    guided, = guided_decode(*toy, prompt, boundary="newline", K=1, max_new_tokens=25,
                            generator=seeded(2))
    plain, = generate(toy[0], prompt, max_new_tokens=25, generator=seeded(2))
    assert guided.ids == plain and len(guided.steps) > 1
    own = inspect.signature(generate).parameters
    other = inspect.signature(guided_decode).parameters
    assert own["weights"].default == other["weights"].default


@torch.no_grad()
def test_steps_and_text_belong_to_the_ids(toy):
    """Prevents: committed text and ids that drift apart: ids are the winners joined, text is
    their decoding; an answer that goes on behind its end."""
    found = guided_decode(*toy, prompts_of(*range(1, 13)), boundary="sentence", K=3,
                          guide="helpfulness", max_new_tokens=8, generator=seeded(1))
    assert {answer.ids[-1] == END for answer in found} == {True, False}
    for answer in found:
        winners = [step.candidates[step.winner] for step in answer.steps]
        assert answer.ids == sum(winners, [])
        assert END not in answer.ids[:-1]
        assert answer.text == toy[0].tokenizer.decode(answer.ids)
        assert all(s.scores[s.winner] == max(s.scores) for s in answer.steps)


@pytest.mark.parametrize("boundary", ["newline", "sentence", "turn"])
@torch.no_grad()
def test_steps_end_where_the_labels_end(toy, boundary):
    """Prevents: decoding that cuts elsewhere than the PRM's training labels, such as past an EOS
    behind a digit."""
    found = guided_decode(*toy, prompts_of(*[4] * 80), boundary=boundary, K=2, max_new_tokens=15,
                          generator=seeded(1))
    before_end = set()
    for answer in found:
        for step in answer.steps:
            for ids in step.candidates:
                assert toy[0].tokenizer.step_ends(ids, boundary) == [len(ids) - 1]
                if ids[-1] == END:
                    before_end.add(ids[-2:][0])
    assert before_end & DIGIT_OR_INITIAL and before_end - DIGIT_OR_INITIAL


OPTIONS = dict(boundary="newline", guide="math_accuracy", max_new_tokens=5)


def test_a_model_without_a_tokenizer_knows_no_boundary(toy, monkeypatch):
    """Prevents: a named boundary that is silently none at all."""
    monkeypatch.setattr(toy[0], "tokenizer", None)
    with pytest.raises(InputError, match="no tokenizer"):
        decode.stop_masks(toy[0], "newline")
    masks = decode.stop_masks(toy[0], "turn")
    assert [mask.shape for mask in masks] == [(13,)] * 4
    assert not any(bool(mask.any()) for mask in masks)


def bare(vocab_size, **more):
    """A random model without a tokenizer."""
    sizes = dict(n_layer=1, n_head=1, n_kv_head=1, d_model=8, d_ff=8, max_len=32)
    return GPT(GPTConfig(vocab_size, **sizes, **more), seeded(0))


def test_bare_checkpoints_are_guided_too(monkeypatch):
    """Prevents: models without a tokenizer, padded to different sizes, that are refused; an id of
    theirs taken for the end of the turn; a first token of a step that is judged as if the
    vocabulary's last stood before it."""
    policy = bare(6)
    prm = PRM(bare(7, objectives=()), outputs("tutor_engagement"), seeded(0))
    masks = torch.zeros(4, 7, dtype=torch.bool)
    masks[1] = True                              # every token is a stop, but for one behind
    masks[2, 5] = True                           # the last id
    monkeypatch.setattr(decode, "stop_masks", lambda *args: list(masks))
    found = guided_decode(policy, prm, [[1, 2]] * 8, boundary="turn", K=2, max_new_tokens=6,
                          generator=seeded(0))
    said = set()
    for answer in found:
        assert len(answer.ids) == 6 and answer.text == ""
        said.update(answer.ids[:-1])
        for step in answer.steps:
            assert [len(ids) for ids in step.candidates] == [1, 1]
    assert said == set(range(6))


# -- guided: refusals

@pytest.mark.parametrize("prompt, options, message", [
    ([1], {"K": 0}, "K must be at least 1"), ([1], {"K": -1}, "K must be at least 1"),
    ([], {}, "empty"), ([1] * 48, {}, "48 tokens, the context has room for 48"),
    ([1], {"guide": "honesty"}, "no PRM output 'honesty'.*math_accuracy")])
def test_guided_refuses(toy, prompt, options, message):
    """Prevents: an empty argmax deep inside the loop; a prompt that fits the policy but not the
    PRM; guidance by nothing (the message names what there is)."""
    with pytest.raises(InputError, match=message):
        guided_decode(*toy, [prompt], **(OPTIONS | options))


def test_guided_temperature_zero_needs_one_candidate(toy):
    """Prevents: five equal candidates scored five times; the answer is the greedy one."""
    prompt = prompts_of(5)
    found, = guided_decode(*toy, prompt, K=4, temperature=0, **OPTIONS)
    assert {len(step.candidates) for step in found.steps} == {1}
    plain, = generate(toy[0], prompt, max_new_tokens=5, temperature=0)
    assert found.ids == plain


@pytest.mark.parametrize("options", [
    {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": 1e-40}, {"top_p": 0.0},
    {"top_p": 1.5}, {"max_new_tokens": 0}])
def test_sampling_options_without_a_meaning_are_refused(toy, options):
    """Prevents: top_p = 0 that returns the least likely token, a negative temperature that
    prefers unlikely ones, a tiny one whose quotients overflow, so that NaN decides."""
    words = r"^need temperature >= 0 .* and max_new_tokens >= 1, not .*\d$"
    with pytest.raises(InputError, match=words):
        generate(toy[0], [[1, 2]], **({"max_new_tokens": 4} | options))
    with pytest.raises(InputError, match=words):
        guided_decode(*toy, [[1, 2]], **(OPTIONS | options))
    decode.check_sampling(1, 1e-6, 1e-9)         # as small as each may be


def test_guided_refuses_scores_that_are_not_finite(toy):
    """Prevents: argmax over NaN, which picks a candidate without a reason; the message names the
    step."""
    policy, prm = toy[0], copy.deepcopy(toy[1])
    calls = []

    def spoil(module, args, scores):
        calls.append(1)
        return scores * (math.nan if len(calls) > 2 else 1)     # the first step is fine
    prm.register_forward_hook(spoil)
    with pytest.raises(InputError, match="^step 2: the PRM's scores are not finite"):
        guided_decode(policy, prm, prompts_of(4, seed=2), generator=seeded(3),
                      **(OPTIONS | {"max_new_tokens": 40}))


def test_guided_refuses_another_tokenizer(toy):
    """Prevents: a PRM that reads the policy's ids as other words; one refused for its padding."""
    other = copy.deepcopy(toy[1])
    other.backbone.tokenizer.pieces[0] = b"zz"
    small = PRM(bare(11, objectives=()), outputs("math_accuracy"))
    for prm in (other, small):
        with pytest.raises(InputError, match="different tokenizers"):
            guided_decode(toy[0], prm, [[1]], **OPTIONS)
    padded = copy.deepcopy(toy[1])
    padded.backbone.tokenizer.pieces.append(b"")              # a vocabulary with one more row
    guided_decode(toy[0], padded, [[1]], **OPTIONS)


@pytest.mark.parametrize("prompts, message", [
    ([[1] * 5], "prompt 0 has 5 tokens.* room for 5"), ([[1]] * 2, "1 conversations, not 2")])
def test_guided_refuses_what_the_state_does_not_carry(toy, prompts, message):
    """Prevents: a conversation that outgrows the context; caches read as if they belonged to other
    prompts."""
    found, = guided_decode(*toy, [[1] * 40], K=3, **OPTIONS)
    found.state.prm.held = torch.tensor([CONTEXT - 5])
    with pytest.raises(InputError, match=message):
        guided_decode(*toy, prompts, K=3, state=found.state, **OPTIONS)


# -- weights

@pytest.mark.parametrize("text, more, weights", [
    ("b=0.3, a=0.7", (), [0.7, 0.3, 0.0]), ("c=2", (), [0.0, 0.0, 2.0]),
    ("b=2", ("--alpha", 1.0), [1.0, 2.0, 1.0])])
def test_parse_weights(text, more, weights):
    """Prevents: weights given to the wrong head; --alpha honesty=2 that silences every objective
    it does not name."""
    assert parse_weights(text, ["a", "b", "c"], *more) == weights


@pytest.mark.parametrize("text, weights", [("a=-0.5,b=1.5", [-0.5, 1.5]), ("", [0, 0])])
def test_free_weights(text, weights):
    """Prevents: weights off the simplex that are refused, or that are let in unasked."""
    assert parse_weights(text, ["a", "b"], free=True) == weights
    with pytest.raises(InputError, match="^--weights: .* non-negative"):
        parse_weights(text, ["a", "b"])


@pytest.mark.parametrize("text, message", [
    ("d=1", "no 'd' here.*a, b"), ("a", "'a' is not NAME=NUMBER"),
    ("a=x", "'a=x' is not NAME=NUMBER"), ("a=1,b=1, a=2", "'a' is given twice"),
    ("a=-1,b=2", "non-negative"), ("a=0,b=0", "positive sum"), ("a=nan", "non-negative"),
    ("a=inf", "non-negative"), ("", "positive sum")])
def test_parse_weights_refuses(text, message):
    """Prevents: unknown, negative, infinite or vanishing weights that give NaN logits."""
    with pytest.raises(InputError, match=f"^--weights: .*{message}"):
        parse_weights(text, ["a", "b"])


@pytest.mark.parametrize("heads, weights", [
    (["math_accuracy", "honesty", "math_engagement"], [1, 0, 1]), (["policy"], [1]),
    (["honesty", "policy"], [0, 0])])
def test_domain_mix(heads, weights):
    """Prevents: heads of another domain in the mix, or no head at all where there is only one."""
    assert domain_mix(heads, "math", OBJECTIVES.values()) == weights


# -- command line

def write_run(run, gpt, **prms):
    """A run directory as decode.py needs it, of random models; prms: directory -> outputs."""
    save_hf(gpt, os.path.join(run, "mah_dpo"))
    for name, names in prms.items():
        prm = PRM(gpt.with_heads(()), outputs(*names), seeded(0))
        save_prm(prm, os.path.join(run, name))
    records = [vars(objective) for objective in outputs(*NAMES[:2])]
    config = {"objectives": records, "temperature": 0.7, "init": "", "max_new_tokens": 256}
    write_json(os.path.join(run, "config.json"), config)
    return str(run)


@pytest.fixture(scope="module")
def tiny_run(gpt, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), gpt, prm=NAMES[:2])


def test_main_shows_candidates_and_winner(tiny_run, capsys):
    """Prevents: a command that hides the algorithm: K scored candidates per step, the best one
    marked, then the text; one that answers otherwise when it is called again; a trace that a script
    would take for the answer."""
    argv = [tiny_run, "--prompt", "4 + 5 - 2 = ?", "--k", "3", "--max-new-tokens", "12",
            "--guide", "math_engagement", "--weights", "math_accuracy=0.7,math_engagement=0.3"]
    decode.main(argv)
    first = capsys.readouterr().out
    blocks = first.split("step ")
    assert blocks[0] == "" and len(blocks) > 1
    for number, block in enumerate(blocks[1:], 1):
        title, *shown = block.splitlines()[:4]
        assert title == str(number)
        scores = [float(line[5:13]) for line in shown]
        marked = [line.startswith("  -> ") for line in shown]
        assert marked.count(True) == 1
        assert scores[marked.index(True)] == max(scores)
    decode.main(argv)
    assert capsys.readouterr().out == first      # --seed defaults to 0: the same again
    decode.main([*argv, "--quiet"])
    answer = capsys.readouterr().out
    assert first.endswith(answer) and "step 1" not in answer


@pytest.mark.parametrize("guide", ["math_engagement", "unified"])
def test_what_is_printed_are_the_prms_own_scores(toy, guide, capsys):
    """Prevents: a right answer of value 2 shown as 2.9, in the unit in which outputs are averaged;
    of several outputs one number that is none of theirs."""
    prompt, index = prompts_of(4)[0], GUIDES["newline"]
    answer, = guided_decode(*toy, [prompt], boundary="newline", guide=guide, K=3, max_new_tokens=8,
                            generator=seeded(1))
    index = index if guide == "unified" else [NAMES.index(guide)]
    text, shown = prompt, []
    for step in answer.steps:
        for ids, values in zip(step.candidates, step.values, strict=True):
            scores = toy[1](torch.tensor([text + ids]))[0, -1]
            assert values == pytest.approx(scores[index].tolist(), abs=1e-9)
            shown.append([f"{value:+.4f}" for value in values])
        text = text + step.candidates[step.winner]
    decode.show_steps(toy[0].tokenizer, answer.steps)
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:4].strip() != "step"]
    assert [line[5:].split()[:len(index)] for line in lines] == shown


@pytest.fixture
def asked(monkeypatch):
    """What decode.main asks of guided_decode; the answer is always "7", ended or cut off in
    turns."""
    calls = []

    def answer(model, prm, prompts, **options):
        calls.append(options | {"prompts": prompts, "outputs": prm.names})
        ids = model.tokenizer.encode("7")
        if len(calls) % 2:
            ids.append(model.tokenizer.eos_id)
        return [decode.Guided(ids, "7", [], "the state")]
    monkeypatch.setattr(decode, "guided_decode", answer)
    return calls


ACCURACY, ENGAGEMENT = NAMES[:2]
OTHER = "the directory of another PRM"


@pytest.mark.parametrize("argv, weights, guide, temperature", [
    ([], [1, 1], ACCURACY, 0.7),
    (["--guide", "unified"], [1, 1], "unified", 0.7),
    (["--weights", f"{ENGAGEMENT}=3,{ACCURACY}=1"], [1, 3], ENGAGEMENT, 0.7),
    (["--weights", f"{ENGAGEMENT}=3", "--guide", ACCURACY], [0, 3], ACCURACY, 0.7),
    (["--temperature", "0.3"], [1, 1], ACCURACY, 0.3),
    (["--guide", "worst"], [1, 1], "worst", 0.7),
    (["--guide", f"{ENGAGEMENT}=3, {ACCURACY}=1"], [1, 1], {ACCURACY: 1.0, ENGAGEMENT: 3.0}, 0.7),
    (["--prm", OTHER], [1, 1], "unified", 0.7),
    (["--prm", OTHER, "--guide", ENGAGEMENT], [1, 1], ENGAGEMENT, 0.7)])
def test_main_derives_what_is_not_said(tiny_run, gpt, asked, tmp_path, argv, weights, guide,
                                       temperature):
    """Prevents: an option that is ignored, or a default that is not what --help says: the guide
    follows the heaviest head, the weights the guide's domain, the temperature the run."""
    save_prm(PRM(gpt.with_heads(()), outputs(ENGAGEMENT), seeded(0)), tmp_path)
    argv = [str(tmp_path) if word == OTHER else word for word in argv]
    decode.main([tiny_run, "--prompt", "2 + 3 = ?", *argv])
    call, = asked
    assert call["outputs"] == ([ENGAGEMENT] if "--prm" in argv else [ACCURACY, ENGAGEMENT])
    assert call.pop("generator").initial_seed() == 0
    expected = dict(weights=weights, guide=guide, temperature=temperature, K=5, state=None,
                    max_new_tokens=72, boundary="newline")
    assert call == call | expected


@pytest.mark.parametrize("init, argv, limit", [
    ("", [], 72), ("", ["--max-new-tokens", "9"], 9), ("a checkpoint", [], 200),
    ("a checkpoint", ["--max-new-tokens", "9"], 9)])
def test_an_answer_may_be_as_long_as_in_training(gpt, asked, tmp_path, init, argv, limit):
    """Prevents: answers that are cut off although the run's own tables let them go on, a sixth of
    maths' at 64 tokens."""
    run = write_run(tmp_path, gpt, prm=NAMES[:2])
    path = os.path.join(run, "config.json")
    write_json(path, decode.read_json(path) | {"init": init, "max_new_tokens": 200})
    decode.main([run, "--prompt", "2 + 3 = ?", *argv])
    assert [call["max_new_tokens"] for call in asked] == [limit]


def test_free_weights_go_on_from_sfts_head(gpt, asked, tmp_path):
    """Prevents: weights that are divided by their sum, a mix that starts from 0 or another head
    than SFT's; numbers that are none."""
    run, sft = write_run(tmp_path, gpt, prm=NAMES[:2]), gpt.with_heads(["policy"], 0.5, seeded(3))
    save_hf(sft, os.path.join(run, "sft"), weights=0)
    mixes = []
    for text in (f"{ACCURACY}=1.5,{ENGAGEMENT}=-1", f"{ACCURACY}=0", f"{ENGAGEMENT}=1"):
        decode.main([run, "--prompt", "2 + 3 = ?", "--free", "--weights", text])
        mixes.append(gpt.fold(asked[-1]["weights"]))
    reference, first, second = (h.weight.detach() for h in (*sft.heads, *gpt.heads))
    expected = 0.5 * reference + 1.5 * first - second
    torch.testing.assert_close(mixes[0], expected, atol=1e-5, rtol=0)
    assert torch.equal(mixes[1], reference)
    torch.testing.assert_close(mixes[2], second, atol=1e-6, rtol=0)
    for bad in ("nan", "inf", "-inf", "1e300"):
        with pytest.raises(InputError, match="^--weights: .* must be numbers from -1e6 to 1e6"):
            decode.main([run, "--free", "--weights", f"{ACCURACY}={bad}"])


def test_main_closes_an_answer_that_was_cut_off(tiny_run, gpt, asked, monkeypatch, capsys):
    """Prevents: a turn without its end, or with two, before the user's next words; a conversation
    whose second line starts again from nothing."""
    lines = ["2 + 3 = ?", "4 - 2 = ?", "1 + 1 = ?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    decode.main([tiny_run, "--seed", str(2**31 - 1)])
    tokenizer = gpt.tokenizer
    second, third = map(tokenizer.encode_turn, lines[1:])
    said = [call["prompts"] for call in asked]
    assert said[1:] == [[second], [[tokenizer.eos_id, *third]]]
    assert {call["generator"].initial_seed() for call in asked} == {2**31 - 1}
    assert [call["state"] for call in asked] == [None, "the state", "the state"]
    assert capsys.readouterr().out == "7\n" * 3


QUESTIONS = ["2 + 3 = ?", "4 - 2 = ?", "2 + 3 = ?"]


@pytest.mark.parametrize("text", [
    "{0}\n{1}\n{2}\n", "\n \n{0}\n\t\n{1}\n\n\n{2}", "  {0} \r\n\r\n{1}\r\n{2}\r\n\r\n"])
def test_blank_lines_are_no_messages(tiny_run, gpt, asked, monkeypatch, tmp_path, text):
    """Prevents: a script whose blank lines, or an editor's line ends, are put to the model; a
    file read otherwise than a pipe."""
    text = text.format(*QUESTIONS)
    monkeypatch.setattr("sys.stdin", io.StringIO(text, newline=""))
    decode.main([tiny_run])
    assert len(asked) == 3
    assert asked[1]["prompts"] == [gpt.tokenizer.encode_turn(QUESTIONS[1])]
    path = tmp_path / "prompts"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    decode.main([tiny_run, "--file", str(path)])
    for call, question in zip(asked[3:], QUESTIONS, strict=True):
        alone = [{"role": "user", "content": question}]
        assert call["prompts"] == [gpt.tokenizer.encode_chat(alone)]
        assert call["state"] is None
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n\n"))
    decode.main([tiny_run])
    assert len(asked) == 6


def test_answers_of_a_file_are_independent(tiny_run, tmp_path, capsys):
    """Prevents: an answer that depends on the prompts before it, a trace among lines of JSON, an
    answer of several lines that is several lines."""
    argv = [tiny_run, "--k", "2", "--max-new-tokens", "12", "--seed", "5"]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(QUESTIONS))
    decode.main([*argv, "--file", str(path)])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = []
    for question in QUESTIONS:
        decode.main([*argv, "--quiet", "--prompt", question])
        expected.append({"prompt": question, "answer": capsys.readouterr().out[:-1]})
    assert found == expected


def test_a_line_that_does_not_fit_is_named(tiny_run, tmp_path, capsys, monkeypatch):
    """Prevents: a long file of which nobody knows which prompt was too long; the answers before it
    lost."""
    path = tmp_path / "prompts.txt"
    path.write_text(f"\n{QUESTIONS[0]}\n" + "1 + " * 100)
    with pytest.raises(InputError, match="prompts.txt:3: .* room for 128"):
        decode.main([tiny_run, "--k", "1", "--file", str(path)])
    assert json.loads(capsys.readouterr().out)["prompt"] == QUESTIONS[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + " * 100))
    with pytest.raises(InputError, match="^standard input:1: .* room for 128"):
        decode.main([tiny_run])


@pytest.mark.parametrize("option", [[], ["--file"]])
def test_a_system_message_stands_first(tiny_run, gpt, asked, monkeypatch, tmp_path, option):
    """Prevents: a system message that is lost, that is said again in every turn, or that only the
    first prompt of a file gets."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(QUESTIONS))
    monkeypatch.setattr("sys.stdin", path.open())
    system = {"role": "system", "content": "Be kind."}
    opening = gpt.tokenizer.encode_chat([system, {"role": "user", "content": QUESTIONS[0]}])
    plain, chats = Tokenizer.encode_chat, []

    def encode_chat(self, messages):
        chats.append(messages)
        return plain(self, messages)
    monkeypatch.setattr(Tokenizer, "encode_chat", encode_chat)
    decode.main([tiny_run, "--system", "Be kind.", *(option and ["--file", str(path)])])
    assert {message["role"] for message in sum(chats, [])} == {"system", "user"}
    said = [call["prompts"][0] for call in asked]
    assert said[0] == opening and len(said) == 3
    assert said[2] == (opening if option else [gpt.tokenizer.eos_id]
                       + gpt.tokenizer.encode_turn(QUESTIONS[2]))


@pytest.mark.parametrize("argv, message", [
    (["--guide", "cleverness"], "no PRM output 'cleverness'"),
    (["--guide", "honesty"], "no PRM output 'honesty' .*math_accuracy, math_engagement"),
    (["--weights", "honesty=1"], "no 'honesty' here"),
    (["--guide", "honesty=1"], "--guide: no 'honesty' here"),
    (["--guide", "math_accuracy=-1"], "--guide: .* non-negative"),
    (["--policy", "nothing"], "no nothing here; it holds mah_dpo, prm$"),
    (["--prompt", " "], "--prompt is blank"),
    (["--prompt", "1 + " * 100], "room for 128 with the answer; shorten the prompt"),
    (["--prompt", "x", "--k", "0"], "K must be"),
    (["--seed", "-1"], "--seed -1 is out of range"), (["--free"], "--free needs --weights"),
    (["--seed", str(2**31)], "--seed 2147483648 is out of range")])
def test_main_refuses(tiny_run, argv, message):
    """Prevents: tracebacks, or an answer by another head or guide than the one asked for."""
    with pytest.raises(InputError, match=message):
        decode.main([tiny_run, "--prompt", "2 + 3 = ?", *argv])


@pytest.mark.parametrize("config, message", [
    (None, "no such file"), ([], "not the configuration of a run"),
    ({"objectives": ["honesty"]}, "not the configuration of a run"),
    ({"objectives": ["honesty"], "temperature": 1}, "objectives must be a list of objectives")])
def test_main_refuses_a_directory_that_is_no_run(tmp_path, config, message):
    """Prevents: a traceback for a mistyped run directory, or for one of an earlier version."""
    if config is not None:
        write_json(str(tmp_path / "config.json"), config)
    with pytest.raises(InputError, match=f"config.json: {message}"):
        decode.main([str(tmp_path), "--prompt", "x"])


def test_main_prefers_the_guides_own_prm(gpt, capsys, tmp_path):
    """Prevents: --prm each runs whose specialised model is never read."""
    run = write_run(tmp_path, gpt, prm_math_engagement=[ENGAGEMENT])
    argv = [run, "--prompt", "2 + 3 = ?", "--max-new-tokens", "3", "--k", "2", "--guide"]
    decode.main([*argv, ENGAGEMENT])
    assert "step 1" in capsys.readouterr().out
    for guide in (ACCURACY, "unified"):
        with pytest.raises(InputError, match=f"no prm_{guide} nor prm .* holds .*prm_{ENGAGEMENT}"):
            decode.main([*argv, guide])
