"""Fine-tunes a model of timm or tokenfusion on a folder of images; without one, a tiny model on handwritten digits.

    python examples/finetune.py --model tokenfusion_crossvit_9_240 --data FOLDER
    torchrun --nproc-per-node 8 examples/finetune.py --model crossvit_15_240 --data FOLDER --parallel fsdp

FOLDER has a subfolder of images for each class, or train and val, which have them. --out gets best/ and last/, models
for predict.py, export.py and, once tokenfusion.models is imported, timm.create_model("local-dir:..."); log.csv and
curves.png; training.safetensors, from which --resume goes on. What is random depends on --seed and on the place in the
training alone: a training that was interrupted has the losses of one that was not.
"""

import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import ModelEmaV3, init_distributed_device
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

import tokenfusion
from tokenfusion.cli.display import console
from tokenfusion.cli.errors import UsageError, first_line
from training import checkpoints, kept, log, pictures, processes, schedule
from training.errors import reported
from training.model import check_size, make
from training.options import check, keep, parsed

_GATHERED = states.StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True, cpu_offload=True)
_SPREAD = states.StateDictOptions(full_state_dict=True)


def add(sums: torch.Tensor, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """To sums of losses, right answers and images."""
    sums[0] += loss
    sums[1] += (logits.argmax(dim=1) == labels).sum()
    sums[2] += len(labels)


class Training:
    def __init__(self, args, model: nn.Module, train: pictures.Pictures, test: pictures.Pictures, classes: list[str]):
        self.args, self.train, self.test = args, train, test
        self.kept = kept.of(args, classes, train.pairs, test.pairs)
        self.model = self.parallel = model
        sharded = args.world_size > 1 and args.parallel == "fsdp"
        self.ema = ModelEmaV3(model, args.ema, use_warmup=True, foreach=not sharded) if args.ema else None
        self.evaluated = self.ema.module if self.ema else model
        self.models = [self.model, self.evaluated] if self.ema else [self.model]
        for each in self.models if sharded else ():
            processes.shard(args, each)
        if args.compile:
            self.model.compile()
        if args.world_size > 1 and not sharded:
            self.parallel = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.steps = len(train) // args.batch_size  # of an epoch
        self.optimizer, self.scheduler = schedule.make(args, self.model, self.steps)
        targets = {"label_smoothing": args.smoothing, "num_classes": len(classes)}
        self.mix = Mixup(args.mixup, args.cutmix, **targets) if args.mixup > 0 or args.cutmix > 0 else None
        self.step, self.history = 0, []
        self.sums = torch.zeros(3, dtype=torch.float64, device=args.device)  # of this epoch

    def run(self) -> None:
        args = self.args
        with log.bar(args) as bar:
            task = bar.add_task("", total=args.epochs * self.steps, completed=self.step)
            for epoch in range(self.step // self.steps, args.epochs):
                row = self.train_epoch(epoch, lambda text: bar.update(task, description=text, completed=self.step))
                row["loss"], row["accuracy"] = self.measure()
                self.history.append(row)
                best = log.best(self.history) is row
                self.save(best)
                args.say(log.line(row, args.epochs, best))
                if args.rank == 0:
                    log.write(args.out, self.history)

    def train_epoch(self, epoch: int, show) -> dict[str, float]:
        args = self.args
        self.train.epoch = epoch
        sampler = DistributedSampler(self.train, args.world_size, args.rank, seed=args.seed, drop_last=True)
        sampler.set_epoch(epoch)
        batches = list(BatchSampler(sampler, args.batch_size // args.world_size, drop_last=True))
        self.parallel.train()
        start, first = time.perf_counter(), self.step
        for images, labels in self.loaded(self.train, batches[self.step % self.steps :]):
            pictures.seed_by(args.seed, self.step, args.rank)  # for mixup, dropout and drop path
            images, targets = self.mix(images, labels) if self.mix else (images, labels)
            with self.autocast():
                logits = self.parallel(images)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=0.0 if self.mix else args.smoothing)
            self.optimizer.zero_grad()
            loss.backward()
            if args.clip_grad:
                nn.utils.clip_grad_norm_(self.model.parameters(), args.clip_grad)
            self.optimizer.step()
            self.step += 1
            self.scheduler.step_update(self.step)
            if self.ema:
                self.ema.update(self.model, self.step)
            add(self.sums, loss.detach() * len(labels), logits, labels)
            saves = args.save_steps and self.step % args.save_steps == 0 and self.step % self.steps
            if saves or self.step % 10 == 0:
                loss, accuracy = self.means(self.sums)
                speed = (self.step - first) * args.batch_size / (time.perf_counter() - start)
                show(f"epoch {epoch + 1}  loss {loss:.3f}  accuracy {accuracy:.1%}  {speed:.0f} images/s")
            if saves:
                self.save(best=False)
        loss, accuracy = self.means(self.sums)
        self.sums.zero_()
        speed = (self.step - first) * args.batch_size / (time.perf_counter() - start)
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        return {
            "epoch": epoch + 1,
            "lr": rate,
            "images/s": round(speed, 1),
            "train_loss": loss,
            "train_accuracy": accuracy,
        }

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """Loss and accuracy of the test images, by the averaged weights where there are any."""
        processes.average_statistics(self.args, self.models)
        rank, world, sums = self.args.rank, self.args.world_size, torch.zeros_like(self.sums)
        sampler = DistributedSampler(self.test, world, rank, shuffle=False)  # repeats some, so that shares are equal
        batches = list(BatchSampler(sampler, self.args.batch_size // world, drop_last=False))
        self.evaluated.eval()
        seen = rank
        for images, labels in self.loaded(self.test, batches):
            with self.autocast():
                logits = self.evaluated(images).float()
            new = torch.arange(seen, seen + world * len(labels), world, device=logits.device) < len(self.test)
            seen += world * len(labels)
            add(sums, F.cross_entropy(logits[new], labels[new], reduction="sum"), logits[new], labels[new])
        return self.means(sums)

    def loaded(self, data: pictures.Pictures, batches: list[list[int]]):
        options = {"num_workers": self.args.workers, "pin_memory": self.args.device.startswith("cuda")}
        for batch in DataLoader(data, batch_sampler=batches, generator=torch.Generator(), **options):
            yield [tensor.to(self.args.device, non_blocking=True) for tensor in batch]

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.args.device).type, torch.bfloat16, enabled=self.args.amp == "bf16")

    def means(self, sums: torch.Tensor) -> tuple[float, float]:
        """Loss and accuracy, of all processes."""
        loss, right, count = self.of_all(sums)
        if not math.isfinite(loss):
            raise UsageError(f"the loss is {loss} by step {self.step}; {self.args.out} has what was saved before")
        return loss / count, right / count

    def of_all(self, sums: torch.Tensor) -> list[float]:
        sums = sums.clone()
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def save_model(self, *names: str) -> None:
        """Called by every process, as `save` is; the first one writes."""
        weights = states.get_model_state_dict(self.evaluated, options=_GATHERED)
        for name in names if self.args.rank == 0 else ():
            checkpoints.save_model(self.args.out / name, weights)

    def save(self, best: bool) -> None:
        if self.of_all(processes.not_finite(self.models)):
            raise UsageError(
                f"weights are nan or inf after step {self.step}; {self.args.out} has what was saved before"
            )
        processes.average_statistics(self.args, self.models)
        self.save_model(*(["best"] if best else []), "last")
        parts = {"model": states.get_model_state_dict(self.model, options=_GATHERED)}
        if self.ema:
            parts["ema"] = states.get_model_state_dict(self.evaluated, options=_GATHERED)
        parts["optimizer"] = states.get_optimizer_state_dict(self.model, self.optimizer, options=_GATHERED)
        progress = {"kept": self.kept, "step": self.step, "sums": self.of_all(self.sums), "history": self.history}
        if self.args.rank == 0:
            checkpoints.save_training(self.args.out / checkpoints.STATE, parts, progress)

    def resume(self, path: Path) -> str:
        """Returns in words which options are others.

        Raises:
            UsageError: the file is of another training.
        """
        parts, progress = checkpoints.load_training(path)
        differences = kept.differences(progress["kept"], self.kept, path)
        states.set_model_state_dict(self.model, parts["model"], options=_SPREAD)
        states.set_optimizer_state_dict(self.model, self.optimizer, parts["optimizer"], options=_SPREAD)
        if self.ema:
            states.set_model_state_dict(self.evaluated, parts["ema"], options=_SPREAD)
        self.step, self.history = progress["step"], progress["history"]
        if self.args.rank == 0:
            self.sums += self.sums.new_tensor(progress["sums"])
            log.write(self.args.out, self.history)
        return differences


def main(arguments: list[str] | None = None) -> None:
    args = parsed(__doc__.splitlines()[0], arguments)
    init_distributed_device(args)
    args.console = console()
    args.say = args.console.print if args.rank == 0 else lambda line: None
    check(args)
    state = args.out / checkpoints.STATE
    train, test, classes = pictures.split(args)
    model, options = make(args, classes)
    data = pictures.datasets(args, model, options, train, test)
    check_size(args, model)
    model = processes.same(args, model)
    if args.fuse:
        args.say(first_line(tokenfusion.fuse(model)))
    else:
        tokenfusion.unfuse(model)
        tokenfusion.set_backend("reference")
    training = Training(args, model, *data, classes)
    args.say(f"{len(train)} images to train, {len(test)} to test, {len(classes)} classes; {training.steps} steps")
    differences = training.resume(state) if state.exists() else None
    if args.rank == 0:
        keep(args)
    if differences is not None:
        args.say(f"resumed after step {training.step}{', with ' if differences else ''}{differences}")
    else:
        for name in ("best", "last") if args.rank == 0 else ():
            checkpoints.save_config(args.out / name, model, classes, options, args.tie)
        training.save_model("best", "last")  # whatever keeps it from being written is known before the work
    training.run()
    best = log.best(training.history)
    args.say(f"accuracy {best['accuracy']:.1%} after epoch {best['epoch']}: {args.out / 'best'}")
    if args.world_size > 1:
        dist.barrier()  # gloo's thread then has no tensors left to release, for which torch 2.11 can wait forever
        dist.destroy_process_group()


if __name__ == "__main__":
    reported(main)
