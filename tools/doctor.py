"""You copied a model file and changed ten lines: what did you break?

    python tools/doctor.py my_tden.py                      six checks on the small world, about a minute
    python tools/doctor.py my_tden.py --only leaks,masks   some of them

    leaks      no later word, padding or other sample changes an output that must not know of it (eval mode)
    gradients  one step of each task reaches every trainable parameter; each is in exactly one optimizer group
    overfit    one batch, its masks too, is learned by heart
    masks      words, regions and mismatched pairs are corrupted as often as Config says, and labelled so
    resume     4 steps are 2 steps and --resume to 4, bit for bit; what is saved gives the same outputs when loaded
    processes  two processes end with equal weights, and take the gradient of one where the losses allow it

The file's own `train` runs, from whichever folder; what it asks of the ground floor (docs/add_a_paper.md, "The contract
of the loop") is where it is watched: `run.go_on` has the optimizer, `common.stop_if_not_finite` the gradients,
`common.Logger.step` the end of a step. Exit status: 0 all is fine, 1 something is broken, 2 the checks cannot run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import inspect
import io
import itertools
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in [str(ROOT)] if path not in sys.path]

import common  # noqa: E402
import data  # noqa: E402
import decoding  # noqa: E402
from common import UserError  # noqa: E402

NOTHING = -100  # the label of what is not to be predicted
TOLERANCE = 3e-5  # what rounding may change
PER_TASK = {"scst": dict(captions_per_image=2), "ve": dict(world="full"), "vcr": dict(max_len=40, max_len_rationale=60)}
COMMON = dict(data="scenes", preset="tiny", train_scenes=40, val_items=2, test_scenes=4, batch=8, captions_per_image=1,
              log_every=1, eval_every=10**6, workers=0, device="cpu", dropout=0.0, max_new=8, gallery=4,
              lm_steps=0, word_steps=0, start_steps=0, lr=2e-3, cnn_lr=2e-3, warmup=0.1)  # fmt: skip


@dataclass
class Kind:
    """What of a family the checks must know; settings that the file's Config lacks are left out."""

    name: str
    network: str  # the class that tells the family
    needs: str  # functions that the checks call, and train, build, check, load_data, main
    sizes: dict  # of a toy network
    tasks: tuple
    free: str = r"(?!)"  # parameters without a gradient by nature: a number added to all that a softmax or a norm takes
    two_phases: dict = field(default_factory=dict)  # settings by which two steps of pre-training are of both its phases
    luck: dict = field(default_factory=dict)  # what makes its training random, beside dropout
    alike: dict = field(default_factory=dict)  # settings under which two processes have one's gradient; {}: none
    share: float = 0.5  # of the first loss that `steps` on one batch leave, at most; wide, measured with several seeds
    steps: int = 80
    rote: dict = field(default_factory=dict)  # settings for that
    causal: dict = field(default_factory=dict)  # task -> its output that tells the next word
    hides_words: bool = True


KINDS = {kind.name: kind for kind in (
    Kind("tden", "TDEN", "rows_of corrupt", dict(width=32, heads=2, mlp=64, pooled=16),
         ("pretrain", "retrieval", "vqa", "vcr", "caption", "scst"),
         causal={"pretrain": "msg", "caption": "logits"}, share=0.15,
         free=r".*\.weigh\.3\.bias|ism\..*\.embed\.bias|answer_head\.u\.1\.bias", alike=dict(task="caption")),
    Kind("vcgpt", "VCGPT", "", dict(width=32, heads=2, mlp=64, vision_width=32, vision_heads=2, fusion_layers=1),
         ("pretrain", "scst"), causal={"pretrain": "logits"}, share=0.3, luck=dict(augment="crop"), hides_words=False,
         alike=dict(task="pretrain")),
    Kind("soho", "SOHO", "rows_of corrupt",
         dict(width=32, heads=2, mlp=64, layers=1, cnn_width=8, codes=16, short_side=32, long_side=32),
         ("pretrain", "retrieval", "vqa", "nlvr2", "ve"), two_phases=dict(word_steps=1), share=0.6),
    Kind("vilta", "ViLTA", "rows_of corrupt write_negatives",
         dict(width=32, heads=2, mlp=64, layers=1, vision_width=32, vision_heads=2, vision_mlp=64, text_width=32,
              text_heads=2, text_mlp=64, text_layers=1, image_size=32),
         ("pretrain", "retrieval", "vqa", "nlvr2", "ve"), free=r"rank_head\.bias", two_phases=dict(start_steps=1),
         luck=dict(augment="rand", caption_noise=0.2), alike=dict(task="vqa", stem="patch"),
         rote=dict(alpha=0.05), share=0.75),
)}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The file, and places in it


def load(file: str, like: str = "") -> tuple:
    """The module at a path and its Kind."""
    path = Path(file).resolve()
    if not path.is_file():
        raise UserError(f"{file} is no file: give the path of a changed copy of {', '.join(KINDS)}.py")
    name = "doctor_" + re.sub(r"\W", "_", str(path.with_suffix("")))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UserError(f"{file} is no Python file: give the path of a changed copy of {', '.join(KINDS)}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        at = error.lineno if isinstance(error, SyntaxError) else frame_of(module, error)[1]
        raise UserError(f"{file} cannot be imported, line {at}: {type(error).__name__}: {error}; mend that first, then "
                        f"`python {file} --help` shows whether it is") from error  # fmt: skip
    defined = [kind for kind in KINDS.values() if hasattr(module, kind.network)]
    if like and like not in KINDS:
        raise UserError(f"--like {like}: it is one of {', '.join(KINDS)}")
    if not like and len(defined) != 1:
        found = "none" if not defined else " and ".join(kind.network for kind in defined)
        raise UserError(f"{file} defines {found} of {', '.join(k.network for k in KINDS.values())}: say whose copy it "
                        f"is, --like {' | '.join(KINDS)}")  # fmt: skip
    kind = KINDS[like] if like else defined[0]
    if defined and kind not in defined:
        raise UserError(f"--like {like}, but {file} defines {defined[0].network}: leave --like out")
    names = f"Config PRESETS RECIPES build check load_data train main {kind.needs}".split()
    if missing := [name for name in names if not hasattr(module, name)]:
        raise UserError(f"{file} lacks {', '.join(missing)}, which a copy of {kind.name}.py has: give another --like, "
                        "or keep these names")  # fmt: skip
    return module, kind


def frame_of(module, error: BaseException) -> tuple[str, int]:
    """The last function of the file, and its line, that an exception passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == module.__file__]
    return (frames[-1].name, frames[-1].lineno) if frames else ("?", 0)


def place(module, name: str, pattern: str = "") -> str:
    """`Class.method, my_tden.py:12` for a name in the file; with a pattern the first line of it that matches."""
    thing = module
    for part in name.split("."):
        thing = getattr(thing, part, None) or module.train
    lines, first = inspect.getsourcelines(thing)
    hits = [i for i, line in enumerate(lines) if pattern and re.search(pattern, line)]
    return f"{thing.__qualname__}, {Path(module.__file__).name}:{first + (hits[0] if hits else 0)}"


def owner_of(module, model, name: str) -> str:
    """Where the file makes the parameter, or the module, of this name: the innermost of its classes around it."""
    found, part = place(module, type(model).__name__), model
    for attribute in name.split("."):
        if type(part).__module__ == module.__name__:
            found = place(module, type(part).__name__, rf"self\.{attribute}\b")
        part = getattr(part, attribute)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Toy runs


class Enough(Exception):
    """A toy run has shown what it was to show."""


def settings(module, kind: Kind, task="pretrain", **more) -> dict:
    names = {one.name for one in dataclasses.fields(module.Config)}
    given = {**COMMON, **kind.sizes, "task": task, **PER_TASK.get(task, {}), **more}
    return {name: value for name, value in given.items() if name in names}


@dataclass
class Trace:
    """What a toy run left: the network, the optimizer, gradients of each update, loss of each step, what the network
    was given (as a dictionary), and `batches`, a loader like the run's."""

    cfg: object = None
    model: object = None
    corpus: object = None
    optimizer: object = None
    grads: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    inputs: list = field(default_factory=list)
    batches: object = None


def practise(module, kind: Kind, steps: int, fixed=False, **more) -> Trace:
    """The file's own `train` for a few steps, watched. fixed: every step has the first one's batch and luck."""
    trace, parts = Trace(), []
    cfg = trace.cfg = common.build_config(module.Config, settings(module, kind, steps=steps, **more), module.PRESETS,
                                          module.RECIPES)  # fmt: skip
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    machine = common.Machine(torch.device("cpu"), torch.float32, rank, world, 0, "toy")
    torch.manual_seed(cfg.seed)
    module.check(cfg)
    trace.corpus = module.load_data(cfg)
    model = trace.model = module.build(cfg, trace.corpus)
    in_order = list(inspect.signature(model.forward).parameters)
    hook = model.register_forward_pre_hook(lambda _, args, named: trace.inputs.append(
        dict(args[0]) if isinstance(args[0], dict) else dict(zip(in_order, args, strict=False)) | named)
        if len(trace.inputs) < 9 else None, with_kwargs=True)  # fmt: skip

    def go_on(_, optimizer):
        trace.optimizer = optimizer
        return 0, -1.0, False

    def updates(*_):
        if not fixed:
            trace.grads.append({name: p.grad if p.grad is None else p.grad.clone()
                                for name, p in model.named_parameters() if p.requires_grad})  # fmt: skip

    def stepped(_, step, *__):
        trace.losses.append(sum(parts))
        parts.clear()
        if step >= cfg.steps:
            raise Enough

    def backward(tensor, *args, original=torch.Tensor.backward, **named):
        parts.append(float(tensor.detach()))
        return original(tensor, *args, **named)

    def loader(*args, original=data.train_loader, **named):
        trace.batches = trace.batches or partial(original, *args, **named)
        one = original(*args, **named)
        return Same(next(iter(one))) if fixed else one

    def rewarded(*args, original=decoding.rewarded_samples):  # an untrained network earns nothing, nothing is learned
        drawn, told = original(*args)
        return drawn | {"advantages": torch.linspace(-1, 1, len(drawn["advantages"]))}, told

    watched = [(common, "stop_if_not_finite", updates), (common.Logger, "step", stepped), (torch.Tensor, "backward",
               backward), (data, "train_loader", loader), (decoding, "rewarded_samples", rewarded)]  # fmt: skip
    if fixed and hasattr(module, "rows_of"):
        found, rows_of = [], module.rows_of

        def once(*args, **named):
            found.extend([] if found else [rows_of(*args, **named)])
            return dict(found[0])

        watched.append((module, "rows_of", once))
    run = SimpleNamespace(path=Path(tempfile.gettempdir()) / "no-run", go_on=go_on, log=lambda _: None)
    with contextlib.ExitStack() as stack:
        for owner, name, instead in watched:
            stack.enter_context(mock.patch.object(owner, name, instead))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.suppress(Enough))
        module.train(cfg, model, trace.corpus, machine, run)
    hook.remove()
    return trace


class Same:
    """A loader that gives one batch for ever."""

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        while True:
            yield dict(self.batch)

    def judge(self, _):
        pass


def call(model, rows: dict) -> dict:
    """{output: tensor} of the network for inputs as `practise` noted them."""
    takes_all = "batch" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        out = model(dict(rows)) if takes_all else model(**rows)
    return {name: x.float() for name, x in out.items()} if isinstance(out, dict) else {"logits": out.float()}


# ---------------------------------------------------------------------------------------------------------------------
# Leaks


def first_seen(module, model, before: dict, after: dict, differs, ready=lambda _: None) -> str:
    """Where in the file the difference of two inputs first stands where it must not: the line that was running when a
    module was called with it or gave it. differs(a, b) -> by how much the tensors differ where they must not.
    ready: is told which of the two comes, 0 or 1."""

    def frame() -> str:
        at = sys._getframe(1)
        while at and at.f_code.co_filename != module.__file__:
            at = at.f_back
        name = at and getattr(at.f_code, "co_qualname", at.f_code.co_name)
        return f"{name}, {Path(module.__file__).name}:{at.f_lineno}" if at else place(module, type(model).__name__)

    def events(number, rows):
        ready(number)
        found, hooks = [], []
        for name, part in model.named_modules():
            is_ours = type(part).__module__ == module.__name__
            made = place(module, f"{type(part).__name__}.forward") if is_ours else ""

            def hear(_, args, named, out=None, name=name, made=made):
                given = [*args, *named.values()] if out is None else out if isinstance(out, (list, tuple)) else [out]
                tensors = [x.clone() for x in given if isinstance(x, torch.Tensor) and x.is_floating_point()]
                found.append((name, frame() if out is None or not made else made, tensors))

            hooks += [part.register_forward_pre_hook(hear, with_kwargs=True),
                      part.register_forward_hook(hear, with_kwargs=True)]  # fmt: skip
        call(model, rows)
        for hook in hooks:
            hook.remove()
        return found

    for (name, where, xs), (_, _, ys) in zip(events(0, before), events(1, after), strict=False):
        if any(x.shape == y.shape and differs(x, y) > TOLERANCE for x, y in zip(xs, ys, strict=False)):
            return f"{where}" + f" ({name})" * bool(name)
    return place(module, type(model).__name__)


def texts_of(rows: dict) -> list[tuple[list[str], torch.Tensor]]:
    """[(names of ids [R, T], which of them are real [R, T])] of a network's inputs."""
    found = []
    for prefix in ("", "itm_"):
        names = [name for name in ((prefix + "ids",) if prefix else ("ids", "u_ids", "g_ids", "teacher_ids"))
                 if name in rows]  # fmt: skip
        keep = rows.get(prefix + "keep_mask", rows["targets"] != NOTHING if "targets" in rows else None)
        found += [(names, keep)] if names else []
    return found


def owners(name: str, x, rows: dict, n: int):
    """The sample, of n, that each row of an output is of; None where that cannot be told."""
    for label in (f"{name}_labels", "mlm_labels", "targets", "region_is_masked"):
        if label in rows and not rows[label].is_floating_point():
            chosen = rows[label] if rows[label].dtype == torch.bool else rows[label] != NOTHING
            if int(chosen.sum()) == len(x):
                return chosen.nonzero()[:, 0] // (len(chosen) // n)
    return torch.arange(len(x)) // (len(x) // n) if len(x) % n == 0 and not name.startswith("mvm") else None


def leaks(module, kind: Kind) -> list[str]:
    found = []
    for task in kind.tasks:
        if task == "scst":  # its forward pass is captioning's
            continue
        more = dict(captions_per_image=2) if task in ("pretrain", "caption") else {}
        trace = practise(module, kind, 1, task=task, **more)
        model, rows = trace.model.eval(), trace.inputs[0]
        told = partial(f"{task}: {{}}; look at {{}}".format)
        for check in (later_words, padding, other_samples):
            number, why, where = check(module, kind, model, rows, task) or (0, "", "")
            if number > TOLERANCE:
                found.append(told(why.format(f"{number:.1e}"), where))
    return found


def later_words(module, kind, model, rows, task):
    if task not in kind.causal:
        return None
    name, worst = kind.causal[task], 0.0
    labels = rows[f"{name}_labels" if f"{name}_labels" in rows else "targets"]
    names, T = texts_of(rows)[0][0], labels.size(1)
    if getattr(model.cfg, "decoder_memory", "") == "understanding":  # the picture's side has read the sentence
        names = ["g_ids"]
    before, at = call(model, rows)[name], (labels != NOTHING).nonzero()[:, 1]
    for t in (1, T // 2):
        moved = rows | {n: torch.where(torch.arange(T) > t, (rows[n] + 1) % model.cfg.vocab_size, rows[n])
                        for n in names}  # fmt: skip
        worst = max(worst, float((call(model, moved)[name] - before)[at <= t].abs().max()))
    where = ""
    if worst > TOLERANCE:
        shown = moved if len(names) == 1 else moved | {"u_ids": rows["u_ids"]}
        where = first_seen(module, model, rows, shown, lambda a, b: float((a - b)[:, : t + 1].abs().max())
                           if a.ndim == 3 and a.size(1) == T else 0.0)  # fmt: skip
    return worst, f"a later word changes the {name} of an earlier one by {{}}", where


def padding(module, kind, model, rows, task):
    """Anything in the padding, and three more columns of it."""
    moved, masks, see = dict(rows), {}, getattr(model, "see", None)

    def loud(*args):
        out = see(*args)
        masks[out["keep_mask"][0].numel()] = out["keep_mask"].flatten(1)
        noise = torch.linspace(-1, 1, out["tokens"].size(1))[:, None, None] * loud.value  # a norm would take a constant
        return out | {"tokens": torch.where(out["keep_mask"][:, None], out["tokens"], noise)}

    for names, keep in texts_of(rows):
        masks[keep.size(1)] = keep
        for name in names:
            moved[name] = torch.where(keep, rows[name], 7)
    if "region_keep_mask" in rows:  # two more regions, which are padding
        rows = dict(rows)
        for name in ("features", "locations", "region_keep_mask", "region_is_masked", "moc_targets"):
            if name in rows:
                rows[name] = torch.cat([rows[name], torch.zeros_like(rows[name][:, :1]).repeat_interleave(2, 1)], 1)
        seen = rows["region_keep_mask"]
        masks.setdefault(seen.size(1), seen)
        moved |= rows | {n: x for n, x in moved.items() if "ids" in n}
        moved |= {name: torch.where(seen[:, :, None], rows[name], 9.0) for name in ("features", "locations")}
    if "sizes" in rows:  # cells beyond the picture, and what the network makes of them
        rows = rows | {"pixels": torch.nn.functional.pad(rows["pixels"], (0, 0, 0, 32))}
        moved["pixels"] = torch.nn.functional.pad(moved["pixels"], (0, 0, 0, 32), value=77)

        model.see = loud
    longer, real = dict(moved), {}
    for names, keep in texts_of(rows):
        for name, x in moved.items():
            if x.shape == keep.shape and not name.startswith("region"):
                fill = 7 if name in names else NOTHING if name.endswith(("labels", "targets")) else 0
                longer[name] = real[name] = torch.nn.functional.pad(x, (0, 3), value=fill)
    try:
        found = []
        for value, one in ((0.0, rows), (9.0, moved), (9.0, longer)):
            loud.value = value
            found.append(call(model, one))
        worst = [max(float((x - found[0][name]).abs().max()) if x.shape == found[0][name].shape else math.inf
                     for name, x in out.items() if x.numel()) for out in found[1:]]  # fmt: skip

        def differs(a, b):
            if a.ndim != 3:
                return 0.0
            candidates = [masks[a.size(1)]] if a.size(1) in masks else []
            for m, n in itertools.permutations(masks, 2):
                if m + n == a.size(1) and len(masks[m]) and len(masks[n]):
                    rows_in = max(len(masks[m]), len(masks[n]))
                    candidates.append(torch.cat([masks[k].repeat_interleave(rows_in // len(masks[k]), 0)
                                                 for k in (m, n)], dim=1))  # fmt: skip
            change = (a - b).abs().amax(2)
            return min((float(change[keep.repeat(len(a) // len(keep), 1)].max()) for keep in candidates
                        if len(a) % len(keep) == 0), default=0.0)  # fmt: skip

        where = ""
        if max(worst) > TOLERANCE:
            where = first_seen(module, model, rows, moved, differs, lambda i: setattr(loud, "value", 9.0 * i))
    finally:
        if "sizes" in rows:
            del model.see
    what = "what stands in the padding" if worst[0] > TOLERANCE else "how long the padding is"
    return max(worst), f"{what} changes outputs of real positions by {{}}", where


def other_samples(module, kind, model, rows, task):
    n = len(rows["pixels"] if "pixels" in rows else rows["features"])
    moved = dict(rows)
    for name in ("pixels", "features"):
        if name in rows:
            moved[name] = rows[name].clone()
            moved[name][-1] = 255 - rows[name][-1] if name == "pixels" else rows[name][-1] + 1
    for names, keep in texts_of(rows):
        is_last = (torch.arange(len(keep)) // (len(keep) // n) == n - 1)[:, None]
        for name in names:
            moved[name] = torch.where(is_last & keep, (rows[name] + 1) % model.cfg.vocab_size, rows[name])
    before, after, worst, which = call(model, rows), call(model, moved), 0.0, ""
    for name, x in before.items():
        of = owners(name, x, rows, n)
        if of is not None and (of < n - 1).any() and after[name].shape == x.shape:
            change = float((after[name] - x)[of < n - 1].abs().max())
            worst, which = max((worst, which), (change, name))
    where = ""
    if worst > TOLERANCE:
        def differs(a, b):
            if a.ndim < 2 or len(a) % n or a.shape != b.shape:
                return 0.0
            change = (a - b).flatten(1).abs().amax(1)
            of = [torch.arange(len(a)) // (len(a) // n), torch.arange(len(a)) % n]  # rows of a sample side by side, or
            return min(float(change[one < n - 1].max()) for one in of)  # copies of the batch one after the other

        where = first_seen(module, model, rows, moved, differs)
    return worst, f"another sample changes {which} by {{}}", where


# ---------------------------------------------------------------------------------------------------------------------
# Gradients, learning, masks


def gradients(module, kind: Kind) -> list[str]:
    found, dead, reached = [], {}, set()
    for task in kind.tasks:
        phases = kind.two_phases if task == "pretrain" else {}
        trace = practise(module, kind, 2 if phases else 1, task=task, **phases)
        model, makes = trace.model, next((n for n in ("make_optimizer", "Optimizers") if hasattr(module, n)), "train")
        alive = {name for grads in trace.grads for name, g in grads.items() if g is not None and bool((g != 0).any())}
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        reached |= alive
        for name in sorted(names - alive):
            if not re.fullmatch(kind.free, name):
                dead.setdefault(name, (model, []))[1].append(task)
        several = [x for v in vars(trace.optimizer).values() for x in (v if isinstance(v, list) else [v])]
        optimizers = {id(o): o for o in [trace.optimizer, *several] if isinstance(o, torch.optim.Optimizer)}.values()
        held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
        for name, p in model.named_parameters():
            if held.count(id(p)) != int(p.requires_grad):
                found.append(f"{task}: {name} is in {held.count(id(p))} optimizer groups, "
                             f"{'1' if p.requires_grad else 'frozen, 0'} is right; look at {place(module, makes)}")
    for name, (model, tasks) in dead.items():
        found.append(f"{name} gets no gradient in {', '.join(tasks)}" + " or any task" * (name not in reached)
                     + f"; look at {owner_of(module, model, name)}")  # fmt: skip
    return found if len(found) < 9 else [*found[:8], f"... and {len(found) - 8} more"]


def overfit(module, kind: Kind) -> list[str]:
    losses = practise(module, kind, kind.steps, fixed=True, **kind.rote).losses
    share = sum(losses[-3:]) / 3 / losses[0]
    if share < kind.share:
        return []
    losses_of = "losses" if hasattr(module, "losses") else "train"
    return [f"{kind.steps} steps on one batch leave {share:.2f} of the loss ({losses[0]:.3f} to {losses[-1]:.3f}), "
            f"less than {kind.share} is usual; look at {place(module, losses_of)}, or the learning rate"]


def masks(module, kind: Kind) -> list[str] | None:
    """Many draws of the same pictures; a share is broken where it is 5 standard deviations off, and 0.3 %."""
    if not kind.hides_words:
        return None
    trace = practise(module, kind, 1, captions_per_image=2, batch=16)
    plain, tok = dataclasses.replace(trace.cfg, **dict.fromkeys(
        {"mismatched", "caption_noise"} & set(vars(trace.cfg)), 0.0)), trace.model.tokenizer  # fmt: skip
    batch, counts, wrong = next(iter(trace.batches())), {}, {}
    ids, keep = data.whole_captions(batch, tok.pad)
    may, k = keep & (ids != tok.bos) & (ids != tok.eos), len(ids) // len(batch["image_id"])
    numbers = data.picture_numbers(batch, k)
    corrupt = place(module, "corrupt")

    def rows_of(cfg, draw):
        named = dict(batch=dict(batch), task="pretrain", tok=tok, cfg=cfg, luck=torch.Generator().manual_seed(draw))
        return module.rows_of(*[named[name] for name in inspect.signature(module.rows_of).parameters])

    def add(name, hits, n, expected):
        old = counts.get(name, (0, 0, 0.0))
        counts[name] = (old[0] + int(hits), old[1] + int(n), old[2] + float(expected) * int(n))

    def never(name, number, what):
        wrong[name] = (wrong.get(name, (0, ""))[0] + int(number), what)

    at_least_one = kind.name == "vilta"
    n_words = may.sum(1)
    share = plain.word_mask + ((1 - plain.word_mask) ** n_words / n_words * at_least_one)
    for draw in range(100):
        rows = rows_of(plain, draw)
        shown, labels = rows["u_ids" if "u_ids" in rows else "ids"], rows["mlm_labels"]
        chosen, is_mask = labels != NOTHING, shown == tok.mask
        add("words hidden", (chosen & may).sum(), may.sum(), (share * n_words).sum() / may.sum())
        add("of them shown as the mask", (chosen & is_mask).sum(), chosen.sum(), 0.8)
        add("of them shown as they are", (chosen & (shown == ids)).sum(), chosen.sum(), 0.1 + 0.1 / plain.vocab_size)
        never("special", (chosen & ~may).sum(), "special tokens or padding have a label of MLM")
        never("unlabelled", ((shown != ids) & ~chosen).sum(), "words are changed without a label (-100 means none)")
        never("labels", ((labels != ids) & chosen).sum(), "labels are neither -100 nor the true word")
        if "msg_labels" in rows:
            wanted = torch.nn.functional.pad(ids[:, 1:].masked_fill(~keep[:, 1:], NOTHING), (0, 1), value=NOTHING)
            never("next", (rows["msg_labels"] != wanted).sum(), "labels of MSG are not the next words, -100 elsewhere")
        if "region_is_masked" in rows:
            real, hidden = rows["region_keep_mask"][:, 1:], rows["region_is_masked"]
            add("regions hidden", (hidden & real).sum(), real.sum(), plain.region_mask)
            never("regions", (hidden & ~real).sum(), "regions of the padding are to be told")
            never("shown", (rows["features"][:, 1:][hidden] != 0).any(-1).sum(), "hidden regions show their features")
        rows = rows_of(trace.cfg, draw)
        matches = rows["itm_labels"] > 0 if "itm_labels" in rows else rows["kinds"] == 0 if "kinds" in rows else None
        if matches is not None:
            add("mismatched pairs", (~matches).sum(), len(matches), trace.cfg.mismatched)
            whose = rows["itm_ids"] if "itm_ids" in rows else rows_of(
                dataclasses.replace(trace.cfg, word_mask=0.0), draw)["ids"]  # fmt: skip
            own = (whose[:, None] == ids[None]).all(2) & (numbers[:, None] == numbers[None])
            is_other = ~matches if "kinds" not in rows else rows["kinds"] == 2
            never("matching", (matches & ~own.any(1)).sum(), "pairs called matching have another picture's text")
            add("texts of their own in mismatched pairs", (is_other & own.any(1)).sum(), is_other.sum(), 0.0)
            if not getattr(trace.cfg, "mlm_on_negatives", True):
                never("negatives", (rows["mlm_labels"][~matches] != NOTHING).sum(), "words of mismatched pairs count")
        if "kinds" in rows and module.writes(trace.cfg):
            add("of mismatched pairs written", (rows["kinds"] == 1).sum(), (~matches).sum(), trace.cfg.syn_ratio)
        if "has_mvm" in rows:
            add("texts with a hidden code", rows["has_mvm"].sum(), len(rows["has_mvm"]), trace.cfg.mvm_prob)
    found = [f"{n} times {what}; look at {corrupt}" for n, what in wrong.values() if n]
    for name, (hits, n, expected) in counts.items():
        p, expected = hits / max(1, n), expected / max(1, n)
        if abs(p - expected) > 5 * math.sqrt(expected * (1 - expected) / max(1, n)) + 0.003 + 0.05 * (expected == 0):
            found.append(f"{name}: {p:.3f}, {expected:.3f} is right ({n} draws); look at {corrupt}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Save, load, resume; processes


def flat(state, path=()) -> dict:
    """{path: tensor} of nested dictionaries and lists."""
    if torch.is_tensor(state):
        return {path: state}
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {k: x for name, part in parts for k, x in flat(part, (*path, name)).items()}


def resume(module, kind: Kind) -> list[str]:
    """A run of four steps, copied as it stands on the disk after two; the copy goes on."""
    found, saved = [], {}
    given = settings(module, kind, steps=4, eval_every=2, **{**kind.luck, "dropout": 0.1})
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    rows = practise(module, kind, 1, dropout=0.0).inputs[0]

    def save(run, step, model, *args, original=common.Run.save):
        original(run, step, model, *args)
        if step == 2 and not saved:
            shutil.copytree(run.path, run.path.parent / "two", symlinks=True)
            with torch.random.fork_rng():
                modes = {part: part.training for part in model.modules()}
                saved["out"] = call(model.eval(), rows)
                for part, mode in modes.items():
                    part.training = mode

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()):  # fmt: skip
        four, two = Path(folder, "four"), Path(folder, "two")
        with mock.patch.object(common.Run, "save", save):
            module.main([*argv, f"--out={four}"])
        checkpoint = two / "step_2"
        values = common.read_json(two / "config.json")
        model = module.build(common.config_from(module.Config, values), None, checkpoint).eval()
        for name, x in call(model, rows).items():
            before = saved["out"][name]
            change = math.inf if x.shape != before.shape else float((x - before).abs().max()) if x.numel() else 0.0
            if change:
                found.append(f"step_2 saved and loaded changes {name} by {change:.1e}; look at "
                             f"{place(module, 'build')} and at state that is no parameter or buffer of "
                             f"{place(module, type(model).__name__)}")  # fmt: skip
        module.main(["--resume", str(two), "--device", "cpu", "--workers", "0"])
        sides = [{**common.read_tensors(path / "last" / "model.safetensors"),
                  **flat(common.read_tensors(path / "last" / "state.pt"))} for path in (four, two)]  # fmt: skip
        logs = [{r["step"]: r for r in common.read_log(path / "log.jsonl") if "lr" in r} for path in (four, two)]
    names = [n for n in sides[0] if n not in sides[1] or not torch.equal(sides[0][n], sides[1][n])]
    clock = ("samples_per_s", "data_wait", "memory_gib", "eta_s", "mfu")
    odd = [(step, n, logs[0][step][n], logs[1].get(step, {}).get(n)) for step in logs[0] for n in logs[0][step]
           if n not in clock and logs[0][step][n] != logs[1].get(step, {}).get(n)]  # fmt: skip
    if names or odd:
        told = "; of step {}, {} is {} and {}".format(*odd[0]) if odd else ""
        if names:
            most = max((float((sides[0][n].float() - sides[1][n].float()).abs().max()) for n in names if n in sides[1]
                        and sides[0][n].shape == sides[1][n].shape), default=math.inf)  # fmt: skip
            told = f" {len(names)} of {len(sides[0])} tensors differ, by {most:.1e} at most" + told
        found.append(f"4 steps and 2 + --resume:{told}; look at {place(module, 'train', 'seed')}: what the first two "
                     "steps leave must be saved, or follow from seed and step")  # fmt: skip
    return found


def as_process(module, kind: Kind, folder: Path) -> None:
    """What each of two processes does: two steps of pre-training, one of the task whose gradient is compared."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = practise(module, kind, 2, **kind.two_phases).model
    state = {name: x for name, x in model.state_dict().items() if not re.search(r"running_|num_batches", name)}
    grads = practise(module, kind, 1, **kind.alike, grad_clip=0.0).grads[0] if kind.alike else {}
    torch.save({"state": state, "grads": grads}, folder / f"{dist.get_rank()}.pt")
    sys.stdout.flush()
    os._exit(0)  # gloo's threads would outlive Python


def processes(module, kind: Kind) -> list[str]:
    spread = place(module, "train", r"common\.spread\(")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, module.__file__, "--like", kind.name, "--as-process", folder]
        both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=Path(folder, f"{rank}.txt").open("w"), env={
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in (0, 1)]  # fmt: skip
        end = time.monotonic() + 120
        while any(p.poll() is None for p in both) and time.monotonic() < end and not any(p.poll() for p in both):
            time.sleep(0.05)
        hung = not any(p.poll() for p in both) and any(p.poll() is None for p in both)
        for one in both:
            one.kill()
            one.wait()
        if hung:
            return [f"two processes wait for one another for 120 seconds; look at {spread}"]
        for rank in (0, 1):
            if not Path(folder, f"{rank}.pt").exists():
                said = Path(folder, f"{rank}.txt").read_text()
                lines = re.findall(rf'File "{re.escape(module.__file__)}", line (\d+), in (\w+)', said)
                line, name = lines[-1] if lines else ("?", "?")
                why = next((x for x in said.splitlines()[::-1] if re.match(r"[\w.]+(Error|Exception)", x)), "no reason")
                return [f"process {rank} ends with {why[:300]}; look at {name}, {Path(module.__file__).name}:{line}"]
        sides = [torch.load(Path(folder, f"{rank}.pt")) for rank in (0, 1)]
    found, (a, b) = [], (side["state"] for side in sides)
    differ = {n: float((a[n].float() - b[n].float()).abs().max()) for n in a if not torch.equal(a[n], b[n])}
    if differ:
        worst = max(differ, key=differ.get)
        found.append(f"after two steps {len(differ)} of {len(a)} tensors differ between the processes, {worst} by "
                     f"{differ[worst]:.1e}; look at {spread}")  # fmt: skip
    if kind.alike:
        one, two = practise(module, kind, 1, **kind.alike, grad_clip=0.0).grads[0], sides[0]["grads"]
        names = [n for n in one if one[n] is not None and two.get(n) is not None]
        ratio, off = (math.sqrt(sum(float(x.square().sum()) for x in xs)) / max(1e-12, math.sqrt(
            sum(float(one[n].square().sum()) for n in names))) for xs in (
            [two[n] for n in names], [two[n] - one[n] for n in names]))  # fmt: skip
        if off > 1e-3:
            found.append(f"{kind.alike['task']}: the gradient of two processes is {ratio:.3f} times as long as that of "
                         f"one, and {off:.1e} of it is off; look at {place(module, 'train', r'backward')}")  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Main

CHECKS = {check.__name__: check for check in (leaks, gradients, overfit, masks, resume, processes)}


def examine(module, kind: Kind, names=tuple(CHECKS)) -> dict:
    """{check: what is broken, [] for nothing, None where it has no meaning}; a line is printed for each."""
    told = {}
    for name in names:
        started = time.perf_counter()
        try:
            told[name] = CHECKS[name](module, kind)
        except (Exception, common.Stopped) as error:
            function, line = frame_of(module, error)
            at = f"{function}, {Path(module.__file__).name}:{line}" if line else place(module, "train")
            told[name] = [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; look at {at}"]
        word = "not applicable" if told[name] is None else "BROKEN" if told[name] else "ok"
        print(f"{name:<10} {word:<14} {time.perf_counter() - started:5.1f} s  {' | '.join(told[name] or [])}".rstrip(),
              flush=True)
    return told


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(prog="doctor.py", description=__doc__.split("\n")[0])
    parser.add_argument("file", metavar="FILE", help="a changed copy of one of the four model files")
    parser.add_argument("--like", default="", help=f"whose copy it is: {', '.join(KINDS)}; default: by its class")
    parser.add_argument("--only", default="", help=f"some of {', '.join(CHECKS)}, with commas between")
    parser.add_argument("--as-process", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = [name for name in args.only.split(",") if name] or list(CHECKS)
    for name in names:
        common.choose("only", name, list(CHECKS))
    module, kind = load(args.file, args.like)
    if args.as_process:
        as_process(module, kind, Path(args.as_process))
    return int(any(examine(module, kind, names).values()))


if __name__ == "__main__":
    common.run_main(lambda: sys.exit(main()))
