"""Tables, figures, TensorBoard."""

from robustrl.report.attack import AttackReport

__all__ = ["AttackReport"]
