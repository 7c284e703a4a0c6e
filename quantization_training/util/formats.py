"""What values read from a file may be: predicates, and functions that build predicates of containers from them."""

import json
import sys

from util.config import is_text

LARGEST = sys.float_info.max
SAFETENSORS_LENGTH = 8  # a safetensors file begins with the length of its header, which is JSON, in so many bytes


def whole(high, low=0):
    """A whole number within bounds that are allowed themselves."""
    return lambda value: type(value) is int and low <= value <= high


is_count, is_positive = whole(2**63 - 1), whole(2**63 - 1, low=1)


def is_bool(value):
    return type(value) is bool


def is_name(value):
    return isinstance(value, str) and is_text(value)


def number(low=-LARGEST, high=LARGEST):
    """A finite number within bounds that are allowed themselves."""
    return lambda value: type(value) in (int, float) and low <= value <= high


def optional(fits):
    return lambda value: value is None or fits(value)


def list_of(fits):
    return lambda value: isinstance(value, list) and all(map(fits, value))


def sequence(*kinds):
    """A list of so many values, each of which its own predicate accepts."""
    return lambda value: (isinstance(value, list) and len(value) == len(kinds)
                          and all(fits(element) for fits, element in zip(kinds, value, strict=True)))


def table_of(fits, is_key=is_name):
    return lambda value: isinstance(value, dict) and all(is_key(key) and fits(element) for key, element in value.items())


def record(needed, optional=None, others=None):
    """A dict with the keys of {key: predicate}; `others` accepts the values of further names, None allows none."""
    known = needed | (optional or {})

    def fits(value):
        return type(value) is dict and needed.keys() <= value.keys() and all(
            known[key](element) if key in known else others is not None and is_name(key) and others(element)
            for key, element in value.items())

    return fits


def safetensors_metadata(data):
    """The metadata in the header of a safetensors file, which has to be JSON; {} where it has none."""
    length = int.from_bytes(data[:SAFETENSORS_LENGTH], "little")
    return json.loads(data[SAFETENSORS_LENGTH:SAFETENSORS_LENGTH + length]).get("__metadata__") or {}
