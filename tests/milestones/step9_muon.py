"""What the checks of step 9's milestones about Muon run on ranks."""

from collections import Counter

from same import same
from step9_models import tiny
from step9_runs import world_group

SHAPES = {"model.layers.0.a": (8, 12), "model.layers.0.b": (12, 8), "model.layers.1.a": (8, 12)}


def matrix(rows, columns, seed=0):
    import torch

    torch.manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64)


# --- 16. nearly orthogonal ------------------------------------------------------------------------


def orthogonal():
    import torch

    from muon import newton_schulz

    for rows, columns in ((6, 10), (10, 6), (8, 8)):
        u, _, v = torch.linalg.svd(matrix(rows, columns), full_matrices=False)
        values = torch.linspace(0.05, 1, len(v), dtype=torch.float64)
        what = f"newton_schulz of [{rows}, {columns}]"
        found = newton_schulz(7 * u * values @ v)
        assert found.shape == (rows, columns), f"{what} has the shape {list(found.shape)}"
        for iterations in (1, 5):
            due = values / values.norm()
            for _ in range(iterations):
                due = 3.4445 * due - 4.7750 * due**3 + 2.0315 * due**5
            found = newton_schulz(7 * u * values @ v, iterations)
            meaning = "those of the matrix over its norm, put through the polynomial as often"
            found, name = (u.T @ found @ v.T).diag(), f"{what}, {iterations} iterations"
            same(found, due, f"{name}: the singular values", meaning)
        assert 0.68 < due.min() and due.max() < 1.14
    zero = newton_schulz(torch.zeros(4, 6, dtype=torch.float64))
    assert not zero.any(), "newton_schulz of zeros should be zeros: divide by 1e-7 at least"


def whose():
    from muon import is_matrix

    found = {name.split(".")[-2] for name, p in tiny().named_parameters() if is_matrix(p)}
    due = {*"qkvo"} | {"gate", "up", "down"}
    due = {f"{name}_proj" for name in due}
    assert found == due, f"is_matrix is true of {sorted(found)}; it should be of {sorted(due)}"


# --- 17. owners -----------------------------------------------------------------------------------


def parts(layout):
    """This rank's parameters of SHAPES, its rows of each, or a stretch of each (zero)."""
    import torch

    import process_group as pg

    size = world_group().size
    mesh = pg.Mesh(tp=size) if layout == "rows" else pg.Mesh(dp=size)
    found = []
    for name, (rows, columns) in SHAPES.items():
        start, stop = mesh.rank * rows // size, (mesh.rank + 1) * rows // size
        whole = matrix(rows, columns, len(found))
        tags = {"global_name": name, "full_shape": torch.Size((rows, columns))}
        held = slice(0, rows), slice(0, columns)
        if layout == "rows":
            held, own = (slice(start, stop), held[1]), whole[start:stop].clone()
        elif layout == "stretches":
            ends = [0, *(rows * columns * at // size + 5 for at in range(1, size)), rows * columns]
            tags["piece"] = slice(ends[mesh.rank], ends[mesh.rank + 1])
            own = whole.flatten()[tags["piece"]].clone()
        else:
            own = whole
        parameter = torch.nn.Parameter(own)
        parameter.__dict__.update(tags, held=held)
        found.append(parameter)
    return mesh, found


def owned(layout):
    """Every owner gets its whole matrices, and every rank gets back the parts that it has."""
    import torch

    from owners import Owners

    mesh, own = parts(layout)
    owners = Owners(own, mesh)
    case = f"{mesh.rank} of {owners.group.size} ranks that hold {layout}"
    assert owners.of.keys() == SHAPES.keys(), f"deal: {case}: owners of {sorted(owners.of)}"
    most = max(Counter(owners.of.values()).values())
    assert most == -(-3 // owners.group.size), f"deal: {case}: one rank owns {most} of 3 matrices"
    like = torch.empty(0, dtype=torch.float64)
    vectors = {p.global_name: p.detach().flatten() for p in own}
    wholes = owners.send(0, vectors, like)()
    mine = {name for name, rank in owners.of.items() if rank == owners.group.rank}
    assert wholes.keys() == mine, f"send: {case}: gets {sorted(wholes)}; it owns {sorted(mine)}"
    for number, (name, shape) in enumerate(SHAPES.items()):
        if name in mine:
            same(wholes[name], matrix(*shape, number), f"send: {case}: {name}", "the whole matrix")
            wholes[name] = -wholes[name]
    back = dict(owners.send_back(0, wholes, like)())
    assert back.keys() == SHAPES.keys(), f"send_back: {case}: gets {sorted(back)}"
    for name, vector in vectors.items():
        what = f"send_back: {case}: the part of {name}"
        same(back[name], -vector, what, "what this rank holds of the owner's matrix")


# --- 18. the optimizer ----------------------------------------------------------------------------


def updated():
    """Two updates of one matrix and of one vector, beside what they should be."""
    import torch

    import process_group as pg
    from muon import Muon, newton_schulz

    world_group()
    mesh = pg.Mesh()
    weight, vector = torch.nn.Parameter(matrix(6, 10, 1)), torch.nn.Parameter(matrix(1, 5, 2)[0])
    alone = torch.nn.Parameter(vector.detach().clone())
    held = tuple(slice(0, size) for size in weight.shape)
    weight.__dict__.update(
        global_name="model.layers.0.a.weight", full_shape=weight.shape, held=held
    )
    vector.__dict__.update(global_name="model.norm.weight", full_shape=vector.shape)
    for nesterov in (False, True):
        groups = [
            {"params": [weight], "weight_decay": 0.3},
            {"params": [vector], "weight_decay": 0.0},
        ]
        optimizer = Muon(groups, lr=0.5, momentum=0.8, nesterov=nesterov, mesh=mesh)
        adamw = torch.optim.AdamW([alone], lr=0.5, weight_decay=0, betas=(0.9, 0.95))
        average, due = torch.zeros(6, 10, dtype=torch.float64), weight.detach().clone()
        for seed in (3, 4):
            weight.grad, vector.grad = matrix(6, 10, seed), matrix(1, 5, seed)[0]
            alone.grad = vector.grad.clone()
            average = 0.8 * average + 0.2 * weight.grad
            ahead = 0.2 * weight.grad + 0.8 * average if nesterov else average
            due = (1 - 0.25 * 0.3) * due - 0.25 * 0.2 * 10**0.5 * newton_schulz(ahead)
            for group in (*optimizer.param_groups, *adamw.param_groups):
                group["lr"] = 0.25
            optimizer.step()
            adamw.step()
        meaning = "(1 - lr decay) w - lr 0.2 sqrt(longer side) newton_schulz(momentum)"
        what = f"Muon with nesterov {nesterov}: a matrix after two updates"
        same(weight.detach(), due, what, meaning)
        what = "Muon: a vector after two updates"
        same(vector.detach(), alone.detach(), what, "that of AdamW at the rate of the group")
        kept = optimizer.state[weight]
        same(kept["momentum_buffer"], average, "Muon: momentum_buffer", "0.8 m + 0.2 gradient")
        steps = {optimizer.state[p]["step"].item() for p in (weight, vector)}
        assert steps == {2}, f"Muon: `step` of matrix and vector are {steps} after two updates"
