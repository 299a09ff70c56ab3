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
FILES = [f"{name}.py" for name in "data model prm mah_dpo decode evaluate train".split()]
BESIDE = ["README.md", "pareto.svg", "requirements.txt", "LICENSE", ".gitignore"]
FOLDERS = ["interop", "experiments", "docs", "tests"]
TOOLS = [f"tests/{name}.py" for name in ("make_assignment", "grade", "mutants", "test_course")]
TOOLS += ["docs/key.md"]
# Above the copy's README.
NOTICE = """*This is the students' copy: `train.py` stops until all exercises are solved, and `tests.grade`,
`tests.mutants`, `tests.make_assignment` and `findings/` are not in it. Begin with docs/course.md.*

"""

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
    """-> {index of the line: its match with FENCE} of all comment lines of exercises."""
    matches = {i: FENCE.fullmatch(line) for i, line in enumerate(lines)}
    return {i: match for i, match in matches.items() if match}


def between(lines, number):
    """-> (first, stop): lines[first:stop] stand between the exercise's fences.

    ValueError says what is wrong with them."""
    marks = fences(lines)
    own = {i: match for i, match in marks.items() if int(match[2]) == number}
    kinds = ["the end" if match[1] else "the start" for match in own.values()]
    if kinds != ["the start", "the end"]:
        raise ValueError(
            f"the comment lines before and after exercise {number} must stand there once each, "
            f"in this order; found {', '.join(kinds) or 'none'}"
        )
    start, stop = own
    if any(start < i < stop for i in marks):
        raise ValueError(f"another exercise's comment line stands inside exercise {number}")
    return start + 1, stop


def functions_of(text, number):
    """-> {name: node of the syntax tree} of an exercise's functions and methods in a file."""
    first, stop = between(text.split("\n"), number)
    tree = ast.parse(text)
    places = {"": tree} | {f"{c.name}.": c for c in tree.body if isinstance(c, ast.ClassDef)}
    found = {}
    for prefix, place in places.items():
        for node in place.body:
            if isinstance(node, ast.FunctionDef) and first < node.lineno <= stop:
                found[prefix + node.name] = node
    return found


def read_exercises():
    """The exercises of the seven files in the order of their numbers.

    ValueError for a fence without its partner, a function without a docstring, a number that
    stands twice."""
    found = []
    for file in FILES:
        text = read(HOME, file)
        for match in fences(text.split("\n")).values():
            functions = functions_of(text, int(match[2]))
            bare = [f for f, n in functions.items() if not ast.get_docstring(n) or len(n.body) < 2]
            if bare or not functions:
                raise ValueError(f"{file}: exercise {match[2]} needs functions, each with a "
                                 f"docstring and a body: {bare}")
            if match[3]:
                about = int(match[2]), match[3], int(match[4])
                found.append(Exercise(*about, file, list(functions)))
    found.sort(key=lambda exercise: exercise.number)
    numbers = [exercise.number for exercise in found]
    if numbers != list(range(1, len(found) + 1)):
        raise ValueError(f"exercises must be numbered from 1, not {numbers}")
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
    files = sum(map(folder, FOLDERS), FILES + BESIDE)
    return [f for f in files if f not in TOOLS and os.path.exists(os.path.join(HOME, f))]


# -- the copy

def left_out(text, exercises):
    """A file's text -> the text that students get: the exercises' bodies replaced."""
    bodies = []
    for exercise in exercises:
        for name, node in functions_of(text, exercise.number).items():
            task = (f"exercise {exercise.number}: write {name}, between its two comment lines in "
                    f"{exercise.file}")
            bodies.append((node.body[0], node.end_lineno, task))
    lines = text.split("\n")
    # From below, so that the line numbers of what is left stay true.
    for docstring, end, task in sorted(bodies, key=lambda body: -body[1]):
        raised = " " * docstring.col_offset + f'raise NotImplementedError("{task}")'
        lines[docstring.end_lineno:end] = [raised]
    return "\n".join(lines)


def make_assignment(out, change=None):
    """Write the copy to a new directory `out`.

    change: {file: text} instead of the files with their exercises left out."""
    if os.path.exists(out):
        raise InputError(f"{out} exists; name a new directory")
    if change is None:
        exercises, change = read_exercises(), {}
        for file in FILES:
            own = [exercise for exercise in exercises if exercise.file == file]
            change[file] = left_out(read(HOME, file), own)
        change["README.md"] = NOTICE + read(HOME, "README.md")
    # Written beside its place and then renamed: there is never half a copy under its name.
    new = out.rstrip("/\\") + ".tmp"
    shutil.rmtree(new, ignore_errors=True)
    write(new, {file: read(HOME, file) for file in copied_files()} | change)
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
    print(f"{args.out}: {len(exercises)} exercises, {points} points; start there with "
          "pytest -k ex1")


if __name__ == "__main__":
    run_command(main)
