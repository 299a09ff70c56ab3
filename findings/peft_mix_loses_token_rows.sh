#!/bin/bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0, CPU
# A weighted mix of two LoRA adapters (add_weighted_adapter) that also train rows of the embedding
# (trainable_token_indices, meant for added tokens such as a reward model's step mark) mixes the
# matrices exactly and sets those rows back to the base model's, without an error or a warning.
# With modules_to_save, the other way to train the embedding, the same call is refused.
# Expected: the weighted mean of the rows, or the same refusal.
# Seen:
#   layer: mixed exactly
#   rows of the new tokens: the base model's, not the mean
#   warnings: 0
#   modules_to_save: ValueError
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" - <<'END'
import warnings

import torch
from peft import LoraConfig, get_peft_model

NEW = torch.tensor([8, 9])          # the tokens that were added


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 16)
        self.layer = torch.nn.Linear(16, 16)

    def forward(self, ids):
        return self.layer(self.embed(ids))


def two_policies(**options):
    """A model with the adapters helpful and honest, both of which have learnt something."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["layer"], **options)
    model = get_peft_model(Tiny(), config, "helpful")
    model.add_adapter("honest", config)
    for name, p in model.named_parameters():
        if "lora_" in name or "trainable_tokens_delta" in name:
            p.data.normal_()
    return model


def rows(model, adapter):
    model.set_adapter(adapter)
    return model.base_model.model.embed(NEW).detach()


model = two_policies(trainable_token_indices={"embed": NEW.tolist()})
with model.disable_adapter():
    base = model.base_model.model.embed(NEW).detach()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model.add_weighted_adapter(["helpful", "honest"], [0.3, 0.7], "mix", "cat")
layer = model.base_model.model.layer
exact = 0.3 * layer.get_delta_weight("helpful") + 0.7 * layer.get_delta_weight("honest")
assert torch.allclose(layer.get_delta_weight("mix"), exact, atol=1e-5)
print("layer: mixed exactly")
a, b, mix = (rows(model, name) for name in ("helpful", "honest", "mix"))
assert not torch.allclose(a, base) and not torch.allclose(b, base)
assert torch.equal(mix, base) and not torch.allclose(mix, 0.3 * a + 0.7 * b)
print("rows of the new tokens: the base model's, not the mean")
print(f"warnings: {len(said)}")
assert not said
try:
    two_policies(modules_to_save=["embed"]).add_weighted_adapter(
        ["helpful", "honest"], [0.3, 0.7], "mix", "cat")
except ValueError:
    print("modules_to_save: ValueError")
else:
    raise SystemExit("modules_to_save: no error")
END
