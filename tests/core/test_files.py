import pytest

from jaxrec.core.files import replacing, write_whole


def test_a_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "values.json"
    write_whole(path, "old é")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text(encoding="utf-8") == "old é"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "values.json"
    write_whole(path, "old")
    with pytest.raises(RuntimeError, match="half"), replacing(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half of it")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
