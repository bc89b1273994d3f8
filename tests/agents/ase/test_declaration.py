"""What is known before the first step: as declared, and as cut to a closed first safe set."""

from __future__ import annotations

import numpy as np

from agents.ase.small import random_world
from robustrl.agents.ase import Declaration


def test_what_was_declared_is_kept_beside_what_the_first_safe_set_leaves_of_it() -> None:
    of = random_world(13)
    declared = Declaration.of(of)
    for found in (declared, Declaration.from_arrays(*declared.to_arrays())):
        np.testing.assert_array_equal(found.declared.candidates, of.outcomes.candidates)
        cut = found.declared.candidates & ~found.outcomes.candidates
        assert np.argwhere(cut).tolist() == [[0, 0, 2], [1, 0, 2]]  # the lava beside the two home pairs
