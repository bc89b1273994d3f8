"""The seed tree: a stream depends on its own path alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robustrl.seeding import chunk_seeds, integer_seed, numpy_generator, slot_seeds, torch_generator

STREAMS = ("environment", "noise", "attacker", "policy")


def test_every_stream_of_every_chunk_under_every_root_is_different() -> None:
    states = {
        integer_seed(getattr(chunk_seeds(seed, chunk), stream))
        for seed in range(5)
        for chunk in range(20)
        for stream in STREAMS
    }
    assert len(states) == 5 * 20 * len(STREAMS)


def test_a_chunk_does_not_depend_on_who_was_asked_for_before_it() -> None:
    alone = chunk_seeds(3, 7)
    for chunk in range(7):
        chunk_seeds(3, chunk).noise.spawn(2)
    again = chunk_seeds(3, 7)
    for stream in STREAMS:
        assert integer_seed(getattr(alone, stream)) == integer_seed(getattr(again, stream))


def test_a_slot_keeps_its_seed_when_the_chunk_grows() -> None:
    sequence = chunk_seeds(0, 0).environment
    seeds = slot_seeds(sequence, 1000)
    assert seeds.dtype == np.uint32
    assert seeds.shape == (1000,)
    assert np.array_equal(slot_seeds(sequence, 10), seeds[:10])
    assert len(np.unique(seeds)) == 1000


def test_integer_seeds_fit_every_consumer() -> None:
    values = [integer_seed(np.random.SeedSequence(i)) for i in range(2000)]
    assert min(values) >= 0
    assert max(values) < 2**63
    assert max(values) > 2**62
    torch.Generator().manual_seed(max(values))


def test_torch_generators_repeat_and_differ_by_stream() -> None:
    seeds = chunk_seeds(1, 2)
    first, again, other = (torch.rand(8, generator=torch_generator(s)) for s in (seeds.noise, seeds.noise, seeds.policy))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_integer_seed_gives_numpy_the_same_generator_twice() -> None:
    assert numpy_generator(5).random() == numpy_generator(5).random()
    assert numpy_generator(None).random() != numpy_generator(None).random()


@pytest.mark.parametrize(
    ("seed", "chunk", "name", "kind"),
    [
        (-1, 0, "seed", ValueError),
        (0, -1, "chunk", ValueError),
        (1.5, 0, "seed", TypeError),
        (True, 0, "seed", TypeError),
        (0, "1", "chunk", TypeError),
        (None, 0, "seed", TypeError),
    ],
)
def test_bad_seeds_are_refused_by_name(seed: object, chunk: object, name: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^{name} must be an integer >= 0"):
        chunk_seeds(seed, chunk)  # type: ignore[arg-type]
