"""What the checks of mixes run."""

from types import SimpleNamespace


def periods(mixes):
    from mixes import period_of

    return [period_of(parts) for parts in mixes]


def text_of(size, seed, part, name):
    """A `Text` whose window w begins with the token w."""
    import numpy as np

    from mixes import Text

    args = SimpleNamespace(
        seq_len=1, stride=0, micro_batch_size=4, gradient_accumulation_steps=1, num_workers=0,
        streaming=False, seed=seed, dataset_name=name, eval_tokens=None,
    )  # fmt: skip
    return Text(args, part, np.arange(size + 1, dtype=np.uint32), None, {})


def rows(sizes, parts, count):
    """The row of (text, window) of a mix; the same after a jump; held-out windows by text."""
    import torch

    from mixes import batches, parts_of

    texts = [text_of(*both, part, "x") for both, part in zip(enumerated(sizes), parts, strict=True)]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]

    def named(index):
        text = max(number for number, start in enumerate(starts) if start <= index)
        return text, index - starts[text]

    def order():
        return batches(texts, torch.device("cpu")).order

    data = batches(texts, torch.device("cpu"))
    for position in (0, 7, 500):
        which, window = named(order().sequence(position))
        assert int(data.windows[starts[which] + window][0]) == window
    row, jumped = order(), order()
    return {
        "row": [named(row.sequence(position)) for position in range(count)],
        "jumped": [named(jumped.sequence(position)) for position in range(1234, 1244)],
        "held_out": [part.held_out for part in parts_of(data)],
    }


def enumerated(sizes):
    return [(size, f"3 text {number}") for number, size in enumerate(sizes)]


def named(names):
    from text_names import parts_of, weights_of

    return [parts_of(weights_of(name), name) for name in names]


def refused(name):
    """What is said of a mix that is an error."""
    from errors import UserError
    from text_names import parts_of, weights_of

    try:
        return str(parts_of(weights_of(name), name))
    except UserError as error:
        return str(error)


def sizes(argv):
    """(tokens, bytes a token) of each text of a run."""
    import torch

    import process_group as pg
    import train

    args = train.parse_args(argv)
    pg.init_processes("cpu")
    try:
        texts = train.load_texts(args, pg.Mesh(dp=1).world, torch.device("cpu"))
        return [(len(text.tokens), text.bytes_per_token) for text in texts]
    finally:
        pg.finish()


def reported(losses, parts, sizes):
    from held_out import held_out_metrics, readable_held_out

    texts = [
        SimpleNamespace(part=part, bytes_per_token=size, args=SimpleNamespace(dataset_name=f"a{n}"))
        for n, (part, size) in enumerate(zip(parts, sizes, strict=True))
    ]
    found = held_out_metrics(losses, texts)
    return found, readable_held_out(found)
