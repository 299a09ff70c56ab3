"""experiments/noise.py: how many wrong labels do the methods bear?

    python experiments/noise.py RUN            a finished run of train.py, of one or several seeds

A share of each objective's training pairs has chosen and rejected exchanged; held-out pairs and
prompts stay as they are. With half of them exchanged nothing can be learnt. More noise exchanges
the same pairs and some more, so that the shares of a training are paired.

What share a noisy judge gets wrong: two answers whose true scores differ by D, rated each with a
standard deviation s, change places with probability Phi(-D / (s sqrt 2)). So .1, .2, .3 and .4 are
judges with s = .55 D, .84 D, 1.35 D and 2.79 D; s is .1 in training.
"""
import os
import sys
from dataclasses import replace
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402

from data import run_command  # noqa: E402
from evaluate import seed_of, table  # noqa: E402
from experiments.vary import (MEAN, add_mean, lines_of, measured, picture,  # noqa: E402
                              read_arguments, retrain)

SHARES = (0, .1, .2, .3, .4, .5)
METHODS = ("single_head_dpo", "soup", "mah_dpo")


def flip(share, pairs, run):
    """Exchange chosen and rejected in a share of each objective's training pairs -> all pairs."""
    found = list(pairs)
    for name in run.names:
        own = [i for i, p in enumerate(pairs) if p.objective == name and p.split == "train"]
        # A training's order is the same for every share.
        generator = torch.Generator().manual_seed(seed_of(run.config.seed, "flip", name))
        order = torch.randperm(len(own), generator=generator).tolist()
        for k in order[:round(share * len(own))]:
            pair = pairs[own[k]]
            # The reference's log-probabilities are those of chosen and rejected, in this order.
            found[own[k]] = replace(pair, chosen=pair.rejected, rejected=pair.chosen,
                                    reference=pair.reference[::-1])
    return found


def main(argv=None):
    """The command line."""
    args = read_arguments(__doc__, argv)
    lines, curves = [], {method: [] for method in METHODS}
    # The soup is made of policies of single objectives.
    policies = ["single_head_dpo", "mah_dpo", *[f"dpo_{name}" for name in args.names]]
    for share in (0, .5) if args.fast else SHARES:
        benches = []
        for run in args.trainings:
            edit = partial(flip, share)
            benches.append(retrain(args, run, f"flipped={share}", policies, edit))
        rows = add_mean(measured(benches, METHODS, args.domain), args.names)
        lines += lines_of(("flipped", f"{share:.1f}"), rows, [MEAN, *args.names, "kl"])
        for row in rows:
            curves[row["policy"]].append((share, row["metrics"][MEAN]["mean"]))
    print(table(f"{args.domain}, pairs flipped", lines))
    picture(f"{args.out}/noise.svg", [("mean of scores", "share flipped", curves)])


if __name__ == "__main__":
    run_command(main)
