"""What a run reads of its --data directory, and real questions as a world to sample and measure in.

    objectives_of           which objectives its files are about, and what each is
    Questions, worlds_of    the worlds of train.py's --data
    real_pairs, real_labels what a run learns from them
    describe_data           how much there is

Before: datasets.py, the rows of the files.
"""
import glob
import json
import os
import re
from collections import Counter
from dataclasses import replace
from functools import partial

from data import (BOUNDARIES, CASES, DOMAINS, OBJECTIVES, SPLITS, InputError, Objective, Problem,
                  World, read_json, select_objectives, split_of)
from interop.answers import final_answer, same_answer
from interop.datasets import (encode_pair, encode_prompt, encode_steps, left_out, objectives_in,
                              read_preferences, read_questions, read_steps, train_or_dev, use_of)
from interop.parallel import placed
from interop.tokenizer import use_template_args
from model import load_hf
from prm import STEP, Labelled


# -- the objectives of a directory

# No objective can have these names: they mean something else in --objective and --guide, as a head,
# as an output of a PRM, in the rows of a log, in the columns of a table.
TAKEN = ("all", "unified", "worst", "policy", STEP, "stage", "step", "split", "gradient_norm",
         "run", "guide", "kl", "tokens", "drawn")


def objective_files(data):
    """A --data directory -> {objective: paths of its pairs or questions}; {} where `data` is "".

    DIR/<name>.jsonl is about that objective. A file whose rows rate several objectives is about all
    of them, unless it has the name of one, or a name of the paper's."""
    found = {}
    for path in sorted(glob.glob(f"{glob.escape(data)}/*.jsonl")) if data else []:
        name = os.path.basename(path).removesuffix(".jsonl")
        # Labelled steps alone make an objective, too, which then lacks its pairs.
        if name.endswith(".steps"):
            found.setdefault(name.removesuffix(".steps"), [])
            continue
        rated = [] if name in OBJECTIVES else objectives_in(path)
        for about in rated if rated and name not in rated else [name]:
            found.setdefault(about, []).append(path)
    return found


def objectives_of(spec, data):
    """What --objective selects, of the paper's seven or of a directory's -> list of Objective.

    The paper's names keep their records and come first. What else DIR/objectives.json does not say
    of a name: its domain is the directory's name, its case C, its steps are sentences. InputError
    for a name that cannot serve, or that the directory lacks."""
    if not data:
        return select_objectives(spec)
    files = objective_files(data)
    if not files:
        raise InputError(f"{data}: no directory with an objective; put the pairs of each into "
                         f"{data}/<objective>.jsonl")
    told = read_told(f"{data}/objectives.json", files)
    # A domain is a single word, as what a user types in --objective.
    domain = re.sub(r"\W", "_", os.path.basename(os.path.abspath(data)))
    known = []
    for name in [*OBJECTIVES, *sorted(files.keys() - OBJECTIVES)]:
        if name in files:
            record = OBJECTIVES.get(name) or Objective(name, domain, "C", "sentence")
            known.append(replace(record, **told.get(name, {})))
    try:
        chosen = select_objectives(spec, known)
    except InputError as e:
        raise InputError(f"{data}: {e}, or add <objective>.jsonl") from None
    for name in [o.name for o in chosen]:
        where = ", ".join(files[name]) or f"{data}/{name}.steps.jsonl"
        # A name becomes a part of files' names, and a key beside others.
        if name in TAKEN or not re.fullmatch(r"\w{1,60}", name):
            raise InputError(f"{where}: no objective can be called {name!r}; give it another name, "
                             f"a single word that is none of {', '.join(TAKEN)}, nor longer than "
                             "60 letters; or leave it out of --objective")
        if not files[name]:
            raise InputError(f"{where}: labelled steps alone are too little; add the pairs or "
                             f"questions of {name!r} as {data}/{name}.jsonl, or leave it out of "
                             "--objective")
    return chosen


def read_told(path, names):
    """objectives.json, if it is there -> {objective: {field of its record: value}}. InputError for
    one that is not among `names`, and for what is no field or value of a record."""
    told = read_json(path) if os.path.exists(path) else {}
    example = '{"brevity": {"domain": "style", "case": "C", "boundary": "newline"}}'
    if not isinstance(told, dict) or not all(isinstance(v, dict) for v in told.values()):
        raise InputError(f"{path}: not such as {example}")
    for name, record in told.items():
        if name not in names:
            raise InputError(f"{path}: {name!r} has no file; add {name}.jsonl beside it, or take "
                             "the name out")
        for key, value in record.items():
            # The fields that may be told, and what each may be.
            good = {"domain": isinstance(value, str) and re.fullmatch(r"\w+", value),
                    "case": value in CASES, "boundary": value in BOUNDARIES}
            if not good.get(key):
                raise InputError(f"{path}: {name!r}: {json.dumps(key)}: {json.dumps(value)} means "
                                 'nothing; give a "domain" (a single word), a "case" '
                                 f'({", ".join(CASES)}) or a "boundary" ({", ".join(BOUNDARIES)})')
    return told


# -- real questions as a world

class Questions(World):
    """Real questions as a world: a response is right if its final answer is. Nobody verifies its
    steps one by one, so hindsight targets come from the ends of rollouts alone."""

    def __init__(self, path, objective, max_new_tokens, model):
        """Keeps the rows of `path` that fit the model's context, with their solution and with
        max_new_tokens. The others are counted in `dropped`, {reason: number}."""
        self.name = objective.domain
        self.boundary = objective.boundary
        self.objective = objective.name
        self.max_new_tokens = max_new_tokens
        self.dropped = Counter()
        rows = read_questions(path, self.dropped)

        context = model.config.max_len
        fitting = [q for q in rows if self.length(q, model.tokenizer) <= context]
        self.rows = {json.dumps(q.prompt): q for q in fitting}
        self.dropped["too long for the context with an answer"] = len(rows) - len(fitting)
        self.dropped["asked before"] = len(fitting) - len(self.rows)

        empty = [split for split, n in self.counts().items() if n == 0]
        if empty:
            raise InputError(f"{path}: {len(rows)} questions, {len(self.rows)} fit the context of "
                             f"{context} tokens with {max_new_tokens} for the answer; none is left "
                             f"for {', '.join(empty)}")

    def length(self, question, tokenizer):
        """Tokens of a question and of what may follow it."""
        solution = len(tokenizer.encode(question.solution)) + 1           # and EOS
        return len(encode_prompt(tokenizer, question.prompt)) + max(self.max_new_tokens, solution)

    @property
    def objectives(self):
        return [self.objective]

    def counts(self):
        """Number of questions by split."""
        splits = [split_of(key) for key in self.rows]
        return {split: splits.count(split) for split in dict.fromkeys(SPLITS)}

    def problems(self, split, n, rng):
        """n questions of a split in random order, or all that there are."""
        drawn = [(rng.random(), key) for key in self.rows if split_of(key) == split]
        questions = [self.rows[key] for _, key in sorted(drawn)[:n]]
        return [Problem(question.prompt, {"question": question}) for question in questions]

    def conversation(self, problem, rng, careful=False):
        question = problem.truth["question"]
        solution = question.solution or question.answer
        return problem.messages() + [{"role": "assistant", "content": solution}]

    def verify(self, problem, steps):
        """As Math.verify, but of the steps nothing is known."""
        answer = final_answer("".join(steps))
        correct = same_answer(answer, problem.truth["question"].answer)
        return float(correct), [None] * len(steps)

    def scores(self, problem, messages, response):
        correct, _ = self.verify(problem, [response])
        return {self.objective: correct}


def holds_questions(path, objective):
    """Does a file of an Objective hold questions, not pairs? InputError if it does, and the
    objective is not verifiable; or if it holds labelled steps."""
    use = use_of(path, ["pairs", "questions", "steps"])
    if use == "steps":
        raise InputError(f"{path}: labelled steps; they belong into {objective.name}.steps.jsonl, "
                         "beside the pairs or questions")
    if use == "questions" and objective.case != "verifiable":
        raise InputError(f"{path}: questions with answers are verified: give {objective.name!r} "
                         'the "case" "verifiable" in an objectives.json beside them')
    return use == "questions"


def worlds_of(objectives, data, max_new_tokens, model):
    """{domain: world} to sample and to measure in, for a list of Objective: the embedded worlds, or
    with a directory `data` the questions that it holds for verifiable objectives."""
    if not data:
        return {o.domain: DOMAINS[o.domain] for o in objectives}
    worlds, files = {}, objective_files(data)
    for objective in objectives:
        domain = objective.domain
        for path in files.get(objective.name, []):
            if not holds_questions(path, objective):
                continue
            # A domain's table measures on one set of questions.
            if domain in worlds:
                raise InputError(f"{path}: {worlds[domain].objective} has questions in the domain "
                                 f"{domain!r}, too; give each a \"domain\" of its own in "
                                 f"{data}/objectives.json")
            worlds[domain] = Questions(path, objective, max_new_tokens, model)
    return worlds


# -- what a run reads from its --data directory

def real_pairs(data, objectives, model):
    """The pairs in a --data directory -> list of Pair, {reason: number of rows left out}; nothing
    where `data` is "". Pairs to train on come before those held out.

    InputError for an objective with nothing to train on or to hold out, and for fewer prompts than
    objectives."""
    found, dropped, files = [], Counter(), objective_files(data)
    limit = model.config.max_len
    too_long = f"longer than the context of {limit} tokens, or alike in this vocabulary"
    for objective in objectives if data else []:
        name, kept, left = objective.name, [], Counter()
        paths = [path for path in files.get(name, []) if not holds_questions(path, objective)]
        # Of an objective with questions alone the pairs are sampled.
        if not paths:
            continue
        for path in paths:
            for preference in read_preferences(path, name, left):
                pair = encode_pair(preference, model)
                kept += [pair] if pair else []
                left[too_long] += not pair
        where = ", ".join(paths)
        # A prompt is trained on or held out as a whole.
        if {pair.split for pair in kept} != {"train", "dev"}:
            n_prompts = len({tuple(pair.prompt) for pair in kept})
            raise InputError(f"{where}: {len(kept)} pairs for {name!r} fit the context of {limit} "
                             f"tokens, on {n_prompts} prompts; some to train on and some to hold "
                             f"out are needed: add prompts, or leave it out of --objective"
                             f"{left_out(left)}")
        found += kept
        dropped += left
    # With so few prompts, what heads learn would not be about the objectives.
    n, prompts = len({pair.objective for pair in found}), {tuple(pair.prompt) for pair in found}
    if len(prompts) < n:
        raise InputError(f"{data}: {n} objectives have only {len(prompts)} different prompts; add "
                         "pairs, or choose fewer with --objective")
    found.sort(key=lambda pair: pair.split == "dev")
    return found, dropped


def real_labels(data, objectives, model):
    """DATA/<name>.steps.jsonl, where there is one, of Objective records -> list of Labelled,
    {reason: number of rows left out}."""
    found, dropped = [], Counter()
    for objective in objectives if data else []:
        path = os.path.join(data, f"{objective.name}.steps.jsonl")
        for row in read_steps(path, dropped) if os.path.exists(path) else []:
            encoded = encode_steps(model.tokenizer, row.prompt, row.steps, objective.boundary)
            if encoded is None or len(encoded[0]) > model.config.max_len:
                dropped["too long for the context, or a step without a token"] += 1
                continue
            targets = [{objective.name: label} for label in row.labels]
            found.append(Labelled(*encoded, targets, train_or_dev(row.prompt)))
    return found, dropped


def describe_data(data, objectives, max_new_tokens, model):
    """Read all that a run will read of its --data directory, and print how much there is."""
    pairs, dropped = real_pairs(data, objectives, model)
    labels, unread = real_labels(data, objectives, model)
    n_train = sum(pair.split == "train" for pair in pairs)
    print(f"objectives: {', '.join(o.name for o in objectives)}")
    print(f"pairs: {n_train} to train on, {len(pairs) - n_train} held out{left_out(dropped)}")
    if labels or any(unread.values()):
        print(f"responses with step labels: {len(labels)}{left_out(unread)}")
    for world in worlds_of(objectives, data, max_new_tokens, model).values():
        counts = [f"{n} {split}" for split, n in world.counts().items()]
        print(f"questions: {', '.join(counts)}{left_out(world.dropped)}")


def data_files(data, objectives):
    """The files of a --data directory that a run reads; none where `data` is ""."""
    found, files = [f"{data}/objectives.json"], objective_files(data)
    for objective in objectives:
        found += [*files.get(objective.name, []), f"{data}/{objective.name}.steps.jsonl"]
    return [path for path in dict.fromkeys(found) if data and os.path.exists(path)]


def load_base(directory, device, template_args=""):
    """The checkpoint of --init, which must bring its tokenizer; several processes share it.
    template_args: see interop.tokenizer.use_template_args."""
    model = load_hf(directory, place=partial(placed, device=device))
    if model.tokenizer is None:
        raise InputError(f"{directory}: tokenizer.json, or vocab.json and merges.txt, is missing; "
                         "a base model needs one")
    use_template_args(model.tokenizer, template_args)
    return model
