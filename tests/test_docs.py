"""What documents say about the code must be so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_cli import finished  # noqa: F401  (a finished toy run)

import common
import vcgpt

ROOT = Path(__file__).resolve().parent.parent
MODELS = [path for name in ("tden", "vcgpt", "soho", "vilta") if (path := ROOT / f"{name}.py").exists()]


def test_every_choice_is_documented_and_every_row_stands_in_the_code():
    ground = [ROOT / name for name in ("data.py", "corpora.py", "eval.py", "tools/regions.py")]
    in_code = {mark for path in MODELS + ground for mark in re.findall(r"HERE\[([a-z]+-\d+)\]", path.read_text())}
    in_docs = re.findall(r"^\| ([a-z]+-\d+) \|", (ROOT / "docs" / "divergences.md").read_text(), re.M)
    assert len(in_docs) == len(set(in_docs)), "a row twice"
    assert in_code == set(in_docs)


def test_links_and_line_counts():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
    limits = {**{path.name: 1100 for path in MODELS}, "common.py": 900, "eval.py": 900, "scenes.py": 1000}
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in [*limits, "data.py", "corpora.py"]}
    assert not {name for name, limit in limits.items() if lines[name] > limit}
    assert lines["data.py"] + lines["corpora.py"] <= 1900


def test_help_is_light():
    """--help answers without importing the heavy libraries."""
    for path in MODELS:
        code = (
            f"import sys, runpy; sys.argv = ['{path.name}', '--help']\n"
            f"try: runpy.run_path({str(path)!r}, run_name='__main__')\n"
            "except SystemExit: pass\n"
            "heavy = {'transformers', 'torchvision', 'matplotlib', 'tokenizers'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "--captions-per-image" in done.stdout or path.name != "vcgpt.py"


def test_twins_are_identical():
    """Blocks marked `# TWIN: a.py, b.py` are the same in all files named, word for word."""
    blocks = {}
    for path in MODELS:
        for names, body in re.findall(r"^# TWIN: ([\w., ]+)\n((?:.+\n|\n(?=[ \n]))+)", path.read_text(), re.M):
            blocks.setdefault((names, body.split("(")[0]), {})[path.name] = body
    for (names, head), found in blocks.items():
        assert set(found) == {name.strip() for name in names.split(",")}, f"{head} is marked in {sorted(found)} alone"
        assert len(set(found.values())) == 1, f"{head} differs between {names}"


def blocks(language):
    """(document, text) of every fenced block of README and docs/."""
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for text in re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.M | re.S):
            yield document.name, text


def test_the_python_example_of_readme_runs(finished, tmp_path, monkeypatch, capsys):  # noqa: F811
    (example,) = [text for name, text in blocks("python") if name == "README.md"]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "vcgpt-scenes").symlink_to(finished[0])
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    model = vcgpt.VCGPT.from_run(str(finished[0]))
    assert capsys.readouterr().out.splitlines() == [model.caption("a.jpg", beam=b) for b in (1, 5)]


COMMANDS = [
    (name, line.split("#")[0].strip())
    for name, text in [*blocks("bash"), ("vcgpt.py", re.sub(r" {6,}.*", "", vcgpt.__doc__, flags=re.M))]
    for line in text.splitlines()
    if re.match(r" *(python|torchrun --nproc_per_node=\d) vcgpt\.py", line)
]


@pytest.mark.parametrize("name, command", COMMANDS, ids=[command for _, command in COMMANDS])
def test_commands_in_documents_have_flags_that_exist(name, command):
    commands = {"caption": dict(nargs="+"), "eval-only": dict(nargs="*")}
    words = command.split("vcgpt.py", 1)[1].split()
    given, asked = common.parse_flags(vcgpt.Config, words, "vcgpt.py", commands)  # raises for what is no flag
    assert given or asked.caption or asked.eval_only or not words
