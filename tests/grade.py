"""Grade a submission: python -m tests.grade DIR [--out results.json]

From DIR nothing is taken but what stands between an exercise's two comment lines (see
make_assignment.py). It runs in a process of its own, one per exercise, on a fresh copy of this
project's files. The exercise's tests run here, in a process that no line of the submission
enters: calls of the exercise's functions go to the student's process as JSON, and so do their
results come back. A submission may hang, exit, print, patch pytest or rewrite the tests: all that
it can do to its mark is to answer rightly or not. An exercise counts if all its tests pass; they
draw other random numbers than the tests that were handed out.

The results are written as Gradescope reads them. What this does not do is hide files: run it
where a submission cannot read or write this project's own (a container, another user).
"""
import argparse
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

import pytest
import torch

from data import InputError, run_command, write_json
from tests.make_assignment import FILES, HOME, between, folder, read, read_exercises, write

LARGEST = 2**26          # bytes of one answer
ERRORS = {"ValueError": ValueError, "InputError": InputError}     # what a function may raise


# -- values as JSON

def encode(value):
    """Numbers, text, tensors, containers, and objects as their class and attributes -> JSON."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return encode_tensor(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if type(value) in (list, tuple, set):
        return {type(value).__name__: [encode(v) for v in value]}
    # Anything else is an object: a dataclass, a model, a named tuple.
    fields = value._asdict() if isinstance(value, tuple) else vars(value)
    return {
        "object": [type(value).__module__, type(value).__qualname__],
        "fields": [[k, encode(v)] for k, v in fields.items()],
    }


def encode_tensor(tensor):
    """A tensor's bytes with its type and shape -> JSON."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    data = flat.view(torch.uint8).numpy().tobytes()
    return {
        "tensor": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "grad": tensor.requires_grad,
        "data": base64.b64encode(data).decode(),
    }


def decode(code, old=None, build=False):
    """JSON -> value.

    Lists, dicts and objects that `old` is already are changed in place, so that what a function
    does to its arguments is seen here. Other objects are made only with `build`, on the student's
    side: nothing from there picks a class."""
    if not isinstance(code, dict):
        return code
    kind, content = next(iter(code.items()))
    if kind == "tensor":
        return decode_tensor(code)
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    if kind == "slice":
        return slice(*content)
    if kind == "object":
        return decode_object(content, code["fields"], old, build)
    if kind == "dict":
        return decode_dict(content, old, build)
    return decode_sequence(kind, content, old, build)


def decode_tensor(code):
    data = bytearray(base64.b64decode(code["data"]))
    dtype = getattr(torch, code["tensor"])
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.view(code["shape"]).requires_grad_(code["grad"])


def decode_dict(pairs, old, build):
    known = old if isinstance(old, dict) else {}
    new = {}
    for key, value in pairs:
        key = decode(key)
        new[key] = decode(value, known.get(key), build)
    if not isinstance(old, dict):
        return new
    old.clear()
    old.update(new)
    return old


def decode_sequence(kind, codes, old, build):
    known = list(old) if isinstance(old, (list, tuple)) else []
    known += [None] * len(codes)         # what is new has no predecessor
    new = [decode(code, before, build) for code, before in zip(codes, known)]
    if kind == "list" and isinstance(old, list):
        old[:] = new
        return old
    return {"list": list, "tuple": tuple, "set": set}[kind](new)


def decode_object(name, fields, old, build):
    """An object by the module and the name of its class, and its attributes."""
    if old is not None and [type(old).__module__, type(old).__qualname__] == name:
        if not isinstance(old, tuple):
            attributes = vars(old)
            for key, value in fields:
                attributes[key] = decode(value, attributes.get(key), build)
        return old
    if not build:
        raise ValueError(f"the answer holds an object of class {name}")
    module, place = name
    kind = operator.attrgetter(place)(importlib.import_module(module))
    values = {key: decode(value, None, True) for key, value in fields}
    if issubclass(kind, tuple):
        return kind(**values)
    new = kind.__new__(kind)
    vars(new).update(values)
    return new


# -- the student's process

def serve():
    """Answer calls until the grader is satisfied. Nothing of the submission is imported before the
    first call."""
    calls = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What a submission prints or reads goes nowhere.
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    torch.set_num_threads(1)
    sys.path.append("tests")             # where classes of the tests' own are found
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
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.grade", "--serve"],
            cwd=self.directory,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )

    def ask(self, line):
        """One line to the process, one back; "" if none comes in time."""
        # From here on the clock runs.
        self.ready = self.ready or self.process.stdout.readline()
        answers = queue.Queue()
        begun = time.monotonic()
        threading.Thread(target=self.talk, args=(line, answers), daemon=True).start()
        try:
            found = answers.get(timeout=max(0.0, self.left))
            if not found:
                self.over = "its process ended without an answer: does it exit, or crash?"
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
    path = os.path.join(directory, exercise.file)
    if not os.path.isfile(path):
        raise ValueError(f"{exercise.file} is missing")
    if os.path.getsize(path) > 2**20:
        raise ValueError(f"{exercise.file} is larger than a megabyte")
    with open(path, encoding="utf-8", errors="surrogateescape") as f:
        lines = f.read().split("\n")
    first, stop = between(lines, exercise.number)
    own = read(HOME, exercise.file).split("\n")
    start, end = between(own, exercise.number)
    text = "\n".join(own[:start] + lines[first:stop] + own[end:])
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"what stands there is not UTF-8; save {exercise.file} as UTF-8"
        raise ValueError(message) from None
    return text


class Report:
    """A pytest plugin: per exercise the number of tests, of passed tests, and the first failure's
    message."""

    def __init__(self, pupils):
        self.pupils = pupils
        self.tests = {}
        self.passed = {}
        self.messages = {}

    @staticmethod
    def number(name):
        return int(re.search(r"::test_ex(\d+)_", name)[1])

    def pytest_collection_modifyitems(self, items):
        for item in items:
            n = self.number(item.nodeid)
            self.tests[n] = self.tests.get(n, 0) + 1

    def pytest_runtest_logreport(self, report):
        n = self.number(report.nodeid)
        if report.when == "call" and report.passed:
            self.passed[n] = self.passed.get(n, 0) + 1
        elif not report.passed:
            name = report.nodeid.split("::")[1]
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else report.longreprtext
            self.messages.setdefault(n, f"{name}: {message}"[:1500])

    def pytest_runtest_logfinish(self, nodeid):
        # Tests come in the order of the exercises: earlier ones are over.
        for n, pupil in self.pupils.items():
            if n < self.number(nodeid):
                pupil.stop()


def own_files():
    """{file: text} of what a student's process needs beside the submission."""
    tools = ("grade.py", "make_assignment.py", "test_exercises.py")
    files = [*FILES, *folder("interop"), *(f"tests/{name}" for name in tools)]
    return {file: read(HOME, file) for file in files}


def hire(exercises, directory, limit):
    """-> ({number: Pupil}, {number: why there is none}); in the project's modules here, the
    exercises' functions are replaced by calls of the submission's."""
    own = own_files()
    pupils, said = {}, {}
    for exercise in exercises:
        try:
            text = submitted(directory, exercise)
        except ValueError as problem:
            said[exercise.number] = str(problem)
            continue
        pupil = Pupil(exercise, own | {exercise.file: text}, limit)
        pupils[exercise.number] = pupil
        for name in exercise.functions:
            replace_function(exercise, name, pupil)
    numbers = list(pupils)
    for n, following in zip(numbers, numbers[1:]):
        pupils[n].following = pupils[following]
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


def grade(exercises, directory, limit, seed):
    """-> ({number: points}, {number: what to say})"""
    pupils, said = hire(exercises, directory, limit)
    report = Report(pupils)
    if pupils:
        os.environ["EXERCISE_SEED"] = str(seed)
        tests = os.path.join(HOME, "tests", "test_exercises.py")
        graded = " or ".join(f"ex{n}" for n in pupils)
        options = ["-p", "no:terminal", "-p", "no:cacheprovider"]
        pytest.main([tests, "-k", graded, *options], plugins=[report])
    for pupil in pupils.values():
        pupil.stop()
    points = {}
    for exercise in exercises:
        n = exercise.number
        tests = report.tests.get(n, 0)
        right = tests > 0 and report.passed.get(n, 0) == tests
        points[n] = exercise.points if right else 0
        said.setdefault(n, report.messages.get(n, "" if right else "its tests did not run"))
    return points, said


def write_results(path, exercises, points, said, seed):
    """The results as Gradescope reads them."""
    tests = []
    for exercise in exercises:
        n = exercise.number
        tests.append({
            "name": exercise.title,
            "number": str(n),
            "score": points[n],
            "max_score": exercise.points,
            "output": said[n],
            "status": "passed" if points[n] else "failed",
        })
    score = sum(points.values())
    write_json(path, {"score": score, "extra_data": {"seed": seed}, "tests": tests})


def show(exercises, points, said, seed):
    """Print the points of each exercise, what its tests say, and the sum."""
    for exercise in exercises:
        n = exercise.number
        print(f"{points[n]:2d} / {exercise.points}   exercise {n:2d}: {exercise.title}")
        for line in said[n].splitlines():
            print(f"         {line}")
    most = sum(exercise.points for exercise in exercises)
    print(f"{sum(points.values()):2d} / {most}   (seed {seed})")


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
    nothing = {exercise.number: 0 for exercise in exercises}
    ended = dict.fromkeys(nothing, "the grader was ended while it ran this submission")
    write_results(args.out, exercises, nothing, ended, seed)
    points, said = grade(exercises, args.directory, args.limit, seed)
    show(exercises, points, said, seed)
    write_results(args.out, exercises, points, said, seed)


if __name__ == "__main__":
    run_command(main)
