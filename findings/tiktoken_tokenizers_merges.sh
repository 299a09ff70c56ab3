#!/bin/bash
# tiktoken 0.14.0, tokenizers 0.23.3
# One vocabulary of a BPE, two answers: tiktoken joins two neighbours whenever the joined text is a
# token, tokenizers only where that very pair stands in the list of merges.  With the merges
# (b, b) and (b, bb), tokenizers turns "bbb" into bb + b, because bb + b is not in the list, and
# tiktoken into the one token bbb.  A list of ranks cannot say what a list of merges says, so a
# conversion from one to the other may change ids without an error.
# Expected: same ids, since both files name the same tokens in the same order.
# Seen:
#   tiktoken:   ['bbb']
#   tokenizers: ['bb', 'b']
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check tiktoken==0.14.0 tokenizers==0.23.3
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore - <<'END'
import tiktoken
from tokenizers import Tokenizer, models
vocab = {"a": 0, "b": 1, "bb": 2, "bbb": 3}
t = Tokenizer(models.BPE(vocab, [("b", "b"), ("b", "bb")]))
ranks = {k.encode(): v for k, v in vocab.items()}
e = tiktoken.Encoding("tiny", pat_str="[ab]+", mergeable_ranks=ranks, special_tokens={})
names = list(vocab)
x = [names[i] for i in e.encode("bbb")]
y = t.encode("bbb").tokens
print("tiktoken:  ", x)
print("tokenizers:", y)
assert x == ["bbb"] and y == ["bb", "b"]
END
