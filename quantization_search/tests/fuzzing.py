"""Inputs that were changed at random, always in the same way, and what no reader may do with one.

The other stages' tests have a copy of this file (make sync). LIMPQP_FUZZ says how many inputs all fuzz tests take together.
"""

import contextlib
import copy
import io
import os
import pathlib
import pickle
import pickletools
import random
import resource
import signal
import traceback
import warnings

from util.errors import UserError

USUAL = 500  # inputs in all three stages together
SECONDS = 5  # for one input
MEMORY = 500  # MB that all inputs of a test may add at most
CANARY = "canary"


def inputs(share):
    """(number, its generator of random numbers) of a test that takes `share` of the USUAL inputs."""
    total = int(os.environ.get("LIMPQP_FUZZ", USUAL))
    return ((number, random.Random(number)) for number in range(share * total // USUAL))


# ---------------------------------------------------------------------------------------------------------------------
# What no reader may do.


class TooSlow(BaseException):
    """The reader hangs."""


def outcome(read, names, number):
    """What read() returns, or its UserError; the current folder holds the input, and is left as it is.

    Args:
        names: what a message may call the input, its path first.
        number: of the input, for messages.

    Raises:
        AssertionError: where the reader did anything else.
    """
    before, memory = contents(), peak()
    said = io.StringIO()
    with warnings.catch_warnings(record=True) as warned, time_limit(), contextlib.redirect_stdout(said), \
            contextlib.redirect_stderr(said):
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # which users are not shown
        try:
            result = read()
        except UserError as error:
            result = error
        except (Exception, SystemExit, TooSlow) as error:
            places = "".join(traceback.format_tb(error.__traceback__)[-3:])
            raise AssertionError(f"input {number}: {type(error).__name__} {error}\n{places}") from None
    assert not warned, f"input {number}: {warned[0].message}"
    assert contents() == before, f"input {number}: a file was written"
    assert peak() - memory < MEMORY, f"input {number}: {peak() - memory} MB"
    if isinstance(result, UserError):
        assert "\n" not in str(result) and any(name in str(result) for name in names), f"input {number}: {result}"
    return result


def contents():
    return {path: path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()}


def peak():
    """Most memory that this process had so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextlib.contextmanager
def time_limit():
    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------------------------
# Changed bytes.


def changed_bytes(rng, data):
    """`data` with one change: never the same bytes."""
    while True:
        changed = rng.choice(BYTE_CHANGES)(rng, data)
        if changed != data:
            return changed


def _span(rng, data):
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice([1, 2, 8, 64, 1000]))


def _flip(rng, data):
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1:]


def _overwrite(rng, data):
    start, end = _span(rng, data)
    return data[:start] + rng.choice([rng.randbytes(end - start), bytes(end - start), b"\xff" * (end - start)]) + data[end:]


def _truncate(rng, data):
    return data[:rng.randrange(len(data))]


def _insert(rng, data):
    start, end = _span(rng, data)
    return data[:start] + rng.choice([rng.randbytes(8), b"\0", b"\n", data[start:end]]) + data[start:]


def _delete(rng, data):
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _swap(rng, data):
    first, second, third = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:first] + data[second:third] + data[first:second] + data[third:]


def _concatenate(rng, data):
    return rng.choice([data + data, data + rng.randbytes(9), rng.randbytes(9) + data, data + b"\n"])


BYTE_CHANGES = (_flip, _flip, _overwrite, _truncate, _insert, _delete, _swap, _concatenate)


# ---------------------------------------------------------------------------------------------------------------------
# Changed pickles.

PICKLE_SNIPPETS = (
    b"cos\nsystem\n", b"cposix\nsystem\n(X\x0c\0\0\0touch canarytR", b"cposix\nsystem\nX\x0c\0\0\0touch canary\x85R",
    b"\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch canary\x85R", b"cbuiltins\neval\n", b"c__builtin__\nbytearray\n",
    b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R", b"ctorch\nTensor\n\x8a\x05\0\0\0\0\x7f\x85R",
    b"cnumpy\nndarray\n", b"(iposix\nsystem\n", b"Pcanary\n", b"X\x06\0\0\0canaryQ", b"R", b"\x81", b"o", b"b",
    b"r\xff\xff\xff\x7f", b"p99999999999\n", b"\x8d" + b"\xff" * 7 + b"\x7f", b"\x8e" + b"\xff" * 6 + b"\0\0",
    b"\x96" + b"\xff" * 5 + b"\0\0\0", b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"]" * 3000, b"(" * 3000,
    b"}" * 3000, b"K\x01\x85" + b"\x85" * 3000, b"I" + b"9" * 9999 + b"\n", b"L" + b"9" * 9999 + b"L\n", b"F1e999\n",
    b"Fnan\n", b"N", b"\x88", b"0", b"1", b"2", b"2a", b"2s", b"2e", b"h\0", b"\x94", b"t", b"l", b"d", b"a", b"e", b"s",
    b"u", b"\x80\x02", b"\x80\x05", b"\x80\xff", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x97", b"\x82\x01",
    b"\x84\xff\xff\xff\x7f", b".", b"\x8f", b"\x91", b"\x92", b"U\x03\xff\xfe\xfd", b"C\x01a", b"V\\ud800\n",
    b"G" + b"\x7f" * 8)


def changed_pickle(rng, data):
    """`data`, a pickle, with opcodes inserted, taken out, doubled or exchanged between two others."""
    places = [position for _, _, position in pickletools.genops(data)]
    start, end = sorted(rng.choice(places) for _ in range(2))
    return rng.choice([data[:start] + rng.choice(PICKLE_SNIPPETS) + data[start:],
                       data[:start] + rng.choice(PICKLE_SNIPPETS) + data[start:],
                       data[:start] + rng.choice(PICKLE_SNIPPETS) + data[end:],
                       data[:start] + data[end:], data[:end] + data[start:]])


class Touch:
    """Would run code where it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


# ---------------------------------------------------------------------------------------------------------------------
# Changed values.


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def laughing():
    """A list of few lists, written out 10^27 values."""
    value = ["ha"]
    for _ in range(27):
        value = [value] * 10
    return value


def looped():
    value = []
    value.append(value)
    return value


PLAIN_JUNK = (
    None, True, False, 0, -1, 1, 2, 9, 1.5, -1e-300, 1e308, float("nan"), float("inf"), 10**30, 10**400, "", "x", "4",
    "a\nb", "\x1b[31m", "\0", "\ud800", "long " * 50_000, [], {}, (), [[]], [None], [4, 2], ["4"], {"a": 1}, {1: 2},
    {None: {}}, {"a": {"a": []}}, {"weight": 1, "act": None}, (1, 2), b"bytes", nested(30), nested(300), laughing(),
    looped(), list(range(1000)))


def changed_value(rng, value, junk=PLAIN_JUNK):
    """A deep copy of dicts and lists with one to three entries exchanged, taken out, renamed or taken from elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        containers = list(_containers(value))
        if not containers:
            break
        # entries near the top are as likely as the many further down
        depth = rng.choice(sorted({depth for depth, _ in containers}))
        container = rng.choice([inner for at, inner in containers if at == depth])
        key = rng.choice(list(container)) if isinstance(container, dict) else rng.randrange(len(container))
        _change_entry(rng, container, key, junk, [inner for _, inner in containers])
    return value


def _containers(value, depth=0, known=None):
    """(depth, container) of every dict and list in a value that is not empty, each once."""
    known = set() if known is None else known
    if isinstance(value, (dict, list)) and value and id(value) not in known and depth < 10:
        known.add(id(value))
        yield depth, value
        for inner in value.values() if isinstance(value, dict) else value[:20]:
            yield from _containers(inner, depth + 1, known)


def _change_entry(rng, container, key, junk, others):
    kind = rng.random()
    if kind < 0.6:
        container[key] = near(rng, container[key]) if rng.random() < 0.2 else copy.deepcopy(rng.choice(junk))
    elif kind < 0.75:
        del container[key]
    elif kind < 0.9 and isinstance(container, dict):
        new = rng.choice(["x", "", f"module.{key}", f"{key}x", 3, None, (1,), "\ud800", "a\nb", "1", 1.5])
        container[new] = container[key] if rng.random() < 0.5 else container.pop(key)
    else:
        container[key] = rng.choice(others)


def near(rng, value):
    """Something of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice([-value, value + 1, value * 1000, value * 1e-30, type(value)(0)])
    if isinstance(value, str):
        return rng.choice([value.upper(), value + "x", value[:-1], f"module.{value}", value * 2])
    if isinstance(value, list):
        return rng.choice([value[::-1], value + value, value[:1], value[1:]])
    return value


def can_be_pickled(value):
    with contextlib.suppress(RecursionError, pickle.PicklingError):
        pickle.dumps(value)
        return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Changed YAML.

YAML_SNIPPETS = (
    "!!python/object/apply:os.system ['touch canary']", "!!python/name:os.system",
    "!!python/object/new:os.system [touch canary]", "&a [*a]", "&a {b: *a}", "*unknown", "&a x",
    "[&b [x, x], &c [*b, *b], &d [*c, *c], *d]", "{<<: {a: 1}, a: 2}", "{<<: 3}", "{<<: [{a: 1}, 2]}", "[" * 900,
    "{a: " * 900, "- " * 900, "[" * 3000 + "]" * 3000, "9" * 5000, "-" + "9" * 400, "0x" + "f" * 9999, "1:" * 300 + "1",
    "1e400", "1e-400", ".nan", ".inf", "-.inf", "~", "!!int ''", "!!int x", "!!float ''", "!!float x", "!!bool x",
    "!!timestamp x", "!!null x", "!!binary x", "!!binary eA==", "!!set {a, b}", "!!omap [a: 1, b: 2]",
    "!!pairs [a: 1, a: 2]", "!!str 3", "!!map 3", "!!seq {a: 1}", "!x y", "2001-01-01", "2001-99-99",
    "0001-01-01T00:00:00+23:59", "9999-12-31 23:59:59 -23:59", "'", '"', '"\\ud800"', '"\\0"', '"\\x1b[31m"', '"a\\nb"',
    "|\n  a\n  b", "? [a]\n: b", "{[a]: b}", "{? {a: b} : c}", "a: b: c", "\0", "\t", "\x07", "%YAML 9.9", "--- {}",
    "...", "---\na: 1\n---\nb: 2", "#", ", ,", "true", "yes", "-1", "0", "3", "1e3", "x" * 70_000, "{a: 1, a: 2}", "[]",
    "{}", "[[], []]", "[4, 2]", "{a: {b: {c: 1}}}", "0o17", "017", "1_000", "+1", "@", "`x`", "%x", "!", "&", "*")
MERGE_BOMB = "m0: &m0 {a: 1, b: 2}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 40))
INVALID_TEXT = (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xfe\xff\0a", b"\0")


def changed_yaml(rng, text):
    """The bytes of a YAML file with a value, a key or a line exchanged, added or doubled, or with changed bytes."""
    kind, lines = rng.random(), text.splitlines()
    if kind < 0.2:
        return changed_bytes(rng, text.encode())
    if kind < 0.25:
        position = rng.randrange(len(text) + 1)
        return text[:position].encode() + rng.choice(INVALID_TEXT) + text[position:].encode()
    if kind < 0.28:
        return (MERGE_BOMB + text).encode()
    number, snippet = rng.randrange(len(lines)), rng.choice(YAML_SNIPPETS)
    key, colon, rest = lines[number].partition(":")
    lines[number] = rng.choice([f"{key}{colon} {snippet}", f"{key}{colon} {snippet}", f"{key}{colon} [{snippet}]",
                                f"{key}{colon} {{{snippet}: 1}}", f"{snippet}{colon}{rest}", f"  {lines[number]}",
                                f"{lines[number]}\n{lines[number]}", f"{lines[number]}\nadded: {snippet}", snippet])
    return "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")
