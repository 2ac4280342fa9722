"""What can be wrong with an experiment before or while it is played.

SimulationError
├── SetupError          what was asked for does not fit the data, found before anything trains
├── MeasurementError    measurements that cannot be compared: other rows, seeds or checkpoints
├── UndeclaredTraffic   something crossed the network that the strategy had not declared
├── RoundFailed         a round that a deployment could not have finished either
└── CacheError          a kept result that is torn, or of another experiment
"""


class SimulationError(ValueError):
    """Base of this package's errors. The message says what was expected and what came."""


class SetupError(SimulationError):
    """Devices, domains, sizes or rounds that the data does not allow."""


class MeasurementError(SimulationError):
    """Measurements that do not belong together."""


class UndeclaredTraffic(SimulationError):
    """A kind of bytes that the strategy does not declare for that direction."""


class CacheError(SimulationError):
    """A file of a kept result that cannot be used. Nothing of it is."""


class RoundFailed(SimulationError):
    """A round that a deployment could not have finished either."""
