#!/bin/bash
# trl 1.16.0, transformers 5.24.0, torch 2.13.0, CPU
# Since trl's trainers compute log-probabilities of tokens without the logits (add_fused_lm_head, in
# SFT, DPO, KTO, GRPO and RLOO), they apply a model's cap of its logits by themselves, and know it by
# the name final_logit_softcapping.  RecurrentGemma calls the same thing logits_soft_cap: its trainers
# learn log-probabilities that are not the model's, without an error or a warning.
# Expected: the log-probability that the model's own logits give, as with Gemma 2.
# Seen, random models whose logits reach the cap, log-probability of seven tokens:
#   Gemma 2: by its logits -24.673, by the trainers -24.673
#   RecurrentGemma: by its logits -27.004, by the trainers -296.486
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 transformers==5.24.0 trl==1.16.0
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore 2>/dev/null - <<'END'
import torch
from transformers import (Gemma2Config, Gemma2ForCausalLM, RecurrentGemmaConfig,
                          RecurrentGemmaForCausalLM)
from trl.trainer.utils import add_fused_lm_head

torch.manual_seed(0)
ids = torch.randint(3, 20, (1, 8))
same = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 1}
recurrent = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(
    num_hidden_layers=3, lru_width=16, attention_window_size=8, logits_soft_cap=1.0, **same))
gemma = Gemma2ForCausalLM(Gemma2Config(
    num_hidden_layers=2, head_dim=8, final_logit_softcapping=1.0, **same))
gaps = {}
for name, model in (("Gemma 2", gemma), ("RecurrentGemma", recurrent)):
    # Weights of 0.02 would give logits that no cap touches.
    model.eval().lm_head.weight.data.mul_(50)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.float()
        own = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).sum().item()
        add_fused_lm_head(model)
        theirs = model(ids, labels=ids, fused_lm_head=True).log_probs.sum().item()
    print(f"{name}: by its logits {own:.3f}, by the trainers {theirs:.3f}")
    gaps[name] = abs(own - theirs)
assert gaps["Gemma 2"] < 1e-3 and gaps["RecurrentGemma"] > 100, gaps
END
