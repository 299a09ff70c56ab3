"""model.py: checkpoints of every family, against a plain reference that knows only their published names. Every
docstring states the bug that its test prevents."""
import json
import math
import os
import random

import pytest
import torch
import torch.nn.functional as F

from data import InputError
from decode import generate
from model import Checkpoint, load_hf, load_safetensors, save_hf, save_safetensors

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}
BASE = {"vocab_size": 23, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
CASES = {
    "llama2": BASE | {"model_type": "llama", "num_key_value_heads": 4, "rope_theta": 100.0, "torch_dtype": "float32"},
    "llama3.1": BASE | {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": LLAMA3},
    "llama3.2": BASE | {"model_type": "llama", "rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "head_dim": 8,
                        "tie_word_embeddings": True, "dtype": "float32"},
    "llama with biases": BASE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": BASE | {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
    "qwen2.5": BASE | {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False, "max_window_layers": 2},
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True, "layer_types": ["full_attention"] * 2},
    "gpt2": {"model_type": "gpt2", "vocab_size": 23, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "n_inner": None, "scale_attn_weights": True}}


def tensors_of(c, generator):
    """Random tensors under the names that the family publishes, every one of them different from its start value."""
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.3
    t = {}
    if c["model_type"] == "gpt2":
        d, f = c["n_embd"], 4 * c["n_embd"]
        t |= {"wte.weight": draw(c["vocab_size"], d), "wpe.weight": draw(c["n_positions"], d)}
        for i in range(c["n_layer"]):
            for name, a, b in (("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d), ("mlp.c_fc", d, f), ("mlp.c_proj", f, d)):
                t |= {f"h.{i}.{name}.weight": draw(a, b), f"h.{i}.{name}.bias": draw(b)}
            for name in ("ln_1", "ln_2"):
                t |= {f"h.{i}.{name}.weight": 1 + draw(d), f"h.{i}.{name}.bias": draw(d)}
        return {f"transformer.{k}": v for k, v in (t | {"ln_f.weight": 1 + draw(d), "ln_f.bias": draw(d)}).items()}
    d, f, n, kv = (c[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    hd = c.get("head_dim", d // n)
    qwen2, biased = c["model_type"] == "qwen2", c.get("attention_bias")
    t |= {"model.embed_tokens.weight": draw(c["vocab_size"], d), "model.norm.weight": 1 + draw(d)}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, a, b, has in (("self_attn.q_proj", d, n * hd, biased or qwen2), ("self_attn.k_proj", d, kv * hd, biased or qwen2),
                                ("self_attn.v_proj", d, kv * hd, biased or qwen2), ("self_attn.o_proj", n * hd, d, biased),
                                ("mlp.gate_proj", d, f, c.get("mlp_bias")), ("mlp.up_proj", d, f, c.get("mlp_bias")),
                                ("mlp.down_proj", f, d, c.get("mlp_bias"))):
            t |= {f"{p}{name}.weight": draw(b, a)} | ({f"{p}{name}.bias": draw(b)} if has else {})
        t |= {f"{p}input_layernorm.weight": 1 + draw(d), f"{p}post_attention_layernorm.weight": 1 + draw(d)}
        if c["model_type"] == "qwen3":
            t |= {f"{p}self_attn.q_norm.weight": 1 + draw(hd), f"{p}self_attn.k_norm.weight": 1 + draw(hd)}
    return t | ({} if c.get("tie_word_embeddings") else {"lm_head.weight": draw(c["vocab_size"], d)})


def write(directory, c, tensors, shards=1, dtype=None):
    """A directory with config.json and the tensors in one file or in shards with an index."""
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(c, f)
    tensors = {k: v.to(dtype or v.dtype).contiguous() for k, v in tensors.items()}
    if shards == 1:
        return save_safetensors(tensors, os.path.join(directory, "model.safetensors"))
    names, where = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_safetensors({n: tensors[n] for n in names[i::shards]}, os.path.join(directory, file))
        where |= dict.fromkeys(names[i::shards], file)
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {}, "weight_map": where}, f)


def reference(c, t, ids):
    """Logits (T, V) in float64 of one sequence, written from the families' papers, one head after another."""
    t = {k.removeprefix("transformer.").removeprefix("model."): v.double() for k, v in t.items()}
    linear = lambda x, name: x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0)
    conv1d = lambda x, name: x @ t[f"{name}.weight"] + t[f"{name}.bias"]
    rms = lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w
    T, causal = len(ids), torch.full((len(ids), len(ids)), -math.inf, dtype=torch.float64).triu(1)
    attend = lambda q, k, v: ((q @ k.T / math.sqrt(q.shape[1]) + causal).softmax(-1)) @ v
    if c["model_type"] == "gpt2":
        layer_norm = lambda x, name: F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)
        x, d, hd = t["wte.weight"][ids] + t["wpe.weight"][:T], c["n_embd"], c["n_embd"] // c["n_head"]
        for i in range(c["n_layer"]):
            q, k, v = conv1d(layer_norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(d, 1)
            heads = [attend(*(m[:, a:a + hd] for m in (q, k, v))) for a in range(0, d, hd)]
            x = x + conv1d(torch.cat(heads, 1), f"h.{i}.attn.c_proj")
            x = x + conv1d(F.gelu(conv1d(layer_norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh"), f"h.{i}.mlp.c_proj")
        return layer_norm(x, "ln_f") @ t["wte.weight"].T
    n, kv = c["num_attention_heads"], c["num_key_value_heads"]
    hd, rope = c.get("head_dim", c["hidden_size"] // n), c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
    rates = []
    for i in range(hd // 2):
        rate = theta ** (-2 * i / hd)
        if rope:
            turns = 24 * rate / (2 * math.pi)
            share = min(1.0, max(0.0, (turns - 1.0) / (4.0 - 1.0)))
            rate = share * rate + (1 - share) * rate / 8.0
        rates.append(rate)
    angle = torch.arange(T)[:, None].double() * torch.tensor(rates, dtype=torch.float64)

    def turn(x):
        a, b = x[:, :hd // 2], x[:, hd // 2:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), 1)

    x = t["embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        p, out = f"layers.{i}.", []
        h = rms(x, t[f"{p}input_layernorm.weight"])
        q, k, v = (linear(h, f"{p}self_attn.{m}_proj") for m in "qkv")
        for j in range(n):
            g = j // (n // kv)
            qj, kj = q[:, j * hd:(j + 1) * hd], k[:, g * hd:(g + 1) * hd]
            if c["model_type"] == "qwen3":
                qj, kj = rms(qj, t[f"{p}self_attn.q_norm.weight"]), rms(kj, t[f"{p}self_attn.k_norm.weight"])
            out.append(attend(turn(qj), turn(kj), v[:, g * hd:(g + 1) * hd]))
        x = x + linear(torch.cat(out, 1), f"{p}self_attn.o_proj")
        h = rms(x, t[f"{p}post_attention_layernorm.weight"])
        x = x + linear(F.silu(linear(h, f"{p}mlp.gate_proj")) * linear(h, f"{p}mlp.up_proj"), f"{p}mlp.down_proj")
    return rms(x, t["norm.weight"]) @ (t["embed_tokens.weight"] if c.get("tie_word_embeddings") else t["lm_head.weight"]).T


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_family_computes_what_its_reference_does(tmp_path, case, shards):
    """GPT-2's transposed maps, Llama 3.1's stretched positions, Qwen's biases and norms of queries, tied heads, shards:
    one of them read wrongly gives fluent nonsense."""
    c, generator = CASES[case], torch.Generator().manual_seed(3)
    tensors = tensors_of(c, generator)
    write(str(tmp_path), c, tensors, shards)
    model, ids = load_hf(str(tmp_path)), torch.randint(0, 23, (40,), generator=generator)
    with torch.no_grad():
        found = model.logits(model(ids[None]))[0].double()
    wanted = reference(c, tensors, ids)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-5
    prompt, said = ids[:5].tolist(), []
    for _ in range(12):
        said.append(int(reference(c, tensors, torch.tensor(prompt + said))[-1].argmax()))
    assert generate(model, [prompt], max_new_tokens=12, temperature=0)[0] == said


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, case):
    """An export that loses a bias, a norm or a field of config.json; a head that stays tied to the embedding elsewhere."""
    c, tensors = CASES[case], tensors_of(CASES[case], torch.Generator().manual_seed(3))
    write(str(tmp_path / "in"), c, tensors)
    model = load_hf(str(tmp_path / "in"))
    save_hf(model, str(tmp_path / "out"), weights=0)
    out = load_safetensors(str(tmp_path / "out" / "model.safetensors"))
    embedding = "transformer.wte.weight" if case == "gpt2" else "model.embed_tokens.weight"
    head = tensors.get("lm_head.weight", tensors[embedding])
    assert out.keys() == tensors.keys() | {"lm_head.weight"} and torch.equal(out["lm_head.weight"], head)
    assert all(torch.equal(out[k], v) for k, v in tensors.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and all(config[k] == v for k, v in c.items() if k != "tie_word_embeddings")
    two = model.with_heads(("honesty", "helpfulness"), 0.1, torch.Generator().manual_seed(0))
    save_hf(two, str(tmp_path / "two"))
    again = load_hf(str(tmp_path / "two"))
    assert again.config.objectives == ("honesty", "helpfulness") and again.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), two.state_dict().values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, dtype):
    """bf16 read as fp16, or a checkpoint loaded in another precision than asked for."""
    tensors = tensors_of(CASES["qwen3"], torch.Generator().manual_seed(3))
    write(str(tmp_path), CASES["qwen3"], tensors, dtype=dtype)
    model, half = load_hf(str(tmp_path)), load_hf(str(tmp_path), dtype=torch.bfloat16)
    assert torch.equal(model.embed.weight, tensors["model.embed_tokens.weight"].to(dtype).float())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.cos.dtype == torch.bfloat16
    assert half(torch.tensor([[1, 2]])).dtype == torch.bfloat16


def test_what_other_programs_leave_behind(tmp_path):
    """Buffers, a repeated head, a missing prefix: harmless, and refusing them would refuse most of the old files."""
    c, tensors = CASES["gpt2"], tensors_of(CASES["gpt2"], torch.Generator().manual_seed(3))
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    more = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4),
            "lm_head.weight": torch.zeros(23, 24)}
    write(str(tmp_path / "a"), c, tensors)
    write(str(tmp_path / "b"), c, bare | more)
    a, b = load_hf(str(tmp_path / "a")), load_hf(str(tmp_path / "b"))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert torch.equal(b.heads[0].weight, b.embed.weight)                  # tied: the file's own head does not count
    write(str(tmp_path / "c"), c, tensors | {"wte.weight": tensors["transformer.wte.weight"]})
    with pytest.raises(InputError, match="stands twice"):
        load_hf(str(tmp_path / "c"))


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "mistral", "sliding_window": 16}, "sliding_window = 16"),
    ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True}, "sliding_window = 16"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
    ({"num_local_experts": 8}, "num_local_experts = 8"), ({"logit_scale": 0.5}, "logit_scale = 0.5"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"), ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"), ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "yarn"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"), ({"hidden_act": "gelu"}, "gelu"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"alibi": True}, "alibi"),
    ({"max_position_embeddings": 10**12}, "max_position|unusable"), ({"num_hidden_layers": 10**6}, "too few"),
    ({"rope_theta": -1.0}, "unusable"), ({"head_dim": 5}, "unusable"), ({"intermediate_size": None}, "intermediate_size")])
def test_other_arithmetic_is_refused_by_name(tmp_path, changes, words):
    """A window, experts, other positions or a scale that is silently ignored: answers that are nearly right."""
    write(str(tmp_path), CASES["llama2"] | changes, tensors_of(CASES["llama2"], torch.Generator().manual_seed(3)))
    with pytest.raises(InputError, match=words) as e:
        load_hf(str(tmp_path))
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("changes, words", [
    ({"activation_function": "relu"}, "relu"), ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
    ({"scale_attn_weights": False}, "scale_attn_weights"), ({"add_cross_attention": True}, "add_cross_attention"),
    ({"n_embd": None}, "n_embd")])
def test_other_arithmetic_of_gpt2_is_refused_by_name(tmp_path, changes, words):
    """GPT-2's variants share its name and its tensors' names."""
    write(str(tmp_path), CASES["gpt2"] | changes, tensors_of(CASES["gpt2"], torch.Generator().manual_seed(3)))
    with pytest.raises(InputError, match=words):
        load_hf(str(tmp_path))


@pytest.mark.parametrize("where, words", [
    ("/etc/passwd", "shards are files of this directory"), ("../model.safetensors", "shards are files of this directory"),
    ("a/../x.safetensors", "shards are files of this directory"), (3, "shards are files of this directory"),
    ("model-00009-of-00003.safetensors", "no such file")])
def test_a_lying_index(tmp_path, where, words):
    """An index that leads out of the directory reads files that are nobody's business; a missing shard must be named."""
    write(str(tmp_path), CASES["llama2"], tensors_of(CASES["llama2"], torch.Generator().manual_seed(3)), shards=3)
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
    tensors = tensors_of(CASES["llama2"] | {"num_key_value_heads": 2}, torch.Generator().manual_seed(3))
    q, k = (f"model.layers.0.self_attn.{m}_proj.weight" for m in "qk")
    tensors[q], tensors[k] = tensors[q][:12], torch.cat((tensors[k], tensors[q][12:]))
    write(str(tmp_path), CASES["llama2"] | {"num_key_value_heads": 2}, tensors)
    with pytest.raises(InputError, match=r"q_proj.*\(12, 24\).*wants \(24, 24\)"):
        load_hf(str(tmp_path))


def test_random_damage_to_config_and_index(tmp_path):
    """A damaged config.json or index must be refused or read; it must never crash, hang, or take the machine's memory."""
    write(str(tmp_path), CASES["llama3.1"], tensors_of(CASES["llama3.1"], torch.Generator().manual_seed(3)), shards=2)
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    values = [0, -1, 1, 2, 10**9, 10**30, 1e300, 0.5, None, True, "x", "", [], [1], {}, {"a": 1}, "float32"]
    for name in ("config.json", "model.safetensors.index.json"):
        good = (tmp_path / name).read_text()
        for _ in range(300):
            content = json.loads(good)
            part = rng.choice([content, *(v for v in content.values() if isinstance(v, dict) and v)])
            part[rng.choice(list(part))] = rng.choice(values)
            (tmp_path / name).write_text(json.dumps(content))
            try:
                load_hf(str(tmp_path))
                outcomes["read"] += 1
            except InputError:
                outcomes["refused"] += 1
        (tmp_path / name).write_text(good)
    assert min(outcomes.values()) > 50, outcomes


def test_pages_are_let_go(tmp_path):
    """Every tensor is mapped apart and freed when it is copied: a big checkpoint must not stand in memory twice."""
    write(str(tmp_path), CASES["llama2"], tensors_of(CASES["llama2"], torch.Generator().manual_seed(3)))
    files = Checkpoint(str(tmp_path))
    taken = files.take("model.norm.weight", (24,), torch.float32)
    assert taken.untyped_storage().nbytes() == 24 * 4                      # its own memory, not a view of the whole file
