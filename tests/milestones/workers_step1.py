"""What the checks of step 1's milestones run: pieces of the model beside NumPy's, in float64."""

import functools
import hashlib
from types import SimpleNamespace

import numpy as np
import numpy_llama
from same import same

ROPE = {"rope_type": "default", "rope_theta": 100.0}
LLAMA3 = {**ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip


def config_of(**fields):
    """A model of two layers, so small that each number can be printed."""
    return SimpleNamespace(**{
        "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "vocab_size": 11,
        "tie_word_embeddings": False, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-5,
        "initializer_range": 0.02, **fields,
    })  # fmt: skip


def numbers(*shape, start=0.0):
    """A float64 tensor with another number in each place."""
    import torch

    size = int(np.prod(shape))
    return torch.linspace(start, start + 3, size, dtype=torch.float64).view(shape).cos()


def filled(module):
    """Give every weight of a module numbers of its own; {name: array} of them."""
    for place, (name, weight) in enumerate(module.named_parameters()):
        weight.data = numbers(*weight.shape, start=place) / 2
        if name.endswith("norm.weight"):
            weight.data += 2
    return {name: weight.detach().numpy() for name, weight in module.named_parameters()}


DERIVATIVE = "what NumPy computes from the derivative of the formula"


def array(x):
    import torch

    return torch.as_tensor(np.asarray(x))


def compare(module, names, inputs, grad, found, backward, what):
    """Compare output and gradients of a module with those that NumPy found."""
    x, *rest = inputs
    y = module(x, *rest)
    same(y, array(found), f"the output of {what}", "what NumPy computes from the formula")
    y.backward(grad)
    weights = dict(module.named_parameters())
    expected = dict(zip(["x", *names], backward, strict=True))
    same(x.grad, array(expected.pop("x")), f"the gradient of {what}'s input", DERIVATIVE)
    for name, due in expected.items():
        same(weights[name].grad, array(due), f"the gradient of {what}'s {name}", DERIVATIVE)


# --- 1. the loss and the positions ----------------------------------------------------------------


def loss():
    import torch

    from model import cross_entropy

    targets = torch.tensor([[0, 4, 2], [1, 1, 3]])
    logits = (3 * numbers(2, 3, 5)).requires_grad_()
    value, gradient = numpy_llama.negative_log_likelihood(logits.detach().numpy(), targets.numpy())
    found = cross_entropy(logits, targets)
    same(found, array(value), "cross_entropy", "the sum over all targets (6 here), not their mean")
    found.backward()
    same(logits.grad, array(gradient), "its gradient", "softmax minus target, for each target")
    half = cross_entropy(logits.to(torch.bfloat16), targets)
    assert half.dtype == torch.float32, (
        f"cross_entropy of bfloat16 logits is {half.dtype}; it must be computed in float32: a sum "
        "of many numbers loses too much in bfloat16"
    )


def positions():
    import torch

    from model import apply_rotary, inverse_frequencies, rotary_tables

    for rope in (ROPE, LLAMA3):
        config = config_of(rope_parameters=rope, head_dim=8)
        found, kind = inverse_frequencies(config, torch.device("cpu")), rope["rope_type"]
        due = array(numpy_llama.inverse_frequencies(config))
        same(found, due, f"inverse_frequencies with rope_type {kind}", "[head_dim / 2] in float64")
    at = np.array([0, 3, 100_000])
    tables = rotary_tables(torch.from_numpy(at), config, torch.float64)
    for name, found, due in zip(
        ("cosines", "sines"), tables, numpy_llama.rotary_tables(config, at), strict=True
    ):
        same(found, array(due), f"the {name} of rotary_tables", "[seq, 1, head_dim], from float64")
    x = numbers(2, 3, 4, 8)
    due = numpy_llama.rotate(x.numpy(), *(table.numpy() for table in tables))
    hint = "each pair (i, i + head_dim / 2) turned by its angle; its length stays"
    same(apply_rotary(x, *tables), array(due), "apply_rotary", hint)
    half = apply_rotary(x.to(torch.bfloat16), *(table.float() for table in tables))
    assert half.dtype == torch.bfloat16, f"apply_rotary of bfloat16 returns {half.dtype}"


# --- 2. a decoder layer ---------------------------------------------------------------------------


def layers_with_a_weight():
    import torch

    from model import Embedding, Linear, RMSNorm

    x, grad = numbers(2, 3, 6).requires_grad_(), numbers(2, 3, 5, start=1)
    linear = Linear(6, 5)
    weight = filled(linear)["weight"]
    due = numpy_llama.linear_backward(grad.numpy(), x.detach().numpy(), weight)
    value = numpy_llama.linear(x.detach().numpy(), weight)
    compare(linear, ["weight"], [x], grad, value, due, "Linear")
    linear.weight = torch.nn.Parameter(linear.weight.detach().float())
    y = linear(x.detach().to(torch.bfloat16))
    y.sum().backward()
    assert (y.dtype, linear.weight.grad.dtype) == (torch.bfloat16, torch.float32), (
        f"Linear: x in bfloat16 and a weight in float32 give an output in {y.dtype}, a gradient in "
        f"{linear.weight.grad.dtype}; cast the weight where it is used: weight.to(x.dtype)"
    )
    table = Embedding(7, 6)
    weight = filled(table)["weight"]
    tokens = torch.tensor([[0, 6, 6], [1, 2, 3]])
    same(table(tokens), array(weight[tokens]), "Embedding", "the rows that the tokens name")

    x, norm = numbers(2, 3, 6).requires_grad_(), RMSNorm(6, 1e-2)
    weight, grad = filled(norm)["weight"], numbers(2, 3, 6, start=1)
    arguments = x.detach().numpy(), weight, 1e-2
    due = numpy_llama.rms_norm_backward(grad.numpy(), *arguments)
    value = numpy_llama.rms_norm(*arguments)
    compare(norm, ["weight"], [x], grad, value, due, "RMSNorm")


def parts_of_a_layer():
    from model import MLP, Attention, DecoderLayer

    config = config_of()
    rotary = numpy_llama.rotary_tables(config, np.arange(3))
    tables = [array(table) for table in rotary]
    x, grad = numbers(2, 3, 16), numbers(2, 3, 16, start=1)

    layer = Attention(config)
    weights = filled(layer)
    names = [f"{name}_proj.weight" for name in "qkvo"]
    arguments = (x.numpy(), *(weights[name] for name in names), rotary)
    value = numpy_llama.self_attention(*arguments)
    due = numpy_llama.self_attention_backward(grad.numpy(), *arguments)
    own = x.clone().requires_grad_()
    compare(layer, names, [own, *tables], grad, value, due, "Attention")

    layer = MLP(config)
    weights = filled(layer)
    names = [f"{name}_proj.weight" for name in ("gate", "up", "down")]
    arguments = (x.numpy(), *(weights[name] for name in names))
    value, due = numpy_llama.mlp(*arguments), numpy_llama.mlp_backward(grad.numpy(), *arguments)
    compare(layer, names, [x.clone().requires_grad_()], grad, value, due, "MLP")

    layer = DecoderLayer(config)
    weights, names = filled(layer), numpy_llama.LAYER_NAMES
    arguments = (x.numpy(), [weights[name] for name in names], 1e-5, rotary)
    value = numpy_llama.block(*arguments)
    grad_x, grads = numpy_llama.block_backward(grad.numpy(), *arguments)
    own = x.clone().requires_grad_()
    compare(layer, names, [own, *tables], grad, value, [grad_x, *grads], "DecoderLayer")


# --- 3. the whole model ---------------------------------------------------------------------------


def model_and_batch(tied=False, checkpointing=False):
    """A Llama in float64 with weights, and tokens, targets and positions."""
    import torch

    from model import Llama

    model = Llama(config_of(tie_word_embeddings=tied), torch.float64, checkpointing)
    tokens = torch.tensor([[0, 10, 3, 2], [5, 5, 4, 9]])
    return model, filled(model), (tokens, tokens.roll(-1, 1), torch.arange(4))


def whole_model(tied, checkpointing, compiled):
    import torch

    model, weights, batch = model_and_batch(tied, checkpointing)
    kept = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]} if tied else weights
    value, due = numpy_llama.loss_and_gradients(
        kept, model.model.config, *(t.numpy() for t in batch)
    )
    if compiled:
        torch.compiler.reset()
        model.compile_layers("aot_eager")
    found = model(*batch)
    same(found, array(value), "the loss of Llama", "the sum over all targets")
    found.backward()
    for name, weight in model.named_parameters():
        same(weight.grad, array(due[name]), f"the gradient of {name}", DERIVATIVE)


def tags():
    model, weights, _ = model_and_batch()
    assert model.parameter_names == list(weights), "parameter_names: all names, in model order"
    count = sum(weight.size for weight in weights.values())
    assert model.parameter_count == count, f"parameter_count is not {count}"
    for name, weight in model.named_parameters():
        whole = tuple(slice(0, size) for size in weight.shape)
        assert weight.global_name == name, f"global_name of {name} is {weight.global_name}"
        assert weight.full_shape == weight.shape, f"full_shape of {name} is not its shape"
        assert weight.held == whole, f"held of {name} is {weight.held}; all of it is held: {whole}"
    rotary_tables_stay_exact()


def rotary_tables_stay_exact():
    """A model in bfloat16 gives its layers tables in float32."""
    import torch

    from model import Llama

    def look(_, inputs, named):
        seen.extend(str(x.dtype) for x in (*inputs, *named.values()))

    _, _, (tokens, _, positions) = model_and_batch()
    seen, half = [], Llama(config_of(), torch.bfloat16)
    half.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    half.model(tokens, positions)
    assert seen == ["torch.bfloat16", "torch.float32", "torch.float32"], (
        f"Decoder in bfloat16 gives a layer x, cos and sin in {seen}; rotary_tables must make the "
        "tables in float32: bfloat16 knows angles of many turns too badly"
    )


# --- 4. weights from a seed and a name ------------------------------------------------------------


def weights_of_a_name():
    import torch

    from model import initial_value

    one = initial_value("a", (300, 200), 42, 0.02)
    state = torch.get_rng_state()
    initial_value("b", (30, 20), 42, 0.02)
    assert torch.equal(state, torch.get_rng_state()), (
        "initial_value must draw from a generator of its own"
    )
    assert torch.equal(one, initial_value("a", (300, 200), 42, 0.02)), "the same seed and name"
    for name, seed in (("b", 42), ("a", 43)):
        other = initial_value(name, (300, 200), seed, 0.02)
        assert not torch.equal(one, other), (
            "initial_value: another name or seed must give other numbers"
        )
    assert one.dtype == torch.float32, f"initial_value is {one.dtype}; the slices are cast later"
    assert abs(one.std() / 0.02 - 1) < 0.02, f"initial_value has std {one.std()}; it should be 0.02"
    same(initial_value("a", (5,), 42, 0.02), torch.ones(5), "a norm's weight", "all ones")
    number = int.from_bytes(hashlib.sha256(b"42 a").digest()[:8], "little")
    due = torch.randn(300, 200, generator=torch.Generator().manual_seed(number)) * 0.02
    same(one, due, "initial_value", "drawn by a generator with the lesson's seed, sha256(b'42 a')")


def real_weights(tied):
    import torch

    from model import Llama, initial_value, materialize

    for dtype in (torch.float64, torch.bfloat16):
        with torch.device("meta"):
            model = Llama(config_of(tie_word_embeddings=tied), dtype)
        layer = model.model.layers[1].mlp.up_proj
        share = torch.nn.Parameter(layer.weight[3:7].detach())  # as later steps cut it
        share.__dict__.update(layer.weight.__dict__, held=(slice(3, 7), slice(0, 16)))
        layer.weight = share
        names = dict(model.named_parameters())
        materialize(model, 7, torch.device("cpu"))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied, (
            "materialize: a tied weight is one parameter in two modules, and must be made once"
        )
        wanted = torch.promote_types(dtype, torch.float32)
        for name, weight in model.named_parameters():
            assert weight.device.type == "cpu", f"{name} is still on {weight.device}"
            assert weight.dtype == wanted, f"{name} is {weight.dtype}; it should be {wanted}"
            kept = {"global_name", "full_shape", "held"} <= weight.__dict__.keys()
            assert kept, f"{name} has lost its tags global_name, full_shape and held"
            full = initial_value(name, names[name].full_shape, 7, 0.02)
            same(weight, full[weight.held], name, "the slice `held` of initial_value")


# --- 5. the optimizer -----------------------------------------------------------------------------


def optimizer():
    import torch

    from optimizer import build_optimizer, clip_gradients, gradient_norm

    model, weights, batch = model_and_batch()
    parameters = list(model.parameters())
    make = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95))
    args = SimpleNamespace(make_optimizer=make, learning_rate=1e-3, weight_decay=0.3)
    built = build_optimizer(parameters, args)
    groups = built.param_groups
    assert type(built) is torch.optim.AdamW and groups[0]["lr"] == 1e-3, (
        "build_optimizer: call args.make_optimizer with the groups, and --learning_rate as lr"
    )
    found = {(g["weight_decay"], p.dim()) for g in groups for p in g["params"]}
    assert found == {(0.3, 2), (0.0, 1)}, (
        f"build_optimizer has (decay, dims) {found}: matrices decay, vectors do not"
    )
    model(*batch).backward()
    gradients = {name: p.grad.clone().numpy() for name, p in model.named_parameters()}
    norm = gradient_norm(parameters, model.parameter_names)
    due = numpy_llama.gradient_norm(gradients)
    same(norm, array(due), "gradient_norm", "the root of the sum of all squares")
    assert norm.dtype == torch.float64, f"gradient_norm is {norm.dtype}; it is a float64 sum"
    sizes = torch.tensor([1e8] + [1.0] * (len(parameters) - 1), dtype=torch.float64)
    for p, size in zip(parameters, sizes, strict=True):
        p.grad = torch.zeros_like(p)
        p.grad.view(-1)[0] = size
    mixed = gradient_norm(parameters[::-1], model.parameter_names)
    assert mixed == sizes.square().sum().sqrt(), (
        "gradient_norm must add in the order of `names`, whatever that of the parameters"
    )
    for limit in (norm / 4, 2 * norm):
        for p in parameters:
            p.grad = array(gradients[p.global_name].copy())
        clip_gradients(parameters, float(limit), norm)
        due = numpy_llama.clip(gradients, float(limit))
        for p in parameters:
            what = f"clip_gradients to {limit / norm:.2g} times the norm: a gradient"
            same(p.grad, array(due[p.global_name]), what, "scaled by min(1, max_norm / norm)")
