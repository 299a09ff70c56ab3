"""Rows of public files: which kinds there are, and what each says.

    DATA_HELP               shows the rows: pairs, ratings, questions, labelled steps, outputs
    FIELDS, LOST, Row       which columns are used, under which names, and which must not be lost
    read_field, transcript  text, messages, and conversations written as text
    asked, prompt_of        a prompt, and all that bears on it
    parse_pair, ...         one parser for each kind of row; KINDS tells the kinds apart
    read_all                every row of a file to its parser
    encode_pair, ...        rows in a model's ids
"""
import functools
import json
import re
from dataclasses import dataclass
from functools import partial

from data import InputError, read_jsonl, split_of
from interop.answers import marked_answer
from interop.templates import text_of
from mah_dpo import Pair


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
            "label": 1}  (the first wrong step, or -1; also Math-Shepherd's and PRM800K's rows)
outputs    {"question": "What is 9 + 9?", "answer": "#### 18",
            "responses": ["I get 18.", "17"]}  (python -m interop.score)
Prompts and responses are text or {"role", "content"} messages. In a transcript the first word of a
paragraph is the speaker: Human, User, Student, Assistant or Tutor. "input" follows the prompt,
"system" and "tools" precede it. Ratings give the best completion against the worst, for each
objective that is rated. Rows that cannot serve, such as ties, are left out and counted; a row with
a fault is an error; columns that mean nothing here are named."""


# -- rows and their columns

# What a field is called in published files. Of several names the first that holds something counts.
FIELDS = {"prompt": ("prompt", "question", "instruction", "problem", "input"),
          "steps": ("steps", "completions"),
          "answer": ("answer", "final_answer", "solution", "ground_truth"),
          "solution": ("solution", "ground_truth"),
          "system": ("system", "system_prompt"),
          "response": ("response", "responses", "output", "outputs", "prediction", "predictions",
                       "completion", "samples", "generations")}
# Without these a prompt means something else, and nothing here could use them.
LOST = ("context", "history", "query", "passage", "functions", "tool_calls", "documents", "choices",
        "options", "image", "images", "audio", "audios", "video", "videos", "chat_template_kwargs",
        "reasoning_content", "reasoning", "thinking")
# What a chat template may use of a message, beside its role and content.
SPOKEN = ("tool_calls", "tool_call_id", "function_call", "name", "tools", "reasoning_content",
          "reasoning", "thinking")


class Unusable(Exception):
    """A well-formed row that cannot serve, such as a tie. It is left out, and counted by reason."""


def is_blank(value):
    """Does it hold nothing? Published files write null where a row has no such column."""
    return value in (None, [], {}) or isinstance(value, str) and not value.strip()


def shown(value):
    """What was found instead, for messages."""
    return f"{type(value).__name__} {json.dumps(value)[:60]}"


class Row:
    """The columns of a row. Those that no parser looks at mean nothing here: they are `ignored`."""

    def __init__(self, columns):
        self.columns, self.ignored = dict(columns), set(columns)
        # What stands in an object has a name as well: label.steps.
        for key, value in columns.items():
            for inner in value if isinstance(value, dict) else ():
                self.columns[f"{key}.{inner}"] = value[inner]

    def keys(self, name):
        """The columns that may hold a field, blank ones last."""
        found = [key for key in FIELDS.get(name, (name,)) if key in self.columns]
        return sorted(found, key=lambda key: is_blank(self.columns[key]))

    def get(self, name):
        """What a field holds, or None."""
        found = self.keys(name)
        self.ignored -= {key.partition(".")[0] for key in found}
        return self.columns[found[0]] if found else None

    def need(self, name):
        """The column that holds a field. InputError where there is none."""
        found = self.keys(name)
        if not found:
            others = ", ".join(FIELDS.get(name, ())[1:])
            hint = f" ({others} would do)" if others else ""
            columns = ", ".join(sorted(self.columns)) or "no fields"
            raise InputError(f"field {name!r} is missing{hint}; the row has {columns}")
        return found[0]


# -- text and conversations

def read_text(value, where):
    """Text, text parts or null -> text. InputError says where, and what stands there instead."""
    try:
        return "" if value is None else text_of({"content": value})
    except InputError as e:
        raise InputError(f"{where} is {shown(value)}: {e}") from None


def read_value(row, key, value):
    """What stands in a column -> (text, messages). Of messages the text is the last one's, and of
    each is kept what a chat template may use; text has no messages."""
    messages = [value] if isinstance(value, dict) else value
    # Without roles, a list can only be the parts of one text.
    if not isinstance(messages, list) or not any("role" in m for m in messages if type(m) is dict):
        return read_text(value, f"{key!r}"), []
    found = []
    for number, message in enumerate(messages, 1):
        where = f"message {number} of {key!r}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where} is {shown(message)}: give role and content")
        content = read_text(message.get("content"), where)
        more = {field: message[field] for field in SPOKEN if not is_blank(message.get(field))}
        found.append({"role": message["role"], "content": content} | more)
        row.ignored |= {f"{key}.{field}" for field in message.keys() - {"role", "content", *SPOKEN}}
    return content, found


def read_field(row, name):
    """A field -> (text, messages), as read_value. Unusable where it is empty."""
    key = row.need(name)
    text, messages = read_value(row, key, row.get(name))
    # A call of a tool takes the place of text.
    if not text.strip() and not any("tool_calls" in m for m in messages[-1:]):
        raise Unusable(f"{key!r} is empty")
    return text, messages


# Who speaks in transcripts, in the first word of a paragraph.
SPEAKERS = {"Human": "user", "User": "user", "Student": "user", "Assistant": "assistant",
            "Tutor": "assistant"}
TURN = re.compile(rf"(?:^|\n\r?\n)({'|'.join(SPEAKERS)}):")
# The last turn of a transcript that ends with 'Assistant:'.
UNANSWERED = {"role": "assistant", "content": ""}


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


def asked(row):
    """The prompt's column as messages, the user's last. Text that is no transcript is one message.
    Alpaca's `input`, which an instruction is about, follows it."""
    key = row.need("prompt")
    text, messages = read_field(row, "prompt")
    for other in FIELDS["prompt"]:
        value = row.columns.get(other)
        if other != "input" and not is_blank(value) and value != row.columns[key]:
            raise InputError(f"{key!r} and {other!r} could each be the prompt; keep one of them")
    if messages and messages[-1]["role"] == "assistant":
        raise Unusable("the prompt ends with the assistant's turn")
    if not messages:
        messages = transcript(text)
        if messages[-1:] == [UNANSWERED]:
            messages.pop()
        if not messages or messages[-1]["role"] == "assistant":
            messages = [{"role": "user", "content": text}]
    if key != "input" and not is_blank(row.get("input")):
        more, _ = read_field(row, "input")
        messages[-1]["content"] += "\n" + more
    return messages


def prompt_of(row, prompt=None):
    """The whole prompt: its column's messages, or those given, and what other columns add: a system
    message, and tools on the first message, where Tokenizer.encode_chat expects them.

    InputError for a column that would be lost."""
    prompt = prompt or asked(row)
    for name in LOST:
        if not is_blank(row.get(name)):
            raise InputError(f"{name!r} would be lost ({shown(row.get(name))}); put it into the "
                             "prompt, or remove the column")
    if not is_blank(row.get("system")):
        text, _ = read_field(row, "system")
        system = {"role": "system", "content": text}
        prompt = prompt if prompt[0] == system else [system, *prompt]
    tools = row.get("tools")
    if not is_blank(tools):
        if not isinstance(tools, list):
            raise InputError(f"'tools' is {shown(tools)}; give a list")
        prompt = [prompt[0] | {"tools": tools}, *prompt[1:]]
    return prompt


# -- pairs and ratings

def response_field(row, name, prompted):
    """A row's `chosen` or `rejected` -> (the messages before the response, if they stand there too;
    the text of the response). prompted: does the row have a prompt beside it?"""
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


def parse_pair(row, objective):
    """A row of pairs -> Preference."""
    prompted = not is_blank(row.get("prompt"))
    before_chosen, chosen = response_field(row, "chosen", prompted)
    before_rejected, rejected = response_field(row, "rejected", prompted)
    before = before_chosen or before_rejected
    # Beside a prompt one of the two may be the bare response.
    bare = prompted and not (before_chosen and before_rejected)
    if before_chosen != before_rejected and not bare:
        raise Unusable("chosen and rejected answer different prompts")
    prompt = asked(row) if prompted or not before else before
    # Beside whole conversations a prompt may hold only the first of their messages, or more than
    # they do, such as a system message.
    if before[:len(prompt)] == prompt:
        prompt = before
    if prompt[len(prompt) - len(before):] != before or prompt[-1]["role"] == "assistant":
        raise Unusable("the responses do not answer the prompt")
    if chosen == rejected:
        raise Unusable("chosen equals rejected")
    return Preference(objective, prompt_of(row, prompt), chosen, rejected)


def parse_ratings(row, objective):
    """A row of rated completions -> Preference, the best against the worst."""
    by_rating = {}                   # {rating: response}
    try:
        for completion in row.get("completions"):
            rating = completion["annotations"].get(objective, {}).get("Rating", "N/A")
            response = read_text(completion["response"], "'response'")
            if rating in ("N/A", None) or is_blank(response):
                continue
            # By way of str, because JSON's true is no rating. Of equal ratings the first counts.
            by_rating.setdefault(float(str(rating)), response)
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
    return Preference(objective, prompt_of(row), chosen=responses[-1], rejected=responses[0])


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
    numbers = labels if isinstance(labels, list) else [None]
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


# -- which objectives a row rates

def objectives_in(columns):
    """The names of the objectives that a row rates, as UltraFeedback's do; () for other rows."""
    names = {}
    completions = columns.get("completions")
    for completion in completions if isinstance(completions, list) else []:
        rated = completion.get("annotations") if isinstance(completion, dict) else None
        names |= dict.fromkeys(rated if isinstance(rated, dict) else ())
    return tuple(names)


# -- every row of a file

@dataclass
class Kind:
    """A kind of rows: what they are for, the fields that tell them, their parser."""
    use: str
    fields: tuple
    parse: callable

    def share(self, row):
        """The share of these fields that a row has."""
        return sum(bool(row.keys(name)) for name in self.fields) / len(self.fields)


# Where a row has all fields of two kinds, it is of the first.
KINDS = [Kind("pairs", ("chosen", "rejected"), parse_pair),
         Kind("outputs", ("answer", "response"), parse_output),
         Kind("steps", ("steps", "labels"), parse_steps),
         Kind("pairs", ("completions",), parse_ratings),
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


@functools.cache
def say_once(remark):
    """Print a remark, although a run reads its files again and again."""
    print(remark)


def read_all(path, skipped=None, *, use, **options):
    """Every row of a file that is for `use` -> list of what the parsers make of them. Rows that
    cannot serve are counted by reason in `skipped`, a dict or None; columns that mean nothing are
    named. An InputError about a row gets its place in front."""
    found, seen, ignored = [], set(), set()
    skipped = {} if skipped is None else skipped
    for where, columns in read_jsonl(path):
        row = Row(columns)
        try:
            kind = kind_of(row, [use])
            for name in kind.fields:
                row.need(name)
            found.append(kind.parse(row, **options))
        except Unusable as e:
            skipped[str(e)] = skipped.get(str(e), 0) + 1
            continue
        except InputError as e:
            raise InputError(f"{where}: {e}") from None
        ignored |= row.ignored
        seen |= columns.keys() - row.ignored
    if not found:
        reasons = [f"; {n} skipped: {reason}" for reason, n in skipped.items()]
        raise InputError(f"{path}: no rows to use{''.join(reasons)}; train.py --help shows rows")
    if ignored - seen:
        say_once(f"{path}: ignored columns: {', '.join(sorted(ignored - seen))}")
    return found


def read_preferences(path, objective, skipped=None):
    """Pairs or rated completions -> list[Preference]. `skipped`: see read_all."""
    return read_all(path, skipped, use="pairs", objective=objective)


read_steps = partial(read_all, use="steps")                 # -> list[Steps]
read_questions = partial(read_all, use="questions")         # -> list[Question]
read_outputs = partial(read_all, use="outputs")             # -> list of parse_output's pairs


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
