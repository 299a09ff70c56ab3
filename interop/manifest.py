"""RUN/manifest.json, {file: sha256} of what finished stages have left: a disk, a copy or a person
may change a byte that no program stumbles over, and only the figures would be wrong. A file that is
not named there is not checked: one of a stage under way, or of a run without a manifest.
"""
import hashlib
import os
from pathlib import Path

from data import InputError, read_json, write_json


def check_files(run, *only):
    """InputError for a file of a run, or of its trainings, that is not what was written. only:
    files and models to look at, default all. One that was removed as a whole is to be made again.
    """
    for directory in [run, *sorted(map(str, Path(run).glob("seed=*")))]:
        for file, value in read_manifest(directory).items():
            top = file.partition("/")[0]
            asked = not only or top in only
            if asked and is_there(f"{directory}/{top}") and value != sha256(f"{directory}/{file}"):
                raise InputError(f"{directory}/{file}: not what the run has written; bring it "
                                 "back. What a stage has made may be removed instead, and train.py "
                                 f"--resume {directory} makes it again")


def note_files(run, names):
    """Enter files, and all files of directories, that are not in a run's manifest yet."""
    noted, new = read_manifest(run), {}
    for name in names:
        path = Path(run, name)
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            file = file.relative_to(run).as_posix()
            if file not in noted and os.path.isfile(f"{run}/{file}"):
                new[file] = sha256(f"{run}/{file}")
    if new:
        write_json(f"{run}/manifest.json", noted | new)


def forget_files(run, names):
    """Take files and directories out of a run's manifest, before they are made anew."""
    noted = read_manifest(run)
    kept = {file: value for file, value in noted.items() if file.partition("/")[0] not in names}
    if len(kept) < len(noted):
        write_json(f"{run}/manifest.json", kept)


def read_manifest(run):
    """{file: hash} of a run; nothing where there is no manifest."""
    path = f"{run}/manifest.json"
    noted = read_json(path) if os.path.exists(path) else {}
    if not isinstance(noted, dict):
        raise InputError(f"{path}: not what a run has written; bring it back, or remove it: then "
                         "nothing is checked")
    return noted


def is_there(path):
    """Is a file there, or a whole model, whose config.json comes last?"""
    return os.path.isfile(path) or os.path.isfile(os.path.join(path, "config.json"))


def sha256(path):
    """The hash of a file's bytes; of a file that is missing None."""
    digest = hashlib.sha256()
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as f:
        while block := f.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()
