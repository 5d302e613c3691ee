"""Mistakes, planted on purpose: what the checks must notice.

Each function of the modules below takes the `train` module of a step and spoils it. As a script it
trains with a mistake:
`python tests/breaks.py halve_norm_gradients step3_dataloader/train.py --max_tokens 9000`.
"""
# ruff: noqa: F401, F403  what is imported here is chosen by name

import importlib
import sys
from pathlib import Path

from breaks_context import *
from breaks_data import *
from breaks_muon import *
from breaks_pipeline import *
from breaks_ranks import *
from breaks_speed import *
from breaks_tensor import *
from breaks_training import *
from fully_sharded import fully_sharded  # no mistake

if __name__ == "__main__":
    name, script, *argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    sys.argv = [script, *argv]
    train = importlib.import_module("train")
    globals()[name](train)
    importlib.import_module("errors").run(train.main, train.parse_args)
