"""The engine: flags, precedence, schedule, optimizer groups, run directories, checkpoints, log."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import common
from common import UserError


@dataclass
class Config(common.RunConfig):
    depth: int = 4  # layers of the thing
    rate: float = 0.5  # 10 % of something
    loud: bool = True  # HERE[x-1] (not in the paper): say it
    steps: int = 0  # optimizer steps
    epochs: float = 1.0  # passes


PRESETS = {"tiny": dict(depth=1, rate=0.1, steps=7), "small": dict(depth=2), "base": {}}
RECIPES = {("caption", "tiny"): dict(rate=0.2), ("caption", "tiny", "coco"): dict(depth=3)}


def parse(*argv):
    return common.parse_flags(Config, list(argv), "x.py", {"ask": dict(nargs="+", help="ask")})


def test_flags_come_from_the_dataclass():
    given, commands = parse("--depth", "3", "--rate=0.25", "--no-loud", "--ask", "a.jpg", "b.jpg")
    assert given == {"depth": 3, "rate": 0.25, "loud": False} and commands.ask == ["a.jpg", "b.jpg"]
    assert parse("--log-every", "3")[0] == parse("--log_every", "3")[0] == {"log_every": 3}
    assert parse("--out", "runs/a_b")[0] == {"out": "runs/a_b"}, "only flags are respelled, never values"


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--dept", "3"], "unknown flag --dept; did you mean --depth?"),
        (["--qqqq"], "unknown flag --qqqq"),
        (["--depth", "many"], "invalid int value: 'many'"),
        (["--depth"], "expected one argument"),
    ],
)
def test_wrong_flags_say_what_to_do(argv, told):
    with pytest.raises(UserError, match=told.replace("?", r"\?")):
        parse(*argv)


def test_help_shows_comments_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "layers of the thing [4]" in text and "10 % of something [0.5]" in text and "say it [True]" in text
    assert "x-1" not in text and "of initialisation, data order" in text
    assert set(common.field_comments(Config)) == {field.name for field in dataclasses.fields(Config)}


def test_precedence_dataclass_preset_recipe_init_flags():
    def build(architecture=None, **given):
        return common.build_config(Config, given, PRESETS, RECIPES, architecture)

    assert (build().preset, build().depth, build().rate, build().loud) == ("tiny", 1, 0.1, True)
    assert build(task="caption").rate == 0.2
    assert build(task="caption", data="coco", preset="tiny").depth == 3
    assert build({"depth": 9}, task="caption").depth == 9
    assert build({"depth": 9}, depth=11).depth == 11
    assert build(epochs=2.0).steps == 0, "--epochs overrules a preset's steps"
    with pytest.raises(UserError, match="contradict"):
        build(steps=1, epochs=2.0)
    with pytest.raises(UserError, match="did you mean small"):
        build(preset="smal")


def test_default_presets(tmp_path):
    found = [common.default_preset(d) for d in ("scenes", "flickr8k", "coco", "mine.jsonl", "mine.csv", str(tmp_path))]
    assert found == ["tiny", "small", "base", "small", "small", "small"]


def test_schedule_by_hand():
    # 10 steps, 20 % warm-up: 1/2, 1, then 8 steps down a straight line that would reach 0 at step 10
    found = [common.linear_schedule(s, 10, 0.2) for s in range(10)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.linear, self.norm = nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.positions = nn.Parameter(torch.zeros(3, 4))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_adamw_groups():
    net = Net()
    optimizer = common.adamw(net, lambda name: 1.0 if "linear" in name else 0.1, 0.01)
    where = {id(p): (g["peak"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert where[id(net.linear.weight)] == (1.0, 0.01) and where[id(net.linear.bias)] == (1.0, 0.0)
    assert {where[id(p)] for p in (net.embed.weight, net.norm.weight, net.positions)} == {(0.1, 0.0)}
    assert id(net.frozen) not in where


class Words:
    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def machine():
    return common.Machine(torch.device("cpu"), torch.float32, 0, 1, 0, "test")


def test_run_directories(tmp_path, monkeypatch, machine):
    monkeypatch.chdir(tmp_path)
    paths = [common.Run.create("m", Config(), machine).path for _ in range(3)]
    assert [str(p) for p in paths] == ["runs/m-scenes", "runs/m-scenes-2", "runs/m-scenes-3"]
    assert common.Run.create("m", Config(data="x/mine.jsonl", task="caption"), machine).path.name == "m-mine-caption"
    common.Run.create("m", Config(out="here"), machine)
    common.Run.create("m", Config(out="here"), machine)  # nothing was saved there: start again
    (tmp_path / "here" / "last").mkdir()
    with pytest.raises(UserError, match="--resume here"):
        common.Run.create("m", Config(out="here"), machine)
    assert json.loads((paths[0] / "config.json").read_text())["depth"] == 4


def test_checkpoints_links_and_reading_back(tmp_path, machine):
    run, net = common.Run.create("m", Config(out=str(tmp_path / "r")), machine), Net()
    optimizer = common.adamw(net, lambda name: 1.0, 0.01)
    net.linear(net.embed(torch.tensor([1]))).sum().backward()
    optimizer.step()
    for step, is_best in ((1, True), (2, False), (3, False)):
        run.save(step, net, Words(), optimizer, {"best": 0.5})
        run.evaluated(step, {"best": 0.5, "val": {"x": step}}, is_best)
    assert (run.path / "last").resolve().name == "step_3" and (run.path / "best").resolve().name == "step_1"
    assert sorted(p.name for p in run.path.glob("step_*")) == ["step_1", "step_3"]
    where, values = common.find_checkpoint(str(run.path), "m")
    assert where.name == "step_1" and values["depth"] == 4
    assert common.find_checkpoint(str(run.path), "m", prefer="last")[0].name == "step_3"
    assert common.find_checkpoint(str(run.path / "step_3"), "m")[0].name == "step_3"
    other, other_optimizer = Net(), None
    common.load_model_weights(other, where)
    assert torch.equal(other.linear.weight, net.linear.weight)
    other_optimizer = common.adamw(other, lambda name: 1.0, 0.01)
    torch.manual_seed(5)
    wanted = {"step": 3, "best": 0.5, "val": {"x": 3}}
    assert common.load_training_state(run.path / "last", other_optimizer) == wanted
    assert torch.equal(
        other_optimizer.state[other.linear.weight]["exp_avg"], optimizer.state[net.linear.weight]["exp_avg"]
    )
    with pytest.raises(UserError, match="run of m.py, not of other.py"):
        common.find_checkpoint(str(run.path), "other")
    with pytest.raises(UserError, match="not a run directory"):
        common.find_checkpoint(str(tmp_path), "m")
    with pytest.raises(UserError, match="another network"):
        common.load_model_weights(nn.Linear(3, 3), where)
    (where / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="nothing in it was run"):
        common.load_model_weights(other, where)


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path, machine):
    run, net = common.Run.create("m", Config(out=str(tmp_path / "r")), machine), Net()
    optimizer = common.adamw(net, lambda name: 1.0, 0.01)
    run.save(1, net, Words(), optimizer, {"best": 0.0})

    class Full:
        def save(self, folder):
            raise OSError("No space left on device")

    with pytest.raises(UserError, match="step_2 could not be saved.*No space.*make room"):
        run.save(2, net, Full(), optimizer, {"best": 0.0})
    assert common.find_checkpoint(str(run.path), "m", prefer="last")[0].name == "step_1"
    assert not (run.path / "step_2").exists()


def test_log_line_and_jsonl(tmp_path, machine, capsys):
    run = common.Run.create("m", Config(out=str(tmp_path / "r")), machine)
    log = common.Logger(run, machine, steps=4, every=2)
    for step in range(1, 5):
        log.step(step, {"loss": torch.tensor(1.5)}, 1e-3, torch.tensor(0.25), 10)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].split()[:6] == ["step", "4/4", "loss", "1.500", "lr", "1.0e-03"]
    records = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [2, 4] and records[0]["grad_norm"] == 0.25 and records[0]["mfu"] == 0


def test_device_errors_name_the_way_out(monkeypatch):
    with pytest.raises(UserError, match="did you mean cuda"):
        common.start_machine(Config(device="cudda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu"):
        common.start_machine(Config(device="cuda"))
    machine = common.start_machine(Config(workers=0, device="cpu", dtype="bf16"))
    assert machine.dtype == torch.bfloat16 and "cpu" in machine.reason and "--dtype" in machine.reason


def test_table():
    text = common.table({"a": {"x": 0.5, "y": 1.0}, "b": {"x": 0.25}})
    assert [line.split() for line in text.splitlines()] == [["a", "b"], ["x", "0.500", "0.250"], ["y", "1.000", "-"]]


def test_why_compile_is_off(monkeypatch, machine):
    assert "--compile turns it on" in common.why_not_compiled(Config(), machine)
    monkeypatch.setattr(common.shutil, "which", lambda name: "/usr/bin/c++" if name == "clang++" else None)
    monkeypatch.setattr(torch._dynamo, "is_dynamo_supported", lambda: True)
    assert common.why_not_compiled(Config(compile=True), machine) == ""
    monkeypatch.setattr(torch._dynamo, "is_dynamo_supported", lambda: False)
    assert "cannot compile under Python" in common.why_not_compiled(Config(compile=True), machine)
    monkeypatch.setattr(common.shutil, "which", lambda name: None)
    assert "install g++" in common.why_not_compiled(Config(compile=True), machine)
    net = Net()
    assert common.spread(net, Config(compile=True), machine) is net, "and then it is left out, not failed at"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_on_a_terminal_and_plain_lines_in_a_pipe(machine, monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(common.sys.stderr, "isatty", lambda: is_terminal, raising=False)
    log = common.Logger(None, machine, steps=4, every=2)
    for step in (1, 2, 3, 4):
        log.step(step, {"loss": torch.tensor(1.0)}, 0.1, 1.0, 5)
    log.close()
    said = capsys.readouterr()
    assert [line.split()[1] for line in said.out.splitlines() if line.startswith("step")] == ["2/4", "4/4"]
    assert ("4/4 [" in said.err) == is_terminal and (said.err == "") != is_terminal


def test_numbers_out_of_range():
    common.check_numbers(Config(depth=0, workers=-1, seed=-3), "")
    for wrong, told in ((dict(depth=0), "--depth 0: give 1 or more"), (dict(rate=-0.1), "--rate -0.1: give 0 or more"),
                        (dict(log_every=0), "--log-every 0"), (dict(rate=float("nan")), "--rate nan")):  # fmt: skip
        with pytest.raises(UserError, match=told):
            common.check_numbers(Config(**wrong), "depth")


def test_an_out_that_cannot_be_made(tmp_path, machine):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        with pytest.raises(UserError, match="cannot be made.*give another --out"):
            common.Run.create("m", Config(out=str(tmp_path / out)), machine)


def test_a_log_line_that_a_crash_cut_off(tmp_path):
    run = common.Run(tmp_path)
    for step in (1, 2, 3):
        run.log({"step": step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run.forget_after(2)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_full_disk_is_one_line(capsys):
    def main():
        raise OSError(28, "No space left on device", "x/log.jsonl")

    with pytest.raises(SystemExit, match="2"):
        common.run_main(main)
    assert capsys.readouterr().err.startswith("error: [Errno 28] No space left on device: 'x/log.jsonl'; make room")


def test_lost_links(tmp_path, machine):
    run, net = common.Run.create("m", Config(out=str(tmp_path / "r")), machine), Net()
    optimizer = common.adamw(net, lambda name: 1.0, 0.01)
    for step in (9, 10):
        run.save(step, net, Words(), optimizer, {"best": 0.0})
        run.evaluated(step, {"best": 0.0}, step == 9)
    (run.path / "last").unlink(), (run.path / "best").unlink()
    assert common.find_checkpoint(str(run.path), "m")[0].name == "step_10"


def test_own_data_is_small_however_its_ending_is_written():
    assert common.default_preset("photos.JSONL") == common.default_preset("photos.csv") == "small"
    assert common.default_preset("coco") == "base" and common.default_preset("scenes") == "tiny"


def test_tensors_of_one_process_stay_as_they_are():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor(3)
    assert common.sum_tensors(one, two) is None and common.share_tensor(one) is None
    assert one.tolist() == [1, 2] and two == 3


class Block(nn.Sequential):
    pass


def test_what_is_computed_anew_does_not_count_twice(machine):
    """Batch norms note the statistics of a batch once, and give them the same gradients, whether or not their block is
    recomputed; norms that are frozen stay so."""
    found = []
    for is_recomputed in (False, True):
        torch.manual_seed(0)
        block = Block(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.BatchNorm2d(4).eval())
        model = nn.Sequential(block, nn.Conv2d(4, 1, 1))
        cfg = Config(gradient_checkpointing=is_recomputed)
        model, calls = common.spread(model, cfg, machine, Block), []
        block[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for k in range(3):
            model(torch.full((2, 3, 2, 2), 1.0 + k) * torch.arange(2.0)[:, None, None, None]).sum().backward()
        assert len(calls) == (6 if is_recomputed else 3)
        assert block[1].momentum == 0.3 and block[1].num_batches_tracked == 3 and block[3].num_batches_tracked == 0
        found.append([*model.state_dict().values(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
