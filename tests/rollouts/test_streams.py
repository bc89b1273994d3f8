"""Noise streams: a slot's draws are its own, whoever else has ended."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robustrl.noise import Ablation, Gaussian, Laplace, Noise, Splitting, Uniform
from robustrl.rollouts.streams import NoiseStreams
from robustrl.seeding import torch_generator

SEED, CPU = np.random.SeedSequence(5, spawn_key=(3, 1)), torch.device("cpu")
MECHANISMS: list[Noise] = [Gaussian(0.3), Uniform(0.2), Laplace(0.1), Splitting(0.2), Ablation(0.5)]


def walk(
    noise: Noise, n: int, block: int, alive: list[list[int]], frame: tuple[int, ...] = (6,)
) -> dict[tuple[int, int], bytes]:
    """Noisy frames by (step, slot) when the slots of `alive[t]` run at step t; slot s shows the value s / 10 at every step."""
    streams, seen = NoiseStreams(noise, SEED, n, block, CPU), {}
    for t, slots in enumerate(alive):
        frames = torch.tensor(slots, dtype=torch.float32).reshape(-1, *(1,) * len(frame)).expand(-1, *frame) / 10
        for slot, noisy in zip(slots, streams(frames.clone(), np.array(slots)), strict=True):
            seen[t, slot] = noisy.numpy().tobytes()
    return seen


@pytest.mark.parametrize("noise", MECHANISMS, ids=str)
@pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
def test_a_slots_noise_does_not_depend_on_who_else_runs(noise: Noise, block: int) -> None:
    everybody = walk(noise, 7, block, [list(range(7))] * 4)
    dwindling = walk(noise, 7, block, [[0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 5, 6], [2, 5, 6], [2, 6]])
    assert all(everybody[key] == frame for key, frame in dwindling.items())
    alone = walk(noise, 7, block, [[4]] * 4)
    assert all(everybody[key] == frame for key, frame in alone.items())


def test_one_block_is_one_generator() -> None:
    """The streams of the vectorised CartPole, on which stored certificates rely."""
    generator = torch_generator(SEED)
    found = walk(Gaussian(0.3), 5, 5, [[0, 1, 2, 3, 4], [1, 4]])
    for t in range(2):
        values = torch.arange(5).float()[:, None].expand(5, 6) / 10
        expected = Gaussian(0.3).perturb(values, generator)
        assert all(found[key] == expected[key[1]].numpy().tobytes() for key in found if key[0] == t)


@pytest.mark.parametrize("block", [1, 3])
def test_slots_and_steps_have_independent_gaussian_noise(block: int) -> None:
    n, steps = 6, 400
    streams = NoiseStreams(Gaussian(0.5), SEED, n, block, CPU)
    draws = torch.stack([streams(torch.zeros(n, 40), np.arange(n)) for _ in range(steps)]).double().numpy() / 0.5
    assert abs(draws.mean()) < 4 / np.sqrt(draws.size)
    assert abs(draws.var() - 1) < 4 * np.sqrt(2 / draws.size)
    rows = draws.transpose(1, 0, 2).reshape(n, -1)
    off = np.corrcoef(rows)[~np.eye(n, dtype=bool)]
    assert np.abs(off).max() < 5 / np.sqrt(rows.shape[1])
    in_time = [np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]]
    assert np.abs(in_time).max() < 5 / np.sqrt(draws.size)


def test_frames_handed_in_are_not_written_to() -> None:
    for block in (1, 2, 9):
        frames = torch.ones(3, 4)
        NoiseStreams(Gaussian(1.0), SEED, 3, block, CPU)(frames, np.arange(3))
        assert torch.equal(frames, torch.ones(3, 4))
