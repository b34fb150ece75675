"""Run by an interpreter that has mergekit: merges each config that is named, in one process, into FILE_theirs.

mergekit 0.1.5 cannot plan tensors that are optional and have other names (BERT's position ids); that is mended here.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner


class Joined(tuple):
    """A tuple that can be added to a list."""

    def __radd__(self, other):
        return [*other, *self]


def mended(plan):
    """Return mergekit's planning of a tensor, with names that can be joined."""

    def plan_tensor(self, weight, weights_in, models, cfg_reader):
        for each in weights_in:
            if each.aliases:
                object.__setattr__(each, "aliases", Joined(each.aliases))
        return plan(self, weight, weights_in, models, cfg_reader)

    return plan_tensor


MergePlanner.plan_tensor = mended(MergePlanner.plan_tensor)
for file in map(Path, sys.argv[1:]):
    config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
    run_merge(config, str(file.with_suffix("")) + "_theirs", MergeOptions(quiet=True, write_model_card=False))
print(version("mergekit"))
