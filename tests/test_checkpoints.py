"""Checkpoints of every family, against a plain reference that knows only their published names:
model.py, interop/checkpoints.py. Every docstring states the bug that its test prevents."""
import json
import math
import os
import random

import pytest
import torch
import torch.nn.functional as F

from data import InputError
from decode import generate
from model import (Checkpoint, load_hf, load_safetensors, read_config, save_hf,
                   save_safetensors)

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}
LLAMA = {"model_type": "llama", "vocab_size": 23, "hidden_size": 24, "intermediate_size": 20,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
CASES = {
    "llama2": LLAMA | {"num_key_value_heads": 4, "rope_theta": 100.0, "torch_dtype": "float32"},
    "llama3.1": LLAMA | {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    "llama3.2": LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "head_dim": 8,
                         "tie_word_embeddings": True, "dtype": "float32"},
    "llama with biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "mistral": LLAMA | {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
    "qwen2.5": LLAMA | {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False,
                        "max_window_layers": 2},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True,
                      "layer_types": ["full_attention"] * 2},
    "gpt2": {"model_type": "gpt2", "vocab_size": 23, "n_embd": 24, "n_layer": 2, "n_head": 4,
             "n_positions": 64, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
             "n_inner": None, "scale_attn_weights": True},
}


def generator():
    return torch.Generator().manual_seed(3)


# -- checkpoints as others write them

def linear_maps(c):
    """Names, shapes (out, in) and biases of a layer's maps, as Llama's relatives publish them."""
    d, f = c["hidden_size"], c["intermediate_size"]
    hd = c.get("head_dim", d // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd
    biased, mlp = c.get("attention_bias", False), c.get("mlp_bias", False)
    qkv = biased or c["model_type"] == "qwen2"
    return [("self_attn.q_proj", q, d, qkv), ("self_attn.k_proj", kv, d, qkv),
            ("self_attn.v_proj", kv, d, qkv), ("self_attn.o_proj", d, q, biased),
            ("mlp.gate_proj", f, d, mlp), ("mlp.up_proj", f, d, mlp), ("mlp.down_proj", d, f, mlp)]


def llama_shapes(c):
    """{name: shape} of a Llama or one of its relatives."""
    V, d = c["vocab_size"], c["hidden_size"]
    shapes = {"model.embed_tokens.weight": (V, d), "model.norm.weight": (d,)}
    hd = c.get("head_dim", d // c["num_attention_heads"])
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, n_out, n_in, biased in linear_maps(c):
            shapes[f"{p}{name}.weight"] = (n_out, n_in)
            if biased:
                shapes[f"{p}{name}.bias"] = (n_out,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{p}{name}.weight"] = (d,)
        if c["model_type"] == "qwen3":
            shapes[f"{p}self_attn.q_norm.weight"] = (hd,)
            shapes[f"{p}self_attn.k_norm.weight"] = (hd,)
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (V, d)
    return shapes


def gpt2_shapes(c):
    """{name: shape} of a GPT-2, whose maps are stored (in, out)."""
    d, f = c["n_embd"], 4 * c["n_embd"]
    shapes = {"wte.weight": (c["vocab_size"], d), "wpe.weight": (c["n_positions"], d)}
    norms = ["ln_f"]
    for i in range(c["n_layer"]):
        norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
        maps = ("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d), ("mlp.c_fc", d, f), \
            ("mlp.c_proj", f, d)
        for name, n_in, n_out in maps:
            shapes[f"h.{i}.{name}.weight"] = (n_in, n_out)
            shapes[f"h.{i}.{name}.bias"] = (n_out,)
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (d,)
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


def tensors_of(c):
    """Random tensors under the names that the family publishes, none at its start value."""
    shapes = gpt2_shapes(c) if c["model_type"] == "gpt2" else llama_shapes(c)
    rng, tensors = generator(), {}
    for name, shape in shapes.items():
        norm = len(shape) == 1 and name.endswith(".weight")
        tensors[name] = torch.randn(shape, generator=rng) * 0.3 + (1.0 if norm else 0.0)
    return tensors


def write(directory, c, tensors, shards=1):
    """A directory with config.json and the tensors, in one file or in shards with an index."""
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(c, f)
    if shards == 1:
        return save_safetensors(tensors, os.path.join(directory, "model.safetensors"))
    names, where = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_safetensors({n: tensors[n] for n in part}, os.path.join(directory, file))
        where |= dict.fromkeys(part, file)
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {}, "weight_map": where}, f)


# -- what they compute, written from the families' papers, one head after another

class Reference:
    """Logits (T, V) in float64 of one sequence."""

    def __init__(self, c, tensors):
        self.c, self.t = c, {}
        for name, tensor in tensors.items():
            name = name.removeprefix("transformer.").removeprefix("model.")
            self.t[name] = tensor.double()

    def logits(self, ids):
        gpt2 = self.c["model_type"] == "gpt2"
        return self.gpt2_logits(ids) if gpt2 else self.llama_logits(ids)

    def linear(self, x, name):
        return x @ self.t[f"{name}.weight"].T + self.t.get(f"{name}.bias", 0)

    def rms(self, x, name):
        size = (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x / size * self.t[f"{name}.weight"]

    def layer_norm(self, x, name):
        w, b = self.t[f"{name}.weight"], self.t[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], w, b, 1e-5)

    def attend(self, q, k, v):
        future = torch.full((len(q), len(q)), -math.inf, dtype=torch.float64).triu(1)
        return (q @ k.T / math.sqrt(q.shape[1]) + future).softmax(-1) @ v

    def conv1d(self, x, name):
        return x @ self.t[f"{name}.weight"] + self.t[f"{name}.bias"]

    def gpt2_logits(self, ids):
        d, hd = self.c["n_embd"], self.c["n_embd"] // self.c["n_head"]
        x = self.t["wte.weight"][ids] + self.t["wpe.weight"][:len(ids)]
        for i in range(self.c["n_layer"]):
            h = self.layer_norm(x, f"h.{i}.ln_1")
            q, k, v = self.conv1d(h, f"h.{i}.attn.c_attn").split(d, 1)
            heads = []
            for a in range(0, d, hd):
                heads.append(self.attend(q[:, a:a + hd], k[:, a:a + hd], v[:, a:a + hd]))
            x = x + self.conv1d(torch.cat(heads, 1), f"h.{i}.attn.c_proj")
            h = self.conv1d(self.layer_norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
            x = x + self.conv1d(F.gelu(h, approximate="tanh"), f"h.{i}.mlp.c_proj")
        return self.layer_norm(x, "ln_f") @ self.t["wte.weight"].T

    def turned(self, x):
        """Rotary positions of one head (T, hd)."""
        rope = self.c.get("rope_parameters") or self.c.get("rope_scaling") or {}
        theta = rope.get("rope_theta") or self.c.get("rope_theta") or 10000.0
        T, hd = x.shape
        rates = []
        for i in range(hd // 2):
            rate = theta ** (-2 * i / hd)
            if rope:                    # Llama 3's: within 24 places, one turn is slow, four fast
                turns = 24 * rate / (2 * math.pi)
                fast = min(1.0, max(0.0, (turns - 1.0) / (4.0 - 1.0)))
                rate = fast * rate + (1 - fast) * rate / 8.0
            rates.append(rate)
        angle = torch.outer(torch.arange(T).double(), torch.tensor(rates, dtype=torch.float64))
        cos, sin = angle.cos(), angle.sin()
        a, b = x[:, :hd // 2], x[:, hd // 2:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), 1)

    def llama_logits(self, ids):
        x = self.t["embed_tokens.weight"][ids]
        for i in range(self.c["num_hidden_layers"]):
            x = x + self.llama_attention(self.rms(x, f"layers.{i}.input_layernorm"), f"layers.{i}")
            h = self.rms(x, f"layers.{i}.post_attention_layernorm")
            gate = self.linear(h, f"layers.{i}.mlp.gate_proj")
            up = self.linear(h, f"layers.{i}.mlp.up_proj")
            x = x + self.linear(F.silu(gate) * up, f"layers.{i}.mlp.down_proj")
        tied = self.c.get("tie_word_embeddings")
        head = self.t["embed_tokens.weight" if tied else "lm_head.weight"]
        return self.rms(x, "norm") @ head.T

    def llama_attention(self, h, layer):
        n, kv = self.c["num_attention_heads"], self.c["num_key_value_heads"]
        hd = self.c.get("head_dim", self.c["hidden_size"] // n)
        q, k, v = (self.linear(h, f"{layer}.self_attn.{m}_proj") for m in "qkv")
        out = []
        for j in range(n):
            g = j // (n // kv)          # the head of keys that query head j shares
            qj, kj = q[:, j * hd:(j + 1) * hd], k[:, g * hd:(g + 1) * hd]
            if self.c["model_type"] == "qwen3":
                qj = self.rms(qj, f"{layer}.self_attn.q_norm")
                kj = self.rms(kj, f"{layer}.self_attn.k_norm")
            out.append(self.attend(self.turned(qj), self.turned(kj), v[:, g * hd:(g + 1) * hd]))
        return self.linear(torch.cat(out, 1), f"{layer}.self_attn.o_proj")


# -- reading and writing

@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_family_computes_what_its_reference_does(tmp_path, case, shards):
    """GPT-2's transposed maps, Llama 3.1's stretched positions, Qwen's biases and norms of queries,
    tied heads, shards: one of them read wrongly gives fluent nonsense."""
    c, tensors = CASES[case], tensors_of(CASES[case])
    write(str(tmp_path), c, tensors, shards)
    model, reference = load_hf(str(tmp_path)), Reference(c, tensors)
    ids = torch.randint(0, 23, (40,), generator=generator())
    with torch.no_grad():
        found = model.logits(model(ids[None]))[0].double()
    wanted = reference.logits(ids)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-5
    prompt, said = ids[:5].tolist(), []
    for _ in range(12):
        logits = reference.logits(torch.tensor(prompt + said))
        said.append(int(logits[-1].argmax()))
    assert generate(model, [prompt], max_new_tokens=12, temperature=0)[0] == said


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, case):
    """An export that loses a bias, a norm or a field of config.json; a head that stays tied to the
    embedding elsewhere."""
    c, tensors = CASES[case], tensors_of(CASES[case])
    write(str(tmp_path / "in"), c, tensors)
    model = load_hf(str(tmp_path / "in"))
    save_hf(model, str(tmp_path / "out"), weights=0)
    out = load_safetensors(str(tmp_path / "out" / "model.safetensors"))
    embedding = "transformer.wte.weight" if case == "gpt2" else "model.embed_tokens.weight"
    expected = {"lm_head.weight": tensors[embedding]} | tensors
    assert out.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(out[name], tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = c | {"tie_word_embeddings": False}
    assert {k: config[k] for k in expected} == expected
    names = ("honesty", "helpfulness")
    two = model.with_heads(names, 0.1, generator())
    save_hf(two, str(tmp_path / "two"))
    again = load_hf(str(tmp_path / "two"))
    assert again.config.objectives == names and same_state(again, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, dtype):
    """bf16 read as fp16, or a checkpoint loaded in another precision than asked for."""
    tensors = {name: t.to(dtype) for name, t in tensors_of(CASES["qwen3"]).items()}
    write(str(tmp_path), CASES["qwen3"], tensors)
    model, half = load_hf(str(tmp_path)), load_hf(str(tmp_path), dtype=torch.bfloat16)
    assert torch.equal(model.embed.weight, tensors["model.embed_tokens.weight"].float())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.cos.dtype == half(torch.tensor([[1, 2]])).dtype == torch.bfloat16


def test_what_other_programs_leave_behind(tmp_path):
    """Buffers, a repeated head, a missing prefix: harmless, and refusing them would refuse most of
    the old files."""
    c, tensors = CASES["gpt2"], tensors_of(CASES["gpt2"])
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    more = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4),
            "lm_head.weight": tensors["transformer.wte.weight"]}
    write(str(tmp_path / "a"), c, tensors)
    write(str(tmp_path / "b"), c, bare | more)
    a, b = load_hf(str(tmp_path / "a")), load_hf(str(tmp_path / "b"))
    assert same_state(a, b)
    write(str(tmp_path / "d"), c, {f"pretrained_model.{name}": t for name, t in tensors.items()})
    assert same_state(a, load_hf(str(tmp_path / "d")))
    llama = tensors_of(LLAMA)
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    write(str(tmp_path / "e"), LLAMA, llama)
    write(str(tmp_path / "f"), LLAMA, llama | tables)
    assert same_state(load_hf(str(tmp_path / "e")), load_hf(str(tmp_path / "f")))
    write(str(tmp_path / "c"), c, tensors | {"wte.weight": torch.ones(23, 24)})
    with pytest.raises(InputError, match="stands twice"):
        load_hf(str(tmp_path / "c"))


@pytest.mark.parametrize("case", ["llama3.2", "qwen3", "gpt2"])
def test_tied_as_the_file_has_it(tmp_path, case):
    """A head of its own dropped for the embedding because config.json says that they are one; a
    file refused that kept the head and dropped the embedding, as safetensors' save_model does."""
    c, tensors = CASES[case], tensors_of(CASES[case])
    name = "transformer.wte.weight" if case == "gpt2" else "model.embed_tokens.weight"
    embedding, head = tensors[name], tensors[name].flip(0)
    write(str(tmp_path / "two"), c, tensors | {"lm_head.weight": head})
    for model in (load_hf(str(tmp_path / "two")), load_hf(str(tmp_path / "two"), ["a", "b"])):
        assert torch.equal(model.embed.weight, embedding)
        assert all(torch.equal(h.weight, head) for h in model.heads)
    del tensors[name]
    write(str(tmp_path / "one"), c, tensors | {"lm_head.weight": embedding})
    model = load_hf(str(tmp_path / "one"))
    assert torch.equal(model.embed.weight, embedding)
    assert torch.equal(model.heads[0].weight, embedding)
    write(str(tmp_path / "none"), c, tensors)
    with pytest.raises(InputError, match="missing"):
        load_hf(str(tmp_path / "none"))


UNKNOWN = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}


@pytest.mark.parametrize("fields, theta, context", [
    ({}, 1e4, None),
    ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5, None),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, 5e5, None),
    ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0}}, 5e5, None),
    ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LLAMA3}, 1e4, 24),
    ({"rope_parameters": LLAMA3, "rope_scaling": {"rope_theta": 5e5}}, 5e5, None),
    ({"rope_theta": 5e5, "rope_scaling": UNKNOWN | {"type": "llama3"}}, 5e5, 64),
    ({"original_max_position_embeddings": 48, "rope_parameters": LLAMA3}, 1e4, 48)])
def test_rotary_fields_wherever_they_stand(tmp_path, fields, theta, context):
    """The default taken where the number stood elsewhere; of two that disagree, the one that other
    programs do not take."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | fields))
    found = read_config(str(tmp_path))
    assert found.rope_theta == theta and bool(found.rope_scaling) == bool(context)
    if context:
        assert found.rope_scaling["original_max_position_embeddings"] == context


# -- what is refused

LLAMA_CHANGES = [
    ({"model_type": "mistral", "sliding_window": 16}, "sliding_window = 16"),
    ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True}, "sliding_window ="),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "MixtralFor.*mixtral"),
    ({"num_local_experts": 8}, "num_local_experts = 8"),
    ({"logit_scale": 0.5}, "logit_scale = 0.5"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "yarn"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "full_attention"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_parameters": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"alibi": True}, "alibi"),
    ({"max_position_embeddings": 10**12}, "max_len|unusable"),
    ({"num_hidden_layers": 10**6}, "too few"),
    ({"rope_theta": -1.0}, "unusable rope_theta"),
    ({"rope_theta": {"full_attention": 5e5}}, "unusable rope_theta"),
    ({"head_dim": 5}, "unusable"),
    ({"intermediate_size": None}, "intermediate_size"),
    ({"model_type": None}, "only llama, mistral"),
    ({"hidden_size": None}, "'hidden_size' is missing"), ({"hidden_size": "24"}, "unusable"),
    ({"num_attention_heads": 0}, "unusable"), ({"num_key_value_heads": 3}, "unusable"),
    ({"num_hidden_layers": -1}, "unusable"), ({"num_hidden_layers": 3}, "layers.2.*is missing"),
    ({"rope_parameters": [1]}, "unusable"), ({"objectives": 5}, "unusable"),
    ({"intermediate_size": 21}, "has shape"),
    ({"vocab_size": 24}, "embed_tokens.weight' has shape"),
    ({"objectives": ["a", "b"]}, "'heads.0.weight' is missing")]
GPT2_CHANGES = [
    ({"activation_function": "relu"}, "relu"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
    ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"add_cross_attention": True}, "add_cross_attention"),
    ({"n_embd": None}, "n_embd")]


@pytest.mark.parametrize("case, changes, words", [
    *(("llama2", *change) for change in LLAMA_CHANGES),
    *(("gpt2", *change) for change in GPT2_CHANGES)])
def test_other_arithmetic_is_refused_by_name(tmp_path, case, changes, words):
    """A window, experts, other positions or a scale that is silently ignored: answers that are
    nearly right. Variants share a family's name and its tensors' names."""
    write(str(tmp_path), CASES[case] | changes, tensors_of(CASES[case]))
    with pytest.raises(InputError, match=words) as e:
        load_hf(str(tmp_path))
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("where, words", [
    ("/etc/passwd", "shards are files of this directory"),
    ("../model.safetensors", "shards are files of this directory"),
    ("a/../x.safetensors", "shards are files of this directory"),
    (3, "shards are files of this directory"),
    ("model-00009-of-00003.safetensors", "no such file")])
def test_a_lying_index(tmp_path, where, words):
    """An index that leads out of the directory reads files that are nobody's business; a missing
    shard must be named."""
    write(str(tmp_path), CASES["llama2"], tensors_of(CASES["llama2"]), shards=3)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = where
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=words):
        load_hf(str(tmp_path))
    index.write_text('{"weight_map": []}')
    with pytest.raises(InputError, match="weight_map"):
        load_hf(str(tmp_path))


def test_parts_of_a_fused_map_must_each_fit(tmp_path):
    """q and k of other sizes whose sum fits would be cut in the wrong place."""
    c = CASES["llama2"] | {"num_key_value_heads": 2}
    tensors = tensors_of(c)
    q, k = (f"model.layers.0.self_attn.{m}_proj.weight" for m in "qk")
    tensors[k] = torch.cat((tensors[k], tensors[q][12:]))
    tensors[q] = tensors[q][:12]
    write(str(tmp_path), c, tensors)
    with pytest.raises(InputError, match=r"q_proj.*\(12, 24\).*wants \(24, 24\)"):
        load_hf(str(tmp_path))


VALUES = [0, -1, 1, 2, 10**9, 10**30, 1e300, 0.5, None, True, "x", "", [], [1], {}, {"a": 1},
          "float32"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_random_damage_to_config_and_index(tmp_path, name):
    """A damaged config.json or index must be refused or read; it must never crash, hang, or take
    the machine's memory."""
    write(str(tmp_path), CASES["llama3.1"], tensors_of(CASES["llama3.1"]), shards=2)
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    good = (tmp_path / name).read_text()
    for _ in range(300):
        content = json.loads(good)
        objects = [v for v in content.values() if isinstance(v, dict) and v]
        part = rng.choice([content, *objects])
        part[rng.choice(list(part))] = rng.choice(VALUES)
        (tmp_path / name).write_text(json.dumps(content))
        try:
            load_hf(str(tmp_path))
            outcomes["read"] += 1
        except InputError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_pages_are_let_go(tmp_path):
    """Every tensor is mapped apart and freed when it is copied: a big checkpoint must not stand in
    memory twice."""
    write(str(tmp_path), CASES["llama2"], tensors_of(CASES["llama2"]))
    taken = Checkpoint(str(tmp_path)).take("model.norm.weight", (24,), torch.float32)
    # Its own memory, not a view of the whole file.
    assert taken.untyped_storage().nbytes() == 24 * 4
