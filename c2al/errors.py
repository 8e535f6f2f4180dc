"""The error tree. Every message names the file, the field or row group, and the value.

``exit_code`` is what the command line returns: 2 for anything the user can mend by
changing input or configuration, 1 for a run that failed after it began, 130 and 143 for one that a
signal ended.
"""


class C2ALError(Exception):
    """Base of every error c2al raises on purpose."""

    exit_code = 1


class ConfigError(C2ALError):
    """A configuration that cannot run. Carries every problem found, one a line."""

    exit_code = 2

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(C2ALError):
    """Input data that is missing, unreadable or outside its contract."""

    exit_code = 2


class CohortError(C2ALError):
    """A cohort or axis that is unknown, empty or cannot be chosen."""

    exit_code = 2


class CheckpointError(C2ALError):
    """A checkpoint that is missing, corrupt or belongs to another model."""

    exit_code = 2


class PlanError(C2ALError):
    """A sharding plan that does not fit the topology or the model."""

    exit_code = 2


class OutputError(C2ALError):
    """An output that cannot be made: a full or read-only disk, a file in the way, another writer."""

    exit_code = 2


class LockedError(OutputError):
    """A folder that another process is writing."""


class StateError(C2ALError):
    """A state file (JSON that another job wrote) that is missing, damaged, foreign or of another version."""

    exit_code = 2


class OperandError(C2ALError, ValueError):
    """Tensors whose shape, dtype or device an op does not take, or an option it does not know."""


class BackendError(C2ALError):
    """A kernel backend or device that was asked for and cannot run here."""

    exit_code = 2


class TrainingError(C2ALError):
    """Training that had to stop: a non-finite loss, a lost rank, a failed write."""


class InterruptError(TrainingError):
    """Training that SIGINT ended after a step, which is saved. The exit code is a shell's for a signal: 128 + it."""

    exit_code = 128 + 2


class TerminateError(InterruptError):
    """The same of SIGTERM."""

    exit_code = 128 + 15


class NotFiniteError(TrainingError):
    """A loss, weights or optimizer state that are not finite."""
