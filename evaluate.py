"""evaluate.py: what each stage bought, measured on test prompts. Before: decode.py; next: train.py.

    python evaluate.py RUN            measure every policy of a run directory again and rewrite its tables
    python evaluate.py DIR --timing   what guided decoding costs with the model in DIR: re-encoding, cached, and as done here

A row is a policy (base, sft, sft_greedy, the baselines, mah_dpo, each head alone), a mix of heads, and perhaps a guide;
a column is an objective's noise-free score, averaged over test prompts that no stage has seen, with half its 95 % interval:
over the prompts, or over the trainings of a run with several seeds. All rows see the same prompts and (in tutoring) simulated
students, and start from the same random seed: differences are paired. KL is the policy's distance from SFT in nats per token
on its own samples: methods should be compared at equal distance. Results go to results.json, results.md and pareto.svg.
"""
import argparse
import copy
import functools
import math
import os
import statistics
import time
import zlib

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (DOMAINS, Dice, InputError, batches_by_length, domain_objectives, pad, read_json, response_mask,
                  run_command, worlds_of, write_json, write_text)
from decode import domain_mix, draw, find_prm, generate, guided_decode, ingest, read_run, score_candidates
from mah_dpo import dpo_loss, log_ratio_margin, soup
from model import load_hf, pick_device
from prm import PRM, load_prm


def seed_of(seed, *what):
    """A seed for one purpose: a function of the run's seed and the purpose alone, so that stages do not interfere."""
    return zlib.crc32(repr((seed, *what)).encode())


class Conversation:
    """One dialogue under way: messages for the judges, ids for the model (text never becomes ids again)."""

    def __init__(self, problem, tokenizer):
        self.problem, self.messages = problem, problem.messages()
        self.ids = self.new_ids = tokenizer.encode_chat(self.messages)
        self.turns = []                    # (ids before, messages before, response ids) of every assistant turn

    def answer(self, response, world, tokenizer, dice):
        """Record the assistant's response and play the user's reply, if there is one."""
        text = tokenizer.decode(response)
        self.turns.append((self.ids, list(self.messages), response))
        self.messages.append({"role": "assistant", "content": text})
        reply = world.reply(self.problem, self.messages, dice)
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
    dice = [Dice(seed_of(seed, i)) for i in range(len(problems))]     # one per student: whom they meet does not matter
    for _ in range(world.turns):
        for i, response in enumerate(respond(conversations)):
            conversations[i].answer(response, world, tokenizer, dice[i])
    return conversations


def plain_responder(model, world, weights, temperature, generator, progress=None):
    """A function for converse: unguided samples of a policy."""
    return lambda cs: generate(model, [c.ids for c in cs], weights=weights, max_new_tokens=world.max_new_tokens,
                               temperature=temperature, generator=generator, progress=progress)


def guided_responder(model, prm, world, weights, guide, temperature, generator, K=5, batch=256):
    """Like plain_responder, guided; both caches go on from turn to turn, one state per batch of conversations."""
    states = {}

    def respond(conversations):
        out = []
        for start in range(0, len(conversations), batch):
            part = conversations[start:start + batch]
            results = guided_decode(model, prm, [c.new_ids for c in part], boundary=world.boundary, K=K, weights=weights,
                                    guide=guide, max_new_tokens=world.max_new_tokens, temperature=temperature,
                                    generator=generator, state=states.get(start))
            states[start] = results[0].state if world.turns > 1 else None
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


def half_width(metric, level=0.95):
    """A summary -> half the interval in which its mean lies with probability `level`; one value says nothing of it."""
    return student_t(metric["n"] - 1, level) * metric["stderr"] if metric["n"] > 1 else math.inf


@torch.no_grad()
def kl_per_token(model, head, reference, conversations, pad_id):
    """KL(pi || pi_sft) of the next-token distributions (all tokens, temperature 1), in nats: exact at every position of
    the policy's own samples (drawn at the run's temperature), averaged over each response, then each conversation."""
    rows = [(before, response) for c in conversations for before, _, response in c.turns]
    found = [0.0] * len(rows)
    for index in batches_by_length([len(a) + len(b) for a, b in rows]):
        part = [rows[i] for i in index]
        ids, lengths = pad([a + b for a, b in part], pad_id, head.device)
        mask = response_mask(torch.tensor([len(a) for a, _ in part], device=head.device), lengths, ids.shape[1])
        r, t = mask[:, 1:].nonzero(as_tuple=True)
        log_pi = F.log_softmax(F.linear(model(ids)[r, t], head).float(), -1)
        log_ref = F.log_softmax(reference.logits(reference(ids)[r, t]).float(), -1)
        kl = (log_pi.exp() * (log_pi - log_ref)).sum(-1)                                  # (N,)
        mean = torch.zeros(len(part), device=head.device).index_add(0, r, kl) / mask.sum(1)
        for i, value in zip(index, mean.tolist()):
            found[i] = value
    turns = len(found) // len(conversations)
    return summary([statistics.fmean(found[i:i + turns]) for i in range(0, len(found), turns)])


# -- policies and rows

def average(models):
    """The uniform DPO soup of single-objective policies, as a model."""
    mixed = models[0].with_heads(models[0].config.objectives)
    mixed.load_state_dict(soup([m.state_dict() for m in models], [1.0] * len(models)))
    return mixed.eval()


class Bench:
    """The models of one run directory, and the measuring of one row of the table."""

    def __init__(self, run, device=None):
        self.run, self.config = run, read_run(run)
        self.objectives, self.seed = self.config["objectives"], self.config["seed"]
        self.device, self.loaded, self.guides = pick_device(device or self.config["device"]), {}, {}
        self.sft = self.model("sft")
        self.tokenizer = self.sft.tokenizer
        self.worlds = worlds_of(self.objectives, self.config["data"], self.config["max_new_tokens"], self.sft)

    def model(self, name):
        if name not in self.loaded:
            self.loaded[name] = load_hf(os.path.join(self.run, name)).to(self.device).eval()
        return self.loaded[name]

    def prm(self, guide):
        if guide not in self.guides:
            self.guides[guide] = find_prm(self.run, guide).to(self.device).eval()
        return self.guides[guide]

    def row(self, policy, model, domain, weights, guide=None, temperature=None):
        """Measure one row on the domain's test prompts -> an entry of results.json."""
        world = self.worlds[domain]
        temperature = self.config["temperature"] if temperature is None else temperature
        problems = world.problems("test", self.config["n_test"], Dice(seed_of(self.seed, "test", domain)))
        generator = torch.Generator().manual_seed(seed_of(self.seed, "draws", domain))
        if guide is None:
            respond = plain_responder(model, world, weights, temperature, generator)
        else:
            respond = guided_responder(model, self.prm(guide), world, weights, guide, temperature, generator)
        conversations = converse(world, problems, self.tokenizer, respond, seed_of(self.seed, "student", domain))
        each = [c.scores(world, self.tokenizer) for c in conversations]
        metrics = {n: summary([s[n] for s in each]) for n in each[0]}
        metrics["tokens"] = summary([sum(len(r) for *_, r in c.turns) / len(c.turns) for c in conversations])
        if guide is None and temperature:
            metrics["kl"] = kl_per_token(model, model.fold(weights), self.sft, conversations, self.tokenizer.pad_id)
        shown = {o: w / sum(weights) for o, w in zip(model.config.objectives, weights)}
        return {"policy": policy, "weights": shown, "guide": guide, "domain": domain, "metrics": metrics, "seed": self.seed}

    def jobs(self, domain):
        """All rows of one domain's table as (policy, model, weights, guide, temperature)."""
        names = domain_objectives(domain, self.objectives)
        one, mah = [1.0], self.model("mah_dpo")
        mix = domain_mix(mah.config.objectives, domain)
        yield from (("base", self.model("base"), one, None, None), ("sft", self.sft, one, None, None),
                    ("sft_greedy", self.sft, one, None, 0.0))
        for policy in ("single_head_dpo", "modpo"):
            yield policy, self.model(policy), one, None, None
        yield "soup", average([self.model(f"dpo_{n}") for n in names]), one, None, None
        yield "mah_dpo", mah, mix, None, None
        for name in names:
            yield f"mah_dpo:{name}", mah, [float(h == name) for h in mah.config.objectives], None, None
        for policy, model, weights in (("sft", self.sft, one), ("mah_dpo", mah, mix)):
            for guide in [*names, *(["unified"] if self.config["prm"] == "unified" else [])]:
                yield policy, model, weights, guide, None

    def sweep(self, domain):
        """Mixes of the domain's first two heads from one to the other: (1 - s, s)."""
        names, mah = [o for o in self.objectives if o in self.worlds[domain].objectives][:2], self.model("mah_dpo")
        for s in (0.0, 0.25, 0.5, 0.75, 1.0) if len(names) == 2 else ():
            weights = [0.0] * len(self.objectives)
            weights[self.objectives.index(names[0])], weights[self.objectives.index(names[1])] = 1 - s, s
            yield "mah_dpo", mah, weights, None, None


# -- preference pairs

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


# -- output

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


def report(rows, config):
    """All tables as Markdown text."""
    policy, guide = {"policy": lambda r: r["policy"]}, {"guide": lambda r: r["guide"] or "-"}
    results, sweeps = ([r for r in rows if bool(r.get("sweep")) == swept] for swept in (False, True))
    seeds = [config["seed"] + i for i in range(config["seeds"])]
    over = f"{len(seeds)} trainings, seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"Seed {seeds[0]}"
    parts = [f"Objectives: {', '.join(config['objectives'])}. {over}. Sampling temperature {config['temperature']}, beta "
             f"{config['beta']}. Mean ± half the 95 % interval over {'trainings' if len(seeds) > 1 else 'prompts'}.\n"]
    for domain in [d for d in DOMAINS if any(r["domain"] == d for r in results)]:
        rows, names = [r for r in results if r["domain"] == domain], domain_objectives(domain, config["objectives"])
        parts.append(table(f"{domain}, {rows[0]['n']} test prompts", policy | guide, rows, [*names, "tokens", "kl"]))
        mixes = [r for r in sweeps if r["domain"] == domain]
        if mixes:
            weight = {f"w {n}": lambda r, n=n: f"{r['weights'][n]:.2f}" for n in names[:2]}
            parts.append(table(f"{domain}, mah_dpo under a sweep of head weights", weight, mixes, [*names, "kl"]))
    rows = [r for r in results if r["domain"].startswith("pairs:")]
    if rows:
        objective = {"held-out pairs": lambda r: f"{r['domain'][6:]} ({r['n']})"}
        parts.append(table("preference pairs held out from training", objective | policy, rows,
                           ["loss", "margin", "reward_accuracy", "logp_accuracy"]))
    return "\n".join(parts)


def pareto_svg(rows, objectives):
    """One panel per domain: the sweep as a line, every other row as a labelled point, first against second objective."""
    results, sweeps = ([r for r in rows if bool(r.get("sweep")) == swept] for swept in (False, True))
    panels = list(dict.fromkeys(r["domain"] for r in sweeps))
    drawn = [panel([r for r in results if r["domain"] == d], [r for r in sweeps if r["domain"] == d],
                   domain_objectives(d, objectives)[:2]) for d in panels]
    style = ("text{font:11px sans-serif;fill:#333}.label{font-size:8px}.axis{stroke:#888;fill:none}"
             ".sweep{stroke:#0a7;stroke-width:2;fill:none}.policy{fill:#06c}.guided{fill:#c50}"
             "@media(prefers-color-scheme:dark){text{fill:#ddd}svg{background:#111}}")
    placed = "".join(f'<g transform="translate({480 * i} 0)">{text}</g>' for i, text in enumerate(drawn))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {480 * max(1, len(panels))} 430">'
            f"<style>{style}</style>{placed}</svg>\n")


def panel(rows, mixes, names):
    """One panel of 480 x 430: axes with their ranges, the sweep's line, a circle with label and tooltip for each row."""
    at = lambda r: [r["metrics"][n]["mean"] for n in names]
    xs, ys = zip(*map(at, rows + mixes))
    place = lambda v, values, a, b: a + (b - a) * (v - min(values)) / ((max(values) - min(values)) or 1)
    X, Y = (lambda v: place(v, xs, 70, 360)), (lambda v: place(v, ys, 370, 40))
    out = ['<path d="M60 25V380H460" class="axis"/>', f'<text x="230" y="414" text-anchor="middle">{names[0]}</text>',
           f'<text x="64" y="18">{names[1]}</text>']
    out += [f'<text x="{X(v):.0f}" y="396" text-anchor="middle">{v:.2f}</text>' for v in (min(xs), max(xs))]
    out += [f'<text x="54" y="{Y(v) + 4:.0f}" text-anchor="end">{v:.2f}</text>' for v in (min(ys), max(ys))]
    line = " ".join(f"{X(x):.1f},{Y(y):.1f}" for x, y in map(at, mixes))
    out.append(f'<polyline class="sweep" points="{line}"/>')
    for r in rows:
        x, y = at(r)
        label = r["policy"] + (f" + {r['guide']}" if r["guide"] else "")
        out.append(f'<circle class="{"guided" if r["guide"] else "policy"}" cx="{X(x):.1f}" cy="{Y(y):.1f}" r="4">'
                   f'<title>{label}: {x:.3f}, {y:.3f}</title></circle>'
                   f'<text x="{X(x) + 6:.1f}" y="{Y(y) + 3:.1f}" class="label">{label}</text>')
    return "".join(out)


def evaluate(run, pair_rows, device=None):
    """Measure every row of a run of one seed, then publish. device: default the run's own."""
    bench, rows = Bench(run, device), []
    jobs = [(d, job, {}) for d in bench.worlds for job in bench.jobs(d)] + \
        [(d, job, {"sweep": True}) for d in bench.worlds for job in bench.sweep(d)]
    for domain, (policy, model, *how), tag in tqdm(jobs, desc="tables", unit="row", disable=None):
        rows.append(bench.row(policy, model, domain, *how) | tag)
    publish(run, rows + pair_rows)


def publish(run, rows):
    """Print the tables of these rows, write results.md, pareto.svg and, last, results.json."""
    config = read_run(run)
    rows = [{"n": next(iter(r["metrics"].values()))["n"]} | r for r in rows]
    text = report(rows, config)
    write_text(os.path.join(run, "results.md"), text)
    write_text(os.path.join(run, "pareto.svg"), pareto_svg(rows, config["objectives"]))
    write_json(os.path.join(run, "results.json"), [{k: v for k, v in r.items() if k != "n"} for r in rows])  # it says "done"
    print("\n" + text)


def seed_runs(run):
    """The directories of a run's trainings, one per seed; the run itself if it has one seed."""
    config = read_run(run)
    seeds = range(config["seed"], config["seed"] + config["seeds"])
    return [os.path.join(run, f"seed={s}") for s in seeds] if len(seeds) > 1 else [run]


def publish_seeds(run):
    """The tables of a run of several seeds, whose values are each training's means."""
    results, rows = [read_json(os.path.join(r, "results.json")) for r in seed_runs(run)], []
    for same in zip(*results, strict=True):
        metrics = {m: summary([r["metrics"][m]["mean"] for r in same]) for m in same[0]["metrics"]
                   if all(m in r["metrics"] for r in same)}
        n = round(statistics.fmean(next(iter(r["metrics"].values()))["n"] for r in same))
        rows.append(same[0] | {"metrics": metrics, "seed": [r["seed"] for r in same], "n": n})
    publish(run, rows)


# -- timings

class Counted:
    """Counts the tokens fed to a model while it is open."""

    def __init__(self, net):
        self.tokens = 0
        self.handle = net.register_forward_hook(self.count)

    def count(self, net, args, output):
        self.tokens += args[0].numel()


def plain_options(model):
    """Keywords of `draw` for timing: no boundary but the limit, the usual sampling, a fixed seed."""
    masks = torch.zeros(4, model.config.vocab_size + 1, dtype=torch.bool, device=model.embed.weight.device)
    return {"masks": list(masks), "temperature": 1.0, "top_k": 50, "top_p": 1.0, "feed_last": True,
            "generator": torch.Generator().manual_seed(0)}


def steps_carried(model, prm, prompt, K, S, N):
    """This project's way, S steps of N tokens: both caches carried on. -> bytes of both caches"""
    options, head = plain_options(model), model.fold(0)
    caches = [net.new_cache(1, len(prompt) + S * N) for net in (model, prm.backbone)]
    h = ingest(model, caches[0], [prompt]).repeat_interleave(K, 0)
    ingest(prm, caches[1], [prompt])
    policy, judge = (cache.fork(K) for cache in caches)
    for _ in range(S):
        drawn = draw(model, head, policy, h, limits=policy.held.new_full((K,), N), **options)
        scores, fed = score_candidates(prm, judge, drawn, None)
        winner, size = int(scores[:, 0].argmax()), policy.nbytes() + judge.nbytes()
        policy.keep(winner)
        judge.keep(winner, fed[winner:winner + 1])
        h[:] = h[winner].clone()
    return size


def steps_one_by_one(model, prm, prompt, K, S, N):
    """As published: a cache is carried, but candidates are drawn one after another from copies of it, and the PRM reads
    prompt and steps again for every candidate."""
    options, head = plain_options(model), model.fold(0)
    running, text = model.new_cache(1, len(prompt) + S * N), list(prompt)
    state = ingest(model, running, [prompt])
    for _ in range(S):
        tried = []
        for _ in range(K):
            cache, h = copy.deepcopy(running), state.clone()
            ids, = draw(model, head, cache, h, limits=cache.held.new_full((1,), N), **options)
            tried.append((float(prm(torch.tensor([text + ids], device=h.device))[0, -1, 0]), ids, cache, h))
        _, ids, running, state = max(tried, key=lambda t: t[0])
        running.keep(0)
        text += ids
    return K * running.nbytes()


def steps_encoded_again(model, prm, prompt, K, S, N):
    """The plain way: every step encodes prompt and text anew, for K rows at once, and so does the PRM."""
    options, head, text = plain_options(model), model.fold(0), list(prompt)
    for _ in range(S):
        cache = model.new_cache(K, len(text) + N)
        h = ingest(model, cache, [text] * K)
        drawn = draw(model, head, cache, h, limits=cache.held.new_full((K,), N), **options)
        scores = prm(torch.tensor([text + ids for ids in drawn], device=h.device))[:, -1, 0]
        text += drawn[int(scores.argmax())]
    return cache.nbytes()


@torch.no_grad()
def timing(directory, device, S=2, N=16):
    """Print the cost of guided decoding (S steps of N tokens) with the model of a run or of a Hugging Face directory, its
    PRM a run's own or one with random weights on the same backbone; and one-token decoding beside the memory's speed."""
    run = os.path.isdir(os.path.join(directory, "mah_dpo"))
    model = load_hf(os.path.join(directory, "mah_dpo") if run else directory).to(device).eval()
    trained = os.path.isdir(os.path.join(directory, "prm"))
    prm = load_prm(os.path.join(directory, "prm")) if trained else \
        PRM(model.with_heads(()), ["reward"], torch.Generator().manual_seed(0))
    prm.to(device)
    size, room = sum(p.numel() for p in model.parameters()), min(model.config.max_len, prm.backbone.config.max_len)
    print(f"{size / 1e6:.1f} M parameters, {'its own' if trained else 'a random'} PRM, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; {S} steps of {N} tokens")
    methods = {"re-encoding": steps_encoded_again, "cached, one by one": steps_one_by_one, "carried (here)": steps_carried}
    generator, rows = torch.Generator().manual_seed(0), []
    for prefix in (128, 512, 2048):
        if prefix + S * N > room:
            print(f"a prefix of {prefix} does not fit the context of {room}: left out")
            continue
        prompt = torch.randint(0, model.config.vocab_size, (prefix,), generator=generator).tolist()
        for K in tqdm((1, 2, 5, 10), desc=f"prefix {prefix}", unit="K", disable=None):
            for name, work in methods.items():
                work(model, prm, prompt, K, 1, 2)                                         # warm up
                counts = Counted(model), Counted(prm.backbone)
                start = time.perf_counter()
                held = work(model, prm, prompt, K, S, N)
                seconds = time.perf_counter() - start
                for c in counts:
                    c.handle.remove()
                rows.append([prefix, K, name, f"{seconds:.2f}", f"{K * S * N / seconds:.0f}", "", f"{held / 1e6:.1f}",
                             *(c.tokens for c in counts), seconds])
            for row in rows[-3:]:
                row[5] = f"{row[-1] / rows[-1][-1]:.1f}"
    head = ["prefix", "K", "method", "seconds", "tokens/s", "x here", "cache MB", "fed to policy", "fed to PRM"]
    print("\n".join("| " + " | ".join(map(str, line[:9])) + " |" for line in [head, ["---"] * 9, *rows]))
    prompt = torch.randint(0, model.config.vocab_size, (min(64, room // 2),), generator=generator).tolist()
    for _ in range(2):                                                                    # the first warms up
        start = time.perf_counter()
        drawn, = generate(model, [prompt], max_new_tokens=64, temperature=0)              # fewer tokens if it ends itself
        per_token = (time.perf_counter() - start) / len(drawn)
    source = torch.ones(64 * 2**20, device=device)
    target, speed = torch.empty_like(source), 0.0
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        speed = max(speed, 2 * source.nbytes / (time.perf_counter() - start))
    read = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith(("heads.", "embed", "positions")))
    read += model.heads[0].weight.nbytes
    print(f"one token: {1e3 * per_token:.2f} ms; reading the {read / 1e6:.0f} MB of weights at the {speed / 1e9:.0f} GB/s of a copy "
          f"takes {1e3 * read / speed:.2f} ms, {read / speed / per_token:.0%} of that")


def main(argv=None):
    """The command line: measure a finished run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run directory written by train.py")
    parser.add_argument("--device", help="auto, cpu, cuda or mps (default: the run's own)")
    parser.add_argument("--timing", action="store_true", help="time guided decoding instead; `run` may be any checkpoint")
    args = parser.parse_args(argv)
    if args.timing:
        return timing(args.run, pick_device(args.device or "auto"))
    if not os.path.isfile(os.path.join(args.run, "results.json")):
        raise InputError(f"{args.run}: not a finished run (no results.json); finish it with train.py --resume {args.run}")
    runs = seed_runs(args.run)
    for run in runs:
        old = read_json(os.path.join(run, "results.json"))
        evaluate(run, [r for r in old if r["domain"].startswith("pairs:")], args.device)
    if runs != [args.run]:
        publish_seeds(args.run)


if __name__ == "__main__":
    run_command(main)
