"""Train on fewer GPUs than ranks: right, and slow.

    torchrun --nproc_per_node 4 tests/shared_gpus.py step9_4d/train.py --device cuda --tp_size 4

NCCL refuses two ranks of a host on one GPU. So each rank claims to be a host of its own, and its
messages go over the network, as between hosts.
"""

import os
import runpy
import sys
from pathlib import Path


def share_gpus():
    """Give this rank, before it joins the others, a GPU that it may share with some of them."""
    import torch

    place = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    os.environ.update(LOCAL_RANK=str(place), LOCAL_WORLD_SIZE="1")
    os.environ["NCCL_HOSTID"] = f"rank {os.environ['RANK']}"


if __name__ == "__main__":
    script, *argv = sys.argv[1:]
    share_gpus()
    sys.argv[:] = [script, *argv]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
