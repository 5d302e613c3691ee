"""Data parallelism: each rank reads other sequences, and the gradients of all ranks are added up.

An engine adds them up. All engines give the same numbers; they differ in when they send, how much
they send, and what a rank keeps. In the two engines of this file every rank keeps everything:

    naive    sums each gradient by itself, after the last backward pass
    bucket   sums many gradients in one message, while the last backward pass goes on

The engines of zero.py deal that out. Ranks along cp read other tokens, too: the group of an engine
is dp x cp. Source: PyTorch DDP (arXiv:2006.15704), section 3.2.
"""

import itertools

import torch
from torch import nn

import process_group as pg


class Naive:
    """Weights, gradients and optimizer state are whole on every rank."""

    axes = ()  # mesh axes along which each rank owns a part of `parameters`: here none

    def __init__(self, model, group):
        self.group = group
        self.parameters = list(model.parameters())
        self.last_backward = False  # whether the coming backward pass is the step's last

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    def on_gradient(self, parameter):
        """What to do when a backward pass has added to a parameter's gradient: here nothing.

        `Bucketed` registers it as a hook.
        """

    def finish_gradients(self):
        """Call after the last backward pass; the gradients of `parameters` are complete then."""
        for parameter in self.parameters:
            pg.all_reduce(parameter.grad, self.group)

    def finish_update(self):
        """Call after the optimizer's step, in which a rank of ZeRO updates only its shard."""


class Bucket:
    """Several parameters, one after the other in a vector that the ranks can share evenly."""

    def __init__(self, parameters, group):
        self.parameters, self.group = parameters, group
        ends = list(itertools.accumulate(p.numel() for p in parameters))
        self.ranges = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        shard = -(-ends[-1] // group.size)  # elements a rank, rounded up
        self.mine = slice(group.rank * shard, (group.rank + 1) * shard)
        self.length = shard * group.size
        self.dtype = parameters[0].dtype
        self.nbytes = self.length * self.dtype.itemsize
        self.missing = len(parameters)  # gradients that the current backward pass has yet to bring

    @torch.no_grad()
    def vector(self, tensors):
        """Tensors shaped like the parameters, one after the other: a new vector [length].

        `to` has work only in zero3 (see zero.py): there gradients may come in bfloat16.
        """
        padding = tensors[0].new_zeros(self.length - self.ranges[-1].stop)
        return torch.cat([*(tensor.flatten() for tensor in tensors), padding]).to(self.dtype)

    def hold(self, weights):
        """Make each parameter a view of a vector [length] that has the weights of all of them.

        Only `.data` changes: the parameter is the same object, so its hooks stay.
        """
        self.weights = weights
        for parameter, view in zip(self.parameters, self.views(weights), strict=True):
            parameter.data = view

    def gradients(self):
        """The parameters' gradients as a vector [length]; a single one is not copied if it fits."""
        found = [parameter.grad for parameter in self.parameters]
        whole = len(found) == 1 and found[0].numel() == self.length
        return found[0].flatten().to(self.dtype) if whole else self.vector(found)

    def views(self, vector):
        """Views of a vector [length]: the place of each parameter, in the parameter's shape."""
        pairs = zip(self.ranges, self.parameters, strict=True)
        return [vector[place].view(parameter.shape) for place, parameter in pairs]

    def pieces(self, weights, gradients):
        """What this rank's shard has of each parameter, as parameters for the optimizer.

        weights, gradients: [length / ranks]. A piece carries the tags of the whole parameter, and
        in `piece` which slice of the flattened one it is: checkpoints (step 9) will ask for it.
        """
        found = []
        for place, parameter in zip(self.ranges, self.parameters, strict=True):
            start, stop = max(place.start, self.mine.start), min(place.stop, self.mine.stop)
            if start < stop:
                in_shard = slice(start - self.mine.start, stop - self.mine.start)
                piece = nn.Parameter(weights[in_shard])
                piece.grad = gradients[in_shard]
                in_parameter = slice(start - place.start, stop - place.start)
                piece.__dict__.update(parameter.__dict__, piece=in_parameter)
                found.append(piece)
        return found

    def arrived(self):
        """Count one more gradient; true for the last one of a backward pass."""
        self.missing -= 1
        if self.missing:
            return False
        self.missing = len(self.parameters)  # for the next one
        return True


def cut_by_size(parameters, most_bytes):
    """Lists of neighbouring parameters of at most so many bytes; a larger parameter is alone."""
    lists, used = [], 0
    for parameter in parameters:
        if not lists or used + parameter.nbytes > most_bytes:
            lists.append([])
            used = 0
        lists[-1].append(parameter)
        used += parameter.nbytes
    return lists


class Bucketed(Naive):
    """Gradients are summed by the bucket, as soon as the last backward pass has completed one."""

    bucket_bytes = 25 * 2**20

    def __init__(self, model, group):
        super().__init__(model, group)
        self.buckets = [Bucket(part, group) for part in self.cut(model)]
        self.bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self.running = []  # what is under way: (bucket, sent, received, handle)
        for parameter in self.bucket_of:
            parameter.register_post_accumulate_grad_hook(self.on_gradient)

    def cut(self, model):
        """Lists of parameters, one a bucket; those of the layers in the order of backward.

        model: only the `cut` of zero3 needs it.

        Each parameter outside of the layers has a bucket of its own. Why does the last norm not
        share one with the head? tp (step 4) may cut the head unevenly, say into 128 and 129 rows.
        After these rows the norm would begin at another index on each tp rank. In a ring the index
        of a number decides in which order the ranks add it up (step 2), and each order rounds
        differently. The copies of the norm on the tp ranks must stay equal, and would drift apart.
        """
        inside = [p for p in self.parameters[::-1] if ".layers." in p.global_name]
        outside = [[p] for p in self.parameters if ".layers." not in p.global_name]
        return cut_by_size(inside, self.bucket_bytes) + outside

    def on_gradient(self, parameter):
        bucket = self.bucket_of[parameter]
        if bucket.arrived() and self.last_backward:
            self.running.append((bucket, *self.reduce(bucket)))

    def reduce(self, bucket):
        """Start to sum a bucket's gradients; returns (what is sent, what is received, handle).

        An all-reduce receives into what it sends. The reduce-scatter of ZeRO receives into another
        tensor.
        """
        vector = bucket.gradients()
        for parameter, view in zip(bucket.parameters, bucket.views(vector), strict=True):
            parameter.grad = view
        return vector, vector, pg.all_reduce(vector, self.group, async_op=True)

    def finish_gradients(self):
        while self.running:
            self.finish_oldest()

    def finish_oldest(self):
        bucket, _, received, handle = self.running.pop(0)
        handle.wait()
        self.reduced(bucket, received)

    def reduced(self, bucket, received):
        """Take the sum that has arrived; here the gradients are already views of it."""
