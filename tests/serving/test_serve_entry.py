"""The entry: what it refuses before it listens, and where the state is kept."""

import argparse
import asyncio
import socket
import sys

import pytest
import uvicorn

from jaxrec import serve
from jaxrec.export.item_index import INDEX_FILE, ItemIndex
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
        (["--share=v1=1", "--shadow=v1"], "--shadow=v1 is never heard, and has a --share"),
        (["--state="], "the state . cannot be opened: unable to open database file; name an SQLite file"),
        (["--state=text"], "the state text cannot be opened: file is not a database; name an SQLite file"),
        (["--graph=nowhere.csv", "--needs=sequel_of"], "the graph nowhere.csv cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_told(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no database " * 100)
    assert serve.main([f"--model={tmp_path}", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        "--requests-per-second=-1",
        "--watch-seconds=0",
        "--watch-seconds=inf",
        "--deadline-ms=0",
        "--port=99999",
    ],
)
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


def test_a_missing_library_is_told_with_its_extra(tmp_path, capsys, monkeypatch):
    (tmp_path / INDEX_FILE).write_bytes(b"index")
    monkeypatch.setitem(sys.modules, "faiss", None)

    async def loads(*_):
        ItemIndex.read(tmp_path, {})

    monkeypatch.setattr(serve, "serve", loads)
    assert serve.main(["--model=m"]) == 2
    assert f"the index of {tmp_path} needs faiss: pip install 'jaxrec[index]'" in capsys.readouterr().err


def test_ctrl_c_ends_it_without_a_traceback(monkeypatch):
    async def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "serve", interrupted)
    assert serve.main(["--model=m"]) == 130


async def no_application(scope, receive, send):
    """Answers nothing."""


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_it_says_where_it_answers_when_it_listens(host, address, capsys):
    config = uvicorn.Config(no_application, host=host, lifespan="off", log_config=None)

    async def main():
        with socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ) as busy:
            config.port = busy.getsockname()[1]
            with pytest.raises(OSError, match=f"--port={config.port}; choose another port"):
                await serve.Server(config, "v1").serve()
        assert capsys.readouterr().out == ""
        server = serve.Server(config, "v1")
        server.should_exit = True
        await server.serve()
        assert capsys.readouterr().out == f"version v1 answers at http://{address}:{config.port}/\n"

    asyncio.run(main())
