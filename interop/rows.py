"""A row of a public file: its columns, its texts and messages, and the prompt that it holds.

    FIELDS, LOST, Row       which columns are used, under which names, and which must not be lost
    read_field, transcript  text, messages, and conversations written as text
    asked, prompt_of        a prompt, and all that bears on it

Next: datasets.py, the kinds of rows.
"""
import json
import math
import re

from data import InputError
from interop.templates import text_of

# What a field is called in published files. Of several names the first that holds something counts.
FIELDS = {"prompt": ("prompt", "question", "instruction", "problem", "input", "context",
                     "conversations"),
          "steps": ("steps", "completions"),
          "answer": ("answer", "final_answer", "solution", "ground_truth"),
          "solution": ("solution", "ground_truth"),
          "system": ("system", "system_prompt"),
          "response": ("response", "responses", "output", "outputs", "prediction", "predictions",
                       "completion", "samples", "generations"),
          "response1": ("response1", "response_1"),
          "response2": ("response2", "response_2"),
          "overall_preference": ("overall_preference", "preference_strength"),
          "attribute": ("helpfulness", "correctness", "coherence", "complexity", "verbosity")}
# Without these a prompt means something else, and nothing here could use them.
LOST = ("history", "query", "passage", "functions", "tool_calls", "documents", "choices", "options",
        "image", "images", "audio", "audios", "video", "videos", "chat_template_kwargs",
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
            others = ", ".join(key for key in FIELDS.get(name, ()) if key != name)
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


def from_sharegpt(message):
    """ShareGPT's {"from", "value"} -> {"role", "content"}; anything else as it is."""
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
        return message
    more = {key: value for key, value in message.items() if key not in ("from", "value")}
    speaker = message["from"]
    role = {"human": "user", "gpt": "assistant"}.get(str(speaker), speaker)
    return more | {"role": role, "content": message["value"]}


def read_number(value, where):
    """A rating, a number or its text -> float; None where there is none. InputError says where."""
    if value == "N/A" or is_blank(value):
        return None
    try:
        # By way of str, because JSON's true is no number.
        number = float(str(value))
    except ValueError:
        number = math.nan
    # Nor are NaN and infinity.
    if not abs(number) < 1e9:
        raise InputError(f"{where} is {shown(value)}: give a number (below 1e9), or null for none")
    return number


def read_value(row, key, value):
    """What stands in a column -> (text, messages). Of messages the text is the last one's, and of
    each is kept what a chat template may use; text has no messages."""
    messages = [value] if isinstance(value, dict) else value
    if isinstance(messages, list):
        messages = [from_sharegpt(message) for message in messages]
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
    # HelpSteer2 puts a mark before every turn but the first.
    text = re.sub(r"\s*<extra_id_1>(User|Assistant)\n", r"\n\n\1: ", text)
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
            raise InputError(f"{key!r} and {other!r} could each be the prompt; join them, or keep "
                             "one")
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
