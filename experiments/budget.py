"""experiments/budget.py: how large a front does so much training buy?

    python experiments/budget.py RUN [--domain math] [--out DIR] [--fast]

Two objectives ask for a front: a policy for every weight w of the second. Scalarisation trains a
single head anew for every w, by the losses weighted with 1 - w and w, and MODPO one for every w
between its ends, which are the policies of single objectives that it needs. The soup trains these
two alone, and MAH-DPO one policy: their weights are swept afterwards, for nothing. All are trained
again on the domain's pairs, the swept ones for several numbers of steps (DIR). Printed is the area
below each front, and what its training took; a step feeds config.dpo_pairs pairs of each objective
that a policy learns from. Writes DIR/budget.svg, the area over the pairs fed.
"""
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import InputError, run_command  # noqa: E402
from evaluate import cell, front_area, table  # noqa: E402
from experiments.vary import (averaged, picture, read_arguments, retrain,  # noqa: E402
                              rows_of)

SHARES = (0.25, 0.5, 1.0)                           # of the steps, for what is swept afterwards
GRIDS = ([0.5], [0.0, 0.5, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0])        # of w
RULES = ("sum", "raco")
MIXES = 10                                          # of a sweep, from one end to the other


def rows_over(args, policy, variant, trained, sweep=False, combine="sum", **options):
    """The row of a policy, or those of its sweep of weights, over all trainings. trained, options:
    as `retrain` takes them."""
    results = []
    for origin in args.trainings:
        bench = retrain(args, origin, variant, trained, combine=combine, weight_steps=MIXES,
                        **options)
        jobs = bench.sweep(args.domain) if sweep else bench.jobs(args.domain)
        # Of a sweep the mixes of this policy alone.
        own = [job for job in jobs if job.policy == policy]
        results.append(rows_of(bench, own))
    return averaged(results)


def weighted(args, w, trained):
    """The row of the last of these policies, trained with the weight w on the second objective."""
    # The objectives' losses get weights; batches have the pairs of both, even at weight 0.
    first, second = args.names
    rows = rows_over(args, trained[-1], f"w={w:g}", trained,
                     alpha=f"{first}={1 - w:g},{second}={w:g}")
    return rows[0]


def fronts(args, whole):
    """Train and measure all -> for each front its method, how many trainings of how many steps, how
    many policies have learnt from each objective's pairs, and its rows. whole: steps."""
    own = [f"dpo_{name}" for name in args.names]
    found = []
    # One training, or two, for all weights: what do shorter ones buy?
    for share in SHARES:
        steps = math.ceil(share * whole)
        for rule in RULES:
            rows = rows_over(args, "mah_dpo", f"steps={steps},{rule}", ["mah_dpo"], True,
                             dpo_steps=steps, combine=rule)
            found.append((f"mah_dpo, {rule}", 1, steps, 1, rows))
        rows = rows_over(args, "soup", f"steps={steps},sum", own, True, dpo_steps=steps)
        found.append(("soup", 2, steps, 1, rows))
    # A whole training for every weight: what do fewer weights buy? The finest grid has them all.
    each = {w: weighted(args, w, ["single_head_dpo"]) for w in GRIDS[-1]}
    for grid in GRIDS:
        n = len(grid)
        found.append(("scalarised", n, whole, n, [each[w] for w in grid]))
    # MODPO's margins are what the policies of single objectives say: the ends of the last soup.
    each = {0.0: rows[0], 1.0: rows[-1]}
    for w in GRIDS[-1][1:-1]:
        each[w] = weighted(args, w, [*own, "modpo"])
    for grid in GRIDS[1:]:
        n = len(grid)
        found.append(("modpo", n, whole, n - 1, [each[w] for w in grid]))
    return found


def main(argv=None):
    """The command line."""
    args = read_arguments(__doc__, argv, domain=("math", "a domain of two objectives"))
    if len(args.names) != 2:
        raise InputError(f"--domain {args.domain}: a front has two objectives, not "
                         f"{len(args.names)}; choose math or tutoring")
    # Options are the same in all trainings, but for the seed.
    config = args.trainings[0].config
    whole = config.dpo_steps
    # A line of the table for every front, and a curve for every method.
    lines, curves = [], {}
    for method, trainings, steps, learners, rows in fronts(args, whole):
        # Both objectives' pairs, as often as somebody learns from them.
        pairs = 2 * learners * steps * config.dpo_pairs
        area = front_area(rows, args.names)
        lines.append({"method": method, "trainings": str(trainings),
                      "steps": str(trainings * steps), "pairs": str(pairs),
                      "points": str(len(rows)), "hypervolume": cell(area)})
        curves.setdefault(method, []).append((pairs, area["mean"]))
    objectives = " and ".join(args.names)
    print(table(f"{objectives}, trainings: {len(args.trainings)}", lines))
    picture(f"{args.out}/budget.svg", [("hypervolume", "pairs fed", curves)])


if __name__ == "__main__":
    run_command(main)
