"""The application for any ASGI server: `uvicorn chatproxy.asgi:app`, and the like of granian, hypercorn and gunicorn.

The environment is read when the lifespan starts, not when this module is imported. Draining with a told end, the write
timeout and the bounds on request heads are promises of our own server, `python -m chatproxy`.
"""

from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from chatproxy import logs
from chatproxy.app import create_app
from chatproxy.config import SettingsError
from chatproxy.config.environment import load_environment


class LazyApp:
    """Becomes the application once its lifespan starts."""

    def __init__(self) -> None:
        self._app: ASGIApp | None = None
        self._middleware: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def add_middleware(self, middleware: Any, *args: Any, **kwargs: Any) -> None:
        """Put an ASGI middleware around the application, as Starlette's method of that name does."""
        self._middleware.append((middleware, args, kwargs))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the lifespan. Wrong settings are reported as a failed start."""
        if scope["type"] == "lifespan":
            problems = self._start()
            if problems is not None:
                await receive()
                # Outside of any `except`: hypercorn's `send` raises, and would show our exception as the cause.
                await send({"type": "lifespan.startup.failed", "message": problems})
                return
        if self._app is None:
            raise RuntimeError("chatproxy needs an ASGI server that runs the lifespan")
        await self._app(scope, receive, send)

    def _start(self) -> str | None:
        """Read the environment and make the application; gives what is wrong with the settings, a line for each."""
        try:
            settings = load_environment()
        except SettingsError as error:
            return str(error)
        logs.configure(settings.log_level, settings.log_format)
        app = create_app(settings)
        for middleware, args, kwargs in self._middleware:
            app.add_middleware(middleware, *args, **kwargs)
        self._app = app
        return None


app = LazyApp()
