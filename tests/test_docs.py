"""What documents say about the code must be so."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = [path for name in ("tden", "vcgpt", "soho", "vilta") if (path := ROOT / f"{name}.py").exists()]


def test_every_choice_is_documented_and_every_row_stands_in_the_code():
    in_code = {mark for path in MODELS for mark in re.findall(r"HERE\[([a-z]+-\d+)\]", path.read_text())}
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
