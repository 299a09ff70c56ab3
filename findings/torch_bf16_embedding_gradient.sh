#!/bin/bash
# torch 2.13.0, CPU
# The gradient of a bfloat16 embedding stops growing at 256: a token that occurs 4096 times in a
# batch (a newline, a digit) gets a gradient 16 times too small.  sum, cumsum and scatter_add of the
# same 4096 ones give 4096, index_add gives 256.  So frequent tokens learn too slowly in pure
# bfloat16 on a CPU, and the loss does not show it.
# Expected: 4096 everywhere.
# Seen:
#   sum 4096, cumsum 4096, scatter_add 4096, index_add 256, embedding gradient 256
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore - <<'END'
import torch
n = 4096
ones = torch.ones(n, dtype=torch.bfloat16)
zero = torch.zeros(n, dtype=torch.long)
w = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
torch.nn.functional.embedding(zero, w).sum().backward()
seen = {
    "sum": ones.sum(),
    "cumsum": ones.cumsum(0)[-1],
    "scatter_add": torch.zeros(1, dtype=torch.bfloat16).scatter_add(0, zero, ones),
    "index_add": torch.zeros(1, dtype=torch.bfloat16).index_add(0, zero, ones),
    "embedding gradient": w.grad,
}
print(", ".join(f"{k} {int(v.item())}" for k, v in seen.items()))
assert [v.item() for v in seen.values()] == [4096, 4096, 4096, 256, 256]
END
