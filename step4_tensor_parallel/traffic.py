"""What one step sends, by formula; `--comm_ledger` prints it beside what was sent."""

from traffic_tensor import tensor_parallel_traffic


def predicted_traffic(state):
    """Rows of (axis, collective, calls, bytes of each call) of all axes together."""
    model_group = state.mesh.group("tp")
    count = len(state.model.parameter_names)
    # Of what every step reports: peak memory, gradient norm.
    sums = [(state.mesh.world, 8), (model_group, 8 * count)]
    rows = [(group.axis, "all_reduce", 1, size) for group, size in sums if group.size > 1]
    return rows + tensor_parallel_traffic(state.args, state.model)
