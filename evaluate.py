"""evaluate.py: what each stage bought, measured on test prompts. Before: decode.py; next: train.py.

    python evaluate.py RUN                     measure every policy of a run directory again and rewrite its tables
    python evaluate.py RUN --samples 3         every policy's responses to the same prompts, with their scores

A row is a policy (base, sft, sft_greedy, the baselines, mah_dpo, each head alone), a mix of heads, and perhaps a guide;
a column is an objective's noise-free score, averaged over test prompts that no stage has seen, with half its 95 % interval:
over the prompts, or over the trainings of a run with several seeds. All rows see the same prompts and (in tutoring) simulated
students, and start from the same random seed: differences are paired. KL is the policy's distance from SFT in nats per token
on its own samples: methods should be compared at equal distance. Results go to results.json, results.md and pareto.svg.
"""
import argparse
import functools
import itertools
import json
import math
import os
import statistics
import textwrap
import zlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (DOMAINS, RNG, InputError, OBJECTIVES, batches_by_length, domain_objectives, pad,
                  read_json, read_jsonl, response_mask, run_command, write_json, write_text)
from decode import domain_mix, find_prm, generate, guided_decode, read_run
from interop.answers import majority
from interop.datasets import worlds_of
from interop.parallel import gather, join_processes, local_items
from mah_dpo import dpo_loss, log_ratio_margin, pair_logps, soup
from model import GPT, linear, load_hf, pick_device, sampling_dtype


def seed_of(seed, *what):
    """A seed for one purpose: a function of the run's seed and the purpose alone, so that stages do not interfere."""
    return zlib.crc32(repr((seed, *what)).encode())


class Conversation:
    """One dialogue under way: messages for the judges, ids for the model (text never becomes ids again)."""

    def __init__(self, problem, tokenizer):
        self.problem, self.messages = problem, problem.messages()
        self.ids = self.new_ids = tokenizer.encode_chat(self.messages)
        self.turns = []                    # (ids before, messages before, response ids) of every assistant turn
        self.drawn = 0                     # tokens sampled for them, those of rejected candidates included

    def answer(self, response, world, tokenizer, rng):
        """Record the assistant's response and play the user's reply, if there is one."""
        text = tokenizer.decode(response)
        self.turns.append((self.ids, list(self.messages), response))
        self.messages.append({"role": "assistant", "content": text})
        reply = world.reply(self.problem, self.messages, rng)
        if reply is not None:
            self.messages.append({"role": "user", "content": reply})
            closing = [] if response[-1] == tokenizer.eos_id else [tokenizer.eos_id]
            self.new_ids = closing + tokenizer.encode_turn(reply)
            self.ids = self.ids + response + self.new_ids

    def scores(self, world, tokenizer):
        """Noise-free scores, averaged over the assistant's turns."""
        each = [world.scores(self.problem, before, tokenizer.decode(ids)) for _, before, ids in self.turns]
        return {name: statistics.fmean(s[name] for s in each) for name in each[0]}


def converse(world, problems, tokenizer, respond, seed):
    """Play all conversations of a world at once; respond(conversations) -> one response (ids) for each."""
    conversations = [Conversation(p, tokenizer) for p in problems]
    rng = [RNG(seed_of(seed, i)) for i in range(len(problems))]     # one per student: whom they meet does not matter
    for _ in range(world.turns):
        for i, response in enumerate(respond(conversations)):
            conversations[i].answer(response, world, tokenizer, rng[i])
    return conversations


def plain_responder(model, world, weights, temperature, generator, samples=1, progress=None):
    """A function for converse: unguided samples of a policy. Of several samples the majority's answer counts, as in
    self-consistency (Wang et al. 2022, arXiv 2203.11171)."""
    def respond(conversations):
        answers = generate(model, [c.ids for c in conversations], weights=weights, max_new_tokens=world.max_new_tokens,
                           temperature=temperature, generator=generator, samples=samples, progress=progress)
        out = []
        for i, c in enumerate(conversations):
            tried = answers[i * samples:(i + 1) * samples]
            c.drawn += sum(map(len, tried))
            out.append(tried[majority([model.tokenizer.decode(r) for r in tried])] if samples > 1 else tried[0])
        return out
    return respond


def guided_responder(model, prm, world, weights, guide, temperature, generator, K=5, boundary=None, batch=256):
    """Like plain_responder, guided; both caches go on from turn to turn, one state per batch of conversations. boundary: where
    a step ends, default the world's; with "turn" a candidate is a whole answer."""
    states = {}

    def respond(conversations):
        out = []
        for start in range(0, len(conversations), batch):
            part = conversations[start:start + batch]
            results = guided_decode(model, prm, [c.new_ids for c in part], boundary=boundary or world.boundary, K=K,
                                    weights=weights, guide=guide, max_new_tokens=world.max_new_tokens, temperature=temperature,
                                    generator=generator, state=states.get(start))
            states[start] = results[0].state if world.turns > 1 else None
            for c, result in zip(part, results):
                c.drawn += sum(len(ids) for step in result.steps for ids in step.candidates)
            out += [r.ids for r in results]
        return out
    return respond


def summary(values):
    """list of numbers -> {"mean", "stderr", "n"}; the standard error of the mean."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "stderr": spread, "n": len(values)}


@functools.cache
def student_t(df, level=0.95):
    """The t for which Student's t with df degrees of freedom lies in (-t, t) with probability `level`. Put t = sqrt(df) tan(a):
    the density of the angle a is proportional to cos(a)^(df - 1)."""
    a = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(a.cos() ** (df - 1), a)
    return math.sqrt(df) * math.tan(a[1 + int(torch.searchsorted(mass, level * mass[-1]))])


def half_width(metric):
    """A summary -> half its 95 % interval (or of another "level"); of one value nothing is known."""
    return student_t(metric["n"] - 1, metric.get("level", 0.95)) * metric["stderr"] if metric["n"] > 1 else math.inf


def jackknife(statistic, columns):
    """A statistic of the means of columns (lists of n values, item i of all columns being one unit) -> n pseudo-values: their
    mean is the statistic, and their interval is its interval (the jackknife, Tukey 1958)."""
    n, sums = len(columns[0]), [math.fsum(c) for c in columns]
    whole = statistic([s / n for s in sums])
    if n == 1:
        return [whole]
    rest = [statistic([(s - c[i]) / (n - 1) for s, c in zip(sums, columns)]) for i in range(n)]
    return [whole + (n - 1) * (statistics.fmean(rest) - r) for r in rest]


LOGITS = 2**28       # at once, a gigabyte in float32: the KL needs five such tensors


@torch.no_grad()
def kl_to_sft(model, head, reference, conversations, pad_id):
    """KL(pi || pi_sft) of the next-token distributions (all tokens, temperature 1), in nats: exact at every position of
    the policy's own samples (drawn at the run's temperature). -> per conversation its mean per token, and its sum over an
    answer's tokens; both averaged over the turns."""
    rows = [(before, response) for c in conversations for before, _, response in c.turns]
    sums = [0.0] * len(rows)
    for index in batches_by_length([len(a) + len(b) for a, b in rows]):
        part = [rows[i] for i in index]
        ids, lengths = pad([a + b for a, b in part], pad_id, head.device)
        mask = response_mask(torch.tensor([len(a) for a, _ in part], device=head.device), lengths, ids.shape[1])
        r, t = mask[:, 1:].nonzero(as_tuple=True)
        kl, some = [], max(1, LOGITS // len(head))            # positions at a time
        for h, h_ref in zip(model(ids)[r, t].split(some), reference(ids)[r, t].split(some)):
            log_pi = F.log_softmax(linear(h, head).float(), -1)
            log_ref = F.log_softmax(reference.logits(h_ref).float(), -1)
            kl.append((log_pi.exp() * (log_pi - log_ref)).sum(-1))
        for i, value in zip(index, torch.zeros(len(part), device=head.device).index_add(0, r, torch.cat(kl)).tolist()):
            sums[i] = value
    turns, means = len(rows) // len(conversations), [s / len(response) for s, (_, response) in zip(sums, rows)]
    return [[statistics.fmean(values[i:i + turns]) for i in range(0, len(rows), turns)] for values in (means, sums)]


# -- policies and rows

def average(models, weights=None):
    """The DPO soup of single-objective policies, uniform if not said otherwise, as a model. Of one policy: itself."""
    if len(models) == 1:
        return models[0]
    state = soup([m.state_dict() for m in models], weights or [1.0] * len(models))
    return GPT.from_state(models[0].config, state, models[0].tokenizer).eval()


class Job(NamedTuple):
    """How a row of the tables is made."""
    policy: str
    models: dict                    # {name of a model of the run: its weight}; several make a soup
    weights: tuple = (1.0,)         # mix of heads
    guide: str = None
    temperature: float = None       # None: the run's own
    samples: int = 1                # of which the majority's answer counts
    boundary: str = None            # of guidance; None: the world's own
    sweep: tuple = None             # the two objectives whose weights are swept


class Bench:
    """The models of one run directory, and the measuring of one row of the table."""

    def __init__(self, run, device=None):
        self.run, self.config = run, read_run(run)
        self.objectives, self.seed = [o.name for o in self.config["objectives"]], self.config["seed"]
        self.device, self.loaded, self.guides, self.known = pick_device(device or self.config["device"]), {}, {}, {}
        self.dtype = sampling_dtype(self.config["dtype"], self.device)
        self.sft = self.model("sft")
        self.tokenizer = self.sft.tokenizer
        self.worlds = worlds_of(self.objectives, self.config["data"], self.config["max_new_tokens"], self.sft)

    def model(self, name, device=None):
        """A model of the run, on the run's device if not said otherwise."""
        key = name, device or self.device
        if key not in self.loaded:
            sft = self.loaded.get(("sft", self.device))
            if sft and sum(p.numel() for p in sft.parameters()) > 1e9:      # beside a large model only SFT stays, for the KL
                self.loaded = {k: m for k, m in self.loaded.items() if k[0] == "sft" or k[1] != key[1]}
            self.loaded[key] = load_hf(os.path.join(self.run, name), dtype=self.dtype, place=lambda t: t.to(key[1])).eval()
        return self.loaded[key]

    def parts(self, job):
        """The models of a row; those of a soup in main memory, where there is room for all of them."""
        return [self.model(name, None if len(job.models) == 1 else "cpu") for name in job.models]

    def prm(self, guide):
        """The PRM that holds the output `guide`: that objective's own if there is one, else the unified one."""
        name = guide if os.path.isdir(os.path.join(self.run, f"prm_{guide}")) else "unified"
        if name not in self.guides:
            self.guides = {name: find_prm(self.run, name, self.dtype).to(self.device).eval()}
        return self.guides[name]

    def problems(self, domain, n):
        """The prompts of a domain's tables: of the split that the configuration names."""
        split = self.config["split"]
        return self.worlds[domain].problems(split, n, RNG(seed_of(self.seed, split, domain)))

    def rollout(self, domain, job, problems):
        """The conversations of a row's policy about these problems -> conversations, the model."""
        world, model = self.worlds[domain], average(self.parts(job), list(job.models.values())).to(self.device)
        temperature = self.config["temperature"] if job.temperature is None else job.temperature
        generator = torch.Generator().manual_seed(seed_of(self.seed, "draws", domain))
        if job.guide is None:
            respond = plain_responder(model, world, job.weights, temperature, generator, job.samples)
        else:
            respond = guided_responder(model, self.prm(job.guide), world, job.weights, job.guide, temperature, generator,
                                       self.config["k"], job.boundary)
        return converse(world, problems, self.tokenizer, respond, seed_of(self.seed, "student", domain)), model

    def measure(self, domain, job):
        """-> {metric: its values, one per prompt}: noise-free scores, the answers' length, the tokens drawn, the KL."""
        conversations, model = self.rollout(domain, job, self.problems(domain, self.config["n_test"]))
        scores = [c.scores(self.worlds[domain], self.tokenizer) for c in conversations]
        each = {name: [s[name] for s in scores] for name in scores[0]}
        each["tokens"] = [sum(len(r) for *_, r in c.turns) / len(c.turns) for c in conversations]
        each["drawn"] = [c.drawn / len(c.turns) for c in conversations]
        if (job.guide, job.temperature, job.samples) == (None, None, 1):
            each["kl"], each["kl/answer"] = kl_to_sft(model, model.fold(job.weights), self.sft, conversations,
                                                      self.tokenizer.pad_id)
        return {name: [round(v, 4) for v in values] for name, values in each.items()}

    def row(self, domain, job):
        """An entry of results.json, and under "each" the values behind its means. Rows that are made alike are made once."""
        total, heads = sum(job.weights), self.parts(job)[0].config.objectives
        share = [w / total for w in job.weights]
        key = repr((domain, sorted(job.models.items()), share, job.guide, job.temperature, job.samples, job.boundary))
        if key not in self.known:
            self.known[key] = self.measure(domain, job)
        each = self.known[key]
        shown = dict(zip(heads, share)) if job.policy != "soup" else {n.removeprefix("dpo_"): w for n, w in job.models.items()}
        row = {"policy": job.policy, "weights": shown, "guide": job.guide, "domain": domain, "seed": self.seed,
               "metrics": {name: summary(values) for name, values in each.items()}, "each": each}
        return row | ({"sweep": list(job.sweep)} if job.sweep else {})

    def jobs(self, domain):
        """All rows of one domain's table."""
        names, heads = domain_objectives(domain, self.objectives), self.model("mah_dpo").config.objectives
        checked = [n for n in names if OBJECTIVES[n].case == "verifiable"]
        sft, mah_dpo = Job("sft", {"sft": 1.0}), Job("mah_dpo", {"mah_dpo": 1.0}, tuple(domain_mix(heads, domain, self.config["objectives"])))

        def unguided(job):
            yield job
            yield job._replace(policy=f"{job.policy}_greedy", temperature=0.0)
            if checked:
                yield job._replace(policy=f"{job.policy}_vote", samples=self.config["k"])

        yield Job("base", {"base": 1.0})
        yield from unguided(sft)
        yield from (Job(name, {name: 1.0}) for name in ("single_head_dpo", "modpo"))
        yield Job("soup", {f"dpo_{n}": 1 / len(names) for n in names})
        yield from unguided(mah_dpo)
        for name in names:
            yield Job(f"mah_dpo:{name}", {"mah_dpo": 1.0}, tuple(float(name == h) for h in heads))
        for job in (sft, mah_dpo):
            for guide in [*names, *(["unified"] if self.config["prm"] == "unified" else [])]:
                yield job._replace(guide=guide)
            for name in checked:                          # whole answers instead of steps: best-of-K as usual
                yield job._replace(policy=f"{job.policy}_rerank", guide=name, boundary="turn")

    def sweep(self, domain):
        """Mixes of every two of the domain's heads, from one to the other, and such soups of their policies."""
        names = [o for o in self.objectives if o in self.worlds[domain].objectives]
        heads, steps = self.model("mah_dpo").config.objectives, self.config["weight_steps"]
        for pair in itertools.combinations(names, 2):
            for share in [dict(zip(pair, ((steps - i) / steps, i / steps))) for i in range(steps + 1 if steps else 0)]:
                yield Job("mah_dpo", {"mah_dpo": 1.0}, tuple(share.get(h, 0.0) for h in heads), sweep=pair)
                yield Job("soup", {f"dpo_{n}": w for n, w in share.items() if w}, sweep=pair)


# -- preference pairs

def own_logps(model, pairs, progress=None):
    """Log-probabilities (N, 2) as by pair_logps, each pair under its objective's head, or else under the first."""
    own = model.config.objectives
    return pair_logps(model, pairs, lambda o: own.index(o) if o in own else 0, model.tokenizer.pad_id, progress)


def pair_metrics_rows(policy, logps, reference, pairs, beta, seed):
    """Held-out metrics of one policy per objective. loss, margin, reward_accuracy compare with the reference;
    logp_accuracy asks whether the policy itself finds chosen likelier than rejected."""
    delta = log_ratio_margin(logps[:, 0], logps[:, 1], reference[:, 0], reference[:, 1])
    loss = dpo_loss(logps[:, 0], logps[:, 1], reference[:, 0], reference[:, 1], beta)
    rows = []
    for name in dict.fromkeys(p.objective for p in pairs):
        i = [k for k, p in enumerate(pairs) if p.objective == name]
        metrics = {"loss": summary(loss[i].tolist()), "margin": summary((beta * delta[i]).tolist()),
                   "logp_accuracy": summary((logps[i, 0] > logps[i, 1]).float().tolist())}
        if bool(delta[i].any()):                          # the reference itself has no margin to be right about
            metrics["reward_accuracy"] = summary((delta[i] > 0).float().tolist())
        rows.append({"policy": policy, "weights": {name: 1.0}, "guide": None, "domain": f"pairs:{name}", "seed": seed,
                     "metrics": metrics})
    return rows


# -- the paper's findings

FINDINGS = {
    "F1": "the ensemble beats SFT, single-head DPO, MODPO and soup on subjective objectives and keeps accuracy",
    "F2": "each head alone beats base, SFT, the baselines, the ensemble and the other heads on its own objective",
    "F3": "verifiable accuracy gains most at test time, by value guidance",
    "F4": "training and guidance together beat either alone, on what is guided and on the mean of the domain's objectives",
    "F5": "sweeping the weights moves smoothly along the trade-off",
    "F6": "one unified PRM guides all domains as well as one PRM per objective",
    "rivals": "guidance beats greedy decoding and as many whole answers by vote or by PRM (not in the paper)"}
KEPT = 0.02      # "keeps", "smoothly" and "as well as" allow to lose less than this


def claims(names):
    """What the findings say of a domain's rows: (finding, objectives (their mean counts), row that is better, row that is
    worse, slack); a row is (policy, guide). F5 and F6 are in sweep_lines and scorecard."""
    heads = {n: (f"mah_dpo:{n}", None) for n in names}
    baselines = [(p, None) for p in ("sft", "single_head_dpo", "modpo", "soup")]
    unguided = [("base", None), *baselines, ("mah_dpo", None), *heads.values()]
    for n in names:
        yield from (("F1", [n], ("mah_dpo", None), b, 0 if OBJECTIVES[n].subjective else KEPT) for b in baselines)
    for n in names:
        yield from (("F2", [n], heads[n], other, 0) for other in unguided if other != heads[n])
    for n in [n for n in names if OBJECTIVES[n].case == "verifiable"]:
        for other in [*unguided[1:], *(("sft", m) for m in names if m != n)]:
            yield "F3", [n], ("sft", n), other, 0
    for n, policy in itertools.product(names, ("sft", "mah_dpo")):
        whole = [(f"{policy}_vote", None), (f"{policy}_rerank", n)] if OBJECTIVES[n].case == "verifiable" else []
        yield from (("rivals", [n], (policy, n), rival, 0) for rival in [(f"{policy}_greedy", None), *whole])
    for guide in [*names, "unified"]:
        counted = [[guide], names] if guide in names else [names]
        yield from (("F4", on, ("mah_dpo", guide), part, 0) for part in (("sft", guide), ("mah_dpo", None)) for on in counted)


def verdict(difference, slack=0.0):
    """Does a difference (a summary) show that something is better, or with slack: hardly worse?"""
    half = half_width(difference)
    return "holds" if difference["mean"] - half > -slack else \
        "does not hold" if difference["mean"] + half < 0 else "not significant"


def label(policy, guide):
    """A row's name: policy, or policy + guide."""
    return policy + (f" + {guide}" if guide else "")


def compare(finding, domain, names, better, worse, slack, rows, others):
    """A line of the scorecard: the row `better` of rows ({(policy, guide): row}) less the row `worse` of others, value by
    value, averaged over objectives. A row that was not measured gives "not run"."""
    a, b = rows.get(better), others.get(worse)
    line = {"finding": finding, "domain": domain, "objective": " + ".join(names), "metrics": {}, "verdict": "not run",
            "compared": f"{label(*better)} - {label(*worse)}"}
    if a is None or b is None:
        return line
    values = [statistics.fmean(x - y for x, y in zip(pairs[::2], pairs[1::2]))
              for pairs in zip(*(r["each"][n] for n in names for r in (a, b)), strict=True)]
    return line | {"metrics": {"difference": summary(values)}, "verdict": verdict(summary(values), slack)}


def sweep_lines(domain, pair, mixes):
    """F5 for one pair of heads: each objective's score against its weight, a straight line's slope; and of the steps from
    weight to weight the one that may lose most: its interval allows for having been picked among all (Bonferroni)."""
    for name in pair:
        rows = sorted((r for r in mixes if r["policy"] == "mah_dpo"), key=lambda r: r["weights"][name])
        w, scores = [r["weights"][name] for r in rows], [r["each"][name] for r in rows]
        spread = [x - statistics.fmean(w) for x in w]
        slope = summary([sum(d * v for d, v in zip(spread, unit)) / sum(d * d for d in spread) for unit in zip(*scores)])
        steps = [summary([y - x for x, y in zip(*two)]) | {"level": 1 - 0.05 / (len(w) - 1)} for two in zip(scores, scores[1:])]
        worst = min(steps, key=lambda s: s["mean"] - half_width(s))
        line = {"finding": "F5", "domain": domain, "objective": name}
        other = pair[1 - pair.index(name)]
        yield line | {"compared": f"slope along its weight, against {other}", "metrics": {"difference": slope},
                      "verdict": verdict(slope)}
        yield line | {"compared": f"worst of {len(steps)} steps, against {other}", "metrics": {"difference": worst},
                      "verdict": verdict(worst, KEPT)}


def scorecard(rows, objectives, separate=()):
    """Every comparison behind the findings, as lines (compare). separate: rows of the same run with one PRM per objective."""
    index = lambda found, domain: {(r["policy"], r["guide"]): r for r in found if r["domain"] == domain and "sweep" not in r}
    lines = []
    for domain in [d for d in DOMAINS if any(r["domain"] == d for r in rows)]:
        measured, own = index(rows, domain), index(separate, domain)
        names = [n for n in domain_objectives(domain, objectives) if n in measured["sft", None]["metrics"]]
        lines += [compare(finding, domain, *claim, measured, measured) for finding, *claim in claims(names)]
        for n, p in itertools.product(names, ("sft", "mah_dpo")):
            line = compare("F6", domain, [n], (p, n), (p, n), KEPT, measured, own)
            lines.append(line | {"compared": f"{label(p, n)} - guided by its own PRM"})
        mixes = [r for r in rows if r["domain"] == domain and "sweep" in r]
        for pair in dict.fromkeys(tuple(r["sweep"]) for r in mixes):
            lines += sweep_lines(domain, pair, [r for r in mixes if r["sweep"] == list(pair)])
    return lines


def verdicts(lines):
    """Lines of one finding and domain -> one cell: all must hold, and one that fails fails the whole."""
    found = [line["verdict"] for line in lines if line["verdict"] != "not run"]
    if not found:
        return "not run" if lines else "-"
    whole = next((v for v in ("does not hold", "not significant") if v in found), "holds")
    return f"{whole} ({found.count('holds')}/{len(found)})" + (", part not run" if len(found) < len(lines) else "")


def findings_table(lines):
    """The scorecard: findings by domain."""
    part = lambda finding, domain: [x for x in lines if (x["finding"], x["domain"]) == (finding, domain)]
    return table("findings (comparisons that hold / comparisons made)", {"": str, "finding": FINDINGS.get} | {
        d: lambda f, d=d: verdicts(part(f, d)) for d in dict.fromkeys(x["domain"] for x in lines)}, FINDINGS, [])


# -- output

COSTS = ["tokens", "drawn", "kl", "kl/answer"]           # columns beside the objectives


def cell(metric):
    """mean ± half the 95 % interval, or a dash where the row has no such metric."""
    if metric is None:
        return "-"
    return f"{metric['mean']:.3f}" + (f" ±{half_width(metric):.3f}" if metric["n"] > 1 else "")


def table(title, first, rows, columns):
    """Rows of results -> an aligned Markdown table. first: {column title: function of a row} before the metrics."""
    head = [*first, *columns]
    lines = [[*(show(r) for show in first.values()), *(cell(r["metrics"].get(c)) for c in columns)] for r in rows]
    width = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    draw = lambda line: "| " + " | ".join(text.ljust(w) for text, w in zip(line, width)) + " |"
    rule = "|" + "|".join("-" * (w + 2) for w in width) + "|"
    return "\n".join([f"### {title}", "", draw(head), rule, *map(draw, lines), ""])


def show(*keys):
    """The first columns of a table that show a row's entries as they are."""
    return {key: lambda r, key=key: r[key] or "-" for key in keys}


# --- exercise 15: hypervolume (3 points) ---
def hypervolume(points, reference=(0.0, 0.0)):
    """The area that a front covers: of all that is better than the reference in both coordinates, what lies below and to the
    left of some point. points: (x, y) of each policy, both to be large; a point that is worse than the reference in one of
    them covers nothing. -> a number"""
    area, height = 0.0, reference[1]
    for x, y in sorted(points, reverse=True):
        area += max(0.0, x - reference[0]) * max(0.0, y - height)
        height = max(height, y)
    return area
# --- end of exercise 15 ---


def fronts(plain, mixes):
    """{method: its rows} from a domain's rows and the sweeps of a pair. A method has one point or many: the table tells."""
    of = lambda policy: [r for r in plain if r["policy"] == policy]
    swept = {f"{p}, swept": [r for r in mixes if r["policy"] == p] for p in ("mah_dpo", "soup")}
    alone = {p: [r for r in of(p) if r["guide"] is None] for p in ("sft", "single_head_dpo", "modpo")}
    return alone | swept | {f"{p}, guided": of(p) for p in ("sft", "mah_dpo")}


def area(objectives, method, rows, pair):
    """A row of the table of hypervolumes; the reference is (0, 0), the worst of all scores."""
    columns = [r["each"][n] for r in rows for n in pair]
    found = summary(jackknife(lambda means: hypervolume(zip(means[::2], means[1::2])), columns))
    return {"objectives": objectives, "method": method, "points": str(len(rows)), "metrics": {"hypervolume": found}}


def sweep_tables(name, variants, names):
    """Tables by domain of one swept field: the rows of every value, {value: rows}; one that reads the same for all stands once."""
    for domain in [d for d in DOMAINS if any(r["domain"] == d for rows in variants.values() for r in rows)]:
        found = {}
        for value, rows in variants.items():
            for r in rows:
                if r["domain"] == domain and "sweep" not in r:
                    found.setdefault((r["policy"], r["guide"]), {})[value] = r
        lines = []
        for same in found.values():
            alike = len(same) == len(variants) and len({tuple(map(cell, r["metrics"].values())) for r in same.values()}) == 1
            lines += [{"value": "any" if alike else str(v)} | r for v, r in list(same.items())[:1 if alike else None]]
        yield table(f"{domain}, by {name}", {name: lambda r: r["value"]} | show("policy", "guide"), lines,
                    [*domain_objectives(domain, names), *COSTS])


def report(rows, config, variants):
    """All tables as Markdown text: (what is printed, the details that only results.md has). variants: {swept field: {value:
    rows}}."""
    seeds = [config["seed"] + i for i in range(config["seeds"])]
    over = f"{len(seeds)} trainings, seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"Seed {seeds[0]}"
    parts = [f"Objectives: {', '.join(config['objectives'])}. {over}. Sampling temperature {config['temperature']}, beta "
             f"{config['beta']}, {config['k']} candidates. Mean ± half the 95 % interval over "
             f"{'trainings' if len(seeds) > 1 else 'prompts'}.\n"]
    separate = variants.get("prm", {}).get("each", []) if config["prm"] == "unified" else []
    lines, details = scorecard(rows, config["objectives"], separate), []
    if lines:
        parts.append(findings_table(lines))
    for domain in [d for d in DOMAINS if any(r["domain"] == d for r in rows)]:
        measured, names = [r for r in rows if r["domain"] == domain], domain_objectives(domain, config["objectives"])
        plain, areas = [r for r in measured if "sweep" not in r], []
        parts.append(table(f"{domain}, {plain[0]['n']} {config['split']} prompts", show("policy", "guide"), plain,
                           [*names, *COSTS]))
        for pair in itertools.combinations(names, 2):
            mixes = sorted((r for r in measured if r.get("sweep") == list(pair)), key=lambda r: r["policy"])
            if mixes:
                weight = {f"w {n}": lambda r, n=n: f"{r['weights'].get(n, 0):.1f}" for n in pair}
                details.append(table(f"{domain}, a sweep of weights", show("policy") | weight, mixes,
                                     [*names, "kl", "kl/answer"]))
                areas += [area(f"{' and '.join(pair)}", *front, pair) for front in fronts(plain, mixes).items()]
        if areas:
            parts.append(table(f"{domain}, the area below each method's front", show("objectives", "method", "points"), areas,
                               ["hypervolume"]))
    pairs = [r for r in rows if r["domain"].startswith("pairs:")]
    if pairs:
        objective = {"held-out pairs": lambda r: f"{r['domain'][6:]} ({r['n']})"}
        parts.append(table("preference pairs held out from training", objective | show("policy"), pairs,
                           ["loss", "margin", "reward_accuracy", "logp_accuracy"]))
    for name, values in variants.items():
        parts += sweep_tables(name, values, config["objectives"])
    if lines:
        details.append(table(f"every comparison; F1's accuracies, F5's worst step and all of F6 may lose less than {KEPT}",
                             show("finding", "domain", "objective", "compared", "verdict"),
                             sorted(lines, key=lambda x: list(FINDINGS).index(x["finding"])), ["difference"]))
    return "\n".join(parts), "\n".join(details)


# The picture: every kind of row has one colour on a light page and one on a dark page.
COLOURS = {"mah_dpo": ("#087", "#3db"), "soup": ("#84a", "#c9e"), "plain": ("#05b", "#6bf"), "guided": ("#b40", "#f93")}
paint = lambda dark: "".join(f".{kind}{{stroke:{c[dark]};fill:{c[dark]}}}" for kind, c in COLOURS.items())
STYLE = ("svg{background:#fff}text{font:11px sans-serif;fill:#222}.axis{stroke:#888;fill:none}.lead{stroke:#888;stroke-width:.5}"
         ".label{font-size:9px;paint-order:stroke;stroke:#fff;stroke-width:2px}"
         f"{paint(0)}polyline{{fill:none!important;stroke-width:1.5}}.bar{{stroke-width:.6;opacity:.6}}"
         f"@media(prefers-color-scheme:dark){{svg{{background:#111}}text{{fill:#ddd}}.label{{stroke:#111}}{paint(1)}}}")
WIDE, HIGH, LEFT, TOP, RIGHT, BOTTOM = 560, 460, 60, 30, 545, 400           # a panel, and the plot in it


def pareto_svg(rows):
    """One panel per pair of a domain's objectives, two in a line: the sweeps of MAH-DPO and of the soup as lines, every other
    row as a labelled point, intervals as thin bars."""
    panels = list(dict.fromkeys((r["domain"], *r["sweep"]) for r in rows if "sweep" in r))
    place = lambda i: f'<g transform="translate({WIDE * (i % 2)} {HIGH * (i // 2)})">'
    drawn = [place(i) + panel(rows, domain, pair) + "</g>" for i, (domain, *pair) in enumerate(panels)]
    size = f"{WIDE * min(2, max(1, len(panels)))} {HIGH * max(1, (len(panels) + 1) // 2)}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{STYLE}</style>{"".join(drawn)}</svg>\n'


def panel(rows, domain, pair):
    """One panel: axes, sweeps, points and their bars, labels."""
    rows, scales, ticks = [r for r in rows if r["domain"] == domain and r.get("sweep", pair) == pair], [], []
    spans = [[(m["mean"] - half, m["mean"], m["mean"] + half) for m in (r["metrics"][n] for r in rows)
              for half in [half_width(m) if m["n"] > 1 else 0.0]] for n in pair]
    for ends, a, b in zip(spans, (LEFT, BOTTOM), (RIGHT, TOP)):
        low = math.floor(10 * max(0.0, min(e[0] for e in ends)))                                # in tenths
        high = max(low + 1, math.ceil(10 * min(1.0, max(e[2] for e in ends))))
        scales.append(lambda v, a=a, b=b, low=low, high=high: a + (b - a) * (min(max(10 * v, low), high) - low) / (high - low))
        ticks.append([t / 10 for t in range(low, high + 1)])
    X, Y = scales
    out = [f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" class="axis"/>',
           f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 36}" text-anchor="middle">{pair[0]}</text>',
           f'<text transform="translate(14 {(TOP + BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{pair[1]}</text>']
    out += [f'<text x="{X(v):.0f}" y="{BOTTOM + 16}" text-anchor="middle">{v:.1f}</text>' for v in ticks[0]]
    out += [f'<text x="{LEFT - 6}" y="{Y(v) + 4:.0f}" text-anchor="end">{v:.1f}</text>' for v in ticks[1]]
    marks, taken, lines = [], [], {"mah_dpo": [], "soup": []}
    for r, *ends in zip(rows, *spans):
        (x0, x, x1), (y0, y, y1) = map(X, ends[0]), map(Y, ends[1])
        kind = r["policy"] if "sweep" in r else "guided" if r["guide"] else "plain"
        text = label(r["policy"], r["guide"])
        out.append(f'<path class="bar {kind}" d="M{x0:.1f} {y:.1f}H{x1:.1f}M{x:.1f} {y0:.1f}V{y1:.1f}"/>'
                   f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{2 if "sweep" in r else 3.5}">'
                   f'<title>{text}: {ends[0][1]:.3f}, {ends[1][1]:.3f}</title></circle>')
        taken.append((x - 4, y - 4, x + 4, y + 4))
        if "sweep" in r:
            lines[r["policy"]].append((x, y))
        else:
            marks.append((x, y, text))
    for policy, line in lines.items():
        marks.append((*line[len(line) // 3], f"{policy}, swept"))
        out.append(f'<polyline class="{policy}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in line)}"/>')
    return "".join(out + [put_label(*mark, taken) for mark in marks])


def put_label(x, y, text, taken):
    """A label in the free place nearest to its point, with a line to it where that is not beside it; taken: boxes (left, top,
    right, bottom) to stay clear of, to which it adds its own."""
    w, h = 5.4 * len(text), 11
    away = lambda box: math.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3]))
    spots = [(x + dx - w / 2, y + dy - h / 2, x + dx + w / 2, y + dy + h / 2)
             for dx in range(-240, 241, 6) for dy in range(-200, 201, 5)]
    inside = [b for b in spots if LEFT < b[0] and b[2] < RIGHT and TOP - 15 < b[1] and b[3] < BOTTOM]
    free = lambda b: all(b[0] >= t[2] or b[2] <= t[0] or b[1] >= t[3] or b[3] <= t[1] for t in taken)
    box = next((b for b in sorted(inside, key=away) if free(b)), None)
    if box is None:                      # no room left: the point's tooltip still names it
        return ""
    taken.append(box)
    near = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    lead = f'<path class="lead" d="M{x:.1f} {y:.1f}L{near[0]:.1f} {near[1]:.1f}"/>' if away(box) > 6 else ""
    return lead + f'<text class="label" x="{box[0]:.1f}" y="{box[3] - 2.5:.1f}">{text}</text>'


def evaluate(run, pair_rows, device=None):
    """Measure every row of a run of one seed, then publish. device: default the run's own."""
    bench = Bench(run, device)
    jobs = [(d, job) for d in bench.worlds for job in bench.jobs(d)] + [(d, job) for d in bench.worlds for job in bench.sweep(d)]
    measured = [(i, bench.row(*jobs[i])) for i in tqdm(local_items(range(len(jobs))), desc="tables", unit="row", disable=None)]
    rows = [row for _, row in sorted(gather(measured), key=lambda pair: pair[0])] + pair_rows
    lines = [json.dumps({k: r[k] for k in ("domain", "policy", "guide", "weights", "each")}, separators=(",", ":"))
             for r in rows if "each" in r]
    write_text(os.path.join(run, "scores.jsonl"), "\n".join(lines) + "\n" if lines else "")
    publish(run, rows)


def publish(run, rows):
    """Print the tables of these rows and of the run's variants, write results.md, pareto.svg and, last, results.json."""
    config, variants = read_run(run), {}
    config["objectives"] = [o.name for o in config["objectives"]]
    rows = [{"n": next(iter(r["metrics"].values()))["n"]} | r for r in rows]
    for name, paths in find_variants(run).items():
        variants[name] = {v: load_rows(path) for v, path in paths.items() if os.path.exists(os.path.join(path, "results.json"))}
        variants[name] = dict(sorted(({config[name]: rows} | variants[name]).items()))
    text, details = report(rows, config, variants)
    write_text(os.path.join(run, "results.md"), f"{text}\n{details}")
    write_text(os.path.join(run, "pareto.svg"), pareto_svg(rows))
    kept = [{k: v for k, v in r.items() if k not in ("n", "each")} for r in rows]
    write_json(os.path.join(run, "results.json"), kept)                                   # last: it says "done"
    print(f"\n{text}\nThe sweeps of weights and every comparison behind the findings: {os.path.join(run, 'results.md')}")


def seed_runs(run):
    """The directories of a run's trainings, one per seed; the run itself if it has one seed."""
    config = read_run(run)
    seeds = range(config["seed"], config["seed"] + config["seeds"])
    return [os.path.join(run, f"seed={s}") for s in seeds] if len(seeds) > 1 else [run]


def find_variants(run):
    """What train.py --sweep put into a run's directory: {field: {value: directory}}."""
    found = {}
    for name in sorted(os.listdir(run)):
        field, path = name.partition("=")[0], os.path.join(run, name)
        if "=" in name and field != "seed" and os.path.isfile(os.path.join(path, "config.json")):
            found.setdefault(field, {})[read_run(path)[field]] = path
    return {field: dict(sorted(values.items())) for field, values in found.items()}


def load_rows(run):
    """The rows of a finished run as `publish` takes them. "each" holds the values that intervals are made of: one per prompt,
    or with several seeds one per training, its mean, of the rows that all trainings have."""
    results = [read_json(os.path.join(r, "results.json")) for r in seed_runs(run)]
    if len(results) == 1:
        each = [row["each"] for _, row in read_jsonl(os.path.join(run, "scores.jsonl"))]
        return [row | ({"each": each[i]} if i < len(each) else {}) for i, row in enumerate(results[0])]
    rows, found = [], {}
    for row in itertools.chain(*results):      # not by their places: held-out pairs come as the samples of a training had them
        found.setdefault(repr([row.get(k) for k in ("policy", "guide", "domain", "weights", "sweep")]), []).append(row)
    for same in (s for s in found.values() if len(s) == len(results)):
        each = {m: [r["metrics"][m]["mean"] for r in same] for m in same[0]["metrics"] if all(m in r["metrics"] for r in same)}
        n = round(statistics.fmean(next(iter(r["metrics"].values()))["n"] for r in same))
        rows.append(same[0] | {"each": each, "metrics": {m: summary(values) for m, values in each.items()},
                               "seed": [r["seed"] for r in same], "n": n})
    return rows


# -- responses to read

def show_samples(run, n, device=None):
    """Print the responses of every row's policy to the same n prompts of each domain, with their noise-free scores, in 100
    columns; > marks the user's words. Of a run with several seeds the first training answers."""
    bench = Bench(seed_runs(run)[0], device)
    fold = lambda text, margin: print("\n".join(textwrap.fill(line, 100, initial_indent=margin, subsequent_indent=margin)
                                                for line in text.splitlines()))
    for domain, world in bench.worlds.items():
        problems, jobs = bench.problems(domain, n), list(bench.jobs(domain))
        played = [bench.rollout(domain, job, problems)[0] for job in tqdm(jobs, desc=domain, unit="policy", disable=None)]
        for i, problem in enumerate(problems):
            print(f"=== {domain}, {bench.config['split']} prompt {i + 1}")
            for m in problem.messages():
                fold(m["content"], "> ")
            for job, c in zip(jobs, (conversations[i] for conversations in played)):
                scores = "".join(f"  {name} {value:.2f}" for name, value in c.scores(world, bench.tokenizer).items())
                print(f"\n{label(job.policy, job.guide):<38}{scores}")
                for t, (_, before, ids) in enumerate(c.turns):
                    if t:
                        fold(before[-1]["content"], "  > ")
                    fold(bench.tokenizer.decode(ids) + ("" if ids[-1] == bench.tokenizer.eos_id else " [cut off]"), "    ")
            print()


def main(argv=None):
    """The command line: measure a finished run again, or show its responses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run directory written by train.py")
    parser.add_argument("--device", help="auto, cpu, cuda or mps (default: the run's own)")
    parser.add_argument("--samples", type=int, metavar="N", help="print every policy's responses to N prompts of each domain")
    args = parser.parse_args(argv)
    join_processes()
    if not os.path.isfile(os.path.join(args.run, "results.json")):
        raise InputError(f"{args.run}: not a finished run (no results.json); finish it with train.py --resume {args.run}")
    if args.samples is not None:
        return show_samples(args.run, args.samples, args.device)
    runs = seed_runs(args.run)
    for run in runs:
        old = read_json(os.path.join(run, "results.json"))
        evaluate(run, [r for r in old if r["domain"].startswith("pairs:")], args.device)
    if runs != [args.run]:
        publish(args.run, load_rows(args.run))


if __name__ == "__main__":
    run_command(main)
