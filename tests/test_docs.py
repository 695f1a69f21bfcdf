"""What documents and --help say, run; what they say about files is in test_files.py."""

import re
import subprocess
import sys

from papers import PAPERS, ROOT
from PIL import Image
from test_cli import finished  # noqa: F401  (a finished toy run)

import vcgpt


def test_help_is_light():
    """--help answers without importing the heavy libraries."""
    for paper in PAPERS:
        code = (
            f"import sys, runpy; sys.argv = ['{paper}.py', '--help']\n"
            f"try: runpy.run_path('{paper}.py', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "heavy = {'transformers', 'torchvision', 'matplotlib', 'tokenizers'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "--captions-per-image" in done.stdout


def test_the_python_example_of_readme_runs(finished, tmp_path, monkeypatch, capsys):  # noqa: F811
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "vcgpt-scenes").symlink_to(finished[0])
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    model = vcgpt.VCGPT.from_run(str(finished[0]))
    assert capsys.readouterr().out.splitlines() == [model.caption("a.jpg", beam=b) for b in (1, 5)]
