"""experiments/gradients.py: do objectives pull against each other on the shared backbone?

    python experiments/gradients.py RUN [--domain values] [--out DIR] [--fast]

Policies of several objectives are trained again on a domain's pairs: MAH-DPO, the same with the
rule raco, and single-head DPO. At several steps of the training, the cosine between two objectives'
gradients on the backbone is measured: below 0, what serves one objective harms the other. Printed
are these cosines and their differences, paired by training: from before to after, and from those
of single-head DPO. Writes DIR/gradients.svg.

log.jsonl has such cosines, too, but by the 8 pairs of a step, whose draw hides most of the angle.
Here they are by 128 training pairs of each objective.
"""
import math
import os
import sys
from itertools import combinations

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402
from data import run_command  # noqa: E402
from evaluate import cell, summary, table  # noqa: E402
from experiments.vary import picture, read_arguments, retrain  # noqa: E402
from interop.resume import read_rows  # noqa: E402
from mah_dpo import Pair, own_heads, policy_logps  # noqa: E402

# As the tables call them: the policy, the rule by which its objectives share the backbone.
METHODS = {"mah_dpo": ("mah_dpo", "sum"),
           "mah_dpo, raco": ("mah_dpo", "raco"),
           "single_head_dpo": ("single_head_dpo", "sum")}
SHARES = (0, 0.25, 0.5, 1)      # of the training, after which we look
PAIRS = 128


def cosines(run, policy):
    """{two objectives: cosine of their gradients on the backbone} of a policy of a run."""
    model = run.load(policy)
    pairs = read_rows(run.file("pairs.jsonl"), Pair)
    backbone = [p for name, p in model.named_parameters() if not name.startswith("heads.")]
    vectors = {}
    for name in run.names:
        # The gradient of this objective's loss, as one long vector.
        part = train.choose(pairs, [name], "train")[:PAIRS]
        logps = policy_logps(model, part, own_heads(model, part))               # (2, n)
        loss, _ = train.preference_loss(run, part, logps)
        parts = torch.autograd.grad(loss, backbone)
        vectors[name] = torch.cat([part.flatten() for part in parts])
    found = {}
    # An angle does not depend on the weights of the objectives' losses.
    for first, second in combinations(run.names, 2):
        cosine = torch.cosine_similarity(vectors[first], vectors[second], 0)
        found[first, second] = cosine.item()
    return found


def measure(args, origin, policy, rule, steps):
    """{step: cosines then} of one training of a policy."""
    found = {}
    # The rate is constant after its rise, and batches come in the same order: a short training is
    # the beginning of a long one.
    for step in steps[1:]:
        bench = retrain(args, origin, f"steps={step},{rule}", [policy], combine=rule,
                        dpo_steps=step)
        run = train.open_run(bench.run)
        found[step] = cosines(run, policy)
    # All policies begin as SFT.
    found[0] = cosines(run, "sft")
    return found


def difference(ours, theirs):
    """The mean difference of cosines as text. ours, theirs: one of each training."""
    return cell(summary([a - b for a, b in zip(ours, theirs)]))


def main(argv=None):
    """The command line."""
    args = read_arguments(__doc__, argv)
    # The first is 0, the last that of the whole training.
    every = args.trainings[0].config.dpo_steps
    steps = sorted({math.ceil(share * every) for share in SHARES})
    # {(two objectives, method, step): the cosine in each training}
    found = {}
    for origin in args.trainings:
        for method, (policy, rule) in METHODS.items():
            for step, looks in measure(args, origin, policy, rule, steps).items():
                for two, cosine in looks.items():
                    found.setdefault((two, method, step), []).append(cosine)
    # Two tables, and for every two objectives a plot.
    values, changes, curves = [], [], {}
    for two in combinations(args.names, 2):
        between = " and ".join(two)
        single = found[two, "single_head_dpo", every]
        for method in METHODS:
            line, curve = {"objectives": between, "method": method}, []
            for step in steps:
                metric = summary(found[two, method, step])
                line[f"step {step}"] = cell(metric)
                curve.append((step, metric["mean"]))
            values.append(line)
            curves.setdefault(between, {})[method] = curve
            # What training changes, and what separate heads change.
            after, before = found[two, method, every], found[two, method, 0]
            changes.append({"objectives": between, "method": method,
                            "after - before": difference(after, before),
                            "after - single head's": difference(after, single)})
    over = f"{args.domain}, trainings: {len(args.trainings)}"
    print(table(f"cosines of gradients on the backbone, {over}", values))
    print(table(f"their differences, {over}", changes))
    plots = [(f"cosine, {between}", "step", lines) for between, lines in curves.items()]
    picture(f"{args.out}/gradients.svg", plots)


if __name__ == "__main__":
    run_command(main)
