"""Mistakes of Muon: of whole matrices, and of what travels to their owners and back."""


def parts_orthogonalised(train):
    """Each rank makes its own part orthogonal, as if that were the matrix."""
    import torch

    from muon import Muon, newton_schulz

    def step(self):
        self.adamw.step()
        for name, (parameter, group) in self.matrices.items():
            rows = len(parameter) if parameter.dim() > 1 else 1  # a piece of ZeRO is a vector
            part = self.direction(parameter, group).view(rows, -1)
            self.update([(name, newton_schulz(part))])

    Muon.step = torch.no_grad()(step)


def size_of_the_part(train):
    """An update as large as fits the part, and not the matrix."""
    from muon import Muon

    update = Muon.update

    def spoiled(self, orthogonal):
        shapes = [(parameter, parameter.full_shape) for parameter, _ in self.matrices.values()]
        for parameter, _ in shapes:
            parameter.full_shape = parameter.shape
        update(self, orthogonal)
        for parameter, shape in shapes:
            parameter.full_shape = shape

    Muon.update = spoiled


def momentum_of_owners_only(train):
    """A rank forgets the momentum of what another one owns."""
    from muon import Muon

    direction = Muon.direction

    def spoiled(self, parameter, group):
        found = direction(self, parameter, group)
        if self.owners.of[parameter.global_name] != self.owners.group.rank:
            self.state[parameter]["momentum_buffer"].zero_()
        return found

    Muon.direction = spoiled


def updates_for_the_own_group(train):
    """An owner sends the update to the ranks of its tp group, and not to the replicas."""
    from owners import Owners

    plan = Owners.plan

    def spoiled(self, bucket):
        there, back = plan(self, bucket)
        return there, [x for x in back if x.target // self.tp == x.source // self.tp]

    Owners.plan = spoiled


def parts_put_as_rows(train):
    """Columns of a matrix, put together as if they were rows: right numbers in wrong places."""
    from owners import Owners

    send = Owners.send

    def spoiled(self, number, vectors, like):
        def turned(name, vector):
            rows = [(a, b) for part in (self.held[self.group.rank][name]) for a, b in part[:1]]
            whole = rows == [(0, self.shapes[name][0])]  # all rows: it has some of the columns
            return vector.view(rows[0][1], -1).T.flatten() if whole else vector

        return send(self, number, {n: turned(n, v) for n, v in vectors.items()}, like)

    Owners.send = spoiled


def small_buckets_of_matrices(train):
    """No mistake: each bucket of matrices has one or two."""
    from owners import Owners

    Owners.most_bytes = 50_000
