"""What do the codes of a visual dictionary stand for? Pictures and a page about a run of soho.py.

    python tools/dictionary.py runs/soho-scenes                          200 pictures of the test split
    python tools/dictionary.py RUN --split val --pictures 1000 --picture test:3      or a file
    python tools/dictionary.py soho_res18.pth --data coco                the authors' weights

Written into the run's directory, or into --out:

    dictionary.png      the codes that stand in most cells: the patches nearest to each, and the words that go with it
    dictionary.html     all codes that are used, in one page that needs no network, and pictures beside their codes
    codes.png           one picture, and the code in each of its cells

A patch is a cell, framed, with half a cell around it. Each picture is looked at alone, in evaluation, so that the
dictionary stays as it is and what is said of a picture depends on no other.
"""

from __future__ import annotations

import base64
import colorsys
import html
import io
import math
import re
import sys
import textwrap
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
import language  # noqa: E402
import soho  # noqa: E402
from common import UserError  # noqa: E402
from tools.sheets import PAPER, side_by_side  # noqa: E402

INK, GREY = (52, 54, 60), (128, 126, 120)
PATCHES, SIDE = 8, 64  # patches of a code, and pixels of each


class Cells(NamedTuple):
    """M cells, each part of its picture: tensors [M]."""

    picture: torch.Tensor  # 0 for the first
    row: torch.Tensor
    column: torch.Tensor
    code: torch.Tensor
    distance: torch.Tensor  # |v - d|^2 of the feature and its code
    # From a cell to the next: all strides, and the pool of 2 after them. Not the height over the number of rows: where
    # the pool drops half a step at the end, the last of them would be looked for half a cell too low.
    step: int = 1  # pixels

    def where(self, which) -> Cells:
        return Cells(*(x[which] for x in self[:-1]), self.step)


class Row(NamedTuple):
    """What is told of a code."""

    code: int
    share: float  # of the cells
    pictures: int  # that have it somewhere
    patches: list[Image.Image]
    words: list[str]
    is_zero: bool  # the zero vector


# ---------------------------------------------------------------------------------------------------------------------
# Looking


def load(source: str, device: str, **where) -> soho.SOHO:
    """The model of a run or of a file of the authors', in evaluation; `where`: data and root, if not the run's own."""
    if Path(source).is_file():
        state = soho.tidy(common.read_tensors(Path(source)))
        cfg = common.build_config(soho.Config, {"preset": "base", **where}, soho.PRESETS, {})
        model = soho.SOHO(replace(cfg, **soho.official_sizes(state)))
        soho.load_official(model, state)
    else:
        model = soho.SOHO.from_run(source)
        model.cfg = replace(model.cfg, **where)
    if model.cfg.vd_mode == "none":
        began = f" ({model.cfg.init})" * (model.cfg.init != "none")
        raise UserError(f"{source} has no dictionary (--vd-mode none): take the pre-trained run that it began with"
                        f"{began}, or train with --vd-mode gate")  # fmt: skip
    return model.to(device)


def distinct_pictures(samples, n: int) -> list[data.Item]:
    """The first n pictures with their captions, or with what these samples ask or say about them."""
    found: dict = {}
    for sample in samples:
        said = sample.captions if isinstance(sample, data.Item) else (getattr(sample, "text", ""),)
        for image_id, image in zip(data.ids_of(sample), data.files_of(sample), strict=True):
            if image_id in found or len(found) < n:
                found.setdefault(image_id, (image, []))[1].extend(said)
        if len(found) == n and data.ids_of(sample)[0] not in found:
            break
    return [data.Item(image_id, image, tuple(said)) for image_id, (image, said) in found.items()]


@torch.no_grad()
def look(model, batches) -> Cells:
    """Every valid cell of a loader's pictures."""
    model.eval()  # in training each pass moves the dictionary
    found, n = [], 0
    for batch in batches:
        rows = data.to_device(model, {name: batch[name] for name in ("pixels", "sizes")})
        seen = model.see(soho.normalise(rows["pixels"], rows["sizes"]), rows["sizes"])
        d = model.dictionary.embed[seen["codes"]]  # [B, h, w, D]
        distance = (seen["v"].movedim(1, -1).float() - d).square().sum(-1)
        b, row, column = seen["keep_mask"].nonzero(as_tuple=True)
        found.append([b + n, row, column, seen["codes"][b, row, column], distance[b, row, column]])
        n += len(rows["pixels"])
    step = 2 * math.prod(map(int, model.cfg.strides.split(",")))
    return Cells(*(torch.cat(x).cpu() for x in zip(*found, strict=True)), step)


def box_of(row: int, column: int, step: int) -> tuple[int, int, int, int]:
    """left, top, right, bottom of a cell in pixels, of whatever shape the picture is."""
    return column * step, row * step, (column + 1) * step, (row + 1) * step


def best_cells(cells: Cells, code: int, n: int = PATCHES) -> list[int]:
    """Numbers of the n cells nearest to the code: of each picture one, then, where pictures are too few, others."""
    mine = (cells.code == code).nonzero()[:, 0]
    mine = mine[cells.distance[mine].argsort(stable=True)].tolist()
    first_of: dict = {}
    for i in mine:
        first_of.setdefault(int(cells.picture[i]), i)
    firsts = list(first_of.values())[:n]
    return firsts + [i for i in mine if i not in firsts][: n - len(firsts)]


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def words_of_codes(cells: Cells, texts: list, least: int = 3, most: int = 6) -> dict[int, list[str]]:
    """Code -> the words that go with it, those first that do so most surely. texts: those of each picture.

    The measure is the log odds ratio over its standard error. Of the pictures that have texts, a have the code and the
    word, b the code alone, c the word alone, d neither (0.5 is added to each): log(a d / (b c)) over
    sqrt(1/a + 1/b + 1/c + 1/d). A word counts from 3 on, because among so many pairs some are near 2 by luck, and where
    it stands beside the code in `least` pictures. Words that are everywhere tell no code from another: near 0.
    """
    told = [i for i, some in enumerate(texts) if any(some)]
    codes, has_code = presence([set(cells.code[cells.picture == i].tolist()) for i in told])
    said = [language.clean_caption(" ".join(texts[i])) for i in told]
    words, has_word = presence([set(re.findall(r"\w[\w'-]*", text)) for text in said])
    n_code, n_word = has_code.sum(0)[:, None], has_word.sum(0)
    both = has_code.T @ has_word  # [codes, words]
    a, b, c, d = (n + 0.5 for n in (both, n_code - both, n_word - both, len(told) - n_code - n_word + both))
    sure = (a * d / (b * c)).log() / (1 / a + 1 / b + 1 / c + 1 / d).sqrt()
    sure[(both < least) | (sure < 3)] = 0
    ranked = sure.argsort(dim=1, descending=True, stable=True)[:, :most].tolist()
    return {code: [words[w] for w in ranked[k] if sure[k, w] > 0] for k, code in enumerate(codes)}


def presence(sets: list[set]) -> tuple[list, torch.Tensor]:
    """All that is in the sets, sorted, and what is in which: 0 or 1, [sets, all]."""
    names = sorted(set().union(*sets))
    number, found = {name: i for i, name in enumerate(names)}, torch.zeros(len(sets), len(names))
    for row, some in zip(found, sets, strict=True):
        row[[number[name] for name in some]] = 1
    return names, found


def shares_of(cells: Cells) -> dict[int, float]:
    """Code -> its share of the cells, the largest first."""
    counts = Counter(cells.code.tolist())
    return {code: n / len(cells.code) for code, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))}


def summary(rows: list[Row], embed) -> str:
    """embed: all codes [K, D]."""
    K, used, zero = len(embed), len(rows), int((embed == 0).all(1).sum())
    perplexity = math.exp(-sum(row.share * math.log(row.share) for row in rows))
    return f"{K} codes, {used} used, {K - used} unused, {zero} zero vectors, perplexity {perplexity:.1f}"


def describe(model, samples, cells: Cells) -> list[Row]:
    """The codes that are used, the most frequent first."""
    patches, words = cut_patches(samples, cells), words_of_codes(cells, [item.captions for item in samples.items])
    is_zero = (model.dictionary.embed == 0).all(1).tolist()
    return [Row(code, share, len(cells.picture[cells.code == code].unique()), patches[code],
                words.get(code, []), is_zero[code])
            for code, share in shares_of(cells).items()]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def colour_of(code: int) -> tuple[int, int, int]:
    """The same on all pictures; neighbouring numbers get colours far apart."""
    rgb = colorsys.hsv_to_rgb(code * 0.618034 % 1, (0.45, 0.65, 0.3)[code % 3], (0.95, 0.8, 0.7)[code // 3 % 3])
    return tuple(round(255 * x) for x in rgb)


def ink_on(colour) -> str:
    return "black" if colour[0] * 0.299 + colour[1] * 0.587 + colour[2] * 0.114 > 120 else "white"


def as_image(pixels) -> Image.Image:
    """uint8 [3, h, w]"""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def patch(picture: Image.Image, box) -> Image.Image:
    """A cell and half a cell around it, what lies beyond the picture left empty; a frame shows the cell."""
    left, top, right, bottom = box
    x, y = left - (right - left) // 2, top - (bottom - top) // 2
    canvas = Image.new("RGB", (2 * (right - left), 2 * (bottom - top)), PAPER)
    canvas.paste(picture, (-x, -y))
    canvas = canvas.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    draw, a, b = ImageDraw.Draw(canvas), SIDE // 4, 3 * SIDE // 4 - 1
    draw.rectangle((a - 1, a - 1, b + 1, b + 1), outline="black")
    draw.rectangle((a - 2, a - 2, b + 2, b + 2), outline="white")
    return canvas


def cut_patches(samples, cells: Cells) -> dict[int, list[Image.Image]]:
    """Code -> its best patches. Each picture is read once more, and once only."""
    chosen = {code: best_cells(cells, code) for code in shares_of(cells)}
    of_picture, cut = defaultdict(list), {}
    for i in (i for some in chosen.values() for i in some):
        of_picture[int(cells.picture[i])].append(i)
    for number, some in of_picture.items():
        picture = as_image(samples[number]["pixels"])
        for i in some:
            cut[i] = patch(picture, box_of(int(cells.row[i]), int(cells.column[i]), cells.step))
    return {code: [cut[i] for i in some] for code, some in chosen.items()}


def draw_map(pixels, cells: Cells, side: int) -> Image.Image:
    """A picture, uint8 [3, h, w], and beside it the codes of its cells, each its own colour; the longer side is `side`
    pixels. What no cell stands for stays empty; so does, with square_mask, the right part of a high picture."""
    high, wide = pixels.shape[1:]
    scale = side / max(high, wide)
    size = max(1, round(wide * scale)), max(1, round(high * scale))
    picture, drawn = as_image(pixels).resize(size, Image.Resampling.BICUBIC), Image.new("RGB", size, PAPER)
    grid, draw = ImageDraw.Draw(picture, "RGBA"), ImageDraw.Draw(drawn)
    font = ImageFont.load_default(max(8, min(22, round(cells.step * scale * 0.42))))
    for row, column, code in zip(cells.row.tolist(), cells.column.tolist(), cells.code.tolist(), strict=True):
        left, top, right, bottom = (min(round(x * scale), most) for x, most in
                                    zip(box_of(row, column, cells.step), size * 2, strict=True))  # fmt: skip
        if right <= left or bottom <= top:
            continue
        box = (left, top, right - 1, bottom - 1)
        draw.rectangle(box, colour_of(code), PAPER)
        grid.rectangle(box, None, (255, 255, 255, 90))
        if draw.textlength(str(code), font) + 4 <= right - left and font.size + 2 <= bottom - top:
            middle = (left + right) / 2, (top + bottom) / 2
            draw.text(middle, str(code), ink_on(colour_of(code)), font, anchor="mm")
    return side_by_side([picture, drawn])


def draw_codes(path: Path, name: str, pixels, cells: Cells) -> None:
    """codes.png: draw_map with a title."""
    drawn = draw_map(pixels, cells, 560)
    title = f"{name}: {len(cells.code)} cells, {len(cells.code.unique())} codes"
    lines = textwrap.wrap(title, max(20, drawn.width // 9))
    sheet = Image.new("RGB", (drawn.width + 40, drawn.height + 40 + 24 * len(lines)), PAPER)
    ImageDraw.Draw(sheet).multiline_text((20, 12), "\n".join(lines), INK, ImageFont.load_default(17), spacing=6)
    sheet.paste(drawn, (20, 20 + 24 * len(lines)))
    sheet.save(path)


def draw_dictionary(path: Path, title: str, rows: list[Row]) -> None:
    """dictionary.png, in one column or two."""
    deep = -(-len(rows) // 2) if len(rows) > 8 else len(rows)
    gap, tall, left = 28, SIDE + 14, 146
    wide = left + PATCHES * (SIDE + 8) + 190
    sheet = Image.new("RGB", (gap + -(-len(rows) // deep) * (wide + gap), 84 + deep * tall), PAPER)
    draw, (small, font, large) = ImageDraw.Draw(sheet), map(ImageFont.load_default, (13, 15, 20))
    draw.multiline_text((gap, 16), "\n".join(textwrap.wrap(title, sheet.width // 11)), INK, large, spacing=4)
    for i, row in enumerate(rows):
        x, y = gap + i // deep * (wide + gap), 76 + i % deep * tall
        draw.rectangle((x, y, x + 47, y + SIDE - 1), colour_of(row.code))
        draw.text((x + 24, y + SIDE / 2), str(row.code), ink_on(colour_of(row.code)), font, anchor="mm")
        draw.text((x + 58, y + 6), f"{row.share:.1%}" if row.share >= 0.0005 else "< 0.1%", INK, font)
        told = f"{row.pictures} picture{'s' * (row.pictures > 1)}" + "\nzero vector" * row.is_zero
        draw.multiline_text((x + 58, y + 28), told, GREY, small, spacing=4)
        sheet.paste(side_by_side(row.patches), (x + left, y))
        at = (x + left + PATCHES * (SIDE + 8) + 6, y + SIDE / 2)
        said = textwrap.wrap(", ".join(row.words), 26)[:3] or ["-"]
        draw.multiline_text(at, "\n".join(said), INK, small, anchor="lm", spacing=5)
    sheet.save(path)


def embedded(image: Image.Image, told: str) -> str:
    """An <img> that carries its picture."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, subsampling=0)  # of photographs a third of PNG's bytes
    coded = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(told)}" src="data:image/jpeg;base64,{coded}">'


STYLE = """body { font: 15px/1.45 sans-serif; color: rgb(52 54 60); background: rgb(250 249 246); margin: 2em auto;
  max-width: 76em; padding: 0 1em }
table { border-collapse: collapse; width: 100% } td, th { padding: 5px 12px 5px 0; text-align: left; }
tr { border-top: 1px solid rgb(225 222 214) } td { white-space: nowrap } td:last-child { white-space: normal }
.code { display: inline-block; min-width: 2.6em; padding: 3px 5px; border-radius: 6px; text-align: center }
img { vertical-align: middle; max-width: 100% } figure { margin: 1.2em 0 } figcaption { color: rgb(128 126 120) }"""


def write_page(path: Path, title: str, told: str, rows: list[Row], examples: list) -> None:
    """dictionary.html. examples: (text, picture)."""
    lines = []
    for row in rows:
        look = f"background: rgb{colour_of(row.code)}; color: {ink_on(colour_of(row.code))}"
        strip, said = embedded(side_by_side(row.patches), f"patches of {row.code}"), html.escape(", ".join(row.words))
        lines.append(f'<tr><td><span class="code" style="{look}">{row.code}</span>{" zero vector" * row.is_zero}</td>'
                     f"<td>{row.share:.2%}</td><td>{row.pictures}</td><td>{strip}</td><td>{said or '-'}</td></tr>")
    figures = [f"<figure>{embedded(picture, text)}<figcaption>{html.escape(text)}</figcaption></figure>"
               for text, picture in examples]  # fmt: skip
    head = "<tr><th>code</th><th>cells</th><th>pictures</th><th>nearest patches</th><th>words</th></tr>"
    path.write_text("\n".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">', f"<title>{html.escape(title)}</title>",
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>", f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(told)}</p>",
        "<h2>Pictures and their codes</h2>", *figures, "<h2>Codes</h2>",
        "<p>A patch is a cell, framed, with half a cell around it. Words: of the texts of the pictures where a code "
        "appears, those that go with it most surely.</p>", f"<table>\n{head}", *lines,
        "</table>\n</body>\n</html>\n"]), "utf-8")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    parser = common.Parser(prog="dictionary.py", allow_abbrev=False,
                           description="What do the codes of a visual dictionary stand for?")  # fmt: skip
    parser.add_argument("run", help="run directory of soho.py, or one of its step_N; or a file of the authors' weights")
    parser.add_argument("--split", default="", help="where pictures come from (default: the test split)")
    parser.add_argument("--pictures", type=int, default=200, help="how many of them (default: 200)")
    parser.add_argument("--codes", type=int, default=32, help="codes in dictionary.png, at most (default: 32)")
    parser.add_argument("--picture", help="for codes.png: a file, or of scenes SPLIT:NUMBER (default: the first)")
    parser.add_argument("--data", help="other data than the run's")
    parser.add_argument("--root", help="directory of the data set, where it is not the run's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--out", help="folder to write into (default: the run directory)")
    args = parser.parse_args(argv)
    for name in ("pictures", "codes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    where = {"root": ""} if args.data else {}
    where |= {name: getattr(args, name) for name in ("data", "root") if getattr(args, name) is not None}
    model = load(args.run, common.choose_device(args.device)[0], **where)
    cfg, corpus = model.cfg, soho.load_data(model.cfg)
    split = args.split or corpus.finally_evaluated()[0]
    common.choose("split", split, list(corpus.splits))
    one = model._look(args.picture) if args.picture else None  # before the long part: it may not be there
    samples = soho.samples_of(cfg, model, corpus, distinct_pictures(corpus.splits[split], args.pictures))
    cells = look(model, data.eval_loader(samples, 1))
    rows = describe(model, samples, cells)

    run = Path(args.run) if (Path(args.run) / "config.json").is_file() else Path(args.run).resolve().parent
    out = Path(args.out or run)
    out.mkdir(parents=True, exist_ok=True)
    told = (f"{summary(rows, model.dictionary.embed)}, in {len(cells.code):,} cells of {len(samples)} "
            f"pictures ({common.data_name(cfg.data)}, {split})")  # fmt: skip
    draw_dictionary(out / "dictionary.png", told, rows[: args.codes])
    firsts = [cells.where(cells.picture == i) for i in range(min(6, len(samples)))]
    examples = [(" / ".join(item.captions[:2]) or str(item.image_id), draw_map(samples[i]["pixels"], some, 360))
                for i, (item, some) in enumerate(zip(samples.items, firsts, strict=False))]  # fmt: skip
    write_page(out / "dictionary.html", f"The visual dictionary of {args.run}", told, rows, examples)
    if one:
        high, wide = one["sizes"][0].tolist()
        draw_codes(out / "codes.png", args.picture, one["pixels"][0, :, :high, :wide], look(model, [one]))
    else:
        name = f"{split}, picture {samples.items[0].image_id}"
        draw_codes(out / "codes.png", name, samples[0]["pixels"], firsts[0])
    print(told)
    for row in rows[:5]:
        said = ", ".join(row.words) or "-"
        print(f"  code {row.code:<5} {row.share:6.1%} of the cells, in {row.pictures} of the pictures: {said}")
    print(f"-> {out / 'dictionary.png'}, {out / 'dictionary.html'}, {out / 'codes.png'}")


if __name__ == "__main__":
    common.run_main(main)
