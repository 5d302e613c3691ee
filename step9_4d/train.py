"""Train a Llama whose matrices, sequences, batches and layers are dealt out over ranks.

torchrun --nproc_per_node 8 train.py --tp_size 2 --dp_size 2 --pp_size 2 --checkpoint_dir runs/1
"""

from errors import UserError, run  # first: Ctrl-C is one line from here on

# isort: split
import math
from dataclasses import dataclass

import torch

import muon
import process_group as pg
from casts import shared_casts
from checkpoint import last_good, listen, load, save_if_due
from config_file import write_config
from context_parallel import apply_context_parallel, zigzag_positions
from data_parallel import Naive
from dataloader import Batches
from flags import DTYPES, parse_args
from held_out import held_out_metrics, readable_held_out
from huggingface import check_tokenizer, load_hf, save_hf
from interleaved import build_stage
from learning_rate import learning_rate_at
from ledger import communication_ledger
from lock import alone
from metrics import Metrics, flops_per_token, peak_memory_gb
from mixes import batches, identity, load_texts, parts_of
from model import Llama, materialize
from optimizer import clip_gradients, gradient_norm
from pipeline_parallel import Stage, apply_pipeline_parallel, sum_shared_gradients
from precision import LossScale
from profiling import record_memory, reported, watched
from restart import chosen
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
    stage: Stage  # or Interleaved
    parameters: list  # what the optimizer works on
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    data: Batches
    step: int = 0
    asked_to_stop: int = 0  # this rank, by the signal of that number
    stop: int = 0  # after this step, as all ranks know
    not_saved: UserError = None  # why the last step's checkpoint is not there


def setup(args):
    """Build everything a run needs; the state before its first step."""
    device = pg.init_processes(args.device)
    record_memory(args)
    mesh = pg.Mesh(args.tp_size, args.cp_size, args.dp_size, args.pp_size)
    # Before the model: it may find a wrong name.
    texts = load_texts(args, mesh.world, device)
    check_tokenizer(args, mesh.world)
    args.data = identity(texts)
    # One checkpoint for all.
    vars(args).update(pg.from_first(mesh.world, lambda: chosen(args)))

    with torch.device("meta"):  # no memory yet: a rank will hold only its own part
        model = Llama(args.config, DTYPES[args.dtype], args.activation_checkpointing)
    apply_tensor_parallel(model, mesh.group("tp"), args.sequence_parallel)
    apply_context_parallel(model, mesh.group("cp"), args.compile)
    apply_pipeline_parallel(model, mesh.group("pp"), args.pp_chunks)
    loads = args.load_hf or (args.resume and args.taken.weights == "all")
    materialize(model, None if loads else args.seed, device, DTYPES[args.weights_dtype])
    if args.load_hf and not args.resume:
        load_hf(model, args.load_hf)
    if args.compile:
        model.compile_layers(args.compile, args.recompute_elementwise)

    engine = data_parallel(args.dp_engine, model, mesh.group("dp", "cp"))
    stage = build_stage(args, model, mesh.group("pp"), engine, device)
    parameters = engine.parameters
    optimizer = muon.build_optimizer(parameters, args, mesh)
    loss_scale = LossScale(args.dtype)
    positions = zigzag_positions(args.seq_len, mesh.group("cp"))
    data = batches(texts, device, positions, mesh.group("dp"))
    state = State(args, device, mesh, model, engine, stage, parameters, optimizer, loss_scale, data)
    if args.resume:
        load(state)
    return state


def mean_loss(state, micro_batches, targets_in_all, backward):
    """The mean loss of some micro-batches, a float64 scalar; with backward, adds its gradient.

    targets_in_all: of all micro-batches together. Each one's sum is divided by it, so that the
    sum of the gradients is the gradient of the mean.
    """
    with shared_casts(state.model, state.engine, state.args):
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
            f"lower --learning_rate {state.args.learning_rate}{last_good(state.args)}"
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
    own = [peak_memory_gb(state.device), state.asked_to_stop]
    maxima = pg.max_over_ranks(own, state.mesh.world, state.device)
    # The only place where the host waits for the device.
    loss, grad_norm, memory, asked = torch.stack([loss, grad_norm, *maxima]).tolist()
    state.stop = int(asked) if state.step < args.total_steps else 0
    scale = state.loss_scale.update(state.optimizer, grad_norm)
    if not math.isfinite(loss + grad_norm) and not scale.get("skipped"):
        raise UserError(
            f"loss {loss}, gradient norm {grad_norm} at step {state.step}: "
            f"{state.loss_scale.remedy}lower --learning_rate {args.learning_rate} or raise "
            f"--warmup_steps {args.warmup_steps}{last_good(args)}"
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
@alone
@reported
def main(args):
    state = setup(args)
    listen(state)
    world, flops = state.mesh.world, flops_per_token(state.model, args.seq_len)
    metrics = Metrics(args, state.device, flops, world.size)
    pg.from_first(world, lambda: (metrics.open(state.step), write_config(args)))
    if world.is_first:
        print(state.mesh)
    counting = args.comm_ledger  # in the first step
    while state.step < args.total_steps and not state.stop:
        with communication_ledger(state.mesh, counting, predicted_traffic(state)):
            result = train_step(state)
        counting = False
        with metrics.paused():
            if args.eval_every and state.step % args.eval_every == 0 and not state.stop:
                result |= evaluate(state)
        if world.is_first:
            metrics.log(result)
        with metrics.paused():
            save_if_due(state)
    if not state.stop:
        held_out = evaluate(state)
        if world.is_first:
            print(readable_held_out(held_out))
        if args.save_hf:
            save_hf(state, args.save_hf)
    state.stage.timeline.write(world)
    pg.from_first(world, metrics.close)
    pg.finish()
    if state.not_saved:
        raise state.not_saved


if __name__ == "__main__":
    run(main, parse_args)
