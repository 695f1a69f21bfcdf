"""What holds for all files together: who imports whom, twins, sections, marks, lengths, commands, links.

Each check takes the root of a project and gives its complaints, a line each. This project gives cause for none, and
every check is seen complaining about an offender made up for it.
"""

import ast
import importlib
import re
import shlex
from textwrap import dedent
from unittest.mock import patch

import pytest
from papers import ROOT

import common

MODELS = ["tden", "vcgpt", "soho", "vilta"]
GROUND = ["common", "language", "data", "corpora", "table", "shards", "pretraining", "mixture", "regions", "eval",
          "scenes"]  # fmt: skip
SECTIONS = ["Config", "Blocks", "Model", "Corruption", "Losses", "Step", "Heads", "Decoding", "Official weights",
            "Training", "Evaluation", "Main"]  # fmt: skip
LIMITS = {**{(name,): 1100 for name in MODELS}, ("common",): 900, ("eval",): 900, ("scenes",): 1000,
          ("data", "corpora"): 1900, ("regions",): 400,
          **{(name,): 500 for name in ("table", "shards", "pretraining", "mixture")}}  # fmt: skip
BANNER = r"^# -{20,}\n# (.+)"  # the title comment below a line of dashes


def sources(root, names):
    """{file name: text} of those that exist."""
    return {f"{name}.py": path.read_text() for name in names if (path := root / f"{name}.py").exists()}


def documents(root):
    """{place: text} of what people read first."""
    paths = [*root.glob("README.md"), *sorted(root.glob("docs/*.md")), *root.glob("bench/README.md")]
    return {str(path.relative_to(root)): path.read_text() for path in paths}


def imported(text):
    """Top names of all that a source imports, inside functions and by import_module("name") too."""
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        if isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        yield from (name.split(".")[0] for name in names)


def models_stand_alone(root):
    """No model file imports another, and nothing on the ground floor imports a model."""
    files = sources(root, MODELS + GROUND)
    found = [(file, name) for file, text in files.items() for name in sorted({*imported(text)} & {*MODELS})]
    return [f"{file} imports {name}.py" for file, name in found if file != f"{name}.py"]


def twins_are_identical(root):
    """A block below `# TWIN: a.py, b.py`, up to a blank line and the next thing beside it, is in all files named the
    same, word for word, and marked in each."""
    complaints, blocks = [], {}
    for file, text in sources(root, MODELS).items():
        marks = re.findall(r"^( *)# TWIN: (\w+\.py(?:, \w+\.py)+)\n((?:.+\n|\n+(?=\1 +\S))+)", text + "\n", re.M)
        if len(marks) != len(re.findall(r"^ *#.*\bTWIN\b", text, re.M)):
            complaints.append(f"{file}: a mark that is not `# TWIN: a.py, b.py` with a block right below")
        for _, names, block in marks:
            head = re.search(r"^ *([^@#\s][^(:=\n]*)", block, re.M)[1].strip()  # decorators are not its name
            found = blocks.setdefault((frozenset(names.split(", ")), head), {})
            found.setdefault(file, []).append(dedent(block).strip())
    for (names, head), found in blocks.items():
        if names != set(found):
            complaints.append(f"{head}: its mark names {', '.join(sorted(names))}, and stands in {', '.join(found)}")
        elif len({tuple(texts) for texts in found.values()}) > 1:
            complaints.append(f"{head} is not the same in {', '.join(found)}")
    return complaints


def sections_stand_in_order(root):
    """Banners of model files begin with the words of SECTIONS, in that order; a word may come again, or not at all."""
    complaints = []
    for file, text in sources(root, MODELS).items():
        last = 0
        for title in re.findall(BANNER, text, re.M):
            place = next((i for i, word in enumerate(SECTIONS) if re.match(rf"{word}\b", title)), None)
            if place is None:
                complaints.append(f"{file}: the banner {title!r} begins with none of {', '.join(SECTIONS)}")
            elif place < last:
                complaints.append(f"{file}: the banner {title!r} stands below {SECTIONS[last]}")
            last = last if place is None else place
    return complaints


def reading_maps_lead_somewhere(root):
    """`Reading map: a | b.` of a model file lists its banners, each up to its first full stop, letter case aside. On
    the ground floor an entry's first word begins a banner, or is a function, in the order of the file."""
    complaints = []
    for file, text in sources(root, MODELS + GROUND).items():
        found = re.search(r"Reading map: (.+?)\.(?!\S)", ast.get_docstring(ast.parse(text)) or "", re.S)
        entries = [" ".join(entry.split()).lower() for entry in found[1].split("|")] if found else []
        if file.removesuffix(".py") in MODELS:
            titles = [title.split(".")[0].lower() for title in re.findall(BANNER, text, re.M)]
            if entries != titles or not titles:
                complaints.append(f"{file}: by its banners the map is `Reading map: {' | '.join(titles)}.`")
            continue
        anchors = iter(re.findall(rf"{BANNER}|^def (\w+)", text, re.M))
        for entry in entries:
            word = entry.removeprefix("the ").split()[0].strip(",")
            if not any(re.match(rf"(the )?{word}", title.lower()) or word == name for title, name in anchors):
                complaints.append(f"{file}: its reading map's {entry!r} is not to be found, or not in this order")
                break
    return complaints


def marks_and_rows_agree(root):
    """Every HERE[id] in the code is a row of docs/divergences.md, every row is a mark, and none stands twice."""
    tools = [f"tools/{path.stem}" for path in sorted(root.glob("tools/*.py"))]
    code = "\n".join(sources(root, MODELS + GROUND + tools).values())
    marks = set(re.findall(r"HERE\[([^\]]*)\]", code)) - {"id"}  # as docstrings explain the mark
    rows = re.findall(r"^\| ([a-z]+-\d+) \|", (root / "docs" / "divergences.md").read_text(), re.M)
    complaints = [f"HERE[{mark}] has no row" for mark in sorted(marks - {*rows})]
    complaints += [f"the row {row} has no mark in the code" for row in sorted({*rows} - marks)]
    return complaints + [f"the row {row} stands twice" for row in sorted({*rows}) if rows.count(row) > 1]


def files_keep_their_limits(root):
    lengths = {names: sum(len(text.splitlines()) for text in sources(root, names).values()) for names in LIMITS}
    return [f"{' + '.join(names)}: {lengths[names]} lines of {n}" for names, n in LIMITS.items() if lengths[names] > n]


def misread(name, words):
    """What the model file `name` has against these words on its command line; nothing is run."""

    class Parsed(Exception):
        pass

    def parse(*args, original=common.parse_flags):
        original(*args)
        raise Parsed

    with patch.object(common, "parse_flags", parse):
        try:
            importlib.import_module(name).main(words)
        except (Parsed, SystemExit):  # or --help
            return ""
        except common.UserError as error:
            return str(error)


def commands_exist(root):
    """`python X.py ...` and `torchrun ... X.py ...`, in documents and in docstrings of files: X is there, and where it
    is a model file its flags are. A command ends at two blanks, a backtick or a #; a single capital is any number."""
    texts, complaints = documents(root), []
    for path in [file for folder in (".", "tools", "bench") for file in sorted((root / folder).glob("*.py"))]:
        texts[str(path.relative_to(root))] = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
    for source, text in texts.items():
        found = re.findall(r"\b(?:python3?|torchrun(?: --\S+)*) ([\w./]+\.py)\b(.*?)(?=  |[`#;]|$)",
                           re.sub(r"\\\n\s*", "", text), re.M)  # fmt: skip
        for file, words in found:
            told = "there is no such file" if not (root / file).exists() else ""
            if not told and file.removesuffix(".py") in MODELS:
                told = misread(file.removesuffix(".py"), shlex.split(re.sub(r"\b[A-Z]\b", "1", words)))
            complaints += [f"{source}: {file}{words}: {told}"] if told else []
    return complaints


def links_resolve(root):
    found = [(name, t) for name, text in documents(root).items() for t in re.findall(r"\]\((?!\w+:)([^)#\s]+)", text)]
    return [f"{name} links to {target}" for name, target in found if not ((root / name).parent / target).exists()]


def papers_are_model_files(root):
    """The shared tests run model files, and all of them."""
    code = ast.parse((root / "tests" / "papers.py").read_text()).body
    listed = next(ast.literal_eval(x.value) for x in code if isinstance(x, ast.Assign) and x.targets[0].id == "PAPERS")
    present = [file.removesuffix(".py") for file in sources(root, MODELS)]
    complaints = [f"PAPERS has {name}, which is no model file" for name in listed if name not in present]
    return complaints + [f"{name}.py is not in PAPERS" for name in present if name not in listed]


DASHES = "# " + "-" * 117 + "\n"
OFFENDERS = [  # a check, the files of a project that offends it, its complaints
    (models_stand_alone, {"tden.py": "def f():\n    from vcgpt import Block", "vcgpt.py": "import tden.x, common"},
     ["tden.py imports vcgpt.py", "vcgpt.py imports tden.py"]),
    (models_stand_alone, {"eval.py": "import importlib\nif 1:\n    importlib.import_module('soho')", "data.py": "soho"},
     ["eval.py imports soho.py"]),
    (twins_are_identical, {f"{x}.py": f"# TWIN: soho.py, tden.py\n@x\ndef f():\n    a\n\n    {x}\n\n\nb = '{x}'"
                           for x in ("soho", "tden")}, ["def f is not the same in tden.py, soho.py"]),
    (twins_are_identical, {"soho.py": "class A:\n    # TWIN: soho.py, tden.py\n    x = 1\n", "tden.py": "x = 1\n"},
     ["x: its mark names soho.py, tden.py, and stands in soho.py"]),
    (twins_are_identical, {"soho.py": "# TWIN: tden\nx = 1\n"},
     ["soho.py: a mark that is not `# TWIN: a.py, b.py` with a block right below"]),
    (sections_stand_in_order, {"soho.py": f"{DASHES}# Model: a\n{DASHES}# Model: b\n{DASHES}# Config. c\n"
                                           f"{DASHES}# Mine"},
     ["soho.py: the banner 'Config. c' stands below Model",
      f"soho.py: the banner 'Mine' begins with none of {', '.join(SECTIONS)}"]),
    (reading_maps_lead_somewhere, {"soho.py": f'"""Reading map: config | main. More."""\n{DASHES}# Config. A\n'
                                   f"{DASHES}# Model: x, y\n{DASHES}# Main\n", "tden.py": "x = 1"},
     ["tden.py: by its banners the map is `Reading map: .`",
      "soho.py: by its banners the map is `Reading map: config | model: x, y | main.`"]),
    (reading_maps_lead_somewhere, {"data.py": f'"""Reading map: words | load | items | words."""\n{DASHES}# The words\n'
                                   f"def load(): 0\n{DASHES}# Items. All\n"},
     ["data.py: its reading map's 'words' is not to be found, or not in this order"]),
    (marks_and_rows_agree, {"tools/t.py": "# HERE[x-1]: a, HERE[id], HERE[x-2]", "soho.py": "HERE[soho.3]",
                            "docs/divergences.md": "| x-2 | a |\n| x-4 | a |\n| x-2 | b |\n"},
     ["HERE[soho.3] has no row", "HERE[x-1] has no row", "the row x-4 has no mark in the code",
      "the row x-2 stands twice"]),
    (files_keep_their_limits, {"soho.py": "\n" * 1101, "common.py": "\n" * 900, "data.py": "\n" * 1000,
                               "corpora.py": "\n" * 901, "regions.py": "\n" * 401},
     ["soho: 1101 lines of 1100", "data + corpora: 1901 lines of 1900", "regions: 401 lines of 400"]),
    (commands_exist, {"README.md": "`python vcgpt.py --seed S`, `python3 tools/x.py`\n```\ntorchrun --standalone --a=2 "
                      "vcgpt.py --seed \\\n  3 --widht 3 # wide\n```\n", "vcgpt.py": "'''\npython no.py  or not\n'''",
                      "bench/README.md": "python3 x.py"},
     ["README.md: tools/x.py: there is no such file",
      "README.md: vcgpt.py --seed 3 --widht 3 : unknown flag --widht; did you mean --width?",
      "bench/README.md: x.py: there is no such file", "vcgpt.py: no.py: there is no such file"]),
    (links_resolve, {"docs/a.md": "[x](../README.md) [y](a.md#a) [z](https://a.b) ![v](v.png)"},
     ["docs/a.md links to ../README.md", "docs/a.md links to v.png"]),
    (papers_are_model_files, {"tests/papers.py": "PAPERS = {'tden': '', 'mine': ''}", "tden.py": "", "soho.py": "",
                              "mine.py": ""}, ["PAPERS has mine, which is no model file", "soho.py is not in PAPERS"]),
]  # fmt: skip
CHECKS = list(dict.fromkeys(check for check, *_ in OFFENDERS))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_nothing_to_complain_about_in(check):
    assert check(ROOT) == []


@pytest.mark.parametrize("check, files, complaints", OFFENDERS, ids=[check.__name__ for check, *_ in OFFENDERS])
def test_offenders_are_seen_by(check, files, complaints, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert check(tmp_path) == complaints
