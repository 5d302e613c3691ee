"""Run functions on N gloo ranks of one step's code, and put full tensors together from them.

    with World(step_dir, 4) as world:
        results = world.run(function, *args)      # one result a rank

`function` is a module-level function of a module in `tests/`; inside it, `import train` gives the
step's own `train.py`. The processes come from a fork server that has torch loaded, and stay for
the next call, so a world of four costs a tenth of a second and not ten.
"""

import faulthandler
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from diagnosis import Comparison, Sizes, explain
from replicas import assemble, only_on_one_side
from shared_gpus import share_gpus
from stacks import LOOK, SIGNAL, Watch, how_it_ended, one_line, short_traceback

CONTEXT = multiprocessing.get_context("forkserver")
# What all steps import, by themselves or, as dynamo, through an optimizer: a rank begins at once.
CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.utils.data", "tokenizers"]
)


class RankError(AssertionError):
    """A rank failed or hung; the first line says how, then come its traceback or all stacks."""


class World:
    """size processes that run functions together; a failed world starts again by itself.

    fresh: for variables of the environment that a library reads when it is imported.
    """

    def __init__(self, step_dir, size, fresh=False, **environment):
        self.step_dir, self.size = str(step_dir), size
        self.context = multiprocessing.get_context("spawn") if fresh else CONTEXT
        self.environment = environment
        self.processes, self.pipes = [], []
        self.folder = None  # of files into which the ranks write where they stand

    def start(self):
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.stack_files = [Path(self.folder.name, str(rank)) for rank in range(self.size)]
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
                target=serve,
                args=(theirs, self.step_dir, rank, environment, self.stack_files[rank]),
                daemon=True,
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, function, *args, timeout=120, idle=15):
        """Call function(*args) on every rank; the list of results, in order of rank.

        Raises RankError, with where the ranks stand, when one fails or dies, when for `idle`
        seconds all of them have only waited for each other, or after `timeout` seconds; then all
        ranks are ended.
        """
        import torch.distributed as dist

        __tracebackhide__ = True  # what pytest shows ends at the test's own line
        if not self.processes:
            self.start()
        # Like torchrun's agent: the launcher holds the store in which the ranks find each other.
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        for pipe in self.pipes:
            pipe.send((store.port, function, args))
        results, waiting = {}, dict(zip(self.pipes, range(self.size), strict=True))
        deadline, watch = time.monotonic() + timeout, Watch(self, idle)
        while waiting:
            ready = wait(waiting, timeout=max(0, min(LOOK, deadline - time.monotonic())))
            for rank, (good, result) in self.received(ready, waiting):
                if not good:
                    lost = result.startswith("died") or "by peer" in result
                    more = self.last_words(waiting) if lost else ""
                    self.fail(f"rank {rank} of {self.size} {result}{more}")
                results[rank] = result
            ranks = sorted(waiting.values())
            if not ready and time.monotonic() >= deadline:
                self.fail(f"ranks {ranks} took over {timeout} s\n{watch.standing(ranks)}")
            if not ready and (text := watch.deadlock(ranks)):
                self.fail(text)
        return [results[rank] for rank in range(self.size)]

    def received(self, ready, waiting):
        """[(rank, (good, result or words))] of pipes with news; who died comes first.

        For a death makes other ranks fail too, with an error that says less.
        """
        news = []
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                news.append((rank, pipe.recv()))
            except EOFError:
                words = how_it_ended(self.processes[rank], self.stack_files[rank], self.step_dir)
                news.insert(0, (rank, (False, f"died, {words}")))
        return news

    def last_words(self, waiting):
        """What other ranks say that fail soon after one has died, or has lost another."""
        others = self.received(wait(waiting, timeout=3) if waiting else [], waiting)
        return "".join(f"\nrank {rank} {text}" for rank, (good, text) in others if not good)

    def fail(self, text):
        __tracebackhide__ = True
        self.close()
        raise RankError(text)

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
        if self.folder:
            self.folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def serve(pipe, step_dir, rank, environment, stack_file):
    """The life of one rank: functions in, results out."""
    import torch
    import torch.distributed as dist

    # Daemons end with us, but may not have children, and a data loader does.
    multiprocessing.current_process()._config["daemon"] = False
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    if 0 < torch.cuda.device_count() < int(environment["WORLD_SIZE"]):
        share_gpus()
    stacks = open(stack_file, "a")  # for as long as this process lives
    faulthandler.register(SIGNAL, stacks, all_threads=False)
    faulthandler.enable(stacks)  # where a library ends the process
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
        except BaseException as error:
            result = False, f"failed: {one_line(error)}\n{short_traceback(error)}"
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
            array_of(of(p), p.global_name),
        )
        for p in parameters
    ]


def array_of(tensor, name):
    assert tensor is not None, f"{name} has no gradient: no backward pass of this rank reached it"
    return tensor.detach().double().cpu().numpy().copy()


def differences(reference, actual, what):
    """{name: max|difference| / max|reference|}; where the latter is 0, 1e-14 counts as 1e-10."""
    __tracebackhide__ = True
    missing = [name for name in reference if name not in actual]
    unexpected = [name for name in actual if name not in reference]
    assert not missing + unexpected, only_on_one_side(missing, unexpected, what)
    largest = {name: np.abs(whole).max() or 1e-4 for name, whole in reference.items()}
    return {name: np.abs(reference[name] - actual[name]).max() / largest[name] for name in largest}


def compare(reference, actual, what, tolerance):
    __tracebackhide__ = True
    return Comparison(what, reference, actual, differences(reference, actual, what), tolerance)


def assert_close(reference, actual, what, tolerance=1e-10, sizes=None):
    """N5: per tensor max|difference| <= tolerance * max|reference|; below 1e-14 for a zero one."""
    __tracebackhide__ = True
    comparison = compare(reference, actual, what, tolerance)
    if comparison.wrong:
        raise AssertionError(explain([comparison], sizes))


def run_steps(argv, steps, break_it=None):
    """A worker function: train for some steps and return all numbers that must not change.

    Returns a dict: config; sizes, what the run is split into; metrics, one dict a step; batches,
    one list of (tokens, targets, positions) a step; before, after: pieces of the weights;
    gradients: pieces of every step, before clipping. break_it: name of a function of `breaks.py`,
    called with the `train` module.
    """
    import torch

    import train

    torch.compiler.reset()  # or shapes of other layouts count, until it compiles no more
    if break_it is not None:
        import breaks

        getattr(breaks, break_it)(train)
    state = train.setup(train.parse_args(argv))
    result = {"config": state.args.config, "metrics": [], "batches": [], "gradients": []}
    result["sizes"] = Sizes.of(state.args, int(os.environ["WORLD_SIZE"]))
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
        __tracebackhide__ = True
        self.config = ranks[0]["config"]
        self.sizes = ranks[0]["sizes"]
        self.metrics = ranks[0]["metrics"]
        self.batches = ranks[0]["batches"]
        self.stages = self.stages_of(ranks)
        # In the order of training: the first complaint is the nearest to the mistake.
        self.before = self.whole([rank["before"] for rank in ranks], "initial weight")
        self.gradients = []
        for step, held in enumerate(zip(*(r["gradients"] for r in ranks), strict=True), 1):
            self.gradients.append(self.whole(held, f"step {step}, gradient"))
        self.after = self.whole([rank["after"] for rank in ranks], "final weight")

    def whole(self, held, what):
        __tracebackhide__ = True
        return assemble(held, what, self.sizes)

    def stages_of(self, ranks):
        """{name of a tensor: the pipeline stages that hold it}."""
        stages = {}
        for rank, result in enumerate(ranks):
            for name, *_ in result["before"]:
                stages.setdefault(name, set()).add(self.sizes.place(rank).get("pp", 0))
        return stages

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
        __tracebackhide__ = True
        pairs = self.compared_with(reference)
        for _, moment in itertools.groupby(pairs, lambda pair: pair[0].split(",")[0]):
            comparisons = []
            for what, one, other in moment:
                most = tolerance if "initial" not in what else 0
                comparisons.append(compare(one, other, what, most))
            if any(comparison.wrong for comparison in comparisons):
                raise AssertionError(explain(comparisons, self.sizes, self.stages))
