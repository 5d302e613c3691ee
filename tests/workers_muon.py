"""What the tests of Muon run on ranks."""

from unittest.mock import patch

from workers_setup import build


def made_orthogonal(argv):
    """({name: shape} of what this rank makes orthogonal in a step, names of all of its stage)."""
    import muon
    import train

    state = build(argv)
    owners, seen = state.optimizer.owners, []

    def counted(matrix, iterations, original=muon.newton_schulz):
        seen.append(tuple(matrix.shape))
        return original(matrix, iterations)

    with patch.object(muon, "newton_schulz", counted):
        train.train_step(state)
    mine = {n: owners.shapes[n] for n, owner in owners.of.items() if owner == owners.group.rank}
    assert sorted(seen) == sorted(mine.values())
    return mine, list(owners.shapes)


def traffic_of_muon(argv):
    """Bytes that this rank sends in the optimizer's step."""
    import ledger
    import train

    state = build(argv)
    train.forward_backward(state)
    with ledger.recorded() as counted:
        state.optimizer.step()
    return sum(size for _, size in counted.values())


def beside_torch(rows, columns, steps=3):
    """A matrix after some updates by our Muon, and by PyTorch's, which iterates in bfloat16."""
    import torch

    import process_group as pg
    from muon import Muon

    pg.init_processes("cpu")
    torch.manual_seed(1)
    start, gradients = torch.randn(rows, columns), torch.randn(steps, rows, columns)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    tags = {"global_name": "model.layers.0.x.weight", "full_shape": ours.shape}
    ours.__dict__.update(tags, held=tuple(slice(0, size) for size in ours.shape))
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    one = Muon([ours], dtype="bfloat16", mesh=pg.Mesh(), **options)
    other = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
    return ours.detach(), theirs.detach()


def slope(rows, columns, rank, size):
    """How often larger a change of a matrix is after five iterations.

    rank: that of the matrix. size: the norm of the change; that of the matrix is 1.
    """
    import torch

    from muon import newton_schulz

    torch.manual_seed(0)
    left, right = (torch.randn(n, rank, dtype=torch.float64) for n in (rows, columns))
    matrix, change = left @ right.T, torch.randn(rows, columns, dtype=torch.float64)
    matrix, change = matrix / matrix.norm(), size * change / change.norm()
    return ((newton_schulz(matrix + change) - newton_schulz(matrix)).norm() / size).item()


def singular_values(rows, columns, low):
    """(least, largest) after five iterations of values from `low` to 1; norm off the diagonal."""
    import torch

    from muon import newton_schulz

    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(low, 1, len(v), dtype=torch.float64)
    found = newton_schulz(u * values @ v)
    inside = u.T @ found @ v.T  # diagonal if the singular vectors are the same
    return inside.diag().min().item(), inside.diag().max().item(), inside.fill_diagonal_(0).norm()


def made_of_rounding(rows, columns, size):
    """The norm of what five iterations make of a matrix that has so small a norm."""
    import torch

    from muon import newton_schulz

    torch.manual_seed(0)
    matrix = torch.randn(rows, columns, dtype=torch.float64)
    return newton_schulz(size * matrix / matrix.norm()).norm().item()
