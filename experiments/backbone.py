"""experiments/backbone.py: when does MAH-DPO part from the soup, and is it then better?

    python experiments/backbone.py RUN [--domain values] [--out DIR] [--fast]

MAH-DPO, and the policies of single objectives that make the soup, are trained again on a domain's
pairs with other learning rates of the backbone. The first table has every policy at full strength.
The second has differences at equal kl (strengths.py): of the ensemble and the soup in the mean of
the domain's scores, and of each head and its objective's own policy in the score of this objective.
Writes DIR/backbone.svg, the mean of the scores over kl. rules.py does the same for other rules.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import run_command  # noqa: E402
from evaluate import table  # noqa: E402
from experiments.strengths import contest, curve, mean_curve, measure  # noqa: E402
from experiments.vary import (MEAN, averaged, lines_of, picture, read_arguments,  # noqa: E402
                              retrain)

RATES = (0.0, 1e-5, 4e-5, 1e-4, 4e-4)           # the heads' is the last


def retrained(args, rate, rule, trained):
    """Train policies at a rate of the backbone under a rule: yield the Bench of every training."""
    for origin in args.trainings:
        # The heads' rate stays what it is.
        yield retrain(args, origin, f"rate={rate:g},{rule}", trained, dpo_lr_backbone=rate,
                      combine=rule)


def by_strength(args, rate, rule, trained, wanted):
    """The same, measured: of every training {policy: its rows by strength}."""
    found = []
    for bench in retrained(args, rate, rule, trained):
        found.append(measure(bench, args.domain, args.names, wanted))
    return found


def at_full_strength(args, label, each):
    """A line of the first table for every policy. each: what `by_strength` gives."""
    # Rows stand in the order of strengths, and the last is that of the policy as trained.
    full = []
    for found in each:
        full.append([rows[-1] for rows in found.values()])
    return lines_of(("rate", label), averaged(full), [*args.names, MEAN, "kl"])


def contests(args, label, shared, soups):
    """The lines of the second table. shared, soups: what `by_strength` gives of MAH-DPO, and of the
    policies of single objectives."""
    pairs = [("mah_dpo", "soup", MEAN)]
    # What has a head learnt, beside a policy that learnt its objective alone?
    for name in args.names:
        pairs.append((f"mah_dpo:{name}", f"dpo_{name}", name))
    lines = []
    for mine, other, metric in pairs:
        # Curves over kl, of every training one.
        ours = [curve(found[mine], metric) for found in shared]
        theirs = [curve(found[other], metric) for found in soups]
        line = {"rate": label, "difference": f"{mine} - {other}", "score": metric}
        lines.append(line | contest(ours, theirs))
    return lines


def compare(args, rates, rules):
    """Train and measure with these rates and rules, print both tables -> a plot for every rate."""
    own = [f"dpo_{name}" for name in args.names]
    heads = [f"mah_dpo:{name}" for name in args.names]
    lines, differences, plots = [], [], []
    # One plot a rate: a curve of the soup, and of MAH-DPO under each rule.
    for rate in rates:
        # Rules are for MAH-DPO alone: there is one soup.
        soups = by_strength(args, rate, "sum", own, ["soup", *own])
        lines += at_full_strength(args, f"{rate:g}", soups)
        curves = {"soup": mean_curve(soups, "soup")}
        for rule in rules:
            shared = by_strength(args, rate, rule, ["mah_dpo"], ["mah_dpo", *heads])
            # Its rows, how they differ from the soup's, and its curve beside that of the soup.
            label = f"{rate:g}, {rule}"
            lines += at_full_strength(args, label, shared)
            differences += contests(args, label, shared, soups)
            curves[f"mah_dpo, {rule}"] = mean_curve(shared, "mah_dpo")
        plots.append((f"mean score, rate {rate:g}", "kl", curves))
    # Intervals are over trainings; those of a single one, in the first table, over prompts.
    over = f"{args.domain}, trainings: {len(args.trainings)}"
    print(table(f"policies by the backbone's rate, {over}", lines))
    print(table(f"differences at equal kl, {over}", differences))
    return plots


def main(argv=None):
    """The command line."""
    args = read_arguments(__doc__, argv)
    picture(f"{args.out}/backbone.svg", compare(args, RATES, ["sum"]))


if __name__ == "__main__":
    run_command(main)
