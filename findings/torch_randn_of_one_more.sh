#!/bin/bash
# torch 2.13.0, CPU
# With one seed, torch.rand(n) begins like torch.rand(n + 1), as do randint, exponential_ and even
# log_normal_.  torch.randn does not: from 16 numbers on it works in blocks of 16 and fills the last
# 16 anew, with pairs that stand eight apart.  A head, a token or a candidate more changes numbers
# that were drawn before it, of what it does not touch; two draws of 10 are not one of 20.
# Expected: the first n numbers do not depend on how many follow.
# Seen, of n = 1 to 69, for how many randn(n) is not the beginning of randn(n + 1):
#   rand 0, randint 0, exponential_ 0, log_normal_ 0, randn 55 (the first: 15), normal_ 55 (the first: 15)
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
cd "$T"
OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore - <<'END'
import torch

DRAWS = {"rand": lambda n, g: torch.rand(n, generator=g),
         "randint": lambda n, g: torch.randint(9, (n,), generator=g),
         "exponential_": lambda n, g: torch.empty(n).exponential_(generator=g),
         "log_normal_": lambda n, g: torch.empty(n).log_normal_(generator=g),
         "randn": lambda n, g: torch.randn(n, generator=g),
         "normal_": lambda n, g: torch.empty(n).normal_(generator=g)}
bad = {}
for name, draw in DRAWS.items():
    bad[name] = []
    for n in range(1, 70):
        few, more = (draw(m, torch.Generator().manual_seed(0)) for m in (n, n + 1))
        if not torch.equal(few, more[:n]):
            bad[name].append(n)
print(", ".join(f"{name} {len(ns)}" + (f" (the first: {ns[0]})" if ns else "")
                for name, ns in bad.items()))
assert bad["randn"] == bad["normal_"] == list(range(15, 70)), bad
assert not any(bad[name] for name in ("rand", "randint", "exponential_", "log_normal_")), bad
END
