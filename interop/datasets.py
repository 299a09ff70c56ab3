"""Rows of public files: which kinds there are, and what each says.

    DATA_HELP               shows the rows: pairs, ratings, verdicts, questions, steps, outputs
    parse_pair, ...         one parser for each kind of row; KINDS tells the kinds apart
    read_all                every row of a file to its parser
    compare, ...            pairs of responses to one prompt: the best against the worst
    encode_pair, ...        rows in a model's ids

Before: rows.py, what every row has. `python -m interop.datasets DIR [--init MODEL]` tells what a
directory of such files holds: look.py.
"""
import json
import re
import statistics
import zlib
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain

from data import InputError, read_jsonl, run_command, split_of
from interop.answers import marked_answer
from interop.rows import (FIELDS, UNANSWERED, Row, Unusable, asked, is_blank, prompt_of, read_field,
                          read_number, read_text, read_value, shown, transcript)
from mah_dpo import Pair


@dataclass
class Preference:
    """One preference pair of an objective. The prompt is a conversation that the user ends."""
    objective: str
    prompt: list
    chosen: str
    rejected: str


@dataclass
class Rated:
    """What a row of pairs says: responses to a prompt, (text, {objective: number or None}) each.
    The objective "" is the one that the file is named after."""
    prompt: list
    responses: list


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
that are read (an objective that no row names is the one that the file is named after):
pairs      {"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "A brick."}
           {"question": "Tutor: 2+3?\n\nStudent: 6\n\nTutor:", "chosen": "Why?", "rejected": "No."}
           {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!",
            "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
           {"context": [{"role": "user", "content": "Name a fruit."}], "response1": "A pear.",
            "response2": "A brick.", "overall_preference": -2}  (HelpSteer3: below 0, the first)
labels     {"prompt": "Name a fruit.", "response_0": "A pear.", "response_1": "A brick.",
            "better_response_id": 0, "safer_response_id": 1}  (PKU-SafeRLHF: better and safer)
ratings    {"instruction": "Name a fruit.", "completions": [
              {"response": "A pear.", "annotations": {"honesty": {"Rating": "5"}}},
              {"response": "A brick.", "annotations": {"honesty": {"Rating": "1"},
                                                       "helpfulness": {"Rating": "N/A"}}}]}
           {"prompt": "Name a fruit.", "response": "A pear.", "helpfulness": 4, "verbosity": 0}
           {"prompt": "Name a fruit.", "response": "A brick.", "helpfulness": 1, "verbosity": 0}
verdicts   {"prompt": "Name a fruit.", "completion": "A pear.", "label": true}
           {"prompt": "Q: Name a fruit.\nA: A brick.\nTrue:", "completion": " no"}
questions  {"question": "What is 9 + 9?", "answer": "9 + 9 = 18\n#### 18"}
           {"problem": "Halve 1.", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
steps      {"prompt": "2 + 3 - 1?", "completions": ["2 + 3 = 5", "5 - 1 = 3"],
            "labels": [true, false]}
           {"problem": "2 + 3 - 1?", "steps": ["2 + 3 = 5", "5 - 1 = 3"],
            "label": 1}  (the first wrong step, or -1)
           {"input": "2 + 3 - 1? Step 1: 2 + 3 = 5 \u043a\u0438\nStep 2: 5 - 1 = 3 \u043a\u0438",
            "label": "2 + 3 - 1? Step 1: 2 + 3 = 5 +\nStep 2: 5 - 1 = 3 -"}  (Math-Shepherd)
           {"question": {"problem": "2 + 3 - 1?"}, "label": {"steps": [{"completions": [
              {"text": "2 + 3 = 5", "rating": 1}, {"text": "2 + 3 = 6", "rating": -1}],
              "chosen_completion": 0, "human_completion": null}]}}  (PRM800K)
outputs    {"question": "What is 9 + 9?", "answer": "#### 18",
            "responses": ["I get 18.", "17"]}  (python -m interop.score)
Prompts and responses are text or {"role", "content"} messages. In a transcript the first word of a
paragraph is the speaker: Human, User, Student, Assistant or Tutor. "input" follows the prompt,
"system" and "tools" precede it. Ratings and verdicts compare all responses to a prompt, wherever
their rows stand: the best with the worst, the second best with the second worst and so on, each
response once. Rows that cannot serve, such as ties, are left out and counted; a row with a fault is
an error; columns that mean nothing here are named."""


# -- pairs, ratings and verdicts

def response_field(row, name, prompted):
    """A column with a response -> (the messages before the response, if they stand there too; the
    text of the response). prompted: does the row have a prompt beside it?"""
    text, messages = read_field(row, name)
    # Beside a prompt a text is the response alone, without one it is a transcript.
    if not messages and not prompted:
        messages = transcript(text)
    if not messages:
        return [], text
    *before, last = messages
    if last == UNANSWERED:
        raise Unusable("the transcript ends without a response")
    if last["role"] != "assistant":
        raise Unusable(f"{name!r} does not end with the assistant's turn")
    more = sorted(last.keys() - {"role", "content", "name"})
    if more:
        raise InputError(f"{name!r} has {more[0]!r}, which would be lost: a response is text")
    return before, last["content"]


def answered(row, *names):
    """The whole prompt of a row, and the texts of the responses in the columns of these names."""
    prompted = not is_blank(row.get("prompt"))
    found = [response_field(row, name, prompted) for name in names]
    # Beside a prompt some of them may be bare responses.
    befores = [before for before, _ in found if before or not prompted] or [[]]
    before = befores[0]
    if any(other != before for other in befores):
        raise Unusable(f"{' and '.join(names)} answer different prompts")
    prompt = asked(row) if prompted or not before else before
    # Beside whole conversations a prompt may hold only the first of their messages, or more than
    # they do, such as a system message.
    if before[:len(prompt)] == prompt:
        prompt = before
    if prompt[len(prompt) - len(before):] != before or prompt[-1]["role"] == "assistant":
        raise Unusable("the responses do not answer the prompt")
    texts = [text for _, text in found]
    if len(set(texts)) < len(texts):
        raise Unusable(" equals ".join(names))
    return prompt_of(row, prompt), texts


def parse_pair(row):
    """A row of pairs -> Rated, as of every parser here."""
    prompt, (chosen, rejected) = answered(row, "chosen", "rejected")
    return Rated(prompt, [(chosen, {"": 1.0}), (rejected, {"": 0.0})])


def parse_signed(row):
    """HelpSteer3, and HelpSteer2's preferences: below 0 the first of two responses is better."""
    strength = read_number(row.get("overall_preference"), "'overall_preference'")
    prompt, (first, second) = answered(row, row.need("response1"), row.need("response2"))
    if not strength:
        raise Unusable("neither response is preferred")
    # Above 0 the second is better. How much does not matter: there are only two.
    return Rated(prompt, [(first, {"": -strength}), (second, {"": strength})])


# A column such as better_response_id says which response is better.
LABEL = "_response_id"


def parse_labels(row):
    """PKU-SafeRLHF: two responses, and for each objective which of them is better, 0 or 1."""
    prompt, texts = answered(row, "response_0", "response_1")
    responses = [(text, {}) for text in texts]
    for column in [key for key in row.columns if key.endswith(LABEL)]:
        best = read_number(row.get(column), repr(column))
        if best not in (None, 0, 1):
            raise InputError(f"{column!r} is {best}: give 0 or 1, or null for neither")
        # The better one has 1, the other 0; both have none where the label is null.
        for i, (_, numbers) in enumerate(responses):
            numbers[column.removesuffix(LABEL)] = None if best is None else float(i == best)
    if not responses[0][1]:
        raise InputError("a column such as 'better_response_id' is missing, which says 0 or 1")
    return Rated(prompt, responses)


def parse_ratings(row):
    """UltraFeedback: completions, each with ratings of several objectives."""
    responses = []
    try:
        for completion in row.get("completions") or []:
            numbers = {}
            for name, note in completion["annotations"].items():
                numbers[name] = read_number(note.get("Rating"), f"the rating of {name!r}")
            # Published files hold completions that a model never gave.
            text = read_text(completion["response"], "'response'")
            if not is_blank(text):
                responses.append((text, numbers))
    except (KeyError, TypeError, AttributeError):
        raise InputError("a completion needs a 'response' and 'annotations', such as "
                         '{"honesty": {"Rating": "4"}}; "N/A" leaves it out') from None
    return Rated(prompt_of(row), responses)


def parse_attributes(row):
    """HelpSteer and HelpSteer2: a response with ratings of several objectives."""
    prompt, [text] = answered(row, row.need("response"))
    numbers = {}
    for name in row.keys("attribute"):
        numbers[name] = read_number(row.get(name), repr(name))
    return Rated(prompt, [(text, numbers)])


def parse_unpaired(row):
    """TRL's unpaired preference: a response, and whether it is a good one."""
    prompt, [text] = answered(row, "completion")
    label = row.get("label")
    if label is not None and type(label) is not bool:
        raise InputError(f"'label' is {shown(label)}: give true or false, or null for neither")
    return Rated(prompt, [(text, {"": label})])


# How TruthfulQA's judges see an answer; the last line says what they judge.
JUDGED = re.compile(r"Q:(.*?)\nA:(.*)\n\w+:\s*", re.DOTALL)


def parse_verdict(row):
    """TruthfulQA's judgements: question and answer in one text, then yes or no."""
    text, _ = read_field(row, "prompt")
    verdict, _ = read_field(row, "completion")
    match = JUDGED.fullmatch(text)
    if not match or verdict.strip() not in ("yes", "no"):
        raise InputError("beside a 'completion', which must be yes or no, 'prompt' must read "
                         f"'Q: ...\\nA: ...\\nTrue:', not {shown(text)}, {shown(verdict)}")
    # Neither prompt nor response keeps anything of the form.
    question, answer = [part.strip() for part in match.groups()]
    if not answer:
        raise Unusable("the answer is empty")
    prompt = [{"role": "user", "content": question}]
    return Rated(prompt_of(row, prompt), [(answer, {"": float(verdict.strip() == "yes")})])


# -- labelled steps

def labels_until(label, n):
    """The first wrong step of n, or -1 -> labels of all n: what follows a wrong step is wrong."""
    if type(label) is not int or not -1 <= label < n:
        raise InputError(f"'label' must be the first wrong step (0 to {n - 1}) or -1, not "
                         f"{shown(label)}")
    n_right = n if label == -1 else label
    return [1.0] * n_right + [0.0] * (n - n_right)


def checked(steps):
    """Steps as they are. Unusable if there are none, or an empty one."""
    if not steps or any(is_blank(step) for step in steps):
        raise Unusable("no steps, or an empty one")
    return steps


def parse_steps(row):
    """A row of steps, with a label for each or with the first wrong one -> Steps."""
    key, steps, labels = row.need("steps"), row.get("steps") or [], row.get("labels")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise InputError(f"{key!r} must be a list of texts, not {shown(steps)}")
    n = len(checked(steps))
    if "labels" not in row.columns:
        labels = labels_until(row.get("label"), n)
    numbers = labels if isinstance(labels, list) else [""]
    if None in numbers:
        raise Unusable("a step has no label")
    if not all(type(v) in (bool, int, float) and 0 <= v <= 1 for v in numbers):
        raise InputError(f"'labels' must be a list of numbers from 0 to 1, not {shown(labels)}")
    if len(labels) != n:
        raise InputError(f"{n} steps but {len(labels)} labels; give one label per step")
    return Steps(prompt_of(row), steps, [float(label) for label in labels])


def parse_math_shepherd(row):
    """Math-Shepherd: each step of `input` ends with 'ки', and in `label` with + or -."""
    text, signed = row.get("input"), row.get("label")
    if not isinstance(text, str) or not isinstance(signed, str):
        raise InputError(f"'label' must repeat 'input' with + or -, not be {shown(signed)}")
    # Step, sign, step, sign, ...; nothing behind the last sign.
    *parts, _ = re.split(r" ([+-])(?:\n|$)", signed)
    if len(parts) != 2 * text.count("ки") or not parts:
        raise Unusable("'label' has not one + or - for each 'ки' of 'input'")
    # The question stands before the first step.
    question, mark, first = parts[0].partition("Step 1:")
    steps = [step.strip() for step in [mark + first, *parts[2::2]]]
    labels = [float(sign == "+") for sign in parts[1::2]]
    prompt = [{"role": "user", "content": question.strip()}]
    return Steps(prompt_of(row, prompt), checked(steps), labels)


def parse_prm800k(row):
    """PRM800K: of each step the chosen completion. Ratings -1, 0 and 1 are labels 0, .5 and 1."""
    steps, labels = [], []
    try:
        for step in row.get("label.steps"):
            chosen, human = step["chosen_completion"], step["human_completion"]
            if chosen is not None:
                taken = step["completions"][chosen]
            # Where none was good enough a person wrote one, or it ends with an error.
            elif human:
                taken = human | {"rating": 1}
            else:
                taken = min(step["completions"], key=lambda completion: completion["rating"])
            steps.append(taken["text"].strip())
            labels.append({-1: 0.0, 0: 0.5, 1: 1.0}[taken["rating"]])
    except (LookupError, TypeError, AttributeError, ValueError):
        raise Unusable("'label.steps' lack a text or a rating") from None
    text, _ = read_field(row, "question.problem")
    prompt = [{"role": "user", "content": text}]
    return Steps(prompt_of(row, prompt), checked(steps), labels)


# -- questions and outputs

def parse_question(row):
    """A row of questions -> Question. The answer stands alone or is marked in a solution."""
    key, value = row.need("answer"), row.get("answer")
    if type(value) in (int, float):
        value = str(value)
    # Published files have answers that nobody could extract.
    if is_blank(value) or value == "nan":
        raise Unusable("the answer is empty")
    given = read_text(value, f"{key!r}")
    answer = marked_answer(given)
    if answer is None and key in FIELDS["solution"]:
        raise Unusable(f"{key!r} marks no final answer, as '#### 18' or '\\boxed{{18}}' do")
    worked = row.get("solution")
    solution = read_text(worked, "'solution'") or (given if answer else "")
    return Question(prompt_of(row), answer or given.strip(), solution)


def parse_output(row):
    """A row of outputs -> (Question, {model: texts of its samples, "" for one that is null})."""
    said = {"response": row.get("response")} if row.keys("response") else {}
    # Those of several models stand in objects that are named after them.
    for key in [] if said else row.columns:
        if key.endswith(".solution"):
            said[key.removesuffix(".solution")] = row.get(key)
    found = {}
    for name, value in said.items():
        # A list without objects holds several samples; with objects it is one conversation.
        several = isinstance(value, list) and not any(isinstance(v, dict) for v in value)
        samples = value if several else [] if is_blank(value) else [value]
        found[name] = [read_value(row, name, sample)[0] for sample in samples]
    return parse_question(row), found


# -- every row of a file

@dataclass
class Kind:
    """A kind of rows: what they are for, the fields that tell them, their parser; named: do they
    name their objectives?"""
    use: str
    fields: tuple
    parse: callable
    named: bool = False

    def share(self, row):
        """The share of these fields that a row has."""
        return sum(bool(row.keys(name)) for name in self.fields) / len(self.fields)


# Where a row has all fields of two kinds, it is of the first.
KINDS = [Kind("pairs", ("chosen", "rejected"), parse_pair),
         Kind("outputs", ("answer", "response"), parse_output),
         Kind("steps", ("steps", "labels"), parse_steps),
         Kind("pairs", ("response1", "response2", "overall_preference"), parse_signed),
         Kind("pairs", ("response_0", "response_1"), parse_labels, named=True),
         Kind("pairs", ("completions",), parse_ratings, named=True),
         Kind("pairs", ("response", "attribute"), parse_attributes, named=True),
         Kind("pairs", ("completion", "label"), parse_unpaired),
         Kind("pairs", ("prompt", "completion"), parse_verdict),
         Kind("steps", ("steps", "label"), parse_steps),
         Kind("steps", ("label.steps",), parse_prm800k),
         Kind("outputs", ("answer",), parse_output),
         Kind("steps", ("input", "label"), parse_math_shepherd),
         Kind("questions", ("answer",), parse_question)]


def kind_of(row, uses):
    """The kind, among those for some uses, of which a row has the largest share of fields."""
    return max([kind for kind in KINDS if kind.use in uses], key=lambda kind: kind.share(row))


def use_of(path, uses):
    """What a file is for, by its first row: one of `uses`."""
    _, columns = next(read_jsonl(path), ("", {}))
    return kind_of(Row(columns), uses).use


@cache
def say_once(remark):
    """Print a remark, although a run reads its files again and again."""
    print(remark)


def objectives_in(path):
    """The objectives that the rows of a file of pairs name; [] where the file's name does."""
    names = []
    for _, columns in read_jsonl(path):
        row = Row(columns)
        if not kind_of(row, ["pairs"]).named:
            break
        names += [key.removesuffix(LABEL) for key in columns if key.endswith(LABEL)]
        names += row.keys("attribute")
        # Rows are not checked yet: any of this may be something else.
        completions = columns.get("completions")
        for completion in completions if isinstance(completions, list) else []:
            notes = completion.get("annotations") if isinstance(completion, dict) else None
            names += notes if isinstance(notes, dict) else []
        names = list(dict.fromkeys(names))
    return names


def left_out(dropped):
    """{reason: number of rows} -> text."""
    return "".join(f"; {n} left out: {reason}" for reason, n in dropped.items() if n)


def read_all(path, skipped=None, *, use):
    """Every row of a file that is for `use` -> list of what the parsers make of them. Rows that
    cannot serve are counted by reason in `skipped`, a dict or None; columns that mean nothing
    are named. An InputError about a row gets its place in front."""
    found, seen, ignored, named = [], set(), set(), set()
    skipped = {} if skipped is None else skipped
    for where, columns in read_jsonl(path):
        row = Row(columns)
        try:
            # The kind that the row resembles most: what it lacks of that is a fault.
            kind = kind_of(row, [use])
            for name in kind.fields:
                row.need(name)
            # Otherwise pairs of one sort would count for every objective of the other.
            named.add(kind.named)
            if len(named) > 1:
                raise InputError("some rows name their objectives, others leave that to the file's "
                                 "name: put the two kinds into two files")
            found.append(kind.parse(row))
        except Unusable as e:
            skipped[str(e)] = skipped.get(str(e), 0) + 1
            continue
        except InputError as e:
            raise InputError(f"{where}: {e}") from None
        # A column may mean something in one row and nothing in another.
        ignored |= row.ignored
        seen |= columns.keys() - row.ignored
    if not found:
        raise InputError(f"{path}: no rows to use{left_out(skipped)}; python -m interop.datasets "
                         "--help shows rows")
    if ignored - seen:
        say_once(f"{path}: ignored columns: {', '.join(sorted(ignored - seen))}")
    return found


def compare(rows, objective, skipped):
    """What an objective compares, of list[Rated] -> list of (prompt, {response: score}), not all
    scores alike. Rows that give it nothing are counted in `skipped`."""
    groups, found = {}, []
    for number, row in enumerate(rows):
        ratings = [(text, by.get(objective, by.get(""))) for text, by in row.responses]
        ratings = [(text, rating) for text, rating in ratings if rating is not None]
        if not ratings:
            reason = f"no rating of {objective}"
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        # Several responses of a row are compared with one another; one alone with all others that
        # stand alone and answer the same prompt.
        alone = len(row.responses) == 1
        _, group = groups.setdefault(json.dumps(row.prompt) if alone else number, (row.prompt, []))
        group.append(ratings)
    for prompt, group in groups.values():
        scores = {}                                          # {response: its ratings}
        for text, rating in chain.from_iterable(group):
            scores.setdefault(text, []).append(rating)
        # A text that was rated more than once has the mean.
        scores = {text: statistics.fmean(numbers) for text, numbers in scores.items()}
        if len(set(scores.values())) > 1:
            found.append((prompt, scores))
        else:
            reason = f"no two responses to the prompt have different ratings of {objective}"
            skipped[reason] = skipped.get(reason, 0) + len(group)
    return found


def best_and_worst(scores):
    """{response: score} -> list of (better, worse): the best with the worst, the second best with
    the second worst, ..., as long as their scores differ."""
    # Among equals a hash decides: neither the file's order, nor the alphabet, which a text shows.
    ties = {text: zlib.crc32(json.dumps(text).encode()) for text in scores}
    order = sorted(scores, key=lambda text: (scores[text], ties[text]))
    # The worst half in ascending order, beside it the best in descending order.
    half = len(order) // 2
    pairs = zip(order[::-1], order[:half])
    return [(best, worst) for best, worst in pairs if scores[best] > scores[worst]]


def paired(groups, objective):
    """What `compare` finds -> list[Preference]"""
    found = []
    for prompt, scores in groups:
        for best, worst in best_and_worst(scores):
            found.append(Preference(objective, prompt, best, worst))
    return found


read_rated = partial(read_all, use="pairs")                 # -> list[Rated]
read_steps = partial(read_all, use="steps")                 # -> list[Steps]
read_questions = partial(read_all, use="questions")         # -> list[Question]
read_outputs = partial(read_all, use="outputs")             # -> list of parse_output's pairs


def read_preferences(path, objective, skipped=None):
    """A file of pairs, ratings or verdicts -> list[Preference]. `skipped`: see read_all."""
    skipped = {} if skipped is None else skipped
    return paired(compare(read_rated(path, skipped), objective, skipped), objective)


# -- rows in a model's ids

def encode_prompt(tokenizer, prompt):
    """Messages -> ids, ready for a response. InputError shows which prompt cannot be written."""
    try:
        return tokenizer.encode_chat(prompt)
    except InputError as e:
        end = prompt[-1]["content"][-60:]
        raise InputError(f"{e}: the prompt that ends with {end!r}") from None


def encode_pair(preference, model):
    """A Preference -> Pair in the model's ids, EOS behind both responses. None if it is longer than
    the context, or nothing of the responses is left to tell them apart."""
    # Encoded apart: tokens must not merge across the border of prompt and response.
    tokenizer, p = model.tokenizer, preference
    prompt = encode_prompt(tokenizer, p.prompt)
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
    ids, ends = list(encode_prompt(tokenizer, prompt)), []
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


if __name__ == "__main__":
    from interop.look import main                 # here, because that file imports this one
    run_command(main)
