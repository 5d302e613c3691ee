"""Functions that the tests run inside a `World`: there, `import train` is the step's own code."""

import functools
import importlib
import itertools
from unittest.mock import patch

import numpy as np
import torch
from harness import pieces
from torch.utils._python_dispatch import TorchDispatchMode  # the public way to see every operator

RMS_SHAPES = [(1, 3), (3, 5), (2, 7, 33), (4, 128), (300, 17), (2, 3, 2049)]


def build(argv):
    """The state of a run before its first step."""
    import train

    return train.setup(train.parse_args(argv.split()))


def tiny_config(**fields):
    """A `transformers.LlamaConfig` with random small fields put over it."""
    from transformers import LlamaConfig

    defaults = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
                "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
                "max_position_embeddings": 64, "rms_norm_eps": 1e-5}  # fmt: skip
    return LlamaConfig(**{**defaults, **fields})


def against_transformers(fields, dtype):
    """Logits and the summed loss of our model and of LlamaForCausalLM with the same weights.

    Returns (ours, theirs, our loss, their loss) after weights went from theirs to ours by
    `load_state_dict`, and back.
    """
    from transformers import LlamaForCausalLM

    from model import Llama, materialize

    dtype = getattr(torch, dtype)
    config = tiny_config(**fields)
    torch.manual_seed(0)
    theirs = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").to(dtype)
    if dtype == torch.float64:
        upcast_in_float64(theirs)
    with torch.device("meta"):
        ours = Llama(config, dtype)
    materialize(ours, 1, torch.device("cpu"))
    ours.load_state_dict(theirs.state_dict())
    before = {name: weight.clone() for name, weight in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict())
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, before[name]), name
    tokens = torch.randint(config.vocab_size, (2, 24))
    positions = torch.arange(24)
    with torch.no_grad():
        our_logits = ours.lm_head(ours.model(tokens, positions))
        their_logits = theirs(tokens).logits
        loss = ours(tokens[:, :-1], tokens[:, 1:], positions[:-1])
        their_loss = theirs(tokens, labels=tokens).loss * tokens[:, 1:].numel()
    return our_logits.numpy(), their_logits.numpy(), loss.item(), their_loss.item()


def upcast_in_float64(model):
    """Where transformers computes in float32 whatever the dtype, put the same formula in float64.

    The frequencies are transformers' own, but from its formula in float32; so its rotary table is
    replaced by one of the oracle's float64 frequencies, which another test compares with its own.
    """
    import numpy_llama

    frequencies = torch.from_numpy(numpy_llama.inverse_frequencies(model.config))

    class Rotary(torch.nn.Module):
        def forward(self, x, position_ids):
            angles = position_ids[..., None].double() * frequencies
            angles = torch.cat([angles, angles], dim=-1)
            return angles.cos(), angles.sin()

    model.model.rotary_emb = Rotary()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: (
                m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon))
            )


def frequencies(fields):
    """Inverse frequencies: our model's, and those of transformers (float32 inside)."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from model import inverse_frequencies

    config = tiny_config(**fields)
    ours = inverse_frequencies(config, torch.device("cpu"))
    return ours.numpy(), LlamaRotaryEmbedding(config).inv_freq.numpy()


def initial_weights(argv):
    """{name: array} of a fresh model."""
    state = build(argv)
    return {p.global_name: p.detach().double().numpy() for p in state.model.parameters()}


class Dtypes(TorchDispatchMode):
    """Records the dtype of each tensor that any operator takes or returns."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                self.seen.setdefault(leaf.dtype, set()).add(str(function))
        return out


def weights_after(argv, steps):
    """Pieces of this rank's weights after some steps of training."""
    import train

    state = build(argv)
    for _ in range(steps):
        train.train_step(state)
    return pieces(state.parameters, lambda p: p)


def gradients_at(argv, weights, step):
    """Pieces of a step's gradients, and its loss, with the weights of an .npz file.

    step: how many there were before.
    """
    import train

    state = build(argv)
    state.step = step
    with np.load(weights) as full:
        for p in state.parameters:
            own = full[p.global_name][p.held].reshape(-1)[getattr(p, "piece", slice(None))]
            p.data.copy_(torch.from_numpy(own).reshape(p.shape))
    if hasattr(state, "engine"):
        state.engine.finish_update()
    loss = train.forward_backward(state).detach().double().cpu().numpy()
    whole = "loss", (), (), slice(None), loss
    return [whole, *pieces(state.parameters, lambda p: p.grad)]


def error_of_the_heads_gradient(argv):
    """How far `head_rounding`'s p - y is from autograd's gradient of the logits, relatively."""
    from head_rounding import head_and_gradient

    state = build(argv)
    hidden, weight, gradient = head_and_gradient(state)
    _, targets, _ = next(state.data.micro_batches(0))
    logits = (hidden @ weight.T).requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    return ((gradient - expected).norm() / expected.norm()).item()


def dtypes_of_a_step(argv):
    """{dtype: operators} of a step, the optimizer's update apart; dtypes of the state by kind."""
    import train

    state = build(argv)
    with Dtypes() as dtypes, patch.object(state.optimizer, "step", lambda: None):
        train.train_step(state)
    train.train_step(state)
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    return {str(dtype): sorted(names) for dtype, names in dtypes.seen.items()}, {
        "weights": {str(p.dtype) for p in state.parameters},
        "gradients": {str(p.grad.dtype) for p in state.parameters},
        "optimizer": {str(moment.dtype) for moment in moments if moment.dim()},
    }


def reads_of_a_step(argv):
    """The methods by which a second step reads what the device computes, in order.

    On a GPU each would make the host wait until the device is there.
    """
    import train

    names = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
    methods, reads = {name: getattr(torch.Tensor, name) for name in names}, []

    def counted(name):
        def read(tensor, *args, **options):
            reads.append(name)
            return methods[name](tensor, *args, **options)

        return read

    state = build(argv)
    train.train_step(state)  # it shuffles, and what is compiled is compiled
    with patch.multiple(torch.Tensor, **{name: counted(name) for name in names}):
        train.train_step(state)
    return reads


def attention_error(dtype, heads, kv_heads, device="cpu"):
    """Forward and backward of `causal_attention` against a plain float64 one; names of kernels.

    Returns (relative error, {kernel names}).
    """
    from torch.profiler import profile

    from model import causal_attention

    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    shapes = [(2, 37, heads, 16), (2, 37, kv_heads, 16), (2, 37, kv_heads, 16)]
    q, k, v = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
    with profile() as trace:
        out = causal_attention(q, k, v)
        out.square().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    wide = [t.repeat_interleave(heads // t.shape[2], dim=2) for t in exact]
    scores = torch.einsum("bqhd,bkhd->bhqk", wide[0], wide[1]) / 4  # sqrt(16)
    hidden = torch.ones(37, 37, dtype=torch.bool, device=device).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    reference = torch.einsum("bhqk,bkhd->bqhd", weights, wide[2])
    reference.square().sum().backward()
    pairs = [(out, reference), *((t.grad, e.grad) for t, e in zip((q, k, v), exact, strict=True))]
    error = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
    return error, {event.key for event in trace.key_averages()}


def triton_rms_norm(dtype, device="cpu"):
    """Largest relative errors of the Triton kernels against float64, {shape: error}."""
    from rms_norm import TritonRMSNorm

    errors = {}
    for shape in RMS_SHAPES:
        torch.manual_seed(0)
        x = torch.randn(shape, device=device, dtype=getattr(torch, dtype), requires_grad=True)
        weights_dtype = torch.promote_types(x.dtype, torch.float32)
        weight = torch.randn(shape[-1], device=device, dtype=weights_dtype, requires_grad=True)
        dy = torch.randn_like(x)
        y = TritonRMSNorm.apply(x, weight, 1e-5)
        y.backward(dy)
        exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, weight))
        exact = torch.nn.functional.rms_norm(exact_x, exact_w.shape, exact_w, 1e-5)
        exact.backward(dy.double())
        pairs = [(y, exact), (x.grad, exact_x.grad), (weight.grad, exact_w.grad)]
        errors[shape] = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
    return errors


def rms_norm_on_cuda():
    """Whether eager calls take the Triton kernels: names of what `rms_norm` ran."""
    from torch.profiler import profile

    from rms_norm import rms_norm

    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(256, device="cuda", requires_grad=True)
    with profile() as trace:
        rms_norm(x, weight, 1e-5).sum().backward()
    return {event.key for event in trace.key_averages()}


def saved_bytes(argv):
    """Bytes that autograd keeps of one micro-batch's forward pass, weights apart."""
    torch.compiler.reset()  # or what was compiled under other flags is taken
    state = build(argv)
    weights = {p.data_ptr() for p in state.model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    data = getattr(state, "data", None)
    batch = next(data.micro_batches(0)) if data else state.batch
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = state.model(*batch)
    assert loss.requires_grad
    return sum(kept.values())


def bytes_kept_of_a_step(argv):
    """Bytes that autograd keeps of all micro-batches together, with all casts, without weights; and
    how many weights there are in matrices whose rows are all here."""
    import train

    torch.compiler.reset()
    state, kept = build(argv), {}
    own = {p.untyped_storage()._cdata for p in state.model.parameters()}

    def keep(tensor):
        casts = [p.cast for p in state.model.parameters() if hasattr(p, "cast")]
        # Held on to, so that nothing else gets the address of one that is gone.
        kept.update((x.untyped_storage()._cdata, x) for x in (tensor, *casts))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train.forward_backward(state)
    size = sum(x.untyped_storage().nbytes() for storage, x in kept.items() if storage not in own)
    matrices = [p for p in state.model.parameters() if p.dim() > 1 and "embed" not in p.global_name]
    return size, sum(p.numel() for p in matrices if len(p) == p.full_shape[0])


def order_of_gradients(argv):
    """The layers whose weights get a gradient in the last backward pass, one after the other."""
    import train

    state, order = build(argv), []
    for parameter in state.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: order.append(p.global_name))
    train.forward_backward(state)
    last = order[-len(list(state.model.parameters())) :]
    return [int(name.split(".")[2]) for name in last if ".layers." in name]


def optimizer_groups(argv):
    """[(weight decay, {dims of its parameters})]."""
    state = build(argv)
    return [
        (group["weight_decay"], {p.dim() for p in group["params"]})
        for group in state.optimizer.param_groups
    ]


def learning_rates(argv, steps):
    import train

    args = train.parse_args(argv.split())
    return args.total_steps, [train.learning_rate_at(step, args) for step in steps]


def flops_and_peak(argv, gpu_name):
    """(FLOP a token, number of parameters, peak FLOP/s of a GPU of that name)."""
    import metrics

    state = build(argv)
    torch.cuda.get_device_name = lambda device: gpu_name
    count = sum(p.full_shape.numel() for p in state.model.parameters())
    flops = metrics.flops_per_token(state.model, state.args.seq_len)
    return flops, count, metrics.peak_flops(torch.device("cuda"))


def metas_before_materialize():
    """What a model built on the meta device holds: devices, and global names in model order."""
    from model import Llama

    with torch.device("meta"):
        model = Llama(tiny_config(tie_word_embeddings=True))
    names = [p.global_name for p in model.parameters()]
    slices = [p.held for p in model.parameters()]
    shapes = [tuple(p.full_shape) for p in model.parameters()]
    return {p.device.type for p in model.parameters()}, names, slices, shapes


def continued(argv, stop, steps):
    """Metrics and final weights of `steps` steps in one go, and stopped and rebuilt after `stop`.

    What is carried over: weights, optimizer state, the number of the step.
    """
    import copy

    import torch.distributed as dist

    import train

    def run(state, until):
        metrics = []
        while state.step < until:
            metrics.append(train.train_step(state))
        return [{k: m[k] for k in m if k != "memory_gb"} for m in metrics]

    def weights(state):
        return [p.detach().numpy().copy() for p in state.parameters]

    def leave():
        if dist.is_initialized():
            dist.destroy_process_group()

    state = build(argv)
    whole = run(state, steps), weights(state)
    leave()
    state = build(argv)
    first = run(state, stop)
    kept = copy.deepcopy((state.model.state_dict(), state.optimizer.state_dict(), state.step))
    leave()
    state = build(argv + " --num_workers 2" if "--dataset_name" in argv else argv)
    state.model.load_state_dict(kept[0])
    state.optimizer.load_state_dict(kept[1])
    state.step = kept[2]
    resumed = first + run(state, steps), weights(state)
    leave()
    same = all(np.array_equal(a, b) for a, b in zip(whole[1], resumed[1], strict=True))
    return whole[0], resumed[0], same


KEPT = {}  # what a rank keeps from one call to the next


def segment(argv, until, resume):
    """Train up to a step, from the start or from where the last segment ended; the metrics.

    What is carried over: what the optimizer works on, its state, the number of the step.
    """
    import copy

    import train

    state = build(argv)
    if resume:
        train.evaluate(state)  # what it leaves behind must not outlive the update below
        with torch.no_grad():
            for parameter, kept in zip(state.parameters, KEPT["parameters"], strict=True):
                parameter.copy_(kept)
        if hasattr(state, "engine"):
            state.engine.finish_update()
        state.optimizer.load_state_dict(KEPT["optimizer"])
        state.step = KEPT["step"]
    metrics = []
    while state.step < until:
        result = train.train_step(state)
        metrics.append([result[key] for key in ("step", "loss", "grad_norm", "learning_rate")])
    KEPT["parameters"] = [parameter.detach().clone() for parameter in state.parameters]
    KEPT["optimizer"] = copy.deepcopy(state.optimizer.state_dict())
    KEPT["step"] = state.step
    return metrics


# --- processes ------------------------------------------------------------------------------------


def mesh_of(sizes, device):
    """What each rank of a mesh knows of its place, axis by axis and for the combined groups."""
    import process_group as pg

    device = pg.init_processes(device)
    mesh = pg.Mesh(**sizes)
    groups = {}
    for axes in [("tp",), ("cp",), ("dp",), ("pp",), ("dp", "cp"), ("tp", "pp")]:
        group = mesh.group(*axes)
        assert mesh.group(*reversed(axes)) is group, "asked twice, made once"
        total = pg.all_reduce(torch.tensor([2.0**mesh.rank], device=device), group)
        members = [rank for rank in range(len(mesh.grid.flatten())) if int(total) >> rank & 1]
        assert members == sorted(group.ranks), "the group that communicates is the one named"
        groups[axes] = {
            "axis": group.axis,
            "ranks": group.ranks,
            "rank": group.rank,
            "next": group.next,
            "previous": group.previous,
            "first": group.is_first,
            "last": group.is_last,
        }
    return groups, str(mesh), mesh.world.is_first


def collectives(dtype, size, device):
    """Every collective on a group of some size, and on one rank alone: {name: array of this rank}.

    Row i of rank r's tensor is [2i, 2i + 1] + 10r; there are as many rows as ranks.
    """
    import ledger
    import process_group as pg

    device = pg.init_processes(device)
    mesh = pg.Mesh(tp=size)
    group, alone = mesh.group("tp"), mesh.group("dp")
    rank, dtype = group.rank, getattr(torch, dtype)

    def mine(rows=size):
        return torch.arange(rows * 2, dtype=dtype, device=device).view(rows, 2) + 10 * rank

    found = {}
    with ledger.recorded() as counted:
        x = mine()
        assert pg.all_reduce(x, group) is x
        found["all_reduce"] = x
        found["all_reduce max"] = pg.all_reduce(mine(), group, pg.ReduceOp.MAX)
        x = mine()
        pg.all_reduce(x, group, async_op=True).wait()
        found["all_reduce later"] = x
        found["all_gather"] = pg.all_gather(mine(), group)
        out, work = pg.all_gather(mine(), group, async_op=True)
        work.wait()
        found["all_gather later"] = out
        found["reduce_scatter"] = pg.reduce_scatter(mine(), group)
        out, work = pg.reduce_scatter(mine(), group, async_op=True)
        work.wait()
        found["reduce_scatter later"] = out
        found["broadcast"] = pg.broadcast(mine(), group, source=1)
        arrived = torch.empty_like(mine())
        for work in pg.exchange(group, [(mine(), group.next)], [(arrived, group.previous)]):
            work.wait()
        found["exchange"] = arrived
        for collective in (pg.all_reduce, pg.all_gather, pg.reduce_scatter, pg.broadcast):
            assert torch.equal(collective(mine(), alone), mine()), "nothing to do on a group of one"
        arrived = torch.empty_like(mine())
        assert pg.exchange(alone, [(mine(), alone.next)], [(arrived, alone.previous)]) == []
        assert torch.equal(arrived, mine())
        for collective in (pg.all_reduce, pg.all_gather, pg.reduce_scatter, pg.broadcast):
            try:
                collective(mine(4)[:, :1], group)
            except AssertionError as error:
                assert "slice" in str(error)
            else:
                raise AssertionError(f"{collective.__name__} took a slice")
    found["largest"] = pg.max_over_ranks([7 - rank, rank], group, device)
    found["from_first"] = torch.tensor(pg.from_first(group, lambda: 100 + rank))
    return {name: value.double().cpu().numpy() for name, value in found.items()}, dict(counted)


def error_on_the_first_rank():
    """The text of an error that only the first rank met, as every rank sees it."""
    import process_group as pg
    from errors import UserError

    pg.init_processes("cpu")

    def fail():
        raise UserError("only here")

    try:
        pg.from_first(pg.Mesh(tp=pg.dist.get_world_size()).world, fail)
    except UserError as error:
        return str(error)


def replicas(spoiled_rank):
    """Whether assert_replicas_equal speaks up when one weight of one rank moved by one bit."""
    import process_group as pg

    state = build("--num_hidden_layers 1 --seq_len 8")
    group = state.mesh.group("dp")
    if group.rank == spoiled_rank:
        with torch.no_grad():
            weight = state.parameters[-1].view(-1)
            weight[3] = torch.nextafter(weight[3], weight[3] + 1)
    try:
        pg.assert_replicas_equal(state.parameters, group)
    except AssertionError as error:
        return str(error)


def fail_on(bad_rank, how):
    """Fail on one rank while the others wait for it."""
    import os
    import time

    import process_group as pg

    pg.init_processes("cpu")
    if pg.dist.get_rank() == bad_rank:
        if how == "raise":
            raise ValueError("this rank has had enough")
        if how == "die":
            os.kill(os.getpid(), 9)
        time.sleep(60)
    pg.dist.barrier()


# --- data -----------------------------------------------------------------------------------------


def tokens_of(argv):
    """(tokens of a data set to train on, heavy libraries that this rank has imported for them)."""
    import sys

    import corpus
    import process_group as pg
    import train

    before = set(sys.modules)
    args = train.parse_args(argv.split())
    device = pg.init_processes("cpu")
    tokens, _ = corpus.load_tokens(args, pg.Mesh(dp=pg.dist.get_world_size()).world, device)
    heavy = {"datasets", "transformers", "pyarrow"} & (set(sys.modules) - before)
    return np.array(tokens), heavy


def data_of(argv, tokens, validation=None):
    """The batches of a run that trains on these tokens, and holds out those."""
    import process_group as pg
    import train

    if pg.dist.is_initialized():
        pg.finish()
    with patch.object(train, "load_tokens", lambda *_: (tokens, validation)):
        return build(argv + " --num_hidden_layers 1").data


def batches_of(argv, tokens, steps, validation=None):
    """[windows of step, [batch, seq + 1]], held-out windows, and how many are for training."""
    data = data_of(argv, tokens, validation)

    def windows(micro_batches):
        found = []
        for inputs, targets, positions in micro_batches:
            assert torch.equal(positions, torch.arange(inputs.shape[1]))
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            found.append(torch.cat([inputs, targets[:, -1:]], dim=1).numpy())
        assert len({len(part) for part in found}) == 1
        return np.concatenate(found)

    train_windows = [windows(data.micro_batches(step)) for step in steps]
    return train_windows, windows(data.evaluation()), data.order.count


def byte_tokenizer_round_trip(text):
    import corpus

    tokenizer = corpus.byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, tokenizer.decode(ids), tokenizer.eos_token_id, len(tokenizer)


def forgotten_loader(argv, tokens):
    """Processes that are still there after a loader in the middle of an epoch was let go."""
    import multiprocessing

    data = data_of(argv, tokens)
    list(data.micro_batches(0))
    started = len(multiprocessing.active_children())
    list(data.micro_batches(7))
    del data
    return started, len(multiprocessing.active_children())


def loads_and_passes(argv, steps):
    """What happens in some steps, in order: a new loader, a micro-batch loaded, a forward pass."""
    import train

    state, events = build(argv), []

    def watched(function, name):
        def wrapper(*args):
            events.append(name)
            return function(*args)

        return wrapper

    state.data.load = watched(state.data.load, "new loader")
    state.data.split = watched(state.data.split, "load")
    state.model.register_forward_pre_hook(lambda model, inputs: events.append("forward"))
    for _ in range(steps):
        train.train_step(state)
    return events


def left_and_read_again(argv, tokens):
    """Tokens of step 1, read whole after step 0, and after a first micro-batch was taken."""

    def fresh():
        data = data_of(argv, tokens)
        list(data.micro_batches(0))
        return data

    data = fresh()
    next(data.micro_batches(1))
    again = [inputs for inputs, _, _ in data.micro_batches(1)]
    whole = [inputs for inputs, _, _ in fresh().micro_batches(1)]
    return torch.cat(whole).numpy(), torch.cat(again).numpy()


def evaluated(argv):
    """(held-out loss, weights, config, all tokens and targets that it is the mean over)."""
    import train

    state = build(argv)
    tokens, targets, _ = zip(*state.data.evaluation(), strict=True)
    weights = {p.global_name: p.detach().numpy() for p in state.model.parameters()}
    both = torch.cat(tokens).numpy(), torch.cat(targets).numpy()
    return train.evaluate(state), weights, state.args.config, *both


def held_out_loss_of_ruined(argv):
    """What is said of the held-out loss when a weight is no number."""
    import errors
    import train

    state = build(argv)
    with torch.no_grad():
        for parameter in state.parameters:
            parameter.fill_(float("nan"))
    try:
        return f"a loss of {train.evaluate(state)}"
    except errors.UserError as error:
        return str(error)


def bytes_kept_to_evaluate(argv, counts):
    """The most that autograd keeps at a time while so many micro-batches are looked at."""
    import weakref

    import train

    class Kept:
        def __init__(self, x):
            self.x = x.detach()  # x may be what the operator made: a circle, until it is collected
            now[0] += x.nbytes
            most[-1] = max(most[-1], now[0])
            weakref.finalize(self, let_go, x.nbytes)

    def let_go(nbytes):
        now[0] -= nbytes

    state, now, most = build(argv), [0], []
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        for count in counts:
            most.append(0)
            micro_batches = itertools.islice(state.data.evaluation(), count)
            train.mean_loss(state, micro_batches, 1, backward=False)
    return most


def preset_sizes():
    """{name: number of parameters} of all presets."""
    from model import Llama
    from presets import PRESETS, preset

    sizes = {}
    for name in PRESETS:
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in Llama(preset(name)).parameters())
    return sizes


def local_batches_of(argv, tokens, step):
    """[(tokens, targets, positions)] that this rank reads in a step, and its held-out tokens."""
    data = data_of(argv, tokens)
    micro_batches = [tuple(t.numpy() for t in batch) for batch in data.micro_batches(step)]
    return micro_batches, [batch[0].numpy() for batch in data.evaluation()]


# --- what is sent ---------------------------------------------------------------------------------


def ledger_of(argv):
    """What a training step sent and what the formulas say, {(axis, collective): (calls, bytes)}."""
    import ledger
    import train

    state = build(argv)
    with ledger.recorded() as counted:
        train.train_step(state)
    predicted = {}
    for axis, collective, calls, size in train.predicted_traffic(state):
        so_far = predicted.get((axis, collective), (0, 0))
        predicted[axis, collective] = so_far[0] + calls, so_far[1] + calls * size
    return {key: tuple(entry) for key, entry in counted.items()}, predicted


def calls_each_way(argv):
    """{(axis, collective): calls} of one micro-batch, forward and backward."""
    import ledger

    state = build(argv)
    batch = next(state.data.micro_batches(0))
    with ledger.recorded() as forward:
        loss = state.model(*batch)
    with ledger.recorded() as backward:
        loss.backward()
    return [{key: calls for key, (calls, _) in way.items()} for way in (forward, backward)]


class Largest(TorchDispatchMode):
    """Records the shape of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.shape = torch.Size([0])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self.shape.numel():
                self.shape = leaf.shape
        return out


def largest_tensor(argv):
    """Shape of the largest tensor of a forward and backward pass."""
    state = build(argv)
    batch = next(state.data.micro_batches(0))
    with Largest() as largest:
        state.model(*batch).backward()
    return tuple(largest.shape)


class Products(TorchDispatchMode):
    """Appends to a list the name of each matrix product and attention kernel."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "attention" in name:
            self.events.append("block")
        elif ".mm." in name or ".bmm." in name or ".addmm." in name:
            self.events.append("product")
        return function(*args, **(kwargs or {}))


def order_of_events(argv, backward=True):
    """Products, attention blocks, collectives begun without waiting, and waits, in order."""
    import process_group as pg
    import train

    state = build(argv)
    events = []

    class Handle:
        def __init__(self, name, handle):
            self.name, self.handle = name, handle

        def wait(self):
            events.append(f"{self.name} is waited for")
            self.handle.wait()

    def watch(name):
        real = getattr(pg, name)

        def watched(*args, **options):
            result = real(*args, **options)
            if name == "exchange":
                events.append("exchange begins")
                return [Handle(name, handle) for handle in result]
            if not options.get("async_op"):
                return result
            events.append(f"{name} begins")
            if isinstance(result, tuple):
                return result[0], Handle(name, result[1])
            return Handle(name, result)

        return patch.object(pg, name, watched)

    with watch("all_reduce"), watch("all_gather"), watch("reduce_scatter"), watch("exchange"):
        with Products(events):
            if backward:
                train.forward_backward(state)
            else:
                state.model(*next(state.data.micro_batches(0)))
    return events


# --- blocks of attention --------------------------------------------------------------------------


def plain_attention(q, k, v, mask):
    """float64 attention with a boolean mask [queries, keys]; heads of k and v serve groups."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def blocks_error(dtype, heads, kv_heads, seq, device="cpu", kernel=None):
    """Attention to earlier keys and to one's own, as two merged blocks, against plain float64.

    Returns ({name: relative error of the output and of each gradient}, {kernel names}). kernel:
    name of a class of attention_blocks, if not the one that the dtype is given.
    """
    import contextlib

    from torch.profiler import profile

    import attention_blocks
    from context_parallel import merge

    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    shapes = [(2, heads, seq, 16)] + 4 * [(2, kv_heads, seq, 16)]
    q, *blocks = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    grad_out = torch.randn_like(q)
    known = [x.double().requires_grad_() for x in (q, *blocks)]
    mask = torch.ones(seq, 2 * seq, dtype=torch.bool, device=device).tril(seq)
    keys, values = (torch.cat([known[i], known[i + 2]], dim=2) for i in (1, 2))
    expected = plain_attention(known[0], keys, values, mask)
    expected.backward(grad_out.double())

    chosen = contextlib.nullcontext()
    if kernel:
        found = getattr(attention_blocks, kernel)
        chosen = patch.object(attention_blocks, "kernel_for", lambda q: found)
    with chosen, profile() as profiled:
        out, log_sum = attention_blocks.forward_block(q, *blocks[:2], False)
        out = out.to(torch.promote_types(dtype, torch.float32))
        log_sum = log_sum.contiguous()
        merge(out, log_sum, *attention_blocks.forward_block(q, *blocks[2:], True))
        merged = out.to(dtype), log_sum
        early = attention_blocks.backward_block(grad_out, q, *blocks[:2], *merged, False)
        own = attention_blocks.backward_block(grad_out, q, *blocks[2:], *merged, True)
    assert log_sum.dtype == out.dtype
    results = [out, early[0].to(out.dtype) + own[0].to(out.dtype), *early[1:], *own[1:]]
    names = ["out", "q", "k before", "v before", "k", "v"]
    errors = {}
    for name, result, exact in zip(
        names, results, [expected, *(x.grad for x in known)], strict=True
    ):
        assert result.shape == exact.shape, name
        errors[name] = ((result.double() - exact).norm() / exact.norm()).item()
    kernels = {event.key for event in profiled.key_averages() if "attention" in event.key}
    return errors, kernels


def reduction_dtypes(argv):
    """{axis: dtypes that were summed over it in a step}, activations apart, and the state's."""
    import process_group as pg
    import train

    state, seen = build(argv), {}
    real = {name: getattr(pg, name) for name in ("all_reduce", "reduce_scatter")}

    def watched(name):
        def call(x, group, *args, **options):
            if group.axis != "tp" or x.dim() < 3:
                seen.setdefault(group.axis, set()).add(str(x.dtype))
            return real[name](x, group, *args, **options)

        return call

    with patch.multiple(pg, **{name: watched(name) for name in real}):
        train.train_step(state)
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    seen["weights"] = {str(p.dtype) for p in state.parameters}
    seen["gradients"] = {str(p.grad.dtype) for p in state.parameters}
    seen["optimizer"] = {str(moment.dtype) for moment in moments if moment.dim()}
    return seen


# --- layouts --------------------------------------------------------------------------------------


def shapes_of(argv):
    """{name: shape of what this rank holds}."""
    return {p.global_name: tuple(p.shape) for p in build(argv).model.parameters()}


def module_kinds(argv):
    return {type(module).__name__ for module in build(argv).model.modules()}


def refusal(argv, started, script="train"):
    """What parse_args says of a wrong call in a job of so many processes."""
    import errors

    with patch.dict("os.environ", WORLD_SIZE=str(started), LOCAL_WORLD_SIZE=str(started)):
        try:
            importlib.import_module(script).parse_args(argv.split())
        except errors.UserError as error:
            return str(error)
    raise AssertionError(f"{argv} was taken for a good call")


def refusals_of_setup(argvs):
    """What each of several wrong calls is told, in order, before it trains."""
    import errors

    said = []
    for argv in argvs:
        try:
            build(argv)
        except errors.UserError as error:
            said.append(str(error))
        else:
            said.append("nothing")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return said


def attended_pairs(seq, cp):
    """For each rank of a ring, how often it attends from a query to a key: [seq, seq]."""
    from types import SimpleNamespace

    from context_parallel import attending, zigzag_positions

    positions = [
        zigzag_positions(seq, SimpleNamespace(size=cp, rank=rank)).numpy() for rank in range(cp)
    ]
    found = []
    for rank in range(cp):
        pairs = np.zeros((seq, seq))
        for source in range(cp):
            rows, columns, causal = attending(rank, source, seq // cp // 2)
            queries, keys = positions[rank][rows], positions[source][columns]
            block = np.ones((len(queries), len(keys)))
            pairs[np.ix_(queries, keys)] += np.tril(block) if causal else block
        found.append(pairs)
    return found


def plain_rows(queries, keys):
    """(most rows at a time, all rows in order) of the plain kernel."""
    from attention_blocks import Plain

    q, k = torch.zeros(1, 1, queries, 4), torch.zeros(1, 1, keys, 4)
    rows = [range(queries)[part] for part in Plain.row_slices(q, k)]
    return max(map(len, rows)), [row for part in rows for row in part]


def trained_and_evaluated(argv):
    """Losses of two steps and held-out losses around them."""
    import train

    state = build(argv)
    losses = [train.evaluate(state)]
    for _ in range(2):
        losses += [train.train_step(state)["loss"], train.evaluate(state)]
    return losses


def tags_of_a_tensor(argv):
    """What parameters carry under a name that every tensor has."""
    tags = {name for parameter in build(argv).model.parameters() for name in vars(parameter)}
    return [name for name in tags if hasattr(torch.Tensor, name)]


def buckets_of(argv, size):
    """[(name, bytes) of each parameter] of the buckets of a given size."""
    from data_parallel import Bucketed

    with patch.object(Bucketed, "bucket_bytes", size):
        state = build(argv + "--dp_size 2")
    return [
        [(parameter.global_name, parameter.nbytes) for parameter in bucket.parameters]
        for bucket in state.engine.buckets
    ]


def reductions_during_backward(argv):
    """For each reduction of a step, in order: how many gradients of its pass were still to come."""
    import data_parallel
    import train
    from zero import ENGINES

    engine = ENGINES[train.parse_args(argv.split()).dp_engine]
    arrived, arrivals = [0], []
    on_gradient, reduce = engine.on_gradient, engine.reduce

    def count(self, bucket, parameter):
        arrived[0] += 1
        on_gradient(self, bucket, parameter)

    def note(self, bucket):
        arrivals.append(arrived[0])
        return reduce(self, bucket)

    # The hooks hold the engine's bound method, so the engine is spoiled before it is built.
    with patch.object(data_parallel.Bucketed, "bucket_bytes", 300_000):
        with patch.object(engine, "on_gradient", count), patch.object(engine, "reduce", note):
            state = build(argv)
            train.forward_backward(state)
    return [-seen % len(list(state.model.parameters())) for seen in arrivals]


def gathers_of_a_step(argv):
    """[(what is gathered, the layer whose turn it is)] of a step of zero3; layers by number."""
    import train
    import zero

    state = build(argv)
    layers = state.engine.buckets[: len(state.model.model.layers)]
    numbers = {id(bucket): i for i, bucket in enumerate(layers)}
    gather, fetch = zero.Zero3.gather, zero.Zero3.fetch
    found, turn = [], [None]

    def noted(self, bucket):
        found.append((numbers.get(id(bucket), "outside"), turn[0]))
        return gather(self, bucket)

    def fetched(self, *buckets, ahead):
        turn[0] = numbers.get(id(buckets[0]))
        fetch(self, *buckets, ahead=ahead)

    with patch.object(zero.Zero3, "gather", noted), patch.object(zero.Zero3, "fetch", fetched):
        train.forward_backward(state)
    return found


def bytes_of_the_embedding_at_the_loss(argv):
    """Of its storage, when the loss is computed in a step."""
    import train

    state, sizes = build(argv), []
    weight, loss = state.model.model.embed_tokens.weight, state.model.cross_entropy

    def cross_entropy(logits, targets):
        sizes.append(weight.untyped_storage().nbytes())
        return loss(logits, targets)

    state.model.cross_entropy = cross_entropy
    train.forward_backward(state)
    (size,) = sizes
    return size


def owned_bytes(argv, bucket_bytes=25 * 2**20):
    """Bytes of weights, gradients and moments that this rank holds after a step; and the most of
    gradients, with what is being sent and received, at any time at which the engine waits.
    """
    import train
    from data_parallel import Bucketed
    from zero import Zero1

    with patch.object(Bucketed, "bucket_bytes", bucket_bytes):
        state = build(argv)
    engine, most = state.engine, []
    wait = "finish_oldest" if isinstance(engine, Bucketed) else "finish_gradients"
    every = [*state.model.parameters(), *state.parameters]

    def storages(tensors):
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(size for address, size in found.items() if address)

    def gradients():
        passing = [tensor for entry in getattr(engine, "running", ()) for tensor in entry[1:3]]
        tensors = [*passing, *(p.grad for p in every)]
        return storages(tensor for tensor in tensors if tensor is not None)

    finish = getattr(type(engine), wait)

    def watched(engine):
        most.append(gradients())
        finish(engine)

    with (
        patch.object(type(engine), wait, watched),
        patch.object(Zero1, "most_bytes", bucket_bytes),
    ):
        train.train_step(state)
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    return {
        "parameters": sum(p.full_shape.numel() for p in state.model.parameters()),
        "weights": storages(every),
        "gradients": gradients(),
        "moments": sum(moment.nbytes for moment in moments if moment.dim()),
        "most gradients": max(most),
    }


def owned_bytes_alone(argv, rank, size):
    """`owned_bytes` of a rank whose other ranks are not there."""
    from one_rank import one_rank

    with one_rank(rank, size):
        return owned_bytes(argv)


def allocated_bytes(argv):
    """Of this rank's GPU: (allocated after a step, most during it, weights of the model)."""
    import kernel_times

    import process_group
    import train

    first = build(argv)  # allocates what libraries keep for ever, too
    train.train_step(first)
    kernel_times.free(first)
    before = torch.cuda.memory_allocated()
    with patch.object(process_group, "init_processes", lambda device_type: first.device):
        state = build(argv)
    train.train_step(state)
    torch.cuda.reset_peak_memory_stats()
    train.train_step(state)  # now the moments are there, too
    found = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    count = sum(p.full_shape.numel() for p in state.model.parameters())
    return *(size - before for size in found), count


def segments_that_grow():
    """Whether those in which PyTorch has this rank's CUDA memory can."""
    import process_group

    device = process_group.init_processes("cuda")
    kept = torch.zeros(2**24, device=device)
    found = {segment["is_expandable"] for segment in torch.cuda.memory_snapshot()}
    del kept
    return found


def kernels_of(argv):
    """Of the third step on this rank: `kernel_times.times`, and for each message its share in time
    that other kernels hide.
    """
    import kernel_times as kt

    import train

    state = build(argv)
    train.train_step(state)
    train.train_step(state)
    kernels = kt.profiled(lambda: train.train_step(state))
    messages = [kernel for kernel in kernels if kt.kind_of(kernel) == "communication"]
    others = [kernel for kernel in kernels if kt.kind_of(kernel) != "communication"]

    def hidden(message):
        return 1 - (kt.covered([*others, message]) - kt.covered(others)) / message["dur"]

    return kt.times(kernels), [hidden(message) for message in messages]


def printed_kernel_times(argv, kernels):
    """What `kernel_times.py argv` prints of training on a CPU, with these kernels for a GPU's."""
    import contextlib
    import io

    import kernel_times

    def profiled(step):
        step()
        return kernels

    text = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(kernel_times, "machine", lambda: "a machine"))
        stack.enter_context(patch.object(kernel_times, "profiled", profiled))
        stack.enter_context(patch.object(kernel_times, "reserved_gib", lambda: 3.0))
        stack.enter_context(contextlib.redirect_stdout(text))
        kernel_times.report(*kernel_times.parse(argv.split()))
    return text.getvalue()


# --- pipelines ------------------------------------------------------------------------------------


def dealt_layers(argv, stages):
    """What deal_layers says, and {layers a stage: largest cost} of every way to cut."""
    import itertools

    import train
    from pipeline_parallel import deal_layers

    config = train.parse_args(argv.split()).config
    dealt = [list(part) for part in deal_layers(config, stages)]
    layer = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128
    largest = {}
    for cuts in itertools.combinations(range(1, config.num_hidden_layers), stages - 1):
        bounds = zip((0, *cuts), (*cuts, config.num_hidden_layers), strict=True)
        parts = [stop - start for start, stop in bounds]
        costs = [part * layer for part in parts]
        costs[0] += 128 * config.vocab_size
        costs[-1] += 128 * config.vocab_size
        largest[tuple(parts)] = max(costs)
    return dealt, largest


def schedule_of(argv):
    """(passes of a step in order, most micro-batches alive, exchanges that send and receive)."""
    import process_group as pg
    import train

    state = build(argv)
    stage, events, alive, together = state.stage, [], [0], [0]
    forward, backward, exchange = stage.forward, stage.backward, pg.exchange

    def went(name, real):
        def call(*args):
            events.append(name)
            alive[0] = max(alive[0], len(stage.alive) + (name == "f"))
            return real(*args)

        return call

    def exchanged(group, send=(), receive=()):
        together[0] += bool(send and receive)
        return exchange(group, send, receive)

    with patch.object(pg, "exchange", exchanged):
        with patch.multiple(stage, forward=went("f", forward), backward=went("b", backward)):
            train.forward_backward(state)
    return events, alive[0], together[0]


def outputs_alive(argv):
    """The most outputs of the stage that were in memory when it computed the next one."""
    import weakref

    import train

    state, made, most = build(argv), [], [0]

    def forward(*inputs, original=state.model.forward):
        most[0] = max(most[0], sum(output() is not None for output in made))
        out = original(*inputs)
        made.append(weakref.ref(out))
        return out

    with patch.object(state.model, "forward", forward):
        train.forward_backward(state)
    return most[0]


class Sleep(torch.autograd.Function):
    """Sleeps forward, and twice as long backward."""

    @staticmethod
    def forward(ctx, x, seconds):
        import time

        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        import time

        time.sleep(2 * ctx.seconds)
        return grad, None


def bubble(argv, seconds):
    """The share of a step in which this stage is idle, if layers take a time that is known.

    A stage's layers sleep so long for a micro-batch forward, its chunks a part of that each.
    """
    import time

    import process_group as pg

    state = build(argv)
    chunks = getattr(state.stage, "stages", [state.stage])
    weight = torch.ones((), requires_grad=True)

    def sleepy(chunk, x, targets, positions):
        x = torch.zeros(chunk.shape) if chunk is chunks[0] and chunk.group.is_first else x
        out = Sleep.apply(x * weight, seconds / len(chunks))
        return out.sum() if chunk.after is None else out

    for chunk in chunks:
        chunk.model.forward = functools.partial(sleepy, chunk)
    micro_batches, shares = list(state.data.micro_batches(0)), []
    for _ in range(3):  # the best one: another process may take the core
        pg.dist.barrier()
        begun = time.perf_counter()
        state.stage.run(micro_batches, 1, True)
        pg.dist.barrier()
        shares.append(1 - len(micro_batches) * 3 * seconds / (time.perf_counter() - begun))
    return min(shares)


def interleaved_plans(cases):
    """For each (ranks, chunks, micro-batches): ticks, each a list of what the ranks do in it."""
    import interleaved

    def plain(tick):
        return [one and tuple(one) for one in tick]

    return [[plain(tick) for tick in interleaved.plan(*case)] for case in cases]


def timeline_of(argv, steps):
    import train

    state = build(argv)
    for _ in range(steps):
        train.train_step(state)
    state.stage.timeline.write(state.mesh.world)
