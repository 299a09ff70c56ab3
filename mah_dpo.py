"""mah_dpo.py: Multi-Action-Head DPO and its baselines, from ids to losses.

Before: prm.py; next: decode.py.

    Delta_i = [log pi_i(y+|x) - log pi_ref(y+|x)] - [log pi_i(y-|x) - log pi_ref(y-|x)]
    L       = sum_i alpha_i * mean over the pairs of objective i of -log sigmoid(beta Delta_i)

(paper, Sec. 5; log-probabilities are sums over response tokens.) pi_i is the shared backbone with
head i; the reference is the frozen SFT model, whose log-probabilities train.py computes once. A
pair of objective i touches head i and the backbone and nothing else: no other head's logits are
made, so a head that saw no pair keeps grad None.

Read response_logps and policy_logps, then the losses: DPO, MAH-DPO, and the baselines MODPO (the
other objectives' rewards as a margin) and DPO soup (a policy per objective, parameters averaged).
Last come rules beside the plain sum for what the objectives ask of the backbone that they share.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import dealt_batches, pad, response_mask
from interop.parallel import gather, ranks
from model import linear

CHUNK = 4096     # response tokens whose logits are made at once: memory is bounded at CHUNK x V


@dataclass
class Pair:
    """A preference pair in ids; a response ends with EOS unless it was cut off."""
    objective: str
    prompt: list
    chosen: list
    rejected: list
    split: str                  # train | dev
    reference: list = None      # the SFT policy's log-probabilities of chosen and rejected
    margin: float = None        # MODPO's

    def __len__(self):
        """Tokens that are fed for it: the prompt is encoded once for both responses."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def lengths(self):
        """What is padded apart in a batch: the prompts, and the responses to one width."""
        longer = max(len(self.chosen), len(self.rejected))
        return len(self.prompt), longer, longer


# --- exercise 1: response_logps (3 points) ---
def response_logps(h, W, ids, mask):
    """Sum of log-probabilities of the response tokens of each row.

    h (B, T, d) hidden states, W (V, d) one head, ids (B, T), mask (B, T) True on response tokens
    -> (B,). h at t predicts the token at t + 1, so token t is scored by h at t - 1 (the last h is
    not needed); prompt and padding are never scored. Softmax and sum are taken in float32 (float64
    for such h). To bound memory, only response tokens get logits, CHUNK at a time (not tested)."""
    # Where the scored tokens stand; t is the place of the state before each.
    row, t = mask[:, 1:].nonzero(as_tuple=True)                             # (N,) response tokens
    dtype = torch.promote_types(h.dtype, torch.float32)
    total = torch.zeros(len(ids), dtype=dtype, device=h.device)
    for r, s in zip(row.split(CHUNK), t.split(CHUNK)):
        logits = linear(h[r, s], W).to(dtype)                               # (CHUNK, V)
        logps = -F.cross_entropy(logits, ids[r, s + 1], reduction="none")   # (CHUNK,)
        total = total.index_add(0, r, logps)
    return total
# --- end of exercise 1 ---


def policy_logps(model, pairs, head):
    """Log-probabilities of chosen and rejected of n Pairs -> (2, n), of pair b by head[b] (n,).

    A pair is a prompt continued twice: the prompt is encoded once, both responses follow it, and
    the first token of each is predicted by the last state of the PROMPT."""
    device = model.embed.weight.device
    # Rows 2b and 2b + 1 continue prompt b: chosen, rejected.
    prompts, lengths = pad([p.prompt for p in pairs], 0, device)            # (n, P)
    both = []
    for p in pairs:
        both += [p.chosen, p.rejected]
    responses, sizes = pad(both, 0, device)                                 # (2n, R)
    # The prompts, whose keys and values all later tokens look at.
    cache = model.new_cache(len(pairs))
    h = model(prompts, cache)                                               # (n, P, d)
    cache.keep(0, lengths)
    b = torch.arange(len(pairs), device=device)
    last = h[b, lengths - 1].repeat_interleave(2, 0)                        # (2n, d)
    # A response's own last token predicts nothing more: it is not fed.
    others = model(responses[:, :-1], cache.fork(2))                        # (2n, R - 1, d)
    h = torch.cat((last[:, None], others), 1)                               # (2n, R, d)
    # Rows are now "the prompt's last token, the response".
    ids = F.pad(responses, (1, 0))                                          # (2n, 1 + R)
    mask = response_mask(torch.ones_like(sizes), 1 + sizes, ids.shape[1])
    # One head after another scores the rows that are its own; they are put back in their places.
    head = head.repeat_interleave(2)                                        # (2n,)
    dtype = torch.promote_types(h.dtype, torch.float32)
    found = torch.zeros(len(ids), dtype=dtype, device=device)                # (2n,)
    for i in head.unique().tolist():
        rows = (head == i).nonzero()[:, 0]
        logps = response_logps(h[rows], model.heads[i].weight, ids[rows], mask[rows])
        found = found.index_copy(0, rows, logps)
    return found.view(-1, 2).T


def own_heads(model, pairs):
    """The heads of n Pairs (n,): each objective's own, or where the model has none, the first."""
    names = model.config.objectives
    found = [names.index(p.objective) if p.objective in names else 0 for p in pairs]
    return torch.tensor(found, device=model.embed.weight.device)


@torch.no_grad()
def pair_logps(model, pairs, progress=None, tokens=4096):
    """Log-probabilities of chosen and rejected of N Pairs -> (N, 2), each under its own head.

    `tokens` bounds a batch; progress(number of pairs) is called after each. Several processes
    share the work: equally many rows each, of which the last may score the first pairs again."""
    n = len(pairs) + -len(pairs) % ranks()
    rows, found = [i % len(pairs) for i in range(n)], []
    for batch in dealt_batches([pairs[i].lengths for i in rows], tokens):
        index = [rows[k] for k in batch]
        part = [pairs[i] for i in index]
        logps = policy_logps(model, part, own_heads(model, part)).T.float()
        found += zip(index, logps.tolist())
        if progress is not None:
            progress(len(index) * ranks())
    # Every process learns all of them, and puts them in the order of the pairs.
    found = dict(gather(found))
    return torch.tensor([found[i] for i in range(len(pairs))]).view(-1, 2)


# -- losses

def log_ratio_margin(pi_chosen, pi_rejected, ref_chosen, ref_rejected):
    """Delta (B,): how much more than the reference the policy prefers chosen to rejected."""
    return (pi_chosen - ref_chosen) - (pi_rejected - ref_rejected)


# --- exercise 2: dpo_loss (1 point) ---
def dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta):
    """-log sigmoid(beta Delta) (B,); arguments (B,) are sums of log-probabilities. ln 2 where
    policy = reference."""
    delta = log_ratio_margin(pi_chosen, pi_rejected, ref_chosen, ref_rejected)
    return -F.logsigmoid(beta * delta)
# --- end of exercise 2 ---


# --- exercise 3: mah_dpo_loss (3 points) ---
def balanced_mean(losses, head, alpha, count=None):
    """sum_i alpha_i * mean of the losses (B,) of objective i -> scalar.

    head (B,): each pair's objective, by number; alpha (H,): weights of the objectives. One that is
    absent from the batch adds nothing, and the others are not reweighted for it. count (H,): pairs
    of each in the whole batch, if these are only a part: the parts' results add up."""
    # Which loss belongs to which objective: products with this matrix are sums per objective.
    one_hot = F.one_hot(head, len(alpha)).to(losses.dtype)                  # (B, H)
    if count is None:
        count = one_hot.sum(0)
    # An objective without a pair has the sum 0, which is divided by 1.
    means = losses @ one_hot / count.clamp(min=1)                           # (H,)
    return (alpha * means).sum()


def mah_dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, head, alpha, beta, count=None):
    """sum_i alpha_i * mean over objective i of -log sigmoid(beta Delta) -> scalar, and metrics as
    in pair_metrics. head, alpha, count as in balanced_mean."""
    logps = pi_chosen, pi_rejected, ref_chosen, ref_rejected
    losses = dpo_loss(*logps, beta)
    metrics = pair_metrics(losses, *logps, head, len(alpha), beta, count)
    return balanced_mean(losses, head, alpha, count), metrics
# --- end of exercise 3 ---


# --- exercise 4: modpo_loss (2 points) ---
def modpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, margin, w_k, beta):
    """MODPO (B,): -log sigmoid( (beta Delta - margin) / w_k ), for pairs of objective k.

    margin (B,) = sum_{j != k} w_j (r_j(y+) - r_j(y-)): the other objectives' rewards
    r_j = beta log(pi_j / pi_ref) by their single-objective DPO policies. w_k, a number or (B,), is
    at least 0.1, since dividing by less makes the loss explode (paper, Sec. 5): else ValueError."""
    if not bool((torch.as_tensor(w_k) >= 0.1).all()):
        raise ValueError(f"MODPO needs w_k >= 0.1, not {w_k}")
    delta = log_ratio_margin(pi_chosen, pi_rejected, ref_chosen, ref_rejected)
    return -F.logsigmoid((beta * delta - margin) / w_k)
# --- end of exercise 4 ---


@torch.no_grad()
def pair_metrics(losses, pi_chosen, pi_rejected, ref_chosen, ref_rejected, head, H, beta,
                 count=None):
    """Means over each objective's pairs, (H,) each, NaN where it has none; count as in
    balanced_mean.

    loss; margin, beta Delta; accuracy, the share of pairs with Delta > 0; chosen and rejected, how
    far they have moved from the reference; kl, half the mean square of those moves, which while it
    is small estimates the KL divergence from the reference in nats per response."""
    chosen, rejected = pi_chosen - ref_chosen, pi_rejected - ref_rejected
    values = {
        "loss": losses,
        "margin": beta * (chosen - rejected),
        "accuracy": chosen > rejected,
        "chosen": chosen,
        "rejected": rejected,
        "kl": (chosen**2 + rejected**2) / 4,
    }
    one_hot = F.one_hot(head, H).to(losses.dtype)                           # (B, H)
    if count is None:
        count = one_hot.sum(0)
    # 0 / 0 is NaN: an objective without a pair.
    return {name: v.to(losses.dtype) @ one_hot / count for name, v in values.items()}


def soup(state_dicts, weights):
    """DPO soup: theta = sum_k w_k theta_k, w divided by its sum. ValueError for unequal models, or
    weights that are negative or sum to nothing."""
    total = sum(weights)
    if len(state_dicts) != len(weights) or min(weights) < 0 or total <= 0:
        raise ValueError("need one non-negative weight per model, not all zero: got "
                         f"{weights} for {len(state_dicts)}")
    mixed = {}
    for state, w in zip(state_dicts, weights):
        if state.keys() != state_dicts[0].keys():
            raise ValueError("the models of a soup must have the same parameters")
        for name, t in state.items():
            mixed[name] = mixed.get(name, 0) + w / total * t
    return mixed


# -- what objectives ask of the backbone
#
# Heads share nothing, but every objective's gradient pulls on the backbone, perhaps against the
# others. A rule chooses how much of each goes into the update, and all that it looks at is how the
# gradients g_i of the losses L_i stand to each other: gram (H, H), gram[i, j] = g_i . g_j.

RULES = ["sum", "raco", "cagrad", "mgda"]


# --- exercise 17: combine (3 points) ---
def combine(gram, alpha, rule, c=0.4):
    """gram (H, H) and the objectives' weights alpha (H,) -> (H,), how much of each g_i goes into
    the update sum_i coefficient_i g_i. With w = alpha / sum(alpha) and g_0 = sum_i w_i g_i:

    sum     g_0, the gradient of sum_i alpha_i L_i
    mgda    the shortest vector G_p = sum_i p_i g_i, p on the simplex (Desideri 2012)
    cagrad  g_0 + c |g_0| G_p / |G_p|, p = argmin G_p . g_0 + c |g_0| |G_p|: of all updates that
            differ from g_0 by c |g_0| the one that serves the worst served objective most
            (Liu et al. 2021, arXiv 2110.14048)
    raco    the same with p_i cut to at most w_i: no objective is served at the cost of the weights
            that were asked for (arXiv 2602.02495, Algorithm 1)

    Each is taken sum(alpha) times, as the sum is. c, in [0, 1), says how far they part from it.
    least_conflict, below, finds p, beginning at w; where G_p is 0, g_0 stays."""
    if rule == "sum":
        return alpha
    total = alpha.sum()
    w = alpha / total
    if rule == "mgda":
        return total * least_conflict(gram, torch.zeros_like(w), 1.0, w)
    along = gram @ w                                    # (H,) every g_i . g_0
    reach = c * (w @ along).clamp(min=0).sqrt()         # c |g_0|
    p = least_conflict(gram, along, reach, w)
    if rule == "raco":
        p = torch.minimum(p, w)
    length = (p @ gram @ p).clamp(min=0).sqrt()         # |G_p|
    if length == 0:
        return alpha
    return alpha + total * reach / length * p
# --- end of exercise 17 ---


def least_conflict(gram, b, s, p):
    """The shares p (H,) on the simplex that minimise b . p + s |sum_i p_i g_i|. They begin at p,
    and a share that is 0 there stays 0.

    Each step moves what is best from the share where the slope is largest to that where it is
    smallest. Along such a line, of two objectives all there is, the minimum is known exactly."""
    p, allowed = p.clone(), p > 0
    for _ in range(200):
        products = gram @ p                             # (H,) every g_i . G_p
        square = (p @ products).clamp(min=0)            # |G_p|^2
        norm = square.sqrt().clamp(min=1e-30)
        slope = b + s * products / norm                 # (H,)
        i = slope.where(allowed, math.inf).argmin()
        j = slope.where(p > 0, -math.inf).argmax()
        # With a share t moved: b . p changes by d t, |G_p|^2 is A t^2 + 2 B t + |G_p|^2.
        across = gram[i] - gram[j]                      # (H,) every g . (g_i - g_j)
        A = across[i] - across[j]
        B = p @ across
        d = b[i] - b[j]
        t = p[j]
        steep = s * s * A - d * d
        # All of it goes where b . p falls faster than the norm can grow; else to where they meet.
        if steep > 0:
            least = (A * square - B * B).clamp(min=0)   # A times the least |G_p|^2 on the line
            turn = B + d * (least / steep).sqrt()
            t = torch.minimum(t, -turn / A)
        # Slopes that are equal but for rounding are equal.
        gap = slope[j] - slope[i]
        rounding = 1e-9 * slope.abs().max()
        if not (gap > rounding and t > 0):
            break
        p[i] += t
        p[j] -= t
    return p


def make_optimizer(model, lr_backbone, lr_heads):
    """AdamW with a rate for the backbone and one for the heads.

    Heads must part from each other while the backbone, which all objectives pull on, moves little.
    The paper's RMSprop has no bias correction, so its first steps are as long as its largest:
    harmless over thousands of steps at 1e-6, not over a hundred. No weight decay: it would pull
    heads away from SFT."""
    heads, backbone = [], []
    for name, p in model.named_parameters():
        group = heads if name.startswith("heads.") else backbone
        group.append(p)
    groups = [{"params": backbone, "lr": lr_backbone, "name": "backbone"},
              {"params": heads, "lr": lr_heads, "name": "heads"}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


if __name__ == "__main__":
    # Where policy and reference are equal, every objective loses ln 2.
    zero = torch.zeros(2)
    objectives, alpha = torch.tensor([0, 1]), torch.ones(2)
    loss, metrics = mah_dpo_loss(zero, zero, zero, zero, objectives, alpha, beta=0.1)
    print(f"policy = reference: loss {loss:.4f} = 2 ln 2, per objective "
          f"{metrics['loss'].tolist()}")
