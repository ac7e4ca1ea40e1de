"""Training a fused model gives what training the plain one gives."""

import pytest
import torch

from tests.crossvit import fused_copy, randomize, small_crossvit


def batches(count, size=8):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        labels = torch.randint(10, (size,), generator=generator)
        noise = torch.randn(size, 3, 48, 48, generator=generator)
        yield noise * 0.3 + labels.view(-1, 1, 1, 1) / 5 - 1, labels


def losses(model, steps=32):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for images, labels in batches(steps):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def test_losses_of_32_steps_are_those_of_the_plain_model():
    plain = small_crossvit()
    fused = fused_copy(plain)
    expected, got = losses(plain), losses(fused)
    assert expected[-1] < expected[0] - 0.2
    assert got == pytest.approx(expected, rel=1e-3)


def test_two_processes_give_the_gradients_of_one(run_python, tmp_path):
    model = fused_copy(randomize(small_crossvit()))
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    model(images).square().mean().backward()
    run_python(
        f"""
        import torch, torch.distributed as dist, torch.multiprocessing as mp

        def worker(rank):
            from tests.crossvit import fused_copy, randomize, small_crossvit
            from tests.parity import assert_runs
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method="file://{tmp_path}/rendezvous", rank=rank, world_size=2)
            model = fused_copy(randomize(small_crossvit()))
            parallel = torch.nn.parallel.DistributedDataParallel(model)
            images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(3))
            with assert_runs("single_query_attention_cpu", "single_query_attention_backward_cpu"):
                parallel(images[rank * 2:][:2]).square().mean().backward()
            if rank == 0:
                torch.save({{n: p.grad for n, p in model.named_parameters()}}, "{tmp_path}/gradients.pt")
            dist.barrier()
            dist.destroy_process_group()

        if __name__ == "__main__":
            context = mp.get_context("fork")
            workers = [context.Process(target=worker, args=(rank,)) for rank in range(2)]
            [w.start() for w in workers]
            [w.join(120) for w in workers]
            assert [w.exitcode for w in workers] == [0, 0], [w.exitcode for w in workers]
        """
    )
    gradients = torch.load(tmp_path / "gradients.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
