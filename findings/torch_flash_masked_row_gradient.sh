#!/bin/bash
# torch 2.13.0, CPU
# Attention with a float mask of torch.finfo(float32).min (not -inf), in a row where every key is
# masked, as for a padding token on the left.  The two CPU kernels agree on the output, the mean of
# the N values.  They disagree on the gradients: those of the flash kernel, the default on a CPU, are
# N times too large for this row (its weights in the backward pass are 1 each, and not 1/N: the
# minimum plus log N rounds to the minimum).
# Expected: the same gradients from both.
# Seen, with 4 keys:
#   outputs equal: True
#   sum of the gradient of v: math 1.0, flash 4.0
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore - <<'END'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 4, 8).unbind()
mask = torch.zeros(4, 4)
mask[0] = torch.finfo(torch.float32).min
out, grad = [], []
for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
    w = v.clone().requires_grad_()
    with sdpa_kernel(kernel):
        y = torch.nn.functional.scaled_dot_product_attention(q, k, w, attn_mask=mask)
    y[0, 0, 0].sum().backward()
    out.append(y.detach())
    grad.append(w.grad[0, 0, :, 0].sum().item())
print("outputs equal:", torch.allclose(*out, atol=1e-6))
print(f"sum of the gradient of v: math {grad[0]:.1f}, flash {grad[1]:.1f}")
assert torch.allclose(*out, atol=1e-6) and abs(grad[0] - 1) < 1e-4 and abs(grad[1] - 4) < 1e-4
END
