"""What is reported of the held-out losses: their mean, by text, and in bits a byte."""

import math


def held_out_metrics(losses, texts):
    """What an evaluation reports, {name: number}.

    losses: mean of each text's targets, in nats. held_out: their mean, by the shares of the texts.
    bits_per_byte: the same for a byte of text, whatever a token is; None where there is no text.
    With a mix also held_out/NAME of each.
    """
    shares = [text.part / sum(text.part for text in texts) for text in texts]
    found = {"held_out": sum(share * loss for share, loss in zip(shares, losses, strict=True))}
    found["bits_per_byte"] = None
    sizes = [text.bytes_per_token for text in texts]
    if all(sizes):
        size = sum(share * size for share, size in zip(shares, sizes, strict=True))
        found["bits_per_byte"] = found["held_out"] / math.log(2) / size
    if len(texts) > 1:
        for text, loss in zip(texts, losses, strict=True):
            found[f"held_out/{text.args.dataset_name}"] = loss
    return found


def readable_held_out(found):
    """One line of an evaluation for people."""
    bits = found["bits_per_byte"]
    line = f"held-out loss {found['held_out']:.4f}"
    line += f" | {bits:.4f} bits a byte" if bits is not None else ""
    for name, loss in found.items():
        if name.startswith("held_out/"):
            line += f" | {name.removeprefix('held_out/')} {loss:.4f}"
    return line
