"""generate.py: the cache changes nothing, tp changes nothing, transformers says the same."""

import json

import numpy as np
import pytest
import torch
import workers_model
import workers_setup
import workers_trainer
from launch import launch, ranks_of
from test_huggingface import theirs
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.steps(9)
PROMPT = [5, 250, 3, 3, 77, 256, 0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "hf"
    return path, theirs(path, initializer_range=0.2)  # so that the likeliest token is no tie


def test_the_likeliest_tokens_with_cache_without_and_by_transformers(step_dir, worlds, model):
    path, reference = model
    argv = f"--load_hf {path} --dtype float64 --temperature 0 --max_new_tokens 40 --tp_size "
    (cached,) = worlds(step_dir, 1).run(workers_trainer.generated, argv + "1", PROMPT)
    (plain,) = worlds(step_dir, 1).run(workers_trainer.generated, argv + "1", PROMPT, False)
    assert len(cached) == 40 and len(set(cached)) > 5
    assert cached == plain
    workers_model.upcast_in_float64(reference)
    with torch.no_grad():
        found = reference.generate(
            torch.tensor([PROMPT]), do_sample=False, max_new_tokens=40, min_new_tokens=40,
            eos_token_id=None,
        )  # fmt: skip
    assert found[0, len(PROMPT) :].tolist() == cached


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_ranks_draw_the_same(step_dir, worlds, model, size):
    argv = f"--load_hf {model[0]} --dtype float64 --max_new_tokens 30 --seed 3 --tp_size "
    (alone,) = worlds(step_dir, 1).run(workers_trainer.generated, argv + "1", PROMPT)
    found = worlds(step_dir, size).run(workers_trainer.generated, argv + f"{size}", PROMPT)
    assert found == [alone] * size


def test_nothing_follows_the_end_token(step_dir, worlds, model):
    """Unless the prompt is one, as an empty one is."""
    argv = f"--load_hf {model[0]} --dtype float64 --max_new_tokens 30 --seed {2**64}"
    run = worlds(step_dir, 1).run
    (tokens,) = run(workers_trainer.generated, argv, PROMPT)
    end, other = tokens[7], tokens[3]
    (found,) = run(workers_trainer.generated, argv, PROMPT, True, [end])
    assert found == tokens[: tokens.index(end) + 1]
    (found,) = run(workers_trainer.generated, argv, PROMPT, True, [end, other])
    assert found == tokens[: min(tokens.index(end), tokens.index(other)) + 1]
    (found,) = run(workers_trainer.generated, argv, [end], True, [end])
    assert found and end not in found[:-1]


def test_temperature_top_k_and_top_p(step_dir, worlds):
    logits = np.log([0.1, 0.2, 0.3, 0.4])
    run = worlds(step_dir, 1).run
    (plain,) = run(workers_trainer.drawn, logits, 1.0, 0, 20_000)
    assert plain == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)
    (cold,) = run(workers_trainer.drawn, logits, 0.5, 0, 20_000)  # p squared
    assert cold == pytest.approx(np.array([1, 4, 9, 16]) / 30, abs=0.02)
    (two,) = run(workers_trainer.drawn, logits, 1.0, 2, 20_000)
    assert two == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=0.02)
    # The fewest of the likeliest that come to top_p: 0.4 + 0.3 do to 0.65, 0.4 alone to 0.35.
    for top_k, top_p, kept in ((0, 0.65, 2), (0, 0.75, 3), (3, 0.85, 3), (2, 0.55, 1)):
        (nucleus,) = run(workers_trainer.drawn, logits, 1.0, top_k, 5_000, top_p)
        few = np.where(np.arange(4) < 4 - kept, 0, np.exp(logits))
        assert nucleus == pytest.approx(few / few.sum(), abs=0.02)
        assert (nucleus > 0).sum() == kept
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 1, 1.0), (1e-310, 0, 1.0), (1, 0, 0.35)):
        (best,) = run(workers_trainer.drawn, logits, temperature, top_k, 100, top_p)
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
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, argv, ranks, "generate")
    assert words in said and "\n" not in said


@pytest.mark.slow
def test_a_wrong_call_as_launched(step_dir, model, tmp_path):
    result = launch(
        step_dir, f"--load_hf {model[0]} --prompt x --tokenizer_name nobody/nothing", ranks=1,
        script="generate.py", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path),
    )  # fmt: skip
    assert result.code != 0
    assert result.errors[0].startswith("error: --tokenizer_name")
    assert result.errors[0].count("\n") == 1


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    "<|eot|>",
    *BYTES,
    "▁",
    "def",
    "▁def",
    "x",
    "▁x",
    ",",
    *"def",
    "de",
]
ID = {piece: index for index, piece in enumerate(PIECES)}


def llama2_tokenizer(path, template="<s> $A"):
    """Save a tokenizer made as Llama 2's is: a mark stands for a space, and one is put first."""
    merges = [("d", "e"), ("de", "f"), ("▁", "def"), ("▁", "x")]
    made = Tokenizer(models.BPE(vocab=ID, merges=merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    special = [("<s>", 1), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    fast.save_pretrained(path)


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A </s>"])
def test_the_space_after_the_prompt_and_ends_that_a_tokenizer_adds(
    step_dir, worlds, tmp_path, template
):
    llama2_tokenizer(tmp_path, template)
    begin = [ID["<s>"]] if "<s>" in template else []
    x, ends = ID["▁x"], [ID["</s>"], ID["<|eot|>"]]
    cases = {  # prompt: (its symbols, new ones, their text)
        "def": ([ID["▁def"]], [x, ID["x"], ID["</s>"]], " xx"),
        "def x": ([ID["▁def"], x], [x, x], " x x"),
        "def ": ([ID["▁def"], ID["▁"]], [ID["x"]], "x"),
        "x ü": ([x, ID["▁"], ID["<0xC3>"], ID["<0xBC>"]], [ID[","], x], ", x"),
        "x": ([x], [ID["<0xC3>"], ID["<0xBC>"]], "ü"),
        "x<|eot|>": ([x, ID["<|eot|>"]], [x], " x"),  # which the text itself ends with
    }
    calls = [(prompt, new) for prompt, (_, new, _) in cases.items()]
    (found,) = worlds(step_dir, 1).run(workers_trainer.continued, str(tmp_path), calls, ends)
    for prompt, (symbols, text) in zip(cases, found, strict=True):
        assert symbols == begin + cases[prompt][0], prompt
        assert text == cases[prompt][2], prompt
    ((empty, text),) = worlds(step_dir, 1).run(
        workers_trainer.continued, str(tmp_path), [("", [x])], ends
    )[0]
    assert empty == (begin or [ID["</s>"]]) and text == "x"


def test_as_launched_any_end_stops_an_ascii_terminal_works_and_a_long_text_is_named(
    step_dir, worlds, tmp_path
):
    theirs(tmp_path, initializer_range=0.2, vocab=len(PIECES), eos_token_id=2)
    llama2_tokenizer(tmp_path)
    argv = f"--load_hf {tmp_path} --temperature 0 --max_new_tokens 70 --prompt xü"
    run = worlds(step_dir, 1).run
    prompt = [ID[piece] for piece in ("<s>", "▁x", "<0xC3>", "<0xBC>")]
    (tokens,) = run(workers_trainer.generated, argv, prompt)
    end = next(token for token in tokens[4:] if token not in tokens[:4])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    new = tokens[: tokens.index(end) + 1]
    (((_, text),),) = run(workers_trainer.continued, str(tmp_path), [("xü", new)], [2, end])
    result = launch(step_dir, argv, script="generate.py", PYTHONIOENCODING="ascii")
    assert (result.code, result.errors) == (0, [""])
    said, text_there = result.out.split("\n", 1)
    assert said.startswith("note: --prompt of 4 tokens with --max_new_tokens 70") and "64" in said
    assert text_there == f"xü{text}\n".encode("ascii", "backslashreplace").decode()
