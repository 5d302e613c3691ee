"""Train a Llama whose matrices, sequences, batches and layers are dealt out over ranks.

torchrun --nproc_per_node 8 train.py --tp_size 2 --dp_size 2 --pp_size 2
"""

from errors import UserError, run  # first: Ctrl-C is one line from here on

# isort: split
import math
from dataclasses import dataclass

import torch

import process_group as pg
from context_parallel import apply_context_parallel, zigzag_positions
from data_parallel import Naive
from dataloader import Batches
from flags import DTYPES, parse_args
from held_out import held_out_metrics, readable_held_out
from learning_rate import learning_rate_at
from ledger import communication_ledger
from metrics import Metrics, flops_per_token, peak_memory_gb
from mixes import batches, load_texts, parts_of
from model import Llama, materialize
from optimizer import build_optimizer, clip_gradients, gradient_norm
from pipeline_parallel import Stage, apply_pipeline_parallel, sum_shared_gradients
from precision import LossScale
from profiling import record_memory, reported, watched
from started import together
from tensor_parallel import apply_tensor_parallel
from traffic import predicted_traffic
from zero import data_parallel


@dataclass
class State:
    """All that a run is: what a step reads and what it changes."""

    args: object
    device: torch.device
    mesh: pg.Mesh
    model: Llama
    engine: Naive  # or one that extends it
    stage: Stage
    parameters: list  # what the optimizer works on
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    data: Batches
    step: int = 0


def setup(args):
    """Build everything a run needs; the state before its first step."""
    device = pg.init_processes(args.device)
    record_memory(args)
    mesh = pg.Mesh(args.tp_size, args.cp_size, args.dp_size, args.pp_size)
    # Before the model: it may find a wrong name.
    texts = load_texts(args, mesh.world, device)

    with torch.device("meta"):  # no memory yet: a rank will hold only its own part
        model = Llama(args.config, DTYPES[args.dtype], args.activation_checkpointing)
    apply_tensor_parallel(model, mesh.group("tp"), args.sequence_parallel)
    apply_context_parallel(model, mesh.group("cp"), args.compile)
    apply_pipeline_parallel(model, mesh.group("pp"))
    materialize(model, args.seed, device, DTYPES[args.weights_dtype])
    if args.compile:
        model.compile_layers(args.compile)

    engine = data_parallel(args.dp_engine, model, mesh.group("dp", "cp"))
    stage = Stage(args, model, mesh.group("pp"), engine, device)
    parameters = engine.parameters
    optimizer = build_optimizer(parameters, args)
    loss_scale = LossScale(args.dtype)
    positions = zigzag_positions(args.seq_len, mesh.group("cp"))
    loss_scale = LossScale(args.dtype)
    data = batches(texts, device, positions, mesh.group("dp"))
    return State(args, device, mesh, model, engine, stage, parameters, optimizer, loss_scale, data)


def mean_loss(state, micro_batches, targets_in_all, backward):
    """The mean loss of some micro-batches, a float64 scalar; with backward, adds its gradient.

    targets_in_all: of all micro-batches together. Each one's sum is divided by it, so that the
    sum of the gradients is the gradient of the mean.
    """
    total = state.stage.run(micro_batches, targets_in_all, backward)
    return pg.all_reduce(total, state.mesh.group("pp", "dp", "cp"))


def forward_backward(state):
    """Add one step's gradients, times the loss scale, to the parameters; returns the mean loss."""
    micro_batches = state.data.micro_batches(state.step)
    scale = state.loss_scale.value  # as if there were so many times fewer targets
    loss = mean_loss(state, micro_batches, state.args.tokens_per_step / scale, backward=True)
    state.engine.finish_gradients()
    sum_shared_gradients(state.parameters)
    return loss / scale


def evaluate(state):
    """The held-out loss, {name: number}. Autograd stays on: compiled layers need no second version.

    Raises UserError when it is not finite.
    """
    losses = []
    for part in parts_of(state.data):  # one, or those of a mix
        targets = len(part.held_out) * state.args.seq_len
        losses.append(mean_loss(state, part.evaluation(), targets, backward=False).item())
    found = held_out_metrics(losses, state.data.texts)
    if not math.isfinite(found["held_out"]):
        raise UserError(
            f"held-out loss {found['held_out']} at step {state.step}: the weights are ruined; "
            f"lower --learning_rate {state.args.learning_rate}"
        )
    return found


@watched
def train_step(state):
    """One update of the weights; returns what is reported of it.

    step; loss, the mean over the step's targets; grad_norm before clipping; learning_rate; tokens
    since the start; memory_gb, the peak so far; in float16 what `LossScale.update` reports. Raises
    UserError when the loss is not finite.
    """
    args = state.args
    state.engine.zero_grad()
    loss = forward_backward(state)
    model_group = state.mesh.group("pp", "tp", *state.engine.axes)
    grad_norm = gradient_norm(state.parameters, state.model.parameter_names, model_group)
    grad_norm /= state.loss_scale.value
    clip_gradients(state.parameters, args.max_grad_norm, grad_norm)

    state.step += 1
    learning_rate = learning_rate_at(state.step, args)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.loss_scale.step(state.optimizer, grad_norm)
    state.engine.finish_update()
    maxima = pg.max_over_ranks([peak_memory_gb(state.device)], state.mesh.world, state.device)
    # The only place where the host waits for the device.
    loss, grad_norm, memory = torch.stack([loss, grad_norm, *maxima]).tolist()
    scale = state.loss_scale.update(state.optimizer, grad_norm)
    if not math.isfinite(loss + grad_norm) and not scale.get("skipped"):
        raise UserError(
            f"loss {loss}, gradient norm {grad_norm} at step {state.step}: "
            f"{state.loss_scale.remedy}lower --learning_rate {args.learning_rate} or raise "
            f"--warmup_steps {args.warmup_steps}"
        )
    return {
        "step": state.step,
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "tokens": state.step * args.tokens_per_step,
        "memory_gb": memory,
        **scale,
    }


@together
@reported
def main(args):
    state = setup(args)
    world, flops = state.mesh.world, flops_per_token(state.model, args.seq_len)
    metrics = Metrics(args, state.device, flops, world.size)
    pg.from_first(world, metrics.open)
    if world.is_first:
        print(state.mesh)
    while state.step < args.total_steps:
        counting = args.comm_ledger and state.step == 0
        with communication_ledger(state.mesh, counting, predicted_traffic(state)):
            result = train_step(state)
        if world.is_first:
            metrics.log(result)
    held_out = evaluate(state)
    state.stage.timeline.write(world)
    if world.is_first:
        print(readable_held_out(held_out))
    pg.from_first(world, metrics.close)
    pg.finish()


if __name__ == "__main__":
    run(main, parse_args)
