"""Small wrong edits of the seven files and interop/, and the tests that notice each.

    python -m tests.mutants [N ...]              every bug (or these) against all tests but this
                                                 course's own; about a minute a bug
    python -m tests.mutants --killers [N ...]    each against the one test that is named beside it;
                                                 some minutes in all
    python -m tests.mutants --plant N OUT        a copy of the project with bug N in it, for a
                                                 student to find

Each bug is an edit (file, old text, new text), the test that kills it, and what one sees of it:
the hint for students.
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
from tests.make_assignment import HOME, make_assignment, read, write


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    killer: str          # a file of tests/ and a test in it
    hint: str


MUTANTS = [
    # -- data.py
    Mutant("data.py", "return SPLITS[zlib.crc32(prompt.encode()) % len(SPLITS)]",
           "return SPLITS[zlib.crc32(prompt.encode()) % (len(SPLITS) - 1)]",
           "test_data.py::test_split_is_a_function_of_the_text", "There is nothing left to test on."),
    Mutant("data.py", "return score + rng.gauss(JUDGE_NOISE)", "return score + rng.gauss(JUDGE_NOISE ** 2)",
           "test_data.py::test_judge_noise_is_calibrated", "The judges are better than they say."),
    Mutant("data.py", "return (best + following) / 2, max(agreements)",
           "return following, max(agreements)", "test_data.py::test_fit_threshold",
           "A judge calls no example positive that is rated just like its best one."),
    Mutant("data.py", 'return a - b if op == "-" else a * b', 'return b - a if op == "-" else a * b',
           "test_data.py::test_misconceptions_are_fixed", "Some facts of arithmetic have changed."),
    Mutant("data.py", "z = float(written[-1:] == [answer])",
           "z = float(bool(written) and written[-1].startswith(answer))",
           "test_data.py::test_verifier", "The verifier accepts 70 for 7."),
    Mutant("data.py", "r.append(float(said[1] == expected[t]))",
           "r.append(float(said[1] in expected))",
           "test_data.py::test_verifier", "Steps may come in any order."),
    Mutant("data.py", 'engagement = len(different) / len(problem.truth["terms"])',
           "engagement = len(different) / len(steps)",
           "test_data.py::test_math_scores", "Short answers engage more."),
    Mutant("data.py", "said.setdefault(attribute, (verb, value))",
           "said[attribute] = (verb, value)",
           "test_data.py::test_values_scores", "One can take back a lie."),
    Mutant("data.py", "FALSE = -0.5", "FALSE = 0.0",
           "test_data.py::test_values_scores", "Lying has become cheaper."),
    Mutant("data.py", "any(q in response and q not in earlier for q in self.ASK)",
           "any(q in response for q in self.ASK)", "test_data.py::test_tutor_scores",
           "A tutor who always asks the same is thought engaging."),
    Mutant("data.py", "lost = 0.5 * claims.count(False)", "lost = 0.0",
           "test_data.py::test_tutor_scores",
           "A tutor may say anything as long as something is right."),
    Mutant("data.py", 'learnt = rng.chance(0.15 + 0.5 * scores["tutor_accuracy"]',
           'learnt = rng.chance(0.45 - 0.3 * scores["tutor_accuracy"]',
           "test_data.py::test_student_replies_twice_and_learns_from_good_tutoring",
           "Students learn whatever they are told."),
    Mutant("data.py", 'self.encode(m["content"]) + [self.eos_id] + self.fill(form.tail)',
           'self.encode(m["content"]) + self.fill(form.tail)',
           "test_tokenizer.py::test_chat_is_encoded_message_by_message", "Answers in the training data never end."),
    Mutant("data.py", "(letters[previous] & stops[before])", "letters[previous]",
           "test_exercises.py::test_ex11_where_a_step_ends", "Some sentences go on behind their full stop."),
    Mutant("data.py", "                found.append(t)\n                previous = before = none",
           "                found.append(t)\n                previous, before = token, previous",
           "test_tokenizer.py::test_steps_are_cut_where_the_objective_says", "Where a step ends depends on the step before it."),
    Mutant("data.py", "after_prompt = t >= prompt_lengths[:, None]",
           "after_prompt = t > prompt_lengths[:, None]",
           "test_data.py::test_pad_and_response_mask", "How an answer begins is never learnt."),
    Mutant("data.py", "if batch and (len(batch) + 1) * lengths[i] > tokens:",
           "if batch and len(batch) * lengths[i] > tokens:",
           "test_data.py::test_batches_by_length", "Memory runs out although batches are bounded."),

    # -- interop/answers.py and interop/datasets.py
    Mutant("interop/answers.py", "return text[ends[-1]:] if ends", "return text[ends[0]:] if ends",
           "test_answers.py::test_final_answers", "Of two boxed results the wrong one counts."),
    Mutant("interop/answers.py", """    if a is None or b is None:
        return False
    return answer_parts(a) == answer_parts(b)""",
           "    return answer_parts(str(a)) == answer_parts(str(b))",
           "test_answers.py::test_no_answer_is_never_right", "Saying nothing can be right."),
    Mutant("interop/datasets.py", "return Preference(objective, prompt_field(row), best, worst)",
           "return Preference(objective, prompt_field(row), worst, best)",
           "test_datasets.py::test_ratings_give_pairs_of_every_objective",
           "Trained on published ratings, the model gets worse."),
    Mutant("interop/datasets.py", "n_right = n if label == -1 else label",
           "n_right = n if label == -1 else min(n, label + 1)",
           "test_datasets.py::test_spellings_of_steps", "The first wrong step is praised."),

    # -- model.py
    Mutant("model.py", "x.roll(x.shape[-1] // 2, -1)", "x.flip(-1)",
           "test_model.py::test_rotary_positions_by_hand", "A checkpoint from elsewhere writes nonsense; one's own trains."),
    Mutant("model.py", '(s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)',
           '(s["high_freq_factor"] - s["low_freq_factor"])).clamp(max=1)',
           "test_checkpoints.py::test_every_family_computes_what_its_reference_does",
           "Llama 3.1 forgets the beginning of long texts."),
    Mutant("model.py", "gate, x = x.chunk(2, -1)", "x, gate = x.chunk(2, -1)",
           "test_model.py::test_activations_by_hand", "Every Llama checkpoint writes nonsense; GPT-2 is fine."),
    Mutant("model.py", 'F.gelu(x, approximate="tanh")', "F.gelu(x)",
           "test_model.py::test_activations_by_hand", "GPT-2's probabilities are off in the fourth digit."),
    Mutant("model.py", "is_causal=mask is None", "is_causal=False",
           "test_model.py::test_no_token_sees_the_future", "The training loss is wonderfully low, the samples are garbage."),
    Mutant("model.py", "return x + self.mlp(self.norm2(x))", "return x + self.mlp(self.norm1(x))",
           "test_checkpoints.py::test_every_family_computes_what_its_reference_does", "Every checkpoint writes nonsense."),
    Mutant("model.py", "if self.own and fed > self.fed:", "if self.own and fed > len(self.held) * self.K:",
           "test_model.py::test_a_subset_of_rows_in_any_order",
           "A row that was left out comes back with words that it never said."),
    Mutant("model.py", "self.held[groups] += counts", "self.held[groups] += self.own",
           "test_exercises.py::test_ex8_keep", "In guided decoding the chosen step is followed by words that nobody chose."),
    Mutant("model.py", "torch.minimum(self.held, torch.as_tensor(lengths, device=self.held.device))",
           "self.held * 0 + torch.as_tensor(lengths, device=self.held.device)",
           "test_exercises.py::test_ex8_rollback", "After a rollback a sequence may be longer than it ever was."),
    Mutant("model.py", "        return w / w.sum()", "        return w",
           "test_exercises.py::test_ex13_folded_head", "--weights 1,1 draws wilder text than 0.5,0.5."),
    Mutant("model.py", "return sum(w[i] * self.heads[i].weight for i in used)",
           "return sum(w[i] * self.heads[i].weight for i in range(len(used)))",
           "test_exercises.py::test_ex13_folded_head", "A mix of the first and the last of three heads sounds like another."),
    Mutant("model.py", "if not 0 <= weights < H:", "if not weights < H:",
           "test_model.py::test_bad_weights_are_refused", "Head -1 exists."),
    Mutant("model.py", "head + like(noise.to(head.dtype), head)", "head.add_(like(noise.to(head.dtype), head))",
           "test_model.py::test_with_heads_makes_untied_copies", "All heads stay the same, and the reference policy learns too."),
    Mutant("model.py", "        if start != end:\n", "        if start < end:\n",
           "test_exercises.py::test_ex14_lies_are_refused", "A checkpoint may hide bytes that belong to no tensor."),
    Mutant("model.py", "if len({k for k, _ in pairs}) != len(pairs):", "if len({k for k, _ in pairs}) > len(pairs):",
           "test_exercises.py::test_ex14_lies_are_refused", "Two programs read different weights from one checkpoint."),
    Mutant("model.py", "type(i) is int and 0 <= i < 2**48 for i in v)", "type(i) is int and i < 2**48 for i in v)",
           "test_model.py::test_safetensors_lies_are_named", "A damaged checkpoint ends in a traceback."),
    Mutant("model.py", 'text += b" " * (-len(text) % 8)', 'text += b" " * (len(text) % 8)',
           "test_model.py::test_safetensors_by_hand", "Some programs load our checkpoints slowly, or not at all."),
    Mutant("model.py", 'LLAMA = {\n    "embed": ["embed_tokens"],', 'LLAMA = {\n    "embed": ["lm_head"],',
           "test_model.py::test_names_of_an_exported_checkpoint", "Our exports are nonsense in every other program."),
    Mutant("model.py", '"tie_word_embeddings": False,', '"tie_word_embeddings": (c.hf or {}).get("tie_word_embeddings", False),',
           "test_model.py::test_a_tied_checkpoint",
           "Exported from a tied base model, a policy serves as if it had never been trained."),
    Mutant("model.py", "if window is not None and used and window <", "if window is not None and not used and window <",
           "test_checkpoints.py::test_other_arithmetic_is_refused_by_name", "Qwen2.5 is refused, an old Mistral is not."),

    # -- prm.py
    Mutant("prm.py", "gamma ** (lengths - t) * correct", "gamma ** (lengths - t + 1) * correct",
           "test_exercises.py::test_ex5_hand_values",
           "The value of a finished right answer is 1.9 at most, never 2."),
    Mutant("prm.py", "discounted.mean(1)", "discounted.sum(1)",
           "test_exercises.py::test_ex5_hand_values", "Values grow with --rollouts."),
    Mutant("prm.py", "(share > 0.5)", "(share >= 0.5)",
           "test_exercises.py::test_ex6_the_majority_is_strict",
           "With an even number of rollouts more steps are engaging."),
    Mutant("prm.py", "-F.logsigmoid(scores_chosen - scores_rejected)",
           "-F.logsigmoid(scores_rejected - scores_chosen)",
           "test_exercises.py::test_ex7_hand_value", "Guided by honesty, the model lies."),
    Mutant("prm.py", "if len(chosen_ends) != len(rejected_ends):", "if not compared:",
           "test_prm.py::test_matching_steps",
           "The end of the longer response is never compared."),
    Mutant("prm.py", "if chosen_ids[:c + 1] != rejected_ids[:r + 1]]",
           "if chosen_ids[c] != rejected_ids[r]]",
           "test_prm.py::test_matching_steps", "Fewer steps are compared than differ."),
    Mutant("prm.py", "mask.sum().clamp(min=1)", "mask.numel()",
           "test_prm.py::test_mse_hand_value_and_mask",
           "The loss is small where few steps have labels."),
    Mutant("prm.py", "(scores[..., index] / self.scale[index]).mean(-1)",
           "scores[..., index].mean(-1)",
           "test_prm.py::test_guide_unified_is_the_scaled_mean_of_the_boundarys_domain",
           "Unified guidance follows one objective only."),
    Mutant("prm.py", "o.boundary in boundaries]", "o.boundary not in boundaries]",
           "test_prm.py::test_guide_unified_is_the_scaled_mean_of_the_boundarys_domain",
           "Unified guidance of maths listens to the tutors."),
    Mutant("prm.py", 'mse_loss if output.case == "verifiable" else bce_loss',
           'bce_loss if output.case == "verifiable" else mse_loss',
           "test_prm.py::test_step_loss_dispatches_by_case",
           "The value model's loss becomes negative."),
    Mutant("prm.py", "targets = targets.nan_to_num()", "targets = targets.clone()",
           "test_prm.py::test_step_loss_missing_labels_have_no_gradient",
           "The PRM is NaN after its first step."),
    Mutant("prm.py", "return scores[:len(p)], scores[len(p):], p",
           "return scores[:len(p)], scores[:len(p)], p",
           "test_train.py::test_pair_scores_compare_matching_steps",
           "The PRM of the values learns nothing."),
    Mutant("prm.py", 'step = step.rstrip("\\n") + "\\n"', 'step = step + "\\n"',
           "test_prm.py::test_steps_are_encoded_as_decoding_ends_them",
           "Published steps that end with a newline get lower scores than others."),
    Mutant("prm.py", "std=d ** -0.5", "std=d ** 0.5",
           "test_prm.py::test_weights_come_from_the_generator",
           "The PRM's loss starts in the thousands."),
    Mutant("interop/reward_models.py", "nn.Parameter(layer.weight[1:] - layer.weight[:1])",
           "nn.Parameter(layer.weight[1:])",
           "test_reward_models.py::test_released_reward_models",
           "A released reward model with two labels ranks answers oddly."),

    # -- mah_dpo.py
    Mutant("mah_dpo.py", "row, t = mask[:, 1:].nonzero(as_tuple=True)", "row, t = mask[:, :-1].nonzero(as_tuple=True)",
           "test_exercises.py::test_ex1_hand_values", "No policy ever learns to end."),
    Mutant("mah_dpo.py", 'cross_entropy(logits, ids[r, s + 1], reduction="none")',
           'cross_entropy(logits, ids[r, s], reduction="none")',
           "test_exercises.py::test_ex1_hand_values", "After training the model repeats itself."),
    Mutant("mah_dpo.py", "return (pi_chosen - ref_chosen) - (pi_rejected - ref_rejected)",
           "return (pi_chosen - ref_chosen) + (pi_rejected - ref_rejected)",
           "test_exercises.py::test_ex2_hand_values", "Chosen and rejected answers become likelier together."),
    Mutant("mah_dpo.py", "return (pi_chosen - ref_chosen) - (pi_rejected - ref_rejected)", "return pi_chosen - pi_rejected",
           "test_mah_dpo.py::test_exact_copies_start_at_ln2", "The loss does not start at ln 2."),
    Mutant("mah_dpo.py", "return -F.logsigmoid(beta * log_ratio_margin(", "return -F.logsigmoid(log_ratio_margin(",
           "test_exercises.py::test_ex2_hand_values", "--beta changes nothing in DPO."),
    Mutant("mah_dpo.py", "(beta * delta - margin) / w_k", "(beta * delta + margin) / w_k",
           "test_exercises.py::test_ex4_hand_values", "MODPO is the worst of all baselines."),
    Mutant("mah_dpo.py", "(beta * delta - margin) / w_k", "(beta * delta - margin) * w_k",
           "test_exercises.py::test_ex4_hand_values", "MODPO hardly moves where w is small."),
    Mutant("mah_dpo.py", "(torch.as_tensor(w_k) >= 0.1).all()", "(torch.as_tensor(w_k) >= 0.1).any()",
           "test_exercises.py::test_ex4_small_weights_are_refused", "MODPO explodes in a batch of several objectives."),
    Mutant("mah_dpo.py", "/ count.clamp(min=1)).sum()", "/ count.clamp(min=1)).mean()",
           "test_exercises.py::test_ex3_hand_value", "The more objectives a run has, the slower each learns."),
    Mutant("mah_dpo.py", "return (alpha * (losses @ one_hot)", "return ((losses @ one_hot)",
           "test_exercises.py::test_ex3_hand_value", "--alpha changes nothing."),
    Mutant("mah_dpo.py", "positions = torch.where(part >= 2, t - c, t)", "positions = torch.where(part >= 3, t - c, t)",
           "test_mah_dpo.py::test_packed_pairs_each_through_its_own_head",
           "Rejected answers are scored as if they stood further back."),
    Mutant("mah_dpo.py", "((part[:, None] == 0) | (part[:, None] == part[:, :, None]))", "(part[:, None] <= part[:, :, None])",
           "test_mah_dpo.py::test_packed_pairs_each_through_its_own_head",
           "A rejected answer is suspiciously likely if it resembles the chosen one."),
    Mutant("mah_dpo.py", "take = torch.where(j == 0, torch.cat((n, n)) - 1, start + j - 1)", "take = (start + j - 1)",
           "test_mah_dpo.py::test_packed_pairs_each_through_its_own_head",
           "Only the first word of rejected answers is scored wrongly."),
    Mutant("mah_dpo.py", "torch.cat(parts)[torch.cat(order).argsort()]", "torch.cat(parts)",
           "test_mah_dpo.py::test_packed_pairs_each_through_its_own_head",
           "Training works with one objective, with two it learns noise."),
    Mutant("mah_dpo.py", "found += zip(index, ", "found += zip(sorted(index), ",
           "test_mah_dpo.py::test_pair_logps_in_batches_of_any_size",
           "The loss starts at ln 2 only if all pairs are equally long."),
    Mutant("mah_dpo.py", "sum(w / sum(weights) * s[k] for w, s in zip(weights, state_dicts))",
           "sum(w * s[k] for w, s in zip(weights, state_dicts))",
           "test_mah_dpo.py::test_soup_is_the_weighted_average", "The soup of two good policies talks nonsense."),
    Mutant("mah_dpo.py", "min(weights) < 0 or sum(weights) <= 0", "sum(weights) <= 0",
           "test_mah_dpo.py::test_soup_refuses_bad_weights", "A policy can be subtracted from a soup."),
    Mutant("mah_dpo.py", "betas=(0.9, 0.99), weight_decay=0.0", "betas=(0.9, 0.99), weight_decay=0.01",
           "test_mah_dpo.py::test_optimizer_covers_every_parameter_once", "Parameters without a gradient's sign shrink."),

    # -- decode.py
    Mutant("decode.py", "F.softmax(logits / temperature, -1)",
           "F.softmax(logits * temperature, -1)",
           "test_exercises.py::test_ex10_temperature",
           "The lower the temperature, the wilder the text."),
    Mutant("decode.py", "likelier = p.cumsum(-1) - p", "likelier = p.cumsum(-1)",
           "test_exercises.py::test_ex10_top_p", "With a small top_p decoding breaks."),
    Mutant("decode.py", "level = u.to(cdf) * cdf[:, -1]", "level = u.to(cdf)",
           "test_exercises.py::test_ex10_top_p",
           "top_p < 1 often draws the least likely of the tokens that it keeps."),
    Mutant("decode.py", "right=True)", "right=False)",
           "test_decode.py::test_sample_never_draws_what_has_no_probability",
           "Once in sixteen million draws something impossible is said."),
    Mutant("decode.py", "token = index if order is None else order.gather(-1, index)",
           "token = index",
           "test_exercises.py::test_ex10_top_k",
           "With top_k all text consists of a few strange tokens."),
    Mutant("decode.py", "if len(prompt) >= limit:", "if len(prompt) > limit:",
           "test_decode.py::test_generate_refuses_prompts_that_do_not_fit",
           "A prompt that fills the context gets an answer of noise."),
    Mutant("decode.py", "    cache.keep(0, n)\n", "    cache.keep(0)\n",
           "test_decode.py::test_ragged_batch_equals_one_by_one",
           "Short prompts get worse answers in a batch with long ones."),
    Mutant("decode.py", "return out[g, n - 1]", "return out[:, -1]",
           "test_decode.py::test_ragged_batch_equals_one_by_one",
           "The first token after a short prompt is odd."),
    Mutant("decode.py", "(count >= limits)", "(count > limits)",
           "test_decode.py::test_generate_limit_per_prompt",
           "Answers are one token longer than was asked for."),
    Mutant("decode.py", "winners = scores.argmax(-1)", "winners = scores.argmin(-1)",
           "test_exercises.py::test_ex12_hand_case", "Guidance makes everything worse."),
    Mutant("decode.py", "state.prm.keep(winners, fed[chosen], alive)",
           "state.prm.keep(winners, drawn[chosen], alive)",
           "test_exercises.py::test_ex12_hand_case",
           "Only with a reward model that reads a marker scores drift from step to step."),
    Mutant("decode.py", "h[alive] = h[alive, winners][:, None]",
           "h[alive] = h[0, winners][:, None]",
           "test_exercises.py::test_ex12_hand_case",
           "Guided decoding is fine for one prompt, and mixes up several."),
    Mutant("decode.py", "        end[ended] = 0\n", "",
           "test_decode.py::test_steps_and_text_belong_to_the_ids",
           "Answers go on behind their end."),
    Mutant("decode.py", "        left = room_left(state, end, context)\n",
           "        more = torch.where(end > 0, context, end)\n"
           "        left = room_left(state, more, context).clamp(max=max_new_tokens)\n",
           "test_decode.py::test_guided_equals_reference",
           "--max-new-tokens limits every step, not their sum."),
    Mutant("decode.py", "if ids[-1] != prm.backbone.tokenizer.eos_id:",
           "if ids[-1] == prm.backbone.tokenizer.eos_id:",
           "test_reward_models.py::test_a_marker_stands_behind_every_step_and_is_read",
           "A reward model that reads a marker scores all steps alike."),
    Mutant("decode.py",
           "context = min(model.config.max_len, prm.backbone.config.max_len - markers)",
           "context = model.config.max_len",
           "test_decode.py::test_guided_stops_at_the_shorter_context",
           "Near its context's end the PRM scores noise."),
    Mutant("decode.py", "key=lambda i: len(prompts[i]))", "key=lambda i: -len(prompts[i]))",
           "test_decode.py::test_ragged_batch_equals_one_by_one",
           "Same seed, other answers than last week."),
    Mutant("decode.py", "out[i] = drawn[first:first + samples]", "out[i] = drawn[k::len(batch)]",
           "test_decode.py::test_samples_of_a_prompt_equal_separate_rows",
           "Some answers belong to another question."),
    Mutant("decode.py", 'all(0 <= w < float("inf") for w in found)',
           "all(0 <= w for w in found)",
           "test_decode.py::test_parse_weights_refuses",
           "An infinite weight gives no error and no text."),
    Mutant("decode.py", "if logits.dtype != torch.float64:", "if logits.dtype == torch.float64:",
           "test_decode.py::test_sample_computes_in_the_precision_it_needs",
           "A model in bfloat16 never says its rarer words."),
    Mutant("decode.py", "progress(len(drawn))", "progress(len(batch))",
           "test_decode.py::test_generate_reports_its_progress",
           "The bar of a stage stops at a sixth."),
    Mutant("decode.py", "heaviest = heads[weights.index(max(weights))]", "heaviest = args.guide",
           "test_decode.py::test_main_derives_what_is_not_said",
           "--weights alone never decides who guides."),
    Mutant("decode.py", "new = closing + tokenizer", "new = tokenizer",
           "test_decode.py::test_main_closes_an_answer_that_was_cut_off",
           "With a short --max-new-tokens conversations derail."),

    # -- evaluate.py
    Mutant("evaluate.py", "return zlib.crc32(repr((seed, *what)).encode())",
           "return zlib.crc32(repr((seed, what[0])).encode())",
           "test_evaluate.py::test_seeds_depend_on_seed_and_purpose",
           "All domains meet the same luck."),
    Mutant("evaluate.py",
           "closing = [] if response[-1] == tokenizer.eos_id else [tokenizer.eos_id]",
           "closing = []",
           "test_evaluate.py::test_conversation_ids_are_the_chat_of_its_messages",
           "A tutor whose turn was cut off goes on in the student's words."),
    Mutant("evaluate.py", "self.ids = self.ids + response + self.new_ids",
           "self.ids = self.ids + self.new_ids",
           "test_evaluate.py::test_conversation_ids_are_the_chat_of_its_messages",
           "Unguided tutors forget what they have said."),
    Mutant("evaluate.py", "for _, messages, response in self.turns:",
           "for _, messages, response in self.turns[-1:]:",
           "test_evaluate.py::test_conversation_scores_average_over_turns",
           "Only the last turn of a lesson counts."),
    Mutant("evaluate.py", "spread = statistics.stdev(values) / math.sqrt(len(values))",
           "spread = statistics.stdev(values)",
           "test_evaluate.py::test_summary_hand_values",
           "Nothing is significant any more."),
    Mutant("evaluate.py", "states[start] = results[0].state if world.turns > 1 else None",
           "states[0] = results[0].state if world.turns > 1 else None",
           "test_evaluate.py::test_guided_conversations_in_batches",
           "Guided tutoring fails on more than 256 students."),
    Mutant("evaluate.py", '"reward_accuracy": (delta > 0).float()',
           '"reward_accuracy": (delta != 0).float()',
           "test_evaluate.py::test_pair_metrics_rows_by_hand",
           "Every policy is perfectly accurate on held-out pairs."),
    Mutant("evaluate.py", "metrics = {metric: summary(v[own].tolist()) for",
           "metrics = {metric: summary(v.tolist()) for",
           "test_evaluate.py::test_pair_metrics_rows_by_hand",
           "All objectives have the same loss in the table of held-out pairs."),
    Mutant("evaluate.py", "for x, y in sorted(points, reverse=True):",
           "for x, y in sorted(points):",
           "test_exercises.py::test_ex15_hand_values",
           "Adding a policy to a front can make its area smaller."),

    # -- train.py
    Mutant("train.py", "mask += [False] * (len(prompt) - len(ids)) + [True] * len(response)",
           "mask += [True] * (len(prompt) - len(ids)) + [True] * len(response)",
           "test_train.py::test_chat_example_masks_only_assistant_turns",
           "After SFT the model asks itself questions."),
    Mutant("train.py", "loss = F.cross_entropy(logits, ids[b, t + 1])",
           "loss = F.cross_entropy(logits, ids[b, t])",
           "test_train.py::test_language_model_loss_is_the_masked_next_token_loss",
           "The loss falls to zero, and the model stutters."),
    Mutant("train.py",
           "self.order += torch.randperm(len(self.items), generator=self.generator).tolist()",
           "self.order += torch.randint(len(self.items), (len(self.items),), "
           "generator=self.generator).tolist()",
           "test_train.py::test_cycle_draws_each_item_once_per_epoch", "Some pairs are never seen."),
    Mutant("train.py", "verified = [verify(source, turn, response) for response in responses]",
           "verified = [verify(source, turn, turn.response) for response in responses]",
           "test_train.py::test_hindsight_by_hand",
           "The value model learns nothing about steps, only about whole answers."),
    Mutant("train.py", "steps.append(tokenizer.decode(response[start:end + 1]))",
           "steps.append(tokenizer.decode(response[start:end]))",
           "test_train.py::test_label_steps_by_hand", "The verifier finds hardly any right step."),
    Mutant("train.py", "[name] for response in responses]", "[name] for response in responses[:1]]",
           "test_train.py::test_verdicts_by_hand",
           "--rollouts changes nothing in the engagement labels."),
    Mutant("train.py", "room.append(world.max_new_tokens - end - 1)",
           "room.append(world.max_new_tokens)",
           "test_train.py::test_label_steps_by_hand", "Rollouts succeed more often than answers."),
    Mutant("train.py", "at = [len(turn.prompt) + end for end in at]",
           "at = [len(turn.prompt) + end - 1 for end in at]",
           "test_train.py::test_label_steps_by_hand",
           "Guidance in maths is a little worse than it could be."),
    Mutant("train.py", "high, low = max(rated), min(rated)", "low, high = max(rated), min(rated)",
           "test_train.py::test_pairs_prefer_the_better_rated", "There are no pairs to train on."),
    Mutant("train.py", "pair.margin += (chosen - rejected) / len(mates)",
           "pair.margin += chosen - rejected",
           "test_train.py::test_margins_by_hand", "MODPO listens to the other objectives too much."),
    Mutant("train.py", "rewards = run.config.beta * (logps - reference)",
           "rewards = run.config.beta * logps",
           "test_train.py::test_margins_by_hand",
           "MODPO's margins depend on how long the answers are."),
    Mutant("train.py", "step_loss(prm.outputs, scores, targets, in_batch)",
           "step_loss(prm.outputs, scores, targets)",
           "test_train.py::test_train_prm_adds_up_the_parts_of_a_batch",
           "The PRM's gradient is larger the more a batch's lengths differ."),
    Mutant("train.py", "bradley_terry_loss(chosen, rejected, output == p)",
           "bradley_terry_loss(chosen, rejected, output >= 0)",
           "test_train.py::test_train_prm_gives_every_objective_the_loss_of_its_own_pairs",
           "The log shows one loss for all values."),
    Mutant("train.py", "alpha = torch.tensor(weights, device=device)",
           "alpha = torch.ones(len(weights), device=device)",
           "test_train.py::test_train_policy_weighs_the_objectives", "--alpha changes nothing."),
    Mutant("train.py", "max(config.prm_pairs, config.prm_batch * n // max(1, sum(labels)))",
           "max(1, config.prm_batch * n // max(1, sum(labels)))",
           "test_train.py::test_train_prm_leaves_no_source_without_its_share",
           "Guidance in the domain with few labels hardly learns anything."),
    Mutant("train.py", "weights.append(config.prm_step_weight)", "weights.append(1.0)",
           "test_train.py::test_train_prm_adds_step_correctness_and_drops_it",
           "--prm-step-weight changes nothing."),
    Mutant("train.py", "known[:known.index(0.0) + 1] if 0.0 in known else known", "known",
           "test_train.py::test_label_steps_by_hand",
           "The PRM finds the first mistake late, and those behind it early."),
    Mutant("train.py", 'if "verifiable" in cases and STEP in', "if STEP in",
           "test_train.py::test_train_prm_adds_step_correctness_and_drops_it",
           "With --prm each engagement's PRM learns arithmetic first."),
    Mutant("train.py", "agreed = agreed and getattr(run.config, name) ==",
           "agreed = getattr(run.config, name) ==",
           "test_runs.py::test_a_run_from_another_equals_one_from_scratch",
           "With --from a run keeps files that another option should have changed."),
    Mutant("model.py", "scores if mask is None else scores + mask", "scores",
           "test_model.py::test_attend_is_scaled_dot_product_attention",
           "Samples drawn many at a time read what another sequence left behind."),
    Mutant("prm.py", "if name != STEP", "if True",
           "test_prm.py::test_step_correctness_is_not_saved",
           "A finished PRM has an output that is no objective."),
    Mutant("model.py", "self.norm(before)) if below", "self.norm(x)) if below",
           "test_prm.py::test_step_correctness_is_read_before_the_last_block", "The value model learns late which steps are wrong."),
]


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
    names = []
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = {element.tag for element in case}
        if outcome & {"failure", "error"}:
            file = case.get("classname").split(".")[-1]
            test = case.get("name").split("[")[0]
            names.append(f"{file}.py::{test}")
    return list(dict.fromkeys(names))


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


def plant(number, out):
    """A copy of the project with a bug in it."""
    mutant = MUTANTS[number - 1]
    make_assignment(out, {mutant.file: mutated(mutant)})
    print(f"{out}: somewhere in the seven files or in interop/ is a bug. {mutant.hint}")


def check_numbers(numbers):
    if not all(0 < n <= len(MUTANTS) for n in numbers):
        raise InputError(f"bugs have numbers from 1 to {len(MUTANTS)}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", nargs="*", type=int, metavar="N",
                        help=f"bugs, 1 to {len(MUTANTS)} (default all)")
    parser.add_argument("--killers", action="store_true", help="run each bug's own test alone")
    parser.add_argument("--plant", nargs=2, metavar=("N", "OUT"),
                        help="write a copy with bug N to the new directory OUT")
    args = parser.parse_args(argv)
    if args.plant:
        number, out = args.plant
        number = int(number) if re.fullmatch("[0-9]+", number) else 0
        check_numbers([number])
        return plant(number, out)
    numbers = args.numbers or list(range(1, len(MUTANTS) + 1))
    check_numbers(numbers)
    survivors = hunt(numbers, args.killers)
    found = len(numbers) - len(survivors)
    rest = f"; not {survivors}" if survivors else ""
    print(f"{found} of {len(numbers)} bugs are found{rest}")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    run_command(main)
