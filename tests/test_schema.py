"""The tables: what is written is what is read, and nothing else gets in."""

import multiprocessing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sweep import schema
from sweep.schema import SCHEMA_VERSION, TABLES, SchemaError


def example_row(name: str, number: int = 0) -> dict[str, Any]:
    """A row whose every value is its own, by table, column and number."""
    values: dict[str, Any] = {}
    for place, column in enumerate(TABLES[name].columns):
        distinct = 1000 * number + place
        values[column.name] = {
            schema.TEXT: f"{column.name} {number}",
            schema.INT: distinct,
            schema.FLOAT: distinct + 0.5,
            schema.BOOL: distinct % 2 == 0,
        }[column.type]
    return values


@pytest.fixture(params=TABLES)
def name(request) -> str:
    return request.param


def test_rows_come_back_as_they_were_written(name, tmp_path):
    rows = [example_row(name, number) for number in range(3)]
    schema.write(name, schema.build(name, rows), tmp_path)
    assert schema.read(name, tmp_path).to_pylist() == rows
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.parquet"]


def test_what_was_not_measured_is_null_and_stays_null(name, tmp_path):
    table = TABLES[name]
    required = {column.name for column in table.columns if column.key and not column.optional}
    row = {key: value if key in required else None for key, value in example_row(name).items()}
    schema.write(name, schema.build(name, [row]), tmp_path)
    assert schema.read(name, tmp_path).to_pylist() == [row]


def test_a_table_without_rows_still_has_its_columns(name, tmp_path):
    schema.write(name, schema.build(name, []), tmp_path)
    read = schema.read(name, tmp_path)
    assert read.num_rows == 0
    assert tuple(read.column_names) == TABLES[name].names


def test_units_meanings_keys_and_version_are_in_the_file(name, tmp_path):
    schema.write(name, schema.build(name, [example_row(name)]), tmp_path)
    found = pq.read_schema(tmp_path / f"{name}.parquet")
    assert found.metadata[b"sweep_schema_version"] == str(SCHEMA_VERSION).encode()
    assert found.metadata[b"sweep_table"] == name.encode()
    for column in TABLES[name].columns:
        said = found.field(column.name).metadata
        assert said[b"unit"].decode() == (column.unit or "")
        assert said[b"meaning"].decode() == column.meaning
        assert said[b"key"] == (b"true" if column.key else b"false")


def test_an_unknown_or_a_missing_column_is_refused(name):
    row = example_row(name)
    with pytest.raises(SchemaError, match=rf"table '{name}' has unknown columns \['wrong'\], lacks \[\]"):
        schema.build(name, [row | {"wrong": 1}])
    last = TABLES[name].names[-1]
    with pytest.raises(SchemaError, match=rf"table '{name}' has unknown columns \[\], lacks \['{last}'\]"):
        schema.build(name, [row, {key: value for key, value in row.items() if key != last}])


def test_a_key_that_is_null_or_given_twice_is_refused(name):
    row = example_row(name)
    for column in TABLES[name].columns:
        if column.key and not column.optional:
            with pytest.raises(SchemaError, match=f"table '{name}' has an empty key column '{column.name}'"):
                schema.build(name, [row | {column.name: None}])
    with pytest.raises(SchemaError, match=f"table '{name}' repeats a key: 1 rows"):
        schema.build(name, [row, row])


def test_every_key_column_tells_rows_apart(name):
    row, other = example_row(name), example_row(name, 1)
    for key in TABLES[name].keys:
        assert schema.build(name, [row, row | {key: other[key]}]).num_rows == 2


def test_a_value_of_the_wrong_type_is_refused_in_every_column(name):
    row = example_row(name)
    for column in TABLES[name].columns:
        wrong = 1 if column.type == schema.TEXT else "text"
        with pytest.raises(SchemaError, match=f"table '{name}' has a value of the wrong type"):
            schema.build(name, [row | {column.name: wrong}])


def test_half_a_number_is_no_count():
    with pytest.raises(SchemaError, match="wrong type"):
        schema.build("steps", [example_row("steps") | {"step": 1.5}])


def test_optional_keys_may_be_null_and_still_tell_rows_apart():
    row = example_row("checkpoint_measures")
    table = schema.build("checkpoint_measures", [row, row | {"layer": None}, row | {"layer": None, "text": None}])
    assert table.num_rows == 3


def test_every_column_says_what_it_is():
    for table in TABLES.values():
        assert table.row and table.keys
        assert len(set(table.names)) == len(table.names)
        for column in table.columns:
            assert column.meaning
            assert column.unit or not column.name.endswith(("_seconds", "_nats", "_gib", "_tokens")), column.name


def test_a_table_of_other_columns_is_not_written(tmp_path):
    with pytest.raises(SchemaError, match="table 'steps' has the columns"):
        schema.write("steps", schema.build("items", []), tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- files that are not to be trusted


def rebuild_hint(folder: Path) -> str:
    return f"rebuild the tables with: python -m sweep collect {folder.parent}"


@pytest.mark.parametrize("version", ["0", "999", None])
def test_another_schema_version_is_refused_with_the_way_to_rebuild(tmp_path, version):
    folder = tmp_path / "tables"
    path = schema.write("steps", schema.build("steps", [example_row("steps")]), folder)
    metadata = {} if version is None else {"sweep_schema_version": version}
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    with pytest.raises(SchemaError) as refused:
        schema.read("steps", folder)
    said = f"{path} has schema version {version or '?'}, this code reads {SCHEMA_VERSION}; "
    assert str(refused.value) == said + rebuild_hint(folder)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all, but longer than a footer"])
def test_a_file_that_is_no_parquet_is_refused_with_the_way_to_rebuild(tmp_path, content):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "steps.parquet").write_bytes(content)
    with pytest.raises(SchemaError, match="is not a readable Parquet file") as refused:
        schema.read("steps", tmp_path / "tables")
    assert rebuild_hint(tmp_path / "tables") in str(refused.value)


def test_half_a_file_is_refused(tmp_path):
    path = schema.write("steps", schema.build("steps", [example_row("steps", i) for i in range(500)]), tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SchemaError, match="is not a readable Parquet file"):
        schema.read("steps", tmp_path)


def test_a_table_that_is_not_there_is_refused_with_the_way_to_rebuild(tmp_path):
    with pytest.raises(SchemaError, match="no table 'steps' in"):
        schema.read("steps", tmp_path)


def write_again_and_again(folder: Path, stop: Any) -> None:
    sizes = [schema.build("steps", [example_row("steps", i) for i in range(n)]) for n in (10, 2000)]
    while not stop.is_set():
        for table in sizes:
            schema.write("steps", table, folder)


def test_a_reader_never_sees_half_a_file(tmp_path):
    schema.write("steps", schema.build("steps", [example_row("steps", i) for i in range(10)]), tmp_path)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    writer = context.Process(target=write_again_and_again, args=(tmp_path, stop))
    writer.start()
    try:
        seen = set()
        for _ in range(20_000):
            seen.add(schema.read("steps", tmp_path).num_rows)
            if seen == {10, 2000}:
                break
        for _ in range(200):
            seen.add(schema.read("steps", tmp_path).num_rows)
    finally:
        stop.set()
        writer.join()
    assert seen == {10, 2000}


def test_the_arrow_types_are_plain_ones():
    assert {column.type for table in TABLES.values() for column in table.columns} == {
        pa.string(),
        pa.int64(),
        pa.float64(),
        pa.bool_(),
    }
