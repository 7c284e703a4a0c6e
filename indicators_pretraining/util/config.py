"""Configuration: YAML files and `dotted.key=value` overrides, checked against one typed schema before work starts.

A schema is a frozen dataclass. Its fields say what exists, of which type, with which default; `option` and `Literal` say
which values are allowed. A blank value in the YAML means the default.

Text is what stands in the file: `name: 1.10` is "1.10" and `name: on` is "on". Numbers are decimal, with leading zeros or
without: 010 is ten. YAML 1.1 would make eight of it, and ninety of 1:30; such numbers are refused, and so are 0x10 and 0o10.
"""

import codecs
import contextlib
import dataclasses
import itertools
import math
import operator
import os
import re
import reprlib
import types
import typing
import unicodedata
from dataclasses import dataclass, field
from typing import Literal

import yaml

from util.errors import UserError, nearest, reason

MAX_VALUES = 100_000
MAX_NUMBER_BITS = 1023  # what a float surely holds
SHORTEST = 8  # bytes that tell text from what is left of another file
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
BOUNDS = {"low": ("at least", operator.ge), "high": ("at most", operator.le), "above": ("above", operator.gt),
          "below": ("below", operator.lt)}
MISFIT = object()  # in place of a value that a type does not allow


def option(default, help="", **bounds):
    """A field of a schema.

    Args:
        default: its value where none is given; a list or a dict becomes one of each configuration's own.
        help: what the key means, one plain sentence.
        bounds: what a number must satisfy: low <= value <= high, or the strict bounds above < value < below. Where the
            command line is made from the schema, what argparse is told of the flag.
    """
    metadata = {"help": help, **bounds}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(item):
    """The default of a field of a schema."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def refuse_if(is_wrong, message):
    """Raise a UserError where something is wrong; the message begins with the key."""
    if is_wrong:
        raise UserError(message)


def check_bits(key, bits):
    """Refuse candidate bit-widths that are missing, repeated, or outside 2..8."""
    refuse_if(not bits or len(set(bits)) != len(bits) or not all(2 <= bit <= 8 for bit in bits),
              f"{key}: found {bits}, expected different bit-widths from 2 to 8, such as [6, 5, 4, 3, 2]")


def load_config(schema, paths, overrides=()):
    """Read YAML files, later ones over earlier ones, then overrides, into a schema.

    Args:
        paths: YAML files; at least one.
        overrides: strings such as "dataloader.batch_size=32"; the value is read as YAML. A word with dots of its own
            stands in quotes: quan.excepts."layer1.0.conv1".weight.bit=8.

    Raises:
        UserError: naming the file, the key, what was found and what is allowed.
    """
    merged, sources = {}, {"": paths[0]}
    for path in paths:
        merge(merged, decode_yaml(read_bytes(path), path), sources, path)
    for override in overrides:
        dotted, equals, value = override.partition("=")
        words = [word.strip('"') for word in KEY_WORDS.findall(dotted)]
        if not equals or not words:
            raise UserError(f"{override!r}: expected dotted.key=value")
        value = parse_yaml(value, f"override {override!r}")
        for word in reversed(words):
            value = {word: value}
        merge(merged, value, sources, "command line")
    config = build(schema, merged, sources)
    object.__setattr__(config, "given", tuple(name for name, value in merged.items() if value is not None))
    return config


def merge(base, extra, sources, source, prefix=""):
    """Merge `extra` into `base` key by key: sections merge, everything else is replaced. `source` is noted for what is new."""
    for name, value in extra.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            merge(base[name], value, sources, source, f"{dotted}.")
        else:
            base[name] = value
            sources[dotted] = source


def source_of(sources, dotted):
    """The file, or the command line, that a key or the section around it came from."""
    while dotted not in sources:
        dotted = dotted.rpartition(".")[0]
    return sources[dotted]


def read_bytes(path, what="the file", limit=MAX_YAML_FILE):
    """The bytes of a file; `what` it holds is said in errors. A limit of None allows any size, but only a regular file."""
    if limit is None and os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device may have no end
        raise UserError(f"{path}: cannot read {what} (not a regular file)")
    try:
        with open(path, "rb") as file:
            data = file.read(-1 if limit is None else limit + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read {what} ({error.strerror})") from None
    if limit is not None and len(data) > limit:
        raise UserError(f"{path}: cannot read {what} (larger than {limit / 2**20:g} MiB)")
    return data


def kind_of(data):
    """What the bytes of a file are by how they begin, in words, or '' where that tells nothing."""
    beginning = bytes(data[:2000])
    if beginning.startswith((b"PK\3\4", b"PK\5\6")):
        return "a checkpoint"
    if beginning[8:9] == b"{" and int.from_bytes(beginning[:8], "little") <= len(data):
        return "a packed model" if b"limpqp" in beginning else "a safetensors file"
    if beginning[:1] == b"\x80":
        return "an indicators file" if b"layer_name" in data else ""
    if beginning[:1] == b"\x08" and beginning[2:3] in (b"\x12", b":"):
        return "an ONNX model"
    if beginning.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8")):
        return "an image"
    text = beginning.decode("utf-8", "ignore")
    if len(data) < SHORTEST or not all(character.isprintable() or character.isspace() for character in text):
        return ""
    return "a policy" if b"\nlayer_name:" in data and b"\nweight_bits:" in data else "text"


def other_kind(data, *expected):
    """What kind_of says of the bytes of a file, where that is none of these; else ''."""
    kind = kind_of(data)
    return "" if kind in expected else kind


def decode_text(data, path):
    """The text in the bytes of a file: UTF-8, with a byte-order mark or without."""
    if kind := other_kind(data, "text", "a policy"):
        raise UserError(f"{path}: is {kind}, expected text")
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
    """A number, or true or false, of a YAML file. It stands there without quotes, and is text where text is wanted."""

    text: str
    value: bool | int | float

    def __repr__(self):
        return self.text


def plain(value):
    """A copy of what a YAML file says in which each Scalar is its value."""
    if isinstance(value, dict):
        return {name: plain(element) for name, element in value.items()}
    if isinstance(value, list):
        return [plain(element) for element in value]
    return value.value if isinstance(value, Scalar) else value


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys. Its keys are text, its numbers decimal."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node, deep=False):
        names = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(f"a list or a section where a key should be (line {line})")
            if key_node.value in names and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"the key {key_node.value!r} stands twice (line {line})")
            names.add(key_node.value)
        self.flatten_mapping(node)
        return {key_node.value: self.construct_object(value_node, deep) for key_node, value_node in node.value}

    def construct_unquoted(self, node):
        text = self.construct_scalar(node)
        if TRUTH.match(text):
            return Scalar(text, text.lower() in TRUE)
        if WHOLE_NUMBER.match(text):
            return Scalar(text, int(text))
        if NUMBER.match(text):
            return Scalar(text, float(text.lower().replace(".inf", "inf").replace(".nan", "nan")))
        raise ValueError(f"{text!r} is no decimal number, nor true or false")

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
for _tag in ("bool", "int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_unquoted)


def parse_yaml(text, where):
    try:
        return unshared(yaml.load(text, Loader=_Loader), itertools.count())
    except Exception as error:  # a tag over a value that it does not fit meets the loader with exceptions of many types
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}:{line} not valid YAML ({getattr(error, 'problem', None) or reason(error)})") from None


def unshared(value, count):
    """A copy of plain values, and Scalars, in which every alias is a value of its own; `count` numbers the values. ValueError:
    on too many of them, on a number too large for a float, and on what is not plain."""
    if next(count) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values, those of aliases counted each time")
    if isinstance(value, dict):
        return {unshared(name, count): unshared(element, count) for name, element in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(unshared(element, count) for element in value)
    number = value.value if isinstance(value, Scalar) else value
    if isinstance(number, int) and number.bit_length() > MAX_NUMBER_BITS:
        raise ValueError(f"a number of {number.bit_length()} bits")
    if number is not None and not isinstance(number, (str, int, float)):
        raise ValueError(f"a {type(value).__name__} where only numbers and text are read; put text in quotes")
    return value


def build(schema, data, sources, prefix=""):
    """Build a schema from a mapping, checking every key and value.

    Args:
        sources: {dotted key: the file it came from}, with that of all others under "".
        prefix: what stands before the keys of this section.
    """
    if not isinstance(data, dict):
        raise UserError(f"{source_of(sources, prefix[:-1])}: {prefix[:-1]}: expected a section, found {describe(data)}")
    fields, hints = {item.name: item for item in dataclasses.fields(schema)}, typing.get_type_hints(schema)
    values = {}
    for name, value in data.items():
        dotted = f"{prefix}{name}"
        if name not in fields:
            raise UserError(f"{source_of(sources, dotted)}: {dotted}: unknown key{nearest(name, fields)}")
        if value is not None:
            values[name] = convert(hints[name], value, dotted, sources, fields[name].metadata)
    try:
        return schema(**values)
    except UserError as error:  # raised by __post_init__, whose messages begin with the key
        raise UserError(f"{source_of(sources, prefix + str(error).partition(':')[0])}: {prefix}{error}") from None


def convert(hint, value, dotted, sources, bounds=types.MappingProxyType({})):
    """A value as the type `hint`, it or the elements of a list within bounds; a UserError says what was expected."""
    result = fit(hint, value, dotted, sources)
    if result is MISFIT:
        raise UserError(f"{source_of(sources, dotted)}: {dotted}: expected {expected(hint)}, found {describe(value)}"
                        + (nearest(value, typing.get_args(hint)) if typing.get_origin(hint) is Literal else ""))
    for number in result if isinstance(result, list) else [result]:
        if not all(holds(number, bounds[name]) for name, (_, holds) in BOUNDS.items() if name in bounds):
            raise UserError(f"{source_of(sources, dotted)}: {dotted}: found {number}, allowed is {describe_bounds(bounds)}")
    return result


def fit(hint, value, dotted, sources):
    """A value as the type `hint`, or MISFIT."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        fitted = (fit(arm, value, dotted, sources) for arm in arguments)
        return next((result for result in fitted if result is not MISFIT), MISFIT)
    if hint is typing.Any:
        return plain(value)
    if isinstance(value, Scalar):
        value = value.text if hint is str or kind is Literal else value.value
    if kind is Literal:
        return value if value in arguments else MISFIT
    if kind is list and isinstance(value, list):
        return [convert(arguments[0], element, dotted, sources) for element in value]
    if kind is dict and isinstance(value, dict):
        return {name: convert(arguments[1], {} if element is None else element, f"{dotted}.{name}", sources)
                for name, element in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, sources, f"{dotted}.")
    if hint is float and not isinstance(value, bool):
        return to_float(value)
    if kind or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        return MISFIT
    return value if hint is not str or is_text(value) else MISFIT


def is_text(value):
    """Whether a string can be a name, a path, or a part of a message: it encodes, and has no control characters."""
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in value)


def to_float(value):
    """A number, also one in quotes, as a float; MISFIT where it is not finite, or no number."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = float(value)
        if math.isfinite(number):
            return number
    return MISFIT


def describe_bounds(bounds):
    """The numbers that a field's metadata allows, in words; '' where it allows all."""
    return " and ".join(f"{words} {bounds[name]}" for name, (words, _) in BOUNDS.items() if name in bounds)


def expected(hint):
    """Say in words which values a type hint allows."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(expected(arm) for arm in arguments if arm is not type(None))
    if kind is Literal:
        return "one of " + ", ".join(arguments)
    if kind is list:
        return f"a list, each element {expected(arguments[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", typing.Any: "anything"}
    return words.get(hint, "a section")


_repr = reprlib.Repr()
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = _repr.maxstring = _repr.maxlong = _repr.maxother = 60


def describe(value):
    """A found value, shortened, for an error message."""
    text = _repr.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def describe_idle(config):
    """A line about keys that say something else than by default and have no effect in this run, or ''."""
    defaults = types.SimpleNamespace(**{item.name: default_of(item) for item in dataclasses.fields(config)})
    said = [f"{name} ({why})" for name, why in config.idle().items()
            if operator.attrgetter(name)(config) != operator.attrgetter(name)(defaults)]
    return f"without effect here: {', '.join(said)}" if said else ""


def to_plain(config):
    """The configuration as plain dicts, lists and scalars, fit for YAML and for a checkpoint."""
    return dataclasses.asdict(config)


def with_defaults(data, schema):
    """A plain configuration with the defaults of the keys that it lacks, as one from before a key was there does."""
    defaults = {item.name: default_of(item) for item in dataclasses.fields(schema)}
    sections = {name: with_defaults(data.get(name, {}), type(value)) for name, value in defaults.items()
                if dataclasses.is_dataclass(value) and isinstance(data.get(name, {}), dict)}
    return {**defaults, **data, **sections}


def flatten(data, prefix=""):
    """{'a': {'b': 1}} -> {'a.b': 1}"""
    flat = {}
    for name, value in data.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def differing_keys(old, new):
    """The dotted keys in which two plain configurations differ, in order. A key that is not there counts as blank, but for
    exceptions: a layer whose entry is blank is one."""
    old, new = flatten(old), flatten(new)
    absent = {name: "absent" for name in old.keys() | new.keys() if name.startswith("quan.excepts.")}
    old, new = absent | old, absent | new
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
