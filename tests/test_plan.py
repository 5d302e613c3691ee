"""The arithmetic of `assets/plan.py` against a run: what is sent, held, and kept for backward."""

import sys
from collections import Counter

import pytest
import torch
import workers_messages
import workers_setup
import workers_sharding
from conftest import ROOT
from launch import ranks_of

sys.path.append(str(ROOT / "assets"))
import numbers_planner  # noqa: E402

SHAPE = (
    "--model_name debug --num_hidden_layers 5 --hidden_size 128 --intermediate_size 352 "
    "--vocab_size 1024 --seq_len 64 --micro_batch_size 2 --gradient_accumulation_steps 3 "
)
RUN = "--dtype bfloat16 --dataset_name random --device cpu "
AXES = ("tp", "cp", "dp_cp", "pp", "ends")
LAYOUTS = [
    "",
    "--activation_checkpointing",
    "--gradient_accumulation_steps 1",
    "--tp_size 2 --pp_size 2 --sequence_parallel",
    "--tp_size 2 --cp_size 2 --gradient_accumulation_steps 1",
    "--cp_size 4 --dp_engine zero1",
    "--dp_size 2 --dp_engine zero3",
    "--tp_size 2 --cp_size 2 --activation_checkpointing",
    "--tp_size 2 --dp_size 2 --dp_engine zero2 --sequence_parallel --activation_checkpointing",
    "--cp_size 2 --pp_size 2 --tie_word_embeddings yes",
    "--pp_size 2 --dp_size 2 --dp_engine zero3 --tie_word_embeddings yes",
]


@pytest.fixture(scope="module")
def plan():
    return numbers_planner.load("plan")


def kept_of(argv):
    """The stage of this rank, and the bytes that autograd keeps of a micro-batch there, with the
    casts that it shares with others."""
    import casts
    import model
    import rms_norm
    import tensor_parallel

    class Norm(torch.autograd.Function):
        """What the kernel for CUDA keeps; PyTorch's own operator on a CPU keeps more."""

        @staticmethod
        def forward(ctx, x, weight, eps):
            ctx.save_for_backward(x, weight)
            return plain(x, weight, eps)

    plain = rms_norm.rms_norm
    state = workers_setup.build(argv)
    # By the storage itself, not by its address: zero3 frees what it has gathered, and the address
    # is that of something else then.
    weights = {p.untyped_storage()._cdata for p in state.model.parameters()}
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes(), x
        return x

    place = state.mesh.group("pp").rank
    tokens, targets, positions = next(state.data.micro_batches(0))
    x = torch.zeros(state.stage.shape, dtype=torch.bfloat16, requires_grad=True)
    model.rms_norm = tensor_parallel.rms_norm = Norm.apply
    try:
        with (
            casts.shared_casts(state.model, state.engine, state.args),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        ):
            out = state.model(x if place else tokens, targets, positions)
    finally:
        model.rms_norm = tensor_parallel.rms_norm = plain
    assert out.requires_grad
    return place, sum(size for storage, (size, _) in kept.items() if storage not in weights)


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, x in enumerate(LAYOUTS)],
)
def test_the_plan_is_what_a_run_does(step_dir, worlds, plan, layout):
    args, argv = plan.parse_args((SHAPE + layout).split()), RUN + SHAPE + layout
    world = worlds(step_dir, ranks_of(layout))
    ranks = (
        world.run(f, argv)
        for f in (workers_messages.ledger_of, workers_sharding.owned_bytes, kept_of)
    )
    ranks, ring = list(zip(*ranks, strict=True)), ("cp", "send")
    most = Counter()  # of each stage: of a ring's ranks the first one sends most, and is planned
    for (_, predicted), _, (place, _) in ranks:
        most[place] = max(most[place], predicted.get(ring, (0, 0))[1])
    for (_, predicted), owned, (place, kept) in ranks:
        stage = plan.Stage(args, place)
        sent = Counter()
        for axis, collective, size, _ in stage.traffic():
            sent[axis, collective] += size
        due = {key: size for key, (_, size) in predicted.items() if key[0] in AXES}
        due[ring] = most[place]
        for key in {*sent, *due}:
            assert sent[key] == pytest.approx(due.get(key, 0), rel=1e-3), key
        memory = stage.memory()
        for kind in ("weights", "gradients", "moments"):
            if kind == "gradients" and "zero1" in layout:
                # Its fullest moment is while they are summed; what is received is in passing.
                received = stage.weights * 4 / stage.replicas
                assert owned["most gradients"] == pytest.approx(memory[kind] + received, rel=1e-3)
                continue
            assert memory[kind] == pytest.approx(owned[kind], rel=1e-3), kind
        _, layers, end = stage.kept()
        # What is left out: a number a token for each norm, one for each head, positions.
        assert layers + end + stage.casts() == pytest.approx(kept, rel=0.05)
        assert layers + end + stage.casts() <= kept


@pytest.mark.parametrize("flags", ["--tp_size 3", "--cp_size 3", "--pp_size 64", "--model_name x"])
def test_a_layout_that_cannot_run_is_refused(plan, flags, capsys):
    with pytest.raises(SystemExit):
        plan.parse_args(flags.split())
    assert flags.split()[0] in capsys.readouterr().err.splitlines()[-1]
