"""Mistakes of pipelines."""


def stages_start_at_layer_zero(train):
    """Each stage names its layers from 0 on, and so draws the weights of the first ones."""
    import re

    materialize = train.materialize

    def spoiled(model, seed, device, dtype):
        names = {p: p.global_name for p in model.parameters()}
        found = (re.search(r"layers\.(\d+)\.", name) for name in names.values())
        first = min(int(number[1]) for number in found if number)
        for parameter, name in names.items():
            parameter.global_name = re.sub(r"[0-9]+", lambda n: str(int(n[0]) - first), name)
        materialize(model, seed, device, dtype)
        for parameter, name in zip(model.parameters(), names.values(), strict=True):
            parameter.global_name = name

    train.materialize = spoiled


def ends_not_summed(train):
    """Tied embeddings whose two stages keep their own gradients."""
    train.sum_shared_gradients = lambda parameters: None


def norm_of_the_own_stage(train):
    """A gradient norm of the layers that a stage has."""
    gradient_norm = train.gradient_norm

    def own(parameters, names, group):
        import dataclasses

        return gradient_norm(parameters, names, dataclasses.replace(group, ranks=group.ranks[:1]))

    train.gradient_norm = own
