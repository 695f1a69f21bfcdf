"""What ViLTA writes, and what it makes of it: a page about a run of vilta.py's pre-training, and numbers for its log.

    python tools/negatives.py runs/vilta-scenes                     12 pictures of the test split
    python tools/negatives.py RUN --split val --pictures 40 --seed 1 --out FILE
    python tools/negatives.py RUN --data own.jsonl                  other pictures than the run's

Written into the run's directory, or into --out:

    negatives.html      each picture with its caption, the written negative, what the model thinks of both, and one word
                        hidden: the words that the teacher holds possible there beside those of the model. One page that
                        needs no network.

Each picture is looked at alone, in evaluation, so that what is said of it depends on no other.
"""

from __future__ import annotations

import base64
import html
import io
import random
import sys
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

import common  # noqa: E402
import corpora  # noqa: E402
import data  # noqa: E402
from common import UserError  # noqa: E402
from eval import score_pairs  # noqa: E402
from tools import judge  # noqa: E402

BEST, LEAST, MOST = 5, 160, 288  # words that are shown of a blank; least and most pixels of a picture on the page

# ---------------------------------------------------------------------------------------------------------------------
# What vilta.py and tools/exam.py call


def rewritten(model, texts: list[str], seed: int = 0) -> list[str | None]:
    """Each text with a word or two rewritten by the model as a hard negative; None where nothing can be rewritten."""
    found = write(model, model.tokenized(texts), seed)
    told = [model.tokenizer.decode(ids[1:].tolist()) for ids in found["ids"]]
    return [text if is_written else None for text, is_written in zip(told, found["is_written"].tolist(), strict=True)]


def write(model, rows: dict, seed: int) -> dict:
    """What model.write makes of ids and keep_mask [R, T]; the luck follows from the seed."""
    luck = torch.Generator().manual_seed(seed)
    lots = {name: torch.rand(rows["ids"].shape, generator=luck) for name in ("order", "lots")}
    return model.write(rows["ids"], rows["keep_mask"], *data.to_device(model, lots).values())


def written_pairs(model, items) -> list[data.Example]:
    """Two Examples a picture: its first caption, label 1, and the same rewritten, label 0."""
    items, pairs = [item for item in items if item.captions], []
    texts = [item.captions[0] for item in items]
    negatives = [text for k in range(0, len(texts), 256) for text in rewritten(model, texts[k : k + 256], k)]
    for k, (item, text) in enumerate(zip(items, negatives, strict=True)):
        for label, said in ((1, item.captions[0]), (0, text)) if text else ():
            pairs.append(data.Example(f"{k}-{label}", (item.image_id,), (item.image,), said, label))
    return pairs


KINDS = ("own", "written", "other")  # of pairs, by number


@torch.no_grad()
def log_of(out: dict, rows: dict) -> dict:
    """What the log of a training step says beside the losses: acc_, ITM's accuracy on each kind of pair; gen_top1, the
    writer's at hidden words; gen_p, the probability of what it wrote; written, its share of all pairs."""
    if "itm" not in out or "order" not in rows:
        return {}
    is_right = out["itm"].argmax(1) == (rows["kinds"] == 0)
    told = {f"acc_{name}": mean(is_right[rows["kinds"] == kind]) for kind, name in enumerate(KINDS)
            if name != "written" or "p" in rows}  # fmt: skip
    if "gen" in out:
        told["gen_top1"] = mean(out["gen"].argmax(1) == rows["mlm_labels"][rows["mlm_labels"] != -100])
    if "p" in rows:
        is_written = rows["kinds"] == 1
        told |= {"gen_p": mean(rows["p"][is_written]), "written": mean(is_written)}
    return told


def mean(x):
    return x.float().sum() / max(1, len(x))


def metrics(asked, items) -> dict:
    """Of a tools.exam.Exam of a pre-trained ViLTA and some items, see docs/vilta.md for the names."""
    from eval import with_other_pictures

    items = [item for item in items if item.captions]
    found = filled(asked, items)
    if "hn" not in asked.model.cfg.arm or not asked.model.cfg.syn_ratio:
        return found
    with asked.machine.autocast():
        pairs = written_pairs(asked.model, items)
    if not pairs:
        return found | {"written": 0.0}
    found["written"] = len(pairs) / 2 / len(items)
    found["itm_accuracy_blind"] = score_pairs(with_other_pictures(pairs), asked.scores)["itm_accuracy"]
    if hasattr(items[0].image, "objects"):
        verdicts = [judge.verdict(pair.text, pair.images[0]) for pair in pairs if pair.label == 0]
        for name in ("false", "true", "unparsable"):
            found[f"written_{name}"] = verdicts.count(name) / len(verdicts)
        # what turned out to be true, or no sentence, is no test of the matching
        pairs = [pair for k, pair in enumerate(pairs) if verdicts[k // 2] == "false"]
    return found | ({"itm_accuracy_written": score_pairs(pairs, asked.scores)["itm_accuracy"]} if pairs else {})


def filled(asked, items) -> dict:
    """{mlm_accuracy, and of scenes mlm_synonyms}: a content word of each picture's first caption is hidden. Accuracy:
    the share where that word is the most probable; synonyms: mean probability of other words of its meaning."""
    model, tok, rows = asked.model, asked.model.tokenizer, []
    is_scene = hasattr(items[0].image, "objects")
    for batch in asked.batches(items):
        told = model.tokenized([captions[0] for captions in batch["captions"]])
        places = model.content_words(told["ids"], told["keep_mask"])
        where = torch.zeros_like(places)
        for row, ids, may_be in zip(where, told["ids"].tolist(), places, strict=True):
            spots = may_be.nonzero()[:, 0].tolist()
            if is_scene:
                spots = [spot for spot in spots if synonyms_of(tok, ids[spot])]
            if spots:
                row[random.Random(str([i for i in ids if i != tok.pad])).choice(spots)] = True
        gold = told["ids"][where]
        with torch.no_grad(), asked.machine.autocast():
            p = model.fill(batch, told["ids"].masked_fill(where, tok.mask), told["keep_mask"], where).float().softmax(1)
        for one, right in zip(p, gold.tolist(), strict=True):
            rows.append((int(one.argmax()) == right, float(one[synonyms_of(tok, right)].sum()) if is_scene else 0.0))
    rows = common.gather_lists(rows)
    names = ("mlm_accuracy", "mlm_synonyms")[: 1 + is_scene]
    return {name: sum(values) / len(rows) for name, values in zip(names, zip(*rows, strict=True), strict=False)}


def synonyms_of(tok, token: int) -> list[int]:
    """Tokens of the other words of the same meaning in the small world."""
    written = tok.backend.id_to_token(token)
    space = "Ġ" * written.startswith("Ġ")
    ids = (tok.backend.token_to_id(space + word) for word in judge.synonyms(written.removeprefix("Ġ")))
    return [i for i in ids if i is not None]


# ---------------------------------------------------------------------------------------------------------------------
# Looking


@dataclass
class Seen:
    """A picture and what the run makes of its first caption. ids: of the text alone, without <s> and </s>."""

    picture: Image.Image  # as the model sees it
    caption: str  # as it was given
    p: float  # that picture and caption belong together
    ids: list[int]
    written: list[int] | None = None  # ids of the negative: as long, other words in some places
    p_written: float = 0.0
    verdict: str = ""  # of scenes: is the negative false, true, unknown, or unparsable?
    hidden: int | None = None  # the place of the hidden word among ids
    teacher: torch.Tensor | None = None  # probabilities of all words there [V], of the text alone
    student: torch.Tensor | None = None  # with the picture


def load(source: str, device: str, **where):
    """The model of a pre-trained run, in evaluation; `where`: data and root, if not the run's own."""
    import vilta  # which imports this file

    advice = "take a run of vilta.py --task pretrain, e.g. runs/vilta-scenes"
    try:
        _, values = common.find_checkpoint(source, "vilta")
    except UserError as error:
        raise UserError(f"{error}: {advice}") from None
    if values.get("task") != "pretrain":
        began = f", like the one that it began with ({values['init']})" * (values.get("init", "none") != "none")
        raise UserError(f"{source} is a run of --task {values.get('task')}, which neither writes captions nor fills in "
                        f"words: {advice}{began}")  # fmt: skip
    model = vilta.ViLTA.from_run(source)
    model.cfg = replace(model.cfg, **where)
    return model.to(device)


def pictures_of(cfg, split: str, n: int) -> tuple[str, list[data.Item]]:
    """The split's name ("": the first that is evaluated) and its first n pictures that have captions."""
    import vilta

    try:
        corpora.check_task("pretrain", cfg.data)
        corpus = vilta.load_data(cfg)
    except UserError as error:
        raise UserError(f"{error}\nOther pictures with captions: --data, or --root for where they are now") from None
    split = split or corpus.finally_evaluated()[0]
    common.choose("split", split, list(corpus.splits))
    found = []
    for item in corpus.splits[split]:
        found += [item] * bool(item.captions)
        if len(found) == n:
            break
    if not found:
        others = ", ".join(name for name in corpus.splits if name != split)
        raise UserError(f"{cfg.data} has no captions in split {split}: choose another (--split {others})")
    return split, found


@torch.no_grad()
def look(model, items: list[data.Item], seed: int = 0) -> list[Seen]:
    """What the model makes of each item's first caption."""
    import vilta

    cfg, tok, found = model.cfg, model.tokenizer, []
    model.eval()
    samples = vilta.samples_of(cfg, model, None, items)
    for k, (item, batch) in enumerate(zip(items, data.eval_loader(samples, 1), strict=True)):
        caption = item.captions[0]
        rows, y = model.tokenized([caption]), model.encode_images(batch)
        ids, keep = rows["ids"], rows["keep_mask"]  # [1, T], without padding

        def matches(ids, keep=keep, y=y) -> float:
            return model.itm_head(model.join(ids, keep, y)).float().softmax(1)[0, 1].item()

        seen = Seen(as_shown(batch["pixels"][0]), caption, matches(ids), ids[0, 1:-1].tolist())
        if vilta.writes(cfg):
            made = write(model, rows, seed * 1_000_003 + k)
            if made["is_written"].item():
                seen.written, seen.p_written = made["ids"][0, 1:-1].tolist(), matches(made["ids"])
                if hasattr(item.image, "objects"):
                    seen.verdict = judge.verdict(tok.decode(seen.written), item.image)
        spots = (model.content_words(ids, keep)[0].nonzero()[:, 0] - 1).tolist()
        if hasattr(item.image, "objects"):  # rather a word of which there are others with its meaning
            spots = [spot for spot in spots if synonyms_of(tok, seen.ids[spot])] or spots
        if spots:
            seen.hidden = random.Random(f"{seed}/{k}").choice(spots)
            where = torch.zeros_like(keep)
            where[0, 1 + seen.hidden] = True
            shown = ids.masked_fill(where, tok.mask)
            seen.student = model.fill(batch, shown, keep, where)[0].float().softmax(0).cpu()
            if hasattr(model, "teacher") and vilta.learns_softly(cfg):  # what it is taught, see cfg
                logits = model.teacher(ids if cfg.teacher_input == "unmasked" else shown, keep, where)
                seen.teacher = vilta.soft_labels(logits, cfg.teacher_temperature, cfg.teacher_topk)[0].cpu()
        found.append(seen)
    return found


def as_shown(pixels) -> Image.Image:
    """uint8 [3, S, S], what the model sees, large enough to look at and not larger than that."""
    side = min(MOST, max(LEAST, pixels.size(1)))
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)


def candidates(p, n: int = BEST) -> list[tuple[int, float]]:
    """Of probabilities [V] the n largest that are not 0, the largest first: (token, probability)."""
    best = p.topk(min(n, len(p)))
    return [(i, x) for i, x in zip(best.indices.tolist(), best.values.tolist(), strict=True) if x > 0]


def summary(found: list[Seen], arm: str, writes: bool) -> str:
    """One line about all pictures that were looked at."""
    written = [seen for seen in found if seen.written]
    n, right = len(found), sum(seen.p > 0.5 for seen in found)
    told = f"{arm}: "
    if writes:
        told += f"{len(written)} of {n} captions rewritten ({len(written) / n:.0%})"
        judged = [seen.verdict for seen in written if seen.verdict]
        if judged:
            shares = (f"{judged.count(name) / len(judged):.0%} {name}"
                      for name in ("false", "true", "unknown", "unparsable"))  # fmt: skip
            told += f", of these {', '.join(shares)}"
        told += "; "
    told += f"ITM is right on {right} of {n} captions"
    if written:
        caught = sum(seen.p_written < 0.5 for seen in written)
        accuracy = (sum(seen.p > 0.5 for seen in written) + caught) / (2 * len(written))
        told += f" and {caught} of {len(written)} negatives, accuracy on these pairs {accuracy:.3f}"
    return told


# ---------------------------------------------------------------------------------------------------------------------
# The page. Whatever comes from data or from a vocabulary passes html.escape.

STYLE = """:root { color-scheme: light dark }
body { font: 16px/1.5 sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em }
article { display: flex; flex-wrap: wrap; gap: 1.5em; padding: 1.2em 0; border-top: 1px solid rgb(128 128 128 / 0.4) }
article > div { flex: 1; min-width: 20em } p { margin: 0 0 0.5em } img { border-radius: 6px; align-self: start }
mark { background: rgb(255 214 90); color: rgb(40 36 20); border-radius: 3px; padding: 0 3px }
del, .told { opacity: 0.65 } .p { font-variant-numeric: tabular-nums } table { border-collapse: collapse }
th { font-weight: normal; opacity: 0.65 } td, th { text-align: left; padding: 1px 1.6em 1px 0 }"""


def text_of(tok, ids) -> str:
    """A piece of a text, with the blank that it may begin with."""
    return tok.backend.decode(list(ids), skip_special_tokens=True)


def marked(tok, old: list[int], new: list[int]) -> str:
    """The text `new` as HTML: where `old` has other tokens these are struck out, and the new ones marked."""
    parts = []
    for is_new, pairs in groupby(zip(old, new, strict=True), key=lambda pair: pair[0] != pair[1]):
        was, now = (text_of(tok, ids) for ids in zip(*pairs, strict=True))
        was, now = html.escape(was.strip()), html.escape(now)  # words that are rewritten are whole
        parts.append(f" <del>{was}</del> <mark>{now.strip()}</mark>" if is_new else now)
    return "".join(parts).strip()


def table_of(tok, seen: Seen) -> str:
    """The best words for the hidden one, a column for the teacher, where there is one, and one for the model."""
    own, columns = seen.ids[seen.hidden], [("model, with the picture", seen.student)]
    columns = [("teacher, text alone", seen.teacher)] * (seen.teacher is not None) + columns

    def cell(i: int, p: float) -> str:
        word = html.escape(tok.backend.decode([i], skip_special_tokens=False).strip())
        return f'<td>{f"<b>{word}</b>" if i == own else word}</td><td class="p">{p:.3f}</td>'

    lists = [candidates(p) for _, p in columns]
    rows = ["".join(cell(*some[k]) if k < len(some) else "<td></td><td></td>" for some in lists)
            for k in range(max(map(len, lists)))]  # fmt: skip
    before, after = (html.escape(text_of(tok, ids)) for ids in (seen.ids[: seen.hidden], seen.ids[seen.hidden + 1 :]))
    word = html.escape(text_of(tok, [own]).strip())
    shares = ", ".join(f"{p[own]:.3f} ({name.split(',')[0]})" for name, p in columns)
    head = "".join(f'<th colspan="2">{html.escape(name)}</th>' for name, _ in columns)
    return (f'<p class="told">{before} ____{after}: <b>{word}</b> {shares}</p>\n<table>\n<tr>{head}</tr>\n'
            + "\n".join(f"<tr>{row}</tr>" for row in rows) + "\n</table>")  # fmt: skip


def article(tok, seen: Seen, writes: bool) -> str:
    """A picture and all that is told of it."""
    file = io.BytesIO()
    seen.picture.save(file, "PNG")
    source, (wide, high) = base64.b64encode(file.getvalue()).decode(), seen.picture.size
    lines = [f'<p>{html.escape(seen.caption)} <span class="told p">ITM {seen.p:.3f}</span></p>']
    if seen.written:
        judged = f"; judged {seen.verdict}" if seen.verdict else ""
        lines.append(f'<p>{marked(tok, seen.ids, seen.written)} <span class="told p">ITM {seen.p_written:.3f}'
                     f"{html.escape(judged)}</span></p>")  # fmt: skip
    elif writes:
        lines.append('<p class="told">No word of this caption could be rewritten.</p>')
    lines.append('<p class="told">No word of this caption is hidden: none is a whole token.</p>'
                 if seen.hidden is None else table_of(tok, seen))  # fmt: skip
    return (f'<article>\n<img alt="{html.escape(seen.caption)}" width="{wide}" height="{high}" '
            f'src="data:image/png;base64,{source}">\n<div>\n' + "\n".join(lines) + "\n</div>\n</article>")


def page_of(tok, title: str, told: str, found: list[Seen], writes: bool) -> str:
    """The whole page."""
    teaches = any(seen.teacher is not None for seen in found)
    guide = ("ITM is the probability that picture and text belong together, which should be near 1 for the caption"
             + (" and near 0 for the written negative below it, whose new words are marked behind those that they "
                "replace." if writes else "; this arm writes no negatives, so none are shown."))  # fmt: skip
    guide += " Below stand the words that are most probable where one is hidden, the caption's own in bold: " + (
        "the frozen teacher, which sees the text alone, beside the model, which learns from it and sees the picture."
        if teaches else "those of the model alone, as this arm has no teacher.")  # fmt: skip
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">', f"<title>{html.escape(title)}</title>",
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>", f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(told)}</p>\n<p>{html.escape(guide)}</p>",
        *(article(tok, seen, writes) for seen in found), "</body>\n</html>\n"])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    parser = common.Parser(prog="negatives.py", allow_abbrev=False, description="What ViLTA writes and fills in.")
    parser.add_argument("run", help="run directory of vilta.py --task pretrain, or one of its step_N")
    parser.add_argument("--split", default="", help="where pictures come from (default: the test split)")
    parser.add_argument("--pictures", type=int, default=12, help="how many of them (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="other words are rewritten and hidden (default: 0)")
    parser.add_argument("--data", help="other data than the run's")
    parser.add_argument("--root", help="directory of the data set, where it is not the run's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--out", help="file to write (default: negatives.html in the run directory)")
    args = parser.parse_args(argv)
    for name, least in (("pictures", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: give {least} or more")
    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a folder: name a file in it, e.g. {Path(args.out) / 'negatives.html'}")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    import vilta

    where = {"root": ""} if args.data else {}
    where |= {name: getattr(args, name) for name in ("data", "root") if getattr(args, name) is not None}
    model = load(args.run, common.choose_device(args.device)[0], **where)
    cfg = model.cfg
    split, items = pictures_of(cfg, args.split, args.pictures)
    found = look(model, items, args.seed)
    told = summary(found, cfg.arm, vilta.writes(cfg))
    title = f"What {args.run} writes ({common.data_name(cfg.data)}, {split})"
    run = Path(args.run) if (Path(args.run) / "config.json").is_file() else Path(args.run).resolve().parent
    out = Path(args.out or run / "negatives.html")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page_of(model.tokenizer, title, told, found, vilta.writes(cfg)), "utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another place with --out FILE") from None
    print(told)
    print(f"-> {out}")


if __name__ == "__main__":
    common.run_main(main)
