"""experiments/findings.py: does a finished run show what the paper found?

    python experiments/findings.py RUN [EACH_RUN]

RUN is a finished run, best one with several seeds. A finding is a set of comparisons: one row of
the tables should score better on an objective than another. A comparison holds if the mean of the
paired differences lies above zero by more than half its 95 % interval, and does not hold if it lies
below by more; where something may be lost, that stands for zero. Pairs are prompts, or the
trainings of a run with several seeds. F6+ compares RUN, whose PRM is unified, with EACH_RUN,
trained alike but with --prm each; without that it is not run.
"""
import argparse
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import InputError, domain_objectives, run_command  # noqa: E402
from decode import read_run  # noqa: E402
from evaluate import by_domain, cell, half_width, load_rows, row_name, summary, table  # noqa: E402
from experiments.claims import FINDINGS, JUMP, KEPT, OWN, comparisons, differences  # noqa: E402
from interop.manifest import check_files  # noqa: E402


def line(finding, domain, objective, compared, values, slack=0.0):
    """A line of the table: do differences show that something is better, or with slack: hardly
    worse? With 95 % confidence the true one lies within half the interval of the mean."""
    metric = summary(values) if values else None
    verdict = "not run"
    if metric:
        half = half_width(metric)
        verdict = "does not hold" if metric["mean"] + half < -slack else "not significant"
        if metric["mean"] - half > -slack:
            verdict = "holds"
    return {"finding": finding, "domain": domain, "objective": objective, "compared": compared,
            "verdict": verdict, "difference": cell(metric)}


def doubtful(steps):
    """steps (n, units) -> the index of the one whose interval reaches down furthest."""
    found = [summary(values) for values in steps.tolist()]
    lowest = [metric["mean"] - half_width(metric) for metric in found]
    return lowest.index(min(lowest))


def sweep_lines(domain, pair, mixes):
    """F5 for one pair of heads, both objectives: the slope of a straight line through the scores
    along the objective's weight; the step from weight to weight that may lose most; and how far the
    largest step stays below half the way from end to end, as no jump does. All steps must pass, so
    having picked the most doubtful makes "holds" no weaker; its "does not hold" is weaker."""
    lines = []
    for name, other in (pair, pair[::-1]):
        # The mixes of heads in the order of this objective's weight.
        rows = [row for row in mixes if row["policy"] == "mah_dpo"]
        rows.sort(key=lambda row: row["weights"][name])
        weights = torch.tensor([row["weights"][name] for row in rows], dtype=torch.float64)
        scores = torch.tensor([row["each"][name] for row in rows], dtype=torch.float64)
        # Least squares, for every prompt or training by itself.
        spread = weights - weights.mean()                                      # (weights,)
        slopes = spread @ scores / (spread @ spread)                           # (units,)
        slope = f"slope along its weight, against {other}"
        lines.append(line("F5", domain, name, slope, slopes.tolist()))
        # From one weight to the next: what does a prompt or training gain, and is that too much?
        gains = scores.diff(dim=0)                                             # (steps, units)
        below = JUMP * gains.sum(0) - gains
        checks = [("worst", gains, KEPT),
                  ("half the way - largest", below, 0.0)]
        for title, steps, slack in checks:
            i = doubtful(steps)
            compared = f"{title} step, {weights[i]:.1f} to {weights[i + 1]:.1f}, against {other}"
            lines.append(line("F5", domain, name, compared, steps[i].tolist(), slack))
    return lines


def scorecard(rows, objectives, each_rows=()):
    """Every comparison, as lines of a table."""
    own = {domain: plain for domain, plain, _ in by_domain(each_rows)}
    lines = []
    for domain, plain, swept in by_domain(rows):
        # EACH_RUN's rows stand beside the run's own, under names of their own.
        named = {row_name(row): row for row in plain}
        named |= {row_name(row) + OWN: row for row in own.get(domain, [])}
        # Of real questions only the answers are scored.
        scored = [o for o in domain_objectives(domain, objectives) if o.name in plain[0]["metrics"]]
        for finding, counted, better, worse, slack in comparisons(scored):
            values = differences(counted, better, worse, named)
            objective, compared = " + ".join(counted), f"{better} - {worse}"
            lines.append(line(finding, domain, objective, compared, values, slack))
        for pair, mixes in swept.items():
            lines += sweep_lines(domain, pair, mixes)
    order = list(FINDINGS)
    return sorted(lines, key=lambda found: order.index(found["finding"]))


def verdict_of_all(verdicts):
    """Of a finding in a domain, as a cell: all must hold; one that fails fails them all."""
    # What was not run counts neither way, but is said.
    made = [v for v in verdicts if v != "not run"]
    if not made:
        return "not run" if verdicts else "-"
    worst = min(made, key=("does not hold", "not significant", "holds").index)
    missing = ", part not run" if len(made) < len(verdicts) else ""
    return f"{worst} ({made.count('holds')}/{len(made)}){missing}"


def findings_table(lines):
    """A line for every finding, with a cell for every domain."""
    parts = {}
    for found in lines:
        by_finding = parts.setdefault(found["domain"], {})
        by_finding.setdefault(found["finding"], []).append(found["verdict"])
    shown = []
    for finding, text in FINDINGS.items():
        shown.append({"": finding, "finding": text})
        for domain, part in parts.items():
            shown[-1][domain] = verdict_of_all(part.get(finding, []))
    return table("findings (comparisons that hold / comparisons made)", shown)


def check_pair(run, each_run):
    """InputError if two runs cannot be compared for F6+: the same but for their PRMs."""
    # Differences are paired by order: both must have met the same prompts, in the same order.
    one, other = read_run(run), read_run(each_run)
    if (one["prm"], other["prm"]) != ("unified", "each"):
        raise InputError(f"F6+ compares a run of --prm unified with one of --prm each: {run} has "
                         f"{one['prm']}, {each_run} has {other['prm']}")
    for name in ("objective", "seed", "seeds", "n_test", "split"):
        if one[name] != other[name]:
            option = name.replace("_", "-")
            raise InputError(f"{run} and {each_run} cannot be compared: --{option} is {one[name]} "
                             f"and {other[name]}")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run")
    parser.add_argument("each_run", nargs="?", help="the same with --prm each")
    args = parser.parse_args(argv)
    each_rows = []
    check_files(args.run)
    if args.each_run:
        check_files(args.each_run)
        check_pair(args.run, args.each_run)
        each_rows = load_rows(args.each_run)
    lines = scorecard(load_rows(args.run), read_run(args.run)["objectives"], each_rows)
    if not lines:
        raise InputError(f"{args.run}: no tables, so nothing to compare")
    print(findings_table(lines))
    print(table("every comparison; F1's accuracies, F5's worst step and all of F6+ may lose less "
                f"than {KEPT}", lines))


if __name__ == "__main__":
    run_command(main)
