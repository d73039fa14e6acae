"""A simple redactor: e-mail addresses, telephone numbers, payment cards and bank accounts become placeholders.

It knows forms, not meanings: names and addresses stay. A tenant that needs more names a function of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable

EMAIL, PHONE, CARD, IBAN = "[email]", "[phone]", "[card]", "[iban]"

_EMAIL = re.compile(r"(?<![\w.%+'-])[\w.%+'-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
# +49 30 1234567 · (555) 123-4567 · 030-123 4567: what has no plus needs its usual groups, so that dates are spared.
_PHONES = (
    re.compile(r"(?<![\w+])\+\d(?:[ ./()-]{0,2}\d){7,14}(?!\d)"),
    re.compile(r"(?<![\w.+-])(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?!\d)"),
    re.compile(r"(?<![\w.+-])0\d{1,4}[ /-]\d{3,4}[ -]?\d{3,5}(?!\d)"),
)
_CARD = re.compile(r"(?<![\w+])\d(?:[ -]?\d){12,18}(?!\d)", re.ASCII)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)", re.ASCII)


def redact(text: str) -> str:
    """The text with placeholders in place of what it finds, and every other character as it was.

    Redacting again changes nothing.
    """
    # What is left beside a placeholder may only now stand free, so it looks until it finds nothing more.
    while (further := _once(text)) != text:
        text = further
    return text


def _once(text: str) -> str:
    text = _EMAIL.sub(EMAIL, text)
    text = _IBAN.sub(lambda match: _replaced(match[0], _is_iban, IBAN), text)
    text = _CARD.sub(lambda match: _replaced(match[0], _is_card, CARD), text)
    for phone in _PHONES:
        text = phone.sub(PHONE, text)
    return text


def _replaced(found: str, valid: Callable[[str], bool], placeholder: str) -> str:
    """`found` with its longest start that is valid, and ends where a group ends, replaced."""
    for end in range(len(found), 0, -1):
        if (end == len(found) or not found[end].isalnum()) and valid(found[:end]):
            return placeholder + found[end:]
    return found


def _is_card(text: str) -> bool:
    """The Luhn check (ISO/IEC 7812-1) over 13 to 19 digits."""
    digits = [int(character) for character in text if character.isdigit()]
    doubled = (2 * digit - 9 * (digit > 4) for digit in digits[-2::-2])
    return 13 <= len(digits) <= 19 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """The check of ISO 13616: the country and check digits moved to the end, letters as 10 to 35, 1 modulo 97."""
    compact = text.replace(" ", "")
    return 15 <= len(compact) <= 34 and int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1
