#!/bin/bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0, CPU
# add_weighted_adapter(..., combination_type="linear") does not give the weighted sum of what the
# adapters add to a layer: it adds up their factors A and B apart, each times the root of its weight,
# and the product has all cross terms.  Halves of one adapter and of its copy make twice the
# adapter; of two unlike ones the cross terms are as large as the sum itself.  "cat" (and "svd",
# but for its rank) gives the weighted sum.
# Expected: by the name, .5 D_1 + .5 D_2.
# Seen, sizes relative to the adapter's, or to the weighted sum's:
#   half of it and half of its copy: linear 2.00, cat 1.00
#   half and half of two unlike ones, how far from the weighted sum: linear 1.03, cat 0.00
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore - <<'END'
import torch
from peft import LoraConfig, get_peft_model


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x)


torch.manual_seed(0)
config = LoraConfig(r=4, target_modules=["layer"])
model = get_peft_model(Tiny(), config, "one")
for name in ("copy", "other"):
    model.add_adapter(name, config)
layer = model.base_model.model.layer
with torch.no_grad():
    for factors in (layer.lora_A, layer.lora_B):
        factors["one"].weight.normal_()
        factors["other"].weight.normal_()
        factors["copy"].weight.copy_(factors["one"].weight)


def mix(adapters, way):
    """What a mix of halves adds to the layer."""
    model.add_weighted_adapter(adapters, [0.5, 0.5], f"{adapters[1]} {way}", way)
    return layer.get_delta_weight(f"{adapters[1]} {way}")


one, other = layer.get_delta_weight("one"), layer.get_delta_weight("other")
exact = 0.5 * one + 0.5 * other
same, far = {}, {}
for way in ("linear", "cat"):
    same[way] = float(mix(["one", "copy"], way).norm() / one.norm())
    far[way] = float((mix(["one", "other"], way) - exact).norm() / exact.norm())
print(f"half of it and half of its copy: linear {same['linear']:.2f}, cat {same['cat']:.2f}")
print("half and half of two unlike ones, how far from the weighted sum: "
      f"linear {far['linear']:.2f}, cat {far['cat']:.2f}")
assert abs(same["linear"] - 2) < 1e-4 and abs(same["cat"] - 1) < 1e-4, same
assert 0.5 < far["linear"] < 1.5 and far["cat"] < 1e-4, far
END
