"""One option varied: the same run trained again with other values of it, side by side.

    python experiments/ablations.py RUN FIELD=a,b,c        e.g. runs/all k=1,2,8

Each value becomes a run of its own, in RUN-FIELD=a and so on. It starts from copies of what RUN has
finished and the option does not change (train.py --from), so `k` costs new tables only, `gamma`
also new labels and a new PRM. A run of several seeds is varied seed by seed. Values that have
commas themselves are separated by semicolons: "dpo_lr_factor=mah_dpo=2;modpo=0.5,soup=2". A command
that was stopped goes on when it is given again.
"""
import argparse
import os
import sys
from dataclasses import fields, replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import evaluate  # noqa: E402
import train  # noqa: E402
from data import InputError, run_command  # noqa: E402
from interop.options import HARMLESS, Config  # noqa: E402


def read_values(text):
    """'FIELD=a,b,c' -> the field of Config, list of its values. InputError for another text."""
    name, _, values = text.partition("=")
    # prm-pairs, as on the command line of train.py, or prm_pairs, as in config.json.
    name = name.strip().replace("-", "_")
    # With these a run would be another one, not the same with one thing changed.
    fixed = [*HARMLESS, "objective", "init", "data", "seed", "grad_checkpoint"]
    types = {f.name: f.type for f in fields(Config) if f.name not in fixed}
    if name not in types or not values:
        raise InputError(f"{text}: write FIELD=a,b,c with one of the fields {', '.join(types)}")
    # Text -> what the field holds: a number, or the text itself.
    found = []
    for value in values.split(";" if ";" in values else ","):
        try:
            found.append(types[name](value.strip()))
        except ValueError:
            raise InputError(f"{text}: {value!r} is no {types[name].__name__}") from None
    return name, found


def variants(run, name, values):
    """The configurations of a run with these values of an option, but the one that it has itself.
    They do without the sweep of weights, which would cost more than the rest of their tables."""
    found = []
    for value in values:
        if value != getattr(run.config, name):
            out = f"{run.path.rstrip('/')}-{name}={value}"
            steps = value if name == "weight_steps" else 0
            config = replace(run.config, out=out, from_=run.path, weight_steps=steps)
            setattr(config, name, value)
            # All that can be wrong shows here, before anything is trained.
            train.check_new(config)
            found.append(config)
    return found


def main(argv=None):
    """The command line: train what is missing, then print the tables of all values."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a finished run of train.py")
    parser.add_argument("values", metavar="FIELD=a,b,c", help="an option of train.py, its values")
    args = parser.parse_args(argv)
    train.join_processes()
    run = train.open_run(args.run)
    name, values = read_values(args.values)
    configs = variants(run, name, values)
    # A variant that is there already goes on, or has finished.
    for config in configs:
        print(f"\n{config.out}: {name} varied")
        train.carry_out(train.begin(config.out, config, run.objectives))
    # The tables of the run itself and of all variants, side by side.
    evaluate.main([args.run, *[config.out for config in configs]])


if __name__ == "__main__":
    run_command(main)
