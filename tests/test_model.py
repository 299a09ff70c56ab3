"""model.py: backbone, KV cache, heads, safetensors, checkpoints. Every docstring states the bug
that its test prevents."""
import json
import math
import random
import struct

import pytest
import torch
import torch.nn.functional as F

from data import InputError
from model import (DTYPES, GPT, GPTConfig, KVCache, emulates_bf16, linear, load_hf,
                   load_safetensors,
                   read_metadata, rotate, save_hf, save_safetensors)
from test_exercises import TWICE, entry, raw

F4 = entry("F32", [1], 0, 4)
SHAPES = []                     # every kind of model: position, norm, mlp, heads of keys
for _position in ("rope", "learned"):
    for _norm in ("rms", "layer"):
        for _mlp in ("swiglu", "gelu"):
            SHAPES += [(_position, _norm, _mlp, n) for n in (1, 2, 4)]
TWO_SHAPES = [("rope", "rms", "swiglu", 2), ("learned", "layer", "gelu", 4)]


def small(position="rope", norm="rms", mlp="swiglu", n_kv_head=2, **more):
    """A small random model whose every parameter matters: biases and norms are random too."""
    settings = dict(vocab_size=23, n_layer=2, n_head=4, d_model=16, d_ff=20, max_len=32,
                    init_std=0.3, position=position, norm=norm, mlp=mlp, n_kv_head=n_kv_head)
    generator = torch.Generator().manual_seed(1)
    model = GPT(GPTConfig(**settings | more), generator)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def tokens(rows, T, seed=0):
    return torch.randint(0, 23, (rows, T), generator=torch.Generator().manual_seed(seed))


def close(a, b):
    return torch.allclose(a, b, atol=2e-5, rtol=1e-4)


def alone(model, *parts):
    """Hidden states of one text, fed by itself and at once: what every cache must give."""
    return model(torch.cat(parts)[None])[0]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# -- backbone

def test_rotary_positions_by_hand():
    """Rotation by the wrong angle or of interleaved pairs: a real Llama checkpoint turns into
    noise."""
    model = small(head_dim=4, max_len=101)
    unit = torch.eye(4)[:2].view(1, 2, 1, 4)                    # e0 at position 1, e1 at 100
    cos, sin = (table[[1, 100]][None, :, None] for table in (model.cos, model.sin))
    found = rotate(unit, cos, sin)[0, :, 0]
    turned = torch.tensor([math.cos(1), 0, math.sin(1), 0])
    assert close(found[0], turned)                              # theta^0 = 1
    assert close(found[1], turned.roll(1))                      # theta^(-2/4) = 1/100


def test_activations_by_hand():
    """Another GELU than GPT-2's, or gate and up exchanged in SwiGLU: a loaded checkpoint is
    slightly, silently wrong."""
    x = torch.tensor([[-2.0, 0.5]])
    cubic = (2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3)
    gelu = 0.5 * x * (1 + torch.tanh(cubic))
    swiglu = x / (1 + torch.exp(-x)) * 3 * x
    for kind, expected in (("gelu", gelu), ("swiglu", swiglu)):
        model = small(mlp=kind, d_model=2, n_head=1, n_kv_head=1, d_ff=2)
        mlp = model.layers[0].mlp
        both = torch.cat((torch.eye(2), 3 * torch.eye(2)))      # gate x = x, up x = 3 x
        mlp.up.weight.copy_(both[:len(mlp.up.weight)])
        mlp.down.weight.copy_(torch.eye(2))
        assert torch.allclose(mlp(x), expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES[::3])
def test_no_token_sees_the_future(shape):
    """Attention without a causal mask: training looks perfect and sampling is garbage."""
    model, ids = small(*shape), tokens(1, 8)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 23
    a, b = model(ids)[0], model(changed)[0]
    assert [close(a[t], b[t]) for t in range(8)] == [True] * 5 + [False] * 3


@pytest.mark.parametrize("shape", SHAPES)
def test_every_earlier_token_and_its_place_matters(shape):
    """Positions that are dropped (rope or learned), or a head of keys wired to nothing: order would
    not matter."""
    model, ids = small(*shape), tokens(1, 6, seed=3)
    swapped = ids[:, [1, 0, 2, 3, 4, 5]]
    assert ids[0, 0] != ids[0, 1]
    assert not close(model(ids)[0, -1], model(swapped)[0, -1])


def test_initialisation_depends_on_its_generator_only():
    """Weights drawn from the global random state: the same seed gives another model after any other
    draw."""
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = GPTConfig(23, position="learned", norm="layer")
        states.append(GPT(config, torch.Generator().manual_seed(5)).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("bad", [
    {"n_kv_head": 3}, {"position": "alibi"}, {"norm": "batch"}, {"mlp": "relu"}, {"norm": "rope"},
    {"n_layer": 0}, {"d_model": "96"}, {"vocab_size": -1}, {"head_dim": 24.0}, {"head_dim": -2},
    {"head_dim": 3}, {"max_len": 2**23}, {"rope_theta": -1.0}, {"norm_eps": math.nan}])
def test_unusable_configuration(bad):
    """A misspelt option that silently means the other choice; a --init whose config.json ends in a
    traceback."""
    with pytest.raises(ValueError, match="must be|is .* or .*, not|query heads|number must be even"):
        GPTConfig(**({"vocab_size": 23} | bad))


# -- cache

@pytest.mark.parametrize("n", [3, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_equals_uncached(shape, n):
    """SDPA's is_causal is aligned top-left: wrong as soon as several tokens are appended to a cache
    (trap 3)."""
    model, ids = small(*shape), tokens(n, 12)
    cache = model.new_cache(n, 4)                       # too small on purpose: it must grow
    parts = [model(part, cache) for part in ids.split([5, 1, 4, 2], 1)]
    assert close(torch.cat(parts, 1), model(ids))
    assert cache.lengths.tolist() == [12] * n


def test_cached_with_gradients():
    """A cache that can only be read where nothing learns; or one whose tokens get no gradient from
    what follows them."""
    model, ids = small(), tokens(2, 9)
    with torch.enable_grad():
        cache = model.new_cache(2)
        parts = [model(part, cache) for part in ids.split([4, 1, 4], 1)]
        assert close(torch.cat(parts, 1), model(ids))
        found = torch.autograd.grad(parts[2].square().sum(), model.layers[0].attn.qkv.weight)
        whole = model(ids)[:, 5:]
        expected = torch.autograd.grad(whole.square().sum(), model.layers[0].attn.qkv.weight)
    assert close(found[0], expected[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_rows_equal_each_row_alone(shape):
    """Left padding, shared positions, or stale places in sight change a row's answer with its
    neighbours (trap 4)."""
    model, lengths, more = small(*shape), torch.tensor([3, 7, 1]), torch.tensor([4, 1, 6])
    texts = [tokens(1, 20, seed=s)[0] for s in range(3)]
    first_ids, second_ids = torch.full((3, 7), 22), torch.full((3, 6), 21)
    for text, a, b, n, m in zip(texts, first_ids, second_ids, lengths, more):
        a[:n] = text[:n]
        b[:m] = text[n:n + m]
    cache = model.new_cache(3, 20)
    first = model(first_ids, cache)
    assert close(first, model(first_ids))               # padded, with and without a cache
    cache.rollback(lengths)
    assert cache.lengths.tolist() == [3, 7, 1]
    second = model(second_ids, cache)
    cache.rollback(lengths + more)
    ends = [text[n:n + 2] for text, n in zip(texts, lengths + more)]
    third = model(torch.stack(ends), cache)
    for b, (n, m) in enumerate(zip(lengths, more)):
        found = torch.cat([first[b, :n], second[b, :m], third[b]])
        assert close(found, alone(model, texts[b][:n + m + 2]))


def test_neighbours_and_padding_leave_a_row_alone():
    """A pad token that is attended to, or a batch that is normalised together: tables depend on the
    batch size."""
    model, ids = small(), tokens(3, 9)
    expected = alone(model, ids[0, :4])
    for pad in (0, 22):
        batch = ids.clone()
        batch[0, 4:] = pad
        assert close(model(batch)[0, :4], expected)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("rows", [[2], [0, 2], [2, 0], [1, 0, 3, 2], [3, 1, 2]])
def test_a_subset_of_rows_in_any_order(rows, kept):
    """Rows that are fed but read from another row's places, or rows that are not fed but change."""
    model, ids = small(), tokens(4, 12)
    cache, index = model.new_cache(4), torch.tensor(rows)
    model(ids[:, :5], cache)
    if kept:
        cache.keep(0)
    h = model(ids[index, 5:8], cache, index[:, None])
    full = model(ids)
    assert close(h, full[index, 5:8])
    if len(rows) < 4:
        with pytest.raises(ValueError, match="dropped out"):
            model(ids[:, :1], cache)
    cache.rollback(5)
    assert close(model(ids[:, 5:], cache), full[:, 5:])


def test_rollback_forgets():
    """A cache that is not rolled back: the next tokens follow text that was thrown away."""
    model, ids, other = small(), tokens(2, 10), tokens(2, 10, seed=9)
    cache = model.new_cache(2, 10)
    model(ids[:, :8], cache)
    cache.rollback(torch.tensor([4, 6]))
    assert cache.lengths.tolist() == [4, 6]
    h = model(other[:, :2], cache)
    for b, n in enumerate((4, 6)):
        assert close(h[b], alone(model, ids[b, :n], other[b, :2])[n:])
    cache.rollback(torch.tensor([9, 1]))                # beyond what a row holds: nothing to forget
    assert cache.lengths.tolist() == [6, 1]


def forked(model, prompts, K):
    """Prompts (B, T) encoded once, forked into K."""
    cache = model.new_cache(len(prompts))
    model(prompts, cache)
    return cache.fork(K)


def feed_each(model, cache, ids):
    """Feed token by token."""
    for t in range(ids.shape[1]):
        model(ids[:, t:t + 1], cache)


def test_rollback_of_candidates_forgets_the_step():
    """A step that was tried and thrown away must not be seen by the next try, nor may the prefix
    suffer."""
    model, prompts = small(), tokens(2, 4)
    cache = forked(model, prompts, 3)
    model(tokens(6, 5, seed=2), cache)
    cache.rollback(3)
    assert cache.lengths.tolist() == [3, 3]
    after = tokens(6, 2, seed=3)
    h = model(after, cache)
    for row in range(6):
        assert close(h[row], alone(model, prompts[row // 3, :3], after[row])[3:])


@pytest.mark.parametrize("shape", TWO_SHAPES)
@pytest.mark.parametrize("winners", [[2, 0], [1, 1], [0, 2]])
def test_keep_commits_the_winner(shape, winners):
    """A loser's step committed, or committed for some layers or rows only, or with tokens that it
    did not have: the text says one thing, the state another."""
    model, prompts, candidates = small(*shape), tokens(2, 4), tokens(6, 5, seed=2)
    after, lengths = tokens(6, 3, seed=3), torch.tensor([1, 5, 3, 4, 2, 5])
    cache = forked(model, prompts, 3)
    feed_each(model, cache, candidates)
    kept = lengths[[winners[0], winners[1] + 3]]
    cache.keep(torch.tensor(winners), kept)
    assert cache.lengths.tolist() == (4 + kept).tolist()
    h = model(after, cache)
    for row in range(6):
        # Whose continuation is this?
        owners = []
        for k in range(3):
            c = row // 3 * 3 + k
            step = candidates[c, :lengths[c]]
            expected = alone(model, prompts[row // 3], step, after[row])[-3:]
            owners += [k] if close(h[row], expected) else []
        assert owners == [winners[row // 3]]


def test_keep_again_and_again():
    """A step that is kept in the wrong place, or a step part that is not emptied: wrong from the
    second step on."""
    model, text = small(), tokens(1, 2)[0]
    cache = forked(model, text[None], 2)
    for winner, length, size in ((1, 4, 6), (0, 3, 5), (1, 1, 3), (0, 5, 7), (1, 16, 16)):
        candidates = tokens(2, size, seed=size)
        h = model(candidates, cache)
        for k in range(2):
            assert close(h[k], alone(model, text, candidates[k])[-size:])
        cache.keep(winner, torch.tensor([length]))
        text = torch.cat([text, candidates[winner, :length]])
        assert cache.lengths.tolist() == [len(text)]


def test_the_prefix_is_stored_once():
    """K copies of the prompt in memory, or a keep that copies it: guided decoding slows down as the
    text grows."""
    model = small()
    per_token = 2 * model.config.n_layer * model.config.n_kv_head * model.config.head_dim * 4
    cache = model.new_cache(2, 40)
    model(tokens(2, 20), cache)
    assert cache.nbytes() == 2 * 40 * per_token                     # what was asked for
    cache = cache.fork(5)
    assert cache.nbytes() == 2 * 40 * per_token                     # whatever K
    model(tokens(10, 3, seed=1), cache)
    assert cache.nbytes() <= (2 * 40 + 10 * 16) * per_token         # room for 16 tokens of each row
    before = [t.clone() for t in cache.prefix]
    places = [t.data_ptr() for t in cache.prefix]
    cache.keep(torch.tensor([4, 0]), torch.tensor([3, 2]))
    assert [t.data_ptr() for t in cache.prefix] == places           # nothing was moved,
    for old, new in zip(before, cache.prefix):                      # only the steps were written
        changed = (old != new).any(-1).any(2).any(0)                # (G, P)
        assert not changed[:, :20].any() and not changed[:, 23:].any()
        assert changed[0, 20:23].all() and changed[1, 20:22].all()


def test_a_first_text_is_moved_not_copied():
    """A prompt that stands in memory twice while it becomes the prefix."""
    model = small()
    cache = model.new_cache(2, 40)
    model(tokens(2, 20), cache)
    places = [t.data_ptr() for t in cache.step]
    cache.keep(0, torch.tensor([20, 7]))
    assert [t.data_ptr() for t in cache.prefix] == places and cache.held.tolist() == [20, 7]


def test_keep_in_some_groups_leaves_the_others():
    """A finished conversation that is overwritten while the others go on."""
    model, prompts, candidates = small(), tokens(3, 4), tokens(6, 4, seed=2)
    cache = forked(model, prompts, 2)
    feed_each(model, cache, candidates)
    # Sequence 2 keeps its candidate 0, sequence 0 its candidate 1, sequence 1 none.
    cache.keep(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([2, 0]))
    after = tokens(6, 1, seed=4)
    h = model(after, cache)
    kept = [candidates[1, :3], candidates[0, :0], candidates[4, :2]]
    for row in range(6):
        g = row // 2
        assert close(h[row, 0], alone(model, prompts[g], kept[g], after[row])[-1])


@pytest.mark.parametrize("T", [1, 3])
def test_candidates_drop_out_of_a_step(T):
    """Rows that reached their boundary cost nothing, and the others must not notice: nor those of
    another sequence, nor the idle places of a grid, which repeat a row."""
    model, prompts, text = small(), tokens(3, 6), tokens(12, 9, seed=2)
    lengths = torch.tensor([6, 2, 4])
    cache = model.new_cache(3, 30)
    model(prompts, cache)
    cache.rollback(lengths)
    cache = cache.fork(4)
    plan = [None, [[0, 1, 3], [4, 6, 6], [8, 9, 10]], [[6, 6], [8, 10]]]
    for step, grid in enumerate(plan):
        rows = None if grid is None else torch.tensor(grid)
        index = torch.arange(12) if grid is None else rows.flatten()
        h = model(text[index, step * T:(step + 1) * T], cache, rows)
        for i, row in enumerate(index):
            prompt = prompts[row // 4, :lengths[row // 4]]
            assert close(h[i], alone(model, prompt, text[row, :(step + 1) * T])[-T:])
    cache.keep(torch.tensor([2, 2]), torch.tensor([3 * T, 3 * T]), torch.tensor([1, 2]))
    assert cache.lengths.tolist() == [6, 2 + 3 * T, 4 + 3 * T]


def test_one_row_of_every_sequence_goes_on():
    """A user's next message that only one candidate's row reads, or that is read behind a loser's
    step: the second turn answers something else."""
    model, prompts = small(), tokens(2, 4)
    step, message = tokens(6, 3, seed=1), tokens(2, 5, seed=2)
    cache = forked(model, prompts, 3)
    model(step, cache)
    cache.keep(torch.tensor([1, 2]), torch.tensor([3, 2]))
    model(message, cache, torch.tensor([[0], [3]]))
    cache.keep(0, torch.tensor([5, 4]))
    after = tokens(6, 1, seed=3)
    h = model(after, cache)
    said = [(step[1], message[0]), (step[5, :2], message[1, :4])]
    for row in range(6):
        g = row // 3
        assert close(h[row, 0], alone(model, prompts[g], *said[g], after[row])[-1])


def test_fork_leaves_the_prompt_as_it_was():
    """Candidates that write into the prompt's own places: the next fork starts from a polluted
    past."""
    model, ids = small(), tokens(2, 8)
    cache = model.new_cache(2, 8)
    model(ids[:, :4], cache)
    one, two = cache.fork(3), cache.fork(2)
    assert isinstance(one, KVCache) and one.lengths.tolist() == [4, 4]
    assert (one.K, two.K) == (3, 2)
    assert one.prefix[0].data_ptr() == cache.prefix[0].data_ptr()      # shared, not copied
    model(tokens(6, 3, seed=1), one)
    h = model(ids[:, 4:].repeat_interleave(2, 0), two)
    assert close(h, model(ids)[:, 4:].repeat_interleave(2, 0))


def test_looking_at_all_places_changes_nothing():
    """What an accelerator does, to keep shapes the same: unused places that are not hidden."""
    model, prompts = small(), tokens(3, 5)
    found = []
    for everywhere in (False, True):
        cache = model.new_cache(3, 20)
        cache.everywhere = everywhere
        model(prompts, cache)
        cache.rollback(torch.tensor([5, 2, 3]))
        cache = cache.fork(2)
        h = [model(tokens(6, T, seed=T), cache) for T in (3, 1)]
        cache.keep(torch.tensor([1, 0, 1]), torch.tensor([4, 1, 2]))
        rows = torch.tensor([[1], [4]])
        h += [model(tokens(2, 1, seed=9), cache, rows), model(tokens(2, 2, seed=8), cache, rows)]
        found.append(torch.cat([x.flatten() for x in h]))
    assert close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_decode(dtype):
    """A softmax over scores rounded to half precision, or in less precision than the model has."""
    model, ids = small().to(dtype), tokens(2, 9)
    cache = forked(model, ids[:, :5], 1)
    parts = [model(ids[:, t:t + 1], cache) for t in range(5, 9)]
    found, expected = torch.cat(parts, 1), model(ids)[:, 5:]
    assert found.dtype == dtype
    atol = 0.1 if dtype == torch.bfloat16 else 1e-12
    assert torch.allclose(found, expected, atol=atol)


@pytest.mark.parametrize("n, biased", [(1, False), (1, True), (5, False), (8, True), (9, False)])
@pytest.mark.parametrize("N, K", [(512, 256), (256, 512)])
def test_few_rows_by_blocks_equal_the_plain_product(n, biased, N, K):
    """Blocks of W in another order, a bias added per block, batch dimensions lost."""
    generator = torch.Generator().manual_seed(0)
    W, b = torch.randn(N, K, generator=generator), torch.randn(N, generator=generator)
    x = torch.randn(n, 1, K, generator=generator)
    bias = b if biased else None
    found = linear(x, W, bias)
    assert found.shape == (n, 1, N)
    assert torch.allclose(found, F.linear(x, W, bias), atol=1e-4)


# -- heads

def three_heads(**more):
    return small(objectives=("a", "b", "c"), **more)


WEIGHTS = [(1, 1, 1), (0.7, 0.3, 0), (5, 0.5, 2), (0, 0, 1), (1e-6, 0, 1e-6)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_mix_of_logits_is_the_logits_of_the_mix(weights):
    """Weights not divided by their sum (a hidden temperature), or a fold that leaves out a head."""
    model = three_heads()
    h = model(tokens(2, 5))
    mix = 0
    for w, head in zip(weights, model.heads):
        mix = mix + w / sum(weights) * (h @ head.weight.T)
    assert close(model.logits(h, weights), mix)
    assert close(model.logits(h, torch.tensor(weights)), mix)
    assert close(h @ model.fold(list(weights)).T, mix)


def test_one_head_by_index_name_or_one_hot():
    """An objective's name that leads to its neighbour's head."""
    model = three_heads()
    h = model(tokens(1, 3))
    for i, name in enumerate("abc"):
        expected = h @ model.heads[i].weight.T
        one_hot = [float(j == i) for j in range(3)]
        assert model.weights(name).tolist() == one_hot
        for weights in (i, name, one_hot):
            assert torch.equal(model.logits(h, weights), expected)
    assert torch.equal(model.logits(h), h @ model.heads[0].weight.T)


@pytest.mark.parametrize("weights, words", [
    ((1, -0.1, 1), "non-negative"), ((0, 0, 0), "positive sum"),
    ((1, float("nan"), 1), "weights must be"), ((1, float("inf"), 1), "weights must be"),
    ((1, 1), "3 non-negative"), ((1, 1, 1, 1), "3 non-negative"), ((), "3 non"),
    ([[1, 1, 1]], "3 non-negative"), (3, "no head 3"), (-1, "no head -1"),
    ("d", "no head named 'd'.* a, b, c")])
def test_bad_weights_are_refused(weights, words):
    """A negative weight subtracts an objective, a zero sum divides by zero, -1 means the last head
    in Python."""
    with pytest.raises(InputError, match=words):
        three_heads().logits(torch.zeros(1, 16), weights)


def test_with_heads_makes_untied_copies():
    """Head copies that share memory train each other, the original, or (as in the published code)
    the embedding."""
    model = three_heads()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new = model.with_heads(["x", "y"])
    assert new.config.objectives == ("x", "y") and model.config.objectives == ("a", "b", "c")
    assert len(new.heads) == 2
    for head in new.heads:
        assert torch.equal(head.weight, model.heads[0].weight)              # std 0: exact copies
    assert close(new(tokens(2, 5)), model(tokens(2, 5)))
    new.heads[0].weight.zero_()
    assert torch.equal(new.heads[1].weight, model.heads[0].weight)
    for p in new.parameters():
        p.fill_(7.0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_with_heads_noise():
    """Noise that is the same for all heads breaks no symmetry; noise from global state breaks
    reproducibility."""
    model, made = small(vocab_size=500), []
    for seed in (4, 4, 5):
        generator = torch.Generator().manual_seed(seed)
        made.append(model.with_heads("xyz", std=0.02, generator=generator))
    a, b, other = made
    noise = [head.weight - model.heads[0].weight for head in a.heads]
    assert all(abs(float(n.std()) - 0.02) < 0.001 for n in noise)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(a.heads[0].weight, other.heads[0].weight)
    assert all(torch.equal(x.weight, y.weight) for x, y in zip(a.heads, b.heads))
    assert torch.equal(a.embed.weight, model.embed.weight)


# -- safetensors

def every_dtype():
    """Tensors of every dtype, of odd sizes and values."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, dtype in DTYPES.items():
        found[name] = (torch.randn(3, 5, generator=generator) * 100).to(dtype)
    found["U8"] = torch.tensor([0, 1, 128, 255], dtype=torch.uint8)
    found["I64"] = torch.tensor([[2**62, -2**63]])
    found["special"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    found["scalar"] = torch.tensor(2.5)
    found["empty"] = torch.zeros(0, 4)
    found["view"] = torch.arange(12.).view(3, 4).T
    found["é/ü"] = torch.ones(1)
    return found


def bits(t):
    return t.contiguous().view(-1).view(torch.uint8).tolist()


def test_safetensors_round_trip_is_bit_exact(tmp_path):
    """A dtype that is converted, a transposed view written in memory order, an odd-sized tensor
    that shifts the rest, metadata that is lost."""
    path, tensors = str(tmp_path / "x.safetensors"), every_dtype()
    save_safetensors(tensors, path, {"step": "7"})
    again = load_safetensors(path)
    assert set(again) == set(tensors)
    for name, t in tensors.items():
        assert again[name].dtype == t.dtype and again[name].shape == t.shape
        assert bits(again[name]) == bits(t)
    assert read_metadata(path) == {"format": "pt", "step": "7"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_safetensors_by_hand(tmp_path):
    """A reader and a writer that share a mistake agree with each other and with nobody else."""
    path = tmp_path / "x"
    # b is not aligned: the format allows it.
    header = {"__metadata__": {"format": "pt"}, "b": entry("F32", [2], 1, 9),
              "a": entry("U8", [1], 0, 1)}
    path.write_bytes(raw(header, b"\x07" + struct.pack("<2f", 1.5, -2.0)))
    found = load_safetensors(str(path))
    assert found["a"].tolist() == [7] and found["b"].tolist() == [1.5, -2.0]
    three = torch.tensor(3, dtype=torch.int16)
    save_safetensors({"w": torch.tensor([[1.0, 2.0]]), "n": three}, str(path))
    content = path.read_bytes()
    n = struct.unpack("<Q", content[:8])[0]
    expected = {"__metadata__": {"format": "pt"}, "w": entry("F32", [1, 2], 0, 8),
                "n": entry("I16", [], 8, 10)}
    assert json.loads(content[8:8 + n]) == expected
    assert content[8 + n:] == struct.pack("<2fh", 1.0, 2.0, 3) and n % 8 == 0


def lie(words, data=b"1234", **changes):
    """A file of one tensor whose entry lies."""
    return raw({"t": {k: v for k, v in (F4 | changes).items() if v is not None}}, data), words


LIES = {
    "empty file": (b"", "not a safetensors file"),
    "cut in the length": (b"\x08\0\0", "not a safetensors file"),
    "length beyond the file": (raw({}, length=1000), "header of 1000 bytes"),
    "length of 2**63": (raw({}, length=2**63), "header of 9223372036854775808 bytes"),
    "header without length": (raw(b"", b"abcd"), "header of 0 bytes"),
    "not JSON": (raw(b"{nope}"), "broken safetensors header"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "broken safetensors header"),
    "deep nesting": (raw(b"[" * 100_000), "broken safetensors header"),
    "list": (raw([]), "not an object"),
    "same name twice": (raw(TWICE, b"1234"), "twice"),
    "entry is a number": (raw({"t": 4}), "'t'"),
    "unknown dtype": lie("'t' has dtype 'F8_E4M3', known are F64, F32", dtype="F8_E4M3"),
    "dtype is a list": lie("'t' has dtype", dtype=[]),
    "no dtype": lie("'t' has dtype", dtype=None),
    "no shape": lie("'t' has shape", shape=None),
    "negative shape": lie("'t' has shape", shape=[-1, -1]),
    "float shape": lie("'t' has shape", shape=[1.0]),
    "bool shape": lie("'t' has shape", shape=[True]),
    "overflowing shape": lie("'t' has shape", b"", shape=[2**47, 2**47, 0], data_offsets=[0, 0]),
    "three offsets": lie("'t' has shape", data_offsets=[0, 2, 4]),
    "beyond the file": lie("'t' has shape", shape=[2], data_offsets=[0, 8]),
    "negative start": lie("'t' has shape", data_offsets=[-4, 0]),
    "end before start": lie("'t' has shape", shape=[0], data_offsets=[4, 0]),
    "wrong bytes": lie("'t' has shape [2], which does not fill bytes [0, 4]", shape=[2]),
    "truncated data": lie("'t' has shape", b"1234567", shape=[2], data_offsets=[0, 8]),
    "overlap": (raw({"s": F4, "t": entry("F32", [1], 2, 6)}, b"123456"), "'t' starts at byte 2"),
    "same bytes twice": (raw({"s": F4, "t": F4}, b"1234"), "'t' starts at byte 0"),
    "gap": (raw({"s": F4, "t": entry("F32", [1], 6, 10)}, b"1234567890"), "'t' starts at byte 6"),
    "bytes left over": (raw({"t": F4}, b"12345"), "end at byte 4"),
}


@pytest.mark.parametrize("name", LIES)
def test_safetensors_lies_are_named(tmp_path, name):
    """A checkpoint is untrusted: a header that lies reads other tensors' bytes, or ends in a crash
    without a name."""
    content, words = LIES[name]
    path = tmp_path / "evil.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as e:
        load_safetensors(str(path))
    assert str(path) in str(e.value) and words in str(e.value)


def damaged(good, rng):
    """Bytes with a few of them changed, added or taken away."""
    content = bytearray(good)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, kind = rng.randrange(len(content)), rng.random()
        if kind < 0.7:
            likely = ord(rng.choice('{}[],:"0123456789-.eE'))
            content[at] = rng.choice((rng.randrange(256), likely))
        elif kind < 0.85:
            content.insert(at, rng.randrange(256))
        else:
            del content[at:at + rng.choice((1, 3))]
    return bytes(content)


def test_safetensors_survive_random_damage(tmp_path):
    """A damaged download may be refused or read; it must never raise anything else, and never read
    out of bounds."""
    path, rng, outcomes = tmp_path / "x", random.Random(0), {"read": 0, "refused": 0}
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int8), "c": torch.ones(40)}
    save_safetensors(tensors, str(path))
    good = path.read_bytes()
    for _ in range(2500):
        content = damaged(good, rng)
        path.write_bytes(content)
        try:
            found = load_safetensors(str(path))
        except InputError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert sum(t.nbytes for t in found.values()) <= len(content)
        assert all(len(bits(t)) == t.nbytes for t in found.values())
    # Damage in the data is read, damage in the header refused.
    assert min(outcomes.values()) > 50, outcomes


# -- Hugging Face directories

def same_parameters(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    kept = {k: v for k, v in config.items() if v is not None}
    path.write_text(json.dumps(kept))


def edit_tensors(directory, changes):
    path = str(directory / "model.safetensors")
    tensors = {k: v.clone() for k, v in load_safetensors(path).items()} | changes
    kept = {k: v for k, v in tensors.items() if v is not None}
    save_safetensors(kept, path)


BIASED = {"attn_bias": True, "out_bias": True}


@pytest.mark.parametrize("more", [{}, BIASED, BIASED | {"mlp_bias": True, "n_kv_head": 1},
                                  {"head_dim": 8, "rope_theta": 500.0, "norm_eps": 1e-3}])
def test_save_and_load_with_heads(tmp_path, more):
    """gate and up, or q and k, swapped on both ways; biases, head_dim, theta or eps forgotten in
    config.json."""
    model, ids = three_heads(**more), tokens(2, 9)
    save_hf(model, str(tmp_path))
    again = load_hf(str(tmp_path))
    assert same_parameters(model, again)
    shapes = [vars(m.config) | {"init_std": 0, "hf": None} for m in (model, again)]
    assert shapes[0] == shapes[1]
    a, b = model(ids), again(ids)
    assert torch.equal(a, b) and torch.equal(model.logits(a, "b"), again.logits(b, "b"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["objectives"] == ["a", "b", "c"]
    # Other programs see the uniform mix.
    tensors = load_safetensors(str(tmp_path / "model.safetensors"))
    assert close(tensors["lm_head.weight"], sum(h.weight for h in model.heads) / 3)


@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [3, 0, 1], "b", 2])
def test_a_folded_export_is_the_mix(tmp_path, weights):
    """An export with the wrong head: the model that others load is not the one that was
    measured."""
    model, ids = three_heads(), tokens(2, 6)
    save_hf(model, str(tmp_path), weights)
    one = load_hf(str(tmp_path))
    assert len(one.heads) == 1
    assert close(one.logits(one(ids)), model.logits(model(ids), weights))
    config = json.loads((tmp_path / "config.json").read_text())
    assert "objectives" not in config and config["tie_word_embeddings"] is False
    names = load_safetensors(str(tmp_path / "model.safetensors"))
    assert not any(name.startswith("heads.") for name in names)


def test_load_makes_exact_untied_copies_of_the_head(tmp_path):
    """Loaded heads that differ, share memory, or are not the checkpoint's lm_head: the loss would
    not start at ln 2."""
    model = three_heads()
    save_hf(model, str(tmp_path), "b")
    again = load_hf(str(tmp_path), objectives=["x", "y"])
    assert again.config.objectives == ("x", "y")
    assert all(torch.equal(h.weight, model.heads[1].weight) for h in again.heads)
    again.heads[0].weight.zero_()
    assert torch.equal(again.heads[1].weight, model.heads[1].weight)
    # Of a file with heads, objectives given means its lm_head, the mix.
    save_hf(model, str(tmp_path))
    again = load_hf(str(tmp_path), objectives=["x", "y"])
    assert len(again.heads) == 2 and close(again.heads[1].weight, model.fold([1, 1, 1]))


def test_a_tied_checkpoint(tmp_path):
    """A tied head that stays tied: training the head would move the embedding."""
    model = small()
    save_hf(model, str(tmp_path))
    edit_config(tmp_path, tie_word_embeddings=True, objectives=None)
    edit_tensors(tmp_path, {"lm_head.weight": None, "heads.0.weight": None})
    again = load_hf(str(tmp_path), objectives=["x", "y"])
    assert all(torch.equal(h.weight, model.embed.weight) for h in again.heads)
    again.heads[0].weight.zero_()
    assert torch.equal(again.embed.weight, model.embed.weight)
    assert torch.equal(again.heads[1].weight, model.embed.weight)
    save_hf(again, str(tmp_path), "y")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("name, tensor, words", [
    (Q, None, f"tensor '{Q}' is missing"),
    ("model.norm.weight", None, "'model.norm.weight' is missing"),
    ("lm_head.weight", None, "'lm_head.weight' is missing"),
    (Q, torch.zeros(17, 16), r"q_proj.*has shape \(17, 16\).*config.json wants \(16, 16\)"),
    (Q, torch.zeros(16, 17), "q_proj.*has shape"),
    (Q, torch.tensor(1.0), "q_proj.*has shape"),
    (Q, torch.ones(16, 16, dtype=torch.int64), "q_proj.*of torch.int64"),
    ("model.embed_tokens.weight", torch.zeros(23), "embed_tokens.weight' has shape"),
    ("model.layers.1.self_attn.q_proj.bias", torch.zeros(16), "q_proj.bias' is unknown"),
    ("model.layers.2.mlp.up_proj.weight", torch.ones(16), "layers.2.mlp.up_proj.*is unknown")])
def test_checkpoint_tensors_must_fit(tmp_path, name, tensor, words):
    """Missing tensors left at their random start, or ignored ones (a bias, a layer): plausible, and
    wrong."""
    save_hf(small(), str(tmp_path), 0)
    edit_tensors(tmp_path, {name: tensor})
    with pytest.raises(InputError, match=words) as e:
        load_hf(str(tmp_path))
    assert "model.safetensors" in str(e.value)


def test_checkpoint_without_its_files(tmp_path):
    """A directory that lacks a file ends in a traceback instead of the file's name."""
    with pytest.raises(InputError, match="config.json: no such file"):
        load_hf(str(tmp_path))
    save_hf(small(), str(tmp_path), 0)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors: no such file"):
        load_hf(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json"):
        load_hf(str(tmp_path))


@pytest.mark.parametrize("kind", [{"position": "learned"}, {"norm": "layer"}, {"mlp": "gelu"},
                                  {"qk_norm": True}, {"attn_bias": True}])
def test_a_model_that_is_no_llama_is_not_half_exported(tmp_path, kind):
    """Weights written under Llama names for a model that Llama code would compute differently, or
    half a directory."""
    with pytest.raises(InputError, match="Llama"):
        save_hf(small(**kind), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_bad_weights_are_refused_before_anything_is_written(tmp_path):
    """An export that fails after it has replaced half of an old one."""
    with pytest.raises(InputError, match="no head named"):
        save_hf(three_heads(), str(tmp_path / "out"), "nope")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_travels_with_the_model(gpt, tokenizer, tmp_path):
    """A checkpoint read with another vocabulary, or special ids missing in config.json: generation
    never ends."""
    save_hf(gpt, str(tmp_path))
    again = load_hf(str(tmp_path))
    assert again.tokenizer.pieces == tokenizer.pieces
    assert again.tokenizer.eos_id == tokenizer.eos_id
    assert again.with_heads(["x"]).tokenizer is again.tokenizer
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_id
    assert config["pad_token_id"] == tokenizer.pad_id
    save_hf(small(), str(tmp_path / "bare"))
    assert load_hf(str(tmp_path / "bare")).tokenizer is None
    # 23 rows of embedding, some hundred ids.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).write_bytes((tmp_path / name).read_bytes())
    with pytest.raises(InputError, match="its tokenizer has ids up to"):
        load_hf(str(tmp_path / "bare"))


def test_a_model_with_more_rows_than_ids(tokenizer, tmp_path):
    """Ids without a piece end in an index error: the boundary masks must cover them too."""
    n = tokenizer.n_vocab
    wide = small(vocab_size=n + 5)
    wide.tokenizer = tokenizer
    save_hf(wide, str(tmp_path))
    again = load_hf(str(tmp_path)).tokenizer
    assert again.n_vocab == n + 5
    assert len(again.boundary_masks("newline")[0]) == n + 6
    assert again.decode([n + 4]) == ""


def test_stories260k_tells_its_story(stories):
    """A real checkpoint, its own documented text: any mistake in rope, GQA, norms, tying, BOS or
    the tokenizer."""
    model = load_hf(stories)
    cache, ids = model.new_cache(1, 64), [1]
    for _ in range(50):
        h = model(torch.tensor([ids[-1:]]), cache)
        ids.append(int(model.logits(h).argmax()))
    text = model.tokenizer.decode(ids).lstrip()
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to "
                           "play outside in the park.")
    # The head is a copy now.
    assert sum(p.numel() for p in model.parameters()) == 260_032 + 512 * 64
    assert model.tokenizer.n_vocab == 512


@pytest.mark.parametrize("device, capabilities, emulated", [
    ("cpu", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True),
    ("cpu", {"avx512_bf16": True, "amx_bf16": False}, False),
    ("cpu", {"neon": True, "bf16": True}, False), ("cpu", {"neon": True}, True),
    ("cuda", {"avx2": True}, False)])
def test_which_processors_only_emulate_bf16(device, capabilities, emulated, monkeypatch):
    """A warning on the processors that compute fast in bfloat16, none on those that do not."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert emulates_bf16(device) == emulated
