"""Words for a set of a Llama's tensors, by the names of a Hugging Face checkpoint."""

import re

# Within a layer, in the order in which the backward pass meets them.
BACKWARD = (
    "down_proj", "up_proj", "gate_proj", "post_attention_layernorm",
    "o_proj", "v_proj", "k_proj", "q_proj", "input_layernorm",
)  # fmt: skip


def kind_of(name):
    """ "q_proj" of "model.layers.0.self_attn.q_proj.weight"."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def layer_of(name):
    """The number of a tensor's layer, None outside of the layers."""
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def norms_of(names):
    return [name for name in names if kind_of(name).endswith("norm")]


def tables_of(names):
    """The embedding and the head."""
    return [name for name in names if kind_of(name) in ("embed_tokens", "lm_head")]


def first_in_backward(names):
    """The one of them that the backward pass, from the loss to the embedding, meets first."""

    def place(name):
        layer, kind = layer_of(name), kind_of(name)
        if layer is not None:
            return 1, -layer, BACKWARD.index(kind) if kind in BACKWARD else len(BACKWARD)
        return {"lm_head": (0, 0, 0), "norm": (0, 0, 1)}.get(kind, (2, 0, 0))

    return min(names, key=place)


def and_join(words):
    """["a", "b", "c"] -> "a, b and c"."""
    words = [str(word) for word in words]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def listed(sentences):
    """Sentences as the end of a message, one a line."""
    if not sentences:
        return ""
    return "\nWhat this usually means:" + "".join(f"\n- {sentence}" for sentence in sentences)


def layers_in_words(layers):
    """[0, 1, 2] -> "layers 0 to 2"."""
    layers = sorted(layers)
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"layers {layers[0]} to {layers[-1]}"
    return "layers " + and_join(layers)


def which(wrong, names, stages=None):
    """Words for a subset of `names`: by kind of tensor, by pipeline stage or by layer.

    stages: by name, the pipeline stages that hold it.
    """
    chosen = set(wrong)
    kinds = list(dict.fromkeys(map(kind_of, wrong)))
    layers = {layer_of(name) for name in names} - {None}
    if len(chosen) == len(names):
        return f"all {len(names)} tensors" if len(names) > 1 else names[0]
    if len(chosen) == 1:
        return f"only {wrong[0]}"
    if chosen == set(norms_of(names)):
        return "only the norms' weights"
    others = list(dict.fromkeys(kind_of(name) for name in names if name not in chosen))
    if chosen == {name for name in names if kind_of(name) not in others} and len(others) < 4:
        if {name for name in names if kind_of(name) in others} == set(norms_of(names)):
            return "all tensors but the norms' weights"
        return f"all tensors but {and_join(others)}"
    if chosen == {name for name in names if kind_of(name) in kinds}:
        inside = any(layer_of(name) is not None for name in wrong)
        return f"only {and_join(kinds)}" + " of all layers" * (inside and len(layers) > 1)
    every = set().union(*stages.values()) if stages else set()
    if len(every) > 1:
        touched = set().union(*(stages[name] for name in wrong))
        if chosen == {name for name in names if stages[name] & touched}:
            of = "stage" if len(touched) == 1 else "stages"
            return f"only the tensors of pipeline {of} {and_join(sorted(touched))}"
    whole = [
        layer
        for layer in sorted(layers)
        if all(name in chosen for name in names if layer_of(name) == layer)
    ]
    parts = [f"all of {layers_in_words(whole)}"] if whole else []
    rest = {}  # by kind, the layers in which it is wrong
    for name in wrong:
        if layer_of(name) not in whole:
            rest.setdefault(kind_of(name), []).append(layer_of(name))
    alike = {}  # by the layers, the kinds
    for kind, where in rest.items():
        alike.setdefault(tuple(where), []).append(kind)
    if len(alike) > 4:
        return f"{len(chosen)} of {len(names)} tensors, among them {and_join(wrong[:3])}"
    for where, kinds in alike.items():
        of = "" if where == (None,) else f" of {layers_in_words(where)}"
        parts.append(and_join(kinds) + of)
    return "only " + (parts[0] if len(parts) == 1 else f"these: {'; '.join(parts)}")
