"""The traffic between the stages of a pipeline, by formula."""

import math

from flags import DTYPES
from pipeline_parallel import message_shape


def pipeline_parallel_traffic(args, group, parameters):
    """What this stage sends in a step: rows of (axis, collective, calls, bytes)."""
    number = DTYPES[args.dtype].itemsize
    size = math.prod(message_shape(args)) * number
    ways = (not group.is_first) + (not group.is_last)  # gradients back, activations on
    rows = [("pp", "send", ways * args.gradient_accumulation_steps, size)] if ways else []
    shared = [p for p in parameters if hasattr(p, "shared")]
    return rows + [("ends", "all_reduce", 1, parameter.nbytes) for parameter in shared]
