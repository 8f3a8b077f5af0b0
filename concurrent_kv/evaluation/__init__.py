"""Leaves evaluated together: one gather, one call of the model and one commit for all who search at the same time.

`Evaluator` is for threads, `concurrent_kv.aio.AsyncEvaluator` for tasks; both may share one.
"""

from ..pool.joint import JointBatch
from .evaluator import Evaluator, EvaluatorWorker
from .leaves import NO_PARENT, Evaluated, Leaf, Walk
from .stats import EvaluatorStats

__all__ = ["NO_PARENT", "Evaluated", "Evaluator", "EvaluatorStats", "EvaluatorWorker", "JointBatch", "Leaf", "Walk"]
