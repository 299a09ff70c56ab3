"""Chat templates: what a checkpoint's own template writes for messages, and which part is whose.

    turns         messages -> list of (role, text), what stands around the contents included
    render        the process that runs the templates (render.py), and what it may answer

The difficulty is to tell a content from what stands around it: a user who types <|im_end|> must not
end a turn. So the template is rendered with a mark, one private-use character, in place of every
content. What it does to a content (it may trim it, or cut a thought from it) shows when that one is
rendered among the marks of the others.
"""
import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from data import InputError

# How data.Tokenizer spells a chat, for other programs.
WORLDS = (
    "{% for m in messages %}<|{{ 'assistant' if m['role'] == 'assistant' else 'user' }}|>"
    "{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")
# For checkpoints that bring no template. They have learnt to continue any text.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "Assistant:{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}")

LOCK = threading.Lock()
TOO_SLOW = set()               # templates that were ended once are not tried again


def turns(template, variables, messages, markup):
    """-> what the template writes, in order: a list of (role, text), role None for its own words.

    variables: what else it may use, {name: value}; markup: a pattern that finds special tokens.
    InputError, in the template's own words where it has some."""
    taken = set(template).union(*[m["content"] for m in messages])
    free = (chr(c) for c in range(0xF0000, 0xFFFFE) if chr(c) not in taken)
    # A template may leave out an empty message altogether, so that one stays as it is.
    marked = [m | {"content": mark if m["content"] else ""} for m, mark in zip(messages, free)]
    # All are marks; all but one, for each; none is.
    versions = [marked]
    for i, message in enumerate(messages):
        versions.append([*marked[:i], message, *marked[i + 1:]])
    versions.append(messages)
    variables = variables | {"tools": None, "documents": None}         # as in transformers
    skeleton, *single, whole = render(template, [variables | {"messages": v} for v in versions])
    # Where each message stands in the skeleton, and what it becomes there.
    spans = []
    for message, text in zip(messages, single):
        if text == skeleton and message["content"].strip():
            raise InputError(f"it leaves out the message {message['content'][:40]!r} of the role "
                             f"{message['role']}")
        start, end, content = difference(skeleton, text)
        # A special token that the message did not bring is the template's: this is not a content.
        new = Counter(markup.findall(content))
        new.subtract(markup.findall(message["content"]))
        if max(new.values(), default=0) > 0:
            raise InputError(f"for the message {message['content'][:40]!r} it writes "
                             f"{content[:80]!r}, where text and markup cannot be told apart")
        spans.append((start, end, message["role"], content))
    # Between them stand the template's own words.
    found, at = [], 0
    for start, end, role, content in sorted(spans):
        found += [(None, skeleton[at:start]), (role, content)]
        at = end
    found.append((None, skeleton[at:]))
    # Together they must be what it writes for the messages as they are.
    texts = [text for _, text in found]
    tokens = [token for text in texts for token in markup.findall(text)]
    if "".join(texts) != whole or tokens != markup.findall(whole):
        raise InputError("what it writes around the messages depends on their text")
    return found


def difference(skeleton, text):
    """-> (start, end, new): `text` is `skeleton` with new in place of skeleton[start:end]."""
    start = len(os.path.commonprefix([skeleton, text]))
    left = min(len(skeleton), len(text)) - start
    same = min(left, len(os.path.commonprefix([skeleton[::-1], text[::-1]])))
    return start, len(skeleton) - same, text[start:len(text) - same]


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
