"""experiments/ensemble.py: are logits mixed and probabilities mixed the same policy?

    python experiments/ensemble.py RUN         a finished run of train.py, of one or several seeds

The uniform mix of the heads z_i = W_i h of the domain, in MAH-DPO, in two ways:
    logits           softmax(sum_i w_i z_i) ~ prod_i pi_i^w_i, which folds into one head
    probabilities    sum_i w_i softmax(z_i), as if for every token a head were drawn, then the token
TV (total variation) and KL compare a next token's distributions at what a way has said; kl is that
from SFT. Calibration: the log-likelihood of a token of the chosen answers of held-out pairs.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402

from data import run_command  # noqa: E402
from evaluate import Bench, cells, row_name, summary, table  # noqa: E402
from experiments.vary import averaged, picture, read_arguments  # noqa: E402
from interop.resume import read_rows  # noqa: E402
from mah_dpo import Pair  # noqa: E402
from model import linear  # noqa: E402
from train import choose  # noqa: E402


class Probabilities:
    """A mix of a model's probabilities, as a model: its states are the mix's log-probabilities
    times the temperature, and its head, the identity, makes logits of them."""

    def __init__(self, model, weights, temperature):
        self.model, self.temperature = model, temperature
        self.tokenizer, self.config, self.embed = model.tokenizer, model.config, model.embed
        self.new_cache, self.w = model.new_cache, model.weights(weights)       # w (H,)

    def __call__(self, ids, cache=None, rows=None):
        """ids (B, T) -> (B, T, V), as GPT.forward."""
        h = self.model(ids, cache, rows)                                       # (B, T, d)
        each = []
        for i in self.w.nonzero()[:, 0].tolist():
            logits = self.model.logits(h, i) / self.temperature
            log_pi = logits.log_softmax(-1)
            each.append(self.w[i].log() + log_pi)
        return self.temperature * torch.stack(each).logsumexp(0)

    def fold(self, weights):
        """The identity (V, V): the weights are in the states."""
        return torch.eye(self.config.vocab_size)


class Mixed(Bench):
    """A Bench whose policies mix probabilities."""

    def policy(self, job):
        model, weights = super().policy(job)
        return Probabilities(model, weights, self.config["temperature"]), weights


@torch.inference_mode()
def log_probs(bench, job, prompt, answer):
    """The log-probabilities that a policy gives to what may come in the place of every token of an
    answer (n, V), at the run's temperature. prompt, answer: ids."""
    model, weights = bench.policy(job)
    h = model(torch.tensor([prompt + answer]))[0]                              # (T, d)
    # The state at t predicts the token at t + 1.
    logits = linear(h[len(prompt) - 1:-1], model.fold(weights))
    return (logits / bench.config["temperature"]).log_softmax(-1)


def distances(own, other):
    """Log-probabilities of two distributions (n, V) -> their total variation, and KL(own || other)
    in nats (n,)."""
    p = own.exp()
    tv = (p - other.exp()).abs().sum(-1) / 2
    return tv, (p * (own - other)).sum(-1)


def row_of(way, bench, other, domain, held_out):
    """The row of one way of mixing, beside the other one's Bench. held_out: Pairs. TV and KL are
    means over an answer's tokens, as kl is."""
    job, = [job for job in bench.jobs(domain) if row_name(job._asdict()) == "mah_dpo"]
    row = bench.row(job)
    each = {"TV": [], "KL": [], "log-likelihood": []}
    talks, _, _ = bench.rollout(job)
    for talk in talks:
        for turn in talk.turns:
            said = job, turn.before, turn.response
            own = log_probs(bench, *said)
            tv, kl = distances(own, log_probs(other, *said))
            each["TV"].append(tv.mean().item())
            each["KL"].append(kl.mean().item())
    for pair in held_out:
        logps = log_probs(bench, job, pair.prompt, pair.chosen)                # (n, V)
        # Of every distribution, what it says of the token that came.
        said = logps[range(len(pair.chosen)), pair.chosen]
        each["log-likelihood"].append(said.mean().item())
    metrics = row["metrics"] | {name: summary(values) for name, values in each.items()}
    return row | {"policy": way, "metrics": metrics, "tv": each["TV"]}


def main(argv=None):
    """The command line."""
    args = read_arguments(__doc__, argv)
    results = []
    for run in args.trainings:
        logits, mixed = Bench(run.path, "cpu"), Mixed(run.path, "cpu")
        for bench in (logits, mixed):
            bench.config["n_test"] = run.config.n_test
        pairs = read_rows(run.file("pairs.jsonl"), Pair)
        held_out = choose(pairs, args.names, "dev")
        results.append([row_of("logits", logits, mixed, args.domain, held_out),
                        row_of("probabilities", mixed, logits, args.domain, held_out)])
    rows = averaged(results)
    metrics = [*args.names, "TV", "KL", "log-likelihood", "kl"]
    lines = [cells(row, metrics, ["policy"]) for row in rows]
    print(table(f"{args.domain}, the heads' uniform mix", lines))
    # Answers of the first training, from the one at which both agree most.
    curves = {row["policy"]: list(enumerate(sorted(row["tv"]))) for row in rows}
    picture(f"{args.out}/ensemble.svg", [("TV", "answers", curves)])


if __name__ == "__main__":
    run_command(main)
