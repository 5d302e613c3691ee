"""Checks of the exercises that ask for code of one's own: they assert what a reader's module does.

python tests/exercise_checks.py step9_4d_README_2 my_steps/exercises/9.2/a_layout_by_numbers.py
"""

import contextlib
import datetime
import importlib.util
import inspect
import io
import multiprocessing
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def ring(yours):
    """step 2: a ring of blocking sends, on 2 to 4 ranks."""
    import torch.distributed  # noqa: F401  once, not in each rank

    context = multiprocessing.get_context("fork")
    for size in (2, 3, 4):
        with tempfile.TemporaryDirectory() as folder:
            results, store = context.Queue(), f"file://{folder}/store"
            given = [(yours, rank, size, store, results) for rank in range(size)]
            ranks = [context.Process(target=rank_of_ring, args=args) for args in given]
            for process in ranks:
                process.start()
            found = dict(results.get(timeout=20) for _ in ranks)
            for process in ranks:
                process.kill()
                process.join()
        for rank, got in sorted(found.items()):
            want = [float((rank - 1) % size)] * 3
            assert got == want, f"on {size} ranks, rank {rank} received {got}, not {want}"


def rank_of_ring(yours, rank, size, store, results):
    import torch
    import torch.distributed as dist

    wait = datetime.timedelta(seconds=3)
    dist.init_process_group("gloo", store, rank=rank, world_size=size, timeout=wait)
    received = torch.full((3,), -1.0)
    try:
        yours.pass_on(torch.full((3,), float(rank)), received)
        results.put((rank, received.tolist()))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}".splitlines()[0]))
    dist.barrier()


def two_groups(yours):
    """step 2: two ranks that reduce in two groups, each in another order."""
    import torch
    import torch.distributed as dist

    groups, called = ["the first group", "the second group"], []
    dist.all_reduce = lambda x, op=None, group=None, async_op=False: called.append(group)
    for rank, order in ((0, groups), (1, groups[::-1])):
        called.clear()
        yours.reduce_in_both(rank, torch.ones(4), *groups)
        assert called == order, f"rank {rank} reduces in {called}, not in {order}"


def simulation(yours):
    """step 9: the time of interleaved stages where messages take time."""
    sys.path.insert(0, str(ROOT / "step9_4d"))
    from interleaved import enables

    wanted = {(1, 0.5): 132, (2, 0.5): 112, (2, 0.0): 105}
    for (factor, message), want in wanted.items():
        orders = [running_ahead(factor)(rank, 4, 2, 16) for rank in range(4)]
        got = yours.duration(orders, lambda one: enables(one, 4, 2), message=message)
        words = f"4 ranks, 2 chunks, 16 micro-batches, factor {factor}, a message of {message}"
        assert got is not None, "duration returns nothing"
        assert abs(got - want) < 1e-6, f"{words}: {got}, not {want}"


def running_ahead(factor):
    """Our `passes_of`, with another factor of the distance."""
    import interleaved

    ours = inspect.getsource(interleaved.passes_of)
    space = dict(vars(interleaved))
    exec(ours.replace("+ 2 * (ranks", f"+ {factor} * (ranks"), space)
    return space["passes_of"]


def layout(yours):
    """step 9: eight GPUs of 80 GB for llama-3.1-8b, and 2,000 FLOP for each byte sent."""
    sys.path.insert(0, str(ROOT / "assets"))
    import plan

    argv = ["--model_name", "llama-3.1-8b", "--seq_len", "32768", *yours.FLAGS.split()]
    args = plan.parse_args(argv)
    ranks = args.pp_size * args.dp_size * args.cp_size * args.tp_size
    assert yours.FLAGS, "FLAGS is empty"
    assert ranks == 8, f"the layout is of {ranks} GPUs, not of 8"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        plan.main(argv)
    whole = float(re.search(r"in all +([\d.]+) GB", said.getvalue())[1])
    assert whole < 80, f"the fullest GPU needs {whole} GB, and has 80"
    for axis, flops in re.findall(r"^(\w+) .* sent, +([\d,]+) FLOP", said.getvalue(), re.M):
        few = int(flops.replace(",", ""))
        assert few >= 2000, f"{axis} has {few} FLOP for a byte that it sends, not 2,000"


CHECKS = {
    "step2_process_group_README_2": ring,
    "step2_process_group_HANGS_1": two_groups,
    "step9_4d_INTERLEAVED_1": simulation,
    "step9_4d_README_2": layout,
}


def main(name, path):
    spec = importlib.util.spec_from_file_location("yours", path)
    yours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(yours)
    CHECKS[name](yours)


if __name__ == "__main__":
    main(*sys.argv[1:])
