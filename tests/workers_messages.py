"""What a step sends, and in which order it sends and computes."""

from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode  # the public way to see every operator
from workers_setup import build


def ledger_of(argv):
    """What a training step sent and what the formulas say, {(axis, collective): (calls, bytes)}."""
    import ledger
    import train

    state = build(argv)
    with ledger.recorded() as counted:
        train.train_step(state)
    predicted = {}
    for axis, collective, calls, size in train.predicted_traffic(state):
        so_far = predicted.get((axis, collective), (0, 0))
        predicted[axis, collective] = so_far[0] + calls, so_far[1] + calls * size
    return {key: tuple(entry) for key, entry in counted.items()}, predicted


def calls_each_way(argv):
    """{(axis, collective): calls} of one micro-batch, forward and backward."""
    import ledger

    state = build(argv)
    batch = next(state.data.micro_batches(0))
    with ledger.recorded() as forward:
        loss = state.model(*batch)
    with ledger.recorded() as backward:
        loss.backward()
    return [{key: calls for key, (calls, _) in way.items()} for way in (forward, backward)]


class Products(TorchDispatchMode):
    """Appends to a list the name of each matrix product and attention kernel."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "attention" in name:
            self.events.append("block")
        elif ".mm." in name or ".bmm." in name or ".addmm." in name:
            self.events.append("product")
        return function(*args, **(kwargs or {}))


def order_of_events(argv, backward=True):
    """Products, attention blocks, collectives begun without waiting, and waits, in order."""
    import process_group as pg
    import train

    state = build(argv)
    events = []

    class Handle:
        def __init__(self, name, handle):
            self.name, self.handle = name, handle

        def wait(self):
            events.append(f"{self.name} is waited for")
            self.handle.wait()

    def watch(name):
        real = getattr(pg, name)

        def watched(*args, **options):
            result = real(*args, **options)
            if name == "exchange":
                events.append("exchange begins")
                return [Handle(name, handle) for handle in result]
            if not options.get("async_op"):
                return result
            events.append(f"{name} begins")
            if isinstance(result, tuple):
                return result[0], Handle(name, result[1])
            return Handle(name, result)

        return patch.object(pg, name, watched)

    with watch("all_reduce"), watch("all_gather"), watch("reduce_scatter"), watch("exchange"):
        with Products(events):
            if backward:
                train.forward_backward(state)
            else:
                state.model(*next(state.data.micro_batches(0)))
    return events
