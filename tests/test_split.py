"""A row's part is a matter of the row alone."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.rows import read_rows
from pipeline.sections import Data
from pipeline.split import part_of, point

PARTS = ("train", "validation", "held_out")
TEXTS = st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=30)
SHARES = st.sampled_from([0.0, 0.1, 0.3, 0.5])


def parts(path, lines, **shares):
    """Part → what its rows say, in order; a part without rows is empty."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {}
    for part in PARTS:
        try:
            found[part] = [row.text for row in read_rows(Data(path=str(path), part=part, **shares))]
        except DataError as error:
            assert "none of its" in str(error)  # noqa: PT017 - an empty part is one of the outcomes
            found[part] = []
    return found


@given(TEXTS, TEXTS, SHARES, SHARES, st.randoms())
def test_a_row_stays_in_its_part_when_others_come_go_or_change_places(
    tmp_path_factory, texts, others, held_out, validation, random
):
    path = tmp_path_factory.mktemp("split") / "a.jsonl"
    alone = parts(path, [{"text": text} for text in texts], held_out=held_out, validation=validation)
    assert sorted(itertools.chain(*alone.values())) == sorted(texts)
    mixed = [{"text": text} for text in texts + others]
    random.shuffle(mixed)
    together = parts(path, mixed, held_out=held_out, validation=validation)
    for part in PARTS:
        assert set(alone[part]) <= set(together[part])
        assert all(set(together[part]).isdisjoint(together[other]) for other in PARTS if other != part)


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), SHARES, SHARES)
def test_the_parts_lie_in_order_on_the_unit_interval(content, held_out, validation):
    at = point(content)
    assert 0 <= at < 1
    expected = "held_out" if at < held_out else "validation" if at < held_out + validation else "train"
    assert part_of(content, Data(path="", held_out=held_out, validation=validation)) == expected


def test_each_part_has_about_its_share(tmp_path):
    found = parts(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(4000)], held_out=0.1, validation=0.2)
    # Four standard deviations of a share p of 4,000 rows: 4 * sqrt(p (1 - p) / 4000).
    assert abs(len(found["held_out"]) / 4000 - 0.1) < 0.02
    assert abs(len(found["validation"]) / 4000 - 0.2) < 0.026


def test_a_larger_share_keeps_what_a_smaller_one_held_out(tmp_path):
    lines = [{"text": str(i)} for i in range(200)]
    few, many = (parts(tmp_path / "a.jsonl", lines, held_out=share)["held_out"] for share in (0.1, 0.3))
    assert few
    assert set(few) < set(many)


def test_where_a_row_stands_and_what_lies_beside_it_in_the_row_do_not_move_it(tmp_path):
    lines = [{"text": f"row {i}", "label": i} for i in range(40)]
    numbered = [{"id": i, **line} for i, line in enumerate(lines)]
    table = "label,text\n" + "".join(f"{line['label']},{line['text']}\n" for line in lines)
    plain = parts(tmp_path / "a.jsonl", lines, held_out=0.3)
    assert parts(tmp_path / "b.jsonl", numbered, held_out=0.3) == plain
    (tmp_path / "a.csv").write_text(table)
    cells = [row.text for row in read_rows(Data(path=str(tmp_path / "a.csv"), held_out=0.3, part="held_out"))]
    assert cells == plain["held_out"]


def test_documents_are_split_file_by_file(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(f"document {i}")
    found = {
        part: [r.text for r in read_rows(Data(path=str(tmp_path), held_out=0.3, part=part))]
        for part in ("train", "held_out")
    }
    assert found["held_out"]
    assert sorted(itertools.chain(*found.values())) == sorted(f"document {i}" for i in range(20))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"held_out": 0.01, "part": "held_out"},
            r"none of its 3 rows belongs to the part held_out, whose share is 0.01;",
        ),
        ({"part": "validation"}, r"none of its 3 rows belongs to the part validation, whose share is 0;"),
        ({"held_out": 0.5, "validation": 0.5}, r"none of its 3 rows belongs to the part train, whose share is 0;"),
    ],
)
def test_a_part_without_rows_is_refused_with_its_share_and_the_number_of_rows(tmp_path, options, said):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(3)))
    with pytest.raises(DataError, match=said):
        list(read_rows(Data(path=str(tmp_path / "a.jsonl"), **options)))
