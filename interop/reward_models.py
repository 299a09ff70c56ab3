"""Released reward models: heads that others put on a backbone, brought to one score per token.

    score.weight                       a classifier's linear map, OpenRLHF's
    v_head.summary.weight              TRL's
    score.0.weight, score.2.weight     two maps, with a ReLU between: Qwen's

and so on: HEADS has the names. A head may also stand in a file of its own beside the backbone. Of
one label the value counts, of two the log-odds of the second. prm.load_prm asks
`read_released_head` for layers and marker, and makes the PRM of them.
"""
import os
import re

import torch.nn as nn

from data import InputError, Objective

# What heads are called, in the backbone's file, or as files beside it: value_head.safetensors.
HEADS = ["score", "v_head", "value_head", "regression_head", "reward_head", "score_head", "rm_head",
         "classifier", "critic_head", "classification_head"]
# A head's name, which it needs in the backbone's file alone; a map's number, if there are several.
TENSOR = re.compile(rf"((?:(?:{'|'.join(HEADS)})\.)?(?:summary\.)?)(\d\.)?(?:weight|bias)")
# Nothing is known of what it was trained on; its steps end wherever those of a policy do.
REWARD = Objective("reward", "", "C", "")


def read_released_head(directory, config, files, tokenizer, dtype):
    """-> layers (B, T, d) -> (B, T, 1), and the token at which steps are scored, or None.

    config: model.read_config(directory). files: model.Checkpoint(directory), from which the
    backbone was taken. InputError for a directory that is no reward model."""
    near = [name for name in os.listdir(directory) if name.partition(".")[0] in HEADS]
    beside = [name for name in near if name.endswith(".safetensors")]
    # A file beside counts more than a head that was left in the backbone's.
    for name in list(files.unused) if beside else []:
        if TENSOR.fullmatch(name):
            files.unused.remove(name)
            del files.entries[name]
    for name in beside:
        files.add(os.path.join(directory, name))
    # The maps that are there: (head's name, map's number).
    maps = set()
    for name in files.unused:
        match = TENSOR.fullmatch(name)
        if match:
            maps.add(match.groups(""))
    maps = sorted(maps)
    numbers = [number for _, number in maps]
    if numbers not in ([""], ["0.", "2."]) or maps[0][0] != maps[-1][0]:
        found = sorted(files.unused, key=len)[:8] + near or ["no others"]
        raise InputError(f"{directory}: no reward model that is known here: config.json names no "
                         f"prm_outputs, and beside the backbone are {', '.join(found)}; wanted "
                         "is one head, NAME.weight or NAME.0.weight and NAME.2.weight as "
                         f"safetensors, where NAME is {', '.join(HEADS)}")
    layers, width = [], config.d_model
    for head, number in maps:
        layer = read_linear(files, head + number, width, number != "0.", dtype)
        layers += [layer, nn.ReLU()]
        width = layer.out_features
    kind, marker = str((config.hf.get("architectures") or [""])[0]), None
    if beside or kind.endswith("ForProcessRewardModel"):
        marker = tokenizer.specials.get("<extra_0>") if tokenizer else None
        if marker is None and not beside:
            raise InputError(f"{directory}: a {kind} is read at <extra_0>, which its tokenizer "
                             "lacks")
    return nn.Sequential(*layers[:-1]), marker


def read_linear(files, name, n_in, is_last, dtype):
    """The map of the tensors {name}weight and, if there is that, {name}bias. The last map has one
    or two labels, and comes out with one."""
    # Whatever shape cannot be is refused by take.
    entry = files.entries.get(f"{name}weight")
    n_out = entry[2][0] if entry and entry[2] else 1
    if is_last:
        n_out = min(n_out, 2)
    tensors = {"weight": files.take(f"{name}weight", (n_out, n_in), dtype)}
    if f"{name}bias" in files.entries:
        tensors["bias"] = files.take(f"{name}bias", (n_out,), dtype)
    # Two labels are bad and good: the log-odds of the second.
    if is_last and n_out == 2:
        for key, t in tensors.items():
            tensors[key] = t[1:] - t[:1]
    layer = nn.Linear(n_in, len(tensors["weight"]), bias="bias" in tensors, device="meta")
    layer.load_state_dict(tensors, assign=True)
    return layer
