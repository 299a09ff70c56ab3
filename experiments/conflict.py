"""experiments/conflict.py: two objectives that want opposite things from the same answers.

    python experiments/conflict.py RUN         a finished run of train.py, of one or several seeds

Both learn from the same answers to the same prompts: the training pairs of the domain's first
objective (in values helpfulness). The second one has a real name (honesty), but here it prefers
what the first prefers, except in a share of the pairs, the dial, in which it prefers what the first
rejects. At 0 there is one objective twice, at .5 the second tells nothing, at 1 it is the first's
opposite, and a single head has nothing to learn. Scores are of the first objective alone: a head of
the second one, mah_dpo:honesty, should lower them as the dial turns.

"fitted": accuracy on the training pairs, each under its own head if a policy has several. Cosines,
from log.jsonl: of both objectives' gradients on the backbone, at the first and the last look. Each
draws a few pairs of its own in a step: equal objectives, too, are far below 1.
"""
import os
import sys
from dataclasses import replace
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import run_command  # noqa: E402
from evaluate import summary, table  # noqa: E402
from experiments.noise import flip  # noqa: E402
from experiments.vary import (averaged, lines_of, picture, read_arguments,  # noqa: E402
                              retrain, rows_of)
from interop.resume import log_rows, read_rows  # noqa: E402
from mah_dpo import Pair, pair_logps  # noqa: E402

DIALS = (0, .25, .5, 1)
METHODS = ["single_head_dpo", "soup", "mah_dpo"]


def dial(share, pairs, run):
    """What retrain asks for: the first objective's training pairs, then the same again as the
    second's, in conflict for a share of them."""
    first, second = run.names
    own = [pair for pair in pairs if pair.objective == first and pair.split == "train"]
    again = [replace(pair, objective=second) for pair in own]
    return own + flip(share, again, run)


def with_fit(row, model, bench, names):
    """A row of the tables with what its policy, a model, makes of the pairs that it was trained on:
    accuracy for each objective, and cosines where it learnt from both."""
    pairs = read_rows(f"{bench.run}/pairs.jsonl", Pair)
    logps = pair_logps(model, pairs)                                           # (N, 2)
    reference = logps.new_tensor([pair.reference for pair in pairs])           # (N, 2)
    chosen, rejected = (logps - reference).T                                   # (N,) each
    right = (chosen > rejected).float()
    metrics = dict(row["metrics"])
    # One objective's pairs stand before the other's.
    for name, half in zip(names, right.chunk(2)):
        metrics[f"{name} fitted"] = summary(half.tolist())
    # Only some rows of the log look at gradients: the first and the last of these stay.
    for look in log_rows(f"{bench.run}/log.jsonl"):
        cosine = look.get(names[0], {}).get(f"cosine {names[1]}")
        if look["stage"] == row["policy"] and cosine is not None:
            metrics.setdefault("first cosine", summary([cosine]))
            metrics["last cosine"] = summary([cosine])
    return row | {"metrics": metrics}


def main(argv=None):
    """The command line."""
    args = read_arguments(__doc__, argv)
    names = args.names = args.names[:2]
    fitted = [f"{name} fitted" for name in names]
    metrics = [names[0], *fitted, "first cosine", "last cosine", "kl"]
    policies = ["single_head_dpo", "mah_dpo", *[f"dpo_{name}" for name in names]]
    wanted = [*METHODS, *[f"mah_dpo:{name}" for name in names]]
    lines, curves = [], {}
    for share in (0, 1) if args.fast else DIALS:
        results = []
        for run in args.trainings:
            edit = partial(dial, share)
            bench = retrain(args, run, f"conflict={share}", policies, edit)
            rows = []
            for job in bench.jobs(args.domain):
                if job.policy in wanted and not job.guide:
                    row, = rows_of(bench, [job])
                    model, _ = bench.policy(job)
                    rows.append(with_fit(row, model, bench, names))
            results.append(rows)
        rows = averaged(results)
        lines += lines_of(("in conflict", f"{share:.2f}"), rows, metrics)
        # In the picture the heads alone are left out: they fit what MAH-DPO fits.
        for row in [row for row in rows if row["policy"] in METHODS]:
            for name in fitted:
                curve = curves.setdefault(f"{row['policy']}: {name}", [])
                curve.append((share, row["metrics"][name]["mean"]))
    print(table(f"{args.domain}, two objectives in conflict", lines))
    picture(f"{args.out}/conflict.svg", [("held-in accuracy", "share in conflict", curves)])


if __name__ == "__main__":
    run_command(main)
