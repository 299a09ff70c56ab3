#!/bin/bash
# math-verify 0.9.0, latex2sympy2_extended 1.11.0
# A unit is dropped before answers are compared, so that a wrong unit is right and the same quantity
# in another unit is wrong: 10 m passes for 10 cm, and 0.1 m does not.  A ratio is a fraction.
# As a reward it teaches the number and not the quantity.
# Expected: 10 m is refused for 10 cm, and 1:2 is not one half.
# Seen (gold, answer, verdict):
#   10 cm  10 m   True
#   10 cm  0.1 m  False
#   1:2    1/2    True
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore - <<'END'
from math_verify import parse, verify
cases = [("10 cm", "10 m", r"$10\text{ cm}$", r"$10\text{ m}$"),
         ("10 cm", "0.1 m", r"$10\text{ cm}$", r"$0.1\text{ m}$"),
         ("1:2", "1/2", "$1:2$", r"$\frac12$")]
seen = []
for gold, answer, g, a in cases:
    seen.append(verify(parse(g), parse(a)))
    print(f"{gold:6} {answer:6} {seen[-1]}")
assert seen == [True, False, True]
END
