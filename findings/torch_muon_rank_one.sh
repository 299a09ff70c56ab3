#!/bin/bash
# torch 2.13.0, CPU
# torch.optim.Muon replaces a gradient by a nearly orthogonal matrix.  Of a gradient of rank one (one
# token's outer product) one would get an update of rank one.  But Muon works in bfloat16, and five
# iterations blow up its rounding errors: the second singular value of the update is .8 of the
# first, and most of its squared norm lies in directions that the gradient does not have.
# Expected: rank one, one singular value between .7 and 1.2.
# Seen (64 x 64, float32 weights; singular values of gradient and update; share outside):
#   gradient [1.0, 0.0, 0.0]
#   update   [0.7, 0.57, 0.43] share outside 0.70
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore - <<'END'
import torch
torch.manual_seed(0)
w = torch.nn.Parameter(torch.zeros(64, 64))
g = torch.outer(torch.randn(64), torch.randn(64))
w.grad = g / g.norm()
torch.optim.Muon([w], lr=1.0, weight_decay=0.0).step()
a = torch.linalg.svdvals(g / g.norm())
b = torch.linalg.svdvals(w.detach())
outside = 1 - (b[0] ** 2 / (b ** 2).sum()).item()
print("gradient", [round(x, 2) for x in a[:3].tolist()])
print("update  ", [round(x, 2) for x in b[:3].tolist()], f"share outside {outside:.2f}")
assert a[1] < 1e-5 and b[1] > 0.2 * b[0] and outside > 0.1
END
