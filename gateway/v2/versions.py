"""V2's model versions as callers spell them, read as Triton reads them: by C++'s `stol`.

That is: spaces and a sign may be before the number, zeros may lead it, and what follows it does not count. So "01",
" 1", "+1" and "1x" are all version 1.
"""

from __future__ import annotations

import re
from typing import Final

from gateway.errors import BadRequest, shown

_NUMBER: Final = re.compile(r"[ \t\n\v\f\r]*([+-]?)0*([0-9]+)")
_LARGEST: Final = 2**63 - 1
_DIGITS: Final = len(str(_LARGEST))  # Python reads long numbers slowly, and a caller may send any number of digits


def maybe_version(text: str) -> str | None:
    """The version as Triton writes it; "" if none was asked for; None if the text is not a version."""
    if not text:
        return ""
    found = _NUMBER.match(text)
    if found is None or len(found[2]) > _DIGITS:
        return None
    number = int(found[2])
    if number > _LARGEST or (found[1] == "-" and number):
        return None
    return str(number)


def read_version(text: str) -> str:
    """The version as Triton names it, "" if none was asked for.

    :raises BadRequest: if the text is not a version, in Triton's words, which differ for a negative number.
    """
    version = maybe_version(text)
    if version is not None:
        return version
    found = _NUMBER.match(text)
    wanted = "version should be an integral value > 0"
    if found is not None and found[1] == "-" and len(found[2]) <= _DIGITS and int(found[2]) <= _LARGEST + 1:
        raise BadRequest(f"invalid model version specified '{shown(text)}' , {wanted}")
    raise BadRequest(
        f"failed to get model version from specified version string '{shown(text)}' (details: stol), {wanted}"
    )
