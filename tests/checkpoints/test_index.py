import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from diffract.checkpoints.dtypes import DTYPE_NAMES, TORCH_DTYPES
from diffract.checkpoints.header import FLOATS, HEADER_LIMIT, ITEMSIZES, TensorInfo, encode_header, read_header
from diffract.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def parse(raw: bytes) -> dict[str, TensorInfo]:
    return read_header(lambda offset, length: raw[offset : offset + length], len(raw), "x").infos


def build(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_agrees_with_safetensors_on_every_dtype(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    raw = file.read_bytes()
    found = parse(raw)
    reference = dict(safetensors.deserialize(raw))
    assert set(found) == set(reference) == set(tensors)
    for name, info in found.items():
        expected = reference[name]
        assert (info.dtype, list(info.shape)) == (expected["dtype"], expected["shape"])
        assert raw[info.offset : info.offset + info.size_bytes] == bytes(expected["data"])


def test_sizes_are_those_of_torch() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == ITEMSIZES
    assert len(DTYPE_NAMES) == len(TORCH_DTYPES), "one name each"
    assert set(FLOATS) < set(ITEMSIZES)


def test_tensors_come_in_file_order(file: Path) -> None:
    offsets = [info.offset for info in parse(file.read_bytes()).values()]
    assert offsets == sorted(offsets)


def test_metadata_is_returned_and_is_no_tensor() -> None:
    raw = save({"w": torch.ones(2)}, {"format": "pt"})
    header = read_header(lambda o, n: raw[o : o + n], len(raw), "x")
    assert header.metadata == {"format": "pt"}
    assert list(header.infos) == ["w"]


LIES = {
    "no bytes": (b"", "too few"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "too few"),
    "header longer than the file": (build({"w": F32})[:20], "truncated"),
    "header over its limit": ((HEADER_LIMIT + 1).to_bytes(8, "little") + b"{}", "more than the limit"),
    "length of 2^64 - 1": (b"\xff" * 8 + b"{}", "more than the limit"),
    "no JSON": (build(b"not json"), "no UTF-8 JSON"),
    "no UTF-8": (build(b'{"\xff": 1}'), "no UTF-8 JSON"),
    "a byte order mark": (build("﻿{}".encode()), "no UTF-8 JSON"),
    "nested too deeply": (build(b"[" * 200_000), "no UTF-8 JSON"),
    "a list": (build(b"[]"), "header is a list"),
    "a name twice": (build(b'{"w": 1, "w": 2}'), "'w' is there twice"),
    "NaN": (build(b'{"w": NaN}'), "'NaN' is no count"),
    "a number of many digits": (build(b'{"w": ' + b"9" * 9000 + b"}"), "no count or offset"),
    "metadata that is no text": (build({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata that is a list": (build({"__metadata__": []}), "__metadata__"),
    "a tensor that is a number": (build({"w": 3}), "expected a dtype"),
    "no dtype": (build({"w": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"), "expected a dtype"),
    "one offset": (build({"w": F32 | {"data_offsets": [0]}}), "expected a dtype"),
    "a name that is no text": (build(b'{"\\ud800": ' + json.dumps(F32).encode() + b"}"), "expected a dtype"),
    "unknown dtype": (build({"w": F32 | {"dtype": "F128"}}, b"\0" * 16), "unknown dtype 'F128'"),
    "dtype that is a list": (build({"w": F32 | {"dtype": []}}, b"\0" * 16), "unknown dtype"),
    "negative extent": (build({"w": F32 | {"shape": [-2, -2]}}, b"\0" * 16), "no count or offset"),
    "minus zero": (build(b'{"w": {"dtype": "U8", "shape": [-0], "data_offsets": [0, 0]}}'), "no count"),
    "fractional extent": (build({"w": F32 | {"shape": [2.0, 2]}}, b"\0" * 16), "not the whole"),
    "extent that is true": (build({"w": F32 | {"shape": [True, 4]}}, b"\0" * 16), "not the whole"),
    "shape that is an object": (
        build({"w": F32 | {"shape": {}, "data_offsets": [0, 4]}}, b"1234"),
        "not the",
    ),
    "shape that is text": (build({"w": F32 | {"shape": "22"}}, b"\0" * 16), "not the whole"),
    "more entries than memory": (build({"w": F32 | {"shape": [2**62, 2**62]}}), "not the whole"),
    "too many dimensions": (build({"w": F32 | {"shape": [1] * 65}}), "not the whole"),
    "offsets that do not fit the shape": (
        build({"w": F32 | {"data_offsets": [0, 12]}}, b"\0" * 12),
        "needs 16",
    ),
    "offsets that run backwards": (build({"w": F32 | {"data_offsets": [16, 0]}}, b"\0" * 16), "needs 16"),
    "tensor past the end": (build({"w": F32}, b"\0" * 15), "truncated"),
    "bytes after the last tensor": (build({"w": F32}, b"\0" * 17), "1 bytes follow"),
    "tensors that overlap": (build({"a": F32, "b": F32}, b"\0" * 16), "'a' and 'b' overlap"),
    "a gap": (
        build({"a": F32, "b": F32 | {"data_offsets": [20, 36]}}, b"\0" * 36),
        "leave a gap",
    ),
    "a gap before the first": (build({"w": F32 | {"data_offsets": [4, 20]}}, b"\0" * 20), "leave a gap"),
}


@pytest.mark.parametrize("case", LIES)
def test_refuses(case: str) -> None:
    raw, message = LIES[case]
    with pytest.raises(CheckpointError, match="x") as caught:
        parse(raw)
    text = str(caught.value)
    assert message in text
    assert len(text) < 1000, "a message must stay readable whatever the header holds"


@pytest.mark.parametrize("case", [case for case in LIES if case != "a name twice"])
def test_what_is_refused_is_refused_by_safetensors_too(case: str) -> None:
    """A name twice is the one thing it lets pass: it takes the last one."""
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(LIES[case][0])


def test_does_not_read_a_header_that_is_too_long() -> None:
    asked = []

    def fetch(offset: int, length: int) -> bytes:
        asked.append(length)
        return (HEADER_LIMIT + 1).to_bytes(8, "little")

    with pytest.raises(CheckpointError, match="limit"):
        read_header(fetch, HEADER_LIMIT * 2, "x")
    assert asked == [8]


def test_messages_cannot_steer_a_terminal() -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(build({"\x1b[31m\n": F32 | {"dtype": "\x1b]0;"}}))
    assert str(caught.value).isprintable()


def test_an_empty_header_is_no_error_of_the_file() -> None:
    assert parse(build({})) == {}
    assert parse(build(b'{"__metadata__": null}')) == {}


def test_empty_tensors_may_lie_between_others() -> None:
    hole = {"dtype": "F32", "shape": [0, 9], "data_offsets": [16, 16]}
    raw = build({"hole": hole, "w": F32, "v": F32 | {"data_offsets": [16, 32]}}, b"\0" * 32)
    assert list(parse(raw)) == ["w", "hole", "v"]
    assert len(safetensors.deserialize(raw)) == 3


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    )
)
@settings(max_examples=100, deadline=None)
def test_what_is_encoded_is_what_is_read(held: dict[str, tuple[str, list[int]]]) -> None:
    infos = [TensorInfo(name, tuple(shape), dtype) for name, (dtype, shape) in held.items()]
    raw = encode_header(infos)
    assert len(raw) % 8 == 0
    raw += b"\0" * sum(info.size_bytes for info in infos)
    seen = {name: (info.dtype, list(info.shape)) for name, info in parse(raw).items()}
    assert seen == held
    reference = {name: (held["dtype"], held["shape"]) for name, held in safetensors.deserialize(raw)}
    assert reference == held


VALID = {
    "a": F32,
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [22, 23]},
    "__metadata__": {"format": "pt"},
}
ODD = st.sampled_from([-1, 0, 1, 2, 3, 15, 16, 22, 23, 2**63, 2**64, 1.0, None, True, "2", "F16", "I8", [], {}])


@st.composite
def broken_files(draw: st.DrawFn) -> bytes:
    """A valid file with values of its header replaced, then bytes of it replaced, removed or put in."""
    header = json.loads(json.dumps(VALID))
    for _ in range(draw(st.integers(0, 2))):
        entry = header[draw(st.sampled_from("abc"))]
        key = draw(st.sampled_from(sorted(entry)))
        if isinstance(entry[key], list) and entry[key] and draw(st.booleans()):
            entry[key][draw(st.integers(0, len(entry[key]) - 1))] = draw(ODD)
        else:
            entry[key] = draw(ODD)
    text = bytearray(json.dumps(header).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(text) - 1))
        text[at : at + draw(st.integers(0, 3))] = draw(st.sampled_from([b"", b" ", b"0", b"9", b'"', b"]", b"-"]))
    length = max(0, len(text) + draw(st.sampled_from([0] * 9 + [-1, 1, 8])))
    return length.to_bytes(8, "little") + bytes(text) + b"\0" * (23 + draw(st.sampled_from([0] * 9 + [-1, 1])))


@given(broken_files())
@settings(max_examples=1500, deadline=None)
def test_what_safetensors_refuses_is_refused(raw: bytes) -> None:
    try:
        reference = dict(safetensors.deserialize(raw))
    except safetensors.SafetensorError:
        with pytest.raises(CheckpointError):
            parse(raw)
        return
    try:
        found = parse(raw)
    except CheckpointError:
        return  # to be stricter is no danger; that valid files are read is for the tests above to show
    assert {name: (info.dtype, list(info.shape)) for name, info in found.items()} == {
        name: (held["dtype"], held["shape"]) for name, held in reference.items()
    }
