"""Several processes (torchrun): sharded training computes what one process computes, work that is
shared out is done once."""
import json
import multiprocessing
import os
import shutil
import socket
import time
from dataclasses import fields

import pytest
import torch

import train
from conftest import TINY
from data import DOMAINS, OBJECTIVES, InputError, dealt_batches, read_json, run_command
from interop import options
from interop.manifest import check_files
from interop.options import Config
from interop.parallel import (
    gather, gathered, in_threads, join_processes, leave_processes, local_items, placed, rank, total,
    whole)
from model import load_hf, load_safetensors, save_safetensors
from prm import STEP, Labelled
from test_train import rows_of
from train import Run, read_rows

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(),
                                reason="the tests fork")


def in_processes(n, work, *args):
    """Run work(*args) in n forked processes that stand to each other as torchrun's do."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])

    def child(r):
        os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        join_processes()
        work(*args)
        leave_processes()
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=child, args=(r,)) for r in range(n)]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in started] == [0] * n


def test_helpers_in_three_processes():
    """Prevents: rows that no process takes or two take, batches of unequal number (a process that
    waits for ever), sums and lists that differ between the processes."""
    lengths = [5, 90, 7, 8, 30, 31, 6, 9, 40]

    def work():
        batches = dealt_batches(lengths, 80)
        taken = sum(batches, [])
        assert len(taken) == 3 and list(range(rank(), 9, 3)) == local_items(list(range(9)))
        assert len(set(gather([len(batches)]))) == 1
        assert all(len(batch) * max(lengths[i] for i in batch) <= 90 for batch in batches)
        assert sorted(gather(taken)) == list(range(9)) and int(total(torch.tensor(rank()))) == 3
        t = torch.arange(7.0)[:, None] * torch.ones(5)
        part = placed(t, "cpu")
        # A shard, not a view of the whole.
        assert part.to_local().untyped_storage().nbytes() <= 3 * 5 * 4
        assert torch.equal(whole(part), t) and gathered(part).is_meta == (rank() > 0)
    in_processes(3, work)


def test_a_command_parts_from_the_others():
    """Prevents: a finished command that aborts in one of 25 runs: torch's threads outlive it."""
    def work():
        run_command(lambda: None)
        assert not torch.distributed.is_initialized()
    in_processes(2, work)


def the_run(path):
    """The run in a directory, which saves a checkpoint after every step."""
    saved = read_json(f"{path}/config.json")
    config = Config(**{f.name: saved[f.name] for f in fields(Config)})
    config.checkpoint_every, config.conflict_every = 1, 0
    return Run(path, config)


def record_gradients(run, directory):
    """Do the training stages of a run again, each from its old inputs, and keep every gradient:
    STAGE.STEP.safetensors."""
    os.makedirs(directory, exist_ok=True)
    plain, batches, count = train.gradient, train.dealt_batches, []

    def gradient(optimizer, *args, **options):
        found = plain(optimizer, *args, **options)
        grads = {str(i): whole(p.grad) for i, p in enumerate(train.parameters_of(optimizer))
                 if p.grad is not None}
        name = f"{stage}-{run.config.combine}.{len(count)}.safetensors"
        save_safetensors(grads, os.path.join(directory, name))
        count.append(stage)
        return found

    def dealt(lengths, _=0):            # several parts a step
        return batches(lengths, tokens=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "gradient", gradient)
        patch.setattr(train, "dealt_batches", dealt)
        # The value model's world has no head here that could draw candidates.
        patch.setattr(train, "set_units", lambda prm, run: None)
        patch.setattr(train, "set_margins", lambda run, pairs: [
            setattr(pair, "margin", 0.0) for pair in pairs])
        for stage, work, rule in (("prm", train.train_prm, "sum"),
                                  ("mah_dpo", train.train_policy, "sum"),
                                  ("mah_dpo", train.train_policy, "raco"),
                                  ("modpo", train.train_policy, "sum"),
                                  ("sft", train.train_sft, "sum"),
                                  ("base", train.train_base, "sum")):
            count.clear()
            run.config.combine = rule
            work(run, stage)
            # Only the PRM has an output for the value model.
            run.objectives = run.objectives[:len(run.names)]


def with_a_value_model(run):
    """Give some of a run's sequences more labels than others, and labels of a value model with its
    auxiliary output."""
    rows = read_rows(run.file("labels.jsonl"), Labelled)
    for row in rows[::3]:
        row.ends, row.targets = [row.ends[0] - 1, *row.ends], [row.targets[0], *row.targets]
    for row in rows:
        row.targets[-1] |= {"math_accuracy": len(row) / 20, STEP: len(row) % 2}
    train.write_rows(run.file("labels.jsonl"), rows)
    run.objectives = [*run.objectives, OBJECTIVES["math_accuracy"]]
    run.domains["math"] = ["math_accuracy"]
    return run


def test_two_processes_compute_what_one_computes(whole, tmp_path):
    """Prevents: a loss averaged over a process's own rows or steps, a head without gradient in one
    process, inner products of a process's own shards, a parameter that is sharded and never
    gathered, a file with a shard in it: first gradients are equal, then losses, norms and
    weights."""
    paths = [shutil.copytree(whole, str(tmp_path / name)) for name in ("one", "two")]
    one = with_a_value_model(the_run(paths[0]))
    shutil.copy(one.file("labels.jsonl"), os.path.join(paths[1], "labels.jsonl"))
    objectives = one.objectives

    def work():
        two = the_run(paths[1])
        two.objectives, two.domains = objectives, one.domains
        record_gradients(two, str(tmp_path / "g2"))
    record_gradients(one, str(tmp_path / "g1"))
    in_processes(2, work)
    assert sorted(os.listdir(tmp_path / "g1")) == sorted(os.listdir(tmp_path / "g2"))
    for name in os.listdir(tmp_path / "g1"):
        a, b = (load_safetensors(str(tmp_path / g / name)) for g in ("g1", "g2"))
        assert a.keys() == b.keys()
        for key, t in a.items():
            bound = 1e-5 * float(t.abs().max()) if ".0." in name else 1e-3
            torch.testing.assert_close(b[key], t, atol=bound, rtol=0, msg=name)
    for a, b in zip(*(rows_of(f"{path}/log.jsonl") for path in paths), strict=True):
        assert close(a, b), (a, b)
    for name in ("base", "sft", "prm", "mah_dpo", "modpo"):
        a, b = (load_safetensors(f"{path}/{name}/model.safetensors") for path in paths)
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[key], b[key], atol=1e-3) for key in a), name


def close(a, b):
    """Two rows of a log: the same keys, numbers that differ by rounding; but of accuracies, which
    ask for the sign of a margin that is nothing but rounding where a policy equals the reference."""
    if isinstance(a, dict):
        kept = [key for key in a if key != "accuracy"]
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in kept)
    return a == pytest.approx(b, rel=2e-3, abs=1e-3) if isinstance(a, float) else a == b


def test_a_run_on_two_processes(small_worlds, tmp_path):
    """Prevents: samples or rows of the tables that are made twice or not at all, two processes that
    write one file, a stage that only one of them reaches; one process that goes on with what two
    have begun, and draws other numbers."""
    out = str(tmp_path / "two")
    in_processes(2, lambda: train.main(["--objective", "math_engagement", "--out", out, *TINY]))
    run, tokenizer = the_run(out), load_hf(f"{out}/base").tokenizer
    for split in ("train", "dev"):
        prompts = []
        for name in ("sft", "mah_dpo"):
            rng = run.rng("rollouts", name, "math", split)
            for problem in DOMAINS["math"].problems(split, 8, rng):
                prompts.append(tokenizer.encode_chat(problem.messages()))
        rows = [r.ids for r in read_rows(run.file("labels.jsonl"), Labelled) if r.split == split]
        assert len(rows) == 16
        for prompt in prompts:
            assert sum(ids[:len(prompt)] == prompt for ids in rows) == prompts.count(prompt)
    rows = [r for r in read_json(run.file("results.json")) if r["domain"] == "math"]
    plain = ["base", "sft", "sft_greedy", "single_head_dpo", "modpo", "soup", "mod", "mah_dpo",
             "mah_dpo_greedy", "mah_dpo:math_engagement"]
    assert [r["policy"] for r in rows if r["guide"] is None] == plain
    assert len({json.dumps(r["metrics"]) for r in rows}) > 1 and len(rows) == 10 + 4
    stages = {row["stage"] for row in rows_of(run.file("log.jsonl"))}
    assert stages >= {"base", "sft", "prm", "mah_dpo", "modpo"}
    assert "checkpoint.safetensors" not in os.listdir(out)
    check_files(out)
    with pytest.raises(InputError, match="a run of 2 processes, not of 1; .*nproc_per_node 2"):
        train.main(["--resume", out])


def test_batches_that_cannot_be_shared_are_refused(monkeypatch):
    """Prevents: a process without rows, which waits for ever or weighs its objectives otherwise."""
    monkeypatch.setattr(options, "ranks", lambda: 3)
    with pytest.raises(InputError, match="3 processes cannot share --sft-batch 64"):
        options.check_config(Config(objective="math"))
    options.check_config(Config(objective="math", init=".", sft_batch=63, prm_batch=66, dpo_pairs=9))


# -- several threads of one process

def test_in_threads_keeps_order_and_numbers():
    """Prevents: results in the order in which they are ready; others than one thread gives; a
    process that is left with one thread; large models side by side in memory."""
    threads, seen = torch.get_num_threads(), []

    def work(n):
        seen.append(torch.get_num_threads())
        time.sleep(0.05 * (n == 0))
        return torch.randn(50, generator=torch.Generator().manual_seed(n)).sum().item()
    torch.set_num_threads(2)
    try:
        found = list(in_threads(work, range(6), alone=False))
        assert torch.get_num_threads() == 2 and set(seen) == {1}
        assert found == list(in_threads(work, range(6), alone=True))
        assert set(seen[6:]) == {2}
    finally:
        torch.set_num_threads(threads)


def test_an_error_in_a_thread_ends_the_work():
    """Prevents: a stop, or a mistake, that is only met when all rows of the tables are done."""
    threads, begun = torch.get_num_threads(), []

    def work(n):
        begun.append(n)
        time.sleep(0.01)
        if n == 1:
            raise InputError("broken")
    torch.set_num_threads(2)
    try:
        with pytest.raises(InputError, match="broken"):
            list(in_threads(work, range(1000), alone=False))
        assert len(begun) < 100 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
