"""Released reward models: heads that others put on a backbone, brought to one score per token.

    a classifier                     score, one or two labels    read at a step's last token
    a Qwen2ForProcessRewardModel     score.0, ReLU, score.2      read at <extra_0> behind a step
    value_head.safetensors beside    0, ReLU, 2                  there, if the tokenizer has that
    the backbone

prm.load_prm asks `read_released_head` for layers, outputs and marker, and makes the PRM of them.
"""
import os
from typing import NamedTuple

import torch.nn as nn

from data import InputError, Objective

ARCHITECTURES = "ForSequenceClassification", "ForTokenClassification", "ForProcessRewardModel"
# Nothing is known of what it was trained on; its steps end wherever those of a policy do.
REWARD = Objective("reward", "", "C", "")


class Released(NamedTuple):
    """What a directory says about a reward model, but for the backbone."""
    score: nn.Module      # (B, T, d) -> (B, T, 1)
    outputs: list         # of one Objective
    marker: int           # the token at which steps are scored, or None


def read_released_head(directory, config, files, tokenizer, dtype):
    """config: model.read_config(directory). files: model.Checkpoint(directory); the head's tensors
    are taken from it. InputError for a directory that is no reward model."""
    kind = str((config.hf.get("architectures") or [""])[0])
    value_head = os.path.join(directory, "value_head.safetensors")
    if os.path.exists(value_head):       # counts more than a classifier's head beside the backbone
        files.unused -= {"score.weight", "score.bias"}
        files.add(value_head, score_name)
    elif not kind.endswith(ARCHITECTURES):
        raise InputError(f"{directory}: no reward model: config.json names neither prm_outputs nor "
                         f"an architecture that ends in {' or '.join(ARCHITECTURES)}, and there "
                         "is no value_head.safetensors")
    if "score.0.weight" in files.entries:
        hidden = read_linear(files, "score.0", config.d_model, config.d_model, dtype)
        score = nn.Sequential(hidden, nn.ReLU(), read_log_odds(files, "score.2", config, dtype))
    else:
        score = read_log_odds(files, "score", config, dtype)
    marker = None
    if os.path.exists(value_head) or kind.endswith("ForProcessRewardModel"):
        marker = tokenizer.specials.get("<extra_0>") if tokenizer else None
        if marker is None and not os.path.exists(value_head):
            raise InputError(f"{directory}: a {kind} is read at <extra_0>, which its tokenizer "
                             "lacks")
    return Released(score, [REWARD], marker)


def score_name(name):
    """The name of a tensor of value_head.safetensors, as a PRM's own would be: value_head.2.bias
    and 2.bias -> score.2.bias."""
    return "score." + ".".join(name.split(".")[-2:])


def read_linear(files, name, n_out, n_in, dtype):
    """The linear map of the tensors name.weight and, if the file has that, name.bias."""
    layer = nn.Linear(n_in, n_out, bias=f"{name}.bias" in files.entries, dtype=dtype)
    for key, parameter in layer.named_parameters():
        parameter.copy_(files.take(f"{name}.{key}", parameter.shape, dtype))
    return layer


def read_log_odds(files, name, config, dtype):
    """The last linear map, to one score: of two labels the log-odds of the second."""
    shape = files.entry(f"{name}.weight")[2]
    layer = read_linear(files, name, min(2, shape[0]), config.d_model, dtype)
    if layer.out_features == 2:
        layer.weight = nn.Parameter(layer.weight[1:] - layer.weight[:1])
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[1:] - layer.bias[:1])
        layer.out_features = 1
    return layer
