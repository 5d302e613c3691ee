"""The milestones of step 4: each piece of tensor parallelism on two ranks, beside the whole."""

import pytest
from same import same, same_step

pytestmark = pytest.mark.usefixtures("worlds")


def weight_of(*shape):
    """A parameter with the tags of a model's, and numbers that differ everywhere."""
    import torch
    from torch import nn

    weight = nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).double().view(shape).sin())
    weight.global_name, weight.full_shape = "weight", weight.shape
    weight.held = tuple(slice(0, size) for size in shape)
    return weight


def linear_of(*shape):
    from model import Linear

    linear = Linear(shape[1], shape[0])
    linear.weight = weight_of(*shape)
    return linear


def setting():
    """The tp group of all ranks, and an input [2, 4, 6] that is the same on all of them."""
    import torch

    import process_group as pg

    pg.init_processes("cpu")
    world = torch.distributed.get_world_size()
    x = torch.linspace(0, 3, 48).double().view(2, 4, 6).cos().requires_grad_()
    return pg.Mesh(tp=world).group("tp"), x


# --- 1. the sum at the end of a block -------------------------------------------------------------


def a_part_of_a_weight():
    import torch

    from tensor_parallel import part

    group, _ = setting()
    for dim in (0, 1):
        whole = weight_of(7, 6)
        share = part(whole, dim, group)
        assert isinstance(share, torch.nn.Parameter), "part returns a nn.Parameter"
        same(share, whole[share.held], f"the part along dim {dim}", "whole[held]")
        assert share.global_name == "weight" and share.full_shape == (7, 6), "the tags are kept"
    return [(s.start, s.stop) for s in share.held]


@pytest.mark.milestone(4, 1)
def test_a_slice_of_a_weight(step_dir, worlds):
    held = worlds(step_dir, 3).run(a_part_of_a_weight)
    assert held == [[(0, 7), (0, 2)], [(0, 7), (2, 4)], [(0, 7), (4, 6)]]


def row_parallel():
    from tensor_parallel import RowParallelLinear

    group, x = setting()
    whole = linear_of(5, 6)
    whole(x).square().sum().backward()
    expected, x.grad = x.grad, None
    layer = RowParallelLinear(linear_of(5, 6), group, False)
    columns = layer.weight.held[1]
    y = layer(x[..., columns])
    same(y, whole(x), "the output of RowParallelLinear", "the sum of the shares of all ranks")
    y.square().sum().backward()
    what = "the gradient of RowParallelLinear's"
    hint = "what the ranks hold already: AllReduce sends nothing backward"
    same(x.grad[..., columns], expected[..., columns], f"{what} input", hint)
    same(layer.weight.grad, whole.weight.grad[:, columns], f"{what} weight", hint)


@pytest.mark.milestone(4, 1)
def test_a_layer_cut_by_input_features(step_dir, worlds):
    worlds(step_dir, 2).run(row_parallel)


# --- 2. one sum for q, k and v --------------------------------------------------------------------


def column_parallel(sequence_parallel):
    from ledger import recorded
    from process_group import all_gather
    from tensor_parallel import ColumnParallelLinear, cut, joined, project

    group, x = setting()
    wholes = [linear_of(4, 6), linear_of(8, 6)]
    sum(whole(x).square().sum() for whole in wholes).backward()
    expected, x.grad = x.grad, None
    layers = [ColumnParallelLinear(w, group, sequence_parallel) for w in map(copy_of, wholes)]
    mine = x
    if sequence_parallel:
        mine = cut(x, group).chunk(group.size)[group.rank].detach().requires_grad_()
    outputs = project(mine, *layers)
    for y, layer, whole in zip(outputs, layers, wholes, strict=True):
        rows = layer.weight.held[0]
        same(y, whole(x)[..., rows], "the output of project", "this rank's features, of all tokens")
    with recorded() as traffic:
        sum(y.square().sum() for y in outputs).backward()
    grad = mine.grad
    if sequence_parallel:
        grad = joined(all_gather(grad, group), group)
    same(grad, expected, "the gradient of project's input", "the sum over ranks and layers")
    for layer, whole in zip(layers, wholes, strict=True):
        due = whole.weight.grad[layer.weight.held[0]]
        same(layer.weight.grad, due, "the gradient of a weight", "that of its rows")
    return {kind: calls for (_, kind), (calls, _) in traffic.items()}


def copy_of(linear):
    return linear_of(*linear.weight.shape)


@pytest.mark.milestone(4, 2)
def test_layers_cut_by_output_features(step_dir, worlds):
    for traffic in worlds(step_dir, 2).run(column_parallel, False):
        found = traffic["all_reduce"]
        assert found == 1, f"{found} all-reduces backward; one is enough: add on each rank first"


# --- 3. the ends of the model ---------------------------------------------------------------------


def ends(sequence_parallel):
    import torch

    from model import Embedding
    from model import cross_entropy as whole_loss
    from process_group import all_gather
    from tensor_parallel import VocabularyParallelEmbedding, cross_entropy, joined

    group, _ = setting()
    whole = Embedding(7, 6)
    whole.weight = weight_of(7, 6)
    layer = VocabularyParallelEmbedding(whole, group, sequence_parallel)
    tokens = torch.tensor([[0, 6, 3, 2], [5, 1, 4, 3]])
    x = layer(tokens)
    if sequence_parallel:
        x = joined(all_gather(x.detach(), group), group)
    same(x, whole(tokens), "the embedding", "rows of the table, each from one rank")
    if sequence_parallel:
        return
    logits = (2 * whole(tokens) @ weight_of(7, 6).T).detach().requires_grad_()
    whole_loss(logits, tokens).backward()
    expected, logits.grad = logits.grad, None
    rows = layer.weight.held[0]
    loss = cross_entropy(logits[..., rows], tokens, rows, group)
    same(loss, whole_loss(logits, tokens), "cross_entropy", "the loss over all symbols")
    loss.backward()
    same(logits.grad[..., rows], expected[..., rows], "its gradient", "softmax minus target")


@pytest.mark.milestone(4, 3)
def test_embedding_and_loss(step_dir, worlds):
    worlds(step_dir, 2).run(ends, False)


# --- 4. sequence parallelism ----------------------------------------------------------------------


def norm():
    import torch

    from model import RMSNorm
    from process_group import all_gather
    from tensor_parallel import SequenceParallelNorm, cut, joined

    group, x = setting()
    parts = cut(x, group)
    same(joined(parts, group), x, "joined(cut(x))", "x")
    whole = RMSNorm(6, 1e-5)
    whole.weight = torch.nn.Parameter(torch.linspace(1, 2, 6).double())
    whole(x).square().sum().backward()
    expected, whole.weight.grad = whole.weight.grad, None
    layer = SequenceParallelNorm(whole, group, True)
    y = layer(parts.chunk(group.size)[group.rank].detach())
    y.square().sum().backward()
    hint = "the sum over the tokens of all ranks: SumGradient's backward"
    same(layer.weight.grad, expected, "the gradient of a norm's weight", hint)
    same(joined(all_gather(y.detach(), group), group), whole(x), "the norm", "that of all tokens")


@pytest.mark.milestone(4, 4)
def test_sequence_parallelism(step_dir, worlds):
    world = worlds(step_dir, 2)
    world.run(norm)
    world.run(ends, True)
    for traffic in world.run(column_parallel, True):
        assert traffic == {"all_gather": 1, "reduce_scatter": 1}, (
            f"backward sends {traffic}; x is gathered once more, and its gradient reduce-scattered"
        )


# --- 5. the whole model ---------------------------------------------------------------------------


@pytest.mark.milestone(4, 5)
@pytest.mark.parametrize("flags", ["--tp_size 2", "--tp_size 2 --sequence_parallel"])
def test_a_step_is_that_of_one_process(step_dir, train_on, flags):
    same_step(step_dir, train_on, 2, flags)
