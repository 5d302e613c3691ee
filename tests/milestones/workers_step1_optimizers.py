"""What the checks of step 1's page about learning rates and optimizers run."""

import contextlib
import io
import json
from types import SimpleNamespace

from same import same


def learning_rates():
    """Rates of 100 steps, 10 of them warm-up, at steps of each part of the way."""
    import torch

    from learning_rate import WAYS_DOWN, learning_rate_at

    middle = {"cosine": 0.5, "linear": 0.5, "constant": 1.0, "wsd": 1 - 0.5**0.5}
    for name, function in WAYS_DOWN.items():
        found = torch.tensor([function(p) for p in (0.0, 0.5, 1.0)], dtype=torch.float64)
        due = torch.tensor([1.0, middle[name], float(name == "constant")], dtype=torch.float64)
        what = f"WAYS_DOWN[{name!r}] at 0, 0.5 and 1"
        same(found, due, what, "what is left of the way from the peak to the lowest rate")
    where = "up in a line to step 10, there until the decay begins, then down"
    for name, decay_steps, ratio in (("cosine", 90, 0.1), ("linear", 40, 0.0), ("wsd", 20, 0.5)):
        args = SimpleNamespace(
            learning_rate=1e-3, warmup_steps=10, total_steps=100, lr_schedule=name,
            decay_steps=decay_steps, min_lr_ratio=ratio,
        )  # fmt: skip
        half = 100 - decay_steps // 2
        steps = [1, 5, 10, 100 - decay_steps, half, 100]
        found = torch.tensor([learning_rate_at(s, args) for s in steps], dtype=torch.float64)
        parts = [0.1, 0.5, 1, 1, ratio + (1 - ratio) * middle[name], ratio]
        what = f"learning_rate_at {steps} with --lr_schedule {name} --decay_steps {decay_steps} "
        what += f"--min_lr_ratio {ratio}"
        same(found, 1e-3 * torch.tensor(parts, dtype=torch.float64), what, where)
    args.warmup_steps = 0
    assert learning_rate_at(1, args) == 1e-3, "learning_rate_at 1 without warm-up is the peak"


def asked(name="adamw", more="{}", weight_decay=0.1):
    """(the arguments after choose_optimizer, what it said) for these flags."""
    from torch_optimizers import choose_optimizer

    args = SimpleNamespace(
        optimizer=name, optimizer_args=more, weight_decay=weight_decay, learning_rate=0.1
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        choose_optimizer(args)
    return args, said.getvalue()


def chosen():
    """The right class with the right arguments; each one treats numbers alone."""
    import torch

    from torch_optimizers import ELEMENTWISE

    def groups_of(*flags):
        weight = torch.zeros(2, requires_grad=True)
        made = asked(*flags)[0].make_optimizer([weight], lr=0.1)
        return type(made), made.param_groups[0]

    for flags, kind, options in (
        (("adamw",), torch.optim.AdamW, {"betas": (0.9, 0.95), "fused": True, "lr": 0.1}),
        (("sgd", '{"momentum": 0.5}'), torch.optim.SGD, {"momentum": 0.5, "fused": True}),
        (("adam", '{"eps": 1e-4}'), torch.optim.Adam, {"eps": 1e-4, "fused": True}),
        (("rmsprop",), torch.optim.RMSprop, {"momentum": 0}),
    ):
        made, group = groups_of(*flags)
        call = f"choose_optimizer of --optimizer {' --optimizer_args '.join(flags)}"
        assert made is kind, f"{call} makes {made.__name__}, not {kind.__name__}"
        found = {name: group[name] for name in options}
        assert found == options, f"{call} has {found}; it should have {options}"
    for name in ELEMENTWISE:
        whole, parts = updated(name, [6]), updated(name, [2, 4])
        assert torch.equal(whole, parts), (
            f"ELEMENTWISE has {name}, but it gives a weight in parts another update"
        )
    _, said = asked("rprop")
    assert "--weight_decay 0.1 is not used" in said, (
        f"choose_optimizer of rprop, which has no weight decay, says {said!r}: note that it is "
        "not used"
    )


def updated(name, sizes):
    """Six weights after three updates, held in parts of some sizes."""
    import torch

    start, gradients = torch.linspace(-1, 1, 6), torch.linspace(-3, 4, 18).sin().view(3, 6)
    parts = [part.clone().requires_grad_() for part in start.split(sizes)]
    optimizer = asked(name)[0].make_optimizer(parts, lr=0.1)
    for gradient in gradients:
        for part, grad in zip(parts, gradient.split(sizes), strict=True):
            part.grad = grad.clone()
        optimizer.step()
    return torch.cat([part.detach() for part in parts])


def refused():
    """Each wrong call is told in one line that names the flag and what else to write."""
    from errors import UserError

    for name, more, words in (
        ("muon", "{}", ("--optimizer muon", "whole matrices", "adamw")),
        ("lbfgs", "{}", ("--optimizer lbfgs", "choose one of")),
        ("adma", "{}", ("--optimizer adma", "choose one of", "adamw")),
        ("sgd", "momentum=0.9", ("--optimizer_args momentum=0.9", "JSON")),
        ("sgd", "[0.9]", ("--optimizer_args [0.9]", "JSON object")),
        ("sgd", json.dumps({"lr": 1}), ("--optimizer_args", "--learning_rate")),
        ("sgd", json.dumps({"weight_decay": 1}), ("--optimizer_args", "--weight_decay")),
        ("sgd", json.dumps({"momemtum": 0.9}), ("--optimizer sgd", "momemtum")),
        ("adamw", json.dumps({"betas": 0.9}), ("--optimizer adamw", "--optimizer_args")),
    ):
        call = f"choose_optimizer of --optimizer {name} --optimizer_args {more}"
        try:
            asked(name, more)
        except UserError as error:
            for word in words:
                assert word in str(error), f"{call} says {str(error)!r}, without {word!r}"
        else:
            raise AssertionError(f"{call} should raise UserError")
