#!/bin/bash
# torch 2.13.0 (CPU)
# Two spellings of a token's log-probability under torch.autocast("cpu", torch.bfloat16):
# F.cross_entropy computes in float32, log_softmax and gather in bfloat16, as do logsumexp,
# logsigmoid and sum.  On CUDA the documentation lists log_softmax, softmax and sum among those that
# autocast to float32; on the CPU they are not.  A loss of preference pairs, which subtracts sums of
# such numbers, is a different one by which of the two its author has written.
# Expected: the same number, but for float32's rounding.
# Seen, a response of 64 tokens, the same bfloat16 logits for both:
#   dtypes: cross_entropy float32, log_softmax bfloat16, logsumexp bfloat16, logsigmoid bfloat16, sum bfloat16
#   log-probability: by cross_entropy -373.06, by log_softmax -374.00, in double precision -373.06
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
cd "$T"
OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore - <<'END'
import torch
import torch.nn.functional as F

g = torch.Generator().manual_seed(0)
logits = torch.randn(64, 256, generator=g).bfloat16()
ids = torch.randint(256, (64,), generator=g)
with torch.autocast("cpu", torch.bfloat16):
    one = -F.cross_entropy(logits, ids, reduction="sum")
    each = logits.log_softmax(-1).gather(-1, ids[:, None])
    other = each.sum()
    kinds = {"cross_entropy": one, "log_softmax": each, "logsumexp": logits.logsumexp(-1),
             "logsigmoid": F.logsigmoid(logits), "sum": other}
exact = logits.double().log_softmax(-1).gather(-1, ids[:, None]).sum()
names = {name: str(x.dtype).removeprefix("torch.") for name, x in kinds.items()}
print("dtypes:", ", ".join(f"{name} {kind}" for name, kind in names.items()))
print(f"log-probability: by cross_entropy {one.item():.2f}, by log_softmax {other.item():.2f}, "
      f"in double precision {exact.item():.2f}")
assert names.pop("cross_entropy") == "float32" and set(names.values()) == {"bfloat16"}
assert abs(one.item() - exact.item()) < .01 and abs(other.item() - exact.item()) > .2
END
