"""What the checks of step 9's milestones run on ranks: models, text and casts."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

from same import same
from step9_runs import begun, refused, world_group

TINY = {
    **{"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 64},
}
SAMPLING = {"temperature": 0, "top_k": 0, "top_p": 1.0, "seed": 1, "max_new_tokens": 12}


def tiny(dtype="float64", tp=None, chunks=None, pp=None, **changes):
    """A small model, whole or this rank's part of it, with the weights of seed 3."""
    import torch

    from model import Llama, materialize
    from pipeline_parallel import apply_pipeline_parallel
    from presets import preset
    from tensor_parallel import apply_tensor_parallel

    config = preset("debug")
    vars(config).update(TINY | changes)
    with torch.device("meta"):
        model = Llama(config, getattr(torch, dtype))
    if tp:
        apply_tensor_parallel(model, tp)
    if pp:
        apply_pipeline_parallel(model, pp, chunks)
    materialize(model, 3, torch.device("cpu"))
    return model


def batches(count, size=2, length=16):
    """Micro-batches of tokens, targets and positions, all different."""
    import torch

    text = torch.arange(count * size * (length + 1)).view(count, size, length + 1)
    text = (text * text + 7 * text) % 61
    return [(part[:, :-1], part[:, 1:], torch.arange(length)) for part in text]


# --- 6. one cast ----------------------------------------------------------------------------------


CASTS = SimpleNamespace(
    activation_checkpointing=False, recompute_elementwise=False, gradient_accumulation_steps=3
)


def with_casts(model, engine):
    """Three micro-batches under shared_casts: its casts, {name: cast}; all of them are used."""
    import torch

    from casts import shared_casts

    used = set()
    with shared_casts(model, engine, CASTS):
        casts = {name: p.cast for name, p in model.named_parameters() if hasattr(p, "cast")}
        for name, cast in casts.items():
            good = cast.is_leaf and cast.dtype == torch.bfloat16
            assert good, f"shared_casts: that of {name} should be a leaf in bfloat16"
            cast.register_hook(lambda grad, name=name: used.add(name))
        losses = [model(*part) for part in batches(3)]
        for loss in losses:
            loss.backward()
    unused = sorted(casts.keys() - used)
    if unused:
        owner = type(model.get_submodule(unused[0].removesuffix(".weight"))).__name__
        raise AssertionError(f"{owner}.forward uses no shared cast of {unused[0]}: see cast_of")
    return casts


def rows():
    """On two tp ranks: the row parallel matrices have casts, and use them."""
    import process_group as pg

    world = world_group()
    model = tiny("bfloat16", tp=pg.Mesh(tp=world.size).group("tp"), tie_word_embeddings=False)
    casts = with_casts(model, SimpleNamespace(on_gradient=lambda weight: None))
    due = {n for n, _ in model.named_parameters() if "o_proj" in n or "down_proj" in n}
    differ = casts.keys() ^ due
    assert not differ, f"shared_casts: on tp ranks casts of {differ} are missing or too many"


def shared():
    import torch

    told = []
    engine = SimpleNamespace(on_gradient=lambda weight: told.append(weight.global_name))
    world_group()
    plain, model = (tiny("bfloat16", tie_word_embeddings=False) for _ in range(2))
    for loss in [plain(*part) for part in batches(3)]:
        loss.backward()
    casts = with_casts(model, engine)
    found = [{name: p.grad for name, p in one.named_parameters()} for one in (plain, model)]
    matrices = {n for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n}
    differ = casts.keys() ^ matrices
    assert not differ, f"shared_casts: casts of {differ} are missing or too many"
    for name, expected in found[0].items():
        what = f"hand_over: the gradient of {name}"
        same(found[1][name], expected, what, "the same bits as without", 0)
        assert found[1][name].dtype == torch.float32, f"{what} is not float32"
    count = {told.count(name) for name in matrices}
    assert count == {3}, (
        f"hand_over: the engine is told of a weight's gradient {count} times; 3 passes have one"
    )
    left = [name for name, p in model.named_parameters() if hasattr(p, "cast")]
    assert not left, f"shared_casts: {len(left)} casts are there after it, as that of {left[0]}"


def switch():
    import torch._functorch.config as partitioner

    for wanted in (True, False):
        tiny(num_hidden_layers=1).compile_layers("aot_eager", wanted)
        found = not partitioner.ban_recompute_materialized_backward
        assert found == wanted, f"compile_layers(…, {wanted}) left the compiler's switch at {found}"


# --- 13. Hugging Face files -----------------------------------------------------------------------


def exported(folder):
    """On tp ranks: export a run, load it again, and compare it with that of `transformers`."""
    import torch

    import huggingface

    state = begun("--tp_size 2", checkpoint_dir=None, save_hf=str(folder))
    huggingface.save_hf(state, str(folder))
    before = [p.detach().clone() for p in state.model.parameters()]
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(torch.nan)
        huggingface.load_hf(state.model, str(folder))
        hint = "this rank's slice of what was exported"
        for parameter, expected in zip(state.model.parameters(), before, strict=True):
            same(parameter, expected, f"load_hf: {parameter.global_name}", hint)
        tokens, _, positions = batches(1)[0]
        ours = state.model.lm_head(state.model.model(tokens, positions))
        if state.mesh.world.is_first:
            from transformers import AutoModelForCausalLM

            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
            theirs = theirs(tokens).logits[..., state.model.lm_head.weight.held[0]]
            # They compute rotations in float32.
            what = "export: the logits of transformers"
            same(theirs, ours, what, "ours", tolerance=1e-5)
    config = state.model.model.config
    for layers, words in ((1, "not a Llama"), (3, "is missing there")):
        config.num_hidden_layers = layers
        refused("stored_slices", lambda: huggingface.stored_slices(folder, config), words)
    left = [path.name for path in Path(folder).parent.iterdir()]
    assert left == [Path(folder).name], f"give_name leaves what was written aside: {left}"


def failing_export(folder):
    """An export that fails leaves nothing, unless the disk refused and the parts are whole."""
    import aside

    for code, kept in ((None, []), (28, ["parts"])):
        for name in ("parts", "whole"):
            (aside.hidden(folder) / name).mkdir(parents=True)

        def fail(code=code):
            with aside.writing(folder, kept=["parts"]):
                raise OSError(code, "no room") if code else ValueError("else")

        with contextlib.suppress(ValueError):
            refused("writing", fail, f"--save_hf {folder}")
        place = aside.hidden(folder)
        left = sorted(path.name for path in place.iterdir()) if place.exists() else []
        assert left == kept, f"writing: after error {code} there is {left} aside, not {kept}"


# --- 14. text -------------------------------------------------------------------------------------


def text():
    import torch

    import generate
    import process_group as pg

    group = world_group()
    if group.size > 1:
        group = pg.Mesh(tp=group.size).group("tp")
    model, prompt = tiny(tp=group), [5, 60, 3, 3, 17]
    whole = tiny()
    for parameter in [*model.parameters(), *whole.parameters()]:
        parameter.data *= 3  # so that the likeliest symbol is no tie
    tokens = list(prompt)
    with torch.no_grad():
        read = torch.tensor([tokens]), torch.arange(len(tokens))
        found, due = generate.next_logits(model, group, *read), whole.lm_head(whole.model(*read))
        same(found, due[0, -1], "next_logits", "those of all symbols, on every rank", 1e-10)
        for _ in range(SAMPLING["max_new_tokens"]):
            positions = torch.arange(len(tokens))
            logits = generate.next_logits(model, group, torch.tensor([tokens]), positions)
            tokens.append(int(logits.argmax()))
    expected = tokens[len(prompt) :]
    found = generate.generate(model, group, prompt, SimpleNamespace(**SAMPLING), [])
    assert found == expected, (
        f"generate: with the Cache the symbols are {found}; without, reading the whole text for "
        f"each, {expected}: perhaps positions begin anew, or Cache keeps a key in a wrong place"
    )
    end = expected[4]
    found = generate.generate(model, group, prompt, SimpleNamespace(**SAMPLING), [end])
    assert found == expected[: expected.index(end) + 1], "generate: nothing follows an end"
    return expected


def draws():
    import torch

    from generate import sample

    logits = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    cases = {
        (1.0, 0, 1.0): [0.1, 0.2, 0.3, 0.4],
        (0.5, 0, 1.0): [1 / 30, 4 / 30, 9 / 30, 16 / 30],
        (1.0, 2, 1.0): [0, 0, 3 / 7, 4 / 7],
        (1.0, 0, 0.65): [0, 0, 3 / 7, 4 / 7],
        (1.0, 0, 0.35): [0, 0, 0, 1],
        (0, 0, 1.0): [0, 0, 0, 1],
    }
    for case, expected in cases.items():
        generator = torch.Generator().manual_seed(0)
        drawn = [sample(logits.clone(), *case, generator) for _ in range(4000)]
        found = [drawn.count(symbol) / len(drawn) for symbol in range(4)]
        apart = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        assert apart < 0.03, f"sample, (temperature, top_k, top_p) {case}: {found}, not {expected}"
