"""evaluate.py: what each policy scores on unseen prompts, alone and guided.
Before: decode.py; next: train.py.

    python evaluate.py RUN                measure a finished run again, rewrite its tables
    python evaluate.py RUN --samples 3    every policy's responses to the same prompts, with scores
    python evaluate.py RUN RUN ...        the tables of finished runs side by side; measures nothing

A row of a table is a policy (base, sft, the baselines, mah_dpo, each of its heads alone) and
perhaps a guide. A column is an objective's noise-free score, averaged over test prompts that no
stage has seen, with half its 95 % interval: over the prompts, or over the trainings of a run with
several seeds. All rows see the same prompts and, in tutoring, the same simulated students, and
start from the same random seed: their differences are paired. KL is a policy's distance from SFT,
in nats per token of its own samples; methods should be compared at equal distance.

In this order: a policy and a world converse; a list of values becomes a mean with its interval;
Bench measures one row and lists the rows of a domain; then held-out pairs, tables (results.md),
the picture (pareto.svg), and the files of a run or of several.
"""
import argparse
import itertools
import json
import math
import os
import statistics
import textwrap
import zlib
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (RNG, InputError, batches_by_length, domain_objectives, pad, read_json,
                  read_jsonl, response_mask, run_command, write_json, write_text)
from decode import find_prm, generate, guided_decode, read_run
from interop.answers import majority
from interop.datasets import worlds_of
from interop.parallel import gather, join_processes, local_items
from mah_dpo import dpo_loss, log_ratio_margin, pair_logps, soup
from model import GPT, load_hf, pick_device, sampling_dtype


def seed_of(seed, *what):
    """A seed for one purpose: a function of the run's seed and of the purpose alone, so that one
    more draw in one stage changes nothing in another."""
    return zlib.crc32(repr((seed, *what)).encode())


# -- conversations

class Turn(NamedTuple):
    """One answer of the assistant, and what came before it."""
    before: list       # ids of the conversation so far, as the policy read it
    messages: list     # the same as messages, as the judges read it
    response: list     # ids of the answer


class Conversation:
    """One dialogue under way: messages for the judges, ids for the models. Text never becomes ids
    again; what a policy reads of its own words is what it has sampled."""

    def __init__(self, problem, tokenizer):
        self.problem = problem
        self.messages = problem.messages()
        self.ids = tokenizer.encode_chat(self.messages)    # all that the policy answers to
        self.new_ids = self.ids                            # its end, which no cache holds yet
        self.turns = []
        self.drawn = 0             # tokens sampled so far, those of rejected candidates included

    def answer(self, response, world, tokenizer, rng):
        """Record the assistant's response (ids) and play the user's reply, if there is one."""
        self.turns.append(Turn(self.ids, list(self.messages), response))
        text = tokenizer.decode(response)
        self.messages.append({"role": "assistant", "content": text})
        reply = world.reply(self.problem, self.messages, rng)
        if reply is None:
            return
        self.messages.append({"role": "user", "content": reply})
        # An answer that was cut off lacks the end-of-turn token, which the user's words follow.
        closing = [] if response[-1] == tokenizer.eos_id else [tokenizer.eos_id]
        self.new_ids = closing + tokenizer.encode_turn(reply)
        self.ids = self.ids + response + self.new_ids

    def scores(self, world, tokenizer):
        """{objective: noise-free score}, the mean of the assistant's turns."""
        each = []
        for _, messages, response in self.turns:
            each.append(world.scores(self.problem, messages, tokenizer.decode(response)))
        return {name: statistics.fmean(values) for name, values in columns(each).items()}

    def length(self):
        """Tokens of an answer, the mean of the assistant's turns."""
        return statistics.fmean([len(turn.response) for turn in self.turns])


def columns(rows):
    """A list of {name: value} -> {name: list of values}."""
    found = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


def converse(world, problems, tokenizer, respond, seed):
    """Play all conversations of a world at once; respond(conversations) -> ids of one response to
    each. Every simulated student has a generator of their own: their luck depends on no other."""
    conversations = [Conversation(problem, tokenizer) for problem in problems]
    students = [RNG(seed_of(seed, i)) for i in range(len(problems))]
    for _ in range(world.turns):
        responses = respond(conversations)
        for conversation, response, rng in zip(conversations, responses, students):
            conversation.answer(response, world, tokenizer, rng)
    return conversations


def plain_responder(model, world, weights, temperature, generator, samples=1, progress=None):
    """What converse asks for answers: a policy without a guide. Of several samples the majority's
    answer counts, as in self-consistency (Wang et al. 2022, arXiv 2203.11171)."""
    draw = partial(generate, model, weights=weights, max_new_tokens=world.max_new_tokens,
                   temperature=temperature, generator=generator, samples=samples,
                   progress=progress)
    return partial(plain_answers, draw, model.tokenizer, samples)


def plain_answers(draw, tokenizer, samples, conversations):
    """One answer to each conversation, the majority's of `samples` tries."""
    answers = draw([c.ids for c in conversations])
    chosen = []
    for i, conversation in enumerate(conversations):
        tried = answers[i * samples:(i + 1) * samples]
        texts = [tokenizer.decode(ids) for ids in tried]
        chosen.append(tried[majority(texts) if samples > 1 else 0])
        conversation.drawn += sum(map(len, tried))
    return chosen


def guided_responder(model, prm, world, weights, guide, temperature, generator, K=5,
                     boundary=None, batch=256):
    """What converse asks for answers: a guided policy. boundary: where a step ends, if not where
    the world's steps do; with "turn" a candidate is a whole answer."""
    draw = partial(guided_decode, model, prm, boundary=boundary or world.boundary, K=K,
                   weights=weights, guide=guide, max_new_tokens=world.max_new_tokens,
                   temperature=temperature, generator=generator)
    return partial(guided_answers, draw, {}, world, batch)


def guided_answers(draw, states, world, batch, conversations):
    """One guided answer to each conversation. Both caches go on from turn to turn: `states` keeps
    the state of every batch, by the number of its first conversation."""
    chosen = []
    for start in range(0, len(conversations), batch):
        part = conversations[start:start + batch]
        results = draw([c.new_ids for c in part], state=states.get(start))
        states[start] = results[0].state if world.turns > 1 else None
        for conversation, result in zip(part, results):
            chosen.append(result.ids)
            for step in result.steps:
                conversation.drawn += sum(map(len, step.candidates))
    return chosen


# -- means, intervals, distance from SFT

# Student's t: with so many degrees of freedom (1 to 10) it lies in (-t, t) with probability 0.95.
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def student_t(df):
    """The 95 % quantile t for df degrees of freedom. For many of them the first terms of its
    series in 1 / df around the normal distribution's 1.96 are exact to three decimals."""
    return T95[df - 1] if df <= len(T95) else 1.95996 + 2.3723 / df + 2.8225 / df ** 2


def summary(values):
    """list of numbers -> {"mean", "stderr", "n"}; the standard error of the mean."""
    spread = 0.0
    if len(values) > 1:
        spread = statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "stderr": spread, "n": len(values)}


def half_width(metric):
    """A summary -> half its 95 % interval; of one value nothing is known."""
    if metric["n"] == 1:
        return math.inf
    return student_t(metric["n"] - 1) * metric["stderr"]


LOGITS = 2 ** 28       # at once, a gigabyte in float32: the KL needs five such tensors


def kl_sums(model, head, reference, turns, pad_id):
    """The KL of kl_to_sft, summed over the positions of every turn's response -> (len(turns),)."""
    ids, lengths = pad([before + response for before, _, response in turns], pad_id, head.device)
    starts = torch.tensor([len(before) for before, _, _ in turns], device=head.device)
    mask = response_mask(starts, lengths, ids.shape[1])               # (B, T)
    row, t = mask[:, 1:].nonzero(as_tuple=True)                       # the state at t predicts t + 1
    states = model(ids)[row, t]                                       # (N, d)
    ref_states = reference(ids)[row, t]
    sums = torch.zeros(len(turns), device=head.device)
    size = max(1, LOGITS // len(head))                                # positions at a time
    for r, h, h_ref in zip(row.split(size), states.split(size), ref_states.split(size)):
        log_pi = F.log_softmax(F.linear(h, head).float(), -1)         # (n, V)
        log_ref = F.log_softmax(reference.logits(h_ref).float(), -1)
        kl = (log_pi.exp() * (log_pi - log_ref)).sum(-1)              # (n,)
        sums = sums.index_add(0, r, kl)
    return sums


@torch.no_grad()
def kl_to_sft(model, head, reference, conversations, pad_id):
    """KL(pi || pi_sft) of the next-token distributions (all tokens, temperature 1), in nats: exact
    at every position of the policy's own samples, which are drawn at the run's temperature.

    head (V, d): the policy's folded head. -> two lists with a number for each conversation: its
    mean per token, and its sum over an answer's tokens; both are means over the turns."""
    turns = list(itertools.chain.from_iterable(c.turns for c in conversations))
    lengths = [len(before) + len(response) for before, _, response in turns]
    per_answer = torch.zeros(len(turns), dtype=torch.float64)
    for index in batches_by_length(lengths):
        part = [turns[i] for i in index]
        per_answer[index] = kl_sums(model, head, reference, part, pad_id).double().cpu()
    per_token = per_answer / torch.tensor([len(response) for _, _, response in turns])
    both = torch.stack((per_token, per_answer)).view(2, len(conversations), -1)
    return both.mean(-1).tolist()


# -- rows

def average(models, weights=None):
    """The DPO soup of single-objective policies, uniform if not said otherwise, as a model. Of one
    policy: itself."""
    if len(models) == 1:
        return models[0]
    state = soup([m.state_dict() for m in models], weights or [1.0] * len(models))
    return GPT.from_state(models[0].config, state, models[0].tokenizer).eval()


class Job(NamedTuple):
    """How a row of the tables is made."""
    policy: str
    models: dict                    # {name of a model of the run: its weight}; several: a soup
    weights: tuple = (1.0,)         # mix of heads
    guide: str = None
    temperature: float = None       # None: the run's own
    samples: int = 1                # of which the majority's answer counts
    boundary: str = None            # where guided steps end; None: where the world's do
    sweep: tuple = None             # the two objectives whose weights are swept


class Bench:
    """The models of one run directory: measures one row, lists the rows of a domain."""

    def __init__(self, run, device=None):
        self.run = run
        self.config = read_run(run)
        self.objectives = self.config["objectives"]
        self.seed = self.config["seed"]
        self.device = pick_device(device or self.config["device"])
        self.dtype = sampling_dtype(self.config["dtype"], self.device)
        self.loaded = {}           # (name, device) -> model
        self.guides = {}           # name -> PRM, the last one used
        self.known = {}            # job -> what it has measured
        self.sft = self.model("sft")
        self.tokenizer = self.sft.tokenizer
        limit = self.config["max_new_tokens"]
        self.worlds = worlds_of(self.objectives, self.config["data"], limit, self.sft)

    def model(self, name, device=None):
        """A model of the run, on the run's device if not said otherwise. All stay in memory, but
        of large ones only SFT, for the KL."""
        device = device or self.device
        if (name, device) not in self.loaded:
            sft = self.loaded.get(("sft", self.device))
            if sft and sum(p.numel() for p in sft.parameters()) > 1e9:
                self.loaded = {("sft", self.device): sft}
            model = load_hf(os.path.join(self.run, name), dtype=self.dtype,
                            place=partial(torch.Tensor.to, device=device))
            self.loaded[name, device] = model.eval()
        return self.loaded[name, device]

    def parts(self, job):
        """The models of a row; those of a soup in main memory, where there is room for all."""
        device = None if len(job.models) == 1 else "cpu"
        return [self.model(name, device) for name in job.models]

    def prm(self, guide):
        """The PRM with the output `guide`: that objective's own if there is one, or the unified."""
        own = os.path.isdir(os.path.join(self.run, f"prm_{guide}"))
        name = guide if own else "unified"
        if name not in self.guides:
            prm = find_prm(self.run, name, self.dtype)
            self.guides = {name: prm.to(self.device).eval()}
        return self.guides[name]

    def problems(self, domain, n):
        """The prompts of a domain's tables: of the split that the configuration names."""
        split = self.config["split"]
        return self.worlds[domain].problems(split, n, RNG(seed_of(self.seed, split, domain)))

    def rollout(self, domain, job, problems):
        """-> the conversations of a row's policy about these problems, and the policy's model."""
        world = self.worlds[domain]
        model = average(self.parts(job), list(job.models.values())).to(self.device)
        temperature = job.temperature
        if temperature is None:
            temperature = self.config["temperature"]
        generator = torch.Generator().manual_seed(seed_of(self.seed, "draws", domain))
        if job.guide is None:
            respond = plain_responder(model, world, job.weights, temperature, generator,
                                      job.samples)
        else:
            respond = guided_responder(model, self.prm(job.guide), world, job.weights, job.guide,
                                       temperature, generator, self.config["k"], job.boundary)
        student = seed_of(self.seed, "student", domain)
        return converse(world, problems, self.tokenizer, respond, student), model

    def measure(self, domain, job):
        """-> {metric: list of values, one per prompt}: the noise-free scores, the tokens of an
        answer and those drawn for it, and of a policy's plain samples the KL."""
        problems = self.problems(domain, self.config["n_test"])
        conversations, model = self.rollout(domain, job, problems)
        world = self.worlds[domain]
        each = columns([c.scores(world, self.tokenizer) for c in conversations])
        each["tokens"] = [c.length() for c in conversations]
        each["drawn"] = [c.drawn / len(c.turns) for c in conversations]
        if (job.guide, job.temperature, job.samples) == (None, None, 1):
            each["kl"], each["kl/answer"] = kl_to_sft(
                model, model.fold(job.weights), self.sft, conversations, self.tokenizer.pad_id)
        return each

    def row(self, domain, job):
        """An entry of results.json, and under "each" the values behind its means."""
        heads = self.parts(job)[0].config.objectives
        shares = [w / sum(job.weights) for w in job.weights]
        # A row may stand in the table and in a sweep: what is made alike is made once.
        alike = repr((domain, job._replace(policy="", weights=shares, sweep=None)))
        if alike not in self.known:
            measured = self.measure(domain, job)
            self.known[alike] = {m: [round(v, 4) for v in measured[m]] for m in measured}
        each = self.known[alike]
        weights = dict(zip(heads, shares))
        if job.policy == "soup":
            weights = {name.removeprefix("dpo_"): w for name, w in job.models.items()}
        row = {"policy": job.policy, "weights": weights, "guide": job.guide, "domain": domain,
               "seed": self.seed, "metrics": {m: summary(each[m]) for m in each}, "each": each}
        return row | ({"sweep": list(job.sweep)} if job.sweep else {})

    def mix(self, weights):
        """{objective: weight} -> the weights of all heads of MAH-DPO."""
        heads = self.model("mah_dpo").config.objectives
        return tuple(weights.get(head, 0.0) for head in heads)

    def unguided(self, job, verified):
        """A policy sampled, at temperature 0, and by majority vote where answers are verified."""
        jobs = [job, job._replace(policy=f"{job.policy}_greedy", temperature=0.0)]
        if verified:
            jobs.append(job._replace(policy=f"{job.policy}_vote", samples=self.config["k"]))
        return jobs

    def guided(self, job, names, verified):
        """A policy under every guide; then whole answers reranked, the usual best-of-K."""
        unified = ["unified"] if self.config["prm"] == "unified" else []
        jobs = [job._replace(guide=guide) for guide in [*names, *unified]]
        rerank = job._replace(policy=f"{job.policy}_rerank", boundary="turn")
        return jobs + [rerank._replace(guide=name) for name in verified]

    def jobs(self, domain):
        """All rows of a domain's table, in its order."""
        objectives = domain_objectives(domain, self.objectives)
        names = [o.name for o in objectives]
        verified = [o.name for o in objectives if o.case == "verifiable"]
        sft = Job("sft", {"sft": 1.0})
        mah_dpo = Job("mah_dpo", {"mah_dpo": 1.0}, self.mix(dict.fromkeys(names, 1.0)))
        jobs = [Job("base", {"base": 1.0}), *self.unguided(sft, verified)]
        jobs += [Job(name, {name: 1.0}) for name in ("single_head_dpo", "modpo")]
        jobs.append(Job("soup", {f"dpo_{name}": 1 / len(names) for name in names}))
        jobs += self.unguided(mah_dpo, verified)
        for name in names:
            alone = self.mix({name: 1.0})
            jobs.append(mah_dpo._replace(policy=f"mah_dpo:{name}", weights=alone))
        return jobs + self.guided(sft, names, verified) + self.guided(mah_dpo, names, verified)

    def sweep(self, domain):
        """Mixes of every two of the domain's heads, from one to the other, and soups alike."""
        scored = self.worlds[domain].objectives
        names = [o.name for o in domain_objectives(domain, self.objectives) if o.name in scored]
        steps = self.config["weight_steps"]
        jobs = []
        for pair in itertools.combinations(names, 2) if steps else ():
            for i in range(steps + 1):
                weights = {pair[0]: (steps - i) / steps, pair[1]: i / steps}
                policies = {f"dpo_{name}": w for name, w in weights.items() if w > 0}
                jobs.append(Job("mah_dpo", {"mah_dpo": 1.0}, self.mix(weights), sweep=pair))
                jobs.append(Job("soup", policies, sweep=pair))
        return jobs


# -- preference pairs held out from training

def head_of(heads, objective):
    """Which head scores an objective's pairs: its own, or else the first."""
    return heads.index(objective) if objective in heads else 0


def own_logps(model, pairs, progress=None):
    """Log-probabilities (N, 2) as by pair_logps, each pair under its objective's own head."""
    own = partial(head_of, model.config.objectives)
    return pair_logps(model, pairs, own, model.tokenizer.pad_id, progress)


def pair_metrics_rows(policy, logps, reference, pairs, beta, seed):
    """Held-out metrics of one policy, a row per objective. loss, margin and reward_accuracy compare
    with the reference; logp_accuracy asks whether the policy itself finds chosen likelier."""
    chosen, rejected = logps.T                                        # (N,) each
    delta = log_ratio_margin(chosen, rejected, *reference.T)
    loss = dpo_loss(chosen, rejected, *reference.T, beta)
    rows = []
    for name in dict.fromkeys(p.objective for p in pairs):
        i = [k for k, p in enumerate(pairs) if p.objective == name]
        metrics = {"loss": summary(loss[i].tolist()),
                   "margin": summary((beta * delta[i]).tolist()),
                   "logp_accuracy": summary((chosen > rejected)[i].float().tolist())}
        if bool(delta[i].any()):              # the reference itself has no margin to be right about
            metrics["reward_accuracy"] = summary((delta[i] > 0).float().tolist())
        rows.append({"policy": policy, "weights": {name: 1.0}, "guide": None,
                     "domain": f"pairs:{name}", "seed": seed, "metrics": metrics})
    return rows


# -- tables

COSTS = ["tokens", "drawn", "kl", "kl/answer"]           # columns beside the objectives


def row_name(policy, guide):
    """How a row is called: policy, or policy + guide."""
    return f"{policy} + {guide}" if guide else policy


def cell(metric):
    """mean ± half the 95 % interval, or a dash where a row has no such metric."""
    if metric is None:
        return "-"
    interval = f" ±{half_width(metric):.3f}" if metric["n"] > 1 else ""
    return f"{metric['mean']:.3f}{interval}"


def cells(row, metrics):
    """The cells of a row of results: {column: text}."""
    shown = {"policy": row["policy"], "guide": row["guide"] or "-"}
    return shown | {name: cell(row["metrics"].get(name)) for name in metrics}


def table(title, lines):
    """Lines, {column: text} each, as an aligned Markdown table under a title."""
    grid = [list(lines[0]), *(list(line.values()) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*grid)]
    grid.insert(1, ["-" * width for width in widths])
    drawn = []
    for texts in grid:
        padded = [text.ljust(width) for text, width in zip(texts, widths)]
        drawn.append(f"| {' | '.join(padded)} |")
    return "\n".join([f"### {title}", "", *drawn, ""])


# --- exercise 15: hypervolume (3 points) ---
def hypervolume(points, reference=(0.0, 0.0)):
    """The area that a front covers: of all that is better than the reference in both coordinates,
    what lies below and to the left of some point. points: (x, y) of each policy, both to be large;
    one that is worse than the reference in a coordinate covers nothing. -> a number"""
    area, height = 0.0, reference[1]
    # From right to left every point adds the strip by which it is higher than all before it.
    for x, y in sorted(points, reverse=True):
        area += max(0.0, x - reference[0]) * max(0.0, y - height)
        height = max(height, y)
    return area
# --- end of exercise 15 ---


def by_training(row, name):
    """A row's scores: one per training of a run with several seeds, or the only one's."""
    if isinstance(row["seed"], list):
        return row["each"][name]
    return [row["metrics"][name]["mean"]]


def front_area(rows, pair):
    """The hypervolume of rows' scores for a pair of objectives; the reference is (0, 0), the worst
    score. Its interval is over trainings: of a single one nothing is known."""
    x = [by_training(row, pair[0]) for row in rows]
    y = [by_training(row, pair[1]) for row in rows]
    areas = [hypervolume(zip(*front)) for front in zip(zip(*x), zip(*y))]
    return summary(areas)


def area_lines(plain, mixes, pair):
    """A line for each method: its number of points and the area below them. plain: the rows of a
    domain's table; mixes: those of the sweep of this pair."""
    fronts = {}
    for policy in ("sft", "single_head_dpo", "modpo"):
        fronts[policy] = [r for r in plain if r["policy"] == policy and r["guide"] is None]
    for policy in ("mah_dpo", "soup"):
        fronts[f"{policy}, swept"] = [r for r in mixes if r["policy"] == policy]
    for policy in ("sft", "mah_dpo"):             # a method has one point or many: the table tells
        fronts[f"{policy}, guided"] = [r for r in plain if r["policy"] == policy]
    lines = []
    for method, rows in fronts.items():
        lines.append({"objectives": " and ".join(pair), "method": method, "points": str(len(rows)),
                      "hypervolume": cell(front_area(rows, pair))})
    return lines


def sweep_table(domain, pair, mixes, names):
    """The scores of a sweep of two weights."""
    lines = []
    for row in sorted(mixes, key=lambda r: r["policy"]):
        weights = {f"w {name}": f"{row['weights'].get(name, 0):.1f}" for name in pair}
        shown = cells(row, [*names, "kl", "kl/answer"])
        del shown["guide"]
        lines.append({"policy": shown["policy"]} | weights | shown)
    return table(f"{domain}, a sweep of weights", lines)


def pairs_table(rows):
    """The rows of held-out pairs."""
    lines = []
    for row in rows:
        name = row["domain"].removeprefix("pairs:")
        shown = cells(row, ["loss", "margin", "reward_accuracy", "logp_accuracy"])
        del shown["guide"]
        lines.append({"held-out pairs": f"{name} ({row['n']})"} | shown)
    return table("preference pairs held out from training", lines)


def opening(config):
    """What all tables of a run have in common, in a sentence or two."""
    seeds = [str(config["seed"] + i) for i in range(config["seeds"])]
    names = ", ".join(o.name for o in config["objectives"])
    trainings = f"Seed {seeds[0]}"
    if len(seeds) > 1:
        trainings = f"{len(seeds)} trainings, seeds {', '.join(seeds)}"
    over = "trainings" if len(seeds) > 1 else "prompts"
    return (f"Objectives: {names}. {trainings}. Sampling temperature {config['temperature']}, "
            f"beta {config['beta']}, {config['k']} candidates. "
            f"Mean ± half the 95 % interval over {over}.\n")


def report(rows, config):
    """All tables as Markdown: (what is printed, the sweeps, which only results.md has)."""
    parts, details = [opening(config)], []
    held_out = [r for r in rows if r["domain"].startswith("pairs:")]
    for domain in dict.fromkeys(r["domain"] for r in rows if r not in held_out):
        plain = [r for r in rows if r["domain"] == domain and "sweep" not in r]
        swept = [r for r in rows if r["domain"] == domain and "sweep" in r]
        names = [o.name for o in domain_objectives(domain, config["objectives"])]
        title = f"{domain}, {plain[0]['n']} {config['split']} prompts"
        parts.append(table(title, [cells(r, [*names, *COSTS]) for r in plain]))
        areas = []
        for pair in dict.fromkeys(tuple(r["sweep"]) for r in swept):
            mixes = [r for r in swept if tuple(r["sweep"]) == pair]
            details.append(sweep_table(domain, pair, mixes, names))
            areas += area_lines(plain, mixes, pair)
        if areas:
            parts.append(table(f"{domain}, the area below each method's front", areas))
    if held_out:
        parts.append(pairs_table(held_out))
    return "\n".join(parts), "\n".join(details)


def side_by_side(runs):
    """The tables of finished runs as one: every row once for each run, or once for all of them
    where all have the same figures -> Markdown."""
    domains, found = {}, {}
    for run in runs:
        for objective in read_run(run)["objectives"]:
            domains.setdefault(objective.domain, {})[objective.name] = True
        for row in load_rows(run):
            if row["domain"] in domains and "sweep" not in row:
                key = row["domain"], row["policy"], row["guide"]
                found.setdefault(key, {})[run] = row
    parts = []
    for domain, names in domains.items():
        lines = []
        for same in (rows for key, rows in found.items() if key[0] == domain):
            shown = {run: cells(row, [*names, *COSTS]) for run, row in same.items()}
            if len(shown) == len(runs) and all(s == shown[runs[0]] for s in shown.values()):
                shown = {"all": shown[runs[0]]}
            lines += [{"run": run} | line for run, line in shown.items()]
        if lines:
            parts.append(table(f"{domain}, by run", lines))
    return "\n".join(parts)


# -- the picture

# A method's colour is readable on a light page and on a dark one. A ring is a guided policy.
COLOURS = {"base": "#888", "sft": "#c70", "single_head_dpo": "#095", "modpo": "#b5b",
           "soup": "#47d", "mah_dpo": "#d33"}
STYLE = ("svg{background:#fff}text{font:12px sans-serif;fill:#222}path{stroke:#888;fill:none}"
         "polyline{fill:none;stroke-width:1.5}circle{stroke-width:1.5}.ring{fill:none}"
         "@media(prefers-color-scheme:dark){svg{background:#111}text{fill:#ddd}}")
WIDE, HIGH = 420, 380                                       # a panel
LEFT, TOP, RIGHT, BOTTOM = 60, 20, 400, 330                 # the plot in it


class Axis(NamedTuple):
    """Scores from low to high on a line of pixels from start to end."""
    low: float
    high: float
    start: int
    end: int

    def at(self, score):
        """The pixel of a score."""
        share = (score - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self):
        """The tenths between low and high."""
        return [t / 10 for t in range(round(10 * self.low), round(10 * self.high) + 1)]


def axis(scores, start, end):
    """The Axis that holds all these scores: whole tenths, at least one."""
    low = math.floor(10 * min(scores))
    high = max(low + 1, math.ceil(10 * max(scores)))
    return Axis(low / 10, high / 10, start, end)


def text_at(x, y, text, anchor="start"):
    """A text of the picture."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def dot(x, y, colour, kind, title):
    """A point of the picture; its title shows under the mouse."""
    return (f'<circle cx="{x}" cy="{y}" r="4" style="stroke:{colour}" fill="{colour}"{kind}>'
            f'<title>{title}</title></circle>')


def frame(x_axis, y_axis, pair):
    """The axes of a panel, with their numbers and the objectives' names."""
    out = [f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>']
    out += [text_at(x_axis.at(v), BOTTOM + 16, v, "middle") for v in x_axis.ticks()]
    out += [text_at(LEFT - 6, y_axis.at(v) + 4, v, "end") for v in y_axis.ticks()]
    out.append(text_at((LEFT + RIGHT) / 2, BOTTOM + 36, pair[0], "middle"))
    turned = text_at(0, 0, pair[1], "middle")
    out.append(f'<g transform="translate(16 {(TOP + BOTTOM) / 2}) rotate(-90)">{turned}</g>')
    return out


def panel(rows, pair):
    """One pair of objectives: sweeps as lines, every other row as a point."""
    xs = [row["metrics"][pair[0]]["mean"] for row in rows]
    ys = [row["metrics"][pair[1]]["mean"] for row in rows]
    x_axis, y_axis = axis(xs, LEFT, RIGHT), axis(ys, BOTTOM, TOP)
    out, lines = frame(x_axis, y_axis, pair), {}
    for row, x, y in zip(rows, xs, ys):
        place = x_axis.at(x), y_axis.at(y)
        if "sweep" in row:
            lines.setdefault(row["policy"], []).append("{},{}".format(*place))
            continue
        method = next(m for m in COLOURS if row["policy"].startswith(m))
        title = f"{row_name(row['policy'], row['guide'])}: {x:.3f}, {y:.3f}"
        out.append(dot(*place, COLOURS[method], ' class="ring"' if row["guide"] else "", title))
    for policy, points in lines.items():
        out.append(f'<polyline points="{" ".join(points)}" stroke="{COLOURS[policy]}"/>')
    return out


def pareto_svg(rows):
    """A panel for every swept pair of objectives, two in a row, below a legend."""
    pairs = list(dict.fromkeys((r["domain"], *r["sweep"]) for r in rows if "sweep" in r))
    out = []
    for i, (method, colour) in enumerate(COLOURS.items()):
        out += [dot(20 + 80 * i, 20, colour, "", method), text_at(28 + 80 * i, 24, method)]
    out.append(text_at(560, 24, "ring: guided; line: weights swept"))
    for i, (domain, *pair) in enumerate(pairs):
        shown = [r for r in rows if r["domain"] == domain and r.get("sweep", pair) == pair]
        corner = f"translate({WIDE * (i % 2)} {40 + HIGH * (i // 2)})"
        out += [f'<g transform="{corner}">', *panel(shown, pair), "</g>"]
    height = 40 + HIGH * math.ceil(len(pairs) / 2)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDE} {height}">'
    return f"{head}<style>{STYLE}</style>{''.join(out)}</svg>\n"


# -- the files of a run

def evaluate(run, pair_rows, device=None):
    """Measure every row of a run of one seed, then publish. pair_rows: the rows of held-out pairs;
    device: if not the run's own."""
    bench = Bench(run, device)
    jobs = []
    for listed in (bench.jobs, bench.sweep):
        for domain in bench.worlds:
            jobs += [(domain, job) for job in listed(domain)]
    measured = []                              # several processes share the rows
    for i in tqdm(local_items(range(len(jobs))), desc="tables", unit="row", disable=None):
        measured.append((i, bench.row(*jobs[i])))
    measured = dict(gather(measured))
    rows = [measured[i] for i in range(len(jobs))]
    # What the means are made of, prompt by prompt: paired comparisons need it.
    lines = []
    for row in rows:
        line = {key: row[key] for key in ("domain", "policy", "guide", "weights", "each")}
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    write_text(os.path.join(run, "scores.jsonl"), "".join(lines))
    publish(run, rows + pair_rows)


def publish(run, rows):
    """Print the tables of these rows; write results.md, pareto.svg and, last, results.json, which
    says that a run is finished."""
    for row in rows:
        first = next(iter(row["metrics"].values()))
        row.setdefault("n", first["n"])
    text, details = report(rows, read_run(run))
    write_text(os.path.join(run, "results.md"), f"{text}\n{details}")
    write_text(os.path.join(run, "pareto.svg"), pareto_svg(rows))
    kept = [{k: row[k] for k in row if k not in ("n", "each")} for row in rows]
    write_json(os.path.join(run, "results.json"), kept)
    print(f"\n{text}\nThe sweeps of weights: {os.path.join(run, 'results.md')}")


def seed_runs(run):
    """The directories of a run's trainings, one per seed; the run itself if it has one seed."""
    config = read_run(run)
    if config["seeds"] == 1:
        return [run]
    seeds = range(config["seed"], config["seed"] + config["seeds"])
    return [os.path.join(run, f"seed={seed}") for seed in seeds]


def load_rows(run):
    """The rows of a finished run as `publish` takes them. "each" holds the values that intervals
    are made of: one per prompt, or with several seeds one per training."""
    results = [read_json(os.path.join(path, "results.json")) for path in seed_runs(run)]
    if len(results) > 1:
        return over_trainings(results)
    rows = results[0]
    for row, (_, line) in zip(rows, read_jsonl(os.path.join(run, "scores.jsonl"))):
        row["each"] = line["each"]             # held-out pairs, the last rows, have none
    return rows


def over_trainings(results):
    """Lists of rows, one list per training -> the rows that all of them have, averaged. Rows are
    matched by what they are: held-out pairs come in the order of a training's samples."""
    found = {}
    for row in itertools.chain.from_iterable(results):
        key = [row.get(k) for k in ("policy", "guide", "domain", "weights", "sweep")]
        found.setdefault(repr(key), []).append(row)
    rows = []
    for same in found.values():
        if len(same) < len(results):
            continue
        metrics = columns([row["metrics"] for row in same])           # {name: list of summaries}
        each = {}
        for name, summaries in metrics.items():
            if len(summaries) == len(same):
                each[name] = [s["mean"] for s in summaries]
        n_prompts = [next(iter(row["metrics"].values()))["n"] for row in same]
        rows.append(same[0] | {"seed": [row["seed"] for row in same], "each": each,
                               "metrics": {name: summary(each[name]) for name in each},
                               "n": round(statistics.fmean(n_prompts))})
    return rows


# -- responses to read

def fold(text, margin):
    """Print a text in 100 columns, every line behind a margin."""
    for line in text.splitlines():
        print(textwrap.fill(line, 100, initial_indent=margin, subsequent_indent=margin))


def show_conversation(conversation, tokenizer):
    """Print a policy's answers and the user's replies between them."""
    for number, turn in enumerate(conversation.turns):
        if number:
            fold(turn.messages[-1]["content"], "  > ")
        whole = turn.response[-1] == tokenizer.eos_id
        fold(tokenizer.decode(turn.response) + ("" if whole else " [cut off]"), "    ")


def show_samples(run, n, device=None):
    """Print the responses of every row's policy to the same n prompts of each domain, with their
    noise-free scores; > marks the user's words. Of several seeds the first training answers."""
    bench = Bench(seed_runs(run)[0], device)
    for domain, world in bench.worlds.items():
        problems, jobs, played = bench.problems(domain, n), bench.jobs(domain), []
        for job in tqdm(jobs, desc=domain, unit="policy", disable=None):
            played.append(bench.rollout(domain, job, problems)[0])
        for i, problem in enumerate(problems):
            print(f"=== {domain}, {bench.config['split']} prompt {i + 1}")
            for message in problem.messages():
                fold(message["content"], "> ")
            for job, conversations in zip(jobs, played):
                scores = conversations[i].scores(world, bench.tokenizer)
                shown = "".join(f"  {name} {score:.2f}" for name, score in scores.items())
                print(f"\n{row_name(job.policy, job.guide):<38}{shown}")
                show_conversation(conversations[i], bench.tokenizer)
            print()


def measure_again(run, device):
    """Every row of a finished run, of each of its trainings; held-out pairs stay as they are."""
    trainings = seed_runs(run)
    for path in trainings:
        rows = read_json(os.path.join(path, "results.json"))
        evaluate(path, [r for r in rows if r["domain"].startswith("pairs:")], device)
    if trainings != [run]:
        publish(run, load_rows(run))


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="a finished run of train.py; several are put side by side")
    parser.add_argument("--device", help="auto, cpu, cuda or mps (default: the run's own)")
    parser.add_argument("--samples", type=int, metavar="N",
                        help="print every policy's responses to N prompts of each domain")
    args = parser.parse_args(argv)
    join_processes()
    for run in args.runs:
        if not os.path.isfile(os.path.join(run, "results.json")):
            raise InputError(f"{run}: not a finished run (no results.json); finish it with "
                             f"train.py --resume {run}")
    if len(args.runs) > 1 and args.samples is not None:
        raise InputError("--samples shows the responses of one run; give one")
    if args.samples is not None:
        show_samples(args.runs[0], args.samples, args.device)
    elif len(args.runs) > 1:
        print(side_by_side(args.runs))
    else:
        measure_again(args.runs[0], args.device)


if __name__ == "__main__":
    run_command(main)
