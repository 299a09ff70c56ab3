"""experiments/findings.py: does a finished run show what the paper found?

    python experiments/findings.py RUN [EACH_RUN]

RUN is a finished run, best one with several seeds. A finding is a set of comparisons: one row of
the tables should score better on an objective than another. A comparison holds if the mean of
the paired differences lies above zero by more than half its 95 % interval; they are paired over
prompts, or over the trainings of a run with several seeds. F6 compares RUN, whose PRM is unified,
with EACH_RUN, trained alike but with --prm each; without that it is not run.
"""
import argparse
import os
import sys
from typing import NamedTuple

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import InputError, domain_objectives, run_command  # noqa: E402
from decode import read_run  # noqa: E402
from evaluate import by_domain, cell, half_width, load_rows, row_name, summary, table  # noqa: E402

# What the paper found; `comparisons` says which rows of the tables must differ for it.
FINDINGS = {
    "F1": "the ensemble beats SFT, single-head DPO, MODPO and soup on subjective objectives and "
          "keeps accuracy",
    "F2": "each head alone beats base, SFT, the baselines, the ensemble and the other heads on "
          "its own objective",
    "F3": "verifiable accuracy gains most at test time, by value guidance",
    "F4": "training and guidance together beat either alone, on what is guided and on the mean of "
          "the domain's objectives",
    "F5": "sweeping the weights moves smoothly along the trade-off",
    "F6": "one unified PRM guides all domains as well as one PRM per objective",
    "rivals": "guidance beats greedy decoding and as many whole answers by vote or by PRM (not in "
              "the paper)"}
# "keeps", "smoothly" and "as well as" allow to lose less than this.
KEPT = 0.02
BASELINES = ["sft", "single_head_dpo", "modpo", "soup"]
# Stands behind the names of EACH_RUN's rows.
OWN = ", its own PRM"


class Comparison(NamedTuple):
    """One row of the tables should beat another; rows go by evaluate.row_name."""
    finding: str
    objectives: list             # names; the mean of their scores counts
    better: str
    worse: str
    slack: float = 0.0           # so much may be lost


def comparisons(objectives):
    """All that the findings say of a domain with these objectives, but for its sweeps (F5)."""
    names = [o.name for o in objectives]
    heads = [f"mah_dpo:{name}" for name in names]
    unguided = [*BASELINES, "mah_dpo", *heads]
    found = []
    for objective, head in zip(objectives, heads):
        name, alone = objective.name, [objective.name]
        # F1: what is a matter of taste is gained, an accuracy is kept.
        kept = 0.0 if objective.subjective else KEPT
        found += [Comparison("F1", alone, "mah_dpo", other, kept) for other in BASELINES]
        # F2: the objective's own head against everyone else without a guide.
        others = [row for row in ["base", *unguided] if row != head]
        found += [Comparison("F2", alone, head, other) for other in others]
        # F3: SFT under the value model against all training, and against SFT's other guides. Where
        # answers are verified, whole answers compete with guidance at its own price.
        whole = []
        if objective.case == "verifiable":
            wrong = [f"sft + {other}" for other in names if other != name]
            found += [Comparison("F3", alone, f"sft + {name}", row) for row in unguided + wrong]
            whole = ["_vote", f"_rerank + {name}"]
        # F6, and guidance against its rivals, with both policies.
        for policy in ("sft", "mah_dpo"):
            guided = f"{policy} + {name}"
            found.append(Comparison("F6", alone, guided, guided + OWN, KEPT))
            for rival in ["_greedy", *whole]:
                found.append(Comparison("rivals", alone, guided, policy + rival))
    # F4: the trained policy under a guide against SFT under it, and against no guide.
    for guide in [*names, "unified"]:
        for part in (f"sft + {guide}", "mah_dpo"):
            for counted in ([[guide], names] if guide in names else [names]):
                found.append(Comparison("F4", counted, f"mah_dpo + {guide}", part))
    return found


def verdict(difference, slack=0.0):
    """Does a difference (a summary) show that something is better, or with slack: hardly worse?"""
    # With 95 % confidence the true difference lies within half the interval of the mean.
    half = half_width(difference)
    if difference["mean"] - half > -slack:
        return "holds"
    return "does not hold" if difference["mean"] + half < 0 else "not significant"


def line(finding, domain, objective, compared, difference, slack):
    """A comparison as a line of the table; of two rows that were not both measured, None."""
    return {"finding": finding, "domain": domain, "objective": objective, "compared": compared,
            "verdict": verdict(difference, slack) if difference else "not run",
            "difference": cell(difference)}


def compare(domain, comparison, rows):
    """The line of a comparison. rows: {name: row}, whose "each" are paired by their order."""
    difference = None
    if comparison.better in rows and comparison.worse in rows:
        # First the mean over objectives, then the difference, prompt by prompt.
        means = []
        for name in (comparison.better, comparison.worse):
            each = [rows[name]["each"][objective] for objective in comparison.objectives]
            means.append(torch.tensor(each, dtype=torch.float64).mean(0))      # (units,)
        difference = summary((means[0] - means[1]).tolist())
    return line(comparison.finding, domain, " + ".join(comparison.objectives),
                f"{comparison.better} - {comparison.worse}", difference, comparison.slack)


def sweep_lines(domain, pair, mixes):
    """F5 for one pair of heads, both objectives: the slope of a straight line through the scores
    along the objective's weight; and the step from weight to weight that may lose most. All steps
    must pass, so having picked the worst makes "holds" no weaker; its "does not hold" is weaker."""
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
        lines.append(line("F5", domain, name, f"slope along its weight, against {other}",
                          summary(slopes.tolist()), 0.0))
        # From one weight to the next: what does a prompt or training gain?
        steps = [summary(step) for step in scores.diff(dim=0).tolist()]
        lowest = [step["mean"] - half_width(step) for step in steps]
        i = lowest.index(min(lowest))
        step = f"{weights[i]:.1f} to {weights[i + 1]:.1f}"
        lines.append(line("F5", domain, name, f"worst step, {step}, against {other}",
                          steps[i], KEPT))
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
        lines += [compare(domain, comparison, named) for comparison in comparisons(scored)]
        for pair, mixes in swept.items():
            lines += sweep_lines(domain, pair, mixes)
    return sorted(lines, key=lambda found: list(FINDINGS).index(found["finding"]))


def verdict_of_all(lines):
    """Lines of a finding and a domain -> one cell: all must hold; one that fails fails them all."""
    verdicts = [found["verdict"] for found in lines]
    # What was not run counts neither way, but is said.
    made = [v for v in verdicts if v != "not run"]
    if not made:
        return "not run" if lines else "-"
    worst = [v for v in ("does not hold", "not significant", "holds") if v in made][0]
    missing = ", part not run" if len(made) < len(verdicts) else ""
    return f"{worst} ({made.count('holds')}/{len(made)}){missing}"


def findings_table(lines):
    """Findings by domain."""
    shown = []
    for finding, text in FINDINGS.items():
        # A line with a cell for every domain.
        shown.append({"": finding, "finding": text})
        for domain in dict.fromkeys(found["domain"] for found in lines):
            part = [f for f in lines if (f["finding"], f["domain"]) == (finding, domain)]
            shown[-1][domain] = verdict_of_all(part)
    return table("findings (comparisons that hold / comparisons made)", shown)


def check_pair(run, each_run):
    """InputError if two runs cannot be compared for F6: the same but for their PRMs."""
    # Differences are paired by order: both must have met the same prompts, in the same order.
    configs = [read_run(run), read_run(each_run)]
    if [config["prm"] for config in configs] != ["unified", "each"]:
        raise InputError(f"F6 compares a run of --prm unified with one of --prm each: {run} has "
                         f"{configs[0]['prm']}, {each_run} has {configs[1]['prm']}")
    for name in ("objective", "seed", "seeds", "n_test", "split"):
        if configs[0][name] != configs[1][name]:
            raise InputError(f"{run} and {each_run} cannot be compared: --{name.replace('_', '-')} "
                             f"is {configs[0][name]} and {configs[1][name]}")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run")
    parser.add_argument("each_run", nargs="?", help="the same with --prm each")
    args = parser.parse_args(argv)
    each_rows = []
    if args.each_run:
        check_pair(args.run, args.each_run)
        each_rows = load_rows(args.each_run)
    lines = scorecard(load_rows(args.run), read_run(args.run)["objectives"], each_rows)
    if not lines:
        raise InputError(f"{args.run}: no tables, so nothing to compare")
    print(findings_table(lines))
    print(table("every comparison; F1's accuracies, F5's worst step and all of F6 may lose less "
                f"than {KEPT}", lines))


if __name__ == "__main__":
    run_command(main)
