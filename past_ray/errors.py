"""Every error that past_ray raises on purpose.

::

    PastRayError
    +-- ConfigError(ValueError)        the user asked for something impossible
    +-- DataError(ValueError)          an example or a table is malformed
    +-- SkillVectorError(ValueError)   checkpoints cannot be subtracted or added
    +-- StorageError(RuntimeError)     a file or folder could not be written or read
    +-- ClusterError(RuntimeError)     an actor, a placement or a transfer failed
    |   +-- ActorLostError             a process died or stopped answering; its work is repeated
    +-- ParityError(RuntimeError)      generator and learner disagree after a weight sync
    +-- RolloutError                   recorded on the rollout; never ends a run
        +-- GenerationError
        +-- ToolError
        +-- GradingError

A message says what must hold, what was found and what to do. Exceptions cross processes, so each
takes exactly one string: a custom ``__init__`` does not survive pickling through Ray.
"""


class PastRayError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(PastRayError, ValueError):
    """The configuration asks for something that cannot be done."""


class DataError(PastRayError, ValueError):
    """An example or a table does not follow its schema."""


class SkillVectorError(PastRayError, ValueError):
    """Two checkpoints, or a checkpoint and a skill vector, do not fit together."""


class StorageError(PastRayError, RuntimeError):
    """A file or folder could not be written or read."""


class ClusterError(PastRayError, RuntimeError):
    """An actor, a placement or a transfer on the cluster failed."""


class ActorLostError(ClusterError):
    """A process died or stopped answering. Its unfinished work is repeated, not its blame."""


class ParityError(PastRayError, RuntimeError):
    """Generator and learner give different log-probabilities for the same weights."""


class RolloutError(PastRayError):
    """One rollout failed. Recorded as its status; the run goes on."""


class GenerationError(RolloutError):
    """The generator returned no usable completion."""


class ToolError(RolloutError):
    """A tool call failed or timed out."""


class GradingError(RolloutError):
    """The reward function failed; such a rollout is excluded, never scored 0."""
