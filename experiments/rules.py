"""experiments/rules.py: does a rule of combination make MAH-DPO better where the backbone learns?

    python experiments/rules.py RUN [--domain values] [--out DIR] [--fast]

As backbone.py, at two rates of the backbone, with every rule by which MAH-DPO's objectives can
share it (mah_dpo.combine): the plain sum of their gradients, RACO, CAGrad and MGDA. The soup, which
shares nothing, is what all of them are compared with. Writes DIR/rules.svg.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import run_command  # noqa: E402
from experiments.backbone import compare  # noqa: E402
from experiments.vary import picture, read_arguments  # noqa: E402
from mah_dpo import RULES  # noqa: E402

RATES = (1e-5, 1e-4)


def main(argv=None):
    """The command line."""
    args = read_arguments(__doc__, argv)
    picture(f"{args.out}/rules.svg", compare(args, RATES, RULES))


if __name__ == "__main__":
    run_command(main)
