"""Whole matrices of which each rank holds a part: who owns which, and how the parts travel.

An owner gets all parts of a matrix, computes with the whole, and gives each rank its part of the
result. The owners are chosen so that all ranks have equally much to compute.
"""

import itertools
import math
from typing import NamedTuple

import torch

import process_group as pg
from data_parallel import cut_by_size
from resharding import merged, tensors_of


class Matrix(NamedTuple):
    """A whole matrix: its name and its (rows, columns)."""

    name: str
    shape: tuple

    @property
    def nbytes(self):
        return 4 * math.prod(self.shape)

    @property
    def cost(self):
        """Multiplications of an iteration of `newton_schulz`."""
        short, long = sorted(self.shape)
        return short * short * (2 * long + short)


class Route(NamedTuple):
    """The way of a part of a matrix from one rank to another, by their places in the group."""

    name: str
    part: tuple  # rectangles, one after the other; of each the (start, stop) of rows and columns
    source: int
    target: int

    def blocks(self, matrix):
        """Views of the whole matrix, one for each rectangle."""
        return [matrix[tuple(slice(*ends) for ends in place)] for place in self.part]

    def read(self, matrix):
        """The numbers of the part, a new vector."""
        return torch.cat([block.flatten() for block in self.blocks(matrix)])

    def write(self, matrix, numbers):
        blocks = self.blocks(matrix)
        for block, own in zip(blocks, numbers.split([b.numel() for b in blocks]), strict=True):
            block.copy_(own.view_as(block))


def count(part):
    """How many numbers a part has."""
    return sum(math.prod(stop - start for start, stop in place) for place in part)


class Owners:
    """The matrices of a pipeline stage, dealt to the ranks that hold them between them.

    buckets: lists of matrices whose parts travel together. of: {name: place of the owner}. routes:
    for each bucket (routes to the owners, routes back), those that begin or end here.
    """

    most_bytes = 2**28  # of a bucket's whole matrices, in float32

    def __init__(self, parameters, mesh):
        """parameters: what this rank holds of the matrices, with the tags of that."""
        self.group, self.tp = mesh.group("dp", "cp", "tp"), mesh.sizes["tp"]
        shapes = {p.global_name: tuple(p.full_shape) for p in parameters}
        parts = {name: tuple(places) for name, places in tensors_of(parameters).items()}
        said = pg.from_all(self.group, lambda: (shapes, parts))
        self.shapes = dict(sorted(merged(shapes for shapes, _ in said).items()))
        self.held = [parts for _, parts in said]  # by place in the group, {name: part}
        self.buckets = cut_by_size([Matrix(*item) for item in self.shapes.items()], self.most_bytes)
        self.of, self.loads = {}, [0] * self.group.size
        for bucket in self.buckets:
            self.deal(bucket)
        self.routes = [tuple(map(self.own, self.plan(bucket))) for bucket in self.buckets]

    def deal(self, bucket):
        """Choose an owner for each matrix, the costliest first.

        A rank has room for it if that does not make its work more than an equal share. Of those
        with room, the owner is the rank that holds the most of the matrix: this part need not
        travel. If no rank has room, the owner is the one with the least work.
        """
        ranks = range(self.group.size)
        share = (sum(self.loads) + sum(matrix.cost for matrix in bucket)) / len(ranks)
        for matrix in sorted(bucket, key=lambda matrix: -matrix.cost):
            here = [count(parts.get(matrix.name, ())) for parts in self.held]
            room = [rank for rank in ranks if self.loads[rank] + matrix.cost <= share]
            room = room or [min(ranks, key=self.loads.__getitem__)]
            owner = max(room, key=lambda rank: (here[rank], -self.loads[rank]))
            self.loads[owner] += matrix.cost
            self.of[matrix.name] = owner

    def plan(self, bucket):
        """Lists of the routes of a bucket: to the owners, and back to all that hold a part."""
        there, back = [], []
        for name, shape in bucket:
            there += self.to_owner(name, shape, self.of[name])
            for rank, parts in enumerate(self.held):
                if name in parts:
                    back.append(Route(name, parts[name], self.of[name], rank))
        return there, back

    def to_owner(self, name, shape, owner):
        """A route for each part of a matrix; of the ranks that hold it, from the nearest one.

        That is the owner itself, or one of its tp group, which sits on the closest devices.
        """

        def distance(rank):
            return rank != owner, rank // self.tp != owner // self.tp, rank

        nearest = {}
        for rank in sorted(range(self.group.size), key=distance):
            if name in self.held[rank]:
                nearest.setdefault(self.held[rank][name], rank)
        found, whole = sum(map(count, nearest)), math.prod(shape)
        assert found == whole, f"{name}: its parts have {found} numbers of {whole}"
        return [Route(name, part, rank, owner) for part, rank in nearest.items()]

    def own(self, routes):
        """Those that begin or end on this rank."""
        return [x for x in routes if self.group.rank in (x.source, x.target)]

    def send(self, number, vectors, like):
        """Start to send this rank's parts of a bucket to their owners; vectors: {name: numbers}.

        Returns a function that waits, and gives {name: whole matrix} of those that are owned here.
        """
        arrived = self.travel(self.routes[number][0], lambda route: vectors[route.name], like)

        def wholes():
            found = {}
            for route, numbers in arrived():
                if route.name not in found:
                    found[route.name] = like.new_empty(self.shapes[route.name])
                route.write(found[route.name], numbers)
            return found

        return wholes

    def send_back(self, number, wholes, like):
        """Start to send each rank its parts of a bucket's matrices; wholes: those owned here.

        Returns a function that waits, and gives a list of (name, numbers).
        """
        arrived = self.travel(
            self.routes[number][1], lambda route: route.read(wholes[route.name]), like
        )
        return lambda: [(route.name, numbers) for route, numbers in arrived()]

    def travel(self, routes, numbers_of, like):
        """Start to send parts along routes, one message for each pair of ranks.

        numbers_of: function from a route that begins here to the numbers of its part, a vector of
        the dtype and device of `like`. Returns a function that waits for those that end here, and
        gives a list of (route, numbers).
        """
        me, leaving, arriving = self.group.rank, {}, {}
        for route in routes:
            if route.source == me:
                leaving.setdefault(route.target, []).append(numbers_of(route))
            if route.target == me:
                arriving.setdefault(route.source, []).append(route)
        sizes = {rank: [count(route.part) for route in found] for rank, found in arriving.items()}
        sent = {rank: torch.cat(found) for rank, found in leaving.items()}
        received = {r: sent[r] if r == me else like.new_empty(sum(sizes[r])) for r in arriving}
        others = [(rank, peer) for rank, peer in enumerate(self.group.ranks) if rank != me]
        send = [(sent[rank], peer) for rank, peer in others if rank in sent]
        receive = [(received[rank], peer) for rank, peer in others if rank in received]
        handles = pg.exchange(self.group, send, receive)

        def arrived():
            for handle in handles:
                handle.wait()
            send.clear()  # until here they had to stay
            pairs = [zip(arriving[r], received[r].split(sizes[r]), strict=True) for r in arriving]
            return list(itertools.chain.from_iterable(pairs))

        return arrived
