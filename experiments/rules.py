"""experiments/rules.py: does a rule of combination make MAH-DPO better where the backbone learns?

    python experiments/rules.py RUN [--domain values] [--out DIR] [--fast]

As backbone.py, at two rates of the backbone, with every rule by which MAH-DPO's objectives can
share it (mah_dpo.combine): the plain sum of their gradients, RACO, CAGrad and MGDA. The soup, which
shares nothing, is what all of them are compared with. Writes DIR/rules.svg. The last table is of
training and guidance together: what the ensemble under a guide has more than SFT under that guide,
and than the ensemble alone, in what is guided.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import run_command  # noqa: E402
from evaluate import cell, row_name, summary, table  # noqa: E402
from experiments.backbone import compare, retrained  # noqa: E402
from experiments.vary import MEAN, add_mean, measured, picture, read_arguments  # noqa: E402
from mah_dpo import RULES  # noqa: E402

RATES = (1e-5, 1e-4)


def scores_of(args, rate, rule, wanted):
    """{name of a row: {objective, or MEAN: a score for every training}}, of MAH-DPO trained under a
    rule and of SFT."""
    benches = retrained(args, rate, rule, ["mah_dpo"])
    rows = add_mean(measured(benches, wanted, args.domain), args.names)
    return {row_name(row): row["each"] for row in rows}


def together(args):
    """The lines of the last table."""
    guides = [*args.names, "unified"]
    own = ["mah_dpo", *[f"mah_dpo + {guide}" for guide in guides]]
    # SFT is the same in all variants.
    sft = scores_of(args, RATES[0], RULES[0], [f"sft + {guide}" for guide in guides])
    lines = []
    for rate in RATES:
        for rule in RULES:
            found = sft | scores_of(args, rate, rule, own)
            for guide in guides:
                metric = MEAN if guide == "unified" else guide
                both = found[f"mah_dpo + {guide}"][metric]
                line = {"rate": f"{rate:g}, {rule}", "guide": guide, "both": cell(summary(both))}
                # Paired: by trainings, or prompts of a single one.
                for title, part in (("guided SFT", f"sft + {guide}"), ("unguided", "mah_dpo")):
                    gains = [a - b for a, b in zip(both, found[part][metric])]
                    line[f"more than {title}"] = cell(summary(gains))
                lines.append(line)
    return lines


def main(argv=None):
    """The command line."""
    args = read_arguments(__doc__, argv)
    picture(f"{args.out}/rules.svg", compare(args, RATES, RULES))
    print(table(f"training and guidance, {args.domain}, trainings: {len(args.trainings)}",
                together(args)))


if __name__ == "__main__":
    run_command(main)
