"""What log lines look like: text or JSON, one line each, to stderr.

Tracebacks name types and places only: the text of an exception may quote what people said.
"""

import json
import logging
import time
import traceback
from contextvars import ContextVar
from types import TracebackType

# The request that is being served, or whose answer is being read: each line written meanwhile names it.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class _Formatter(logging.Formatter):
    def formatException(  # noqa: N802 -- logging's name
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        kind, _, tb = ei
        places = (f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(tb))
        return f"{kind.__name__ if kind else ''}: {' > '.join(places)}"

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        fields: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        extra = {"request_id": request_id.get(), **vars(record)}
        fields |= {name: value for name, value in extra.items() if name not in _STANDARD and value is not None}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return fields


class TextFormatter(_Formatter):
    """`2026-01-31T12:00:00.000Z info request route=/api/chat status=200 ...`"""

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        words = [str(fields.pop("time")), str(fields.pop("level")), str(fields.pop("message"))]
        del fields["logger"]
        words += [f"{name}={value}" for name, value in fields.items()]
        return " ".join(words).replace("\r", "\\r").replace("\n", "\\n")


class JSONFormatter(_Formatter):
    """One JSON object a line, with the same fields."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.fields(record), ensure_ascii=False, default=str)


def configure(level: str, format: str) -> None:
    """Set up logging for the process: ours at `level`, the libraries' from warnings on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=max(logging.WARNING, logging.getLevelName(level.upper())), handlers=[handler], force=True)
    logging.getLogger("chatproxy").setLevel(level.upper())
    logging.captureWarnings(True)
