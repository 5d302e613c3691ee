"""What the checks of step 4 run on each rank: the layers and the model in parts."""

from same import SMALL, same


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
    """The tp group of all ranks, and an input [2, 6, 12] that is the same on all of them."""
    import torch

    import process_group as pg

    pg.init_processes("cpu")
    world = torch.distributed.get_world_size()
    x = torch.linspace(0, 3, 144).double().view(2, 6, 12).cos().requires_grad_()
    return pg.Mesh(tp=world).group("tp"), x


def mine(x, group):
    """This rank's tokens of x under sequence parallelism."""
    from tensor_parallel import cut

    return cut(x, group).chunk(group.size)[group.rank]


def check_dtypes(layer, x):
    """A layer of float64 weights computes in bfloat16 where its input is bfloat16."""
    import torch

    y = layer(x.detach().bfloat16())
    assert y.dtype == torch.bfloat16, f"x is bfloat16, y is {y.dtype}: cast the weight to x.dtype"
    layer.weight.grad = None
    y.sum().backward()
    found = layer.weight.grad.dtype
    assert found == torch.float64, f"the weight is float64, its gradient is {found}"


# --- 1. the sum at the end of a block -------------------------------------------------------------


def a_part_of_a_weight(dim):
    """What this rank holds along a dim of a weight [7, 6], a list of indices."""
    import torch

    from tensor_parallel import part

    group, _ = setting()
    whole, call = weight_of(7, 6), f"part(weight, {dim}, group)"
    own = part(whole, dim, group)
    assert isinstance(own, torch.nn.Parameter), f"{call} should be an nn.Parameter"
    held = getattr(own, "held", None)
    assert isinstance(held, tuple) and len(held) == 2, f"held is {held}; it should be 2 slices"
    same(own, whole[held], call, f"weight[held], and held is {held}")
    tags = getattr(own, "global_name", None), getattr(own, "full_shape", None)
    assert tags == ("weight", (7, 6)), f"global_name and full_shape should stay, not be {tags}"
    assert own.shape[1 - dim] == whole.shape[1 - dim], f"{call} cuts dim {1 - dim}: {held}"
    return list(range(7)[held[dim]])


def sum_over_its_input():
    """A sum written over numbers that autograd keeps must not give a wrong gradient silently."""
    import torch

    import tensor_parallel

    group, _ = setting()
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    share = weight.exp()  # its backward uses what it gave
    y = tensor_parallel.AllReduce.apply(share, group)
    try:
        y.sum().backward()
    except RuntimeError as error:
        assert "inplace" in str(error), error
        return
    what = "AllReduce: behind an exp the gradient"
    same(
        weight.grad,
        weight.detach().exp(),
        what,
        "exp(x). Has forward told autograd what it does to x",
    )


def row_parallel(sequence_parallel):
    from tensor_parallel import RowParallelLinear

    group, x = setting()
    whole = linear_of(5, 12)
    whole(x).square().sum().backward()
    expected, x.grad = x.grad, None
    layer = RowParallelLinear(linear_of(5, 12), group, sequence_parallel)
    columns = layer.weight.held[1]
    found = f"RowParallelLinear's part of a weight [5, 12] is {list(layer.weight.shape)}"
    assert layer.weight.shape == (5, 12 // group.size), f"{found}; it should be some columns"
    y, due = layer(x[..., columns]), whole(x)
    tokens = "of all tokens"
    if sequence_parallel:
        due, tokens = mine(due, group), "of this rank's tokens only"
    same(y, due, "the output of RowParallelLinear", f"the sum of the ranks' shares, {tokens}")
    y.square().sum().backward()
    what, hint = "the gradient of RowParallelLinear's", "complete without a sum in AllReduce's"
    if sequence_parallel:
        hint = "that of all tokens, gathered in ReduceScatter's"
    same(x.grad[..., columns], expected[..., columns], f"{what} input", f"{hint} backward")
    same(layer.weight.grad, whole.weight.grad[:, columns], f"{what} weight", f"{hint} backward")
    check_dtypes(layer, x[..., columns])


# --- 2. one sum for q, k and v --------------------------------------------------------------------


def remainder(group):
    """7 on 3 ranks, 8 on 2: there gloo would die of parts that differ, and say nothing."""
    return 7 if group.size == 3 else 8


def column_parallel(sequence_parallel):
    """The collectives that two layers with one x send backward, {kind: calls}."""
    from ledger import recorded
    from tensor_parallel import ColumnParallelLinear, project

    group, x = setting()
    features = 4, remainder(group)
    wholes = [linear_of(n, 12) for n in features]
    sum(whole(x).square().sum() for whole in wholes).backward()
    layers = [ColumnParallelLinear(linear_of(n, 12), group, sequence_parallel) for n in features]
    for layer, whole in zip(layers, wholes, strict=True):
        found = f"ColumnParallelLinear's part of [{len(whole.weight)}, 12] is "
        assert layer.weight.shape[1] == 12, f"{found}{list(layer.weight.shape)}; cut rows"
    part, due = x.detach(), x.grad
    if sequence_parallel:
        part, due = mine(part, group), mine(due, group)
    part.requires_grad_()
    outputs = project(part, *layers)
    meant = "this rank's features, of all tokens"
    if sequence_parallel:
        meant += ", as ColumnParallel.forward gathers them in an `if` block of its own"
    for y, layer, whole in zip(outputs, layers, wholes, strict=True):
        rows = layer.weight.held[0]
        same(y, whole(x)[..., rows], "an output of project", meant)
        same(layer(part), y, "ColumnParallelLinear(x)", "project's only output")
    with recorded() as traffic:
        sum(y.square().sum() for y in outputs).backward()
    meaning = "the sum over all layers and ranks, waited for before ColumnParallel.backward ends"
    same(part.grad, due, "the gradient of project's input", meaning)
    for layer, whole in zip(layers, wholes, strict=True):
        rows = layer.weight.held[0]
        what = "ColumnParallel.backward: the gradient of a weight"
        meaning = "that of its rows, complete on this rank: gᵀ x of all tokens, without a sum"
        same(layer.weight.grad, whole.weight.grad[rows], what, meaning)
    check_dtypes(layers[0], part)
    return {kind: calls for (_, kind), (calls, _) in traffic.items()}


def around_the_sum(kind):
    """What backward of two layers with one x does from the start of its sum on, a list."""
    from overlap import events_after

    from tensor_parallel import ColumnParallelLinear, project

    group, x = setting()
    sequence_parallel = kind == "reduce_scatter"
    layers = [ColumnParallelLinear(linear_of(4, 12), group, sequence_parallel) for _ in range(2)]
    x = mine(x, group) if sequence_parallel else x
    loss = sum(y.sum() for y in project(x, *layers))
    return events_after(kind, loss.backward)


# --- 3. the ends of the model ---------------------------------------------------------------------


def embedding(sequence_parallel):
    import torch

    from model import Embedding
    from tensor_parallel import VocabularyParallelEmbedding, local_symbol

    group, _ = setting()
    symbols = remainder(group)
    whole, layer = Embedding(symbols, 12), Embedding(symbols, 12)
    whole.weight, layer.weight = weight_of(symbols, 12), weight_of(symbols, 12)
    layer = VocabularyParallelEmbedding(layer, group, sequence_parallel)
    held, every = layer.weight.held[0], torch.arange(symbols)
    row, here = local_symbol(every, held)
    due = [symbol in range(symbols)[held] for symbol in range(symbols)]
    call = f"local_symbol(symbols, {held}): of the symbols 0 to {symbols - 1} it says"
    assert here.tolist() == due, f"{call} {here.tolist()} to which are here, and not {due}"
    rows = [symbol - held.start if due[symbol] else 0 for symbol in range(symbols)]
    assert row.tolist() == rows, f"{call} that their rows here are {row.tolist()}, and not {rows}"
    tokens = torch.tensor([[0, 6, 3, 2, 6, 1], [5, 1, 4, 3, 0, 0]])
    x, due = layer(tokens), whole(tokens)
    due.square().sum().backward()
    due = mine(due, group) if sequence_parallel else due
    hint = "the row of each token, from the one rank that has it, and zeros from the others"
    same(x, due, "the output of VocabularyParallelEmbedding", hint)
    x.square().sum().backward()
    rows = layer.weight.held[0]
    what, hint = "the gradient of the embedding's rows", "that of the tokens that this rank has"
    same(layer.weight.grad, whole.weight.grad[rows], what, hint)


def loss_of_parts():
    """The collectives of the loss forward and backward, and the numbers that they carry."""
    import torch

    from ledger import recorded
    from model import cross_entropy as whole_loss
    from tensor_parallel import cross_entropy, part

    group, x = setting()
    symbols = part(weight_of(remainder(group), 12), 0, group).held[0]
    logits = (9 * x[..., : remainder(group)]).detach() + 1000  # exp(1000) is no number
    logits.requires_grad_()
    targets = torch.tensor([[0, 6, 3, 2, 6, 1], [5, 1, 4, 3, 0, 0]])
    whole_loss(logits, targets).backward()
    expected, logits.grad = logits.grad, None
    with recorded() as forward:
        loss = cross_entropy(logits[..., symbols], targets, symbols, group)
    same(loss, whole_loss(logits, targets), "cross_entropy", "the summed loss over all symbols")
    with recorded() as backward:
        (3 * loss).backward()
    meaning = "3 (softmax over all symbols - 1 at the target), 3 being the gradient of the loss"
    due = 3 * expected[..., symbols]
    what = "the gradient of the logits (SumOfLosses.backward)"
    same(logits.grad[..., symbols], due, what, meaning)
    rounded = cross_entropy(logits[..., symbols].bfloat16(), targets, symbols, group)
    assert rounded.dtype == torch.float32, f"of bfloat16 logits the loss is {rounded.dtype}"
    return forward, backward


# --- 4. sequence parallelism ----------------------------------------------------------------------


def norm():
    import torch

    from model import RMSNorm
    from tensor_parallel import SequenceParallelNorm, cut, joined

    group, x = setting()
    parts = cut(x, group)
    shape = [2 * group.size, 6 // group.size, 12]
    assert [*parts.shape] == shape, f"cut(x) of [2, 6, 12] has the shape {[*parts.shape]}, {shape}"
    same(joined(parts, group), x, "joined(cut(x))", "x")
    whole, own = RMSNorm(12, 1e-5), RMSNorm(12, 1e-5)
    for module in (whole, own):
        module.weight = torch.nn.Parameter(torch.linspace(1, 2, 12).double())
    due = whole(x)
    due.square().sum().backward()
    layer = SequenceParallelNorm(own, group, True)
    y = layer(mine(x, group).detach())
    same(y, mine(due, group), "SequenceParallelNorm", "the norm of this rank's tokens")
    y.square().sum().backward()
    hint = "the sum over the tokens of all ranks (SumGradient's backward)"
    same(own.weight.grad, whole.weight.grad, "the gradient of a norm's weight", hint)


# --- 5. the whole model ---------------------------------------------------------------------------


def model_in_parts(flags):
    """Of each weight of a small model on this rank {name: (full shape, shape, counted)}."""
    import torch

    import process_group as pg
    import train
    from tensor_parallel import apply_tensor_parallel

    args = train.parse_args((SMALL + flags).split())
    pg.init_processes("cpu")
    with torch.device("meta"):
        model = train.Llama(args.config, torch.float64)
    apply_tensor_parallel(model, pg.Mesh(tp=2).group("tp"), args.sequence_parallel)
    if args.config.tie_word_embeddings:
        assert model.lm_head.weight is model.model.embed_tokens.weight, (
            "the head and the embedding of a tied model should still be one weight"
        )
    assert all(p.is_meta for p in model.parameters()), "the weights should stay on meta"
    return {p.global_name: (p.full_shape, p.shape, p.counted) for p in model.parameters()}


def norm_of_parts():
    import torch

    from optimizer import gradient_norm

    group, _ = setting()
    gradients = torch.tensor([3.0 + group.rank, 12.0], dtype=torch.float64)
    parameters = []
    for name, gradient in zip(("cut", "whole"), gradients, strict=True):
        parameter = torch.nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
        parameter.global_name, parameter.grad = name, gradient.view(1, 1)
        parameter.counted = name == "cut" or group.is_first
        parameters.append(parameter)
    found = gradient_norm(parameters, ["cut", "whole"], group)
    meaning = "√(3² + 4² + 12²) = 13 for 3 and 4 on one rank each, and 12 on both but counted once"
    same(found, torch.tensor(13.0), f"gradient_norm, {found.item():.4f},", meaning)


def memory_of_weights():
    """Of a run before its first step: a weight's memory is that of its part."""
    from workers_setup import build

    for weight in build(SMALL + "--tp_size 2").parameters:
        size = weight.untyped_storage().nbytes() // weight.element_size()
        assert size == weight.numel(), (
            f"train.setup: {weight.global_name} has {weight.numel()} numbers here, and takes the "
            f"memory of {size}. apply_tensor_parallel comes before materialize: cut on meta, where "
            "nothing takes memory, then draw"
        )
