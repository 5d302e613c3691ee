"""Train on fewer GPUs than ranks: right, and slow.

    torchrun --nproc_per_node 4 tests/shared_gpus.py step9_4d/train.py --device cuda --tp_size 4

NCCL refuses two ranks of a host on one GPU. So on 2 GPUs ranks 0 and 1 claim to be one host, ranks
2 and 3 another one, and so on: between two such hosts messages go over the network.
"""

import os
import runpy
import sys
from pathlib import Path


def share_gpus():
    """Give this rank, before it joins the others, a GPU that it may share with some of them."""
    import torch

    gpus = torch.cuda.device_count()
    host, place = divmod(int(os.environ["LOCAL_RANK"]), gpus)
    os.environ.update(LOCAL_RANK=str(place), LOCAL_WORLD_SIZE=str(gpus), NCCL_HOSTID=f"host {host}")


if __name__ == "__main__":
    script, *argv = sys.argv[1:]
    share_gpus()
    sys.argv[:] = [script, *argv]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
