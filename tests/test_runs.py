"""train.py from the command line: whole runs, --resume, --from, --seeds, real data, mistakes."""
import contextlib
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch

import decode
import evaluate
import train
from conftest import NAMES, TINY
from data import OBJECTIVES, InputError, Objective, read_json, run_command, split_of, write_json
from interop import options
from interop.answers import final_answer, same_answer
from interop.manifest import check_files
from interop.options import HARMLESS, Config, flag, read_command
from interop.parallel import alone
from mah_dpo import Pair
from model import load_hf, load_safetensors, save_hf, save_safetensors
from prm import SECOND, Labelled, load_prm
from test_train import rows_of

pytestmark = pytest.mark.usefixtures("small_worlds")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
POLICIES = ["base", "sft", "single_head_dpo", "modpo", "mah_dpo", "soup"]


def files_of(run):
    """{name: content} of all files in a directory."""
    found = {}
    for directory, _, names in os.walk(run):
        for name in names:
            path = os.path.join(directory, name)
            with open(path, "rb") as f:
                found[os.path.relpath(path, run)] = f.read()
    return found


def results_of(run):
    """All that a run leaves but what names its directory or tells the time. Rows of the log are in
    the order in which the stages ran last."""
    files = files_of(run)
    log = sorted(files.pop("log.jsonl").splitlines())
    for name in ("config.json", "timings.jsonl", "manifest.json"):
        files.pop(name, None)
    return files | {"log.jsonl": log}


def copy_of(run, directory, *without):
    """A copy of a run without some of its files."""
    copied = shutil.copytree(run, str(directory / "copied"))
    for name in without:
        path = os.path.join(copied, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.remove(path)
    return copied


def refused(argv, capsys, main=train.main):
    """Run a command that must end in exit code 2 with one line on stderr -> that line."""
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: main(argv))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    return error


# -- a whole run

def test_run_writes_what_is_promised(whole):
    """Prevents: a result that the documentation promises and no file holds."""
    config = read_json(os.path.join(whole, "config.json"))
    assert [o["name"] for o in config["objectives"]] == NAMES and config["seed"] == 0
    assert set(config["objectives"][0]) == {f.name for f in fields(Objective)}
    assert (config["temperature"], config["dpo_steps"]) == (0.7, 2)
    trained = ["base", "sft", "prm", *POLICIES[2:5], *[f"dpo_{name}" for name in NAMES]]
    for name in trained:
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            assert os.path.getsize(os.path.join(whole, name, file)) > 0
    log = rows_of(os.path.join(whole, "log.jsonl"))
    assert {row["stage"] for row in log} == set(trained)
    timings = rows_of(os.path.join(whole, "timings.jsonl"))
    assert {row["stage"] for row in timings if "tokens_per_second" in row} == set(trained)
    assert len(timings) == 13 + len(trained) and all(row["seconds"] >= 0 for row in timings)
    assert not [name for name in files_of(whole) if name.endswith(".tmp")]


def test_preference_training_starts_at_ln2(whole):
    """Prevents: a reference scored differently from the policy anywhere between samples, files and
    the first step."""
    log = rows_of(os.path.join(whole, "log.jsonl"))
    for stage in ("single_head_dpo", *[f"dpo_{name}" for name in NAMES], "mah_dpo"):
        first = next(row for row in log if row["stage"] == stage)
        losses = [v["loss"] for v in first.values() if isinstance(v, dict)]
        # Heads of MAH-DPO carry a perturbation of 1e-3; all others are exact copies.
        bound = 0.05 if stage == "mah_dpo" else 1e-5
        assert losses and losses == pytest.approx([math.log(2)] * len(losses), abs=bound)


def test_pairs_and_labels_are_well_formed(whole):
    """Prevents: train and held-out prompts mixed up, empty responses, labels outside the
    sequence; two judges who are one."""
    pairs = train.read_rows(os.path.join(whole, "pairs.jsonl"), Pair)
    assert {p.objective for p in pairs} == set(NAMES)
    assert all(p.chosen and p.rejected and p.chosen != p.rejected for p in pairs)
    prompts = {split: {tuple(p.prompt) for p in pairs if p.split == split}
               for split in ("train", "dev")}
    assert all(prompts.values()) and not prompts["train"] & prompts["dev"]
    judges = set()
    for row in train.read_rows(os.path.join(whole, "labels.jsonl"), Labelled):
        judges |= {tuple(labels.values()) for labels in row.targets}
        assert len(row.ends) == len(row.targets) and row.ends[-1] == len(row.ids) - 1
        assert [set(labels) for labels in row.targets] == [{NAMES[2], NAMES[2] + SECOND}]
        assert all(0 <= label <= 1 for labels in row.targets for label in labels.values())
    assert any(first != second for first, second in judges)


def test_bf16_starts_at_ln2(tmp_path, monkeypatch, capsys):
    """Prevents: a reference in another precision than the policy's, whose rounding looks like a
    margin before training; a loss that is itself rounded to bfloat16; nobody is told where that is
    slower."""
    out, stages = str(tmp_path / "run"), train.stages
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    kept = ("base", "sft", "pairs.jsonl", "mah_dpo")
    monkeypatch.setattr(train, "stages", lambda run: [
        stage for stage in stages(run) if stage.files[-1] in kept])
    train.main(["--objective", "helpfulness,honesty", "--out", out, *TINY, "--dtype", "bf16",
                "--perturbation", "0", "--device", "cpu"])
    assert capsys.readouterr().out.count("no instructions for bfloat16") == 1
    held_out, batch = [row for row in rows_of(f"{out}/log.jsonl")
                       if row["stage"] == "mah_dpo" and row["step"] == 0]
    for name in NAMES[:2]:
        assert held_out[name]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        moved = [held_out[name][side] for side in ("margin", "chosen", "rejected")]
        assert moved == pytest.approx([0, 0, 0], abs=1e-4)
        # A batch is padded to another width, and bfloat16 rounds otherwise. The loss is what
        # its margin says, not rounded itself: ln 2 in bfloat16 is .6914.
        expected = math.log(2) - batch[name]["margin"] / 2
        assert batch[name]["loss"] == pytest.approx(expected, abs=1e-5)
        assert abs(batch[name]["margin"]) < 1e-3


# -- going on

def test_same_seed_same_bits(whole, tmp_path):
    """Prevents: a draw outside the run's generators: results and every weight repeat exactly."""
    again = str(tmp_path / "again")
    torch.manual_seed(12345)
    train.main(["--objective", ",".join(reversed(NAMES)), "--out", again, *TINY])
    assert results_of(again) == results_of(whole)


def test_resume_repeats_only_what_is_missing(whole, tmp_path, capsys):
    """Prevents: a resumed run that starts over, or whose later stages depend on what ran in the
    same process."""
    copied = copy_of(whole, tmp_path, "results.json", "results.md", "pareto.svg", "mah_dpo", "prm",
                     "dpo_honesty", "pair_metrics.json")
    torch.manual_seed(777)
    train.main(["--resume", copied])
    # base, sft, pairs, single-head DPO, two of three single objectives, MODPO, labels
    assert capsys.readouterr().out.count("finished before") == 8
    assert results_of(copied) == results_of(whole)


def test_the_log_is_written_before_the_file_that_says_finished(whole, tmp_path, monkeypatch):
    """Prevents: a kill -9 right after a stage's last file, whose rows of log.jsonl then never
    come."""
    last = {"base": "base/config.json", "sft": "sft/config.json", "prm": "prm/config.json"}
    copied, late, plain = copy_of(whole, tmp_path, *last.values()), {}, train.Run.log

    def watch(run, stage, rows, *name):
        if not name:
            late[stage] = os.path.exists(run.file(last[stage]))
        plain(run, stage, rows, *name)
    monkeypatch.setattr(train.Run, "log", watch)
    train.main(["--resume", copied])
    assert late == dict.fromkeys(last, False)


def train_in_child(argv, renames=None, seconds=None):
    """train.main in a forked process which is killed, as by kill -9, at its renames-th rename (at an
    odd number before it, at an even one after it) or after that many seconds -> its exit code, -9
    if it was killed."""
    left, plain = [renames], os.replace

    def replace(a, b):
        left[0] -= 1
        if left[0] != 0 or renames % 2 == 0:
            plain(a, b)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def child():
        os.replace = replace if renames else plain
        run_command(lambda: train.main(argv))
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the test forks")
def test_kill_9_loses_nothing(tmp_path):
    """Prevents: a kill at any moment after which --resume, or the same command where there is no run
    yet, ends elsewhere than a run that nobody stopped: a draw that is repeated or left out, an
    optimiser without its past, half a file, a row of the log twice."""
    options = ["--objective", "honesty", *TINY, "--checkpoint-every", "1", "--base-steps", "5",
               "--prm-steps", "4"]
    calm, killed = str(tmp_path / "calm"), str(tmp_path / "killed")
    rng, codes = random.Random(0), []
    train.main([*options, "--out", calm])
    while codes[-1:] != [0]:
        how = {"renames": rng.randint(1, 12)}
        if len(codes) % 4 == 0:
            how = {"seconds": rng.uniform(0.1, 0.5)}
        argv = ["--resume", killed] if os.path.exists(killed) else [*options, "--out", killed]
        codes.append(train_in_child(argv, **how))
    assert len(codes) > 8 and set(codes) == {0, -signal.SIGKILL}
    assert results_of(killed) == results_of(calm)
    assert os.listdir(tmp_path) == ["calm", "killed"] or "killed.tmp" not in os.listdir(tmp_path)


def test_a_stop_says_how_to_go_on(whole, tmp_path, capsys, monkeypatch):
    """Prevents: Ctrl-C or SIGTERM that end in a traceback, or leave a run which --resume cannot
    finish."""
    copied = copy_of(whole, tmp_path, "results.json", "pair_metrics.json", "modpo/config.json")

    def stop(run, name):
        run.log(name, [{"half": "done"}])
        signal.raise_signal(signal.SIGTERM)
        time.sleep(5)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train, "train_policy", stop)
        train.main(["--resume", copied])
    error = capsys.readouterr().err
    assert stopped.value.code == 130 and f"python train.py --resume {copied}" in error
    with open(os.path.join(copied, "labels.jsonl.tmp"), "w"):           # as a kill may leave it
        pass
    train.main(["--resume", copied])
    assert results_of(copied) == results_of(whole)


def test_a_run_at_work_is_refused(whole, capsys):
    """Prevents: two commands that write the same files: --resume while the processes of a killed
    torchrun still go on."""
    with alone(whole):
        assert "a train.py is at work there already" in refused(["--resume", whole], capsys)
    train.main(["--resume", whole])


def test_resume_of_nothing_starts_nothing(capsys, tmp_path, monkeypatch):
    """Prevents: --resume "$RUN" with an empty variable, which trains a new run with default options
    for minutes."""
    monkeypatch.chdir(tmp_path)
    assert "--resume needs the directory of a run" in refused(["--resume", ""], capsys)
    assert "nowhere/config.json: no such file" in refused(["--resume", "nowhere"], capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ["[]", "null", "{}", "[{}]"])
def test_a_foreign_config_is_no_run(content, capsys, tmp_path):
    """Prevents: tracebacks of all three commands for a directory whose config.json is valid JSON
    but no run's."""
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "results.json").write_text("[]")
    commands = [(["--resume", str(tmp_path)], train.main), ([str(tmp_path)], evaluate.main),
                ([str(tmp_path)], decode.main)]
    for argv, main in commands:
        error = refused(argv, capsys, main)
        assert "config.json: not the configuration of a run" in error


@pytest.mark.parametrize("edit, message", [
    ({"sft_steps": "four"}, "the options, or the files in --data"),
    ({"beta": 0.2}, "the options, or the files in --data"),
    ({"objectives": []}, "the options, or the files in --data"),
    ({"key": None}, "not the configuration of a run of this version (key)"),
    ({"prm_step_weight": None}, "not the configuration of a run of this version (prm_step_weight)"),
    ({"processes": 2}, "a run of 2 processes, not of 1; go on with torchrun --nproc_per_node 2"),
    ({"device": "cpu", "checkpoint_every": 7}, "")])
def test_resume_checks_the_saved_configuration(edit, message, capsys, whole, tmp_path, monkeypatch):
    """Prevents: a run that goes on under other options than those it began with, or one of an older
    version; and one that is refused for an option that changes nothing."""
    monkeypatch.setattr(train, "run_stages", lambda run: print("goes on"))
    path = str(tmp_path / "config.json")
    saved = read_json(os.path.join(whole, "config.json")) | edit
    write_json(path, {k: v for k, v in saved.items() if v is not None})
    if message:
        assert message in refused(["--resume", str(tmp_path)], capsys)
    else:
        train.main(["--resume", str(tmp_path)])
        assert capsys.readouterr().out.endswith("goes on\n")


def test_resume_takes_no_options(capsys, whole):
    """Prevents: options beside --resume that are ignored, and a batch that the processes share
    unevenly when a run is resumed with more of them."""
    for option in (["--seed", "1"], ["--fast"], ["--grad-checkpoint"]):
        assert "no option with it but --device" in refused(["--resume", whole, *option], capsys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "ranks", lambda: 3)
        assert "3 processes cannot share --sft-batch 64" in refused(["--resume", whole], capsys)


# -- damage

def damages(content):
    """A file's content as it may be found: a byte changed, emptied, a line lost."""
    middle = len(content) // 2
    yield content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]
    yield b""
    yield content.partition(b"\n")[2]


def test_damage_is_noticed(whole, tmp_path, capsys):
    """Prevents: other figures from a damaged file, in silence: a policy of which one byte is wrong,
    labels that are gone, and with them a value model."""
    copied, new = copy_of(whole, tmp_path), str(tmp_path / "new")
    full = [(["--resume", copied], train.main), ([copied], evaluate.main)]
    from_ = ["--objective", ",".join(NAMES), *TINY, "--from", copied, "--out", new]
    files = [name for name in files_of(whole) if "/" not in name or name[:3] in ("prm", "mah")]
    files.remove("manifest.json")
    assert len(files) > 16
    for name in files:
        path = os.path.join(copied, name)
        with open(path, "rb") as f:
            content = f.read()
        for damaged in damages(content):
            with open(path, "wb") as f:
                f.write(damaged)
            commands = [*full, (from_, train.main)]
            if "/" in name or name == "config.json":
                commands.append(([copied], decode.main))
            for argv, main in commands:
                assert f"copied/{name}: " in refused(argv, capsys, main)
        with open(path, "wb") as f:
            f.write(content)
    train.main(["--resume", copied])
    assert sorted(os.listdir(tmp_path)) == ["copied"]


def test_damage_by_hand_is_noticed(whole, tmp_path, capsys):
    """Prevents: tracebacks for an option of another kind in config.json, or for a manifest.json
    that is JSON and no manifest; another run's PRM that guides although it is damaged."""
    copied = copy_of(whole, tmp_path)
    config = read_json(f"{whole}/config.json")
    commands = [(["--resume", copied], train.main), ([copied], evaluate.main),
                ([copied], decode.main)]
    for name, value in (("config.json", config | {"checkpoint_every": None}),
                        ("config.json", config | {"seeds": "two"}), ("manifest.json", []),
                        ("manifest.json", None)):
        write_json(f"{copied}/{name}", value)
        for argv, main in commands:
            assert f"copied/{name}: not what " in refused(argv, capsys, main)
        shutil.copy(f"{whole}/{name}", copied)
    os.truncate(f"{copied}/prm/tokenizer.json", 1000)
    borrowed = [whole, "--prm", f"{copied}/prm/"]
    assert "copied/prm/tokenizer.json: not what " in refused(borrowed, capsys, decode.main)


def test_damage_in_a_training_of_several_is_noticed(together, tmp_path, capsys):
    """Prevents: a run of several seeds of which only the tables of means are looked at."""
    copied = copy_of(together[0], tmp_path)
    write_lines(f"{copied}/seed=4/labels.jsonl", [])
    for argv, main in ((["--resume", copied], train.main), ([copied], evaluate.main)):
        assert "seed=4/labels.jsonl: not what the run has written" in refused(argv, capsys, main)


def test_new_tables_are_no_damage(whole, tmp_path):
    """Prevents: a run that is refused because evaluate.py has written its tables anew, or because a
    stage was removed to be made again, of which one of two files is left."""
    copied = copy_of(whole, tmp_path, "mah_dpo_pairs.jsonl")
    with open(os.path.join(copied, "results.md"), "a") as f:
        f.write("\n")
    os.remove(os.path.join(copied, "results.md"))
    evaluate.main([copied])
    check_files(copied)
    train.main(["--resume", copied])
    check_files(copied)
    assert results_of(copied) == results_of(whole)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(number, whole, tmp_path, capsys):
    """Prevents: word salad with exit code 0 from a policy or a PRM with a NaN in it."""
    for name, tensor in (("mah_dpo", "model.layers.1.mlp.up_proj.weight"), ("prm", "score.2.bias")):
        copied = copy_of(whole, tmp_path, "manifest.json")
        path = os.path.join(copied, name, "model.safetensors")
        tensors = {key: t.clone() for key, t in load_safetensors(path).items()}
        tensors[tensor].view(-1)[3 % tensors[tensor].numel()] = number
        save_safetensors(tensors, path)
        error = refused([copied, "--prompt", "hello"], capsys, decode.main)
        assert f"{name}/model.safetensors: tensor '{tensor}' holds numbers" in error
        shutil.rmtree(copied)


def test_scores_are_joined_by_what_a_row_is(whole, tmp_path):
    """Prevents: values of another row, or none, for the rows behind a line that is lost."""
    copied = copy_of(whole, tmp_path)
    path, rows = os.path.join(copied, "scores.jsonl"), evaluate.load_rows(whole)
    lines = rows_of(path)
    write_lines(path, lines[::-1])
    assert evaluate.load_rows(copied) == rows
    write_lines(path, lines[1:])
    with pytest.raises(InputError, match="scores.jsonl: no line of base, values; bring the file"):
        evaluate.load_rows(copied)


def test_prompts_that_are_none(whole):
    """Prevents: tracebacks for an empty list of prompts, for an id outside the vocabulary, which on
    a GPU ends the process, and for a conversation that has filled its context."""
    model, prm = load_hf(f"{whole}/mah_dpo"), load_prm(f"{whole}/prm")
    guided = {"boundary": "turn", "guide": NAMES[0], "max_new_tokens": 4, "K": 2}
    assert decode.generate(model, [], max_new_tokens=4) == []
    assert decode.guided_decode(model, prm, [], **guided) == []
    for bad in (model.config.vocab_size, -1):
        for call in (lambda: decode.generate(model, [[5], [5, bad]], max_new_tokens=4),
                     lambda: decode.guided_decode(model, prm, [[5], [5, bad]], **guided)):
            with pytest.raises(InputError, match=f"prompt 1 has ids from .*{bad}"):
                call()
    answer, = decode.guided_decode(model, prm, [[5] * (model.config.max_len - 2)], **guided)
    with pytest.raises(InputError, match="where the conversation is full, begin a new one"):
        decode.guided_decode(model, prm, [[5]], state=answer.state, **guided)


# -- several trainings, and runs from others

@pytest.fixture(scope="module")
def together(small_worlds, checkpoint, tmp_path_factory):
    """Two trainings, stopped in the second and resumed -> directory, common options."""
    common = ["--objective", "math_engagement,honesty", "--init", checkpoint, *TINY]
    out = str(tmp_path_factory.mktemp("seeds") / "run")
    plain, calls = train.train_sft, []

    def stop(run, name):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        plain(run, name)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_sft", stop)
        train.main([*common, "--seed", "3", "--seeds", "2", "--out", out])
    assert os.path.exists(f"{out}/seed=4/base") and not os.path.exists(f"{out}/results.json")
    first = results_of(f"{out}/seed=3")
    train.main(["--resume", out])
    assert results_of(f"{out}/seed=3") == first
    return out, common


def test_seeds_are_trained_apart_and_reported_together(together):
    """Prevents: seeds that share weights or test prompts, tables that are not the means over the
    trainings; rollouts (case A) that only work beside a verifier."""
    out, _ = together
    for seed in ("seed=3", "seed=4"):
        labels = train.read_rows(f"{out}/{seed}/labels.jsonl", Labelled)
        targets = sum([row.targets for row in labels], [])
        assert targets and all("math_engagement" in t and len(t) == 2 for t in targets)
    name = "sft/model.safetensors"
    assert files_of(f"{out}/seed=3")[name] != files_of(f"{out}/seed=4")[name]
    mean, *each = (read_json(f"{out}/{d}results.json") for d in ("", "seed=3/", "seed=4/"))
    for row, *same in zip(mean, *each, strict=True):
        assert row["seed"] == [3, 4] and {r["policy"] for r in same} == {row["policy"]}
        for name, m in row["metrics"].items():
            a, b = (r["metrics"][name]["mean"] for r in same)
            assert m["mean"] == pytest.approx((a + b) / 2) and m["n"] == 2
            assert m["stderr"] == pytest.approx(abs(a - b) / 2)


@pytest.mark.parametrize("option, copied", [
    ("--k 3", 11), ("--perturbation 0.5", 7)])
def test_a_run_from_another_equals_one_from_scratch(option, copied, together, tmp_path, capsys):
    """Prevents: files taken over that depend on an option that differs, or those of another seed;
    rows of the log that are lost; a run that breaks when the other one is removed."""
    source, common = together
    changed = [*common, *option.split(), "--weight-steps", "0", "--seed", "4"]
    moved = str(tmp_path / "source")
    shutil.copytree(source, moved)
    train.main([*changed, "--from", moved, "--out", str(tmp_path / "from")])
    assert capsys.readouterr().out.count(": copied from ") == copied
    shutil.rmtree(moved)
    train.main([*changed, "--out", str(tmp_path / "scratch")])
    assert results_of(str(tmp_path / "from")) == results_of(str(tmp_path / "scratch"))


def test_a_run_from_another_pairs_its_seeds(together, tmp_path, capsys):
    """Prevents: a training that starts from the files of another seed; a run from nothing that looks
    like one from another."""
    source, common = together
    out = str(tmp_path / "run")
    train.main([*common, "--seed", "3", "--seeds", "2", "--from", source, "--out", out])
    assert capsys.readouterr().out.count(": copied from ") == 2 * 12
    for seed in ("seed=3", "seed=4"):
        assert results_of(f"{out}/{seed}") == results_of(f"{source}/{seed}")
    for argv, message in ((["--seed", "5", "--from", source], "has no training with seed 5"),
                          (["--from", str(tmp_path / "none")], "none/config.json: no such file")):
        assert message in refused([*common, *argv, "--out", str(tmp_path / "new")], capsys)
    assert os.listdir(tmp_path) == ["run"]


def test_every_option_belongs_to_a_stage_or_changes_nothing(tmp_path):
    """Prevents: a new option for which --from takes over files that depend on it."""
    named = list(HARMLESS)
    for stage in train.stages(train.Run(str(tmp_path), Config(objective="honesty"))):
        named += stage.options.split()
    assert set(named) == {f.name for f in fields(Config)}


# -- real data

def write_lines(path, rows):
    """JSONL; a row that is text stays as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    with open(path, "w", encoding="utf-8") as f:
        f.write("".join(line + "\n" for line in lines))


def preference(i, chosen="the color is red .", rejected="no idea ."):
    """A row of pairs."""
    return {"prompt": f"what is the color of {i} ?", "chosen": chosen, "rejected": rejected}


@pytest.fixture
def pairs_dir(tmp_path):
    """--data for two objectives, one row too long for the context of 128 tokens, one objective with
    step labels."""
    directory = tmp_path / "pairs"
    directory.mkdir()
    rows = [preference(i) for i in range(24)]
    write_lines(directory / "helpfulness.jsonl", rows)
    write_lines(directory / "honesty.jsonl", [*rows, preference(99, "the color is red . " * 40)])
    steps = {"steps": ["the color is red .", " no idea ."], "labels": [1, 0]}
    write_lines(directory / "honesty.steps.jsonl",
                [{"prompt": f"what of {i} ?"} | steps for i in range(24)])
    return str(directory)


def test_real_data_run(pairs_dir, checkpoint, tmp_path, capsys):
    """Prevents: a run on someone's own files that misses a stage, hides dropped rows, reports on
    training pairs, or goes on when the files have changed."""
    out = str(tmp_path / "run")
    train.main(["--objective", "helpfulness,honesty", "--init", checkpoint, "--data", pairs_dir,
                "--out", out, "--prm", "each", *TINY])
    assert "; 1 left out: longer than the context of 128 tokens" in capsys.readouterr().out
    pairs = train.read_rows(f"{out}/pairs.jsonl", Pair)
    assert len(pairs) == 48
    found = {(r["policy"], r["domain"], r["metrics"]["loss"]["n"])
             for r in read_json(f"{out}/results.json")}
    expected = set()
    for name in NAMES[:2]:
        held_out = len(train.choose(pairs, [name], "dev"))
        expected |= {(policy, f"pairs:{name}", held_out) for policy in POLICIES}
        assert load_prm(f"{out}/prm_{name}").names == [name]
    assert found == expected and not os.path.exists(f"{out}/prm")
    base, given = (load_safetensors(f"{d}/model.safetensors") for d in (f"{out}/base", checkpoint))
    assert all(torch.equal(base[name], given[name]) for name in given)
    labels = train.read_rows(f"{out}/labels.jsonl", Labelled)
    assert len(labels) == 24
    assert all(row.targets == [{"honesty": 1.0}, {"honesty": 0.0}] for row in labels)
    quality = {}
    for row in rows_of(f"{out}/log.jsonl"):
        quality |= row.get("held_out", {})
    assert "r2" in quality["honesty"] and "pair_accuracy" in quality["helpfulness"]
    decode.main([out, "--prompt", "what is the color ?", "--guide", "honesty", "--weights",
                 "helpfulness=1,honesty=3", "--max-new-tokens", "6", "--k", "2"])
    assert "->" in capsys.readouterr().out
    write_lines(os.path.join(pairs_dir, "honesty.jsonl"), [preference(i) for i in range(23)])
    assert f"the files in --data ({pairs_dir}), are not those" in refused(["--resume", out], capsys)


def test_questions_go_through_the_whole_pipeline(gpt, tokenizer, tmp_path, capsys):
    """Prevents: questions that are sampled but never verified, a value model without rollouts,
    tables of training questions, a row left out in silence; questions that only the paper's
    objective may have."""
    base, rows_dir, out = str(tmp_path / "base"), tmp_path / "data", str(tmp_path / "run")
    save_hf(gpt.with_heads(["policy"]), base, weights=0)
    rows_dir.mkdir()
    answers, rows = {}, []
    for a in range(9):
        for b in range(9):
            answer = a + b if a % 2 else 7
            solution = f"a {a} + {b} = {a + b}\n#### {answer}"
            rows.append({"question": f"{a} + {b} = ?", "answer": solution})
            message = {"role": "user", "content": f"{a} + {b} = ?"}
            answers[tuple(tokenizer.encode_chat([message]))] = str(answer), json.dumps([message])
    odd = [{"question": "4 " * 200, "answer": "#### 1"}, {"question": "?", "answer": ""}, *rows[:3]]
    write_lines(rows_dir / "sums.jsonl", rows + odd)
    write_json(str(rows_dir / "objectives.json"), {"sums": {"case": "verifiable"}})
    chats = [{"prompt": f"go {i}", "chosen": "nice work so far !", "rejected": "no"}
             for i in range(30)]
    write_lines(rows_dir / "brevity.jsonl", chats)
    train.main(["--objective", "data", "--init", base, "--data", str(rows_dir), "--out", out,
                "--max-new-tokens", "24", *TINY, "--sft-steps", "150", "--sft-lr", "3e-3",
                "--n-prompts", "40", "--n-samples", "4", "--epochs", "200"])
    printed = capsys.readouterr().out
    assert "pairs: " in printed and "; 1 left out: the answer is empty; 1 left out: too long for " \
        "the context with an answer; 3 left out: asked before\n" in printed
    pairs = train.read_rows(f"{out}/pairs.jsonl", Pair)
    sampled = [p for p in pairs if p.objective == "sums"]
    for pair in sampled:
        answer, message = answers[tuple(pair.prompt)]
        right = [same_answer(final_answer(tokenizer.decode(ids)), answer)
                 for ids in (pair.chosen, pair.rejected)]
        assert right == [True, False] and pair.split == split_of(message)
    labels = train.read_rows(f"{out}/labels.jsonl", Labelled)
    assert sampled and {row.split for row in labels} == {"train", "dev"}
    for row in labels:
        assert all([*t] == ["sums"] and 0 <= t["sums"] <= 1 for t in row.targets)
    tables = [r for r in read_json(f"{out}/results.json") if r["domain"] == "data"]
    rivals = {("sft", None), ("sft_vote", None), ("mah_dpo_vote", None), ("sft", "sums"),
              ("mah_dpo", "sums"), ("sft_rerank", "sums")}
    assert {(r["policy"], r["guide"]) for r in tables} >= rivals
    assert {r["metrics"]["sums"]["n"] for r in tables} == {2}


@pytest.mark.parametrize("file, rows, message", [
    ("honesty", [preference(1), "{not json"], "honesty.jsonl:2: not JSON"),
    ("honesty", [preference(1), {"prompt": "a", "chosen": "b"}], "honesty.jsonl:2"),
    ("honesty", [preference(1, "same", "same")], "1 left out: chosen equals rejected"),
    ("honesty", [], "no rows"), ("honesty", None, "labelled steps alone are too little; add the "),
    ("honesty", [preference(i, "red " * 200) for i in range(20)], "0 pairs for 'honesty' fit"),
    ("honesty", [preference(1)], "1 pairs for 'honesty' fit the context"),
    ("honesty", [preference(1, "red " * i) for i in range(1, 41)], "tokens, on 1 prompts; some"),
    ("honesty.steps", [{"prompt": "a", "steps": ["x"], "labels": [1, 0]}],
     "honesty.steps.jsonl:1: 1 steps but 2 labels")])
def test_broken_data_leaves_nothing_behind(file, rows, message, capsys, checkpoint, pairs_dir,
                                           tmp_path):
    """Prevents: a run directory that has to be deleted by hand after a mistake in the data, which
    may show after minutes of training; the message names the line."""
    path, out = os.path.join(pairs_dir, f"{file}.jsonl"), str(tmp_path / "out")
    if rows is None:
        os.remove(path)
    else:
        write_lines(path, rows)
    argv = ["--objective", "honesty", "--init", checkpoint, "--data", pairs_dir, "--out", out]
    assert message in refused(argv, capsys) and not os.path.exists(out)


@pytest.mark.parametrize("name, change, words, with_data", [
    *[(name, None, name, with_data) for with_data in (True, False)
      for name in ("config.json", "model.safetensors", "tokenizer.json")],
    ("config.json", {"max_position_embeddings": 40}, "a context of 40 tokens is too short", False),
    ("tokenizer_config.json", {"chat_template": "{{ odd }}"}, "chat_template", False)])
def test_unfit_checkpoints_leave_nothing_behind(name, change, words, with_data, capsys, checkpoint,
                                                pairs_dir, tmp_path):
    """Prevents: a traceback, or a run directory that never can go on, for an --init that lacks a
    file, or that stage 2 would refuse; the message names what is wrong."""
    unfit, out = str(tmp_path / "unfit"), str(tmp_path / "out")
    shutil.copytree(checkpoint, unfit)
    path = os.path.join(unfit, name)
    if change:
        write_json(path, read_json(path) | change)
    else:
        os.remove(path)
    data = ["--data", pairs_dir] if with_data else []
    argv = ["--objective", "honesty", "--init", unfit, "--fast", *data, "--out", out]
    assert words in refused(argv, capsys) and not os.path.exists(out)


def test_a_run_goes_on_from_another_directory(pairs_dir, checkpoint, tmp_path, capsys, monkeypatch):
    """Prevents: a run that was given relative paths, and that --resume, --from or evaluate.py can
    only use in the directory where it began; data that has moved and is taken for none."""
    monkeypatch.chdir(tmp_path)
    init, data = os.path.relpath(checkpoint), os.path.relpath(pairs_dir)
    relative = ["--objective", "honesty", "--init", init, "--data", data, "--out", "a"]
    first = train.new_run(read_command(relative, "")[0])
    absolute = ["--objective", "honesty", "--init", checkpoint, "--data", pairs_dir + "/"]
    train.new_run(read_command([*absolute, "--from", "a", "--out", "b"], "")[0])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    runs = [train.open_run(str(tmp_path / name)) for name in "ab"]
    assert [(r.config.init, r.config.data) for r in runs] == [(checkpoint, pairs_dir)] * 2
    assert runs[1].config.from_ == str(tmp_path / "a") and runs[1].key == runs[0].key == first.key
    os.rename(pairs_dir, str(tmp_path / "moved"))
    for argv, main in ((["--resume", "../a"], train.main), (["../a"], evaluate.main)):
        (tmp_path / "a" / "results.json").write_text("[]")
        assert f"the files in --data ({pairs_dir})" in refused(argv, capsys, main)


# -- the command line

def test_one_flag_per_field():
    """Prevents: a setting that the command line cannot reach, or that is read as text."""
    for f in fields(Config):
        value = {"objective": "math", "prm": "each"}.get(f.name, f.type(3))
        argv = [flag(f.name)] + ([] if f.type is bool else [str(value)])
        config, resume = read_command(argv, "")
        assert getattr(config, f.name) == value and resume is None
        assert type(getattr(config, f.name)) is f.type
        others = [g.name for g in fields(Config) if g is not f]
        assert all(getattr(config, name) == getattr(Config(), name) for name in others)


def test_fast_derives_the_rest():
    """Prevents: --fast that is slow because a setting was forgotten, or that overrules what was
    asked for."""
    config, _ = read_command(["--fast", "--dpo-steps", "77"], "")
    for f in fields(Config):
        small = f.metadata.get("fast")
        assert small is None or small < f.default
        expected = 77 if f.name == "dpo_steps" else f.default if small is None else small
        assert getattr(config, f.name) == expected


@pytest.mark.parametrize("module", [train, evaluate, decode])
def test_help_tells_every_option(module, capsys):
    """Prevents: a --help that crashes on a per cent sign or leaves an option unexplained."""
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and module.__doc__.splitlines()[0][:40] in text
    for f in fields(Config) if module is train else ():
        assert flag(f.name) in text and f.metadata["help"] in text


@pytest.mark.parametrize("argv, message", [
    ("--objective cleverness", "unknown objective 'cleverness'"),
    ("--objective math,cleverness", "cleverness"), ("--objective ,", "unknown objective"),
    ("--temperature 0", "--temperature 0.0 is out of range"),
    ("--temperature nan", "--temperature nan"), ("--n-samples 1", "--n-samples 1"),
    ("--dpo-steps 0", "--dpo-steps 0"), ("--beta -1", "--beta -1.0"), ("--seed -1", "--seed -1"),
    ("--dpo-lr-heads inf", "--dpo-lr-heads inf"), ("--prm both", "choose unified or each"),
    ("--dtype fp8", "choose fp32 or bf16"), ("--split all", "choose test or dev"),
    ("--spacing even", "choose equal or front"),
    ("--combine pcgrad", "choose sum or raco or cagrad or mgda"),
    ("--combine-c 1", "--combine-c 1.0 is out of range"), ("--combine-c -.1", "--combine-c -0.1"),
    ("--combine-c nan", "--combine-c nan is out"), ("--conflict-every -1", "--conflict-every -1"),
    ("--alpha honesty=1", "no 'honesty' here"), ("--data .", "--data needs --init"),
    ("--dpo-lr-factor dpo=1", "no 'dpo' here"), ("--n-test 9999999", "ask for less"),
    ("--init nowhere", "nowhere/config.json: no such file"),
    ("--from nowhere", "nowhere/config.json: no such file"),
    ("--device abacus", "--device abacus: not available"),
    ("--device meta", "--device meta: not available")])
def test_bad_options_are_refused(argv, message, capsys, tmp_path, monkeypatch):
    """Prevents: tracebacks, and half-written run directories, for values that cannot work."""
    monkeypatch.chdir(tmp_path)

    def problems(self, split, n, rng):
        if n > 10**6:
            raise InputError("ask for less")
    monkeypatch.setattr(train.World, "problems", problems)
    argv = argv.split()
    if "--objective" not in argv:
        argv += ["--objective", "math"]
    assert message in refused(argv, capsys) and os.listdir(tmp_path) == []


def test_a_taken_name_gets_the_next_number(tmp_path, monkeypatch):
    """Prevents: a new run that overwrites an old one; a comma in a directory's name; a directory
    that is there without its config.json."""
    monkeypatch.setattr(train, "check_new", lambda config: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").write_text("a file is taken, too")
    for argv, path in (("--out run/", "run-3"), ("--objective honesty,math", "runs/honesty+math"),
                       ("", "runs/all"), ("", "runs/all-2")):
        run = train.new_run(read_command(argv.split(), "")[0])
        assert run.path == path and read_json(f"{path}/config.json")["out"] == path
    assert os.listdir("run") == [] and sorted(os.listdir()) == ["run", "run-2", "run-3", "runs"]


def test_commands_end_with_one_line_and_code_2(checkpoint, tmp_path):
    """Prevents: a real shell that sees a traceback, or exit code 0 or 1, for a user's mistake."""
    write_lines(tmp_path / "honesty.jsonl", [preference(1), preference(2), "{\"prompt\": "])
    argv = [sys.executable, os.path.join(ROOT, "train.py"), "--objective", "honesty", "--init",
            checkpoint, "--data", str(tmp_path)]
    done = subprocess.run(argv, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2 and "honesty.jsonl:3: not JSON" in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and done.stdout == ""
    assert os.listdir(tmp_path) == ["honesty.jsonl"]


def test_documented_commands_are_accepted(capsys, tmp_path, monkeypatch):
    """Prevents: a command of the documentation that has an option of an earlier version, or a value
    that is refused."""
    known, found = {}, []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DATA").mkdir()
    for name in (*OBJECTIVES, "brevity", "warmth"):
        write_lines(tmp_path / "DATA" / f"{name}.jsonl", [preference(1)])
    for name, command in (("decode.py", decode.main), ("evaluate.py", evaluate.main)):
        with contextlib.suppress(SystemExit):
            command(["--help"])
        known[name] = capsys.readouterr().out
    docs = [os.path.join(ROOT, "docs", name) for name in os.listdir(os.path.join(ROOT, "docs"))
            if name.endswith(".md")] if os.path.isdir(os.path.join(ROOT, "docs")) else []
    for path in [os.path.join(ROOT, "README.md"), *docs]:
        with open(path, encoding="utf-8") as f:
            text = f.read().replace("\\\n", " ")
        found += re.findall(r"(?:python|torchrun --nproc_per_node \d+) "
                            r"((?:train|decode|evaluate)\.py [^`\n]*)", text)
    for name, *argv in (shlex.split(line.replace("...", ""), comments=True) for line in found):
        if name != "train.py":
            assert all(f"{a} " in known[name] for a in argv if a.startswith("--")), argv
        elif "--help" not in argv:
            train.check_config(read_command(argv, "")[0])
    assert len(found) > 8
