"""steps (pure): files of class names. May use step."""

from __future__ import annotations

from gateway.steps.step import Read, StepError


def read_text(parameter: str, path: str, read: Read) -> str:
    """A small UTF-8 file that a parameter names.

    :raises StepError: naming the parameter, if the file cannot be read or is not UTF-8.
    """
    try:
        return read(path).decode("utf-8-sig")
    except OSError as exc:
        raise StepError(parameter, f"cannot read '{path}': {exc.strerror or type(exc).__name__}") from exc
    except UnicodeDecodeError as exc:
        raise StepError(parameter, f"'{path}' is not UTF-8 text (byte {exc.start})") from exc


def read_labels(parameter: str, path: str, read: Read) -> list[bytes]:
    """Names of classes, one a line, line number = class, as UTF-8. Triton's `label_filename` has the same form.

    :raises StepError: naming the parameter, if there are none, or as `read_text`.
    """
    lines = read_text(parameter, path, read).splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise StepError(parameter, f"'{path}' has no labels", "one label a line, in the order of the model's classes")
    return [line.strip().encode() for line in lines]
