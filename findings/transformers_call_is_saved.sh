#!/bin/bash
# transformers 5.24.0, tokenizers 0.23.3
# How a tokenizer was last CALLED is saved with it: after one call with truncation and padding,
# save_pretrained writes both into tokenizer.json.  transformers itself ignores them when it reads
# the file; tokenizers, and what is built on it, obeys them: every text is cut, or filled, to the
# length of a call that somebody once made, without a warning.
# Expected: the same file before and after a call.
# Seen, ids of six words and of one word:
#   before the call: tokenizers [2, 3, 4, 5, 6, 7] [2], transformers [2, 3, 4, 5, 6, 7] [2]
#   after the call: tokenizers [2, 3] [2, 0], transformers [2, 3, 4, 5, 6, 7] [2]
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore 2>/dev/null - <<'END'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

words = ["<pad>", "<eos>", *"abcdef"]
spec = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
spec.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=spec, pad_token="<pad>", eos_token="<eos>")
seen = {}
for name in ("before", "after"):
    if name == "after":
        tokenizer(["a b c"], truncation=True, padding="max_length", max_length=2)
    tokenizer.save_pretrained(name)
    one, other = Tokenizer.from_file(f"{name}/tokenizer.json"), AutoTokenizer.from_pretrained(name)
    seen[name] = [[one.encode(text).ids for text in ("a b c d e f", "a")],
                  [other(text).input_ids for text in ("a b c d e f", "a")]]
    print(f"{name} the call: tokenizers", *seen[name][0], end=", ")
    print("transformers", *seen[name][1])
whole = [[2, 3, 4, 5, 6, 7], [2]]
assert seen == {"before": [whole, whole], "after": [[[2, 3], [2, 0]], whole]}, seen
END
