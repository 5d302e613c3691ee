"""What one step sends, by formula; `--comm_ledger` prints it beside what was sent."""


def predicted_traffic(state):
    """Rows of (axis, collective, calls, bytes of each call): the peak memory, one float64."""
    return [("world", "all_reduce", 1, 8)] if state.mesh.world.size > 1 else []
