"""Finite Markov decision processes: known exactly, known up to their probabilities, and what may be transferred inside them."""

from robustrl.mdp.model import Floats, TabularMDP, improved
from robustrl.mdp.outcomes import ModelViolation, Outcomes

__all__ = ["Floats", "ModelViolation", "Outcomes", "TabularMDP", "improved"]
