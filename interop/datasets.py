"""Rows of public files (pairs, ratings, labelled steps, questions, outputs), and real questions as a world.
"""
import json
import os
import re
from collections import Counter
from dataclasses import dataclass

from data import DOMAINS, InputError, OBJECTIVES, Problem, World, read_jsonl, split_of
from interop.answers import final_answer, marked_answer, same_answer
from mah_dpo import encode_pair
from prm import Labelled, encode_steps


@dataclass
class Preference:
    """One preference pair of an objective; prompt is a conversation that ends with a user message."""
    objective: str
    prompt: list
    chosen: str
    rejected: str


@dataclass
class Steps:
    """A response to `prompt` cut into steps, with a label in [0, 1] for each."""
    prompt: list
    steps: list
    labels: list


@dataclass
class Question:
    """A question with its final answer, for the verifier, and the worked solution ("" where the file has none)."""
    prompt: list
    answer: str
    solution: str


DATA_HELP = r"""Files of real data hold one JSON object per line, or one JSON list of them. The rows that are read:
pairs      {"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "A brick."}
           {"question": "Tutor: What is 2 + 3?\n\nStudent: 6\n\nTutor:", "chosen": "Count again.", "rejected": "Yes."}
           {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
ratings    {"instruction": "Name a fruit.", "completions": [
              {"response": "A pear.", "annotations": {"honesty": {"Rating": "5"}, "helpfulness": {"Rating": "4"}}},
              {"response": "A brick.", "annotations": {"honesty": {"Rating": "1"}, "helpfulness": {"Rating": "N/A"}}}]}
questions  {"question": "What is 9 + 9?", "answer": "9 + 9 = 18\n#### 18"}
           {"problem": "Halve 1.", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
steps      {"prompt": "What is 2 + 3 - 1?", "completions": ["2 + 3 = 5", "5 - 1 = 3"], "labels": [true, false]}
           {"problem": "What is 2 + 3 - 1?", "steps": ["2 + 3 = 5", "5 - 1 = 3"], "label": 1}  (first wrong step, or -1)
outputs    {"question": "What is 9 + 9?", "answer": "#### 18", "response": "I get 18."}  (evaluate.py --score)
Prompts and responses are text or lists of {"role", "content"} messages. In a transcript the first word of a paragraph
is the speaker: Human, User, Student, Assistant or Tutor. Ratings give the best completion against the worst, for each
objective that is rated. Rows that cannot serve, such as ties, are left out; a row with a fault is an error."""

# What a field is called in published files (the first that a row has is read), and who speaks in their transcripts.
FIELDS = {"prompt": ("prompt", "question", "instruction", "problem"), "steps": ("steps", "completions"),
          "answer": ("answer", "final_answer"), "solution": ("solution", "ground_truth"),
          "response": ("response", "output", "prediction", "completion")}
SPEAKERS = {"Human": "user", "User": "user", "Student": "user", "Assistant": "assistant", "Tutor": "assistant"}
TURN = re.compile(rf"(?:^|\n\r?\n)({'|'.join(SPEAKERS)}):")
UNANSWERED = {"role": "assistant", "content": ""}            # the turn of a transcript that ends with 'Assistant:'


class Unusable(Exception):
    """A well-formed row that cannot serve, such as a tie: it is skipped, and counted under this reason."""


def read_all(path, parse, skipped, kind):
    """parse(row) of every row -> list. Unusable rows are counted by reason in the dict `skipped`, if given; an InputError
    gets the row's place in front."""
    found, skipped = [], {} if skipped is None else skipped
    for where, row in read_jsonl(path):
        try:
            found.append(parse(row))
        except Unusable as e:
            skipped[str(e)] = skipped.get(str(e), 0) + 1
        except InputError as e:
            raise InputError(f"{where}: {e}") from None
    if not found:
        reasons = "".join(f"; {n} skipped: {reason}" for reason, n in skipped.items())
        raise InputError(f"{path}: no rows to use{reasons}; train.py --help shows rows of {kind}")
    return found


def spelling(row, name):
    """The key under which `row` has the field `name`, or None."""
    return next((key for key in FIELDS.get(name, (name,)) if key in row), None)


def messages_of(value):
    """A list of messages or a transcript -> [{"role", "content"}], [] if it is neither. What a transcript says before
    the first speaker is the user's, or a system message if the user speaks first."""
    if isinstance(value, str):
        opening, *parts = TURN.split(value)
        messages = [{"role": SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]
        if not opening.strip():
            return messages
        first = {"role": "system" if messages and messages[0]["role"] == "user" else "user", "content": opening.strip()}
        return [first] + messages if any(m["role"] == "assistant" for m in messages) else []
    good = isinstance(value, list) and all(
        isinstance(m, dict) and m.get("role") in ("system", "user", "assistant") and isinstance(m.get("content"), str)
        for m in value)
    return [{"role": m["role"], "content": m["content"]} for m in value] if good else []


def text_field(row, name):
    """The field as non-empty text; a list of messages gives its last message's content."""
    key = spelling(row, name)
    if key is None:
        also, found = ", ".join(FIELDS.get(name, ())[1:]), ", ".join(sorted(row)) or "no fields"
        raise InputError(f"field {name!r} is missing{f' ({also} would do)' if also else ''}; the row has {found}")
    messages = [] if isinstance(row[key], str) else messages_of(row[key])
    value = messages[-1]["content"] if messages else row[key]
    if not isinstance(value, str):
        raise InputError(f"{key!r} is {type(value).__name__}; give text or a list of role/content messages")
    if not value.strip():
        raise InputError(f"{key!r} is empty; remove the row or fill it in")
    return value


def prompt_field(row):
    """The prompt as a list of messages that ends with the user's. Text is one message if it is no transcript."""
    text, value = text_field(row, "prompt"), row[spelling(row, "prompt")]
    messages = messages_of(value)
    if messages[-1:] == [UNANSWERED]:
        messages.pop()
    if messages and messages[-1]["role"] != "assistant":
        return messages
    if not isinstance(value, str):
        raise InputError("'prompt' ends with the assistant's turn; end it with the user's")
    return [{"role": "user", "content": text}]


def read_pair(row, objective):
    """A row of pairs -> Preference. A response may come as a whole conversation (a transcript if there is no prompt):
    the last message is the response, what both share before it the prompt."""
    said, heads = [], []
    for key in ("chosen", "rejected"):
        text = text_field(row, key)
        messages = [] if isinstance(row[key], str) and spelling(row, "prompt") else messages_of(row[key])
        if messages[-1:] == [UNANSWERED]:
            raise Unusable("the transcript ends without a response")
        if messages and messages[-1]["role"] != "assistant":
            raise InputError(f"{key!r} does not end with the assistant's turn; end it with that")
        heads.append(messages[:-1])
        said.append(messages[-1]["content"] if messages else text)
    if heads[0] != heads[1] and (all(heads) or not spelling(row, "prompt")):
        raise Unusable("chosen and rejected answer different prompts")
    before = heads[0] or heads[1]
    # Beside whole conversations a prompt may be their first message only, or hold a system message that they lack.
    prompt = prompt_field(row) if spelling(row, "prompt") or not before else before
    if before != prompt[len(prompt) - len(before):]:
        prompt = before if prompt == before[:len(prompt)] else []
    if not prompt or prompt[-1]["role"] == "assistant":
        raise Unusable("the responses do not answer the prompt")
    if said[0] == said[1]:
        raise InputError("'chosen' equals 'rejected'; a pair must prefer something")
    return Preference(objective, prompt, *said)


def read_rated(row, objective):
    """A row of rated completions -> Preference: the best against the worst. One rated "N/A" is left out."""
    rated = []
    try:
        for c in row["completions"]:
            rating = c["annotations"].get(objective, {}).get("Rating", "N/A")
            if rating not in ("N/A", None) and c["response"].strip():
                rated.append((float(str(rating)), c["response"]))       # str: true is not a rating
        if not all(abs(rating) < 1e9 for rating, _ in rated):           # nor is NaN
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InputError("a completion needs a 'response' and 'annotations', such as "
                         f"{{\"{objective}\": {{\"Rating\": \"4\"}}}}; \"N/A\" leaves it out") from None
    worst, best = (pick(rated, key=lambda r: r[0], default=(0, ""))[1] for pick in (min, max))
    if worst == best:                    # of equal ratings both picks take the first
        raise Unusable(f"no two completions have different ratings of {objective}")
    return Preference(objective, prompt_field(row), best, worst)


def read_preferences(path, objective, skipped=None):
    """Pairs or rated completions (DATA_HELP) -> list[Preference]. `skipped`: see read_all. InputError as file:line."""
    def parse(row):
        rated = "completions" in row and "chosen" not in row
        return (read_rated if rated else read_pair)(row, objective)
    return read_all(path, parse, skipped, "pairs and ratings")


def read_steps(path):
    """Labelled steps (DATA_HELP) -> list[Steps]. With `label` all steps from the first wrong one on are wrong. InputError as
    file:line."""
    def parse(row):
        key = spelling(row, "steps") or "steps"
        steps, labels = row.get(key), row.get("labels")
        if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s for s in steps):
            raise InputError(f"{key!r} must be a non-empty list of non-empty texts")
        if "label" in row and "labels" not in row:
            if type(row["label"]) is not int or not -1 <= row["label"] < len(steps):
                raise InputError(f"'label' must be the first wrong step (0 to {len(steps) - 1}) or -1")
            labels = [row["label"] == -1 or t < row["label"] for t in range(len(steps))]
        if not isinstance(labels, list) or not all(isinstance(v, (bool, int, float)) and 0 <= v <= 1 for v in labels):
            raise InputError("'labels' must be a list of numbers from 0 to 1")
        if len(steps) != len(labels):
            raise InputError(f"{len(steps)} steps but {len(labels)} labels; give one label per step")
        return Steps(prompt_field(row), steps, [float(v) for v in labels])
    return read_all(path, parse, {}, "steps")


def read_question(row):
    """A row of questions -> Question."""
    key = spelling(row, "answer") or spelling(row, "solution")
    value = str(row[key]) if key and type(row[key]) in (int, float) else row.get(key)
    if value in ("", "nan"):         # published files have answers that nobody could extract
        raise Unusable("the answer is empty")
    given = text_field({key: value} if key else row, key or "answer")
    solution = given if marked_answer(given) else ""
    if spelling(row, "solution"):
        solution = text_field(row, "solution")
    answer = marked_answer(given) or (given.strip() if key in FIELDS["answer"] else None)
    if answer is None:
        raise InputError(f"{key!r} marks no final answer; end it in '#### 18' or '\\boxed{{18}}'")
    return Question(prompt_field(row), answer, solution)


def read_questions(path, skipped=None):
    """Questions with a final answer, alone or marked in a solution (DATA_HELP) -> list[Question]."""
    return read_all(path, read_question, skipped, "questions")


def read_outputs(path, skipped=None):
    """Questions with the responses of models -> [(Question, {model: its text})]. A response stands in "response" (or "output",
    "prediction", "completion"), or several in objects with a "solution", each named after its model."""
    def parse(row):
        key = spelling(row, "response")
        said = {key: row[key]} if key else {k: v.get("solution") for k, v in row.items() if isinstance(v, dict)}
        if not said or not all(isinstance(text, str) for text in said.values()):
            raise InputError("no text of a response; give it as \"response\", beside the question and its answer")
        return read_question(row), said
    return read_all(path, parse, skipped, "questions")


class Questions(World):
    """Real questions as a world: a response is right if its final answer is. Its steps are lines; nobody verifies them one
    by one, so the hindsight targets come from the rollouts' ends alone."""
    boundary = "newline"

    def __init__(self, path, objective, max_new_tokens, model):
        """The rows of `path` that fit the model's context with their solution and with max_new_tokens; the others are
        counted in `dropped`, {reason: number}."""
        self.name, self.objective, self.max_new_tokens = OBJECTIVES[objective].domain, objective, max_new_tokens
        self.dropped = {}
        rows, encode = read_questions(path, self.dropped), model.tokenizer.encode
        fits = lambda q: len(model.tokenizer.encode_chat(q.prompt)) + max(max_new_tokens, len(encode(q.solution)) + 1) \
            <= model.config.max_len
        kept = [q for q in rows if fits(q)]
        self.rows = {json.dumps(q.prompt): q for q in kept}
        self.dropped |= {"too long for the context with an answer": len(rows) - len(kept),
                         "asked before": len(kept) - len(self.rows)}
        empty = [split for split, n in self.counts().items() if n == 0]
        if empty:
            raise InputError(f"{path}: {len(rows)} questions, {len(self.rows)} fit the context of {model.config.max_len} "
                             f"tokens with {max_new_tokens} for the answer; none is left for {', '.join(empty)}")

    @property
    def objectives(self):
        return [self.objective]

    def counts(self):
        """Number of questions by split."""
        return {s: sum(split_of(key) == s for key in self.rows) for s in ("train", "dev", "test")}

    def problems(self, split, n, rng):
        """n questions of a split in random order, or all that there are."""
        found = sorted((rng.random(), key) for key in self.rows if split_of(key) == split)[:n]
        return [Problem(self.rows[key].prompt, {"question": self.rows[key]}) for _, key in found]

    def conversation(self, problem, rng, careful=False):
        solution = problem.truth["question"].solution or problem.truth["question"].answer
        return problem.messages() + [{"role": "assistant", "content": solution}]

    def verify(self, problem, steps):
        """As Math.verify, but only the final answer is known: None for every step."""
        return float(same_answer(final_answer("".join(steps)), problem.truth["question"].answer)), [None] * len(steps)

    def scores(self, problem, messages, response):
        return {self.objective: self.verify(problem, [response])[0]}


def holds_questions(path, objective):
    """Does the file of a verifiable objective hold questions, not pairs?"""
    if OBJECTIVES[objective].case != "verifiable":
        return False
    row = next(read_jsonl(path), ("", {"chosen": ""}))[1]
    return not {"chosen", "completions"} & row.keys()


def worlds_of(objectives, data, max_new_tokens, model):
    """domain -> world to sample and to measure in: the embedded worlds of the objectives, or with a directory `data` those
    of the verifiable objectives whose files hold questions."""
    if not data:
        return {OBJECTIVES[o].domain: DOMAINS[OBJECTIVES[o].domain] for o in objectives}
    files = {o: os.path.join(data, f"{o}.jsonl") for o in objectives}
    return {OBJECTIVES[o].domain: Questions(path, o, max_new_tokens, model)
            for o, path in files.items() if holds_questions(path, o)}


# -- what a run reads from its --data directory

def real_pairs(data, names, model):
    """DATA/<name>.jsonl for every objective that has pairs there -> list of Pair, {reason: number of
    rows left out}; nothing where `data` is "". Pairs to train on come before those held out.

    InputError for an objective with nothing to train on or to hold out."""
    found, dropped = [], Counter()
    limit = model.config.max_len
    too_long = f"longer than the context of {limit} tokens, or alike in this vocabulary"
    for name in names if data else []:
        path = os.path.join(data, f"{name}.jsonl")
        if holds_questions(path, name):
            continue
        encoded = [encode_pair(row, model) for row in read_preferences(path, name, dropped)]
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
            split = "train" if split_of(json.dumps(row.prompt)) == "train" else "dev"
            rows.append(Labelled(ids, ends, targets, split))
    return rows, n_dropped


def describe_data(data, objectives, max_new_tokens, model):
    """Read all that a run will read of its --data directory, and print how much there is."""
    names = [o.name for o in objectives]
    pairs, dropped = real_pairs(data, names, model)
    labels, n_dropped = real_labels(data, objectives, model)
    n_train = sum(pair.split == "train" for pair in pairs)
    print(f"pairs: {n_train} to train on, {len(pairs) - n_train} held out{left_out(dropped)}")
    if labels or n_dropped:
        print(f"responses with step labels: {len(labels)}, {n_dropped} left out")
    for world in worlds_of(names, data, max_new_tokens, model).values():
        counts = [f"{n} {split}" for split, n in world.counts().items()]
        print(f"questions: {', '.join(counts)}{left_out(world.dropped)}")


def left_out(dropped):
    """{reason: number of rows} -> text."""
    return "".join(f"; {n} left out: {reason}" for reason, n in dropped.items() if n)
