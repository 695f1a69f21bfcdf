"""Where tests find reference files. MINVLP_EXTRA and GOLDEN_DIR are named here and in .ci/run, nowhere else.

MINVLP_EXTRA  the folder that holds golden/ and realdata/; default ../shared beside the repository. Set and lacking a
              file: failure. Unset and absent: skip, with the reason.
GOLDEN_DIR    a folder with reference files of other sizes and seeds: looked into directly, MINVLP_EXTRA is not asked.
"""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "tests" / "golden"

torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", 2))))


def find_extra(*parts: str) -> Path:
    folder = os.environ.get("MINVLP_EXTRA")
    path = Path(folder or ROOT.parent / "shared").joinpath(*parts)
    if not path.exists():
        if folder:
            pytest.fail(f"MINVLP_EXTRA is set to {folder}, but {path} is missing")
        pytest.skip(f"{'/'.join(parts)} not found: set MINVLP_EXTRA to the folder that holds golden/ and realdata/")
    return path


@pytest.fixture(scope="module")
def one_thread():
    """For tensors so small that several threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def extra() -> Path:
    """The folder with realdata/ (and golden/); skips or fails as said above."""
    return find_extra("realdata").parent


@pytest.fixture
def golden_path():
    """name -> Path of a reference file, wherever it is to be looked for."""

    def find(name: str) -> Path:
        if "GOLDEN_DIR" in os.environ:
            path = Path(os.environ["GOLDEN_DIR"]) / name
            if not path.exists():
                pytest.skip(f"GOLDEN_DIR has no {name}")
            return path
        return COMMITTED / name if (COMMITTED / name).exists() else find_extra("golden", name)

    return find


@pytest.fixture
def exempt():
    """file name -> [(key pattern, reason)] of tests/golden/exempt.txt, one `file, key pattern, reason` a line."""

    def read(name: str) -> list[tuple[str, str]]:
        lines = (COMMITTED / "exempt.txt").read_text().splitlines()
        rows = [[cell.strip() for cell in line.split(",", 2)] for line in lines if line and not line.startswith("#")]
        return [(pattern, reason) for file, pattern, reason in rows if file == name]

    return read
