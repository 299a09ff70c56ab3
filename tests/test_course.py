"""The course's tools: fences, the students' copy, the grader, planted bugs, and its handout.

Every docstring states the bug that its test prevents.
"""
import ast
import itertools
import math
import os
import re
import subprocess
import sys
from statistics import NormalDist
from xml.etree import ElementTree

import pytest
import torch

from data import DOMAINS, JUDGE_NOISE, SPLITS, InputError, Problem, believed, operations, read_json
from data import right as truth_of
from evaluate import half_width, summary
from mah_dpo import dpo_loss, modpo_loss, pair_metrics
from model import GPT, GPTConfig
from prm import hindsight_targets, majority_labels, matching_steps
from tests.grade import Pupil, own_files, submitted
from tests.grade import main as grade_main
from tests.make_assignment import (FILES, HOME, TOOLS, Exercise, between, copied_files, folder,
                                   left_out, make_assignment, read, read_exercises, write)
from tests.make_assignment import main as make_assignment_main
from tests.mutants import MUTANTS, TABLE, mutated
from tests.mutants import main as mutants_main

EXERCISES = read_exercises()
PROGRAM = [*FILES, *folder("interop")]
NUMBERS = range(1, len(EXERCISES) + 1)
POINTS = {exercise.number: exercise.points for exercise in EXERCISES}


def run(*argv, cwd=HOME):
    """A Python command's output; its environment asks for no extra pytest options."""
    env = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, *argv], cwd=cwd, env=env, encoding="utf-8",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


# -- the students' copy

def test_exercises_are_fenced():
    """A fence that lost its partner in an edit: the students' copy would hold the answer. An
    exercise whose tests draw nothing: a table of what they expect gets its points."""
    assert 12 <= len(EXERCISES) <= 17
    assert [exercise.number for exercise in EXERCISES] == list(NUMBERS)
    third = EXERCISES[2]
    assert (third.title, third.points, third.file) == ("mah_dpo_loss", 3, "mah_dpo.py")
    tests = read(HOME, "tests/test_exercises.py")
    for exercise in EXERCISES:
        own = re.findall(rf"^def test_ex{exercise.number}_", tests, re.M)
        assert own, f"exercise {exercise.number} has no tests of its own"
        drawn = rf"^def test_ex{exercise.number}_\w+\(.*\b(rng|three_heads)\b"
        assert re.search(drawn, tests, re.M), f"a table solves exercise {exercise.number}"
        assert exercise.points > 0
        assert exercise.functions[-1].split(".")[-1] in exercise.title
    # A number selects its own exercise alone (that ex1 is not ex10, the grader's test below shows).
    named = [f for f in folder("tests") if re.search("def test_.*ex[0-9]+_", read(HOME, f))]
    assert named == ["tests/test_exercises.py"]


START, END = "# --- exercise 2: f (1 point) ---", "    # --- end of exercise 2 ---"
FENCED = ["x", START, "def f():", "    pass", END, "y"]


@pytest.mark.parametrize("lines, message", [
    ([*FENCED, END], "once each"),
    ([START, *FENCED], "once each"),
    ([START, "# --- exercise 9: other (1 point) ---", END], "inside exercise 2"),
    (FENCED[:4], "once each"),
    (FENCED[2:], "once each"),
    ([END, "def f():", START], "once each"),
    ([], "once each")])
def test_between_refuses_other_fences(lines, message):
    """A body taken from the wrong place of a submission, or from another exercise; the rest of the
    file, or nothing, taken for an answer."""
    assert between(FENCED, 2) == (2, 4)
    with pytest.raises(ValueError, match=message):
        between(lines, 2)


ANSWER = """\
        # the answer is 3
        def g():
            return 1
        return 3
"""
SOLVED = f'''\
import os


class C:
    # --- exercise 1: C.f (2 points) ---
    def f(self, x,
          y=1):  # (B,)
        """What.

        More."""
{ANSWER}
    def h(self):
        "One line."
        return 4
    # --- end of exercise 1 ---

    def other(self):
        return 5
'''


def test_left_out_keeps_what_is_not_the_answer():
    """A copy without the docstring that states the task, with a comment that holds the answer, or
    with broken code around it."""
    found = left_out(SOLVED, [Exercise(1, "C.f", 2, "c.py", ["C.f", "C.h"])])
    raised = ('        raise NotImplementedError("exercise 1: write C.{}, between its two comment '
              'lines in c.py")\n')
    expected = SOLVED.replace(ANSWER, raised.format("f"))
    assert found == expected.replace("        return 4\n", raised.format("h"))
    space = {}
    exec(found, space)
    assert space["C"]().other() == 5
    with pytest.raises(NotImplementedError, match="exercise 1: write C.h"):
        space["C"]().h()


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("course") / "copy")
    make_assignment_main([out])
    return out


def test_the_copy_asks_for_every_exercise(handed_out):
    """An exercise whose tests pass, or fail for another exercise's sake, before it is solved; other
    tests that fail with it."""
    names = ("exercises", "data", "tokenizer", "vocabulary", "prm", "mah_dpo")
    files = [f"tests/test_{name}.py" for name in names]
    report = os.path.join(handed_out, "report.xml")
    options = ["-q", "--tb=native", "-p", "no:cacheprovider", f"--junitxml={report}",
               "-k", "not million and not quick"]              # two slow ones
    printed = run("-m", "pytest", *options, *files, cwd=handed_out)
    passed = []
    for case in ElementTree.parse(report).iter("testcase"):
        name, problems = case.get("name"), [p for p in case if p.tag in ("failure", "error")]
        own = re.match("test_ex([0-9]+)_", name)
        if not problems:
            assert not own, f"{name} passes before anything is solved"
            passed.append(name)
            continue
        # Its own exercise is asked for, and nothing before it.
        said = problems[0].get("message") if own else problems[0].text
        asked = f"NotImplementedError: exercise {own[1] if own else '[0-9]+'}: write "
        assert (re.match if own else re.search)(asked, said), (name, said)
    assert len(passed) > 140, printed[-2000:]


def test_pasting_the_reference_back_restores_the_files(handed_out):
    """A copy in which something is missing beside the bodies: solved, it would still fail."""
    for file in FILES:
        lines = read(handed_out, file).split("\n")
        own = read(HOME, file).split("\n")
        for exercise in EXERCISES:
            if exercise.file == file:
                first, stop = between(lines, exercise.number)
                start, end = between(own, exercise.number)
                lines[first:stop] = own[start:end]
        assert lines == own


def test_the_copy_is_whole_and_holds_no_answers(handed_out):
    """A copy without the door to other files, the handout or its pictures; with a tool that holds
    or shows answers."""
    for name in TOOLS:
        assert not os.path.exists(os.path.join(handed_out, name))
    for file in ("interop/__init__.py", "docs/course.md", "docs/method.svg", "pareto.svg"):
        assert read(handed_out, file) == read(HOME, file)
    assert read(handed_out, "README.md").startswith("*This is the students' copy: ")
    assert any(file.startswith("experiments/") for file in copied_files())


# -- the grader

def submission(directory, edits):
    """A directory with the seven files; what stands between the fences of exercise n is replaced by
    edits[n]: text, or a function of the reference's."""
    make_assignment(str(directory), {})
    for n, edit in edits.items():
        path = os.path.join(directory, EXERCISES[n - 1].file)
        with open(path, encoding="utf-8", errors="surrogateescape") as f:
            lines = f.read().split("\n")
        first, stop = between(lines, n)
        text = edit if isinstance(edit, str) else edit("\n".join(lines[first:stop]))
        lines[first:stop] = text.split("\n")
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as f:
            f.write("\n".join(lines))
    return str(directory)


def test_submitted_takes_what_stands_between_the_fences(tmp_path):
    """A fault in one exercise that costs others of the same file; an edit elsewhere that counts;
    bytes that are no UTF-8; a package that the grader's machine happens to have, also by a call;
    a mistake whose line is told as of another file."""
    directory = submission(tmp_path / "s", {
        2: "def dpo_loss(): return '\udcff'",
        3: "# --- exercise 4: modpo_loss (2 points) ---",
        5: "x = 1\nreturn x",
        6: "def (",
        7: "from torch import nn\nimport math, requests.api",
        11: "import importlib\n__import__('requests')",
        13: "    def fold(self, weights):\n        return 3",
    })
    with open(os.path.join(directory, "prm.py"), "a", encoding="utf-8") as f:
        f.write("\nraise SystemExit\n")
    write(directory, {"evaluate.py": "\0".join(read(HOME, "evaluate.py"))})      # as in UTF-16
    os.remove(os.path.join(directory, "decode.py"))
    if hasattr(os, "mkfifo"):            # reading it would wait for ever
        os.mkfifo(os.path.join(directory, "decode.py"))
    problems = {}
    for exercise in EXERCISES:
        try:
            text = submitted(directory, exercise)
            changed = text != read(HOME, exercise.file)
            assert changed == (exercise.number == 13)
        except ValueError as problem:
            problems[exercise.number] = str(problem)
    assert "not UTF-8" in problems.pop(2)
    assert "inside exercise 3" in problems.pop(3)
    assert "once each" in problems.pop(4)
    assert "outside function, in line 2 of the exercise, 'return x'" in problems.pop(5)
    assert "no Python" in problems[6] and "in line 1 of the exercise, 'def ('" in problems.pop(6)
    assert "it imports requests;" in problems.pop(7)
    assert "it imports __import__, importlib;" in problems.pop(11)
    assert "saved as UTF-8?" in problems.pop(15)
    assert problems == {10: "decode.py is missing", 12: "decode.py is missing"}


PATCHED = """\
import torch, builtins, sys
pytest = sys.modules['pytest']
pytest.fail = lambda *a, **k: None
torch.allclose = lambda *a, **k: True
sys.modules['test_exercises'] = pytest
def mah_dpo_loss(*a): return torch.tensor(0.0), {}
def balanced_mean(*a): return torch.tensor(0.0)"""


def again(n):
    """An answer that is not marked, and so costs no time: a fence stands there twice."""
    return f"# --- exercise {n}: again (1 point) ---"


def after(action):
    """The right answer, which does something else first."""
    def edit(reference):
        head, docstring, body = reference.split('"""', 2)
        first = len(head.split("\n")[-1])
        return f'{head}"""{docstring}"""\n{" " * first}{action}{body}'
    return edit


def test_a_submission_costs_its_own_exercise_only(tmp_path):
    """A grader that a submission ends, silences or persuades: by leaving, by patching pytest and
    torch, by tests of its own. `-k ex1` that runs ex10 to ex15 too would give their points."""
    edits = {
        1: after('print("hello" * 9999)'),
        2: "import os\nos._exit(0)",
        3: PATCHED,
        4: "import sys\nsys.exit(0)",
    }
    unmarked = {n: again(n) for n in (5, 6, 7, *range(9, len(EXERCISES) + 1))}
    directory = submission(tmp_path / "s", edits | unmarked)
    names = ("tests/conftest.py", "tests/test_exercises.py")
    write(directory, dict.fromkeys(names, "raise SystemExit\n"))
    out = str(tmp_path / "results.json")
    printed = run("-m", "tests.grade", directory, "--out", out, "--seed", "5")
    results = read_json(out)
    scores = {int(test["number"]): test["score"] for test in results["tests"]}
    expected = dict.fromkeys(NUMBERS, 0) | {1: POINTS[1], 8: POINTS[8]}
    assert scores == expected, printed
    assert results["score"] == POINTS[1] + POINTS[8]
    said = {int(test["number"]): test["output"] for test in results["tests"]}
    for n, why in {2: "ended without an answer", 3: "balanced_mean is 0.0, expected",
                   4: "SystemExit", 9: "once each"}.items():
        assert why in said[n]
    assert "hello" not in printed
    assert " 3 / 3   exercise  1: response_logps" in printed
    fields = {"name", "number", "score", "max_score", "output", "status"}
    assert set(results["tests"][0]) == fields


def doing(action):
    """The right answer, which does something else first and hides that it failed."""
    def edit(reference):
        head, docstring, body = reference.split('"""', 2)
        wrapped = f"\n    try:\n        {action}\n    except Exception:\n        pass"
        return f'{head}"""{docstring}"""{wrapped}{body}'
    return edit


def test_a_submission_stays_within_its_exercise(tmp_path):
    """Files that are written, a network that is used, programs that are started or read: answers
    could be copied, and results sent away, also past Python and where the error is swallowed. A
    million printed lines that fill the grader's memory."""
    edits = {
        1: doing("torch.save({}, 'notes.pt')"),
        2: doing("open('notes.txt', 'w')"),
        4: doing("import ctypes; ctypes.CDLL(None).system(b'true')"),
        5: doing("import socket; socket.socket().sendto(b'1', ('127.0.0.1', 9))"),
        6: doing("import subprocess; subprocess.run('true')"),
        7: doing("print('line\\n' * 1_000_000)"),
        10: doing("import os; os.symlink('a', 'b')"),
        15: doing(f"open({str(tmp_path / 'solution.py')!r}).read()"),
    }
    write(str(tmp_path), {"solution.py": "def hypervolume(points): return 1.0"})
    unmarked = {n: again(n) for n in NUMBERS if n not in edits}
    directory = submission(tmp_path / "s", edits | unmarked)
    out = str(tmp_path / "results.json")
    printed = run("-m", "tests.grade", directory, "--out", out)
    rows = {int(test["number"]): test for test in read_json(out)["tests"]}
    for n, why in {1: "open to write", 2: "open to write ('notes.txt'", 4: "ctypes.dlopen",
                   5: "socket.", 6: "subprocess.Popen", 7: "it prints more than 500,000 bytes",
                   10: "os.symlink", 15: "solution.py"}.items():
        assert rows[n]["score"] == 0 and why in rows[n]["output"], printed
    assert len(printed) < 10_000


def test_a_submission_that_kills_the_grader_has_no_points(tmp_path):
    """A submission without results, which a course's platform takes for a fault of the grader."""
    edits = {n: again(n) for n in NUMBERS} | {1: "import os\nos.kill(os.getppid(), 9)"}
    directory = submission(tmp_path / "s", edits)
    out = str(tmp_path / "results.json")
    run("-m", "tests.grade", directory, "--out", out)
    results = read_json(out)
    assert results["score"] == 0
    said = {(test["score"], "was ended" in test["output"]) for test in results["tests"]}
    assert said == {(0, True)} and len(results["tests"]) == len(EXERCISES)


def test_a_submission_must_be_named(capsys):
    """A grader that answers a missing directory with "None: no such directory"."""
    with pytest.raises(SystemExit, match="2"):
        grade_main([])
    assert "which directory holds the submission?" in capsys.readouterr().err


def test_a_submission_that_hangs_is_stopped():
    """A grader that waits for ever."""
    second = EXERCISES[1]
    texts = own_files() | {second.file: "while True: pass"}
    pupil = Pupil(second, texts, limit=0.2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="did not answer in time"):
            pupil.call("dpo_loss", (), {})
    assert pupil.process.returncode is not None
    assert not os.path.exists(pupil.directory)


# -- planted bugs

def test_bugs_can_be_planted():
    """An edit of the code after which a bug cannot be planted any more (`--killers` runs all)."""
    assert len(MUTANTS) == TABLE.count("==>") >= 60
    assert set(FILES) <= {mutant.file for mutant in MUTANTS} <= set(PROGRAM)
    for mutant in MUTANTS:
        # Raises where the old text does not stand there exactly once.
        compile(mutated(mutant), mutant.file, "exec")
        assert mutant.hint.endswith(".")
        assert mutant.file not in mutant.hint


@pytest.mark.parametrize("n", [1, len(MUTANTS)])
def test_a_planted_bug_is_not_told(n, tmp_path, capsys):
    """A copy that says where its bug is, or has none, or several."""
    mutant = MUTANTS[n - 1]
    out = str(tmp_path / "copy")
    mutants_main(["--plant", str(n), out])
    differ = [file for file in PROGRAM if read(out, file) != read(HOME, file)]
    assert differ == [mutant.file]
    assert not os.path.exists(os.path.join(out, "tests", "mutants.py"))
    printed = capsys.readouterr().out
    assert mutant.hint in printed
    assert mutant.file not in printed


@pytest.mark.parametrize("argv", [
    ["0"],
    ["--plant", "0", "OUT"],
    ["--plant", "x", "OUT"],
    ["--plant", str(len(MUTANTS) + 1), "OUT"],
])
def test_a_number_without_a_bug(argv, tmp_path):
    """A traceback, or the last bug for number 0."""
    argv = [str(tmp_path / "out") if word == "OUT" else word for word in argv]
    with pytest.raises(InputError, match=f"numbers from 1 to {len(MUTANTS)}"):
        mutants_main(argv)


# -- the handout

def test_the_handout_hands_out_what_there_is():
    """A handout whose points, files or bugs are those of last year."""
    text = read(HOME, "docs/course.md")
    pattern = (
        r"^\| ([0-9]+) \| `(.*?)` \| (.*?) \| .* \| `pytest -k ex([0-9]+)` \| ([0-9]+) "
        r"\| [0-9]+ \|$"
    )
    rows = []
    for number, file, names, test, points in re.findall(pattern, text, re.M):
        functions = re.findall("`(.*?)`", names)
        rows.append((int(number), file, functions, int(test), int(points)))
    expected = [(e.number, e.file, e.functions, e.number, e.points) for e in EXERCISES]
    assert rows == expected
    assert f"they are {sum(POINTS.values())} points" in text
    assert f"There are {len(MUTANTS)};" in text
    # Bugs: each hint that the handout shows, with the number under which it is planted now.
    shown = re.findall(r"^\| ([0-9]+) \| ([^|`]*\.) \|$", text, re.M)
    hints = [mutant.hint for mutant in MUTANTS]
    assert shown == [(str(hints.index(hint) + 1), hint) for _, hint in shown]
    assert len(shown) >= 10
    # Symptoms: the bug of that number stands in the function that the row names.
    rows = re.findall(r"^\| .* \| `(\w+\.py)`, `(\w+)` \| ([0-9]+) \|$", text, re.M)
    found = [(*place_of(MUTANTS[int(n) - 1]), n) for _, _, n in rows]
    assert rows == found and len(rows) >= 15
    assert not {n for _, _, n in rows} & {n for n, _ in shown}, "a bug to be found is told"


def place_of(mutant):
    """The file of a bug, and the function at the top of it (or method of a class) that holds it."""
    text = read(HOME, mutant.file)
    line = text[:text.index(mutant.old)].count("\n") + 1
    tops = []
    for node in ast.parse(text).body:
        tops += node.body if isinstance(node, ast.ClassDef) else [node]
    return mutant.file, next(f.name for f in tops if f.lineno <= line <= f.end_lineno)


# -- written questions

def test_every_question_has_a_key_that_stays_behind(handed_out):
    """A question without an answer, points that do not add up, answers that are handed out."""
    text = read(HOME, "docs/written.md")
    key, experiments = read(HOME, "docs/key.md").split("\n## Experiments")
    questions = re.findall(r"^([0-9]+)\. \(([0-9]) points?\) ", text, re.M)
    answers = re.findall(r"^([0-9]+)\. .* \*.*[0-9].*\*$", key, re.M)
    numbers = [str(n) for n in range(1, len(questions) + 1)]
    assert [n for n, _ in questions] == answers == numbers and len(numbers) >= 20
    tasks = re.findall(r"^([0-9])\. \*\*", read(HOME, "docs/course.md"), re.M)
    assert re.findall(r"^([0-9])\. ", experiments, re.M) == tasks and len(tasks) >= 4
    total = sum(int(points) for _, points in questions)
    assert f", {total} points," in text and f", {total} points;" in read(HOME, "docs/course.md")
    assert os.path.exists(os.path.join(handed_out, "docs/written.md"))
    assert not os.path.exists(os.path.join(handed_out, "docs/key.md"))


def test_problem_sets_add_up():
    """An exercise in two sets or in none, a question likewise, points that are not those it has."""
    text = read(HOME, "docs/course.md")
    found = re.findall(r"^\| [1-5]\. .*? \| lecture [1-3] \|(.*)\| ([0-9]+) \|$", text, re.M)
    exercises, questions = [], []
    for parts, total in found:
        given = [int(points) for points in re.findall(r"\(([0-9]+)\)", parts)]
        assert sum(given) == int(total), parts
        first, second, _ = parts.split(" | ")
        own = [int(n) for n in re.sub(r"\(.*", "", first).split(",")]
        assert sum(POINTS[n] for n in own) == given[0], parts
        exercises += own
        asked = [int(n) for n in re.findall("[0-9]+", re.sub(r"\(.*", "", second))]
        questions += range(asked[0], asked[-1] + 1)
    assert sorted(exercises) == list(NUMBERS) and len(found) == 5
    points = re.findall(r"^[0-9]+\. \(([0-9]) ", read(HOME, "docs/written.md"), re.M)
    assert sorted(questions) == list(range(1, len(points) + 1))


def labels(r, z, gamma):
    """The labels of an answer of four steps that is its own only rollout."""
    n, z = torch.full((4, 1), 4), torch.full((4, 1), z)
    return [round(v, 3) for v in hindsight_targets(torch.tensor(r), n, z, gamma).tolist()]


def positive(M):
    """How often majority_labels says 1 if every verdict is a fair coin's."""
    verdicts = torch.tensor(list(itertools.product((0, 1), repeat=M)))
    return majority_labels(verdicts).mean().item()


def key_numbers(tokenizer):
    """{question: numbers that the code gives and the key must state}"""
    model = GPT(GPTConfig(tokenizer.n_vocab), torch.Generator().manual_seed(0))
    config, head = model.config, model.heads[0].weight.numel()
    one = sum(p.numel() for p in model.parameters())
    stranger = {"color": ("seen", "gold", "gold"), "size": ("none", "long", None),
                "home": ("heard", "hill", "cave"), "food": ("seen", "rice", "rice"),
                "job": ("heard", "baker", "baker")}
    said = "the color is gold . the home may be cave . the food is rice . the job is baker ."
    score = DOMAINS["values"].scores(Problem("", stranger), [], said)
    facts = {(value, op, b) for value in range(21) for op, b in operations(value)}
    wrong = sum(believed(*fact) != truth_of(*fact) for fact in facts)
    train = SPLITS.count("train") / len(SPLITS)
    normal, apart = NormalDist(), 0.1 / (JUDGE_NOISE * math.sqrt(2))
    kept = normal.cdf(-2 * apart)
    zero, delta = torch.zeros(2), torch.tensor([0.0, 20.0], requires_grad=True)
    dpo_loss(delta, zero, zero, zero, 0.1).sum().backward()
    moved = torch.tensor([2.0]), torch.tensor([-3.0]), torch.zeros(1), torch.zeros(1)
    pair = pair_metrics(dpo_loss(*moved, 0.1), *moved, torch.tensor([0]), 1, 0.1)
    modpo = modpo_loss(torch.tensor([2.0]), *[torch.zeros(1)] * 3, torch.tensor([0.05]), 1 / 3, 0.1)
    half = [half_width(summary([0.0, 1.0] * n)) for n in (100, 6)]
    return {
        1: [math.log(tokenizer.n_vocab), tokenizer.n_vocab],
        2: [one, one + 6 * head, one - head, math.ceil((one - head) / head)],
        3: [8 * config.n_layer * config.n_kv_head * config.head_dim],
        5: [5 * score["helpfulness"], 5 * score["honesty"], 5 * score["truthfulness"]],
        7: [wrong, len(facts), (1 - wrong / len(facts)) ** 4],
        8: [train, round(train ** 4, 2)],
        9: [*labels([1.0] * 4, 1.0, 0.9), *labels([1.0, 1.0, 0.0, 0.0], 0.0, 0.9)],
        10: [*labels([1.0] * 4, 1.0, 1.0), *labels([1.0] * 4, 1.0, 0.0)],
        11: [round(normal.cdf(-apart), 2), kept, kept / (kept + 0.5)],
        12: [positive(3), round(positive(4), 4)],
        13: [len(matching_steps("abc", "axyzu", [0, 1, 2], [0, 1, 2, 3, 4]))],
        16: [7 * math.log(2)],
        19: [pair["margin"].item(), pair["loss"].item(), pair["kl"].item()],
        20: [delta.grad[0].item(), round(delta.grad[1].item(), 4)],
        22: [modpo.item()],
        25: [math.log(5) - 4 / 5],
        26: half,
    }


def test_the_key_is_what_the_code_gives(tokenizer):
    """A key of last year's numbers: right answers are marked wrong."""
    answers = read(HOME, "docs/key.md").split("\n## Experiments")[0]
    key = dict(re.findall(r"^([0-9]+)\. (.*)$", answers, re.M))
    for question, numbers in key_numbers(tokenizer).items():
        for number in numbers:
            exact = round(number, 4 if question in (12, 20) else 3)
            text = re.sub(r"^(-?)0\.", r"\1.", f"{exact:,}")
            text = text.removesuffix(".0") if exact else "0"
            stated = re.search(rf"(?<![\w.]){re.escape(text)}0*(?!\d)", key[str(question)])
            assert stated, f"question {question}: {text}"


def test_links_of_the_documents_lead_somewhere():
    """A link or a picture whose file was renamed."""
    for name in ("README.md", *(f for f in copied_files() if f.startswith("docs/"))):
        if not name.endswith(".md"):
            continue
        place = os.path.join(HOME, os.path.dirname(name))
        for link in re.findall(r"\]\(([^)#]+)\)", read(HOME, name)):
            if not link.startswith("http"):
                assert os.path.exists(os.path.join(place, link)), f"{name}: {link}"
