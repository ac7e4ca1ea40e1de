"""timm's optimizer and learning rates, as the options have them."""

from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from tokenfusion.cli.errors import UsageError, first_line


def make(args, model: nn.Module, steps: int) -> tuple[Optimizer, Scheduler]:
    """For so many steps an epoch.

    Raises:
        UsageError: timm has none of this name, or it cannot be stepped here.
    """
    rates = {"lr": args.lr, "weight_decay": args.weight_decay, "layer_decay": args.layer_decay}
    try:
        optimizer = create_optimizer_v2(model, args.opt, **rates)
    except (ValueError, TypeError, AssertionError, RuntimeError, ImportError) as error:
        raise UsageError(f"--opt: timm cannot make {args.opt}: {first_line(error)}") from None
    warmup = {"warmup_epochs": args.warmup_epochs, "warmup_lr": args.lr / 100}
    by_steps = {"step_on_epochs": False, "updates_per_epoch": steps}
    try:
        scheduler, _ = create_scheduler_v2(optimizer, args.sched, args.epochs, **warmup, **by_steps)
    except (ValueError, TypeError, AssertionError) as error:
        raise UsageError(f"--sched: timm cannot make {args.sched}: {first_line(error)}") from None
    if scheduler is None:
        raise UsageError(f"--sched: got {args.sched}, expected a scheduler of timm, such as constant")
    return optimizer, scheduler
