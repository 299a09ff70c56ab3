#!/bin/bash
# datasets 5.2.0, pyarrow 26.0.1
# An integer answer above 2 ** 63 in a JSON-lines file (2 ** 64 - 1, the number of grains on a
# chessboard) becomes a float without a warning: its last digits are gone, and one grain more is the
# same answer.
# Expected: an error, or Python's exact integer, which json.loads gives.
# Seen:
#   json.loads: 18446744073709551615
#   datasets:   float64 1.8446744073709552e+19
#   equal to the answer that is one larger: True
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore - <<'END'
import json, datasets
datasets.disable_progress_bars()
grains = 2 ** 64 - 1
lines = [json.dumps({"answer": grains + more}) for more in (0, 1)]
with open("a.jsonl", "w") as f:
    f.write("\n".join(lines) + "\n")
d = datasets.load_dataset("json", data_files="a.jsonl", split="train")
print("json.loads:", json.loads(lines[0])["answer"])
print("datasets:  ", d.features["answer"].dtype, d[0]["answer"])
print("equal to the answer that is one larger:", d[0]["answer"] == d[1]["answer"])
assert d.features["answer"].dtype == "float64" and d[0]["answer"] == d[1]["answer"]
END
