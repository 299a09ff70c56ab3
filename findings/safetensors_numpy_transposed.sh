#!/bin/bash
# safetensors 0.8.0 and 0.7.0, numpy 2.4.6
# safetensors.numpy.save of an array that is not in C order, such as the transpose that turns a
# Conv1D weight into a Linear one, writes the memory as it lies under the shape of the view: other
# numbers, no error.  0.7.0 wrote the right ones; safetensors.torch refuses such a tensor.
# Reported as safetensors/safetensors#825 in August 2026.
# Expected: what 0.7.0 does, or a refusal.
# Seen, the transpose of [[0, 1, 2], [3, 4, 5]] after a round trip:
#   0.7.0: [[0, 3], [1, 4], [2, 5]]
#   0.8.0: [[0, 1], [2, 3], [4, 5]]
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
cd "$T"
for version in 0.7.0 0.8.0; do
    "$T/venv/bin/pip" install -q --disable-pip-version-check safetensors==$version numpy==2.4.6
    "$T/venv/bin/python" - <<'END'
import numpy as np
import safetensors
from safetensors.numpy import load, save

x = np.arange(6).reshape(2, 3).T
found = load(save({"x": x}))["x"].tolist()
print(f"{safetensors.__version__}: {found}")
right, wrong = x.tolist(), [[0, 1], [2, 3], [4, 5]]
assert found == {"0.7.0": right, "0.8.0": wrong}[safetensors.__version__]
END
done
