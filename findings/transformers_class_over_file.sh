#!/bin/bash
# transformers 5.24.0, tokenizers 0.23.3
# tokenizer.json says: lower case first, then split.  With "tokenizer_class": "Qwen2Tokenizer" in
# tokenizer_config.json, transformers takes the vocabulary and merges from that file, and the
# normalizer and the pre-tokenizer from its own class: the ids differ from those that the tokenizers
# library reads from the same file, without a warning.  With "PreTrainedTokenizerFast" they agree.
# A checkpoint whose author changed tokenizer.json but kept the class trains on other ids than it
# is served with.
# Expected: the file decides, the class is only a name.
# Seen:
#   tokenizers              ['a', 'b']
#   PreTrainedTokenizerFast ['a', 'b']
#   Qwen2Tokenizer          ['A', 'B']
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore - <<'END'
import json, os
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
t = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
t.normalizer = normalizers.Lowercase()
t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
t.decoder = decoders.ByteLevel()
want = t.encode("AB").tokens
print(f"{'tokenizers':23}", want)
got = {}
for name in ("PreTrainedTokenizerFast", "Qwen2Tokenizer"):
    os.mkdir(name)
    t.save(name + "/tokenizer.json")
    with open(name + "/tokenizer_config.json", "w") as f:
        json.dump({"tokenizer_class": name}, f)
    h = AutoTokenizer.from_pretrained(name)
    got[name] = h.convert_ids_to_tokens(h("AB")["input_ids"])
    print(f"{name:23}", got[name])
assert want == got["PreTrainedTokenizerFast"] == ["a", "b"] and got["Qwen2Tokenizer"] == ["A", "B"]
END
