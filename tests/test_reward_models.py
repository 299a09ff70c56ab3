"""interop/reward_models.py: released reward heads, read by prm.load_prm and guiding decode.py."""
import os

import pytest
import torch
import torch.nn.functional as F

from data import InputError, Tokenizer, read_json, write_json
from decode import guided_decode
from model import GPT, GPTConfig, load_safetensors, save_hf, save_safetensors
from prm import load_prm

V, D = 23, 24
END, MARKER = V - 2, V - 1


def tiny(d_model=D, seed=0, **more):
    """A random model; as a policy it has one head."""
    config = dict(vocab_size=V, n_layer=1, n_head=2, n_kv_head=1, d_ff=16, max_len=64)
    config = GPTConfig(d_model=d_model, **(config | more))
    return GPT(config, torch.Generator().manual_seed(seed))


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def mlp(n, prefix):
    """The tensors of an MLP with n outputs, under names that begin with `prefix`."""
    tensors = {"0.weight": random(D, D), "0.bias": random(D),
               "2.weight": random(n, D), "2.bias": random(n)}
    return {prefix + name: tensor for name, tensor in tensors.items()}


def layer(n, name, bias=True):
    """The tensors of one linear map with n outputs."""
    weight = {f"{name}weight": random(n, D)}
    return weight | {f"{name}bias": random(n)} if bias else weight


def reward_model(directory, architecture, head, beside=None):
    """A reward model's directory: a backbone under its published names, and a head in the same
    file, in one `beside`, or, with "shards", in the second of two."""
    save_hf(tiny(seed=3, init_std=0.3), directory)
    path = os.path.join(directory, "model.safetensors")
    tensors = {k: t.clone() for k, t in load_safetensors(path).items() if k.startswith("model.")}
    save_safetensors(tensors if beside else tensors | head, path)
    if beside == "shards":
        beside = "2.safetensors"
        os.rename(path, os.path.join(directory, "1.safetensors"))
        where = dict.fromkeys(tensors, "1.safetensors") | dict.fromkeys(head, beside)
        write_json(f"{path}.index.json", {"weight_map": where})
    if beside:
        save_safetensors(head, os.path.join(directory, beside))
    config = read_json(os.path.join(directory, "config.json"))
    del config["objectives"]
    config["architectures"] = [architecture]
    write_json(os.path.join(directory, "config.json"), config)


@torch.no_grad()
def plain_score(prm, head, ids):
    """The score at the last of the ids, from the head's published tensors: of two labels the
    log-odds of the second."""
    labels = prm.backbone(torch.tensor([ids]))[0, -1]
    for name, weight in head.items():
        if name.endswith("weight"):
            first = "0." in name
            labels = weight @ labels + head.get(name.replace("weight", "bias"), 0)
            labels = F.relu(labels) if first else labels
    return float(labels[1] - labels[0] if len(labels) == 2 else labels)


CLASSIFIER, PROCESS = "Qwen2ForSequenceClassification", "Qwen2ForProcessRewardModel"
NARROW = {"v_head.summary.0.weight": random(5, D), "v_head.summary.2.weight": random(1, 5)}


@pytest.mark.parametrize("architecture, head, beside", [
    (CLASSIFIER, layer(1, "score.", False), None),
    (CLASSIFIER, layer(2, "score.", False), None),
    (CLASSIFIER, layer(1, "score.", False), "shards"),
    ("GPT2ForTokenClassification", layer(2, "classifier."), None),
    ("Qwen2ForRewardModel", mlp(1, "score."), None),
    ("Qwen2ForRewardModel", mlp(2, "score."), "shards"),
    ("RewardModel", layer(1, "value_head.", False), None),
    ("LlamaRewardModel", layer(1, "regression_head.", False), None),
    ("LlamaForCausalLM", layer(1, "v_head.summary."), None),
    ("LlamaForCausalLM", NARROW, None),
    (None, layer(1, "reward_head."), None),
    ("LlamaForCausalLM", layer(1, "v_head.summary."), "value_head.safetensors"),
    ("LlamaForCausalLM", layer(2, ""), "v_head.safetensors"),
    ("Qwen2ForCausalLM", mlp(1, "value_head."), "value_head.safetensors"),
    ("Qwen2ForCausalLM", mlp(1, ""), "value_head.safetensors")])
def test_released_reward_models(tmp_path, architecture, head, beside):
    """Prevents: a head that is not found under the name that its program gives it; guidance
    towards the worst step, by the probability of `bad` or by a label's raw logit: one label is a
    value, of two the log-odds of the second count."""
    reward_model(str(tmp_path), architecture, head, beside)
    prm, prompt = load_prm(str(tmp_path)), [1, 2, 3]
    assert prm.names == ["reward"] and prm.marker is None
    assert prm(torch.tensor([prompt])).shape == (1, 3, 1)
    for guide in ("reward", "unified"):
        result, = guided_decode(tiny(16), prm, [prompt], boundary="turn", K=3, guide=guide,
                                max_new_tokens=4, generator=torch.Generator().manual_seed(0))
        step, = result.steps
        alone = [plain_score(prm, head, prompt + ids) for ids in step.candidates]
        assert step.scores == pytest.approx(alone, abs=1e-4)
        assert alone[step.winner] == max(alone)


@pytest.mark.parametrize("head", [mlp(1, "value_head."), layer(1, "score.")])
def test_a_value_head_counts_more_than_a_classifier(tmp_path, head):
    """Prevents: a leftover classifier in the backbone's file that is read instead, or refused."""
    reward_model(str(tmp_path), CLASSIFIER, {"score.weight": torch.ones(2, D)})
    save_safetensors(head, str(tmp_path / "value_head.safetensors"))
    prm = load_prm(str(tmp_path))
    found = prm(torch.tensor([[1, 2, 3]]))[0, -1, 0].item()
    assert found == pytest.approx(plain_score(prm, head, [1, 2, 3]), abs=1e-4)


def marked_tokenizer():
    """A tokenizer of V ids with a newline, an end and Qwen's marker."""
    pieces = [bytes([97 + i]) for i in range(V - 3)] + [b"\n", b"", b""]
    ranks = {bytes([b]): b for b in range(256)}
    return Tokenizer(pieces, ranks, {"<|end|>": END, "<extra_0>": MARKER}, r"[\s\S]", END, END)


def with_marker(ids):
    """A step as the PRM reads it: the marker stands behind it, and before the end."""
    if ids[-1] == END:
        return [*ids[:-1], MARKER, END]
    return [*ids, MARKER]


def test_a_marker_stands_behind_every_step_and_is_read(tmp_path, monkeypatch):
    """Prevents: scores that mean nothing. Qwen's PRM has learnt to be read at <extra_0>, behind
    the step and before the end of the turn; not elsewhere, not without the markers of earlier
    steps, not beyond the end of its context."""
    head, tokenizer = mlp(2, "score."), marked_tokenizer()
    reward_model(str(tmp_path), PROCESS, head)
    with pytest.raises(InputError, match="<extra_0>"):
        load_prm(str(tmp_path))
    monkeypatch.setattr("prm.load_tokenizer", lambda *args: tokenizer)
    prm, policy = load_prm(str(tmp_path)), tiny(16, init_std=0.02)
    policy.tokenizer = tokenizer
    ended, steps, held = 0, 0, []
    for seed in range(8):
        text = [1, 2, 3] * 12
        result, = guided_decode(policy, prm, [text], boundary="newline", K=3, guide="reward",
                                max_new_tokens=60, generator=torch.Generator().manual_seed(seed))
        for step in result.steps:
            for ids, score in zip(step.candidates, step.scores):
                read = text + with_marker(ids)
                upto = len(read) - read[::-1].index(MARKER)
                assert score == pytest.approx(plain_score(prm, head, read[:upto]), abs=1e-3)
                ended += ids[-1] == END
            text = text + with_marker(step.candidates[step.winner])
        assert int(result.state.prm.held) == len(text)
        held.append(len(text))
        steps = max(steps, len(result.steps))
    assert ended and steps > 2 and 63 <= max(held) <= 64        # the cases that are hard


@pytest.mark.parametrize("head, words", [
    (layer(3, "score."), "score.weight.*shape"),
    ({"score.weight": torch.zeros(1, D - 1)}, "score.weight.*shape"),
    ({"score.weight": torch.zeros(0, 3)}, "score.weight.*shape"),
    ({"score.weight": torch.tensor(1.0)}, "score.weight.*shape"),
    ({"score.bias": torch.zeros(1)}, "score.weight.*missing"),
    (layer(1, "score.") | {"extra": torch.zeros(1)}, "'extra' is unknown"),
    ({}, "no reward model"),
    (layer(1, "gating."), "no reward model .* gating.bias, gating.weight"),
    (layer(1, "score.") | layer(1, "v_head."), "no reward model .* v_head.weight"),
    (layer(D, "score.0.") | layer(1, "score.3."), "no reward model .* score.3.weight"),
    (layer(1, "classifier.dense."), "no reward model .* classifier.dense.weight")])
def test_a_reward_model_that_is_none(tmp_path, head, words):
    """Prevents: three labels, or a head of another width, silently cut to what fits; one of two
    heads taken by chance; a head of another make computed as if it were linear; names kept to
    oneself."""
    reward_model(str(tmp_path), "LlamaForSequenceClassification", head)
    (tmp_path / "value_head.bin").write_bytes(b"")
    with pytest.raises(InputError, match=words) as e:
        load_prm(str(tmp_path))
    assert "no reward model" not in words or "value_head.bin" in str(e.value)
