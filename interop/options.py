"""The options of train.py: a table, its command line, and what is refused.

    Config          all options, with their defaults and their lines in --help
    read_command    the command line -> Config
    check_config    are the values in their ranges?
"""
import argparse
from dataclasses import dataclass, field, fields

from data import InputError
from decode import parse_weights
from interop.datasets import DATA_HELP
from interop.parallel import ranks
from interop.real_data import objectives_of
from mah_dpo import RULES

# The names under which --dpo-lr-factor knows the preference-trained policies.
METHODS = ["mah_dpo", "single_head_dpo", "modpo", "soup"]


def option(default, text, **about):
    """A field of Config: its default, its line in --help; perhaps `fast`, its value under --fast,
    and what it may be: at least `low` (if not said: 0, of a whole number 1), below `high`, one of
    `choices`."""
    return field(default=default, metadata={"help": text} | about)


@dataclass
class Config:
    """All that a run depends on, and its command line: one flag per field. Saved in config.json."""
    objective: str = option("all", "all, domains (math, values, tutoring) or objectives, with "
                            "commas; with --data those of its files")
    out: str = option("", "run directory (default runs/<objective>; a taken name gets a number)")
    from_: str = option("", "start from copies of what this run has finished under these options")
    init: str = option("", "Hugging Face directory that serves as the base model")
    template_args: str = option("", "variables for the chat template of --init, NAME=VALUE,..., "
                                "such as enable_thinking=false")
    data: str = option("", "directory of real data, a file for each objective (needs --init)")
    seed: int = option(0, "every random draw of the run derives from it", low=0)
    seeds: int = option(1, "train so often, with seed, seed + 1, ..., for intervals over trainings")
    device: str = option("auto", "auto, cpu, cuda or mps")
    # bf16 is torch's autocast; weights and losses stay in fp32.
    dtype: str = option("fp32", "fp32, or bf16 for training", choices=["fp32", "bf16"])
    # Less memory for a third more time.
    grad_checkpoint: bool = option(False, "training recomputes each block in backward")
    # A unified PRM has an output per objective.
    prm: str = option("unified", "one PRM, or one per objective", choices=["unified", "each"])
    # The paper's is 1.0.
    temperature: float = option(0.7, "of samples, rollouts, candidates and tables", low=1e-6)
    beta: float = option(0.1, "strength of the tie to the reference policy in DPO", low=1e-9)
    alpha: str = option("", "weights of the objectives' losses, NAME=NUMBER,... (1 if not named)")
    gamma: float = option(0.9, "discount per step in hindsight targets")
    perturbation: float = option(1e-3, "standard deviation of the noise on a head's copy of SFT's")
    # Language models.
    base_steps: int = option(1200, "pre-training steps of 64 conversations", fast=300)
    base_lr: float = option(3e-3, "peak learning rate of pre-training")
    sft_steps: int = option(120, "SFT steps", fast=10)
    sft_batch: int = option(64, "conversations per SFT step")
    sft_lr: float = option(3e-4, "SFT learning rate")
    # A training ends there, or at its number of steps.
    epochs: int = option(8, "most passes of a training over its largest source of data")
    # Samples, which become pairs, and rollouts, which become labels.
    n_prompts: int = option(1000, "prompts per domain whose samples become pairs", fast=60)
    n_samples: int = option(6, "responses sampled per prompt", fast=4, low=2)
    # For the value model three times the problems are worth more than a second rollout of each,
    # which costs as much.
    n_rollout_prompts: int = option(12000, "problems whose every step gets rollouts", fast=40)
    rollouts: int = option(1, "M, rollouts per prefix (the response itself is the first)")
    judge_labels: str = option("graded", "labels of judged steps: graded, the mean rating, or the "
                               "paper's majority", choices=["graded", "majority"])
    # The process reward model.
    prm_steps: int = option(1200, "PRM training steps", fast=10)
    # Shared by the domains as they have labels, but at least prm_pairs of each.
    prm_batch: int = option(64, "labelled sequences per PRM step")
    prm_pairs: int = option(4, "pairs per objective and PRM step")
    # Where the auxiliary output of the next line has no labels, as with --data, a larger weight is
    # better: the value model alone drowns in the noise of the other outputs' gradients.
    prm_value_weight: float = option(5.0, "weight of the value model's squared error in the loss")
    prm_step_weight: float = option(60.0, "weight in it of the auxiliary output: is a step right?")
    prm_lr_backbone: float = option(1.5e-3, "PRM learning rate, backbone")
    prm_lr_head: float = option(2e-3, "PRM learning rate, MLP")
    # The policies.
    dpo_steps: int = option(100, "steps of every preference-trained policy", fast=6)
    dpo_pairs: int = option(8, "pairs per objective and step")
    dpo_lr_backbone: float = option(1e-5, "learning rate of the backbone in preference training")
    dpo_lr_heads: float = option(4e-4, "learning rate of the heads in preference training")
    # With these factors all four methods end about as far from SFT: .052 to .057 nats per token at
    # temperature 1 on development prompts, mean of the domains. Names: METHODS; 1 where not named.
    dpo_lr_factor: str = option("single_head_dpo=0.55,modpo=0.55", "factors on the heads' rate, "
                                "NAME=NUMBER,... of mah_dpo, single_head_dpo, modpo, soup")
    # sum is the plain gradient of the loss; the others are in mah_dpo.combine.
    combine: str = option("sum", "rule by which MAH-DPO's objectives share the backbone: "
                          f"{', '.join(RULES)}", choices=RULES)
    combine_c: float = option(0.4, "how far raco and cagrad part from the sum, in [0, 1)",
                              high=1)
    conflict_every: int = option(20, "steps between looks, for log.jsonl, at the cosines of the "
                                 "objectives' gradients on the backbone; 0: never, which saves a "
                                 "gradient's memory for each", low=0)
    # The tables.
    n_test: int = option(200, "prompts per domain that the tables measure", fast=12)
    # dev while settings are still being chosen.
    split: str = option("test", "prompts of the tables: test or dev", choices=["test", "dev"])
    weight_steps: int = option(10, "steps from one head to another in the sweep of weights, or 0",
                               fast=2, low=0)
    spacing: str = option("equal", "weights of the sweep: equal, or by a second sweep at equal "
                          "distances along the front that the first has measured",
                          choices=["equal", "front"])
    k: int = option(5, "K, candidates per step of guided decoding, and whole answers of its rivals")
    max_new_tokens: int = option(256, "most tokens of a sampled answer to a real question")
    checkpoint_every: int = option(100, "steps of a training between checkpoints for --resume")


# Options that change no figure: a run may go on, or be started from, under other values.
HARMLESS = ["out", "from_", "seeds", "device", "checkpoint_every", "conflict_every"]


def flag(name):
    """The flag of a field of Config."""
    return "--" + name.rstrip("_").replace("_", "-")


def read_command(argv, description):
    """Command line -> Config, directory to resume or None. InputError for an option beside
    --resume."""
    # SUPPRESS: an option that is not given is absent, and takes its default from Config.
    parser = argparse.ArgumentParser(description=description, epilog=DATA_HELP,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    small = {}
    for f in fields(Config):
        text = f"{f.metadata['help']} (default {f.default!r})".replace("%", "%%")
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument(flag(f.name), dest=f.name, help=text, **kind)
        if "fast" in f.metadata:
            small[f.name] = f.metadata["fast"]
    parser.add_argument("--fast", action="store_const", const=small, default={},
                        help="every stage, small: shows that it works, finds nothing")
    parser.add_argument("--resume", metavar="RUN", help="go on with an unfinished run, under its "
                        "own options; takes no other option but --device")
    given = vars(parser.parse_args(argv))           # only what stands on the command line
    fast, resume = given.pop("fast"), given.pop("resume", None)
    if resume == "":                                # an empty variable of a script
        raise InputError("--resume needs the directory of a run")
    if resume and (fast or set(given) - {"device"}):
        raise InputError("--resume goes on with the run's own configuration; give no option with "
                         "it but --device")
    return Config(**fast | given), resume


def check_config(config, objectives=None):
    """InputError for an option out of its range. objectives: those of a run that has begun."""
    for f in fields(config):
        value = getattr(config, f.name)
        low = f.metadata.get("low", 1 if f.type is int else 0)
        if f.type in (int, float) and not low <= value < f.metadata.get("high", 2**31):
            raise InputError(f"{flag(f.name)} {value} is out of range")
        if value not in f.metadata.get("choices", [value]):
            choices = " or ".join(f.metadata["choices"])
            raise InputError(f"{flag(f.name)} {value}: choose {choices}")
    for name in ("sft_batch", "dpo_pairs"):
        size = getattr(config, name)
        if size % ranks():
            raise InputError(f"{ranks()} processes cannot share {flag(name)} {size} evenly; choose "
                             "a multiple, or another number of processes")
    if config.template_args and not config.init:
        raise InputError("--template-args needs --init: the embedded model has no chat template")
    if config.data and not config.init:
        raise InputError("--data needs --init: the embedded model knows only its own small worlds")
    # NAME=NUMBER,... for known names.
    names = [o.name for o in objectives or objectives_of(config.objective, config.data)]
    parse_weights(config.alpha, names, "--alpha", 1.0)
    parse_weights(config.dpo_lr_factor, METHODS, "--dpo-lr-factor", 1.0)
