"""decode.py: sampling, and PRM-guided best-of-K that carries its caches. Before: mah_dpo.py; next: evaluate.py.

    from the running state (KV cache kv_t and the hidden state at the last token), for every prompt at once:
      draw     K candidates as one batch, one forward per token, until a boundary (newline, sentence, end of turn)
      score    r_k = P(x, y_1:t, y^k_{t+1}): the PRM reads only the candidates' tokens, behind its own running cache
      commit   k* = argmax r_k: its step joins the shared prefix, its hidden state goes on          (paper, Sec. 5)

Nothing that was committed is ever encoded again, by the policy or by the PRM; in a conversation the state goes on to the
next turn and only the user's new words are fed. What is committed are token ids; text is derived from them. Plain
generation is the same `draw` with the end of the turn as its only boundary.

    python decode.py RUN --weights math_accuracy=0.7,math_engagement=0.3 --guide math_accuracy \\
                         --prompt "4 ; a + 5 ; b - 2 = ?"
"""
import argparse
import os
import sys
import warnings
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F

from data import InputError, OBJECTIVES, domain_objectives, ends_step, pad, read_json, run_command
from model import KVCache, linear, load_hf
from prm import load_prm


# --- exercise 10: sample (3 points) ---
def sample(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one token per row by inverting the distribution function at u.

    logits (B, V); u (B,) uniform in [0, 1); temperature 0 is greedy. top_k keeps the k likeliest tokens (0: all), top_p
    the smallest set of likeliest tokens whose probability reaches p. -> (B,) ids"""
    if temperature == 0:
        return logits.argmax(-1)
    order = None
    if 0 < top_k < logits.shape[-1] or top_p < 1:
        logits, order = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))     # sorted, likeliest first
    p = F.softmax(logits.float() / temperature if logits.dtype != torch.float64 else logits / temperature, -1)
    if top_p < 1:
        p = p * (p.cumsum(-1) - p < top_p)                # the token that crosses top_p stays, so one always does
    cdf = p.cumsum(-1)
    index = torch.searchsorted(cdf, (u.to(cdf) * cdf[:, -1])[:, None], right=True)
    index = index.clamp(max=p.shape[-1] - 1)
    return (index if order is None else order.gather(-1, index))[:, 0]
# --- end of exercise 10 ---


def check_prompts(prompts, room):
    """InputError for an empty prompt or one that leaves no room for an answer. room: a prompt's tokens in the context."""
    for i, (prompt, limit) in enumerate(zip(prompts, room)):
        if not prompt:
            raise InputError(f"prompt {i} is empty; give it at least one token")
        if len(prompt) >= limit:
            raise InputError(f"prompt {i} has {len(prompt)} tokens, the context has room for {limit} with the answer; "
                             "shorten the prompt")


def check_sampling(max_new_tokens, temperature, top_p):
    """InputError for sampling options without a meaning."""
    # Logits divided by next to nothing overflow, and what is drawn from NaN is noise.
    if not (temperature == 0 or temperature >= 1e-6) or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise InputError("need temperature >= 0 (1e-6 if not 0), 0 < top_p <= 1 and max_new_tokens >= 1, not "
                         f"{temperature}, {top_p}, {max_new_tokens}")


def prefill(net, cache, prompts):
    """Feed new text to one row of every sequence and commit it; return the hidden states (or scores) at its last token."""
    ids, n = pad(prompts, 0, cache.held.device)
    out = net(ids, cache, (torch.arange(len(n), device=n.device) * cache.K)[:, None])
    cache.keep(0, n)
    return out[torch.arange(len(n), device=n.device), n - 1]


def alive_rows(done):
    """done (G, K) -> the rows that go on as a grid (G', m): their sequences, and m, the most of one sequence. Idle places
    of a grid repeat a row that goes on."""
    order = done.int().argsort(dim=1, stable=True)                                         # those that go on first
    order = torch.where(done.gather(1, order), order[:, :1], order)
    going = (~done).sum(1)
    groups = going.nonzero()[:, 0]
    return groups[:, None] * done.shape[1] + order[groups, :int(going.max())]


def draw(model, head, cache, h, masks, limits, *, temperature, top_k, top_p, generator, feed_last, groups=None):
    """Sample every row of the sequences `groups` (default all) until a boundary token or its limit. `rows` is what is fed:
    a stopped row leaves before its last token is fed, or with feed_last after that.

    head (V, d) folded; h (G K, d) hidden state at the last token of every row, updated in place; masks as in
    Tokenizer.boundary_masks; limits (G K,) most new tokens of a row (at least 1). feed_last: also feed the boundary token,
    so that cache and h are ready to go on. -> list of id lists, one for each row of `groups`"""
    R, K, device = len(h), cache.K, h.device
    done = torch.ones(R // K, K, dtype=torch.bool, device=device)
    done[slice(None) if groups is None else groups] = False
    wanted, rows = (~done).flatten().nonzero()[:, 0], None if groups is None else alive_rows(done)
    tokens, count, done = [], torch.zeros_like(limits), done.flatten()
    previous = before = torch.full_like(limits, len(masks[0]) - 1)
    while True:
        index = slice(None) if rows is None else rows.flatten()
        # One draw for every row, also for those that have stopped: a row's tokens do not depend on when others stop.
        u = torch.rand(R, generator=generator, device=generator.device if generator else "cpu").to(device)
        token = torch.zeros_like(limits)
        token[index] = sample(linear(h[index], head), u[index], temperature, top_k, top_p)
        tokens.append(token)
        going = ~done
        count += going
        done = done | going & (ends_step(masks, token, previous, before) | (count >= limits))
        previous, before = token, previous
        finished = bool(done.all())                        # the one flag per token that the host waits for
        if finished and not feed_last:
            break
        # A CPU drops rows that have stopped; an accelerator feeds them too, so that shapes stay the same.
        shrink = device.type == "cpu" and not finished and int(done.sum()) > R - len(wanted)
        if shrink and not feed_last:
            rows = alive_rows(done.view(-1, K))
            index = rows.flatten()
        out = model(token[index][:, None], cache, rows)[:, 0]
        h[index] = torch.where(going[index][:, None], out, h[index])
        if finished:
            break
        if shrink and feed_last:
            rows = alive_rows(done.view(-1, K))
    table, count = torch.stack(tokens, 1)[wanted].tolist(), count[wanted].tolist()
    return [row[:n] for row, n in zip(table, count)]


def stop_masks(model, boundary):
    """Boundary name (or ready masks as Tokenizer.boundary_masks gives) -> masks on the model's device."""
    if isinstance(boundary, str) and model.tokenizer is not None:
        boundary = model.tokenizer.boundary_masks(boundary)
    elif boundary == "turn":                # no tokenizer, no end-of-turn token: only the budget ends a response
        boundary = torch.zeros(4, model.config.vocab_size + 1, dtype=torch.bool)
    elif isinstance(boundary, str):
        raise InputError("this model has no tokenizer; give the boundary as masks over the vocabulary")
    return [m.to(model.embed.weight.device) for m in boundary]


@torch.inference_mode()
def generate(model, prompts, *, weights=0, max_new_tokens, temperature=1.0, top_k=50, top_p=1.0, generator=None, samples=1,
             batch_size=512, progress=None):
    """prompts (list of id lists, ragged) -> list of id lists, each up to and including EOS, or max_new_tokens long (a
    number, or one per prompt).

    weights: as in GPT.weights. samples: responses per prompt, which stand together in the result; the prompt is encoded
    once for all of them. progress: called with the number of new responses after each batch of batch_size."""
    check_prompts(prompts, [model.config.max_len] * len(prompts))
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    check_sampling(min(most, default=1), temperature, top_p)
    head, masks, out = model.fold(weights), stop_masks(model, "turn"), [None] * len(prompts)
    order, size = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), max(1, batch_size // samples)
    for start in range(0, len(prompts), size):
        batch = order[start:start + size]                # of similar length, so that little is padded
        cache = model.new_cache(len(batch))
        h = prefill(model, cache, [prompts[i] for i in batch]).repeat_interleave(samples, 0)
        new = cache.held.new_tensor([most[i] for i in batch])
        limits = torch.minimum(model.config.max_len - cache.held, new).repeat_interleave(samples)
        drawn = draw(model, head, cache.fork(samples), h, masks, limits, temperature=temperature, top_k=top_k, top_p=top_p,
                     generator=generator, feed_last=False)
        for k, i in enumerate(batch):
            out[i] = drawn[k * samples:(k + 1) * samples]
        if progress is not None:
            progress(len(h))
    return [response for responses in out for response in responses]


@dataclass
class State:
    """What goes on to the next step or turn, for all prompts of a batch: both caches and the policy's hidden states."""
    policy: KVCache
    prm: KVCache
    h: torch.Tensor


@dataclass
class Step:
    """One step's K candidates (id lists), their PRM scores and the index of the committed one."""
    candidates: list
    scores: list
    winner: int


@dataclass
class Guided:
    """One prompt's answer: ids, their text, the steps with all candidates, and the state that a next turn goes on from."""
    ids: list
    text: str
    steps: list
    state: State


def check_guided(model, prm, prompts, K, temperature, guide, boundary, state):
    """Refuse what guided_decode cannot do -> (K, the context that policy and PRM share)."""
    if K < 1:
        raise InputError(f"K must be at least 1, not {K}")
    prm.guide(prm.scale, guide, boundary if isinstance(boundary, str) else None)   # refuses a guide that the PRM lacks
    # Vocabularies may be padded to different sizes; what counts is that the PRM reads every id as the policy means it.
    known = [net.tokenizer.pieces if net.tokenizer else [b""] * net.config.vocab_size for net in (model, prm.backbone)]
    if any(a != b for a, b in zip_longest(*known, fillvalue=b"")):
        raise InputError("policy and PRM have different tokenizers; the PRM must read the policy's own ids")
    limit = min(model.config.max_len, prm.backbone.config.max_len - (prm.marker is not None))     # the last step's marker
    held = torch.maximum(state.policy.held, state.prm.held).tolist() if state else [0] * len(prompts)
    if len(held) != len(prompts):
        raise InputError(f"the state holds {len(held)} conversations, {len(prompts)} new texts came")
    check_prompts(prompts, [limit - n for n in held])
    if temperature == 0 and K > 1:
        warnings.warn("temperature 0 makes all candidates equal: K = 1", stacklevel=4)
        K = 1
    if state and state.policy.K != K:
        raise InputError(f"the state carries K = {state.policy.K} candidates, not {K}; go on with the same K")
    return K, limit


@torch.inference_mode()
def guided_decode(model, prm, prompts, *, boundary, K=5, weights=0, guide="unified", max_new_tokens, temperature=1.0,
                  top_k=50, top_p=1.0, generator=None, state=None):
    """PRM-guided best-of-K (paper, Sec. 5) for B ragged prompts at once -> list of B Guided.

    boundary: newline | sentence | turn. guide: one of the PRM's outputs, or "unified". state: that of an earlier call
    for the same conversations, which this call changes in place; prompts are then only the new tokens (the end-of-turn
    token is in the cache already).
    InputError for a prompt that does not fit, K < 1, a guide the PRM lacks, scores that are not finite."""
    check_sampling(max_new_tokens, temperature, top_p)
    K, limit = check_guided(model, prm, prompts, K, temperature, guide, boundary, state)
    head, masks, B = model.fold(weights), stop_masks(model, boundary), len(prompts)
    named = boundary if isinstance(boundary, str) else None
    if state is None:        # the prompt is encoded once, by one row per prompt, then forked into K
        room = min(max_new_tokens, limit)
        caches = [net.new_cache(B, max(map(len, prompts)) + room) for net in (model, prm.backbone)]
        h = prefill(model, caches[0], prompts)
        prefill(prm, caches[1], prompts)
        state = State(caches[0].fork(K), caches[1].fork(K), h.repeat_interleave(K, 0))
    else:
        state.h = prefill(model, state.policy, prompts).repeat_interleave(K, 0)
        prefill(prm, state.prm, prompts)
    results = [Guided([], "", [], state) for _ in prompts]
    end = (state.policy.held + max_new_tokens).clamp(max=limit)                           # (B,)
    budget = lambda: torch.minimum(end - state.policy.held, limit - state.prm.held)       # markers fill the PRM's context alone
    alive = torch.arange(B, device=state.h.device)
    while len(alive):
        groups = alive if len(alive) < B else None
        candidates = draw(model, head, state.policy, state.h, masks, budget().repeat_interleave(K), temperature=temperature,
                          top_k=top_k, top_p=top_p, generator=generator, feed_last=True, groups=groups)
        scores, fed = score_candidates(prm, state.prm, candidates, groups)
        scores = prm.guide(scores, guide, named).view(-1, K)
        if not bool(scores.isfinite().all()):
            number = len(results[int(alive[0])].steps) + 1
            raise InputError(f"step {number}: the PRM's scores are not finite: {scores.tolist()}")
        winners = select(state, scores, torch.tensor([len(c) for c in candidates], device=alive.device), fed, alive)
        alive = commit(model, results, candidates, scores.tolist(), winners.tolist(), alive, budget(), K)
    for result in results:
        result.text = model.tokenizer.decode(result.ids) if model.tokenizer else ""
    return results


def score_candidates(prm, cache, candidates, groups):
    """Feed each candidate's tokens to the PRM -> scores at each candidate's last token (n, P), and how many tokens each was
    (n,). A PRM with a marker gets it behind the step, before EOS, and is read there."""
    device = cache.held.device
    at = torch.tensor([len(c) - 1 for c in candidates], device=device)
    if prm.marker is not None:
        at = at + torch.tensor([c[-1] != prm.backbone.tokenizer.eos_id for c in candidates], device=device)
        candidates = [c[:i] + [prm.marker] + c[i:] for c, i in zip(candidates, at.tolist())]
    ids, n = pad(candidates, 0, device)
    rows = None if groups is None else groups[:, None] * cache.K + torch.arange(cache.K, device=device)
    return prm(ids, cache, rows)[torch.arange(len(n), device=device), at], n


# --- exercise 12: select (4 points) ---
def select(state, scores, drawn, fed, alive):
    """The best candidate of every sequence goes on (paper, Sec. 5): both caches keep its step, all K rows its hidden state.

    scores (G', K) of the candidates of the sequences `alive` (G',), some of the G that `state` (State, changed in place)
    holds; its h is (G K, d), candidate k of sequence g at row gK + k. drawn, fed (G' K,): how many tokens of each
    candidate the policy's and the PRM's cache were fed. -> winners (G',), k* = argmax_k r_k"""
    K, winners = scores.shape[1], scores.argmax(-1)
    chosen = torch.arange(len(alive), device=alive.device) * K + winners                  # among the G' K candidates
    state.policy.keep(winners, drawn[chosen], alive)
    state.prm.keep(winners, fed[chosen], alive)
    state.h.view(-1, K, state.h.shape[-1])[alive] = state.h[alive * K + winners][:, None]
    return winners
# --- end of exercise 12 ---


def commit(model, results, candidates, scores, winners, alive, budget, K):
    """Append the winners to their results; return the prompts that go on: no EOS yet and some budget left."""
    going = []
    eos = model.tokenizer.eos_id if model.tokenizer else -1
    for g, b in enumerate(alive.tolist()):
        step = Step(candidates[g * K:(g + 1) * K], scores[g], winners[g])
        ids = step.candidates[step.winner]
        results[b].ids += ids
        results[b].steps.append(step)
        if ids[-1] != eos and int(budget[b]) > 0:
            going.append(b)
    return alive.new_tensor(going)


def parse_weights(text, names, option="--weights", default=0.0):
    """'a=0.7,b=0.3' -> list of numbers, one per name, `default` for those not named. InputError for an unknown name, a
    broken or negative number, all zero."""
    weights, parts = dict.fromkeys(names, default), text.split(",") if text else []
    given = [part.partition("=")[0].strip() for part in parts]
    for part in parts:
        name, _, value = part.partition("=")
        if name.strip() not in weights:
            raise InputError(f"{option}: no {name.strip()!r} here; choose from {', '.join(names)}")
        if given.count(name.strip()) > 1:
            raise InputError(f"{option}: {name.strip()!r} is given twice")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise InputError(f"{option}: {part!r} is not NAME=NUMBER") from None
    if any(not 0 <= w < float("inf") for w in weights.values()) or sum(weights.values()) <= 0:
        raise InputError(f"{option}: {text!r} must be non-negative numbers with a positive sum")
    return list(weights.values())


def read_run(run):
    """The configuration of a run directory. InputError if its config.json is that of something else."""
    path = os.path.join(run, "config.json")
    config = read_json(path)
    if not isinstance(config, dict) or not {"objectives", "temperature"} <= config.keys():
        raise InputError(f"{path}: not the configuration of a run")
    return config | {"objectives": [OBJECTIVES[o] for o in config["objectives"]]}      # TRANSITION


def find_prm(run, guide, dtype=torch.float32):
    """The PRM of a run that has the output `guide`: RUN/prm, or with one PRM per objective RUN/prm_<guide>."""
    single = os.path.join(run, f"prm_{guide}")
    if guide == "unified" and not os.path.isdir(os.path.join(run, "prm")):
        raise InputError(f"{run}: no unified PRM here; guide by an objective that has one (prm_<objective>)")
    return load_prm(single if os.path.isdir(single) else os.path.join(run, "prm"), dtype)


def domain_mix(heads, domain):
    """Uniform weights over the heads of one domain; a model with a single head has nothing to mix."""
    return [float(len(heads) == 1 or h in domain_objectives(domain, OBJECTIVES)) for h in heads]


def show_step(tokenizer, number, step):
    """Print one step's candidates with their scores, the winner marked."""
    print(f"step {number}")
    for k, (ids, score) in enumerate(zip(step.candidates, step.scores)):
        mark = "->" if k == step.winner else "  "
        print(f"  {mark} {score:+8.4f}  {tokenizer.decode(ids)!r}{' [end]' if ids[-1] == tokenizer.eos_id else ''}")


def main(argv=None):
    """The command line: guided answers of a finished run, every candidate shown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run directory written by train.py")
    parser.add_argument("--prompt", help="the user's message; without it, lines from standard input are a conversation")
    parser.add_argument("--policy", default="mah_dpo", help="which model of the run answers (default mah_dpo)")
    parser.add_argument("--weights", help="mix of heads, NAME=NUMBER,...; default: uniform over the domain of the guide "
                        "(of the run's first objective for 'unified')")
    parser.add_argument("--guide", default=None,
                        help="objective that guides, or 'unified'; default: that of the largest weight, else the run's first")
    parser.add_argument("--prm", help="directory of a reward model from elsewhere that guides instead of the run's own")
    parser.add_argument("--k", type=int, default=5, help="candidates per step (default 5)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer in tokens (default 64)")
    parser.add_argument("--temperature", type=float, default=None, help="default: the run's own")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws (default 0)")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**31:
        raise InputError(f"--seed {args.seed} is out of range")
    config = read_run(args.run)
    model = load_hf(os.path.join(args.run, args.policy))
    objectives = model.config.objectives
    weights = parse_weights(args.weights, objectives) if args.weights is not None else None
    heaviest = objectives[max(range(len(objectives)), key=weights.__getitem__)] if weights else None
    leading = next(o for o in (args.guide, heaviest, config["objectives"][0]) if o in OBJECTIVES)
    guide = args.guide or ("unified" if args.prm else leading)
    if guide != "unified" and guide not in OBJECTIVES and not args.prm:
        raise InputError(f"--guide: unknown objective {guide!r}; choose unified or one of {', '.join(OBJECTIVES)}")
    prm = load_prm(args.prm) if args.prm else find_prm(args.run, guide)
    weights = weights or domain_mix(objectives, OBJECTIVES[leading].domain)
    generator, result = torch.Generator().manual_seed(args.seed), None
    temperature = config["temperature"] if args.temperature is None else args.temperature
    for line in [args.prompt] if args.prompt is not None else sys.stdin:
        tokenizer = model.tokenizer
        if result is None:
            ids = tokenizer.encode_chat([{"role": "user", "content": line.strip()}])
        else:                               # an answer that was cut off is closed first
            ids = ([] if result.ids[-1] == tokenizer.eos_id else [tokenizer.eos_id]) + tokenizer.encode_turn(line.strip())
        result, = guided_decode(model, prm, [ids], boundary=OBJECTIVES[leading].boundary, K=args.k, weights=weights,
                                guide=guide, max_new_tokens=args.max_new_tokens, temperature=temperature,
                                generator=generator, state=result.state if result else None)
        for number, step in enumerate(result.steps, 1):
            show_step(tokenizer, number, step)
        print(result.text, flush=True)


if __name__ == "__main__":
    run_command(main)
