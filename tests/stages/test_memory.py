"""What is kept for a gradient: how much it is, that it fits, and that the gradient does not tell."""

import os
import weakref

import pytest
import torch

from stages.contract import Sampler
from stages.memory import EVERYTHING, NOTHING, SHARE, Memory, measured
from stages.sampling import denoise

CPU = torch.device("cpu")
NUMBERS = 1000
SIZE = 4 * NUMBERS  # bytes that a step of `Chain` saves
STEPS = 6


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Chain:
    """Steps x ↦ sin x, each of which saves its argument, and a count of how often one was run."""

    def __init__(self):
        self.runs = 0

    def step(self, x):
        self.runs += 1
        return x.sin()

    def gradient(self, memory):
        memory.begin()
        x = start = noise(NUMBERS).requires_grad_()
        for _ in range(STEPS):
            x = memory.run(self.step, x)
        return torch.autograd.grad(x.sum(), start)[0]


def test_bytes_of_a_step_counted_by_hand():
    """exp saves its result, the square the same once more, sin its argument; a product only the parameter."""
    weight, matrix = (torch.nn.Parameter(noise(*shape), requires_grad=False) for shape in ((40,), (40, 40)))

    def step(x):
        y = x.exp()
        return (y.square() + (y * weight).sin()) @ matrix.T

    x = noise(25, 40).requires_grad_()
    made, saved = measured(step, x)
    assert saved == 2 * 4 * 25 * 40
    assert torch.equal(made, step(x))
    assert torch.equal(*(torch.autograd.grad(each.sum(), x)[0] for each in (made, step(x))))


def test_a_view_keeps_the_whole_of_its_storage():
    x = noise(25, 40).requires_grad_()
    assert measured(lambda x: (2 * x)[:3].sin(), x)[1] == 4 * 25 * 40


def test_what_was_measured_and_is_not_wanted_is_freed():
    class Exp(torch.autograd.Function):
        """Saves its own result: a graph that holds itself, if what is saved knows its graph."""

        @staticmethod
        def forward(ctx, x):
            alive.append(weakref.ref(ctx))
            y = x.exp()
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0]

    alive = []
    made, _ = measured(Exp.apply, noise(5).requires_grad_())
    assert alive[0]() is not None
    del made
    assert alive[0]() is None


@pytest.mark.parametrize(
    ("room", "kept"), [(0, 0), (1, 0), (2, 1), (3.5, 2), (STEPS, STEPS - 1), (STEPS + 1, STEPS), (99, STEPS)]
)
def test_steps_are_kept_while_they_fit_beside_one_that_is_run_again(room, kept):
    """`room` in steps. The first is run to be measured, and once more at once where it does not fit."""
    chain, memory = Chain(), Memory(room * SIZE)
    gradient = chain.gradient(memory)
    assert memory.kept == kept * SIZE <= memory.budget
    in_vain = 1 if kept == 0 and room > 0 else 0
    assert chain.runs == STEPS + (STEPS - kept) + in_vain
    assert torch.equal(gradient, Chain().gradient(EVERYTHING))

    chain.runs = 0
    assert torch.equal(
        chain.gradient(memory), gradient
    )  # the next pass has all the room, and measures nothing
    assert memory.kept == kept * SIZE
    assert chain.runs == STEPS + (STEPS - kept)


def test_a_larger_step_is_known_by_its_arguments():
    memory = Memory(5 * SIZE)
    x, y = noise(NUMBERS).requires_grad_(), noise(3 * NUMBERS).requires_grad_()
    memory.run(torch.sin, x)
    memory.run(torch.sin, y)  # 1 + 3 and 3 to be run again
    assert memory.kept == SIZE
    memory.run(torch.sin, x)
    assert memory.kept == 2 * SIZE
    memory.run(torch.sin, x)  # 2 + 1, and 3 to be run again
    assert memory.kept == 2 * SIZE


def test_without_a_gradient_nothing_is_kept_or_run_again():
    chain, memory = Chain(), Memory(99 * SIZE)
    with torch.no_grad():
        for each in (memory, NOTHING, EVERYTHING):
            each.run(chain.step, noise(NUMBERS).requires_grad_())
    assert (chain.runs, memory.kept) == (3, 0)


def test_the_gradient_through_a_sampler_has_the_same_bits_whatever_is_kept(load_tiny):
    """And what an autograd without a policy would keep shrinks to the latents between the steps."""
    backbone, sampler = load_tiny(), Sampler(4, 3.0, "dpm_solver++")

    def gradient(memory):
        z_BCHW = noise(2, 4, 8, 8).requires_grad_()
        saved = []

        def pack(tensor):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = denoise(backbone, z_BCHW, "a cat", sampler, memory=memory).square().sum()
        return torch.autograd.grad(loss, z_BCHW)[0], sum(saved)

    plain, much = gradient(EVERYTHING)
    assert plain.abs().max() > 1e-3
    again, little = gradient(NOTHING)
    assert torch.equal(again, plain)
    assert little < much / 10
    whole = Memory(2**40)
    gradient(whole)
    some = Memory(whole.kept // 2)
    assert torch.equal(gradient(some)[0], plain)
    assert 0 < some.kept < whole.kept


def test_the_workers_of_a_machine_share_what_it_has():
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < Memory.spare(CPU).budget * os.cpu_count() <= SHARE * memory  # tests have one thread
