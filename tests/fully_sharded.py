"""PyTorch's own FSDP2 in place of a step's engine: what zero3 is compared with.

`python tests/breaks.py fully_sharded step6_data_parallel/train.py --dp_size 2 …` under torchrun
trains with it; everything but the engine is the step's own code.
"""


def fully_sharded(train):
    """Let `fully_shard` do what the step's engine does. Source: FSDP2, torch.distributed.fsdp."""
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    class FullySharded(train.Naive):
        axes = ("dp", "cp")

        def __init__(self, model, group):
            self.group, self.last_backward = group, False
            tags = {name: dict(p.__dict__) for name, p in model.named_parameters()}
            device = next(model.parameters()).device
            mesh = DeviceMesh.from_group(group.handle, device.type)
            modules = [*model.model.layers, model]
            for module in modules:
                fully_shard(module, mesh=mesh)
            for module in modules:  # a sum: the loss is divided by the targets of all ranks
                module.set_gradient_divide_factor(1.0)
            self.pairs, self.parameters = [], []
            for name, parameter in model.named_parameters():
                parameter.__dict__.update(tags[name])
                rows, width = parameter.shape[0], parameter.numel() // parameter.shape[0]
                share = -(-rows // group.size)
                first, last = (min(rows, r * share) for r in (group.rank, group.rank + 1))
                if first < last:
                    own = nn.Parameter(parameter.to_local().detach())
                    assert own.numel() == (last - first) * width
                    own.__dict__.update(tags[name], piece=slice(first * width, last * width))
                    self.pairs.append((parameter, own))
                    self.parameters.append(own)
            self.model = model

        def zero_grad(self):
            for parameter, own in self.pairs:
                parameter.grad = own.grad = None

        def finish_gradients(self):
            for parameter, own in self.pairs:
                own.grad = parameter.grad.to_local()

        def traffic(self, micro_batches):
            return []

    train.data_parallel = lambda name, model, group: FullySharded(model, group)
