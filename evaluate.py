"""evaluate.py: what each policy scores on unseen prompts, alone and guided.
Before: decode.py; next: train.py.

    python evaluate.py RUN                measure a finished run again, rewrite its tables
    python evaluate.py RUN RUN ...        the tables of finished runs side by side; measures nothing

A row of a table is a policy (base, sft, the baselines, mah_dpo, each of its heads alone) and
perhaps a guide. A column is an objective's noise-free score, averaged over test prompts that no
stage has seen, with half its 95 % interval: over the prompts, or over the trainings of a run with
several seeds. All rows see the same prompts and, in tutoring, the same simulated students, and
start from the same random seed: their differences are paired. kl is a policy's distance from SFT,
in nats per token of its own samples, both at the temperature of these; methods should be compared
at equal distance. results.json has the distance at temperature 1 besides.

In this order: a policy and a world converse; a list of values becomes a mean with its interval;
Bench lists the rows of a domain and measures one; then held-out pairs, tables (results.md), the
picture (pareto.svg), and the files of a run or of several.
"""
import argparse
import itertools
import json
import math
import os
import statistics
import zlib
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (PROMPTS, RNG, InputError, Problem, batches_by_length, domain_objectives, pad,
                  read_json, read_jsonl, response_mask, run_command, write_json, write_text)
from decode import find_model, generate, guided_decode, next_turn, read_run
from interop.answers import majority
from interop.manifest import check_files, forget_files, note_files
from interop.real_data import worlds_of
from interop.parallel import gather, in_threads, join_processes, local_items
from interop.resume import check_key
from mah_dpo import dpo_loss, log_ratio_margin, soup
from model import GPT, load_hf, pick_device, sampling_dtype
from prm import load_prm


def seed_of(seed, *what):
    """A seed for one purpose: a function of the run's seed and of the purpose alone, so that one
    more draw in one stage changes nothing in another."""
    return zlib.crc32(repr((seed, *what)).encode())


# -- conversations

class Turn(NamedTuple):
    """One answer of the assistant, and what came before it."""
    problem: Problem
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
        self.turns.append(Turn(self.problem, self.ids, list(self.messages), response))
        # The user and the judges read text.
        said = {"role": "assistant", "content": tokenizer.decode(response)}
        self.messages.append(said)
        reply = world.reply(self.problem, self.messages, rng)
        if reply is not None:
            self.messages.append({"role": "user", "content": reply})
            # The policy reads ids. They only grow: a carried cache stays true.
            self.new_ids = next_turn(tokenizer, response, reply)
            self.ids = self.ids + response + self.new_ids

    def scores(self, world, tokenizer):
        """{objective: noise-free score}, the mean of the assistant's turns."""
        each = []
        for turn in self.turns:
            text = tokenizer.decode(turn.response)
            each.append(world.scores(self.problem, turn.messages, text))
        return {name: statistics.fmean(values) for name, values in columns(each).items()}


def columns(rows):
    """A list of {name: value} -> {name: list of values}."""
    found = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


def converse(world, problems, tokenizer, respond, seed):
    """Play all conversations of a world at once; respond(conversations) -> ids of one response to
    each."""
    conversations = [Conversation(problem, tokenizer) for problem in problems]
    # Who a student is depends on the prompt's number alone, not on what other students draw.
    students = [RNG(seed_of(seed, i)) for i in range(len(problems))]
    for _ in range(world.turns):
        responses = respond(conversations)
        for conversation, response, rng in zip(conversations, responses, students):
            conversation.answer(response, world, tokenizer, rng)
    return conversations


def plain_responder(model, world, weights, temperature, generator, samples=1, progress=None):
    """What converse asks for answers: a policy without a guide. Of several samples the majority's
    answer counts, as in self-consistency (Wang et al. 2022, arXiv 2203.11171)."""
    def respond(conversations):
        answers = generate(model, [c.ids for c in conversations], weights=weights, samples=samples,
                           max_new_tokens=world.max_new_tokens, temperature=temperature,
                           generator=generator, progress=progress)
        chosen = []
        # The samples of a prompt stand together.
        for i, conversation in enumerate(conversations):
            tried = answers[i * samples:(i + 1) * samples]
            conversation.drawn += sum(map(len, tried))
            best = 0
            if samples > 1:
                best = majority([model.tokenizer.decode(ids) for ids in tried])
            chosen.append(tried[best])
        return chosen
    return respond


def guided_responder(model, prm, world, boundary=None, batch=64, **options):
    """What converse asks for answers: a guided policy. boundary: where a step ends, if not where
    the world's steps do; with "turn" a candidate is a whole answer. options: of guided_decode."""
    # Both caches go on from turn to turn: the state of every batch, by its first conversation.
    states = {}

    def respond(conversations):
        results = []
        for start in range(0, len(conversations), batch):
            new = [c.new_ids for c in conversations[start:start + batch]]
            results += guided_decode(model, prm, new, boundary=boundary or world.boundary,
                                     max_new_tokens=world.max_new_tokens,
                                     state=states.get(start), **options)
            # A batch's results share one state. Without a next turn it need not stay in memory.
            states[start] = results[-1].state if world.turns > 1 else None
        for conversation, result in zip(conversations, results):
            for step in result.steps:
                conversation.drawn += sum(map(len, step.candidates))
        return [result.ids for result in results]
    return respond


# -- means, intervals, distance from SFT

# Student's t with 1 to 10 degrees of freedom lies in (-t, t) with probability 0.95.
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def student_t(df):
    """The t of a 95 % interval for df degrees of freedom. For many of them it is a series in 1 / df
    around the normal distribution's 1.96 (Cornish and Fisher); three terms give four digits."""
    if df <= len(T95):
        return T95[df - 1]
    return 1.95996 + 2.3723 / df + 2.8225 / df ** 2 + 2.5558 / df ** 3


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


# So many logits are made at once, a gigabyte in float32; the KL needs seven tensors of that size.
LOGITS = 2 ** 28


KL_AT_1 = "kl at temperature 1"     # in results.json only: the tables have that of what is sampled


@torch.no_grad()
def kl_to_sft(model, head, reference, conversations, temperature):
    """KL(pi || pi_sft) of the next-token distributions in nats: exact at every position of the
    policy's own samples. temperature: theirs, at which both policies are compared; that only the
    likeliest tokens are ever drawn is left out.

    head (V, d): the policy's folded head. -> {metric: a number for each conversation}: kl, per
    token; kl/answer, per answer; KL_AT_1, per token at temperature 1. All are means over turns."""
    device = head.device
    # A turn is read as the policy read it: all that came before, then its answer.
    turns = list(itertools.chain.from_iterable(c.turns for c in conversations))
    texts = [turn.before + turn.response for turn in turns]
    starts = torch.tensor([len(turn.before) for turn in turns], device=device)
    sums = torch.zeros(2, len(turns), dtype=torch.float64)
    # Few enough tokens at a time for their logits over a large vocabulary.
    size = min(4096, LOGITS // len(head))
    for index in batches_by_length([len(text) for text in texts], size):
        ids, lengths = pad([texts[i] for i in index], reference.tokenizer.pad_id, device)  # (B, T)
        mask = response_mask(starts[index], lengths, ids.shape[1])        # (B, T)
        # Only states that predict a response token count: that at t predicts the token at t + 1.
        row, t = mask[:, 1:].nonzero(as_tuple=True)                       # (N,) each
        h = model(ids)[row, t]                                            # (N, d)
        h_ref = reference(ids)[row, t]
        logits = F.linear(h, head).float()                                # (N, V)
        others = reference.logits(h_ref).float()
        for i, T in enumerate((temperature, 1.0)):
            # Both distributions over the whole vocabulary, so the sum over it is exact.
            log_pi = F.log_softmax(logits / T, -1)                        # (N, V)
            log_ref = F.log_softmax(others / T, -1)
            kl = (log_pi.exp() * (log_pi - log_ref)).sum(-1)              # (N,)
            # Every turn's tokens are added up.
            found = torch.zeros(len(index), device=device).index_add(0, row, kl)
            sums[i, index] = found.double().cpu()
    n_tokens = torch.tensor([len(turn.response) for turn in turns])
    per_token, per_token_at_1 = sums / n_tokens                           # (turns of all,) each
    # Every conversation has equally many turns, one after the other.
    values = torch.stack((per_token, sums[0], per_token_at_1)).view(3, len(conversations), -1)
    return dict(zip(("kl", "kl/answer", KL_AT_1), values.mean(-1).tolist()))


# -- rows

def average(models, weights=None):
    """The DPO soup of single-objective policies, uniform if not said otherwise, as a model. Of one
    policy: itself."""
    if len(models) == 1:
        return models[0]
    # As a state first, which then becomes a model of the same configuration.
    state = soup([m.state_dict() for m in models], weights or [1.0] * len(models))
    return GPT.from_state(models[0].config, state, models[0].tokenizer).eval()


class Together:
    """MOD (arXiv 2406.18853): policies of one shape, with one head each, that decode together by
    the mix of their log-probabilities: pi ~ prod_i pi_i^w_i = softmax(sum_i w_i W_i h_i).

    That is one product again, of all hidden states one behind the other with all heads w_i W_i
    side by side: to what decodes it is a model with a wide h. Of heads of one backbone it is
    GPT.fold."""

    def __init__(self, models):
        self.models, self.tokenizer, self.embed = models, models[0].tokenizer, models[0].embed
        # One cache has the layers of all.
        layers = list(itertools.chain.from_iterable(model.layers for model in models))
        self.config = replace(models[0].config, n_layer=len(layers))
        for i, layer in enumerate(layers):
            layer.attn.layer = i

    new_cache = GPT.new_cache

    def __call__(self, ids, cache=None, rows=None):
        """ids (B, T) -> h (B, T, n d), the hidden states of n models; as GPT.forward."""
        own, each = cache and cache.own, []
        for model in self.models:
            # All of them read the same tokens at the same places.
            if cache:
                cache.own = own
            each.append(model(ids, cache, rows))
        return torch.cat(each, -1)

    def fold(self, weights):
        """n numbers -> one head (V, n d)."""
        heads = [w * model.heads[0].weight for w, model in zip(weights, self.models)]
        return torch.cat(heads, 1)


SINGLE = ("base", "sft", "single_head_dpo", "modpo")           # policies with a single head


class Job(NamedTuple):
    """How a row of the tables is made."""
    domain: str
    policy: str                     # the row's name: mah_dpo_greedy is another policy than mah_dpo,
    model: str                      # of the same model, a directory; "soup" and "mod" have none
    weights: dict                   # {head: its share}, of these {objective: its policy's share}
    guide: str = None
    temperature: float = None       # None: the run's own
    samples: int = 1                # of which the majority's answer counts
    boundary: str = None            # where guided steps end; None: where the world's do
    sweep: tuple = None             # the two objectives whose weights are swept


class Bench:
    """The models of one run directory: lists the rows of its tables and measures them."""

    def __init__(self, run, device=None):
        self.run = run
        self.config = read_run(run)
        self.objectives = self.config["objectives"]
        self.seed = self.config["seed"]
        self.device = pick_device(device or self.config["device"])
        self.dtype = sampling_dtype(self.config["dtype"], self.device)
        # Of large models only one is in memory, and rows are measured one after another.
        self.alone = bool(self.config["init"]) or self.device != "cpu"
        # SFT stays, for the KL; beside it only the last model and the last PRM are in memory: these
        # functions remember what they loaded last.
        self.sft = self.load("sft")
        self.model, self.load_prm = lru_cache(1)(self.load), lru_cache(1)(load_prm)
        self.tokenizer = self.sft.tokenizer
        self.known = {}             # what has been measured, by job
        # Real questions are taken where they and their answers fit SFT's context.
        limit = self.config["max_new_tokens"]
        self.worlds = worlds_of(self.objectives, self.config["data"], limit, self.sft)
        # All rows meet the same prompts, which are drawn once.
        self.problems = lru_cache(self.draw_problems)

    def load(self, name, device=None):
        """A model of the run, on the run's device if not said otherwise."""
        # Every tensor goes there as it is read: beside it main memory holds no second copy.
        place = partial(torch.Tensor.to, device=device or self.device)
        return load_hf(f"{self.run}/{name}", dtype=self.dtype, place=place).eval()

    def prm(self, guide):
        """The PRM with the output `guide`: its own, or the one that all objectives share."""
        path = find_model(self.run, f"prm_{guide}", "prm")
        return self.load_prm(path, self.dtype).to(self.device).eval()

    # -- the rows

    def mix(self, weights):
        """{objective: share} -> the shares of all heads of MAH-DPO, of others 0."""
        return {o.name: weights.get(o.name, 0.0) for o in self.objectives}

    def jobs(self, domain):
        """All rows of a domain's table, in its order: first what training alone has bought, then
        guidance, of SFT alone and of MAH-DPO."""
        objectives = domain_objectives(domain, self.objectives)
        names = [o.name for o in objectives]
        verified = [o.name for o in objectives if o.case == "verifiable"]
        guides = [*names, "unified"] if self.config["prm"] == "unified" else names
        # Uniform over the domain: of policies for the soup, of heads for the ensemble.
        uniform = dict.fromkeys(names, 1 / len(names))
        # A single head has the name "policy".
        policies = [Job(domain, name, name, {"policy": 1.0}) for name in SINGLE]
        policies.append(Job(domain, "soup", "soup", uniform))
        # Policies that decode together are in memory together: for large ones there is no room.
        if not self.config["init"]:
            policies.append(Job(domain, "mod", "mod", uniform))
        policies.append(Job(domain, "mah_dpo", "mah_dpo", self.mix(uniform)))
        for name in names:
            policies.append(Job(domain, f"mah_dpo:{name}", "mah_dpo", self.mix({name: 1.0})))
        alone, guided = [], []
        for job in policies:
            alone.append(job)
            if job.policy not in ("sft", "mah_dpo"):
                continue
            # No luck at all: the likeliest token every time.
            alone.append(job._replace(policy=f"{job.policy}_greedy", temperature=0.0))
            guided += [job._replace(guide=guide) for guide in guides]
            # Where answers are verified, what costs as much as guidance, with as many candidates:
            # the majority's answer, and the PRM's choice of whole answers, which end with the turn.
            if verified:
                vote = job._replace(policy=f"{job.policy}_vote", samples=self.config["k"])
                alone.append(vote)
            rerank = job._replace(policy=f"{job.policy}_rerank", boundary="turn")
            guided += [rerank._replace(guide=name) for name in verified]
        return alone + guided

    def sweep(self, domain):
        """Mixes of every two of the domain's heads, from one to the other, and soups alike."""
        # Of real questions only the answers are scored: then there is no pair, and no sweep.
        scored = self.worlds[domain].objectives
        names = [o.name for o in domain_objectives(domain, self.objectives) if o.name in scored]
        # From (1, 0) to (0, 1) in `steps` steps, with both ends; 0 steps mean no sweep at all.
        steps = self.config["weight_steps"]
        jobs = []
        for pair in itertools.combinations(names, 2):
            for i in range(steps + 1 if steps else 0):
                jobs.append(self.swept(domain, "mah_dpo", pair, i / steps))
                jobs.append(self.swept(domain, "soup", pair, i / steps))
        return jobs

    def swept(self, domain, policy, pair, w):
        """A job of a sweep, in which the second objective of the pair has the weight w."""
        weights = dict(zip(pair, (round(1 - w, 3), round(w, 3))))
        # The mix of heads costs nothing; the soup is another model at every step.
        if policy == "mah_dpo":
            weights = self.mix(weights)
        else:
            weights = {name: share for name, share in weights.items() if share > 0}
        return Job(domain, policy, policy, weights, sweep=pair)

    def spread(self, rows):
        """The jobs of sweeps whose points stand at equal distances along the fronts that the rows
        of other sweeps have measured, with as many points."""
        fronts = {}
        for row in rows:
            key = row["domain"], row["policy"], tuple(row["sweep"])
            fronts.setdefault(key, []).append(means_of(row, row["sweep"]))
        jobs = []
        for key, points in fronts.items():
            jobs += [self.swept(*key, w) for w in equal_arcs(points)]
        return jobs

    # -- one row

    def policy(self, job):
        """A row's model, and the weights of its heads as GPT.weights takes them."""
        weights = list(job.weights.values())
        if job.model == "soup":
            # In main memory there is room for all the policies that are averaged.
            device = "cpu" if len(weights) > 1 else self.device
            parts = [self.model(f"dpo_{name}", device) for name in job.weights]
            return average(parts, weights).to(self.device), 0           # head 0, the only one
        if job.model == "mod":
            return Together([self.load(f"dpo_{name}") for name in job.weights]), weights
        model = self.sft if job.model == "sft" else self.model(job.model)
        return model, weights

    def draw_problems(self, domain):
        """The prompts of a domain, of the split that the configuration names: test, or dev for
        tuning."""
        split = self.config["split"]
        rng = RNG(seed_of(self.seed, split, domain))
        return self.worlds[domain].problems(PROMPTS[split], self.config["n_test"], rng)

    def rollout(self, job):
        """Play a row's policy -> a conversation about each of its domain's prompts, its model, its
        weights. What is drawn depends on the domain alone: rows differ by their policies, not by
        their luck."""
        config, world = self.config, self.worlds[job.domain]
        # No part of these seeds names the row.
        generator = torch.Generator().manual_seed(seed_of(self.seed, "draws", job.domain))
        model, weights = self.policy(job)
        temperature = config["temperature"] if job.temperature is None else job.temperature
        if job.guide is None:
            respond = plain_responder(model, world, weights, temperature, generator, job.samples)
        else:
            respond = guided_responder(model, self.prm(job.guide), world, job.boundary,
                                       guide=job.guide, weights=weights, K=config["k"],
                                       temperature=temperature, generator=generator)
        students = seed_of(self.seed, "student", job.domain)
        talks = converse(world, self.problems(job.domain), self.tokenizer, respond, students)
        return talks, model, weights

    def measure(self, job):
        """{metric: its values, one per prompt}: the noise-free scores, the tokens of an answer and
        those drawn for it, and of a policy's plain samples the KL."""
        talks, model, weights = self.rollout(job)
        # The scores are the world's own; noisy judges are for training alone.
        world, tokenizer = self.worlds[job.domain], self.tokenizer
        rows = []
        for talk in talks:
            said = sum(len(turn.response) for turn in talk.turns)
            cost = {"tokens": said / world.turns, "drawn": talk.drawn / world.turns}
            rows.append(talk.scores(world, tokenizer) | cost)
        each = columns(rows)
        # Of guided, greedy or chosen answers the next-token distributions say little.
        if (job.guide, job.temperature, job.samples) == (None, None, 1):
            head = model.fold(weights)                                # (V, d)
            each |= kl_to_sft(model, head, self.sft, talks, self.config["temperature"])
        return {metric: [round(v, 4) for v in values] for metric, values in each.items()}

    def row(self, job):
        """An entry of results.json, and under "each" the values behind its means."""
        # One row in ten stands in the table and in a sweep: what is alike is measured once.
        alike = repr(job._replace(policy="", sweep=None))
        if alike not in self.known:
            self.known[alike] = self.measure(job)
        each = self.known[alike]
        metrics = {metric: summary(values) for metric, values in each.items()}
        row = {"policy": job.policy, "weights": job.weights, "guide": job.guide,
               "domain": job.domain, "seed": self.seed, "metrics": metrics, "each": each}
        return row | ({"sweep": list(job.sweep)} if job.sweep else {})


# -- preference pairs held out from training

PAIR_METRICS = ("loss", "margin", "reward_accuracy", "logp_accuracy")


def pair_metrics_rows(policy, logps, reference, pairs, beta, seed):
    """Held-out metrics of one policy, a row per objective. loss, margin and reward_accuracy compare
    with the reference; logp_accuracy asks whether the policy itself finds chosen likelier."""
    chosen, rejected = logps.T                                        # (N,) each
    delta = log_ratio_margin(chosen, rejected, *reference.T)
    # Of every metric the values of all pairs, of which each objective then takes its own.
    values = {"loss": dpo_loss(chosen, rejected, *reference.T, beta),
              "margin": beta * delta,
              "logp_accuracy": (chosen > rejected).float(),
              "reward_accuracy": (delta > 0).float()}
    rows = []
    # dict.fromkeys: every objective once, in the order of the pairs.
    for name in dict.fromkeys(p.objective for p in pairs):
        own = [i for i, p in enumerate(pairs) if p.objective == name]
        metrics = {metric: summary(v[own].tolist()) for metric, v in values.items()}
        # The reference itself has no margin that it could be right about.
        if not bool(delta[own].any()):
            del metrics["reward_accuracy"]
        rows.append({"policy": policy, "weights": {name: 1.0}, "guide": None,
                     "domain": f"pairs:{name}", "seed": seed, "metrics": metrics})
    return rows


# -- tables

def row_name(row):
    """How a row is called: policy, or policy + guide."""
    policy, guide = row["policy"], row["guide"]
    return f"{policy} + {guide}" if guide else policy


def n_of(row):
    """How many prompts or pairs a row was measured on. A row over several trainings says it in its
    own "n", since the n of its metrics counts trainings."""
    return row.get("n") or next(iter(row["metrics"].values()))["n"]


def by_domain(rows):
    """Rows of results -> a list of (domain, the rows of its table, {swept pair: its rows})."""
    found = {}
    for row in rows:
        # Rows of held-out pairs have a table of their own.
        if not row["domain"].startswith("pairs:"):
            parts = found.setdefault(row["domain"], {})
            parts.setdefault(tuple(row.get("sweep", ())), []).append(row)
    # Those that stand in no sweep are the table.
    return [(domain, parts.pop(()), parts) for domain, parts in found.items()]


def cell(metric):
    """mean ± half the 95 % interval, or a dash where a row has no such metric."""
    if metric is None:
        return "-"
    mean = f"{metric['mean']:.3f}"
    return mean if metric["n"] == 1 else f"{mean} ±{half_width(metric):.3f}"


def cells(row, metrics, names=("policy", "guide")):
    """A row of results as a line of a table: {column: text}."""
    line = {name: row[name] or "-" for name in names}
    return line | {m: cell(row["metrics"].get(m)) for m in metrics if m != KL_AT_1}


def table(title, lines):
    """Lines, {column: text} each, as an aligned Markdown table under a title."""
    # The titles of the columns, then the lines' texts; every column as wide as its widest text.
    grid = [list(lines[0])] + [list(line.values()) for line in lines]
    widths = [max(map(len, column)) for column in zip(*grid)]
    # Below the titles Markdown wants a rule.
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


def equal_arcs(points):
    """A curve measured at n equal steps of its weight, from 0 to 1 -> the n weights, with both
    ends, that cut it into arcs of equal length (SURF, arXiv 2605.20619). points: n times (x, y);
    between two of them the curve counts as straight, and its weight as even."""
    # How long the curve is up to each point. Not even one of no length divides by 0.
    arcs = [math.dist(here, there) + 1e-9 for here, there in zip(points, points[1:])]
    length = np.cumsum([0.0, *arcs])
    even = np.linspace(0, 1, len(points))
    return np.interp(even * length[-1], length, even).tolist()


def means_of(row, pair):
    """A row's mean scores of two objectives: a point of a front."""
    return [row["metrics"][name]["mean"] for name in pair]


def front_area(rows, pair):
    """The summary of the hypervolume of rows' scores; the reference is (0, 0), the worst score. The
    interval is over trainings: of a single one nothing is known."""
    # A front for every training. A row of several, whose "seed" is a list, has the scores of each.
    fronts = [[means_of(row, pair) for row in rows]]
    if isinstance(rows[0]["seed"], list):
        fronts = zip(*[zip(*[row["each"][name] for name in pair]) for row in rows])
    return summary([hypervolume(points) for points in fronts])


def area_lines(plain, mixes, pair):
    """A line for each method: its number of points and the area below them. plain: the rows of a
    domain's table; mixes: those of the sweep of this pair."""
    # A single head is one point; for MAH-DPO and the soup every mix is; guided, a policy has a
    # point for every guide, and one without.
    alone = [row for row in plain if not row["guide"]]
    fronts = [("", alone, ("sft", "single_head_dpo", "modpo")),
              (", swept", mixes, ("mah_dpo", "soup")),
              (", guided", plain, ("sft", "mah_dpo"))]
    lines = []
    for how, among, policies in fronts:
        for policy in policies:
            rows = [row for row in among if row["policy"] == policy]
            area = cell(front_area(rows, pair))
            lines.append({"objectives": " and ".join(pair), "method": policy + how,
                          "points": str(len(rows)), "hypervolume": area})
    return lines


def sweep_table(domain, pair, mixes):
    """The scores of a sweep of two weights, method by method."""
    lines = []
    for row in sorted(mixes, key=lambda r: r["policy"]):
        line = {"policy": row["policy"]}
        for name in pair:
            line[f"w {name}"] = str(row["weights"].get(name, 0.0))
        lines.append(line | cells(row, row["metrics"], ()))
    return table(f"{domain}, a sweep of weights", lines)


def report(rows, config):
    """All tables as Markdown: (what is printed, the sweeps, which only results.md has)."""
    n, names = config["seeds"], ", ".join(o.name for o in config["objectives"])
    seeds = ", ".join(str(config["seed"] + i) for i in range(n))
    over = "prompts" if n == 1 else "trainings"
    parts = [f"Objectives: {names}. Trained with seed {seeds}. "
             f"Sampling temperature {config['temperature']}, beta {config['beta']}, "
             f"{config['k']} candidates. Mean ± half the 95 % interval over {over}. "
             f"kl: nats from SFT, both at temperature {config['temperature']}.\n"]
    details = []
    for domain, plain, swept in by_domain(rows):
        # The first row, a plain policy, has every metric.
        first = plain[0]
        title = f"{domain}, {n_of(first)} {config['split']} prompts"
        parts.append(table(title, [cells(row, first["metrics"]) for row in plain]))
        areas = []
        for pair, mixes in swept.items():
            details.append(sweep_table(domain, pair, mixes))
            areas += area_lines(plain, mixes, pair)
        if areas:
            parts.append(table(f"{domain}, the area below each method's front", areas))
    # The rows of pairs held out from training, if there are any.
    lines = []
    for row in rows:
        if row["domain"].startswith("pairs:"):
            line = cells(row, PAIR_METRICS, ("domain", "policy"))
            lines.append(line | {"n": str(n_of(row))})
    if lines:
        parts.append(table("preference pairs held out from training", lines))
    return "\n".join(parts), "\n".join(details)


def side_by_side(runs):
    """The tables of finished runs as one: every row once for each run, or once for all of them
    where all have the same figures -> Markdown."""
    # {(domain, name of a row): {run: line}}: rows of one name will stand below each other.
    found, metrics = {}, {}
    for run in runs:
        for domain, plain, _ in by_domain(load_rows(run)):
            # The first row, a plain policy, has every metric.
            metrics.setdefault(domain, plain[0]["metrics"])
            for row in plain:
                lines = found.setdefault((domain, row_name(row)), {})
                lines[run] = cells(row, metrics[domain])
    tables = {}
    for (domain, _), lines in found.items():
        # What a varied option does not touch reads the same everywhere.
        line = next(iter(lines.values()))
        if list(lines.values()) == [line] * len(runs):
            lines = {"all": line}
        shown = tables.setdefault(domain, [])
        shown += [{"run": run} | line for run, line in lines.items()]
    return "\n".join(table(f"{domain}, by run", lines) for domain, lines in tables.items())


# -- the picture

# Every method has a colour that is readable on a light page and on a dark one.
COLOURS = {"base": "#888", "sft": "#c70", "single_head_dpo": "#095", "modpo": "#b5b",
           "soup": "#47d", "mod": "#0ab", "mah_dpo": "#d33"}
STYLE = ("svg{background:#fff}text{font:13px sans-serif;fill:#222}path{stroke:#888;fill:none}"
         "polyline{fill:none}circle,polyline{stroke-width:2}"
         "@media(prefers-color-scheme:dark){svg{background:#111}text{fill:#ddd}}")
SIDE = 360                          # a plot; in both directions scores go from 0 to 1
AXES = """<path d="M0 0V360H360"/>
<text x="-4" y="378">0</text><text x="170" y="378">0.5</text><text x="356" y="378">1</text>
<text x="-14" y="364">0</text><text x="-26" y="184">0.5</text><text x="-14" y="8">1</text>\
<text x="130" y="398">{}</text><text transform="translate(-34 230) rotate(-90)">{}</text>"""


def place(row, pair):
    """Where a row's scores stand in a plot, in pixels from its upper left corner."""
    x, y = means_of(row, pair)
    return round(SIDE * x, 1), round(SIDE * (1 - y), 1)


def plot(plain, mixes, pair):
    """One pair of objectives: sweeps as lines, the rows of the table as points."""
    out = [AXES.format(*pair)]
    # A sweep's rows stand in the order of its weights.
    for policy in ("mah_dpo", "soup"):
        line = [place(row, pair) for row in mixes if row["policy"] == policy]
        points = " ".join(f"{x},{y}" for x, y in line)
        out.append(f'<polyline points="{points}" stroke="{COLOURS[policy]}"/>')
    for row in plain:
        # A ring is guided, a disc is not. mah_dpo:honesty and mah_dpo_greedy have mah_dpo's colour.
        x, y = place(row, pair)
        colour = next(c for method, c in COLOURS.items() if row["policy"].startswith(method))
        fill = "none" if row["guide"] else colour
        out.append(f'<circle cx="{x}" cy="{y}" r="4" stroke="{colour}" fill="{fill}">'
                   f"<title>{row_name(row)}</title></circle>")
    return out


def pareto_svg(rows):
    """The picture: below a legend a plot for every swept pair of objectives, two beside each
    other. A row's name shows when the mouse is on its point."""
    # The legend is one line of text, every method in its colour.
    out = ['<text x="20" y="24">']
    for method, colour in COLOURS.items():
        out.append(f'<tspan dx="9" style="fill:{colour}">&#9679; {method}</tspan>')
    out.append('<tspan dx="9">ring: guided, line: weights swept</tspan></text>')
    # With fewer than two objectives in a domain there is nothing to plot.
    plots = []
    for _, plain, swept in by_domain(rows):
        plots += [plot(plain, mixes, pair) for pair, mixes in swept.items()]
    # A plot and its texts fill a square of 440.
    for i, drawn in enumerate(plots):
        x, y = 60 + 440 * (i % 2), 50 + 440 * (i // 2)
        out += [f'<g transform="translate({x} {y})">', *drawn, "</g>"]
    # The style stands inside: the picture needs no other file.
    height = 50 + 440 * math.ceil(len(plots) / 2)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 {height}">'
    return f"{head}<style>{STYLE}</style>{''.join(out)}</svg>\n"


# -- the files of a run

# The last one is written last: where it is, all are.
OUTPUTS = ("scores.jsonl", "results.md", "pareto.svg", "results.json")
# What a row of results.json and its line of scores.jsonl share; rows alike in it have equal values.
ROW_KEY = ("domain", "policy", "guide", "weights")


def measure_all(bench, jobs):
    """The rows of jobs. Several processes share them; each then has all of them."""
    own = local_items(range(len(jobs)))
    measured = in_threads(bench.row, [jobs[i] for i in own], bench.alone)
    bar = tqdm(measured, desc="tables", total=len(own), unit="row", disable=None)
    found = dict(gather(list(zip(own, bar))))
    return [found[i] for i in range(len(jobs))]


def evaluate(run, pair_rows, device=None):
    """Measure every row of a run of one seed, then publish. pair_rows: the rows of held-out pairs;
    device: if not the run's own."""
    bench = Bench(run, device)
    # First the tables of all domains, then the sweeps.
    tables = [bench.jobs(domain) for domain in bench.worlds]
    sweeps = [bench.sweep(domain) for domain in bench.worlds]
    rows = measure_all(bench, list(itertools.chain(*tables, *sweeps)))
    # A second sweep takes the place of the first, which has shown how the fronts run. (Runs of
    # earlier versions know one spacing.)
    if bench.config.get("spacing") == "front":
        swept = [row for row in rows if "sweep" in row]
        rows = [row for row in rows if "sweep" not in row] + measure_all(bench, bench.spread(swept))
    # What the means are made of, prompt by prompt: paired comparisons need it.
    lines = ""
    for row in rows:
        line = {key: row[key] for key in (*ROW_KEY, "each")}
        lines += json.dumps(line, separators=(",", ":")) + "\n"
    forget_files(run, OUTPUTS)
    write_text(f"{run}/scores.jsonl", lines)
    publish(run, rows + pair_rows)


def publish(run, rows):
    """Print the tables of these rows; write results.md, pareto.svg and, last, results.json, which
    says that a run is finished."""
    text, details = report(rows, read_run(run))
    forget_files(run, OUTPUTS)
    write_text(f"{run}/results.md", f"{text}\n{details}")
    write_text(f"{run}/pareto.svg", pareto_svg(rows))
    # The values behind the means are in scores.jsonl already.
    kept = []
    for row in rows:
        kept.append({key: v for key, v in row.items() if key not in ("n", "each")})
    write_json(f"{run}/results.json", kept)
    note_files(run, OUTPUTS)
    print(f"\n{text}\nThe sweeps of weights: {run}/results.md")


def seed_runs(run):
    """The directories of a run's trainings, one per seed; the run itself if it has one seed."""
    config = read_run(run)
    if config["seeds"] == 1:
        return [run]
    return [f"{run}/seed={config['seed'] + i}" for i in range(config["seeds"])]


def load_rows(run):
    """The rows of a finished run as `publish` takes them. "each" holds the values that intervals
    are made of: one per prompt, or with several seeds one per training."""
    results = [read_json(f"{path}/results.json") for path in seed_runs(run)]
    if len(results) > 1:
        return over_trainings(results)
    each = {}
    for _, line in read_jsonl(f"{run}/scores.jsonl"):
        each[repr([line.get(name) for name in ROW_KEY])] = line.get("each")
    for row in results[0]:
        # Held-out pairs have no line.
        if not row["domain"].startswith("pairs:"):
            row["each"] = each.get(repr([row[name] for name in ROW_KEY]))
            if not row["each"]:
                where = f"{row_name(row)}, {row['domain']}"
                raise InputError(f"{run}/scores.jsonl: no line of {where}; bring the file back, or "
                                 f"write it anew with evaluate.py {run}")
    return results[0]


def over_trainings(results):
    """Lists of rows, one list per training -> the rows that all of them have, averaged. Rows are
    matched by what they are: held-out pairs come in the order of a training's samples."""
    found = {}
    for row in itertools.chain.from_iterable(results):
        key = [row.get(k) for k in ("policy", "guide", "domain", "weights", "sweep")]
        found.setdefault(repr(key), []).append(row)
    rows = []
    for same in found.values():
        # A training may lack held-out pairs of an objective, or a metric of theirs.
        if len(same) < len(results):
            continue
        # Every training's mean is one value. How many prompts it was over is said beside it.
        each = {}
        for name, summaries in columns([row["metrics"] for row in same]).items():
            if len(summaries) == len(same):
                each[name] = [s["mean"] for s in summaries]
        metrics = {name: summary(values) for name, values in each.items()}
        n = round(statistics.fmean([n_of(row) for row in same]))
        seeds = [row["seed"] for row in same]
        rows.append(same[0] | {"seed": seeds, "n": n, "each": each, "metrics": metrics})
    return rows


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="a finished run of train.py; several are put side by side")
    parser.add_argument("--device", help="auto, cpu, cuda or mps (default: the run's own)")
    args = parser.parse_args(argv)
    join_processes()
    for run in args.runs:
        if not os.path.isfile(f"{run}/results.json"):
            raise InputError(f"{run}: not a finished run (no results.json); finish it with "
                             f"train.py --resume {run}")
        check_files(run)
    # Several runs are only read, not measured.
    if len(args.runs) > 1:
        print(side_by_side(args.runs))
        return
    check_key(run, read_run(run))           # the same --data
    trainings = seed_runs(run)
    for path in trainings:
        # Held-out pairs are not measured again.
        evaluate(path, read_json(f"{path}/pair_metrics.json"), args.device)
    # Of several trainings the run itself has tables of means.
    if len(trainings) > 1:
        publish(run, load_rows(run))


if __name__ == "__main__":
    run_command(main)
