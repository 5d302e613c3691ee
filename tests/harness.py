"""Run functions on N gloo ranks of one step's code, and put full tensors together from them.

    with World(step_dir, 4) as world:
        results = world.run(function, *args)      # one result a rank

`function` is a module-level function of a module in `tests/`; inside it, `import train` gives the
step's own `train.py`. The processes come from a fork server that has torch loaded, and stay for
the next call, so a world of four costs a tenth of a second and not ten.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import wait

import numpy as np
from shared_gpus import share_gpus

CONTEXT = multiprocessing.get_context("forkserver")
# What all steps import, by themselves or, as dynamo, through an optimizer: a rank begins at once.
CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.utils.data", "tokenizers"]
)


class RankError(AssertionError):
    """A rank failed or hung; the text holds its traceback."""


class World:
    """size processes that run functions together; a failed world starts again by itself.

    fresh: for variables of the environment that a library reads when it is imported.
    """

    def __init__(self, step_dir, size, fresh=False, **environment):
        self.step_dir, self.size = str(step_dir), size
        self.context = multiprocessing.get_context("spawn") if fresh else CONTEXT
        self.environment = environment
        self.processes, self.pipes = [], []

    def start(self):
        pipes = [self.context.Pipe() for _ in range(self.size)]
        self.pipes = [mine for mine, _ in pipes]
        environment = {
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "localhost",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
            **self.environment,
        }
        self.processes = [
            self.context.Process(
                target=serve, args=(theirs, self.step_dir, rank, environment), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, function, *args, timeout=120):
        """Call function(*args) on every rank; the list of results, in order of rank.

        Raises RankError with the traceback of the first rank that failed, died or took longer than
        `timeout` seconds; then all ranks are ended.
        """
        import torch.distributed as dist

        if not self.processes:
            self.start()
        # Like torchrun's agent: the launcher holds the store in which the ranks find each other.
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        for pipe in self.pipes:
            pipe.send((store.port, function, args))
        results, waiting = {}, dict(zip(self.pipes, range(self.size), strict=True))
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(waiting, timeout=max(0, deadline - time.monotonic()))
            if not ready:
                self.fail(f"ranks {sorted(waiting.values())} took over {timeout} s", show=True)
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    good, results[rank] = pipe.recv()
                except EOFError:
                    self.fail(f"rank {rank} of {self.size} died")
                if not good:
                    self.fail(f"rank {rank} of {self.size} failed:\n{results[rank]}")
        return [results[rank] for rank in range(self.size)]

    def fail(self, text, show=False):
        if show:  # where each of them stands, on standard error
            for process in self.processes:
                os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.5)
        self.close()
        raise RankError(text)

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def serve(pipe, step_dir, rank, environment):
    """The life of one rank: functions in, results out."""
    import torch
    import torch.distributed as dist

    # Daemons end with us, but may not have children, and a data loader does.
    multiprocessing.current_process()._config["daemon"] = False
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    if 0 < torch.cuda.device_count() < int(environment["WORLD_SIZE"]):
        share_gpus()
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    sys.path.insert(0, step_dir)
    while True:
        try:
            port, function, args = pipe.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        try:
            result = True, function(*args)
            if dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()
        except BaseException:
            result = False, traceback.format_exc()
        pipe.send(result)


# --- full tensors ---------------------------------------------------------------------------------


def pieces(parameters, of):
    """What this rank holds of each tensor: (name, full shape, slices, piece, array).

    of: function from a parameter to the tensor to look at, its gradient for instance. piece: where
    a parameter is only a part of what the slices cut out, flattened, the slice of that.
    """
    return [
        (
            p.global_name,
            tuple(p.full_shape),
            p.held,
            getattr(p, "piece", slice(None)),
            of(p).detach().double().cpu().numpy().copy(),
        )
        for p in parameters
    ]


def assemble(ranks):
    """Full arrays {name: array} from the pieces of all ranks, a list for each rank.

    Raises AssertionError where no rank holds an element, or two hold different values of it.
    """
    full = {}
    for rank, held in enumerate(ranks):
        for name, shape, slices, piece, array in held:
            whole = full.setdefault(name, np.full(shape, np.nan))
            flat = whole[slices].flatten()
            there, array = flat[piece], array.flatten()
            differs = ~np.isnan(there) & (there != array)
            assert not differs.any(), f"{name}: rank {rank} holds another value than a rank before"
            flat[piece] = array
            whole[slices] = flat.reshape(whole[slices].shape)
    for name, whole in full.items():
        assert not np.isnan(whole).any(), f"{name}: a part that no rank holds, or a NaN"
    return full


def differences(reference, actual, what):
    """{name: max|difference| / max|reference|}; where the latter is 0, 1e-14 counts as 1e-10."""
    only_one = reference.keys() ^ actual.keys()
    assert not only_one, f"{what}: {only_one} on one side only"
    largest = {name: np.abs(whole).max() or 1e-4 for name, whole in reference.items()}
    return {name: np.abs(reference[name] - actual[name]).max() / largest[name] for name in largest}


def assert_close(reference, actual, what, tolerance=1e-10):
    """N5: per tensor max|difference| <= tolerance * max|reference|; below 1e-14 for a zero one."""
    for name, off in differences(reference, actual, what).items():
        assert off <= tolerance, f"{what} of {name}: off by {off:.3g}, bound {tolerance:.3g}"


def run_steps(argv, steps, break_it=None):
    """A worker function: train for some steps and return all numbers that must not change.

    Returns a dict: config; metrics, one dict a step; batches, one list of (tokens, targets,
    positions) a step; before, after: pieces of the weights; gradients: pieces of every step,
    before clipping. break_it: name of a function of `breaks.py`, called with the `train` module.
    """
    import torch

    import train

    torch.compiler.reset()  # or shapes of other layouts count, until it compiles no more
    if break_it is not None:
        import breaks

        getattr(breaks, break_it)(train)
    state = train.setup(train.parse_args(argv))
    result = {"config": state.args.config, "metrics": [], "batches": [], "gradients": []}
    result["before"] = pieces(state.parameters, lambda p: p)
    forward_backward = train.forward_backward

    def recording(state):
        loss = forward_backward(state)
        result["gradients"].append(pieces(state.parameters, lambda p: p.grad))
        return loss

    train.forward_backward = recording
    try:
        for step in range(steps):
            data = getattr(state, "data", None)
            micro_batches = data.micro_batches(step) if data else [state.batch]
            result["batches"].append([tuple(t.cpu().numpy() for t in m) for m in micro_batches])
            result["metrics"].append(train.train_step(state))
    finally:
        train.forward_backward = forward_backward
    result["after"] = pieces(state.parameters, lambda p: p)
    return result


class Run:
    """The results of `run_steps` of all ranks, with full tensors put together."""

    def __init__(self, ranks):
        self.config = ranks[0]["config"]
        self.metrics = ranks[0]["metrics"]
        self.batches = ranks[0]["batches"]
        self.before = assemble([rank["before"] for rank in ranks])
        self.after = assemble([rank["after"] for rank in ranks])
        self.gradients = [
            assemble(step) for step in zip(*(rank["gradients"] for rank in ranks), strict=True)
        ]

    def compared_with(self, reference):
        """Yield (what, arrays of the other Run, arrays of this one), in the order of training."""
        yield "initial weight", reference.before, self.before
        for step, (one, other) in enumerate(zip(reference.metrics, self.metrics, strict=True)):
            numbers = (
                {key: np.array([m[key]]) for key in ("loss", "grad_norm", "learning_rate")}
                for m in (one, other)
            )
            yield f"step {step + 1}", *numbers
            yield f"step {step + 1}, gradient", reference.gradients[step], self.gradients[step]
        yield "final weight", reference.after, self.after

    def assert_same_as(self, reference, tolerance=1e-10):
        """Weights, losses, gradient norms and every gradient equal those of another Run (N5)."""
        for what, one, other in self.compared_with(reference):
            assert_close(one, other, what, tolerance if "initial" not in what else 0)
