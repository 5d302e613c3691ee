"""The traffic of the engines of data parallelism, by formula."""

from data_parallel import Bucketed
from zero import Zero1, Zero2, Zero3


def data_parallel_traffic(engine, micro_batches):
    """What an engine sends in a step: rows of (axis, collective, calls, bytes)."""
    axis = engine.group.axis
    if engine.group.size == 1:
        return []
    if not isinstance(engine, Bucketed):
        return [(axis, "all_reduce", 1, parameter.nbytes) for parameter in engine.parameters]
    if not isinstance(engine, Zero1):
        return [(axis, "all_reduce", 1, bucket.nbytes) for bucket in engine.buckets]
    sums = micro_batches if isinstance(engine, Zero2) else 1
    rows = [(axis, "reduce_scatter", sums, bucket.nbytes) for bucket in engine.buckets]
    calls = micro_batches if isinstance(engine, Zero3) else 1
    gathers = [(axis, "all_gather", calls, bucket.weights.nbytes) for bucket in engine.buckets]
    if isinstance(engine, Zero3):
        # Forward and backward; once for the last layer, the head and the norms, which stay in
        # between, and for the embedding, which backward does not need.
        gathers += gathers[: len(engine.layers) - 1]
    return rows + gathers
