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
from functools import lru_cache, partial
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
        # The user and the judges read text.
        text = tokenizer.decode(response)
        self.messages.append({"role": "assistant", "content": text})
        reply = world.reply(self.problem, self.messages, rng)
        if reply is None:
            return
        self.messages.append({"role": "user", "content": reply})
        # The policy reads ids. They only grow: a carried cache stays true.
        # An answer that was cut off lacks the end-of-turn token, which the user's words follow.
        closing = [] if response[-1] == tokenizer.eos_id else [tokenizer.eos_id]
        self.new_ids = closing + tokenizer.encode_turn(reply)
        self.ids = self.ids + response + self.new_ids

    def scores(self, world, tokenizer):
        """{objective: noise-free score}, the mean of the assistant's turns."""
        each = []
        for _, messages, response in self.turns:
            text = tokenizer.decode(response)
            each.append(world.scores(self.problem, messages, text))
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
    # All but the prompts is known: `draw` is generate with these arguments filled in.
    draw = partial(generate, model, weights=weights, max_new_tokens=world.max_new_tokens,
                   temperature=temperature, generator=generator, samples=samples,
                   progress=progress)
    return partial(plain_answers, draw, model.tokenizer, samples)


def plain_answers(draw, tokenizer, samples, conversations):
    """One answer to each conversation, the majority's of `samples` tries."""
    answers = draw([c.ids for c in conversations])
    chosen = []
    for i, conversation in enumerate(conversations):
        # The samples of a prompt stand together.
        tried = answers[i * samples:(i + 1) * samples]
        conversation.drawn += sum(map(len, tried))
        best = 0
        if samples > 1:
            best = majority([tokenizer.decode(ids) for ids in tried])
        chosen.append(tried[best])
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
        # All results of a batch share one state. Without a next turn it need not stay in memory.
        states[start] = results[0].state if world.turns > 1 else None
        for conversation, result in zip(part, results):
            chosen.append(result.ids)
            for step in result.steps:
                conversation.drawn += sum(map(len, step.candidates))
    return chosen


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


LOGITS = 2 ** 28       # at once, a gigabyte in float32: the KL needs five such tensors


def kl_sums(model, head, reference, turns, pad_id):
    """The KL of kl_to_sft, summed over the tokens of every turn's response -> (len(turns),)."""
    device = head.device
    texts = [before + response for before, _, response in turns]
    ids, lengths = pad(texts, pad_id, device)                         # (B, T)
    starts = torch.tensor([len(before) for before, _, _ in turns], device=device)
    mask = response_mask(starts, lengths, ids.shape[1])               # (B, T)
    # Only states that predict a response token count: the state at t predicts the token at t + 1.
    row, t = mask[:, 1:].nonzero(as_tuple=True)                       # (N,) each
    h = model(ids)[row, t]                                            # (N, d)
    h_ref = reference(ids)[row, t]
    # Both distributions over the whole vocabulary, so the sum over it is exact.
    log_pi = F.log_softmax(F.linear(h, head).float(), -1)             # (N, V)
    log_ref = F.log_softmax(reference.logits(h_ref).float(), -1)
    kl = (log_pi.exp() * (log_pi - log_ref)).sum(-1)                  # (N,)
    return torch.zeros(len(turns), device=device).index_add(0, row, kl)


@torch.no_grad()
def kl_to_sft(model, head, reference, conversations, pad_id):
    """KL(pi || pi_sft) of the next-token distributions (all tokens, temperature 1), in nats: exact
    at every position of the policy's own samples, which are drawn at the run's temperature.

    head (V, d): the policy's folded head. -> two lists with a number for each conversation: its
    mean per token, and its sum over an answer's tokens; both are means over the turns."""
    turns = list(itertools.chain.from_iterable(c.turns for c in conversations))
    lengths = [len(before) + len(response) for before, _, response in turns]
    sums = torch.zeros(len(turns), dtype=torch.float64)
    # Few enough tokens at a time for their logits over a large vocabulary.
    size = min(16384, LOGITS // len(head))
    for index in batches_by_length(lengths, size):
        part = [turns[i] for i in index]
        sums[index] = kl_sums(model, head, reference, part, pad_id).double().cpu()
    n_tokens = torch.tensor([len(response) for _, _, response in turns])
    both = torch.stack((sums / n_tokens, sums))                       # (2, turns of all)
    # Every conversation has equally many turns, one after the other.
    return both.view(2, len(conversations), -1).mean(-1).tolist()


# -- rows

def average(models, weights=None):
    """The DPO soup of single-objective policies, uniform if not said otherwise, as a model. Of one
    policy: itself."""
    if len(models) == 1:
        return models[0]
    state = soup([m.state_dict() for m in models], weights or [1.0] * len(models))
    return GPT.from_state(models[0].config, state, models[0].tokenizer).eval()


SINGLE = ("base", "sft", "single_head_dpo", "modpo")           # policies with a single head


class Job(NamedTuple):
    """How a row of the tables is made."""
    policy: str                     # the row's name
    model: str                      # a directory of the run, or "soup" of the dpo_<objective>
    weights: dict                   # {head: its share}, of a soup {objective: its policy's share}
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
        # SFT stays, for the KL; beside it only the last model and the last PRM are in memory.
        self.sft = self.load("sft")
        self.model = lru_cache(1)(self.load)
        self.load_prm = lru_cache(1)(partial(find_prm, run, dtype=self.dtype))
        self.tokenizer = self.sft.tokenizer
        self.known = {}             # what has been measured, by job
        limit = self.config["max_new_tokens"]
        self.worlds = worlds_of(self.objectives, self.config["data"], limit, self.sft)

    def load(self, name, device=None):
        """A model of the run, on the run's device if not said otherwise."""
        place = partial(torch.Tensor.to, device=device or self.device)
        return load_hf(f"{self.run}/{name}", dtype=self.dtype, place=place).eval()

    def prm(self, guide):
        """The PRM with the output `guide`: that objective's own if there is one, or the unified."""
        own = os.path.isdir(f"{self.run}/prm_{guide}")
        return self.load_prm(guide if own else "unified").to(self.device).eval()

    # -- the rows

    def mix(self, weights):
        """{objective: weight} -> the shares of all heads of MAH-DPO, which sum to 1."""
        total = sum(weights.values())
        return {o.name: weights.get(o.name, 0.0) / total for o in self.objectives}

    def unguided(self, job, verified):
        """A policy sampled, at temperature 0, and by majority vote where answers are verified."""
        # No luck at all: the likeliest token every time.
        greedy = job._replace(policy=f"{job.policy}_greedy", temperature=0.0)
        # As many samples as guidance has candidates: what guidance has to beat.
        vote = job._replace(policy=f"{job.policy}_vote", samples=self.config["k"])
        return [job, greedy, vote] if verified else [job, greedy]

    def guided(self, job, names, verified):
        """A policy under every guide; then whole answers reranked, the usual best-of-K."""
        guides = list(names)
        if self.config["prm"] == "unified":
            guides.append("unified")
        # A candidate that ends with the turn is a whole answer, and the first step is the last.
        rerank = job._replace(policy=f"{job.policy}_rerank", boundary="turn")
        jobs = [job._replace(guide=guide) for guide in guides]
        return jobs + [rerank._replace(guide=name) for name in verified]

    def jobs(self, domain):
        """All rows of a domain's table, in its order."""
        objectives = domain_objectives(domain, self.objectives)
        names = [o.name for o in objectives]
        verified = [o.name for o in objectives if o.case == "verifiable"]
        base, sft, single, modpo = [Job(name, name, {"policy": 1.0}) for name in SINGLE]
        # Uniform over the domain: of policies for the soup, of heads for the ensemble.
        mixed = Job("soup", "soup", dict.fromkeys(names, 1 / len(names)))
        mah_dpo = Job("mah_dpo", "mah_dpo", self.mix(dict.fromkeys(names, 1.0)))
        # Without a guide: what training alone has bought ...
        jobs = [base, *self.unguided(sft, verified), single, modpo, mixed]
        jobs += self.unguided(mah_dpo, verified)
        for name in names:
            alone = self.mix({name: 1.0})
            jobs.append(Job(f"mah_dpo:{name}", "mah_dpo", alone))
        # ... and with one: guidance of SFT alone, and of MAH-DPO.
        jobs += self.guided(sft, names, verified)
        jobs += self.guided(mah_dpo, names, verified)
        return jobs

    def sweep(self, domain):
        """Mixes of every two of the domain's heads, from one to the other, and soups alike."""
        # Of real questions only the answers are scored: then there is no pair, and no sweep.
        scored = self.worlds[domain].objectives
        names = [o.name for o in domain_objectives(domain, self.objectives) if o.name in scored]
        steps = self.config["weight_steps"]
        jobs = []
        for pair in itertools.combinations(names, 2):
            for i in range(steps + 1 if steps else 0):
                # The mix of heads costs nothing; the soup is another model at every step.
                weights = dict(zip(pair, ((steps - i) / steps, i / steps)))
                parts = {name: w for name, w in weights.items() if w > 0}
                jobs.append(Job("mah_dpo", "mah_dpo", self.mix(weights), sweep=pair))
                jobs.append(Job("soup", "soup", parts, sweep=pair))
        return jobs

    # -- one row

    def policy(self, job):
        """-> a row's model and the weights of its heads."""
        weights = list(job.weights.values())
        if job.model == "sft":
            return self.sft, weights
        if job.model != "soup":
            return self.model(job.model), weights
        # In main memory there is room for all the policies that are averaged.
        device = "cpu" if len(weights) > 1 else self.device
        parts = [self.model(f"dpo_{name}", device) for name in job.weights]
        return average(parts, weights).to(self.device), 0

    def problems(self, domain, n):
        """The prompts of a domain's tables: of the split that the configuration names."""
        split = self.config["split"]
        rng = RNG(seed_of(self.seed, split, domain))
        return self.worlds[domain].problems(split, n, rng)

    def rollout(self, domain, job, problems):
        """Play a row's policy -> conversations about these problems, its model, its weights."""
        world = self.worlds[domain]
        model, weights = self.policy(job)
        temperature = job.temperature
        if temperature is None:
            temperature = self.config["temperature"]
        # The same draws for every row: rows differ by their policies, not by their luck.
        generator = torch.Generator().manual_seed(seed_of(self.seed, "draws", domain))
        students = seed_of(self.seed, "student", domain)
        if job.guide is None:
            respond = plain_responder(model, world, weights, temperature, generator, job.samples)
        else:
            respond = guided_responder(model, self.prm(job.guide), world, weights, job.guide,
                                       temperature, generator, self.config["k"], job.boundary)
        talks = converse(world, problems, self.tokenizer, respond, students)
        return talks, model, weights

    def measure(self, domain, job):
        """-> {metric: list of values, one per prompt}: the noise-free scores, the tokens of an
        answer and those drawn for it, and of a policy's plain samples the KL."""
        problems = self.problems(domain, self.config["n_test"])
        talks, model, weights = self.rollout(domain, job, problems)
        world, tokenizer = self.worlds[domain], self.tokenizer
        # The scores are the world's own; noisy judges are for training alone.
        each = columns([talk.scores(world, tokenizer) for talk in talks])
        each["tokens"] = [talk.length() for talk in talks]
        each["drawn"] = [talk.drawn / len(talk.turns) for talk in talks]
        # Of guided, greedy or chosen answers the next-token distributions say little.
        if (job.guide, job.temperature, job.samples) == (None, None, 1):
            head = model.fold(weights)                                # (V, d)
            per_token, per_answer = kl_to_sft(model, head, self.sft, talks, tokenizer.pad_id)
            each |= {"kl": per_token, "kl/answer": per_answer}
        return {metric: [round(v, 4) for v in values] for metric, values in each.items()}

    def row(self, domain, job):
        """An entry of results.json, and under "each" the values behind its means."""
        # A row may stand in the table and in a sweep: what is made alike is made once.
        alike = repr((domain, job._replace(policy="", sweep=None)))
        if alike not in self.known:
            self.known[alike] = self.measure(domain, job)
        each = self.known[alike]
        row = {"policy": job.policy, "weights": job.weights, "guide": job.guide,
               "domain": domain, "seed": self.seed,
               "metrics": {metric: summary(values) for metric, values in each.items()},
               "each": each}
        if job.sweep:
            row["sweep"] = list(job.sweep)
        return row


# -- preference pairs held out from training

def head_of(heads, objective):
    """Which head scores an objective's pairs: its own, or else the first."""
    return heads.index(objective) if objective in heads else 0


def own_logps(model, pairs, progress=None):
    """Log-probabilities (N, 2) as by pair_logps, each pair under its objective's own head."""
    own = partial(head_of, model.config.objectives)
    return pair_logps(model, pairs, own, progress)


def pair_metrics_rows(policy, logps, reference, pairs, beta, seed):
    """Held-out metrics of one policy, a row per objective. loss, margin and reward_accuracy compare
    with the reference; logp_accuracy asks whether the policy itself finds chosen likelier."""
    chosen, rejected = logps.T                                        # (N,) each
    delta = log_ratio_margin(chosen, rejected, *reference.T)
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


def by_domain(rows):
    """Rows of results -> a list of (domain, the rows of its table, {swept pair: its rows})."""
    found = {}
    for row in rows:
        if row["domain"].startswith("pairs:"):
            continue
        plain, swept = found.setdefault(row["domain"], ([], {}))
        if "sweep" in row:
            swept.setdefault(tuple(row["sweep"]), []).append(row)
        else:
            plain.append(row)
    return [(domain, plain, swept) for domain, (plain, swept) in found.items()]


def cell(metric):
    """mean ± half the 95 % interval, or a dash where a row has no such metric."""
    if metric is None:
        return "-"
    mean = f"{metric['mean']:.3f}"
    return mean if metric["n"] == 1 else f"{mean} ±{half_width(metric):.3f}"


def cells(row, metrics, names=("policy", "guide")):
    """A row of results as a line of a table: {column: text}."""
    line = {name: row[name] or "-" for name in names}
    return line | {name: cell(row["metrics"].get(name)) for name in metrics}


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


def front_area(rows, pair):
    """The summary of the hypervolume of rows' scores; the reference is (0, 0), the worst score. The
    interval is over trainings: of a single one, whose "each" are prompts, nothing is known."""
    x, y = pair
    areas = []
    # A row of several trainings names all their seeds, and "each" has a value per training.
    if isinstance(rows[0]["seed"], list):
        for k in range(len(rows[0]["seed"])):
            areas.append(hypervolume([(r["each"][x][k], r["each"][y][k]) for r in rows]))
    else:
        means = [r["metrics"] for r in rows]
        areas.append(hypervolume([(m[x]["mean"], m[y]["mean"]) for m in means]))
    return summary(areas)


def area_lines(plain, mixes, pair):
    """A line for each method: its number of points and the area below them. plain: the rows of a
    domain's table; mixes: those of the sweep of this pair."""
    fronts = {}
    for policy in ("sft", "single_head_dpo", "modpo"):
        fronts[policy] = [r for r in plain if row_name(r) == policy]
    for policy in ("mah_dpo", "soup"):
        fronts[f"{policy}, swept"] = [r for r in mixes if r["policy"] == policy]
    # Guided, a policy has a point for every guide, and one without.
    for policy in ("sft", "mah_dpo"):
        fronts[f"{policy}, guided"] = [r for r in plain if r["policy"] == policy]
    lines = []
    for method, rows in fronts.items():
        area = cell(front_area(rows, pair))
        lines.append({"objectives": " and ".join(pair), "method": method,
                      "points": str(len(rows)), "hypervolume": area})
    return lines


def sweep_table(domain, pair, mixes):
    """The scores of a sweep of two weights, method by method."""
    lines = []
    for row in sorted(mixes, key=lambda r: r["policy"]):
        line = {"policy": row["policy"]}
        for name in pair:
            line[f"w {name}"] = f"{row['weights'].get(name, 0.0):.1f}"
        lines.append(line | cells(row, row["metrics"], ()))
    return table(f"{domain}, a sweep of weights", lines)


def pairs_table(rows):
    """The metrics of held-out pairs."""
    lines = []
    for row in rows:
        objective = row["domain"].removeprefix("pairs:")
        metrics = cells(row, ["loss", "margin", "reward_accuracy", "logp_accuracy"], ["policy"])
        lines.append({"held-out pairs": f"{objective} ({row['n']})"} | metrics)
    return table("preference pairs held out from training", lines)


def opening(config):
    """What all tables of a run have in common."""
    n, names = config["seeds"], ", ".join(o.name for o in config["objectives"])
    trainings = "Seed" if n == 1 else f"{n} trainings, seeds"
    seeds = ", ".join(str(config["seed"] + i) for i in range(n))
    over = "prompts" if n == 1 else "trainings"
    return (f"Objectives: {names}. {trainings} {seeds}. "
            f"Sampling temperature {config['temperature']}, beta {config['beta']}, "
            f"{config['k']} candidates. Mean ± half the 95 % interval over {over}.\n")


def report(rows, config):
    """All tables as Markdown: (what is printed, the sweeps, which only results.md has)."""
    parts, details = [opening(config)], []
    for domain, plain, swept in by_domain(rows):
        # The first row, a plain policy, has every metric.
        metrics, n = plain[0]["metrics"], plain[0]["n"]
        title = f"{domain}, {n} {config['split']} prompts"
        parts.append(table(title, [cells(row, metrics) for row in plain]))
        areas = []
        for pair, mixes in swept.items():
            details.append(sweep_table(domain, pair, mixes))
            areas += area_lines(plain, mixes, pair)
        if areas:
            parts.append(table(f"{domain}, the area below each method's front", areas))
    held_out = [row for row in rows if row["domain"].startswith("pairs:")]
    if held_out:
        parts.append(pairs_table(held_out))
    return "\n".join(parts), "\n".join(details)


def side_by_side(runs):
    """The tables of finished runs as one: every row once for each run, or once for all of them
    where all have the same figures -> Markdown."""
    # domain -> name of a row -> run -> row
    found = {}
    for run in runs:
        for domain, plain, _ in by_domain(load_rows(run)):
            names = found.setdefault(domain, {})
            for row in plain:
                names.setdefault(row_name(row), {})[run] = row
    parts = []
    for domain, names in found.items():
        lines = []
        # SFT's plain samples have every metric.
        metrics = next(iter(names["sft"].values()))["metrics"]
        for same in names.values():
            shown = {run: cells(row, metrics) for run, row in same.items()}
            # What a varied option does not touch reads the same everywhere.
            texts = list(shown.values())
            if texts == [texts[0]] * len(runs):
                shown = {"all": texts[0]}
            lines += [{"run": run} | line for run, line in shown.items()]
        parts.append(table(f"{domain}, by run", lines))
    return "\n".join(parts)


# -- the picture

# Every method has a colour that is readable on a light page and on a dark one.
COLOURS = {"base": "#888", "sft": "#c70", "single_head_dpo": "#095", "modpo": "#b5b",
           "soup": "#47d", "mah_dpo": "#d33"}
STYLE = ("svg{background:#fff}text{font:13px sans-serif;fill:#222}path{stroke:#888;fill:none}"
         "polyline{fill:none}circle,polyline{stroke-width:2}"
         "@media(prefers-color-scheme:dark){svg{background:#111}text{fill:#ddd}}")
SIDE = 360                          # a plot; in both directions scores go from 0 to 1
AXES = """<path d="M0 0V360H360"/>
<text x="-4" y="378">0</text><text x="170" y="378">0.5</text><text x="356" y="378">1</text>
<text x="-14" y="364">0</text><text x="-26" y="184">0.5</text><text x="-14" y="8">1</text>"""


def place(row, pair):
    """Where a row's scores stand in a plot, in pixels from its upper left corner."""
    x, y = [row["metrics"][name]["mean"] for name in pair]
    return round(SIDE * x, 1), round(SIDE * (1 - y), 1)


def plot(plain, mixes, pair):
    """One pair of objectives: sweeps as lines, the rows of the table as points."""
    out = [AXES, f'<text x="130" y="398">{pair[0]}</text>',
           f'<text transform="translate(-34 230) rotate(-90)">{pair[1]}</text>']
    # A sweep's rows stand in the order of its weights.
    for policy in ("mah_dpo", "soup"):
        line = [place(row, pair) for row in mixes if row["policy"] == policy]
        points = " ".join(f"{x},{y}" for x, y in line)
        out.append(f'<polyline points="{points}" stroke="{COLOURS[policy]}"/>')
    for row in plain:
        x, y = place(row, pair)
        # mah_dpo:honesty and mah_dpo_greedy are of the method mah_dpo.
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
    plots = []
    for _, plain, swept in by_domain(rows):
        plots += [plot(plain, mixes, pair) for pair, mixes in swept.items()]
    # A plot and its texts fill a square of 440.
    for i, drawn in enumerate(plots):
        x, y = 60 + 440 * (i % 2), 50 + 440 * (i // 2)
        out += [f'<g transform="translate({x} {y})">', *drawn, "</g>"]
    height = 50 + 440 * math.ceil(len(plots) / 2)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 {height}">'
    return f"{head}<style>{STYLE}</style>{''.join(out)}</svg>\n"


# -- the files of a run

def evaluate(run, pair_rows, device=None):
    """Measure every row of a run of one seed, then publish. pair_rows: the rows of held-out pairs;
    device: if not the run's own."""
    bench = Bench(run, device)
    jobs = []
    # First the tables of all domains, then the sweeps.
    for listed in (bench.jobs, bench.sweep):
        for domain in bench.worlds:
            jobs += [(domain, job) for job in listed(domain)]
    # Several processes share the rows; each then has all of them.
    measured = []
    mine = local_items(range(len(jobs)))
    for i in tqdm(mine, desc="tables", unit="row", disable=None):
        measured.append((i, bench.row(*jobs[i])))
    found = dict(gather(measured))
    rows = [found[i] for i in range(len(jobs))]
    # What the means are made of, prompt by prompt: paired comparisons need it.
    lines = []
    for row in rows:
        line = {key: row[key] for key in ("domain", "policy", "guide", "weights", "each")}
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    write_text(f"{run}/scores.jsonl", "".join(lines))
    publish(run, rows + pair_rows)


def n_of(row):
    """How many prompts or pairs a row of one training was measured on."""
    return next(iter(row["metrics"].values()))["n"]


def publish(run, rows):
    """Print the tables of these rows; write results.md, pareto.svg and, last, results.json, which
    says that a run is finished."""
    for row in rows:
        row.setdefault("n", n_of(row))
    # How many prompts: over trainings, whose summaries count trainings, load_rows has said it.
    text, details = report(rows, read_run(run))
    write_text(f"{run}/results.md", f"{text}\n{details}")
    write_text(f"{run}/pareto.svg", pareto_svg(rows))
    kept = []
    for row in rows:
        kept.append({key: v for key, v in row.items() if key not in ("n", "each")})
    write_json(f"{run}/results.json", kept)
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
    rows = results[0]
    # Held-out pairs, the last rows, have no line.
    for row, (_, line) in zip(rows, read_jsonl(f"{run}/scores.jsonl")):
        row["each"] = line["each"]
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
        # A training may lack held-out pairs of an objective.
        if len(same) < len(results):
            continue
        # Each training's mean is one value.
        each = {}
        for name, summaries in columns([row["metrics"] for row in same]).items():
            if len(summaries) == len(same):
                each[name] = [s["mean"] for s in summaries]
        metrics = {name: summary(values) for name, values in each.items()}
        n = round(statistics.fmean([n_of(row) for row in same]))
        seeds = [row["seed"] for row in same]
        rows.append(same[0] | {"seed": seeds, "n": n, "each": each, "metrics": metrics})
    return rows


# -- responses to read

def fold(text, margin):
    """Print a text in 100 columns, every line behind a margin."""
    for line in text.splitlines():
        print(textwrap.fill(line, 100, initial_indent=margin, subsequent_indent=margin))


def show_conversation(name, conversation, world, tokenizer):
    """Print a policy's name and scores, its answers and the user's replies between them."""
    line = f"\n{name:<38}"
    for objective, score in conversation.scores(world, tokenizer).items():
        line += f"  {objective} {score:.2f}"
    print(line)
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
        # Policy by policy, as models are loaded; printed below prompt by prompt.
        for job in tqdm(jobs, desc=domain, unit="policy", disable=None):
            played.append(bench.rollout(domain, job, problems)[0])
        for i, problem in enumerate(problems):
            print(f"=== {domain}, {bench.config['split']} prompt {i + 1}")
            for message in problem.messages():
                fold(message["content"], "> ")
            for job, conversations in zip(jobs, played):
                show_conversation(row_name(job._asdict()), conversations[i], world,
                                  bench.tokenizer)
            print()


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
        if not os.path.isfile(f"{run}/results.json"):
            raise InputError(f"{run}: not a finished run (no results.json); finish it with "
                             f"train.py --resume {run}")
    if args.samples is not None:
        for run in args.runs:
            show_samples(run, args.samples, args.device)
        return
    if len(args.runs) > 1:
        print(side_by_side(args.runs))
        return
    # Held-out pairs are not measured again: they belong to the training that kept them.
    trainings = seed_runs(args.runs[0])
    for path in trainings:
        rows = read_json(f"{path}/results.json")
        evaluate(path, [r for r in rows if r["domain"].startswith("pairs:")], args.device)
    if len(trainings) > 1:
        publish(args.runs[0], load_rows(args.runs[0]))


if __name__ == "__main__":
    run_command(main)
