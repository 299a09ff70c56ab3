"""experiments/front.py: two choices that cost no training.

    python experiments/front.py RUN            a finished run of train.py, of one or several seeds

Guides: candidates are chosen by the mean of a domain's outputs (`unified`), or against the output
that they serve worst (`worst`), on the same prompts, from as many candidates. Columns: each
objective's score, the lowest of these means, and the mean over prompts of the lowest score of each.
Spacing: a front of mixes by equal steps of the weight, or at equal distances along the front that
equal steps have measured on development prompts (SURF). How even a front is, on the tables' own
prompts: the smallest distance between neighbouring points over the mean distance; 1 is perfect.
"""
import math
import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import run_command  # noqa: E402
from evaluate import Bench, cells, means_of, row_name, summary, table  # noqa: E402
from experiments.vary import averaged, picture, read_arguments  # noqa: E402


def with_lowest(row, names):
    """A row of a table with the scores of these objectives alone, and the lowest of them in both
    senses: of the objectives' means, and prompt by prompt."""
    scores = [row["each"][name] for name in names]
    each = dict(zip(names, scores))
    # The first is one number; the second has one for every prompt.
    each["lowest mean"] = [min(map(statistics.fmean, scores))]
    each["mean of the lowest"] = [min(values) for values in zip(*scores)]
    metrics = {metric: summary(values) for metric, values in each.items()}
    return row | {"each": each, "metrics": metrics}


def difference(row, other):
    """What a row has more than another one, prompt by prompt: paired, since both met the same."""
    metrics = {}
    # The lowest mean is one number already: its difference is that of the means.
    for metric, values in row["each"].items():
        metrics[metric] = summary([a - b for a, b in zip(values, other["each"][metric])])
    return row | {"guide": f"{row['guide']} - {other['guide']}", "metrics": metrics}


def guided_rows(bench, domain, names):
    """SFT and MAH-DPO's uniform ensemble: alone, guided by both, and what `worst` has more."""
    rows = []
    for job in bench.jobs(domain):
        if row_name(job._asdict()) not in ("sft", "mah_dpo"):
            continue
        # All three meet the same prompts.
        found = []
        for guide in (None, "unified", "worst"):
            row = bench.row(job._replace(guide=guide))
            found.append(with_lowest(row, names))
        rows += [*found, difference(found[2], found[1])]
    return rows


def evenness(points):
    """The smallest distance of neighbours among points along a front over the mean distance."""
    gaps = [math.dist(here, there) for here, there in zip(points, points[1:])]
    # All points may be one.
    return min(gaps) / max(statistics.fmean(gaps), 1e-9)


def fronts(bench, jobs):
    """Measure the jobs of sweeps -> {(policy, first objective, second): its points, in order}."""
    found = {}
    for job in jobs:
        points = found.setdefault((job.policy, *job.sweep), [])
        points.append(means_of(bench.row(job), job.sweep))
    return found


def spaced_rows(bench, domain):
    """Sweeps of both spacings -> a row for each method and pair of objectives, with the fronts'
    points under "curves"."""
    # Development prompts choose the weights, the others judge them.
    chooser = Bench(bench.run)
    chooser.config = bench.config | {"split": "dev"}
    swept = [chooser.row(job) for job in chooser.sweep(domain)]
    spaced = fronts(bench, chooser.spread(swept))
    rows = []
    for key, points in fronts(bench, bench.sweep(domain)).items():
        curves = {"equal": points, "front": spaced[key]}
        equal, front = [evenness(curve) for curve in curves.values()]
        values = {"equal": equal, "front": front, "difference": front - equal}
        metrics = {name: summary([value]) for name, value in values.items()}
        rows.append({"policy": key[0], "guide": " and ".join(key[1:]), "domain": domain,
                     "seed": bench.seed, "metrics": metrics, "curves": curves})
    return rows


def main(argv=None):
    """The command line."""
    args = read_arguments(__doc__, argv)
    guided, spaced = [], []
    for run in args.trainings:
        bench = Bench(run.path)
        # Ten steps, whatever the run's own tables have; fewer of both in a trial.
        bench.config["weight_steps"] = 2 if args.fast else 10
        bench.config["n_test"] = run.config.n_test
        guided.append(guided_rows(bench, args.domain, args.names))
        spaced.append(spaced_rows(bench, args.domain))
    for title, results in (("guides", guided), ("evenness of fronts", spaced)):
        rows = averaged(results)
        lines = [cells(row, row["metrics"]) for row in rows]
        print(table(f"{args.domain}, {title}", lines))
    # The picture shows fronts: a row over trainings keeps the first one's curves, and its
    # guide holds the names of both axes.
    plots = []
    for row in rows:
        across, up = row["guide"].split(" and ")
        plots.append((f"{row['policy']}: {up}", across, row["curves"]))
    picture(f"{args.out}/front.svg", plots)


if __name__ == "__main__":
    run_command(main)
