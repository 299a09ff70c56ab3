"""model.py: one backbone with H heads, its KV cache, and checkpoints in and out.

Before: data.py; next: prm.py.

    h   = GPT(ids)           (B, T) -> (B, T, d)     the backbone, shared by all objectives
    z_i = W_i h              (B, T, d) -> (B, T, V)  head i, one for each objective
    z   = sum_i w_i z_i      any mix of heads is ONE ordinary head sum_i w_i W_i   (paper, Sec. 5)

Read GPTConfig, then KVCache: what every sequence has said, and what its K candidates say next. Then
the backbone, from rotary positions over Attention, MLP and Block to GPT: a transformer as published
many times, from GPT-2 to Qwen3. The rest is plumbing: the safetensors format, and Hugging Face
directories, whose names and fields stand in interop/checkpoints.py.
"""
import copy
import json
import math
import os
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import InputError, write_json
from interop import checkpoints as hf
from interop.parallel import gathered, is_sharded, like, rank, shard, whole, whole_file
from interop.tokenizer import load_tokenizer


# Fields of GPTConfig that are positive whole numbers, and fields of two kinds.
SIZES = ["vocab_size", "n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "max_len"]
KINDS = {"position": ["rope", "learned"], "norm": ["rms", "layer"], "mlp": ["swiglu", "gelu"]}


@dataclass
class GPTConfig:
    """The shape of a model. The defaults are the embedded experiment's; read_config finds those of
    a checkpoint. ValueError for a shape that cannot be."""

    vocab_size: int
    n_layer: int = 3
    n_head: int = 4
    n_kv_head: int = 2               # fewer than n_head: several query heads share keys and values
    d_model: int = 96
    d_ff: int = 256
    max_len: int = 128               # context length in tokens
    head_dim: int = 0                # 0: d_model / n_head
    position: str = "rope"           # rope | learned
    norm: str = "rms"                # rms | layer
    mlp: str = "swiglu"              # swiglu | gelu
    attn_bias: bool = False          # bias of queries, keys and values
    out_bias: bool = False           # bias of the attention's output
    mlp_bias: bool = False
    qk_norm: bool = False            # RMSNorm of every query and key (Qwen3)
    rope_theta: float = 10000.0
    rope_scaling: dict = None        # Llama 3's stretching of slow rotations to a longer context
    norm_eps: float = 1e-5
    objectives: tuple = ("policy",)  # names of the heads
    init_std: float = 0.05           # of linear maps at the start
    hf: dict = None                  # config.json that this came from; save_hf writes it back

    def __post_init__(self):
        self.objectives = tuple(self.objectives)
        for name in SIZES:
            n = getattr(self, name)
            # The rotary tables are as long as the context: four million places are 2 GB.
            most = 2**22 if name == "max_len" else 2**31 - 1
            if type(n) is not int or not 0 < n <= most:
                raise ValueError(f"{name} must be a whole number from 1 to {most}, not {n!r}")
        for name, kinds in KINDS.items():
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} is {' or '.join(kinds)}, not {getattr(self, name)!r}")
        self.head_dim = self.head_dim or self.d_model // self.n_head
        # Channels are rotated in pairs, so there is an even number of them.
        if type(self.head_dim) is not int or self.head_dim < 1 or self.head_dim % 2:
            raise ValueError(f"heads of {self.head_dim} channels; the number must be even")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} query heads on {self.n_kv_head} heads of keys")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


# -- the KV cache
# G sequences have each committed a text, the prefix. K rows (candidates) continue each of them by
# a step of their own, which is not committed yet. Often only some are fed: m rows of each of G' of
# the sequences, n = G' m in all.

# --- exercise 9: attention_mask (3 points) ---
def attention_mask(held, P, t, S):
    """Which places T new tokens of G sequences see: P of the prefix, then S of their own step.

    held (G,): a sequence's prefix fills its first held[g] places; what lies behind is stale.
    t (T,): the new tokens' places in their step; each sees the step up to itself.
    -> (G, T, P + S) bool"""
    prefix = torch.arange(P, device=held.device) < held[:, None, None]      # (G, 1, P)
    step = torch.arange(S, device=held.device) <= t[:, None]                # (T, S)
    size = len(held), len(t)
    return torch.cat((prefix.expand(*size, P), step.expand(*size, S)), -1)
# --- end of exercise 9 ---


@dataclass
class Past:
    """What n rows see while T tokens are fed to each. KVCache.extend makes one for all layers of a
    forward pass."""
    prefix: list                # the cache's keys and values, layer by layer: shapes in KVCache
    step: list
    groups: object              # (G',) those sequences; slice(None) for all, which copies nothing
    rows: object                # (n,) the rows; slice(None) for all
    start: int                  # where in their step the new tokens go
    P: int                      # places of the prefix that are looked at,
    S: int                      # and of the step
    positions: torch.Tensor     # (n, T) of the new tokens in their texts
    mask: torch.Tensor          # (G', T, P + S) added to the scores; None: nothing stands before

    def read(self, layer, new):
        """New keys and values (2, n, n_kv, T, hd) of a layer join its step.
        -> all that is seen: prefix (2, G', n_kv, P, hd), step (2, n, n_kv, S, hd)"""
        prefix = self.prefix[layer][:, self.groups, :, :self.P]
        step = self.step[layer]
        if torch.is_grad_enabled():
            # Nothing is written in training: gradients need the old values, and a block that is
            # computed again (gradient checkpointing) must find what it found the first time.
            return prefix, torch.cat((step, new), 3) if self.start else new
        stop = self.start + new.shape[3]
        step[:, self.rows, :, self.start:stop] = new
        return prefix, step[:, self.rows, :, :self.S]


class KVCache:
    """Keys and values of G sequences, each continued by K rows (at first one).

        prefix[layer]  (2, G, n_kv, P, hd)    keys and values of what is committed, once a sequence
        step[layer]    (2, G K, n_kv, S, hd)  those of each row's own tokens since
        held           (G,)                   committed tokens, in the first held[g] places

    Row g K + k continues sequence g. Memory grows as prefix + K x step, one product serves all rows
    of a sequence, and committing a candidate copies its step and nothing else. Both parts have room
    ahead, and are made anew, larger, where it ends. Rows may drop out of a step, but all that are
    fed have been fed from its beginning."""

    def __init__(self, config, sequences, max_len=0, device=None, dtype=None):
        self.K = 1
        self.own = 0                # tokens of every row in the running step,
        self.fed = 0                # and rows fed last: the host knows both, and waits for nothing
        self.held = torch.zeros(sequences, dtype=torch.long, device=device)
        # A CPU looks at what is there; an accelerator at all places, so that shapes stay the same
        # from token to token, and a mask hides the unused ones.
        self.everywhere = self.held.device.type != "cpu"
        shape = (2, sequences, config.n_kv_head, 0, config.head_dim)
        nothing = torch.zeros(shape, device=device, dtype=dtype)
        self.prefix = [nothing] * config.n_layer
        # The first text is a step like any other, and becomes the prefix: see keep.
        self.step = with_room(self.prefix, max_len)

    @property
    def lengths(self):
        """(G,) tokens of every sequence, the running step included."""
        return self.held + self.own

    def extend(self, rows, T):
        """Make room for T more tokens of some rows, and say what they see. -> Past

        rows (G', m): m rows of each of G' sequences; None: all, and with gradients always all."""
        G, K, device = len(self.held), self.K, self.held.device
        training = torch.is_grad_enabled()
        n = G * K if rows is None else rows.numel()
        # A row that was left out lacks tokens in its step, and would see stale ones there.
        if self.own and n > self.fed:
            raise ValueError("a row that dropped out cannot go on before the next keep")
        start = self.own
        self.own, self.fed = start + T, n
        if not training:
            self.step = with_room(self.step, self.own)
        # Which sequences and rows are read, as indices or, where it is all of them, as a slice.
        groups = which = slice(None)
        if rows is not None:
            groups, which = rows[:, 0] // K, rows.flatten()
            # All sequences in order are read where they lie; indices would copy them.
            if not self.everywhere and torch.equal(groups, torch.arange(G)):
                groups = slice(None)
        P, S = self.prefix[0].shape[3], self.step[0].shape[3]
        if training or not self.everywhere:
            P, S = int(self.held.max()), self.own
        # A token stands behind its sequence's prefix and what its own row has said in this step.
        held = self.held[groups]                                            # (G',)
        t = start + torch.arange(T, device=device)                          # (T,)
        positions = (held[:, None] + t).repeat_interleave(n // len(held), 0)
        # Of a first text nothing is masked but the future, and no mask is needed for that.
        mask = None
        if P + start > 0:
            seen = attention_mask(held, P, t, S)
            mask = torch.zeros(seen.shape, device=device, dtype=self.prefix[0].dtype)
            mask.masked_fill_(~seen, -math.inf)
        return Past(self.prefix, self.step, groups, which, start, P, S, positions, mask)

    def fork(self, K):
        """A cache whose sequences are each continued by K rows: g by rows g K .. g K + K - 1.

        The prefix is shared, not copied: of a cache and its forks only one may be fed."""
        if self.own:
            self.keep(0)
        new = copy.copy(self)
        new.K = K
        new.held = self.held.clone()
        # Every candidate starts with an empty step; room for it is made when it is fed.
        _, G, n_kv, _, hd = self.prefix[0].shape
        nothing = self.prefix[0].new_zeros(2, G * K, n_kv, 0, hd)
        new.step = [nothing] * len(self.prefix)
        return new

    # --- exercise 8: KVCache.keep and rollback (6 points) ---
    def keep(self, winners, counts=None, groups=None):
        """Commit one row of each sequence: the first tokens of its step join the prefix, which all
        K rows share. Every other step is forgotten.

        winners (G',) in 0..K-1, or one number; counts (G',) how many tokens, default all that were
        fed; groups (G',) the sequences, default all."""
        device = self.held.device
        if groups is None:
            groups = torch.arange(len(self.held), device=device)
        if counts is None:
            counts = torch.full_like(groups, self.own)
        counts = torch.as_tensor(counts, device=device)
        if self.K == 1 and not bool(self.held.any()):
            # The first text of all is the prefix as it stands.
            self.prefix, self.step = self.step, self.prefix
        else:
            rows = groups * self.K + torch.as_tensor(winners, device=device)        # (G',)
            t = torch.arange(int(counts.max()), device=device)                      # (C,)
            self.prefix = with_room(self.prefix, int(self.held.max()) + len(t))
            places = self.held[groups, None] + t                                    # (G', C)
            # What is copied beyond a row's count is not seen, and the next keep writes over it.
            for prefix, step in zip(self.prefix, self.step):
                prefix[:, groups[:, None], :, places] = step[:, rows[:, None], :, t]
        # The next step begins behind what is held now.
        self.held[groups] += counts
        self.own = self.fed = 0

    def rollback(self, lengths):
        """Forget what every sequence holds beyond lengths (G,), or one number. Of a forked cache
        the running step goes too, since nothing of it was committed."""
        if self.K == 1 and self.own:
            self.keep(0)
        lengths = torch.as_tensor(lengths, device=self.held.device)
        self.held = torch.minimum(self.held, lengths)
        self.own = self.fed = 0
    # --- end of exercise 8 ---

    def nbytes(self):
        """Bytes that the cache holds."""
        return sum(x.nbytes for x in (*self.prefix, *self.step))


def with_room(parts, places):
    """Tensors (..., places, hd) of all layers, larger by a quarter at least if there is no room."""
    room = parts[0].shape[3]
    if places <= room:
        return parts
    more = max(places - room, room // 4, 16)
    return [F.pad(x, (0, 0, 0, more)) for x in parts]


# -- the backbone

def rope_frequencies(c):
    """Angle per position of every pair of channels, theta^(-2i/hd): (hd / 2,) in float64.

    Llama 3's scaling divides slow rotations (a turn longer than the original context) by `factor`,
    keeps fast ones, and goes over between the two."""
    pair = torch.arange(0, c.head_dim, 2, dtype=torch.float64)
    angle = c.rope_theta ** (-pair / c.head_dim)
    s = c.rope_scaling
    if not s:
        return angle
    # How often a pair turns within the original context: the more often, the faster.
    turns = s["original_max_position_embeddings"] * angle / (2 * math.pi)
    fast = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    # 1: as it is; 0: divided by the factor; between the two, a bit of both.
    fast = fast.clamp(0, 1)
    return angle * fast + angle / s["factor"] * (1 - fast)


def rotate(x, cos, sin):
    """Rotary position embedding of x (B, T, n, hd). A head's two halves are real and imaginary:

        (a, b) (cos + i sin) = (a cos - b sin, b cos + a sin)

    which is x times cos, plus the halves exchanged times (-sin, sin). cos, sin (B, T, 1, hd) as in
    GPT.make_rope."""
    exchanged = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, exchanged, sin)


def linear(x, W, bias=None):
    """x W^T + bias, x (..., d), W (N, d): F.linear, but for up to 8 rows in float32 on a CPU, as in
    decoding. One product with so few rows keeps one core busy; a batch of products with blocks of W
    (views, not copies) keeps all."""
    n, N = x.shape[:-1].numel(), len(W)
    decoding = n <= 8 and N % 16 == 0 and not torch.is_grad_enabled()
    if not decoding or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, W, bias)
    # Each block of rows of W gives a block of the result's rows, which stand in columns here.
    blocks = W.view(16, N // 16, -1)
    columns = x.reshape(n, -1).t().expand(16, -1, n)                        # (16, d, n)
    y = torch.bmm(blocks, columns).view(N, n)
    y = y.t().reshape(*x.shape[:-1], N)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def attend_first(q, k, v):
    """Attention of texts from their beginning: (n, T, heads, hd) each -> (n, T, n_head hd)."""
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return o.transpose(1, 2).flatten(2)


# --- exercise 16: attend_one (5 points) ---
def attend_one(q, prefix, step, mask):
    """Attention of one new token per row to what its sequence has said and to its row's own step:
    softmax(q k / sqrt(hd) + mask) v, one softmax over both, in float32 at least.

    q (n, 1, n_head, hd); prefix (2, G', n_kv, P, hd), step (2, n, n_kv, S, hd) and mask
    (G', 1, P + S) as in Past. Sequence g has n / G' rows in a row, and n_head / n_kv query heads
    in a row share a head of keys and values. -> (n, 1, n_head hd)"""
    _, G, n_kv, P, hd = prefix.shape
    n = len(q)
    q = q.view(n, n_kv, -1, hd) * hd ** -0.5                                # (n, n_kv, g, hd)
    m, g = n // G, q.shape[2]       # rows of a sequence, query heads of a key head
    # A sequence's m g queries of a key head read its prefix in one product, and are parted again.
    queries = q.view(G, m, n_kv, g, hd).transpose(1, 2).reshape(G, n_kv, m * g, hd)
    on_prefix = (queries @ prefix[0].mT).view(G, n_kv, m, g, P).transpose(1, 2)
    on_step = (q @ step[0].mT).view(G, m, n_kv, g, -1)
    scores = torch.cat((on_prefix, on_step), -1)                    # (G', m, n_kv, g, P + S)
    scores = scores + mask[:, None, None]
    # One softmax over both, in float32 at least, then each part's share of the values.
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=precise).to(scores.dtype)
    on_prefix = weights[..., :P].transpose(1, 2).reshape(G, n_kv, m * g, P)
    from_prefix = (on_prefix @ prefix[1]).view(G, n_kv, m, g, hd).transpose(1, 2)
    from_step = weights[..., P:].flatten(0, 1) @ step[1]                    # (n, n_kv, g, hd)
    o = from_prefix + from_step.view(G, m, n_kv, g, hd)
    return o.reshape(n, 1, -1)
# --- end of exercise 16 ---


def attend_many(q, prefix, step, mask):
    """The same for T new tokens. Their scores would be large, so keys of prefix and step are put
    one behind the other for F.scaled_dot_product_attention, which does not store scores. (After a
    past, is_causal would put the triangle into the wrong corner: the mask says what is seen.)"""
    _, G, n_kv, P, hd = prefix.shape
    n, T, n_head, _ = q.shape
    m = n // G
    # In training every response has keys of its prompt: a copy, which a gradient can go through.
    shared = prefix[:, :, None].expand(2, G, m, n_kv, P, hd)
    own = step.unflatten(1, (G, m))
    # The rows of a sequence share a mask: they stand side by side as if they were more heads.
    k, v = torch.cat((shared, own), 4).flatten(2, 3)                # (G', m n_kv, P + S, hd)
    q = q.view(G, m, T, n_head, hd).transpose(2, 3).flatten(1, 2)   # (G', m n_head, T, hd)
    mask = mask[:, None].to(q.dtype)
    o = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return o.view(n, n_head, T, hd).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Causal attention: x (n, T, d) -> (n, T, d), and the step that the cache holds then."""

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.hd = layer, c.head_dim
        self.heads = (c.n_head, c.n_kv_head, c.n_kv_head)       # of queries, keys, values
        self.qkv = Linear(c.d_model, sum(self.heads) * c.head_dim, bias=c.attn_bias)
        self.out = Linear(c.n_head * c.head_dim, c.d_model, bias=c.out_bias)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else None
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else None

    def forward(self, x, rope, past):
        n, T, _ = x.shape
        # What a token looks for (q), what it is found by (k), what it says then (v).
        qkv = self.qkv(x).view(n, T, sum(self.heads), self.hd)
        q, k, v = qkv.split(self.heads, 2)                                  # (n, T, heads, hd)
        if self.q_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        if past is None:
            return self.out(attend_first(q, k, v)), None
        # With a cache: join it, then look at all that is in it.
        new = torch.stack((k.transpose(1, 2), v.transpose(1, 2)))           # (2, n, n_kv, T, hd)
        prefix, step = past.read(self.layer, new)
        if past.mask is None:
            o = attend_first(q, k, v)
        elif T == 1:
            o = attend_one(q, prefix, step, past.mask)
        else:
            o = attend_many(q, prefix, step, past.mask)
        return self.out(o), step


class MLP(nn.Module):
    """down(silu(gate x) * up x) or down(gelu(up x)): (B, T, d) -> (B, T, d)."""

    def __init__(self, c):
        super().__init__()
        self.gated = c.mlp == "swiglu"
        # SwiGLU has two maps up, gate and up; one product computes both.
        width = 2 * c.d_ff if self.gated else c.d_ff
        self.up = Linear(c.d_model, width, bias=c.mlp_bias)
        self.down = Linear(c.d_ff, c.d_model, bias=c.mlp_bias)

    def forward(self, x):
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x, approximate="tanh"))


def make_norm(c):
    """RMSNorm or LayerNorm of the backbone's width."""
    kind = nn.RMSNorm if c.norm == "rms" else nn.LayerNorm
    return kind(c.d_model, eps=c.norm_eps)


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, c, layer):
        super().__init__()
        self.norm1 = make_norm(c)
        self.attn = Attention(c, layer)
        self.norm2 = make_norm(c)
        self.mlp = MLP(c)

    def forward(self, x, rope, past):
        attended, step = self.attn(self.norm1(x), rope, past)
        x = x + attended
        return x + self.mlp(self.norm2(x)), step


def make_embedding(n, d):
    """nn.Embedding without numbers: torch takes two seconds to learn to draw for a meta device."""
    return nn.Embedding.from_pretrained(torch.empty(n, d), freeze=False)


class GPT(nn.Module):
    """Backbone and heads: forward gives hidden states, `logits` applies heads to them."""

    def __init__(self, config, generator=None):
        super().__init__()
        c = self.config = config
        # The tokenizer travels with the model: texts are encoded for it, answers decoded.
        self.tokenizer = None
        # train.py sets this where memory is short: see forward.
        self.grad_checkpoint = False
        self.embed = make_embedding(c.vocab_size, c.d_model)
        learned = c.position == "learned"
        self.positions = make_embedding(c.max_len, c.d_model) if learned else None
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.norm = make_norm(c)
        heads = [nn.Linear(c.d_model, c.vocab_size, bias=False) for _ in c.objectives]
        self.heads = nn.ModuleList(heads)
        # On the meta device there are shapes without numbers: from_state brings those.
        if not self.embed.weight.is_meta:
            self.make_rope()
            self.draw_weights(generator)

    @torch.no_grad()
    def draw_weights(self, generator):
        """Random weights, by this generator alone. Norms keep their ones."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # Small models learn faster if embeddings start large.
                embedding = name.startswith(("embed", "positions"))
                p.normal_(std=0.5 if embedding else self.config.init_std, generator=generator)
            elif name.endswith("bias"):
                p.zero_()

    def make_rope(self):
        """Cosines and sines (max_len, hd) of rotary positions, for both halves of a head."""
        if self.config.position == "rope":
            place = torch.arange(self.config.max_len, dtype=torch.float64)
            angle = torch.outer(place, rope_frequencies(self.config))
            cos, sin = angle.cos(), angle.sin()
            self.register_buffer("cos", torch.cat((cos, cos), 1).float(), persistent=False)
            self.register_buffer("sin", torch.cat((-sin, sin), 1).float(), persistent=False)

    @classmethod
    def from_state(cls, config, state, tokenizer):
        """A model of these very tensors: nothing is allocated or drawn only to be overwritten."""
        with torch.device("meta"):
            model = cls(config)
        # Of several processes each brings its shards.
        if is_sharded(state["embed.weight"]):
            shard(model, state["embed.weight"].device)
        model.load_state_dict(state, assign=True)
        model.make_rope()
        model.tokenizer = tokenizer
        # The tensors are in place; the tables of make_rope follow to their device and dtype.
        return model.to(model.embed.weight)

    def forward(self, ids, cache=None, rows=None, below=False):
        """ids (B, T) -> h (B, T, d), hidden states.

        Without a cache, rows start at position 0, and are padded on the right if ragged. With a
        cache the tokens follow what its rows hold (`rows` as in KVCache.extend), and join it; after
        a ragged batch, cache.keep(0, true lengths). With gradients all rows are fed, and what they
        see keeps its graph: a prompt, once encoded, learns from all its continuations.
        below: give also what h is before the last block."""
        T, past = ids.shape[1], None
        # Where do the tokens stand in their texts?
        if cache is not None:
            past = cache.extend(rows, T)
            positions = past.positions                                      # (B, T)
        elif T > self.config.max_len:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.max_len}")
        else:
            positions = torch.arange(T, device=ids.device)[None]            # (1, T)
        # Padding may stick out of the context; nobody reads it.
        positions = positions.clamp(max=self.config.max_len - 1)
        # Learned positions are added to the tokens; rotary ones turn each layer's queries and keys.
        x, rope = self.embed(ids), None
        if self.positions is not None:
            x = x + self.positions(positions)
        else:
            cos, sin = self.cos[positions], self.sin[positions]             # (B, T, hd)
            rope = cos[:, :, None], sin[:, :, None]
        # From block to block, remembering what the one before the last gave.
        steps = []
        for layer in self.layers:
            before = x
            if self.grad_checkpoint and torch.is_grad_enabled():
                # Keep x alone; the rest is computed again in the backward pass.
                x, step = checkpoint(layer, x, rope, past, use_reentrant=False)
            else:
                x, step = layer(x, rope, past)
            steps.append(step)
        # Without gradients the blocks have written into the cache's room; with them it takes over
        # their results, graph and all.
        if cache is not None and torch.is_grad_enabled():
            cache.step = steps
        return (self.norm(x), self.norm(before)) if below else self.norm(x)

    def new_cache(self, sequences, max_len=0):
        """An empty KVCache with room for max_len tokens of each sequence; it grows when needed."""
        weight = self.embed.weight
        return KVCache(self.config, sequences, max_len, weight.device, weight.dtype)

    def weights(self, weights):
        """Head index, objective name or (H,) non-negative numbers -> (H,) tensor that sums to 1.
        InputError for anything else."""
        H, names, head = len(self.heads), self.config.objectives, self.heads[0].weight
        # One head by name or number: the whole weight is on it.
        if isinstance(weights, str):
            if weights not in names:
                raise InputError(f"no head named {weights!r}: this model has {', '.join(names)}")
            weights = names.index(weights)
        if isinstance(weights, int):
            if not 0 <= weights < H:
                raise InputError(f"no head {weights}: this model has {H}")
            weights = [float(i == weights) for i in range(H)]
        w = torch.as_tensor(weights, dtype=head.dtype, device=head.device)
        if w.shape != (H,) or not bool((w >= 0).all()) or not 0 < float(w.sum()) < math.inf:
            raise InputError(f"weights must be {H} non-negative numbers with a positive sum, not "
                             f"{w.tolist()}")
        return w / w.sum()

    # --- exercise 13: GPT.fold (2 points) ---
    def fold(self, weights):
        """The mix of heads as one matrix (V, d) = sum_i w_i W_i (paper, Sec. 5): H heads decode at
        the price of one. A head of weight 0 is not touched, and one alone is itself; so is what
        fold_free gives."""
        if isinstance(weights, torch.Tensor) and weights.dim() == 2:
            return weights
        w = self.weights(weights)
        used = [i for i in range(len(w)) if w[i] > 0]
        if len(used) == 1:
            return self.heads[used[0]].weight
        return sum(w[i] * self.heads[i].weight for i in used)
    # --- end of exercise 13 ---

    @torch.no_grad()
    def fold_free(self, weights, reference):
        """A mix off the simplex: W_ref + sum_i l_i (W_i - W_ref) (V, d), which `fold` takes for
        weights. l (H,): `weights`, any numbers; 0 is the reference, more than 1 goes further than
        training, less than 0 the other way. W_ref (V, d): `reference`, the head of SFT."""
        head = reference.clone()
        for l, own in zip(weights, self.heads):
            head += l * (own.weight - reference)
        return head

    def logits(self, h, weights=0):
        """h (..., d) -> (..., V) of a mix of heads, or of one head: 0 is the first one's number."""
        return linear(h, self.fold(weights))

    def with_heads(self, objectives, std=0.0, generator=None):
        """A copy of this model with a copy of head 0 for each objective, plus Gaussian noise of
        `std`. The copies are untied: neither the embedding nor head 0 is touched (the published
        code perturbs both by accident)."""
        # Everything but the heads as it is, in memory of its own.
        state = {}
        for name, t in self.state_dict().items():
            if not name.startswith("heads."):
                state[name] = t.clone()
        # Noise makes the heads differ, so that they can part.
        head = self.heads[0].weight.detach()
        for i in range(len(objectives)):
            noise = torch.randn(head.shape, generator=generator) * std
            state[f"heads.{i}.weight"] = head + like(noise.to(head.dtype), head)
        return GPT.from_state(replace(self.config, objectives=objectives), state, self.tokenizer)


# -- safetensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


# --- exercise 14: read_header (5 points) ---
def read_header(path):
    """The tensors of a safetensors file: {name: (dtype, shape, first byte, last byte + 1)}, in the
    order of their bytes, which are counted from the file's beginning.

    Layout: 8 bytes little-endian header length n; n bytes of JSON {name: {dtype, shape,
    data_offsets}}; the data. The file is untrusted: any lie in its header (length, offsets, dtype,
    shape) is an InputError that names the file and the tensor."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; a checkpoint needs it")
    size = os.path.getsize(path)
    # The header's length, which is not trusted with the memory.
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if not 2 <= n <= min(size - 8, 100_000_000):
            raise InputError(f"{path}: not a safetensors file (header of {n} bytes in a file of "
                             f"{size})")
        text = f.read(n)
    # The header itself: an object of tensors, and perhaps one entry of metadata.
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: broken safetensors header: {e}") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: safetensors header is not an object")
    header.pop("__metadata__", None)
    # Every entry by itself.
    start = 8 + n                       # of the data
    spans = []
    for name, entry in header.items():
        first, last = check_entry(path, name, entry, size - start)
        spans.append((first, last, name))
    # All together: they fill the data, without gap or overlap.
    end, found = 0, {}
    for first, last, name in sorted(spans):
        if first != end:
            raise InputError(f"{path}: tensor {name!r} starts at byte {first} of the data, "
                             f"expected {end}")
        end = last
        dtype, shape = DTYPES[header[name]["dtype"]], tuple(header[name]["shape"])
        found[name] = (dtype, shape, start + first, start + last)
    if end != size - start:
        raise InputError(f"{path}: the tensors end at byte {end} of the data, the file at "
                         f"{size - start}")
    return found
# --- end of exercise 14 ---


def no_duplicates(pairs):
    """JSON object hook: a header that names a tensor twice is refused."""
    names = {name for name, _ in pairs}
    if len(names) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def check_entry(path, name, entry, size):
    """A tensor's entry in the header -> (first byte, last byte + 1) in the data of `size` bytes.
    InputError unless dtype, shape and bytes agree."""
    entry = entry if isinstance(entry, dict) else {}
    kind = entry.get("dtype")
    shape = entry.get("shape")
    span = entry.get("data_offsets")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise InputError(f"{path}: tensor {name!r} has dtype {kind!r}, known are "
                         f"{', '.join(DTYPES)}")
    # Few whole numbers, none negative, none absurd: torch multiplies sizes in 64 bits, even those
    # next to a 0.
    good = isinstance(shape, list) and isinstance(span, list) and len(shape) <= 16
    good = good and all(type(i) is int and 0 <= i < 2**48 for i in shape + span)
    good = good and math.prod(i or 1 for i in shape) < 2**63
    good = good and len(span) == 2 and span[0] <= span[1] <= size
    if not good or math.prod(shape) * DTYPES[kind].itemsize != span[1] - span[0]:
        raise InputError(f"{path}: tensor {name!r} has shape {shape}, which does not fill bytes "
                         f"{span} of {size} in {kind}")
    return span


def map_tensor(path, dtype, shape, first, stop):
    """An entry of read_header -> the tensor, memory-mapped: nothing is read before it is used."""
    data = torch.from_file(path, shared=False, size=stop, dtype=torch.uint8)
    part = data[first:]
    # torch wants aligned views; the format does not promise them: an odd offset costs a copy.
    if first % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).view(shape)


def load_safetensors(path):
    """File -> {name: tensor}, memory-mapped. InputError as in read_header."""
    return {name: map_tensor(path, *entry) for name, entry in read_header(path).items()}


def read_metadata(path):
    """The metadata that save_safetensors was given. InputError as in read_header."""
    read_header(path)
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        return json.loads(f.read(n)).get("__metadata__", {})


def save_safetensors(tensors, path, metadata=None):
    """Write {name: tensor}, and `metadata`, a dict of texts, into the header. Several processes
    call it together; the first writes, see whole_file."""
    # Where each tensor will stand, one behind another.
    header, offset = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    for name, t in tensors.items():
        end = offset + t.numel() * t.element_size()
        span = [offset, end]
        header[name] = {"dtype": kinds[t.dtype], "shape": list(t.shape), "data_offsets": span}
        offset = end
    text = json.dumps(header).encode()
    # Blanks at its end are allowed: the data starts aligned.
    text += b" " * (-len(text) % 8)
    with whole_file(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            # All processes have a part in making a sharded tensor whole, one of them writes it.
            t = whole(t.detach())
            if rank() == 0:
                f.write(t.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


# -- Hugging Face directories in and out

class Checkpoint:
    """The tensors of a Hugging Face directory, in one file or in shards, by names without the
    prefixes that programs put before them (checkpoints.PREFIX).

    They are read one by one, on demand, and those of a model put where `place` puts a tensor: no
    process holds more than its part of the model and one tensor."""

    def __init__(self, directory, place=torch.as_tensor):
        self.place = place
        self.entries = {}           # name -> (file, dtype, shape, first byte, last byte + 1)
        self.unused = set()         # names that nobody has asked for
        self.path, shards = hf.find_shards(directory)
        for path in shards:
            self.add(path)

    def add(self, path):
        """Take in a safetensors file."""
        for name, entry in read_header(path).items():
            own = hf.PREFIX.sub("", name)
            if own in self.entries:
                raise InputError(f"{path}: tensor {name!r} stands twice in this checkpoint")
            self.entries[own] = (path, *entry)
            self.unused.add(own)

    def take(self, name, shape, dtype):
        """A copy of a tensor in `dtype`; the file's pages are let go. InputError if it is missing,
        has another shape, no floating-point numbers, or NaN among them."""
        own = hf.PREFIX.sub("", name)
        if own not in self.entries:
            raise InputError(f"{self.path}: tensor {name!r} is missing")
        self.unused.discard(own)
        path, *entry = self.entries[own]
        kind, found = entry[:2]
        if found != tuple(shape) or not kind.is_floating_point:
            raise InputError(f"{path}: tensor {name!r} has shape {found} of {kind}, config.json "
                             f"wants {tuple(shape)}")
        t = map_tensor(path, *entry).to(dtype, copy=True)
        # A NaN or an infinity anywhere makes the sum one; large numbers may, too.
        if not t.sum().isfinite() and not t.isfinite().all():
            raise InputError(f"{path}: tensor {name!r} holds numbers that are not finite; get the "
                             "file again, or train with a lower learning rate")
        return t

    def backbone(self, config, dtype):
        """The backbone's state {our name: tensor}, placed. InputError as in take."""
        if config.n_layer > len(self.entries):
            raise InputError(f"{self.path}: {len(self.entries)} tensors are too few for "
                             f"{config.n_layer} layers")
        # A model without numbers knows which parameters there are.
        with torch.device("meta"):
            model = GPT(replace(config, objectives=()))
        # Where embedding and head are tied, either may stand in the file for both.
        if config.hf.get("tie_word_embeddings", hf.is_gpt2(config)):
            embedding, = hf.parts_of(config, "embed.weight", model.embed.weight)
            tied = [hf.PREFIX.sub("", embedding), "lm_head.weight"]
            for name, other in (tied, tied[::-1]):
                entry = self.entries.get(other)
                if entry:
                    self.entries.setdefault(name, entry)
        state = {}
        for name, p in model.named_parameters():
            # Ours may be several of theirs, or theirs turned round.
            parts = []
            for theirs, part in hf.parts_of(config, name, p).items():
                parts.append(self.take(theirs, part.shape, dtype))
            t = torch.cat(parts) if len(parts) > 1 else parts[0]
            t = t.t().contiguous() if hf.is_transposed(config, name) else t
            state[name] = self.place(t)
        return state

    def finish(self):
        """InputError for a tensor that nobody took and that other programs do not leave behind."""
        left = [name for name in self.unused if not hf.LEFT_BEHIND.fullmatch(name)]
        if left:
            raise InputError(f"{self.path}: tensor {min(left)!r} is unknown to this architecture")


def read_config(directory):
    """config.json -> GPTConfig; its .hf is the JSON object. InputError names what is wrong."""
    path = os.path.join(directory, "config.json")
    try:
        return GPTConfig(**hf.read_fields(path))
    except InputError:
        raise
    # Whatever else can be wrong is a value of the wrong type or size.
    except (AttributeError, TypeError, ValueError, OverflowError) as e:
        raise InputError(f"{path}: unusable configuration: {e}") from None


@torch.no_grad()
def load_hf(directory, objectives=None, dtype=torch.float32, place=torch.as_tensor):
    """A Hugging Face directory -> GPT in `dtype`, its tensors where place(tensor) puts them.

    objectives given: that many exact copies of the checkpoint's head (its lm_head, or its embedding
    where tied). None: the heads that the file holds if save_hf wrote it with heads, else one."""
    config, files = read_config(directory), Checkpoint(directory, place)
    own_heads = objectives is None and "objectives" in config.hf
    if objectives is not None:
        config = replace(config, objectives=objectives)
    # The backbone, then the heads: each its own, or all the same one.
    state = files.backbone(config, dtype)
    for i in range(len(config.objectives)):
        name = f"heads.{i}.weight"
        source = name if own_heads else "lm_head.weight"
        head = files.take(source, (config.vocab_size, config.d_model), dtype)
        state[name] = files.place(head)
    # Heads beside an lm_head that was asked for may stay unread; nothing else may.
    if not own_heads:
        files.unused -= {name for name in files.unused if name.startswith("heads.")}
    files.finish()
    return GPT.from_state(config, state, load_tokenizer(directory, config.vocab_size))


def save_hf(model, directory, weights=None):
    """Write config.json, model.safetensors and the tokenizer's files, which other programs load.

    weights given: ONE ordinary checkpoint whose lm_head is that mix of heads, folded. None: lm_head
    is the uniform mix, and the H heads stand beside it as heads.*.weight, their names in
    config.json, for load_hf."""
    # What other programs take for the head, then what load_hf takes for the heads.
    lm_head = model.fold([1.0] * len(model.heads) if weights is None else weights)
    heads, extra = {"lm_head.weight": gathered(lm_head)}, {}
    if weights is None:
        extra["objectives"] = list(model.config.objectives)
        for i, head in enumerate(model.heads):
            heads[f"heads.{i}.weight"] = gathered(head.weight)
    save_directory(directory, model, heads, **extra)


def save_directory(directory, model, heads, **extra):
    """The tokenizer, model.safetensors (the backbone and `heads`, {name: tensor}) and config.json,
    the last one last: a directory that has it is whole. extra: more fields for config.json.
    InputError, before anything is written, for a model that no other program computes."""
    tokenizer = model.tokenizer
    # A model from elsewhere keeps its own special ids in config.json.
    if tokenizer is not None and model.config.hf is None:
        extra["bos_token_id"] = tokenizer.bos_id
        extra["eos_token_id"] = tokenizer.eos_id
        extra["pad_token_id"] = tokenizer.pad_id
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    config = hf.config_json(model.config, dtype, extra)
    # The backbone's parameters under their Hugging Face names.
    tensors = {}
    for name, p in model.named_parameters():
        if not name.startswith("heads."):
            tensors |= hf.parts_of(model.config, name, gathered(p))
    os.makedirs(directory, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(directory)
    save_safetensors(tensors | heads, os.path.join(directory, "model.safetensors"))
    write_json(os.path.join(directory, "config.json"), config)


# -- devices

def sampling_dtype(dtype, device):
    """Of a run's --dtype, that of the weights which only sample: half of the bytes are faster on a
    GPU, not on a CPU."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.bfloat16 if dtype == "bf16" and on_gpu else torch.float32


def emulates_bf16(device):
    """Does this device compute in bfloat16 without instructions for it, and so more slowly than in
    float32? Of an older torch, which cannot tell, nothing is said."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    if torch.device(device).type != "cpu" or ask is None:
        return False
    # On x86 and on ARM.
    return not any(ask().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def pick_device(name):
    """"auto" -> cuda, mps or cpu, whichever is there; a name is checked. InputError if it is not
    available."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).tolist()        # read back: a "meta" device computes nothing
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"--device {name}: not available here ({reason})") from None
    return name


if __name__ == "__main__":
    with torch.no_grad():
        model = GPT(GPTConfig(vocab_size=400), torch.Generator().manual_seed(0))
        ids = torch.arange(12)[None]
        cache = model.new_cache(1)
        parts = torch.cat((model(ids[:, :7], cache), model(ids[:, 7:], cache)), 1)
        difference = float((model(ids) - parts).abs().max())
    print(f"in two pieces through a cache against in one without: differs by {difference:.1e}")
