"""Grade a submission: python -m tests.grade DIR [--out results.json]

From DIR nothing is taken but what stands between an exercise's two comment lines (see
make_assignment.py). It runs in a process of its own, one per exercise, on a fresh copy of this
project's files. The exercise's tests run here, in a process that no line of the submission
enters: calls of the exercise's functions go to the student's process as JSON, and so do their
results come back. A submission may hang, exit, print, patch pytest or rewrite the tests: all that
it can do to its mark is to answer rightly or not. One that writes files, uses the network, starts
programs, reads programs other than Python's and its own, imports what its file does not or prints
half a megabyte has no points for that exercise. An exercise counts if all its tests pass; they draw
other random numbers than the tests that were handed out.

The results are written as Gradescope reads them. What this cannot stop is a submission that was
written against it: read what is handed in, and run it as a user who owns nothing else.
"""
import argparse
import ast
import base64
import contextlib
import importlib
import json
import operator
import os
import queue
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial

import pytest
import torch

from data import InputError, run_command, write_json
from tests.make_assignment import FILES, HOME, between, fences, folder, read, read_exercises, write

LARGEST = 2**26          # bytes of one answer
PRINTED = 500_000        # bytes that an exercise may print
ERRORS = {"ValueError": ValueError, "InputError": InputError}     # what a function may raise
# What an exercise may import besides its file's own; importlib would bring the rest.
LIBRARY = sys.stdlib_module_names - {"importlib", "runpy"}
SEQUENCES = {"list": list, "tuple": tuple, "set": set}

# How the names of events begin that a submission may not cause. Python tells an audit hook of them
# before they happen (sys.addaudithook); ctypes would reach the rest.
FORBIDDEN = ("socket.", "subprocess.", "ctypes.dl", "os.system", "os.exec", "os.posix_spawn",
             "os.fork", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
             "os.truncate", "os.chmod", "os.chown", "os.utime")


# -- values as JSON

def encode(value):
    """Value -> JSON: numbers and text are themselves, all else is [kind, content]; an object (a
    dataclass, a model, a named tuple) is its class and attributes."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        data = base64.b64encode(flat.numpy().tobytes()).decode()
        return ["tensor", [encode(value.dtype), list(value.shape), value.requires_grad, data]]
    if isinstance(value, (torch.dtype, torch.device)):
        return [kind, str(value).removeprefix("torch.")]
    if isinstance(value, slice):
        return [kind, [value.start, value.stop, value.step]]
    if isinstance(value, dict):
        return ["dict", [[encode(k), encode(v)] for k, v in value.items()]]
    if kind in SEQUENCES:
        return [kind, [encode(v) for v in value]]
    fields = value._asdict() if isinstance(value, tuple) else vars(value)
    return ["object", [type(value).__module__, type(value).__qualname__, encode(fields)]]


def decode(code, old=None, build=False):
    """JSON -> value.

    Lists, dicts and objects that `old` is already are changed in place, so that what a function
    does to its arguments is seen here. Other objects are made only with `build`, on the student's
    side: nothing from there picks a class."""
    if not isinstance(code, list):
        return code
    kind, content = code
    if kind == "tensor":
        return decode_tensor(*content)
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    if kind == "slice":
        return slice(*content)
    if kind == "object":
        return decode_object(*content, old, build)
    if kind == "dict":
        known, new = old if isinstance(old, dict) else {}, {}
        for key, value in content:
            key = decode(key)
            new[key] = decode(value, known.get(key), build)
        known.clear()
        known.update(new)
        return known
    known = list(old) if isinstance(old, (list, tuple)) else []
    known += [None] * len(content)       # what is new has no predecessor
    new = [decode(item, before, build) for item, before in zip(content, known)]
    if kind == "list" and isinstance(old, list):
        old[:] = new
        return old
    return SEQUENCES[kind](new)


def decode_tensor(dtype, shape, grad, data):
    data, dtype = bytearray(base64.b64decode(data)), decode(dtype)
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.view(shape).requires_grad_(grad)


def decode_object(module, name, fields, old, build):
    """An object by the module and the name of its class, and its attributes."""
    if old is not None and (type(old).__module__, type(old).__qualname__) == (module, name):
        if not isinstance(old, tuple):
            decode(fields, vars(old), build)
        return old
    if not build:
        raise ValueError(f"the answer holds an object of class {module}.{name}")
    kind = operator.attrgetter(name)(importlib.import_module(module))
    values = decode(fields, None, True)
    if issubclass(kind, tuple):
        return kind(**values)
    new = kind.__new__(kind)
    vars(new).update(values)
    return new


# -- the student's process

def refuse(answers, places, event, args):
    """An audit hook, which nobody can take away. It ends the process before what is forbidden
    happens, so that no try and except hides it. Programs may be read in `places` only."""
    what = event if event.startswith(FORBIDDEN) else None
    if event == "open" and isinstance(args[0], (str, bytes)):
        place = os.path.realpath(os.fsdecode(args[0]))
        if args[2] & (os.O_WRONLY | os.O_RDWR):
            what = "open to write"
        elif place.endswith((".py", ".pyc")) and not place.startswith(places):
            what = "open"
    if what:
        message = (f"an exercise writes no files, uses no network, starts no programs and reads no "
                   f"program but its own: {what} {args[:1]}")
        print(json.dumps({"error": "Refused", "message": message[:300]}), file=answers, flush=True)
        os._exit(1)


def refuse_write(answers, number, frame):
    """The signal that a file was to grow: torch.save, say, asks no audit hook."""
    refuse(answers, (), "open", ("past Python's open", None, os.O_WRONLY))


def serve():
    """Answer calls until the grader is satisfied. Nothing of the submission is imported before the
    first call."""
    calls = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What a submission reads comes from nowhere; what it prints is counted.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    sys.path.append("tests")             # where classes of the tests' own are found
    sys.dont_write_bytecode = True
    # No file grows, whoever writes it.
    with contextlib.suppress(ImportError):
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        signal.signal(signal.SIGXFSZ, partial(refuse_write, answers))
    places = tuple(os.path.realpath(place) for place in sys.path)
    sys.addaudithook(partial(refuse, answers, places))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in calls:
        print(json.dumps(answer(line)), file=answers, flush=True)


def answer(line):
    """Carry out one call: JSON [module, name, args, kwargs] -> result, and args as they are now."""
    try:
        module, name, args, kwargs = decode(json.loads(line), build=True)
        function = operator.attrgetter(name)(importlib.import_module(module))
        result = function(*args, **kwargs)
        return {"result": encode(result), "args": encode(args)}
    except BaseException as e:           # SystemExit too is an answer
        return {"error": type(e).__name__, "message": str(e)[:2000]}


class Pupil:
    """The process that runs one exercise of a submission, with `limit` seconds for all its calls.

    The first call starts it, and the following one's: importing torch takes longer than most
    exercises."""

    def __init__(self, exercise, texts, limit):
        self.exercise = exercise
        self.texts = texts               # {file: text} of its directory
        self.left = limit                # seconds
        self.following = None            # the Pupil of the next exercise
        self.process = None
        self.ready = False               # has it said that it is ready?
        self.over = None                 # why there will be no more answers

    def start(self):
        if self.process is not None:
            return
        self.directory = tempfile.mkdtemp()
        write(self.directory, self.texts)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.grade", "--serve"], cwd=self.directory,
            start_new_session=True, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8")
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        """Throw away what the process prints; end it when that is too much."""
        printed = 0
        while chunk := self.process.stderr.buffer.read1(2**16):
            printed += len(chunk)
            if printed > PRINTED:
                self.over = f"it prints more than {PRINTED:,} bytes: take its prints out"
                self.process.kill()

    def ask(self, line):
        """One line to the process, one back; "" if none comes in time."""
        # From here on the clock runs.
        self.ready = self.ready or self.process.stdout.readline()
        answers, begun = queue.Queue(), time.monotonic()
        threading.Thread(target=self.talk, args=(line, answers), daemon=True).start()
        try:
            found = answers.get(timeout=max(0.0, self.left))
            if not found:
                why = "its process ended without an answer: does it exit, or crash?"
                self.over = self.over or why
        except queue.Empty:
            found = ""
            self.over = "it did not answer in time: does it wait for something, or run for ever?"
        self.left -= time.monotonic() - begun
        return found

    def talk(self, line, answers):
        """What may wait for ever, in a thread of its own."""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answers.put(self.process.stdout.readline(LARGEST))
        except (OSError, ValueError):
            answers.put("")

    def call(self, name, args, kwargs):
        """The result of the submission's function, whose changes of its arguments are made here."""
        self.start()
        if self.following:
            self.following.start()
        module = self.exercise.file.removesuffix(".py")
        line = json.dumps(encode([module, name, list(args), kwargs]))
        text = "" if self.over else self.ask(line)
        if not text:
            self.stop()
            raise RuntimeError(self.over)
        found = json.loads(text)
        if "error" in found:
            kind, message = found["error"], found["message"]
            if kind in ERRORS:
                raise ERRORS[kind](message)
            raise RuntimeError(f"{kind}: {message}")
        decode(found["args"], list(args))
        return decode(found["result"])

    def stop(self):
        if self.process is None or self.process.returncode is not None:
            return
        if hasattr(os, "killpg"):        # with whatever the submission started
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


# -- the grader's process

def submitted(directory, exercise):
    """The exercise's file as it is here, but for the submission's lines between the fences.

    ValueError if there are none."""
    file, path = exercise.file, os.path.join(directory, exercise.file)
    if not os.path.isfile(path):
        raise ValueError(f"{file} is missing")
    if os.path.getsize(path) > 2**20:
        raise ValueError(f"{file} is larger than a megabyte")
    with open(path, encoding="utf-8", errors="surrogateescape") as f:
        lines = f.read().split("\n")
    if not fences(lines):
        raise ValueError(f"{file} has no exercise's comment lines: is it the file that was handed "
                         "out, saved as UTF-8?")
    first, stop = between(lines, exercise.number)
    reference = read(HOME, file)
    own = reference.split("\n")
    start, end = between(own, exercise.number)
    text = "\n".join(own[:start] + lines[first:stop] + own[end:])
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"what stands there is not UTF-8; save {file} as UTF-8") from None
    try:
        tree = ast.parse(text)
        compile(tree, file, "exec")
    except SyntaxError as e:
        at = e.lineno or start + 1
        wrong = "".join(text.split("\n")[at - 1:at]).strip()
        raise ValueError(f"this is no Python: {e.msg}, in line {at - start} of the exercise, "
                         f"{wrong!r}") from None
    except (ValueError, RecursionError, MemoryError) as e:
        raise ValueError(f"Python cannot read it: {e}") from None
    foreign = imports(tree) - imports(ast.parse(reference)) - LIBRARY
    if foreign:
        raise ValueError(f"it imports {', '.join(sorted(foreign))}; an exercise needs no more than "
                         f"what {file} imports and Python's library, importlib left out")
    return text


def imports(tree):
    """The names of the packages that a program imports, and of a function that imports others."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        if isinstance(node, ast.Name) and node.id == "__import__":
            found.add(node.id)
    return found


def own_files():
    """{file: text} of what a student's process needs beside the submission."""
    tools = [f"tests/{name}.py" for name in ("grade", "make_assignment", "test_exercises")]
    return {file: read(HOME, file) for file in [*FILES, *folder("interop"), *tools]}


def hire(exercises, directory, limit):
    """-> ({number: Pupil}, {number: why there is none}); in the project's modules here, the
    exercises' functions are replaced by calls of the submission's."""
    own, pupils, said = own_files(), {}, {}
    for exercise in exercises:
        try:
            text = submitted(directory, exercise)
        except ValueError as problem:
            said[exercise.number] = str(problem)
            continue
        pupil = Pupil(exercise, own | {exercise.file: text}, limit)
        if pupils:
            list(pupils.values())[-1].following = pupil
        pupils[exercise.number] = pupil
        for name in exercise.functions:
            replace_function(exercise, name, pupil)
    return pupils, said


def replace_function(exercise, name, pupil):
    """Let calls of an exercise's function go to the student's process."""
    place = importlib.import_module(exercise.file.removesuffix(".py"))
    *classes, last = name.split(".")
    if classes:
        place = getattr(place, classes[0])

    def proxy(*args, **kwargs):
        return pupil.call(name, args, kwargs)
    setattr(place, last, proxy)


class Report:
    """A pytest plugin: per exercise the number of tests, of passed tests, and the first failure's
    message."""

    def __init__(self, pupils):
        self.pupils = pupils
        self.tests, self.passed, self.messages = Counter(), Counter(), {}

    @staticmethod
    def number(name):
        return int(re.search(r"::test_ex(\d+)_", name)[1])

    def pytest_collection_modifyitems(self, items):
        self.tests.update(self.number(item.nodeid) for item in items)

    def pytest_runtest_logreport(self, report):
        n = self.number(report.nodeid)
        if report.passed:
            self.passed[n] += report.when == "call"
            return
        name = report.nodeid.split("::")[1]
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else report.longreprtext
        message = message.removeprefix("RuntimeError: ")     # what the pupil's process told
        self.messages.setdefault(n, f"{name}: {message}"[:1500])

    def pytest_runtest_logfinish(self, nodeid):
        # Tests come in the order of the exercises: earlier ones are over.
        for n, pupil in self.pupils.items():
            if n < self.number(nodeid):
                pupil.stop()


def grade(exercises, directory, limit, seed):
    """-> rows of results as Gradescope reads them, one per exercise"""
    pupils, said = hire(exercises, directory, limit)
    report = Report(pupils)
    if pupils:
        os.environ["EXERCISE_SEED"] = str(seed)
        graded = " or ".join(f"ex{n}" for n in pupils)
        options = ["-k", graded, "-p", "no:terminal", "-p", "no:cacheprovider"]
        tests = os.path.join(HOME, "tests", "test_exercises.py")
        pytest.main([tests, *options], plugins=[report])
    for pupil in pupils.values():
        pupil.stop()
    rows = []
    for exercise in exercises:
        n = exercise.number
        right = 0 < report.tests[n] == report.passed[n]
        why = report.messages.get(n, "" if right else "its tests did not run")
        rows.append(row_of(exercise, right, said.get(n, why)))
    return rows


def row_of(exercise, right, said):
    """An exercise's result as Gradescope reads it."""
    return {"name": exercise.title, "number": str(exercise.number),
            "score": exercise.points if right else 0, "max_score": exercise.points,
            "output": said, "status": "passed" if right else "failed"}


def write_results(path, rows, seed):
    """The results as Gradescope reads them -> the sum of points"""
    score = sum(row["score"] for row in rows)
    write_json(path, {"score": score, "extra_data": {"seed": seed}, "tests": rows})
    return score


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", nargs="?", help="a submission: the seven files, or some")
    parser.add_argument("--out", default="results.json",
                        help="where the results go (default results.json)")
    parser.add_argument("--limit", type=float, default=60,
                        help="seconds that one exercise may run (default 60)")
    parser.add_argument("--seed", type=int, default=None,
                        help="of the tests' random numbers (default: another one each time)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        return serve()
    if args.directory is None:
        parser.error("which directory holds the submission?")
    if not os.path.isdir(args.directory):
        raise InputError(f"{args.directory}: no such directory; give that of a submission")
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    exercises = read_exercises()
    # A submission that kills the grader is left with these results.
    ended = "the grader was ended while it ran this submission"
    write_results(args.out, [row_of(e, False, ended) for e in exercises], seed)
    rows = grade(exercises, args.directory, args.limit, seed)
    for row in rows:
        n = int(row["number"])
        print(f"{row['score']:2d} / {row['max_score']}   exercise {n:2d}: {row['name']}")
        for line in row["output"].splitlines():
            print(f"         {line}")
    score, most = write_results(args.out, rows, seed), sum(row["max_score"] for row in rows)
    print(f"{score:2d} / {most}   (seed {seed})")


if __name__ == "__main__":
    run_command(main)
