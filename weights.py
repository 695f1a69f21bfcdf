"""Weights that other people trained: reading their files, and filling a network of ours from them, every key accounted
for. Nothing here knows a model; each brings a table of names.

Reading map: reading | names | sizes | filling | spellings.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch

import corpora
import language
from common import UserError, read_json, read_tensors

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_weights(source: str) -> tuple[dict, dict]:
    """(config.json, state dict) of a transformers checkpoint: a local directory or a hub id.

    Reads model.safetensors, else pytorch_model.bin with weights_only, so that a file can never run code.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        try:
            folder = Path(hf_hub_download(source, "config.json")).parent
            try:
                hf_hub_download(source, "model.safetensors")
            except Exception:  # many older repositories hold only the pickle
                hf_hub_download(source, "pytorch_model.bin")
        except Exception as error:
            raise UserError(
                f"cannot fetch {source} from the hub ({type(error).__name__}). Give a local directory that holds "
                "config.json and model.safetensors, or `none` to start from random weights"
            ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: give a directory as transformers' save_pretrained writes it")
    config = json.loads((folder / "config.json").read_text())
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return config, read_tensors(folder / name)
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin (shards are not read: merge them)")


def choose_tokenizer(cfg, official: str, checkpoint, corpus, kind: str, is_fixed: bool) -> language.Tokenizer:
    """A run's own; that of cfg.tokenizer or of the official weights; or one of `kind` trained on the corpus.

    cfg.vocab_size is fixed where weights bring it; otherwise it becomes the tokenizer's.
    """
    if checkpoint:
        tokenizer = language.Tokenizer.load(checkpoint)
    elif cfg.tokenizer != "none" or official != "none":
        tokenizer = language.Tokenizer.from_pretrained(cfg.tokenizer if cfg.tokenizer != "none" else official)
    else:
        tokenizer = language.Tokenizer.train(corpora.texts(corpus, cfg.world), cfg.vocab_size, kind)
    if not is_fixed and not checkpoint:
        cfg.vocab_size = tokenizer.vocab_size
    elif tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} entries, the word embedding {cfg.vocab_size}")
    return tokenizer


def known_answers(corpus, checkpoint: Path | None, init: str, has_answers: bool) -> tuple[str, ...]:
    """VQA's answers by class: a run's own, those listed beside official weights that have an answer head, or the
    corpus'. UserError where such weights come without a list: nothing else says which of their answers is which."""
    file = (checkpoint or Path(init)).parent / "answers.json"
    if (checkpoint or has_answers) and file.is_file():
        return tuple(read_json(file))
    if has_answers:
        raise UserError(f"which answer is which in {init}? Put the list of them, in its order, into {file}")
    return tuple(corpus.answers) if corpus else ()


# ---------------------------------------------------------------------------------------------------------------------
# Names


def module_names(table, depth) -> dict[str, list[str]]:
    """A table of names, layer by layer -> {our module: the modules of theirs that it holds, to be concatenated}.

    table: rows of (our prefix, their prefix, {the rest of our name: the rest of theirs, or a tuple}), with {} where the
    number of a layer stands; depth: our prefix -> how many layers.
    """
    modules = {}
    for ours, theirs, inside in table:
        for i in range(depth(ours) if "{}" in ours else 1):
            for mine, names in inside.items():
                names = (names,) if isinstance(names, str) else names
                modules[ours.format(i) + mine] = [theirs.format(i) + name for name in names]
    return modules


def tensor_names(model, modules: dict[str, list[str]]) -> dict[str, list[str]]:
    """Our name of each tensor in these modules -> their names, to be concatenated."""
    of = {name: name.rsplit(".", 1) for name in model.state_dict()}
    return {name: [f"{theirs}.{tensor}" for theirs in modules[module]] for name, (module, tensor) in of.items()
            if module in modules}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def sizes_of(state: dict, shapes: dict, depths: dict) -> dict:
    """Config fields from a state dict, as far as it has what tells them. shapes: {field: (key, dimension)}; depths:
    {field: what comes before the numbers of layers}."""
    sizes = {name: state[key].size(dim) for name, (key, dim) in shapes.items() if key in state}
    for name, prefix in depths.items():
        if layers := {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}:
            sizes[name] = len(layers)
    return sizes


def sine_table(grid: int, width: int):
    """[grid^2, width]: sines and cosines of row and column, a quarter of the width each. Where positions
    start from nothing, neighbours should look alike from the first step."""
    turns = 100 ** -torch.linspace(0, 1, width // 4)  # from one radian per cell down to a hundredth
    angles = torch.arange(grid)[:, None] * turns  # [grid, width / 4]
    half = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    rows, columns = half[:, None].expand(grid, grid, -1), half[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=2).reshape(grid * grid, -1)


def resize_positions(positions, grid: int):
    """Learned table [1 + g^2, D] -> [1 + grid^2, D], bicubically, for pictures of another size; [CLS] keeps its row."""
    side = math.isqrt(len(positions) - 1)
    if side == grid:
        return positions
    table = positions[1:].view(1, side, side, -1).permute(0, 3, 1, 2).float()
    table = torch.nn.functional.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], table.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(positions)])


# ---------------------------------------------------------------------------------------------------------------------
# Filling


def load_renamed(module, state: dict, names: dict, not_used: tuple[str, ...], what: str, may_lack=()) -> None:
    """Fill `module` from official `state`: names maps our key -> their key, or a list of keys to concatenate.

    Every key must be used once, or start with an entry of `not_used`; every parameter of ours must be filled, save
    those whose name contains an entry of `may_lack`. Otherwise UserError with the lists, and nothing is changed.
    """
    wanted = [key for theirs in names.values() for key in ([theirs] if isinstance(theirs, str) else theirs)]
    ours = module.state_dict()
    missing = [key for key in wanted if key not in state]
    left_over = [key for key in state if key not in set(wanted) and not key.startswith(not_used)]
    unfilled = [key for key in ours if key not in names and not any(part in key for part in may_lack)]
    if missing or left_over or unfilled:
        lists = [("missing in the file", missing), ("unknown in the file", left_over), ("not filled here", unfilled)]
        told = "; ".join(f"{title}: {', '.join(keys[:5])} ({len(keys)} in all)" for title, keys in lists if keys)
        raise UserError(f"these weights are not {what} of this size and form. {told}")
    lists = {ours: [theirs] if isinstance(theirs, str) else theirs for ours, theirs in names.items()}
    new = {k: torch.cat([state[x] for x in t]) if len(t) > 1 else state[t[0]] for k, t in lists.items()}
    wrong = [
        f"{k}: {tuple(new[k].shape)} in the file, {tuple(ours[k].shape)} here"
        for k in new
        if new[k].shape != ours[k].shape
    ]
    if wrong:
        raise UserError(f"{what} weights of other sizes: {'; '.join(wrong[:5])} ({len(wrong)} in all)")
    module.load_state_dict(new, strict=not may_lack)


def load_parts(model, state: dict, names: dict, not_used: tuple[str, ...], what: str) -> str:
    """As load_renamed, but a part (a child of `model`) of which `state` has nothing keeps its first weights.

    A part that is there must be whole. Returns a sentence on which parts the file has, which are new, what is left.
    """
    lists = {ours: [theirs] if isinstance(theirs, str) else theirs for ours, theirs in names.items()}
    there = {ours.split(".")[0] for ours, theirs in lists.items() if theirs[0] in state}
    fresh = [name for name, part in model.named_children() if name not in there and part.state_dict()]
    if not there:
        raise UserError(f"{what} has nothing for this model; its first keys are {', '.join(list(state)[:3])}")
    kept = {ours: theirs for ours, theirs in names.items() if ours.split(".")[0] in there}
    may_lack = ("num_batches_tracked", *(f"{name}." for name in fresh))  # the first is a count that nothing reads
    load_renamed(model, state, kept, not_used, what, may_lack)
    left = {key.split(".")[0] for key in state} - {key.split(".")[0] for ours in kept for key in lists[ours]}
    told = (("has", sorted(there)), ("new here", fresh), ("not used", sorted(left)))
    return f"{what}: " + "; ".join(f"{title} {', '.join(parts)}" for title, parts in told if parts)


# ---------------------------------------------------------------------------------------------------------------------
# Spellings: the same weights under the names that different programs gave them

CLIP_NAMES = (("embeddings.class_embedding", "class_embedding"), ("embeddings.patch_embedding.", "conv1."),
              ("embeddings.position_embedding.weight", "positional_embedding"), ("pre_layrnorm", "ln_pre"),
              ("post_layernorm", "ln_post"), ("encoder.layers.", "transformer.resblocks."), (".layer_norm", ".ln_"),
              (".self_attn.", ".attn."), (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."))  # fmt: skip


def parted(state: dict) -> dict:
    """Attention's in_proj_weight and in_proj_bias as q_proj, k_proj and v_proj."""
    found = {}
    for key, x in state.items():
        if part := re.search(r"in_proj_(weight|bias)$", key):
            found |= {f"{key[: part.start()]}{q}_proj.{part[1]}": y for q, y in zip("qkv", x.chunk(3), strict=True)}
        else:
            found[key] = x
    return found


def clip_vision(state: dict) -> dict:
    """CLIP's vision tower under OpenAI's names (class_embedding, conv1.weight, transformer.resblocks.0.ln_1.weight),
    attention parted, from a full model or the tower alone: OpenAI's (`visual.`), or transformers', with or without
    `vision_model.`. UserError where there is none."""
    prefix = next((x for x in ("visual.", "vision_model.") if any(key.startswith(x) for key in state)), "")
    state = parted({key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)})
    for theirs, openais in CLIP_NAMES:
        state = {key.replace(theirs, openais): x for key, x in state.items()}
    if "class_embedding" not in state:
        raise UserError(f"no vision tower of CLIP's; its first keys are {', '.join(list(state)[:3])}")
    return {key: x for key, x in state.items() if key not in ("proj", "embeddings.position_ids")}


def roberta(state: dict) -> dict:
    """RoBERTa under transformers' names without `roberta.`, its word head `lm_head.` without tied copies."""
    state = {key.removeprefix("roberta."): x for key, x in state.items() if not key.startswith("lm_head.decoder.")}
    return {key: x for key, x in state.items() if key != "embeddings.position_ids" and not key.startswith("pooler.")}
