"""experiments/candidates.py: do more candidates make guidance better?

    python experiments/candidates.py RUN [GUIDE ...]    guides: objectives; default: the run's first

The best of K candidates by a PRM's score is more and more often one that the PRM is wrong about.
Beside each other, as K grows: what the guide thinks of the answers that it has chosen, and what
they are worth. Both scores are means over the prompts of RUN's tables; of several seeds the first
training is measured.
"""
import argparse
import os
import sys

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import InputError, run_command  # noqa: E402
from evaluate import Bench, cell, seed_runs, summary, table  # noqa: E402
from prm import scores_at  # noqa: E402

KS = "1,2,5,10,16,32,64"


@torch.inference_mode()
def own_scores(prm, guide, talks):
    """What the guide's output says of the ends of all answers of conversations -> numbers."""
    p, found = prm.names.index(guide), []
    for talk in talks:
        texts = [turn.before + turn.response for turn in talk.turns]
        scores = scores_at(prm, [(ids, [len(ids) - 1]) for ids in texts])      # (turns, P)
        found.append(scores[:, p].mean().item())
    return found


def measure(bench, job, Ks):
    """A guided row of the tables with every number of candidates -> lines of a table."""
    lines, world = [], bench.worlds[job.domain]
    for K in tqdm(Ks, desc=f"{job.policy} + {job.guide}", unit="K", disable=None):
        bench.config["k"] = K
        # Every K meets the same prompts.
        talks, _, _ = bench.rollout(job)
        thought = own_scores(bench.prm(job.guide), job.guide, talks)
        worth = [talk.scores(world, bench.tokenizer)[job.guide] for talk in talks]
        lines.append({"policy": job.policy, "guide": job.guide, "K": str(K),
                      "PRM's score": cell(summary(thought)), "true score": cell(summary(worth))})
    return lines


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a finished run of train.py")
    parser.add_argument("guides", nargs="*", metavar="GUIDE", help="objectives of the run")
    parser.add_argument("--k", default=KS, help=f"numbers of candidates (default {KS})")
    parser.add_argument("--device", help="auto, cpu, cuda or mps (default: the run's own)")
    args = parser.parse_args(argv)
    if not all(k.isdigit() and int(k) > 0 for k in args.k.split(",")):
        raise InputError(f"--k {args.k}: write whole numbers from 1 on, with commas")
    Ks = [int(k) for k in args.k.split(",")]
    bench, lines = Bench(seed_runs(args.run)[0], args.device), []
    # Of real questions only the answers are scored.
    names = []
    for world in bench.worlds.values():
        names += [o.name for o in bench.objectives if o.name in world.objectives]
    guides = args.guides or names[:1]
    for guide in guides:
        if guide not in names:
            raise InputError(f"{args.run}: {guide!r} is not measured here, only {', '.join(names)}")
    for domain in bench.worlds:
        for job in bench.jobs(domain):
            # Step by step, not of whole answers.
            if job.guide in guides and job.boundary is None:
                lines += measure(bench, job, Ks)
    print(table("the guide's own score and the true one, by candidates per step", lines))


if __name__ == "__main__":
    run_command(main)
