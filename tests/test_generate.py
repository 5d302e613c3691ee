"""generate.py: the cache changes nothing, tp changes nothing, transformers says the same."""

import numpy as np
import pytest
import torch
import trainer_workers
import workers
from launch import launch, ranks_of
from test_huggingface import theirs

pytestmark = pytest.mark.steps(9)
PROMPT = [5, 250, 3, 3, 77, 256, 0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "hf"
    return path, theirs(path, initializer_range=0.2)  # so that the likeliest token is no tie


def test_the_likeliest_tokens_with_cache_without_and_by_transformers(step_dir, worlds, model):
    path, reference = model
    argv = f"--load_hf {path} --dtype float64 --temperature 0 --max_new_tokens 40 --tp_size "
    (cached,) = worlds(step_dir, 1).run(trainer_workers.generated, argv + "1", PROMPT)
    (plain,) = worlds(step_dir, 1).run(trainer_workers.generated, argv + "1", PROMPT, False)
    assert len(cached) == 40 and len(set(cached)) > 5
    assert cached == plain
    workers.upcast_in_float64(reference)
    with torch.no_grad():
        found = reference.generate(
            torch.tensor([PROMPT]), do_sample=False, max_new_tokens=40, min_new_tokens=40,
            eos_token_id=None,
        )  # fmt: skip
    assert found[0, len(PROMPT) :].tolist() == cached


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_ranks_draw_the_same(step_dir, worlds, model, size):
    argv = f"--load_hf {model[0]} --dtype float64 --max_new_tokens 30 --seed 3 --tp_size "
    (alone,) = worlds(step_dir, 1).run(trainer_workers.generated, argv + "1", PROMPT)
    found = worlds(step_dir, size).run(trainer_workers.generated, argv + f"{size}", PROMPT)
    assert found == [alone] * size


def test_nothing_follows_the_end_token(step_dir, worlds, model):
    """Unless the prompt is one, as an empty one is."""
    argv = f"--load_hf {model[0]} --dtype float64 --max_new_tokens 30 --seed {2**64}"
    run = worlds(step_dir, 1).run
    (tokens,) = run(trainer_workers.generated, argv, PROMPT)
    end, other = tokens[7], tokens[3]
    (found,) = run(trainer_workers.generated, argv, PROMPT, True, [end])
    assert found == tokens[: tokens.index(end) + 1]
    (found,) = run(trainer_workers.generated, argv, PROMPT, True, [end, other])
    assert found == tokens[: min(tokens.index(end), tokens.index(other)) + 1]
    (found,) = run(trainer_workers.generated, argv, [end], True, [end])
    assert found and end not in found[:-1]


def test_temperature_top_k_and_top_p(step_dir, worlds):
    logits = np.log([0.1, 0.2, 0.3, 0.4])
    run = worlds(step_dir, 1).run
    (plain,) = run(trainer_workers.drawn, logits, 1.0, 0, 20_000)
    assert plain == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)
    (cold,) = run(trainer_workers.drawn, logits, 0.5, 0, 20_000)  # p squared
    assert cold == pytest.approx(np.array([1, 4, 9, 16]) / 30, abs=0.02)
    (two,) = run(trainer_workers.drawn, logits, 1.0, 2, 20_000)
    assert two == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=0.02)
    # The fewest of the likeliest that come to top_p: 0.4 + 0.3 do to 0.65, 0.4 alone to 0.35.
    for top_k, top_p, kept in ((0, 0.65, 2), (0, 0.75, 3), (3, 0.85, 3), (2, 0.55, 1)):
        (nucleus,) = run(trainer_workers.drawn, logits, 1.0, top_k, 20_000, top_p)
        few = np.where(np.arange(4) < 4 - kept, 0, np.exp(logits))
        assert nucleus == pytest.approx(few / few.sum(), abs=0.02)
        assert (nucleus > 0).sum() == kept
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 1, 1.0), (1e-310, 0, 1.0), (1, 0, 0.35)):
        (best,) = run(trainer_workers.drawn, logits, temperature, top_k, 100, top_p)
        assert best == pytest.approx([0, 0, 0, 1])


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "--checkpoint --load_hf"),
        ("--checkpoint /no/such/place", "no checkpoint"),
        ("--load_hf {hf} --tp_size 3", "heads 8"),
        ("--load_hf {hf} --top_p 0", "'0' is not a number above 0 and at most 1"),
        ("--load_hf {hf} --top_p 1.5", "--top_p: '1.5' is not a number above 0 and at most 1"),
        ("--load_hf {hf} --prompt \udcff", "--prompt '\\udcff': bytes that are no UTF-8"),
    ],
)
def test_wrong_calls(step_dir, worlds, model, flags, words):
    argv, ranks = flags.format(hf=model[0]), ranks_of(flags)
    (said,) = worlds(step_dir, 1).run(workers.refusal, argv, ranks, "generate")
    assert words in said and "\n" not in said


def test_a_wrong_call_as_launched(step_dir, model, tmp_path):
    result = launch(
        step_dir, f"--load_hf {model[0]} --prompt x --tokenizer_name nobody/nothing", ranks=1,
        script="generate.py", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path),
    )  # fmt: skip
    assert result.code != 0
    assert result.errors[0].startswith("error: --tokenizer_name")
    assert result.errors[0].count("\n") == 1
