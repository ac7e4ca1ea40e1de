"""What many processes that share a training do together; on one process nothing of it is needed."""

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from timm.utils import distribute_bn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def same(args, model: nn.Module) -> nn.Module:
    """On the device, with the first process's weights in all; on GPUs batch norm is over the images of all."""
    model = model.to(args.device)
    if args.world_size == 1:
        return model
    for values in model.state_dict().values():
        sent = values.contiguous()
        dist.broadcast(sent, 0)
        values.copy_(sent)
    return convert_sync_batchnorm(model) if args.device.startswith("cuda") else model


def shard(args, model: nn.Module) -> None:
    """FSDP2, layer by layer."""
    mesh = init_device_mesh(torch.device(args.device).type, (args.world_size,))
    for layers in model.children():
        if isinstance(layers, (nn.ModuleList, nn.Sequential)):
            for layer in layers:
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def average_statistics(args, models: list[nn.Module]) -> None:
    """Of batch norm, which each process has of its own images."""
    for model in models if args.world_size > 1 else ():
        distribute_bn(model, args.world_size, reduce=True)


def not_finite(models: list[nn.Module]) -> torch.Tensor:
    """How many values of this process's weights are NaN or infinite."""
    tensors = [tensor for model in models for tensor in model.parameters()]
    mine = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return torch.stack([(~tensor.detach().isfinite()).sum() for tensor in mine]).sum()
