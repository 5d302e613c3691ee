"""A run whose model's directory is gone, and that was moved: its checkpoints have all it needs."""

import shutil

import pytest
import workers_runs
import workers_setup
import workers_trainer
from test_huggingface import theirs
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.steps(9)


def with_tokenizer(path):
    """A model of transformers with a tokenizer of four words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    theirs(path)
    words = Tokenizer(models.WordLevel({"<end>": 0, "?": 1, "to": 2, "be": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(path)


def test_a_moved_run_needs_nothing_of_where_it_began(step_dir, worlds, tmp_path):
    with_tokenizer(tmp_path / "begun" / "model")
    (tmp_path / "text.txt").write_text("to be or not to be " * 500)
    argv = f"--load_hf model --dataset_name {tmp_path / 'text.txt'} --seq_len 16 "
    argv += "--micro_batch_size 2 --save_every 1 --checkpoint_dir "
    run = worlds(step_dir, 1).run
    (found,) = run(workers_runs.life_in, tmp_path / "begun", argv + "run --max_tokens 64")
    assert found["said"] is None and found["steps"] == [1, 2]
    (tmp_path / "begun" / "run").rename(tmp_path / "run")
    shutil.rmtree(tmp_path / "begun")

    argv += f"{tmp_path / 'run'} --max_tokens 96 --resume auto"
    (found,) = run(workers_runs.life_in, tmp_path, argv)
    assert found["said"] is None and found["steps"] == [3]
    assert any("no config.json" in n and "not needed" in n for n in found["notes"])
    assert not any("data are not those" in note for note in found["notes"])

    run(
        workers_trainer.exported,
        f"--checkpoint {tmp_path / 'run'} --save_hf {tmp_path / 'hf'}",
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("to be")["input_ids"] == [2, 3]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.vocab_size == 257
    (tokenizer,) = run(workers_trainer.tokenizer_for_generating, f"--checkpoint {tmp_path / 'run'}")
    assert tokenizer == str(tmp_path / "run" / "step_00000003" / "tokenizer")


def test_a_model_that_is_gone_is_needed_where_nothing_was_saved(step_dir, worlds, tmp_path):
    argv = f"--load_hf {tmp_path / 'gone'} --checkpoint_dir {tmp_path / 'run'} --resume auto"
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, argv, 1)
    assert said.startswith(f"--load_hf {tmp_path / 'gone'}: no config.json there")
