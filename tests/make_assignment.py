"""Write the students' copy of this project: python -m tests.make_assignment OUT

An exercise is one function of the seven files, or a few that belong together, between two comment
lines:

    # --- exercise 3: mah_dpo_loss (3 points) ---
    # --- end of exercise 3 ---

In the copy every body there is a `raise NotImplementedError("exercise 3: ...")`; signatures and
docstrings (what, shapes, equation) stay. The instructor's tools stay behind: they hold the
answers, or lead to them.
"""
import argparse
import ast
import os
import re
import shutil
from dataclasses import dataclass

from data import InputError, run_command

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = (
    "data.py",
    "model.py",
    "prm.py",
    "mah_dpo.py",
    "decode.py",
    "evaluate.py",
    "train.py",
)
BESIDE = ("README.md", "pareto.svg", "requirements.txt", "LICENSE", ".gitignore")
FOLDERS = ("interop", "experiments", "docs", "tests")
TOOLS = ("make_assignment.py", "grade.py", "mutants.py", "test_course.py")

# A comment line before or after an exercise: (end of)? number, and before it: title, points.
FENCE = re.compile(
    r"\s*# --- (end of )?exercise ([0-9]{1,3})(?:: (.+) \(([0-9]{1,3}) points?\))? ---\s*"
)


@dataclass
class Exercise:
    number: int
    title: str
    points: int
    file: str
    functions: list          # "mah_dpo_loss", "KVCache.keep"


# -- where an exercise stands

def fences(lines):
    """-> [(index of the line, its match with FENCE)] of all comment lines of exercises."""
    found = []
    for i, line in enumerate(lines):
        match = FENCE.fullmatch(line)
        if match:
            found.append((i, match))
    return found


def between(lines, number):
    """-> (first, stop): lines[first:stop] stand between the exercise's fences.

    ValueError says what is wrong with them."""
    marks = fences(lines)
    mine = [(i, match) for i, match in marks if int(match[2]) == number]
    kinds = ["the end" if match[1] else "the start" for _, match in mine]
    if kinds != ["the start", "the end"]:
        raise ValueError(
            f"the comment lines before and after exercise {number} must stand there once each, "
            f"in this order; found {', '.join(kinds) or 'none'}"
        )
    first = mine[0][0] + 1
    stop = mine[1][0]
    for i, _ in marks:
        if first <= i < stop:
            raise ValueError(f"another exercise's comment line stands inside exercise {number}")
    return first, stop


def functions_of(text, first, stop):
    """-> [(name, node of the syntax tree)] of the functions and methods that start in
    lines[first:stop] of a file's text."""
    tree = ast.parse(text)
    places = [("", tree)]
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            places.append((f"{node.name}.", node))
    found = []
    for prefix, place in places:
        for node in place.body:
            if isinstance(node, ast.FunctionDef) and first < node.lineno <= stop:
                found.append((prefix + node.name, node))
    return found


def read_exercises(home=HOME):
    """The exercises of the seven files in the order of their numbers.

    ValueError for a fence without its partner, a function without a docstring, a number that
    stands twice."""
    found = []
    for file in FILES:
        found += exercises_of(file, read(home, file))
    found.sort(key=lambda exercise: exercise.number)
    numbers = [exercise.number for exercise in found]
    if numbers != list(range(1, len(found) + 1)):
        raise ValueError(f"exercises must be numbered from 1, not {numbers}")
    return found


def exercises_of(file, text):
    """The exercises of one file, in the order in which they stand there."""
    found = []
    lines = text.split("\n")
    for _, match in fences(lines):
        number = int(match[2])
        functions = functions_of(text, *between(lines, number))
        if not functions:
            raise ValueError(f"{file}: exercise {number} needs a function")
        for name, node in functions:
            if not ast.get_docstring(node) or len(node.body) < 2:
                raise ValueError(f"{file}: {name} needs a docstring and a body")
        if match[3]:
            names = [name for name, _ in functions]
            found.append(Exercise(number, match[3], int(match[4]), file, names))
    return found


# -- files

def read(home, file):
    with open(os.path.join(home, file), encoding="utf-8") as f:
        return f.read()


def write(directory, texts):
    """{file: text} -> files of a directory."""
    for file, text in texts.items():
        path = os.path.join(directory, file)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)


def folder(name):
    """The files of a folder: programs, texts and pictures, in alphabetical order."""
    names = sorted(os.listdir(os.path.join(HOME, name)))
    return [f"{name}/{n}" for n in names if n.endswith((".py", ".md", ".svg"))]


def copied_files():
    """What students get: the seven files and those beside them, without the instructor's tools."""
    files = [*FILES, *BESIDE]
    for name in FOLDERS:
        files += folder(name)
    tools = [f"tests/{name}" for name in TOOLS]
    return [f for f in files if f not in tools and os.path.exists(os.path.join(HOME, f))]


# -- the copy

def left_out(text, exercises):
    """A file's text -> the text that students get: the exercises' bodies replaced."""
    lines = text.split("\n")
    bodies = []
    for exercise in exercises:
        first, stop = between(lines, exercise.number)
        for name, node in functions_of(text, first, stop):
            bodies.append((node, name, exercise))
    # From below, so that the line numbers of what is left stay true.
    bodies.sort(key=lambda body: -body[0].lineno)
    for node, name, exercise in bodies:
        docstring = node.body[0]
        message = (
            f"exercise {exercise.number}: write {name}, "
            f"between its two comment lines in {exercise.file}"
        )
        indent = " " * docstring.col_offset
        raised = f'{indent}raise NotImplementedError("{message}")'
        lines[docstring.end_lineno:node.end_lineno] = [raised]
    return "\n".join(lines)


def unsolved():
    """{file: text} of the seven files with all exercises left out."""
    exercises = read_exercises()
    texts = {}
    for file in FILES:
        own = [exercise for exercise in exercises if exercise.file == file]
        texts[file] = left_out(read(HOME, file), own)
    return texts


def make_assignment(out, change=None):
    """Write the copy to a new directory `out`.

    change: {file: text} instead of the files with their exercises left out."""
    if os.path.exists(out):
        raise InputError(f"{out} exists; name a new directory")
    texts = {file: read(HOME, file) for file in copied_files()}
    texts |= unsolved() if change is None else change
    # Written beside its place and then renamed: there is never half a copy under its name.
    new = out.rstrip("/\\") + ".tmp"
    shutil.rmtree(new, ignore_errors=True)
    write(new, texts)
    os.replace(new, out)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", help="a new directory for the students' copy")
    args = parser.parse_args(argv)
    make_assignment(args.out)
    exercises = read_exercises()
    points = sum(exercise.points for exercise in exercises)
    print(
        f"{args.out}: {len(exercises)} exercises, {points} points; "
        "start there with pytest -k ex1"
    )


if __name__ == "__main__":
    run_command(main)
