"""What ranks do for the tests of `stacks.py`: wait for each other for ever, sleep, or fail."""

import os
import threading
import time

from harness import run_steps


def nothing():
    """For the time that it takes to start."""
    import process_group as pg

    pg.init_processes("cpu")


def wait_for_each_other(how):
    """Ranks that never end. how: what each of two ranks does."""
    import torch

    import process_group as pg

    pg.init_processes("cpu")
    group = pg.Mesh(dp=2).group("dp")
    x = torch.ones(4)
    if how == "other calls" and group.is_first:
        pg.all_gather(x, group)
    elif how == "other calls":
        add_up(x, group)
    elif how == "one rank less" and group.is_first:
        add_up(x, group)
    elif how == "receive first":
        receive_then_send(x, group)
    elif how == "begun":
        pg.dist.all_reduce(x)  # so that both are there
        if group.is_first:
            work = pg.all_reduce(x, group, async_op=True)
            work.wait()


def sizes_that_do_not_fit():
    """A sum of tensors of other sizes on each of two ranks."""
    import torch

    import process_group as pg

    pg.init_processes("cpu")
    group = pg.Mesh(dp=2).group("dp")
    add_up(torch.ones(8 * (1 + group.rank)), group)


def add_up(x, group):
    import process_group as pg

    pg.all_reduce(x, group)


def receive_then_send(x, group):
    import process_group as pg

    for handle in pg.exchange(group, receive=[(x, group.next)]):
        handle.wait()
    pg.exchange(group, send=[(x, group.next)])


def one_micro_batch_less(argv):
    """Train; the last stage of a pipeline of two forgets a micro-batch."""
    import train

    if os.environ["RANK"] == "1":
        original = train.Batches.micro_batches
        train.Batches.micro_batches = lambda self, step: list(original(self, step))[1:]
    return run_steps(argv.split(), 1)


def come_late(how, seconds):
    """One rank lets the other one wait, and comes. Returns whether both were there.

    how: "sleep"; or "compute", in another thread than that which waits.
    """
    import torch

    import process_group as pg

    pg.init_processes("cpu")
    group = pg.Mesh(dp=2).group("dp")
    x = torch.ones(4)
    if how == "sleep" and not group.is_first:
        time.sleep(seconds)
    if how == "compute" and not group.is_first:
        begun = threading.Event()
        threading.Thread(target=compute_then_send, args=(seconds, begun, x, group)).start()
        begun.wait()
    if how == "compute":
        if group.is_first:
            for handle in pg.exchange(group, receive=[(x, 1)]):
                handle.wait()
    pg.dist.barrier()
    return True


def compute_then_send(seconds, begun, x, group):
    import process_group as pg

    begun.set()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    for handle in pg.exchange(group, send=[(x, 0)]):
        handle.wait()


def fail(how):
    """An error in a function of the step, or one that another one led to."""
    import torch

    import model

    if how == "in the step":
        model.cross_entropy(torch.ones(1, 2, 3), "no targets")
    try:
        raise ValueError("the first one\nin two lines")
    except ValueError as error:
        raise RuntimeError("the second one\nin two lines") from error
