"""Finite Markov decision processes: known exactly, known up to their probabilities, and what may be transferred inside them."""

from robustrl.mdp import prism
from robustrl.mdp.analogy import Analogy
from robustrl.mdp.model import Floats, TabularMDP, improved
from robustrl.mdp.outcomes import Flags, ModelViolation, Outcomes
from robustrl.mdp.planning import Beliefs, Plan, evaluate, optimise, water_fill
from robustrl.mdp.safe_sets import (
    AnalogyCheck,
    Leak,
    closed_subset,
    expand,
    leaks,
    learnable_oracle,
    safe_oracle,
    validate_analogy,
    validate_safe_set,
)
from robustrl.mdp.unsafe import Unsafe

__all__ = [
    "Analogy",
    "AnalogyCheck",
    "Beliefs",
    "Flags",
    "Floats",
    "Leak",
    "ModelViolation",
    "Outcomes",
    "Plan",
    "TabularMDP",
    "Unsafe",
    "closed_subset",
    "evaluate",
    "expand",
    "improved",
    "leaks",
    "learnable_oracle",
    "optimise",
    "prism",
    "safe_oracle",
    "validate_analogy",
    "validate_safe_set",
    "water_fill",
]
