#!/bin/bash
# minijinja 3.1.0, Jinja2 3.1.6
# minijinja, by which several servers written in Rust render chat templates, now follows Jinja2 so
# closely that most of what differs is an error.  Two things differ in silence: a text and a mapping
# are no sequence there, so that a template which asks "is sequence" takes the other branch; and
# floats are written without an exponent, or by tojson with another one, so that the arguments of a
# tool call become other tokens.
# Expected: the same text, as with 40 other expressions.
# Seen:
#   text is sequence: jinja2 True, minijinja False
#   mapping is sequence: jinja2 True, minijinja False
#   {{ 1e-7 }}: jinja2 1e-07, minijinja 0.0000001
#   {{ 1e16 }}: jinja2 1e+16, minijinja 10000000000000000.0
#   {{ 1e-7|tojson }}: jinja2 1e-07, minijinja 1e-7
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check minijinja==3.1.0 jinja2==3.1.6
cd "$T"
"$T/venv/bin/python" -W ignore - <<'END'
import jinja2
import minijinja

given = {"x": "hello", "d": {"a": 1}}
seen = []
for name, template in {"text is sequence": "{{ x is sequence }}",
                       "mapping is sequence": "{{ d is sequence }}",
                       "{{ 1e-7 }}": "{{ 1e-7 }}", "{{ 1e16 }}": "{{ 1e16 }}",
                       "{{ 1e-7|tojson }}": "{{ 1e-7|tojson }}"}.items():
    one = jinja2.Environment().from_string(template).render(**given)
    other = minijinja.Environment().render_str(template, **given)
    print(f"{name}: jinja2 {one}, minijinja {other}")
    seen.append((one, other))
assert seen == [("True", "False"), ("True", "False"), ("1e-07", "0.0000001"),
                ("1e+16", "10000000000000000.0"), ("1e-07", "1e-7")], seen
END
