"""Mistakes of tensor parallelism."""

import os


def no_sum_forward(train):
    """Row-parallel layers keep their share of the sum."""
    from tensor_parallel import AllReduce

    AllReduce.forward = staticmethod(lambda ctx, x, group: x.view_as(x))


def no_sum_backward(train):
    """Column-parallel layers keep their share of the gradient for x."""
    import process_group as pg

    all_reduce = pg.all_reduce

    def deaf(x, group, op=pg.ReduceOp.SUM, async_op=False):
        return pg.Done() if async_op else all_reduce(x, group, op)

    pg.all_reduce = deaf


def first_slice_everywhere(train):
    """Every rank loads the slice of the first one, whatever its own is."""
    materialize = train.materialize

    def spoiled(model, seed, device, dtype):
        held = {p: p.held for p in model.parameters()}
        for parameter, slices in held.items():
            parameter.held = tuple(slice(0, s.stop - s.start) for s in slices)
        materialize(model, seed, device, dtype)
        for parameter, slices in zip(model.parameters(), held.values(), strict=True):
            parameter.held = slices

    train.materialize = spoiled


def weights_drawn_by_each_rank(train):
    """Each rank draws its own part of a weight: no longer the single device's weights."""
    import model

    initial_value = model.initial_value

    def drawn(name, shape, seed, std):
        return initial_value(name, shape, seed + int(os.environ["RANK"]), std)

    model.initial_value = drawn


def norm_gradients_of_own_tokens(train):
    """Sequence parallelism without the sum of the norms' gradients."""
    from tensor_parallel import SumGradient

    SumGradient.backward = staticmethod(lambda ctx, grad: (grad, None))


def replicas_counted_twice(train):
    """The gradient norm adds what all tensor-parallel ranks hold, copies included."""
    apply = train.apply_tensor_parallel

    def spoiled(model, *rest):
        apply(model, *rest)
        for parameter in model.parameters():
            parameter.counted = True

    train.apply_tensor_parallel = spoiled


def symbols_of_others_found_here(train):
    """An embedding that does not leave the symbols of other ranks out."""
    import tensor_parallel

    local_symbol = tensor_parallel.local_symbol

    def everything_here(symbols, held):
        column, here = local_symbol(symbols, held)
        return column, here | True

    tensor_parallel.local_symbol = everything_here
