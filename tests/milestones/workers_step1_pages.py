"""What the checks of step 1's further pages run: the kernels and the reports."""

import contextlib
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy_llama
from same import same
from workers_step1 import DERIVATIVE, array, config_of, numbers

# --- 7. and 8. KERNELS.md -------------------------------------------------------------------------


def attention(heads, kv_heads):
    """Compare causal_attention with NumPy's; the names of the operators that ran."""
    from torch.profiler import profile

    from attention import causal_attention

    shapes = [(2, 5, heads, 4), (2, 5, kv_heads, 4), (2, 5, kv_heads, 4)]
    q, k, v = (numbers(*shape, start=i).requires_grad_() for i, shape in enumerate(shapes))
    grad = numbers(*shapes[0], start=4)
    with profile() as trace:
        out = causal_attention(q, k, v)
        out.backward(grad)
    arrays = [x.detach().numpy() for x in (q, k, v)]
    due = array(numpy_llama.attention(*arrays))
    hint = "of each query head, over the tokens up to its own; kv_heads serve several heads"
    same(out, due, "causal_attention", hint)
    grads = numpy_llama.attention_backward(grad.numpy(), *arrays)
    for name, x, expected in zip("qkv", (q, k, v), grads, strict=True):
        same(x.grad, array(expected), f"the gradient of {name}", DERIVATIVE, 1e-11)
    return {event.key for event in trace.key_averages()}


def rms_norm(kernels):
    """Compare rms_norm, or with `kernels` what Triton's interpreter makes of them, with NumPy's."""
    import rms_norm as ours

    function = ours.TritonRMSNorm.apply if kernels else ours.rms_norm
    name = "TritonRMSNorm" if kernels else "rms_norm"
    for shape in ((2, 3, 5), (300, 4)):  # the latter has more rows than there are programs
        x, weight = numbers(*shape).requires_grad_(), numbers(shape[-1], start=2).requires_grad_()
        grad = numbers(*shape, start=1)
        y = function(x, weight, 1e-2)
        y.backward(grad)
        arguments = x.detach().numpy(), weight.detach().numpy(), 1e-2
        same(y, array(numpy_llama.rms_norm(*arguments)), name, "x / rms(x) * weight")
        grads = numpy_llama.rms_norm_backward(grad.numpy(), *arguments)
        for what, found, due in zip(("x", "weight"), (x, weight), grads, strict=True):
            hint = DERIVATIVE + (", a sum over all rows" if what == "weight" else "")
            same(found.grad, array(due), f"the gradient of {name}'s {what}", hint)


# --- 9. and 10. REPORTS.md ------------------------------------------------------------------------


def refused(path, flags):
    """What check_metrics_file says of a run with these flags; None if it may write there."""
    from errors import UserError
    from metrics_file import check_metrics_file

    try:
        check_metrics_file(SimpleNamespace(metrics_file=path, flags=flags))
    except UserError as error:
        return str(error)


def metrics_file(path):
    from metrics_file import MetricsFile

    flags = {"seed": 1, "metrics_file": path}
    for _ in range(2):  # the same command may be given again
        said = refused(path, flags)
        assert said is None, f"the file is new, or of a run of the same flags, but: {said}"
        file = MetricsFile(path, flags)
        for step in (1, 2):
            file.write({"step": step, "loss": 0.1})
            lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
            due = [{"step": step, "loss": 0.1} for step in range(1, step + 1)]
            assert lines == due, (
                f"MetricsFile: after step {step} the file holds {lines}; a line a step is due, and "
                "none of the run before"
            )
        file.write({"step": 3, "loss": math.nan, "grad_norm": math.inf, "skipped": True})
        text = Path(path).read_text().splitlines()[-1]
        due = '{"step": 3, "loss": null, "grad_norm": null, "skipped": true}'
        assert text == due, (
            f"MetricsFile.write: a loss of nan and a norm of inf are {text}; JSON knows neither, "
            f"so null is due: {due}"
        )
        file.close()
    for other in (flags | {"seed": 2}, flags | {"device": "cpu"}, {"metrics_file": path}):
        assert refused(path, other), (
            f"same_flags: a run of {other} would write over the lines of a run of {flags}"
        )
    kept = Path(path).read_text()
    Path(path).write_text("notes of mine\n")
    assert refused(path, flags), "a file that holds something else would be lost"
    Path(path).write_text(kept[:-9])  # as a run leaves it that was killed
    assert refused(path, flags) is None, "a last line that is cut off is no reason to refuse"


def room_for_a_part(path):
    """Lines on a disk that has room for one and a half, until someone makes more."""
    import resource

    from metrics_file import MetricsFile

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = MetricsFile(path, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (18, limits[1]))  # bytes; a line of these has 12
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # of the tests, which is a file, too
            file.write({"step": 1})
            file.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.write({"step": 3})
    file.close()
    found, due = Path(path).read_bytes(), b"".join(b'{"step": %d}\n' % n for n in (1, 2, 3))
    assert found == due, (
        f"MetricsFile.write: half of line 2 found no room at first; later the file has {found}. "
        "What write returns is how many bytes went out; the rest of waiting goes with the next call"
    )


def full_disk():
    from errors import UserError
    from metrics_file import MetricsFile

    file = MetricsFile("/dev/full", {})  # a device of Linux on which nothing finds room
    file.write({"step": 1})  # training goes on
    file.write({"step": 2})
    try:
        file.close()
    except UserError as error:
        assert "2 lines" in str(error), f"2 lines are lost; close says: {error}"
    else:
        raise AssertionError("the lines found no room, and close must say so at the end")


def metrics(path):
    import torch

    from metrics import Metrics, flops_per_token, peak_flops, peak_memory_gb, readable

    model = SimpleNamespace(parameter_count=1000, model=SimpleNamespace(config=config_of()))
    due = 6 * 1000 + 12 * 2 * 16 * 128
    found = flops_per_token(model, 128)
    assert found == due, f"flops_per_token is {found}; 6 N + 12 L h s are {due}"
    memory = peak_memory_gb(torch.device("cpu"))
    assert 0.01 < memory < 1000, f"peak_memory_gb: {memory} GB are no size of this process"
    for name, due in (
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("Another GPU", None),
    ):
        with patch.object(torch.cuda, "get_device_name", lambda *_, name=name: name):
            found = peak_flops(torch.device("cuda"))
        assert found == due, f"peak_flops of a GPU called {name} is {found}; it should be {due}"
    assert peak_flops(torch.device("cpu")) is None, "peak_flops of a CPU should be None"
    args = SimpleNamespace(metrics_file=path, use_wandb=False, use_tensorboard=None, flags={})
    report = Metrics(args, torch.device("cpu"), 2e9)
    report.peak = 1e12  # as if it were known
    report.open()
    for step, tokens in ((1, 1000), (2, 3000)):
        report.clock -= 10  # as if the step had taken ten seconds
        report.log({"step": step, "loss": 5.0, "grad_norm": 2.0, "learning_rate": 1e-3,
                    "tokens": tokens, "memory_gb": 0.5})  # fmt: skip
    report.close()
    for place, line in enumerate(map(json.loads, Path(path).read_text().splitlines())):
        speed = (100, 200)[place]
        for name, due in {"tokens_per_second": speed, "mfu": speed * 2e9 / 1e12}.items():
            assert abs(line[name] / due - 1) < 0.01, (
                f"Metrics.log gives {line[name]} as {name} of step {place + 1}; it should be {due}"
            )
    assert "loss  5.0000" in readable(line), f"the line for people: {readable(line)}"
