"""prm.py: the process reward model (PRM), the labels it learns from, its losses, its files.

A PRM maps a prefix (x, y_1:t), a prompt and the first t steps of a response, to a score p_t, read
at the last token of step t. How a prefix gets its label depends on the objective (paper, Sec. 4).
Each case is one pure function on finished rollouts or pairs, and one loss:

    verifiable   V_t = r_t + mean_m gamma^(n_m - t) z_m       hindsight_targets   mse_loss
    case A       r_t = mean_m J(y_1:t, rollout_m)             graded_labels       bce_loss
                 r_t = 1[ mean_m J(y_1:t, rollout_m) > 1/2 ]  majority_labels     (the paper's)
    case B       the same of J(y_1:t), without rollouts
    case C       P(y+_1:t) should exceed P(y-_1:t)            matching_steps      bradley_terry_loss

One backbone serves all objectives, with one output each: (B, T, d) -> (B, T, P).
Read the labels first, then the losses, then the class PRM; scoring and files come last.
Before: model.py; next: mah_dpo.py.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import InputError, Objective, pad, read_objectives
from interop.parallel import gathered
from interop.reward_models import REWARD, read_released_head
from interop.tokenizer import load_tokenizer
from model import GPT, Checkpoint, read_config, save_directory

# -- labels


# --- exercise 5: hindsight_targets (2 points) ---
def hindsight_targets(step_rewards, lengths, correct, gamma):
    """Verifiable case: V_t = r_t + mean_m gamma^(n_m - t) z_m (paper, Sec. 4) -> (S,)

    step_rewards (S,): r_t of step t = 1..S.
    lengths (S, M): n_m, the number of steps of rollout m from prefix t, prefix included.
    correct (S, M): z_m in {0, 1}, the verifier's verdict on the end of that rollout.
    ValueError if a rollout is shorter than its prefix, n_m < t."""
    t = torch.arange(1, len(step_rewards) + 1, device=lengths.device)[:, None]     # (S, 1)
    if bool((lengths < t).any()):
        raise ValueError("a rollout from prefix t has fewer than t steps")
    # Each rollout has its own power of gamma: a right answer that is far away counts less.
    discounted = gamma ** (lengths - t) * correct                                  # (S, M)
    return step_rewards + discounted.mean(1)
# --- end of exercise 5 ---


# --- exercise 6: majority_labels (1 point) ---
def majority_labels(verdicts):
    """Case A: verdicts (S, M) in {0, 1}, a judge's, on M completed rollouts from each prefix.

    -> (S,) in {0., 1.}: what the strict majority says; a tie is negative (paper, Sec. 4)."""
    share = verdicts.float().mean(1)
    return (share > 0.5).float()
# --- end of exercise 6 ---


def graded_labels(ratings):
    """Cases A and B: a judge's ratings (S, M) of M completed rollouts from each prefix -> (S,), the
    mean within [0, 1].

    Not in the paper. A majority says yes to nearly all that a well-trained policy answers, and then
    tells its candidates apart no more; a threshold for each policy would label one text in two
    ways."""
    return ratings.mean(1).clamp(0, 1)


def matching_steps(chosen_ids, rejected_ids, chosen_ends, rejected_ends):
    """Case C: where two responses are compared -> list of (index in chosen, index in rejected).

    ids: tokens of the responses; ends: the index of the last token of each step. Step t stands
    against step t for t = 1..min(n+, n-), then the full responses against each other."""
    # zip stops with the shorter response.
    compared = list(zip(chosen_ends, rejected_ends))
    if len(chosen_ends) != len(rejected_ends):
        compared.append((chosen_ends[-1], rejected_ends[-1]))
    # Equal prefixes get equal scores whatever the PRM says: nothing can be learnt from them.
    return [(c, r) for c, r in compared if chosen_ids[:c + 1] != rejected_ids[:r + 1]]


# -- losses

def masked_mean(values, mask):
    """Mean of the values whose mask is set; 0 if there is none."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def mse_loss(scores, targets, mask):
    """Mean over masked steps of (p_t - V_t)^2. All arguments have one shape; p_t is unbounded."""
    return masked_mean((scores - targets) ** 2, mask)


def bce_loss(scores, targets, mask):
    """Mean over masked steps of -[r log sigmoid(p) + (1 - r) log(1 - sigmoid(p))].

    scores p are logits, targets r lie in [0, 1]."""
    losses = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    return masked_mean(losses, mask)


# --- exercise 7: bradley_terry_loss (1 point) ---
def bradley_terry_loss(scores_chosen, scores_rejected, mask):
    """Mean over masked comparisons of -log sigmoid(P(y+_1:t) - P(y-_1:t))."""
    return masked_mean(-F.logsigmoid(scores_chosen - scores_rejected), mask)
# --- end of exercise 7 ---


def step_loss(outputs, scores, targets, count=None):
    """Labelled steps of all objectives at once -> (P,) the loss of each output.

    outputs: P Objective records. scores, targets (N, P), NaN where a step has no label for an
    output. count (P,): the labels of the whole batch, if these are only a part: parts add up."""
    labelled = ~targets.isnan()                                                    # (N, P)
    here = labelled.sum(0)                                                         # (P,)
    whole = here if count is None else count                                       # (P,)
    # Masked out is not enough: 0 * NaN would be NaN, in the loss and in its gradient.
    targets = targets.nan_to_num()
    losses = []
    for p, output in enumerate(outputs):
        loss = mse_loss if output.case == "verifiable" else bce_loss
        losses.append(loss(scores[:, p], targets[:, p], labelled[:, p]))
    # Each loss is a mean over the labels that are here; it counts by their share of the batch.
    return torch.stack(losses) * (here / whole.clamp(min=1))


# -- the model

# An auxiliary output that exists in training only and is no objective: is this step right?
# Its label is r_t itself, of every step up to the first wrong one.
STEP = "step_correctness"
STEP_OUTPUT = Objective(STEP, "", "B", "")
# Beside a judge's label stands a second judge's, who is as noisy. No output learns it: what two
# judges agree on is what can be learnt.
SECOND = " by a second judge"


def worst_mix(V):
    """RMOD (arXiv 2503.08796): scores V (..., K, P) of K candidates -> the weights w (..., 1, P) on
    the simplex that minimise log mean_k exp(sum_p w_p V_kp): those of the mix by which the
    candidates gain least, which is guidance against the worst objective.

    Scores of preferences have no zero: a gain is counted from the mean of the candidates."""
    mean = V.mean(-2, keepdim=True)
    V = V - mean
    # The larger the scores, the shorter the steps that still converge.
    largest = V.abs().amax((-2, -1), keepdim=True)
    rate = 2 / largest.square().clamp(min=1)
    u = torch.zeros_like(mean)                                                     # (..., 1, P)
    for _ in range(100):
        # Exponentiated gradient: an output by which the better candidates gain loses weight.
        w = u.softmax(-1)
        mixed = (w * V).sum(-1, keepdim=True)                                      # (..., K, 1)
        better = mixed.softmax(-2)
        gain = (better * V).sum(-2, keepdim=True)                                  # (..., 1, P)
        u = u - rate * gain
    return u.softmax(-1)


class PRM(nn.Module):
    """A backbone and an MLP (Linear, ReLU, Linear) with P scores for every token.

    outputs: P Objective records. While a value model is trained, STEP_OUTPUT may be the last."""

    def __init__(self, backbone, outputs, generator=None):
        super().__init__()
        self.backbone = backbone
        self.outputs = list(outputs)
        self.names = [output.name for output in outputs]
        d = backbone.config.d_model
        self.score = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, len(outputs)))
        for layer in (self.score[0], self.score[2]):
            nn.init.normal_(layer.weight, std=d ** -0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        # How far each output spreads among the candidates of one step, which is all that guidance
        # compares: in these units "unified" may average values, logits and preference scores.
        self.register_buffer("scale", torch.ones(len(outputs)))
        # A released PRM may want this token after every step, and is read there.
        self.marker = None

    def forward(self, ids, cache=None, rows=None):
        """ids (B, T) -> scores (B, T, P); cache and rows as in GPT.forward.

        STEP is not in the paper. V_t depends on r_1..r_t, but rollouts are noisy. So STEP is read
        before the last block (deep supervision), which can then attend to all steps' verdicts."""
        if STEP not in self.names:
            return self.score(self.backbone(ids, cache, rows))
        h, h_below = self.backbone(ids, cache, rows, below=True)                   # (B, T, d) each
        above, below = self.score(h), self.score(h_below)                          # (B, T, P) each
        return torch.cat((above[..., :-1], below[..., -1:]), -1)

    def guide(self, scores, guide, boundary):
        """scores (..., K, P) of K candidates -> the outputs' own scores that guide (..., K, P');
        and what is compared, their weighted mean in units of their spread (..., K).

        guide: an output; {output: weight}; "unified", all whose steps end at `boundary`, a world's
        say, weighted alike; "worst", the same ones as in worst_mix. InputError for one that names
        no output, or some whose steps end differently."""
        shares = guide if isinstance(guide, dict) else {guide: 1.0}
        if guide in ("unified", "worst"):
            # A released reward model has no boundary of its own: it fits all.
            fitting = [o.name for o in self.outputs if o.boundary in ("", boundary)]
            shares = dict.fromkeys(fitting, 1.0)
        index = [p for p, name in enumerate(self.names) if shares.get(name)]
        unknown = shares.keys() - set(self.names)
        if unknown or not index:
            known = ", ".join(self.names)
            raise InputError(f"no PRM output {guide!r} here: this PRM has {known}, 'unified' and "
                             "'worst'")
        ends = {self.outputs[p].boundary for p in index}
        ends.discard("")
        if len(ends) > 1:
            found = ", ".join(sorted(ends))
            raise InputError(f"the steps of the outputs that guide end differently: {found}")
        values = scores[..., index]                                                # (..., K, P')
        scaled = values / self.scale[index]
        # One weight for each of them, or for every step its own.
        weights = [shares[self.names[p]] for p in index]
        weights = scaled.new_tensor(weights)                                       # (P',)
        if guide == "worst":
            weights = worst_mix(scaled)                                            # (..., 1, P')
        mixed = (weights * scaled).sum(-1)
        total = weights.sum(-1)
        return values, mixed / total


# -- scoring sequences

@dataclass
class Labelled:
    """A sequence with labels: targets[s] is {output's name: number} of the step that ends at
    index ends[s] of ids. The names are of objectives, STEP, or a name with SECOND."""
    ids: list
    ends: list
    targets: list
    split: str
    policy: str = ""                 # whose answer it is; "" where a file of --data has it

    def __len__(self):
        return len(self.ids)


def scores_at(prm, sequences):
    """[(ids, ends)] with N ends in all -> the scores there, one sequence after another (N, P)."""
    # What stands behind a sequence changes none of its scores: any id pads.
    ids, _ = pad([ids for ids, _ in sequences], 0, prm.scale.device)               # (B, T)
    # One index for all: a gradient for every sequence's own would each be as large as the batch.
    rows, places = [], []
    for row, (_, ends) in enumerate(sequences):
        rows += [row] * len(ends)
        places += ends
    return prm(ids)[rows, places].float()


def step_scores(prm, rows):
    """Labelled rows with N steps in all -> scores (N, P), targets (N, P), NaN where none."""
    targets = []
    for row in rows:
        for labels in row.targets:
            targets.append([labels.get(name, math.nan) for name in prm.names])
    scores = scores_at(prm, [(row.ids, row.ends) for row in rows])
    return scores, torch.tensor(targets, device=scores.device)


def pair_scores(prm, pairs):
    """Pairs with N matching steps in all -> scores of chosen (N,), of rejected (N,), each by the
    output of the pair's objective, and the index of that output (N,)."""
    tokenizer = prm.backbone.tokenizer
    chosen, rejected, outputs = [], [], []
    for pair in pairs:
        p = prm.names.index(pair.objective)
        boundary = prm.outputs[p].boundary
        ends = [tokenizer.step_ends(ids, boundary) for ids in (pair.chosen, pair.rejected)]
        matches = matching_steps(pair.chosen, pair.rejected, *ends)
        # The same two steps, counted from the beginning of the prompt.
        start = len(pair.prompt)
        chosen.append((pair.prompt + pair.chosen, [start + c for c, _ in matches]))
        rejected.append((pair.prompt + pair.rejected, [start + r for _, r in matches]))
        outputs += [p] * len(matches)
    scores = scores_at(prm, chosen + rejected)     # (2N, P): all of chosen, all of rejected
    p = torch.tensor(outputs, dtype=torch.long, device=scores.device)              # (N,)
    scores = scores.unflatten(0, (2, len(p)))[:, torch.arange(len(p)), p]          # (2, N)
    return scores[0], scores[1], p


# -- files

def save_prm(prm, directory):
    """Write a PRM as a Hugging Face directory, without STEP: the backbone as a checkpoint of its
    family, the MLP as score.0 and score.2, the records of the outputs in config.json."""
    kept = [p for p, name in enumerate(prm.names) if name != STEP]
    tensors = {"score_scale": prm.scale[kept]}
    for name, tensor in prm.score.state_dict().items():
        tensor = gathered(tensor)
        tensors[f"score.{name}"] = tensor[kept] if name.startswith("2.") else tensor
    records = [asdict(prm.outputs[p]) for p in kept]
    save_directory(directory, prm.backbone, tensors, prm_outputs=records)


@torch.no_grad()
def load_prm(directory, dtype=torch.float32):
    """The directory of a reward model -> PRM: one written by save_prm, or a released one, whose
    single output is "reward" (see interop/reward_models.py).

    InputError names a missing, unknown or wrongly shaped tensor, or a broken config.json."""
    config, files = read_config(directory), Checkpoint(directory)
    config.objectives = ()               # no head of a policy
    tokenizer = load_tokenizer(directory, config.vocab_size)
    backbone = GPT.from_state(config, files.backbone(config, dtype), tokenizer)
    outputs = config.hf.get("prm_outputs")
    if outputs is None:
        prm = PRM(backbone, [REWARD]).to(dtype)
        prm.score, prm.marker = read_released_head(directory, config, files, tokenizer, dtype)
    else:
        outputs = read_objectives(f"{directory}: config.json: prm_outputs", outputs)
        prm = PRM(backbone, outputs).to(dtype)
        for name, p in prm.score.named_parameters():
            p.copy_(files.take(f"score.{name}", p.shape, dtype))
        prm.scale = files.take("score_scale", prm.scale.shape, dtype)
    files.finish()
    return prm


if __name__ == "__main__":
    # A solution of three steps, the second wrong; two rollouts from each prefix, gamma = 0.9.
    rewards = torch.tensor([1., 0., 1.])
    n = torch.tensor([[3, 4], [3, 3], [3, 3]])
    z = torch.tensor([[1., 1.], [0., 1.], [0., 0.]])
    values = [round(v, 3) for v in hindsight_targets(rewards, n, z, 0.9).tolist()]
    print("V_t =", values, "(1 + (.81 + .729)/2, 0 + .9/2, 1 + 0)")
