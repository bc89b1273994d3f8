"""Examples to learn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robustrl.training.supervised import Examples

EPISODES = torch.arange(20).repeat_interleave(torch.arange(1, 21))
N = len(EPISODES)


def examples(*, episodes: bool = True) -> Examples:
    inputs = torch.arange(2 * N).reshape(N, 2).float()
    return Examples(inputs, torch.arange(N) % 3, EPISODES if episodes else None)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.05, 0.12, 0.5, 0.99])
def test_hold_out_shares_no_episode_and_loses_no_row(share: float, seed: int) -> None:
    kept, held = examples().split(share, seed)
    assert kept.episodes is not None
    assert held.episodes is not None
    assert not set(kept.episodes.tolist()) & set(held.episodes.tolist())
    assert sorted(torch.cat((kept.inputs, held.inputs))[:, 0].tolist()) == examples().inputs[:, 0].tolist()
    assert len(set(held.episodes.tolist())) == min(19, -(-round(100 * share) * 20 // 100))
    kept.check_apart(held)


def test_rows_stay_with_their_targets() -> None:
    for part in (*examples().split(0.3, 1), examples().draw(17, 3), examples(episodes=False).split(0.3, 1)[1]):
        rows = (part.inputs[:, 0] / 2).long()
        assert torch.equal(part.targets, rows % 3)
        assert part.episodes is None or torch.equal(part.episodes, EPISODES[rows])


def test_independent_rows_are_held_out_one_by_one() -> None:
    kept, held = examples(episodes=False).split(0.1, 0)
    assert (len(kept), len(held)) == (189, 21)


def test_draw_of_a_seed_is_the_same_and_of_another_not() -> None:
    one, same, other = (examples().draw(20, seed).inputs for seed in (0, 0, 1))
    assert len(one) == 20
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert examples().draw(N, 0).inputs.shape == (N, 2)


def test_hold_out_with_episodes_of_the_examples_is_refused() -> None:
    whole = examples()
    with pytest.raises(ValueError, match="other episodes"):
        whole.rows(torch.arange(100)).check_apart(whole.rows(torch.arange(100, N)))


def test_hold_out_of_the_same_inputs_is_refused() -> None:
    whole = examples(episodes=False)
    with pytest.raises(ValueError, match="other inputs"):
        whole.check_apart(whole.draw(10, 0))
    whole.rows(torch.arange(100)).check_apart(whole.rows(torch.arange(99, N)))  # one equal input can be chance


def test_pictures_in_bytes_are_batches_of_floats() -> None:
    pictures = Examples(torch.full((4, 1, 2, 2), 200, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32))
    assert pictures.inputs.dtype == torch.uint8
    inputs, targets = pictures.batch(torch.tensor([0, 3]))
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert float(inputs.mean()) == 200


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)), "targets must be as many"),
        ((torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.long)), "episodes must be as many"),
        ((torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)), "at least one row"),
        ((torch.full((3, 2), torch.nan), torch.zeros(3, dtype=torch.long)), "inputs must be finite"),
        ((torch.zeros(3, 2), torch.full((3, 2), torch.inf)), "targets must be finite"),
        ((torch.zeros(3, 2), torch.zeros(3)), "targets must be integers"),
        ((torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.long)), "targets must be integers"),
        ((torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(3)), "episodes must be integers"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Examples(*arguments)


def test_arrays_are_refused() -> None:
    with pytest.raises(TypeError, match="inputs must be a torch tensor"):
        Examples([[1.0]], torch.zeros(1, dtype=torch.long))  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, torch.nan])
def test_share_outside_the_open_interval_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        examples().split(share, 0)


def test_single_episode_cannot_be_held_out() -> None:
    with pytest.raises(ValueError, match="at least two"):
        examples().rows(torch.nonzero(EPISODES == 7).flatten()).split(0.5, 0)
