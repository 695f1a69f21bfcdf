"""A planted fault does not survive the tests: one line of the code is made wrong, and a test has to go red.

    python tests/mutants.py                          the handwritten faults, one after another
    python tests/mutants.py --drawn 40 --seed 0      and forty that are drawn, the same ones for a seed and a commit
    python tests/mutants.py --only ID ...            some of them; --list shows all that are chosen

Handwritten faults are rows of FAULTS: an id, a file, its text, what stands there instead, the tests that must see it.
Drawn ones come from OPERATORS, fixed beforehand, on the lines of SECTIONS; what cannot show (messages, docstrings,
types, assertions, prints, see `hidden`) is left out by rule, never by looking at results. Their tests are TESTS'.
Faults are planted in a copy of the repository. The result: docs/mutants.md.
"""

import argparse
import ast
import concurrent.futures
import functools
import hashlib
import io
import json
import os
import queue
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Fault:
    id: str
    file: str
    old: str  # stands once in the file; of a drawn fault the line
    new: str
    tests: tuple[str, ...]  # files of tests/ or FILE::TEST, the quickest first
    line: int = 0  # of a drawn fault, from 1 on
    operator: str = ""


def planted(fault: Fault, text: str) -> str:
    """The text of its file with the fault in it."""
    if fault.line:
        lines = text.splitlines(keepends=True)
        assert lines[fault.line - 1].rstrip("\n") == fault.old, fault.id
        lines[fault.line - 1] = fault.new + "\n"
        return "".join(lines)
    assert text.count(fault.old) == 1, f"{fault.id}: its old text stands {text.count(fault.old)} times in {fault.file}"
    return text.replace(fault.old, fault.new)


# ---------------------------------------------------------------------------------------------------------------------
# Handwritten: id, file, old, new, tests

FAULTS = [Fault(*row[:4], row[4:]) for row in [
    # --- tden.py
    ("tden-moc-mean", "tden.py", 'target_probs, reduction="sum") / max(1, len(logits))',
     'target_probs, reduction="mean") / max(1, len(logits))', "test_tden.py::test_class_loss_by_hand"),
    ("tden-ism-own-picture-is-negative", "tden.py", "S.diagonal()[:, None]).clamp(min=0).masked_fill(is_same, 0.0)",
     "S.diagonal()[:, None]).clamp(min=0)", "test_tden.py::test_matching_loss_by_hand"),
    ("tden-ism-axis", "tden.py", "by_image.amax(0).sum()", "by_image.amax(1).sum()",
     "test_tden.py::test_matching_loss_by_hand"),
    ("tden-ism-wrong-positive", "tden.py", "(margin + S - S.diagonal()[None])", "(margin + S - S.diagonal()[:, None])",
     "test_tden.py::test_matching_loss_by_hand"),
    ("tden-second-pass-unshifted", "tden.py", "F.pad(next_words[:, :-1], (1, 0))", "next_words",
     "test_tden.py::test_the_second_pass_reads_what_the_first_said"),
    ("tden-decoder-sees-all", "tden.py", "causal = whole.tril()", "causal = whole",
     "test_tden.py::test_no_later_word_reaches_the_decoder"),
    ("tden-caption-sees-next-word", "tden.py", "device=ids.device).tril() if T > 1",
     "device=ids.device).tril(1) if T > 1", "test_tden.py::test_no_later_word_reaches_the_decoder",
     "test_tden.py::test_cached_decoding_is_uncached_decoding"),
    ("tden-msg-predicts-itself", "tden.py",
     "F.pad(ids[:, 1:].masked_fill(~keep[:, 1:], NOTHING), (0, 1), value=NOTHING)",
     "ids.masked_fill(~keep, NOTHING)", "test_tden.py::test_labels_of_a_corrupted_sentence"),
    ("tden-moc-next-region", "tden.py", "v_last[-1][:, 1:][batch", "v_last[-1][:, :-1][batch",
     "test_golden_tden.py"),
    ("tden-overlap-of-the-masked-alone", "tden.py", "> 0.4) & is_masked[:, None]).any(2)",
     "> 0.4) & is_masked[:, :, None]).any(2)",
     "test_tden.py::test_regions_that_overlap_a_masked_one_are_zeroed_with_it"),
    ("tden-padding-is-pooled", "tden.py", ".masked_fill(~keep_mask[:, :, None], -math.inf).softmax(dim=1)",
     ".softmax(dim=1)", "test_tden.py::test_neither_padding_nor_other_samples_matter"),
    ("tden-smoothing-over-all-words", "tden.py", "smoothing / (log_p.size(-1) - 1)", "smoothing / log_p.size(-1)",
     "test_tden.py::test_downstream_losses_by_hand"),
    ("tden-cache-not-reordered", "tden.py", 'cache["kv"].index_select(1, rows)', 'cache["kv"]',
     "test_tden.py::test_cached_decoding_is_uncached_decoding"),
    ("tden-layer-drop-in-evaluation", "tden.py", "return self.training and probability > 0",
     "return probability > 0", "test_tden.py::test_layers_are_dropped_in_training_only"),
    # --- vcgpt.py
    ("vcgpt-later-token-leaks", "vcgpt.py", "is_causal=causal and T > 1", "is_causal=False",
     "test_vcgpt.py::test_no_later_token_and_no_other_picture_leaks"),
    ("vcgpt-position-of-a-cached-word", "vcgpt.py", "self.wpe.weight[start : start + ids.size(1)])",
     "self.wpe.weight[: ids.size(1)])", "test_vcgpt.py::test_cached_decoding_is_uncached_decoding"),
    ("vcgpt-scst-sum", "vcgpt.py", 'reduction="none")).mean()', 'reduction="none")).sum()',
     "test_scst.py::test_loss_by_hand"),
    ("vcgpt-readings-swapped", "vcgpt.py", 'if self.cfg.memory == "B":', 'if self.cfg.memory != "B":',
     "test_vcgpt.py::test_readings_a_and_b_of_the_figure"),
    ("vcgpt-square-matrix-untransposed", "vcgpt.py", '("c_attn.weight", "c_proj.weight", ', '("c_attn.weight", ',
     "test_golden_vcgpt.py"),
    # --- soho.py
    ("soho-decay-of-counts", "soho.py", "self.cluster_size.mul_(self.decay).add_(n, alpha=1 - self.decay)",
     "self.cluster_size.mul_(self.decay).add_(n, alpha=self.decay)", "test_soho.py::test_updates_by_hand"),
    ("soho-sums-never-fade", "soho.py", "self.embed_avg.mul_(self.decay).add_(", "self.embed_avg.add_(",
     "test_soho.py::test_updates_by_hand"),
    ("soho-smoothed-size-unscaled", "soho.py", "(total + len(n) * eps) * total", "(total + len(n) * eps)",
     "test_soho.py::test_updates_by_hand"),
    ("soho-no-way-past-the-dictionary", "soho.py", "return x + (self.embed[indices] - x).detach(), indices",
     "return self.embed[indices], indices",
     "test_soho.py::test_gradients_pass_the_dictionary_as_if_it_were_not_there"),
    ("soho-sums-of-one-process", "soho.py", "common.sum_tensors(n, s)", "common.sum_tensors(n)",
     "test_soho.py::test_the_dictionary_of_two_processes_is_that_of_one"),
    ("soho-evaluation-moves-codes", "soho.py",
     "            if self.training:\n                self.update(x.detach(), indices)",
     "            if True:\n                self.update(x.detach(), indices)",
     "test_soho.py::test_evaluation_moves_no_buffer"),
    ("soho-distance-half", "soho.py", "- 2 * x @ self.embed.T", "- x @ self.embed.T",
     "test_soho.py::test_the_nearest_code_by_hand"),
    ("soho-padding-is-hidden", "soho.py", "anchors[:, None])) & keep_mask & has_mvm[:, None]",
     "anchors[:, None])) & has_mvm[:, None]", "test_soho.py::test_hidden_cells_are_all_of_one_code"),
    ("soho-cells-of-the-text", "soho.py", "hidden, d = x[:, T:][is_target]", "hidden, d = x[:, :-T][is_target]",
     "test_soho.py::test_what_pretraining_asks_of_which_states"),
    ("soho-mlm-on-negatives-alone", "soho.py", "masked_fill((itm_labels == 0)[:, None], NOTHING)",
     "masked_fill((itm_labels > 0)[:, None], NOTHING)", "test_soho.py::test_what_a_pretraining_batch_asks"),
    ("soho-negative-of-the-same-picture", "soho.py", "numbers[:, None] != numbers[None, ::k]",
     "numbers[:, None] == numbers[None, ::k]", "test_soho.py::test_mismatched_texts_are_another_pictures"),
    # --- vilta.py
    ("vilta-distillation-mean-over-words", "vilta.py", "(soft * log_p).sum(1).mean()", "(soft * log_p).mean(1).mean()",
     "test_vilta.py::test_cross_distillation_by_hand"),
    ("vilta-teacher-wakes", "vilta.py", "return super().train(False)", "return super().train(mode)",
     "test_vilta.py::test_the_teacher_is_frozen"),
    ("vilta-positions-from-one", "vilta.py", "return keep_mask.cumsum(1) * keep_mask + 1",
     "return keep_mask.cumsum(1) * keep_mask", "test_golden_vilta.py"),
    ("vilta-image-reads-new-text", "vilta.py", "x, y = text(x, keep_mask, y, None, n), None",
     "x = text(x, keep_mask, y, None, n); y = None", "test_golden_vilta.py"),
    ("vilta-same-stem-is-written", "vilta.py",
     'may_be & ~tables["stop"] & (tables["stem"] != tables["stem"][old][:, None])',
     'may_be & ~tables["stop"]', "test_vilta.py::test_written_captions_by_hand"),
    ("vilta-writing-with-dropout", "vilta.py", "    text.eval()\n", "    text.train()\n",
     "test_vilta.py::test_writing_is_without_dropout_and_leaves_no_trace"),
    ("vilta-probe-reaches-the-encoder", "vilta.py", "states, words = states.detach(), words.detach()",
     "states, words = states, words.detach()", "test_vilta.py::test_what_the_writers_loss_teaches"),
    ("vilta-one-negative-less", "vilta.py", "torch.where(rank >= n, MATCHING", "torch.where(rank >= n - 1, MATCHING",
     "test_vilta.py::test_exact_numbers_of_each_kind"),
    ("vilta-written-ones-fail", "vilta.py", 'masked_scatter(asked, ~found["is_written"])',
     'masked_scatter(asked, found["is_written"])', "test_vilta.py::test_written_pairs_and_those_that_cannot_be"),
    ("vilta-second-picture-like-the-first", "vilta.py", "self.see(pixels[:, i], 1 + i)", "self.see(pixels[:, i], 1)",
     "test_vilta.py::test_a_pair_of_pictures_has_two_types"),
    # --- decoding, metrics
    ("beam-length-without-eos", "decoding.py", "score, slot = (sums / t**alpha)",
     "score, slot = (sums / max(1, t - 1) ** alpha)", "test_eval.py::test_beam_search_against_plain_lists"),
    ("beam-slot-filled-again", "decoding.py", "room -= ended.sum(dim=1, keepdim=True)", "room = room.clone()",
     "test_eval.py::test_a_finished_beam_gives_its_slot_up"),
    ("nucleus-one-too-few", "decoding.py", "p.cumsum(-1) - p >= top_p", "p.cumsum(-1) >= top_p",
     "test_eval_extras.py::test_truncated_sampling_by_hand"),
    ("finished-beam-is-not-free", "decoding.py", "torch.where(is_live[:, :, None], log_p, stay)",
     "torch.where(is_live[:, :, None], log_p, log_p)", "test_decoding.py::test_competing_beams_against_plain_lists"),
    ("end-token-does-not-count", "decoding.py", "is_end.cumsum(1) - is_end.long() == 0", "is_end.cumsum(1) == 0",
     "test_decoding.py::test_up_to_the_first_end"),
    ("reward-of-another-picture", "decoding.py", "[i for i in image_ids for _ in range(k)]",
     "[i for _ in range(k) for i in image_ids]", "test_decoding.py::test_rewarded_samples"),
    ("bleu-unclipped", "eval.py", "+= min(count, most[gram])", "+= count * (most[gram] > 0)",
     "test_eval.py::test_bleu_by_hand"),
    ("cider-unclipped", "eval.py", "np.minimum(weight[element], r) * r", "weight[element] * r",
     "test_eval.py::test_cider_by_hand"),
    ("cider-documents-are-captions", "eval.py", "np.unique(self.image[text] * G + gram) % G", "gram",
     "test_eval.py::test_cider_averages_references_and_counts_images_not_captions"),
    ("advantage-over-all", "eval.py", "- rewards) / (k - 1)", "- rewards) / k",
     "test_decoding.py::test_rewarded_samples", "test_scst.py"),
    ("vqa-own-vote-counts", "eval.py", "(sum(same) - one) / 3", "sum(same) / 3",
     "test_question_metrics.py::test_agreeing_people"),
    ("ties-are-won", "eval.py", "(part > own).sum(0) + (part == own).sum(0) / 2", "(part > own).sum(0) + 0.5",
     "test_question_metrics.py::test_recalls_with_ties_are_counted_one_by_one"),
    # --- batches, samplers, schedule
    ("pad-is-a-target", "data.py", "[[*row, eos] + [-100] * (", "[[*row, eos] + [pad] * (",
     "test_data.py::test_collate_by_hand"),
    ("special-tokens-are-masked", "data.py", "is_selected = (order < share) & may_mask", "is_selected = order < share",
     "test_data.py::test_masked_words_by_share", "test_tden.py::test_labels_of_a_corrupted_sentence"),
    ("labels-of-the-others", "data.py", "ids.masked_fill(~is_selected, -100)", "ids.masked_fill(is_selected, -100)",
     "test_data.py::test_masked_words_by_share"),
    ("every-process-reads-the-same", "data.py", "range(step * self.batch + self.rank,", "range(step * self.batch,",
     "test_data.py::test_every_item_once_per_epoch_at_any_number_of_processes"),
    ("every-epoch-the-same-order", "data.py", "default_rng([self.seed % 2**32, epoch])",
     "default_rng([self.seed % 2**32, 0])", "test_data.py::test_order_changes_with_epoch_and_seed_and_may_be_endless"),
    ("mixture-begins-anew", "mixture.py", "item = part.item(epoch * part.n + index -", "item = part.item(index -",
     "test_mixture.py::test_half_comes_in_two_epochs"),
    ("iou-without-the-edge", "regions.py", "(high - low + 1).clamp(min=0)", "(high - low).clamp(min=0)",
     "test_regions.py::test_overlap_by_hand"),
    ("warmup-from-nought", "common.py", "return (step + 1) / rise if step < rise", "return step / rise if step < rise",
     "test_common.py::test_schedule_by_hand"),
]]  # fmt: skip

# Faults that no test can see: id -> why. The id of a drawn one follows from its file, its function and both lines.
EQUIVALENT = {
    "soho-15aed3": "Dictionary.update runs without gradients as a whole, so what it is given need not be detached",
    "tden-b7b12c": "of the logits an argmax or a draw is taken, integers, through which no gradient flows anyhow",
    "eval-35eb23": "a reference of norm 0 has weights of 0 alone: the share is 0, whatever it is divided by",
}

# ---------------------------------------------------------------------------------------------------------------------
# Drawn: where, by what, and what is left out

# file -> functions and classes whose lines can be drawn
SECTIONS = {
    "tden.py": "Attention FeedForward EncoderBlock UnderstandingBlock GenerationBlock Head AttentionPooler "
               "TokenEmbedding RegionEmbedding TDEN cross_depth corrupt_regions corrupt loss_mlm loss_msg loss_moc "
               "loss_ism loss_answers loss_caption loss_scst second_inputs rows_of counts losses Similarity AnswerHead "
               "Decoder",
    "vcgpt.py": "quick_gelu SelfAttention CrossAttention MLP Block ConvStem CLIPVision GPT2 VCGPT loss_lm loss_scst "
                "Decoder generate",
    "soho.py": "ResidualBlock ResNet Dictionary Mixer TextEmbedding EncoderBlock SOHO normalise valid_cells "
               "sine_positions mismatch corrupt grid same_code loss_mlm loss_mvm loss_words loss_itm loss_answers "
               "rows_of words_of losses answer_head",
    "vilta.py": "quick_gelu Attention VisionBlock TextBlock ConvStem Vision normalise Language text_positions WordHead "
                "answer_head Teacher ViLTA learns_softly writes corrupt other_captions rewritable write "
                "write_negatives loss_mlm soft_labels loss_itm loss_rank loss_answers rows_of start_of losses",
    "decoding.py": "beam_search greedy competing_beams _truncated sample up_to_end rewarded_samples",
    "eval.py": "_ngram_counts _bleu_counts _bleu_values bleu bleu_per_image _lcs rouge_l _ranges _find CiderD "
               "CiderReward advantage caption_metrics vqa_forms vqa_accuracy class_accuracy nlvr2_metrics vcr_metrics "
               "_places recalls shuffled best_constant_caption",
    "data.py": "pad_texts pad_regions pad_captions whole_captions mask_words first_of exchange words_said pieces_of "
               "equal_pieces picture_numbers TrainBatches eval_indices soft_scores _cut",
    "mixture.py": "Part Mixture",
    "regions.py": "iou with_global of_batch join_objects",
    "common.py": "adamw linear_schedule schedule",
}  # fmt: skip

TESTS = {  # file, or file and function -> what meets the faults that are drawn there, the quickest first
    "tden.py": ("test_golden_tden.py", "test_tden.py"),
    "vcgpt.py": ("test_golden_vcgpt.py", "test_vcgpt.py", "test_scst.py"),
    "soho.py": ("test_golden_soho.py", "test_soho.py"),
    "vilta.py": ("test_golden_vilta.py", "test_vilta.py"),
    "decoding.py": ("test_decoding.py", "test_eval.py", "test_scst.py"),
    "eval.py": ("test_question_metrics.py", "test_eval.py", "test_golden_metrics.py"),
    "data.py": ("test_shapes.py", "test_data.py", "test_tden.py"),
    "mixture.py": ("test_mixture.py",),
    "regions.py": ("test_regions.py", "test_golden_tden.py"),
    "common.py": ("test_common.py", "test_data.py"),
    # functions whose tests are elsewhere
    "decoding.py sample": ("test_decoding.py", "test_eval.py", "test_eval_extras.py"),
    "decoding.py _truncated": ("test_eval.py", "test_eval_extras.py"),
    "data.py _cut": ("test_benchmarks.py",),
    "data.py soft_scores": ("test_benchmarks.py",),
    "data.py pad_regions": ("test_regions.py", "test_tden.py"),
    "data.py first_of": ("test_words.py", "test_vilta.py"),
    "data.py exchange": ("test_vilta.py",),
    "data.py words_said": ("test_soho.py", "test_vilta.py"),
    "data.py equal_pieces": ("test_data.py", "test_soho.py"),
}

SWAPS = {" + ": " - ", " - ": " + ", " * ": " / ", " / ": " * ", " < ": " <= ", " <= ": " < ", " > ": " >= ",
         " >= ": " > ", " == ": " != ", " != ": " == ", " and ": " or ", " or ": " and ", ".mean(": ".sum(",
         ".sum(": ".mean(", ".max(": ".min(", ".min(": ".max(", ".amax(": ".amin(", ".amin(": ".amax(",
         ".argmax(": ".argmin(", ".argmin(": ".argmax(", "=True": "=False", "=False": "=True", "min(": "max(",
         "max(": "min(", "1": "0", "0": "1", "-1": "0"}  # fmt: skip


def swapped(found: re.Match) -> str:
    return SWAPS[found[0]]


OPERATORS = {  # name -> a regular expression over a line, what stands for the match
    "plus or minus": (r"(?<=[\w)\]]) [+-] (?=\S)", swapped),
    "times or over": (r"(?<=[\w)\]]) [*/] (?=\S)", swapped),
    "edge of a comparison": (r" (?:<=|>=|<|>) ", swapped),
    "equal or not": (r" (?:==|!=) ", swapped),
    "not dropped": (r"\bnot (?!in\b)", lambda found: ""),
    "mask turned": (r"~(?=\w)", lambda found: ""),
    "and or or": (r" (?:and|or) ", swapped),
    "axis": (r"(?:(?<=dim=)|(?<=axis=)|(?<=cumsum\()|(?<=softmax\()|(?<=sum\()|(?<=any\()|(?<=argmax\()|(?<=mean\()"
             r"|(?<=amax\()|(?<=argmin\())(?:-1|[01])(?=[,)])", swapped),
    "constant": (r"(?<![\w.:\[-])[01](?![\w.:\]])", swapped),
    "index": (r"(?<=\[)-?[01](?=\])|(?<=, )-?[01](?=\])", swapped),
    "twice": (r"(?<![\w.])(?!0\.0\b)\d+\.\d+(?![\w.])", lambda found: repr(2 * float(found[0]))),
    "detach dropped": (r"\.detach\(\)", lambda found: ""),
    "mean or sum": (r"\.(?:mean|sum)\(", swapped),
    "least or most": (r"\.(?:max|min|amax|amin|argmax|argmin)\(|(?<![\w.])(?:max|min)\(", swapped),
    "default": (r"(?<=\w)=(?:True|False)\b", swapped),
    "slice": (r"(?<=[\[ ])1(?=:[^:])|(?<=:)-1(?=[\],])", lambda found: {"1": "0", "-1": "-2"}[found[0]]),
}  # fmt: skip

# Options that choose how, not what: a check that two lists are of one length, memory, threads of a copy.
HOW = re.compile(r"\b(?:strict|persistent|non_blocking|keepdim|inplace|fused|pin)=\w+")


def hidden(text: str) -> list[str]:
    """The lines of a source with blanks where a change cannot show: comments, strings, types, raise, assert, print,
    decorators, and the options of HOW."""
    lines = text.splitlines()
    spans = []  # (line, column) from, to; lines from 1 on, columns in characters

    def add(node):
        start = len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
        end = len(lines[node.end_lineno - 1].encode()[: node.end_col_offset].decode())
        spans.append(((node.lineno, start), (node.end_lineno, end)))

    for node in ast.walk(ast.parse(text)):
        is_print = isinstance(node, ast.Expr) and getattr(getattr(node.value, "func", None), "id", "") == "print"
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr) or is_print:
            add(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            add(node)
        types = [getattr(node, name, None) for name in ("annotation", "returns")]
        for part in [*types, *getattr(node, "decorator_list", [])]:
            if isinstance(part, ast.AST):
                add(part)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            spans.append((token.start, token.end))
    for (first, start), (last, end) in spans:
        for number in range(first, last + 1):
            line = lines[number - 1]
            a, b = start if number == first else 0, end if number == last else len(line)
            lines[number - 1] = line[:a] + " " * (b - a) + line[b:]
    return [HOW.sub(lambda found: " " * len(found[0]), line) for line in lines]


@functools.cache
def places(root: Path = ROOT) -> dict[str, list[Fault]]:
    """Every fault that can be drawn, by operator; where two operators say the same, the first one's alone."""
    found: dict[str, list[Fault]] = {name: [] for name in OPERATORS}
    for file, names in SECTIONS.items():
        text = (root / file).read_text()
        shown, lines = hidden(text), text.splitlines()
        tops = {node.name: node for node in ast.parse(text).body if hasattr(node, "name")}
        for name in names.split():
            top, known = tops[name], set()
            for number in range(top.lineno, top.end_lineno + 1):
                old = lines[number - 1]
                nth = lines[top.lineno - 1 : number].count(old)  # of equal lines
                for operator, (pattern, change) in OPERATORS.items():
                    for match in re.finditer(pattern, shown[number - 1]):
                        new = old[: match.start()] + change(match) + old[match.end() :]
                        if (number, new) in known:
                            continue
                        known.add((number, new))
                        code = hashlib.sha256("\n".join((file, name, old, new, str(nth))).encode()).hexdigest()[:6]
                        tests = TESTS.get(f"{file} {name}", TESTS[file])
                        found[operator].append(Fault(f"{file[:-3]}-{code}", file, old, new, tests, number, operator))
    return {operator: faults for operator, faults in found.items() if faults}


def compiles(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def drawn(n: int, seed: int, root: Path = ROOT) -> list[Fault]:
    """`n` faults: an operator, each as probable, then one of its places; none twice, and none that does not compile."""
    luck, left = random.Random(seed), {name: list(faults) for name, faults in places(root).items()}
    found: list[Fault] = []
    while len(found) < n and left:
        operator = luck.choice(sorted(left))
        fault = left[operator].pop(luck.randrange(len(left[operator])))
        if not left[operator]:
            del left[operator]
        if compiles(planted(fault, (root / fault.file).read_text())):
            found.append(fault)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Planting and testing


def copied(folder: Path) -> Path:
    """The repository's files in a folder of their own; what lies beside it, as reference files do, is linked."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True,
                            check=True).stdout.decode()  # fmt: skip
    copy = folder / "copy"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return copy


# A process that has imported what is heavy and never changes forks one for each run of pytest: of a narrow test most of
# the time would go into imports. Without .pyc files: of two versions of a line, equally long and written within a
# second, the first would be read.
HEAVY = ("hypothesis", "numpy", "PIL.Image", "pytest", "safetensors.torch", "tokenizers", "torch", "transformers")
SERVER = """
import importlib, json, os, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
for line in sys.stdin:
    arguments, told = json.loads(line)
    child = os.fork()
    if not child:
        os.setsid()
        out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for ours, theirs in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (out, 2)):
            os.dup2(ours, theirs)
        import pytest
        sys.exit(int(pytest.main(arguments)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def server(copy: Path) -> subprocess.Popen:
    """It ends with this process, which holds its input."""
    return subprocess.Popen([sys.executable, "-B", "-c", SERVER, *HEAVY], cwd=copy, stdin=subprocess.PIPE, bufsize=0,
                            stdout=subprocess.PIPE, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip


def tested(copy: Path, tests, limit: float, deselected=()) -> tuple[str, float, str]:
    """Pytest up to the first red test -> ("" or what went red, seconds, the end of what it printed)."""
    process, told = server(copy), copy.parent / "told.txt"
    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(copy)]
    options += [word for test in deselected for word in ("--deselect", f"tests/{test}")]
    order = json.dumps([options + [f"tests/{test}" for test in tests], str(told)])
    started = time.perf_counter()
    process.stdin.write(order.encode() + b"\n")
    child = int(process.stdout.readline())
    is_late = not select.select([process.stdout], [], [], limit)[0]
    if is_late:
        os.killpg(child, signal.SIGKILL)
    code, seconds = int(process.stdout.readline()), time.perf_counter() - started
    if is_late:
        return f"time limit of {limit:.0f} s", seconds, ""
    text = told.read_text(errors="replace")
    if code == 0:
        return "", seconds, text[-3000:]
    if code not in (1, 2):
        raise SystemExit(f"pytest ended with {code} on {' '.join(tests)}:\n{text[-3000:]}")
    red = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", text, re.M)
    return red[1] if red else "collection", seconds, text[-3000:]


def try_out(fault: Fault, copy: Path, limit: float, deselected=()) -> dict:
    """The fault planted in the copy, tested, and taken out again."""
    file = copy / fault.file
    text = file.read_text()
    try:
        file.write_text(planted(fault, text))
        red, seconds, _ = tested(copy, fault.tests, limit, deselected)
    finally:
        file.write_text(text)
    return {**asdict(fault), "caught_by": red, "seconds": round(seconds, 1)}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="ID", help="these alone, handwritten or drawn")
    parser.add_argument("--drawn", type=int, default=0, help="how many are drawn beside the handwritten ones")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--no-handwritten", action="store_true", help="the drawn ones alone")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are tested beside one another")
    parser.add_argument("--limit", type=float, default=300, help="seconds for the tests of a fault; beyond: caught")
    parser.add_argument("--deselect", nargs="+", default=[], metavar="TEST",
                        help="FILE::TEST, left out: red without any fault")
    parser.add_argument("--no-check", action="store_true", help="without a first run of the unchanged tests")
    parser.add_argument("--list", action="store_true", help="show what is chosen, and run nothing")
    parser.add_argument("--out", type=Path, help="a JSON file for the results, written as they come")
    args = parser.parse_args(argv)

    faults = [] if args.no_handwritten else list(FAULTS)
    if args.drawn:
        print(f"seed {args.seed}: {args.drawn} drawn of {sum(map(len, places().values())):,} places")
        faults += drawn(args.drawn, args.seed)
    if unknown := set(args.only) - {fault.id for fault in faults}:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; drawn ones need their --drawn and --seed")
    faults = [fault for fault in faults if not args.only or fault.id in args.only]
    if args.list:
        for fault in faults:
            place = f"{fault.file}:{fault.line}" if fault.line else fault.file
            print(f"{fault.id}  {place}  {fault.operator}\n  - {fault.old.strip()}\n  + {fault.new.strip()}")
        return 0

    results = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = queue.Queue()
        for k in range(args.jobs):
            (Path(folder) / str(k)).mkdir()
            copies.put(copied(Path(folder) / str(k)))
        if not args.no_check:
            tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
            tests = [test for test in tests if "::" not in test or test.split("::")[0] not in tests]
            copy = copies.get()
            red, seconds, tail = tested(copy, tests, 3600, args.deselect)
            copies.put(copy)
            if red:
                print(f"without any fault {red} is red; mend that first\n{tail}")
                return 2
            print(f"the unchanged tests are green, {seconds:.0f} s", flush=True)

        def run(fault):
            copy = copies.get()
            try:
                return try_out(fault, copy, args.limit, args.deselect)
            finally:
                copies.put(copy)

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for future in concurrent.futures.as_completed([pool.submit(run, fault) for fault in faults]):
                one = future.result()
                results.append(one)
                told = f"caught by {one['caught_by']}" if one["caught_by"] else "SURVIVED"
                print(f"{one['id']:42} {told}, {one['seconds']:.0f} s", flush=True)
                if args.out:
                    found = {"seed": args.seed, "drawn": args.drawn, "results": results}
                    args.out.write_text(json.dumps(found, indent=1))

    survivors = [one for one in results if not one["caught_by"]]
    late = sum(one["caught_by"].startswith("time limit") for one in results)
    print(f"caught {len(results) - len(survivors)} of {len(results)} ({late} of them by the time limit)")
    for one in survivors:
        print(f"survived: {one['id']}  {one['file']}{':' + str(one['line']) if one['line'] else ''}"
              f"\n  - {one['old'].strip()}\n  + {one['new'].strip()}")  # fmt: skip
        if one["id"] in EQUIVALENT:
            print(f"  known: {EQUIVALENT[one['id']]}")
    return int(any(one["id"] not in EQUIVALENT for one in survivors))


if __name__ == "__main__":
    sys.exit(main())
