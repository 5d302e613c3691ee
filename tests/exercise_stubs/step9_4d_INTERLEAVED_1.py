"""A simulation of interleaved stages in which messages take time."""


def duration(passes, enables, forward=1.0, backward=2.0, message=0.5):
    """The time at which the last pass ends, from 0.

    passes: of each rank, in its order, as `passes_of(rank, ranks, chunks, count)` returns them: a
        pass has kind ("forward" or "backward"), stage and micro_batch. Rank r has the stages
        r, r + ranks, r + 2 ranks, …
    enables: a function: the pass that can be done once one is done, with its result; or None.
    A rank does its next pass as soon as it is free and the input has come. A forward pass of the
    first stage needs none. A result that goes to another rank is there `message` later.
    """
    raise NotImplementedError
