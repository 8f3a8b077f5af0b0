"""The world model as several threads call it."""

from __future__ import annotations

import threading

from torch import Tensor

from examples.cartpole.model import ModelConfig, PastKeysValues, RootOutput, StepOutput, WorldModel


class SharedModel:
    """A world model that one thread calls at a time, while the others gather, commit and walk their trees.

    The model could serve all at once. But each of its hundred small operators lets go of the interpreter lock and takes
    it back: two threads inside would hand it to and fro at every operator, which takes longer than the operator.
    """

    def __init__(self, model: WorldModel) -> None:
        self._model = model
        self._turn = threading.Lock()

    @property
    def config(self) -> ModelConfig:
        """Sizes and discount."""
        return self._model.config

    def initial(self, observation: Tensor, past: PastKeysValues, positions: Tensor) -> RootOutput:
        """See `WorldModel.initial`."""
        with self._turn:
            return self._model.initial(observation, past, positions)

    def observe(self, action: Tensor, observation: Tensor, past: PastKeysValues, positions: Tensor) -> RootOutput:
        """See `WorldModel.observe`."""
        with self._turn:
            return self._model.observe(action, observation, past, positions)

    def recurrent(self, action: Tensor, past: PastKeysValues, positions: Tensor) -> StepOutput:
        """See `WorldModel.recurrent`."""
        with self._turn:
            return self._model.recurrent(action, past, positions)
