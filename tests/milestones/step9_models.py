"""What the checks of step 9's milestones run on ranks: models, text, chunks and casts."""

import contextlib
import itertools
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


# --- 3. layers by cost, in chunks -----------------------------------------------------------------


def dealt():
    from pipeline_parallel import deal_layers
    from presets import preset

    config, layer = preset("debug"), 2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128
    for layers, vocabulary, stages in ((8, 256, 3), (9, 5000, 4), (6, 5000, 2)):
        config.num_hidden_layers, config.vocab_size = layers, vocabulary
        table, best = 128 * vocabulary, None
        for cuts in itertools.combinations(range(1, layers), stages - 1):
            bounds = itertools.pairwise((0, *cuts, layers))
            costs = [(stop - start) * layer for start, stop in bounds]
            costs[0], costs[-1] = costs[0] + table, costs[-1] + table
            best = min(best or max(costs), max(costs))
        parts = deal_layers(config, stages)
        held = [i for part in parts for i in part]
        assert held == [*range(layers)], f"the stages hold {held}; each layer once, in order"
        costs = [len(part) * layer for part in parts]
        costs[0], costs[-1] = costs[0] + table, costs[-1] + table
        assert max(costs) == best, (
            f"{layers} layers, {vocabulary} symbols, {stages} stages: the largest cost of "
            f"{[len(part) for part in parts]} is {max(costs):,} weights; {best:,} is possible"
        )


def chunked():
    """Which layers and chunks a rank holds, and that no bucket mixes chunks."""
    import process_group as pg
    from data_parallel import Bucketed

    size = world_group().size
    mesh = pg.Mesh(pp=size)
    model = tiny(pp=mesh.group("pp"), chunks=2, num_hidden_layers=2 * size)
    layers = [int(name.split(".")[2]) for name, _ in model.named_parameters() if ".layers." in name]
    numbers = {
        p.global_name: p.chunk_number for p in model.parameters() if "layers" in p.global_name
    }
    held = sorted({(int(name.split(".")[2]), chunk) for name, chunk in numbers.items()})
    due = [(mesh.rank, 0), (mesh.rank + size, 1)]
    assert held == due, f"rank {mesh.rank} holds (layer, chunk) {held}; it should be {due}"
    assert len({*layers}) == 2
    for bucket in Bucketed(model, mesh.group("dp")).buckets:
        chunks = {getattr(p, "chunk_number", None) for p in bucket.parameters}
        assert len(chunks) == 1, f"a bucket has weights of the chunks {chunks}; one each, please"


# --- 4., 5. the plan, and to follow it ------------------------------------------------------------


def plans():
    from interleaved import plan

    for ranks, chunks, count in ((2, 2, 2), (2, 3, 4), (3, 2, 6), (4, 2, 8)):
        ticks, done = plan(ranks, chunks, count), {}
        for number, tick in enumerate(ticks):
            for rank, one in enumerate(tick):
                if one is None:
                    continue
                assert one.stage % ranks == rank, f"rank {rank} does {one}, which is another one's"
                before = one._replace(stage=one.stage + (1 if one.kind == "backward" else -1))
                if before.stage == ranks * chunks:
                    before = one._replace(kind="forward")
                ready = before.stage < 0 or done.get(before, number) < number
                assert ready, f"{one} is done in tick {number}, before {before} is there"
                assert one not in done, f"{one} is done twice"
                done[one] = number
        passes, due = len(done), 2 * ranks * chunks * count
        assert passes == due, f"{passes} passes are in the plan; there are {due}"
        least = 2 * (chunks * count + ranks - 1)
        assert len(ticks) == least, (
            f"p {ranks}, c {chunks}, m {count}: {len(ticks)} ticks; {least} are enough. Compare "
            "the order of a rank's passes, and how far it runs ahead"
        )
        first = [next(t[rank] for t in ticks if t[rank]) for rank in range(ranks)]
        assert all(one.micro_batch == 0 and one.kind == "forward" for one in first)


def interleaved(rounds):
    """Gradients of chunks on all ranks, beside those of the whole model."""
    import torch

    import process_group as pg
    from data_parallel import Naive
    from interleaved import build_stage

    size = world_group().size
    group, count = pg.Mesh(pp=size).group("pp"), size * rounds
    whole = tiny(num_hidden_layers=2 * size)
    parts = batches(count)
    expected = sum(whole(*part) / 1000 for part in parts)
    expected.backward()
    model = tiny(pp=group, chunks=2, num_hidden_layers=2 * size)
    args = SimpleNamespace(
        pp_chunks=2, pp_engine="interleaved", gradient_accumulation_steps=count, timeline=None,
        micro_batch_size=2, seq_len=16, cp_size=1, tp_size=1, sequence_parallel=False,
        config=model.model.config,
    )  # fmt: skip
    stage = build_stage(args, model, group, Naive(model, group), torch.device("cpu"))
    total = stage.run(iter(parts), 1000, True)
    if group.is_last:
        same(total, expected.detach(), "the loss", "the sum of the micro-batches' losses / 1000")
    weights = dict(whole.named_parameters())
    hint = "that of the whole model: each micro-batch once, through all chunks in order"
    for parameter in model.parameters():
        due = weights[parameter.global_name].grad
        same(parameter.grad, due, f"the gradient of {parameter.global_name}", hint)
    total = stage.run(iter(parts), 1000, False)
    if group.is_last:
        same(total, expected.detach(), "the loss of an evaluation", "that of training")
    alive = [len(stage.alive) for stage in stage.stages]
    assert not any(alive), f"after an evaluation {alive} micro-batches are still kept"


# --- 6. one cast ----------------------------------------------------------------------------------


def shared():
    import torch

    from casts import shared_casts

    told, found = [], []
    engine = SimpleNamespace(on_gradient=lambda weight: told.append(weight.global_name))
    args = SimpleNamespace(
        activation_checkpointing=False, recompute_elementwise=False, gradient_accumulation_steps=3
    )
    world_group()
    for inside in (contextlib.nullcontext(), None):
        model = tiny("bfloat16", tie_word_embeddings=False)
        with inside or shared_casts(model, engine, args):
            losses = [model(*part) for part in batches(3)]
            if inside is None:
                casts = {n: p.cast for n, p in model.named_parameters() if hasattr(p, "cast")}
            for loss in losses:
                loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    matrices = {n for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n}
    assert casts.keys() == matrices, f"casts of {casts.keys() ^ matrices} are missing or too many"
    assert all(cast.is_leaf and cast.dtype == torch.bfloat16 for cast in casts.values())
    for name, expected in found[0].items():
        same(found[1][name], expected, f"the gradient of {name}", "the same bits as without", 0)
        assert found[1][name].dtype == torch.float32, f"the gradient of {name} is not float32"
    count = {told.count(name) for name in matrices}
    assert count == {3}, (
        f"the engine is told of a weight's gradient {count} times; 3 passes have one"
    )
    left = [name for name, p in model.named_parameters() if hasattr(p, "cast")]
    assert not left, f"{len(left)} casts are still there after the step, as that of {left[0]}"


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
            same(parameter, expected, parameter.global_name, hint)
        tokens, _, positions = batches(1)[0]
        ours = state.model.lm_head(state.model.model(tokens, positions))
        if state.mesh.world.is_first:
            from transformers import AutoModelForCausalLM

            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
            theirs = theirs(tokens).logits[..., state.model.lm_head.weight.held[0]]
            # They compute rotations in float32.
            same(theirs, ours, "the logits of transformers", "ours", tolerance=1e-5)
    config = state.model.model.config
    for layers, words in ((1, "not a Llama"), (3, "is missing there")):
        config.num_hidden_layers = layers
        refused(lambda: huggingface.stored_slices(folder, config), words)
    left = [path.name for path in Path(folder).parent.iterdir()]
    assert left == [Path(folder).name], f"what was written aside is left: {left}"


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
            refused(fail, f"--save_hf {folder}")
        place = aside.hidden(folder)
        left = sorted(path.name for path in place.iterdir()) if place.exists() else []
        assert left == kept, f"after the error {code} there is {left} aside; it should be {kept}"


# --- 14. text -------------------------------------------------------------------------------------


def text():
    import torch

    import generate
    import process_group as pg

    group = world_group()
    if group.size > 1:
        group = pg.Mesh(tp=group.size).group("tp")
    model, prompt = tiny(tp=group), [5, 60, 3, 3, 17]
    for parameter in model.parameters():
        parameter.data *= 3  # so that the likeliest symbol is no tie
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(SAMPLING["max_new_tokens"]):
            positions = torch.arange(len(tokens))
            logits = generate.next_logits(model, group, torch.tensor([tokens]), positions)
            tokens.append(int(logits.argmax()))
    expected = tokens[len(prompt) :]
    found = generate.generate(model, group, prompt, SimpleNamespace(**SAMPLING), [])
    assert found == expected, (
        f"with the cache the symbols are {found}; without, reading the whole text for each, "
        f"{expected}: perhaps positions begin anew, or a key is kept in a wrong place"
    )
    end = expected[4]
    found = generate.generate(model, group, prompt, SimpleNamespace(**SAMPLING), [end])
    assert found == expected[: expected.index(end) + 1], "nothing should follow an end symbol"
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
        assert apart < 0.03, f"temperature, top_k, top_p {case}: {found}, not {expected}"
