#!/bin/bash
# trl 1.16.0, transformers 5.24.0, torch 2.13.0, CPU
# DPOTrainer mixes losses (loss_type=["sigmoid", "sft"]) and weights pairs by how likely the policy
# finds them (use_weighting=True, WPO).  Each works alone; together the first step raises
# torch's RuntimeError about memory that is written twice, which names neither option: the SFT term
# is one number expanded over the pairs, and the weights are multiplied into it in place.
# Expected: a step, or a refusal of the two options when they are given.
# Seen, the loss of one step:
#   sigmoid: 0.693
#   sigmoid + sft: 3.022
#   sigmoid, weighted: 0.674
#   sigmoid + sft, weighted: RuntimeError
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 transformers==5.24.0 trl==1.16.0
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore 2>/dev/null - <<'END'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer

words = ["<pad>", "<eos>", *"abcdefgh"]
spec = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
spec.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=spec, pad_token="<pad>", eos_token="<eos>")
torch.manual_seed(0)
# The trainer reads the reference model from where the policy came from.
GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_positions=32, n_embd=16, n_layer=1, n_head=1,
                           bos_token_id=1, eos_token_id=1, pad_token_id=0)).save_pretrained("tiny")
pairs = Dataset.from_dict({"prompt": ["a b ", "c d "], "chosen": ["e f", "g h"],
                           "rejected": ["h g", "f e a"]})


def one_step(**options):
    config = DPOConfig("out", per_device_train_batch_size=2, max_steps=1, report_to=[], bf16=False,
                       save_strategy="no", use_cpu=True, disable_tqdm=True, **options)
    model = GPT2LMHeadModel.from_pretrained("tiny")
    trainer = DPOTrainer(model=model, args=config, train_dataset=pairs, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer.train().training_loss


seen = {}
for name, options in {"sigmoid": {}, "sigmoid + sft": {"loss_type": ["sigmoid", "sft"]},
                      "sigmoid, weighted": {"use_weighting": True},
                      "sigmoid + sft, weighted": {"loss_type": ["sigmoid", "sft"],
                                                  "use_weighting": True}}.items():
    try:
        seen[name] = f"{one_step(**options):.3f}"
    except RuntimeError as error:
        assert "single memory location" in str(error), error
        seen[name] = "RuntimeError"
    print(f"{name}: {seen[name]}")
assert seen["sigmoid"] == "0.693" and seen["sigmoid, weighted"] == "0.674", seen
assert seen["sigmoid + sft"] == "3.022" and seen["sigmoid + sft, weighted"] == "RuntimeError", seen
END
