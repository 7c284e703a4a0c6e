"""Configuration: YAML files and `dotted.key=value` overrides, checked against one typed schema before work starts.

A schema is a frozen dataclass. Its fields say what exists, of which type, with which default; `bounded` and
`Literal` say which values are allowed. A blank value in the YAML means the default.

Text is what stands in the file: `name: 1.10` is "1.10" and `name: on` is "on". Numbers are decimal, with leading zeros or
without: 010 is ten. YAML 1.1 would make eight of it, and ninety of 1:30; such numbers are refused, and so are 0x10 and 0o10.
"""

import codecs
import dataclasses
import functools
import itertools
import math
import operator
import re
import reprlib
import types
import typing
import unicodedata
from dataclasses import dataclass, field
from typing import Literal

import yaml

from util.errors import UserError, nearest, reason

MAX_ALIASES = 100
MAX_VALUES = 100_000
MAX_NUMBER_BITS = 1024  # as many as the largest float has
MAX_YAML_FILE = 2**18
MAX_LEVELS = 50
AUTO = "auto"
KEY_WORDS = re.compile(r'"[^"]*"|[^."]+')
BLANK = re.compile(r"(~|null|Null|NULL|)\Z")
TRUTH = re.compile(r"(true|True|TRUE|yes|Yes|YES|on|On|ON|false|False|FALSE|no|No|NO|off|Off|OFF)\Z")
TRUE = ("true", "yes", "on")
WHOLE_NUMBER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*\Z")
NUMBER = re.compile(r"([-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
                    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z")
MERGE = re.compile(r"<<\Z")


def bounded(default, low=None, high=None, above=None, below=None, help=""):
    """A field whose number must satisfy low <= value <= high, or the strict bounds above < value < below.

    Args:
        help: what the key means, one plain sentence.
    """
    return field(default=default, metadata={"low": low, "high": high, "above": above, "below": below, "help": help})


def described(default, help):
    """A field of any value of its type, and what the key means."""
    return bounded(default, help=help)


def check_bits(key, bits):
    """Refuse candidate bit-widths that are missing, repeated, or outside 2..8."""
    if not bits or len(set(bits)) != len(bits) or not all(2 <= bit <= 8 for bit in bits):
        raise UserError(f"{key}: found {bits}, expected different bit-widths from 2 to 8, such as [6, 5, 4, 3, 2]")


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


def load_config(schema, paths, overrides=()):
    """Read YAML files, later ones over earlier ones, then `dotted.key=value` overrides, into `schema`.

    Args:
        schema: a frozen dataclass type.
        paths: YAML files; at least one.
        overrides: strings such as "dataloader.batch_size=32"; the value is read as YAML. A word with dots of its own
            stands in quotes: quan.excepts."layer1.0.conv1".weight.bit=8.

    Raises:
        UserError: naming the file, the key, what was found and what is allowed.
    """
    merged, origin = {}, {}
    for path in paths:
        merge(merged, decode_yaml(read_bytes(path), path), origin, path)
    for override in overrides:
        key, equals, value = override.partition("=")
        words = [word.strip('"') for word in KEY_WORDS.findall(key)]
        if not equals or not words:
            raise UserError(f"{override!r}: expected dotted.key=value")
        merge(merged, nest(words, parse_yaml(value, f"override {override!r}")), origin, "command line")
    config = build(schema, merged, "", Origin(paths[0], origin))
    object.__setattr__(config, "given", tuple(key for key, value in merged.items() if value is not None))
    return config


def read_yaml(path):
    """Read a YAML file that holds a mapping, as plain values."""
    return plain(decode_yaml(read_bytes(path), path))


def read_bytes(path, limit=MAX_YAML_FILE, what="the file"):
    """The bytes of a file that has to be small."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read {what} ({error.strerror})") from None
    if len(data) > limit:
        raise UserError(f"{path}: cannot read {what} (larger than {limit / 2**20:g} MiB)")
    return data


def decode_text(data, path):
    """The text in the bytes of a file: UTF-8, with a byte-order mark or without."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}: the file is UTF-16 text; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: cannot read the file (line {line} is not UTF-8 text); save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: cannot read the file (not text)")
    return text


def decode_yaml(data, path):
    """The mapping in the bytes of a YAML file, its numbers and truth values as Scalars."""
    content = parse_yaml(decode_text(data, path), path)
    if content is None:
        raise UserError(f"{path}: the file is empty")
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found {describe(content)}")
    return content


@dataclass(frozen=True)
class Scalar:
    """What stands in a YAML file without quotes and is a number, or true or false, unless text is wanted there."""

    text: str
    value: bool | int | float

    def __repr__(self):
        return self.text


def plain(value):
    """A copy of what a YAML file says in which each Scalar is its value."""
    if isinstance(value, dict):
        return {key: plain(element) for key, element in value.items()}
    if isinstance(value, list):
        return [plain(element) for element in value]
    return value.value if isinstance(value, Scalar) else value


def written(value):
    """A value of a YAML file as text, as it stands there; None where it is a list or a section."""
    return value.text if isinstance(value, Scalar) else value if isinstance(value, str) else None


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and a flood of aliases. Its keys are text, its numbers decimal."""

    yaml_implicit_resolvers = {}

    def __init__(self, stream):
        super().__init__(stream)
        self.aliases = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                raise yaml.YAMLError(f"more than {MAX_ALIASES} aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        if not isinstance(node, yaml.MappingNode):  # a tag over something else
            return super().construct_mapping(node, deep)
        keys = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(f"a list or a section where a key should be (line {key_node.start_mark.line + 1})")
            if key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in keys:
                    raise yaml.YAMLError(f"the key {key_node.value!r} stands twice (line {key_node.start_mark.line + 1})")
                keys.add(key_node.value)
        self.flatten_mapping(node)
        return {key_node.value: self.construct_object(value_node, deep) for key_node, value_node in node.value}

    def construct_truth(self, node):
        text = self.construct_scalar(node)
        if not TRUTH.match(text):
            raise ValueError(f"{text!r} is neither true nor false")
        return Scalar(text, text.lower() in TRUE)

    def construct_number(self, node):
        text = self.construct_scalar(node)
        if WHOLE_NUMBER.match(text):
            return Scalar(text, int(text))
        if NUMBER.match(text) and node.tag.endswith(":float"):
            return Scalar(text, float(text.lower().replace(".inf", "inf").replace(".nan", "nan")))
        raise ValueError(f"{text!r} is no decimal number")

    def fetch_flow_collection_start(self, token):
        if self.flow_level >= MAX_LEVELS:  # the scanner looks at every level again with each token
            raise yaml.YAMLError(f"more than {MAX_LEVELS} levels of brackets")
        super().fetch_flow_collection_start(token)

    def flatten_mapping(self, node):
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:  # merge keys of merge keys multiply
            raise yaml.YAMLError(f"more than {MAX_VALUES} values")


for _tag, _pattern in (("null", BLANK), ("bool", TRUTH), ("int", WHOLE_NUMBER), ("float", NUMBER), ("merge", MERGE)):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)
_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.construct_truth)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def parse_yaml(text, where):
    try:
        return unshared(yaml.load(text, Loader=_Loader), itertools.count())
    except Exception as error:  # a tag over a value that it does not fit meets the loader with exceptions of many types
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}:{line} not valid YAML ({getattr(error, 'problem', None) or reason(error)})") from None


def unshared(value, count):
    """A copy of plain values, and Scalars, in which every alias has become a value of its own; `count` numbers the values.

    Raises:
        ValueError: on too many of them, on a number too large for a float, and on what is not plain.
    """
    if next(count) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    if isinstance(value, dict):
        return {unshared(key, count): unshared(element, count) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(unshared(element, count) for element in value)
    number = value.value if isinstance(value, Scalar) else value
    if isinstance(number, int) and number.bit_length() > MAX_NUMBER_BITS:
        raise ValueError(f"a number of {number.bit_length()} bits")
    if number is not None and not isinstance(number, (str, int, float)):
        raise ValueError(f"a {type(value).__name__} where only numbers and text are read; put text in quotes")
    return value


def merge(base, extra, origin, source, prefix=""):
    """Merge `extra` into `base` key by key; sections merge, everything else is replaced."""
    for key, value in extra.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value, origin, source, f"{dotted}.")
        else:
            base[key] = value
            origin[dotted] = source


def nest(keys, value):
    return {keys[0]: nest(keys[1:], value)} if len(keys) > 1 else {keys[0]: value}


@dataclass(frozen=True)
class Origin:
    """Which file, or the command line, a key came from."""

    default: str
    sources: dict

    def of(self, dotted):
        parts = dotted.split(".")
        for length in range(len(parts), 0, -1):
            source = self.sources.get(".".join(parts[:length]))
            if source is not None:
                return source
        return self.default


def build(schema, data, prefix, where):
    """Build the frozen dataclass `schema` from a mapping, checking every key and value."""
    if not isinstance(data, dict):
        raise UserError(f"{where.of(prefix[:-1])}: {prefix[:-1]}: expected a section, found {describe(data)}")
    fields = {item.name: item for item in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    values = {}
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        if key not in fields:
            raise UserError(f"{where.of(dotted)}: {dotted}: unknown key{nearest(key, fields)}")
        if value is not None:
            values[key] = convert(hints[key], value, dotted, where, fields[key])
    try:
        return schema(**values)
    except UserError as error:  # raised by __post_init__, whose messages begin with the key
        key = str(error).partition(":")[0]
        raise UserError(f"{where.of(prefix + key)}: {prefix}{error}") from None


def convert(hint, value, dotted, where, item=None):
    """Return `value` as the type `hint`, or raise a UserError that says what was expected."""
    matched, result = try_convert(hint, value, dotted, where)
    if not matched:
        raise UserError(f"{where.of(dotted)}: {dotted}: expected {expected(hint)}, found {describe(value)}"
                        + (nearest(value, typing.get_args(hint)) if typing.get_origin(hint) is Literal else ""))
    if item is not None and isinstance(result, (int, float)) and not isinstance(result, bool):
        check_bounds(result, item.metadata, dotted, where)
    return result


def try_convert(hint, value, dotted, where):
    """Return (True, converted) where `value` fits `hint`, else (False, None)."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Scalar) and kind not in (typing.Union, types.UnionType):
        value = value.text if hint is str or kind is Literal else value.value
    if hint is typing.Any:
        return True, plain(value)
    if hint is type(None):
        return value is None, None
    if kind in (typing.Union, types.UnionType):
        return next((pair for pair in (try_convert(arm, value, dotted, where) for arm in arguments) if pair[0]),
                    (False, None))
    if kind is Literal:
        return value in arguments, value
    if kind is list:
        return (True, [convert(arguments[0], element, dotted, where) for element in value]) \
            if isinstance(value, list) else (False, None)
    if kind is dict:
        return (True, {str(key): convert(arguments[1], {} if element is None else element, f"{dotted}.{key}", where)
                       for key, element in value.items()}) if isinstance(value, dict) else (False, None)
    if dataclasses.is_dataclass(hint):
        return True, build(hint, value, f"{dotted}.", where)
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool), value
    if hint is float:
        return to_float(value)
    if hint is str:
        return (True, str(value)) if isinstance(value, (str, int, float)) and is_text(str(value)) else (False, None)
    return isinstance(value, hint), value


def is_text(value):
    """Whether a string can be a name, a path, or a part of a message: it encodes, and has no control characters."""
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in value)


def to_float(value):
    """A number, also one in quotes; refuse what is not finite."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    return (True, number) if math.isfinite(number) else (False, None)


def check_bounds(value, bounds, dotted, where):
    holds = {"low": operator.ge, "high": operator.le, "above": operator.gt, "below": operator.lt}
    if not all(compare(value, bounds[name]) for name, compare in holds.items() if bounds.get(name) is not None):
        raise UserError(f"{where.of(dotted)}: {dotted}: found {value}, allowed is {describe_bounds(bounds)}")


def describe_bounds(bounds):
    """The numbers that a field's metadata allows, in words; '' where it allows all."""
    words = {"low": "at least", "high": "at most", "above": "above", "below": "below"}
    return " and ".join(f"{text} {bounds[name]}" for name, text in words.items() if bounds.get(name) is not None)


def expected(hint):
    """Say in words which values a type hint allows."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(expected(arm) for arm in arguments if arm is not type(None))
    if kind is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if kind is list:
        return f"a list, each element {expected(arguments[0])}"
    if kind is dict or dataclasses.is_dataclass(hint):
        return "a section"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", typing.Any: "anything"}
    return words.get(hint, str(hint))


def describe(value):
    """A found value, shortened, for an error message."""
    try:
        text = _repr.repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or a deep nesting
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= 60 else text[:57] + "..."


_repr = reprlib.Repr()
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = _repr.maxstring = _repr.maxlong = _repr.maxother = 60


def describe_idle(config):
    """A line about keys that say something else than by default and have no effect in this run, or ''."""
    fields = {item.name: item for item in dataclasses.fields(config)}

    def is_given(key):
        first, *rest = key.split(".")
        item = fields[first]
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        return functools.reduce(getattr, key.split("."), config) != functools.reduce(getattr, rest, default)

    said = [f"{key} ({why})" for key, why in config.idle().items() if is_given(key)]
    return f"without effect here: {', '.join(said)}" if said else ""


def to_plain(config):
    """The configuration as plain dicts, lists and scalars, fit for YAML and for a checkpoint."""
    return dataclasses.asdict(config)


def flatten(data, prefix=""):
    """{'a': {'b': 1}} -> {'a.b': 1}"""
    flat = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing_keys(old, new):
    """The dotted keys in which two plain configurations differ, in order. A key that is not there counts as blank, but for
    exceptions: a layer whose entry is blank is one."""
    old, new = flatten(old), flatten(new)
    absent = {key: "absent" for key in old.keys() | new.keys() if key.startswith("quan.excepts.")}
    return sorted(key for key in old.keys() | new.keys() if old.get(key, absent.get(key)) != new.get(key, absent.get(key)))
