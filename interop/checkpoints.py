"""Hugging Face directories as data: which models are computed here, what their tensors are called,
which shard holds which.

A directory holds config.json and model.safetensors, or shards with an index. config.json names a
family (model_type) and its sizes; many families differ from Llama in one or two fields, and some in
arithmetic that this project does not follow: such a configuration is refused, and the field named.

    read_fields, config_json      config.json -> fields of model.GPTConfig, and back
    parts_of, is_transposed       one of our parameters -> the tensors that hold it
    read_index                    model.safetensors.index.json -> the shards

Read read_fields first, then FAMILIES and refuse: what is computed, and what is not. model.py builds
models of what is found here; nothing in this file holds a tensor.
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

# Sizes have one name in Llama and its relatives, another in GPT-2.
GPT2_FIELDS = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}
NEEDED = ["vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size",
          "intermediate_size", "max_position_embeddings", "rms_norm_eps"]

# The numbers of Llama 3's stretched rotary positions, see model.rope_frequencies.
LLAMA3_ROPE = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]

# Names by which one knows that a field changes the arithmetic: refused unless it is off ...
CHANGES = re.compile(r"scal|softcap|multiplier|expert|moe|partial|clip|quantiz|window|layer_types"
                     r"|alibi|residual|cross")
# ... but for these, which are looked at one by one.
HANDLED = {"rope_scaling", "sliding_window", "use_sliding_window", "max_window_layers",
           "layer_types", "scale_attn_weights"}


def read_fields(directory):
    """config.json -> fields of model.GPTConfig; `hf` is the JSON object itself. InputError names a
    field that is missing, unusable, or changes the arithmetic in a way not computed here."""
    path = os.path.join(directory, "config.json")
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: {type(found).__name__}, not an object")
    family = found.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"{path}: architecture {found.get('architectures')} (model_type "
                         f"{family!r}) is not computed here, only {', '.join(FAMILIES)}")
    # Whatever else can be wrong with a value of the wrong type is one kind of mistake.
    try:
        fields = translate(path, found, family)
    except InputError:
        raise
    except (AttributeError, TypeError, ValueError, OverflowError) as e:
        raise InputError(f"{path}: unusable configuration: {e}") from None
    return fields | FAMILIES[family] | {"hf": found}


def translate(path, found, family):
    """The object of config.json -> GPTConfig's fields, but for those that the family decides."""
    # GPT-2 has other names for the same sizes.
    spelling = GPT2_FIELDS if family == "gpt2" else {}
    c = dict(found)
    for ours, theirs in spelling.items():
        c[ours] = found.get(theirs)
    if family == "gpt2" and c["intermediate_size"] is None and c["hidden_size"] is not None:
        c["intermediate_size"] = 4 * c["hidden_size"]
    # Without its sizes there is no model.
    for name in NEEDED:
        if c.get(name) is None:
            raise InputError(f"{path}: field {spelling.get(name, name)!r} is missing")
    refuse(path, c, family)
    # Newer files put all about rotary positions into one object, older ones only their scaling.
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    bias = bool(c.get("attention_bias"))
    return {
        "vocab_size": c["vocab_size"],
        "n_layer": c["num_hidden_layers"],
        "n_head": c["num_attention_heads"],
        "n_kv_head": c.get("num_key_value_heads") or c["num_attention_heads"],
        "d_model": c["hidden_size"],
        "d_ff": c["intermediate_size"],
        "max_len": c["max_position_embeddings"],
        "head_dim": c.get("head_dim") or 0,
        "attn_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(c.get("mlp_bias")),
        "rope_theta": float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0),
        "rope_scaling": rope_scaling(path, rope),
        "norm_eps": float(c["rms_norm_eps"]),
        "objectives": tuple(c.get("objectives") or ("policy",)),
    }


def rope_scaling(path, rope):
    """Llama 3's stretching of rotary positions as four numbers, None where there is none."""
    # Some models turn the queries of some layers otherwise than those of the others.
    for name, value in rope.items():
        if isinstance(value, dict):
            raise InputError(f"{path}: rope_parameters of {name!r} are not computed here, only one "
                             "kind for all layers")
    # A factor without a kind is of some kind that is not known here.
    unnamed = None if "factor" in rope else "default"
    kind = rope.get("rope_type", rope.get("type", unnamed))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"{path}: rope_scaling {kind!r} is not computed here, only default and "
                         "llama3")
    for name in LLAMA3_ROPE:
        if name not in rope:
            raise InputError(f"{path}: field {name!r} is missing")
    return {name: float(rope[name]) for name in LLAMA3_ROPE}


def is_off(value):
    """Does a field with this value change nothing? A factor of 1 does not."""
    number = type(value) in (int, float)
    return value in (None, False, [], {}, "") or number and value == 1


def refuse(path, c, family):
    """InputError for fields that change the arithmetic in a way that is not followed here."""
    # Names that tell, whatever the family.
    odd = {}
    for name, value in c.items():
        if CHANGES.search(name) and name not in HANDLED and not is_off(value):
            odd[name] = value
    # Qwen's files give a window and say that it is not used; Mistral's have no such switch.
    window = c.get("sliding_window")
    used = c.get("use_sliding_window", not family.startswith("qwen"))
    # A window as long as the context hides nothing.
    if window is not None and used and window < c["max_position_embeddings"]:
        odd["sliding_window"] = window
    # Layers that are all alike may be listed one by one.
    layers = set(c.get("layer_types") or ())
    if layers - {"full_attention"}:
        odd["layer_types"] = sorted(layers)
    # GPT-2 may leave out the square root of the width, or take another activation.
    if c.get("scale_attn_weights", True) is not True:
        odd["scale_attn_weights"] = c["scale_attn_weights"]
    known = ("gelu_new", "gelu_pytorch_tanh") if family == "gpt2" else ("silu", "swish")
    if c.get("hidden_act") not in (None, *known):
        odd["hidden_act"] = c["hidden_act"]
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
    if not kept and (not plain or c.attn_bias != c.out_bias):
        raise InputError("a model of one's own is saved as a Llama checkpoint: RoPE, RMSNorm, "
                         "SwiGLU, no norm of queries")
    # What another program needs to compute the same.
    own = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_len,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
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
PREFIX = re.compile(r"^(model|transformer)\.")
# What other programs leave behind in a file: buffers, and a head beside one that is tied.
LEFT_BEHIND = re.compile(r".*rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight")


def is_gpt2(config):
    """GPT-2 files have names of their own and linear maps stored (in, out)."""
    return config.position == "learned"


def their_names(config, name):
    """A backbone parameter of ours -> the names of the tensors that stand in it, in order."""
    # layers.3.attn.qkv.weight is the layer's number, the map and which part of it.
    layer, stem, kind = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    prefix, layers, table = "model.", "layers", LLAMA
    if is_gpt2(config):
        prefix, layers, table = "transformer.", "h", GPT2
    if layer is not None:
        prefix += f"{layers}.{layer}."
    return [f"{prefix}{theirs}.{kind}" for theirs in table[stem]]


def is_transposed(config, name):
    """Is this parameter of ours stored the other way round, as GPT-2's linear maps are?"""
    matrix = name.startswith("layers.") and name.endswith(".weight") and ".norm" not in name
    return is_gpt2(config) and matrix


def parts_of(config, name, shape):
    """A parameter of ours -> [(name, shape)] of the tensors that it consists of, one behind another
    by their rows."""
    # How our rows are shared out: equally, or by the numbers of heads.
    names, n = their_names(config, name), shape[0]
    rows = [n // len(names)] * len(names)
    if len(names) == 3:             # queries, keys and values
        heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        rows = [k * config.head_dim for k in heads]
    shapes = [(k, *shape[1:]) for k in rows]
    # As they stand in the file.
    if is_transposed(config, name):
        shapes = [s[::-1] for s in shapes]
    return list(zip(names, shapes))


def without_prefix(name):
    """Some programs leave "model." or "transformer." off: tensors are found with or without."""
    return PREFIX.sub("", name)


def read_index(directory, index):
    """model.safetensors.index.json -> paths of the shards. InputError for one that lies outside of
    the directory."""
    found = read_json(index)
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index}: no weight_map; it must map every tensor to its file")
    # The index is untrusted: names of files, never paths.
    shards = []
    for tensor, name in names.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise InputError(f"{index}: tensor {tensor!r} lies in {name!r}; shards are files of "
                             "this directory, NAME.safetensors")
        path = os.path.join(directory, name)
        if path not in shards:
            shards.append(path)
    return shards
