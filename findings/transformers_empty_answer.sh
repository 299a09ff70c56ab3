#!/bin/bash
# transformers 5.24.0
# continue_final_message=True lets a model go on with an answer that has begun.  With an answer that
# is still empty it should give what add_generation_prompt=True gives.  It does so where the template
# leaves contents as they are; where the template trims them, as Llama 3's does, the line break that
# belongs to the header before the answer goes as well, and the model starts from another prompt.
# Expected: the same prompt for both.
# Seen, ends of the prompts:
#   contents as they are: begun '<assistant>\n', asked '<assistant>\n'
#   contents trimmed: begun '<assistant>', asked '<assistant>\n'
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3 jinja2==3.1.6
cd "$T"
HF_HUB_OFFLINE=1 HF_HOME="$T/hf" "$T/venv/bin/python" -W ignore 2>/dev/null - <<'END'
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
question = {"role": "user", "content": "hi"}
seen = []
for name, content in {"contents as they are": "m.content", "contents trimmed": "m.content | trim"}.items():
    template = ("{% for m in messages %}<{{ m.role }}>{{ '\\n' }}{{ " + content + " }}<end>{% endfor %}"
                "{% if add_generation_prompt %}<assistant>{{ '\\n' }}{% endif %}")
    empty = {"role": "assistant", "content": ""}
    begun = tokenizer.apply_chat_template([question, empty], chat_template=template, tokenize=False,
                                          continue_final_message=True)
    asked = tokenizer.apply_chat_template([question], chat_template=template, tokenize=False,
                                          add_generation_prompt=True)
    ends = [prompt.partition("<end>")[2] for prompt in (begun, asked)]
    print(f"{name}: begun {ends[0]!r}, asked {ends[1]!r}")
    seen.append(ends)
assert seen == [["<assistant>\n", "<assistant>\n"], ["<assistant>", "<assistant>\n"]], seen
END
