"""mah_dpo.py: Multi-Action-Head DPO and its baselines. Before: prm.py; next: decode.py.

    Delta_i = [log pi_i(y+|x) - log pi_ref(y+|x)] - [log pi_i(y-|x) - log pi_ref(y-|x)]      sums over response tokens
    L       = sum_i alpha_i * mean over the pairs of objective i of -log sigmoid(beta Delta_i)        (paper, Sec. 5)

pi_i is the shared backbone with head i; the reference is the frozen SFT model with its own head. A pair of objective i
touches head i and the backbone and nothing else: `policy_logps` never computes another head's logits, so a head that
saw no pair keeps grad None and the optimiser leaves it alone. The reference's log-probabilities are constants: train.py
computes them once. Baselines: single-head DPO (H = 1), MODPO (one policy per w, the other objectives as a margin) and
DPO soup (one policy per objective, parameters averaged).
"""
import json
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import dealt_batches, pad, split_of
from interop.parallel import gather, ranks
from model import linear

CHUNK = 4096     # response positions whose logits are made at once: without gradients, memory is bounded at CHUNK x V


# --- exercise 1: response_logps (3 points) ---
def response_logps(h, W, ids, mask):
    """Sum of log-probabilities of the response tokens of each row.

    h (B, T, d) hidden states, W (V, d) one head, ids (B, T), mask (B, T) True on response tokens -> (B,) in float32.
    h at t predicts the token at t + 1, so token t is scored by h at t - 1; prompt and padding are never scored, and
    their logits are never computed. The softmax is taken in float32."""
    row, t = mask[:, 1:].nonzero(as_tuple=True)                                           # (N,) response positions
    total = torch.zeros(len(ids), dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
    for r, s in zip(row.split(CHUNK), t.split(CHUNK)):
        logits = linear(h[r, s], W).to(total.dtype)                                       # (n, V)
        total = total.index_add(0, r, -F.cross_entropy(logits, ids[r, s + 1], reduction="none"))
    return total
# --- end of exercise 1 ---


class Packed(NamedTuple):
    """n pairs as one row each: the prompt is encoded once, the responses do not see each other, and both start at the
    prompt's length. The 2n responses (all chosen, then all rejected) are read from it as rows "last prompt token, response";
    their first token is predicted by the last PROMPT state.

        row         x x x | + + | - - - | pad
        positions   0 1 2 | 3 4 | 3 4 5
        take        2 3 4  and  2 5 6 7"""
    ids: torch.Tensor           # (n, T)
    positions: torch.Tensor     # (n, T)
    mask: torch.Tensor          # (n, 1, T, T), added to the scores
    take: torch.Tensor          # (2n, R + 1) places in the packed row
    responses: torch.Tensor     # (2n, R + 1) their ids
    scored: torch.Tensor        # (2n, R + 1) bool, True on response tokens


def pack(pairs, pad_id, device):
    """Objects with prompt, chosen, rejected (ids) -> Packed."""
    ids, _ = pad([p.prompt + p.chosen + p.rejected for p in pairs], pad_id, device)
    sizes = torch.tensor([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs], device=device)
    n, c, r = sizes.T[:, :, None]                                                         # (n, 1) each
    t = torch.arange(ids.shape[1], device=device)
    part = (t >= n).int() + (t >= n + c).int() + (t >= n + c + r).int()                   # prompt, chosen, rejected, padding
    positions = torch.where(part >= 2, t - c, t)
    seen = (t <= t[:, None]) & ((part[:, None] == 0) | (part[:, None] == part[:, :, None]))                # (n, T, T)
    mask = torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)[:, None]
    length = torch.cat((c, r))                                                            # (2n, 1)
    j = torch.arange(1 + int(length.max()), device=device)
    start = torch.cat((n, n + c))                                                         # where the response stands
    take = torch.where(j == 0, torch.cat((n, n)) - 1, start + j - 1).clamp(max=len(t) - 1)
    rows = torch.arange(len(pairs), device=device).repeat(2)[:, None]
    return Packed(ids, positions, mask, take, ids[rows, take], (j > 0) & (j <= length))


def policy_logps(model, pairs, head):
    """One forward of the backbone for pairs of several objectives; pair b is scored by head[b] (n,) alone -> (2, n):
    log-probabilities of chosen and rejected."""
    packed = pack(pairs, model.tokenizer.pad_id, model.embed.weight.device)
    h = model(packed.ids, packing=(packed.positions, packed.mask.to(model.embed.weight.dtype)))
    head, parts, order = head.repeat(2), [], []
    h = h[torch.arange(len(packed.ids), device=h.device).repeat(2)[:, None], packed.take]                 # (2n, R + 1, d)
    for i in head.unique().tolist():
        rows = (head == i).nonzero()[:, 0]
        parts.append(response_logps(h[rows], model.heads[i].weight, packed.responses[rows], packed.scored[rows]))
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()].view(2, -1)


def log_ratio_margin(pi_chosen, pi_rejected, ref_chosen, ref_rejected):
    """Delta (B,): how much more than the reference the policy prefers chosen to rejected."""
    return (pi_chosen - ref_chosen) - (pi_rejected - ref_rejected)


# --- exercise 2: dpo_loss (1 point) ---
def dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta):
    """-log sigmoid(beta Delta) (B,); every argument (B,) a sum of log-probabilities. ln 2 where policy = reference."""
    return -F.logsigmoid(beta * log_ratio_margin(pi_chosen, pi_rejected, ref_chosen, ref_rejected))
# --- end of exercise 2 ---


# --- exercise 4: modpo_loss (2 points) ---
def modpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, margin, w_k, beta):
    """MODPO (B,): -log sigmoid( (beta Delta - margin) / w_k ), for pairs of objective k.

    margin (B,) = sum_{j != k} w_j (r_j(y+) - r_j(y-)), the other objectives' rewards r_j = beta log(pi_j / pi_ref) by
    their single-objective DPO policies; w_k a number or (B,), at least 0.1, since dividing by less makes the loss explode
    (paper, Sec. 5)."""
    if not bool((torch.as_tensor(w_k) >= 0.1).all()):
        raise ValueError(f"MODPO needs w_k >= 0.1, not {w_k}")
    delta = log_ratio_margin(pi_chosen, pi_rejected, ref_chosen, ref_rejected)
    return -F.logsigmoid((beta * delta - margin) / w_k)
# --- end of exercise 4 ---


# --- exercise 3: mah_dpo_loss (3 points) ---
def balanced_mean(losses, head, alpha, count=None):
    """sum_i alpha_i * mean of the losses (B,) of objective i -> scalar. An objective absent from the batch adds
    nothing, and the others are not reweighted for it. count (H,): pairs of every objective in the whole batch, if these
    are only some of them: then the parts' results add up to that of the whole."""
    one_hot = F.one_hot(head, len(alpha)).to(losses.dtype)                                # (B, H)
    count = one_hot.sum(0) if count is None else count
    return (alpha * (losses @ one_hot) / count.clamp(min=1)).sum()


def mah_dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, head, alpha, beta, count=None):
    """The MAH-DPO loss. head (B,): each pair's objective; alpha (H,): weights of the objectives; count: see balanced_mean.
    -> scalar, metrics as in pair_metrics."""
    losses = dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta)
    return balanced_mean(losses, head, alpha, count), pair_metrics(
        losses, pi_chosen, pi_rejected, ref_chosen, ref_rejected, head, len(alpha), beta, count)
# --- end of exercise 3 ---


@torch.no_grad()
def pair_metrics(losses, pi_chosen, pi_rejected, ref_chosen, ref_rejected, head, H, beta, count=None):
    """Per objective (H,), NaN where it has no pair: the mean of the losses (B,); margin, beta Delta; accuracy, the share of
    pairs with Delta > 0; how far the log-probabilities of chosen and rejected have moved from the reference's; and kl, half
    the mean square of those moves, which estimates the KL divergence from the reference in nats per response while it is
    small. count: see balanced_mean."""
    one_hot = F.one_hot(head, H).to(losses.dtype)
    count = one_hot.sum(0) if count is None else count
    mean = lambda values: (values.to(losses.dtype) @ one_hot) / count                     # 0 / 0 = NaN: no such pair
    chosen, rejected = pi_chosen - ref_chosen, pi_rejected - ref_rejected
    return {"loss": mean(losses), "margin": mean(beta * (chosen - rejected)), "accuracy": mean(chosen > rejected),
            "chosen": mean(chosen), "rejected": mean(rejected), "kl": mean((chosen ** 2 + rejected ** 2) / 4)}


def soup(state_dicts, weights):
    """DPO soup: parameters averaged, theta = sum_k w_k theta_k, w divided by its sum. ValueError for unequal models or
    weights that are negative or sum to nothing."""
    if len(state_dicts) != len(weights) or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"need one non-negative weight per model, not all zero: got {weights} for {len(state_dicts)}")
    if any(s.keys() != state_dicts[0].keys() for s in state_dicts):
        raise ValueError("the models of a soup must have the same parameters")
    return {k: sum(w / sum(weights) * s[k] for w, s in zip(weights, state_dicts)) for k in state_dicts[0]}


@dataclass
class Pair:
    """A preference pair in ids; the response ends with EOS unless it was cut off. `split` is train or dev."""
    objective: str
    prompt: list
    chosen: list
    rejected: list
    split: str
    reference: list = None      # log-probabilities of chosen and rejected under the SFT policy
    margin: float = None        # MODPO's

    def __len__(self):
        """Tokens of the packed pair."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def encode_pair(preference, model):
    """Preference -> Pair in the model's ids, EOS behind both responses; its split is the hash of the prompt's text. None if it
    is longer than the context, or nothing of the responses is left to tell them apart."""
    tokenizer, p = model.tokenizer, preference
    chosen, rejected = (tokenizer.encode(text) + [tokenizer.eos_id] for text in (p.chosen, p.rejected))
    split = "train" if split_of(json.dumps(p.prompt)) == "train" else "dev"
    pair = Pair(p.objective, tokenizer.encode_chat(p.prompt), chosen, rejected, split)
    fits = len(pair.prompt) + max(len(chosen), len(rejected)) <= model.config.max_len
    return pair if fits and min(len(chosen), len(rejected)) > 1 and chosen != rejected else None


@torch.no_grad()
def pair_logps(model, pairs, head_of, pad_id, progress=None, tokens=16384):
    """pairs: objects with objective, prompt, chosen, rejected (ids) -> log-probabilities (N, 2) of chosen and rejected,
    each pair under the head head_of(objective); `tokens` per batch at most. Several processes share the work."""
    device, found = model.embed.weight.device, []
    rows = [i % len(pairs) for i in range(len(pairs) + -len(pairs) % ranks())]            # equally many for every process
    for batch in dealt_batches([len(pairs[i]) for i in rows], tokens):
        index = [rows[k] for k in batch]
        head = torch.tensor([head_of(pairs[i].objective) for i in index], device=device)
        logps = policy_logps(model, [pairs[i] for i in index], head).T.float()
        found += zip(index, logps.tolist())
        if progress is not None:
            progress(len(index) * ranks())
    found = dict(gather(found))
    return torch.tensor([found[i] for i in range(len(pairs))]).view(-1, 2)


def make_optimizer(model, lr_backbone, lr_heads):
    """AdamW with a rate for the backbone and one for the heads. The heads must part from each other while the backbone,
    which all objectives pull on, moves little: one rate for both either leaves the heads alike or breaks the backbone.
    The paper's RMSprop has no bias correction, so its first steps are as long as its largest: harmless over thousands
    of steps at 1e-6, not over the hundred or so taken here. No weight decay: it would pull heads away from SFT."""
    heads = list(model.heads.parameters())
    backbone = [p for name, p in model.named_parameters() if not name.startswith("heads.")]
    return torch.optim.AdamW([{"params": backbone, "lr": lr_backbone, "name": "backbone"},
                              {"params": heads, "lr": lr_heads, "name": "heads"}],
                             betas=(0.9, 0.99), weight_decay=0.0, fused=True)


if __name__ == "__main__":
    zero, alpha = torch.zeros(2), torch.ones(2)
    loss, metrics = mah_dpo_loss(zero, zero, zero, zero, torch.tensor([0, 1]), alpha, beta=0.1)
    print(f"policy = reference: loss {float(loss):.4f} = 2 ln 2, per objective {metrics['loss'].tolist()}")
