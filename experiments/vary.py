"""experiments/vary.py: what the programs behind docs/questions.md share. Policies of a finished run
are trained again with one thing changed; their rows of all trainings become lines of a table and
of a picture.

A variant of a training is a small run directory: SFT, the PRM if there is one, and the pairs of
some objectives come from the run, the policies are its own. What is there is not trained again.
"""
import argparse
import os
import shutil
import sys
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402
from data import InputError, domain_objectives, write_text  # noqa: E402
from evaluate import (COLOURS, SIDE, STYLE, Bench, cells, over_trainings, row_name,  # noqa: E402
                      seed_runs)
from interop.options import check_config  # noqa: E402
from interop.resume import new_directory, read_rows, save_config, write_rows  # noqa: E402
from mah_dpo import Pair  # noqa: E402

# For a minute's trial: one training, few steps, few prompts.
FAST = {"dpo_steps": 6, "n_test": 12}


def read_arguments(doc, argv):
    """The command line that all of these programs have -> its arguments, with `trainings`, the Runs
    of RUN's trainings, and `names`, the objectives of the domain."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a finished run of train.py")
    parser.add_argument("--domain", default="values", help="math, values (default) or tutoring")
    parser.add_argument("--out", help="directory of what is trained (default RUN-<program>)")
    parser.add_argument("--fast", action="store_true", help="a minute's trial; means nothing")
    args = parser.parse_args(argv)
    program = os.path.splitext(os.path.basename(parser.prog))[0]
    args.out = args.out or f"{args.run.rstrip('/')}-{program}"
    args.trainings = [train.open_run(path) for path in seed_runs(args.run)]
    if args.fast:
        args.trainings = args.trainings[:1]
    first = args.trainings[0]
    args.names = [o.name for o in domain_objectives(args.domain, first.objectives)]
    if len(args.names) < 2:
        raise InputError(f"{args.run}: it has fewer than two objectives of the domain "
                         f"{args.domain!r}; its domains: {', '.join(first.domains)}")
    return args


def retrain(args, origin, variant, policies, edit=None, **options):
    """Train policies of one training again, on the pairs of the domain's objectives -> its Bench.

    variant: a name for what is changed; policies: their directories (MODPO comes after dpo_...);
    edit(pairs, run) -> the pairs that they learn from; options: fields of Config."""
    path = f"{args.out}/seed={origin.config.seed}/{variant}"
    if not os.path.isdir(path):
        options = options | FAST if args.fast else options
        config = replace(origin.config, objective=",".join(args.names), out=path, **options)
        objectives = [o for o in origin.objectives if o.name in args.names]
        check_config(config, objectives)
        run = train.Run(path, config, objectives)
        pairs = read_rows(origin.file("pairs.jsonl"), Pair)
        pairs = [pair for pair in pairs if pair.objective in args.names]
        if edit:
            pairs = edit(pairs, run)
        with new_directory(path) as unfinished:
            save_config(run, unfinished)
            write_rows(f"{unfinished}/pairs.jsonl", pairs)
            for name in ("sft", "prm"):
                if os.path.isdir(origin.file(name)):
                    shutil.copytree(origin.file(name), f"{unfinished}/{name}")
    run = train.open_run(path)
    for policy in policies:
        if not os.path.isdir(run.file(policy)):
            print(f"{path}: {policy}", flush=True)
            train.train_policy(run, policy)
    return Bench(path)


def measured(benches, wanted, domain):
    """Rows of the tables, by name, of one variant in all trainings -> rows over trainings."""
    results = []
    for bench in benches:
        jobs = [job for job in bench.jobs(domain) if row_name(job._asdict()) in wanted]
        results.append([bench.row(job) for job in jobs])
    return results[0] if len(results) == 1 else over_trainings(results)


def lines_of(label, rows, metrics):
    """Rows as lines of a table, with what was varied in the first column. label: (title, text)."""
    return [dict([label]) | cells(row, metrics) for row in rows]


def plot(title, across, curves, x):
    """{name: [(x, y)]} -> an SVG plot at x pixels. Both axes go from the least to the largest."""
    points = [point for curve in curves.values() for point in curve]
    least, most = [[f(values) for values in zip(*points)] for f in (min, max)]
    # All values of an axis may be equal.
    wide, high = [max(b - a, 1e-9) for a, b in zip(least, most)]
    out = [f'<g transform="translate({x} 40)"><path d="M0 0V{SIDE}H{SIDE}"/>',
           f'<text y="-12">{title}: {least[1]:.3g} to {most[1]:.3g}</text>',
           f'<text y="{SIDE + 20}">{across}: {least[0]:.3g} to {most[0]:.3g}</text>']
    for colour, (name, curve) in zip(COLOURS.values(), curves.items()):
        drawn = []
        for right, up in curve:
            place = SIDE * (right - least[0]) / wide, SIDE * (1 - (up - least[1]) / high)
            drawn.append("{:.0f},{:.0f}".format(*place))
        out.append(f'<polyline points="{" ".join(drawn)}" stroke="{colour}"/>')
        # The name stands where the curve ends.
        right, up = drawn[-1].split(",")
        out.append(f'<text x="{right}" dx="6" y="{up}">{name}</text>')
    return [*out, "</g>"]


def picture(path, plots):
    """Write plots beside each other as an SVG file. plots: (title, across, curves) of each."""
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {500 * len(plots)} 420">',
           f"<style>{STYLE}</style>"]
    for number, (title, across, curves) in enumerate(plots):
        out += plot(title, across, curves, 40 + 500 * number)
    write_text(path, "".join([*out, "</svg>\n"]))
    print(f"picture: {path}")
