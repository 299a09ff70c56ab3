"""Chat templates: what a checkpoint's own template writes for messages.

    text_of       a message's content, which may be a list of text parts
    written       messages -> the text that the template writes, as in transformers
    render        the process that runs the templates (render.py), and what it may answer

The difficulty is to tell the template's words from those of the messages: a user who types
<|im_end|> must not end a turn. So special tokens that a message spells are replaced by private-use
characters while the template is at work. And it is seen with a mark in place of every content: what
is marked must show up, and the special tokens must be the same ones with marks as with words.
"""
import atexit
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from data import InputError

# How data.Tokenizer spells a chat, for other programs.
WORLDS = (
    "{% for m in messages %}<|{{ 'assistant' if m['role'] == 'assistant' else 'user' }}|>"
    "{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")
# For checkpoints that bring no template. They have learnt to continue any text. CUT: no token
# reaches from one side of an answer's edges to the other, so that a prompt is the start of what
# follows.
CUT = "\U000FFFF2"
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    f"Assistant:{CUT}{{{{ m['content'] }}}}{CUT}{{{{ eos_token }}}}"
    "{% else %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}")

NAMED = re.compile(r'"name": "(?:[^"\\]|\\.)*"')       # a tool's name, in JSON
LOCK = threading.Lock()
TOO_SLOW = set()               # templates that were ended once are not tried again


def text_of(message):
    """The text of a message's content, which may be a list of text parts; "" where the call of a
    tool takes its place. InputError for anything else."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"the content of a message holds {kind!r}: give text, or a list of "
                             '{"type": "text", "text": "..."}')
        texts.append(part["text"])
    return "".join(texts)


def tidy(message, template):
    """A message -> the same with its content as text, and without the empty fields that a file of
    data has where a row does not use a column.

    InputError for a field, or the role of a tool, that `template`, the text of a chat template,
    does not mention: what it says would be lost."""
    text = text_of(message)
    fields = {name: value for name, value in message.items() if value not in (None, "", [])}
    wrong = sorted(fields.keys() - {"role", "content", "name", "tool_call_id"})
    wrong = [name for name in wrong if name not in template]
    if wrong:
        raise InputError(f"a message has {wrong[0]!r}, which this tokenizer's chats do not know")
    # Templates may tell no content and an empty one apart.
    if message.get("content") is not None:
        fields["content"] = text
    return fields


def written(template, variables, messages, markup):
    """-> (text, said): what the template writes for messages, the first of which may hold `tools`;
    and {code: a special token}, what the private-use characters in it stand for.

    variables: what else it may use, {name: value}; markup: a pattern that finds special tokens.
    InputError, in the template's own words where it has some."""
    chat = {"messages": [tidy(message, template) for message in messages]}
    for first in chat["messages"][:1]:
        chat["tools"] = first.pop("tools", None)
    words = json.dumps(chat, ensure_ascii=False)
    taken = set(template + words)
    free = (chr(c) for c in range(0xF0000, 0xFFFFE) if chr(c) not in taken)
    # Special tokens that are typed, longer ones first: one may be a part of another.
    hidden, said = words, {}
    for token in sorted(set(markup.findall(words)), key=len, reverse=True):
        sign = next(free)
        hidden, said[ord(sign)] = hidden.replace(token, sign), token
    marked, marks = json.loads(hidden), {}
    for owner in [*marked["messages"], marked]:
        mark_words(owner, marks, free)
    # In transformers, too, a template finds these variables.
    variables = {"tools": None, "documents": None} | variables
    versions = [variables | version for version in (chat, json.loads(hidden), marked)]
    plain, text, skeleton = render(template, versions)
    for mark, what in marks.items():
        if mark not in skeleton:
            raise InputError(f"it leaves out {what}")
    # A template may read a special token, say to cut a thought: it shall see them.
    if text.translate(said) != plain:
        text = plain
    if markup.findall(text) != markup.findall(skeleton):
        raise InputError(f"for {words[:200]} it writes {plain[:200]!r}, where text and markup "
                         "cannot be told apart")
    return text, said


def mark_words(owner, marks, free):
    """Put a character of `free` in place of the words of a message, or of all the tools: of its
    content, and of the names of tools. marks[character] says what it stands for."""
    for name in ("content", "tool_calls", "tools"):
        value = owner.get(name)
        # A template may leave out an empty message altogether.
        if not value or not str(value).strip():
            continue
        mark = next(free)
        marks[mark] = f"the {name} of {owner.get('role', 'the system')}: {str(value)[:80]!r}"
        if name == "content":
            owner[name] = mark
        else:
            owner[name] = json.loads(NAMED.sub(f'"name": "{mark}"', json.dumps(value)))


# -- the process that renders

@functools.cache
def renderer(process):
    """The process that renders templates for this one (`process`, its number)."""
    program = str(Path(__file__).with_name("render.py"))
    child = subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    # When Python ends, this closes the pipes, and with them the process ends.
    atexit.register(child.communicate)
    return child


def render(template, conversations):
    """A template's text, and dicts of its variables -> texts. InputError where it cannot."""
    request = json.dumps({"template": template, "conversations": conversations})
    with LOCK:
        if template in TOO_SLOW:
            raise InputError("it takes too long")
        child, line = renderer(os.getpid()), ""
        try:
            print(request, file=child.stdin, flush=True)
            line = child.stdout.readline()
        except BrokenPipeError:
            pass                         # it has ended before
        finally:
            # Also where Ctrl-C came: a late answer would be taken for the next one.
            if not line:
                child.kill()
                renderer.cache_clear()
        if not line:
            if child.wait() == -signal.SIGALRM:
                TOO_SLOW.add(template)
                raise InputError("it takes too long")
            raise InputError(f"its process ended with code {child.returncode}")
    answer = json.loads(line)
    if "error" in answer:
        raise InputError(answer["error"])
    return answer["texts"]
