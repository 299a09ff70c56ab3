#!/bin/bash
# tiktoken 0.14.0, tokenizers 0.23.3
# Where one special token begins with another (runs of spaces; <s1, <s12, <s123), tokenizers takes
# the longest that fits.  tiktoken takes whichever its table happens to hold first: neither the
# longest nor the shortest, nor the one that was given first.  The same names in another set may be
# cut otherwise, and a text that IS a special token may come back as two pieces.
# Expected: every special token, encoded with allowed_special="all", is one id: its own.
# Seen, the pieces of each name:
#   tiktoken:   ['<s'] ['<s', '1'] ['<s12'] ['<s12', '3']   and for 2, 4, 8 spaces ['2'] ['4'] ['4', '4']
#   tokenizers: ['<s'] ['<s1'] ['<s12'] ['<s123']           and for 2, 4, 8 spaces ['2'] ['4'] ['8']
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check tiktoken==0.14.0 tokenizers==0.23.3
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore - <<'END'
import tiktoken
from tokenizers import AddedToken, Tokenizer, models


def cut(names):
    """The pieces of every name, by tiktoken and by tokenizers; spaces as their number."""
    specials = {name: 256 + i for i, name in enumerate(names)}
    e = tiktoken.Encoding("tiny", pat_str=r"(?s).", special_tokens=specials,
                          mergeable_ranks={bytes([i]): i for i in range(256)})
    t = Tokenizer(models.BPE({chr(i): i for i in range(256)}, []))
    t.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    found = []
    for name in names:
        one = [e.decode([i]) for i in e.encode(name, allowed_special="all")]
        other = t.encode(name).tokens
        found.append([[str(len(p)) if p.isspace() else p for p in pieces] for pieces in (one, other)])
    return zip(*found)


seen = [list(cut(names)) for names in (["<s", "<s1", "<s12", "<s123"], [" " * n for n in (2, 4, 8)])]
for i, program in enumerate(("tiktoken:  ", "tokenizers:")):
    print(program, *[list(found[i]) for found in seen])
(t1, h1), (t2, h2) = seen
assert list(t1) == [["<s"], ["<s", "1"], ["<s12"], ["<s12", "3"]], t1
assert list(h1) == [["<s"], ["<s1"], ["<s12"], ["<s123"]], h1
assert list(t2) == [["2"], ["4"], ["4", "4"]], t2
assert list(h2) == [["2"], ["4"], ["8"]], h2
END
