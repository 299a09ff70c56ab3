"""decode.py: sampling, and PRM-guided best-of-K that carries its caches (paper, Sec. 5).

From the running state (the KV caches of policy and PRM), for every prompt at once, until each
answer has ended:

    draw     K candidates as one batch, one forward per token, until a step ends (newline,
             sentence or end of turn)
    score    r_k = P(x, y_1:t, y^k_{t+1}): the PRM reads the candidates' tokens behind its cache
    select   k* = argmax_k r_k: its step joins the shared prefix of both caches

Nothing that was committed is ever encoded again, by the policy or by the PRM, nor in the next turn
of a conversation. What is committed are token ids; text is derived from them.

Read `sample` and `draw`, then `guided_decode`, whose loop is the three lines above. Plain
generation is `draw` alone, with the end of the turn as the only boundary. Checks of what the user
gave, and the command line, come last. Before: mah_dpo.py; next: evaluate.py.

    python decode.py RUN --weights math_accuracy=0.7,math_engagement=0.3 --guide math_accuracy \\
                         --prompt "4 ; a + 5 ; b - 2 = ?"
"""
import argparse
import json
import os
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F

from data import DOMAINS, InputError, ends_step, pad, read_json, read_objectives, run_command
from interop.manifest import check_files
from interop.tokenizer import use_template_args
from model import KVCache, linear, load_hf
from prm import load_prm

# -- sampling


# --- exercise 10: sample (3 points) ---
def sample(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one token per row by inverting the distribution function at u -> (B,) ids.

    logits (B, V); u (B,) uniform in [0, 1). temperature 0 is greedy. top_k keeps the k likeliest
    tokens (0: all), top_p the smallest set of likeliest tokens whose probability reaches p."""
    if temperature == 0:
        return logits.argmax(-1)
    V, order = logits.shape[-1], None
    if 0 < top_k < V or top_p < 1:
        logits, order = logits.topk(min(top_k or V, V))       # sorted, likeliest first
    if logits.dtype != torch.float64:
        logits = logits.float()               # sums of bfloat16 stop growing long before 1
    p = F.softmax(logits / temperature, -1)                                        # (B, k)
    if top_p < 1:
        # The token that crosses top_p stays, so one always does.
        likelier = p.cumsum(-1) - p
        p = p * (likelier < top_p)
    # The first token at which the distribution function exceeds u. What was cut left a sum below
    # 1, so u is taken as a share of that sum.
    cdf = p.cumsum(-1)
    level = u.to(cdf) * cdf[:, -1]
    index = torch.searchsorted(cdf, level[:, None], right=True)                    # (B, 1)
    index = index.clamp(max=p.shape[-1] - 1)
    token = index if order is None else order.gather(-1, index)
    return token[:, 0]
# --- end of exercise 10 ---


def prefill(net, cache, texts, groups=None):
    """Feed new text to one row of each sequence and commit it to the prefix.

    texts: ragged id lists, for the sequences `groups` (G',), default all -> hidden states (or
    scores) at their last tokens (G', d)."""
    ids, n = pad(texts, 0, cache.held.device)                                      # (G', T), (G',)
    g = torch.arange(len(texts), device=ids.device)
    groups = g if groups is None else groups
    out = net(ids, cache, groups[:, None] * cache.K)                               # (G', T, d)
    # Of every row only the first n tokens are text; the rest is padding.
    cache.keep(0, n, groups)
    return out[g, n - 1]


def alive_rows(done, K):
    """done (G K,) -> the rows that go on, as a grid (G', m): G' sequences, m the most rows of one;
    and the same as an index. None, which means all rows, and a slice of all, if none is done."""
    if not bool(done.any()):
        return None, slice(None)
    done = done.view(-1, K)
    going = (~done).sum(1)                                                         # (G,)
    groups = going.nonzero()[:, 0]                                                 # (G',)
    # Within a sequence the rows that go on come first; the places of others repeat the first.
    order = done.int().argsort(dim=1, stable=True)                                 # (G, K)
    order = torch.where(done.gather(1, order), order[:, :1], order)
    most = int(going.max())
    rows = groups[:, None] * K + order[groups, :most]
    return rows, rows.flatten()


def draw(model, head, cache, h, masks, limits, temperature=1.0, top_k=50, top_p=1.0,
         generator=None):
    """K samples behind each of G sequences, until their step ends -> list of id lists, sequence by
    sequence, none for one whose limit is 0.

    head (V, d): folded. cache: forked into K rows a sequence, R = G K in all. h (G, d): the hidden
    state that a sequence goes on from. masks: where a step ends, as in Tokenizer.boundary_masks.
    limits (G,): the most new tokens. generator: of the random numbers, default torch's own. The
    last token of a step is not fed to the model: whatever follows will follow the winner's alone.
    """
    limits = limits.repeat_interleave(cache.K)                                     # (R,)
    done = limits < 1
    # Computed are the n rows of the grid `rows`; `done` (R,) says which of all have stopped.
    rows, at = alive_rows(done, cache.K)
    h = h.repeat_interleave(cache.K, 0)[at]                                        # (n, d)
    tokens, count = [], torch.zeros_like(limits)
    # The index behind the vocabulary's last stands for "no token before".
    previous = before = torch.full_like(limits, len(masks[0]) - 1)
    while True:
        # One number for every row, also for those that have stopped: what a row says does not
        # depend on when others stop.
        u = torch.rand(len(limits), generator=generator).to(h.device)              # (R,)
        token = torch.zeros_like(limits)      # (R,), of which rows that have stopped get no token
        token[at] = sample(linear(h, head), u[at], temperature, top_k, top_p)
        tokens.append(token)
        # Rows that had not stopped before got this token. Which has it stopped?
        count += ~done
        done = done | ends_step(masks, token, previous, before) | (count >= limits)
        previous, before = token, previous
        if bool(done.all()):                  # the one flag per token that the host waits for
            break
        # A CPU drops rows that have stopped; an accelerator feeds them on, so that shapes stay the
        # same.
        if h.device.type == "cpu":
            rows, at = alive_rows(done, cache.K)
        h = model(token[at, None], cache, rows)[:, 0]                              # (n, d)
    table = torch.stack(tokens, 1).tolist()                                        # (R, T)
    return [row[:n] for row, n in zip(table, count.tolist()) if n]


@torch.inference_mode()
def generate(model, prompts, *, weights=0, max_new_tokens, samples=1, boundary="turn",
             batch_size=512, progress=None, **sampling):
    """Ragged prompts (id lists) -> id lists, each up to and including EOS or max_new_tokens long.

    weights: as in GPT.weights. max_new_tokens: a number, or one per prompt. samples: responses
    per prompt, which stand together in the result; a prompt is encoded once for all of them.
    boundary: where they end, after a whole turn or after a step (newline | sentence).
    progress: called with the number of new responses after each batch of batch_size. sampling:
    temperature, top_k, top_p and generator, as in `draw`."""
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * len(prompts)
    check_prompts(model, prompts, [model.config.max_len] * len(prompts))
    check_sampling(min(max_new_tokens, default=1), **sampling)
    head, masks = model.fold(weights), stop_masks(model, boundary)
    out = [None] * (len(prompts) * samples)
    # Prompts of similar length go together, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = max(1, batch_size // samples)
    for start in range(0, len(prompts), size):
        batch = order[start:start + size]
        cache = model.new_cache(len(batch))
        h = prefill(model, cache, [prompts[i] for i in batch])                     # (G, d)
        most = cache.held.new_tensor([max_new_tokens[i] for i in batch])
        limits = torch.minimum(most, model.config.max_len - cache.held)            # (G,)
        drawn = draw(model, head, cache.fork(samples), h, masks, limits, **sampling)
        for g, i in enumerate(batch):
            out[i * samples:(i + 1) * samples] = drawn[g * samples:(g + 1) * samples]
        if progress is not None:
            progress(len(drawn))
    return out


# -- guided decoding

@dataclass
class State:
    """What goes on to the next step or turn, for all G prompts of a batch."""
    policy: KVCache
    prm: KVCache


@dataclass
class Step:
    """One step of one answer."""
    candidates: list      # K id lists
    scores: list          # K numbers, of which the largest wins
    winner: int           # index of the candidate that was committed
    values: list          # for each candidate the PRM's own scores, of all outputs that guide


@dataclass
class Guided:
    """One prompt's answer."""
    ids: list
    text: str
    steps: list
    state: State          # what a next turn goes on from, shared by all answers of a call


@torch.inference_mode()
def guided_decode(model, prm, prompts, *, boundary, K=5, weights=0, guide="unified",
                  max_new_tokens, state=None, **sampling):
    """PRM-guided best-of-K (paper, Sec. 5) for B ragged prompts at once -> list of B Guided.

    boundary: newline | sentence | turn. guide: as in PRM.guide.
    state: that of an earlier call for the same conversations, which this call changes in place;
    prompts are then only the new tokens (the end of the turn is in the caches already).
    sampling: temperature (0 makes all candidates equal, so there is one only), top_k, top_p and
    generator, as in `draw`.
    InputError for a prompt that does not fit, K < 1, a guide that the PRM lacks, scores that are
    not finite."""
    check_sampling(max_new_tokens, **sampling)
    if not prompts:
        return []
    state, context = open_state(model, prm, prompts, K, max_new_tokens, state)
    if sampling.get("temperature") == 0:
        K = 1
    head, masks, tokenizer = model.fold(weights), stop_masks(model, boundary), model.tokenizer
    eos = tokenizer.eos_id if tokenizer else None
    # A prompt is read once, by one row; K candidates share its prefix.
    h = prefill(model, state.policy, prompts)                                      # (B, d)
    prefill(prm, state.prm, prompts)
    state.policy, state.prm = state.policy.fork(K), state.prm.fork(K)
    answers = [Guided([], "", [], state) for _ in prompts]
    while True:
        # What each answer may still say: nothing behind its end, and no more than the PRM's cache
        # has room for, which may hold markers besides.
        budgets = [max_new_tokens - len(a.ids) if a.ids[-1:] != [eos] else 0 for a in answers]
        room = context - state.prm.held                                            # (B,)
        left = torch.minimum(room, room.new_tensor(budgets)).clamp(min=0)
        alive = left.nonzero()[:, 0]                                               # (B',)
        if len(alive) == 0:
            break
        going = [answers[b] for b in alive.tolist()]
        # Draw K candidates for the next step of each.
        candidates = draw(model, head, state.policy, h, masks, left, **sampling)
        # Score them with every output of the PRM; the guide makes one number of some of these.
        rows, _ = alive_rows((left < 1).repeat_interleave(K), K)                   # (B', K)
        outputs, fed = score_candidates(prm, state.prm, candidates, rows)          # (B' K, P)
        outputs = outputs.unflatten(0, (-1, K))                                    # (B', K, P)
        values, scores = prm.guide(outputs, guide, boundary)                       # (B', K)
        if not bool(scores.isfinite().all()):      # the largest of NaN would be any of them
            number = len(going[0].steps) + 1
            raise InputError(f"step {number}: the PRM's scores are not finite: {scores.tolist()}")
        # Select the best; both caches go on from it. The policy was not fed a step's last token.
        drawn = fed.new_tensor([len(ids) - 1 for ids in candidates])
        winners = select(state, scores, drawn, fed, alive)                         # (B',)
        # Write down what won against what; K candidates of an answer stand together.
        tried = [candidates[i:i + K] for i in range(0, len(candidates), K)]
        found = zip(going, tried, scores.tolist(), winners.tolist(), values.tolist())
        for answer, own, points, k, said in found:
            answer.steps.append(Step(own, points, k, said))
            answer.ids += own[k]
        # The winner's last token is read like a prompt: the next step goes on from its state.
        h[alive] = prefill(model, state.policy, [a.ids[-1:] for a in going], alive)
    # Text is made of what was committed, never the other way round.
    for answer in answers:
        answer.text = tokenizer.decode(answer.ids) if tokenizer else ""
    return answers


def score_candidates(prm, cache, candidates, rows=None):
    """Feed n candidates to their rows of the PRM's cache (as in GPT.forward) -> the scores at
    their last tokens (n, P), and how many tokens each was (n,).

    A PRM with a marker gets it behind the step, before EOS, and is read there."""
    texts, ends = [], []
    for ids in candidates:
        end = len(ids) - 1
        if prm.marker is not None:
            if ids[-1] != prm.backbone.tokenizer.eos_id:
                end += 1
            ids = [*ids[:end], prm.marker, *ids[end:]]
        texts.append(ids)
        ends.append(end)
    # They are padded on the right; `select` tells the cache how many tokens count.
    ids, fed = pad(texts, 0, cache.held.device)                                    # (n, T), (n,)
    scores = prm(ids, cache, rows)                                                 # (n, T, P)
    return scores[torch.arange(len(texts)), ends], fed


# --- exercise 12: select (4 points) ---
def select(state, scores, drawn, fed, alive):
    """The best candidate of every sequence goes on: both caches keep its step.
    -> winners (G',), k* = argmax_k r_k (paper, Sec. 5)

    scores (G', K): of the candidates of the sequences `alive` (G',), which are some of the G that
    `state` (State) holds. drawn, fed (G' K,): how many tokens of each candidate the policy's and
    the PRM's cache were fed, candidate k of the i-th of these sequences at i K + k."""
    K = scores.shape[1]
    winners = scores.argmax(-1)                                                    # (G',)
    chosen = torch.arange(len(alive), device=alive.device) * K + winners           # of G' K
    state.policy.keep(winners, drawn[chosen], alive)
    state.prm.keep(winners, fed[chosen], alive)
    return winners
# --- end of exercise 12 ---


# -- what may be asked for

def check_prompts(model, prompts, room):
    """InputError for an empty prompt, an id that is none, or no room for an answer.

    room: for each prompt the tokens that the context can still take."""
    for i, (prompt, limit) in enumerate(zip(prompts, room)):
        if not prompt:
            raise InputError(f"prompt {i} is empty; give it at least one token")
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise InputError(f"prompt {i} has ids from {min(prompt)} to {max(prompt)}, the "
                             f"vocabulary has those from 0 to {model.config.vocab_size - 1}")
        if len(prompt) >= limit:
            raise InputError(f"prompt {i} has {len(prompt)} tokens, the context has room for "
                             f"{limit} with the answer; shorten the prompt, or, where the "
                             "conversation is full, begin a new one")


def check_sampling(max_new_tokens, temperature=1.0, top_p=1.0, **others):
    """InputError for sampling options without a meaning."""
    # Logits divided by next to nothing overflow, and what is drawn from NaN is noise.
    meaningful = temperature == 0 or temperature >= 1e-6
    if not meaningful or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise InputError("need temperature >= 0 (1e-6 if not 0), 0 < top_p <= 1 and "
                         f"max_new_tokens >= 1, not {temperature}, {top_p}, {max_new_tokens}")


def open_state(model, prm, prompts, K, max_new_tokens, state):
    """The state in which guided_decode begins, a new one if none is given, and the context that
    policy and PRM share. InputError for what it cannot do."""
    if K < 1:
        raise InputError(f"K must be at least 1, not {K}")
    # The PRM must read every id as the policy means it. Vocabularies may be padded, with b"".
    pieces = [net.tokenizer.pieces if net.tokenizer else [] for net in (model, prm.backbone)]
    if any(own != other for own, other in zip_longest(*pieces, fillvalue=b"")):
        raise InputError("policy and PRM have different tokenizers; they must share their ids")
    # Behind the last step the PRM still needs room for its marker.
    markers = 0 if prm.marker is None else 1
    context = min(model.config.max_len, prm.backbone.config.max_len - markers)
    if state is None:
        # A cache with room for all that may come need not be made anew while an answer grows.
        room = min(context, max(map(len, prompts)) + max_new_tokens)
        caches = [net.new_cache(len(prompts), room) for net in (model, prm.backbone)]
        state = State(*caches)
    # What the caches hold counts too. The PRM's is never the emptier one.
    held = state.prm.held.tolist()
    if len(held) != len(prompts):
        raise InputError(f"the state carries {len(held)} conversations, not {len(prompts)}")
    check_prompts(model, prompts, [context - n for n in held])
    return state, context


def stop_masks(model, boundary):
    """Where steps end, as in Tokenizer.boundary_masks, on the model's device."""
    if model.tokenizer is not None:
        masks = model.tokenizer.boundary_masks(boundary)
    elif boundary == "turn":
        # Without a tokenizer there is no end of the turn: only the budget ends a response.
        masks = torch.zeros(4, model.config.vocab_size + 1, dtype=torch.bool)
    else:
        raise InputError(f"this model has no tokenizer: no {boundary} is known, only the turn")
    return [mask.to(model.embed.weight.device) for mask in masks]


def parse_weights(text, names, option="--weights", default=0.0, free=False):
    """'a=0.7,b=0.3' -> list of numbers, one per name, `default` for those not named.

    InputError for an unknown name, one given twice, a broken number; and if not `free`, where they
    may be anything up to a million, for a negative one, or all zero."""
    # What the text says, name by name.
    weights = {}
    for part in text.split(",") if text else []:
        name, _, value = part.partition("=")
        name = name.strip()
        if name not in names:
            raise InputError(f"{option}: no {name!r} here; choose from {', '.join(names)}")
        if name in weights:
            raise InputError(f"{option}: {name!r} is given twice")
        try:
            weights[name] = float(value)
        except ValueError:
            raise InputError(f"{option}: {part!r} is not NAME=NUMBER") from None
    # In the order of the names, with the default for those that it does not mention.
    found = [weights.get(name, default) for name in names]
    if free and not all(abs(w) <= 1e6 for w in found):
        raise InputError(f"{option}: {text!r} must be numbers from -1e6 to 1e6")
    if not free and (not all(0 <= w < float("inf") for w in found) or sum(found) <= 0):
        raise InputError(f"{option}: {text!r} must be non-negative numbers with a positive sum")
    return found


# -- runs

def read_run(run):
    """The configuration of a run directory, its "objectives" as a list of Objective.

    InputError if its config.json is that of something else."""
    path = f"{run}/config.json"
    config = read_json(path)
    if not isinstance(config, dict) or not {"objectives", "temperature"} <= config.keys():
        raise InputError(f"{path}: not the configuration of a run")
    config["objectives"] = read_objectives(f"{path}: objectives", config["objectives"])
    return config


def find_model(run, *names):
    """The directory of the first of these models that a run has: its PRM for a guide is
    prm_<guide>, else prm, the unified one. InputError says what the run has."""
    for name in names:
        if os.path.isfile(f"{run}/{name}/config.json"):
            return f"{run}/{name}"
    known = sorted(entry.name for entry in os.scandir(run) if entry.is_dir())
    raise InputError(f"{run}: no {' nor '.join(names)} here; it holds {', '.join(known)}")


def domain_mix(heads, domain, objectives):
    """Weights for heads (names): uniform over those of one domain among the run's objectives, or
    over the only one."""
    names = [o.name for o in objectives if o.domain == domain]
    return [float(len(heads) == 1 or head in names) for head in heads]


# -- the command line

def next_turn(tokenizer, answer, message):
    """The user's next message behind an answer (ids) -> the ids that no cache holds yet."""
    # An answer that was cut off lacks the end-of-turn token, which the user's words follow.
    closing = [] if answer[-1] == tokenizer.eos_id else [tokenizer.eos_id]
    return closing + tokenizer.encode_turn(message)


def parse_args(argv):
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, asked = parser.add_argument, parser.add_mutually_exclusive_group()
    add("run", help="a run directory written by train.py")
    asked.add_argument("--prompt", help="the user's message; without it, lines from standard input "
                       "are turns of one conversation. Blank lines say nothing")
    asked.add_argument("--file", help="a file of prompts that have nothing to do with each other, "
                       'one a line; each answer is one line, {"prompt": ..., "answer": ...}')
    add("--system", help="what the system says before the user's first message")
    add("--quiet", action="store_true", help="print the answers alone, no candidates")
    add("--policy", default="mah_dpo", help="which model of the run answers (default mah_dpo)")
    add("--weights", help="mix of heads, NAME=NUMBER,...; default: uniform over the domain of the "
        "guide (of the run's first objective for 'unified')")
    add("--free", action="store_true", help="take --weights as they are, any numbers: each says "
        "how far to go from SFT's head towards its own, such as 1.5 or -0.5")
    add("--guide", help="objective that guides, NAME=NUMBER,... for several, 'unified' for all of "
        "a domain, 'worst' for the one that a step serves worst; default: that of the largest "
        "weight, else the run's first")
    add("--prm", help="directory of another reward model that guides instead of the run's own")
    add("--k", type=int, default=5, help="candidates per step (default 5; 1 with temperature 0)")
    add("--max-new-tokens", type=int, help="longest answer in tokens; default: the domain's, such "
        "as 72 in maths; of a run with --init that run's --max-new-tokens")
    add("--temperature", type=float, help="default: the run's own")
    add("--seed", type=int, default=0, help="seed of the random draws (default 0)")
    add("--template-args", default="", help="variables for a checkpoint's chat template, "
        "NAME=VALUE,..., such as enable_thinking=false; default: the run's own")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**31:
        raise InputError(f"--seed {args.seed} is out of range")
    if args.free and args.weights is None:
        raise InputError("--free needs --weights")
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt is blank; say something")
    return args


def user_messages(args):
    """Yield (file and line, the user's message): --prompt, else the lines of --file or of standard
    input."""
    where, lines = args.file or "standard input", sys.stdin
    if args.prompt is not None:
        where, lines = "--prompt", [args.prompt]
    elif args.file is not None:
        with open(args.file, encoding="utf-8-sig") as f:
            lines = f.readlines()
    for number, line in enumerate(lines, 1):
        # A blank line is no message.
        if line.strip():
            yield f"{where}:{number}", line.strip()


def show_steps(tokenizer, steps):
    """Print the candidates of every step with the PRM's own scores, of "unified" one for each
    output that guides, the winner marked."""
    for number, step in enumerate(steps, 1):
        print(f"step {number}")
        for k, (ids, values) in enumerate(zip(step.candidates, step.values)):
            mark = "->" if k == step.winner else "  "
            ended = " [end]" if ids[-1] == tokenizer.eos_id else ""
            shown = " ".join([f"{value:+8.4f}" for value in values])
            print(f"  {mark} {shown}  {tokenizer.decode(ids)!r}{ended}")


def main(argv=None):
    """The command line: guided answers of a finished run, every candidate shown."""
    args = parse_args(argv)
    config = read_run(args.run)
    check_files(args.run, "config.json", args.policy)
    model = load_hf(find_model(args.run, args.policy))
    tokenizer, heads = model.tokenizer, model.config.objectives
    use_template_args(tokenizer, args.template_args)
    # The leading objective says where steps end, and without --weights which heads speak: the
    # guide, of several the first, else that of the largest weight, else the run's first.
    weights = heaviest = None
    if args.weights is not None:
        weights = parse_weights(args.weights, heads, free=args.free)
        heaviest = heads[weights.index(max(weights))]
    objectives = config["objectives"]
    known = {o.name: o for o in objectives}
    first = (args.guide or "").partition("=")[0].strip()
    leading = known.get(first) or known.get(heaviest) or objectives[0]
    if weights is None:
        weights = domain_mix(heads, leading.domain, objectives)
    if args.free:
        check_files(args.run, "sft")
        sft = load_hf(find_model(args.run, "sft"))
        weights = model.fold_free(weights, sft.heads[0].weight)
    # A PRM from elsewhere may call its outputs what it likes: all of them guide.
    guide = args.guide or ("unified" if args.prm else leading.name)
    path = args.prm or find_model(args.run, f"prm_{guide}", "prm")
    check_files(Path(path).parent, Path(path).name)
    prm = load_prm(path)
    if "=" in guide:
        guide = dict(zip(prm.names, parse_weights(guide, prm.names, "--guide")))
    temperature = config["temperature"] if args.temperature is None else args.temperature
    # An embedded model's answers were never longer than its world lets them be.
    longest = config["max_new_tokens"] if config["init"] else DOMAINS[leading.domain].max_new_tokens
    limit = longest if args.max_new_tokens is None else args.max_new_tokens
    system = [{"role": "system", "content": args.system}] if args.system else []
    answer = None
    for where, message in user_messages(args):
        # A message begins a conversation, or is the next turn of the one under way: then only the
        # new words are fed, and the answer goes on from the state of the last.
        if answer is None or args.file:
            state, generator = None, torch.Generator().manual_seed(args.seed)
            new = tokenizer.encode_chat([*system, {"role": "user", "content": message}])
        else:
            state, new = answer.state, next_turn(tokenizer, answer.ids, message)
        try:
            answer, = guided_decode(model, prm, [new], boundary=leading.boundary, K=args.k,
                                    weights=weights, guide=guide, temperature=temperature,
                                    max_new_tokens=limit, generator=generator, state=state)
        except InputError as e:
            raise InputError(f"{where}: {e}") from None
        text = answer.text
        if args.file:
            text = json.dumps({"prompt": message, "answer": text})
        elif not args.quiet:
            show_steps(tokenizer, answer.steps)
        print(text, flush=True)


if __name__ == "__main__":
    run_command(main)
