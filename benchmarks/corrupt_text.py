"""JSON and TOML made wrong: other types and values, missing and strange names, endless nesting."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from random import Random
from typing import Any

from corruption import Corruption

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400,
    0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "0", "int8", "fp32", "bf16", "../../../../etc/passwd", "/", ".", "\0", "a\nb\nc\nd\ne",
    "\x1b[31m[red]", "\ud800", "x" * 5000, "{}", "9" * 5000,
    [], {}, [[]], [None], [0, 0], [1e308] * 3, [2**40, 2**40], ["a", 1], {"": None},
    {"a": {"b": []}},
)  # fmt: skip
"""What somebody's program may write where something else was meant."""

_DEPTH = (50, 500, 5_000, 100_000)
_HUGE_INTEGER = "9" * 5000
_TOML_VALUES = (
    "-1", "0", "9" * 30, _HUGE_INTEGER, "nan", "inf", "-inf", "1e999", "true", '""', '"\\u0000"',
    '"a\\nb\\nc\\nd"', '"../../../etc/passwd"', "[]", "{}", '["sm86"]', "[[1], [2]]", "1979-05-27",
    '"' + "x" * 5000 + '"', '"\\u001b[31m[red]"', "{ a = { b = 1 } }", '"fp8"', '"A9"',
)  # fmt: skip


def strange_value(random: Random) -> Any:
    """A value of JSON's types, or NaN or a lone surrogate, which JSON does not have."""
    return random.choice(_VALUES)


def changed(content: Any, random: Random, times: int = 1) -> Any:
    """A copy in which nodes have another value, another name, or are gone."""
    content = json.loads(json.dumps(content))
    for _ in range(times):
        places = list(_places(content))
        if not places:
            return strange_value(random)
        container, key = random.choice(places)
        how = random.random()
        if how < 0.6:
            container[key] = strange_value(random)
        elif how < 0.8:
            del container[key]
        elif isinstance(container, dict):
            name = random.choice(("", "unknown", "\ud800", "a\nb", key.upper(), " " + key))
            container[name] = container[key] if random.random() < 0.5 else strange_value(random)
        else:
            container.insert(random.randrange(len(container) + 1), strange_value(random))
    return content


def _places(content: Any) -> Any:
    """Every (container, key) in ``content``."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(items):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


def json_changed(data: bytes, random: Random) -> bytes:
    """Nodes of the document replaced, renamed or removed."""
    content = changed(json.loads(data), random, random.choice((1, 1, 1, 2, 5)))
    text = json.dumps(content, ensure_ascii=random.random() < 0.7)
    return text.encode("utf-8", "surrogatepass")


def json_replaced(data: bytes, random: Random) -> bytes:
    """Another document: a bare value, or one in another encoding."""
    encodings = ("utf-8-sig", "utf-16", "utf-32", "latin-1")
    if random.random() < 0.4:
        return data.decode().encode(random.choice(encodings))
    return json.dumps(strange_value(random)).encode("utf-8", "surrogatepass")


def json_nested(data: bytes, random: Random) -> bytes:
    """One value is a list in a list in a list, or an integer without end."""
    depth = random.choice(_DEPTH)
    opening, closing = random.choice(((b"[", b"]"), (b'{"a":', b"}")))
    bottomless = opening * depth + b"1" + (closing * depth if random.random() < 0.7 else b"")
    deep = random.choice((bottomless, bottomless, _HUGE_INTEGER.encode()))
    if random.random() < 0.2:
        return deep
    values = list(re.finditer(rb":\s*(\"[^\"]*\"|[-\d.eE+]+|true|false|null)", data))
    if not values:
        return deep
    found = random.choice(values)
    return data[: found.start(1)] + deep + data[found.end(1) :]


def toml_changed(data: bytes, random: Random) -> bytes:
    """One value is another, or one key has another name."""
    text = data.decode()
    keys = list(re.finditer(r"(?m)^([\w.]+)(\s*=\s*)(.+)$", text))
    found = random.choice(keys)
    if random.random() < 0.7:
        value = random.choice(_TOML_VALUES)
        return (text[: found.start(3)] + value + text[found.end(3) :]).encode()
    name = random.choice(("unknown", '""', "out", "a.b.c", found[1].upper(), '"a\\nb"', "model"))
    return (text[: found.start(1)] + name + text[found.end(1) :]).encode()


def toml_nested(data: bytes, random: Random) -> bytes:
    """Arrays, tables or dotted keys without end; a line twice."""
    depth = random.choice(_DEPTH)
    deep = random.choice(
        (
            "a = " + "[" * depth + "]" * depth,
            "a = " + "{a=" * depth + "1" + "}" * depth,
            ".".join(["a"] * min(depth, 5_000)) + " = 1",
            "[" + ".".join(["a"] * min(depth, 5_000)) + "]",
        )
    )
    lines = data.decode().splitlines()
    at = random.randrange(len(lines) + 1)
    added = lines[at - 1] if random.random() < 0.2 and lines else deep
    return "\n".join([*lines[:at], added, *lines[at:]]).encode()


def cache_changed(data: bytes, random: Random) -> bytes:
    """A line of TensorRT's calibration cache with another number, twice, or without a name."""
    lines = data.decode().splitlines()
    at = random.randrange(len(lines))
    name = lines[at].partition(":")[0]
    lines[at] = random.choice(
        (
            f"{name}: 00000000", f"{name}: 7fc00000", f"{name}: ffffffff", f"{name}: {'f' * 4000}",
            f"{name}: zz", ": 3c000000", name, f"{lines[at]}\n{lines[at]}", "", "\0" * 100,
            "x" * 100_000 + ": 3c000000",
        )
    )  # fmt: skip
    return "\n".join(lines).encode()


JSON: Mapping[str, Corruption] = {
    "values changed": json_changed,
    "document replaced": json_replaced,
    "nested without end": json_nested,
}
TOML: Mapping[str, Corruption] = {
    "values changed": toml_changed,
    "nested without end": toml_nested,
}
CACHE: Mapping[str, Corruption] = {"lines changed": cache_changed}
