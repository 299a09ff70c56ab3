"""train.py: the whole method, one stage after another, from one command. Before: evaluate.py (and all the others).

    python train.py --objective all

    1 base       pre-training on flawed demonstrations of three small worlds (with --init: a real checkpoint instead)
    2 sft        supervised fine-tuning on demonstrations (better ones in maths and tutoring): the reference policy pi_ref
    3 pairs      responses of the SFT policy, judged: preference pairs per objective
    4 policies   MAH-DPO, and on the same pairs single-head DPO, one DPO per objective (for the soup), MODPO
    5 labels     rollouts and judged answers of SFT and of MAH-DPO, the two policies that will be guided
    6 prm        the process reward model, one output per objective
    7 tables     every policy measured on unseen prompts, alone and guided

A stage is a function of the configuration, the seed and the files of earlier stages, and writes its own files last:
`--resume RUN` skips what is finished and starts the unfinished stage (in stage 4: policy) again, its training from the last
checkpoint, and ends with the same bits as a run that nobody stopped. --seeds N trains N times, in RUN/seed=..., and puts the
tables over the trainings into RUN; --sweep FIELD=a,b,c trains variants of a run, in RUN/FIELD=a and so on. --fast runs
everything small, to see that it works. --data DIR reads DIR/<objective>.jsonl: preference pairs, or for math_accuracy questions
with final answers, which are sampled and verified; and DIR/<objective>.steps.jsonl, labelled steps, where it exists.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatch
from itertools import islice

try:
    import fcntl
except ImportError:     # Windows has no such locks
    fcntl = None


def claim(argv):
    """Make the directory of a new run, with the command line in it: from here on --resume can go on after a kill. A taken name
    gets the next number. -> its path; None for --resume, --help and a command line that main will refuse."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    for name, default in (("--out", ""), ("--objective", "all"), ("--resume", None)):
        parser.add_argument(name, default=default)
    try:
        args, others = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        return None
    if args.resume is not None or {"-h", "--help"} & set(others):
        return None
    wanted = (args.out or os.path.join("runs", args.objective.replace(",", "+"))).rstrip("/")
    path, number = wanted, 2
    while os.path.lexists(path):
        path, number = f"{wanted}-{number}", number + 1
    os.makedirs(f"{path}.tmp", exist_ok=True)
    with open(os.path.join(f"{path}.tmp", "command.json"), "w", encoding="utf-8") as f:
        json.dump(argv, f)
    os.rename(f"{path}.tmp", path)              # never there without the command
    return path


# torch takes seconds to be imported; the run's directory is there before.
CLAIMED = None
if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":      # the first of several processes
    with contextlib.suppress(OSError):      # main meets it again, and says so
        CLAIMED = claim(sys.argv[1:])

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import (DOMAINS, RNG, ENGAGING, InputError, OBJECTIVES, Tokenizer, batches_by_length,
                  dealt_batches, domain_objectives, fit_threshold, judge, pad, read_json,
                  read_jsonl, run_command, select_objectives, split_of, write_json, write_text)
from decode import domain_mix, generate, parse_weights, read_run
from evaluate import (average, converse, evaluate, load_rows, own_logps,
                      pair_metrics_rows, plain_responder, publish, seed_of, seed_runs)
from interop.datasets import DATA_HELP, holds_questions, read_preferences, read_steps, worlds_of
from interop.parallel import (gather, join_processes, like, local_items, placed, rank, ranks, shard,
                              total, whole)
from mah_dpo import (Pair, balanced_mean, encode_pair, mah_dpo_loss, make_optimizer, modpo_loss,
                     pair_logps, pair_metrics, policy_logps)
from model import (GPT, GPTConfig, load_hf, load_safetensors, pick_device, read_metadata,
                   sampling_dtype, save_hf, save_safetensors)
from prm import (Labelled, PRM, STEP, STEP_OUTPUT, bradley_terry_loss, encode_steps,
                 hindsight_targets, majority_labels, pair_scores, save_prm, step_loss, step_scores)

VERIFIABLE = {o.name for o in OBJECTIVES.values() if o.case == "verifiable"}


def domain_names(domain, names):
    """The names of those objectives, given by name, that belong to a domain."""
    return [o.name for o in domain_objectives(domain, [OBJECTIVES[n] for n in names])]


def option(default, text, fast=None):
    """A configuration field: its default, its line in --help, and its value under --fast."""
    return field(default=default, metadata={"help": text, "fast": fast})


@dataclass
class Config:
    """All that a run depends on, and its command line: one flag per field. Saved as RUN/config.json."""
    objective: str = option("all", "all, math, values, tutoring, or objective names separated by commas")
    out: str = option("", "run directory (default runs/<objective>; a taken name gets the next free number)")
    init: str = option("", "Hugging Face directory that serves as the base model")
    data: str = option("", "directory of <objective>.jsonl with real pairs or questions, see below (needs --init)")
    seed: int = option(0, "every random draw of the run derives from it")
    seeds: int = option(1, "train so many times, with seed, seed + 1, ..., for intervals over trainings")
    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: str = option("fp32", "fp32, or bf16: training computes in bfloat16 (autocast), weights and losses stay in fp32")
    grad_checkpoint: bool = option(False, "training recomputes each block in backward: less memory, a third more time")
    prm: str = option("unified", "unified: one PRM with an output per objective; each: one PRM per objective")
    temperature: float = option(0.7, "for samples, rollouts, candidates and tables (the paper's is 1.0)")
    beta: float = option(0.1, "strength of the tie to the reference policy in DPO")
    alpha: str = option("", "weights of the objectives' losses, NAME=NUMBER,... (1 where not named)")
    gamma: float = option(0.9, "discount per step in hindsight targets")
    perturbation: float = option(1e-3, "standard deviation of the noise on each head's copy of the SFT head")
    base_steps: int = option(1200, "pre-training steps of 64 conversations", fast=300)
    base_lr: float = option(3e-3, "peak learning rate of pre-training")
    sft_steps: int = option(120, "SFT steps", fast=10)
    sft_batch: int = option(64, "conversations per SFT step")
    sft_lr: float = option(3e-4, "SFT learning rate")
    epochs: int = option(8, "most passes over a stage's largest source of data; a stage ends there or at its number of steps")
    n_prompts: int = option(1000, "prompts per domain whose sampled responses become pairs", fast=60)
    n_samples: int = option(6, "responses sampled per prompt", fast=4)
    # For the value model three times the problems are worth more than a second rollout of each, which costs as much.
    n_rollout_prompts: int = option(12000, "problems whose every step gets rollouts, of SFT and again of MAH-DPO", fast=40)
    rollouts: int = option(1, "M, rollouts per prefix (the response itself is the first)")
    prm_steps: int = option(1200, "PRM training steps", fast=10)
    prm_batch: int = option(64, "labelled sequences per PRM step, shared by the domains as they have labels, but at least prm_pairs "
                            "of each")
    prm_pairs: int = option(4, "pairs per objective and PRM step")
    prm_value_weight: float = option(5.0, "weight of the value model's squared error in the PRM's loss; without an auxiliary output "
                                     "beside it (--data) it wants more, or drowns in the noise of the other outputs' gradients")
    prm_step_weight: float = option(60.0, "weight in it of the auxiliary output, for training alone: is this step right?")
    prm_lr_backbone: float = option(1.5e-3, "PRM learning rate, backbone")
    prm_lr_head: float = option(2e-3, "PRM learning rate, MLP")
    dpo_steps: int = option(100, "steps of every preference-trained policy", fast=6)
    dpo_pairs: int = option(8, "pairs per objective and step")
    dpo_lr_backbone: float = option(1e-5, "learning rate of the backbone in preference training")
    dpo_lr_heads: float = option(4e-4, "learning rate of the heads in preference training")
    # On development prompts all four methods then end about as far from SFT: .052 to .057 nats per token, mean of the domains.
    dpo_lr_factor: str = option("single_head_dpo=0.55,modpo=0.55", "factors on the heads' rate, NAME=NUMBER,... of mah_dpo, "
                                "single_head_dpo, modpo, soup (1 where not named)")
    n_test: int = option(200, "prompts per domain that the tables measure", fast=12)
    split: str = option("test", "prompts of the tables: test, or dev while settings are still being chosen")
    weight_steps: int = option(10, "steps in which the weights of two heads go from one to the other (0: no sweep)", fast=2)
    k: int = option(5, "K, candidates per step of guided decoding in the tables, and whole answers of their rivals")
    max_new_tokens: int = option(256, "most tokens of a sampled answer to a real question")
    checkpoint_every: int = option(100, "steps of a training stage between checkpoints from which --resume goes on")


# In the order of the stages: what they leave in a run directory and in its log, and the options that they are the first to
# depend on. A variant of --sweep takes over what comes before its option.
WRITTEN = {"base": "dtype base_steps base_lr epochs",
           "sft": "sft_steps sft_batch sft_lr max_new_tokens",
           "pairs.jsonl": "temperature n_prompts n_samples",
           "single_head_dpo dpo_* modpo sft_logps.safetensors":
               "alpha beta dpo_steps dpo_pairs dpo_lr_backbone dpo_lr_heads dpo_lr_factor",
           "mah_dpo pair_metrics.json": "perturbation",
           "mah_dpo_pairs.jsonl labels.jsonl judge": "gamma rollouts n_rollout_prompts",
           "prm prm_*": "prm prm_steps prm_batch prm_pairs prm_value_weight prm_step_weight prm_lr_backbone prm_lr_head",
           "results.json": "n_test split k"}
UNTOUCHED = {name: " ".join(list(WRITTEN)[:i]).split() for i, names in enumerate(WRITTEN.values()) for name in names.split()}


class Run:
    """A run directory and what the stages share."""

    def __init__(self, path, config):
        self.path, self.config = path, config
        self.objectives = select_objectives(config.objective)
        self.domains = list(dict.fromkeys(OBJECTIVES[o].domain for o in self.objectives))
        self.device = pick_device(config.device)
        self.own = (rank(),) if ranks() > 1 else ()       # in the seed of what the processes draw apart
        self.training = self.stopping = False

    def stop(self, *signal):
        """Ctrl-C, or SIGTERM, a batch system's request: at once, but in training after the step that is under way, whose
        result is saved."""
        if not self.training or self.stopping:
            raise KeyboardInterrupt
        self.stopping = True

    def key(self, *paths):
        """Fingerprint of the configuration and of files: what was made from others must not be used."""
        settings = {k: v for k, v in asdict(self.config).items() if k not in ("out", "device", "checkpoint_every")}
        return fingerprint([settings, self.objectives], *paths)

    def file(self, name):
        """The path of one of the run's files."""
        return os.path.join(self.path, name)

    def generator(self, *what):
        """A torch.Generator for one purpose."""
        return torch.Generator().manual_seed(seed_of(self.config.seed, *what))

    def rng(self, *what):
        """Python-side draws for one purpose."""
        return RNG(seed_of(self.config.seed, *what))

    def load(self, name):
        """A trained model of this run, ready to train on, and sharded over the processes."""
        model = load_hf(self.file(name), place=lambda t: placed(t, self.device))
        model.grad_checkpoint = self.config.grad_checkpoint
        return model

    def autocast(self):
        """The context in which training computes. Its cache of weights in bfloat16 would undo the sharding."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.config.dtype == "bf16",
                              cache_enabled=ranks() == 1)

    def worlds(self, model):
        """domain -> the world to sample and to measure in: the embedded ones, or those of the questions in --data."""
        return worlds_of([OBJECTIVES[o] for o in self.objectives], self.config.data, self.config.max_new_tokens, model)

    def log(self, stage, rows, name="log.jsonl"):
        """Put a stage's rows into log.jsonl, before the file that says it is finished (a kill between the two would lose
        them); what an interrupted attempt left of it is replaced. Figures of time go to timings.jsonl, and nowhere else."""
        path = self.file(name)
        kept = [row for _, row in read_jsonl(path) if row["stage"] != stage] if os.path.exists(path) else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in [*kept, *({"stage": stage} | row for row in rows)]))


def fingerprint(settings, *paths):
    """A hash of settings (JSON) and of the contents of files."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in paths:
        with open(path, "rb") as f:
            digest.update(hashlib.sha256(f.read()).digest())
    return digest.hexdigest()


# -- 1, 2: base and SFT

def chat_example(tokenizer, messages):
    """A conversation -> (ids, mask): mask is True on the assistant's tokens, end of turn included."""
    ids, mask = [], []
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            prompt, response = tokenizer.encode_chat(messages[:i]), tokenizer.encode(m["content"]) + [tokenizer.eos_id]
            mask += [False] * (len(prompt) - len(ids)) + [True] * len(response)
            ids = prompt + response
    return ids, mask


def fit(run, stage, model, optimizer, steps, *, batches, backward, tokens, where, key, names=(), develop=None, clip=1.0,
        warm_up=20, rate=lambda step: 1.0):
    """The training loop of every stage: `steps` updates, each by the gradient of one batch. -> rows for the log

    batches: endless iterator of lists of items, a function of the seed alone, so that its position is the step.
    backward(batch): adds up the gradient of this process's share, returns numbers for the log, {name: tensor, scalar or one
    per objective of `names`}, which add up over the processes. tokens(item), where(item): its size, and where a person finds
    it. key: fingerprint of all this. rate(step): factor on the learning rates, which rise over `warm_up` steps. develop(): the
    numbers of backward on development data, taken four times. Every config.checkpoint_every steps, and before a stop, all that
    the next step needs is saved."""
    top, seconds, n_tokens = [g["lr"] for g in optimizer.param_groups], 0.0, 0
    start, log = load_checkpoint(run, stage, model, optimizer, key)
    measure = lambda step: log.append({"step": step, "split": "dev"} | log_row(develop(), names)) if develop else None
    run.training = True
    with tqdm(desc=stage, total=steps, initial=start, unit="step", disable=None) as bar:
        for step, batch in enumerate(islice(batches, start, steps), start):
            if step % math.ceil(steps / 3) == 0:
                measure(step)
            begun = time.perf_counter()
            for group, lr in zip(optimizer.param_groups, top):
                group["lr"] = lr * (min(1.0, (step + 1) / warm_up) * rate(step))
            found, norm, finite = gradient(optimizer, batch, backward, clip)
            if not finite:
                bad = [where(item) for item in batch if not gradient(optimizer, [item] * ranks(), backward, clip)[-1]]
                refuse_step(stage, step, bad or [where(item) for item in batch])
            optimizer.step()
            seconds, n_tokens = seconds + time.perf_counter() - begun, n_tokens + sum(map(tokens, batch))
            if step % 10 == 0 or step == steps - 1:
                log.append({"step": step, "gradient_norm": norm.item()} | log_row(found, names))
                bar.set_postfix_str(brief(log[-1], names), refresh=False)
            bar.update()
            stopping = bool(total(torch.tensor(int(run.stopping), device=run.device)))
            if stopping or (step + 1) % run.config.checkpoint_every == 0 and step + 1 < steps:
                save_checkpoint(run, stage, model, optimizer, step + 1, log, key)
            if stopping:
                raise KeyboardInterrupt
    run.training = False
    measure(steps)
    run.log(stage, [{"steps": steps - start, "tokens": n_tokens, "seconds": seconds,
                     "tokens_per_second": n_tokens / max(seconds, 1e-9)}], "timings.jsonl")
    return log


def gradient(optimizer, batch, backward, clip):
    """Leave a batch's gradient, clipped, in the parameters. -> (numbers for the log, norm before clipping, are loss and norm
    finite?), all over all processes"""
    optimizer.zero_grad()
    found = {name: total(value.detach()) for name, value in backward(batch).items()}
    norm = whole(torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip))
    return found, norm, bool(norm.isfinite()) and bool(found["loss"].isfinite().all())


def refuse_step(stage, step, bad):
    """InputError that names stage, step and the examples whose loss or gradient is no finite number."""
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise InputError(f"{stage}, step {step}: the loss or its gradient is not finite for {', '.join(bad[:5])}{more}; this step was "
                     "not taken, and earlier checkpoints are kept. Lower the learning rate, or look at these examples")


def log_row(found, names):
    """{metric: scalar, or (H,) tensor} -> {metric: number}, {objective: {metric: number}}; an objective without data, whose
    metrics are NaN, is left out."""
    values = {metric: value.tolist() for metric, value in found.items()}
    each = {name: {metric: v[i] for metric, v in values.items() if isinstance(v, list)} for i, name in enumerate(names)}
    return {metric: v for metric, v in values.items() if not isinstance(v, list)} | {
        name: row for name, row in each.items() if not any(map(math.isnan, row.values()))}


def brief(row, names):
    """A row of the log in one line: means over the objectives."""
    each = [row[n] for n in names if n in row] or [row]
    wanted = ("loss", "margin", "accuracy", "chosen", "rejected", "kl")
    shown = {m: sum(r[m] for r in each) / len(each) for m in wanted if m in each[0]}
    return " ".join(f"{m} {v:.3g}" for m, v in (shown | {"gradient": row["gradient_norm"]}).items())


def save_checkpoint(run, stage, model, optimizer, step, log, key):
    """What the next step of a stage needs: weights, the optimiser's state, the number of steps done, from which schedule and
    draws follow, and the log so far."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"optimizer.{i}.{k}": v for i, state in optimizer.state_dict()["state"].items() for k, v in state.items()}
    save_safetensors(tensors, run.file("checkpoint.safetensors"),
                     {"stage": stage, "step": str(step), "key": key, "log": json.dumps(log)})


@torch.no_grad()
def load_checkpoint(run, stage, model, optimizer, key):
    """Put back what save_checkpoint saved. -> (steps done, log), (0, []) where there is nothing of this stage. InputError if
    it was saved under another configuration or with other data."""
    path = run.file("checkpoint.safetensors")
    try:
        about = read_metadata(path) if os.path.exists(path) else {}
    except InputError as e:
        raise InputError(f"{e}; remove this file to start {stage} again") from None
    if about.get("stage") != stage:             # none, or that of an earlier stage, which is finished
        return 0, []
    if about.get("key") != key:
        raise InputError(f"{path}: saved with another configuration or other data than these; bring those back, or remove this "
                         f"file to start {stage} again")
    tensors, own, saved = load_safetensors(path), model.state_dict(), optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            own[rest].copy_(like(tensor, own[rest]))
        else:
            i, what = rest.split(".")
            state = saved["state"].setdefault(int(i), {})
            state[what] = tensor.clone() if what == "step" else like(tensor.clone(), parameters[int(i)])
    optimizer.load_state_dict(saved)
    return int(about["step"]), json.loads(about["log"])


def language_model(run, stage, model, examples, steps, lr, batch_size=64, files=()):
    """Next-token training on the masked tokens of (ids, mask) examples; batches of similar length, cosine schedule.
    files: what the examples were read from. Logs, saves. -> the rows of the log"""
    steps = capped(steps, len(examples) / batch_size, run.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def backward(index):
        index = local_items(index)
        ids, _ = pad([examples[i][0] for i in index], model.tokenizer.pad_id, run.device)
        mask, _ = pad([[int(m) for m in examples[i][1]] for i in index], 0, run.device)
        r, t = mask[:, 1:].nonzero(as_tuple=True)
        with run.autocast():
            loss = F.cross_entropy(model.logits(model(ids)[r, t]).float(), ids[r, t + 1])
            loss = loss * (len(r) / total(mask[:, 1:].sum()))
        (loss * ranks()).backward()         # FSDP takes the mean of the processes' gradients; theirs is a sum
        return {"loss": loss}

    log = fit(run, stage, model, optimizer, steps, backward=backward, tokens=lambda i: len(examples[i][0]),
              batches=length_batches([len(ids) for ids, _ in examples], batch_size, run.generator(stage)),
              warm_up=40, rate=lambda step: 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2,
              where=lambda i: f"example {i + 1} ({model.tokenizer.decode(examples[i][0][:20])!r}...)",
              key=run.key(*files))
    run.log(stage, log)
    save_hf(model, run.file(stage), weights=0)
    return log


def length_batches(lengths, size, generator):
    """Endless batches of indices of similar length: every epoch is shuffled, then sorted in windows of 16 batches. What is
    left of a batch that the processes cannot share evenly waits for another epoch."""
    if len(lengths) < ranks():
        raise InputError(f"{len(lengths)} examples are too few for {ranks()} processes")
    while True:
        order, batches = torch.randperm(len(lengths), generator=generator).tolist(), []
        for start in range(0, len(order), 16 * size):
            window = sorted(order[start:start + 16 * size], key=lengths.__getitem__)
            batches += [window[i:i + size] for i in range(0, len(window), size)]
        for i in reversed(torch.randperm(len(batches), generator=generator).tolist()):
            even = len(batches[i]) - len(batches[i]) % ranks()
            if even:
                yield batches[i][:even]


def capped(steps, steps_per_epoch, config):
    """The number of steps of a stage: as configured, but at most config.epochs passes over its largest data source."""
    return min(steps, max(1, math.ceil(config.epochs * steps_per_epoch)))


def load_init(run):
    """The checkpoint given by --init, which must bring its tokenizer."""
    directory = run.config.init
    model = load_hf(directory, place=lambda t: placed(t, run.device))
    if model.tokenizer is None:
        raise InputError(f"{directory}: tokenizer.json, or vocab.json and merges.txt, is missing; a base model needs one")
    return model


def train_base(run):
    """Stage 1: the embedded base model, or the checkpoint that --init names."""
    if run.config.init:
        save_hf(load_init(run), run.file("base"), weights=0)
        return
    tokenizer, rng, examples = Tokenizer.embedded(), run.rng("base", "data"), []
    for domain in DOMAINS.values():
        for problem in domain.problems("train", 8000, rng):
            ids, _ = chat_example(tokenizer, domain.conversation(problem, rng))
            examples.append((ids, [True] * len(ids)))
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab), run.generator("base", "weights")).to(run.device)
    model.tokenizer = tokenizer
    language_model(run, "base", shard(model, run.device), examples, run.config.base_steps, run.config.base_lr)


def train_sft(run):
    """Stage 2: fine-tuning on careful demonstrations, or on the chosen responses of real pairs."""
    model, config = run.load("base"), run.config
    examples = sft_examples(run, model)
    files = [os.path.join(config.data, f"{o}.jsonl") for o in run.objectives] if config.data else []
    language_model(run, "sft", model, examples, config.sft_steps, config.sft_lr, config.sft_batch, files)


def sft_examples(run, model):
    """Stage 2's (ids, mask): careful demonstrations, or the chosen responses of real pairs. InputError if one is longer
    than the context."""
    rng, config = run.rng("sft", "data"), run.config
    examples = [(p.prompt + p.chosen, [False] * len(p.prompt) + [True] * len(p.chosen))
                for p in read_real_pairs(run, model)[0]] if config.data else []
    for world in run.worlds(model).values():
        for problem in world.problems("train", min(2500, 25 * config.sft_steps), rng):
            examples.append(chat_example(model.tokenizer, world.conversation(problem, rng, careful=True)))
    longest = max(len(ids) for ids, _ in examples)
    if longest > model.config.max_len:
        raise InputError(f"{config.init}: a context of {model.config.max_len} tokens is too short for the embedded worlds, "
                         f"whose conversations reach {longest} in its vocabulary")
    return examples


# -- 3: samples

def write_rows(path, rows):
    """Dataclass objects -> JSONL."""
    write_text(path, "".join(json.dumps(asdict(r)) + "\n" for r in rows))


def read_rows(path, kind):
    """JSONL -> objects of a dataclass. InputError for a line that is none."""
    names, rows = [f.name for f in fields(kind)], []
    for where, row in read_jsonl(path):
        if sorted(row) != sorted(names):
            raise InputError(f"{where}: not a row that this run has written, which has the fields {', '.join(names)}; bring the "
                             "file back, or remove it to have it made again")
        rows.append(kind(**row))
    return rows


def read_real_pairs(run, model):
    """DIR/<objective>.jsonl for every objective that has pairs there -> (train pairs, dev pairs, {reason: number of rows
    dropped}). An objective with nothing left to train on or to hold out is an error."""
    found, dropped = [], Counter()
    too_long = f"longer than the context of {model.config.max_len} tokens, or alike in this vocabulary"
    for name in run.objectives:
        path = os.path.join(run.config.data, f"{name}.jsonl")
        if holds_questions(path, OBJECTIVES[name]):
            continue
        encoded = [encode_pair(p, model) for p in read_preferences(path, name, dropped)]
        kept = [pair for pair in encoded if pair]
        dropped[too_long] += len(encoded) - len(kept)
        if {p.split for p in kept} != {"train", "dev"}:
            raise InputError(f"{path}: of its rows {len(kept)} fit the context of {model.config.max_len} tokens; pairs to "
                             "train on and to hold out are both needed: add rows, or shorter ones")
        found += kept
    return [p for p in found if p.split == "train"], [p for p in found if p.split == "dev"], dropped


def read_real_labels(run, model):
    """DIR/<objective>.steps.jsonl, where it exists -> (Labelled rows, number of rows dropped: longer than the context, or a
    step without a token of this vocabulary)."""
    rows, n_dropped = [], 0
    for name in run.objectives:
        path = os.path.join(run.config.data, f"{name}.steps.jsonl")
        for row in read_steps(path) if os.path.exists(path) else ():
            found = encode_steps(model.tokenizer, row.prompt, row.steps, OBJECTIVES[name].boundary)
            targets = [{name: v} for v in row.labels]
            if found and len(found[0]) <= model.config.max_len:
                rows.append(Labelled(*found, targets, "train" if split_of(json.dumps(row.prompt)) == "train" else "dev"))
            else:
                n_dropped += 1
    return rows, n_dropped


def policy_of(run, name):
    """A trained policy of this run to sample from -> (model, {domain: mix of its heads}). Several processes share the prompts, each
    with the whole model: sharded, every token would wait for all of them."""
    dtype = sampling_dtype(run.config.dtype, run.device)
    model = load_hf(run.file(name), dtype=dtype, place=lambda t: t.to(run.device))
    return model, {d: domain_mix(model.config.objectives, d, OBJECTIVES.values()) for d in run.domains}


def make_pairs(run):
    """Stage 3: pairs.jsonl, from samples of the SFT policy, or from --data."""
    model, mixes = policy_of(run, "sft")
    pairs = []
    for domain, world in run.worlds(model).items():
        names = [o for o in run.objectives if o in world.objectives]
        for split in ("train", "dev"):
            pairs += sample_pairs(run, "sft", model, mixes[domain], world, split, names)
    pairs = gather(pairs)
    if run.config.data:
        train, dev, _ = read_real_pairs(run, model)
        pairs = train + dev + pairs
    count = Counter((p.objective, p.split) for p in pairs)
    empty = [o for o in run.objectives if not count[o, "train"]]
    if empty:
        raise InputError(f"no preference pair for {', '.join(empty)}: no prompt has two sampled answers of different scores (all "
                         "wrong, or all right); raise --n-samples or --n-prompts, or give a better --init")
    tqdm.write("  pairs to train on + held out: "
               + ", ".join(f"{o} {count[o, 'train']} + {count[o, 'dev']}" for o in run.objectives))
    write_rows(run.file("pairs.jsonl"), pairs)


def rollout(run, what, name, model, mix, world, split, n):
    """The beginning of every sampling stage: a policy answers training problems of n turns in all, or 15 % as many development
    problems. -> every turn as (problem, messages before, ids before, response), the judge's RNG, the generator for further samples"""
    seed, n = (what, name, world.name, split), max(8, n if split == "train" else int(0.15 * n)) // world.turns
    problems = local_items(world.problems(split, n, run.rng(*seed)))
    # The processes have drawn the same problems; from here on each draws apart.
    rng, generator = run.rng(*seed, "judge", *run.own), run.generator(*seed, *run.own)
    student = seed_of(run.config.seed, *seed, "student", *run.own)
    with tqdm(total=len(problems) * world.turns, desc=f"{world.name}: {what}, {split}", unit="answer", disable=None) as bar:
        respond = plain_responder(model, world, mix, run.config.temperature, generator, progress=bar.update)
        played = converse(world, problems, model.tokenizer, respond, student)
    return [(c.problem, before, ids, response) for c in played for ids, before, response in c.turns], rng, generator


def sample_pairs(run, name, model, mix, world, split, names):
    """Several answers of a policy to every prompt, judged for the objectives `names` -> list of Pair, the best against the worst."""
    config, tokenizer = run.config, model.tokenizer
    # The contexts to answer: the problems themselves, or every turn of a dialogue that the policy has played.
    contexts, rng, generator = rollout(run, "samples", name, model, mix, world, split, config.n_prompts)
    with tqdm(total=len(contexts) * config.n_samples, desc=f"{world.name} {split}", unit="sample", disable=None) as bar:
        answers = generate(model, [ids for _, _, ids, _ in contexts], weights=mix, samples=config.n_samples,
                           max_new_tokens=world.max_new_tokens, temperature=config.temperature, generator=generator,
                           progress=bar.update)
    pairs = []
    for i, (problem, before, ids, _) in enumerate(contexts):
        responses = answers[i * config.n_samples:(i + 1) * config.n_samples]
        scores = [world.scores(problem, before, tokenizer.decode(r)) for r in responses]
        ratings = [{n: s[n] if OBJECTIVES[n].case == "verifiable" else judge(s[n], rng) for n in names} for s in scores]
        for o in names:
            best, worst = (f(range(len(responses)), key=lambda k: ratings[k][o]) for f in (max, min))
            if ratings[best][o] - ratings[worst][o] > 0.1 and responses[best] != responses[worst]:
                pairs.append(Pair(o, ids, responses[best], responses[worst], split))
    return pairs


def make_labels(run):
    """Stage 5: what the PRM learns from, labels.jsonl and mah_dpo_pairs.jsonl. It will guide the SFT policy and MAH-DPO's uniform
    mixes, so both make its data: rollouts, turns to be judged, and for case C pairs (SFT's are in pairs.jsonl)."""
    labels, pairs, cuts = [], [], {}
    for name in ("sft", "mah_dpo"):
        model, mixes = policy_of(run, name)
        worlds = run.worlds(model)
        if name == "sft":
            judges = [calibrate_judge(run, model, o) for w in worlds.values() for o in run.objectives
                      if o in w.objectives and OBJECTIVES[o].case == "A"]
            cuts = {row["objective"]: row["threshold"] for row in judges}
        for domain, world in worlds.items():
            of = lambda *cases: [o for o in run.objectives if o in world.objectives and OBJECTIVES[o].case in cases]
            for split in ("train", "dev"):
                part = run, name, model, mixes[domain], world, split
                labels += judge_turns(*part, of("B")) if of("B") else []
                labels += label_rollouts(*part, of("verifiable", "A"), cuts) if of("verifiable", "A") else []
                pairs += sample_pairs(*part, of("C")) if name != "sft" and of("C") else []
    labels, pairs = gather(labels), gather(pairs)
    if run.config.data:
        labels += read_real_labels(run, model)[0]
    tqdm.write(f"  labelled sequences: {len(labels)}; more pairs: {len(pairs)}")
    run.log("judge", judges)
    write_rows(run.file("mah_dpo_pairs.jsonl"), pairs)
    write_rows(run.file("labels.jsonl"), labels)


def judge_turns(run, name, model, mix, world, split, names):
    """Case B: every turn of a policy's dialogues, judged as it is -> list of Labelled."""
    turns, rng, _ = rollout(run, "turns", name, model, mix, world, split, run.config.n_prompts)
    rows = []
    for problem, before, ids, response in turns:
        scores = world.scores(problem, before, model.tokenizer.decode(response))
        targets = {o: float(judge(scores[o], rng) > 0.5) for o in names}
        rows.append(Labelled(ids + response, [len(ids) + len(response) - 1], [targets], split))
    return rows


def calibrate_judge(run, model, name):
    """Case A: the judge's threshold, fitted on 200 rated development examples, and the agreement on another 200.
    -> a row for the log."""
    world, rng, generator = DOMAINS[OBJECTIVES[name].domain], run.rng("judge", name), run.generator("judge", name)
    respond = plain_responder(model, world, 0, run.config.temperature, generator)
    student = seed_of(run.config.seed, "judge", name)
    rated = converse(world, world.problems("dev", 400, rng), model.tokenizer, respond, student)
    scores = [c.scores(world, model.tokenizer)[name] for c in rated]
    ratings, gold = [judge(s, rng) for s in scores], [s >= ENGAGING for s in scores]
    half = len(scores) // 2
    threshold, fitted = fit_threshold(ratings[:half], gold[:half])
    agreement = sum((r > threshold) == g for r, g in zip(ratings[half:], gold[half:])) / half
    share = sum(gold[half:]) / half
    tqdm.write(f"  {name}: judge's threshold {threshold:.3f}, agreement {fitted:.3f} on the {half} rated dev examples it was "
               f"fitted on, {agreement:.3f} on {half} others (always the commoner answer: {max(share, 1 - share):.3f})")
    return {"objective": name, "threshold": threshold, "agreement_fitted": fitted, "agreement": agreement, "positive": share}


def label_rollouts(run, name, model, mix, world, split, names, cuts):
    """Rollouts from every prefix of a policy's responses -> Labelled rows with hindsight targets and majority labels."""
    config, tokenizer, more = run.config, model.tokenizer, run.config.rollouts - 1
    answers, rng, generator = rollout(run, "rollouts", name, model, mix, world, split, config.n_rollout_prompts)
    ends = [tokenizer.step_ends(response, world.boundary) for *_, response in answers]
    starts = [(ids + response[:e + 1], e) for (*_, ids, response), found in zip(answers, ends) for e in found[:-1]]
    with tqdm(total=len(starts) * more, desc=f"rollouts of {name}, {split}", unit="rollout", disable=None) as bar:
        tails = iter(generate(model, [prefix for prefix, _ in starts], weights=mix, generator=generator,
                              max_new_tokens=[world.max_new_tokens - e - 1 for _, e in starts], samples=more,
                              temperature=config.temperature, progress=bar.update) if more else [])
    rows = []
    for (problem, _, prompt, response), found in zip(answers, ends):
        # For every step M completed rollouts, the response first; behind the last step nothing is left to draw.
        sets = [[response] + [response[:e + 1] + next(tails) for _ in range(more)] for e in found[:-1]]
        sets, steps = sets + [[response] * config.rollouts], step_texts(tokenizer, response, world.boundary)
        r = world.verify(problem, steps)[1] if VERIFIABLE & set(names) else [None] * len(steps)
        targets = {o: (hindsight(world, problem, tokenizer, r, sets, config.gamma) if o in VERIFIABLE
                       else verdicts(world, problem, tokenizer, o, sets, cuts[o], rng)).tolist() for o in names}
        known = r.index(0.0) + 1 if 0.0 in r else len(r)    # what follows a wrong step is judged by that, not by what it says
        targets[STEP] = r[:known] + [None] * (len(r) - known)
        rows.append(Labelled(prompt + response, [len(prompt) + e for e in found],
                             [{o: v[s] for o, v in targets.items() if v[s] is not None} for s in range(len(steps))], split))
    return rows


def step_texts(tokenizer, ids, boundary):
    """Response ids -> the text of every step."""
    ends = tokenizer.step_ends(ids, boundary)
    return [tokenizer.decode(ids[a + 1:b + 1]) for a, b in zip([-1, *ends], ends)]


def hindsight(world, problem, tokenizer, r, sets, gamma):
    """The verifiable case: verify every rollout's end, then hindsight_targets. r: verdicts on the response's steps, or None."""
    texts = [[step_texts(tokenizer, ids, world.boundary) for ids in rollouts] for rollouts in sets]
    z = torch.tensor([[world.verify(problem, t)[0] for t in row] for row in texts])
    n = torch.tensor([[len(t) for t in row] for row in texts])
    return hindsight_targets(torch.tensor([right or 0.0 for right in r]), n, z, gamma)


def verdicts(world, problem, tokenizer, name, sets, threshold, rng):
    """Case A: the judge's verdict on every completed rollout, then majority_labels."""
    rate = lambda r: judge(world.scores(problem, [], tokenizer.decode(r))[name], rng)
    return majority_labels(torch.tensor([[rate(r) > threshold for r in rollouts] for rollouts in sets]))


# -- 6: PRM

PAIR_FILES = ["pairs.jsonl", "mah_dpo_pairs.jsonl"]      # of samples of SFT, on which the policies train, and of MAH-DPO


class Cycle:
    """Draw from a list without replacement, reshuffled when it is used up."""

    def __init__(self, items, generator):
        assert items, "nothing to draw from"
        self.items, self.generator, self.order = items, generator, []

    def take(self, n):
        """The next n items."""
        while len(self.order) < n:
            self.order += torch.randperm(len(self.items), generator=self.generator).tolist()
        taken, self.order = self.order[:n], self.order[n:]
        return [self.items[i] for i in taken]


def prm_sources(run, outputs):
    """What a PRM with these outputs learns from: {split: (lists of Labelled by objectives, lists of Pair by objective)}. With
    real data an objective without step labels learns from its pairs, as in case C."""
    labels = read_rows(run.file("labels.jsonl"), Labelled)
    pairs = [p for name in PAIR_FILES for p in read_rows(run.file(name), Pair)]
    labelled = {o for row in labels if row.split == "train" for o in about(run, row)}
    groups = {}
    for row in labels:                          # sequences with the same labelled objectives come from one domain
        groups.setdefault(tuple(o for o in about(run, row) if o in outputs), []).append(row)
    groups.pop((), None)
    rest = [[p for p in pairs if p.objective == o] for o in outputs if o not in labelled]
    split = lambda kind, s: [part for part in ([item for item in items if item.split == s] for items in kind) if part]
    return {s: (split(groups.values(), s), split(rest, s)) for s in ("train", "dev")}


def about(run, item):
    """The objectives of a Pair or of the labels of a Labelled."""
    return [item.objective] if isinstance(item, Pair) else [o for o in run.objectives if any(o in t for t in item.targets)]


def where_is(run, item):
    """The line of labels.jsonl or of pairs.jsonl on which an item stands, and its objectives."""
    for path in map(run.file, PAIR_FILES if isinstance(item, Pair) else ["labels.jsonl"]):
        rows = read_rows(path, type(item)) if os.path.exists(path) else []
        if item in rows:
            return f"{path}:{rows.index(item) + 1} ({', '.join(about(run, item))})"


def train_prm(run, name, outputs):
    """Stage 6: one PRM with these outputs, on labelled sequences and pairs, from the SFT backbone."""
    config, generator, sources = run.config, run.generator(name), prm_sources(run, outputs)
    backbone = run.load("sft").with_heads(())
    # Where it is known which steps are right, a value model is taught that too. (Below an only block there is nothing to read.)
    verified = any(STEP in t for items in sources["train"][0] for row in items for t in row.targets)
    if verified and VERIFIABLE & set(outputs) and backbone.config.n_layer > 1:
        outputs = [*outputs, STEP]
    records = [STEP_OUTPUT if o == STEP else OBJECTIVES[o] for o in outputs]
    prm = shard(PRM(backbone, records, run.generator(name, "weights")).to(run.device), run.device)
    optimizer = torch.optim.AdamW([{"params": backbone.parameters(), "lr": config.prm_lr_backbone},
                                   {"params": prm.score.parameters(), "lr": config.prm_lr_head}],
                                  betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    rows, pairs = ([Cycle(items, generator) for items in kind] for kind in sources["train"])
    n_labels = [sum(len(r.ends) for r in cycle.items) for cycle in rows]
    even = lambda n: max(1, n // ranks()) * ranks()                                       # what the processes can share
    share = lambda n: max(config.prm_pairs, config.prm_batch * n // sum(n_labels))        # few labels are still learned from
    sizes = [even(share(n)) for n in n_labels] + [even(config.prm_pairs) for _ in pairs]
    largest = max(len(cycle.items) / size for cycle, size in zip([*rows, *pairs], sizes))
    steps = capped(config.prm_steps, largest, config)
    weight = torch.tensor([config.prm_step_weight if o == STEP else config.prm_value_weight if o in VERIFIABLE else 1.0
                           for o in outputs], device=run.device)

    def batches():
        while True:
            yield [item for cycle, n in zip([*rows, *pairs], sizes) for item in cycle.take(n)]

    def parts(batch):
        """This process's items, labelled ones some of similar length at a time: gradients add up, and little is padded."""
        labelled, compared = ([x for x in batch if isinstance(x, kind)] for kind in (Labelled, Pair))
        for index in dealt_batches([len(r) for r in labelled], 2048):
            yield [labelled[i] for i in index]
        if compared:
            yield local_items(compared)

    def backward(batch):
        losses, labels = torch.zeros(2, len(outputs), device=run.device)
        named = Counter(o for x in batch if isinstance(x, Labelled) for t in x.targets for o in t)
        of_batch = torch.tensor([named[o] for o in outputs], device=run.device)
        for part in parts(batch):
            with run.autocast():
                if isinstance(part[0], Labelled):
                    scores, targets = step_scores(prm, part)
                    count = (~targets.isnan()).sum(0)
                    loss = step_loss(records, scores, targets, of_batch)
                else:
                    chosen, rejected, owner = pair_scores(prm, part)
                    count = owner.bincount(minlength=len(outputs))
                    loss = torch.stack([bradley_terry_loss(chosen, rejected, owner == p) for p in range(len(outputs))])
                    loss = loss * count / total(count).clamp(min=1)
            ((loss * weight).sum() * ranks()).backward()
            losses, labels = losses + loss.detach(), labels + count
        return {"loss": losses, "labels": labels}

    log = fit(run, name, prm, optimizer, steps, batches=batches(), backward=backward, names=outputs,
              warm_up=100, rate=lambda step: 0.05 + 0.95 * (1 - step / steps), tokens=len,
              where=lambda item: where_is(run, item), key=run.key(*map(run.file, ["labels.jsonl", *PAIR_FILES])))
    log.append(measure_prm(prm, sources["dev"]))
    run.log(name, log)
    save_prm(prm, run.file(name))


@torch.no_grad()
def measure_prm(prm, sources):
    """Held-out quality of every output, printed; sets prm.scale. For the value model: R^2 beside predict-the-mean (0)."""
    found, quality = {o: [] for o in prm.names}, {}
    batches = lambda items: ([items[i] for i in index] for index in batches_by_length([len(x) for x in items]))
    for rows in sources[0]:
        parts = [step_scores(prm, part) for part in batches(rows)]
        scores, targets = (torch.cat(t) for t in zip(*parts))
        for p, name in enumerate(prm.names):
            has = ~targets[:, p].isnan()
            s, t = scores[has, p], targets[has, p]
            if len(s) and name in VERIFIABLE:
                quality[name] = {"r2": 1 - float(((s - t) ** 2).mean() / t.var(correction=0).clamp(min=1e-9)), "n": len(s)}
            elif len(s):
                common = float(t.mean())
                quality[name] = {"accuracy": float(((s > 0) == (t > 0.5)).float().mean()),
                                 "commoner_label": max(common, 1 - common), "n": len(s)}
            found[name].append(s)
    for pairs in sources[1]:
        chosen, rejected, _ = (torch.cat(t) for t in zip(*(pair_scores(prm, part) for part in batches(pairs))))
        quality[pairs[0].objective] = {"pair_accuracy": float((chosen > rejected).float().mean()), "n": len(chosen)}
        found[pairs[0].objective] += [chosen, rejected]
    for p, name in enumerate(prm.names):
        values = torch.cat(found[name]) if found[name] else torch.zeros(0)
        if len(values) > 1 and float(values.std()) > 0:
            prm.scale[p] = values.std()
    for name, q in quality.items():
        tqdm.write(f"  {name:17s} held-out " + ", ".join(f"{k} {v:.3f}" if k != "n" else f"{v} steps" for k, v in q.items()))
    return {"held_out": quality}


# -- 4: policies

METHODS = ["mah_dpo", "single_head_dpo", "modpo", "soup"]


def reference_logps(run, pairs):
    """The SFT policy's log-probabilities (N, 2) of all pairs, computed once, in the precision that the policies train in, and
    kept in sft_logps.safetensors. InputError if what is kept there is of other pairs, or if one is not finite."""
    path, key = run.file("sft_logps.safetensors"), fingerprint(run.config.dtype, run.file("pairs.jsonl"))
    if not os.path.exists(path):
        model = run.load("sft")
        with run.autocast(), tqdm(total=len(pairs), desc="log-probs of sft", unit="pair", disable=None) as bar:
            logps = own_logps(model, pairs, bar.update)
        bad = (~logps.isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise InputError(f"{where_is(run, pairs[bad[0]])}: its log-probability under the SFT policy is not finite, as of "
                             f"{len(bad)} of {len(pairs)} pairs")
        save_safetensors({"logps": logps}, path, {"key": key})
    if read_metadata(path).get("key") != key:
        raise InputError(f"{path}: computed for another pairs.jsonl, or in another --dtype; bring that back, or remove this file "
                         "and the policies that were trained on it")
    return load_safetensors(path)["logps"]


def train_policy(run, name, heads, objectives, margins=None):
    """Preference training on the pairs of `objectives`. heads: names of the policy's heads; an objective without a head
    of its own goes through head 0, so this one function is MAH-DPO, single-head DPO, DPO on one objective, and with
    margins (N,) MODPO. Balanced: the same number of pairs of every objective in every step (paper, Sec. 5)."""
    config, pairs = run.config, read_rows(run.file("pairs.jsonl"), Pair)
    reference = reference_logps(run, pairs)
    model = run.load("sft").with_heads(heads, config.perturbation if len(heads) > 1 else 0.0, run.generator(name, "heads"))
    factors = parse_weights(config.dpo_lr_factor, METHODS, "--dpo-lr-factor", 1.0)
    factor = factors[METHODS.index("soup" if name.startswith("dpo_") else name)]
    optimizer = make_optimizer(model, config.dpo_lr_backbone, factor * config.dpo_lr_heads)
    weights = dict(zip(run.objectives, parse_weights(config.alpha, run.objectives, "--alpha", 1.0)))
    alpha = torch.tensor([weights[o] for o in objectives], device=run.device)
    domain = lambda o: OBJECTIVES[o].domain
    w_k = torch.tensor([1 / sum(domain(o) == domain(k) for o in objectives) for k in objectives], device=run.device)
    # An objective's pairs come in the same order to every policy, for the same number of steps.
    of = lambda o, split: [i for i, p in enumerate(pairs) if p.objective == o and p.split == split]
    cycles = {o: Cycle(of(o, "train"), run.generator("pairs", o)) for o in run.objectives}
    steps = capped(config.dpo_steps, max(len(c.items) for c in cycles.values()) / config.dpo_pairs, config)
    dev = [i for o in objectives for i in of(o, "dev")[:4 * config.dpo_pairs]]
    head_of = lambda o: heads.index(o) if o in heads else 0

    def batches():
        while True:
            yield [i for o in objectives for i in cycles[o].take(config.dpo_pairs)]

    def judged(pi, index, count=None):
        """Log-probabilities (2, n) of the pairs `index` -> loss, metrics."""
        which = torch.tensor([objectives.index(pairs[i].objective) for i in index], device=run.device)
        ref = reference[index].T.to(run.device)
        if margins is None:
            return mah_dpo_loss(*pi, *ref, which, alpha, config.beta, count)
        losses = modpo_loss(*pi, *ref, margins[index].to(run.device), w_k[which], config.beta)
        return balanced_mean(losses, which, alpha, count), pair_metrics(losses, *pi, *ref, which, len(alpha), config.beta, count)

    def backward(index):
        found = []
        count = torch.full((len(objectives),), config.dpo_pairs, device=run.device)
        for part in dealt_batches([len(pairs[i]) for i in index]):                        # gradients add up exactly
            part = [index[k] for k in part]
            head = torch.tensor([head_of(pairs[i].objective) for i in part], device=run.device)
            with run.autocast():
                loss, metrics = judged(policy_logps(model, [pairs[i] for i in part], head), part, count)
            if ranks() > 1:             # FSDP wants a gradient for the same parameters in every process
                loss = loss + 0 * sum(head.weight[0, 0] for head in model.heads)
            (loss * ranks()).backward()
            found.append(metrics)
        found = {metric: sum(m[metric] for m in found) for metric in found[0]}
        if len(heads) > 1:              # a head's gradient comes from its objective alone
            grads = [model.heads[head_of(o)].weight.grad for o in objectives]     # None without a pair of the objective
            norms = [torch.zeros((), device=run.device) if g is None else whole(g.norm()) for g in grads]
            found["gradient_norm"] = torch.stack(norms) / ranks()
        return found

    def develop():
        with run.autocast():
            logps = own_logps(model, [pairs[i] for i in dev]).T.to(run.device)
        return judged(logps, dev)[1]

    log = fit(run, name, model, optimizer, steps, batches=batches(), backward=backward, names=objectives, clip=10.0,
              develop=develop if dev else None, tokens=lambda i: len(pairs[i]), where=lambda i: where_is(run, pairs[i]),
              key=run.key(run.file("pairs.jsonl")))
    if not name.startswith("dpo_"):         # the soup's members go without
        show_progress(name, objectives, log)
    run.log(name, log)
    save_hf(model, run.file(name), weights=0 if heads == ["policy"] else None)


def show_progress(name, objectives, log):
    """One aligned line per evaluation on development pairs: loss, margin, accuracy of every objective."""
    names = " ".join(f"{o:>18}" for o in objectives)
    tqdm.write(f"  {name}: loss, margin, accuracy on development pairs\n        {names}")
    for row in (r for r in log if r.get("split") == "dev"):
        cells = [f"{m['loss']:6.3f} {m['margin']:+6.2f} {m['accuracy']:4.2f}" if m else "-"
                 for m in (row.get(o) for o in objectives)]
        tqdm.write(f"  {row['step']:5d} " + " ".join(f"{c:>18}" for c in cells))


def modpo_margins(run, pairs):
    """(N,): for a pair of objective k, sum over the domain's other objectives j of w_j (r_j(y+) - r_j(y-)) with uniform w
    and r_j = beta log(pi_j / pi_ref) by the single-objective DPO policies."""
    reference = reference_logps(run, pairs)
    margins = torch.zeros(len(pairs))
    for name in run.objectives:
        mates = domain_names(OBJECTIVES[name].domain, run.objectives)
        index = [i for i, p in enumerate(pairs) if p.objective in mates and p.objective != name]
        if index:
            model = run.load(f"dpo_{name}")
            with run.autocast(), tqdm(total=len(index), desc=f"rewards by dpo_{name}", unit="pair", disable=None) as bar:
                logps = pair_logps(model, [pairs[i] for i in index], lambda o: 0, model.tokenizer.pad_id, bar.update)
            rewards = run.config.beta * (logps - reference[index])
            margins[index] += (rewards[:, 0] - rewards[:, 1]) / len(mates)
    return margins


def train_policies(run):
    """Stage 4, one policy after another; finished ones are skipped."""
    objectives = run.objectives
    jobs = [("mah_dpo", objectives, objectives), ("single_head_dpo", ["policy"], objectives),
            *((f"dpo_{o}", ["policy"], [o]) for o in objectives), ("modpo", ["policy"], objectives)]
    for name, heads, wanted in jobs:
        if not finished(run, name):
            margins = modpo_margins(run, read_rows(run.file("pairs.jsonl"), Pair)) if name == "modpo" else None
            train_policy(run, name, list(heads), wanted, margins)
    with run.autocast():            # as the reference's log-probabilities were computed
        write_json(run.file("pair_metrics.json"), measure_pairs(run))


def measure_pairs(run):
    """Rows of the held-out pairs' table: every policy, each pair under its own head; the soup under its domain's."""
    pairs = read_rows(run.file("pairs.jsonl"), Pair)
    reference, rows = reference_logps(run, pairs), []
    jobs = [(name, [name], run.objectives) for name in ("base", "sft", "single_head_dpo", "modpo", "mah_dpo")]
    jobs += [("soup", [f"dpo_{o}" for o in names], names)
             for names in (domain_names(domain, run.objectives) for domain in run.domains)]
    for policy, members, names in tqdm(jobs, desc="held-out pairs", unit="policy", disable=None):
        index = [i for i, p in enumerate(pairs) if p.split == "dev" and p.objective in names]
        part, model = [pairs[i] for i in index], average([run.load(m) for m in members])
        logps = reference[index] if policy == "sft" else own_logps(model, part)
        rows += pair_metrics_rows(policy, logps, reference[index], part, run.config.beta, run.config.seed)
    return rows


# -- command

def finished(run, name):
    """Is a stage's last file there?"""
    return os.path.exists(run.file(name if "." in name else os.path.join(name, "config.json")))


def stages(run):
    """The stages in order: (title, the file that is there when it is finished, the work)."""
    prms = [("prm", run.objectives)] if run.config.prm == "unified" else [(f"prm_{o}", [o]) for o in run.objectives]
    source = f"from {run.config.init}" if run.config.init else "pre-training"
    yield f"base model, {source}", "base", lambda: train_base(run)
    yield "supervised fine-tuning", "sft", lambda: train_sft(run)
    yield "samples and judges", "pairs.jsonl", lambda: make_pairs(run)
    yield "MAH-DPO and the baselines", "pair_metrics.json", lambda: train_policies(run)
    yield "rollouts and labels", "labels.jsonl", lambda: make_labels(run)
    for name, outputs in prms:
        yield f"process reward model {name}", name, lambda name=name, outputs=outputs: train_prm(run, name, outputs)
    yield "tables", "results.json", lambda: evaluate(run.path, read_json(run.file("pair_metrics.json")))


def run_stages(run):
    """Run what is not finished, with a numbered title and the time of each stage."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.stop)
    begun = time.time()
    for number, (title, last_file, work) in enumerate(stages(run), 1):
        if finished(run, last_file):
            print(f"[{number}] {title}: finished before")
            continue
        print(f"[{number}] {title}", flush=True)
        start = time.time()
        work()
        seconds = time.time() - start
        run.log(title, [{"seconds": round(seconds, 1)}], "timings.jsonl")
        print(f"    {seconds:.0f} s", flush=True)
    for name in os.listdir(run.path):          # a kill may have left half a file
        if name == "checkpoint.safetensors" or name.endswith(".tmp"):
            with contextlib.suppress(OSError):
                os.remove(run.file(name))
    print(f"{run.path}: done in {time.time() - begun:.0f} s. Talk to it: python decode.py {run.path} --prompt ...")


def link(source, target):
    """A link to a file or a directory, or a copy of it where the system lends links to few (Windows)."""
    try:
        os.symlink(os.path.relpath(source, os.path.dirname(target)), target)
    except OSError:
        part = f"{target}.tmp"                 # half a copy is made again
        if os.path.isdir(source):
            shutil.copytree(source, part, dirs_exist_ok=True)
        else:
            shutil.copy(source, part)
        os.replace(part, target)


def take_over(run, source, swept):
    """Link what a run that differs in the swept field need not make again, and copy its part of the log."""
    same = lambda name: "=" not in name and any(fnmatch(name, p) for p in UNTOUCHED[swept])         # no other variants
    if not os.path.exists(run.file("log.jsonl")):
        rows = [row for _, row in read_jsonl(source.file("log.jsonl")) if same(row["stage"])]
        write_text(run.file("log.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    for name in filter(same, sorted(os.listdir(source.path))):
        if rank() == 0 and not os.path.lexists(run.file(name)):
            link(source.file(name), run.file(name))
    total(torch.zeros(1))                      # the other processes look for the links only now


def begin(path, config):
    """The run in a directory, begun with this configuration if there is none yet."""
    run = Run(path, config)
    if not os.path.exists(run.file("config.json")):
        os.makedirs(path, exist_ok=True)
        write_json(run.file("config.json"), asdict(config) | {"objectives": [asdict(OBJECTIVES[o]) for o in run.objectives]})
    return run


def find_variants(run):
    """TRANSITION: what train.py --sweep put into a run's directory: {field: {value: directory}}."""
    found = {}
    for name in sorted(os.listdir(run)):
        field, path = name.partition("=")[0], os.path.join(run, name)
        if "=" in name and field != "seed" and os.path.isfile(os.path.join(path, "config.json")):
            found.setdefault(field, {})[read_run(path)[field]] = path
    return {field: dict(sorted(values.items())) for field, values in found.items()}


def carry_out(run, source=None, swept=None):
    """All that is unfinished of a run: its stages, or with several seeds those of each training; then the variants that --sweep
    put into its directory; then the tables over these."""
    trainings, variants = seed_runs(run.path), find_variants(run.path)
    if run.config.seeds > 1:
        for i, path in enumerate(trainings):
            print(f"\n{path}: training {i + 1} of {len(trainings)}")
            one = begin(path, replace(run.config, seed=run.config.seed + i, seeds=1))
            carry_out(one, source and Run(seed_runs(source.path)[i], one.config), swept)
    else:
        if source:
            take_over(run, source, swept)
        run_stages(run)
    for name, values in variants.items():
        for path in values.values():
            print(f"\n{path}: {name} varied")
            carry_out(open_run(run.config, path), run, name)
    if len(trainings) > 1 or variants:
        publish(run.path, load_rows(run.path))


def read_sweep(text, config):
    """'FIELD=a,b,c' (or 'FIELD=a;b;c', where a value has commas of its own) -> the field, [config with each value but the one
    it has already]. Variants do without the sweep of weights, which would cost more time than all else of their tables."""
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in UNTOUCHED or not values:
        raise InputError(f"--sweep {text}: write FIELD=a,b,c with one of the fields {', '.join(UNTOUCHED)}")
    kind, found = type(getattr(config, name)), []
    for value in values.split(";" if ";" in values else ","):
        try:
            found.append(replace(config, **{name: kind(value.strip())}))
        except ValueError:
            raise InputError(f"--sweep {text}: {value!r} is no {kind.__name__}") from None
        check_config(found[-1])
    return name, [replace(c, weight_steps=0) for c in found if c != config]


def read_command(argv):
    """Command line -> (config, directory to resume or None, sweep or None). One flag per field of Config."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=DATA_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        shown = f"{f.metadata['help']} (default {f.default!r})" if f.default != "" else f.metadata["help"]
        flag, shown = "--" + f.name.replace("_", "-"), shown.replace("%", "%%")
        kind = {"action": "store_const", "const": True} if f.type is bool else {"type": type(f.default)}
        parser.add_argument(flag, default=None, help=shown, **kind)
    parser.add_argument("--fast", action="store_true", help="every stage, small: shows that it works, finds nothing")
    parser.add_argument("--resume", metavar="RUN", help="go on with an unfinished run; takes no options but --device and --sweep")
    parser.add_argument("--sweep", metavar="FIELD=a,b,c", help="train the run also with these values of an option, in "
                        "RUN/FIELD=a and so on, from the first stage that the option concerns; the tables go into RUN/results.md. "
                        f"With --resume: of an old run. FIELD is one of {', '.join(UNTOUCHED)}")
    args = vars(parser.parse_args(argv))
    fast, resume, sweep = args.pop("fast"), args.pop("resume"), args.pop("sweep")
    given = {k: v for k, v in args.items() if v is not None}
    if resume == "":                            # an empty variable of a script must not start a new run
        raise InputError("--resume needs the directory of a run")
    begun, saved = [resume and os.path.exists(os.path.join(resume, name)) for name in ("config.json", "command.json")]
    if (begun or saved) and (set(given) - {"device"} or fast):
        raise InputError("--resume goes on with the run's own configuration; give no option with it but --device and --sweep")
    if saved:
        config, _, swept = read_command(read_json(os.path.join(resume, "command.json")))
        return Config(**given) if begun else replace(config, **given), resume, sweep or swept
    small = {f.name: f.metadata["fast"] for f in fields(Config) if fast and f.metadata["fast"] is not None}
    return Config(**(small | given)), resume, sweep


def check_config(c):
    """InputError for an option out of its range."""
    low = {"temperature": 1e-6, "beta": 1e-9, "perturbation": 0, "gamma": 0, "seed": 0, "n_samples": 2, "weight_steps": 0}
    for f in fields(c):
        value, kind = getattr(c, f.name), type(f.default)
        if type(value) is not kind and not (kind is float and type(value) is int):            # in a config.json
            raise InputError(f"--{f.name.replace('_', '-')} {value!r} is no {kind.__name__}")
        least = low.get(f.name, 1 if type(value) is int else 0)
        if type(value) in (int, float) and not least <= value < 2**31:
            raise InputError(f"--{f.name.replace('_', '-')} {value} is out of range")
    parse_weights(c.alpha, select_objectives(c.objective), "--alpha", 1.0)
    parse_weights(c.dpo_lr_factor, METHODS, "--dpo-lr-factor", 1.0)
    for name, known in (("prm", ("unified", "each")), ("dtype", ("fp32", "bf16")), ("split", ("test", "dev"))):
        if getattr(c, name) not in known:
            raise InputError(f"--{name} {getattr(c, name)}: choose {' or '.join(known)}")
    batches = {"--sft-batch": c.sft_batch, "--dpo-pairs": c.dpo_pairs}
    for name, n in (batches if c.init else batches | {"a batch of pre-training": 64}).items():
        if n % ranks():
            raise InputError(f"{name} {n}: {ranks()} processes cannot share it evenly; choose a multiple, or other processes")
    if c.data and not c.init:
        raise InputError("--data needs --init: the embedded model knows only its own small worlds")


def check_inputs(run):
    """Read what the stages will read, so that a mistake shows before anything is written."""
    config = run.config
    for path in filter(None, (config.data, config.init)):
        if not os.path.isdir(path):
            raise InputError(f"{path}: no such directory")
    model = load_init(run) if config.init else None
    if config.data:
        train, dev, dropped = read_real_pairs(run, model)
        labels, n_bad = read_real_labels(run, model)
        print(f"pairs: {len(train)} to train on, {len(dev)} held out"
              + "".join(f"; {n} left out: {reason}" for reason, n in dropped.items() if n))
        if labels or n_bad:
            print(f"responses with step labels: {len(labels)}, {n_bad} left out")
        for world in run.worlds(model).values():
            counts = ", ".join(f"{n} {split}" for split, n in world.counts().items())
            print(f"questions: {counts}" + "".join(f"; {n} left out: {reason}" for reason, n in world.dropped.items() if n))
        return
    for domain in run.domains:                              # a world that is too small for what is asked
        world, names = DOMAINS[domain], domain_names(domain, run.objectives)
        rolled = {OBJECTIVES[o].case for o in names} & {"verifiable", "A"}
        world.problems(config.split, config.n_test, RNG(0))
        world.problems("train", max(config.n_prompts, config.n_rollout_prompts if rolled else 0) // world.turns, RNG(0))
    if model:
        sft_examples(run, model)               # a context that is too short, a chat template that is not read


def open_run(config, path):
    """A new run in a directory that is empty or holds the command alone, or the old run there, with its own configuration."""
    held = set(os.listdir(path)) if os.path.isdir(path) else {"nothing"}
    begun = "config.json" in held or held and "command.json" not in held
    if begun:
        saved = read_run(path)
        other = set(saved) ^ {f.name for f in fields(Config)} ^ {"objectives"}
        if other:
            raise InputError(f"{path}/config.json: not the configuration of a run of this version ({', '.join(sorted(other))})")
        saved |= {"device": config.device} if config.device != "auto" else {}
        config = Config(**{k: v for k, v in saved.items() if k != "objectives"})
    check_config(config)
    if not begun:
        config.out, config.device = path, pick_device(config.device)
        check_inputs(Run(path, config))
        print(f"writing to {path}")
    return begin(path, config)


@contextlib.contextmanager
def alone(path):
    """Hold a run directory. InputError if a train.py is at work there already, say the processes that go on after their torchrun
    was killed: two would write the same files."""
    with contextlib.ExitStack() as stack:
        if fcntl and rank() == 0:
            directory = os.open(path, os.O_RDONLY)
            stack.callback(os.close, directory)
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{path}: a train.py is at work there already; wait for it, or end its processes") from None
            except OSError:                                 # a file system without locks
                pass
        yield


def main(argv=None):
    """The command line: a new run, or an unfinished one."""
    argv = sys.argv[1:] if argv is None else argv
    join_processes()
    path, = gather([CLAIMED or (claim(argv) if rank() == 0 else None)])[:1]
    try:
        config, resume, sweep = read_command(argv)
        run = open_run(config, path or resume)
        name, variants = read_sweep(sweep, run.config) if sweep else (None, [])
        for variant in variants:
            check_inputs(Run(run.path, variant))
    except BaseException:
        if path and rank() == 0:                                # a mistake leaves nothing behind
            shutil.rmtree(path)
            with contextlib.suppress(OSError):
                os.rmdir("runs")
        raise
    with alone(run.path):
        for variant in variants:
            begin(run.file(f"{name}={getattr(variant, name)}"), variant)
        try:
            carry_out(run)
        except KeyboardInterrupt:
            if rank() == 0:
                print(f"\nstopped; what is finished is kept. Go on with: python train.py --resume {run.path}", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    run_command(main)
