"""The same numbers however a batch is spread: one, two and three gloo processes, the files' own loops, toy sizes.

Each process draws its corruption from seed, step and rank; here all draw that of the whole batch and keep their own
rows of it (`shared_luck`), so that what is left to differ is the exchange. `cut` is the other half of a proof: one
process that takes the shares of n processes one after the other, as if they were micro-batches. docs/distributed.md
names the tests behind its sentences.
"""

import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from papers import PAPERS, toy

import common
import data
from tools import finish

PICTURES, STEPS, TEST = 8, 3, 11  # three divides none of the last two, nor the first; two not the last
SEED = 5
FLAGS = f"--batch {PICTURES} --captions-per-image 1 --steps {STEPS} --eval-every {STEPS} --log-every 1 --val-items 5 " \
        f"--test-scenes {TEST} --dropout 0 --grad-clip 0 --warmup 0 --no-official --seed {SEED}"  # fmt: skip
PAIRS = f"--batch {2 * PICTURES} --captions-per-image 2"
MORE = {("soho", "pretrain"): "--word-steps 1", ("vilta", "tune"): "--stem patch"}  # the other stem has BatchNorm
TUNE = {"vcgpt": "caption", "tden": "vqa", "soho": "vqa", "vilta": "vqa"}
BY_PIECE = ("soho", "vilta")  # whose losses are means over a piece, and a step the mean over pieces and processes
TASKS = ("pretrain", "tune")


def flags_of(paper, job, *more):
    task = f"--task {TUNE[paper]} --train-scenes 200" if job == "tune" else PAIRS
    return toy(paper, *FLAGS.split(), *task.split(), *MORE.get((paper, job), "").split(), *more)


# ---------------------------------------------------------------------------------------------------------------------
# In a process


def own(x, B: int, rank: int, world: int):
    """The rows of every world-th of B pictures, from the rank-th on; a picture has one row or several."""
    return x.view(B, -1, *x.shape[1:])[rank::world].flatten(0, 1)


def interleaved(shares: list[dict], pad: int) -> dict:
    """The batches of all processes -> the batch that one process would have, texts as wide as the widest."""
    sizes, found = [len(share["image_id"]) for share in shares], {}
    for name, first in shares[0].items():
        if isinstance(first, torch.Tensor):
            widest = [max(share[name].size(d) for share in shares) for d in range(1, first.ndim)]
            fill = {"ids": pad, "targets": -100}.get(name, 0) if not first.is_floating_point() else 0
            k = len(first) // sizes[0]
            whole = torch.full((sum(sizes) * k, *widest), fill, dtype=first.dtype)
            for rank, share in enumerate(shares):
                x = share[name]
                where = whole.view(sum(sizes), k, *widest)[rank :: len(shares)]
                where[(slice(None), slice(None), *map(slice, x.shape[1:]))] = x.view(-1, k, *x.shape[1:])
            found[name] = whole
        elif name == "bad":
            found[name] = sum((share[name] for share in shares), [])
        else:
            found[name] = [shares[i % len(shares)][name][i // len(shares)] for i in range(sum(sizes))]
    return found


def shared_luck(original, told: dict):
    """A file's rows_of whose corruption is that of the whole batch, drawn alike by all; and what it would have been."""

    def rows_of(batch, *rest):
        *same, tok, cfg, luck = rest
        alone = original(batch, *same, tok, dataclasses.replace(cfg, word_mask=0.0), luck)
        if "targets" in batch and cfg.task == "pretrain":
            told["texts"] = data.whole_captions(batch, tok.pad)[0]
            told["alone"] = alone.get("itm_ids", alone.get("ids"))
        whole = interleaved(common.gather_lists([batch]), tok.pad)
        told["step"], told["pictures"] = told.get("step", 0) + 1, len(whole["image_id"])
        rows = original(whole, *same, tok, cfg, torch.Generator().manual_seed(told["step"]))
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        return {name: own(x, len(whole["image_id"]), rank, world) for name, x in rows.items()}

    return rows_of


def cut(model_of, told: dict, n: int):
    """In place of data.equal_pieces and pieces_of: the shares of n processes. SOHO's codes, too, are moved as n
    processes would: once, by what all shares count and sum, each share being looked up among the old codes."""

    def pieces(rows, _):
        B, model = told.get("pictures", PICTURES), model_of()
        shares = [{name: own(x, B, rank, n) for name, x in rows.items()} for rank in range(n)]
        codes = getattr(model, "dictionary", None)
        if codes is None or "words" in rows:
            return shares
        before = {name: x.clone() for name, x in model.named_buffers()}
        old, found = {name: x.clone() for name, x in codes.named_buffers()}, []

        def put(module, values):
            for name, x in module.named_buffers():
                x.copy_(values[name])

        codes._forward_pre_hooks.clear()
        codes.register_forward_pre_hook(lambda module, _: put(module, old) if module.training else None)
        common.sum_tensors = lambda *tensors: found.append([x.clone() for x in tensors])
        with torch.no_grad():
            for share in shares:
                model(share)
        put(model, before)
        totals = [sum(x) for x in zip(*found, strict=True)]
        common.sum_tensors = lambda *tensors: [x.copy_(total) for x, total in zip(tensors, totals, strict=True)]
        return shares

    return pieces


def carry_out(paper: str, flags: list, pieces=0) -> dict:
    """A run of the file's main, and what its loop did: gradients before each update, losses of each piece, weights at
    the end, log. pieces: cut as so many processes would."""
    module, patch = importlib.import_module(paper), pytest.MonkeyPatch()
    told = {"gradients": [], "pieces": [], "ids": []}
    spread, check, losses = common.spread, common.stop_if_not_finite, getattr(module, "losses", None)
    models = []

    def spy_spread(model, *args, **named):
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0  # SOHO's answer head has its own
        models.append(model)
        return spread(model, *args, **named)

    def spy_check(norm, loss, ids, *rest):
        named = models[0].named_parameters()
        told["gradients"].append({name: p.grad.clone() for name, p in named if p.grad is not None})
        told["ids"].append(list(ids))
        check(norm, loss, ids, *rest)

    def spy_losses(cfg, out, rows):
        found = losses(cfg, out, rows)
        n = int((rows["mlm_labels"] != -100).sum()) if "mlm_labels" in rows else 0  # words of `mlm` and `lm`
        told["pieces"].append({name: (loss.item(), n) for name, loss in found.items()})
        return found

    def spy_train(cfg, model, *rest):  # at the end a run goes back to its best step, on every process
        train(cfg, model, *rest)
        told["weights"] = {name: x.clone() for name, x in model.state_dict().items()}

    train = module.train
    patch.setattr(module, "train", spy_train)
    patch.setattr(common, "spread", spy_spread)
    patch.setattr(common, "stop_if_not_finite", spy_check)
    patch.setattr(common, "sum_tensors", common.sum_tensors)  # `cut` changes it
    if losses:
        patch.setattr(module, "losses", spy_losses)
    for name in ("rows_of", "start_of"):
        if hasattr(module, name):
            patch.setattr(module, name, shared_luck(getattr(module, name), told))
    if pieces:
        for name in ("equal_pieces", "pieces_of"):
            patch.setattr(data, name, cut(lambda: models[0], told, pieces))
    patch.setattr(module, "final_evaluation", lambda *_: {})  # see `evaluated`
    patch.setattr(finish, "tell", lambda *_: None)
    try:
        module.main(list(map(str, flags)))
    finally:
        patch.undo()
    out = Path(flags[flags.index("--out") + 1])
    told["log"] = [r for r in common.read_log(out / "log.jsonl") if "lr" in r]
    return told


def evaluated(paper: str, run, folder) -> dict:
    """The final evaluation of a run's best step on this many processes -> splits of metrics.json."""
    module = importlib.import_module(paper)
    checkpoint, values = common.find_checkpoint(str(run), paper)
    cfg = common.config_from(module.Config, values)
    machine = common.start_machine(cfg)
    if machine.is_main:
        folder.mkdir()
    common.wait_for_all()
    module.evaluate_run(cfg, checkpoint, machine, folder)
    common.wait_for_all()
    return json.loads((folder / "metrics.json").read_text())["splits"]


def stopped_by_one(paper: str, flags: list, rank: int, world: int) -> tuple:
    """The last process alone gets a signal after its first step -> (signal of the end, what is said, steps taken)."""
    patch, taken, log = pytest.MonkeyPatch(), [], common.Logger.step

    def step(self, number, *args, **named):
        log(self, number, *args, **named)
        taken.append(number)
        if number == 1 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(common.Logger, "step", step)
    try:
        importlib.import_module(paper).main(list(map(str, flags)))
    except common.Stopped as stop:
        return int(stop.signum), str(stop), taken
    finally:
        patch.undo()
    return 0, "", taken


def process(rank, world, paper, folder, port):
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["LOCAL_WORLD_SIZE"] = "1000"  # a thread each
    torch.set_num_threads(1)
    join = dist.init_process_group  # each main would join anew
    dist.init_process_group = lambda *args: dist.is_initialized() or join(*args)
    told = {}

    def carry(name, job, *more, **how):
        out = folder / f"{world}-{name}"
        told[name] = carry_out(paper, flags_of(paper, job, *more, "--out", out), **how)

    for job in TASKS:
        carry(job, job)
        told[f"{job}, evaluated"] = evaluated(paper, folder / f"1-{job}", folder / f"{world}-{job}-evaluated")
        for n in (2, 3) if world == 1 and paper != "vcgpt" else ():
            carry(f"{job}, cut {n}", job, pieces=n)
        for n in (1, 2, 3) if world == 1 else ():
            if paper != "tden" or job == "tune" or n > 1:  # TDEN's pieces need two pictures
                carry(f"{job}, micro {n}", job, "--captions-per-image", 1, "--batch", PICTURES, "--micro-batch", n)
        if world == 1:
            carry(f"{job}, micro 0", job, "--captions-per-image", 1, "--batch", PICTURES)
    if paper == "tden":
        carry("one update", "pretrain", "--no-two-updates")
        if world == 1:
            for n in (2, 3):
                carry(f"one update, cut {n}", "pretrain", "--no-two-updates", pieces=n)
    if world > 1:
        told["stop"] = stopped_by_one(paper, flags_of(paper, "tune", "--out", folder / f"{world}-stop"), rank, world)
    torch.save(told, folder / f"{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Three spawns a paper


@pytest.fixture(params=PAPERS, scope="module")
def paper(request):
    return request.param


def spawn(paper, world, folder) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if "forkserver" in multiprocessing.get_all_start_methods():  # imports once for all processes
        multiprocessing.set_forkserver_preload(["torchvision", "transformers", "torch._dynamo", "PIL", *PAPERS])
        method = "forkserver"
    else:
        method = "spawn"
    started = time.monotonic()
    processes = mp.start_processes(process, args=(world, paper, folder, port), nprocs=world, join=False,
                                   start_method=method)  # fmt: skip
    while not processes.join(1):
        if time.monotonic() > started + 300:  # each waits for the other
            for one in processes.processes:
                one.kill()
            pytest.fail(f"{world} processes hang")
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


FOUND = {}  # pytest may leave a parameter and come back to it


@pytest.fixture(scope="module")
def alone(paper, tmp_path_factory):
    """What one process found."""
    if paper not in FOUND:
        FOUND[paper] = folder = tmp_path_factory.mktemp(paper)
        (FOUND[folder, 1],) = spawn(paper, 1, folder)
    return FOUND[FOUND[paper], 1]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def several(request, paper, alone):
    """What each of two, and of three processes found."""
    folder, world = FOUND[paper], request.param
    if (folder, world) not in FOUND:
        FOUND[folder, world] = spawn(paper, world, folder)
    return FOUND[folder, world]


# ---------------------------------------------------------------------------------------------------------------------
# What is the same

BY_COUNTS = ("vcgpt", "tden")  # whose losses are means over all targets of the global batch, however it is cut
CLOSE = 3e-6  # how far a first gradient may be off, as a share of its length; measured: at most 8e-7
LATER, ENDS = 1e-4, 2e-3  # gradients after an update, weights after the last; measured: 2e-5 and 5e-4, see below
CLOCK = ("samples_per_s", "data_wait", "memory_gib", "eta_s", "mfu")


def distance(a: dict, b: dict) -> float:
    """Of two gradients, relative to the first one's length."""
    assert a.keys() == b.keys()
    far, long = (sum(x.double().square().sum() for x in xs) for xs in ((a[name] - b[name] for name in a), a.values()))
    return float((far / long).sqrt())


def distances(a: dict, b: dict) -> list[float]:
    """Of the gradients before each update."""
    assert len(a["gradients"]) == len(b["gradients"]) >= STEPS
    return [distance(x, y) for x, y in zip(a["gradients"], b["gradients"], strict=True)]


def flat(found, path="") -> dict:
    """Nested dictionaries -> {path: number}."""
    parts = {f"{path}/{name}": x for name, x in found.items()}
    return {k: y for name, x in parts.items() for k, y in (flat(x, name) if isinstance(x, dict) else {name: x}).items()}


def logged(told: dict) -> list[dict]:
    return [{name: x for name, x in record.items() if name not in CLOCK} for record in told["log"]]


def jobs(paper) -> list[str]:
    return [*TASKS, *["one update"] * (paper == "tden")]


def reference(paper, alone, job, world) -> dict:
    """One process that does by definition what `world` do: the whole batch where nothing depends on how it is cut."""
    return alone[job if paper == "vcgpt" or (paper, job) == ("tden", "tune") else f"{job}, cut {world}"]


def of(*papers):
    """For what is not in all of the files."""
    return pytest.mark.parametrize("paper", papers, indirect=True, scope="module")


def test_the_global_batch_is_the_same(paper, alone, several):
    """Shares that overlap in nothing and are all there, of uneven sizes where three processes share eight pictures."""
    world = len(several)
    for job in jobs(paper):
        for step, whole in enumerate(alone[job]["ids"]):
            shares = [told[job]["ids"][step] for told in several]
            assert shares == [whole[rank::world] for rank in range(world)]
            assert [len(share) for share in shares] == {2: [4, 4], 3: [3, 3, 2]}[world]


def test_gradients_are_those_of_one_process(paper, alone, several):
    """Before each update, on every process. Later ones are further off, because AdamW divides a gradient that is zero
    but for rounding (of a bias that softmax cancels) by its own size: such weights move by a whole step either way."""
    for job in jobs(paper):
        one = reference(paper, alone, job, len(several))
        for told in several:
            first, *later = distances(one, told[job])
            assert first < CLOSE and max(later) < LATER, job


def test_weights_after_several_steps(paper, alone, several):
    """Close to one process's, but for BatchNorm's running statistics; on all processes the same bit for bit, these
    statistics and the codes included."""
    for job in jobs(paper):
        one, first = reference(paper, alone, job, len(several))["weights"], several[0][job]["weights"]
        names = [name for name in one if "running" not in name and "num_batches" not in name]
        assert distance(*({name: weights[name] for name in names} for weights in (one, first))) < ENDS, job
        for told in several[1:]:
            assert all(torch.equal(x, first[name]) for name, x in told[job]["weights"].items()), job


def test_the_log_says_the_same(paper, alone, several):
    """Losses are those of the global batch, not sums over processes."""
    for job in jobs(paper):
        one = logged(reference(paper, alone, job, len(several)))
        for x, y in zip(one, logged(several[0][job]), strict=True):
            assert x == pytest.approx(y, abs=2e-3, rel=1e-4), job


@of("soho")
def test_the_dictionary_is_that_of_one_process(paper, alone, several):
    """SOHO's codes, counts and sums after two steps with it."""
    one = alone[f"pretrain, cut {len(several)}"]["weights"]
    names = [name for name in one if name.startswith("dictionary.")]
    assert len(names) == 4 and one["dictionary.cluster_sum"].sum() > 0
    for told in several:
        for name in names:
            assert (told["pretrain"]["weights"][name] - one[name]).abs().max() < 3e-5, name  # measured: 6e-6


def test_every_metric_of_the_final_evaluation(paper, alone, several):
    """Of the same checkpoint on eleven test samples, their controls and the held-out split: equal, not close; but for
    the one metric that is a mean of probabilities, which are added up in another order."""
    for job in TASKS:
        one = flat(alone[f"{job}, evaluated"])
        means = {name for name in one if name.endswith("/mlm_synonyms")}
        assert len(one) > 15 and len(means) == 2 * (paper == "vilta" and job == "pretrain")
        for told in several:
            found = flat(told[f"{job}, evaluated"])
            assert {name: one[name] for name in means} == pytest.approx({name: found[name] for name in means}, rel=1e-5)
            assert {name: x for name, x in found.items() if name not in means} == {
                name: x for name, x in one.items() if name not in means}  # fmt: skip


def test_a_signal_to_one_process_stops_all_after_the_same_step(paper, several):
    for told in several:
        signum, said, steps = told["stop"]
        assert steps == [1, 2] and signum == signal.SIGTERM and "stopped" in said
    assert "step_2 is saved" in several[0]["stop"][1]


# ---------------------------------------------------------------------------------------------------------------------
# What differs by nature, and how


@of(*BY_PIECE)
def test_mismatched_texts_come_from_the_processs_own_share(paper, several):
    """Negatives are not gathered: each text beside a picture is one of the share's own."""
    for told in several:
        texts, used = ({tuple(row) for row in told["pretrain"][name].tolist()} for name in ("texts", "alone"))
        assert used and used <= texts
    shares = [{tuple(row) for row in told["pretrain"]["texts"].tolist()} for told in several]
    assert not shares[0] <= shares[1], "so the share of another process would be noticed"


@of("tden")
def test_only_ism_depends_on_the_shares(paper, alone, several):
    """TDEN: its negatives and the BatchNorm of its poolers are those of a process; the other losses of a step are not
    touched before the weights are."""
    whole, found = (logged(told["one update"])[0] for told in (alone, several[0]))
    for name in ("mlm", "msg", "moc", "mlm_2", "msg_2", "moc_2"):
        assert whole[name] == pytest.approx(found[name], abs=2e-4), name
    assert abs(whole["ism"] - found["ism"]) > 0.01


@of(*BY_PIECE)
def test_uneven_shares_weigh_as_much_as_others(paper, alone, several):
    """SOHO, ViLTA: a step is the mean over processes of means over shares. With shares alike, and without BatchNorm,
    that is the mean over the batch; with a smaller last share its samples weigh more."""
    one, found = alone["tune"], several[0]["tune"]
    far, shares = distances(one, found)[0], [told["tune"]["pieces"][0]["vqa"][0] for told in several]
    assert found["log"][0]["vqa"] == pytest.approx(sum(shares) / len(shares), rel=1e-4)
    is_same = paper == "vilta" and len(several) == 2  # SOHO has BatchNorm
    assert far < CLOSE if is_same else far > 0.01


@of(*BY_COUNTS, "vilta")
def test_pieces_of_any_size_are_one_step(paper, alone):
    """--micro-batch 1 x 8 = 2 x 4 = 3, 3, 2 = the whole, with numbers of words that vary. ViLTA: pieces of one size."""
    for job in TASKS if paper == "vcgpt" else ["tune"]:
        whole = alone[f"{job}, micro 0"]
        for n in (1, 2, 3) if paper in BY_COUNTS else (1, 2):
            found = alone[f"{job}, micro {n}"]
            assert distances(whole, found)[0] < CLOSE, (job, n)
            assert paper == "vcgpt" or len(found["pieces"]) == STEPS * math.ceil(PICTURES / n)


@of("tden", *BY_PIECE)
def test_what_a_masked_word_weighs(paper, alone):
    """SOHO, ViLTA: losses are means over a piece, so a masked word in a piece of few counts more. TDEN: it does not."""
    name, step = {"tden": ("mlm", 0), "soho": ("mlm", 1), "vilta": ("lm", 0)}[paper]
    found = alone["pretrain, micro 2"]
    losses, counts = zip(*[piece[name] for piece in found["pieces"] if name in piece][:4], strict=True)
    by_word = sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
    by_piece = sum(losses) / len(losses)
    assert len(set(counts)) > 1 and abs(by_word - by_piece) > 5e-4
    assert found["log"][step][name] == pytest.approx(by_word if paper == "tden" else by_piece, abs=1e-4)
