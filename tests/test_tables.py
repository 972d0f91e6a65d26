import datetime

import openpyxl
import pytest

from sharding.tables import BadCell, TablesFolder, find_table, read_table


def table(folder, content, name="T.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def only_row(folder, content, **options):
    (row,) = read_table(table(folder, content), **options)
    return row


@pytest.mark.parametrize(
    "name", ["DXSUM.csv", "DXSUM_21Aug2025.csv", "dxsum_2025-08-21.csv", "DXSUM_01-Jun-2018.csv", "DXSUM (1).csv"]
)
def test_a_table_is_found_with_the_date_that_archives_append(tmp_path, name):
    (tmp_path / "deep").mkdir()
    path = table(tmp_path / "deep", "RID\n1\n", name)
    for stranger in ("X_DXSUM.csv", "DXSUM2.csv", "DXSUM_notes.csv", "DXSUM.txt"):
        table(tmp_path, "RID\n1\n", stranger)
    assert find_table(TablesFolder(tmp_path), ["DXSUM"]) == path


def test_the_first_stem_that_is_there_wins_and_two_copies_are_refused(tmp_path):
    old = table(tmp_path, "RID\n", "DXSUM_PDXCONV.csv")
    assert find_table(TablesFolder(tmp_path), ["DXSUM", "DXSUM_PDXCONV"]) == old
    table(tmp_path, "RID\n", "DXSUM_01Jan2024.csv")
    new = table(tmp_path, "RID\n", "DXSUM_01Jan2025.csv")
    with pytest.raises(ValueError, match=f"2 tables are named DXSUM.*{new.name}"):
        find_table(TablesFolder(tmp_path), ["DXSUM"])
    with pytest.raises(ValueError, match="no table named MMSE or All_Subjects_MMSE"):
        find_table(TablesFolder(tmp_path), ["MMSE", "All_Subjects_MMSE"])
    assert find_table(TablesFolder(tmp_path), ["MMSE"], required=False) is None


def test_a_byte_order_mark_blank_lines_and_short_lines_are_read(tmp_path):
    path = table(tmp_path, b"\xef\xbb\xbfID , A\n1,x\n\n , \n2\n")
    rows = list(read_table(path, needed=["ID", "A"]))
    assert [(row["ID"], row["A"], row.line) for row in rows] == [("1", "x", 2), ("2", "", 5)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"ID;A\n1;2\n", "columns must be separated by ','"),
        (b"ID\tA\n1\t2\n", "columns must be separated by ','"),
        (b"Id,A\n1,2\n", r"no column 'ID' \(is it 'Id'\?\)"),
        (b"ID,A,A\n1,2,3\n", "column 'A' appears twice"),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_name(tmp_path, content, words):
    with pytest.raises(ValueError, match=f"T.csv: .*{words}"):
        list(read_table(table(tmp_path, content), needed=["ID", "A"]))


def test_other_spellings_of_a_column_are_accepted(tmp_path):
    row = only_row(tmp_path, "Gender,ID\nM,1\n", needed=["ID", "sex"], names={"sex": ("M/F", "Gender")})
    assert row["sex"] == "M" and "sex" in row


def test_codes_are_one_whatever_their_spelling_and_unknown_ones_are_named(tmp_path):
    row = only_row(tmp_path, "A,B,C,D,E\n3,3.0,-4,-4.0,7\n")
    meanings = {"1": "CN", "3": "AD"}
    assert row.code("A", meanings) == row.code("B", meanings) == "AD"
    assert row.code("C", meanings, missing=["-4"]) is row.code("D", meanings, missing=["-4"]) is None
    with pytest.raises(BadCell, match=r"T\.csv row 2, column 'E': '7' is not one of 1, 3"):
        row.code("E", meanings)
    with pytest.raises(BadCell, match="'-4'"):
        row.code("C", meanings)


@pytest.mark.parametrize("value", ["31", "-1", "nan", "inf", "x", "28.5"])
def test_numbers_out_of_their_range_are_named(tmp_path, value):
    row = only_row(tmp_path, f"ID,MMSE\n1,{value}\n")
    with pytest.raises(BadCell, match=rf"row 2, column 'MMSE': '{value}' is not a whole number within 0\.\.30"):
        row.number("MMSE", 0, 30, whole=True)


def test_missing_codes_are_missing_in_their_own_column_only(tmp_path):
    row = only_row(tmp_path, "ID,AGE,MMSE\n1,88,88\n")
    assert row.number("AGE", 18, 110) == 88
    assert row.number("MMSE", 0, 30, missing=["88"]) is None


def test_dates_are_read_in_the_tables_order_or_not_at_all(tmp_path):
    row = only_row(tmp_path, "ID,A,B,C,D\n1,02/13/2011,13/02/2011,2011-02-13,\n")
    assert row.date("A", ["%m/%d/%Y"]) == row.date("C", ["%m/%d/%Y", "%Y-%m-%d"]) == datetime.date(2011, 2, 13)
    assert row.date("D", ["%Y-%m-%d"]) is None
    with pytest.raises(BadCell, match="column 'B': '13/02/2011' is not a date like %m/%d/%Y"):
        row.date("B", ["%m/%d/%Y"])


def test_a_date_that_two_orders_read_differently_is_refused(tmp_path):
    row = only_row(tmp_path, "ID,A\n1,02/03/2011\n")
    with pytest.raises(BadCell, match="column 'A'"):
        row.date("A", ["%m/%d/%Y", "%d/%m/%Y"])


def test_bytes_that_are_not_utf8_matter_only_where_they_are_used(tmp_path):
    row = only_row(tmp_path, b"ID,NOTE,A\n1,caf\xe9,2\n")
    assert row.number("A", 0, 9) == 2
    with pytest.raises(BadCell, match="row 2, column 'NOTE'.*save the table as UTF-8"):
        row.text("NOTE")


def test_a_comma_too_many_spoils_its_line_only(tmp_path):
    path = table(tmp_path, "ID,NOTE,A\n1,well, thanks,2\n2,fine,3\n3,fine,4,,\n")
    first, *others = read_table(path)
    with pytest.raises(BadCell, match="row 2: 1 cells more than the header"):
        first.number("A", 0, 9)
    assert [row.number("A", 0, 9) for row in others] == [3, 4]


def test_a_spreadsheet_is_read_as_its_text(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["ID", "Age", "CDR"])
    book.active.append(["OAS1_0001_MR1", 74, 0.5])
    book.active.append(["OAS1_0002_MR1", 55, None])
    book.save(tmp_path / "t.xlsx")
    rows = list(read_table(tmp_path / "t.xlsx", needed=["ID", "Age", "CDR"]))
    assert [(row["ID"], row.number("Age", 0, 120), row.number("CDR", 0, 3)) for row in rows] == [
        ("OAS1_0001_MR1", 74, 0.5),
        ("OAS1_0002_MR1", 55, None),
    ]
