"""Every error Tidegate raises on purpose.

* TidegateError
  + ConfigError           a setting is wrong; fix the file or the flag
  + RequestError          one request is wrong; fix that request (HTTP 400, 413, 422)
  + CheckpointError       a checkpoint is missing, damaged or of an unknown kind
  + BundleError           a bundle is damaged, incomplete or from a newer version
  + ConversionError       a model cannot be lowered to the wanted target
  + AccessError           an API key may not do this (HTTP 403)
  + CapacityError         no room right now; wait, or let it overflow            retryable
    - LimitError            a key has used up its rate for now
      . QuotaError            or what it may use in a day or a month
  + UnavailableError      the engine, the broker or the peer is gone             retryable
    - TeamError             a process that runs a part of the model; all must start again
  + SensorError           a sensor gave nothing or nonsense; a later reading may be good
  + ActuationError        a power mode could not be taken; the board is as it was
  + DeadlineError         a request was not answered within the time its caller gave it
  + ExecutionError        a step of the model failed; the request is lost, the engine is not
  + LinkError             the sealed link refused something
    - SealError           a message failed authentication; dropped, counted, never retried
    - IdentityError       a key, an advert or a device is unknown, expired or revoked
      . DeviceRefusedError  the gateway takes nothing from this device any more

`retryable` is the only thing callers branch on; everything else is for people. A message names
the setting or field, the value it had and what is allowed, and never a secret.
"""

from __future__ import annotations

import traceback
from typing import ClassVar


class TidegateError(Exception):
    """Base of the tree. Catch it at a process or request boundary and nowhere else."""

    retryable: ClassVar[bool] = False
    code: ClassVar[str] = "internal_error"
    """Stable machine-readable name, the `code` of the HTTP error object."""
    exit_status: ClassVar[int] = 1
    """Of a command that ends with it; 70 (EX_SOFTWARE) where starting it again may help."""


class ConfigError(TidegateError):
    """A setting is out of range. Names the setting, what it was and what it may be."""

    code = "invalid_config"

    def __init__(self, setting: str, value: object, allowed: str) -> None:
        super().__init__(f"{setting} = {value!r}: must be {allowed}")
        self.setting = setting
        self.allowed = allowed


class RequestError(TidegateError):
    """One request is wrong. `status` is the HTTP status that says so (400, 413, 422 or 404)."""

    code = "invalid_request"

    def __init__(self, field: str, problem: str, *, status: int = 400) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.status = status


class CheckpointError(TidegateError):
    """A checkpoint is missing, damaged or of an unknown kind. The message names the file."""

    code = "invalid_checkpoint"


class BundleError(TidegateError):
    """A bundle is damaged, incomplete or from a newer version. The message names the file."""

    code = "invalid_bundle"


class ConversionError(TidegateError):
    """A model cannot be lowered to the wanted target; the message says which part and why."""

    code = "conversion_failed"


class AccessError(TidegateError):
    """An API key is good, and may not do this. The message says what it lacks."""

    code = "access_denied"


class CapacityError(TidegateError):
    """There is no room right now; `retry_after_s` is a hint when there may be."""

    retryable = True
    code = "over_capacity"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LimitError(CapacityError):
    """An API key has used up its rate; the message says which limit, `retry_after_s` when it ends.

    `limit` names it in a few fixed words, for a metric's label.
    """

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, limit: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.limit = limit


class QuotaError(LimitError):
    """An API key has used up its quota of a day or a month."""

    code = "insufficient_quota"


class UnavailableError(TidegateError):
    """The engine, the broker or the peer is gone for now."""

    retryable = True
    code = "unavailable"


class TeamError(UnavailableError):
    """A process that runs a part of the model is gone, and the service with it: start it again."""

    exit_status = 70


class SensorError(TidegateError):
    """A sensor gave nothing, or nothing that can be true; a later reading may be good."""

    retryable = True
    code = "sensor_failed"


class ActuationError(TidegateError):
    """A power mode could not be taken; the message says what refused it and how to mend it."""

    code = "actuation_failed"


class DeadlineError(TidegateError):
    """A request was not answered within the time its caller gave it; nobody wants it any more."""

    code = "deadline_exceeded"


class ExecutionError(TidegateError):
    """A step of the model failed; the request that made it fail is lost, the engine goes on."""

    code = "execution_failed"


class LinkError(TidegateError):
    """The sealed link refused something."""

    code = "link_error"


class SealError(LinkError):
    """A message failed authentication. Says nothing about why; dropped, counted, not retried."""

    code = "seal_error"

    def __init__(self) -> None:
        super().__init__("message could not be opened")


class IdentityError(LinkError):
    """A key, an advert or a device is unknown, expired or revoked."""

    code = "identity_error"


class DeviceRefusedError(IdentityError):
    """The gateway takes nothing from this device any more; enrol it again, or ask its owner.

    Its message is for whoever calls the device, so it names no file and no key.
    """

    code = "device_refused"


def describe_defect(error: BaseException) -> str:
    """Type and frames of an unexpected error, for a log.

    Its message is left out: a library's may quote the data that it tripped over, and a prompt must
    not reach a log.
    """
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__qualname__}\n{frames}"
