"""tools/doctor.py finds planted faults, says where, and has nothing to say of the files as they are."""

import dataclasses
import re

import pytest
from papers import PAPERS, ROOT

from common import UserError
from tools import doctor

pytestmark = pytest.mark.usefixtures("one_thread")


def changed(tmp_path, paper: str, old: str, new: str):
    """A copy of a model file with one line changed."""
    source = (ROOT / f"{paper}.py").read_text()
    assert source.count(old) == 1, f"{source.count(old)} times in {paper}.py: {old}"
    path = tmp_path / f"my_{paper}.py"
    path.write_text(source.replace(old, new))
    return path


MASKS = "shown, mlm_labels = data.mask_words(ids, may_mask, tok.mask, cfg.vocab_size, cfg.word_mask, luck)\n"
RATE = "rest = dict(params=rest, lr=cfg.lr, peak=cfg.lr)"
# check, paper, line, what stands in its place, what is said of it, where to look
FAULTS = {
    "no causal mask": (
        "leaks", "vcgpt", '"gelu_new", cfg.dropout, causal=True, cross=cross)',
        '"gelu_new", cfg.dropout, causal=False, cross=cross)', "a later word changes the logits",
        "SelfAttention.forward"),
    "the decoder sees all words": (
        "leaks", "tden", "causal = whole.tril()", "causal = whole", "a later word changes the msg",
        "Attention.forward"),
    "padding of texts": (
        "leaks", "tden", "whole = keep[:, None, None].expand(", "whole = torch.ones_like(keep)[:, None, None].expand(",
        "what stands in the padding", "Attention.forward"),
    "padding of regions": (
        "leaks", "tden", 'block(v, batch["region_keep_mask"][:, None, None])', "block(v, None)",
        "what stands in the padding", "Attention.forward"),
    "padding of pictures": (
        "leaks", "soho", "keep = torch.cat([keep_mask, visual_keep_mask], dim=1)[:, None, None]",
        "keep = torch.cat([keep_mask, torch.ones_like(visual_keep_mask)], dim=1)[:, None, None]",
        "what stands in the padding", "EncoderBlock.forward"),
    "the mean over padding": (
        "leaks", "vilta", "x = self.word(ids) + self.position(text_positions(keep_mask)) + self.segment.weight[0]",
        "x = self.word(ids) + self.position(text_positions(keep_mask)) + self.segment.weight[0] * ids.size(1)",
        "how long the padding is", "ViLTA"),
    "a mean over the batch": (
        "leaks", "vcgpt", "v = self.project(v)  # V0, [B, N, D]", "v = self.project(v) + v.mean(0)",
        "another sample changes logits", "VCGPT.encode_image"),
    "a mean over the batch, k texts": (
        "leaks", "vilta", "return self.text_transform(states) + self.types.weight[0]",
        "return self.text_transform(states) + self.types.weight[0] + states.mean(0)", "another sample changes",
        "ViLTA."),
    "detached": (
        "gradients", "tden", "g = self.generate(g, self.memory(memory), causal, seen)",
        "g = self.generate(g, self.memory(memory), causal, seen).detach()",
        "cross_decoder.0.cross_att.kv.bias gets no gradient in pretrain", "Attention"),
    "never reached": (
        "gradients", "vilta", "self.image_transform, self.text_transform = nn.Linear(cfg.vision_width, D), "
        "nn.Linear(cfg.text_width, D)", "self.image_transform, self.text_transform = nn.Linear(cfg.vision_width, D), "
        "nn.Linear(cfg.text_width, D); self.extra = nn.Linear(D, D)",
        "extra.bias gets no gradient in pretrain.* or any task", "ViLTA"),
    "no group": (
        "gradients", "soho", RATE, RATE.replace("params=rest", "params=rest[1:]"),
        r"project.weight is in 0 optimizer groups", "Optimizers"),
    "targets of others": (
        "overfit", "vcgpt", "return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)",
        "return F.cross_entropy(logits.float(), targets[torch.randperm(len(targets))])", "80 steps on one batch leave",
        "train"),
    "half the words": ("masks", "tden", "cfg.vocab_size, cfg.word_mask, luck)",
                       "cfg.vocab_size, cfg.word_mask / 2, luck)", "^words hidden: 0.07", "corrupt"),
    "all shown as the mask": (
        "masks", "soho", MASKS, MASKS.strip() + "; shown = ids.masked_fill(mlm_labels != NOTHING, tok.mask)\n",
        "^of them shown as the mask: 1.000, 0.800 is right", "corrupt"),
    "labels where nothing is masked": (
        "masks", "vilta", '"mlm_labels": labels, "teacher_ids"',
        '"mlm_labels": labels.masked_fill(labels == NOTHING, 0), "teacher_ids"', "labels are neither -100", "corrupt"),
    "special tokens": (
        "masks", "vilta",
        "# HERE[vilta-9] (not in the paper): of a caption of which nothing was drawn one word, whichever",
        "may_mask = keep", "special tokens or padding", "corrupt"),
    "half the mismatched": (
        "masks", "soho", "is_replaced = torch.rand(R, generator=luck) < cfg.mismatched",
        "is_replaced = torch.rand(R, generator=luck) < cfg.mismatched / 2", "^mismatched pairs: 0.2", "corrupt"),
    "its own text": ("masks", "soho", "taken = torch.where(is_replaced, other, torch.arange(len(ids)))",
                     "taken = torch.arange(len(ids))", "texts of their own in mismatched pairs: 1.000", "corrupt"),
    "regions of the padding": (
        "masks", "tden", "is_masked = (torch.rand(seen.shape, generator=luck) < cfg.region_mask) & seen",
        "is_masked = torch.rand(seen.shape, generator=luck) < cfg.region_mask", "regions of the padding", "corrupt"),
    "not saved": (
        "resume", "soho", 'self.register_buffer("embed", torch.randn(cfg.codes, cfg.width))',
        'self.register_buffer("embed", torch.randn(cfg.codes, cfg.width), persistent=False)',
        "saved and loaded changes", "SOHO"),
    "no seed": ("resume", "vcgpt", "torch.manual_seed(seed)  # of dropout", "pass", r"4 steps and 2 \+ --resume",
                "train"),
    "not averaged": ("processes", "vcgpt", "ddp = common.spread(model, cfg, machine, Block)", "ddp = model",
                     "tensors differ between the processes", "train"),
    "half the gradient": ("processes", "vcgpt", "(loss * machine.processes).backward()", "loss.backward()",
                          "is 0.500 times as long", "train"),
}  # fmt: skip


@pytest.mark.parametrize("fault", [pytest.param(f, marks=[pytest.mark.slow] * (FAULTS[f][0] in ("resume", "processes")))
                                   for f in FAULTS])  # fmt: skip
def test_a_planted_fault_is_found_and_its_place_named(tmp_path, capsys, fault):
    check, paper, old, new, said, where = FAULTS[fault]
    path = changed(tmp_path, paper, old, new)
    module, kind = doctor.load(str(path))
    assert kind.name == paper
    found = doctor.examine(module, dataclasses.replace(kind, tasks=kind.tasks[:1]), [check])[check]
    assert any(re.search(said, one) for one in found), found
    one = next(one for one in found if re.search(said, one))
    assert re.search(rf"look at .*{re.escape(where)}.*my_{paper}\.py:\d+", one), one
    assert re.match(rf"{check} +BROKEN ", capsys.readouterr().out)
    if check == "leaks" and "causal" not in old and "mean(0)" not in new:  # of no other kind; these let padding in, too
        assert all(re.search(said, one) for one in found), found


@pytest.mark.parametrize("paper", PAPERS)
def test_the_files_as_they_are(paper, capsys):
    module, kind = doctor.load(str(ROOT / f"{paper}.py"))
    told = doctor.examine(module, dataclasses.replace(kind, tasks=kind.tasks[:1]), ["leaks", "gradients", "masks"])
    assert told == {"leaks": [], "gradients": [], "masks": None if paper == "vcgpt" else []}
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_every_check_of_the_files_as_they_are(paper, capsys):
    assert doctor.main([str(ROOT / f"{paper}.py")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(doctor.CHECKS)
    assert sum(" ok " in line for line in lines) == (5 if paper == "vcgpt" else 6)


def test_places_are_the_right_lines(tmp_path):
    path = changed(tmp_path, "vcgpt", "v = self.project(v)  # V0, [B, N, D]", "v = self.project(v) + v.mean(0)")
    module, kind = doctor.load(str(path))
    found = doctor.leaks(module, dataclasses.replace(kind, tasks=("pretrain",)))
    line = int(re.search(r"my_vcgpt\.py:(\d+)", found[0])[1])
    lines = path.read_text().splitlines()
    fault = next(i for i, text in enumerate(lines, 1) if "v.mean(0)" in text)
    assert 0 < line - fault < 9 and "block(v)" in lines[line - 1], "the first call that is given what leaked"


def test_exit_status(tmp_path, capsys):
    path = changed(tmp_path, "tden", "cfg.vocab_size, cfg.word_mask, luck)", "cfg.vocab_size, cfg.word_mask / 2, luck)")
    assert doctor.main([str(path), "--only", "masks"]) == 1
    assert doctor.main([str(ROOT / "tden.py"), "--only=masks"]) == 0
    assert "masks      BROKEN" in capsys.readouterr().out


def test_a_fault_that_raises_is_a_finding(tmp_path):
    path = changed(tmp_path, "vcgpt", "t = h_gpt2\n", "t = h_gpt2.no_such_thing\n")
    module, kind = doctor.load(str(path))
    found = doctor.examine(module, kind, ["overfit"])["overfit"]
    assert "AttributeError" in found[0] and re.search(r"look at hidden, my_vcgpt\.py:\d+", found[0])


@pytest.mark.parametrize("text, flags, said", [
    ("def broken(:", [], "cannot be imported, line 1: SyntaxError.*mend that first"),
    ("import no_such_module", [], "cannot be imported, line 1: ModuleNotFoundError"),
    ("x = 1", [], "defines none of TDEN, VCGPT, SOHO, ViLTA: say whose copy it is, --like"),
    ("x = 1", ["--like", "tden"], "lacks Config, .*rows_of.* give another --like"),
    ("x = 1", ["--like", "bert"], "--like bert: it is one of tden"),
    ("class SOHO: pass", ["--like", "tden"], "defines SOHO: leave --like out"),
    ("x = 1", ["--only", "leeks"], "did you mean leaks"),
    (None, [], "is no file"),
])  # fmt: skip
def test_what_cannot_be_checked(tmp_path, text, flags, said):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"(?s){said}"):
        doctor.main([str(path), *flags])


def test_a_renamed_class_is_told_by_like(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(re.sub(r"\bTDEN\b", "Mine", (ROOT / "tden.py").read_text()))
    module, kind = doctor.load(str(path), "tden")
    assert kind.name == "tden" and doctor.masks(module, kind) == []
