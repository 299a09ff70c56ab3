"""experiments/prm_quality.py: how good must a process reward model be, to be worth following?

    python experiments/prm_quality.py RUN      a finished run of train.py, of one or several seeds

The PRM is trained anew, from the run's own labels and pairs, for fewer steps each time; its rates
fall over these steps. Then each of the domain's objectives (default: math) guides SFT by each PRM.
`quality` is R^2 on held-out steps of SFT's answers, or for an objective that learns from pairs the
share of held-out comparisons that are right; `gain` is what the guide adds to its own score.
"""
import os
import sys
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402
from data import run_command  # noqa: E402
from evaluate import Bench, cells, row_name, summary, table  # noqa: E402
from experiments.vary import averaged, picture, read_arguments  # noqa: E402
from interop.resume import log_rows  # noqa: E402

STEPS = (75, 150, 300, 600)


def with_prm(args, origin, steps):
    """The Bench of one training with a PRM of so many steps; of its own number the run itself."""
    if steps == origin.config.prm_steps:
        return Bench(origin.path)
    path = f"{args.out}/seed={origin.config.seed}/prm_steps={steps}"
    # As with train.py --from: all that comes before the PRM is copied, if no other option differs.
    origin = train.open_run(origin.path)
    config = replace(origin.config, prm_steps=steps, out=path, from_=origin.path)
    run = train.begin(path, config, origin.objectives)
    if not os.path.isdir(run.file("prm")):
        print(f"{path}: prm", flush=True)
        train.train_prm(run, "prm")
    return Bench(path)


def quality(run, name):
    """The held-out quality of an output on SFT's answers, from the log of a run directory; 0 where
    nothing was held out that differs."""
    rows = [row for row in log_rows(f"{run}/log.jsonl") if row.get("policies") == ["sft"]]
    found = rows[-1]["held_out"].get(name, {})
    # Labels have R^2, comparisons have an accuracy.
    return found.get("r2", found.get("pair_accuracy", 0.0))


def guided_rows(bench, args, steps):
    """SFT guided by each objective of the domain -> rows, with quality, own score and gain."""
    jobs = {row_name(job._asdict()): job for job in bench.jobs(args.domain)}
    # What SFT is worth without a guide, prompt by prompt.
    alone, rows = bench.row(jobs["sft"])["each"], []
    for name in args.names:
        row = bench.row(jobs[f"sft + {name}"])
        # Both met the same prompts: gains are paired.
        own = row["each"][name]
        gains = [a - b for a, b in zip(own, alone[name])]
        metrics = {"quality": summary([quality(bench.run, name)]), "score": summary(own),
                   "gain": summary(gains)}
        rows.append(row | {"policy": f"{steps} steps", "metrics": metrics})
    return rows


def main(argv=None):
    """The command line."""
    args = read_arguments(__doc__, argv, domain=("math", "math, values or tutoring"))
    # The run's own PRM ends the curve.
    own = args.trainings[0].config.prm_steps
    lines, curves = [], {}
    for steps in (1, own) if args.fast else (*STEPS, own):
        results = []
        for run in args.trainings:
            bench = with_prm(args, run, steps)
            bench.config["n_test"] = run.config.n_test
            results.append(guided_rows(bench, args, steps))
        rows = averaged(results)
        for row in rows:
            lines.append(cells(row, row["metrics"]))
            point = row["metrics"]["quality"]["mean"], row["metrics"]["gain"]["mean"]
            curves.setdefault(row["guide"], []).append(point)
    print(table(f"{args.domain}, SFT guided by PRMs of fewer steps", lines))
    picture(f"{args.out}/prm_quality.svg", [("gain", "held-out quality", curves)])


if __name__ == "__main__":
    run_command(main)
