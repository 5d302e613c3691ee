"""What a GPU runs in a step, and what makes the host wait for it."""

from unittest.mock import patch

import torch
from workers_setup import build


def reads_of_a_step(argv):
    """The methods by which a second step reads what the device computes, in order.

    On a GPU each would make the host wait until the device is there.
    """
    import train

    names = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
    methods, reads = {name: getattr(torch.Tensor, name) for name in names}, []

    def counted(name):
        def read(tensor, *args, **options):
            reads.append(name)
            return methods[name](tensor, *args, **options)

        return read

    state = build(argv)
    train.train_step(state)  # it shuffles, and what is compiled is compiled
    with patch.multiple(torch.Tensor, **{name: counted(name) for name in names}):
        train.train_step(state)
    return reads


def rms_norm_on_cuda():
    """Whether eager calls take the Triton kernels: names of what `rms_norm` ran."""
    from torch.profiler import profile

    from rms_norm import rms_norm

    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(256, device="cuda", requires_grad=True)
    with profile() as trace:
        rms_norm(x, weight, 1e-5).sum().backward()
    return {event.key for event in trace.key_averages()}


def kernels_of(argv):
    """Of the third step on this rank: `kernel_times.times`, and for each message its share in time
    that other kernels hide.
    """
    import kernel_times as kt

    import train

    state = build(argv)
    train.train_step(state)
    train.train_step(state)
    kernels = kt.profiled(lambda: train.train_step(state))
    messages = [kernel for kernel in kernels if kt.kind_of(kernel) == "communication"]
    others = [kernel for kernel in kernels if kt.kind_of(kernel) != "communication"]

    def hidden(message):
        return 1 - (kt.covered([*others, message]) - kt.covered(others)) / message["dur"]

    return kt.times(kernels), [hidden(message) for message in messages]


def printed_kernel_times(argv, kernels):
    """What `kernel_times.py argv` prints of training on a CPU, with these kernels for a GPU's.

    With `--rank` no launcher has named a port, as under plain `python`.
    """
    import contextlib
    import io
    import os

    import kernel_times

    launched = [name for name in os.environ if "MASTER_" in name or "TORCHELASTIC" in name]
    for name in launched if "--rank" in argv else []:
        del os.environ[name]

    def profiled(step):
        step()
        return kernels

    text = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(kernel_times, "machine", lambda: "a machine"))
        stack.enter_context(patch.object(kernel_times, "profiled", profiled))
        stack.enter_context(patch.object(kernel_times, "reserved_gib", lambda: 3.0))
        stack.enter_context(contextlib.redirect_stdout(text))
        kernel_times.report(*kernel_times.parse(argv.split()))
    return text.getvalue()
