"""Theory measured: what a step sends, collective by collective, is what the formulas say."""

import pytest
import workers_messages
from launch import ranks_of

SHORT = (
    "--num_hidden_layers 3 --seq_len 32 --micro_batch_size 2 --gradient_accumulation_steps 3 "
    "--dataset_name random --vocab_size 257 "
)
CASES = {
    4: [
        "--tp_size 2",
        "--tp_size 4 --activation_checkpointing",
        "--tp_size 2 --sequence_parallel",
        "--tp_size 4 --sequence_parallel --dtype float64 --tie_word_embeddings yes",
        "--tp_size 2 --sequence_parallel --activation_checkpointing --dtype bfloat16",
        "--tp_size 2 --sequence_parallel --dtype float16",
        "--tp_size 2 --sequence_parallel --dtype bfloat16 --weights_dtype bfloat16",
        "--tp_size 2 --compile aot_eager",
    ],
    5: [
        "--cp_size 2",
        "--cp_size 4 --dtype float64",
        "--cp_size 4 --activation_checkpointing --dtype float16",
        "--cp_size 2 --tp_size 2 --sequence_parallel",
        "--cp_size 2 --compile aot_eager",
    ],
    6: [
        "--dp_size 3 --dp_engine naive",
        "--dp_size 2 --dp_engine bucket",
        "--dp_size 2 --dp_engine zero1 --dtype bfloat16",
        "--dp_size 3 --dp_engine zero2",
        "--dp_size 2 --dp_engine zero3",
        "--dp_size 2 --dp_engine zero3 --activation_checkpointing",
        "--dp_size 2 --dp_engine zero3 --dtype bfloat16",
        "--dp_size 2 --dp_engine zero2 --dtype float16 --weights_dtype float16",
        "--dp_size 2 --dp_engine zero3 --compile aot_eager",
        "--cp_size 2 --dp_engine zero1",
        "--cp_size 2 --dp_size 2 --dp_engine zero3",
        "--tp_size 2 --dp_size 2 --dp_engine zero2 --sequence_parallel",
    ],
    7: [
        "--pp_size 2",
        "--pp_size 3 --tie_word_embeddings yes --dtype bfloat16",
        "--pp_size 2 --tp_size 2 --sequence_parallel",
        "--pp_size 2 --dp_size 2 --dp_engine zero3 --dtype float16",
        "--pp_size 2 --cp_size 2 --dp_engine zero2 --activation_checkpointing",
    ],
    9: [
        "--pp_size 3 --pp_engine interleaved --num_hidden_layers 7",
        "--pp_size 2 --pp_engine interleaved --num_hidden_layers 6 --pp_chunks 3 --dp_size 2 "
        "--dp_engine zero2 --gradient_accumulation_steps 4 --tie_word_embeddings yes",
        "--tp_size 2 --pp_size 2 --dp_size 2 --dp_engine zero3 --sequence_parallel",
    ],
}


def ledgers(step_dir, worlds, flags):
    size = ranks_of(flags)
    return worlds(step_dir, size).run(workers_messages.ledger_of, SHORT + flags)


def check(step_dir, worlds, subtests, cases):
    for flags in cases:
        with subtests.test(flags):
            for counted, predicted in ledgers(step_dir, worlds, flags):
                assert counted == predicted


@pytest.mark.steps(4, 4)
def test_tensor_parallel_traffic(step_dir, worlds, subtests):
    check(step_dir, worlds, subtests, CASES[4])


@pytest.mark.steps(5, 5)
def test_context_parallel_traffic(step_dir, worlds, subtests):
    check(step_dir, worlds, subtests, CASES[5])


@pytest.mark.steps(6, 6)
def test_data_parallel_traffic(step_dir, worlds, subtests):
    check(step_dir, worlds, subtests, CASES[6])


@pytest.mark.sampled(9, only=True)
@pytest.mark.steps(7)
def test_pipeline_traffic(step_dir, worlds, subtests):
    check(step_dir, worlds, subtests, CASES[7])


@pytest.mark.steps(9)
def test_traffic_of_all_axes(step_dir, worlds, subtests):
    check(step_dir, worlds, subtests, CASES[9])


# The rows above compare the code with formulas that stand beside it; these stand here.

LAYERS, WIDTH, TOKENS, MICRO_BATCHES = 3, 128, 2 * 32, 3
WHOLE = 4 * TOKENS * WIDTH  # bytes of an activation in float32


@pytest.mark.steps(4, 4)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_sums_a_layer_each_way(step_dir, worlds, sequence_parallel):
    argv = SHORT + "--tp_size 2 " + "--sequence_parallel" * sequence_parallel
    for forward, backward in worlds(step_dir, 2).run(workers_messages.calls_each_way, argv):
        if sequence_parallel:
            assert forward["tp", "reduce_scatter"] == 2 * LAYERS + 1  # and the embedding
            assert forward["tp", "all_gather"] == 2 * LAYERS + 2  # and the head, and the loss
            assert backward["tp", "reduce_scatter"] == 2 * LAYERS + 1  # and the head
            assert backward["tp", "all_gather"] == 4 * LAYERS + 2
            assert backward["tp", "all_reduce"] == 2 * LAYERS + 1  # the norms' weights
        else:
            assert forward == {("tp", "all_reduce"): 2 * LAYERS + 1, ("tp", "all_gather"): 1}
            assert backward == {("tp", "all_reduce"): 2 * LAYERS + 1}


@pytest.mark.steps(5, 5)
@pytest.mark.parametrize("cp", [2, 4])
def test_keys_and_values_are_sent_unrepeated(step_dir, worlds, cp):
    block = 2 * 4 * (TOKENS // cp) * 4 * 16  # k and v of 4 kv heads of 16, in float32
    for rank, (counted, _) in enumerate(ledgers(step_dir, worlds, f"--cp_size {cp}")):
        # Forward, backward without the two that are there, and gradients, to earlier ranks those
        # of half a block.
        travels = (cp - 1) + (cp - 2) + (cp - 1)
        blocks, calls = travels - rank / 2, MICRO_BATCHES * LAYERS * travels
        assert counted["cp", "send"] == (calls, MICRO_BATCHES * LAYERS * blocks * block)


@pytest.mark.steps(6, 6)
@pytest.mark.parametrize("dtype, number", [("float32", 4), ("bfloat16", 2)])
def test_volumes_of_the_engines(step_dir, worlds, dtype, number):
    """In units of the model's bytes: what the lesson says of each engine."""
    matrices = LAYERS * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128)
    head, norms = 257 * 128, (2 * LAYERS + 1) * 128
    model, m = 4 * (matrices + 2 * head + norms), MICRO_BATCHES
    cast = 2 * matrices - matrices // LAYERS + head
    expected = {
        "naive": {"all_reduce": model},
        "bucket": {"all_reduce": model},
        "zero1": {"reduce_scatter": model, "all_gather": model},
        "zero2": {"reduce_scatter": m * model, "all_gather": model},
        # The matrices of every layer forward and, but for the last, backward; the head once. These
        # are cast before they travel, embedding and norms are not.
        "zero3": {
            "reduce_scatter": m * model,
            "all_gather": m * (number * cast + 4 * (head + norms)),
        },
    }
    for engine, volumes in expected.items():
        flags = f"--dp_size 2 --dp_engine {engine} --dtype {dtype}"
        ((counted, _), *_) = ledgers(step_dir, worlds, flags)
        for collective, size in volumes.items():
            found = counted["dp_cp", collective][1]
            extra = 8 if collective == "all_reduce" else 0  # the loss
            words = f"{engine}, bytes of {collective}: found {found}, expected {size + extra}"
            assert abs(found - size - extra) <= 4 * 4 * m, words  # padding
        others = {key[1] for key in counted if key[0] == "dp_cp"} - {*volumes, "all_reduce"}
        assert not others, f"{engine} also calls {others}"
