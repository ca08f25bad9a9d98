"""Commands that serve: serve, serve-key."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from focus_core.cli._shared import Adapter, Base, ChunkSize, Device, app, note, open_engine
from focus_core.errors import ConfigError

Store = Annotated[Path | None, typer.Option("--store", help="Folder of the named memories. [default: the user's]")]


@app.command()
def serve(
    store: Store = None,
    base: Base = None,
    adapter: Adapter = None,
    chunk_size: ChunkSize = None,
    device: Device = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    keys: Annotated[Path | None, typer.Option(help="File of API keys, made by `focusllm serve-key`.")] = None,
    model: Annotated[str | None, typer.Option(help="Id of the model for clients. [default: the base's name]")] = None,
    origin: Annotated[list[str] | None, typer.Option(help="Web origin that may call; may be repeated.")] = None,
    running: Annotated[int, typer.Option(help="Answers made at the same time.")] = 16,
    waiting: Annotated[int, typer.Option(help="Answers that may wait; one more gets 429.")] = 64,
    seconds: Annotated[float, typer.Option(help="Most seconds of an answer.")] = 600.0,
    grace: Annotated[float, typer.Option(help="Seconds that a shutdown waits for running answers.")] = 30.0,
) -> None:
    """Serve named memories over HTTP: OpenAI's and Anthropic's interfaces, and a page at /."""
    try:
        import uvicorn

        from focus_core.server.app import create_app
    except ImportError as error:
        raise ConfigError(f"serving needs the server extra ({error}); pip install 'focusllm[server]'") from error
    from focus_core.server.settings import ServerSettings
    from focus_core.store.places import own_store

    class Server(uvicorn.Server):
        """Says where it listens when it does."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for address in [one.getsockname() for server in self.servers for one in server.sockets][:1]:
                shown = f"[{address[0]}]" if ":" in address[0] else address[0]
                note.print(f"memories in {settings.store}; http://{shown}:{address[1]}/", markup=False)

    settings = ServerSettings(
        store=store or own_store(),
        host=host,
        port=port,
        keys=keys,
        model=model,
        origins=tuple(origin or ()),
        running=running,
        waiting=waiting,
        seconds=seconds,
        grace=grace,
    )
    engine = open_engine(base, adapter, chunk_size, device)
    config = uvicorn.Config(
        create_app(engine, settings),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(settings.grace) + 5,
        server_header=False,
    )
    Server(config).run()


@app.command("serve-key")
def serve_key(
    name: Annotated[str, typer.Argument(help="Names the key.")],
    keys: Annotated[Path, typer.Option(help="File of API keys; made if absent.")],
    tenant: Annotated[str, typer.Option(help="Whose memories the key sees.")] = "",
    scope: Annotated[list[str] | None, typer.Option(help="read, write or admin; may be repeated.")] = None,
) -> None:
    """Make an API key; it is printed once, the file keeps its hash."""
    from focus_core.server.access import add_key

    print(add_key(keys, name, tenant, scope or ["read"]))
