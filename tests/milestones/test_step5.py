"""The milestones of step 5: blocks of attention, then the ring on two and three ranks."""

import numpy as np
import pytest
import step5_ring
from same import SMALL, demand, same, same_step
from workers_context import attended_pairs, plain_attention, plain_rows
from workers_setup import build

pytestmark = pytest.mark.usefixtures("worlds")


# --- 1. two blocks of a softmax -------------------------------------------------------------------


def two_blocks(name):
    """The late half of the queries, with the early keys as one block and the late ones as another.

    name: of a class of attention_blocks.
    """
    import torch

    import attention_blocks
    from context_parallel import merge

    kernel = getattr(attention_blocks, name)
    *whole, out, grad = step5_ring.sequence(12)
    q, k, v = (x.detach() for x in whole)
    early, late = slice(0, 6), slice(6, 12)
    scores = q[:, :, late] @ k.repeat_interleave(2, dim=1).mT * 8**-0.5
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[late]
    scores = scores.masked_fill(~mask, -torch.inf)
    parts = []
    for keys, causal in (early, False), (late, True):
        block = q[:, :, late], k[:, :, keys], v[:, :, keys]
        part, log_sum = kernel.forward(*block, causal)
        what = f"of {name}.forward, causal={causal},"
        due = "the log of Σ exp(q · k / √head_dim) over the keys"
        same(log_sum, scores[..., keys].logsumexp(-1), f"log_sum {what}", due)
        due = plain_attention(*block, mask[:, keys])
        same(part, due, f"out {what}", "attention to this block alone")
        parts.append((part.clone(), log_sum.clone()))
    (found, log_sum), other = parts
    merge(found, log_sum, *other)
    hint = "both blocks together, written into the first two arguments of merge"
    same(log_sum, scores.logsumexp(-1), "log_sum after merge", f"that of {hint}")
    same(found, out[:, :, late], "out after merge", f"attention to {hint}")
    grad_q = 0
    for keys, causal in (early, False), (late, True):
        block = q[:, :, late], k[:, :, keys], v[:, :, keys]
        share_q, *shares = kernel.backward(grad[:, :, late], *block, found, log_sum, causal)
        grad_q = grad_q + share_q
        if causal:  # only these queries have seen the late keys
            due = (
                "that of the whole softmax: p is exp(score - log_sum), and a head of k or v sums "
                "over the heads of q that it serves"
            )
            for what, share, x in zip("kv", shares, whole[1:], strict=True):
                same(share, x.grad[:, :, keys], f"the gradient of {what}, {name}.backward,", due)
    due = "the whole gradient, when the shares of both blocks are added"
    same(grad_q, whole[0].grad[:, :, late], f"the gradient of q, {name}.backward,", due)


@pytest.mark.milestone(5, 1)
@pytest.mark.parametrize("kernel", ["Plain", "OnCpu"])
def test_two_blocks_are_one_softmax(step_dir, worlds, kernel):
    worlds(step_dir, 1).run(two_blocks, kernel)


def chosen_kernels():
    from types import SimpleNamespace

    import torch

    from attention_blocks import kernel_for

    cases = {
        ("cpu", "float32", 64): "OnCpu", ("cpu", "bfloat16", 64): "OnCpu",
        ("cuda", "bfloat16", 64): "Cudnn", ("cuda", "float16", 12): "Plain",
        ("cuda", "float32", 64): "Efficient", ("cuda", "float64", 64): "Plain",
    }  # fmt: skip
    for (device, dtype, head_dim), name in cases.items():
        q = SimpleNamespace(device=SimpleNamespace(type=device), shape=(1, 1, 4, head_dim))
        q.dtype = getattr(torch, dtype)
        found = kernel_for(q).__name__
        where = f"{dtype} with a head_dim of {head_dim} on {device}"
        assert found == name, f"kernel_for chooses {found} for {where}; it should be {name}"


@pytest.mark.milestone(5, 1)
def test_a_kernel_for_each_dtype(step_dir, worlds):
    world = worlds(step_dir, 1)
    world.run(chosen_kernels)
    for queries, keys in (32, 32), (16, 32), (32, 16):
        ((rows, covered),) = world.run(plain_rows, queries, keys)
        assert covered == list(range(queries)), f"row_slices should cover {queries} queries"
        assert rows * keys <= 16 * 16, (
            f"Plain computes {rows} x {keys} scores at a time; with chunks of 16 tokens "
            "16 x 16 are enough"
        )


# --- 2. who holds what, and who attends to what ---------------------------------------------------


def dealt_out(size):
    """The positions of each rank in a sequence of two tokens a chunk."""
    from types import SimpleNamespace

    from context_parallel import zigzag_positions

    groups = [SimpleNamespace(size=size, rank=rank) for rank in range(size)]
    return [zigzag_positions(4 * size, group).tolist() for group in groups]


@pytest.mark.milestone(5, 2)
@pytest.mark.parametrize("size", [2, 3])
def test_the_zigzag(step_dir, worlds, size):
    (found,) = worlds(step_dir, 1).run(dealt_out, size)
    every = [*range(4 * size)]
    for rank, positions in enumerate(found):
        early, late = 2 * rank, 4 * size - 2 * rank - 2
        due = every[early : early + 2] + every[late : late + 2]
        said = f"zigzag_positions: of {4 * size} tokens rank {rank} of {size} has {positions}, not "
        demand(positions == due, f"{said}{due}: chunk {rank} from the front, and from the back")


@pytest.mark.milestone(5, 2)
@pytest.mark.parametrize("size", [2, 3])
def test_who_attends_to_whom(step_dir, worlds, size):
    (found,) = worlds(step_dir, 1).run(attended_pairs, 4 * size, size)
    due = np.tril(np.ones((4 * size, 4 * size)))
    for query, key in zip(*np.nonzero(sum(found) != due), strict=True):
        times = sum(found)[query, key]
        found = f"on {size} ranks query {query} attends {times:g} times to key {key}; it should be "
        demand(False, f"{found}{due[query, key]:g}: look at the three cases of `attending`")
    work = [int(pairs.sum()) for pairs in found]
    assert len(set(work)) == 1, f"the ranks attend to {work} pairs; each should have as many"


def parts_of_a_sequence(size):
    from types import SimpleNamespace

    import torch

    from context_parallel import zigzag_positions
    from dataloader import Batches

    tokens = np.arange(1000, dtype=np.uint16)  # a token says where it stands
    args = SimpleNamespace(
        seq_len=4 * size, micro_batch_size=2, gradient_accumulation_steps=1, seed=1, num_workers=0,
        dataset_name="numbers", stride=0, eval_tokens=None,
    )  # fmt: skip
    every = []
    for rank in range(size):
        positions = zigzag_positions(args.seq_len, SimpleNamespace(size=size, rank=rank))
        data = Batches(args, tokens, torch.device("cpu"), positions)
        ((inputs, targets, found),) = data.micro_batches(0)
        assert found.tolist() == positions.tolist(), (
            "positions should be those that Batches is given"
        )
        assert inputs.shape == (2, 4), f"a rank reads {list(inputs.shape)} tokens, not [2, 4]"
        assert torch.equal(targets, inputs + 1), (
            f"rank {rank} of {size} reads {inputs.tolist()} with the targets {targets.tolist()}; a "
            "target is the next token of the text, also where that lies in a chunk of another rank"
        )
        every.append(inputs - positions)
    assert all((x == every[0][:, :1]).all() for x in every), "all ranks read the same sequences"


@pytest.mark.milestone(5, 2)
@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_reads_its_chunks(step_dir, worlds, size):
    worlds(step_dir, 1).run(parts_of_a_sequence, size)


# --- 3. the ring ----------------------------------------------------------------------------------


@pytest.mark.milestone(5, 3)
@pytest.mark.parametrize("size", [2, 3])
def test_blocks_go_round_the_ring(step_dir, worlds, size):
    worlds(step_dir, size).run(step5_ring.forward)


# --- 4. the way back ------------------------------------------------------------------------------


@pytest.mark.milestone(5, 4)
@pytest.mark.parametrize("size", [2, 3])
def test_gradients_come_home(step_dir, worlds, size):
    worlds(step_dir, size).run(step5_ring.shares_home)
    worlds(step_dir, size).run(step5_ring.backward)


# --- 5. the whole model ---------------------------------------------------------------------------


def gradients(argv):
    """(loss, {name: gradient}) of the first step, as this rank has them."""
    import train

    state = build(argv)
    loss = train.forward_backward(state)
    return loss.item(), {p.global_name: p.grad.double().numpy() for p in state.parameters}


@pytest.mark.milestone(5, 5)
@pytest.mark.parametrize(
    "size, flags, one",
    [
        (2, "--cp_size 2 --micro_batch_size 1 --gradient_accumulation_steps 2", ""),
        (3, "--cp_size 3 --seq_len 18", "--seq_len 18"),
    ],
)
def test_a_step_is_that_of_one_process(step_dir, worlds, train_on, size, flags, one):
    ((loss, due),) = worlds(step_dir, 1).run(gradients, SMALL + one)
    for rank, (found, grads) in enumerate(worlds(step_dir, size).run(gradients, SMALL + flags)):
        assert found == pytest.approx(loss, rel=1e-10), (
            f"rank {rank} of {size} has {found / loss:.4g} times the right loss; it should be the "
            "sum over the ranks (mean_loss), each of which divides by the number of all targets. "
            f"About {1 / size:.4g} means: not summed. About {size}: each rank reads all tokens. "
            "Near 1: attention does not see other ranks (apply_context_parallel)"
        )
        for name, grad in grads.items():
            apart = np.abs(grad - due[name]).max() / np.abs(due[name]).max()
            times = np.linalg.norm(grad) / np.linalg.norm(due[name])
            assert apart <= 1e-10, (
                f"the gradient of {name} on rank {rank} of {size} is {times:.4g} times as large as "
                "it should be; it should be the sum over the tokens of all ranks (sum_gradients). "
                f"Exactly {1 / size:.4g} means: a mean. Another factor: the sum is missing"
            )
    same_step(step_dir, train_on, size, flags, one=one)
