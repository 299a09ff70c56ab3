"""RUN/manifest.json: the sha256 of each file that a finished stage of a run has left there. A disk,
a copy or a person may change a byte that no program stumbles over: only the figures would be wrong.

    note_files, forget_files   a hash enters when its file is whole, and goes before that is replaced
    check_files                every file that is named there is as it was

A file that is not named is not checked: one of a stage under way, or of a run without a manifest.
"""
import hashlib
import json
import os
from pathlib import Path

from data import InputError, read_json, write_json
from interop.parallel import gather, local_items

MANIFEST = "manifest.json"


def check_files(run, *only):
    """InputError for a file of a run, or of one of its trainings, that is not what was written.
    only: files and models' directories to look at, default all. Of what was removed as a whole, to
    be made again, nothing is asked."""
    for directory in [run, *sorted(map(str, Path(run).glob("seed=*")))]:
        noted = read_manifest(directory)
        files = []
        for file in noted:
            top = file.partition("/")[0]
            if (not only or top in only) and is_there(f"{directory}/{top}"):
                files.append(file)
        # Several processes share the reading.
        damaged = [file for file in local_items(files)
                   if sha256(f"{directory}/{file}") != noted[file]]
        for file in gather(damaged):
            raise InputError(f"{directory}/{file}: not what the run has written there; bring it back "
                             "from a copy, or remove what its stage has made, and train.py --resume "
                             f"{directory} makes it again")


def note_files(run, names):
    """Enter files, and all files of directories, that are not in a run's manifest yet."""
    noted, new = read_manifest(run), []
    for name in names:
        path = Path(run, name)
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        new += [file.relative_to(run).as_posix() for file in found if file.is_file()]
    new = [file for file in new if file not in noted]
    hashes = gather([(file, sha256(f"{run}/{file}")) for file in local_items(new)])
    if new:
        write_manifest(run, noted | dict(hashes))


def forget_files(run, names):
    """Take files and directories out of a run's manifest, because they will be made anew."""
    noted = read_manifest(run)
    kept = {file: value for file, value in noted.items() if file.partition("/")[0] not in names}
    if len(kept) < len(noted):
        write_manifest(run, kept)


def is_there(path):
    """Is a file there, or the directory of a model as a whole, whose config.json comes last?"""
    return os.path.isfile(path) or os.path.isfile(os.path.join(path, "config.json"))


def sha256(path):
    """The hash of a file's bytes, None if there is no file."""
    if not os.path.isfile(path):
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


# -- the manifest itself, which may be damaged, too: its own hash stands in it

def seal(noted):
    """The hash of what a manifest says."""
    return hashlib.sha256(json.dumps(noted, sort_keys=True).encode()).hexdigest()


def read_manifest(run):
    """{file: hash} of a run; nothing where there is no manifest."""
    path = f"{run}/{MANIFEST}"
    if not os.path.exists(path):
        return {}
    try:
        noted = dict(read_json(path))
        own = noted.pop(MANIFEST)
    except (InputError, KeyError, TypeError, ValueError):
        noted, own = {}, None
    if own != seal(noted):
        raise InputError(f"{path}: not what the run has written there; bring it back from a copy, or "
                         "remove it to go on with files that nobody has checked")
    return noted


def write_manifest(run, noted):
    """What read_manifest reads."""
    noted = dict(sorted(noted.items()))
    write_json(f"{run}/{MANIFEST}", noted | {MANIFEST: seal(noted)})
