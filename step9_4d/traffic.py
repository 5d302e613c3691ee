"""What one step sends, by formula; `--comm_ledger` prints it beside what was sent."""

from traffic_context import context_parallel_traffic
from traffic_data import data_parallel_traffic
from traffic_muon import muon_traffic
from traffic_pipeline import pipeline_parallel_traffic
from traffic_tensor import tensor_parallel_traffic


def predicted_traffic(state):
    """Rows of (axis, collective, calls, bytes of each call) of all axes together."""
    model_group = state.mesh.group("pp", "tp", *state.engine.axes)
    data_group = state.mesh.group("pp", "dp", "cp")
    count = len(state.model.parameter_names)
    # Of what every step reports: peak memory and the flag to stop, gradient norm, loss.
    sums = [(state.mesh.world, 16), (model_group, 8 * count), (data_group, 8)]
    rows = [(group.axis, "all_reduce", 1, size) for group, size in sums if group.size > 1]
    rows += context_parallel_traffic(state.args, state.model, state.mesh.group("cp"))
    rows += data_parallel_traffic(state.engine, state.args.gradient_accumulation_steps)
    rows += muon_traffic(state.optimizer, state.engine)
    rows += pipeline_parallel_traffic(state.args, state.mesh.group("pp"), state.parameters)
    return rows + tensor_parallel_traffic(state.args, state.model)
