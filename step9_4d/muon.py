"""Muon: the update of a matrix is its momentum, with all singular values made nearly 1.

Only a whole matrix has singular values, and a rank may hold no more than a part of it. The parts of
the momentum travel to the matrix's owner (see owners.py), and the parts of the update travel back.
So each matrix is made orthogonal once, whatever the layout. Embedding, head and norms are AdamW's.

Sources: Jordan, kellerjordan.github.io/posts/muon; Moonlight (arXiv:2502.16982), section 2.
"""

import functools
import math

import torch
from torch import optim

import optimizer
from owners import Owners
from torch_optimizers import DEFAULTS

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of a s + b s^3 + c s^5; source: Jordan's post
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def newton_schulz(matrix, iterations=5):
    """Nearly U V' of a matrix U S V': the same singular vectors, singular values near 1.

    matrix: [rows, columns]. Each iteration puts the singular values through the polynomial. After
    five those above 1/100 of the matrix's norm are between 0.68 and 1.14. One near 0 grows by
    3.4445 each time.
    """
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm().clamp(min=1e-7)  # no singular value is larger than this norm
    tall = len(x) > len(x.T)
    x = x.T if tall else x
    for _ in range(iterations):
        gram = x @ x.T  # [shorter side, shorter side]
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def is_matrix(parameter):
    """Whether it is a matrix of a layer, or a part of one."""
    return ".layers." in getattr(parameter, "global_name", "") and len(parameter.full_shape) == 2


class Muon(optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for all other parameters.

    The matrices' updates are made as large as AdamW's, so one learning rate and one weight decay do
    for both. Source: arXiv:2502.16982, section 2.2. dtype: of the iterations and of what travels;
    by default that of the weights, but bfloat16 on CUDA for float32.
    """

    def __init__(
        self, params, lr=3e-4, weight_decay=0.1, momentum=0.95, nesterov=True, iterations=5,
        dtype=None, betas=DEFAULTS["adamw"]["betas"], eps=1e-8, mesh=None,
    ):  # fmt: skip
        check_arguments(momentum, iterations, dtype)
        own = {"momentum": momentum, "nesterov": nesterov, "iterations": iterations, "dtype": dtype}
        shared = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "eps": eps}
        super().__init__(params, shared | own)
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        self.matrices = {p.global_name: (p, group) for p, group in pairs if is_matrix(p)}
        for parameter, _ in self.matrices.values():
            zeros = torch.zeros_like(parameter)
            self.state[parameter] = {"step": torch.zeros(()), "momentum_buffer": zeros}
        others = [
            group | {"params": [p for p in group["params"] if not is_matrix(p)]}
            for group in self.param_groups
        ]
        self.adamw = optim.AdamW(others, fused=True, **shared)
        self.adamw.state = self.state  # one for both, as checkpoints expect
        self.like = like(pairs[0][0], dtype)
        self.owners = Owners([p for p, _ in self.matrices.values()], mesh) if mesh else None

    @torch.no_grad()
    def step(self, closure=None):
        """One update. While a bucket is computed, others travel."""
        arriving, returning = self.send(0), list  # `list` returns an empty one: nothing has come
        for group, mine in zip(self.adamw.param_groups, self.param_groups, strict=True):
            group["lr"] = mine["lr"]
        self.adamw.step()
        for number in range(len(self.owners.buckets) if self.owners else 0):
            wholes = arriving()
            arriving = self.send(number + 1)
            for name, whole in wholes.items():
                wholes[name] = newton_schulz(whole, self.defaults["iterations"])
            self.update(returning())
            returning = self.owners.send_back(number, wholes, self.like)
        self.update(returning())

    def send(self, number):
        """Start to send the directions of a bucket to the owners; see `Owners.send`."""
        if self.owners is None or number == len(self.owners.buckets):
            return dict  # returns an empty one: nothing will come
        names = [name for name, _ in self.owners.buckets[number] if name in self.matrices]
        directions = {name: self.direction(*self.matrices[name]) for name in names}
        return self.owners.send(number, directions, self.like)

    def direction(self, parameter, group):
        """This rank's part of a matrix's momentum, a vector; with `nesterov`, of a step ahead."""
        kept, gradient = self.state[parameter], parameter.grad
        kept["step"] += 1
        average = kept["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        return ahead.flatten().to(self.like)

    def update(self, orthogonal):
        """Change the weights; orthogonal: a list of (name, numbers)."""
        for name, numbers in orthogonal:
            parameter, group = self.matrices[name]
            size = 0.2 * math.sqrt(max(parameter.full_shape))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(numbers.view_as(parameter), alpha=-group["lr"] * size)


def check_arguments(momentum, iterations, dtype):
    """Raise ValueError for what Muon can't do; AdamW checks its own."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum {momentum}: choose 0 or more, and less than 1")
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations {iterations}: choose 1 or more")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype {dtype}: choose one of {', '.join(DTYPES)}")


def like(parameter, dtype):
    """An empty tensor of the dtype in which the iterations run, on the parameter's device."""
    faster = parameter.is_cuda and parameter.dtype == torch.float32
    default = torch.bfloat16 if faster else parameter.dtype
    return parameter.new_empty(0, dtype=DTYPES.get(dtype, default))


def build_optimizer(parameters, args, mesh):
    """The optimizer of `--optimizer`; Muon has to know which ranks hold a matrix between them."""
    if args.optimizer == "muon":
        args.make_optimizer = functools.partial(args.make_optimizer, mesh=mesh)
    return optimizer.build_optimizer(parameters, args)
