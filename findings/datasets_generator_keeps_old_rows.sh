#!/bin/bash
# datasets 5.2.0
# Dataset.from_generator keeps what a generator has given under a hash of its code and of gen_kwargs.
# A generator that reads a file of pairs is given the path: once the file has changed, the rows are
# still the old ones, in this process and in every later one, without a word.  Dataset.from_json
# of the same path sees the change.
# Expected: the rows that the generator gives.
# Seen, after "old" in the file was replaced by "new":
#   from_generator: old, from_json: new
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 numpy==2.4.6
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" "$T/venv/bin/python" -W ignore 2>/dev/null - <<'END'
import json

from datasets import Dataset


def pairs(path):
    with open(path) as file:
        for line in file:
            yield json.loads(line)


seen = {}
for word in ("old", "new"):
    with open("pairs.jsonl", "w") as file:
        file.write(json.dumps({"chosen": word}) + "\n")
    seen["from_generator"] = Dataset.from_generator(pairs, gen_kwargs={"path": "pairs.jsonl"})[0]
    seen["from_json"] = Dataset.from_json("pairs.jsonl")[0]
print(", ".join(f"{name}: {row['chosen']}" for name, row in seen.items()))
assert seen == {"from_generator": {"chosen": "old"}, "from_json": {"chosen": "new"}}, seen
END
