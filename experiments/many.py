"""experiments/many.py: what do 1, 2, 4, 8 and 16 objectives cost, and do they help each other?

    python experiments/many.py RUN             a finished run of train.py, of one or several seeds

MAH-DPO is trained on ever more objectives: first those of the domain, then the run's others. A run
has seven, so more are made by dealing the training pairs of each out to copies of it: "honesty_2"
learns from other pairs than "honesty", but wants the same. At every number an objective has the
same pairs, and as many in every step; what changes is what else the backbone learns. A negative
transfer is a score of a domain's objective, by its own head, that falls as others join.

Time per step is the clock's, so run it on an idle machine; memory is the heads' parameters.
"""
import argparse
import os
import sys
from dataclasses import replace
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import run_command  # noqa: E402
from evaluate import summary, table  # noqa: E402
from experiments.vary import (averaged, lines_of, picture, read_arguments,  # noqa: E402
                              retrain, rows_of)
from interop.resume import log_rows  # noqa: E402
from train import Run  # noqa: E402

COUNTS = (1, 2, 4, 8, 16)


def with_copies(run, first, most):
    """A run with copies of its objectives, at least `most` in all -> Run, whose objectives begin
    with those of the names `first`."""
    own = sorted(run.objectives, key=lambda o: o.name not in first)
    found = list(own)
    # A second round of all, a third...
    while len(found) < most:
        number = len(found) // len(own) + 1
        found += [replace(o, name=f"{o.name}_{number}") for o in own]
    return Run(run.path, run.config, found)


def deal(rounds, pairs, run):
    """The pairs of each objective, dealt out to it and its copies in `rounds` hands, of which those
    that have no objective here are put away -> list of Pair, as many of every objective."""
    found, seen = [], {}
    for pair in pairs:
        key = pair.objective, pair.split
        seen[key] = seen.get(key, -1) + 1
        hand = seen[key] % rounds + 1
        name = pair.objective if hand == 1 else f"{pair.objective}_{hand}"
        if name in run.names:
            found.append(replace(pair, objective=name))
    return found


def cost(bench):
    """Seconds per step of a training of MAH-DPO, and millions of parameters in its heads."""
    row = next(row for row in log_rows(f"{bench.run}/timings.jsonl") if row["stage"] == "mah_dpo")
    heads = sum([head.weight.numel() for head in bench.model("mah_dpo").heads])
    return {"seconds per step": summary([row["seconds"] / row["steps"]]),
            "M in heads": summary([heads / 1e6])}


def own_rows(bench, domain, names):
    """What the heads of the domain's objectives, those of `names` that a training has, score for
    themselves -> rows, with the cost of the training."""
    rows, about = [], cost(bench)
    for job in bench.jobs(domain):
        # A head alone is called mah_dpo:<objective>.
        name = job.policy.removeprefix("mah_dpo:")
        if name in names:
            row, = rows_of(bench, [job])
            found = {"own score": row["metrics"][name], "kl": row["metrics"]["kl"]}
            rows.append(row | {"policy": name, "metrics": found | about})
    return rows


def main(argv=None):
    """The command line."""
    args = read_arguments(__doc__, argv)
    lines, curves = [], {}
    counts = COUNTS[:3] if args.fast else COUNTS
    for count in counts:
        results = []
        for run in args.trainings:
            origin = with_copies(run, args.names, counts[-1])
            edit = partial(deal, len(origin.objectives) // len(run.objectives))
            few = argparse.Namespace(**vars(args) | {"names": origin.names[:count]})
            # No looks at the gradients, which would take time.
            bench = retrain(few, origin, f"objectives={count}", ["mah_dpo"], edit,
                            conflict_every=0)
            results.append(own_rows(bench, args.domain, args.names))
        rows = averaged(results)
        lines += lines_of(("objectives", str(count)), rows, rows[0]["metrics"])
        for row in rows:
            curve = curves.setdefault(row["policy"], [])
            curve.append((count, row["metrics"]["own score"]["mean"]))
    print(table(f"{args.domain}, heads of MAH-DPO", lines))
    picture(f"{args.out}/many.svg", [("own head's score", "objectives", curves)])


if __name__ == "__main__":
    run_command(main)
