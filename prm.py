"""prm.py: the process reward model (PRM), the labels it learns from, its losses. Before: model.py; next: mah_dpo.py.

A PRM maps a prefix (x, y_1:t) of prompt and steps to a score p_t, read at the step's last token. How the label is built
depends on the objective (paper, Sec. 4); here every case is one pure function on finished rollouts or pairs:

    verifiable   V_t = r_t + mean_m gamma^(n_m - t) z_m      hindsight_targets, then mse_loss
    case A       r_t = 1[ mean_m J(y_1:t, rollout_m) > 1/2 ] majority_labels, then bce_loss
    case B       r_t = J(y_1:t), the prefix judged as it is  nothing to build, then bce_loss
    case C       -log sigmoid(P(y+_1:t) - P(y-_1:t))         matching_steps, then bradley_terry_loss

One backbone serves all objectives: an MLP (Linear, ReLU, Linear) with one output per objective, (B, T, d) -> (B, T, P).
While a value model is trained, an auxiliary output, one block lower, learns r_t by itself (not in the paper).
"""
import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import InputError, OBJECTIVES, batches_by_length, pad
from interop.parallel import gathered
from interop.tokenizer import load_tokenizer
from model import Checkpoint, GPT, backbone_tensors, read_config, save_directory

VERIFIABLE = {name for name, objective in OBJECTIVES.items() if objective.case == "verifiable"}
STEP = "step_correctness"      # the auxiliary output, see PRM.forward


class PRM(nn.Module):
    """A backbone and an MLP with P = len(outputs) scores per token. `outputs` are objective names; in training STEP may be the
    last."""

    def __init__(self, backbone, outputs, generator=None):
        super().__init__()
        self.backbone, self.outputs, d = backbone, list(outputs), backbone.config.d_model
        self.score = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, len(self.outputs)))
        for layer in (self.score[0], self.score[2]):
            nn.init.normal_(layer.weight, std=d ** -0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        # Spread of each output over held-out steps: brings values, logits and preference scores to one unit, so that
        # "unified" guidance may average them.
        self.register_buffer("scale", torch.ones(len(self.outputs)))
        self.marker = None             # a released PRM may want this token after every step, and is read there

    def forward(self, ids, cache=None, rows=None):
        """ids (B, T) -> scores (B, T, P); cache and rows as in GPT.forward.

        STEP is an auxiliary output, trained on r_t of every step up to the first wrong one and dropped when the PRM is saved. V_t
        depends on r_1..r_t; in the noise of rollouts a small model is long in finding out what makes a step wrong. STEP is read
        before the last block (deep supervision), which can then attend to the verdicts on all steps."""
        if STEP not in self.outputs:
            return self.score(self.backbone(ids, cache, rows))
        above, below = map(self.score, self.backbone(ids, cache, rows, below=True))
        return torch.cat((above[..., :-1], below[..., -1:]), -1)

    def guide(self, scores, guide, boundary=None):
        """scores (..., P) -> (...): one output, or for "unified" the mean of the scaled outputs of the domain whose
        steps end at `boundary`. InputError for a guide this PRM does not have."""
        unified = [n for n in self.outputs if n not in OBJECTIVES or boundary in (None, OBJECTIVES[n].boundary)]
        names = unified if guide == "unified" else [n for n in self.outputs if n == guide]
        if not names:
            raise InputError(f"no PRM output {guide!r} here: this PRM has {', '.join(self.outputs)}, and 'unified'")
        index = [self.outputs.index(n) for n in names]
        return (scores[..., index] / self.scale[index]).mean(-1)


# --- exercise 5: hindsight_targets (2 points) ---
def hindsight_targets(step_rewards, lengths, correct, gamma):
    """Hindsight relabelling for a verifiable objective: V_t = r_t + mean_m gamma^(n_m - t) z_m (paper, Sec. 4).

    step_rewards (S,): r_t of step t = 1..S. lengths (S, M): n_m, the number of steps of rollout m from prefix t, prefix
    included. correct (S, M): z_m in {0, 1}, the verifier's verdict on that rollout's end. -> (S,)"""
    t = torch.arange(1, len(step_rewards) + 1, device=lengths.device)[:, None]            # (S, 1)
    if bool((lengths < t).any()):
        raise ValueError("a rollout from prefix t has fewer than t steps")
    return step_rewards + (gamma ** (lengths - t) * correct).mean(1)
# --- end of exercise 5 ---


# --- exercise 6: majority_labels (1 point) ---
def majority_labels(verdicts):
    """Case A: verdicts (S, M) in {0, 1} of a judge on M completed rollouts from each prefix -> (S,) in {0., 1.}: the
    strict majority; a tie is negative (paper, Sec. 4)."""
    return (verdicts.float().mean(1) > 0.5).float()
# --- end of exercise 6 ---


def matching_steps(chosen_ids, rejected_ids, chosen_ends, rejected_ends):
    """Case C: the pairs of step ends (index in chosen, index in rejected) at which two responses are compared: step t
    against step t for t = 1..min(n+, n-), then full against full; pairs with equal prefixes are skipped."""
    pairs = list(zip(chosen_ends, rejected_ends))
    if pairs and pairs[-1] != (chosen_ends[-1], rejected_ends[-1]):
        pairs.append((chosen_ends[-1], rejected_ends[-1]))
    return [(c, r) for c, r in pairs if chosen_ids[:c + 1] != rejected_ids[:r + 1]]


def masked_mean(values, mask):
    """Mean of the values whose mask is set; 0 if there is none."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def mse_loss(scores, targets, mask):
    """mean over masked steps of (p_t - V_t)^2; all arguments (...) of one shape. The output is unbounded."""
    return masked_mean((scores - targets) ** 2, mask)


def bce_loss(scores, targets, mask):
    """mean over masked steps of -[r log sigmoid(p) + (1 - r) log(1 - sigmoid(p))]; scores are logits, targets in [0, 1]."""
    return masked_mean(F.binary_cross_entropy_with_logits(scores, targets, reduction="none"), mask)


# --- exercise 7: bradley_terry_loss (1 point) ---
def bradley_terry_loss(scores_chosen, scores_rejected, mask):
    """mean over masked comparisons of -log sigmoid(P(y+_1:t) - P(y-_1:t))."""
    return masked_mean(-F.logsigmoid(scores_chosen - scores_rejected), mask)
# --- end of exercise 7 ---


def step_loss(outputs, scores, targets, count=None):
    """Labelled steps of all objectives at once. scores, targets (N, P), NaN where a step has no label for an output.
    -> (P,) each output's own loss, MSE if verifiable, else BCE; 0 where it has no label. count (P,): labels of every output
    in the whole batch, if these are only some of its steps: then the parts' results add up to that of the whole."""
    masks = ~targets.isnan()
    share = masks.sum(0) / (masks.sum(0) if count is None else count).clamp(min=1)
    losses = [(mse_loss if name in VERIFIABLE else bce_loss)(scores[:, p], targets[:, p].nan_to_num(), masks[:, p])
              for p, name in enumerate(outputs)]
    return torch.stack(losses) * share


@dataclass
class Labelled:
    """A sequence with PRM labels: at index ends[s] of ids, targets[s] is {output: number}, of objectives and STEP."""
    ids: list
    ends: list
    targets: list
    split: str

    def __len__(self):
        return len(self.ids)


def encode_steps(tokenizer, prompt, steps, boundary, marker=None):
    """Messages and the texts of a response's steps -> (ids, index of the token at which each step is scored), or None if a step
    has no token. A step ends as guided decoding will end it, with a newline where steps are lines, and the last one with
    EOS; a PRM with a marker is read at that, behind every step as it is."""
    if boundary == "newline" and marker is None:
        steps = [s.rstrip("\n") + "\n" for s in steps[:-1]] + steps[-1:]
    ids, ends, encoded = tokenizer.encode_chat(prompt), [], [tokenizer.encode(s) for s in steps]
    for t, step in enumerate(encoded):
        last = [tokenizer.eos_id] if t == len(encoded) - 1 else []
        ids = ids + step + (last if marker is None else [marker])
        ends.append(len(ids) - 1)
    return (ids, ends) if all(encoded) else None


@torch.no_grad()
def score_sequences(prm, output, sequences):
    """[(ids, ends)] -> one output's scores at the ends of each sequence: list of lists."""
    found, p = [None] * len(sequences), prm.outputs.index(output)
    for index in batches_by_length([len(ids) for ids, _ in sequences]):
        ids, _ = pad([sequences[i][0] for i in index], prm.backbone.tokenizer.pad_id, prm.scale.device)
        scores = prm(ids)[..., p].float().cpu()
        for row, i in zip(scores, index):
            found[i] = row[sequences[i][1]].tolist()
    return found


def step_scores(prm, rows):
    """Scores at every labelled step of Labelled rows, and their targets: (N, P), (N, P), NaN where there is none."""
    device = prm.scale.device
    ids, _ = pad([r.ids for r in rows], prm.backbone.tokenizer.pad_id, device)
    at = torch.tensor([(i, e) for i, r in enumerate(rows) for e in r.ends], device=device)
    targets = torch.tensor([[t.get(o, math.nan) for o in prm.outputs] for r in rows for t in r.targets])
    return prm(ids)[at[:, 0], at[:, 1]].float(), targets.to(device)


def pair_scores(prm, pairs):
    """Scores of chosen and rejected at every matching step of pairs, each by its objective's output -> (N,), (N,), and the
    index of that output (N,)."""
    tokenizer, device, n = prm.backbone.tokenizer, prm.scale.device, len(pairs)
    ids, _ = pad([x.prompt + x.chosen for x in pairs] + [x.prompt + x.rejected for x in pairs], tokenizer.pad_id, device)
    scores, at = prm(ids).float(), []
    for i, x in enumerate(pairs):
        p, boundary = prm.outputs.index(x.objective), OBJECTIVES[x.objective].boundary
        matches = matching_steps(x.chosen, x.rejected, tokenizer.step_ends(x.chosen, boundary),
                                 tokenizer.step_ends(x.rejected, boundary))
        at += [(i, len(x.prompt) + c, i + n, len(x.prompt) + r, p) for c, r in matches]
    i, c, j, r, p = torch.tensor(at, dtype=torch.long, device=device).view(-1, 5).unbind(1)
    return scores[i, c, p], scores[j, r, p], p


def save_prm(prm, directory):
    """Write a PRM as a Hugging Face directory: the backbone as a checkpoint of its family, the MLP as score.0 and score.2,
    without STEP."""
    kept = [p for p, name in enumerate(prm.outputs) if name != STEP]
    score = {f"score.{k}": gathered(v)[kept] if k.startswith("2.") else gathered(v) for k, v in prm.score.state_dict().items()}
    save_directory(directory, backbone_tensors(prm.backbone) | score | {"score_scale": prm.scale[kept]}, prm.backbone,
                   prm_outputs=[prm.outputs[p] for p in kept])


RELEASED = ("ForSequenceClassification", "ForTokenClassification", "ForProcessRewardModel")


@torch.no_grad()
def load_prm(directory, dtype=torch.float32):
    """A reward model's directory -> PRM. One written by save_prm, or a released one, whose single output is "reward":
    a classifier (`score.weight`, one or two labels), a Qwen2ForProcessRewardModel (`score.0`, ReLU, `score.2`), or a
    backbone with an MLP of that form in value_head.safetensors; the last two are read at `<extra_0>` behind every step, if
    the tokenizer has that. Of two labels the score is the log-odds of the second. InputError names a missing, unknown or
    wrongly shaped tensor."""
    config, files = read_config(directory), Checkpoint(directory)
    own, kind = config.hf.get("prm_outputs"), str((config.hf.get("architectures") or [""])[0])
    value_head = os.path.join(directory, "value_head.safetensors")
    if os.path.exists(value_head):       # counts more than a classifier's head beside the backbone
        files.unused -= {"score.weight", "score.bias"}
        files.add(value_head, lambda name: "score." + ".".join(name.split(".")[-2:]))
    elif own is None and not kind.endswith(RELEASED):
        raise InputError(f"{directory}: no reward model: config.json names neither prm_outputs nor an architecture that ends "
                         f"in {' or '.join(RELEASED)}, and there is no value_head.safetensors")
    if own is not None and not (isinstance(own, list) and own and set(map(str, own)) <= set(OBJECTIVES)):
        raise InputError(f"{directory}: config.json: prm_outputs {own!r} are not objectives")
    config.objectives = ()
    state = files.backbone(config, dtype)
    names = ["score.0", "score.2"] if "score.0.weight" in files.entries else ["score"]
    n = len(own) if own else min(2, files.entry(f"{names[-1]}.weight")[2][0])             # labels
    layers = []
    for name, width in zip(names, [config.d_model, n][-len(names):]):
        layers.append(nn.Linear(config.d_model, width, bias=f"{name}.bias" in files.entries, dtype=dtype))
        for key, parameter in layers[-1].named_parameters():
            parameter.copy_(files.take([f"{name}.{key}"], [len(parameter)], parameter.shape, dtype))
    if own is None and n == 2:
        last = layers[-1]
        last.weight, last.bias = (None if p is None else nn.Parameter(p[1:] - p[:1]) for p in (last.weight, last.bias))
    prm = PRM(GPT.from_state(config, state, load_tokenizer(directory, config.vocab_size)), own or ["reward"])
    prm.score = nn.Sequential(layers[0], nn.ReLU(), layers[1]) if len(layers) == 2 else layers[0]
    prm.scale = files.take(["score_scale"], [n], (n,), dtype) if own else prm.scale
    files.finish()
    if os.path.exists(value_head) or kind.endswith("ForProcessRewardModel"):
        prm.marker = prm.backbone.tokenizer.specials.get("<extra_0>") if prm.backbone.tokenizer else None
        if prm.marker is None and not os.path.exists(value_head):
            raise InputError(f"{directory}: a {kind} is read at <extra_0>, which its tokenizer lacks")
    return prm


if __name__ == "__main__":
    # A solution of three steps, the second wrong; two rollouts from each prefix, gamma = 0.9.
    r, n = torch.tensor([1., 0., 1.]), torch.tensor([[3, 4], [3, 3], [3, 3]])
    z = torch.tensor([[1., 1.], [0., 1.], [0., 0.]])
    print("V_t =", [round(v, 3) for v in hindsight_targets(r, n, z, 0.9).tolist()], "(1 + (.81 + .729)/2, 0 + .9/2, 1 + 0)")
