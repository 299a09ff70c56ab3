"""The projects' scores of submitted runs: python -m tests.leaderboard BASELINE RUN ... [--json]

BASELINE is a finished run of the unchanged project; every RUN was trained and measured with the
same options. A project has one score: the mean of its objectives in one row of the tables
(docs/course.md). Beside it stand half its 95 % interval, the paired difference from the baseline's,
the tokens drawn for an answer, and how many test prompts the run has trained on: none, if it is
fair. What supervised fine-tuning has read is not written down, and not checked.
"""
import argparse
import json
import math
import statistics

from data import InputError, run_command
from decode import read_run
from evaluate import cell, half_width, load_rows, row_name, seed_runs, summary, table
from interop.manifest import check_files
from interop.score import Scorer

# Project: its domain, the row that it changes, the objectives that are its score.
PROJECTS = {
    "adaptive weights": ("math", "mah_dpo", ["math_accuracy", "math_engagement"]),
    "another boundary": ("values", "sft + honesty", ["honesty"]),
    "tree search": ("math", "sft + math_accuracy", ["math_accuracy"]),
    "conflict-averse gradients": ("values", "mah_dpo:honesty", ["honesty"]),
}
# Runs that differ in one of these have met other prompts.
SAME = ("objective", "seed", "seeds", "n_test", "split")


def find_row(run, rows, project):
    """The row of a project among a run's rows; None where the run lacks it. InputError if its means
    are not those of its values: somebody has written them by hand."""
    domain, name, objectives = PROJECTS[project]
    for row in rows:
        if (row["domain"], row_name(row)) != (domain, name) or "sweep" in row:
            continue
        for objective in objectives:
            mean = statistics.fmean(row["each"][objective])
            if not math.isclose(mean, row["metrics"][objective]["mean"], abs_tol=1e-6):
                raise InputError(f"{run}: the mean of {objective} in {name} is not that of its "
                                 f"values ({mean:.4f}); measure again: python evaluate.py {run}")
        return row
    return None


def values_of(row, objectives):
    """The score of every prompt, or of every training: the mean of the objectives."""
    return [statistics.fmean(values) for values in zip(*[row["each"][o] for o in objectives])]


def seen_prompts(run):
    """How many of a run's test prompts are prompts of its pairs or labels to train on."""
    n = 0
    for path in seed_runs(run):
        config = read_run(path)
        scorer = Scorer(path, path, config["objectives"][0].name, False, "cpu")
        for domain in scorer.bench.worlds:
            for problem in scorer.bench.problems(domain):
                n += scorer.seen(scorer.bench.tokenizer.encode_chat(problem.messages()))
    return n


def read_submission(run, baseline):
    """A finished run that can be compared with the baseline -> its rows. InputError if not."""
    check_files(run)
    own, other = read_run(run), read_run(baseline)
    for name in SAME:
        if own[name] != other[name]:
            option = name.replace("_", "-")
            raise InputError(f"{run}: --{option} is {own[name]}, the baseline's {other[name]}; "
                             "train and measure with the same")
    return load_rows(run)


def scores(runs):
    """Finished runs, the baseline first -> a record for every project and run that has its row."""
    rows = {run: read_submission(run, runs[0]) for run in runs}
    seen = {run: seen_prompts(run) for run in rows}
    found = []
    for project, (_, name, objectives) in PROJECTS.items():
        before = None
        for run in rows:
            row = find_row(run, rows[run], project)
            if row is None:
                continue
            values = values_of(row, objectives)
            before = before or values                    # the baseline's, which comes first
            gained = [x - y for x, y in zip(values, before)]
            found.append({"project": project, "run": run, "row": name, "score": summary(values),
                          "difference": summary(gained), "drawn": summary(row["each"]["drawn"]),
                          "seen": seen[run]})
    return found


def shown(record, baseline):
    """A record as a line of the table."""
    gained = record["difference"]
    beats = gained["mean"] > half_width(gained)
    drawn = f"{record['drawn']['mean']:.0f}"
    verdict = "baseline" if record["run"] == baseline else "beats it" if beats else "-"
    return {"project": record["project"], "run": record["run"], "row": record["row"],
            "score": cell(record["score"]), "difference": cell(gained), "verdict": verdict,
            "drawn": drawn, "prompts seen": str(record["seen"])}


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished runs, the baseline first")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    found = scores(args.runs)
    if not found:
        rows = ", ".join(f"{name} in {domain}" for domain, name, _ in PROJECTS.values())
        raise InputError(f"{args.runs[0]}: no row of a project here; these are {rows}")
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print(table("projects", [shown(record, args.runs[0]) for record in found]))


if __name__ == "__main__":
    run_command(main)
