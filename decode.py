"""decode.py: sampling, and PRM-guided best-of-K that carries its caches (paper, Sec. 5).

From the running state (the KV caches of policy and PRM, and the policy's hidden state at the last
token), for every prompt at once, until each answer has ended:

    draw     K candidates as one batch, one forward per token, until a step ends (newline,
             sentence or end of turn)
    score    r_k = P(x, y_1:t, y^k_{t+1}): the PRM reads the candidates' tokens behind its cache
    select   k* = argmax_k r_k: its step joins the shared prefix, its hidden state goes on

Nothing that was committed is ever encoded again, by the policy or by the PRM, nor in the next turn
of a conversation. What is committed are token ids; text is derived from them.

Read `sample` and `draw`, then `guided_decode`, whose loop is the three lines above. Plain
generation is `draw` alone, with the end of the turn as the only boundary. Checks of what the user
gave, and the command line, come last. Before: mah_dpo.py; next: evaluate.py.

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

from data import InputError, ends_step, pad, read_json, read_objectives, run_command
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


def prefill(net, cache, prompts):
    """Feed new text to one row of every sequence and commit it to the prefix.

    prompts: G ragged id lists -> hidden states (or scores) at their last tokens (G, d)."""
    ids, n = pad(prompts, 0, cache.held.device)                                    # (G, T), (G,)
    g = torch.arange(len(prompts), device=ids.device)
    out = net(ids, cache, g[:, None] * cache.K)                                    # (G, T, d)
    # Of every row only the first n tokens are text; the rest is padding.
    cache.keep(0, n)
    return out[g, n - 1]


def alive_rows(done, K):
    """done (G K,) -> the rows that go on, as a grid (G', m): G' sequences, m the most rows of one.

    None, which means all rows, if none is done."""
    if not bool(done.any()):
        return None
    done = done.view(-1, K)
    going = (~done).sum(1)                                                         # (G,)
    groups = going.nonzero()[:, 0]                                                 # (G',)
    # Within a sequence the rows that go on come first; the places of others repeat the first.
    order = done.int().argsort(dim=1, stable=True)                                 # (G, K)
    order = torch.where(done.gather(1, order), order[:, :1], order)
    most = int(going.max())
    return groups[:, None] * K + order[groups, :most]


def flat(rows):
    """A grid of rows -> an index for tensors of all rows."""
    return slice(None) if rows is None else rows.flatten()


def draw(model, head, cache, h, masks, limits, *, temperature, top_k, top_p, generator,
         feed_last):
    """Sample every row until its step ends -> list of id lists, for all rows with a limit.

    head (V, d): folded. h (R, d): hidden state at the last token of every row, R = G K, updated
    in place. masks: where a step ends, as in Tokenizer.boundary_masks. limits (R,): the most new
    tokens of a row, 0 for all rows of a sequence that has ended. feed_last: feed the last token
    too, so that cache and h are ready to go on."""
    done = limits < 1
    finished = False
    rows = alive_rows(done, cache.K)
    tokens, count = [], torch.zeros_like(limits)
    # The index behind the vocabulary's last stands for "no token before".
    previous = before = torch.full_like(limits, len(masks[0]) - 1)
    # Computed are the n rows of the grid `rows`; `done` (R,) says which of all have stopped.
    while not finished:
        # One number for every row, also for those that have stopped: what a row says does not
        # depend on when others stop.
        u = torch.rand(len(h), generator=generator).to(h.device)                   # (R,)
        at = flat(rows)
        logits = linear(h[at], head)                                               # (n, V)
        token = torch.zeros_like(limits)      # (R,), of which rows that have stopped get no token
        token[at] = sample(logits, u[at], temperature, top_k, top_p)
        tokens.append(token)
        # Rows that had not stopped before got this token. Which has it stopped?
        going = ~done
        count += going
        done = done | ends_step(masks, token, previous, before) | (count >= limits)
        previous, before = token, previous
        finished = bool(done.all())           # the one flag per token that the host waits for
        if finished and not feed_last:
            break
        # A CPU drops rows that have stopped, before their last token is fed or, with feed_last,
        # after it. An accelerator feeds them on, so that shapes stay the same.
        left = alive_rows(done, cache.K) if h.device.type == "cpu" else rows
        fed = rows if feed_last else left
        # A hidden state changes where a token was new: rows that had stopped keep theirs.
        at = flat(fed)
        new = model(token[at, None], cache, fed)[:, 0]                             # (n, d)
        h[at] = torch.where(going[at, None], new, h[at])
        rows = left
    table = torch.stack(tokens, 1).tolist()                                        # (R, T)
    return [row[:n] for row, n in zip(table, count.tolist()) if n]


@torch.inference_mode()
def generate(model, prompts, *, weights=0, max_new_tokens, temperature=1.0, top_k=50, top_p=1.0,
             generator=None, samples=1, batch_size=512, progress=None):
    """Ragged prompts (id lists) -> id lists, each up to and including EOS or max_new_tokens long.

    weights: as in GPT.weights. max_new_tokens: a number, or one per prompt. samples: responses
    per prompt, which stand together in the result; a prompt is encoded once for all of them.
    progress: called with the number of new responses after each batch of batch_size."""
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * len(prompts)
    check_prompts(prompts, [model.config.max_len] * len(prompts))
    check_sampling(min(max_new_tokens, default=1), temperature, top_p)
    head, masks = model.fold(weights), stop_masks(model, "turn")
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
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
        # Each prompt's state and limit serve all its samples.
        h = h.repeat_interleave(samples, 0)                                        # (G samples, d)
        limits = limits.repeat_interleave(samples)                                 # (G samples,)
        drawn = draw(model, head, cache.fork(samples), h, masks, limits, feed_last=False,
                     **sampling)
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
    h: torch.Tensor       # (G K, d) the policy's hidden state at the last token of every row


@dataclass
class Step:
    """One step of one answer."""
    candidates: list      # K id lists
    scores: list          # K numbers, the PRM's
    winner: int           # index of the candidate that was committed


@dataclass
class Guided:
    """One prompt's answer."""
    ids: list
    text: str
    steps: list
    state: State          # what a next turn goes on from, shared by all answers of a call


@torch.inference_mode()
def guided_decode(model, prm, prompts, *, boundary, K=5, weights=0, guide="unified",
                  max_new_tokens, temperature=1.0, top_k=50, top_p=1.0, generator=None, state=None):
    """PRM-guided best-of-K (paper, Sec. 5) for B ragged prompts at once -> list of B Guided.

    boundary: newline | sentence | turn. guide: one of the PRM's outputs, or "unified".
    state: that of an earlier call for the same conversations, which this call changes in place;
    prompts are then only the new tokens (the end of the turn is in the caches already).
    InputError for a prompt that does not fit, K < 1, a guide that the PRM lacks, scores that are
    not finite."""
    check_sampling(max_new_tokens, temperature, top_p)
    K, context = check_guided(model, prm, prompts, K, temperature, guide, boundary, state)
    # How tokens are drawn, where steps end, and the state behind the prompts.
    head, masks = model.fold(weights), stop_masks(model, boundary)
    eos = model.tokenizer.eos_id if model.tokenizer else None
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    state = read_prompts(model, prm, prompts, K, min(max_new_tokens, context), state)
    results = [Guided([], "", [], state) for _ in prompts]
    budgets = [max_new_tokens] * len(prompts)
    while True:
        # The B' answers that go on. The PRM's cache bounds them too: it may hold markers besides.
        left = torch.minimum(state.prm.held.new_tensor(budgets), context - state.prm.held)
        left = left.clamp(min=0)                                                   # (B,)
        alive = left.nonzero()[:, 0]                                               # (B',)
        if len(alive) == 0:
            break
        # Draw K candidates for the next step of each.
        limits = left.repeat_interleave(K)                                         # (B K,)
        candidates = draw(model, head, state.policy, state.h, masks, limits, feed_last=True,
                          **sampling)
        drawn = torch.tensor([len(ids) for ids in candidates], device=alive.device)
        # Score them with every output of the PRM; the guide makes one number of these.
        rows = alive_rows(limits < 1, K)                                           # (B', K)
        outputs, fed = score_candidates(prm, state.prm, candidates, rows)          # (B' K, P)
        scores = prm.guide(outputs, guide, boundary).view(-1, K)                   # (B', K)
        if not bool(scores.isfinite().all()):      # the largest of NaN would be any of them
            number = len(results[alive[0]].steps) + 1
            raise InputError(f"step {number}: the PRM's scores are not finite: {scores.tolist()}")
        # Select the best; both caches and h go on from it.
        winners = select(state, scores, drawn, fed, alive)                         # (B',)
        # Write down what won, and how much may still be said. Candidates stand prompt by prompt.
        rounds = zip(alive.tolist(), scores.tolist(), winners.tolist())
        for i, (b, points, winner) in enumerate(rounds):
            own, answer = candidates[i * K:(i + 1) * K], results[b]
            answer.steps.append(Step(own, points, winner))
            answer.ids += own[winner]
            ended = answer.ids[-1] == eos
            budgets[b] = 0 if ended else max_new_tokens - len(answer.ids)
    # Text is made of what was committed, never the other way round.
    for result in results:
        result.text = model.tokenizer.decode(result.ids) if model.tokenizer else ""
    return results


def read_prompts(model, prm, prompts, K, room, state):
    """Feed prompts to policy and PRM -> State, a new one with room for `room` tokens of an answer,
    or the given one. A prompt is encoded once, by one row; K candidates share its prefix."""
    if state is None:
        # A cache with room for all that may come need not be made anew while an answer grows.
        size = len(prompts), max(map(len, prompts)) + room
        state = State(model.new_cache(*size), prm.backbone.new_cache(*size), None)
    h = prefill(model, state.policy, prompts)                                      # (B, d)
    prefill(prm, state.prm, prompts)
    if state.policy.K != K:
        state.policy, state.prm = state.policy.fork(K), state.prm.fork(K)
    state.h = h.repeat_interleave(K, 0)                                            # (B K, d)
    return state


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
    """The best candidate of every sequence goes on: both caches keep its step, all K rows its
    hidden state. -> winners (G',), k* = argmax_k r_k (paper, Sec. 5)

    scores (G', K): of the candidates of the sequences `alive` (G',), which are some of the G that
    `state` holds. state (State) is changed in place; its h is (G K, d), candidate k of sequence g
    at row g K + k. drawn, fed (G' K,): how many tokens of each candidate the policy's and the
    PRM's cache were fed."""
    K = scores.shape[1]
    winners = scores.argmax(-1)                                                    # (G',)
    chosen = torch.arange(len(alive), device=alive.device) * K + winners           # of G' K
    state.policy.keep(winners, drawn[chosen], alive)
    state.prm.keep(winners, fed[chosen], alive)
    h = state.h.view(-1, K, state.h.shape[-1])                                     # (G, K, d)
    h[alive] = h[alive, winners][:, None]
    return winners
# --- end of exercise 12 ---


# -- what may be asked for

def check_prompts(prompts, room):
    """InputError for an empty prompt, or one that leaves no room for an answer.

    room: for each prompt the tokens that the context can still take."""
    for i, (prompt, limit) in enumerate(zip(prompts, room)):
        if not prompt:
            raise InputError(f"prompt {i} is empty; give it at least one token")
        if len(prompt) >= limit:
            raise InputError(f"prompt {i} has {len(prompt)} tokens, the context has room for "
                             f"{limit} with the answer; shorten the prompt")


def check_sampling(max_new_tokens, temperature, top_p):
    """InputError for sampling options without a meaning."""
    # Logits divided by next to nothing overflow, and what is drawn from NaN is noise.
    meaningful = temperature == 0 or temperature >= 1e-6
    if not meaningful or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise InputError("need temperature >= 0 (1e-6 if not 0), 0 < top_p <= 1 and "
                         f"max_new_tokens >= 1, not {temperature}, {top_p}, {max_new_tokens}")


def check_guided(model, prm, prompts, K, temperature, guide, boundary, state):
    """Refuse what guided_decode cannot do -> (K, the context that policy and PRM share)."""
    if K < 1:
        raise InputError(f"K must be at least 1, not {K}")
    prm.guide(prm.scale, guide, boundary)                      # refuses a guide that it lacks
    # The PRM must read every id as the policy means it. Vocabularies may be padded, with b"".
    pieces = [net.tokenizer.pieces if net.tokenizer else [] for net in (model, prm.backbone)]
    if any(own != other for own, other in zip_longest(*pieces, fillvalue=b"")):
        raise InputError("policy and PRM have different tokenizers; they must share their ids")
    # Equal candidates would be drawn K times and scored K times.
    if temperature == 0 and K > 1:
        warnings.warn("temperature 0 makes all candidates equal: K = 1", stacklevel=4)
        K = 1
    # Behind the last step the PRM still needs room for its marker.
    markers = 0 if prm.marker is None else 1
    context = min(model.config.max_len, prm.backbone.config.max_len - markers)
    # What the caches hold counts too. The PRM's is never the emptier one.
    held = [0] * len(prompts)
    if state is not None:
        held = state.prm.held.tolist()
        if (len(held), state.policy.K) != (len(prompts), K):
            raise InputError(f"the state carries {len(held)} conversations with K = "
                             f"{state.policy.K} candidates, not {len(prompts)} with K = {K}")
    check_prompts(prompts, [context - n for n in held])
    return K, context


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


def parse_weights(text, names, option="--weights", default=0.0):
    """'a=0.7,b=0.3' -> list of numbers, one per name, `default` for those not named.

    InputError for an unknown name, one given twice, a broken or negative number, all zero."""
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
    if not all(0 <= w < float("inf") for w in found) or sum(found) <= 0:
        raise InputError(f"{option}: {text!r} must be non-negative numbers with a positive sum")
    return found


# -- runs

def read_run(run):
    """The configuration of a run directory, its "objectives" as a list of Objective.

    InputError if its config.json is that of something else."""
    path = os.path.join(run, "config.json")
    config = read_json(path)
    if not isinstance(config, dict) or not {"objectives", "temperature"} <= config.keys():
        raise InputError(f"{path}: not the configuration of a run")
    config["objectives"] = read_objectives(f"{path}: objectives", config["objectives"])
    return config


def find_prm(run, guide, dtype=torch.float32):
    """The PRM of a run that guides by `guide`: RUN/prm_<guide>, else RUN/prm, the unified one."""
    for name in (f"prm_{guide}", "prm"):
        path = os.path.join(run, name)
        if os.path.isdir(path):
            return load_prm(path, dtype)
    raise InputError(f"{run}: neither prm_{guide} nor prm, the unified PRM, is here; guide by an "
                     "objective that has its own")


def domain_mix(heads, domain, objectives):
    """Weights for heads (names): uniform over those of one domain among the run's objectives, or
    over the only one."""
    names = [o.name for o in objectives if o.domain == domain]
    return [float(len(heads) == 1 or head in names) for head in heads]


# -- the command line

def show_step(tokenizer, step):
    """Print one step's candidates with their scores, the winner marked."""
    for k, (ids, score) in enumerate(zip(step.candidates, step.scores)):
        mark = "->" if k == step.winner else "  "
        ended = " [end]" if ids[-1] == tokenizer.eos_id else ""
        print(f"  {mark} {score:+8.4f}  {tokenizer.decode(ids)!r}{ended}")


def parse_args(argv):
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", help="a run directory written by train.py")
    add("--prompt", help="the user's message; without it, lines from standard input are turns")
    add("--policy", default="mah_dpo", help="which model of the run answers (default mah_dpo)")
    add("--weights", help="mix of heads, NAME=NUMBER,...; default: uniform over the domain of the "
        "guide (of the run's first objective for 'unified')")
    add("--guide", help="objective that guides, or 'unified'; default: that of the largest "
        "weight, else the run's first")
    add("--prm", help="directory of another reward model that guides instead of the run's own")
    add("--k", type=int, default=5, help="candidates per step (default 5)")
    add("--max-new-tokens", type=int, default=64, help="longest answer in tokens (default 64)")
    add("--temperature", type=float, help="default: the run's own")
    add("--seed", type=int, default=0, help="seed of the random draws (default 0)")
    add("--template-args", default="", help="variables for a checkpoint's chat template, "
        "NAME=VALUE,..., such as enable_thinking=false; default: the run's own")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**31:
        raise InputError(f"--seed {args.seed} is out of range")
    return args


def main(argv=None):
    """The command line: guided answers of a finished run, every candidate shown."""
    args = parse_args(argv)
    config = read_run(args.run)
    model = load_hf(os.path.join(args.run, args.policy))
    tokenizer, heads = model.tokenizer, model.config.objectives
    use_template_args(tokenizer, args.template_args)
    # The leading objective says where steps end, and without --weights which heads speak: the
    # guide, else that of the largest weight, else the run's first.
    weights = heaviest = None
    if args.weights is not None:
        weights = parse_weights(args.weights, heads)
        heaviest = heads[weights.index(max(weights))]
    known = {o.name: o for o in config["objectives"]}
    leading = known.get(args.guide) or known.get(heaviest) or config["objectives"][0]
    if weights is None:
        weights = domain_mix(heads, leading.domain, config["objectives"])
    # A PRM from elsewhere may call its outputs what it likes: all of them guide.
    guide = args.guide or ("unified" if args.prm else leading.name)
    prm = load_prm(args.prm) if args.prm else find_prm(args.run, guide)
    # Each line is a turn of one conversation; its answer goes on from the state of the last.
    temperature = config["temperature"] if args.temperature is None else args.temperature
    generator = torch.Generator().manual_seed(args.seed)
    state, ids = None, []
    for line in sys.stdin if args.prompt is None else [args.prompt]:
        if state is None:
            new = tokenizer.encode_chat([{"role": "user", "content": line.strip()}])
        else:
            # Only the new words are fed; an answer that was cut off is closed before them.
            closing = [] if ids[-1] == tokenizer.eos_id else [tokenizer.eos_id]
            new = closing + tokenizer.encode_turn(line.strip())
        result, = guided_decode(model, prm, [new], boundary=leading.boundary, K=args.k,
                                weights=weights, guide=guide, max_new_tokens=args.max_new_tokens,
                                temperature=temperature, generator=generator, state=state)
        ids, state = result.ids, result.state
        for number, step in enumerate(result.steps, 1):
            print(f"step {number}")
            show_step(tokenizer, step)
        print(result.text, flush=True)


if __name__ == "__main__":
    run_command(main)
