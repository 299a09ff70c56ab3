"""Several processes (torchrun): sharded training computes what one process computes, work that is shared out is done once."""
import json
import multiprocessing
import os
import shutil
import socket

import pytest
import torch

import train
from conftest import TINY
from data import DOMAINS, InputError, dealt_batches, read_json
from interop.parallel import gather, gathered, join_processes, local_items, placed, rank, total, whole
from mah_dpo import Pair
from model import load_hf, load_safetensors, save_safetensors
from prm import Labelled, STEP
from train import Config, Run, read_rows
from test_train import rows_of

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the tests fork")


def in_processes(n, work, *args):
    """Run work(*args) in n forked processes that stand to each other as torchrun's do."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def child(r):
        os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        join_processes()
        work(*args)
        torch.distributed.destroy_process_group()
    started = [multiprocessing.get_context("fork").Process(target=child, args=(r,)) for r in range(n)]
    for process in started:
        process.start()
    for process in started:
        process.join(100)
        process.kill()
    assert [process.exitcode for process in started] == [0] * n


def the_run(path, **settings):
    """The run in a directory."""
    saved = {k: v for k, v in read_json(os.path.join(path, "config.json")).items() if k != "objectives"}
    return Run(path, Config(**saved | settings))


def test_helpers_in_three_processes():
    """Prevents: rows that no process takes or two take, batches of unequal number (a process that waits for ever), sums and
    lists that differ between the processes."""
    lengths = [5, 90, 7, 8, 30, 31, 6, 9, 40]

    def work():
        taken = [i for batch in dealt_batches(lengths, 80) for i in batch]
        assert sorted(taken) == list(range(rank(), 9, 3)) and local_items(list(range(9))) == sorted(taken)
        assert len(set(gather([len(dealt_batches(lengths, 80))]))) == 1
        assert all(len(batch) * max(lengths[i] for i in batch) <= 90 for batch in dealt_batches(lengths, 80))
        assert sorted(gather(taken)) == list(range(9)) and int(total(torch.tensor(rank()))) == 3
        t = torch.arange(7.0)[:, None] * torch.ones(5)
        part = placed(t, "cpu")
        assert part.to_local().untyped_storage().nbytes() <= 3 * 5 * 4          # a shard, not a view of the whole
        assert torch.equal(whole(part), t) and gathered(part).is_meta == (rank() > 0)
    in_processes(3, work)


def record_gradients(run, directory):
    """Do the training stages of a run again, each from its old inputs, and keep every gradient: STAGE.STEP.safetensors."""
    os.makedirs(directory, exist_ok=True)
    plain, count, last = train.gradient, [0], [None]

    def gradient(optimizer, *args):
        found = plain(optimizer, *args)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        count[0] = count[0] + 1 if last[0] is optimizer else 0
        last[0] = optimizer
        save_safetensors({str(i): whole(p.grad) for i, p in enumerate(parameters) if p.grad is not None},
                         os.path.join(directory, f"{stage}.{count[0]}.safetensors"))
        return found
    batches = train.dealt_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "gradient", gradient)
        patch.setattr(train, "dealt_batches", lambda lengths, _=0: batches(lengths, tokens=200))       # several parts a step
        margins = torch.zeros(len(read_rows(run.file("pairs.jsonl"), Pair)))
        for stage, work in (("prm", lambda: train.train_prm(run, "prm", [*run.objectives, "math_accuracy"])),
                            ("mah_dpo", lambda: train.train_policy(run, "mah_dpo", run.objectives, run.objectives)),
                            ("modpo", lambda: train.train_policy(run, "modpo", ["policy"], run.objectives, margins)),
                            ("sft", lambda: train.train_sft(run)), ("base", lambda: train.train_base(run))):
            work()


def test_two_processes_compute_what_one_computes(whole, tmp_path):
    """Prevents: a loss averaged over a process's own rows or steps, a head without gradient in one process, a parameter that
    is sharded and never gathered, a file with a shard in it: first gradients are equal, then losses, norms and weights."""
    paths = [shutil.copytree(whole, str(tmp_path / name)) for name in ("one", "two")]
    runs = [the_run(path, checkpoint_every=1) for path in paths]
    for run in runs:
        os.remove(run.file("sft_logps.safetensors"))
        rows = read_rows(run.file("labels.jsonl"), Labelled)
        for row in rows[::3]:               # some with more labels than others
            row.ends, row.targets = [row.ends[0] - 1, *row.ends], [row.targets[0], *row.targets]
        for row in rows:                    # and some of a value model, with its auxiliary output
            row.targets[-1] |= {"math_accuracy": len(row) / 20, STEP: len(row) % 2}
        train.write_rows(run.file("labels.jsonl"), rows)
    record_gradients(runs[0], str(tmp_path / "g1"))
    in_processes(2, lambda: record_gradients(the_run(paths[1], checkpoint_every=1), str(tmp_path / "g2")))
    assert sorted(os.listdir(tmp_path / "g1")) == sorted(os.listdir(tmp_path / "g2"))
    for name in os.listdir(tmp_path / "g1"):
        one, two = (load_safetensors(str(tmp_path / g / name)) for g in ("g1", "g2"))
        assert one.keys() == two.keys()
        for k, t in one.items():
            torch.testing.assert_close(two[k], t, atol=1e-5 * float(t.abs().max()) if ".0." in name else 1e-3, rtol=0, msg=name)
    for a, b in zip(*(rows_of(run.file("log.jsonl")) for run in runs), strict=True):
        assert close(a, b), (a, b)
    for name in ("base", "sft", "prm", "mah_dpo", "modpo"):
        one, two = (load_safetensors(run.file(f"{name}/model.safetensors")) for run in runs)
        assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=1e-3) for k in one), name


def close(a, b):
    """Two rows of a log: the same keys, numbers that differ by rounding."""
    if isinstance(a, dict):
        tie = abs(a.get("margin", 1)) < 1e-4        # policy = reference: rounding decides which is larger
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a if k != "accuracy" or not tie)
    return a == pytest.approx(b, rel=2e-3, abs=1e-3) if isinstance(a, float) else a == b


def test_a_run_on_two_processes(small_worlds, tmp_path):
    """Prevents: samples or rows of the tables that are made twice or not at all, two processes that write one file, a stage that
    only one of them reaches."""
    out = str(tmp_path / "two")
    in_processes(2, lambda: train.main(["--objective", "math_engagement", "--out", out, *TINY]))
    run, tokenizer = the_run(out), load_hf(os.path.join(out, "base")).tokenizer
    for split in ("train", "dev"):
        problems = [p for name in ("sft", "mah_dpo")
                    for p in DOMAINS["math"].problems(split, 8, run.rng("rollouts", name, "math", split))]
        rows = [r.ids for r in read_rows(run.file("labels.jsonl"), Labelled) if r.split == split]
        prompts = [tokenizer.encode_chat(p.messages()) for p in problems]
        assert len(rows) == 16 and all(sum(ids[:len(p)] == p for ids in rows) == prompts.count(p) for p in prompts)
    rows = [r for r in read_json(run.file("results.json")) if r["domain"] == "math"]
    assert [r["policy"] for r in rows if r["guide"] is None] == \
        ["base", "sft", "sft_greedy", "single_head_dpo", "modpo", "soup", "mah_dpo", "mah_dpo_greedy", "mah_dpo:math_engagement"]
    assert len({json.dumps(r["metrics"]) for r in rows}) > 1 and len(rows) == 9 + 4
    assert {r["stage"] for r in rows_of(run.file("log.jsonl"))} >= {"base", "sft", "judge", "prm", "mah_dpo", "modpo"}


def test_batches_that_cannot_be_shared_are_refused(monkeypatch):
    """Prevents: a process without rows, which waits for ever or weighs its objectives otherwise."""
    monkeypatch.setattr(train, "ranks", lambda: 3)
    with pytest.raises(InputError, match="--sft-batch 64: 3 processes cannot share it evenly"):
        train.check_config(Config(objective="math"))
    train.check_config(Config(objective="math", init=".", sft_batch=63, prm_batch=66, dpo_pairs=9))
