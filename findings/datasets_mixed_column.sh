#!/bin/bash
# datasets 5.2.0, pyarrow 26.0.1
# Ratings that are numbers in some rows and strings in others load without an error since the Json
# type exists, but a string that happens to be JSON is parsed: "5" comes back as the number 5,
# "007" as 7 and "null" as None, while "N/A" stays a string.
# Expected: every row comes back as the file has it (or, as in older releases, an error).
# Seen:
#   in the file: [4, '5', '007', 'null', 'true', 'N/A']
#   in the rows: [4, 5, 7, None, True, 'N/A']
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore - <<'END'
import json, datasets
datasets.disable_progress_bars()
want = [4, "5", "007", "null", "true", "N/A"]
with open("a.jsonl", "w") as f:
    for r in want:
        f.write(json.dumps({"rating": r}) + "\n")
d = datasets.load_dataset("json", data_files="a.jsonl", split="train")
got = [row["rating"] for row in d]
print("in the file:", want)
print("in the rows:", got)
assert got[:2] == [4, 5] and isinstance(got[1], int) and got[-1] == "N/A"
END
