"""Rows of public files, and real questions as a world to sample and to measure in.

    DATA_HELP               shows the rows: pairs, ratings, questions, labelled steps, outputs
    FIELDS, read_field      what the fields are called, and how conversations are written
    parse_preference, ...   one parser for each kind of row
    read_preferences, ...   give every row of a file to a parser
    Questions, worlds_of    the worlds of train.py's --data
    real_pairs, real_labels what a run learns from them
"""
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial

from data import DOMAINS, InputError, Problem, World, read_jsonl, split_of
from interop.answers import final_answer, marked_answer, same_answer
from interop.parallel import placed
from interop.tokenizer import use_template_args
from mah_dpo import Pair
from model import load_hf
from prm import Labelled


@dataclass
class Preference:
    """One preference pair of an objective. The prompt is a conversation that the user ends."""
    objective: str
    prompt: list
    chosen: str
    rejected: str


@dataclass
class Steps:
    """A response to a prompt, cut into steps, with a label in [0, 1] for each."""
    prompt: list
    steps: list
    labels: list


@dataclass
class Question:
    """A question, its final answer for the verifier, a worked solution ("" if there is none)."""
    prompt: list
    answer: str
    solution: str


DATA_HELP = r"""Files of real data hold one JSON object per line, or one JSON list of them. The rows
that are read:
pairs      {"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "A brick."}
           {"question": "Tutor: 2+3?\n\nStudent: 6\n\nTutor:", "chosen": "Why?", "rejected": "No."}
           {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!",
            "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
ratings    {"instruction": "Name a fruit.", "completions": [
              {"response": "A pear.", "annotations": {"honesty": {"Rating": "5"}}},
              {"response": "A brick.", "annotations": {"honesty": {"Rating": "1"},
                                                       "helpfulness": {"Rating": "N/A"}}}]}
questions  {"question": "What is 9 + 9?", "answer": "9 + 9 = 18\n#### 18"}
           {"problem": "Halve 1.", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
steps      {"prompt": "2 + 3 - 1?", "completions": ["2 + 3 = 5", "5 - 1 = 3"],
            "labels": [true, false]}
           {"problem": "2 + 3 - 1?", "steps": ["2 + 3 = 5", "5 - 1 = 3"],
            "label": 1}  (the first wrong step, or -1)
outputs    {"question": "What is 9 + 9?", "answer": "#### 18",
            "response": "I get 18."}  (python -m interop.score)
Prompts and responses are text or lists of {"role", "content"} messages. In a transcript the first
word of a paragraph is the speaker: Human, User, Student, Assistant or Tutor. Ratings give the best
completion against the worst, for each objective that is rated. Rows that cannot serve, such as
ties, are left out; a row with a fault is an error."""


# -- every row of a file

class Unusable(Exception):
    """A well-formed row that cannot serve, such as a tie. It is left out, and counted by reason."""


def read_all(path, skipped=None, *, parse):
    """parse(row) for every row of a file -> list. Rows that cannot serve are counted by reason in
    `skipped`, a dict or None. An InputError about a row gets its place in front."""
    found = []
    skipped = {} if skipped is None else skipped
    for where, row in read_jsonl(path):
        try:
            found.append(parse(row))
        except Unusable as e:
            skipped[str(e)] = skipped.get(str(e), 0) + 1
        except InputError as e:
            raise InputError(f"{where}: {e}") from None
    if not found:
        reasons = [f"; {n} skipped: {reason}" for reason, n in skipped.items()]
        raise InputError(f"{path}: no rows to use{''.join(reasons)}; train.py --help shows rows")
    return found


# -- fields

# What a field is called in published files. Of several names the first that a row has is read.
FIELDS = {"prompt": ("prompt", "question", "instruction", "problem"),
          "steps": ("steps", "completions"),
          "answer": ("answer", "final_answer"),
          "solution": ("solution", "ground_truth"),
          "response": ("response", "output", "prediction", "completion")}


def key_of(row, name):
    """The key under which a row has the field `name`, or None."""
    keys = [key for key in FIELDS.get(name, (name,)) if key in row]
    return keys[0] if keys else None


def read_field(row, name):
    """A field -> (text, not blank; messages). The messages of a text are there if it is a transcript,
    the text of a list of messages is the last one's."""
    key = key_of(row, name)
    if key is None:
        others = ", ".join(FIELDS.get(name, ())[1:])
        hint = f" ({others} would do)" if others else ""
        found = ", ".join(sorted(row)) or "no fields"
        raise InputError(f"field {name!r} is missing{hint}; the row has {found}")
    value = row[key]
    messages = transcript(value) if isinstance(value, str) else message_list(value)
    if messages and not isinstance(value, str):
        value = messages[-1]["content"]
    if not isinstance(value, str):
        kind = type(value).__name__
        raise InputError(f"{key!r} is {kind}; give text or a list of role/content messages")
    if not value.strip():
        raise InputError(f"{key!r} is empty; remove the row or fill it in")
    return value, messages


# -- conversations

# Who speaks in transcripts, in the first word of a paragraph.
SPEAKERS = {"Human": "user", "User": "user", "Student": "user", "Assistant": "assistant",
            "Tutor": "assistant"}
TURN = re.compile(rf"(?:^|\n\r?\n)({'|'.join(SPEAKERS)}):")
# The last turn of a transcript that ends with 'Assistant:'.
UNANSWERED = {"role": "assistant", "content": ""}





def message_list(value):
    """A list of messages -> the same with role and content only; [] if it is none."""
    found = []
    for message in value if isinstance(value, list) else []:
        match message:
            case {"role": "system" | "user" | "assistant" as role, "content": str(content)}:
                found.append({"role": role, "content": content})
            case _:
                return []
    return found


def transcript(text):
    """The text of a conversation -> messages; [] if nobody speaks in it."""
    # split gives what stands before the first speaker, then speaker and words of every turn.
    opening, *turns = TURN.split(text)
    opening = opening.strip()
    messages = []
    for speaker, words in zip(turns[::2], turns[1::2]):
        messages.append({"role": SPEAKERS[speaker], "content": words.strip()})
    if not opening:
        return messages
    # A text with an opening is a transcript only if the assistant speaks in it. Before a user's
    # turn the opening is a system message, before the assistant's it is the user's.
    if not any(m["role"] == "assistant" for m in messages):
        return []
    role = "system" if messages[0]["role"] == "user" else "user"
    return [{"role": role, "content": opening}, *messages]


def prompt_field(row):
    """The prompt as messages, the user's last. Text that is no transcript is one message."""
    text, messages = read_field(row, "prompt")
    if messages[-1:] == [UNANSWERED]:
        messages.pop()
    if messages and messages[-1]["role"] != "assistant":
        return messages
    if not isinstance(row[key_of(row, "prompt")], str):
        raise InputError("'prompt' ends with the assistant's turn; end it with the user's")
    return [{"role": "user", "content": text}]


# -- pairs and ratings

def response_field(row, key):
    """A row's `chosen` or `rejected` -> (the messages before the response, if they stand there too;
    the text of the response)."""
    text, messages = read_field(row, key)
    # Beside a prompt a text is the response alone, without one it is a transcript.
    response_alone = isinstance(row[key], str) and key_of(row, "prompt")
    if response_alone or not messages:
        return [], text
    if messages[-1] == UNANSWERED:
        raise Unusable("the transcript ends without a response")
    if messages[-1]["role"] != "assistant":
        raise InputError(f"{key!r} does not end with the assistant's turn; end it with that")
    return messages[:-1], messages[-1]["content"]


def parse_preference(row, objective):
    """A row of pairs or of ratings -> Preference."""
    if "completions" in row and "chosen" not in row:
        return parse_ratings(row, objective)
    before_chosen, chosen = response_field(row, "chosen")
    before_rejected, rejected = response_field(row, "rejected")
    before = before_chosen or before_rejected
    prompt_given = key_of(row, "prompt")
    # Beside a prompt one of the two may be the bare response.
    bare = prompt_given and not (before_chosen and before_rejected)
    if before_chosen != before_rejected and not bare:
        raise Unusable("chosen and rejected answer different prompts")
    prompt = prompt_field(row) if prompt_given or not before else before
    # Beside whole conversations a prompt may hold only the first of their messages, or more than
    # they do, such as a system message.
    if before[:len(prompt)] == prompt:
        prompt = before
    if prompt[len(prompt) - len(before):] != before or prompt[-1]["role"] == "assistant":
        raise Unusable("the responses do not answer the prompt")
    if chosen == rejected:
        raise InputError("'chosen' equals 'rejected'; a pair must prefer something")
    return Preference(objective, prompt, chosen, rejected)


def parse_ratings(row, objective):
    """A row of rated completions -> Preference, the best against the worst."""
    by_rating = {}                   # {rating: response}
    try:
        for completion in row["completions"]:
            rating = completion["annotations"].get(objective, {}).get("Rating", "N/A")
            if rating in ("N/A", None) or not completion["response"].strip():
                continue
            # By way of str, because JSON's true is no rating. Of equal ratings the first counts.
            by_rating.setdefault(float(str(rating)), completion["response"])
        # Nor are NaN and infinity.
        if not all(abs(rating) < 1e9 for rating in by_rating):
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError):
        example = f'{{"{objective}": {{"Rating": "4"}}}}'
        raise InputError("a completion needs a 'response' and 'annotations', such as "
                         f"{example}; \"N/A\" leaves it out") from None
    responses = [by_rating[rating] for rating in sorted(by_rating)]
    if not responses or responses[0] == responses[-1]:
        raise Unusable(f"no two completions have different ratings of {objective}")
    return Preference(objective, prompt_field(row), chosen=responses[-1], rejected=responses[0])


def read_preferences(path, objective, skipped=None):
    """Pairs or rated completions -> list[Preference]. `skipped`: see read_all."""
    return read_all(path, skipped, parse=partial(parse_preference, objective=objective))


# -- labelled steps

def labels_until(label, n):
    """The first wrong step of n, or -1 -> labels of all n: what follows a wrong step is wrong."""
    if type(label) is not int or not -1 <= label < n:
        raise InputError(f"'label' must be the first wrong step (0 to {n - 1}) or -1")
    n_right = n if label == -1 else label
    return [1.0] * n_right + [0.0] * (n - n_right)


def parse_steps(row):
    """A row of labelled steps -> Steps."""
    key = key_of(row, "steps") or "steps"
    steps = row.get(key)
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s for s in steps):
        raise InputError(f"{key!r} must be a non-empty list of non-empty texts")
    labels = row.get("labels")
    if "label" in row and "labels" not in row:
        labels = labels_until(row["label"], len(steps))
    numbers = labels if isinstance(labels, list) else [None]
    if not all(type(v) in (bool, int, float) and 0 <= v <= 1 for v in numbers):
        raise InputError("'labels' must be a list of numbers from 0 to 1")
    if len(steps) != len(labels):
        raise InputError(f"{len(steps)} steps but {len(labels)} labels; give one label per step")
    return Steps(prompt_field(row), steps, [float(label) for label in labels])





# -- questions and outputs

def parse_question(row):
    """A row of questions -> Question. The answer stands alone or is marked in a solution."""
    key = key_of(row, "answer") or key_of(row, "solution") or "answer"
    if type(row.get(key)) in (int, float):
        row = row | {key: str(row[key])}
    # Published files have answers that nobody could extract.
    if row.get(key) in ("", "nan"):
        raise Unusable("the answer is empty")
    given, _ = read_field(row, key)
    answer = marked_answer(given)
    solution = given if answer else ""
    if key_of(row, "solution"):
        solution, _ = read_field(row, "solution")
    if answer is None and key not in FIELDS["answer"]:
        raise InputError(f"{key!r} marks no final answer; end it in '#### 18' or '\\boxed{{18}}'")
    return Question(prompt_field(row), answer or given.strip(), solution)





def parse_output(row):
    """A row of outputs -> (Question, {model: text of its response})."""
    # One response has a field. Several stand in objects that are named after their models.
    key = key_of(row, "response")
    if key:
        said = {key: row[key]}
    else:
        said = {model: v.get("solution") for model, v in row.items() if isinstance(v, dict)}
    if not said or not all(isinstance(text, str) for text in said.values()):
        raise InputError("no text of a response; give it as \"response\", beside the question and "
                         "its answer")
    return parse_question(row), said


# Readers of files: read_steps(path, skipped=None) and so on, as read_all.
read_steps = partial(read_all, parse=parse_steps)            # -> list[Steps]
read_questions = partial(read_all, parse=parse_question)     # -> list[Question]
read_outputs = partial(read_all, parse=parse_output)         # -> list of parse_output's pairs


# -- real questions as a world

class Questions(World):
    """Real questions as a world: a response is right if its final answer is. Its steps are lines;
    nobody verifies them one by one, so hindsight targets come from the ends of rollouts alone."""
    boundary = "newline"

    def __init__(self, path, objective, max_new_tokens, model):
        """Keeps the rows of `path` that fit the model's context, with their solution and with
        max_new_tokens. The others are counted in `dropped`, {reason: number}."""
        self.name = objective.domain
        self.objective = objective.name
        self.max_new_tokens = max_new_tokens
        self.dropped = {}
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
        return len(tokenizer.encode_chat(question.prompt)) + max(self.max_new_tokens, solution)

    @property
    def objectives(self):
        return [self.objective]

    def counts(self):
        """Number of questions by split."""
        splits = [split_of(key) for key in self.rows]
        return {split: splits.count(split) for split in ("train", "dev", "test")}

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
    """Does the file of an Objective hold questions, not pairs? Only a verifiable one's may."""
    if objective.case != "verifiable":
        return False
    _, row = next(read_jsonl(path), ("", {"chosen": ""}))
    return not {"chosen", "completions"} & row.keys()


def worlds_of(objectives, data, max_new_tokens, model):
    """{domain: world} to sample and to measure in, for a list of Objective: the embedded worlds, or
    with a directory `data` the questions that it holds for verifiable objectives."""
    if not data:
        return {o.domain: DOMAINS[o.domain] for o in objectives}
    worlds = {}
    for objective in objectives:
        path = os.path.join(data, f"{objective.name}.jsonl")
        if holds_questions(path, objective):
            worlds[objective.domain] = Questions(path, objective, max_new_tokens, model)
    return worlds


# -- rows in a model's ids

def encode_pair(preference, model):
    """A Preference -> Pair in the model's ids, EOS behind both responses. None if it is longer than
    the context, or nothing of the responses is left to tell them apart."""
    # Encoded apart: tokens must not merge across the border of prompt and response.
    tokenizer, p = model.tokenizer, preference
    prompt = tokenizer.encode_chat(p.prompt)
    chosen = tokenizer.encode(p.chosen) + [tokenizer.eos_id]
    rejected = tokenizer.encode(p.rejected) + [tokenizer.eos_id]
    short, long = sorted((len(chosen), len(rejected)))
    if short == 1 or chosen == rejected or len(prompt) + long > model.config.max_len:
        return None
    return Pair(p.objective, prompt, chosen, rejected, train_or_dev(p.prompt))


def train_or_dev(prompt):
    """The split of a conversation, by the hash of its text; "test" counts as "dev" here."""
    return "train" if split_of(json.dumps(prompt)) == "train" else "dev"


def encode_steps(tokenizer, prompt, steps, boundary, marker=None):
    """Messages and the texts of a response's steps -> (ids, index at which each step is scored).

    A step ends as guided decoding will end it: with a newline where steps are lines, the last
    one with EOS. A PRM with a marker is read at that, behind every step as it is. None if a step
    has no token."""
    ids, ends = list(tokenizer.encode_chat(prompt)), []
    for number, step in enumerate(steps, 1):
        is_last = number == len(steps)
        if boundary == "newline" and marker is None and not is_last:
            step = step.rstrip("\n") + "\n"
        tokens = tokenizer.encode(step)
        if not tokens:
            return None
        ids += tokens
        # What is read, if it is not the step's own last token.
        if marker is not None:
            ids.append(marker)
        elif is_last:
            ids.append(tokenizer.eos_id)
        ends.append(len(ids) - 1)
    return ids, ends


# -- what a run reads from its --data directory

def real_pairs(data, objectives, model):
    """DATA/<name>.jsonl for every objective that has pairs there -> list of Pair, {reason: number of
    rows left out}; nothing where `data` is "". Pairs to train on come before those held out.

    InputError for an objective with nothing to train on or to hold out."""
    found, dropped = [], Counter()
    limit = model.config.max_len
    too_long = f"longer than the context of {limit} tokens, or alike in this vocabulary"
    for objective in objectives if data else []:
        path = os.path.join(data, f"{objective.name}.jsonl")
        if holds_questions(path, objective):
            continue
        rows = read_preferences(path, objective.name, dropped)
        encoded = [encode_pair(row, model) for row in rows]
        kept = [pair for pair in encoded if pair]
        dropped[too_long] += len(encoded) - len(kept)
        if {pair.split for pair in kept} != {"train", "dev"}:
            raise InputError(f"{path}: of its rows {len(kept)} fit the context of {limit} tokens; "
                             "pairs to train on and to hold out are both needed: add rows, or "
                             "shorter ones")
        found += kept
    found.sort(key=lambda pair: pair.split == "dev")
    return found, dropped


def real_labels(data, objectives, model):
    """DATA/<name>.steps.jsonl, where there is one, of Objective records -> list of Labelled, number of
    rows left out: longer than the context, or with a step without a token of this vocabulary."""
    rows, n_dropped = [], 0
    for objective in objectives if data else []:
        path = os.path.join(data, f"{objective.name}.steps.jsonl")
        for row in read_steps(path) if os.path.exists(path) else []:
            found = encode_steps(model.tokenizer, row.prompt, row.steps, objective.boundary)
            if found is None or len(found[0]) > model.config.max_len:
                n_dropped += 1
                continue
            ids, ends = found
            targets = [{objective.name: label} for label in row.labels]
            rows.append(Labelled(ids, ends, targets, train_or_dev(row.prompt)))
    return rows, n_dropped


def describe_data(data, objectives, max_new_tokens, model):
    """Read all that a run will read of its --data directory, and print how much there is."""
    pairs, dropped = real_pairs(data, objectives, model)
    labels, n_dropped = real_labels(data, objectives, model)
    n_train = sum(pair.split == "train" for pair in pairs)
    print(f"pairs: {n_train} to train on, {len(pairs) - n_train} held out{left_out(dropped)}")
    if labels or n_dropped:
        print(f"responses with step labels: {len(labels)}, {n_dropped} left out")
    for world in worlds_of(objectives, data, max_new_tokens, model).values():
        counts = [f"{n} {split}" for split, n in world.counts().items()]
        print(f"questions: {', '.join(counts)}{left_out(world.dropped)}")


def left_out(dropped):
    """{reason: number of rows} -> text."""
    return "".join(f"; {n} left out: {reason}" for reason, n in dropped.items() if n)


def data_files(data, objectives):
    """The files of a --data directory that a run reads; none where `data` is ""."""
    found = []
    for objective in objectives if data else []:
        found += [f"{data}/{objective.name}.jsonl", f"{data}/{objective.name}.steps.jsonl"]
    return [path for path in found if os.path.exists(path)]


def load_base(directory, device, template_args=""):
    """The checkpoint of --init, which must bring its tokenizer; several processes share it.
    template_args: see interop.tokenizer.use_template_args."""
    model = load_hf(directory, place=partial(placed, device=device))
    if model.tokenizer is None:
        raise InputError(f"{directory}: tokenizer.json, or vocab.json and merges.txt, is missing; "
                         "a base model needs one")
    use_template_args(model.tokenizer, template_args)
    return model
