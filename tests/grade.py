"""Grade a submission: python -m tests.grade DIR [--out results.json]

From DIR nothing is taken but what stands between an exercise's two comment lines (see make_assignment.py). It runs in a process
of its own, one per exercise, on a fresh copy of this project's files. The exercise's tests run here, in a process that no line
of the submission enters: calls of the exercise's functions go to the student's process as JSON, and so do their results come
back. A submission may hang, exit, print, patch pytest or rewrite the tests: all that it can do to its mark is to answer rightly
or not. An exercise counts if all its tests pass; they draw other random numbers than the tests that were handed out.

The results are written as Gradescope reads them. What this does not do is hide files: run it where a submission cannot read or
write this project's own (a container, another user).
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
from tests.make_assignment import FILES, HOME, between, read, read_exercises, write

LARGEST = 2**26          # bytes of one answer


# -- values as JSON

def encode(value):
    """Numbers, text, tensors, containers, and objects as their class and attributes -> JSON."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "grad": value.requires_grad,
                "data": base64.b64encode(data).decode()}
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if type(value) in (list, tuple, set):
        return {type(value).__name__: [encode(v) for v in value]}
    fields = value._asdict() if isinstance(value, tuple) else vars(value)
    return {"object": [type(value).__module__, type(value).__qualname__], "fields": [[k, encode(v)] for k, v in fields.items()]}


def decode(code, old=None, build=False):
    """JSON -> value. Lists, dicts and objects that `old` is already are changed in place, so that what a function does to its
    arguments is seen here. Other objects are made only with `build`, on the student's side: nothing from there picks a class."""
    if not isinstance(code, dict):
        return code
    kind, content = next(iter(code.items()))
    if kind == "tensor":
        data, dtype = bytearray(base64.b64decode(code["data"])), getattr(torch, content)
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.view(code["shape"]).requires_grad_(code["grad"])
    if kind in ("dtype", "device"):
        return getattr(torch, content) if kind == "dtype" else torch.device(content)
    if kind == "slice":
        return slice(*content)
    if kind == "object":
        return decode_object(content, code["fields"], old, build)
    if kind == "dict":
        known = old if isinstance(old, dict) else {}
        pairs = [(decode(k), v) for k, v in content]
        new = {k: decode(v, known.get(k), build) for k, v in pairs}
        if isinstance(old, dict):
            old.clear()
            old.update(new)
        return old if isinstance(old, dict) else new
    known = list(old) if isinstance(old, (list, tuple)) else []
    new = [decode(c, known[i] if i < len(known) else None, build) for i, c in enumerate(content)]
    if kind == "list" and isinstance(old, list):
        old[:] = new
        return old
    return {"list": list, "tuple": tuple, "set": set}[kind](new)


def decode_object(name, fields, old, build):
    if old is not None and [type(old).__module__, type(old).__qualname__] == name:
        for k, v in fields if not isinstance(old, tuple) else ():
            vars(old)[k] = decode(v, vars(old).get(k), build)
        return old
    if not build:
        raise ValueError(f"the answer holds an object of class {name}")
    kind, values = operator.attrgetter(name[1])(importlib.import_module(name[0])), {k: decode(v, None, True) for k, v in fields}
    if issubclass(kind, tuple):
        return kind(**values)
    new = kind.__new__(kind)
    vars(new).update(values)
    return new


# -- the student's process

def serve():
    """Answer calls until the grader is satisfied. Nothing of the submission is imported before the first call."""
    calls, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)                  # what a submission prints or reads goes nowhere
    torch.set_num_threads(1)
    sys.path.append("tests")             # where classes of the tests' own are found
    print(json.dumps("ready"), file=answers, flush=True)
    for line in calls:
        try:
            module, name, args, kwargs = decode(json.loads(line), build=True)
            function = operator.attrgetter(name)(importlib.import_module(module))
            answer = {"result": encode(function(*args, **kwargs)), "args": encode(args)}
        except BaseException as e:       # SystemExit too is an answer
            answer = {"error": type(e).__name__, "message": str(e)[:2000]}
        print(json.dumps(answer), file=answers, flush=True)


class Pupil:
    """The process that runs one exercise of a submission, with `limit` seconds for all its calls. The first call starts it, and
    the following one's: importing torch takes longer than most exercises."""

    def __init__(self, exercise, texts, limit):
        self.exercise, self.texts, self.left, self.following = exercise, texts, limit, None
        self.process, self.ready, self.over = None, False, None

    def start(self):
        if self.process is not None:
            return
        self.directory = tempfile.mkdtemp()
        write(self.directory, self.texts)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.grade", "--serve"], cwd=self.directory, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")

    def ask(self, line):
        """One line to the process, one back; "" if none comes in time."""
        answers, self.ready = queue.Queue(), self.ready or self.process.stdout.readline()      # from here on the clock runs

        def talk():
            try:
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()
                answers.put(self.process.stdout.readline(LARGEST))
            except (OSError, ValueError):
                answers.put("")
        begun = time.monotonic()
        threading.Thread(target=talk, daemon=True).start()
        try:
            answer = answers.get(timeout=max(0.0, self.left))
        except queue.Empty:
            self.over, answer = "it did not answer in time: does it wait for something, or run for ever?", ""
        self.left -= time.monotonic() - begun
        self.over = self.over or (None if answer else "its process ended without an answer: does it exit, or crash?")
        return answer

    def call(self, name, args, kwargs):
        self.start()
        if self.following:
            self.following.start()
        module = self.exercise.file.removesuffix(".py")
        answer = "" if self.over else self.ask(json.dumps(encode([module, name, list(args), kwargs])))
        if not answer:
            self.stop()
            raise RuntimeError(self.over)
        answer = json.loads(answer)
        if "error" in answer:
            kind = {"ValueError": ValueError, "InputError": InputError}.get(answer["error"], RuntimeError)
            raise kind(answer["message"] if kind is not RuntimeError else f"{answer['error']}: {answer['message']}")
        decode(answer["args"], list(args))
        return decode(answer["result"])

    def stop(self):
        if self.process is not None and self.process.returncode is None:
            if hasattr(os, "killpg"):    # with whatever the submission started
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
            shutil.rmtree(self.directory, ignore_errors=True)


# -- the grader's process

def submitted(directory, exercise):
    """The exercise's file as it is here, but for the submission's lines between the fences. ValueError if there are none."""
    path = os.path.join(directory, exercise.file)
    if not os.path.isfile(path):
        raise ValueError(f"{exercise.file} is missing")
    if os.path.getsize(path) > 2**20:
        raise ValueError(f"{exercise.file} is larger than a megabyte")
    with open(path, encoding="utf-8", errors="surrogateescape") as f:
        lines = f.read().split("\n")
    first, stop = between(lines, exercise.number)
    own = read(HOME, exercise.file).split("\n")
    a, b = between(own, exercise.number)
    text = "\n".join(own[:a] + lines[first:stop] + own[b:])
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"what stands there is not UTF-8; save {exercise.file} as UTF-8") from None
    return text


class Report:
    """A pytest plugin: per exercise the number of tests, of passed tests, and the first failure's message."""

    def __init__(self, pupils):
        self.pupils, self.tests, self.passed, self.messages = pupils, {}, {}, {}

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
            crash = getattr(report.longrepr, "reprcrash", None)
            name = report.nodeid.split("::")[1]
            self.messages.setdefault(n, f"{name}: {crash.message if crash else report.longreprtext}"[:1500])

    def pytest_runtest_logfinish(self, nodeid):
        for n, pupil in self.pupils.items():
            if n < self.number(nodeid):
                pupil.stop()             # tests come in the order of the exercises


def grade(exercises, directory, limit, seed):
    """-> ({number: points}, {number: what to say})"""
    pupils, said = {}, {}
    files = [*FILES, *(os.path.join("tests", n) for n in ("grade.py", "make_assignment.py", "test_exercises.py"))]
    own = {file: read(HOME, file) for file in files}
    for e in exercises:
        try:
            pupils[e.number] = Pupil(e, own | {e.file: submitted(directory, e)}, limit)
        except ValueError as problem:
            said[e.number] = str(problem)
            continue
        module = importlib.import_module(e.file.removesuffix(".py"))
        for name in e.functions:
            *place, last = name.split(".")
            setattr(operator.attrgetter(place[0])(module) if place else module, last, proxy(pupils[e.number], name))
    for n in pupils:
        pupils[n].following = next((pupils[m] for m in pupils if m > n), None)
    os.environ["EXERCISE_SEED"] = str(seed)
    report, graded = Report(pupils), " or ".join(f"ex{n}" for n in pupils)
    if pupils:
        tests = os.path.join(HOME, "tests", "test_exercises.py")
        pytest.main([tests, "-k", graded, "-p", "no:terminal", "-p", "no:cacheprovider"], plugins=[report])
    for pupil in pupils.values():
        pupil.stop()
    points = {}
    for e in exercises:
        right = 0 < report.tests.get(e.number, 0) == report.passed.get(e.number, 0)
        points[e.number] = e.points if right else 0
        said.setdefault(e.number, report.messages.get(e.number, "" if right else "its tests did not run"))
    return points, said


def proxy(pupil, name):
    """What stands for an exercise's function while its tests run."""
    return lambda *args, **kwargs: pupil.call(name, args, kwargs)


def write_results(path, exercises, points, said, seed):
    """The results as Gradescope reads them."""
    write_json(path, {"score": sum(points.values()), "extra_data": {"seed": seed}, "tests": [
        {"name": e.title, "number": str(e.number), "score": points[e.number], "max_score": e.points, "output": said[e.number],
         "status": "passed" if points[e.number] else "failed"} for e in exercises]})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", help="a submission: the seven files, or some of them")
    parser.add_argument("--out", default="results.json", help="where the results go (default results.json)")
    parser.add_argument("--limit", type=float, default=60, help="seconds that one exercise may run (default 60)")
    parser.add_argument("--seed", type=int, default=None, help="of the tests' random numbers (default: another one each time)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        return serve()
    if args.directory is None or not os.path.isdir(args.directory):
        raise InputError(f"{args.directory}: no such directory; give that of a submission")
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    exercises = read_exercises()          # a submission that kills the grader is left with these results
    write_results(args.out, exercises, {e.number: 0 for e in exercises},
                  {e.number: "the grader was ended while it ran this submission" for e in exercises}, seed)
    points, said = grade(exercises, args.directory, args.limit, seed)
    for e in exercises:
        line = f"{points[e.number]:2d} / {e.points}   exercise {e.number:2d}: {e.title}"
        print(line + ("\n" + "\n".join(f"         {text}" for text in said[e.number].splitlines()) if said[e.number] else ""))
    total = sum(points.values())
    print(f"{total:2d} / {sum(e.points for e in exercises)}   (seed {seed})")
    write_results(args.out, exercises, points, said, seed)


if __name__ == "__main__":
    run_command(main)
