"""Chat templates, rendered in a process of their own.

    python interop/render.py < requests > answers        one JSON object a line, both ways

A chat template is a program in the language Jinja that comes with a checkpoint, so it is not to be
trusted. Jinja's sandbox keeps it away from Python's insides and from files, but it may still loop
for ever, or ask for all memory. Here the operating system bounds both: a process that takes too
long is ended by the kernel, whatever it is doing, and whoever asked sees that no answer came.

This program imports nothing of the project; interop/templates.py starts it and talks to it.
"""
import functools
import json
import resource
import signal
import sys
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 3              # for one request; a template of the usual kind takes .001
MEMORY = 2**29           # bytes, Python itself included
CHARACTERS = 10**7       # that a template may write


# -- what templates may use, as in transformers

class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks answers for training; here it does nothing."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def raise_exception(message):
    """A template's way to say that it cannot write these messages."""
    raise TemplateError(message)


def strftime_now(form):
    """The present date and time in a form like '%d %b %Y'."""
    return datetime.now().strftime(form)


# -- rendering

@functools.cache
def compiled(template):
    """The text of a template -> a template that can render, in the sandbox."""
    # Settings as in transformers, for which templates are written.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    # JSON as it is; Jinja's own filter would write it for web pages, with < as \u003c.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


def answer(request):
    """{"template", "conversations": [variables, ...]} -> {"texts": [...]} or {"error": words}"""
    texts = []
    try:
        template = compiled(request["template"])
        for variables in request["conversations"]:
            texts.append(template.render(variables))
            if len(texts[-1]) > CHARACTERS:
                return {"error": f"it writes {len(texts[-1])} characters"}
    # Whatever a program may do wrong; its memory is free again.
    except Exception as e:
        return {"error": str(e) or type(e).__name__}
    return {"texts": texts}


def main():
    """Answer requests until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # The timer's signal ends this process by itself: no Python code has to run for that. Ctrl-C is
    # meant for the program that asks, which ends this one by closing its standard input.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        signal.alarm(SECONDS)
        reply = json.dumps(answer(json.loads(line)))
        signal.alarm(0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
