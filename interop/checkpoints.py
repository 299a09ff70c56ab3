"""Hugging Face directories as data: which models are computed here, what their tensors are called,
which shard holds which.

A directory holds config.json and model.safetensors, or shards with an index. config.json names a
family (model_type) and its sizes; many families differ from Llama in one or two fields, and some in
arithmetic that this project does not follow: such a configuration is refused, and the field named.

    read_fields, config_json      config.json -> fields of model.GPTConfig, and back
    parts_of                      one of our parameters -> the tensors that files hold for it
    find_shards                   model.safetensors, or the files that its index lists

Read read_fields first, then FAMILIES and refuse: what is computed, and what is not. model.py builds
models of what is found here; nothing in this file reads a tensor.
"""
import os
import re

from data import InputError, read_json

# What a family computes beside plain Llama, as fields of model.GPTConfig.
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attn_bias": True},
    "qwen3": {"qk_norm": True},
    "gpt2": {
        "position": "learned", "norm": "layer", "mlp": "gelu",
        "attn_bias": True, "out_bias": True, "mlp_bias": True,
    },
}

# Fields of model.GPTConfig: their names in Llama and its relatives, and in GPT-2.
NAMES = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "n_layer": ("num_hidden_layers", "n_layer"),
    "n_head": ("num_attention_heads", "n_head"),
    "d_model": ("hidden_size", "n_embd"),
    "d_ff": ("intermediate_size", "n_inner"),
    "max_len": ("max_position_embeddings", "n_positions"),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon"),
}

# Llama 3's stretched rotary positions, see model.rope_frequencies: three numbers, and how long the
# context was before.
LLAMA3_ROPE = ["factor", "low_freq_factor", "high_freq_factor"]
UNSTRETCHED = "original_max_position_embeddings"

# Names by which one knows that a field changes the arithmetic: refused unless it is off ...
CHANGES = re.compile(r"scal|softcap|multiplier|expert|moe|partial|clip|quantiz|window|layer_types"
                     r"|alibi|residual|cross|rope|rotary")
# ... but for these, which are looked at one by one,
HANDLED = ["rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "use_sliding_window",
           "max_window_layers", "layer_types", "scale_attn_weights"]
# and these, which may have no other values: GPT-2 could leave out the square root of the width.
ALLOWED = {
    "scale_attn_weights": [True],
    "hidden_act": [None, "silu", "swish"],
    "activation_function": [None, "gelu_new", "gelu_pytorch_tanh"],
}


def read_fields(path):
    """config.json -> fields of model.GPTConfig; `hf` is the JSON object itself. InputError names a
    field that is missing, or changes the arithmetic in a way that is not computed here; another
    error is raised for values of the wrong type."""
    c = read_json(path)
    if not isinstance(c, dict):
        raise InputError(f"{path}: {type(c).__name__}, not an object")
    family = c.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{path}: architecture {c.get('architectures')} (model_type {family!r}) "
                         f"is not computed here, only {', '.join(FAMILIES)}")
    # Without its sizes there is no model.
    fields = {}
    for ours, names in NAMES.items():
        name = names[family == "gpt2"]
        fields[ours] = c.get(name)
        # GPT-2 need not say that its feed-forward layers are four times as wide.
        if name == "n_inner" and fields[ours] is None:
            fields[ours] = 4 * fields["d_model"]
        if fields[ours] is None:
            raise InputError(f"{path}: field {name!r} is missing")
    refuse(path, c, family, fields["max_len"])
    # The rest has a default; FAMILIES decides where the files of a family do not say.
    bias = bool(c.get("attention_bias"))
    more = {
        "n_kv_head": c.get("num_key_value_heads") or fields["n_head"],
        "head_dim": c.get("head_dim") or 0,
        "attn_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(c.get("mlp_bias")),
        "norm_eps": float(fields["norm_eps"]),
        "objectives": tuple(c.get("objectives") or ("policy",)),
        "hf": c,
    }
    return fields | more | read_rope(path, c, fields["max_len"]) | FAMILIES[family]


def read_rope(path, c, max_len):
    """Rotary positions as fields of model.GPTConfig, from the object of config.json."""
    # Newer files have all about them in rope_parameters, older ones their scaling in rope_scaling.
    # Of a file with both, say an edited one, other programs take the latter.
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    # A factor without a kind is of some kind that is not known here.
    unnamed = None if "factor" in rope else "default"
    kind = rope.get("rope_type", rope.get("type", unnamed))
    if kind not in ("default", "llama3"):
        raise InputError(f"{path}: rope_scaling {kind!r} is not computed here, only default and "
                         "llama3")
    # Whatever else there is, such as the share of a head that turns, or an object for each kind of
    # layer, is not followed.
    known = ["rope_theta", "rope_type", "type", *LLAMA3_ROPE, UNSTRETCHED]
    for name, value in rope.items():
        if name not in known and not is_off(value):
            raise InputError(f"{path}: rotary positions with {name} = {value!r} are not computed "
                             "here")
    # Newer files have theta there too.
    numbers = {"rope_theta": rope.get("rope_theta", c.get("rope_theta", 10000.0))}
    # The context before it was stretched may stand outside, which counts more, or nowhere.
    if kind == "llama3":
        numbers[UNSTRETCHED] = c.get(UNSTRETCHED) or rope.get(UNSTRETCHED) or max_len
        for name in LLAMA3_ROPE:
            numbers[name] = rope.get(name)
    for name, value in numbers.items():
        if type(value) not in (int, float) or not value > 0:
            raise InputError(f"{path}: unusable {name} = {value!r}; it must be a positive number")
        numbers[name] = float(value)
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise InputError(f"{path}: low_freq_factor is not below high_freq_factor")
    return {"rope_theta": numbers.pop("rope_theta"), "rope_scaling": numbers or None}


def is_off(value):
    """Does a field with this value change nothing? A factor of 1 does not."""
    number = type(value) in (int, float)
    return value in (None, False, [], {}, "") or number and value == 1


def refuse(path, c, family, max_len):
    """InputError for fields that change the arithmetic in a way that is not followed here."""
    # Names that tell, whatever the family.
    odd = {}
    for name, value in c.items():
        changes = CHANGES.search(name) and name not in HANDLED and not is_off(value)
        if changes or value not in ALLOWED.get(name, [value]):
            odd[name] = value
    # Qwen's files give a window and say that it is not used; Mistral's have no such switch.
    window = c.get("sliding_window")
    used = c.get("use_sliding_window", not family.startswith("qwen"))
    # A window as long as the context hides nothing.
    if window is not None and used and window < max_len:
        odd["sliding_window"] = window
    # Layers that are all alike may be listed one by one.
    layers = set(c.get("layer_types") or ())
    if layers - {"full_attention"}:
        odd["layer_types"] = sorted(layers)
    if odd:
        listed = ", ".join(f"{name} = {value!r}" for name, value in odd.items())
        raise InputError(f"{path}: {listed}: not computed here")


def config_json(c, dtype, extra):
    """GPTConfig -> the object of config.json: what the checkpoint came with, or a Llama's.

    The head is written untied, whatever it was. InputError for a model that came from nowhere and
    is no Llama: no other program would compute it."""
    # What this project itself had added is written anew, in `extra`.
    kept = {k: v for k, v in (c.hf or {}).items() if k not in ("objectives", "prm_outputs")}
    plain = (c.position, c.norm, c.mlp) == ("rope", "rms", "swiglu") and not c.qk_norm
    if not kept and (not plain or c.rope_scaling or c.attn_bias != c.out_bias):
        raise InputError("a model of one's own is saved as a Llama checkpoint: plain RoPE, "
                         "RMSNorm, SwiGLU, no norm of queries")
    # What another program needs to compute the same, under Llama's names.
    own = {names[0]: getattr(c, ours) for ours, names in NAMES.items()}
    own |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rope_theta": c.rope_theta,
        "attention_bias": c.attn_bias,
        "mlp_bias": c.mlp_bias,
    }
    spelling = "dtype" if "dtype" in kept else "torch_dtype"
    return (kept or own) | {"tie_word_embeddings": False, spelling: dtype} | extra


# -- names of tensors

# Our name -> theirs, within a layer or outside; several are one behind another (fused products).
LLAMA = {
    "embed": ["embed_tokens"],
    "norm": ["norm"],
    "norm1": ["input_layernorm"],
    "norm2": ["post_attention_layernorm"],
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.out": ["self_attn.o_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "mlp.up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}
GPT2 = {
    "embed": ["wte"],
    "positions": ["wpe"],
    "norm": ["ln_f"],
    "norm1": ["ln_1"],
    "norm2": ["ln_2"],
    "attn.qkv": ["attn.c_attn"],
    "attn.out": ["attn.c_proj"],
    "mlp.up": ["mlp.c_fc"],
    "mlp.down": ["mlp.c_proj"],
}
# What programs put before the names, or leave off: names are compared without.
PREFIX = re.compile(r"^(pretrained_model\.|backbone_model\.)?(model\.|transformer\.)?")
# What other programs leave behind in a file: buffers, and a head beside one that is tied.
LEFT_BEHIND = re.compile(r".*rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight")


def is_gpt2(config):
    """GPT-2 files have names of their own and linear maps stored (in, out)."""
    return config.position == "learned"


def is_transposed(config, name):
    """Is this parameter of ours stored the other way round, as GPT-2's linear maps are?"""
    matrix = name.startswith("layers.") and name.endswith(".weight") and ".norm" not in name
    return is_gpt2(config) and matrix


def parts_of(config, name, p):
    """A parameter of ours -> {name: tensor} as files hold it: turned round, or cut by its rows."""
    # layers.3.attn.qkv.weight is the layer's number, the map and which part of it.
    layer, stem, kind = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    prefix, layers, table = "model.", "layers", LLAMA
    if is_gpt2(config):
        prefix, layers, table = "transformer.", "h", GPT2
    if layer is not None:
        prefix += f"{layers}.{layer}."
    names = [f"{prefix}{theirs}.{kind}" for theirs in table[stem]]
    # Their parts are equal, but of queries, keys and values, whose heads differ in number.
    p = p.t() if is_transposed(config, name) else p
    rows = [len(p) // len(names)] * len(names)
    if len(names) == 3:
        heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        rows = [n * config.head_dim for n in heads]
    return dict(zip(names, p.split(rows)))


def find_shards(directory):
    """-> model.safetensors and a list of it, or its index and the paths of the shards that this
    lists. InputError for a shard that lies outside of the directory."""
    whole = os.path.join(directory, "model.safetensors")
    index = f"{whole}.index.json"
    if os.path.exists(whole) or not os.path.exists(index):
        return whole, [whole]
    found = read_json(index)
    where = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(where, dict) or not where:
        raise InputError(f"{index}: no weight_map; it must map every tensor to its file")
    # The index is untrusted. It may name files, which lie in this directory, never paths, which
    # may lead anywhere.
    for tensor, name in where.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise InputError(f"{index}: tensor {tensor!r} lies in {name!r}; shards are files of "
                             "this directory, NAME.safetensors")
    return index, [os.path.join(directory, name) for name in sorted(set(where.values()))]
