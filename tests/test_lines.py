"""Files that grow line by line keep every whole line, whatever happened to the others."""

import json

from medblip import lines


def write(path, num_records=5):
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, num_records + 1)))
    return path.read_bytes().splitlines(keepends=True)


def steps(path):
    return [record["step"] for record in lines.read_records(path)]


def test_a_last_line_that_a_kill_has_torn_is_left_out(tmp_path, caplog):
    written = write(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(written)[:-4])
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4] and not caplog.text


def test_a_damaged_line_is_named_and_no_other_is_lost(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    for damaged in (b'{"step" 2}\n', b'{"\xf3tep": 2}\n'):
        written = write(path)
        path.write_bytes(b"".join([written[0], damaged, *written[2:]]))
        caplog.clear()
        lines.cut_back(path, 4)
        assert f"{path}: line 2 is damaged" in caplog.text
        assert steps(path) == [1, 3, 4]
