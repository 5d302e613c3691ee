"""What the checks of step 1's page about half precision run."""

import functools
import math
from types import SimpleNamespace

import torch


def asked(dtype=None, weights=None, device="cpu", name="adamw", fused=True):
    """The arguments after check_precision."""
    from precision import check_precision

    make = functools.partial(torch.optim.AdamW, fused=fused)
    args = SimpleNamespace(
        dtype=dtype, weights_dtype=weights, device=device, optimizer=name, make_optimizer=make
    )
    check_precision(args)
    return args


def dtypes_that_fit():
    for given, due in (
        ((None, None), ("float32", "float32")),
        ((None, None, "cuda"), ("bfloat16", "float32")),
        (("bfloat16", None), ("bfloat16", "float32")),
        (("float16", None), ("float16", "float32")),
        (("float64", None), ("float64", "float64")),
        (("float16", "float16"), ("float16", "float16")),
        (("bfloat16", "bfloat16"), ("bfloat16", "bfloat16")),
        (("bfloat16", "float32"), ("bfloat16", "float32")),
    ):
        args = asked(*given)
        found = args.dtype, args.weights_dtype
        assert found == due, (
            f"check_precision of --dtype {given[0]} --weights_dtype {given[1]} gives {found} for "
            f"computation and weights; it should give {due}"
        )


def dtypes_that_do_not():
    """Each wrong pair is told in one line that names both and what else to write."""
    from errors import UserError

    for given, words in (
        (("float32", "bfloat16"), ("--weights_dtype bfloat16", "--dtype float32")),
        (("bfloat16", "float16"), ("--weights_dtype float16", "--dtype bfloat16", "float32")),
        (("float64", "float32"), ("--weights_dtype float32", "--dtype float64")),
        (("bfloat16", "float64"), ("--weights_dtype float64", "--dtype bfloat16")),
        (("float16", None, "cpu", "rmsprop", None), ("--optimizer rmsprop", "adamw", "bfloat16")),
        (("float16", None, "cpu", "adamw", False), ("--optimizer adamw", "fused")),
    ):
        call = f"check_precision of --dtype {given[0]} --weights_dtype {given[1]} {given[3:]}"
        try:
            asked(*given)
        except UserError as error:
            for word in words:
                assert word in str(error), f"{call} says “{error}”: say {word}"
        else:
            raise AssertionError(f"{call} raises nothing; it should raise UserError")


def stepped(scale, optimizer, weight, gradient, norm):
    """One update with a gradient that is too large by the scale; what is reported of it."""
    weight.grad = torch.full_like(weight, gradient * scale.value)
    scale.step(optimizer, torch.tensor(norm, dtype=torch.float64))
    return scale.update(optimizer, norm)


def updates():
    """A good step is that without a scale; a bad one leaves everything as it was."""
    from precision import LossScale

    for dtype, value in (("float32", 1), ("bfloat16", 1), ("float64", 1), ("float16", 2**16)):
        scale = LossScale(dtype)
        assert scale.value == value, f"LossScale({dtype!r}).value is {scale.value}, not {value}"
        weight = torch.ones(3, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.5, fused=True)
        report = stepped(scale, optimizer, weight, 1.0, 1.0)
        assert torch.equal(weight, torch.full((3,), 0.5)), (
            f"LossScale({dtype!r}).step: weights of 1, gradients of 1 (times the scale) and a rate "
            f"of 0.5 give {weight.tolist()}; they should be 0.5"
        )
        due = {"loss_scale": 2**16, "skipped": False} if dtype == "float16" else {}
        assert report == due, f"LossScale({dtype!r}).update returns {report}; it should be {due}"
    kept = weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()
    for norm in (math.inf, math.nan):
        before = scale.value
        report = stepped(scale, optimizer, weight, math.inf, norm)
        now = weight.detach(), optimizer.state[weight]["momentum_buffer"]
        assert all(map(torch.equal, kept, now)), (
            f"LossScale.step: a gradient norm of {norm} changes weights or momentum to {now}; "
            "give the optimizer a found_inf that is not 0"
        )
        due = {"loss_scale": before, "skipped": True}
        assert report == due, f"LossScale.update of norm {norm} returns {report}, not {due}"
        assert scale.value == before / 2, f"the scale after it is {scale.value}, not {before / 2}"


def first_step():
    from precision import LossScale

    weight, scale = torch.ones(3, requires_grad=True), LossScale("float16")
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.5, fused=True)
    stepped(scale, optimizer, weight, math.inf, math.inf)
    assert not optimizer.state, (
        "LossScale.update: after a first step that is skipped the optimizer has a state that it "
        f"has not filled: {dict(optimizer.state[weight])}; clear it"
    )


def up_and_down():
    from precision import LossScale

    scale = LossScale("float16")
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0, fused=True)

    def after(count, norm):
        for _ in range(count):
            report = stepped(scale, optimizer, weight, 1.0, norm)
        return report

    for count, norm, due in (
        (1999, 1.0, 2**16), (1, 1.0, 2**17), (1999, 1.0, 2**17), (1, math.inf, 2**16),
        (1999, 1.0, 2**16), (1, 1.0, 2**17),
    ):  # fmt: skip
        after(count, norm)
        assert scale.value == due, (
            f"LossScale.update: the scale is {scale.value} after {count} more steps of norm {norm};"
            f" it should be {due}: doubled after 2000 good steps in a row, halved after a bad one"
        )
    assert scale.remedy == "", f"LossScale.remedy at {scale.value} is {scale.remedy!r}"
    report = after(17, math.nan)
    assert report["skipped"] and scale.value == 1, f"a scale of 2 is halved to {scale.value}"
    report = after(1, math.nan)
    assert not report["skipped"], "below 1 no step can be skipped: then the run has to stop"
    assert "--dtype bfloat16" in scale.remedy, f"LossScale.remedy below 1 is {scale.remedy!r}"
