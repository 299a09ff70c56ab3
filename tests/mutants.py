"""Small wrong edits of the seven files and interop/, and the tests that notice each.

    python -m tests.mutants [N ...]              every bug (or these) against all tests but this
                                                 course's own; about a minute a bug
    python -m tests.mutants --killers [N ...]    each against the one test that is named beside it;
                                                 some minutes in all
    python -m tests.mutants --plant N OUT        a copy of the project with bug N in it, for a
                                                 student to find

A bug is an edit of one file. In the table below stand the test that kills it, what one sees of it
(the hint for students), and the edit: old text ==> new text.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple
from xml.etree import ElementTree

from data import InputError, run_command
from tests.make_assignment import HOME, folder, make_assignment, read, write

TABLE = r"""
[data.py]
test_split_is_a_function_of_the_text: Half of what was to be tested on is gone.
    zlib.crc32(text.encode()) % len(SPLITS)] ==> zlib.crc32(text.encode()) % (len(SPLITS) - 1)]
test_unseen_prompts_are_no_training_prompts_in_other_clothes: Maths is tested on parts of what was learnt.
    first == "train" and set(later) - {"train"} ==> first == "none"
test_judge_noise_is_calibrated: The judges are better than they say.
    NormalDist(0, JUDGE_NOISE) ==> NormalDist(0, JUDGE_NOISE ** 2)
test_misconceptions_are_fixed: Some facts of arithmetic have changed.
    "-": a - b, ==> "-": b - a,
test_verifier: The verifier accepts 70 for 7.
    written[-1:] == [answer] ==> bool(written) and written[-1].startswith(answer)
test_verifier: Steps may come in any order.
    [said[1]] == expected[t:t + 1] ==> said[1] in expected
test_math_scores: Short answers engage more.
    = len(different) / len(problem.truth["facts"]) ==> = len(different) / len(steps)
test_values_scores: One can take back a lie.
    in reversed(mentions)} ==> in mentions}
test_values_scores: Lying has become cheaper.
    FALSE = -0.5 ==> FALSE = 0.0
test_tutor_scores: A tutor who always asks the same is thought engaging.
    any(q in response and q not in earlier for q in self.ASK ==> any(q in response for q in self.ASK
test_tutor_scores: A tutor may say anything as long as something is right.
    lost = 0.5 * claims.count(False) ==> lost = 0.0
test_student_replies_twice_and_learns_from_good_tutoring: Students learn whatever they are told.
    0.15 + 0.5 * scores["tutor_accuracy"] ==> 0.45 - 0.3 * scores["tutor_accuracy"]
test_chat_is_encoded_message_by_message: Answers in the training data never end.
    *self.encode(message["content"]), self.eos_id] ==> *self.encode(message["content"])]
test_ex11_where_a_step_ends: Some sentences go on behind their full stop.
    (letters[previous] & stops[before]) ==> letters[previous]
test_steps_are_cut_where_the_objective_says: Where a step ends depends on the step before it.
    previous = before = -1 ==> previous, before = token, previous
test_pad_and_response_mask: How an answer begins is never learnt.
    after_prompt = t >= prompt_lengths[:, None] ==> after_prompt = t > prompt_lengths[:, None]
test_batches_by_length: Memory runs out although batches are bounded.
    padded = (len(batch) + 1) * sum(grown) ==> padded = len(batch) * sum(grown)
test_broken_records_of_objectives: Of two outputs of one name nobody knows which guides.
    if not good or len(names) < len(found): ==> if not good:
test_tutor_scores: Tutors who never get beyond the first line are thought the best.
    [0 if len(messages) == 1 else 1] ==> [0]
[model.py]
test_rotary_positions_by_hand: A checkpoint from elsewhere writes nonsense; one's own trains.
    x.roll(x.shape[-1] // 2, -1) ==> x.flip(-1)
test_every_family_computes_what_its_reference_does: Llama 3.1 forgets the beginning of long texts.
    fast = fast.clamp(0, 1) ==> fast = fast.clamp(max=1)
test_activations_by_hand: Every Llama checkpoint writes nonsense; GPT-2 is fine.
    gate, x = x.chunk(2, -1) ==> x, gate = x.chunk(2, -1)
test_activations_by_hand: GPT-2's probabilities are off in the fourth digit.
    F.gelu(x, approximate="tanh") ==> F.gelu(x)
test_no_token_sees_the_future: The training loss is wonderfully low, the samples are garbage.
    is_causal=True, enable ==> is_causal=False, enable
test_every_family_computes_what_its_reference_does: Every checkpoint writes nonsense.
    return x + self.mlp(self.norm2(x)) ==> return x + self.mlp(self.norm1(x))
test_a_subset_of_rows_in_any_order:
  A row that was left out comes back with words that it never said.
    if self.own and n > self.fed: ==> if self.own and n > G * K:
test_ex8_keep: In guided decoding the chosen step is followed by words that nobody chose.
    self.held[groups] += counts ==> self.held[groups] += self.own
test_ex8_rollback: After a rollback a sequence may be longer than it ever was.
    self.held = torch.minimum(self.held, lengths) ==> self.held = self.held * 0 + lengths
test_ex13_folded_head: --weights 1,1 draws tamer text than 0.5,0.5.
    return w / w.sum() ==> return w
test_ex13_folded_head: A mix of the first and the last of three heads sounds like another.
    * self.heads[i].weight for i in used) ==> * self.heads[i].weight for i in range(len(used)))
test_bad_weights_are_refused: Head -1 exists.
    if not 0 <= weights < H: ==> if not weights < H:
test_with_heads_makes_untied_copies: All heads stay the same, and the reference policy learns too.
    head + like(noise.to(head.dtype), head) ==> head.add_(like(noise.to(head.dtype), head))
test_ex14_lies_are_refused: A checkpoint may hide bytes that belong to no tensor.
    if first != end: ==> if first < end:
test_ex14_lies_are_refused: Two programs read different weights from one checkpoint.
    if len(names) != len(pairs): ==> if len(names) > len(pairs):
test_safetensors_lies_are_named: A damaged checkpoint ends in a traceback.
    type(i) is int and 0 <= i < 2**48 for i in shape ==> type(i) is int and i < 2**48 for i in shape
test_safetensors_by_hand: Some programs load our checkpoints slowly, or not at all.
    text += b" " * (-len(text) % 8) ==> text += b" " * (len(text) % 8)
test_candidates_drop_out_of_a_step:
  Samples drawn many at a time read what another sequence left behind.
    scores = scores + mask[:, None, None] ==> scores = scores
test_ex9_hand_mask: An answer depends a little on what else is in its batch.
    torch.arange(P, device=held.device) < held ==> torch.arange(P, device=held.device) <= held
test_ex8_keep: Guided one by one, conversations are fine; together, they answer each other.
    rows = groups * self.K + torch ==> rows = groups + torch
test_a_shared_prompt_changes_no_gradient:
  Losses are right, but a policy learns only from how answers go, not from what was asked.
    .expand(2, G, m, n_kv, P, hd) ==> .expand(2, G, m, n_kv, P, hd).detach()
test_step_correctness_is_read_before_the_last_block:
  The value model learns late which steps are wrong.
    self.norm(before)) if below ==> self.norm(x)) if below
test_candidates_drop_out_of_a_step:
  With one conversation all is well; with two, each looks up its words in the other.
    (queries @ prefix[0].mT) ==> (queries @ prefix[0].flip(0).mT)
test_ex9_hand_mask: A word behind a prompt is suspiciously likely if the word after it fits.
    <= t[:, None] ==> <= t[-1:, None].expand(len(t), 1)
test_pairs_each_through_its_own_head:
  A rejected answer is suspiciously likely if it resembles the chosen one.
    own = step.unflatten(1, (G, m)) ==> own = step.unflatten(1, (G, m)).roll(1, 2)
test_pairs_each_through_its_own_head:
  After prompts of unequal length words stand in places that are not theirs.
    t).repeat_interleave(n // len(held), 0) ==> t).repeat(n // len(held), 1)
test_free_weights_go_on_from_sfts_head: --free with weights of 0 does not talk like SFT.
    head += l * (own.weight - reference) ==> head = l * (own.weight - reference)
[prm.py]
test_ex5_hand_values: The value of a finished right answer is 1.9 at most, never 2.
    gamma ** (lengths - t) * correct ==> gamma ** (lengths - t + 1) * correct
test_ex5_hand_values: Values grow with --rollouts.
    discounted.mean(1) ==> discounted.sum(1)
test_ex6_the_majority_is_strict: With an even number of rollouts more steps are engaging.
    (share > 0.5) ==> (share >= 0.5)
test_ex7_hand_value: Guided by honesty, the model lies.
    -F.logsigmoid(scores_chosen - scores_rejected ==> -F.logsigmoid(scores_rejected - scores_chosen
test_matching_steps: The end of the longer response is never compared.
    if len(chosen_ends) != len(rejected_ends): ==> if not compared:
test_matching_steps: Fewer steps are compared than differ.
    if chosen_ids[:c + 1] != rejected_ids[:r + 1]] ==> if chosen_ids[c] != rejected_ids[r]]
test_mse_hand_value_and_mask: The loss is small where few steps have labels.
    mask.sum().clamp(min=1) ==> mask.numel()
test_guide_unified_is_the_scaled_mean_of_the_boundarys_domain:
  Unified guidance follows one objective only.
    scaled = values / self.scale[index] ==> scaled = values
test_guide_unified_is_the_scaled_mean_of_the_boundarys_domain:
  Unified guidance of maths listens to the tutors.
    if o.boundary in ("", boundary)] ==> if o.boundary not in ("", boundary)]
test_step_loss_dispatches_by_case: The value model's loss becomes negative.
    mse_loss if output.case == "verifiable" else bce_loss
    ==> bce_loss if output.case == "verifiable" else mse_loss
test_step_loss_missing_labels_have_no_gradient: The PRM is NaN after its first step.
    targets = targets.nan_to_num() ==> targets = targets.clone()
test_pair_scores_compare_matching_steps: The PRM of the values learns nothing.
    return scores[0], scores[1], p ==> return scores[0], scores[0], p
test_weights_come_from_the_generator: The PRM's loss starts in the thousands.
    std=d ** -0.5 ==> std=d ** 0.5
test_step_correctness_is_not_saved: A finished PRM has an output that is no objective.
    if name != STEP ==> if True
test_the_worst_served_objective_weighs_most: --guide worst helps whom it need not help.
    u = u - rate * gain ==> u = u + rate * gain
test_guide_of_unlike_steps_is_refused: An output is read where none of its steps ends.
    if len(ends) > 1: ==> if len(ends) > 2:
[mah_dpo.py]
test_ex1_hand_values: No policy ever learns to end.
    row, t = mask[:, 1:].nonzero(as_tuple=True) ==> row, t = mask[:, :-1].nonzero(as_tuple=True)
test_ex1_hand_values: After training the model repeats itself.
    logits, ids[r, s + 1], reduction="none") ==> logits, ids[r, s], reduction="none")
test_ex2_hand_values: Chosen and rejected answers become likelier together.
    ref_chosen) - (pi_rejected ==> ref_chosen) + (pi_rejected
test_exact_copies_start_at_ln2: The loss does not start at ln 2.
    (pi_chosen - ref_chosen) - (pi_rejected - ref_rejected) ==> pi_chosen - pi_rejected
test_ex2_hand_values: --beta changes nothing in DPO.
    return -F.logsigmoid(beta * delta) ==> return -F.logsigmoid(delta)
test_ex4_hand_values: MODPO is the worst of all baselines.
    (beta * delta - margin) / w_k ==> (beta * delta + margin) / w_k
test_ex4_hand_values: MODPO hardly moves where w is small.
    (beta * delta - margin) / w_k ==> (beta * delta - margin) * w_k
test_ex4_small_weights_are_refused: MODPO explodes in a batch of several objectives.
    (torch.as_tensor(w_k) >= 0.1).all() ==> (torch.as_tensor(w_k) >= 0.1).any()
test_ex3_hand_value: The more objectives a run has, the slower each learns.
    return (alpha * means).sum() ==> return (alpha * means).mean()
test_pairs_each_through_its_own_head:
  Answers to short prompts are scored as if something else stood before them.
    cache.keep(0, lengths) ==> cache.keep(0)
test_pairs_each_through_its_own_head: The longer a policy is trained, the worse it answers.
    both += [p.chosen, p.rejected] ==> both += [p.rejected, p.chosen]
test_pairs_each_through_its_own_head:
  Only the first word of answers to short prompts is scored wrongly.
    last = h[b, lengths - 1] ==> last = h[:, -1]
test_pairs_each_through_its_own_head:
  Training works with one pair a step, with more it learns noise.
    found.index_copy(0, rows, logps) ==> found.index_copy(0, rows.flip(0), logps)
test_pair_logps_in_batches_of_any_size: The loss starts at ln 2 only if all pairs are equally long.
    found += zip(index, logps ==> found += zip(sorted(index), logps
test_soup_is_the_weighted_average: The soup of two good policies talks nonsense.
    mixed.get(name, 0) + w / total * t ==> mixed.get(name, 0) + w * t
test_soup_refuses_bad_weights: A policy can be subtracted from a soup.
    min(weights) < 0 or total <= 0 ==> total <= 0
test_optimizer_covers_every_parameter_once: Parameters without a gradient's sign shrink.
    betas=(0.9, 0.99), weight_decay=0.0 ==> betas=(0.9, 0.99), weight_decay=0.01
test_pairs_each_through_its_own_head:
  With several pairs a step, answers begin as if something else had been asked.
    last = h[b, lengths - 1].repeat_interleave(2, 0) ==> last = h[b, lengths - 1].repeat(2, 1)
test_raco_of_two_is_the_closed_form: --combine raco and cagrad train the same policy.
    p = torch.minimum(p, w) ==> p = torch.maximum(p, p)
test_raco_of_two_is_the_closed_form: Of two objectives a rule serves the wrong one more.
    d = b[i] - b[j] ==> d = b[j] - b[i]
[decode.py]
test_ex10_draws: The lower the temperature, the wilder the text.
    F.softmax(logits / temperature, -1) ==> F.softmax(logits * temperature, -1)
test_ex10_draws: With a small top_p decoding breaks.
    likelier = p.cumsum(-1) - p ==> likelier = p.cumsum(-1)
test_ex10_draws: top_p < 1 often draws the least likely of the tokens that it keeps.
    level = u.to(cdf) * cdf[:, -1] ==> level = u.to(cdf)
test_sample_never_draws_what_has_no_probability:
  Once in sixteen million draws something impossible is said.
    right=True) ==> right=False)
test_ex10_draws: With top_k all text consists of a few strange tokens.
    token = index if order is None else order.gather(-1, index) ==> token = index
test_generate_refuses_prompts_that_do_not_fit:
  A prompt that fills the context gets an answer of noise.
    if len(prompt) >= limit: ==> if len(prompt) > limit:
test_ragged_batch_equals_one_by_one: Short prompts get worse answers in a batch with long ones.
    cache.keep(0, n, groups) ==> cache.keep(0, None, groups)
test_ragged_batch_equals_one_by_one: The first token after a short prompt is odd.
    return out[g, n - 1] ==> return out[:, -1]
test_generate_limit_per_prompt: Answers are one token longer than was asked for.
    (count >= limits) ==> (count > limits)
test_ex12_hand_case: Guidance makes everything worse.
    winners = scores.argmax(-1) ==> winners = scores.argmin(-1)
test_ex12_hand_case: Only with a reward model that reads a marker scores drift from step to step.
    state.prm.keep(winners, fed[chosen], alive) ==> state.prm.keep(winners, drawn[chosen], alive)
test_guided_equals_reference: Guided decoding is fine for one prompt, and mixes up several.
    h[alive] = prefill( ==> h[:len(alive)] = prefill(
test_steps_and_text_belong_to_the_ids: Answers go on behind their end.
    max_new_tokens - len(a.ids) if a.ids[-1:] != [eos] else 0 for a ==> max_new_tokens - len(a.ids) for a
test_guided_equals_reference: --max-new-tokens limits every step, not their sum.
    budgets = [max_new_tokens - len(a.ids) if ==> budgets = [max_new_tokens if
test_a_marker_stands_behind_every_step_and_is_read:
  A reward model that reads a marker scores all steps alike.
    if ids[-1] != prm.backbone.tokenizer.eos_id: ==> if ids[-1] == prm.backbone.tokenizer.eos_id:
test_guided_stops_at_the_shorter_context: Near its context's end the PRM scores noise.
    = min(model.config.max_len, prm.backbone.config.max_len - markers) ==> = model.config.max_len
test_ragged_batch_equals_one_by_one: Same seed, other answers than last week.
    key=lambda i: len(prompts[i])) ==> key=lambda i: -len(prompts[i]))
test_samples_of_a_prompt_equal_separate_rows: Some answers belong to another question.
    = drawn[g * samples:(g + 1) * samples] ==> = drawn[g::len(batch)]
test_parse_weights_refuses: An infinite weight gives no error and no text.
    all(0 <= w < float("inf") for w in found) ==> all(0 <= w for w in found)
test_sample_computes_in_the_precision_it_needs: A model in bfloat16 never says its rarer words.
    if logits.dtype != torch.float64: ==> if logits.dtype == torch.float64:
test_generate_reports_its_progress: The bar of a stage stops at a sixth.
    progress(len(drawn)) ==> progress(len(batch))
test_main_derives_what_is_not_said: --weights alone never decides who guides.
    heaviest = heads[weights.index(max(weights))] ==> heaviest = args.guide
test_main_closes_an_answer_that_was_cut_off: With a short --max-new-tokens conversations derail.
    return closing + tokenizer ==> return tokenizer
test_free_weights: A weight of -0.5 is taken although nobody asked for --free.
    if not free and (not all( ==> if not found and (not all(
[evaluate.py]
test_seeds_depend_on_seed_and_purpose: All domains meet the same luck.
    zlib.crc32(repr((seed, *what)).encode()) ==> zlib.crc32(repr((seed, what[0])).encode())
test_conversation_ids_are_the_chat_of_its_messages:
  A tutor whose turn was cut off goes on in the student's words.
    self.new_ids = next_turn(tokenizer, response, reply) ==> self.new_ids = tokenizer.encode_turn(reply)
test_conversation_ids_are_the_chat_of_its_messages: Unguided tutors forget what they have said.
    self.ids = self.ids + response + self.new_ids ==> self.ids = self.ids + self.new_ids
test_conversation_scores_average_over_turns: Only the last turn of a lesson counts.
    for turn in self.turns: ==> for turn in self.turns[-1:]:
test_summary_hand_values: Nothing is significant any more.
    spread = statistics.stdev(values) / math.sqrt(len(values)) ==> spread = statistics.stdev(values)
test_guided_conversations_in_batches: Guided tutoring fails on more than 256 students.
    states[start] = results[-1].state if ==> states[0] = results[-1].state if
test_pair_metrics_rows_by_hand: Every policy is perfectly accurate on held-out pairs.
    "reward_accuracy": (delta > 0).float() ==> "reward_accuracy": (delta != 0).float()
test_pair_metrics_rows_by_hand: All objectives have the same loss in the table of held-out pairs.
    metrics = {metric: summary(v[own].tolist()) for ==> metrics = {metric: summary(v.tolist()) for
test_ex15_hand_values: Adding a policy to a front can make its area smaller.
    for x, y in sorted(points, reverse=True): ==> for x, y in sorted(points):
test_mod_mixes_the_log_probabilities_of_policies: In the row mod every policy counts alike.
    heads = [w * model.heads[0].weight ==> heads = [model.heads[0].weight / len(weights)
test_mod_of_heads_of_one_backbone_is_their_fold:
  The row mod is fine for a first token, and worse from token to token.
    cache.own = own ==> cache.own = cache.own
test_equal_arcs: --spacing front changes nothing.
    np.interp(even * length[-1], length, even) ==> np.interp(even, even, even)
[train.py]
test_train_policy_weighs_the_objectives: --alpha changes nothing.
    alpha = torch.tensor(weights, device=device) ==> alpha = torch.ones(len(weights), device=device)
test_chat_example_masks_only_assistant_turns: After SFT the model asks itself questions.
    mask += [learnt] * len(new) ==> mask += [True] * len(new)
test_language_model_loss_is_the_masked_next_token_loss:
  The loss falls to zero, and the model stutters.
    F.cross_entropy(logits, ids[b, t + 1], ==> F.cross_entropy(logits, ids[b, t],
test_endless_draws_each_item_once_per_epoch: Some pairs are never seen.
    torch.randperm(len(items), ==> torch.randint(len(items), (len(items),),
test_hindsight_by_hand: The value model learns nothing about steps, only about whole answers.
    verdicts[response] = verify(source, turn, response) ==> verdicts[response] = verify(source, turn, turn.response)
test_label_steps_by_hand: The verifier finds hardly any right step.
    tokenizer.decode(response[start:end + 1])) ==> tokenizer.decode(response[start:end]))
test_judged_labels_by_hand: --rollouts changes nothing in the engagement labels.
    [ratings[tuple(r)] for r ==> [ratings[tuple(rollouts[0])] for r
test_judged_labels_by_hand: Good rollouts of a step count all or nothing.
    graded_labels(table).tolist() ==> majority_labels(table > 0.5).tolist()
test_an_answer_gets_one_rating: The judges of labels are never wrong.
    judge(value, rng) for response ==> value for response
test_label_steps_by_hand: Rollouts succeed more often than answers.
    room.append(source.world.max_new_tokens - end - 1) ==> room.append(source.world.max_new_tokens)
test_label_steps_by_hand: Guidance in maths is a little worse than it could be.
    at = [len(turn.before) + end for end in at] ==> at = [len(turn.before) + end - 1 for end in at]
test_pairs_prefer_the_better_rated: There are no pairs to train on.
    high, low = max(rated), min(rated) ==> low, high = max(rated), min(rated)
test_margins_by_hand: MODPO listens to the other objectives too much.
    pair.margin += w * (chosen - rejected) ==> pair.margin += chosen - rejected
test_margins_by_hand: MODPO's margins depend on how long the answers are.
    rewards = run.config.beta * (logps - reference) ==> rewards = run.config.beta * logps
test_train_prm_adds_up_the_parts_of_a_batch:
  The PRM's gradient is larger the more a batch's lengths differ.
    step_loss(prm.outputs, scores, targets, in_batch) ==> step_loss(prm.outputs, scores, targets)
test_train_prm_gives_every_objective_the_loss_of_its_own_pairs:
  The log shows one loss for all values.
    chosen, rejected, output == p) ==> chosen, rejected, output >= 0)
test_train_prm_adds_step_correctness_and_drops_it: --prm-step-weight changes nothing.
    weights.append(config.prm_step_weight) ==> weights.append(1.0)
test_label_steps_by_hand: The PRM finds the first mistake late, and those behind it early.
    known[:known.index(0.0) + 1] if 0.0 in known else known ==> known
test_train_prm_adds_step_correctness_and_drops_it:
  With --prm each engagement's PRM learns arithmetic first.
    if "verifiable" in cases and STEP in ==> if STEP in
test_train_prm_leaves_no_source_without_its_share:
  Guidance in the domain with few labels hardly learns anything.
    max(config.prm_pairs, config.prm_batch * n ==> max(1, config.prm_batch * n
test_a_rule_combines_what_objectives_ask_of_the_backbone: With --combine, --alpha counts twice.
    alpha, rule, config.combine_c) / scale ==> alpha, rule, config.combine_c)
test_a_look_at_the_conflict_changes_nothing: All gradients on the backbone are of one length.
    {"backbone_norm": norms} ==> {"backbone_norm": norms / norms}
[interop/answers.py]
test_final_answers: Of two boxed results the wrong one counts.
    return text[ends[-1]:] if ends ==> return text[ends[0]:] if ends
test_no_answer_is_never_right: Saying nothing can be right.
    return False ==> return a == b
[interop/checkpoints.py]
test_a_checkpoint_comes_back_bit_for_bit: Our exports are nonsense in every other program.
    "embed": ["embed_tokens"], ==> "embed": ["lm_head"],
test_a_tied_checkpoint:
  Exported from a tied base model, a policy serves as if it had never been trained.
    {"tie_word_embeddings": False,
    ==> {"tie_word_embeddings": (c.hf or {}).get("tie_word_embeddings", False),
test_other_arithmetic_is_refused_by_name: Qwen2.5 is refused, an old Mistral is not.
    if window is not None and used and window < ==> if window is not None and not used and window <
[interop/datasets.py]
test_steps_are_encoded_as_decoding_ends_them:
  Published steps that end with a newline get lower scores than others.
    step = step.rstrip("\n") + "\n" ==> step = step + "\n"
test_ratings_give_pairs_of_every_objective: Trained on published ratings, the model gets worse.
    Preference(objective, prompt, best, worst) ==> Preference(objective, prompt, worst, best)
test_spellings_of_steps: The first wrong step is praised.
    n_right = n if label == -1 else label ==> n_right = n if label == -1 else min(n, label + 1)
[interop/parallel.py]
test_two_processes_compute_what_one_computes: With two processes every rule is another one.
    return total(found).cpu() ==> return found.cpu()
[interop/reward_models.py]
test_released_reward_models: A released reward model with two labels ranks answers oddly.
    tensors[key] = t[1:] - t[:1] ==> tensors[key] = t[1:]
[interop/templates.py]
test_pieces_of_special_tokens_do_not_join: A template may make a special token of two messages.
    if markup.findall(text) != markup.findall(skeleton): ==> if False:
test_thoughts_between_special_tokens_are_cut: A model reads thoughts that it should have forgotten.
    if text.translate(said) != plain: ==> if False:
test_its_own_words_are_the_error: What a template does not write is lost without a word.
    if mark not in skeleton: ==> if False:
test_plain_chat_has_one_bos: A cached prompt is not the beginning of the longer conversation.
    {CUT}{{{{ m['content'] }}}}{CUT} ==> {{{{ m['content'] }}}}
[interop/tokenizer.py]
test_nobody_types_special_tokens: What a user types of special tokens vanishes.
    self.encode(piece.translate(said)) ==> self.encode(piece)
test_what_ends_an_answer: A chat model's answers do not end.
    not in (bos, CUT)][:1] + ends ==> not in (bos, CUT)][1:] + ends
test_what_ends_an_answer: What ends a turn stands there twice.
    text.removeprefix(self.closing) ==> text
[interop/vocabulary.py]
test_split_patterns: Words between digits vanish.
    found += [piece[end:match.start()], match[0]] ==> found.append(match[0])
test_ids_in_another_order_than_merges:
  Words fall into other pieces than those that the checkpoint knows.
    ordered = [bytes([b]) for b in range(256)] ==> ordered = sorted(vocab, key=vocab.get)
"""


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    killer: str          # a file of tests/ and a test in it
    hint: str


def read_table(table):
    """-> list of Mutant"""
    tests = {}                           # {name: file and name}
    for file in folder("tests"):
        for name in re.findall(r"^def (test_\w+)", read(HOME, file), re.M):
            tests[name] = f"{os.path.basename(file)}::{name}"
    found = []
    for section in re.split(r"^(?=\[)", table.lstrip("\n"), flags=re.M)[1:]:
        file = section[1:section.index("]")]
        bugs = r"^(test_\w+):\s+(.+)\n    (.+?)\s+==> (.+)$"
        for test, hint, old, new in re.findall(bugs, section, re.M):
            found.append(Mutant(file, old, new, tests[test], hint))
    return found


MUTANTS = read_table(TABLE)


# -- running them

def mutated(mutant):
    """The file's text with the edit. ValueError unless the old text stands there exactly once."""
    text = read(HOME, mutant.file)
    times = text.count(mutant.old)
    if times != 1 or mutant.old == mutant.new:
        raise ValueError(f"{mutant.file} holds {times} times, not once: {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def failures(directory, selection):
    """Run tests in a copy of the project -> names of those that fail.

    RuntimeError if they cannot be run."""
    report = os.path.join(directory, "report.xml")
    options = ["-q", "--tb=no", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, *selection]
    done = subprocess.run(command, cwd=directory, capture_output=True, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the tests do not run:\n{done.stdout[-2000:]}")
    names = {}                           # each once, in order
    for case in ElementTree.parse(report).iter("testcase"):
        if {element.tag for element in case} & {"failure", "error"}:
            file, test = case.get("classname").split(".")[-1], case.get("name").split("[")[0]
            names[f"{file}.py::{test}"] = True
    return list(names)


def hunt(numbers, killers):
    """Plant one bug after another in a copy and run the tests; print who found it.

    -> numbers of those that nobody found"""
    survivors = []
    with tempfile.TemporaryDirectory() as temporary:
        copy = os.path.join(temporary, "copy")
        make_assignment(copy, {})
        named = [os.path.join("tests", MUTANTS[n - 1].killer) for n in numbers]
        selection = list(dict.fromkeys(named)) if killers else ["tests"]
        wrong = failures(copy, selection)
        if wrong:
            raise InputError(f"these tests fail without any bug: {', '.join(wrong)}")
        for n, killer in zip(numbers, named):
            mutant = MUTANTS[n - 1]
            write(copy, {mutant.file: mutated(mutant)})
            found = failures(copy, [killer] if killers else ["tests"])
            write(copy, {mutant.file: read(HOME, mutant.file)})
            verdict = f"killed by {', '.join(found)}" if found else "SURVIVES"
            print(f"{n:3d} {mutant.file:12} {verdict}", flush=True)
            if not found:
                survivors.append(n)
    return survivors


def chosen(words):
    """Numbers of bugs, as typed -> the numbers, which have bugs."""
    numbers = [int(word) if re.fullmatch("[0-9]+", word) else 0 for word in words]
    if not all(0 < n <= len(MUTANTS) for n in numbers):
        raise InputError(f"bugs have numbers from 1 to {len(MUTANTS)}")
    return numbers


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", nargs="*", metavar="N",
                        help=f"bugs, 1 to {len(MUTANTS)} (default all)")
    parser.add_argument("--killers", action="store_true", help="run each bug's own test alone")
    parser.add_argument("--plant", nargs=2, metavar=("N", "OUT"),
                        help="write a copy with bug N to the new directory OUT")
    args = parser.parse_args(argv)
    if args.plant:
        number, = chosen(args.plant[:1])
        mutant, out = MUTANTS[number - 1], args.plant[1]
        make_assignment(out, {mutant.file: mutated(mutant)})
        print(f"{out}: somewhere in the seven files or in interop/ is a bug. {mutant.hint}")
        return
    numbers = chosen(args.numbers) or list(range(1, len(MUTANTS) + 1))
    survivors = hunt(numbers, args.killers)
    rest = f"; not {survivors}" if survivors else ""
    print(f"{len(numbers) - len(survivors)} of {len(numbers)} bugs are found{rest}")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    run_command(main)
