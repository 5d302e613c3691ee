"""Run a program as a user who has no home and no entry among the users, as in many containers.

python tests/nobody.py step1_model/train.py --max_tokens 512
"""

import os
import pwd
import runpy
import sys
from pathlib import Path


def unknown(*_):
    raise KeyError("getpwuid(): uid not found")


if __name__ == "__main__":
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        os.environ.pop(name, None)
    pwd.getpwuid = pwd.getpwnam = unknown
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
