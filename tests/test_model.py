"""model.py: backbone, KV cache, heads, safetensors, checkpoints. Every docstring states the bug that its test prevents."""
import json
import math
import random
import struct

import pytest
import torch
import torch.nn.functional as F

from data import InputError
from model import (DTYPES, GPT, GPTConfig, KVCache, linear, load_hf, load_safetensors,
                   rotate, save_hf, save_safetensors)

SHAPES = [(p, n, m, kv) for p in ("rope", "learned") for n in ("rms", "layer") for m in ("swiglu", "gelu") for kv in (1, 2, 4)]


def small(position="rope", norm="rms", mlp="swiglu", n_kv_head=2, **more):
    """A small random model whose every parameter matters: biases and norms are random too."""
    settings = dict(vocab_size=23, n_layer=2, n_head=4, d_model=16, d_ff=20, max_len=32, init_std=0.3) | more
    generator = torch.Generator().manual_seed(1)
    model = GPT(GPTConfig(position=position, norm=norm, mlp=mlp, n_kv_head=n_kv_head, **settings), generator)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def tokens(rows, T, seed=0):
    return torch.randint(0, 23, (rows, T), generator=torch.Generator().manual_seed(seed))


def close(a, b):
    return torch.allclose(a, b, atol=2e-5, rtol=1e-4)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# -- backbone

def test_rotary_positions_by_hand():
    """Rotation by the wrong angle or of interleaved pairs: a real Llama checkpoint turns into noise."""
    model = small(head_dim=4, max_len=101)
    unit = torch.eye(4)[:2].view(1, 2, 1, 4)                   # e0 at position 1, e1 at position 100
    at = torch.tensor([1, 100])
    out = rotate(unit, model.cos[at][None, :, None], model.sin[at][None, :, None])[0, :, 0]
    assert close(out[0], torch.tensor([math.cos(1), 0, math.sin(1), 0]))           # theta^0 = 1
    assert close(out[1], torch.tensor([0, math.cos(1), 0, math.sin(1)]))           # theta^(-2/4) = 1/100


def test_activations_by_hand():
    """Another GELU than GPT-2's, or gate and up exchanged in SwiGLU: a loaded checkpoint is slightly, silently wrong."""
    x = torch.tensor([[-2.0, 0.5]])
    for kind, expected in (("gelu", 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3)))),
                           ("swiglu", x / (1 + torch.exp(-x)) * 3 * x)):
        mlp = small(mlp=kind, d_model=2, n_head=1, n_kv_head=1, d_ff=2).layers[0].mlp
        mlp.up.weight.copy_(torch.cat((torch.eye(2), 3 * torch.eye(2)))[:len(mlp.up.weight)])
        mlp.down.weight.copy_(torch.eye(2))
        assert torch.allclose(mlp(x), expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES[::3])
def test_no_token_sees_the_future(shape):
    """Attention without a causal mask: training looks perfect and sampling is garbage."""
    model, ids = small(*shape), tokens(1, 8)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 23
    a, b = model(ids)[0], model(changed)[0]
    assert close(a[:5], b[:5])
    assert not any(close(a[t], b[t]) for t in range(5, 8))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_earlier_token_and_its_place_matters(shape):
    """Positions that are dropped (rope or learned), or a KV head wired to nothing: order would not matter."""
    model, ids = small(*shape), tokens(1, 6, seed=3)
    swapped = ids[:, [1, 0, 2, 3, 4, 5]]
    assert ids[0, 0] != ids[0, 1] and not close(model(ids)[0, -1], model(swapped)[0, -1])


def test_initialisation_depends_on_its_generator_only():
    """Weights drawn from the global random state: the same seed gives another model after any other draw."""
    def make():
        return GPT(GPTConfig(23, position="learned", norm="layer"), torch.Generator().manual_seed(5)).state_dict()
    torch.manual_seed(1)
    a = make()
    torch.manual_seed(2)
    b = make()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("bad", [{"n_kv_head": 3}, {"position": "alibi"}, {"norm": "batch"}, {"mlp": "relu"}, {"n_layer": 0},
                                 {"d_model": "96"}, {"vocab_size": -1}, {"head_dim": 24.0}, {"head_dim": -2}])
def test_unusable_configuration(bad):
    """A misspelt option that silently means the other choice; a --init whose config.json ends in a traceback."""
    with pytest.raises(ValueError, match="unusable model configuration"):
        GPTConfig(**({"vocab_size": 23} | bad))


# -- cache

@pytest.mark.parametrize("n", [3, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_equals_uncached(shape, n):
    """SDPA's is_causal is aligned top-left: wrong as soon as several tokens are appended to a cache (trap 3)."""
    model, ids = small(*shape), tokens(n, 12)
    cache = model.new_cache(n, 4)                       # too small on purpose: it must grow and lose nothing
    parts = [model(part, cache) for part in ids.split([5, 1, 4, 2], 1)]
    assert close(torch.cat(parts, 1), model(ids))
    assert cache.lengths.tolist() == [12] * n


@pytest.mark.parametrize("G, R", [(3, 2), (8, 2), (30, 10), (800, 200)])
def test_attend_is_scaled_dot_product_attention(G, R):
    """Many short sequences attend without the scale, or to places that are masked; or the mask is forgotten with many rows."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(G, 2, n, 6, generator=generator) for n in (R, 7, 7))
    seen = (torch.rand(G, 1, R, 7, generator=generator) < 0.5) | (torch.arange(7) == 3)
    for mask in (None, torch.zeros(seen.shape).masked_fill(~seen, -math.inf)):
        assert torch.allclose(attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_rows_equal_each_row_alone(shape):
    """Left padding, shared positions, or stale places in sight change a row's answer with its neighbours (trap 4)."""
    model, lengths, more = small(*shape), torch.tensor([3, 7, 1]), torch.tensor([4, 1, 6])
    rows, ids = [tokens(1, 20, seed=s)[0] for s in range(3)], torch.full((3, 7), 22)
    for b, n in enumerate(lengths):
        ids[b, :n] = rows[b][:n]
    cache = model.new_cache(3, 20)
    first = model(ids, cache)
    assert close(first, model(ids))                     # padded on the right, with and without a cache
    cache.rollback(lengths)
    assert cache.lengths.tolist() == [3, 7, 1]
    ids = torch.full((3, 6), 21)
    for b, (n, m) in enumerate(zip(lengths, more)):
        ids[b, :m] = rows[b][n:n + m]
    second = model(ids, cache)
    cache.rollback(lengths + more)
    third = model(torch.stack([rows[b][n + m:n + m + 2] for b, (n, m) in enumerate(zip(lengths, more))]), cache)
    for b, (n, m) in enumerate(zip(lengths, more)):
        alone = model(rows[b][None, :n + m + 2])[0]
        assert close(torch.cat([first[b, :n], second[b, :m], third[b]]), alone)


def test_neighbours_and_padding_leave_a_row_alone():
    """A pad token that is attended to, or a batch that is normalised together: tables depend on the batch size."""
    model, ids = small(), tokens(3, 9)
    alone = model(ids[:1, :4])[0]
    for pad in (0, 22):
        batch = ids.clone()
        batch[0, 4:] = pad
        assert close(model(batch)[0, :4], alone)


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
        assert close(h[b], model(torch.cat([ids[b, :n], other[b, :2]])[None])[0, n:])
    cache.rollback(torch.tensor([9, 1]))                  # beyond what a row holds: nothing to forget there
    assert cache.lengths.tolist() == [6, 1]


def test_rollback_of_candidates_forgets_the_step():
    """A step that was tried and thrown away must not be seen by the next try, nor may the prefix suffer."""
    model, prompts = small(), tokens(2, 4)
    cache = model.new_cache(2)
    model(prompts, cache)
    cache = cache.fork(3)
    model(tokens(6, 5, seed=2), cache)
    cache.rollback(3)
    assert cache.lengths.tolist() == [3, 3]
    after = tokens(6, 2, seed=3)
    h = model(after, cache)
    for row in range(6):
        assert close(h[row], model(torch.cat([prompts[row // 3, :3], after[row]])[None])[0, 3:])


def forked(model, prompts, K, candidates):
    """Prompts (B, T) encoded once, forked into K, candidates (B K, n) fed token by token."""
    cache = model.new_cache(len(prompts))
    model(prompts, cache)
    cache = cache.fork(K)
    for t in range(candidates.shape[1]):
        model(candidates[:, t:t + 1], cache)
    return cache


@pytest.mark.parametrize("shape", [("rope", "rms", "swiglu", 2), ("learned", "layer", "gelu", 4)])
@pytest.mark.parametrize("winners", [[2, 0], [1, 1], [0, 2]])
def test_keep_commits_the_winner(shape, winners):
    """A loser's cache promoted, or promoted for some layers or rows only, or with tokens that it did not have: the text
    says one thing, the state another."""
    model, prompts, candidates, after = small(*shape), tokens(2, 4), tokens(6, 5, seed=2), tokens(6, 3, seed=3)
    lengths = torch.tensor([1, 5, 3, 4, 2, 5])
    cache = forked(model, prompts, 3, candidates)
    kept = lengths[torch.tensor([winners[0], winners[1] + 3])]
    cache.keep(torch.tensor(winners), kept)
    assert cache.lengths.tolist() == (4 + kept).tolist()
    h = model(after, cache)
    for row in range(6):
        continued = {}
        for k in range(3):
            c = row // 3 * 3 + k
            text = torch.cat([prompts[row // 3], candidates[c, :lengths[c]], after[row]])
            continued[k] = close(h[row], model(text[None])[0, -3:])
        assert [k for k in continued if continued[k]] == [winners[row // 3]]


def test_keep_again_and_again():
    """A step that is kept in the wrong place, or a step part that is not emptied: wrong from the second step on."""
    model, text = small(), tokens(1, 2)
    cache = model.new_cache(1)
    model(text, cache)
    cache = cache.fork(2)
    for step, (winner, length) in enumerate([(1, 4), (0, 3), (1, 1), (0, 5), (1, 70)]):
        candidates = tokens(2, length + 2, seed=step + 5) if length < 10 else tokens(2, 16, seed=9)
        h = model(candidates, cache)
        length = min(length, candidates.shape[1])
        for k in range(2):
            assert close(h[k], model(torch.cat([text, candidates[k:k + 1]], 1))[0, -candidates.shape[1]:])
        cache.keep(winner, torch.tensor([length]))
        text = torch.cat([text, candidates[winner:winner + 1, :length]], 1)
        assert cache.lengths.tolist() == [text.shape[1]]


def test_the_prefix_is_stored_once():
    """K copies of the prompt in memory, or a promotion that copies it: guided decoding slows down as the text grows."""
    model, prompts = small(), tokens(2, 20)
    cache = model.new_cache(2, 40)
    model(prompts, cache)
    before = cache.nbytes()
    cache = cache.fork(5)
    stores = [t.data_ptr() for t in (*cache.k, *cache.v)]
    per_token = 2 * model.config.n_layer * model.config.n_kv_head * model.config.head_dim * 4
    assert cache.nbytes() == before == 2 * 40 * per_token                        # room for 2 x 40 tokens, whatever K
    model(tokens(10, 3, seed=1), cache)
    assert cache.nbytes() == before                                             # 20 + 5 x 3 places of 40
    marked = [t.clone() for t in (*cache.k, *cache.v)]
    cache.keep(torch.tensor([4, 0]), torch.tensor([3, 2]))
    assert [t.data_ptr() for t in (*cache.k, *cache.v)] == stores               # nothing was moved,
    for old, new in zip(marked, (*cache.k, *cache.v)):                            # and only the steps' places were written
        changed = (old != new).any(-1).any(1)
        assert not changed[:, :20].any() and not changed[:, 23:].any() and changed[0, 20:23].all() and changed[1, 21]
    model(tokens(10, 6, seed=1), cache)
    assert cache.nbytes() <= before + 2 * 5 * 16 * per_token                   # prefix + K x step, and not K x prefix


def test_keep_in_some_groups_leaves_the_others():
    """A finished conversation that is overwritten while the others go on."""
    model, prompts, candidates = small(), tokens(3, 4), tokens(6, 4, seed=2)
    cache = forked(model, prompts, 2, candidates)
    cache.keep(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([2, 0]))      # group 2 keeps its 0, group 0 its 1
    after = tokens(6, 1, seed=4)
    h = model(after, cache)
    for row, kept in enumerate([(1, 3), (1, 3), (2, 0), (2, 0), (4, 2), (4, 2)]):
        text = torch.cat([prompts[row // 2], candidates[kept[0], :kept[1]], after[row]])
        assert close(h[row, 0], model(text[None])[0, -1])


@pytest.mark.parametrize("T", [1, 3])
def test_candidates_drop_out_of_a_step(T):
    """Rows that reached their boundary cost nothing, and the others must not notice: nor those of another sequence, nor the
    idle places of a grid, which repeat a row."""
    model, prompts, text = small(), tokens(3, 6), tokens(12, 9, seed=2)
    cache = model.new_cache(3, 30)
    model(prompts, cache)
    cache.rollback(torch.tensor([6, 2, 4]))
    cache = cache.fork(4)
    plan = [None, torch.tensor([[0, 1, 3], [4, 6, 6], [8, 9, 10]]), torch.tensor([[6, 6], [8, 10]])]
    for step, rows in enumerate(plan):
        index = torch.arange(12) if rows is None else rows.flatten()
        h = model(text[index, step * T:(step + 1) * T], cache, rows)
        for i, row in enumerate(index):
            past = torch.cat([prompts[row // 4, :[6, 2, 4][row // 4]], text[row, :(step + 1) * T]])
            assert close(h[i], model(past[None])[0, -T:])
    cache.keep(torch.tensor([2, 2]), torch.tensor([3 * T, 3 * T]), torch.tensor([1, 2]))
    assert cache.lengths.tolist() == [6, 2 + 3 * T, 4 + 3 * T]


def test_fork_leaves_the_prompt_as_it_was():
    """Candidates that write into the prompt's own places: the next fork starts from a polluted past."""
    model, ids = small(), tokens(2, 8)
    cache = model.new_cache(2, 8)
    model(ids[:, :4], cache)
    one, two = cache.fork(3), cache.fork(2)
    assert isinstance(one, KVCache) and one.lengths.tolist() == [4, 4] and (one.K, two.K) == (3, 2)
    model(tokens(6, 3, seed=1), one)
    h = model(ids[:, 4:].repeat_interleave(2, 0), two)
    assert close(h, model(ids)[:, 4:].repeat_interleave(2, 0))


@pytest.mark.parametrize("n, bias", [(1, False), (1, True), (5, False), (8, True), (9, False), (97, True)])
def test_few_rows_by_blocks_equal_the_plain_product(n, bias):
    """Blocks of W in another order, a bias added per block, batch dimensions lost."""
    generator = torch.Generator().manual_seed(0)
    for N, K in ((512, 256), (256, 512)):
        W, b = torch.randn(N, K, generator=generator), torch.randn(N, generator=generator) if bias else None
        x = torch.randn(n, 1, K, generator=generator)
        assert linear(x, W, b).shape == (n, 1, N) and torch.allclose(linear(x, W, b), F.linear(x, W, b), atol=1e-4)
        assert torch.equal(linear(x[:, 0].double(), W.double()), F.linear(x[:, 0].double(), W.double()))


# -- heads

def three_heads(**more):
    return small(objectives=("a", "b", "c"), **more)


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0.3, 0), (5, 0.5, 2), (0, 0, 1), (1e-6, 0, 1e-6)])
def test_a_mix_of_logits_is_the_logits_of_the_mix(weights):
    """Weights not divided by their sum (a hidden temperature), or a fold that leaves out a head."""
    model = three_heads()
    h = model(tokens(2, 5))
    each = torch.stack([h @ head.weight.T for head in model.heads])              # (3, B, T, V)
    w = torch.tensor(weights) / sum(weights)
    assert close(model.logits(h, weights), (w.view(3, 1, 1, 1) * each).sum(0))
    assert close(model.logits(h, torch.tensor(weights)), h @ model.fold(list(weights)).T)


def test_one_head_by_index_name_or_one_hot():
    """An objective's name that leads to its neighbour's head."""
    model = three_heads()
    h = model(tokens(1, 3))
    for i, name in enumerate("abc"):
        expected = h @ model.heads[i].weight.T
        one_hot = [float(j == i) for j in range(3)]
        assert all(torch.equal(model.logits(h, w), expected) for w in (i, name, one_hot))
        assert model.weights(name).tolist() == one_hot
    assert torch.equal(model.logits(h), h @ model.heads[0].weight.T)


@pytest.mark.parametrize("weights, words", [
    ((1, -0.1, 1), "non-negative"), ((0, 0, 0), "positive sum"), ((1, float("nan"), 1), "weights must be"),
    ((1, float("inf"), 1), "weights must be"), ((1, 1), "3 non-negative"), ((1, 1, 1, 1), "3 non-negative"), ((), "3 non"),
    ([[1, 1, 1]], "3 non-negative"), (3, "no head 3"), (-1, "no head -1"), ("d", "no head named 'd'.* a, b, c")])
def test_bad_weights_are_refused(weights, words):
    """A negative weight subtracts an objective, a zero sum divides by zero, -1 means the last head in Python."""
    with pytest.raises(InputError, match=words):
        three_heads().logits(torch.zeros(1, 16), weights)


def test_with_heads_makes_untied_copies():
    """Head copies that share memory train each other, the original, or (as in the published code) the embedding."""
    model = three_heads()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new = model.with_heads(["x", "y"])
    assert new.config.objectives == ("x", "y") and model.config.objectives == ("a", "b", "c") and len(new.heads) == 2
    assert all(torch.equal(head.weight, model.heads[0].weight) for head in new.heads)          # std 0: exact copies
    assert close(new(tokens(2, 5)), model(tokens(2, 5)))
    new.heads[0].weight.zero_()
    assert torch.equal(new.heads[1].weight, model.heads[0].weight)
    for p in new.parameters():
        p.fill_(7.0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_with_heads_noise():
    """Noise that is the same for all heads breaks no symmetry; noise from global state breaks reproducibility."""
    model = small(vocab_size=500)
    make = lambda seed: model.with_heads("xyz", std=0.02, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(1)
    a, b, other = make(4), make(4), make(5)
    noise = [head.weight - model.heads[0].weight for head in a.heads]
    assert all(abs(float(n.std()) - 0.02) < 0.001 for n in noise)
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(a.heads[0].weight, other.heads[0].weight)
    assert all(torch.equal(x.weight, y.weight) for x, y in zip(a.heads, b.heads))
    assert torch.equal(a.embed.weight, model.embed.weight)


# -- safetensors

def every_dtype():
    g = torch.Generator().manual_seed(0)
    out = {name: (torch.randn(3, 5, generator=g) * 100).to(dtype) for name, dtype in DTYPES.items()}
    out["U8"] = torch.tensor([0, 1, 128, 255], dtype=torch.uint8)
    out["I64"] = torch.tensor([[2**62, -2**63]])
    out["special"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return out | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "view": torch.arange(12.).view(3, 4).T, "é/ü": torch.ones(1)}


def bits(t):
    return t.contiguous().view(-1).view(torch.uint8).tolist()


def test_safetensors_round_trip_is_bit_exact(tmp_path):
    """A dtype that is converted, a transposed view written in memory order, an odd-sized tensor that shifts the rest."""
    path, tensors = str(tmp_path / "x.safetensors"), every_dtype()
    save_safetensors(tensors, path)
    again = load_safetensors(path)
    assert set(again) == set(tensors)
    for name, t in tensors.items():
        assert again[name].dtype == t.dtype and again[name].shape == t.shape and bits(again[name]) == bits(t)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def raw(header, data=b"", length=None):
    """The bytes of a file with this header (object or bytes) and these data bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_safetensors_by_hand(tmp_path):
    """A reader and a writer that share a mistake agree with each other and with nobody else."""
    path = tmp_path / "x"
    path.write_bytes(raw({"__metadata__": {"format": "pt"}, "b": entry("F32", [2], 1, 9), "a": entry("U8", [1], 0, 1)},
                         b"\x07" + struct.pack("<2f", 1.5, -2.0)))          # b is not aligned: the format allows it
    assert {k: v.tolist() for k, v in load_safetensors(str(path)).items()} == {"a": [7], "b": [1.5, -2.0]}
    save_safetensors({"w": torch.tensor([[1.0, 2.0]]), "n": torch.tensor(3, dtype=torch.int16)}, str(path))
    content = path.read_bytes()
    n = struct.unpack("<Q", content[:8])[0]
    assert json.loads(content[8:8 + n]) == {"__metadata__": {"format": "pt"}, "w": entry("F32", [1, 2], 0, 8),
                                            "n": entry("I16", [], 8, 10)}
    assert content[8 + n:] == struct.pack("<2fh", 1.0, 2.0, 3) and n % 8 == 0


F4 = entry("F32", [1], 0, 4)
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
    "same name twice": (raw(b'{"t":' + json.dumps(F4).encode() + b',"t":' + json.dumps(F4).encode() + b"}", b"1234"), "twice"),
    "entry is a number": (raw({"t": 4}), "'t'"),
    "unknown dtype": (raw({"t": entry("F8_E4M3", [4], 0, 4)}, b"1234"), "'t' has dtype 'F8_E4M3'"),
    "dtype is a list": (raw({"t": entry([], [1], 0, 4)}, b"1234"), "'t' has dtype"),
    "no dtype": (raw({"t": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"), "'t' has dtype"),
    "no shape": (raw({"t": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"), "'t' has shape"),
    "negative shape": (raw({"t": entry("F32", [-1, -1], 0, 4)}, b"1234"), "'t' has shape"),
    "float shape": (raw({"t": entry("F32", [1.0], 0, 4)}, b"1234"), "'t' has shape"),
    "bool shape": (raw({"t": entry("F32", [True], 0, 4)}, b"1234"), "'t' has shape"),
    "overflowing shape": (raw({"t": entry("F32", [2**47, 2**47, 0], 0, 0)}), "'t' has shape"),
    "three offsets": (raw({"t": F4 | {"data_offsets": [0, 2, 4]}}, b"1234"), "'t' has shape"),
    "beyond the file": (raw({"t": entry("F32", [2], 0, 8)}, b"1234"), "'t' has shape"),
    "negative start": (raw({"t": entry("F32", [1], -4, 0)}, b"1234"), "'t' has shape"),
    "end before start": (raw({"t": entry("F32", [0], 4, 0)}, b"1234"), "'t' has shape"),
    "wrong bytes": (raw({"t": entry("F32", [2], 0, 4)}, b"1234"), "'t': shape [2] of F32 is not 4 bytes"),
    "truncated data": (raw({"t": entry("F32", [2], 0, 8)}, b"1234567"), "'t' has shape"),
    "overlap": (raw({"s": F4, "t": entry("F32", [1], 2, 6)}, b"123456"), "'t' starts at byte 2"),
    "same bytes twice": (raw({"s": F4, "t": F4}, b"1234"), "'t' starts at byte 0"),
    "gap": (raw({"s": F4, "t": entry("F32", [1], 6, 10)}, b"1234567890"), "'t' starts at byte 6"),
    "bytes left over": (raw({"t": F4}, b"12345"), "end at byte 4"),
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_lies_are_named(tmp_path, lie):
    """A checkpoint is untrusted: a header that lies reads other tensors' bytes, or ends in a crash without a name."""
    content, words = LIES[lie]
    path = tmp_path / "evil.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as e:
        load_safetensors(str(path))
    assert str(path) in str(e.value) and words in str(e.value)


def test_safetensors_missing_file(tmp_path):
    """A missing file reported as a broken one."""
    with pytest.raises(InputError, match="none.safetensors: no such file"):
        load_safetensors(str(tmp_path / "none.safetensors"))


def test_safetensors_survive_random_damage(tmp_path):
    """A damaged download may be refused or read; it must never raise anything else, and never read out of bounds."""
    path, rng = tmp_path / "x", random.Random(0)
    save_safetensors({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int8), "c": torch.ones(40)}, str(path))
    good, outcomes = path.read_bytes(), {"read": 0, "refused": 0}
    for _ in range(2500):
        content = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at, kind = rng.randrange(len(content)), rng.random()
            if kind < 0.7:
                content[at] = rng.choice((rng.randrange(256), ord(rng.choice('{}[],:"0123456789-.eE'))))
            elif kind < 0.85:
                content.insert(at, rng.randrange(256))
            else:
                del content[at:at + rng.choice((1, 3))]
        path.write_bytes(content)
        try:
            tensors = load_safetensors(str(path))
        except InputError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert sum(t.numel() * t.element_size() for t in tensors.values()) <= len(content)
            assert all(len(bits(t)) == t.numel() * t.element_size() for t in tensors.values())
    assert min(outcomes.values()) > 50, outcomes          # damage in the data is read, damage in the header refused


# -- Hugging Face directories

def same_parameters(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("more", [{}, {"attn_bias": True, "out_bias": True}, {"attn_bias": True, "out_bias": True, "mlp_bias": True, "n_kv_head": 1},
                                  {"head_dim": 8, "rope_theta": 500.0, "norm_eps": 1e-3}])
def test_save_and_load_with_heads(tmp_path, more):
    """gate and up, or q and k, swapped on both ways; biases, head_dim, theta or eps forgotten in config.json."""
    model, ids = three_heads(**more), tokens(2, 9)
    save_hf(model, str(tmp_path))
    again = load_hf(str(tmp_path))
    assert same_parameters(model, again)
    c, d = (vars(m.config) | {"init_std": 0, "hf": None} for m in (model, again))
    assert c == d
    assert torch.equal(model(ids), again(ids)) and torch.equal(model.logits(model(ids), "b"), again.logits(again(ids), "b"))
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_safetensors(str(tmp_path / "model.safetensors"))
    assert config["tie_word_embeddings"] is False and config["objectives"] == ["a", "b", "c"]
    assert close(tensors["lm_head.weight"], sum(h.weight for h in model.heads) / 3)        # others see the uniform mix


def test_names_of_an_exported_checkpoint(tmp_path):
    """A round trip through our own names proves nothing: the file must hold q, k, gate and up where Llama keeps them."""
    model = small(attn_bias=True, out_bias=True)                    # 4 heads and 2 KV heads of 4, d_ff 20
    save_hf(model, str(tmp_path), weights=0)
    t, attn, mlp = load_safetensors(str(tmp_path / "model.safetensors")), model.layers[1].attn, model.layers[1].mlp
    prefix = "model.layers.1."
    for name, start, end in (("q", 0, 16), ("k", 16, 24), ("v", 24, 32)):
        assert torch.equal(t[f"{prefix}self_attn.{name}_proj.weight"], attn.qkv.weight[start:end])
        assert torch.equal(t[f"{prefix}self_attn.{name}_proj.bias"], attn.qkv.bias[start:end])
    assert torch.equal(t[f"{prefix}self_attn.o_proj.bias"], attn.out.bias)
    assert torch.equal(t[f"{prefix}mlp.gate_proj.weight"], mlp.up.weight[:20])
    assert torch.equal(t[f"{prefix}mlp.up_proj.weight"], mlp.up.weight[20:])
    assert torch.equal(t[f"{prefix}input_layernorm.weight"], model.layers[1].norm1.weight)
    assert torch.equal(t[f"{prefix}post_attention_layernorm.weight"], model.layers[1].norm2.weight)
    assert torch.equal(t["model.norm.weight"], model.norm.weight) and torch.equal(t["lm_head.weight"], model.heads[0].weight)
    assert torch.equal(t["model.embed_tokens.weight"], model.embed.weight)
    assert len(t) == 3 + 2 * 13 and all(v.dtype == torch.float32 for v in t.values())


@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [3, 0, 1], "b", 2])
def test_a_folded_export_is_the_mix(tmp_path, weights):
    """An export with the wrong head: the model that others load is not the one that was measured."""
    model, ids = three_heads(), tokens(2, 6)
    save_hf(model, str(tmp_path), weights)
    one = load_hf(str(tmp_path))
    assert len(one.heads) == 1 and close(one.logits(one(ids)), model.logits(model(ids), weights))
    config = json.loads((tmp_path / "config.json").read_text())
    assert "objectives" not in config and config["tie_word_embeddings"] is False
    assert not any(n.startswith("heads.") for n in load_safetensors(str(tmp_path / "model.safetensors")))


def test_load_makes_exact_untied_copies_of_the_head(tmp_path):
    """Loaded heads that differ, share memory, or are not the checkpoint's lm_head: the loss would not start at ln 2."""
    model = three_heads()
    save_hf(model, str(tmp_path), "b")
    again = load_hf(str(tmp_path), objectives=["x", "y"])
    assert again.config.objectives == ("x", "y")
    assert all(torch.equal(h.weight, model.heads[1].weight) for h in again.heads)
    again.heads[0].weight.zero_()
    assert torch.equal(again.heads[1].weight, model.heads[1].weight)
    save_hf(model, str(tmp_path))                     # a file with heads: objectives given means its lm_head, the mix
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
    assert torch.equal(again.embed.weight, model.embed.weight) and torch.equal(again.heads[1].weight, model.embed.weight)
    save_hf(again, str(tmp_path), "y")
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


def test_half_precision_checkpoint(tmp_path):
    """bfloat16 checkpoints read as such train in bfloat16; the loader promises float32."""
    model = small()
    save_hf(model, str(tmp_path), 0)
    path = str(tmp_path / "model.safetensors")
    save_safetensors({k: v.bfloat16() for k, v in load_safetensors(path).items()}, path)
    again = load_hf(str(tmp_path))
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert torch.equal(again.embed.weight, model.embed.weight.bfloat16().float())


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(directory, changes):
    path = str(directory / "model.safetensors")
    tensors = {k: v.clone() for k, v in load_safetensors(path).items()} | changes
    save_safetensors({k: v for k, v in tensors.items() if v is not None}, path)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("changes, words", [
    ({Q: None}, f"tensor '{Q}' is missing"), ({"model.norm.weight": None}, "'model.norm.weight' is missing"),
    ({"lm_head.weight": None}, "'lm_head.weight' is missing"),
    ({Q: torch.zeros(17, 16)}, r"q_proj.*has shape \(17, 16\).*config.json wants \(16, 16\)"),
    ({Q: torch.zeros(16, 17)}, "q_proj.*has shape"), ({Q: torch.tensor(1.0)}, "q_proj.*has shape"),
    ({"model.embed_tokens.weight": torch.zeros(23)}, "embed_tokens.weight' has shape"),
    ({"model.layers.1.self_attn.q_proj.bias": torch.zeros(16)}, "q_proj.bias' is unknown"),
    ({"model.layers.2.input_layernorm.weight": torch.ones(16)}, "layers.2.input_layernorm.weight' is unknown")])
def test_checkpoint_tensors_must_fit(tmp_path, changes, words):
    """Missing tensors left at their random start, or ignored ones (a bias, a layer): plausible, and wrong."""
    save_hf(small(), str(tmp_path), 0)
    edit_tensors(tmp_path, changes)
    with pytest.raises(InputError, match=words) as e:
        load_hf(str(tmp_path))
    assert "model.safetensors" in str(e.value)


def test_rotary_tables_in_old_checkpoints_are_ignored(tmp_path):
    """Old Llama exports carry inv_freq buffers; refusing them refuses half of the family."""
    save_hf(small(), str(tmp_path), 0)
    edit_tensors(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert same_parameters(load_hf(str(tmp_path)), small())


@pytest.mark.parametrize("changes, words", [
    ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM.*mixtral"),
    ({"model_type": None}, "only llama, mistral"), ({"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
    ({"hidden_act": "gelu"}, "gelu"), ({"hidden_size": None}, "'hidden_size' is missing"),
    ({"num_attention_heads": 0}, "unusable"), ({"num_key_value_heads": 3}, "unusable"), ({"hidden_size": "16"}, "unusable"),
    ({"num_hidden_layers": -1}, "unusable"), ({"rope_parameters": [1]}, "unusable"), ({"objectives": 5}, "unusable"),
    ({"num_hidden_layers": 3}, "layers.2.*is missing"), ({"intermediate_size": 21}, "has shape"),
    ({"vocab_size": 24}, "embed_tokens.weight' has shape"), ({"objectives": ["a", "b"]}, "'heads.0.weight' is missing")])
def test_configurations_that_are_not_computed_here(tmp_path, changes, words):
    """A checkpoint of another family, or with scaled positions, read as plain Llama answers nonsense without a word."""
    save_hf(small(), str(tmp_path), 0)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError, match=words) as e:
        load_hf(str(tmp_path))
    assert str(tmp_path) in str(e.value)


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


@pytest.mark.parametrize("model", [{"position": "learned"}, {"norm": "layer"}, {"mlp": "gelu"}])
def test_a_model_that_is_no_llama_is_not_half_exported(tmp_path, model):
    """Weights written under Llama names for a model that Llama code would compute differently, or half a directory."""
    with pytest.raises(InputError, match="Llama"):
        save_hf(small(**model), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_bad_weights_are_refused_before_anything_is_written(tmp_path):
    """An export that fails after it has replaced half of an old one."""
    with pytest.raises(InputError, match="no head named"):
        save_hf(three_heads(), str(tmp_path / "out"), "nope")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_travels_with_the_model(gpt, tokenizer, tmp_path):
    """A checkpoint read with another vocabulary, or special ids missing in config.json: generation never ends."""
    save_hf(gpt, str(tmp_path))
    again = load_hf(str(tmp_path))
    assert again.tokenizer.pieces == tokenizer.pieces and again.tokenizer.eos_id == tokenizer.eos_id
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_id, tokenizer.pad_id)
    assert again.with_heads(["x"]).tokenizer is again.tokenizer
    save_hf(small(), str(tmp_path / "bare"))
    assert load_hf(str(tmp_path / "bare")).tokenizer is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).write_bytes((tmp_path / name).read_bytes())
    with pytest.raises(InputError, match="its tokenizer has ids up to"):
        load_hf(str(tmp_path / "bare"))               # 23 rows of embedding, 416 ids
    wide = small(vocab_size=tokenizer.n_vocab + 5)    # ids without a piece: the boundary masks must cover them all the same
    wide.tokenizer = tokenizer
    save_hf(wide, str(tmp_path / "wide"))
    again = load_hf(str(tmp_path / "wide")).tokenizer
    assert again.n_vocab + 1 == len(again.boundary_masks("newline")[0]) == tokenizer.n_vocab + 6
    assert again.decode([tokenizer.n_vocab + 4]) == ""


def test_stories260k_tells_its_story(stories):
    """A real checkpoint, its own documented text: any mistake in rope, GQA, norms, tying, BOS or the tokenizer."""
    model = load_hf(stories)
    cache, ids = model.new_cache(1, 64), [1]
    for _ in range(50):
        ids.append(int(model.logits(model(torch.tensor([ids[-1:]]), cache)).argmax()))
    text = model.tokenizer.decode(ids).lstrip()
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside in the park.")
    assert sum(p.numel() for p in model.parameters()) == 260_032 + 512 * 64          # the head is a copy now
    assert model.tokenizer.n_vocab == 512
