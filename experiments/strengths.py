"""experiments/strengths.py: policies drawn back to SFT, and compared at equal distance from it.

A policy that learns more also moves further from SFT, and scores of policies at unequal distance
say little. So each is measured at several strengths s, theta_SFT + s (theta - theta_SFT): a curve
of its score over kl. Two policies are compared at the kl of the one that has moved less.
"""
import os
import sys
from functools import partial

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from evaluate import Job, average, cell, summary  # noqa: E402
from experiments.vary import MEAN, add_mean, rows_of  # noqa: E402

STRENGTHS = (0.25, 0.5, 0.75, 1.0)


def drawn_back(bench, name, device=None):
    """In place of Bench.load: "policy@s" is the policy at strength s."""
    policy, _, s = name.partition("@")
    s = float(s)
    model = bench.load(policy, device)
    # Every head of the policy was a copy of SFT's only one.
    start = bench.sft.with_heads(model.config.objectives)
    start = start.to(model.embed.weight)
    return average([start, model], [1 - s, s])


def at_strength(job, s):
    """A policy's job at strength s. The soup of policies drawn back is the soup drawn back."""
    if job.model == "soup":
        weights = {}
        for name, share in job.weights.items():
            weights[f"{name}@{s}"] = share
        return job._replace(weights=weights)
    return job._replace(model=f"{job.model}@{s}")


def measure(bench, domain, names, policies):
    """Policies of one training -> {policy: its rows, from SFT to full strength}.

    They may be those of the tables, and dpo_<objective>; names: the domain's objectives."""
    bench.model = partial(drawn_back, bench)
    jobs = {job.policy: job for job in bench.jobs(domain) if job.guide is None}
    # An objective's own policy stands in no table.
    for name in names:
        own = f"dpo_{name}"
        jobs[own] = Job(domain, own, own, {"policy": 1.0})
    found = {}
    for policy in policies:
        # SFT is strength 0, where the kl is 0.
        wanted = [jobs["sft"]]
        for s in STRENGTHS:
            wanted.append(at_strength(jobs[policy], s))
        found[policy] = add_mean(rows_of(bench, wanted), names)
    return found


def curve(rows, metric):
    """Rows from SFT to full strength -> (2, n): their kl, and their means of a metric."""
    kl = [row["metrics"]["kl"]["mean"] for row in rows]
    score = [row["metrics"][metric]["mean"] for row in rows]
    # A distance is measured on samples, and may fall a little where it should stay: np.interp
    # takes none that falls.
    return np.array([np.maximum.accumulate(kl), score])


def mean_curve(each, policy):
    """A policy's curve of mean scores, averaged over trainings, as n points (kl, score). each: what
    `measure` has found, one result a training."""
    curves = [curve(found[policy], MEAN) for found in each]
    return np.mean(curves, 0).T.tolist()


def at_equal_kl(ours, theirs):
    """Two curves -> the kl to which the one that has moved less has come, and by how much the
    first one's score is larger there."""
    # The last points are those of full strength.
    kl = min(ours[0, -1], theirs[0, -1])
    # Between two strengths a score counts as straight.
    return kl, np.interp(kl, *ours) - np.interp(kl, *theirs)


def contest(ours, theirs):
    """Two policies' curves, of every training one -> columns of a table, as text."""
    kls, gains, full = [], [], []
    for mine, other in zip(ours, theirs):
        # Trainings differ in how far their policies move: each has a kl of its own.
        kl, gain = at_equal_kl(mine, other)
        kls.append(kl)
        gains.append(gain)
        # At full strength they may stand at unequal distances.
        full.append(mine[1, -1] - other[1, -1])
    return {"kl": cell(summary(kls)), "at equal kl": cell(summary(gains)),
            "at full strength": cell(summary(full))}
