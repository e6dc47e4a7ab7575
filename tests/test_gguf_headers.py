"""A GGUF header is read as the gguf package reads it, and a damaged one is refused in a sentence."""

import struct

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import CorruptShard, InputError, UnsupportedFormat
from pipeline.gguf_headers import TYPES, read_gguf_header
from tests.gguf_models import tiny_llama_gguf

U32, STRING, ARRAY = 4, 8, 9
KINDS = ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ2_XS", "BF16", "F16")


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def tensor(name, dims, kind, offset):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCHITECTURE = entry("general.architecture", STRING, text("llama"))


def gguf(entries=(ARCHITECTURE,), tensors=(), data=b"", *, version=3, counts=None):
    """A file of these metadata entries, tensors and data."""
    tensor_count, entry_count = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, entry_count) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", kinds=KINDS)


def test_the_table_of_types_is_the_gguf_packages():
    assert {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()} == TYPES


def test_tensors_and_metadata_are_those_that_the_gguf_package_finds(model):
    theirs, ours = GGUFReader(model), read_gguf_header(model)
    assert list(ours.tensors) == [found.name for found in theirs.tensors]
    for found in theirs.tensors:
        info = ours.tensors[found.name]
        assert (info.dtype, info.start) == (found.tensor_type.name, found.data_offset)
        assert (info.shape, info.end - info.start) == (tuple(found.shape.tolist())[::-1], found.n_bytes)
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
        if field.types[0] == ARRAY:
            assert ours.lengths[key] == len(field.contents())
        else:
            assert ours.metadata[key] == field.contents()


def test_every_type_of_value_and_both_versions_are_read(tmp_path):
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    values = {
        "uint8": 200, "int8": -3, "uint16": 60000, "int16": -9, "uint32": 2**32 - 1, "int32": -1, "uint64": 2**63,
        "int64": -(2**40),
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)  # noqa: FBT003 - gguf's own signature
    writer.add_array("floats", [0.5] * 7)
    writer.add_tensor("w", np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for version in (2, 3):
        raw = bytearray(path.read_bytes())
        raw[4:8] = struct.pack("<I", version)
        path.write_bytes(raw)
        header = read_gguf_header(path)
        assert {key: header.metadata[key] for key in values} == values
        assert [header.metadata[key] for key in ("f32", "f64", "yes")] == [0.5, 0.1, True]
        assert header.lengths == {"floats": 7}
        assert header.tensors["w"].shape == (2, 3)


MALFORMED = {
    "an empty file": (b"", "does not begin as a GGUF file"),
    "a pickle": (b"PK\3\4" + bytes(100), "does not begin as a GGUF file"),
    "cut in its fixed part": (b"GGUF\3\0\0\0", "does not begin as a GGUF file"),
    "2^60 entries": (gguf(counts=(0, 2**60)), "1152921504606846976 metadata entries"),
    "2^60 tensors": (gguf(counts=(2**60, 1)), "1152921504606846976 tensors"),
    "a string of 2^63": (gguf([struct.pack("<Q", 2**63)] * 3), "a string of 9223372036854775808 bytes"),
    "100 MB claimed": (gguf([entry("a", STRING, struct.pack("<Q", 100_000_000))]), "a string of 100000000 bytes"),
    "an array of 2^60 numbers": (gguf([entry("a", ARRAY, struct.pack("<IQ", U32, 2**60))]), "an array of 1152921504"),
    "an array of 2^60 strings": (gguf([entry("a", ARRAY, struct.pack("<IQ", STRING, 2**60))]), "an array of 1152921"),
    "strings that end outside": (
        gguf([entry("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + struct.pack("<Q", 2**62))]),
        "an array of 2 strings",
    ),
    "arrays in arrays": (
        gguf([entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(40))]),
        "array of unknown type 9",
    ),
    "an unknown value": (gguf([entry("a", 77, bytes(40))]), "unknown value type 77"),
    "a key twice": (gguf([ARCHITECTURE, ARCHITECTURE]), "'general.architecture' twice"),
    "no UTF-8": (gguf([entry(b"\xff\xfe", U32, bytes(4))], data=bytes(64)), "is no UTF-8"),
    "alignment 0": (gguf([entry("general.alignment", U32, struct.pack("<I", 0))]), "alignment of 0 bytes"),
    "alignment 24": (gguf([entry("general.alignment", U32, struct.pack("<I", 24))]), "alignment of 24 bytes"),
    "alignment of text": (gguf([entry("general.alignment", STRING, text("32"))]), "alignment of '32' bytes"),
    "a tensor twice": (gguf(tensors=[tensor("a", [8], 0, 0), tensor("a", [8], 0, 32)], data=bytes(64)), "'a' twice"),
    "five dimensions": (gguf(tensors=[tensor("a", [1] * 5, 0, 0)], data=bytes(64)), "5 dimensions"),
    "2^32 dimensions": (gguf(tensors=[text("a") + struct.pack("<I", 2**32 - 1)], data=bytes(64)), "4294967295 dimens"),
    "a retired type": (gguf(tensors=[tensor("a", [32], 4, 0)], data=bytes(64)), "ggml type 4, which is unknown"),
    "half a block": (gguf(tensors=[tensor("a", [48], 2, 0)], data=bytes(64)), "no multiple of the 32"),
    "a huge tensor": (gguf(tensors=[tensor("a", [2**40, 2**40], 0, 0)], data=bytes(64)), "but the file has"),
    "an offset outside": (gguf(tensors=[tensor("a", [8], 0, 2**60)], data=bytes(64)), "but the file has"),
    "overlapping tensors": (
        gguf(tensors=[tensor("a", [16], 0, 0), tensor("b", [8], 0, 32)], data=bytes(96)),
        "'b' starts at byte",
    ),
    "a gap": (gguf(tensors=[tensor("a", [8], 0, 0), tensor("b", [8], 0, 64)], data=bytes(96)), "'b' starts at byte"),
    "an odd offset": (gguf(tensors=[tensor("a", [8], 0, 5)], data=bytes(96)), "'a' starts at byte"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_damaged_file_is_refused_in_a_sentence(name, tmp_path):
    raw, said = MALFORMED[name]
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(CorruptShard, match=said) as caught:
        read_gguf_header(tmp_path / "m.gguf")
    assert str(caught.value).startswith("m.gguf: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (gguf(version=1), "GGUF version 1"),
        (gguf(version=4), "GGUF version 4"),
    ],
)
def test_another_byte_order_or_version_is_refused_by_name(raw, said, tmp_path):
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(UnsupportedFormat, match=said):
        read_gguf_header(tmp_path / "m.gguf")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_file_cut_short_or_changed_anywhere_is_read_or_refused_and_never_crashes(model, tmp_path_factory, data):
    raw = bytearray(model.read_bytes())
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    end = read_gguf_header(model).tables + 2000
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(raw) - 1))
        path.write_bytes(raw[:cut])
        with pytest.raises(CorruptShard):
            read_gguf_header(path)
        return
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        read_gguf_header(path)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017 - any other exception fails the test
