"""What is kept in memory: by autograd, by one operator, on a GPU."""

import itertools
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # the public way to see every operator
from workers_setup import build


def saved_bytes(argv):
    """Bytes that autograd keeps of one micro-batch's forward pass, weights apart."""
    torch.compiler.reset()  # or what was compiled under other flags is taken
    state = build(argv)
    weights = {p.data_ptr() for p in state.model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    data = getattr(state, "data", None)
    batch = next(data.micro_batches(0)) if data else state.batch
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = state.model(*batch)
    assert loss.requires_grad
    return sum(kept.values())


def bytes_kept_of_a_step(argv):
    """Bytes that autograd keeps of all micro-batches together, with all casts, without weights; and
    how many weights there are in matrices whose rows are all here."""
    import train

    torch.compiler.reset()
    state, kept = build(argv), {}
    own = {p.untyped_storage()._cdata for p in state.model.parameters()}

    def keep(tensor):
        casts = [p.cast for p in state.model.parameters() if hasattr(p, "cast")]
        # Held on to, so that nothing else gets the address of one that is gone.
        kept.update((x.untyped_storage()._cdata, x) for x in (tensor, *casts))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train.forward_backward(state)
    size = sum(x.untyped_storage().nbytes() for storage, x in kept.items() if storage not in own)
    matrices = [p for p in state.model.parameters() if p.dim() > 1 and "embed" not in p.global_name]
    return size, sum(p.numel() for p in matrices if len(p) == p.full_shape[0])


def bytes_kept_to_evaluate(argv, counts):
    """The most that autograd keeps at a time while so many micro-batches are looked at."""
    import time
    import weakref

    import train

    class Kept:
        def __init__(self, x):
            self.x = x.detach()  # x may be what the operator made: a circle, until it is collected
            now[0] += x.nbytes
            most[-1] = max(most[-1], now[0])
            weakref.finalize(self, let_go, x.nbytes)

    def let_go(nbytes):
        now[0] -= nbytes

    def slowly(micro_batches):
        """gloo's thread holds the last message, and so its graph, a moment longer than we do."""
        for one in micro_batches:
            time.sleep(0.05)
            yield one

    state, now, most = build(argv), [0], []
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        for count in counts:
            most.append(0)
            micro_batches = slowly(itertools.islice(state.data.evaluation(), count))
            train.mean_loss(state, micro_batches, 1, backward=False)
    return most


class Largest(TorchDispatchMode):
    """Records the shape of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.shape = torch.Size([0])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self.shape.numel():
                self.shape = leaf.shape
        return out


def largest_tensor(argv):
    """Shape of the largest tensor of a forward and backward pass."""
    state = build(argv)
    batch = next(state.data.micro_batches(0))
    with Largest() as largest:
        state.model(*batch).backward()
    return tuple(largest.shape)


def allocated_bytes(argv):
    """Of this rank's GPU: (allocated after a step, most during it, weights of the model)."""
    import kernel_times

    import process_group
    import train

    first = build(argv)  # allocates what libraries keep for ever, too
    train.train_step(first)
    kernel_times.free(first)
    before = torch.cuda.memory_allocated()
    with patch.object(process_group, "init_processes", lambda device_type: first.device):
        state = build(argv)
    train.train_step(state)
    torch.cuda.reset_peak_memory_stats()
    train.train_step(state)  # now the moments are there, too
    found = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    count = sum(p.full_shape.numel() for p in state.model.parameters())
    return *(size - before for size in found), count


def segments_that_grow():
    """Whether those in which PyTorch has this rank's CUDA memory can."""
    import process_group

    device = process_group.init_processes("cuda")
    kept = torch.zeros(2**24, device=device)
    found = {segment["is_expandable"] for segment in torch.cuda.memory_snapshot()}
    del kept
    return found
