"""What was started: how many processes, where they meet, and whether they can work as asked."""

import functools
import os
import signal
import socket
import time

import torch

from errors import RANK, UserError, in_one_line

LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what `torchrun` sets
# What gloo and NCCL say to a rank whose neighbour is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process")


def world_size():
    """The number of processes, known before they have joined.

    Raises UserError where the variables that `torchrun` sets are there only in part.
    """
    if "RANK" not in os.environ:
        return 1
    if missing := [name for name in LAUNCH if not os.environ.get(name)]:
        raise UserError(
            f"RANK is set, but not {', '.join(missing)}: start with torchrun, which sets all of "
            "them, or unset RANK"
        )
    numbers = {name: os.environ.get(name, "1") for name in (*LAUNCH[:2], "LOCAL_WORLD_SIZE")}
    whole = all(number.isdigit() for number in numbers.values())
    if not whole or int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        said = ", ".join(f"{name} {number}" for name, number in numbers.items())
        raise UserError(f"{said}: no rank of a world; start with torchrun, or unset RANK")
    return int(numbers["WORLD_SIZE"])


def check_port():
    """Raise UserError if the first rank's port is taken; under torchrun the launcher has it."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if RANK == 0 and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        try:
            socket.getaddrinfo(address, int(port))
            socket.create_server(("", int(port))).close()
        except (OSError, ValueError) as error:
            what = f"MASTER_ADDR {address}, MASTER_PORT {port}: {error}"
            raise UserError(f"{what}; choose another port, or start with torchrun") from None


def check_world(device_type, tp=1, cp=1, dp=1, pp=1):
    """Raise UserError unless the processes started are as many as the layout and the GPUs take."""
    if tp * cp * dp * pp != world_size():
        raise UserError(
            f"tp_size {tp} x cp_size {cp} x dp_size {dp} x pp_size {pp} = {tp * cp * dp * pp} "
            f"ranks, but {world_size()} started: change a size or torchrun's --nproc_per_node"
        )
    here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if device_type == "cuda" and here > devices:
        raise UserError(
            f"--device cuda: {here} processes for {devices} CUDA devices on this machine; lower "
            "torchrun's --nproc_per_node or use --device cpu"
        )


def together(main):
    """Run main(args). If it fails because another rank has ended, leave the report to that rank.

    The launcher then ends this rank, too. If it does not, the first rank raises UserError.
    """

    @functools.wraps(main)
    def wrapped(args):
        try:
            return main(args)
        except RuntimeError as error:
            if not any(words in str(error) for words in LOST):
                raise
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
            if RANK > 0:
                os._exit(2)
            raise UserError(f"another rank has ended: {in_one_line(error)}") from None

    return wrapped
