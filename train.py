"""train.py: the whole method, one stage after another, from one command. Before: evaluate.py.

    python train.py --objective all

    base       pre-training on flawed demonstrations of three small worlds; with --init a real
               checkpoint instead
    sft        fine-tuning on better demonstrations: the reference policy pi_ref
    pairs      responses of the SFT policy, judged: preference pairs of every objective
    policies   trained on these: single-head DPO, one DPO per objective (the soup), MODPO, MAH-DPO
    labels     rollouts and judged answers of SFT and of MAH-DPO, the two that will be guided
    prm        the process reward model, one output per objective
    tables     every policy measured on unseen prompts, alone and guided

The stages are rows of a table, see `stages`. A stage is a function of the options, the seed and the
files of earlier stages; its last file says that it has finished.
    --resume RUN   skips what is finished and starts the unfinished stage again, a training from its
                   last checkpoint. It ends with the same bits as a run that nobody stopped.
    --from RUN     starts a new run from copies of what RUN has finished under the same options.
    --seeds N      trains N times, in RUN/seed=..., and puts the tables over the trainings into RUN.
    --data DIR     reads real data, for objectives of any name. DIR/<objective>.jsonl: preference
                   pairs, or if it is verifiable questions with final answers, which are sampled and
                   verified; and, where it exists, DIR/<objective>.steps.jsonl: labelled steps.
                   DIR/objectives.json may say what an objective is, such as {"brevity": {"domain":
                   "style", "case": "C", "boundary": "newline"}}; if not, it is of case C.
    --fast         makes everything small, to see that it works.

Read in this order: the stages from `train_base` to `measure_prm`; their table `stages`; the
training loop `fit`; then runs in directories. All options stand in interop/options.py; how files
survive a kill is in interop/resume.py.
"""
import math
import os
import signal
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (CASES, DOMAINS, PROMPTS, RNG, InputError, Tokenizer, World, batches_by_length,
                  dealt_batches, judge, pad, read_json, run_command, write_json)
from decode import domain_mix, generate, parse_weights
from evaluate import (OUTPUTS, SINGLE, average, converse, evaluate, load_rows, pair_metrics_rows,
                      plain_responder, publish, seed_of, seed_runs)
from interop.manifest import check_files, forget_files, note_files
from interop.options import METHODS, check_config, read_command
from interop.parallel import (even, gather, head_norm, in_threads, inner_products,
                              join_processes, local_items, parameters_of, placed, rank, ranks,
                              reaching, shard, total, whole)
from interop.real_data import (describe_data, load_base, objectives_of, real_labels, real_pairs,
                               worlds_of)
from interop.resume import (at_work, clear, copy_stages, finished, free_name, load_checkpoint,
                            load_config, log_rows, new_directory, read_rows, run_key,
                            save_checkpoint, save_config, stops_wait, write_rows)
from mah_dpo import (Pair, balanced_mean, combine, mah_dpo_loss, make_optimizer, modpo_loss,
                     own_heads, pair_logps, pair_metrics, policy_logps)
from model import GPT, GPTConfig, emulates_bf16, load_hf, pick_device, sampling_dtype, save_hf
from prm import (PRM, SECOND, STEP, STEP_OUTPUT, Labelled, bradley_terry_loss, graded_labels,
                 hindsight_targets, majority_labels, pair_scores, save_prm, scores_at, step_loss,
                 step_scores)


# -- what the stages share

class Run:
    """A run directory, its options and objectives, and the random draws of its stages."""

    def __init__(self, path, config, objectives=None):
        """objectives: the records in an old run's config.json; a new run looks them up."""
        if objectives is None:
            objectives = objectives_of(config.objective, config.data)
        self.path = path
        self.config = config
        self.objectives = objectives
        self.names = [o.name for o in objectives]
        self.domains = {}                       # {domain: names of its objectives}
        for o in objectives:
            self.domains.setdefault(o.domain, []).append(o.name)
        self.device = pick_device(config.device)
        # Large models answer one after another.
        self.alone = bool(config.init) or self.device != "cpu"
        self.key = run_key(asdict(config), objectives)      # of its options and data

    def file(self, name):
        """The path of one of the run's files."""
        return os.path.join(self.path, name)

    def generator(self, *purpose):
        """A torch.Generator for one purpose: the draws of one stage do not shift another's."""
        return torch.Generator().manual_seed(seed_of(self.config.seed, *purpose))

    def rng(self, *purpose):
        """Draws of Python numbers for one purpose."""
        return RNG(seed_of(self.config.seed, *purpose))

    def load(self, name):
        """A trained model of this run, ready to train on; several processes share its weights."""
        model = load_hf(self.file(name), place=partial(placed, device=self.device))
        model.grad_checkpoint = self.config.grad_checkpoint
        return model

    def worlds(self, model):
        """The worlds to sample and measure in: the embedded ones, or the questions of --data."""
        config = self.config
        found = worlds_of(self.objectives, config.data, config.max_new_tokens, model)
        return list(found.values())

    def autocast(self):
        """The context in which training computes: bfloat16 where --dtype says so."""
        # autocast's cache of weights in bfloat16 would undo the sharding over several processes.
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.config.dtype == "bf16",
                              cache_enabled=ranks() == 1)

    def log(self, stage, rows, name="log.jsonl"):
        """Put a stage's rows into log.jsonl; what an interrupted attempt left of it is replaced.

        This comes before the file that says the stage is finished: a kill between the two would
        lose the rows. Figures of time go to timings.jsonl, so that all else can repeat."""
        path = self.file(name)
        kept = [row for row in log_rows(path) if row["stage"] != stage]
        write_rows(path, kept + [{"stage": stage} | row for row in rows])


def shuffled(items, generator):
    """A list in random order."""
    order = torch.randperm(len(items), generator=generator).tolist()
    return [items[i] for i in order]


def endless(items, generator):
    """Items in random order without end: all of them come before any comes again."""
    assert items, "nothing to draw from"
    while True:
        yield from shuffled(items, generator)


def dealt_parts(batch):
    """This process's items of a batch, in lists of similar length, so that little is padded."""
    parts = []
    lengths = [item.lengths if isinstance(item, Pair) else len(item) for item in batch]
    for index in dealt_batches(lengths):
        parts.append([batch[i] for i in index])
    return parts


def mixed_batches(streams, sizes):
    """Endless batches, each of the next sizes[i] items of streams[i]."""
    while True:
        batch = []
        for stream, size in zip(streams, sizes):
            batch += islice(stream, size)
        yield batch


# -- stages base and sft: language models
#
# Both learn to predict the next token of conversations. The base model reads those of careless
# people; SFT then learns from careful ones, and only what the assistant says.

@dataclass
class Example:
    """A text to learn from; the loss counts the tokens whose mask is True."""
    ids: list
    mask: list
    where: str          # tells a person which it is

    def __len__(self):
        return len(self.ids)


def chat_example(tokenizer, messages, n=1):
    """A conversation -> ids, mask: the assistant's tokens and ends of turn are learnt. The first n
    messages, which the user ends, are the prompt."""
    ids = list(tokenizer.encode_chat(messages[:n]))
    mask = [False] * len(ids)
    for message in messages[n:]:
        learnt = message["role"] == "assistant"
        # As when the model talks: ids only grow, and are never made anew from text. A checkpoint's
        # template may write an old answer otherwise; prompt and answer must not merge.
        if learnt:
            new = tokenizer.encode(message["content"]) + [tokenizer.eos_id]
        else:
            new = tokenizer.encode_turn(message["content"])
        ids += new
        mask += [learnt] * len(new)
    return ids, mask


def demonstrations(worlds, n, rng, tokenizer, careful):
    """Examples of n conversations of each world; those of careful demonstrators err less."""
    examples = []
    for world in worlds:
        for problem in world.problems("train", n, rng):
            messages = world.conversation(problem, rng, careful)
            ids, mask = chat_example(tokenizer, messages, len(problem.messages()))
            examples.append(Example(ids, mask, f"the example {messages[0]['content'][:60]!r}..."))
    return examples


def train_base(run, name):
    """Stage base: the embedded base model, or the checkpoint that --init names."""
    config, tokenizer = run.config, Tokenizer.embedded()
    if config.init:
        model = load_base(config.init, run.device, config.template_args)
        save_hf(model, run.file(name), weights=0)
        return
    # All worlds, whatever the objectives: a base model knows a bit of everything.
    examples = demonstrations(DOMAINS.values(), 8000, run.rng("base", "data"), tokenizer, False)
    for example in examples:
        example.mask = [True] * len(example)            # a base model learns the user's words too
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab), run.generator("base", "weights"))
    model.tokenizer = tokenizer
    model = shard(model.to(run.device), run.device)
    language_model(run, name, model, examples, config.base_steps, config.base_lr, 64)


def train_sft(run, name):
    """Stage sft: fine-tuning on careful demonstrations, or on chosen responses of real pairs."""
    model, config = run.load("base"), run.config
    examples = sft_examples(run, model)
    language_model(run, name, model, examples, config.sft_steps, config.sft_lr, config.sft_batch)


def sft_examples(run, model):
    """The Examples of stage sft. InputError if one is longer than the model's context."""
    config, tokenizer = run.config, model.tokenizer
    n = min(2500, 25 * config.sft_steps)
    examples = demonstrations(run.worlds(model), n, run.rng("sft", "data"), tokenizer, True)
    # With --data the chosen responses are the demonstrations. (_: what was left out.)
    pairs, _ = real_pairs(config.data, run.objectives, model)
    for pair in choose(pairs, run.names, "train"):
        mask = [False] * len(pair.prompt) + [True] * len(pair.chosen)
        where = f"the example {tokenizer.decode(pair.prompt)[:60]!r}..."
        examples.append(Example(pair.prompt + pair.chosen, mask, where))
    longest = max(map(len, examples))
    if longest > model.config.max_len:
        raise InputError(f"{config.init}: a context of {model.config.max_len} tokens is too short; "
                         f"the embedded worlds' conversations reach {longest} in its vocabulary")
    return examples


def language_model(run, name, model, examples, steps, lr, size):
    """Next-token training on the masked tokens of Examples, `size` a batch; logs and saves."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01,
                                  fused=True)

    def loss_of(part, batch):
        ids, _ = pad([e.ids for e in part], model.tokenizer.pad_id, run.device)     # (B, T)
        mask, _ = pad([e.mask for e in part], False, run.device)                    # (B, T)
        # The token at t + 1 is predicted by the hidden state at t.
        b, t = mask[:, 1:].nonzero(as_tuple=True)                                   # (N,)
        with run.autocast():
            logits = model.logits(model(ids)[b, t]).float()                         # (N, V)
            loss = F.cross_entropy(logits, ids[b, t + 1], reduction="sum")
        # The mean over the tokens of the whole batch.
        loss = loss / sum([sum(e.mask[1:]) for e in batch])
        return loss, {"loss": loss.detach()}

    batches = length_batches(examples, size, run.generator(name))
    fit(run, name, model, optimizer, steps, len(examples) / size, batches, loss_of, warm_up=40,
        decay="cosine")
    save_hf(model, run.file(name), weights=0)


def length_batches(items, size, generator):
    """Endless batches of items of similar length: every epoch is shuffled, then sorted in windows
    of 16 batches. What several processes cannot share evenly waits for another epoch."""
    if len(items) < ranks():
        raise InputError(f"{len(items)} examples are too few for {ranks()} processes")
    while True:
        order = shuffled(items, generator)
        batches = []
        for start in range(0, len(items), 16 * size):
            # Neighbours in a sorted window are of similar length, so that little is padded.
            window = sorted(order[start:start + 16 * size], key=len)
            batches += [window[i:i + size] for i in range(0, len(window), size)]
        # Long and short batches take turns at random.
        for batch in reversed(shuffled(batches, generator)):
            if even(batch):
                yield even(batch)


# -- stage pairs: a policy's samples, judged
#
# A policy answers every prompt several times. Each answer gets a rating for every objective, and
# the best and the worst become a pair: what is good for one objective may be bad for another.

class Source(NamedTuple):
    """Where samples come from: a policy of the run that answers problems of a world and split."""
    run: Run
    policy: str
    model: GPT
    world: World
    split: str

    @property
    def mix(self):
        """The weights of the policy's heads in this world: uniform over those of its domain."""
        return domain_mix(self.model.config.objectives, self.world.name, self.run.objectives)

    def objectives(self, *cases):
        """The names of the run's objectives of these cases that the world scores."""
        scored = self.world.objectives
        return [o.name for o in self.run.objectives if o.case in cases and o.name in scored]

    def bar(self, what, n):
        """A progress bar."""
        title = f"{self.world.name}: {what} of {self.policy}, {self.split}"
        return tqdm(total=n, desc=title, disable=None)


def sources_of(run, policy):
    """A policy of this run, and a Source for each world and split in which it is to answer."""
    # Several processes share the prompts, each with the whole model: if they shared the model,
    # every token would wait for all of them.
    model = load_hf(run.file(policy), dtype=sampling_dtype(run.config.dtype, run.device),
                    place=partial(torch.Tensor.to, device=run.device))
    found = []
    for world in run.worlds(model):
        found += [Source(run, policy, model, world, split) for split in ("train", "dev")]
    return model, found


def roll_out(source, purpose, n):
    """A policy answers n training problems, or 15 % as many development problems -> its Turns, the
    RNG of the judge, the generator of further samples.

    n counts turns: a dialogue counts as often as the policy speaks in it."""
    run, world = source.run, source.world
    seed = purpose, source.policy, world.name, source.split
    # One split is one purpose: the draws of development do not depend on those of training.
    n = n if source.split == "train" else int(0.15 * n)
    n_problems = max(8, n) // world.turns
    problems = world.problems(source.split, n_problems, run.rng(*seed))
    # All processes have drawn the same problems. From here on each draws for itself.
    own = [rank()] if ranks() > 1 else []
    rng = run.rng(*seed, "judge", *own)
    generator = run.generator(*seed, *own)
    student = seed_of(run.config.seed, *seed, "student", *own)
    problems = local_items(problems)
    with source.bar("answers", len(problems) * world.turns) as bar:
        respond = plain_responder(source.model, world, source.mix, run.config.temperature,
                                  generator, progress=bar.update)
        talks = converse(world, problems, source.model.tokenizer, respond, student)
    turns = list(chain.from_iterable(talk.turns for talk in talks))
    return turns, rng, generator


def continuations(source, turns, ends, n, generator):
    """Yield n responses for each of the ends of every turn: of the turn's own response the tokens
    up to that index are kept, of -1 none, and what follows is sampled. Nothing is drawn before the
    first one is asked for."""
    kept, prompts, room = [], [], []
    for turn, at in zip(turns, ends):
        for end in at:
            kept.append(turn.response[:end + 1])
            prompts.append(turn.before + kept[-1])
            room.append(source.world.max_new_tokens - end - 1)
    with source.bar("samples", len(prompts) * n) as bar:
        found = generate(source.model, prompts, weights=source.mix, samples=n, max_new_tokens=room,
                         temperature=source.run.config.temperature, generator=generator,
                         progress=bar.update)
    # The samples of a prompt stand together.
    for i, sample in enumerate(found):
        yield kept[i // n] + sample


def score(source, turn, response, name):
    """The noise-free score of an objective for a response to a turn's messages."""
    text = source.model.tokenizer.decode(response)
    return source.world.scores(turn.problem, turn.messages, text)[name]


def rate(source, turn, response, name, rng):
    """A response's rating for an objective in training. A verifier is exact, a judge is not."""
    exact = score(source, turn, response, name)
    return exact if name in source.objectives("verifiable") else judge(exact, rng)


def sample_pairs(source, cases=CASES):
    """Several answers to every prompt, rated for the objectives of these cases -> list of Pair, of
    each prompt's answers the best against the worst."""
    names = source.objectives(*cases)
    if not names:
        return []
    # What is answered: the problem itself, or every turn of a dialogue that the policy has led.
    turns, rng, generator = roll_out(source, "samples", source.run.config.n_prompts)
    # New answers: nothing of the first is kept.
    n = source.run.config.n_samples
    samples = continuations(source, turns, [[-1]] * len(turns), n, generator)
    pairs = []
    for turn in turns:
        responses = list(islice(samples, n))
        # A row for every response, a column for every objective.
        ratings = []
        for response in responses:
            ratings.append([rate(source, turn, response, name, rng) for name in names])
        # An objective has its own best and worst. Ratings that are nearly equal say nothing.
        for name, rated in zip(names, zip(*ratings)):
            high, low = max(rated), min(rated)
            best = responses[rated.index(high)]
            worst = responses[rated.index(low)]
            if high - low > 0.1 and best != worst:
                pairs.append(Pair(name, turn.before, best, worst, source.split))
    return pairs


def make_pairs(run, name):
    """Stage pairs: pairs.jsonl, from --data and from samples of the SFT policy, with the SFT
    policy's log-probabilities of both responses: the reference of preference training."""
    model, sources = sources_of(run, "sft")
    sampled = []
    for found in in_threads(sample_pairs, sources, run.alone):
        sampled += found
    pairs, _ = real_pairs(run.config.data, run.objectives, model)
    pairs += gather(sampled)
    n = Counter((pair.objective, pair.split) for pair in pairs)
    for o in run.names:
        tqdm.write(f"  {o}: {n[o, 'train']} pairs to train on, {n[o, 'dev']} held out")
    # Every objective needs pairs, or its head would stay a copy.
    empty = [o for o in run.names if not n[o, "train"]]
    if empty:
        raise InputError(f"no preference pair for {', '.join(empty)}: no prompt has two sampled "
                         "answers of different scores (all wrong, or all right); raise --n-samples "
                         "or --n-prompts, or give a better --init")
    # The reference never changes: its log-probabilities are computed once, for all policies.
    logps = score_pairs(run, run.load("sft"), pairs, "sft").tolist()
    for pair, reference in zip(pairs, logps):
        pair.reference = reference
    write_rows(run.file(name), pairs)


# -- stages of the policies: one preference step for DPO, MAH-DPO and MODPO
#
# The methods differ in their heads, their pairs and their loss, and in nothing else. All of them
# start from SFT, and SFT is what their loss compares them with.

def score_pairs(run, model, pairs, name):
    """Log-probabilities (N, 2) of chosen and rejected under a policy, each pair under its own head,
    in the precision in which the policies train."""
    with run.autocast(), tqdm(total=len(pairs), desc=f"log-probs of {name}", disable=None) as bar:
        return pair_logps(model, pairs, bar.update)


def choose(pairs, names, split):
    """The pairs of these objectives and of a split."""
    return [pair for pair in pairs if pair.objective in names and pair.split == split]


def backbone_shares(config, rule, names, gram):
    """A rule for `gradient`: the share that `combine` gives to each objective's gradient on the
    backbone, and for the log their norms and cosines.

    gram (O, O): of the gradients of alpha_i L_i, which are what a training step computes."""
    norms = gram.diagonal().sqrt()
    cosines = gram / torch.outer(norms, norms)
    # That with itself, and of a gradient that is 0, says nothing: the log leaves NaN out.
    about = {"backbone_norm": norms}
    for name, column in zip(names, cosines.fill_diagonal_(math.nan)):
        about[f"cosine {name}"] = column
    # The rules take the gradients of L_i. An objective of weight 0 has a gradient of 0.
    alpha = gram.new_tensor(parse_weights(config.alpha, names, "--alpha", 1.0))     # (O,)
    scale = alpha.clamp(min=1e-9)
    shares = combine(gram / torch.outer(scale, scale), alpha, rule, config.combine_c) / scale
    return shares.tolist(), about


def preference_loss(run, pairs, logps, count=None):
    """The loss of n pairs: DPO's objective by objective, or MODPO's where the pairs have margins.

    logps (2, n): the policy's. count: see balanced_mean -> loss, metrics by objective."""
    device, beta = logps.device, run.config.beta
    weights = parse_weights(run.config.alpha, run.names, "--alpha", 1.0)
    alpha = torch.tensor(weights, device=device)                                    # (O,)
    owner = torch.tensor([run.names.index(pair.objective) for pair in pairs], device=device)
    reference = torch.tensor([pair.reference for pair in pairs], device=device)     # (n, 2)
    both = [*logps, *reference.T]                                                   # 4 times (n,)
    if pairs[0].margin is None:
        return mah_dpo_loss(*both, owner, alpha, beta, count)
    margin = torch.tensor([pair.margin for pair in pairs], device=device)           # (n,)
    w = torch.tensor(modpo_weights(run), device=device)                             # (O,)
    losses = modpo_loss(*both, margin, w[owner], beta)
    metrics = pair_metrics(losses, *both, owner, len(alpha), beta, count)
    # The paper trains one MODPO a domain. Here one policy serves all, and a division by w_k would
    # let objectives of little weight pull harder: their losses count by w_k, which undoes that.
    return balanced_mean(losses, owner, w, count), metrics


def modpo_weights(run):
    """MODPO's w_k for every objective, its share of its domain's alpha; at least 0.1, since the
    loss divides by it."""
    alpha = dict(zip(run.names, parse_weights(run.config.alpha, run.names, "--alpha", 1.0)))
    w = []
    for objective in run.objectives:
        total = sum(alpha[name] for name in run.domains[objective.domain])
        # A domain may have no weight at all.
        w.append(max(0.1, alpha[objective.name] / max(total, 1e-9)))
    return w


def train_policy(run, name):
    """A stage of the policies: preference training from the SFT policy.

    MAH-DPO has a head per objective, the others have one; dpo_<objective> learns from the pairs of
    one objective, the others from all; MODPO's loss has margins. All else is the same. Balanced:
    as many pairs of every objective in every step (paper, Sec. 5)."""
    config, pairs = run.config, read_rows(run.file("pairs.jsonl"), Pair)
    method = "soup" if name.startswith("dpo_") else name
    names = [name.removeprefix("dpo_")] if method == "soup" else run.names
    heads = names if name == "mah_dpo" else ["policy"]
    if name == "modpo":
        set_margins(run, pairs)
    # Several heads start a little apart from each other; a single head is an exact copy.
    noise = config.perturbation if len(heads) > 1 else 0.0
    model = run.load("sft").with_heads(heads, noise, run.generator(name, "heads"))
    # A rate of its own for each method, so that all end about as far from the reference.
    factors = parse_weights(config.dpo_lr_factor, METHODS, "--dpo-lr-factor", 1.0)
    lr_heads = factors[METHODS.index(method)] * config.dpo_lr_heads
    optimizer = make_optimizer(model, config.dpo_lr_backbone, lr_heads)
    # The loss of an objective is the mean over its pairs in the batch.
    n = config.dpo_pairs
    count = torch.tensor([n * (o in names) for o in run.names], device=run.device)  # (O,)

    def loss_of(part, batch):
        with run.autocast():
            logps = policy_logps(model, part, own_heads(model, part))               # (2, n)
        loss, metrics = preference_loss(run, part, logps, count)
        # FSDP wants gradients for the same heads in every process, whatever pairs each has.
        return reaching(loss, [head.weight for head in model.heads]), metrics

    def develop():
        logps = score_pairs(run, model, dev, name).T.to(run.device)
        return preference_loss(run, dev, logps)[1]

    # An objective's pairs come in the same order to every policy, for as many steps. Progress is
    # measured on held-out pairs, as many of every objective.
    dev, streams = [], []
    for o in names:
        dev += choose(pairs, [o], "dev")[:4 * n]
        streams.append(endless(choose(pairs, [o], "train"), run.generator("pairs", o)))
    # A rule is for what the objectives share apart from their heads: MAH-DPO's backbone. How they
    # pull on it is logged for every policy of several objectives.
    rule = config.combine if name == "mah_dpo" else "sum"
    shares = partial(backbone_shares, config, rule, names) if len(names) > 1 else None
    plain = rule == "sum"
    # Every policy's epochs are those of the objective with the most pairs.
    most = max(len(choose(pairs, [o], "train")) for o in run.names)
    batches = mixed_batches(streams, [n] * len(names))
    fit(run, name, model, optimizer, config.dpo_steps, most / n, batches, loss_of, run.names,
        develop if dev else None, heads=model.heads if len(heads) > 1 else (), clip=10.0,
        rule=None if plain else shares, look=shares if plain and config.conflict_every else None)
    save_hf(model, run.file(name), weights=None if name == "mah_dpo" else 0)


def set_margins(run, pairs):
    """MODPO's margin of a pair of objective k: the sum over the domain's other objectives j of
    w_j (r_j(y+) - r_j(y-)), with r_j = beta log(pi_j / pi_ref) by the policies of single
    objectives (paper, Sec. 5)."""
    for pair in pairs:
        pair.margin = 0.0
    for objective, w in zip(run.objectives, modpo_weights(run)):
        # This objective's policy rewards the pairs of the domain's other objectives.
        domain = run.domains[objective.domain]
        part = [p for p in pairs if p.objective in domain and p.objective != objective.name]
        if part:
            policy = f"dpo_{objective.name}"
            logps = score_pairs(run, run.load(policy), part, policy)
            reference = torch.tensor([pair.reference for pair in part])
            rewards = run.config.beta * (logps - reference)                         # (n, 2)
            for pair, (chosen, rejected) in zip(part, rewards.tolist()):
                pair.margin += w * (chosen - rejected)


def measure_pairs(run, name):
    """Stage pair_metrics: rows for the table of held-out pairs. Each pair is scored under its own
    head; the soup is that of its domain's policies."""
    pairs = read_rows(run.file("pairs.jsonl"), Pair)
    # policy -> the models that are averaged, the objectives whose pairs it is measured on
    jobs = [(policy, [policy], run.names) for policy in (*SINGLE, "mah_dpo")]
    for names in run.domains.values():
        jobs.append(("soup", [f"dpo_{o}" for o in names], names))
    rows = []
    for policy, members, names in jobs:
        part = choose(pairs, names, "dev")
        logps = reference = torch.tensor([pair.reference for pair in part]).view(-1, 2)
        if policy != "sft":                     # the reference itself
            model = average([run.load(member) for member in members])
            logps = score_pairs(run, model, part, policy)
        rows += pair_metrics_rows(policy, logps, reference, part, run.config.beta, run.config.seed)
    write_json(run.file(name), rows)


# -- stage labels: what the PRM learns from
#
# A step is as good as what comes after it. From every step the policy goes on M times to the end of
# its answer (rollouts); a verifier or a judge looks at these ends, and that labels the step. The
# four cases are in prm.py.

def make_labels(run, name):
    """Stage labels: labels.jsonl and mah_dpo_pairs.jsonl. The PRM will guide the SFT policy and
    MAH-DPO's uniform mixes, so both make its data: judged turns (case B), rollouts (verifiable and
    case A), and pairs (case C; those of SFT are in pairs.jsonl)."""
    labels, pairs = [], []
    model, sources = sources_of(run, "sft")
    sources += sources_of(run, "mah_dpo")[1]
    for found, more in in_threads(label_answers, sources, run.alone):
        labels += found
        pairs += more
    real, _ = real_labels(run.config.data, run.objectives, model)
    labels, pairs = gather(labels) + real, gather(pairs)
    tqdm.write(f"  labelled sequences: {len(labels)}; more pairs: {len(pairs)}")
    write_rows(run.file("mah_dpo_pairs.jsonl"), pairs)
    write_rows(run.file(name), labels)


def label_answers(source):
    """Labelled rows of a source's judged turns and rollouts; and its pairs, if it is MAH-DPO."""
    config = source.run.config
    judged, rolled = source.objectives("B"), source.objectives("verifiable", "A")
    labels = label_steps(source, judged, "turns", config.n_prompts, 1)
    labels += label_steps(source, rolled, "rollouts", config.n_rollout_prompts, config.rollouts)
    pairs = []
    if source.policy == "mah_dpo":
        pairs = sample_pairs(source, ["C"])
    return labels, pairs


def label_steps(source, names, purpose, n, M):
    """M rollouts from every step of a policy's answers to n problems -> Labelled rows with a label
    for each of the objectives `names`."""
    if not names:
        return []
    tokenizer, world = source.model.tokenizer, source.world
    turns, rng, generator = roll_out(source, purpose, n)
    # What the judge's noise leaves to be learnt shows beside a second judge: see noise_ceiling.
    second = purpose, source.policy, world.name, source.split, "second judge", rank()
    judges = rng, source.run.rng(*second)
    ends = [tokenizer.step_ends(turn.response, world.boundary) for turn in turns]
    # The response itself is the first rollout. M - 1 others go on from every step but the last.
    others = continuations(source, turns, [at[:-1] for at in ends], M - 1, generator)
    rows = []
    for turn, at in zip(turns, ends):
        rollouts = []                                       # M whole responses for every step
        for _ in at[:-1]:
            rollouts += [turn.response, *islice(others, M - 1)]
        rollouts += [turn.response] * M
        # Every output labels the steps from the first on, perhaps not all of them.
        targets = [{} for _ in at]                          # for every step {output: label}
        for name, labels in labels_of(source, turn, rollouts, M, names, judges).items():
            for target, label in zip(targets, labels):
                target[name] = label
        # The PRM reads the prompt, too: a step ends that much later.
        at = [len(turn.before) + end for end in at]
        rows.append(Labelled(turn.before + turn.response, at, targets, source.split, source.policy))
    return rows


def labels_of(source, turn, rollouts, M, names, judges):
    """{output: its labels} for the steps of a turn. rollouts: M responses for every step. judges:
    the draws of the judge, and of a second one."""
    found, verifiable = {}, source.objectives("verifiable")
    for name in names:
        if name in verifiable:
            found[name] = hindsight(source, turn, rollouts, M)
            continue
        # A response is rated once, however many steps it is a rollout of. In case B a step is a
        # whole turn: its one "rollout" is the turn itself.
        exact = {}
        for response in dict.fromkeys(map(tuple, rollouts)):
            exact[response] = score(source, turn, response, name)
        for output, rng in zip((name, name + SECOND), judges):
            ratings = {response: judge(value, rng) for response, value in exact.items()}
            each = [ratings[tuple(r)] for r in rollouts]
            table = torch.tensor(each).view(-1, M)                                  # (S, M)
            if source.run.config.judge_labels == "majority":
                found[output] = majority_labels(table > 0.5).tolist()
            else:
                found[output] = graded_labels(table).tolist()
    if verifiable:
        _, rewards = verify(source, turn, turn.response)
        known = [reward for reward in rewards if reward is not None]
        # What follows the first wrong step is judged by that, not by what it says.
        found[STEP] = known[:known.index(0.0) + 1] if 0.0 in known else known
    return found


def verify(source, turn, response):
    """The verifier on a response -> is its end right? 1 or 0; the same for every step, as far as
    steps are verified."""
    tokenizer = source.model.tokenizer
    steps, start = [], 0
    for end in tokenizer.step_ends(response, source.world.boundary):
        steps.append(tokenizer.decode(response[start:end + 1]))
        start = end + 1
    return source.world.verify(turn.problem, steps)


def hindsight(source, turn, rollouts, M):
    """The verifiable case: V_t for each of S steps, which have M rollouts each."""
    # A response is verified once, however many steps it is a rollout of.
    verdicts = {}
    for response in dict.fromkeys(map(tuple, rollouts)):
        verdicts[response] = verify(source, turn, response)
    verified = [verdicts[tuple(response)] for response in rollouts]
    # Of every rollout: is its end right, and how many steps does it have?
    correct = torch.tensor([z for z, _ in verified]).view(-1, M)                    # (S, M)
    lengths = torch.tensor([len(steps) for _, steps in verified]).view(-1, M)       # (S, M)
    # The first rollout is the response itself. Nobody verifies the single steps of an answer to a
    # real question: r_t is 0 there.
    _, rewards = verified[0]
    r = torch.tensor([reward or 0.0 for reward in rewards])                         # (S,)
    return hindsight_targets(r, lengths, correct, source.run.config.gamma).tolist()


# -- stage prm: the process reward model
#
# Labelled steps come in lists, one for each domain, and pairs in lists, one for each objective that
# has no labels. A batch takes some items of every list; an output without a label loses nothing.

# Whose samples the pairs of a file are; on those of SFT the policies train, too.
PAIR_FILES = {"sft": "pairs.jsonl", "mah_dpo": "mah_dpo_pairs.jsonl"}


def prm_data(run, names, split, policies=tuple(PAIR_FILES)):
    """What a PRM with these outputs learns from, or is measured on: lists of Labelled, one for each
    set of objectives that are labelled together (those of a domain); then lists of Pair, one for
    each objective without labels, as in case C. policies: whose answers, beside those of --data."""
    groups, pairs = {}, []
    for row in read_rows(run.file("labels.jsonl"), Labelled):
        # The outputs that some step of this row has a label for.
        about = set().union(*row.targets) & set(names)
        if about and row.split == split and row.policy in ("", *policies):
            groups.setdefault(frozenset(about), []).append(row)
    for policy in policies:
        pairs += read_rows(run.file(PAIR_FILES[policy]), Pair)
    # Labels say more than pairs do: pairs serve objectives that have none.
    labelled = set().union(*groups)
    found = list(groups.values())
    for name in names:
        own = choose(pairs, [name], split)
        if own and name not in labelled:
            found.append(own)
    return found


def labels_in(items):
    """The names of the labels on Labelled rows, one for each label (a Pair has none)."""
    names = []
    for item in items:
        for labels in item.targets if isinstance(item, Labelled) else []:
            names += labels
    return names


def step_sizes(data, config):
    """How many items of each list of prm_data a PRM step takes. Lists of Labelled rows share
    prm_batch as they have labelled steps, but each gives at least prm_pairs, so that few labels are
    still learnt from; a list of pairs gives prm_pairs."""
    # A list of pairs has 0 labelled steps.
    steps = []
    for items in data:
        steps.append(sum([len(item.ends) for item in items if isinstance(item, Labelled)]))
    all_steps = max(1, sum(steps))
    sizes = [max(config.prm_pairs, config.prm_batch * n // all_steps) for n in steps]
    # Rounded up to what the processes can share.
    return [-(-size // ranks()) * ranks() for size in sizes]


def own_parts(batch):
    """This process's items of a batch in parts: labelled sequences, then pairs."""
    labelled = [item for item in batch if isinstance(item, Labelled)]
    pairs = [item for item in batch if isinstance(item, Pair)]
    # All pairs are one part.
    parts = dealt_parts(labelled)
    return [*parts, local_items(pairs)] if pairs else parts


def prm_loss(prm, part, in_batch):
    """Losses (P,) of every output on a part of a batch, such that those of all parts add up to the
    batch's; and how many labels or comparisons of each there are in the part (P,). in_batch (P,):
    labels in the whole batch."""
    if isinstance(part[0], Labelled):
        scores, targets = step_scores(prm, part)                                    # (N, P)
        count = (~targets.isnan()).sum(0)
        return step_loss(prm.outputs, scores, targets, in_batch), count
    # Case C: the comparisons of each objective, counted over all processes.
    chosen, rejected, output = pair_scores(prm, part)                               # (N,)
    P = len(prm.outputs)
    losses = [bradley_terry_loss(chosen, rejected, output == p) for p in range(P)]
    count = output.bincount(minlength=P)
    # Each loss is a mean over this process's comparisons, and counts by their share of all.
    losses = torch.stack(losses) * count
    return losses / total(count).clamp(min=1), count


def train_prm(run, name):
    """Stage prm: one PRM on labelled sequences and pairs, from the SFT backbone."""
    config, generator = run.config, run.generator(name)
    outputs = [o for o in run.objectives if name in ("prm", f"prm_{o.name}")]
    names = [o.name for o in outputs]
    cases = [o.case for o in outputs]
    data = prm_data(run, names, "train")
    # A model without heads is a backbone.
    backbone = run.load("sft").with_heads(())
    # A value model's squared errors are small beside the other outputs' losses.
    weights = [config.prm_value_weight if case == "verifiable" else 1.0 for case in cases]
    # Where it is known which steps are right, a value model is taught that too. A single block has
    # no layer below it to read it from.
    labels = labels_in(chain.from_iterable(data))
    if "verifiable" in cases and STEP in labels and len(backbone.layers) > 1:
        outputs.append(STEP_OUTPUT)
        weights.append(config.prm_step_weight)
    weight = torch.tensor(weights, device=run.device)                               # (P,)
    prm = PRM(backbone, outputs, run.generator(name, "weights")).to(run.device)
    prm = shard(prm, run.device)
    optimizer = torch.optim.AdamW([{"params": backbone.parameters(), "lr": config.prm_lr_backbone},
                                   {"params": prm.score.parameters(), "lr": config.prm_lr_head}],
                                  betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def loss_of(part, batch):
        count = Counter(labels_in(batch))
        in_batch = torch.tensor([count[output] for output in prm.names], device=run.device)
        with run.autocast():
            losses, labels = prm_loss(prm, part, in_batch)                          # (P,) each
        return (losses * weight).sum(), {"loss": losses.detach(), "labels": labels}

    # Every list of items is gone through at its own pace; the slowest one counts the epochs.
    sizes = step_sizes(data, config)
    streams = [endless(items, generator) for items in data]
    batches = mixed_batches(streams, sizes)
    epoch = max(len(items) / size for items, size in zip(data, sizes))
    log = fit(run, name, prm, optimizer, config.prm_steps, epoch, batches, loss_of, prm.names,
              parts_of=own_parts, warm_up=100, decay="linear")
    # Both together hide a policy about whose answers an output says nothing. The last sets scale.
    for policies in (["sft"], ["mah_dpo"], list(PAIR_FILES)):
        quality = measure_prm(prm, prm_data(run, names, "dev", policies))
        log.append({"policies": policies} | quality)
    # A single output guides in whatever unit.
    if len(names) > 1:
        set_units(prm, run)
    run.log(name, log)
    save_prm(prm, run.file(name))


@torch.no_grad()
def measure_prm(prm, data):
    """The held-out quality of every output, printed, as a row of the log; sets prm.scale."""
    # For every output its scores and, where these are of labelled steps, their targets.
    found = {}
    for items in data:
        if isinstance(items[0], Pair):
            chosen, rejected, _ = all_scores(pair_scores, prm, items)               # (N,)
            found[items[0].objective] = torch.stack((chosen, rejected)), None
            continue
        scores, targets = all_scores(step_scores, prm, items)                       # (N, P)
        # Not every step has a label of every output. Of equal labels nothing can be explained.
        for p, name in enumerate(prm.names):
            has = ~targets[:, p].isnan()
            if len(targets[has, p].unique()) > 1:
                found[name] = scores[has, p], targets[has, p]
    quality = {}
    for name, (scores, targets) in found.items():
        p = prm.names.index(name)
        quality[name] = quality_of(prm.outputs[p], scores, targets) | noise_ceiling(data, name)
        numbers = ", ".join([f"{metric} {number:.6g}" for metric, number in quality[name].items()])
        tqdm.write(f"  {name:17s} held-out {numbers}")
        # A unit for want of a better one, where there is no world to draw candidates in.
        if scores.numel() > 1 and scores.std() > 0:
            prm.scale[p] = scores.std()
    return {"held_out": quality}


def noise_ceiling(data, name):
    """{"ceiling": the best possible R^2, of who knows all true scores, even those of answers that
    only begin}; {} where no judge made the labels.

    Two judges' labels have nothing in common but what the true scores tell of them: their
    correlation is the share of a label's variance that these explain."""
    labels = []
    for row in chain.from_iterable(data):
        for step in row.targets if isinstance(row, Labelled) else []:
            if name + SECOND in step:
                labels.append((step[name], step[name + SECOND]))
    if not labels:
        return {}
    first, second = torch.tensor(labels).T                                          # (n,) each
    return {"ceiling": F.cosine_similarity(first - first.mean(), second - second.mean(), 0).item()}


@torch.no_grad()
def set_units(prm, run):
    """Set prm.scale to the spread of each output among candidates of one step, on development
    prompts of MAH-DPO: guidance compares these alone, and what steps differ by tells it nothing."""
    _, sources = sources_of(run, "mah_dpo")
    for source in sources:
        if source.split != "dev":
            continue
        variances = []
        # Several processes share the PRM: each lets it read all that all of them have drawn.
        for texts in gather(draw_candidates(source)):
            scores = scores_at(prm, [(ids, [len(ids) - 1]) for ids in texts])       # (K, P)
            variances.append(scores.var(0))
        spread = torch.stack(variances).mean(0).sqrt()                              # (P,)
        for p, output in enumerate(prm.outputs):
            if output.domain == source.world.name and spread[p] > 0:
                prm.scale[p] = spread[p]


def draw_candidates(source, K=5):
    """K ways to take each step of a policy's answers -> for every step K texts (ids), which begin
    with the prompt and end with that step."""
    tokenizer, world = source.model.tokenizer, source.world
    turns, _, generator = roll_out(source, "candidates", 200)
    starts = []
    for turn in turns:
        for end in [-1, *tokenizer.step_ends(turn.response, world.boundary)[:-1]]:
            starts.append(turn.before + turn.response[:end + 1])
    drawn = generate(source.model, starts, weights=source.mix, samples=K, boundary=world.boundary,
                     max_new_tokens=world.max_new_tokens, generator=generator,
                     temperature=source.run.config.temperature)
    texts = [starts[i // K] + step for i, step in enumerate(drawn)]
    return [texts[i:i + K] for i in range(0, len(texts), K)]


def all_scores(read, prm, items):
    """What `read` (step_scores or pair_scores) gives for all items, some of them at a time."""
    parts = []
    for index in batches_by_length([len(item) for item in items]):
        parts.append(read(prm, [items[i] for i in index]))
    return [torch.cat(tensors) for tensors in zip(*parts)]


def quality_of(output, scores, targets):
    """The measures of one output: of scores (2, n), of chosen and rejected; or of scores and
    targets (n,) of held-out steps."""
    n = scores.shape[-1]
    if targets is None:
        right = scores[0] > scores[1]
        return {"pair_accuracy": right.float().mean().item(), "n": n}
    # A value is what it says; the others' loss reads a score as a logit.
    guesses = scores if output.case == "verifiable" else scores.sigmoid()
    # R^2: the share of the targets' variance that guesses explain; to guess their mean gives 0.
    error = ((guesses - targets) ** 2).mean()
    return {"r2": 1 - float(error / targets.var(correction=0)), "n": n}


# -- the table of stages
#
# What is in the table decides what a run may skip: a stage whose last file is there, and what a run
# may copy from another one: stages before the first that reads an option that differs.

class Stage(NamedTuple):
    """A stage, and what tells whether its files may be kept."""
    title: str
    files: list         # what it leaves in the directory; the last one says that it has finished
    options: str        # the options that it depends on and the stages before it do not
    work: Callable      # work(run, the last file's name)


def stages(run):
    """The stages of a run in their order."""
    policies = "alpha beta dpo_steps dpo_pairs dpo_lr_backbone dpo_lr_heads dpo_lr_factor"
    prm = ("prm prm_steps prm_batch prm_pairs prm_value_weight prm_step_weight prm_lr_backbone "
           "prm_lr_head")
    baselines = ["single_head_dpo", *[f"dpo_{name}" for name in run.names], "modpo"]
    prms = ["prm"] if run.config.prm == "unified" else [f"prm_{name}" for name in run.names]
    return [
        Stage("base model", ["base"],
              "init template_args seed dtype grad_checkpoint epochs base_steps base_lr",
              train_base),
        Stage("supervised fine-tuning", ["sft"],
              "objective data max_new_tokens sft_steps sft_batch sft_lr", train_sft),
        Stage("samples and judges", ["pairs.jsonl"], "temperature n_prompts n_samples", make_pairs),
        *[Stage(f"policy {name}", [name], policies, train_policy) for name in baselines],
        Stage("policy mah_dpo", ["mah_dpo"], "perturbation combine combine_c", train_policy),
        Stage("held-out pairs", ["pair_metrics.json"], "", measure_pairs),
        Stage("rollouts and labels", ["mah_dpo_pairs.jsonl", "labels.jsonl"],
              "gamma rollouts n_rollout_prompts judge_labels", make_labels),
        *[Stage(f"process reward model {name}", [name], prm, train_prm) for name in prms],
        Stage("tables", list(OUTPUTS), "n_test split weight_steps spacing k", make_tables)]


def make_tables(run, name):
    """Stage tables: those of evaluate.py, with the rows of the held-out pairs."""
    evaluate(run.path, read_json(run.file("pair_metrics.json")), run.device)


def run_stages(run):
    """Run what is not finished, with a numbered title and the time of each stage."""
    for number in (signal.SIGINT, signal.SIGTERM):      # a batch system's request is as Ctrl-C
        signal.signal(number, signal.default_int_handler)
    for number, stage in enumerate(stages(run), 1):
        # The stage leaves its files and rows in both logs.
        done, files = finished(run, stage), [*stage.files, "log.jsonl", "timings.jsonl"]
        print(f"[{number}] {stage.title}{': finished before' * done}", flush=True)
        if not done:
            forget_files(run.path, files)
            begun = time.time()
            stage.work(run, stage.files[-1])
            seconds = round(time.time() - begun, 1)
            run.log(stage.title, [{"seconds": seconds}], "timings.jsonl")
            print(f"    {seconds} s", flush=True)
        note_files(run.path, files)
    clear(run.path)
    print(f"{run.path}: done. Talk to it: python decode.py {run.path} --prompt ...")


# -- the training loop of all stages
#
# A stage brings its batches and the loss of a part of a batch. The loop does the rest: rates,
# gradients, checkpoints, the log.

def fit(run, stage, model, optimizer, steps, epoch, batches, loss_of, names=(), develop=None, *,
        parts_of=dealt_parts, heads=(), clip=1.0, warm_up=20, decay="constant", rule=None,
        look=None):
    """Updates, each by the gradient of one batch: as many as `steps`, but at most config.epochs
    passes over the data, of `epoch` batches each -> the rows of its log.

    batches: endless iterator of lists of items, a function of the seed alone: its position is the
    step. parts_of(batch): this process's items in lists that are computed one after another.
    loss_of(part, batch): a part's share of the batch's loss, and numbers for the log, {metric:
    tensor}, scalars or one for each objective of `names`; both add up over parts and processes.
    develop(): such numbers on held-out data, four times. heads: those whose gradients' norms are
    logged, one for each of `names`. clip: largest norm of a gradient. rule: as in `gradient`; look:
    the same, for the log alone, every config.conflict_every steps. Every config.checkpoint_every
    steps, and before a stop, all that the next step needs is saved."""
    steps = min(steps, max(1, math.ceil(run.config.epochs * epoch)))
    top = [group["lr"] for group in optimizer.param_groups]
    backward = partial(gradient, optimizer, parts_of, loss_of, heads, clip, names, rule=rule)
    start, log = load_checkpoint(run, stage, model, optimizer)
    seconds, tokens = 0.0, 0
    # The batches of the steps that a checkpoint holds are drawn again, and not used.
    batches = islice(batches, start, steps)
    with (stops_wait() as stops,
          tqdm(desc=stage, total=steps, initial=start, unit="step", disable=None) as bar):
        # The last round takes no step: it measures what the last step has left.
        for step in range(start, steps + 1):
            # Several processes stop before the same step.
            stopping = bool(total(torch.tensor(len(stops))))
            if stopping or step % run.config.checkpoint_every == 0 and start < step < steps:
                save_checkpoint(run, stage, model, optimizer, step, log)
            if stopping:
                raise KeyboardInterrupt
            third = math.ceil(steps / 3)
            if develop and (step % third == 0 or step == steps):
                log.append({"step": step, "split": "dev"} | log_row(develop(), names))
            if step == steps:
                break
            batch = next(batches)
            begun = time.perf_counter()
            # One step: the rates, the gradient, and if it is a number, the update.
            for group, lr in zip(optimizer.param_groups, top):
                group["lr"] = lr * rate_factor(step, steps, warm_up, decay)
            asked = {}
            if look and step % run.config.conflict_every == 0:
                asked, *_ = backward(batch, rule=look)
            found, norm, finite = backward(batch)
            if not finite:
                refuse_step(f"{stage}, step {step}", batch, partial(backward, rule=None))
            optimizer.step()
            seconds += time.perf_counter() - begun
            tokens += sum(map(len, batch))
            # What a person wants to see.
            if asked or step % 10 == 0 or step == steps - 1:
                row = log_row(asked | found, names)
                log.append({"step": step, "gradient_norm": norm.item()} | row)
                bar.set_postfix(loss=float(found["loss"].nanmean()), refresh=False)
            bar.update()
    run.log(stage, log)
    run.log(stage, [{"steps": steps - start, "tokens": tokens, "seconds": seconds,
                     "tokens_per_second": tokens / max(seconds, 1e-9)}], "timings.jsonl")
    return log


def rate_factor(step, steps, warm_up, decay):
    """The factor on the learning rates: it rises over `warm_up` steps; then it stays, or falls to
    .05."""
    left = {"constant": 1.0, "linear": 1 - step / steps,
            "cosine": (1 + math.cos(math.pi * step / steps)) / 2}[decay]
    warm = min(1.0, (step + 1) / warm_up)
    return warm * (0.05 + 0.95 * left)


def gradient(optimizer, parts_of, loss_of, heads, clip, names, batch, rule=None):
    """Leave a batch's gradient, clipped, in the parameters -> numbers for the log, the norm before
    clipping, are loss and norm finite? All over all processes.

    rule(gram): of the gradients of the objectives `names` on the backbone, which `gram` holds the
    inner products of, how much of each is taken, and numbers for the log. Without it, all."""
    optimizer.zero_grad()
    found, backbone = Counter(), optimizer.param_groups[0]["params"]
    # For a rule one objective comes after another, and its gradient on the backbone is put aside.
    groups, each = [batch], []
    if rule:
        groups = [[pair for pair in batch if pair.objective == name] for name in names]
    for group in groups:
        for part in parts_of(group):
            loss, metrics = loss_of(part, batch)
            # FSDP takes the mean of the processes' gradients: each is made larger by their number.
            (loss * ranks()).backward()
            found.update(metrics)
        if rule:
            each.append([p.grad for p in backbone])
            for p in backbone:
                p.grad = None
    if heads:                   # a head's gradient comes from its own objective alone
        found["gradient_norm"] = torch.stack([head_norm(head) for head in heads])
    found = {metric: total(value) for metric, value in found.items()}
    if rule:
        shares, about = rule(inner_products(each))
        for p, own in zip(backbone, zip(*each)):
            p.grad = sum(share * g for share, g in zip(shares, own))
        found |= about
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), clip))
    # The loss of an objective without pairs is NaN.
    loss = found["loss"].nansum()
    return found, norm, bool(norm.isfinite() and loss.isfinite())


def refuse_step(where, batch, backward):
    """InputError that names the examples which alone give no finite gradient, or else all."""
    bad = []
    for item in batch:
        *_, finite = backward([item] * ranks())
        if not finite:
            bad.append(item.where)
    bad = bad or [item.where for item in batch]
    raise InputError(f"{where}: the loss or its gradient is not finite for {', '.join(bad[:5])}; "
                     "this step was not taken, and earlier checkpoints are kept. Lower the "
                     "learning rate, or look at these")


def log_row(found, names):
    """{metric: tensor} -> {metric: number} of scalars, {objective: {metric: number}} of the others.
    An objective without data, whose metrics are NaN, is left out."""
    row = {}
    for metric, value in found.items():
        if value.dim() == 0:
            row[metric] = value.item()
            continue
        for name, number in zip(names, value.tolist()):
            if not math.isnan(number):
                row.setdefault(name, {})[metric] = number
    return row


# -- runs

def carry_out(run):
    """All that is unfinished of a run: the stages of its training, or of each of several, and then
    the tables over these."""
    if run.config.dtype == "bf16" and emulates_bf16(run.device):
        print("--dtype bf16: this processor has no instructions for bfloat16; fp32 is faster here")
    with at_work(run.path):
        check_files(run.path)
        trainings = seed_runs(run.path)
        # A training of several is a run of its own, with its own seed.
        for i, path in enumerate(trainings):
            print(f"{path}: training {i + 1} of {len(trainings)}")
            one = replace(run.config, seed=run.config.seed + i, seeds=1)
            run_stages(begin(path, one, run.objectives))
        if len(trainings) > 1:
            publish(run.path, load_rows(run.path))


def begin(path, config, objectives=None):
    """The run in a directory; one that is not there yet is made, with copies of what --from offers
    -> Run. objectives: as in Run."""
    if os.path.isdir(path):
        return open_run(path, config.device)
    # Resumed from another directory, the run must still find what it was given in this one.
    for name in ("init", "data", "from_"):
        given = getattr(config, name)
        setattr(config, name, given and os.path.abspath(given))
    run = Run(path, config, objectives)
    with new_directory(path) as unfinished:
        save_config(run, unfinished)
        # When the second of several seeds begins, the other run may be gone: then all is trained.
        if config.seeds == 1 and os.path.isdir(config.from_):
            copy_stages(origin_of(config), Run(unfinished, config, objectives), stages(run))
    return run


def origin_of(config):
    """The run that this one starts from; of several trainings the one of the same seed."""
    path = f"{config.from_}/seed={config.seed}"
    origin = open_run(path if os.path.isdir(path) else config.from_)
    if origin.config.seed != config.seed:
        raise InputError(f"--from {config.from_}: it has no training with seed {config.seed}")
    return origin


def open_run(path, device="auto"):
    """The run in a directory, with its own options. InputError as in load_config."""
    check_files(path, "config.json")
    config, objectives = load_config(path)
    if device != "auto":
        config.device = device
    check_config(config, objectives)
    return Run(path, config, objectives)


def check_new(config):
    """check_config, and read what the stages of a new run will read, so that a mistake shows before
    anything is written."""
    check_config(config)
    # Where --from leads, there must be a training of every seed, and no damage.
    for seed in range(config.seed, config.seed + config.seeds) if config.from_ else []:
        origin_of(replace(config, seed=seed))
    if config.from_:
        check_files(config.from_)
    run = Run("", config)
    model = None
    if config.init:
        model = load_base(config.init, run.device, config.template_args)
    if config.data:
        describe_data(config.data, run.objectives, config.max_new_tokens, model)
    if model:
        sft_examples(run, model)                # a short context, a chat template that is not read
    # A world may be too small for what is asked of it.
    for world in [] if config.data else run.worlds(model):
        world.problems(PROMPTS[config.split], config.n_test, RNG(0))
        n = config.n_prompts
        source = Source(run, "", model, world, "train")
        if source.objectives("verifiable", "A"):
            n = max(n, config.n_rollout_prompts)
        world.problems("train", n // world.turns, RNG(0))


def new_run(config):
    """Check what a new run was given, and make its directory. A taken name gets a number -> Run."""
    check_new(config)
    config.device = pick_device(config.device)
    config.out = free_name(config.out or f"runs/{config.objective.replace(',', '+')[:99]}")
    print(f"writing to {config.out}")
    return begin(config.out, config)


def main(argv=None):
    """The command line: a new run, or an unfinished one."""
    join_processes()
    config, resume = read_command(argv, __doc__)
    carry_out(open_run(resume, config.device) if resume else new_run(config))


if __name__ == "__main__":
    run_command(main)
