"""Train a Llama in many processes that all do the same, bit for bit.

torchrun --nproc_per_node 2 train.py
"""

from errors import UserError, run  # first: Ctrl-C is one line from here on

# isort: split
import math
from dataclasses import dataclass

import torch

import process_group as pg
from flags import DTYPES, parse_args
from learning_rate import learning_rate_at
from ledger import communication_ledger
from metrics import Metrics, flops_per_token, peak_memory_gb
from model import Llama, materialize
from optimizer import build_optimizer, clip_gradients, gradient_norm
from precision import LossScale
from profiling import record_memory, reported, watched
from started import together, world_size
from traffic import predicted_traffic


@dataclass
class State:
    """All that a run is: what a step reads and what it changes."""

    args: object
    device: torch.device
    mesh: pg.Mesh
    model: Llama
    parameters: list  # what the optimizer works on
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    batch: tuple  # tokens, targets: [batch, seq]; positions: [seq]
    step: int = 0


def setup(args):
    """Build everything a run needs; the state before its first step."""
    device = pg.init_processes(args.device)
    record_memory(args)
    mesh = pg.Mesh(dp=world_size())

    with torch.device("meta"):  # no memory yet: a rank will hold only its own part
        model = Llama(args.config, DTYPES[args.dtype], args.activation_checkpointing)
    materialize(model, args.seed, device, DTYPES[args.weights_dtype])
    if args.compile:
        model.compile_layers(args.compile)

    parameters = list(model.parameters())
    optimizer = build_optimizer(parameters, args)
    loss_scale = LossScale(args.dtype)
    batch = one_batch(args, device)
    return State(args, device, mesh, model, parameters, optimizer, loss_scale, batch)


def one_batch(args, device):
    """The start of a multiplication table: tokens, next tokens [batch, seq], positions [seq]."""
    if args.config.vocab_size < 256:
        raise UserError(f"--vocab_size {args.config.vocab_size}: bytes need 256 or more")
    text = "".join(f"{a} x {b} = {a * b}\n" for a in range(1, 100) for b in range(1, 100)).encode()
    size = args.tokens_per_step + 1
    text = (text * math.ceil(size / len(text)))[:size]
    data = torch.tensor(list(text), device=device)
    shape = args.micro_batch_size, args.seq_len
    return data[:-1].view(shape), data[1:].view(shape), torch.arange(args.seq_len, device=device)


def forward_backward(state):
    """Add one step's gradients, times the loss scale, to the parameters; returns the mean loss."""
    tokens, targets, positions = state.batch
    scale = state.loss_scale.value  # as if there were so many times fewer targets
    loss = state.model(tokens, targets, positions) / (state.args.tokens_per_step / scale)
    loss.backward()
    return loss.detach() / scale


@watched
def train_step(state):
    """One update of the weights; returns what is reported of it.

    step; loss, the mean over the step's targets; grad_norm before clipping; learning_rate; tokens
    since the start; memory_gb, the peak so far; in float16 what `LossScale.update` reports. Raises
    UserError when the loss is not finite.
    """
    args = state.args
    state.optimizer.zero_grad()
    loss = forward_backward(state)
    grad_norm = gradient_norm(state.parameters, state.model.parameter_names)
    grad_norm /= state.loss_scale.value
    clip_gradients(state.parameters, args.max_grad_norm, grad_norm)

    state.step += 1
    learning_rate = learning_rate_at(state.step, args)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.loss_scale.step(state.optimizer, grad_norm)
    maxima = pg.max_over_ranks([peak_memory_gb(state.device)], state.mesh.world, state.device)
    # The only place where the host waits for the device.
    loss, grad_norm, memory = torch.stack([loss.double(), grad_norm, *maxima]).tolist()
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
    pg.from_first(world, metrics.close)
    pg.assert_replicas_equal(state.parameters, state.mesh.group("dp"))
    pg.finish()


if __name__ == "__main__":
    run(main, parse_args)
