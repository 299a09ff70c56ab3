"""What a run keeps on the disk, such that a kill at any moment loses nothing that was finished.

    rows           dataclass objects and rows of the log, as JSONL
    checkpoints    all that the next step of a training needs
    directories    a new one appears with all that belongs in it
    stops          Ctrl-C waits for the end of a step
    stages         what is finished of a run, and what another run can take over from it
    run_key        a hash that tells whether a file belongs to these options and data

`run` is a train.Run: run.file(name) gives a path in its directory, run.key its hash.
"""
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch

from data import InputError, read_jsonl, write_json, write_text
from decode import read_run
from interop.manifest import is_there, note_files, sha256
from interop.options import HARMLESS, Config
from interop.parallel import alone, gather, like, once, parameters_of, rank, ranks
from interop.real_data import data_files
from model import load_safetensors, read_metadata, save_safetensors


# -- rows

def write_rows(path, rows):
    """Dataclass objects or dicts -> JSONL; what is None is left out."""
    lines = []
    for row in rows:
        if not isinstance(row, dict):
            # Not asdict, which would copy every id.
            row = {f.name: getattr(row, f.name) for f in fields(row)}
        kept = {name: value for name, value in row.items() if value is not None}
        lines.append(json.dumps(kept) + "\n")
    write_text(path, "".join(lines))


def read_rows(path, kind):
    """JSONL -> objects of a dataclass; .where is an object's file and line. InputError for a line
    that is none."""
    rows = []
    for where, row in read_jsonl(path):
        try:
            rows.append(kind(**row))
        except TypeError:
            raise InputError(f"{where}: not a row that this run has written; bring the file back, "
                             "or remove it to have it made again") from None
        rows[-1].where = where
    return rows


def log_rows(path):
    """The rows of a log; none where there is no file yet."""
    return [row for _, row in read_jsonl(path)] if os.path.exists(path) else []


# -- checkpoints

def save_checkpoint(run, stage, model, optimizer, step, log):
    """What the next step of a stage needs: weights, the optimiser's state, the log so far, and the
    number of steps done, from which the schedule and the draws follow."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, p in enumerate(parameters_of(optimizer)):
        for name, tensor in optimizer.state.get(p, {}).items():
            tensors[f"{name}.{i}"] = tensor
    about = {"stage": stage, "step": str(step), "key": run.key, "log": json.dumps(log)}
    save_safetensors(tensors, run.file("checkpoint.safetensors"), about)


@torch.no_grad()
def load_checkpoint(run, stage, model, optimizer):
    """Put back what save_checkpoint saved -> steps done, log; 0, [] where there is nothing of this
    stage. InputError if it was saved under other options or with other data."""
    path = run.file("checkpoint.safetensors")
    again = f"remove this file to start {stage} again"
    try:
        about = read_metadata(path) if os.path.exists(path) else {}
    except InputError as e:
        raise InputError(f"{e}; {again}") from None
    if about.get("stage") != stage:             # none, or that of an earlier, finished stage
        return 0, []
    if about.get("key") != run.key:
        raise InputError(f"{path}: saved with another configuration or other data than these; "
                         f"bring those back, or {again}")
    # Each tensor goes back to where it was, on its device and in its shards, apart from the file,
    # which will be replaced.
    weights, parameters = model.state_dict(), parameters_of(optimizer)
    for key, tensor in load_safetensors(path).items():
        kind, _, name = key.partition(".")
        if kind == "model":
            weights[name].copy_(like(tensor, weights[name]))
            continue
        p = parameters[int(name)]
        tensor = tensor.clone()
        # The number of steps is one number for a parameter, which is not sharded.
        optimizer.state[p][kind] = tensor.to(p.device) if kind == "step" else like(tensor, p)
    return int(about["step"]), json.loads(about["log"])


# -- stops

@contextlib.contextmanager
def stops_wait():
    """Inside, Ctrl-C, or SIGTERM, a batch system's request, only enters the list that this yields:
    the step under way can be ended and saved. A second request stops at once, and one that nobody
    has heeded at the end."""
    stops = []
    before = {n: signal.signal(n, partial(note, stops)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
        if stops:
            raise KeyboardInterrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def note(stops, number, frame):
    """Note a signal; KeyboardInterrupt if there was one before."""
    if stops:
        raise KeyboardInterrupt
    stops.append(number)


# -- directories

def free_name(name):
    """A path that nothing has: the name itself, or with a number; the same in all processes."""
    name = path = name.rstrip("/")
    number = 2
    while os.path.lexists(path):
        path, number = f"{name}-{number}", number + 1
    return gather([path])[0]


@contextlib.contextmanager
def new_directory(path):
    """Yields the path of an empty directory, which appears as `path` when all is in it."""
    unfinished = f"{path}.tmp"
    once(shutil.rmtree, unfinished, True)       # what a kill has left
    once(os.makedirs, unfinished)
    yield unfinished
    once(os.rename, unfinished, path)


def clear(directory):
    """Remove what is of no more use in a finished run: its last checkpoint, half a file that a kill
    has left."""
    for path in [*Path(directory).glob("*.tmp"), Path(directory, "checkpoint.safetensors")]:
        with contextlib.suppress(OSError):
            path.unlink()


# -- stages

@contextlib.contextmanager
def at_work(path):
    """Inside, a run's directory is held against other commands. A stop ends this one with exit code
    130, and says how to go on."""
    try:
        with alone(path):
            yield
    except KeyboardInterrupt:
        if rank() == 0:
            print("\nstopped; what is finished is kept. Go on with: python train.py --resume "
                  f"{path}", file=sys.stderr)
        sys.exit(130)


def finished(run, stage):
    """Are all files of a stage there?"""
    return all(is_there(run.file(name)) for name in stage.files)


def copy_stages(source, run, stages):
    """Copy another run's stages, up to the first that it has not finished, or that reads an option
    whose value differs: all later ones depend on it."""
    # The same word may select others now: it counts what the objectives are.
    theirs, ours = [vars(r.config) | {"objective": r.objectives} for r in (source, run)]
    for stage in stages:
        same = [theirs[name] == ours[name] for name in stage.options.split()]
        if not all(same) or not finished(source, stage):
            break
        print(f"{stage.title}: copied from {source.path}")
        # What it has left: rows of the log, and files.
        name = stage.files[-1].partition(".")[0]
        run.log(name, [row for row in log_rows(source.file("log.jsonl")) if row["stage"] == name])
        for file in stage.files:
            copy = shutil.copytree if os.path.isdir(source.file(file)) else shutil.copy
            once(copy, source.file(file), run.file(file))


# -- configurations

def save_config(run, directory):
    """config.json: the options, and what tells whether they still mean the same."""
    records = [asdict(o) for o in run.objectives]
    about = {"objectives": records, "key": run.key, "processes": ranks()}
    write_json(f"{directory}/config.json", asdict(run.config) | about)
    note_files(directory, ["config.json"])


def load_config(path):
    """What save_config saved -> Config, list of Objective. InputError where the options are others:
    another version of train.py may mean something else by them; for a changed option or --data; and
    for another number of processes, whose draws and roundings are others."""
    saved = read_run(path)
    other = set(saved) ^ {*[f.name for f in fields(Config)], "objectives", "key", "processes"}
    if other:
        raise InputError(f"{path}/config.json: not the configuration of a run of this version "
                         f"({', '.join(sorted(other))})")
    check_key(path, saved)
    objectives, n, _ = [saved.pop(name) for name in ("objectives", "processes", "key")]
    if n != ranks():
        raise InputError(f"{path}: a run of {n} processes, not of {ranks()}; go on with torchrun "
                         f"--nproc_per_node {n} train.py, or python train.py if that is 1")
    return Config(**saved), objectives


def check_key(path, saved):
    """InputError if the options of a run, as read_run gives them, or its data are no longer those
    that it began with."""
    if saved.get("key") != run_key(saved, saved["objectives"]):
        raise InputError(f"{path}/config.json: the options, or the files in --data "
                         f"({saved.get('data')}), are not those that this run began with; bring "
                         "those back, or start a new run")


def run_key(options, objectives):
    """A hash of options ({name: value}) and data: files made under others have another key."""
    # config.json holds more than options.
    left_out = [*HARMLESS, "objectives", "key", "processes"]
    options = {name: value for name, value in options.items() if name not in left_out}
    records = [asdict(o) for o in objectives]
    digest = hashlib.sha256(json.dumps([options, records]).encode())
    for path in data_files(options.get("data"), objectives):
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()
