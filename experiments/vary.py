"""experiments/vary.py: what the programs behind docs/questions.md share.

Policies of a finished run are trained again with one thing changed: a variant. Its rows, averaged
over the run's trainings, become lines of a table and points of a picture.

    read_arguments    the command line of these programs
    retrain           a variant of one training, a small run directory of its own: SFT, the PRM and
                      pairs are copies of the run's, the policies are new
    measured          rows of the tables, over all trainings
    add_mean          the mean of the domain's scores, as one more metric
    lines_of          rows -> lines of a table
    plot, picture     curves -> SVG

What a variant has trained and measured is kept in its directory, and not made again: a command that
was stopped goes on when it is given again.
"""
import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from itertools import chain, cycle

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402
from data import InputError, domain_objectives, read_json, write_text  # noqa: E402
from evaluate import (COLOURS, SIDE, STYLE, Bench, cells, over_trainings, row_name,  # noqa: E402
                      seed_runs, summary)
from interop.manifest import is_there  # noqa: E402
from interop.options import check_config  # noqa: E402
from interop.resume import new_directory, read_rows, save_config, write_rows  # noqa: E402
from mah_dpo import Pair  # noqa: E402

# For a minute's trial: one training, few steps, few prompts.
FAST = {"dpo_steps": 6, "n_test": 12}
MEAN = "mean"           # what add_mean adds


def read_arguments(doc, argv, **more):
    """The command line that all of these programs have -> its arguments, with `trainings`, the Runs
    of RUN's trainings, and `names`, the objectives of the domain.

    more: options of one program, or another default of --domain: name=(default, line in --help).
    InputError for a run that has no pairs, or only one objective of the domain."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a finished run of train.py")
    options = {"domain": ("values", "math, values or tutoring")} | more
    for name, (default, text) in options.items():
        parser.add_argument(f"--{name}", default=default, help=f"{text} (default {default})")
    parser.add_argument("--out", help="directory of what is trained (default RUN-<program>)")
    parser.add_argument("--n-test", type=int, help="prompts that are measured (default RUN's)")
    parser.add_argument("--fast", action="store_true", help="a minute's trial; means nothing")
    args = parser.parse_args(argv)
    program = os.path.splitext(os.path.basename(parser.prog))[0]
    # A trial must not leave anything that the experiment would go on from.
    args.out = args.out or f"{args.run.rstrip('/')}-{program}{'-fast' * args.fast}"
    args.trainings = [train.open_run(path) for path in seed_runs(args.run)]
    # Variants take their options, but for what is varied, from here.
    changed = {"n_test": args.n_test} if args.n_test is not None else {}
    if args.fast:
        changed = FAST | changed
        args.trainings = args.trainings[:1]
    for run in args.trainings:
        run.config = replace(run.config, **changed)
    # All that can be wrong with the run shows here, before anything is trained.
    for run in args.trainings:
        if not is_there(run.file("pairs.jsonl")):
            raise InputError(f"{run.path}: no pairs.jsonl to train on; finish the run with "
                             f"train.py --resume {args.run}")
    first = args.trainings[0]
    # In the order of RUN.
    args.names = [o.name for o in domain_objectives(args.domain, first.objectives)]
    if len(args.names) < 2:
        raise InputError(f"{args.run}: it has fewer than two objectives of the domain "
                         f"{args.domain!r}; its domains: {', '.join(first.domains)}")
    return args


def retrain(args, origin, variant, policies, edit=None, **options):
    """Train policies of one training again, on the pairs of the domain's objectives -> its Bench.

    origin: the training's Run; variant: a name for what is changed; policies: their directories
    (MODPO comes after all dpo_...); edit(pairs, run) -> the pairs that they learn from; options:
    fields of Config. InputError where the variant is there already under other options."""
    # The training's own options, but for what is varied.
    path = f"{args.out}/seed={origin.config.seed}/{variant}"
    config = replace(origin.config, objective=",".join(args.names), out=path, **options)
    objectives = [o for o in origin.objectives if o.name in args.names]
    check_config(config, objectives)
    run = train.Run(path, config, objectives)
    if not os.path.isdir(path):
        begin_variant(origin, run, edit)
    # The key is a hash of all options that change a figure.
    if train.open_run(path).key != run.key:
        raise InputError(f"{path}: made under other options; give another --out, or remove it")
    # A model is whole when all of its files are there.
    for policy in policies:
        if not is_there(run.file(policy)):
            print(f"{path}: {policy}", flush=True)
            train.train_policy(run, policy)
    # What it has measured before it knows already.
    bench = Bench(path)
    if is_there(measured_file(bench)):
        bench.known = read_json(measured_file(bench))
    return bench


def begin_variant(origin, run, edit):
    """Make the directory of a variant: its options, its pairs, and copies of the models."""
    pairs = read_rows(origin.file("pairs.jsonl"), Pair)
    pairs = [pair for pair in pairs if pair.objective in run.names]
    if edit:
        pairs = edit(pairs, run)
    with new_directory(run.path) as unfinished:
        save_config(run, unfinished)
        write_rows(f"{unfinished}/pairs.jsonl", pairs)
        for name in ("sft", "prm"):
            # Not every run has one PRM for all objectives.
            if os.path.isdir(origin.file(name)):
                shutil.copytree(origin.file(name), f"{unfinished}/{name}")


def measured_file(bench):
    """Where a variant keeps what it has measured."""
    return f"{bench.run}/measured.json"


def rows_of(bench, jobs):
    """The rows of these jobs of one training."""
    rows = []
    for job in jobs:
        rows.append(bench.row(job))
        # After every row: a stop loses one at most.
        write_text(measured_file(bench), json.dumps(bench.known))
    return rows


def averaged(results):
    """Rows of every training -> rows over trainings; those of a single one as they are, with
    intervals over prompts."""
    return results[0] if len(results) == 1 else over_trainings(results)


def measured(benches, wanted, domain):
    """Rows of the tables, by name, of one variant in all trainings -> rows over trainings."""
    results = []
    for bench in benches:
        jobs = [job for job in bench.jobs(domain) if row_name(job._asdict()) in wanted]
        results.append(rows_of(bench, jobs))
    return averaged(results)


def add_mean(rows, names):
    """Put the mean of these objectives' scores into rows, as one more metric: of each prompt, or of
    each training."""
    for row in rows:
        scores = zip(*[row["each"][name] for name in names])
        row["each"][MEAN] = [sum(values) / len(names) for values in scores]
        row["metrics"][MEAN] = summary(row["each"][MEAN])
    return rows


def lines_of(label, rows, metrics):
    """Rows as lines of a table, with what was varied in the first column. label: (title, text)."""
    return [dict([label]) | cells(row, metrics) for row in rows]


# -- the picture

def span(values):
    """Numbers -> the least, and how far it is from there to the largest: more than 0."""
    return min(values), max(max(values) - min(values), 1e-9)


def plot(title, across, curves, x):
    """{name: [(x, y)]} -> an SVG plot at x pixels. Both axes go from the least to the largest."""
    # Where the axes begin, and how far they go.
    points = list(chain.from_iterable(curves.values()))
    rights, ups = zip(*points)
    left, wide = span(rights)
    low, high = span(ups)
    out = [f'<g transform="translate({x} 40)"><path d="M0 0V{SIDE}H{SIDE}"/>',
           f'<text y="-12">{title}: {low:.3g} to {max(ups):.3g}</text>',
           f'<text y="{SIDE + 20}">{across}: {left:.3g} to {max(rights):.3g}</text>']
    for colour, (name, curve) in zip(cycle(COLOURS.values()), curves.items()):
        drawn = []
        for right, up in curve:
            # In pixels, counted from the upper left corner.
            column = SIDE * (right - left) / wide
            line = SIDE - SIDE * (up - low) / high
            drawn.append(f"{column:.0f},{line:.0f}")
            # A curve may have a single point, which no line shows.
            out.append(f'<circle cx="{column:.0f}" cy="{line:.0f}" r="3" fill="{colour}"/>')
        out.append(f'<polyline points="{" ".join(drawn)}" stroke="{colour}"/>')
        # The name stands where the curve ends.
        out.append(f'<text x="{column + 6:.0f}" y="{line:.0f}">{name}</text>')
    return [*out, "</g>"]


def picture(path, plots):
    """Write plots, three beside each other, as an SVG file. plots: (title, across, curves) each."""
    # A plot and its texts fill 500 x 430.
    wide = 500 * min(3, len(plots))
    high = 430 * (1 + (len(plots) - 1) // 3)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}">',
           f"<style>{STYLE}</style>"]
    for number, (title, across, curves) in enumerate(plots):
        row, column = divmod(number, 3)
        out.append(f'<g transform="translate(0 {430 * row})">')
        out += plot(title, across, curves, 40 + 500 * column)
        out.append("</g>")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_text(path, "".join([*out, "</svg>\n"]))
    print(f"picture: {path}")
