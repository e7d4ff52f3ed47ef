"""The entry: what it refuses before it listens, and where the state is kept."""

import argparse

import pytest

from jaxrec import serve
from jaxrec.serving.sqlite_store import SqliteStore


def test_others_cannot_reach_a_server_without_a_token(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(serve.TOKEN_VARIABLE, raising=False)
    assert serve.main([f"--model={tmp_path}", "--host=0.0.0.0"]) == 2
    assert "--host=0.0.0.0 can be reached by others: set a token" in capsys.readouterr().err
    given = serve.parse_arguments([f"--model={tmp_path}", "--host=0.0.0.0"])
    assert serve.limits_of(given, "secret").token == "secret"
    assert serve.is_loopback("127.0.0.1") and serve.is_loopback("::1")
    assert not serve.is_loopback("0.0.0.0")


def test_without_a_token_the_server_is_called_by_names_of_this_machine():
    given = serve.parse_arguments(["--model=m", "--host=::1", "--host-name=Recs.example"])
    assert serve.limits_of(given, "").hosts == ("localhost", "127.0.0.1", "[::1]", "[::1]", "recs.example")
    assert serve.limits_of(given, "secret").hosts == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tls-key=k.pem"], "--tls-certificate and --tls-key belong together"),
        (["--graph=g.csv"], "--graph and --needs belong together"),
        (["--graph=nowhere.csv", "--needs=sequel_of"], "the graph nowhere.csv cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_told(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert serve.main([f"--model={tmp_path}", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--requests-per-second=-1", "--watch-seconds=0", "--deadline-ms=0"])
def test_numbers_have_bounds(option, capsys):
    with pytest.raises(SystemExit):
        serve.parse_arguments(["--model=m", option])
    assert "must be" in capsys.readouterr().err


def test_a_directory_without_a_version_is_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert serve.main([f"--model={tmp_path}"]) == 2
    assert "holds no exported version" in capsys.readouterr().err


def test_shares_are_read_strictly():
    assert serve.share("v1=0.9") == ("v1", 0.9)
    for text in ("v1", "v1=", "=1", "v1=0", "v1=nan", "v1=inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="say VERSION=SHARE"):
            serve.share(text)


def test_the_state_is_a_file_unless_it_is_a_url(tmp_path):
    store = serve.open_store(str(tmp_path / "state.db"))
    assert isinstance(store, SqliteStore)
    store.close()
    with pytest.raises(ConnectionError):
        serve.open_store(f"unix://{tmp_path}/nobody.sock")
