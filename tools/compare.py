"""Finished runs side by side: what --eval-only of every model file does."""

import dataclasses

import common
from common import UserError


def evaluate_runs(sources: list[str], given: dict, model_name, config_class, flags: list[str], check, evaluate) -> None:
    """--eval-only: finished runs, each on its own data or on what the flags say, in one table for each split.

    check(cfg) raises UserError; evaluate(cfg, checkpoint, machine, folder) -> {split or control: metrics}.
    """
    common.allow(given, common.EVAL_FLAGS + flags, "--eval-only")
    if not sources and given.get("init", "none") != "none":
        sources = [given["init"]]
    if not sources:
        raise UserError(f"--eval-only needs a trained model: --eval-only RUN, e.g. runs/{model_name}-scenes")
    found = [(source, *common.find_checkpoint(source, model_name)) for source in sources]
    configs = [common.config_from(config_class, {**values, "out": "", **given}) for _, _, values in found]
    for cfg in configs:
        check(cfg)
    machine, tables = common.start_machine(configs[0]), {}
    is_mixed = len({cfg.data for cfg in configs}) > 1
    run = common.Run.create(model_name, dataclasses.replace(configs[0], task="eval"), machine)
    for i, (cfg, (source, checkpoint, _)) in enumerate(zip(configs, found, strict=True)):
        folder = run.path if len(found) == 1 else run.path / f"{i + 1}-{checkpoint.parent.name}-{checkpoint.name}"
        if machine.is_main:
            folder.mkdir(exist_ok=True)
            common.write_json(folder / "config.json", {"model": model_name, **dataclasses.asdict(cfg), "task": "eval"})
        for name, column in evaluate(cfg, checkpoint, machine, folder).items():
            about = f" on {common.data_name(cfg.data)}" * is_mixed
            title, heading = ("", name) if len(found) == 1 else (name, source + about)
            tables.setdefault(title, {})[heading] = column
    for title, columns in tables.items():  # empty on all processes but the first
        print(f"\n{title}\n{common.table(columns)}")
    if machine.is_main:
        where = run.path if len(found) == 1 else f"a folder for each in {run.path}"
        print(f"\n{where}: metrics.json, samples.png and result files")
