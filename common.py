"""The engine under the four papers: flags, processes, optimizer, schedule, checkpoints, logs, run directories.

Nothing here knows a model. A model file brings a dataclass, a network and a visible training loop; this file brings
what a fifth paper would use unchanged.

Reading map: errors | flags from the dataclass | device, dtype, processes | stopping | optimizer and schedule |
run directory and checkpoints | log | tables.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import difflib
import inspect
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist

# ---------------------------------------------------------------------------------------------------------------------
# Errors


class UserError(Exception):
    """A mistake that the user can mend: `run_main` prints the message, which says what to do next, and exits with 2."""


class Stopped(Exception):
    """A run was asked to stop. str() says what is saved and how to go on; `signum` is the signal that asked."""

    def __init__(self, message: str, signum: int = signal.SIGINT):
        super().__init__(message)
        self.signum = signum


def interrupt(signum, _) -> None:
    """SIGTERM ends what runs like Ctrl-C does, so that the same message is given."""
    raise KeyboardInterrupt(signum)


def run_main(main) -> None:
    """Call main(); a UserError becomes its message and exit status 2, a stop 128 + its signal, neither a traceback."""
    signal.signal(signal.SIGTERM, interrupt)
    status = 0
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:
        print(f"error: {error}; make room, or mend the path or its permissions", file=sys.stderr)
        status = 2
    except Stopped as stop:
        print(stop, file=sys.stderr)
        status = 128 + stop.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    if dist.is_initialized():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, to those that are left
        dist.destroy_process_group()
        # Python must not shut down here: DistributedDataParallel keeps gloo's threads alive, and one that lets go of
        # its last tensor meanwhile aborts the process (of 28 toy runs 4 ended so). What is due at exit is done.
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Flags. Each field of the config dataclass is a flag, its comment is the help text.


@dataclass
class RunConfig:
    """What every model file's Config starts with: what to run, on what, and where to put it."""

    # --- what to run
    data: str = "scenes"  # scenes, coco, vg ...: `python data.py where`; own .jsonl, .csv, .tar; several: coco,vg:0.5
    root: str = ""  # directory of the data set, default data/NAME; of several the one above theirs, default data
    phrases: int = 5  # of vg: descriptions drawn of each picture in each epoch
    keep_test: bool = False  # of vg and sbu: train also on pictures that COCO or Flickr30k keep for val and test
    quotes: str = "csv"  # of cc3m's TSV files: csv (a double quote may join lines, as in xmodaler) | none (never)
    task: str = "pretrain"  # what to train; the tasks of a paper are in its file
    preset: str = ""  # tiny | small | base; default tiny for scenes, small for flickr8k and own data, base otherwise
    init: str = "none"  # start from the weights of a run directory (or its step_N), of the authors' file, or none
    resume: str = ""  # go on with a run: RUN or RUN/step_N; all other settings come from it
    out: str = ""  # run directory; default runs/<model>-<data>[-<task>], with the next free suffix
    seed: int = 0  # of initialisation, data order, augmentation, dropout and sampling
    # --- the small world
    world: str = "tiny"  # tiny: 4 shapes x 6 colours x 2 sizes, 1-3 objects | full: everything, and panels
    train_scenes: int = 20000  # scenes in the training split
    test_scenes: int = 500  # scenes in each test split
    # --- machine
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # auto: bf16 on GPUs that have it, float32 elsewhere | float32 | bf16
    compile: bool = False  # torch.compile the model: minutes at the start, faster steps on a GPU
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more arithmetic
    workers: int = -1  # loader processes; -1: one less than this process's share of the cores, at most 8
    micro_batch: int = 0  # pairs per forward pass and process; 0: no accumulation
    # --- log and checkpoints
    log_every: int = 50  # steps between log lines
    eval_every: int = 0  # steps between evaluations on val and checkpoints; 0: five times in a run
    val_items: int = 200  # items of val that are looked at during training; the end looks at all of test
    official: bool = True  # of photographs also METEOR, SPICE and PTB tokens, where pycocoevalcap and Java are present


@cache
def field_comments(config_class) -> dict[str, str]:
    """Field name -> the comment behind it in the source."""
    found = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            for line in inspect.getsource(base).splitlines():
                match = re.match(r"    (\w+): [^#]*?#\s*(.+)", line)
                if match:
                    found[match[1]] = re.sub(r"(HERE\[[\w-]+\]( \(.*?\))?:?|PAPER:|OFFICIAL:)\s*", "", match[2]).strip()
    return found


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists every flag)")


def parse_flags(config_class, argv: list[str], prog: str, extra: dict[str, dict] | None = None):
    """argv -> (flags given, {name: value}; values of `extra` flags as a namespace).

    extra: argparse keywords of flags that are commands rather than settings (`--caption`). An unknown flag raises
    UserError naming the nearest one; hyphens and underscores are the same.
    """
    comments = field_comments(config_class)
    parser = Parser(prog=prog, allow_abbrev=False, usage=f"{prog} [--flag value]", argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(config_class):
        flag = "--" + field.name.replace("_", "-")
        help_text = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            parser.add_argument(flag, type=type(field.default), metavar=type(field.default).__name__, help=help_text)
    for name, keywords in (extra or {}).items():
        parser.add_argument("--" + name, **keywords)
    argv = [re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), word) for word in argv]
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [option for action in parser._actions for option in action.option_strings]
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else " (--help lists every flag)"
        raise UserError(f"unknown flag {unknown[0]}{hint}")
    given = vars(known)
    names = [name.replace("-", "_") for name in extra or {}]
    return given, argparse.Namespace(**{name: given.pop(name, None) for name in names})


def choose(name: str, value, choices) -> None:
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"--{name} {value}: it is one of {', '.join(map(str, choices))}{hint}")


def check_numbers(cfg, from_one: str) -> None:
    """UserError for a setting that is negative or no finite number, and for a zero among the names in `from_one`."""
    for field in dataclasses.fields(cfg):
        value, flag = getattr(cfg, field.name), "--" + field.name.replace("_", "-")
        least = 1 if field.name in ("log_every", "train_scenes", "test_scenes", "phrases", *from_one.split()) else 0
        if field.name == "seed" and abs(value) >= 2**31:
            raise UserError(f"{flag} {value}: give less than 2^31")
        if type(value) in (int, float) and field.name not in ("workers", "seed"):
            if not value >= least or math.isinf(value):
                raise UserError(f"{flag} {value}: give {least} or more" + ", and a finite number" * math.isinf(value))


def check_multiples(cfg, **of) -> None:
    """UserError for a setting that is no multiple of the other one; of: {name: name of the other}."""
    for name, other in of.items():
        if getattr(cfg, name) % getattr(cfg, other):
            flags = (f"--{x.replace('_', '-')} {getattr(cfg, x)}" for x in (name, other))
            raise UserError(f"{' '.join(flags)}: the first must be a multiple of the second")


def check_drops(cfg) -> None:
    """UserError where cfg.drops is not what `schedule` reads."""
    try:
        shares = [float(share) for share in cfg.drops.split(",")] if cfg.drops else []
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise UserError(f"--drops {cfg.drops}: give shares of the run between 0 and 1, like 0.5,0.6")


def check_most(cfg, limits: dict) -> None:
    """UserError for a setting above its limit; limits: {name: the most}."""
    for name, most in limits.items():
        if getattr(cfg, name) > most:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: give {most} or less")


def default_preset(data: str) -> str:
    """tiny for scenes, small for what a laptop holds, base for the rest."""
    own = data.lower().endswith((".jsonl", ".csv")) or Path(data).is_dir() and not any(Path(data).glob("*.tar"))
    return "tiny" if data == "scenes" else "small" if data in ("flickr8k", "nlvr1") or own else "base"


def data_name(spec: str) -> str:
    """A short name of what --data names: coco,vg:0.5,shards/cc3m-{000..331}.tar -> coco+vg+cc3m."""
    parts = [spec] if Path(spec).exists() else re.split(r",(?![^{]*\})", spec)  # commas outside braces
    return "+".join(Path(re.sub(r"\{[^}]*\}|\*|:[\d.eE+-]+$", "", part)).stem.strip("-_ ") for part in parts)


def build_config(config_class, given: dict, presets: dict, recipes: dict, architecture: dict | None = None):
    """dataclass < preset < recipe of (task, preset[, data]) < architecture of --init < flags."""
    data_name = given.get("data", config_class.data)
    task = given.get("task", config_class.task)
    preset = given.get("preset") or default_preset(data_name)
    choose("preset", preset, list(presets))
    values = {**presets[preset]}
    for key in ((task, preset), (task, preset, data_name)):
        values.update(recipes.get(key, {}))
    if "steps" in given and "epochs" in given:
        raise UserError("--steps and --epochs contradict each other: give one of them")
    if "epochs" in given:
        values["steps"] = 0
    return config_class(**{**values, **(architecture or {}), **given, "preset": preset})


# What may change when a run goes on, and what means something to a finished one (a file adds its decoding flags).
RESUME_FLAGS = "resume data root device workers micro_batch compile gradient_checkpointing official".split()
EVAL_FLAGS = "init data root keep_test world test_scenes val_items device dtype workers seed out official".split()


def allow(given: dict, allowed: list[str], command: str) -> None:
    if odd := sorted(set(given) - set(allowed)):
        flags = ["--" + name.replace("_", "-") for name in (odd[0], *allowed)]
        raise UserError(f"{flags[0]} has no meaning with {command}, which takes {', '.join(flags[1:])}")


def configure(config_class, given: dict, model_name: str, presets, recipes, sizes: list[str], takes_files=False):
    """Flags -> (config, checkpoint to start from or None). --resume: all settings are the run's, but for RESUME_FLAGS.
    --init: weights and `sizes` are the run's; with `takes_files` a file of official weights is left to the model.
    Neither: see build_config."""
    if given.get("resume"):
        allow(given, RESUME_FLAGS, "--resume")
        checkpoint, values = find_checkpoint(given["resume"], model_name, prefer="last")
        if "data" in given and Path(given["data"]).name != Path(values["data"]).name:
            raise UserError(f"the run is of {values['data']}: --resume takes the same data at another place; for other "
                            f"data start a run with --init {given['resume']}")  # fmt: skip
        return config_from(config_class, {**values, **given}), checkpoint
    if given.get("init", "none") == "none" or (takes_files and Path(given["init"]).is_file()):
        return build_config(config_class, given, presets, recipes), None
    checkpoint, values = find_checkpoint(given["init"], model_name)
    kept = {name: values[name] for name in sizes if name in values}
    return build_config(config_class, {"preset": values["preset"], **given}, presets, recipes, kept), checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Device, dtype, processes


@dataclass
class Machine:
    """Where this process runs: device, autocast dtype, its rank among all processes."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    processes: int
    workers: int
    reason: str  # why this device and dtype, for the log

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def choose_device(name: str) -> tuple[str, str]:
    """--device -> (device, why). UserError where it is not there."""
    choose("device", name.split(":")[0], ["auto", "cpu", "cuda", "mps"])
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return name, {"cuda": "a GPU is there", "mps": "Apple's GPU is there", "cpu": "no GPU found"}[name]
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU: use --device cpu, or install a CUDA build of torch")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps, but torch sees no Apple GPU: use --device cpu")
    return name, "--device"


def start_machine(cfg: RunConfig) -> Machine:
    """Choose device and dtype once, join the other processes if torchrun started any, seed everything."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    choose("dtype", cfg.dtype, ["auto", "float32", "bf16"])
    name, why = choose_device(cfg.device)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if cfg.dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype, why2 = (torch.bfloat16, "it has bf16") if bf16 else (torch.float32, "default")
    else:
        dtype, why2 = {"float32": torch.float32, "bf16": torch.bfloat16}[cfg.dtype], "--dtype"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # this process's share
    if world > 1:
        torch.set_num_threads(cores)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    workers = cfg.workers if cfg.workers >= 0 else min(8, cores - 1)
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    reason = (
        f"{device.type} ({why}), {str(dtype).removeprefix('torch.')} ({why2}), {world} process(es), {workers} workers"
    )
    return Machine(device, dtype, rank, world, workers, reason)


def sum_over_processes(values: list, device) -> list[float]:
    """Each number added up over all processes, in one exchange."""
    values = [float(value) for value in values]
    if not dist.is_initialized():
        return values
    device = device if device.type == "cuda" else "cpu"  # gloo knows no Apple GPU
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def sum_tensors(*tensors) -> None:
    """Each tensor becomes its sum over all processes, in place. Every process has to call it equally often."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


def share_tensor(tensor) -> None:
    """The first process's tensor, on every process, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)


def gather_lists(values: list) -> list:
    """The lists of all processes, one after the other, on every process."""
    if not dist.is_initialized():
        return values
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, values)
    return [value for share in shares for value in share]


def share_from_main(value):
    """The first process's value, on every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def unwrap(model):
    """The network itself, without DistributedDataParallel's or torch.compile's shell."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


def spread(model, cfg: RunConfig, machine: Machine, block_class=None, find_unused=False):
    """The model as the loop calls it: compiled if asked for, wrapped where there are several processes.

    block_class: the class (or classes) of its blocks, which gradient checkpointing recomputes. find_unused: some steps
    leave parameters without a gradient.
    """
    if cfg.gradient_checkpointing:
        for module in model.modules():
            if isinstance(module, block_class):
                module.forward = partial(recomputed, module.forward)
    if cfg.compile and not why_not_compiled(cfg, machine):
        model = torch.compile(model)
    if machine.processes > 1:
        ids = [machine.device.index] if machine.device.type == "cuda" else None
        # To exchange buffers in each forward would hang where processes differ in micro-batches: see share_buffers.
        ddp = torch.nn.parallel.DistributedDataParallel
        names = [n for n in ("forward_sync_buffers", "broadcast_buffers") if n in inspect.signature(ddp).parameters]
        model = ddp(model, device_ids=ids, find_unused_parameters=find_unused, **{names[0]: False})  # torch renamed it
    return model


def share_buffers(model) -> None:
    """The first process's buffers on every process: running statistics that each has gathered from its own share."""
    for buffer in model.buffers():
        share_tensor(buffer)


def recomputed(forward, *inputs, **options):
    """forward(...), whose activations are not kept but computed anew in the backward pass, with the same dropout."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    from torch.utils.checkpoint import checkpoint

    norms = [part for part in forward.__self__.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    if norms:
        options["context_fn"] = lambda: (nullcontext(), unnoted(norms))
    return checkpoint(forward, *inputs, use_reentrant=False, **options)


@contextmanager
def unnoted(norms):
    """Batch norms whose running statistics stay: of what is computed anew they would count every batch twice."""
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, number) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, number


def why_not_compiled(cfg: RunConfig, machine: Machine) -> str:
    """The reason why torch.compile is off, "" where it is on."""
    if not cfg.compile:
        return "not asked for; --compile turns it on"
    if machine.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        return "it needs a C++ compiler and there is none: install g++ or clang++"
    if machine.device.type == "mps":
        return "a prototype on Apple's GPUs"
    if not torch._dynamo.is_dynamo_supported():
        return f"this torch cannot compile under Python {platform.python_version()}"
    return ""


def synchronised(model, is_last: bool):
    """Around a micro-batch's forward and backward: gradients are exchanged between processes in the last one alone.

    So processes may have different numbers of micro-batches, as when a broken picture was skipped on one of them.
    """
    return nullcontext() if is_last or not hasattr(model, "no_sync") else model.no_sync()


# ---------------------------------------------------------------------------------------------------------------------
# Stopping


class StopRequest:
    """`with StopRequest() as stop`: Ctrl-C and SIGTERM only set `stop.signum`; the loop ends its step and saves.

    A second one, two seconds later or more, stops at once (torchrun passes Ctrl-C on, so a process may hear it twice).
    """

    def __init__(self):
        self.signum, self.heard_at, self.before = 0, 0.0, {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python hears signals nowhere else
            self.before = {s: signal.signal(s, self._hear) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _hear(self, signum, _) -> None:
        if self.signum and time.monotonic() - self.heard_at > 2:
            raise KeyboardInterrupt
        self.signum, self.heard_at = self.signum or signum, self.heard_at or time.monotonic()


def stopped(run: Run, machine: Machine, signum: int = signal.SIGINT, why: BaseException | None = None) -> Exception:
    """What to raise where a run ends before its time: what is saved, and the command that goes on. A UserError as the
    reason stays one; an interrupt brings its signal along."""
    signum = why.args[0] if isinstance(why, KeyboardInterrupt) and why.args else signum
    if not (run.path / "last").exists():
        told = f"stopped before the first checkpoint of {run.path}: nothing to resume, start it again"
        return UserError(f"{why}\n{told}") if isinstance(why, UserError) else Stopped(told, signum)
    python = "python" if machine.processes == 1 else f"torchrun --nproc_per_node={machine.processes}"
    saved = f"{(run.path / 'last').resolve().name} is saved. Go on with:"
    saved += f"\n{python} {Path(sys.argv[0]).name} --resume {shlex.quote(str(run.path))}"
    return UserError(f"{why}\n{saved}") if isinstance(why, UserError) else Stopped(f"stopped; {saved}", signum)


def stop_if_not_finite(norm, loss, image_ids: list, step: int, run: Run) -> None:
    """UserError, and RUN/not_finite.json, where the gradient norm of a step is no finite number any more.

    Called before the optimizer's step, so the weights are still whole. The norm is the same on all processes; the
    samples named are those of the processes whose own loss is not finite, of all where every loss is.
    """
    if math.isfinite(norm):  # waits for the GPU, once a step
        return
    shares = gather_lists([(float(loss), list(map(str, image_ids)))])
    guilty = [share for share in shares if not math.isfinite(share[0])] or shares
    ids, file, last = [i for share in guilty for i in share[1]], run.path / "not_finite.json", run.path / "last"
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_json(file, {"step": step, "loss": str(guilty[0][0]), "grad_norm": str(float(norm)), "image_ids": ids})
    saved, init = (last.resolve().name, f"from it, --init {last}") if last.exists() else ("none", "")
    raise UserError(
        f"step {step}: loss {guilty[0][0]}, gradient norm {float(norm)}; the step was not taken; checkpoint: {saved}. "
        f"Samples: {', '.join(ids[:8])}{', ...' * (len(ids) > 8)} ({len(ids)} in {file}). Look at them, or start anew "
        f"{init} with a lower rate, --lr"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule


def adamw(model, lr_of, weight_decay: float, betas=(0.9, 0.98), all_matrices=False) -> torch.optim.AdamW:
    """AdamW over every trainable parameter, each in exactly one group of (peak rate, decay).

    lr_of(name) -> peak learning rate. Matrices decay; norms, biases, embeddings and position tables do not, except
    that with `all_matrices` these tables do.
    """
    groups: dict[tuple, list] = {}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, p in trainable:
        decays = p.ndim >= 2 and (all_matrices or (id(p) not in embeddings and "position" not in name))
        groups.setdefault((lr_of(name), weight_decay if decays else 0.0), []).append(p)
    assert sum(map(len, groups.values())) == len(trainable) == len({id(p) for _, p in trainable})
    settings = [dict(params=ps, lr=lr, peak=lr, weight_decay=wd) for (lr, wd), ps in groups.items()]
    # fused: one kernel for all parameters instead of a dozen small ones for each
    return torch.optim.AdamW(settings, betas=betas, eps=1e-8, fused=True)


def linear_schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at `step` (0-based): linear rise over the first `warmup` share, then linear to 0."""
    rise = max(1, int(warmup * steps))
    return (step + 1) / rise if step < rise else max(0.0, (steps - step) / max(1, steps - rise))


def schedule(cfg, step: int) -> float:
    """Share of the peak rate: linear_schedule, or where cfg.drops names shares of all steps ("0.5,0.6"), constant after
    the rise (from cfg.warmup_from, where there is such a setting) and times cfg.drop_factor at each of them."""
    if not cfg.drops:
        return linear_schedule(step, cfg.steps, cfg.warmup)
    n_drops = sum(step >= float(drop) * cfg.steps for drop in cfg.drops.split(","))
    low, rise = getattr(cfg, "warmup_from", 0.0), min(1.0, (step + 1) / max(1, int(cfg.warmup * cfg.steps)))
    return (low + (1 - low) * rise) * cfg.drop_factor**n_drops


# ---------------------------------------------------------------------------------------------------------------------
# Run directory and checkpoints


class Run:
    """runs/<model>-<data>[-<task>]: config.json, log.jsonl, step_N/, links `last` and `best`, metrics, pictures."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, model_name: str, cfg: RunConfig, machine: Machine, main_task: str = "pretrain") -> Run:
        """A fresh directory. --out that already holds a run is an error; a default name takes the next free suffix."""
        found = share_from_main(cls._make(model_name, cfg, main_task) if machine.is_main else None)
        if isinstance(found, UserError):
            raise found  # on every process, so that none waits for the others
        return cls(found)

    @staticmethod
    def _make(model_name: str, cfg: RunConfig, main_task: str) -> Path | UserError:
        if cfg.out:
            path = Path(cfg.out)
            if any((path / name).exists() for name in ("last", "metrics.json")):
                return UserError(f"{path} already holds a run: go on with it by --resume {path}, or give another --out")
        else:
            name = f"{model_name}-{data_name(cfg.data)}" + ("" if cfg.task == main_task else f"-{cfg.task}")
            path, n = Path("runs") / name, 2
            while path.exists():
                path, n = Path("runs") / f"{name}-{n}", n + 1
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "config.json", {"model": model_name, **dataclasses.asdict(cfg)})
        except OSError as error:
            return UserError(f"{path} cannot be made ({error.strerror}): give another --out")
        return path

    def save(self, step: int, model, tokenizer, optimizer, meta: dict) -> None:
        """Write step_N completely under another name, rename it, then move the link `last`."""
        from safetensors.torch import save_file

        final, temporary = self.path / f"step_{step}", self.path / f"step_{step}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            tensors = {k: v.detach().cpu().contiguous() for k, v in unwrap(model).state_dict().items()}
            save_file(tensors, temporary / "model.safetensors")
            tokenizer.save(temporary)
            torch.save({"optimizer": optimizer.state_dict()}, temporary / "state.pt")  # all else follows from the step
            write_json(temporary / "meta.json", {"step": step, **meta})
        except Exception as error:  # safetensors and torch wrap what the disk says in errors of their own
            shutil.rmtree(temporary, ignore_errors=True)
            told = f"{final} could not be saved ({type(error).__name__}: {error}): make room or mend permissions"
            raise UserError(told) from error
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        self._link("last", final.name)

    def evaluated(self, step: int, meta: dict, is_best: bool) -> None:
        """What an evaluation of the saved step_N found: into its meta.json, and `best` moves there if it is."""
        write_json(self.path / f"step_{step}" / "meta.json", {"step": step, **meta})
        if is_best:
            self._link("best", f"step_{step}")

    def _link(self, link: str, name: str) -> None:
        fresh = self.path / f"{link}.tmp"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(name)
        os.replace(fresh, self.path / link)
        kept = {(self.path / link).resolve().name for link in ("last", "best")}
        for old in self.path.glob("step_*"):  # neither last nor best any more
            if old.name not in kept:
                shutil.rmtree(old)

    def forget_after(self, step: int) -> None:
        """Drop log records of steps beyond the checkpoint that a run goes on from; all that one without has left."""
        path = self.path / "log.jsonl"
        kept = [json.dumps(record) + "\n" for record in read_log(path) if record["step"] <= step]
        path.with_suffix(".tmp").write_text("".join(kept))
        path.with_suffix(".tmp").replace(path)

    def go_on(self, checkpoint: Path | None, optimizer) -> tuple[int, float, bool]:
        """(step, best value on val so far, whether its evaluation is due) of a checkpoint; 0, -1, False without."""
        meta = load_training_state(checkpoint, optimizer) if checkpoint else {"step": 0, "best": -1.0}
        if not dist.is_initialized() or dist.get_rank() == 0:
            self.forget_after(meta["step"])
        return meta["step"], meta["best"], bool(meta.get("is_due"))

    def log(self, record: dict) -> None:
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict]:
    """The records of log.jsonl; a line that a crash cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def find_checkpoint(source: str, model_name: str, prefer: str = "best") -> tuple[Path, dict]:
    """RUN or RUN/step_N -> (directory of the checkpoint, the run's config as a dict). RUN means RUN/`prefer`."""
    path = Path(source)
    steps = sorted(path.glob("step_*"), key=lambda p: (len(p.name), p.name), reverse=True)  # if the links are lost
    step = next((p for p in (path, path / prefer, path / "last", *steps) if (p / "model.safetensors").exists()), None)
    if step is None:
        raise UserError(f"{source} is not a run directory with a checkpoint in it (step_N/model.safetensors)")
    step = step.resolve()
    if not (step.parent / "config.json").exists():
        raise UserError(f"{step.parent} has no config.json, so the sizes of {step.name} are unknown")
    values = read_json(step.parent / "config.json")
    if not isinstance(values, dict) or "model" not in values:
        raise UserError(f"{step.parent / 'config.json'} is not the config of a run")
    if values.get("model") != model_name:
        raise UserError(f"{source} is a run of {values.get('model')}.py, not of {model_name}.py")
    return step, values


def load_training_state(checkpoint: Path, optimizer) -> dict:
    """Optimizer state of a checkpoint -> its meta.json: step, best validation score so far, what evaluation found.

    Data order, augmentation and dropout follow from seed and step, so there is no random state to bring back.
    """
    optimizer.load_state_dict(read_tensors(checkpoint / "state.pt")["optimizer"])
    return read_json(checkpoint / "meta.json")


def read_tensors(path: Path) -> dict:
    """A flat state dict from .safetensors, or from a torch file with weights_only."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as plain tensors ({type(error).__name__}: {error}); nothing in it was run. "
            "Take another copy or checkpoint"
        ) from error


def load_model_weights(model, checkpoint: Path) -> None:
    """model.safetensors of a checkpoint into a network of the same sizes; UserError names the first differences."""
    try:
        model.load_state_dict(read_tensors(checkpoint / "model.safetensors"))
    except RuntimeError as error:
        told = str(error).splitlines()[1:4]
        raise UserError(f"{checkpoint} holds another network than the flags describe:\n" + "\n".join(told)) from error


def config_from(config_class, values: dict):
    """A config from a run's config.json; entries that this version does not know are left out."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{k: v for k, v in values.items() if k in names})


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): is the run whole? Take another of its checkpoints") from None


def write_json(path: Path, value) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)


def write_metrics(folder: Path, model_name, cfg, machine: Machine, model, seconds, protocol, splits) -> None:
    """metrics.json: what was measured, on what, how. `splits`: {split: {"metrics": ..., "controls": ...}}. `seconds`
    and `command` are those of the last leg where the run was resumed."""
    write_json(folder / "metrics.json", {
        "model": model_name, "data": cfg.data, "task": cfg.task, "command": "python " + shlex.join(sys.argv),
        "seed": cfg.seed, "steps": cfg.steps, "seconds": round(seconds, 1),
        "params": sum(p.numel() for p in model.parameters()), "device": describe_device(machine),
        "versions": versions(), "protocol": {
            "dtype": str(machine.dtype).removeprefix("torch."), "processes": machine.processes, "resumed": cfg.resume,
            **({"world": cfg.world} if cfg.data == "scenes" else {}), "val_items": cfg.val_items, **protocol,
        }, "splits": splits,
    })  # fmt: skip


def own_settings(cfg) -> dict:
    """A paper's own settings, which RunConfig has not: for the protocol."""
    ours = {field.name for field in dataclasses.fields(RunConfig)}
    return {name: value for name, value in dataclasses.asdict(cfg).items() if name not in ours or name == "init"}


def how_chosen(checkpoint: Path) -> str:
    """What a checkpoint is, for the protocol of its evaluation."""
    links = [link for link in ("best", "last") if (checkpoint.parent / link).resolve() == checkpoint.resolve()]
    looked = bool(read_json(checkpoint / "meta.json").get("val"))
    what = "best on val" if links[:1] == ["best"] and looked else "last" if links else "neither best nor last"
    return f"{checkpoint.resolve().name}: {what}"


def announce(title: str, model, cfg: RunConfig, machine: Machine, corpus, run: Run) -> None:
    """What is about to happen, on what."""
    if machine.is_main:
        why_not = why_not_compiled(cfg, machine)
        print(f"{title}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, on {machine.reason}, "
              f"torch.compile {f'off ({why_not})' if why_not else 'on'}")  # fmt: skip
        print(f"{corpus.name}: " + ", ".join(f"{name} {len(items):,}" for name, items in corpus.splits.items()))
        for note in corpus.notes:
            print(f"  note: {note}")
        print(f"-> {run.path}", flush=True)


def versions() -> dict:
    from importlib.metadata import version

    packages = ("torch", "torchvision", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def describe_device(machine: Machine) -> str:
    if machine.device.type == "cuda":
        return f"{machine.processes} x {torch.cuda.get_device_name(machine.device)}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{machine.device.type}, {cores} cores, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------------------------------
# Log

# dense bf16 peaks of the data sheets, FLOP/s; MFU is 0 where the GPU is not listed
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


class Logger:
    """One line per `log_every` steps, the same as JSONL, and a progress bar where a terminal looks on."""

    def __init__(self, run: Run | None, machine: Machine, steps: int, every: int, start: int = 0):
        self.run, self.machine, self.steps, self.every = run, machine, steps, every
        self.bar, self.flops_per_item = None, 0.0
        self.clear(start)
        if machine.is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def clear(self, step: int):
        self.since, self.first, self.items, self.waited = time.perf_counter(), step, 0, 0.0

    @contextmanager
    def waiting(self):
        """Around whatever waits for data."""
        t = time.perf_counter()
        yield
        self.waited += time.perf_counter() - t

    @contextmanager
    def pause(self):
        """Around evaluation and saving, which are no training time."""
        t = time.perf_counter()
        yield
        self.since += time.perf_counter() - t

    def step(self, step: int, losses: dict[str, torch.Tensor], lr: float, norm, items: int) -> None:
        """After optimizer step number `step` (1-based) on `items` samples over all processes.

        losses: this process's part of each loss, as in the loop; the parts are added up here.
        """
        self.items += items
        if self.bar:
            self.bar.update()
        if step % self.every and step != self.steps:
            return
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated() / 2**30
        else:
            memory = peak_memory_gib()
        seconds = max(1e-9, time.perf_counter() - self.since)
        name = torch.cuda.get_device_name() if self.machine.device.type == "cuda" else ""
        peak = next((flops for gpu, flops in PEAKS.items() if gpu in name), 0.0) * self.machine.processes
        totals = sum_over_processes(list(losses.values()), self.machine.device)
        record = {
            "step": step, **dict(zip(losses, (round(value, 4) for value in totals), strict=True)),
            "lr": lr,
            "grad_norm": round(float(norm), 3),
            "samples_per_s": round(self.items / seconds, 1),
            "mfu": round(self.flops_per_item * self.items / seconds / peak, 4) if peak else 0,
            "data_wait": round(self.waited / seconds, 4), "memory_gib": round(memory, 2),
            "eta_s": round((self.steps - step) * seconds / max(1, step - self.first)),
        }  # fmt: skip
        if self.machine.is_main:
            if self.run:
                self.run.log(record)
            shown = "  ".join(f"{k} {record[k]:.3f}" for k in losses)
            self.say(
                f"step {step:>5}/{self.steps}  {shown}  lr {lr:.1e}  norm {record['grad_norm']:.2f}  "
                f"{record['samples_per_s']:.0f} samples/s  mfu {record['mfu']:.2f}  wait {record['data_wait']:.0%}  "
                f"mem {memory:.1f}G  eta {record['eta_s'] // 60}:{record['eta_s'] % 60:02d}"
            )
        self.clear(step)

    def say(self, text: str) -> None:
        if self.machine.is_main:
            self.bar.write(text) if self.bar else print(text, flush=True)

    def close(self):
        if self.bar:
            self.bar.close()


def peak_memory_gib() -> float:
    """Largest resident size of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def table(columns: dict[str, dict[str, float]]) -> str:
    """{column title: {row name: number}} as aligned text; a missing number is a dash."""
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    first = max(map(len, rows)) + 2
    widths = [max(len(title), 5) + 3 for title in columns]
    lines = [" " * first + "".join(f"{title:>{w}}" for title, w in zip(columns, widths, strict=True))]
    for row in rows:
        cells = [f"{column[row]:.3f}" if row in column else "-" for column in columns.values()]
        lines.append(f"{row:<{first}}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)
