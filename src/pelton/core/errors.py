"""Every error that Pelton raises on purpose.

One tree, so that a caller can catch `PeltonError` and a border (HTTP, CLI) can map classes to its
own vocabulary. `code` is the stable machine-readable name; the message says what was wrong and what
would be right.
"""

from __future__ import annotations

from dataclasses import dataclass


class PeltonError(Exception):
    """Root of the tree."""

    code: str = "internal_error"


class ConfigError(PeltonError):
    """A setting that cannot be used: unknown key, wrong type, contradictory values."""

    code = "invalid_config"


class InvalidRequestError(PeltonError):
    """A request that can never be served as sent. `param` names the offending field."""

    code = "invalid_value"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class ContextLengthExceededError(InvalidRequestError):
    """The prompt (with the tokens asked for) does not fit the model's context or the KV cache."""

    code = "context_length_exceeded"


class ModelNotFoundError(PeltonError):
    """No model of that name is served, known to the catalog, or on disk."""

    code = "model_not_found"


class ModelFileError(PeltonError):
    """A model file that is truncated, corrupted, hostile or of an unsupported kind."""

    code = "invalid_model_file"

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = str(path)
        self.problem = problem


class UnsupportedModelError(PeltonError):
    """A well-formed model whose architecture or feature Pelton does not implement."""

    code = "unsupported_model"


class DownloadError(PeltonError):
    """A model could not be fetched; what was already fetched is kept for the next try."""

    code = "download_failed"


class QueueFullError(PeltonError):
    """The bounded queue is full. `retry_after_s` is an estimate from the measured service rate."""

    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TenantLimitError(QueueFullError):
    """A tenant has as many requests waiting as it may; others are still served."""

    code = "rate_limit_exceeded"


class DeadlineUnreachableError(QueueFullError):
    """So much waits ahead that the request's deadline would pass before its first token."""

    code = "deadline_unreachable"


class ServiceUnavailableError(PeltonError):
    """The server is starting, restarting its engine, or draining; the request was not admitted."""

    code = "service_unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(PeltonError):
    """The engine process died while the request was running; sending it again is safe."""

    code = "engine_dead"


class EngineStepError(PeltonError):
    """The step that carried this request failed; other requests go on."""

    code = "engine_step_failed"


class DeadlineExceededError(PeltonError):
    """The request's deadline passed before it finished."""

    code = "deadline_exceeded"


class RequestCancelledError(PeltonError):
    """The request was cancelled by its client or by shutdown."""

    code = "request_cancelled"


# Errors that travel between processes, as `ErrorInfo`.
_ERRORS_BY_CODE: dict[str, type[PeltonError]] = {
    cls.code: cls
    for cls in (
        ConfigError,
        ContextLengthExceededError,
        ModelNotFoundError,
        UnsupportedModelError,
        QueueFullError,
        TenantLimitError,
        DeadlineUnreachableError,
        ServiceUnavailableError,
        EngineDeadError,
        EngineStepError,
        DeadlineExceededError,
        RequestCancelledError,
    )
}


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """A `PeltonError` as a value."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    is_invalid_request: bool = False

    @classmethod
    def of(cls, error: PeltonError) -> ErrorInfo:
        return cls(
            error.code,
            str(error),
            getattr(error, "param", None),
            getattr(error, "retry_after_s", None),
            isinstance(error, InvalidRequestError),
        )

    def to_error(self) -> PeltonError:
        """The typed error again; an unknown code keeps its code and message."""
        error_class = _ERRORS_BY_CODE.get(self.code, PeltonError)
        error: PeltonError
        if self.is_invalid_request:
            invalid_class = error_class if issubclass(error_class, InvalidRequestError) else InvalidRequestError
            error = invalid_class(self.message, param=self.param)
        elif issubclass(error_class, (QueueFullError, ServiceUnavailableError)):
            error = error_class(self.message, retry_after_s=self.retry_after_s or 1.0)
        else:
            error = error_class(self.message)
        error.code = self.code
        return error
