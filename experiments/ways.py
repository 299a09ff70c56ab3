"""experiments/ways.py: three ways to take S steps of N tokens behind a prompt, each the best of K
candidates. timing.py times them. Models have no tokenizer here, so no answer ends by itself."""
import copy

import torch

from decode import State, draw, generate, guided_decode, prefill, stop_masks

S, N = 2, 16                # steps, and tokens of one


def last_scores(prm, texts):
    """The PRM's score at the end of texts of one length, read from the beginning -> a list."""
    ids = torch.tensor(texts, device=prm.scale.device)                        # (n, T)
    return prm(ids)[:, -1, 0].tolist()


def carried(model, prm, prompt, K):
    """This project's way: candidates in one batch, both caches carried on. -> bytes of caches"""
    room = len(prompt) + S * (N + 1)
    state = State(model.new_cache(1, room), prm.backbone.new_cache(1, room))
    new = prompt
    for _ in range(S):
        guided_decode(model, prm, [new], boundary="turn", K=K, guide=prm.names[0],
                      max_new_tokens=N, state=state)
        # A step is a turn here: before the next one the user says a word, which is one token.
        new = prompt[:1]
    return state.policy.nbytes() + state.prm.nbytes()


def one_by_one(model, prm, prompt, K):
    """As published: a cache is carried, but candidates are drawn one after another from copies of
    it, and the PRM reads prompt and steps again for every candidate."""
    text = unread = prompt
    running = model.new_cache(1, len(prompt) + S * N)
    head, masks = model.fold(0), stop_masks(model, "turn")
    limits = running.held.new_tensor([N])
    for _ in range(S):
        h = prefill(model, running, [unread])
        scores, tried = [], []
        for _ in range(K):
            # Every candidate begins from a copy of the whole cache.
            cache = copy.deepcopy(running)
            ids, = draw(model, head, cache, h, masks, limits)
            scores += last_scores(prm, [text + ids])
            tried.append((ids, cache))
        # The best one's copy becomes the cache that goes on. It has yet to read the last token.
        ids, running = tried[scores.index(max(scores))]
        running.keep(0)
        text, unread = text + ids, ids[-1:]
    return K * running.nbytes()


def encoded_again(model, prm, prompt, K):
    """The plain way: policy and PRM read prompt and text anew in every step, K rows at once."""
    for _ in range(S):
        drawn = generate(model, [prompt] * K, max_new_tokens=N)
        texts = [prompt + ids for ids in drawn]
        scores = last_scores(prm, texts)
        prompt = texts[scores.index(max(scores))]
    return model.new_cache(K, len(prompt)).nbytes()


# As the table calls them; the last is what the others are compared with.
METHODS = {"re-encoding": encoded_again,
           "cached, one by one": one_by_one,
           "carried (here)": carried}
