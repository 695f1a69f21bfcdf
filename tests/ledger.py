"""The account that each golden test keeps of its reference file: nothing in it may be overlooked."""

import json
from fnmatch import fnmatchcase

import numpy as np
import torch


class Ledger:
    """Which arrays of a reference (.npz) have been compared, and how far off the worst was.

    exempt: rows of exempt.txt, (pattern of keys, reason). Inputs are config_json, what stands in a folder `weights` or
    `inputs`, also inside groups, and what fits a pattern in `given`; what fits one in `results` is never an input.
    """

    def __init__(self, path, exempt=(), tolerance=0.0, given=(), results=()):
        self.path, self.arrays, self.tolerance = path, np.load(path, allow_pickle=False), tolerance
        self.config = json.loads(str(self.arrays["config_json"]))
        self.compared, self.worst = set(), 0.0

        def is_given(key):
            folders = key.split("/")[:-1]
            is_input = key == "config_json" or "weights" in folders or "inputs" in folders or fits(key, given)
            return is_input and not fits(key, results)

        all_results = {key for key in self.arrays.files if not is_given(key)}
        self.exempt = {key for key in all_results if fits(key, [pattern for pattern, _ in exempt])}
        self.to_cover = all_results - self.exempt

    def has(self, *prefixes):
        return all(any(key.startswith(prefix) for key in self.arrays.files) for prefix in prefixes)

    def names(self, prefix):
        """What follows the prefix in each key that has it."""
        return [key.removeprefix(prefix) for key in self.arrays.files if key.startswith(prefix)]

    def tensor(self, key):
        return torch.from_numpy(self.arrays[key])

    def weights(self, prefix="weights/"):
        return {name: self.tensor(prefix + name) for name in self.names(prefix)}

    def check(self, key, ours, is_real=None, tolerance=None, relative=0.0):
        """is_real: bool over the leading dimensions, where the numbers mean something; integers must be equal."""
        theirs, ours = self.tensor(key), ours.detach()
        assert tuple(ours.shape) == tuple(theirs.shape), key
        if is_real is not None:
            assert is_real.any(), f"{key}: nothing to compare"
            theirs, ours = theirs[is_real], ours[is_real]
        if theirs.dtype.is_floating_point:
            limit = (self.tolerance if tolerance is None else tolerance) + relative * theirs.double().abs()
            error = (ours.double() - theirs.double()).abs()
            assert (error <= limit).all(), f"{key}: {error.max()}"
            self.worst = max(self.worst, error.max().item())
        else:
            assert torch.equal(ours, theirs), key
        self.compared.add(key)

    def close(self):
        left = sorted(self.to_cover - self.compared)
        print(f"\ngolden {self.path.name}: {len(self.compared)} arrays compared, {len(left)} not covered, "
              f"{len(self.exempt)} exempt, max abs err {self.worst:.1e}")  # fmt: skip
        assert not left, left


def fits(key, patterns):
    return any(fnmatchcase(key, pattern) for pattern in patterns)
