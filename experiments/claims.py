"""experiments/claims.py: what the paper found, as comparisons of rows. findings.py judges them."""
import torch

# What the paper found; `comparisons` says which rows of the tables must differ for it.
FINDINGS = {
    "F1": "the ensemble beats SFT, single-head DPO, MODPO and soup on subjective objectives and "
          "keeps accuracy",
    "F2": "each head alone beats base, SFT, the baselines, the ensemble and the other heads on "
          "its own objective",
    "F3": "verifiable accuracy gains most at test time, by value guidance",
    "F4": "training and guidance together beat either alone, on what is guided and on the mean of "
          "the domain's objectives",
    "F5": "sweeping the weights moves smoothly along the trade-off: up, no step back, none of more "
          "than half the way",
    # The paper's one output learns from a mixture of all labels, values binarised at .85 of the
    # largest; here every objective has an output, and "unified" averages those of a domain.
    "F6": "one unified PRM, guiding, beats no guide in every domain, on the mean of its objectives",
    "F6+": "it guides each objective as well as a PRM of its own (stronger than in the paper)",
    "rivals": "guidance beats greedy decoding and as many whole answers by vote or by PRM (not in "
              "the paper)"}
KEPT = 0.02                # "keeps", "no step back" and "as well as" allow to lose less than this
JUMP = 0.5                 # of the whole way, the most that one step of a sweep may go
OWN = ", its own PRM"      # stands behind the names of EACH_RUN's rows


def comparisons(objectives):
    """All that the findings say of a domain with these objectives, but for its sweeps (F5): a list
    of (finding, names of objectives whose mean counts, better row, worse row, what may be lost)."""
    names, claims = tuple(o.name for o in objectives), []
    # Of a single objective the head is the ensemble, and its guide the unified one.
    several = len(names) > 1
    heads = [f"mah_dpo:{name}" for name in names] if several else ["mah_dpo"]
    guides = [*names, "unified"] if several else names
    baselines = ["sft", "single_head_dpo", "modpo", "soup"]
    unguided = [*baselines, "mah_dpo", *heads]
    for objective, name, head in zip(objectives, names, heads):
        # F1: what is a matter of taste is gained, an accuracy is kept.
        kept = 0.0 if objective.subjective else KEPT
        claims.append(("F1", (name,), "mah_dpo", baselines, kept))
        # F2: the objective's own head against everyone else without a guide.
        claims.append(("F2", (name,), head, ["base", *unguided], 0.0))
        # F3: SFT under the value model against all training, and against SFT's other guides. Where
        # answers are verified, whole answers compete with guidance at its own price.
        rivals = ["_greedy"]
        if objective.case == "verifiable":
            others = unguided + [f"sft + {other}" for other in names]
            claims.append(("F3", (name,), f"sft + {name}", others, 0.0))
            rivals += ["_vote", f"_rerank + {name}"]
        # F6+, and guidance against its rivals, with both policies.
        for policy in ("sft", "mah_dpo"):
            guided = f"{policy} + {name}"
            claims.append(("F6+", (name,), guided, [guided + OWN], KEPT))
            claims.append(("rivals", (name,), guided, [policy + way for way in rivals], 0.0))
    # F4: the trained policy under a guide against SFT under it, and against no guide.
    for guide in guides:
        parts = [f"sft + {guide}", "mah_dpo"]
        for counted in [names] if guide == "unified" else [(guide,), names]:
            claims.append(("F4", counted, f"mah_dpo + {guide}", parts, 0.0))
    # F6: the last guide is the unified one.
    for policy in ("sft", "mah_dpo"):
        claims.append(("F6", names, f"{policy} + {guides[-1]}", [policy], 0.0))
    # Nothing is compared with itself, or twice.
    found = []
    for finding, counted, better, others, slack in claims:
        found += [(finding, counted, better, row, slack) for row in others if row != better]
    return list(dict.fromkeys(found))


def differences(objectives, better, worse, rows):
    """How much more the one row scores than the other on the mean of objectives, by prompt or by
    training; None if not both were measured. rows: {name: row}, whose "each" are in one order."""
    if better not in rows or worse not in rows:
        return None
    # First the mean over objectives, then the difference, prompt by prompt.
    means = []
    for row in (better, worse):
        each = [rows[row]["each"][name] for name in objectives]
        means.append(torch.tensor(each, dtype=torch.float64).mean(0))          # (units,)
    return (means[0] - means[1]).tolist()
