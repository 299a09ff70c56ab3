"""A dataclass as a command line: every field is a flag.

    option          a field: its default, its help, what it may be
    read_options    the command line -> an object of the dataclass
    check_options   are the values in their ranges?
"""
import argparse
from dataclasses import field, fields

from data import InputError


def option(default, text, **about):
    """A field: its default, its line in --help; perhaps `fast`, its value under --fast, and what it
    may be: at least `low` (if not said 0, or 1 for a whole number), or one of `choices`."""
    return field(default=default, metadata={"help": text} | about)


def flag(name):
    """The flag of a field."""
    return "--" + name.rstrip("_").replace("_", "-")


def read_options(kind, argv, description, epilog):
    """The command line of a dataclass -> an object of it; the run that --resume names, or None.
    InputError for other options beside --resume."""
    # SUPPRESS: an option that is not given is absent, and takes its default from the dataclass.
    parser = argparse.ArgumentParser(description=description, epilog=epilog,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    small = {}
    for f in fields(kind):
        text = f"{f.metadata['help']} (default {f.default!r})".replace("%", "%%")
        action = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument(flag(f.name), dest=f.name, help=text, **action)
        if "fast" in f.metadata:
            small[f.name] = f.metadata["fast"]
    parser.add_argument("--fast", action="store_const", const=small, default={},
                        help="every stage, small: shows that it works, finds nothing")
    parser.add_argument("--resume", metavar="RUN", help="go on with an unfinished run, under its "
                        "own options; takes no other option but --device")
    given = vars(parser.parse_args(argv))
    fast, resume = given.pop("fast"), given.pop("resume", None)
    if resume == "":                                # an empty variable of a script
        raise InputError("--resume needs the directory of a run")
    if resume and (fast or set(given) - {"device"}):
        raise InputError("--resume goes on with the run's own configuration; give no option with "
                         "it but --device")
    return kind(**fast | given), resume


def check_options(config):
    """InputError for a value out of its range."""
    for f in fields(config):
        value = getattr(config, f.name)
        low = f.metadata.get("low", 1 if f.type is int else 0)
        if f.type in (int, float) and not low <= value < 2**31:
            raise InputError(f"{flag(f.name)} {value} is out of range")
        choices = f.metadata.get("choices", [value])
        if value not in choices:
            raise InputError(f"{flag(f.name)} {value}: choose {' or '.join(choices)}")
