#!/bin/bash
# datasets 5.2.0, pyarrow 26.0.1
# Dataset.from_list takes its columns from the first row alone: a field that only later rows have
# (here the step labels) is gone without a word.  The JSON loader, given the same rows as a file,
# keeps the field and fills the first row with None.
# Expected: both hold the union of the fields.
# Seen:
#   from_list: ['prompt', 'response']
#   json:      ['prompt', 'response', 'labels']
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore - <<'END'
import json, datasets
datasets.disable_progress_bars()
rows = [{"prompt": "1+1?", "response": "2"}, {"prompt": "2+2?", "response": "5", "labels": [False]}]
with open("a.jsonl", "w") as f:
    for r in rows:
        f.write(json.dumps(r) + "\n")
a = datasets.Dataset.from_list(rows)
b = datasets.load_dataset("json", data_files="a.jsonl", split="train")
print("from_list:", a.column_names)
print("json:     ", b.column_names)
assert a.column_names == ["prompt", "response"] and b.column_names == ["prompt", "response", "labels"]
END
