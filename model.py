"""model.py: one GPT backbone with H linear heads, its KV cache, and checkpoints in and out. Before: data.py; next: prm.py.

    h = GPT(ids)                        (B, T) -> (B, T, d)     the backbone, shared by all objectives
    z_i = W_i h                         (B, T, d) -> (B, T, V)  head i, one per objective (paper, Sec. 5)
    z = sum_i w_i z_i = (sum_i w_i W_i) h                       any mix of heads folds into ONE ordinary head

The backbone is configurable: rotary (RoPE) or learned positions, RMSNorm or LayerNorm, SwiGLU or GELU, grouped-query
attention, optional biases; that covers GPT-2 to Llama. KVCache is an explicit object, allocated ahead per layer, passed
into forward and never hidden in a layer; K candidate rows of one sequence share its prefix and own their steps.
Checkpoints are Hugging Face directories; safetensors files are read and written here.
"""
import copy
import json
import math
import os
import re
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from data import InputError, read_json, write_json, writing
from interop.parallel import gathered, like, rank, shard, whole
from interop.tokenizer import load_tokenizer


@dataclass
class GPTConfig:
    """The shape of a model: the defaults are the embedded experiment's, read_config finds those of a checkpoint."""
    vocab_size: int
    n_layer: int = 3
    n_head: int = 4
    n_kv_head: int = 2             # fewer than n_head: grouped-query attention
    d_model: int = 96
    d_ff: int = 256
    max_len: int = 128             # context length in tokens
    head_dim: int = 0              # 0: d_model / n_head
    position: str = "rope"         # rope | learned
    norm: str = "rms"              # rms | layer
    mlp: str = "swiglu"            # swiglu | gelu
    attn_bias: bool = False        # bias on q, k and v
    out_bias: bool = False         # bias on the attention's output
    mlp_bias: bool = False
    qk_norm: bool = False          # RMSNorm of every query and key (Qwen3)
    rope_theta: float = 10000.0
    rope_scaling: dict = None      # llama3's stretching of the slow rotations to a longer context
    norm_eps: float = 1e-5
    objectives: tuple = ("policy",)  # names of the heads; head index = index here
    init_std: float = 0.05           # of the linear maps; embeddings start at 0.5 (small models learn faster so)
    hf: dict = None                  # config.json of the checkpoint that this came from, written back by save_hf

    def __post_init__(self):
        self.objectives = tuple(self.objectives)
        sizes = self.vocab_size, self.n_layer, self.n_head, self.n_kv_head, self.d_model, self.d_ff, self.max_len
        if not all(type(n) is int and 0 < n < 2**31 for n in sizes) or self.max_len > 2**22:
            raise ValueError("unusable model configuration: sizes must be positive whole numbers (context up to 4 million), "
                             f"not {sizes}")
        self.head_dim = self.head_dim or self.d_model // self.n_head
        good = self.position in ("rope", "learned") and self.norm in ("rms", "layer") and self.mlp in ("swiglu", "gelu")
        if not good or self.n_head % self.n_kv_head or type(self.head_dim) is not int or self.head_dim < 1 or self.head_dim % 2:
            raise ValueError(f"unusable model configuration: {self.n_head} heads of {self.head_dim} channels on "
                             f"{self.n_kv_head}, {self.position}, {self.norm}, {self.mlp}")
        if not all(0 < x < math.inf for x in (self.rope_theta, self.norm_eps)):
            raise ValueError(f"unusable model configuration: rope_theta {self.rope_theta} and norm_eps {self.norm_eps}")


class View(NamedTuple):
    """Where the next tokens of n rows go, m of each of G' sequences (n = G' m), and what they see: what KVCache.extend, below,
    answers."""
    groups: torch.Tensor        # (G',) the sequences, or slice(None) for all
    places: torch.Tensor        # (G', m, T) where the new tokens go, or a slice if these are all rows
    length: int                 # places that are looked at
    positions: torch.Tensor     # (n, T) positions of the new tokens in their sequences
    mask: torch.Tensor          # (G', 1, m T g, length) added to the scores, g query heads per key; None: every token sees all


class KVCache:
    """Keys and values of every layer, for G sequences of which each is continued by K rows (candidates; at first K = 1).

    k, v:     per layer (G, n_kv, room, hd). The prefix stands once for all K rows; behind it, in the running step, the K rows
              take turns:      x x x x x . | a0 b0 c0 a1 b1 c1 ...        (K = 3; . a stale place, which no mask shows)
    held:     (G,) tokens in each prefix;  high: the longest of them, where the steps begin
    own:      tokens of every row in the running step; `lengths` = held + own

    So memory grows as prefix + K x step, one attention product serves all rows of a sequence, and committing a candidate
    moves its step and nothing else, as long as the room that was asked for lasts; beyond it the tensors are made anew,
    larger. Rows may drop out of a step, but all that are fed have been fed from its beginning.
    """

    def __init__(self, config, sequences, max_len=0, device=None, dtype=None):
        """max_len: tokens for which there is room from the start; more is made when needed."""
        self.per_key, self.K = config.n_head // config.n_kv_head, 1
        self.held = torch.zeros(sequences, dtype=torch.long, device=device)
        self.high = self.own = self.fed = 0     # known to the host, so that nothing has to wait for a device
        self.k, self.v = ([torch.zeros(sequences, config.n_kv_head, max_len, config.head_dim, device=device, dtype=dtype)
                           for _ in range(config.n_layer)] for _ in "kv")

    @property
    def lengths(self):
        """(G,) tokens of every sequence, the running step included."""
        return self.held + self.own

    def extend(self, rows, T):
        """Make room for T more tokens in rows: (G', m), m rows of each of G' sequences; None is all. -> View"""
        K, device = self.K, self.held.device
        fed = len(self.held) * K if rows is None else rows.numel()
        if self.own and fed > self.fed:
            raise ValueError("a row that dropped out cannot go on before the next keep")
        groups = slice(None) if rows is None else rows[:, 0] // K
        if rows is not None and device.type == "cpu" and torch.equal(groups, torch.arange(len(self.held))):
            groups = slice(None)       # of all, in order: a view where a tensor of indices would be a copy
        start, self.own, self.fed = self.own, self.own + T, fed
        end, room = self.high + self.own * K, self.k[0].shape[2]
        if end > room:
            more = max(end - room, room // 4, 16 * K)
            self.k, self.v = ([F.pad(x, (0, 0, 0, more)) for x in part] for part in (self.k, self.v))
        k = (torch.arange(K, device=device)[None] if rows is None else rows % K)                           # (G' or 1, m)
        t = start + torch.arange(T, device=device)
        held = self.held[groups]
        places = slice(self.high + start * K, end) if rows is None else self.high + t * K + k[..., None]
        positions = (held[:, None] + t).repeat_interleave(k.shape[1], 0)                                   # (n, T)
        # A CPU looks at what is there; an accelerator at all places, so that shapes stay the same from token to token.
        length, mask = end if device.type == "cpu" else self.k[0].shape[2], None
        if K > 1 or T > 1 or device.type != "cpu" or bool((held != self.high).any()):
            seen = attention_mask(held, self.high, K, k, t, length).flatten(1, 2).repeat_interleave(self.per_key, 1)[:, None]
            mask = torch.zeros(seen.shape, device=device, dtype=self.k[0].dtype).masked_fill(~seen, -math.inf)
        return View(groups, places, length, positions, mask)

    def fork(self, K):
        """A cache whose sequences are each continued by K rows: sequence g by rows gK .. gK+K-1. The prefix is shared, not
        copied: of a cache and its forks only one may be fed."""
        if self.own:
            self.keep(0)
        new = copy.copy(self)
        new.held, new.K, new.k, new.v = self.held.clone(), K, [*self.k], [*self.v]
        return new

    # --- exercise 8: KVCache.append, keep and rollback (6 points) ---
    def append(self, layer, view, k, v):
        """Write k, v (n, T, n_kv, hd) of the rows of `view`. -> keys and values that they look at, (G', n_kv, length, hd)."""
        found = []
        for old, new in ((self.k[layer], k), (self.v[layer], v)):
            n, T, n_kv, hd = new.shape
            if isinstance(view.places, slice):
                old[:, :, view.places].unflatten(2, (T, -1)).copy_(new.view(len(old), -1, T, n_kv, hd).permute(0, 3, 2, 1, 4))
            else:
                g = torch.arange(len(old), device=old.device)[view.groups]
                old[g[:, None, None], :, view.places] = new.view(len(g), -1, T, n_kv, hd)
            found.append(old[view.groups][:, :, :view.length])
        return found

    def keep(self, winners, counts=None, groups=None):
        """Commit one row of each sequence: the first counts (G',) tokens of its step (default all) go into the prefix, which
        all K rows share; every other step is forgotten. winners (G',) in 0..K-1, or one number; groups (G',) default all."""
        device = self.held.device
        groups = torch.arange(len(self.held), device=device) if groups is None else groups
        counts = torch.full_like(groups, self.own) if counts is None else torch.as_tensor(counts, device=device)
        if self.K > 1 or self.high > 0:             # else the step of the first text stands where the prefix belongs
            t = torch.arange(int(counts.max()), device=device)
            source = self.high + t * self.K + torch.as_tensor(winners, device=device).expand(len(groups))[:, None]  # (G', C)
            for x in (*self.k, *self.v):            # what lies behind a row's count is overwritten, or never shown
                x[groups[:, None], :, self.held[groups][:, None] + t] = x[groups[:, None], :, source]
        self.held[groups] += counts
        self.high, self.own, self.fed = int(self.held.max()), 0, 0

    def rollback(self, lengths):
        """Forget tokens: of an unforked cache every sequence's beyond lengths (G,), or one number; of a forked one the
        running step too, of which nothing was committed."""
        if self.K == 1 and self.own:
            self.keep(0)
        self.held = torch.minimum(self.held, torch.as_tensor(lengths, device=self.held.device))
        self.high, self.own, self.fed = int(self.held.max()), 0, 0
    # --- end of exercise 8 ---

    def nbytes(self):
        """Bytes that the cache holds."""
        return sum(x.nbytes for x in (*self.k, *self.v))


# --- exercise 9: attention_mask (3 points) ---
def attention_mask(held, high, K, k, t, length):
    """Which places of a KVCache T new tokens of m rows of each of G' sequences see -> (G' or 1, m, T, length) bool.

    held (G',) prefix places that a sequence has filled, from 0; at `high` the steps begin, where the K rows take turns:
    the token i of row k stands at place high + i K + k. k (G' or 1, m) rows in 0..K-1; t (T,) the new tokens' places in
    their steps. A token sees its sequence's prefix, and of its own row's step all up to itself."""
    p = torch.arange(length, device=held.device)
    turn, time = (p - high) % K, (p - high) // K
    step = (p >= high) & (turn == k[..., None, None]) & (time <= t[:, None])
    return (p < held[:, None, None, None]) | step
# --- end of exercise 9 ---


def rope_frequencies(c):
    """Angle per position of every pair of channels (hd/2,) in float64: theta^(-2i/hd). llama3's scaling divides the slow
    ones by `factor` (a turn longer than the original context), keeps the fast ones, and goes over between the two."""
    f = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    if c.rope_scaling:
        s = c.rope_scaling
        turns = s["original_max_position_embeddings"] * f / (2 * math.pi)                 # within the original context
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        f = f * keep + f / s["factor"] * (1 - keep)
    return f


def rotate(x, cos, sin):
    """Rotary position embedding. The two halves of a head are real and imaginary parts, (a, b) (cos + i sin) =
    (a cos - b sin, b cos + a sin): x times cos, plus the halves exchanged times (-sin, sin). x (B, T, n, hd); cos and sin
    (B, T, 1, hd) as in GPT.make_rope."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def linear(x, W, bias=None):
    """x W^T + bias, as F.linear, by the fastest way known here for float32 on a CPU. With few rows, as in decoding, F.linear
    keeps one core busy; with many it is half as fast as a convolution on the AMD processor that this was measured on. So

        up to 8 rows        a batch of products with blocks of W (views, no copies), which keeps all cores busy; as W x^T unless
                            W is wide and the rows several
        up to 200           a 1 x 1 convolution of W, the image (one pixel per row of W), with the rows of x as filters
        more, or training   the other way round, x being the image and W the filters
    """
    (N, K), n = W.shape, x.numel() // W.shape[1]
    decoding = n < 200 and N * K >= 2**16 and N % 16 == 0 and not torch.is_grad_enabled()
    if x.dtype != torch.float32 or x.device.type != "cpu" or not (decoding or n * N * K >= 2**25):
        return F.linear(x, W, bias)
    x2, image = x.reshape(n, K), lambda rows: rows.view(1, -1, 1, K).permute(0, 3, 1, 2)   # (1, K, rows, 1), channels last
    if not decoding:
        return F.conv2d(image(x2), W[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], N)
    if n > 8:
        y = F.conv2d(image(W), x2[:, :, None, None]).view(n, N)
    elif n > 1 and N < K:
        y = torch.bmm(x2.expand(16, n, K), W.view(16, N // 16, K).mT).transpose(0, 1)
    else:
        y = torch.bmm(W.view(16, N // 16, K), x2.t().expand(16, K, n)).view(N, n).t()
    y = y.reshape(*x.shape[:-1], N)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def attend(q, k, v, mask):
    """Attention of a cache's new tokens, as F.scaled_dot_product_attention: q (G', n_kv, m T g, hd); k, v (G', n_kv, length, hd);
    mask as in View. Many short sequences in float32 on a CPU, as in sampling, take that two to four times as long as the two
    products it is made of, as long as the scores between them (8 MB here) fit into the processor's cache."""
    small = len(q) >= 8 and q.shape[:3].numel() * k.shape[2] <= 2**21
    if q.device.type != "cpu" or q.dtype != torch.float32 or not small:
        return F.scaled_dot_product_attention(q, k, v, mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return (scores if mask is None else scores + mask).softmax(-1) @ v


class Attention(nn.Module):
    """Causal attention, grouped-query where n_kv_head < n_head: (B, T, d) -> (B, T, d). With a cache, the B rows are those that
    `view` says, their keys and values join those of `layer` there, and x holds the new tokens alone."""

    def __init__(self, c, layer):
        super().__init__()
        self.n_head, self.n_kv, self.hd, self.layer = c.n_head, c.n_kv_head, c.head_dim, layer
        self.qkv = Linear(c.d_model, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias=c.attn_bias)
        self.out = Linear(c.n_head * c.head_dim, c.d_model, bias=c.out_bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else None for _ in "qk")

    def forward(self, x, rope, cache, view, mask):
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.hd)
        qk, v = qkv[:, :, :-self.n_kv], qkv[:, :, -self.n_kv:]
        if self.q_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :, :self.n_head]), self.k_norm(qk[:, :, self.n_head:])), 2)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk[:, :, :self.n_head], qk[:, :, self.n_head:]                             # (B, T, n, hd)
        if cache is not None:
            keys, values = cache.append(self.layer, view, k, v)                           # (G', n_kv, length, hd)
        if cache is None or cache.high == 0 and cache.own == T and cache.K == 1:          # no past: plain causal attention
            mask = None if mask is None else mask.to(q.dtype)                             # under autocast q may be bfloat16
            o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask,
                                               is_causal=mask is None, enable_gqa=True).transpose(1, 2)
        else:
            # After a past is_causal would align the triangle with the wrong corner: the mask comes from positions. All query
            # heads of one key head, of all rows of a sequence, stand side by side, so that keys are read once for all.
            G, n_kv = keys.shape[:2]
            q = q.reshape(G, -1, n_kv, self.n_head // n_kv, self.hd).transpose(1, 2)      # (G', n_kv, m T, g, hd)
            o = attend(q.flatten(2, 3), keys, values, view.mask).view(q.shape).transpose(1, 2)
        return self.out(o.reshape(B, T, -1))


class MLP(nn.Module):
    """down(silu(gate x) * up x) or down(gelu(up x)): (B, T, d) -> (B, T, d)."""

    def __init__(self, c):
        super().__init__()
        self.gated = c.mlp == "swiglu"
        self.up = Linear(c.d_model, c.d_ff * (2 if self.gated else 1), bias=c.mlp_bias)  # SwiGLU: gate, then up
        self.down = Linear(c.d_ff, c.d_model, bias=c.mlp_bias)

    def forward(self, x):
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, c, layer):
        super().__init__()
        norm = nn.RMSNorm if c.norm == "rms" else nn.LayerNorm
        self.norm1, self.attn = norm(c.d_model, eps=c.norm_eps), Attention(c, layer)
        self.norm2, self.mlp = norm(c.d_model, eps=c.norm_eps), MLP(c)

    def forward(self, x, *context):
        x = x + self.attn(self.norm1(x), *context)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Backbone and heads. forward gives hidden states; `logits` applies a head, or any mix of heads, to them."""

    def __init__(self, config, generator=None):
        super().__init__()
        c = self.config = config
        self.tokenizer = None          # travels with the model: decode.py takes texts and boundaries from it
        self.grad_checkpoint = False   # train.py sets it
        # Not drawn here, but below: torch takes two seconds to learn how to draw for the meta device.
        embedding = lambda n: nn.Embedding.from_pretrained(torch.empty(n, c.d_model), freeze=False)
        self.embed = embedding(c.vocab_size)
        self.positions = embedding(c.max_len) if c.position == "learned" else None
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.norm = (nn.RMSNorm if c.norm == "rms" else nn.LayerNorm)(c.d_model, eps=c.norm_eps)
        self.heads = nn.ModuleList(nn.Linear(c.d_model, c.vocab_size, bias=False) for _ in c.objectives)
        if self.embed.weight.is_meta:      # from_state brings the numbers
            return
        self.make_rope()
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.5 if "embed" in name or "positions" in name else c.init_std
                nn.init.normal_(p, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def make_rope(self):
        """The cosine and sine tables (max_len, hd) of rotary positions, for both halves of a head."""
        if self.config.position == "rope":
            angle = torch.outer(torch.arange(self.config.max_len, dtype=torch.float64), rope_frequencies(self.config))
            self.register_buffer("cos", angle.cos().repeat(1, 2).float(), persistent=False)
            self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), 1).float(), persistent=False)

    @classmethod
    def from_state(cls, config, state, tokenizer):
        """A model made of these very tensors: nothing is allocated or drawn only to be overwritten."""
        with torch.device("meta"):
            model = cls(config)
        if isinstance(state["embed.weight"], DTensor):
            shard(model, state["embed.weight"].device)
        model.load_state_dict(state, assign=True)
        model.make_rope()
        model.tokenizer = tokenizer
        return model.to(model.embed.weight)

    def forward(self, ids, cache=None, rows=None, packing=None, below=False):
        """ids (B, T) -> h (B, T, d). Without a cache: rows start at position 0, padded on the right if ragged.
        With a cache: the tokens follow what its rows hold (`rows` as in KVCache.extend, default all), and are added to it;
        after a ragged batch, cache.keep(0, true lengths).
        packing: positions (B, T) and a mask (B, 1, T, T), added to the scores, of rows that hold several texts.
        below: give also what h is before the last block, (B, T, d)."""
        T, view, mask = ids.shape[1], None, None
        if packing is not None:
            positions, mask = packing
        elif cache is None:
            if T > self.config.max_len:
                raise ValueError(f"{T} tokens do not fit the context of {self.config.max_len}")
            positions = torch.arange(T, device=ids.device)[None]                          # (1, T)
        else:
            view = cache.extend(rows, T)
            positions = view.positions                                                    # (B, T)
        x = self.embed(ids)
        inside = positions.clamp(max=self.config.max_len - 1)    # padding may stick out of the context; nobody reads it
        if self.positions is not None:
            x, rope = x + self.positions(inside), None
        else:
            rope = self.cos[inside][:, :, None], self.sin[inside][:, :, None]             # (B or 1, T, 1, hd)
        for layer in self.layers:
            before = x
            if self.grad_checkpoint and torch.is_grad_enabled():   # keep x alone, compute the rest again in backward
                x = checkpoint(layer, x, rope, cache, view, mask, use_reentrant=False)
            else:
                x = layer(x, rope, cache, view, mask)
        return (self.norm(x), self.norm(before)) if below else self.norm(x)

    def new_cache(self, sequences, max_len=0):
        """An empty KVCache for so many sequences, with room for max_len tokens of each; it grows when needed."""
        return KVCache(self.config, sequences, max_len, self.embed.weight.device, self.embed.weight.dtype)

    def weights(self, weights):
        """Head index, objective name or (H,) non-negative numbers -> (H,) tensor that sums to 1. InputError else."""
        H = len(self.heads)
        if isinstance(weights, str):
            if weights not in self.config.objectives:
                raise InputError(f"no head named {weights!r}: this model has {', '.join(self.config.objectives)}")
            weights = self.config.objectives.index(weights)
        if isinstance(weights, int):
            if not 0 <= weights < H:
                raise InputError(f"no head {weights}: this model has {H}")
            return F.one_hot(torch.tensor(weights), H).to(self.heads[0].weight)
        w = torch.as_tensor(weights, dtype=self.heads[0].weight.dtype, device=self.heads[0].weight.device)
        if w.shape != (H,) or not bool((w >= 0).all()) or not 0 < float(w.sum()) < math.inf:
            raise InputError(f"weights must be {H} non-negative numbers with a positive sum, not {w.tolist()}")
        return w / w.sum()

    # --- exercise 13: GPT.fold (2 points) ---
    def fold(self, weights):
        """The mix of heads as one matrix (V, d) = sum_i w_i W_i (paper, Sec. 5): H heads decode at the price of one."""
        w = self.weights(weights)
        used = [i for i in range(len(w)) if w[i] > 0]
        if len(used) == 1:
            return self.heads[used[0]].weight
        return sum(w[i] * self.heads[i].weight for i in used)
    # --- end of exercise 13 ---

    def logits(self, h, weights=0):
        """h (..., d) -> (..., V) of one head or of a mix of heads."""
        return linear(h, self.fold(weights))

    def with_heads(self, objectives, std=0.0, generator=None):
        """A copy of this model with one copy of head 0 per objective, each plus Gaussian noise of `std`. The copies are
        untied: neither the embedding nor head 0 is touched (the published code perturbs both by accident)."""
        own = self.state_dict()
        state, head = {k: v.clone() for k, v in own.items() if not k.startswith("heads.")}, own.get("heads.0.weight")
        for i in range(len(objectives)):
            noise = torch.randn(head.shape, generator=generator) * std
            state[f"heads.{i}.weight"] = head + like(noise.to(head.dtype), head)
        return GPT.from_state(GPTConfig(**vars(self.config) | {"objectives": tuple(objectives)}), state, self.tokenizer)


# -- safetensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


# --- exercise 14: read_header (5 points) ---
def read_header(path):
    """The tensors of a safetensors file: dict name -> (dtype, shape, first byte, last byte + 1), in the file's bytes.

    The file is untrusted: any lie in its header (length, offsets, dtype, shape) is an InputError that names the file and
    the tensor. Layout: 8 bytes little-endian header length n, n bytes JSON {name: {dtype, shape, data_offsets}}, data."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; a checkpoint needs it")
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        prefix = f.read(8)
        n = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= n <= min(size - 8, 100_000_000):
            raise InputError(f"{path}: not a safetensors file (header of {n} bytes in a file of {size})")
        try:
            header = json.loads(f.read(n).decode("utf-8"), object_pairs_hook=no_duplicates)
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}: broken safetensors header: {e}") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: safetensors header is not an object")
    header.pop("__metadata__", None)
    spans = sorted((check_entry(path, name, entry, size - 8 - n), name) for name, entry in header.items())
    end = 0
    for (start, stop), name in spans:
        if start != end:
            raise InputError(f"{path}: tensor {name!r} starts at byte {start} of the data, expected {end}")
        end = stop
    if end != size - 8 - n:
        raise InputError(f"{path}: the tensors end at byte {end} of the data, the file at {size - 8 - n}")
    return {name: (DTYPES[header[name]["dtype"]], tuple(header[name]["shape"]), 8 + n + start, 8 + n + stop)
            for (start, stop), name in spans}
# --- end of exercise 14 ---


def read_metadata(path):
    """The metadata that save_safetensors was given. InputError as in read_header."""
    read_header(path)
    with open(path, "rb") as f:
        return json.loads(f.read(struct.unpack("<Q", f.read(8))[0])).get("__metadata__", {})


def no_duplicates(pairs):
    """JSON object hook: a header that names a tensor twice is refused."""
    if len({k for k, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def check_entry(path, name, entry, size):
    """One header entry -> its (start, stop) in the data. InputError unless dtype, shape and bytes agree."""
    ints = lambda v: isinstance(v, list) and len(v) <= 16 and all(type(i) is int and 0 <= i < 2**48 for i in v)
    if not isinstance(entry, dict) or str(entry.get("dtype")) not in DTYPES:
        raise InputError(f"{path}: tensor {name!r} has dtype {entry.get('dtype') if isinstance(entry, dict) else entry!r}, "
                         f"known are {', '.join(DTYPES)}")
    shape, span = entry.get("shape"), entry.get("data_offsets")
    if not ints(shape) or math.prod(i or 1 for i in shape) >= 2**63 or not ints(span) or len(span) != 2 \
            or not span[0] <= span[1] <= size:
        raise InputError(f"{path}: tensor {name!r} has shape {shape} at bytes {span} of {size}")
    if math.prod(shape) * DTYPES[entry["dtype"]].itemsize != span[1] - span[0]:
        raise InputError(f"{path}: tensor {name!r}: shape {shape} of {entry['dtype']} is not {span[1] - span[0]} bytes")
    return tuple(span)


def map_tensors(path, entries):
    """Entries of read_header -> dict name -> tensor, memory-mapped: nothing is read before it is used, and freeing the tensors
    frees the map. torch wants aligned views; the format does not promise them: an odd offset costs a copy."""
    data, found = torch.from_file(path, shared=False, size=os.path.getsize(path), dtype=torch.uint8), {}
    for name, (dtype, shape, start, stop) in entries.items():
        flat = data[start:stop] if start % dtype.itemsize == 0 else data[start:stop].clone()
        found[name] = flat.view(dtype).view(shape)
    return found


def load_safetensors(path):
    """File -> dict name -> tensor, memory-mapped. InputError as in read_header."""
    return map_tensors(path, read_header(path))


def save_safetensors(tensors, path, metadata=None):
    """Write dict name -> tensor, and `metadata`, dict of text -> text, into the header; see data.writing."""
    names = {v: k for k, v in DTYPES.items()}
    header, offset = {}, 0
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"} | (metadata or {})} | header).encode()
    text += b" " * (-len(text) % 8)                       # so that the data starts aligned
    with writing(path) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            t = whole(t.detach())
            if rank() == 0:
                f.write(t.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


# -- Hugging Face directories in and out

# Our tensor -> theirs, concatenated along dim 0 where several (fused projections); a layer's without the layer's own name.
# Some programs leave the prefix off ("model." or "transformer."): tensors are found with or without.
LLAMA = {
    "embed": ["embed_tokens"], "norm": ["norm"], "norm1": ["input_layernorm"], "norm2": ["post_attention_layernorm"],
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "attn.out": ["self_attn.o_proj"],
    "attn.q_norm": ["self_attn.q_norm"], "attn.k_norm": ["self_attn.k_norm"],
    "mlp.up": ["mlp.gate_proj", "mlp.up_proj"], "mlp.down": ["mlp.down_proj"],
}
GPT2 = {
    "embed": ["wte"], "positions": ["wpe"], "norm": ["ln_f"], "norm1": ["ln_1"], "norm2": ["ln_2"],
    "attn.qkv": ["attn.c_attn"], "attn.out": ["attn.c_proj"], "mlp.up": ["mlp.c_fc"], "mlp.down": ["mlp.c_proj"],
}
PREFIX = re.compile(r"^(model|transformer)\.")
LEFT_BEHIND = re.compile(r".*rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight")    # nothing to load


def is_gpt2(config):
    """GPT-2 files have names of their own and linear maps stored (in, out)."""
    return config.position == "learned"


def theirs(config, name):
    """Our backbone parameter's name -> the list of theirs."""
    layer, stem, kind = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    prefix, layers, table = ("transformer.", "h", GPT2) if is_gpt2(config) else ("model.", "layers", LLAMA)
    prefix += f"{layers}.{layer}." if layer else ""
    return [f"{prefix}{t}.{kind}" for t in table[stem]]


def rows_of(config, names, n):
    """How the n rows of a parameter of ours are shared out among their tensors: q, k and v, or equal parts."""
    heads = config.n_head, config.n_kv_head, config.n_kv_head
    return [k * config.head_dim for k in heads] if len(names) == 3 else [n // len(names)] * len(names)


def transposed(config, name):
    """Is this parameter of ours stored the other way round (GPT-2's Conv1D)?"""
    return is_gpt2(config) and name.startswith("layers.") and name.endswith(".weight") and ".norm" not in name


class Checkpoint:
    """The tensors of a Hugging Face directory, in one file or in shards, found by name without prefix, read on demand and put
    where `place` puts a tensor: no process holds more than its part of the model and one tensor."""

    def __init__(self, directory, place=lambda t: t):
        self.place, self.entries, self.unused = place, {}, set()
        self.path = os.path.join(directory, "model.safetensors")
        index, files = f"{self.path}.index.json", {self.path: []}       # file -> the names that the index expects there
        if not os.path.exists(self.path) and os.path.exists(index):
            self.path, files = index, self.read_index(directory, index)
        for path, expected in files.items():
            missing = set(expected) - self.add(path, lambda name: PREFIX.sub("", name))
            if missing:
                raise InputError(f"{path}: tensor {min(missing)!r} is missing, which {index} promises")

    def add(self, path, rename):
        """Take in a safetensors file, its tensors under the names that `rename` gives. -> the names in the file"""
        header = read_header(path)
        for name, entry in header.items():
            if rename(name) in self.entries:
                raise InputError(f"{path}: tensor {name!r} stands twice in this checkpoint")
            self.entries[rename(name)] = (path, *entry)
            self.unused.add(rename(name))
        return set(header)

    @staticmethod
    def read_index(directory, index):
        """model.safetensors.index.json -> {shard's path: names in it}. InputError for a path out of the directory."""
        found = read_json(index)
        names = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(names, dict) or not names:
            raise InputError(f"{index}: no weight_map; it must map every tensor to its file")
        files = {}
        for tensor, name in names.items():
            if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
                raise InputError(f"{index}: tensor {tensor!r} lies in {name!r}; shards are files of this directory, "
                                 "NAME.safetensors")
            files.setdefault(os.path.join(directory, name), []).append(tensor)
        return files

    def entry(self, name):
        """(file, dtype, shape, first byte, last byte + 1) of a tensor. InputError if it is missing."""
        if PREFIX.sub("", name) not in self.entries:
            raise InputError(f"{self.path}: tensor {name!r} is missing")
        self.unused.discard(PREFIX.sub("", name))
        return self.entries[PREFIX.sub("", name)]

    def take(self, names, rows, shape, dtype, transpose=False):
        """The tensors `names`, of rows[i] rows each, as one new tensor of `shape` and `dtype`, placed; the file's pages are let
        go one tensor after another. InputError if one is missing, or has another shape or no floating-point numbers."""
        out, row = None, 0
        for name, n in zip(names, rows):
            path, *entry = self.entry(name)
            kind, held = entry[:2]
            wanted = (n, *shape[1:])[::-1] if transpose else (n, *shape[1:])
            if held != wanted or not kind.is_floating_point:
                raise InputError(f"{path}: tensor {name!r} has shape {held} of {kind}, config.json wants {wanted}")
            out = torch.empty(shape, dtype=dtype) if out is None else out
            part = map_tensors(path, {name: entry})[name]
            out[row:row + n].copy_(part.t() if transpose else part)
            row += n
        return self.place(out)

    def backbone(self, config, dtype):
        """The backbone's state: our names -> tensors. InputError as in take."""
        if config.n_layer > len(self.entries):
            raise InputError(f"{self.path}: {len(self.entries)} tensors are too few for {config.n_layer} layers")
        with torch.device("meta"):
            model = GPT(GPTConfig(**vars(config) | {"objectives": ()}))
        state = {}
        for name, p in model.named_parameters():
            names = theirs(config, name)
            state[name] = self.take(names, rows_of(config, names, len(p)), p.shape, dtype, transposed(config, name))
        return state

    def finish(self):
        """InputError for a tensor that nobody took and that does not belong to what other programs leave behind."""
        left = sorted(n for n in self.unused if not LEFT_BEHIND.fullmatch(n))
        if left:
            raise InputError(f"{self.path}: tensor {left[0]!r} is unknown to this architecture")


# What a family computes beside plain Llama, as fields of GPTConfig; and whether it ties head and embedding by default.
FAMILIES = {"llama": {}, "mistral": {}, "qwen2": {"attn_bias": True}, "qwen3": {"qk_norm": True},
            "gpt2": {"position": "learned", "norm": "layer", "mlp": "gelu", "attn_bias": True, "out_bias": True,
                     "mlp_bias": True}}
GPT2_FIELDS = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd",
               "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "rms_norm_eps": "layer_norm_epsilon",
               "hidden_act": "activation_function"}
# Fields by whose name one knows that they change the arithmetic: refused unless they are off (or handled below).
CHANGES = re.compile(r"scal|softcap|multiplier|expert|moe|partial|clip|quantiz|window|layer_types|alibi|residual|cross")
HANDLED = {"rope_scaling", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "scale_attn_weights"}


def read_config(directory):
    """config.json -> GPTConfig; its .hf is the JSON object. InputError names a field that this code does not compute."""
    path = os.path.join(directory, "config.json")
    c = read_json(path)
    if not isinstance(c, dict):
        raise InputError(f"{path}: {type(c).__name__}, not an object")
    family = c.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"{path}: architecture {c.get('architectures')} (model_type {family!r}) is not computed here, only "
                         f"{', '.join(FAMILIES)}")
    get = lambda key: c.get(GPT2_FIELDS.get(key, key)) if family == "gpt2" else c.get(key)
    try:
        refuse(path, c, family, get("hidden_act"))
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", None if "factor" in rope else "default"))
        if kind not in ("default", "llama3"):
            raise InputError(f"{path}: rope_scaling {kind!r} is not computed here, only default and llama3")
        scaling = {k: float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor",
                                               "original_max_position_embeddings")} if kind == "llama3" else None
        for key in ("vocab_size", *GPT2_FIELDS):
            if get(key) is None and key != "hidden_act" and not (key == "intermediate_size" and family == "gpt2"):
                raise InputError(f"{path}: field {GPT2_FIELDS.get(key, key) if family == 'gpt2' else key!r} is missing")
        biased = bool(c.get("attention_bias"))
        return GPTConfig(**{
            "vocab_size": c["vocab_size"], "n_layer": get("num_hidden_layers"), "n_head": get("num_attention_heads"),
            "n_kv_head": c.get("num_key_value_heads") or get("num_attention_heads"), "d_model": get("hidden_size"),
            "d_ff": get("intermediate_size") or 4 * get("hidden_size"), "max_len": get("max_position_embeddings"),
            "head_dim": c.get("head_dim") or 0, "attn_bias": biased, "out_bias": biased, "mlp_bias": bool(c.get("mlp_bias")),
            "rope_theta": float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0), "rope_scaling": scaling,
            "norm_eps": float(get("rms_norm_eps")), "objectives": tuple(c.get("objectives") or ("policy",)),
            "hf": c} | FAMILIES[family])
    except InputError:
        raise
    except KeyError as e:
        raise InputError(f"{path}: field {e} is missing") from None
    except (AttributeError, TypeError, ValueError, OverflowError) as e:
        raise InputError(f"{path}: unusable configuration: {e}") from None


def refuse(path, c, family, activation):
    """InputError for a field of config.json that changes the arithmetic in a way that this code does not follow."""
    off = lambda v: v in (None, False, [], {}, "") or type(v) in (int, float) and v == 1
    odd = {k: v for k, v in c.items() if CHANGES.search(k) and k not in HANDLED and not off(v)}
    # Qwen's files give a window and say that it is not used; Mistral's has no such switch.
    window = c.get("sliding_window")
    used = c.get("use_sliding_window", not family.startswith("qwen"))
    if window is not None and used and window < c.get("max_position_embeddings", math.inf):
        odd["sliding_window"] = window
    if set(c.get("layer_types") or ()) - {"full_attention"}:
        odd["layer_types"] = sorted(set(c["layer_types"]))
    if c.get("scale_attn_weights", True) is not True:
        odd["scale_attn_weights"] = c["scale_attn_weights"]
    if activation not in {"gpt2": (None, "gelu_new", "gelu_pytorch_tanh")}.get(family, (None, "silu", "swish")):
        odd["hidden_act"] = activation
    if odd:
        raise InputError(f"{path}: {', '.join(f'{k} = {v!r}' for k, v in odd.items())}: not computed here")


@torch.no_grad()
def load_hf(directory, objectives=None, dtype=torch.float32, place=lambda t: t):
    """A Hugging Face directory (families: see FAMILIES) -> GPT in `dtype`, its tensors where `place` puts them.

    objectives given: that many exact copies of the checkpoint's head (its lm_head, or its embedding where tied).
    None: the heads that the file holds if save_hf wrote it with heads, else one head."""
    config, files = read_config(directory), Checkpoint(directory, place)
    own_heads = objectives is None and "objectives" in config.hf
    config.objectives = tuple(objectives) if objectives is not None else config.objectives
    tied = config.hf.get("tie_word_embeddings", is_gpt2(config))
    state = files.backbone(config, dtype)
    for i in range(len(config.objectives)):
        name = f"heads.{i}.weight" if own_heads else theirs(config, "embed.weight")[0] if tied else "lm_head.weight"
        state[f"heads.{i}.weight"] = files.take([name], [config.vocab_size], (config.vocab_size, config.d_model), dtype)
    if not own_heads:
        files.unused -= {n for n in files.unused if n.startswith("heads.")}
    files.finish()
    return GPT.from_state(config, state, load_tokenizer(directory, config.vocab_size))


def backbone_tensors(model):
    """The backbone's parameters under their Hugging Face names."""
    c, tensors = model.config, {}
    hf_config(c)                                          # refuses other families before anything is written
    for name, p in model.named_parameters():
        if name.startswith("heads."):
            continue
        names, p = theirs(c, name), gathered(p)
        tensors.update(zip(names, [p.t()] if transposed(c, name) else p.split(rows_of(c, names, len(p)))))
    return tensors


def hf_config(c, dtype=torch.float32, **extra):
    """GPTConfig -> the object of config.json: what the checkpoint came with, or that of a Llama checkpoint. InputError
    if it came from nowhere and is not of that family."""
    kept = {k: v for k, v in (c.hf or {}).items() if k not in ("objectives", "prm_outputs")}
    if not kept and ((c.position, c.norm, c.mlp) != ("rope", "rms", "swiglu") or c.qk_norm or c.attn_bias != c.out_bias):
        raise InputError("a model of one's own is saved as a Llama checkpoint: RoPE, RMSNorm, SwiGLU, no norm of queries")
    own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab_size,
           "hidden_size": c.d_model, "intermediate_size": c.d_ff, "num_hidden_layers": c.n_layer,
           "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim,
           "max_position_embeddings": c.max_len, "hidden_act": "silu", "rms_norm_eps": c.norm_eps,
           "rope_theta": c.rope_theta, "attention_bias": c.attn_bias, "mlp_bias": c.mlp_bias}
    return (kept or own) | {"tie_word_embeddings": False,
                            "dtype" if "dtype" in kept else "torch_dtype": str(dtype).removeprefix("torch.")} | extra


def save_hf(model, directory, weights=None):
    """Write config.json and model.safetensors (and the tokenizer's files) that other programs load.

    weights given: ONE ordinary checkpoint whose lm_head is that mix of heads, folded. None: lm_head is the uniform mix,
    and the H heads stand beside it as heads.*.weight, their names in config.json, for load_hf."""
    tensors, extra = backbone_tensors(model), {}
    H = len(model.heads)
    tensors["lm_head.weight"] = gathered(model.fold(torch.ones(H) if weights is None else weights))
    if weights is None:
        tensors |= {f"heads.{i}.weight": gathered(head.weight) for i, head in enumerate(model.heads)}
        extra["objectives"] = list(model.config.objectives)
    save_directory(directory, tensors, model, **extra)


def save_directory(directory, tensors, model, **extra):
    """model.safetensors, config.json and the model's tokenizer, config.json last: a directory that has it is whole."""
    os.makedirs(directory, exist_ok=True)
    if model.tokenizer is not None:
        model.tokenizer.save(directory)
        if model.config.hf is None:
            extra |= {f"{kind}_token_id": getattr(model.tokenizer, f"{kind}_id") for kind in ("bos", "eos", "pad")}
    save_safetensors(tensors, os.path.join(directory, "model.safetensors"))
    dtype = model.embed.weight.dtype
    write_json(os.path.join(directory, "config.json"), hf_config(model.config, dtype, **extra))


def sampling_dtype(dtype, device):
    """Of a run's --dtype, that of the weights which only sample: a GPU is faster with half of the bytes, a CPU is not."""
    return torch.bfloat16 if dtype == "bf16" and torch.device(device).type == "cuda" else torch.float32


def pick_device(name):
    """"auto" -> cuda, mps or cpu, whichever is there; a name is checked. InputError if it is not available."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).tolist()             # read back: a "meta" device computes nothing
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name}: not available here ({str(e).splitlines()[0]})") from None
    return name


if __name__ == "__main__":
    model = GPT(GPTConfig(vocab_size=400, objectives=("accuracy", "engagement")), torch.Generator().manual_seed(0))
    ids = torch.arange(12)[None]
    cache = model.new_cache(1, 16)
    full, parts = model(ids), torch.cat([model(ids[:, :7], cache), model(ids[:, 7:], cache)], 1)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; cached in two pieces against uncached: "
          f"largest difference {float((full - parts).detach().abs().max()):.1e}")
